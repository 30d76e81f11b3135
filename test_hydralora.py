# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""A correctness oracle for HydraLoRA, then the tests of this project.

The oracle tests any function (x, W0, bias, A, B, Wg, scaling) -> y that computes

    y = W0 x + bias + scaling * sum_i w_i B_i A x,    w = softmax(Wg x),

with x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k), y (..., d):

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle -x

Without HYDRALORA_IMPL, it tests `hydralora_layer`. HYDRALORA_DEVICE sets the device, by
default a GPU if there is one. W0 and bias need not get a gradient (frozen base). Second
derivatives are not tested.

Read `reference`, GROUPS, `tolerance`, `forward`, CASES and test_oracle_*. Select with
-k "oracle and 3d and half": values (no gradients) or gradients; 1d to 5d, the number of axes of
x; a case, group or test by name. A new case, layout or test needs a row in WRONG: an
implementation that it must catch.
"""
import collections
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import runpy
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hydralora
from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, export_lora, from_official_state_dict,
    hook_gates, hydralora_layers, hydralora_state_dict, inject_hydralora,
    load_hydralora_state_dict, mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
if unknown := SETTINGS.keys() - {"HYDRALORA_IMPL", "HYDRALORA_DEVICE"}:
    raise ValueError(f"unknown setting {unknown}")
DEVICE = SETTINGS.get("HYDRALORA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATION = None  # then hydralora_layer, defined below
if "HYDRALORA_IMPL" in SETTINGS:
    IMPLEMENTATION = pkgutil.resolve_name(SETTINGS["HYDRALORA_IMPL"])
parametrize = pytest.mark.parametrize


# ---- The equations, twice ----
def reference(x, W0, bias, A, B, Wg, scaling, grad_y):
    """Eqs. 3 and 4, and their derivatives by hand: y, and the gradients of sum(grad_y * y)."""
    n, d, r = B.shape
    y = np.zeros(x.shape[:-1] + (d,))
    inputs = dict(x=x, W0=W0, bias=bias, A=A, B=B, Wg=Wg)
    grads = {name: np.zeros_like(v) for name, v in inputs.items()}
    for token in np.ndindex(x.shape[:-1]):
        v, g = x[token], grad_y[token]       # (k,), (d,)
        e = np.exp(Wg @ v - np.max(Wg @ v))  # (n,)
        w = e / e.sum()                      # (n,) Eq. 4
        z = A @ v                            # (r,)
        y[token] = W0 @ v + bias             # (d,) Eq. 3
        for i in range(n):
            y[token] += scaling * w[i] * (B[i] @ z)
        score = np.zeros(n)  # d loss / d w_i
        for i in range(n):
            back = B[i].T @ g  # (r,)
            score[i] = scaling * (back @ z)
            grads["B"][i] += scaling * w[i] * np.outer(g, z)
            grads["A"] += scaling * w[i] * np.outer(back, v)
            grads["x"][token] += scaling * w[i] * (A.T @ back)
        for i in range(n):
            slope = w[i] * (score[i] - w @ score)  # through the softmax
            grads["Wg"][i] += slope * v
            grads["x"][token] += slope * Wg[i]
        grads["W0"] += np.outer(g, v)
        grads["bias"] += g
        grads["x"][token] += W0.T @ g
    return y, grads


def loop(x, W0, bias, A, B, Wg, scaling):
    """Eq. 3 in torch: it shows how much a dtype rounds, and is faster than `reference`."""
    y, x = F.linear(x, W0, bias), x.to(A.dtype)         # (..., d), (..., k)
    w, z = F.linear(x, Wg).softmax(-1), F.linear(x, A)  # (..., n), (..., r)
    for i in range(len(B)):
        y = y + (w[..., i, None] * F.linear(z, B[i]) * scaling).to(y.dtype)
    return y


# ---- Cases and their tensors ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TENSORS = (*INPUTS, "grad_y")
ADAPTER = ("x", "A", "B", "Wg")  # what requires a gradient if the base is frozen
LAYER = INPUTS[1:]  # what differs between layers

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
GROUPS = {  # dtype of x and y; of W0 and bias; of A, B and Wg; and autocast's
    "float64": (f64, f64, f64, None),
    "float32": (f32, f32, f32, None),  # not TF32, whose errors are about 5e-4
    "bfloat16": (bf16, bf16, bf16, None),
    "half": (f16, f16, f16, None),
    "mixed": (bf16, bf16, f32, None),  # A, B and Wg may be cast to 16 bits
    "mixfp16": (f16, f16, f32, None),
    "autocast": (f32, f32, f32, bf16),  # y in 16 bits or float32, here and below
    "autofp16": (f32, f32, f32, f16),
    "automix": (bf16, bf16, f32, bf16),
    "autonorm": (f32, bf16, f32, bf16),  # x as from a LayerNorm
}


@dataclass(frozen=True)
class Case:
    """Dtypes, shapes, magnitudes, memory layouts, and what requires a gradient."""
    group: str = ""
    name: str = ""
    lead: tuple = (2, 5)  # axes of x before k: () is one token, (5,) a sequence
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    input_scale: float = 1.0  # x is larger by this, and W0 and Wg are smaller
    Wg_scale: float = 1.0
    B_scale: float = 1.0
    grad_scale: float = 1.0  # of grad_y
    mean: float = 0.0  # of x and grad_y; sums over tokens grow with it
    requires_grad: tuple = field(default=INPUTS, compare=False)  # changes no number
    layout: str = "contiguous"
    in_layout: tuple = TENSORS  # those with enough axes are in this layout
    seed: int = 0
    resampled: tuple = ()  # tensors drawn with the next seed

    def __repr__(self):
        changed = {name: v for name, v in vars(self).items() if v != getattr(Case, name)}
        return f"Case({', '.join(f'{name}={v!r}' for name, v in changed.items())})"

    @property
    def dtypes(self):
        x, base, adapter, autocast = GROUPS[self.group]
        return dict(x=x, W0=base, bias=base, A=adapter, B=adapter, Wg=adapter, grad_y=autocast or x)


@functools.cache
def arrays(c):
    """The tensors of a case as NumPy arrays in float64, the same in each group and run."""
    if c.group:
        return arrays(replace(c, group="", name=""))
    weight, drawn = c.k**-0.5, {}
    sizes = dict(  # standard deviation and shape
        x=(c.input_scale, (*c.lead, c.k)), W0=(weight / c.input_scale, (c.d, c.k)),
        bias=(1.0, (c.d,)), A=(weight, (c.r, c.k)), B=(c.B_scale * c.r**-0.5, (c.n, c.d, c.r)),
        Wg=(c.Wg_scale * weight / c.input_scale, (c.n, c.k)),
        grad_y=(c.grad_scale, (*c.lead, c.d)))
    for i, (name, (std, shape)) in enumerate(sizes.items()):
        rng = np.random.default_rng([c.seed + (name in c.resampled), i])
        mean = c.mean if name in ("x", "grad_y") else 0.0
        drawn[name] = std * (rng.normal(size=shape) + mean)
    return drawn


def tensors(case, names=TENSORS):
    """Fresh copies of the tensors of a case."""
    made = {}
    axes, lay_out = (LAYOUTS | EXPANDED)[case.layout]
    for name in names:
        t = torch.tensor(arrays(case)[name], device=DEVICE, dtype=case.dtypes[name])
        if name in case.in_layout and t.dim() >= axes:
            t = lay_out(t)
        made[name] = nn.Parameter(t) if name in case.requires_grad else t
    return made if case.bias else made | {"bias": None}


def as_float64(found):
    """Copies on the CPU, so that later changes in place do not show."""
    return {name: t.detach().to("cpu", f64, copy=True) for name, t in found.items()
            if t is not None}


@functools.cache
def expected(case):
    """y and its gradients in float64, computed from the rounded tensors."""
    inputs = {"bias": torch.zeros(case.d, dtype=f64)} | as_float64(tensors(case))
    if math.prod(case.lead) * case.n > 64 or case.d * case.r > 1e4:  # NumPy is slow
        return by_autograd(**inputs, scaling=case.scaling)
    arguments = {name: t.numpy() for name, t in inputs.items()}
    y, grads = reference(**arguments, scaling=case.scaling)
    return {"y": torch.tensor(y)} | {f"{name}.grad": torch.tensor(g) for name, g in grads.items()}


def by_autograd(grad_y, scaling, **inputs):
    """y and the gradients of sum(grad_y * y) again, by autograd."""
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = loop(**leaves, scaling=scaling)
    y.backward(grad_y)
    return {"y": y.detach()} | {f"{name}.grad": t.grad for name, t in leaves.items()}


# ---- Tolerances ----
@functools.cache
def tolerance(case):
    """The largest allowed errors: 1e-10 in float64, else 5e-5 plus the larger of 9 times the
    plain loop's error and 6 eps (3 eps for y). So in bfloat16, a sum over 4096 tokens may be
    rounded after each of 32 chunks, but not after each of 256."""
    if case.group == "float64":
        return dict.fromkeys(expected(case), 1e-10)
    all_cast = dict(mixed="bfloat16", mixfp16="half").get(case.group, case.group)
    rounded = as_float64(compute(loop, replace(case, group=all_cast, requires_grad=INPUTS)))
    eps = torch.finfo(case.dtypes["grad_y"]).eps
    return {name: max(9 * error_of(name, t, case), (3 if name == "y" else 6) * eps) + 5e-5
            for name, t in rounded.items()}


def error_of(name, found, case):
    """The norm of the difference in the worst row (one token) or column, relative to an average
    row or column of what is right, or to its usual size if larger."""
    right, heads = expected(case)[name], case.B_scale or 1.0
    usual = {"x.grad": max(1.0, case.Wg_scale), "A.grad": heads, "Wg.grad": heads}.get(name, 1.0)
    if name != "y":
        usual *= case.grad_scale
    squares = torch.atleast_2d(found - right).flatten(0, -2).square()  # (rows, columns)
    if not squares.numel():
        return 0.0
    rows, columns = squares.shape
    worst = torch.stack([squares.sum(1).max() * rows, squares.sum(0).max() * columns])
    return worst.nan_to_num(math.inf).max().item()**0.5 / max(right.norm().item(), usual)


def assert_correct(found, case, moment=""):
    """Fails with what is wrong, where and by how much, and which known mistake it matches."""
    __tracebackhide__ = True
    found, allowed = as_float64(found), tolerance(case)
    errors = {name: error_of(name, t, case) for name, t in found.items()}
    wrong = [name for name in found if errors[name] > allowed[name]]
    if not wrong:
        return
    worst = "y" if "y" in wrong else max(wrong, key=lambda name: errors[name] / allowed[name])
    how = "wrong" if found[worst].any() else "zero or missing"
    correct = ", ".join(name for name in found if name not in wrong) or "nothing"
    message = (f"{moment}{worst} is {how}{where(worst, found[worst], case)}: "
               f"error {errors[worst]:.2g}, tolerance {allowed[worst]:.2g}\n"
               f"wrong: {', '.join(wrong)}; correct: {correct}\n{case}")
    known = {text: None for text, caught_by, steps, *_ in WRONG
             if isinstance(caught_by, str) and matches(steps, found, case)}
    if len(known) in (1, 2, 3) and errors[worst] > 2 * allowed[worst]:
        message += f"\nmatches a known mistake: {' or '.join(known)}"
    raise AssertionError(message)


def where(name, found, case):
    """Which rows are wrong, unless all are."""
    right = expected(case)[name]
    off = (found - right).norm(dim=-1)
    wrong = torch.argwhere(~(off <= tolerance(case)[name] * right.norm() / off.numel()**0.5))
    if not 0 < len(wrong) < off.numel():
        return ""
    return f" in {len(wrong)} of {off.numel()} rows, first {wrong[0].tolist()}"


def matches(steps, found, case):
    """Whether the layer with these steps gives what was found, nan and inf included."""
    mode, allowed = torch.enable_grad if len(found) > 1 else torch.no_grad, tolerance(case)
    try:
        given = as_float64(compute(mutant(**steps), case, mode))
    except Exception:  # it does not run on this case
        return False
    return all(torch.allclose(found[name], t, allowed[name], allowed[name], equal_nan=True)
               for name, t in given.items() if name in found)


# ---- One call ----
def global_state():
    return {"the grad mode": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
            "the default dtype": torch.get_default_dtype(),
            "float32's precision": torch.get_float32_matmul_precision()}


def call_kernel(function, arguments, case, moment):
    """Fails if the function raises, skips or exits, or changes the global state."""
    __tracebackhide__ = True
    before = global_state()
    try:
        returned = function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        *_, line = [frame for frame in traceback.extract_tb(error.__traceback__)
                    if "_pytest" not in frame.filename
                    and not frame.filename.startswith(torch.__path__[0])]
        test = re.search(r"oracle_(\w+)|$", os.environ.get("PYTEST_CURRENT_TEST", ""))[1]
        raise AssertionError(
            f"{moment} raised {type(error).__name__}: {error}\n"
            f"at {line.filename}:{line.lineno}: {line.line}\n{case}\nleave it out with "
            f"-k 'oracle and not {case.group}' or -k 'oracle and not {case.name or test}'"
        ) from None
    after = global_state()
    torch.set_num_threads(before["threads"])  # for later calls
    changed = [f"{name} to {after[name]}" for name in after if after[name] != before[name]]
    assert not changed, f"{moment} has changed {', '.join(changed)}; {case}"
    return returned


def assert_unchanged(call, moment):
    __tracebackhide__ = True
    for name, value in call.before.items():
        now = call.inputs[name].detach()
        same = torch.equal(now.nan_to_num(), value.nan_to_num())
        assert same, f"{moment} has changed {name} in place; {call.case}"


def forward(function, case, mode=torch.enable_grad, inputs=None):
    """Calls the function and checks what must hold for every y."""
    __tracebackhide__ = True
    inputs, cast, before = inputs or tensors(case), GROUPS[case.group][3], {}
    for name, t in inputs.items():
        if t is not None:
            t.grad, before[name] = None, t.detach().clone()
    required = [name for name in before if mode is torch.enable_grad and inputs[name].requires_grad]
    arguments = (*(inputs[name] for name in INPUTS), case.scaling)
    with torch.autocast(torch.device(DEVICE).type, cast or bf16, bool(cast)), mode():
        y = call_kernel(function, arguments, case, "the call")
    assert isinstance(y, torch.Tensor), f"expected a tensor, got a {type(y).__name__}; {case}"
    shape, dtype = (*case.lead, case.d), case.dtypes["grad_y"]
    assert y.shape == shape, f"wrong shape: expected {shape}, got {tuple(y.shape)}; {case}"
    assert y.dtype in (dtype, f32 if cast else dtype), (
        f"wrong dtype: expected {dtype}, got {y.dtype}; {case}")
    assert required or not y.requires_grad, f"y requires a gradient, but no input does; {case}"
    assert y.requires_grad or {*required} <= {"W0", "bias"}, (
        f"y has no gradient, but {', '.join(required)} require one: no backward (-k 'oracle and "
        f"values')? Copied weights (see hydralora_layer)? A reentrant checkpoint? {case}")
    assert mode is torch.inference_mode or not y.is_inference(), f"y is an inference tensor; {case}"
    call = SimpleNamespace(case=case, inputs=inputs, before=before, required=required, y=y,
                           grad_y=inputs["grad_y"].to(y.dtype))
    assert_unchanged(call, "the call")
    return call


def gradients(call):
    """The required gradients: 0 for a missing one of x, A, B or Wg."""
    grads = {name: call.inputs[name].grad for name in call.required}
    return {f"{name}.grad": torch.zeros_like(call.inputs[name]) if g is None else g
            for name, g in grads.items() if g is not None or name in ADAPTER}


def backward(call):
    """y and the required gradients."""
    __tracebackhide__ = True
    if call.y.requires_grad:
        call_kernel(call.y.backward, (call.grad_y,), call.case, "the backward")
        assert_unchanged(call, "the backward")
    return {"y": call.y} | gradients(call)


def compute(function, case, mode=torch.enable_grad, inputs=None):
    __tracebackhide__ = True
    return backward(forward(function, case, mode, inputs))


# ---- Memory layouts ----
def swapped(t, a, b):
    return t.transpose(a, b).contiguous().transpose(a, b)


GAP = 9999.0  # not nan, as PyTorch may multiply gaps by 0
LAYOUTS = {  # for tensors of at least so many axes: the same values in another layout
    "contiguous": (0, torch.Tensor.contiguous),
    "columns": (2, lambda t: swapped(t, -2, -1)),  # matrices by column
    "rows": (1, lambda t: F.pad(t, (0, 8), value=GAP)[..., :-8]),
    "second": (1, lambda t: F.pad(t[..., None], (0, 1), value=GAP).flatten(-2)[..., ::2]),
    "offset": (1, lambda t: F.pad(t.flatten(), (1, 0), value=GAP)[1:].view(t.shape)),
    "swapped": (3, lambda t: swapped(t, 0, 1)),  # x from (t, b, k)
    "gaps": (3, lambda t: F.pad(t, (0, 0, 0, 1), value=GAP)[..., :-1, :]),
    "inner": (4, lambda t: swapped(t, -3, -2)),  # x from (b, heads, t, k)
}
EXPANDED = {  # for x and grad_y; these change the values
    "number": (1, lambda t: t.flatten()[0].expand(t.shape)),
    "padding": (2, lambda t: torch.cat([0 * t[:1], t[1:]])),
}


# ---- Cases ----
ALIGNED = dict(k=64, d=64, r=16, n=8)  # optimised code often has a path for it
CASES = {
    "plain": Case(),
    "vector": Case(lead=(), scaling=2.0**-10),
    "empty-batch": Case(lead=(0, 5), **ALIGNED),
    "only-head": Case(k=320, d=256, r=16, n=1),  # LoRA
    "last-tokens": Case(lead=(99, 1), **ALIGNED, layout="gaps", in_layout=("x",)),
    "thousands": Case(lead=(512, 8), k=64, d=64, r=8, n=3, mean=1.0),
    "grid-limit": Case(lead=(65540,), k=3, d=2, r=1, n=2, requires_grad=ADAPTER),
    "heads-at-zero": Case(lead=(2, 30), k=3, d=10, bias=False, B_scale=0.0),  # at the start
    "near-zero": Case(B_scale=2e-4),  # soon after the start
    "token-at-zero": Case(layout="padding", in_layout=("x",)),
    "steep": Case(n=70, Wg_scale=1000.0),
    "large-all": Case(input_scale=2.0**17, grad_scale=2.0**16),
    "decode-long": Case(lead=(1, 1), k=28673, d=80, r=32, n=2, requires_grad=ADAPTER),
    "decode-wide": Case(lead=(1, 1), k=80, d=9001, r=32, n=8, requires_grad=ADAPTER),
    "both-wide": Case(lead=(3,), k=1100, d=1050, r=8, n=2, requires_grad=ADAPTER),
    **{f"layout-{layout}": Case(lead=(2, 3, 4) if axes > 3 else (3, 4), **ALIGNED, layout=layout)
       for layout, (axes, _) in LAYOUTS.items()},
    "layout-number": Case(lead=(3, 4), **ALIGNED, layout="number", in_layout=("x", "grad_y")),
}
FEW, TILES, ODD = range(1, 17), (64, 128, 192), range(65, 576, 2)
RANDOM = {  # k, d, r, n and tokens, drawn for each group like everything else
    "drawn-tiles": (TILES, TILES, (16, 32, 64), (4, 8, 16), (64, 128)),
    "drawn-odd-tokens": (TILES, TILES, FEW, FEW, ODD),
    "drawn-odd-d": (TILES, ODD, FEW, FEW, FEW),
    "drawn-odd-k": (ODD, TILES, FEW, FEW, FEW),
    "drawn-large-r": (FEW, FEW, range(129, 257), FEW, FEW),
}
FOUR_GROUPS = ("float32", "bfloat16", "mixed", "autocast")
IN_FOUR_GROUPS = (  # the numbers do not fit float16, or the tensors are large
    "large-all", "decode-long", "decode-wide", "both-wide")


def draw_case(kind, group):
    rng = np.random.default_rng([list(RANDOM).index(kind), list(GROUPS).index(group)])

    def one_of(*values):
        return values[rng.integers(len(values))]

    k, d, r, n, tokens = (one_of(*sizes) for sizes in RANDOM[kind])
    lead = (one_of(1, 2, 3), one_of(1, 2, 3), one_of(1, 2, 3), tokens)[one_of(0, 1, 2, 3):]
    share = one_of(0, 0.6, 0.9)  # of the tensors that are not contiguous
    return Case(
        group, kind, lead, k, d, r, n, bias=bool(rng.random() < 0.7), seed=int(rng.integers(99)),
        scaling=one_of(1.0, 2.0, 0.5, rng.normal()), layout=one_of(*LAYOUTS),
        in_layout=tuple(name for name in TENSORS if rng.random() < share),
        requires_grad=one_of(INPUTS, ADAPTER, ADAPTER, (one_of(*INPUTS),)))


ALL_CASES = {
    (name, group): draw_case(name, group) if name in RANDOM else
    replace(CASES[name], group=group, name=name)
    for group in GROUPS for name in CASES | RANDOM
    if group in FOUR_GROUPS or name not in IN_FOUR_GROUPS}
MODES = {"values": torch.no_grad, "inference-values": torch.inference_mode,
         "gradients": torch.enable_grad}


# ---- The tests of an implementation ----
@pytest.fixture
def implementation():
    """In one thread, as the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield IMPLEMENTATION or hydralora_layer
    torch.set_num_threads(threads)


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=GROUPS, ids="3d-{}".format)
def group(request):
    return request.param


@parametrize("mode, case", [
    pytest.param(MODES[mode], case, id=f"{mode}-{len(case.lead) + 1}d-{name}-{group}")
    for (name, group), case in ALL_CASES.items() for mode in MODES])
def test_oracle(implementation, mode, case):
    assert_correct(compute(implementation, case, mode), case)


def test_oracle_calls_in_a_row(implementation, mode, group):
    """Other numbers, another layer, one token after a sequence, fewer heads after more."""
    results, activations = [], ("x", "grad_y")
    for now, size in itertools.product((mode, torch.no_grad, torch.inference_mode), ({}, ALIGNED)):
        with mode():
            inputs = tensors(Case(group, **size))
        for new, change in [
                ((), {}), ((), dict(scaling=0.0)), (LAYER, {}), (activations, {}),
                (activations, dict(lead=(4, 7))), (activations, dict(lead=(2, 1))),
                (TENSORS, dict(lead=(2, 1))), (("bias",), dict(bias=False)),
                (INPUTS, dict(layout="columns", in_layout=("B",))), (("A", "B"), dict(r=2)),
                (("B", "Wg"), dict(n=2))]:
            case = Case(group, **size | change, resampled=new)
            found = compute(implementation, case, now, inputs | tensors(case, new))
            results.append((found, case, f"a later call, {now.__name__}: "))
    for result in results:  # only now: a later call may overwrite a result
        assert_correct(*result)


def test_oracle_changed_tensors(implementation, mode, group):
    """By .data, which keeps the version, in place or in other memory, as by offloading. The sum
    stays the same."""
    for name, size in itertools.product(INPUTS, ({}, ALIGNED, dict(lead=(2, 1)))):
        case = Case(group, requires_grad=("x",) if size else INPUTS, **size)
        inputs, value = tensors(case), tensors(case)[name].detach()
        for way in ("in place", "in other memory"):
            t = inputs[name]
            t.data.copy_(value.flip(0))
            for _ in range(4):
                forward(implementation, case, mode, inputs)
            if way == "in place":
                t.data.copy_(value)
            else:
                t.data = value.clone()
            found = compute(implementation, case, mode, inputs)
            assert_correct(found, case, f"{name} was changed {way}: ")


def test_oracle_decoding(implementation, mode, group):
    """One token after another through a layer of a usual width."""
    case = Case(group, lead=(1, 1), k=1024, d=1024, r=8, n=3, requires_grad=ADAPTER)
    inputs = tensors(case)
    calls = [forward(implementation, now, mode, inputs | tensors(now, ("x",)))
             for now in [replace(case, resampled=("x",))] * 4 + [case] * 8]
    for call in calls:
        assert_correct({"y": call.y}, call.case, "12 tokens: ")
    assert_correct(backward(calls[-1]), case, "the last of 12 tokens: ")


def test_oracle_many_layers(implementation, mode, group):
    """All forwards of a model, then all backwards: one half in order, the other in reverse."""
    calls = []
    for i in range(70):  # more than a ring of 64 buffers
        case = Case(group, seed=i % 11, scaling=i % 11 - 4.5)
        calls.append(forward(implementation, case, mode))
    results = [(backward(call), call.case) for call in calls[:35] + calls[:34:-1]]
    for found, case in results:
        assert_correct(found, case, "70 layers: ")


def test_oracle_nan_stays(implementation, mode, group):
    """nan in an input reaches the outputs that depend on it, and no others. From x, Wg and
    grad_y it reaches all gradients, as does inf in grad_y, which a GradScaler looks for."""
    case, reached = Case(group), dict(x=(0, 0), A=..., Wg=..., grad_y=slice(0))
    for name, value in [*((name, math.nan) for name in TENSORS), ("grad_y", math.inf)]:
        inputs = tensors(case)
        inputs[name].data[(0,) * inputs[name].dim()] = value
        found = as_float64(compute(implementation, case, mode, inputs))
        y, index = found.pop("y"), reached.get(name, (..., 0))
        assert y[index].isnan().all(), f"{value} in {name}: y is not nan; {case}"
        y[index] = expected(case)["y"][index]
        assert_correct({"y": y}, case, f"{value} in {name}, the rest: ")
        if name in ("x", "Wg", "grad_y"):
            finite = [one for one in found if one[:-5] in ADAPTER and found[one].isfinite().all()]
            assert not finite, f"{value} in {name}: finite {', '.join(finite)}; {case}"


def test_oracle_nothing_kept(implementation, mode, group):
    """The memory of x, y and the graph is freed with the last reference to y."""
    for with_backward in (True, False):
        call = forward(implementation, Case(group), mode)
        if with_backward:
            backward(call)
        memory = [StorageWeakRef(t.untyped_storage()) for t in (call.inputs["x"], call.y)]
        del call
        assert all(storage.expired() for storage in memory), (
            f"the kernel keeps x or y alive; {Case(group)}")


def test_oracle_gradients_add_up(implementation, group):
    """Of two layers on one x, as q_proj and v_proj, or one layer twice, after calls without
    gradients: in one backward, or in two."""
    for size, new, at_once in itertools.product(
            ({}, ALIGNED), (LAYER, ("x",), ("grad_y",)), (True, False)):
        p, q = (Case(group, requires_grad=ADAPTER, resampled=t, **size) for t in ((), new))
        inputs = tensors(p)
        for mode in (torch.inference_mode, torch.no_grad):
            forward(implementation, p, mode, inputs)
        first = forward(implementation, p, inputs=inputs)
        second = forward(implementation, q, inputs=inputs | tensors(q, new))
        if at_once:
            torch.autograd.backward([first.y, second.y], [first.grad_y, second.grad_y])
        else:
            backward(first)
            backward(second)
        rest = {name: g - expected(q)[name] for name, g in as_float64(gradients(first)).items()
                if name[:-5] not in new}
        count = "one backward" if at_once else "two backwards"
        assert_correct(rest, p, f"two calls, then {count}, new {new}: ")


def test_oracle_gradients_twice(implementation, group):
    """By torch.autograd.grad, over a retained graph, to inputs that are not leaves."""
    case = Case(group, requires_grad=ADAPTER)
    leaves = tensors(case)
    inputs = leaves | {name: leaves[name] * 1.0 for name in ADAPTER}
    call = forward(implementation, case, inputs=inputs)
    arguments = (call.y, [leaves[name] for name in ADAPTER], call.grad_y, True)
    for moment in ("first", "second"):
        grads = call_kernel(torch.autograd.grad, arguments, case, "torch.autograd.grad")
        found = {f"{name}.grad": g for name, g in zip(ADAPTER, grads)}
        assert_correct(found, case, f"the {moment} torch.autograd.grad: ")


def test_oracle_gradients_after_a_change(implementation, group):
    """y or an input changes in place; then the gradients are right, or autograd notices."""
    for name in ("y", *INPUTS):
        call = forward(implementation, Case(group))
        with torch.no_grad():
            (call.y if name == "y" else call.inputs[name]).mul_(2)
        with contextlib.suppress(RuntimeError):
            call.y.backward(call.grad_y)
            assert_correct(gradients(call), call.case, f"{name} changed before the backward: ")


def test_oracle_gradients_of_each_choice(implementation, group):
    """Every choice of what requires a gradient, switched on the same tensors."""
    for size in ({}, dict(lead=(2, 32), **ALIGNED)):
        inputs = tensors(Case(group, **size))
        for choice in itertools.product((False, True), repeat=len(INPUTS)):
            case = Case(group, requires_grad=tuple(itertools.compress(INPUTS, choice)), **size)
            for name in INPUTS:
                inputs[name].requires_grad_(name in case.requires_grad)
            assert_correct(compute(implementation, case, inputs=inputs), case)


@parametrize("group", ["float32"], ids=["3d-float32"])
def test_oracle_gradients_compiled(implementation, group):
    """By torch.compile, where it can compile."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: implementation(*inputs), backend="eager")
    with torch._dynamo.config.patch(suppress_errors=True):
        assert_correct(compute(compiled, Case(group)), Case(group), "under torch.compile: ")


TESTS = [test for name, test in globals().items() if name.startswith("test_oracle_")]  # above


def groups_of(check):
    """The groups of a case, by its name, or of a test."""
    if check is test_oracle_gradients_compiled:
        return ["float32"]
    return FOUR_GROUPS if check in IN_FOUR_GROUPS else [*GROUPS]


def run_check(check, function, group):
    for mode in MODES.values():
        if check not in TESTS:
            test_oracle(function, mode, ALL_CASES[check, group])
        elif "mode" in inspect.signature(check).parameters:
            check(function, mode, group)
        elif mode is torch.enable_grad:
            check(function, group)


# ---- The layer ----
def hydralora_layer(x, W0, bias, A, B, Wg, scaling):
    """HydraLoRALinear with the given tensors as parameters: copies would take the gradients."""
    n, d, r = B.shape
    base = nn.Linear(A.shape[1], d, bias is not None, device="meta", dtype=W0.dtype)
    layer = HydraLoRALinear(base, num_heads=n, r=r, lora_alpha=scaling * r)
    weights = {"base.weight": W0, "lora_A": A, "lora_B": B, "router.weight": Wg}
    if bias is not None:
        weights["base.bias"] = bias
    return torch.func.functional_call(layer, weights, x)


# ---- Wrong implementations ----
STEPS = dict(
    base=lambda v: F.linear(v.x, v.W0, v.bias),  # (..., d)
    h=lambda v: v.x.to(v.A.dtype),               # (..., k)
    logits=lambda v: F.linear(v.h, v.Wg),        # (..., n)
    w=lambda v: v.logits.softmax(-1),            # (..., n)
    z=lambda v: F.linear(v.h, v.A),              # (..., r)
    delta=lambda v: v.s * torch.einsum("...n,...r,ndr->...d", v.w, v.z, v.B),
    y=lambda v: v.base + v.delta.to(v.base.dtype))  # (..., d)


def mutant(**changed):
    """The layer with some steps changed: s=lambda v: 1.0 drops the scaling, dw=lambda v, g: 2 * g
    doubles the gradient of w. v holds the inputs (s is the scaling), n, d, r, k, tokens (of a
    sequence), then the steps; v.memory lasts from call to call."""
    names, memory = (*INPUTS, "s"), {}

    def function(*inputs):
        v = SimpleNamespace(**dict(zip(names, inputs)), weights=inputs[1:], memory=memory)
        (v.n, v.d, v.r), v.k = v.B.shape, v.x.shape[-1]
        v.tokens = v.x.shape[-2] if v.x.dim() > 1 else 0
        for name in (*names, *STEPS):
            for step in (STEPS.get(name), changed.get(name)):
                if step:
                    setattr(v, name, step(v))
            if "d" + name in changed:
                t = getattr(v, name).clone()
                setattr(v, name, t)
                if t.requires_grad:
                    t.register_hook(functools.partial(changed["d" + name], v))
        return v.y

    return function


correct = mutant()


def straight_through(t, value):
    """`value` with the gradient of t."""
    return t + (value - t).detach()


def as_contiguous(t):
    """What a kernel reads if it assumes that t is contiguous, with offset 0."""
    strides = [math.prod(t.shape[i + 1:]) for i in range(t.dim())]
    return straight_through(t, t.detach().as_strided(t.shape, strides, 0))


def zero_from(t, dim, size):
    """t, zero from index `size` on."""
    t, rest = t.tensor_split([size], dim)
    return torch.cat([t, 0 * rest], dim)


def chunks(v, count):
    """The layer on chunks of `count` tokens."""
    parts = [correct(part, *v.weights) for part in v.x.reshape(-1, v.k).split(count)]
    return torch.cat(parts).view(v.y.shape)


def listed(v):
    """The update, once its call is in the list of those that wait for their backward."""
    if v.delta.requires_grad:
        v.memory.setdefault("calls", []).append(v)
    return v.delta


# What the message says, which case or test must catch it though "plain" may pass, the changed
# steps, and the groups, unless float32 and bfloat16. Messages name those that cases catch.
WRONG = [
    ("no update", "plain", dict(delta=lambda v: 0 * v.delta)),
    ("no scaling", "plain", dict(s=lambda v: 1.0)),
    ("scaling twice", "plain", dict(s=lambda v: v.s**2)),
    ("lora_alpha for lora_alpha / r", "plain", dict(s=lambda v: v.s * v.r)),
    ("lora_alpha / sqrt(r)", "plain", dict(s=lambda v: v.s * v.r**0.5)),
    ("softmax over tokens", "plain", dict(w=lambda v: v.logits.softmax(-2))),
    ("softmax over axis 1", "plain", dict(w=lambda v: v.logits.softmax(1))),
    ("sigmoid for softmax", "plain", dict(w=lambda v: v.logits.sigmoid())),
    ("top-1 gates", "plain", dict(w=lambda v: v.w * F.one_hot(v.w.argmax(-1), v.n))),
    ("equal gates", "plain", dict(w=lambda v: 0 * v.w + 1 / v.n)),
    ("heads summed", "plain", dict(w=lambda v: 0 * v.w + 1)),
    ("one mixture for a sequence", "plain", dict(w=lambda v: v.w.mean(-2, keepdim=True))),
    ("router on A x", "plain", dict(
        logits=lambda v: F.linear(F.linear(v.h, v.A), v.Wg[:, :v.r]))),
    ("router's input detached", "plain", dict(logits=lambda v: F.linear(v.h.detach(), v.Wg))),
    ("gates detached", "plain", dict(w=lambda v: v.w.detach())),
    ("A detached", "plain", dict(A=lambda v: v.A.detach())),
    ("weights copied into a layer (see hydralora_layer)", "plain", dict(
        A=lambda v: v.A.detach(), B=lambda v: v.B.detach(), Wg=lambda v: v.Wg.detach())),
    ("gradient of the gates without scaling", "plain", dict(dw=lambda v, g: g / v.s)),
    ("B reshaped, not transposed", "plain", dict(
        B=lambda v: v.B.reshape(v.d, v.n, v.r).transpose(0, 1))),
    ("no bias", "plain", dict(base=lambda v: F.linear(v.x, v.W0))),
    ("exp without the maximum", "steep", dict(
        w=lambda v: v.logits.exp() / v.logits.exp().sum(-1, keepdim=True))),
    ("rounded to float32", "plain", dict(y=lambda v: v.y.float().to(v.y)), "float64"),
    ("rounded as by TF32", "plain", dict(
        x=lambda v: straight_through(v.x, v.x.half().to(v.x))), "float32"),
    ("y has no gradient, but x, ", "plain", dict(y=lambda v: v.y.detach())),
    ("the backward has changed threads to 2", "plain", dict(
        dy=lambda v, g: torch.set_num_threads(2)), "float32"),
    ("the call raised Skipped", "plain", dict(y=lambda v: pytest.skip("not for me"))),
    ("wrong dtype", "plain", dict(y=lambda v: v.y.double()),
     "bfloat16 half autocast autofp16 automix autonorm"),
    ("wrong dtype", "plain", dict(y=lambda v: v.y.float()), "bfloat16 half"),
    ("y requires a gradient, but no input does", "plain", dict(
        y=lambda v: v.y.requires_grad_())),
    ("the backward has changed bias in place", "plain", dict(
        dy=lambda v, g: g + 0 * v.bias.data.mul_(2).sum())),
    ("the call raised RuntimeError", "plain", dict(h=lambda v: v.x), "mixed mixfp16"),
    ("lone token not scaled", "vector", dict(s=lambda v: v.s if v.tokens > 1 else 1.0)),
    ("x read as contiguous", "last-tokens", dict(x=lambda v: as_contiguous(v.x))),
    ("W0 transposed if square", "layout-contiguous", dict(
        W0=lambda v: v.W0.T if v.k == v.d else v.W0)),
    ("y has no gradient", "empty-batch", dict(y=lambda v: v.y if v.y.numel() else v.y.detach())),
    ("wrong shape", "last-tokens", dict(y=lambda v: v.y.squeeze())),
    ("no update with one head", "only-head", dict(delta=lambda v: v.delta * (v.n > 1))),
    (".grad is wrong", "thousands", dict(y=lambda v: chunks(v, 16)), "bfloat16"),
    ("first 65535 tokens only", "grid-limit", dict(delta=lambda v: zero_from(v.delta, -2, 65535))),
    ("no update while B is 0", "heads-at-zero", dict(delta=lambda v: v.delta * v.B.any())),
    *((f"{name}.grad is zero or missing", "near-zero", {
        f"d{name}": lambda v, g: g * (g.norm() > 0.01)}) for name in ("A", "Wg")),
    ("no gradient of padding", "token-at-zero", dict(
        dx=lambda v, g: g * v.x.any(-1, keepdim=True))),
    ("gradients clamped", "large-all", dict(ddelta=lambda v, g: g.clamp(-1000, 1000))),
    ("first 2**20 of W0 only", "both-wide", dict(
        W0=lambda v: zero_from(v.W0.flatten(), 0, 2**20).view(v.d, v.k))),
    ("first 8192 of k only", "decode-long", dict(x=lambda v: zero_from(v.x, -1, 8192))),
    ("first 8192 of d only", "decode-wide", dict(delta=lambda v: zero_from(v.delta, -1, 8192))),
    ("wrong in whole tiles", "drawn-tiles", dict(
        A=lambda v: v.A * (1 + (v.r % 16 + v.k % 64 + v.d % 64 + v.tokens % 64 == 0)))),
    ("first 64 tokens only", "drawn-odd-tokens", dict(delta=lambda v: zero_from(v.delta, -2, 64))),
    ("first 64 of d only", "drawn-odd-d", dict(delta=lambda v: zero_from(v.delta, -1, 64))),
    ("first 64 of k only", "drawn-odd-k", dict(x=lambda v: zero_from(v.x, -1, 64))),
    ("first 64 ranks only", "drawn-large-r", dict(A=lambda v: zero_from(v.A, -2, 64))),
    ("first 16 heads only", "steep", dict(B=lambda v: zero_from(v.B, -3, 16))),
    *(("x read as contiguous", f"layout-{layout}", dict(x=lambda v: as_contiguous(v.x)))
      for layout in [*LAYOUTS, "number"][1:]),
    ("a gap is read", "layout-rows", dict(
        z=lambda v: v.z + v.x.detach().as_strided((), (), v.k) * (v.x.stride(-2) > v.k))),
    ("B read as contiguous", "layout-second", dict(B=lambda v: as_contiguous(v.B))),
    *(("grad_y read as contiguous", f"layout-{layout}", dict(dy=lambda v, g: as_contiguous(g)))
      for layout in ("swapped", "number")),

    ("a later call", test_oracle_calls_in_a_row, dict(
        s=lambda v: v.memory.setdefault("s", v.s))),
    *((f"{name} was changed in place", test_oracle_changed_tensors, {
        name: lambda v, name=name: straight_through(t := getattr(v, name), t.__dict__.setdefault(
            "cached", t.detach().clone()))}) for name in INPUTS),
    ("A was changed in other memory", test_oracle_changed_tensors, dict(
        A=lambda v: straight_through(v.A, v.A.__dict__.setdefault("cached", v.A.detach())))),
    ("the call has changed W0 in place", test_oracle_decoding, dict(
        W0=lambda v: v.W0.data.mul_(1 + torch.finfo(v.W0.dtype).eps) if v.tokens == 1 else v.W0)),
    ("12 tokens: y is wrong", test_oracle_decoding, dict(  # the first y is overwritten
        y=lambda v: v.memory.setdefault(v.y.shape, v.y).data.copy_(v.y) is None or v.y)),
    *(("70 layers: ", test_oracle_many_layers, dict(
        delta=listed, ddelta=lambda v, g, i=i: g * (v.memory["calls"].pop(i) is v)))
      for i in (0, -1)),
    ("70 layers: ", test_oracle_many_layers, dict(
        delta=listed, ddelta=lambda v, g: g * any(call is v for call in v.memory["calls"][-64:]))),
    *((f"nan in {name}: y is not nan", test_oracle_nan_stays, {
        name: lambda v, name=name: getattr(v, name).nan_to_num()}) for name in INPUTS),
    ("inf in grad_y: finite", test_oracle_nan_stays, dict(dy=lambda v, g: g.clamp(-1e4, 1e4))),
    *(("keeps x or y alive", test_oracle_nothing_kept, {
        name: lambda v, name=name: v.memory.setdefault(len(v.memory), getattr(v, name))})
      for name in "xy"),
    ("two backwards", test_oracle_gradients_add_up, dict(
        dA=lambda v, g: setattr(v.weights[2], "grad", None) or g)),
    ("the second torch.autograd.grad", test_oracle_gradients_twice, dict(
        dlogits=lambda v, g: g + v.w.data.zero_())),
    *((f"{name} changed before the backward", test_oracle_gradients_after_a_change, {
        f"d{name}": lambda v, g, i=i: g * (v.weights[i]._version == 0)})
      for i, name in enumerate(LAYER)),
    ("y changed before the backward", test_oracle_gradients_after_a_change, dict(
        dy=lambda v, g: g * (v.y._version == 0))),
    ("y has no gradient, but Wg require", test_oracle_gradients_of_each_choice, dict(
        y=lambda v: v.y if v.x.requires_grad else v.y.detach())),
    ("under torch.compile", test_oracle_gradients_compiled, dict(
        s=lambda v: 1.0 if torch.compiler.is_compiling() else v.s), "float32"),
]


@pytest.mark.usefixtures("implementation")
@parametrize("row", WRONG, ids=[message for message, *_ in WRONG])
def test_wrong_implementation_is_caught(row):
    message, caught_by, steps, *groups = row
    for group in groups[0].split() if groups else ["float32", "bfloat16"]:
        if caught_by != "plain":
            run_check("plain", mutant(**steps), group)
        with pytest.raises(AssertionError, match=re.escape(message)):
            run_check(caught_by, mutant(**steps), group)


def test_each_case_test_and_group_must_catch_a_wrong_implementation():
    assert {caught_by for _, caught_by, *_ in WRONG} == {*CASES, *RANDOM, *TESTS}, "see WRONG"
    groups = " ".join(group for *_, group in WRONG if isinstance(group, str))
    assert {*groups.split()} == {*GROUPS} and len({*GROUPS.values()}) == len(GROUPS)
    assert all(draw_case(*key) == case for key, case in ALL_CASES.items() if key[0] in RANDOM)


# ---- Right implementations ----
class OwnBackward(torch.autograd.Function):
    """A typical kernel: its own backward, for a frozen base."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:-1])
        ctx.scaling = inputs[-1]
        return correct(*inputs)

    @staticmethod
    def backward(ctx, g):
        inputs = [t if t is None else t.detach().to(torch.promote_types(t.dtype, f32))
                  for t in ctx.saved_tensors]
        with torch.enable_grad():
            trained = [inputs[i].requires_grad_() for i in (0, 3, 4, 5)]
            y = correct(*inputs, ctx.scaling)
            dx, *others = torch.autograd.grad(y, trained, g.to(y.dtype))
        return dx, None, None, *others, None


CORRECT = {
    "plain loop": loop,
    "own backward": OwnBackward.apply,
    "32 chunks of tokens": mutant(y=lambda v: chunks(v, max(8, v.x[..., 0].numel() // 32))),
    "strided output": mutant(y=lambda v: v.y.mT.contiguous().mT if v.tokens else v.y),
    "adapter cast to the dtype of x": mutant(y=lambda v: correct(
        v.x, v.W0, v.bias, *(t.to(v.x.dtype) for t in (v.A, v.B, v.Wg)), v.s)),
}


@pytest.mark.usefixtures("implementation")
@parametrize("style", CORRECT)
def test_right_implementation_passes(style):
    """Each style in each case and test, in groups that take turns."""
    for i, check in enumerate([*CASES, *RANDOM, *TESTS], list(CORRECT).index(style)):
        groups = groups_of(check)
        run_check(check, CORRECT[style], groups[i % len(groups)])


# ---- The reference and the settings ----
def test_reference_by_hand():
    """The example of hydralora.py: A x = 3 and w = (3/4, 1/4). With grad_y = (1, 0), the scores
    of the heads are 6 and 30, and their slopes -4.5 and 4.5."""
    inputs = dict(  # one token, k = d = 2, r = 1, n = 2
        x=[[1, 2]], W0=np.eye(2), bias=[10, 20], A=[[1, 1]], B=[[[1], [2]], [[5], [-2]]],
        Wg=[[math.log(3), 0], [0, 0]], grad_y=[[1, 0]])
    y, grads = reference(scaling=2.0, **{name: np.array(v, float) for name, v in inputs.items()})
    np.testing.assert_allclose(y, [[23, 28]], rtol=1e-14)
    by_hand = dict(
        x=[[5 - 4.5 * math.log(3), 4]], W0=[[1, 2], [0, 0]], bias=[1, 0], A=[[4, 8]],
        B=[[[4.5], [0]], [[1.5], [0]]], Wg=[[-4.5, -9], [4.5, 9]])
    for name, g in by_hand.items():
        np.testing.assert_allclose(grads[name], g, rtol=1e-14, err_msg=name)


@parametrize("group", ["float64", "bfloat16"])
@parametrize("name", ["plain", "vector", "layout-second"])
def test_reference_agrees_with_autograd(name, group):
    """In the expected values, which are those of the rounded tensors."""
    case = ALL_CASES[name, group]
    by_torch = by_autograd(scaling=case.scaling, **as_float64(tensors(case)))
    close(expected(case), by_torch, rtol=1e-10, atol=1e-10)


def test_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setenv("HYDRALORA_DEVISE", "cpu")
    with pytest.raises(ValueError, match="DEVISE"):
        runpy.run_path(__file__)


# ---- The layer ----
N, K, D, R = 4, 7, 5, 3  # heads, features in and out, rank
GATES = torch.tensor([0.1, 0.2, -0.3, 0.4])  # fixed gates need not sum to 1
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(3))
randn = functools.partial(torch.randn, dtype=f64)
close = torch.testing.assert_close
each_dtype = parametrize("dtype", [f64, f32, bf16, f16], ids=str)


def make_layer(k=K, d=D, dtype=f64, layer=HydraLoRALinear, **arguments):
    """A layer whose heads are not zero and whose gates vary from token to token."""
    torch.manual_seed(0)
    arguments = dict(num_heads=N, r=R, lora_alpha=2 * R) | arguments
    made = layer(nn.Linear(k, d, dtype=dtype), **arguments)
    nn.init.normal_(made.lora_B)
    nn.init.normal_(made.router.weight)
    return made


def plain_model():
    torch.manual_seed(0)
    return TinyTransformer(TinyConfig())


def adapted_model(targets=("q_proj", "v_proj"), layer=HydraLoRALinear):
    model = inject_hydralora(plain_model(), targets, layer, num_heads=N, r=R)
    for adapter in hydralora_layers(model).values():
        nn.init.normal_(adapter.lora_B, std=0.3)
        nn.init.normal_(adapter.router.weight)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_defaults():
    base = nn.Linear(2, 5, device="meta")
    layer = HydraLoRALinear(base)
    assert all(p.is_meta for p in layer.parameters())
    assert "num_heads=3, r=8, scaling=2" in str(layer) and layer.lora_dropout.p == 0
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (2, 5)
    assert not isinstance(layer.router, nn.Linear)  # which quantisers replace
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A": (8, 2), "lora_B": (3, 5, 8), "router.weight": (3, 2)}


@each_dtype
def test_dtypes(dtype):
    layer, x = make_layer(dtype=dtype), torch.ones(2, K, dtype=dtype)
    adapter = torch.promote_types(dtype, f32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.router.weight.dtype == adapter
    assert layer(x).dtype == dtype and layer.to(dtype)(x).dtype == dtype
    assert mean_gates(nn.Sequential(layer), [x])["0"].dtype == adapter


def test_initialisation():
    layer = HydraLoRALinear(nn.Linear(256, 8), r=16, num_heads=16)
    Wg = layer.router.weight.clone()
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters()  # not the router's
    assert not layer.lora_B.any() and torch.equal(layer.router.weight, Wg)
    for p in (layer.lora_A, Wg):  # U(-b, b) with b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16


def test_dropout_has_one_mask_and_spares_the_router():
    layer, x = make_layer(6, 6, r=6, lora_alpha=6, lora_dropout=0.5), randn(50, 6)
    with torch.no_grad():  # with A = 1 and B_i = 1 the update is x after dropout
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B.copy_(torch.eye(6).expand(N, 6, 6))
    with record_gates(layer) as gates:
        mask = (layer(x) - layer.base(x)) / x
    close(gates[""], layer.router(x).detach())
    close(mask, 2 * (mask > 1).double())  # 0 or 1 / (1 - 0.5)
    close(layer.eval()(x) - layer.base(x), x)


def test_base_is_called_and_its_output_is_not_changed():
    layer, x, outputs = make_layer(), randn(9, K), []
    before, plain = layer(x), F.linear(x, layer.weight, layer.bias)
    layer.base.register_forward_hook(lambda base, inputs, y: outputs.append(2 * y) or outputs[0])
    close(layer(x) - before, plain)
    close(outputs[0], 2 * plain)


SOURCE = Path(hydralora.__file__).read_text(encoding="utf-8")


def test_lines_to_copy_need_no_others():
    start, end = map(SOURCE.index, ("# ---- The layer", "# ---- A tiny transformer"))
    copied = dict(math=math, torch=torch, F=F, nn=nn)
    exec(SOURCE[start:end], copied)
    layer = copied["HydraLoRALinear"](nn.Linear(K, D))
    layer(torch.ones(K))
    layer.merge([0, 0, 1])


def test_upper_part_uses_nothing_below_it():
    upper = {"__name__": "upper"}
    exec(SOURCE[:SOURCE.index("# ---- On a model")], upper)
    upper["TinyTransformer"](upper["TinyConfig"]())(IDS)
    assert upper["num_heads_from_corpus"](["a b", "a b", "c d"])[1][-1] < 1e-5  # not nan


# ---- A model ----
def test_tiny_transformer_step_by_step():
    model, split = plain_model(), (3, 11, 4, 16)  # sequences, tokens, heads, head width
    h = model.token_embedding(IDS) + model.position_embedding.weight[:11]
    for layer in model.layers:
        x = layer.attention_norm(h)
        q, k, v = ((x @ proj.weight.T).view(split).transpose(1, 2)
                   for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        future = torch.ones(11, 11).triu(1).bool()
        attention = (q @ k.mT / 4).masked_fill(future, -math.inf).softmax(-1)
        h = h + (attention @ v).transpose(1, 2).reshape(3, 11, 64) @ layer.o_proj.weight.T
        h = h + layer.down_proj(F.gelu(layer.up_proj(layer.mlp_norm(h))))
    close(model(IDS), model.lm_head(model.norm(h)))


def test_injection_changes_no_output_and_no_mode():
    model = plain_model()
    model.layers[0].eval()
    logits = model(IDS)
    assert inject_hydralora(model, ["0.q_proj", "layers.1.down_proj"], lora_dropout=0.5) is model
    assert [*hydralora_layers(model)] == ["layers.0.q_proj", "layers.1.down_proj"]
    assert torch.equal(model(IDS), logits)
    assert not any(m.training for m in model.layers[0].modules())
    assert all(m.training for m in model.layers[1].modules())


class TwoA(HydraLoRALinear):
    """A variant with one more parameter, and a forward of its own."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.A2 = nn.Parameter(torch.ones_like(self.lora_A))

    def forward(self, x):
        return super().forward(x) + F.linear(x, self.A2).mean(-1, keepdim=True)


def test_second_injection_adds_to_the_first():
    model = inject_hydralora(plain_model(), "0.q_proj", TwoA)
    assert trained_names(model) == hydralora_state_dict(model).keys()
    model.layers[0].q_proj.lora_A.requires_grad_(False)  # the caller's choice stays
    model.layers[0].q_proj.base.weight.requires_grad_(True)  # a base is frozen again
    inject_hydralora(model, ["q_proj", "v_proj"])
    assert trained_names(model) == hydralora_state_dict(model).keys() - {"layers.0.q_proj.lora_A"}
    assert "layers.0.q_proj.A2" in trained_names(model)


class MyLinear(nn.Linear):
    pass


def test_layer_with_two_names_gets_one_adapter():
    shared = MyLinear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    inject_hydralora(model, iter(["b.0", "a"]))
    assert model["a"] is model["b"][0] and model["a"].base is shared
    merge_hydralora(model, torch.ones(3))
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


# ---- Choosing N ----
@parametrize("sizes", [[240 // n] * n for n in range(2, 11)] + [[144, 72, 24]])
def test_num_heads_of_domains(sizes):
    """In documents of 25 token ids; each domain has its own distribution over 40 terms."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        topics = rng.dirichlet(np.full(40, 0.2), len(sizes)).repeat(sizes, axis=0)
        documents = [rng.choice(40, size=25, p=topic).tolist() for topic in topics]
        assert num_heads_from_corpus(documents)[0] == len(sizes)


@parametrize("documents", [
    ["a c", "b  c\n", "a a c", "b b c"], [[], [1, 3], [2, 3], [1, 1, 3], "", [2, 2, 3]],
    [torch.tensor(ids) for ids in ([1, 3], [2, 3], [1, 1, 3], [2, 2, 3])]])
def test_sse_by_hand(documents):
    n, sse = num_heads_from_corpus(iter(documents), max_heads=3)
    assert n == 2
    np.testing.assert_allclose(sse, [1.659844, 0.069862, 0.034931], atol=1e-5)


# ---- Merging ----
@each_dtype
@parametrize("size", [1e-6, 1e-3, 1, 30])  # of the update, relative to W0
@torch.no_grad()
def test_merge_rounds_once(size, dtype):
    layer = make_layer(dtype=dtype, lora_alpha=size * R).eval()
    A, B = layer.to_lora(GATES.double())
    W = (layer.weight.to(A.dtype) + size * (B @ A)).to(dtype)
    with torch.autocast("cpu", dtype=bf16):
        merged = layer.merge(GATES)
    assert type(merged) is nn.Linear and not merged.training
    assert torch.equal(merged.weight, W) and torch.equal(merged.bias, layer.bias)
    assert not any(p.requires_grad for p in merged.parameters())
    for t in (*merged.parameters(), A, B):
        t.zero_()
    assert all(p.all() for p in layer.parameters())  # nothing is shared


class OwnForward(nn.Linear):
    forward = nn.Bilinear.forward


class Subclass(torch.Tensor):
    """As torchao's quantised tensors and DTensor."""


def set_to(name, value):
    if isinstance(value, torch.Tensor):
        value = nn.Parameter(value, requires_grad=False)
    return lambda base: setattr(base, name, value)


def computed(name):
    return lambda base: nn.utils.parametrize.register_parametrization(base, name, nn.Identity())


@parametrize("bias", [True, False])
@parametrize("change", [
    set_to("forward", nn.Linear(K, D).forward),
    set_to("__class__", OwnForward),
    lambda base: base.register_forward_hook(print),
    lambda base: base.register_forward_pre_hook(print),
    computed("weight"),
    lambda base: computed("bias" if base.bias is not None else "weight")(base),
    set_to("scale", torch.ones(D)),
    set_to("weight", torch.ones(D, K).as_subclass(Subclass)),
    set_to("weight", torch.ones(D, K).char()),
    set_to("weight", torch.ones(D, K).to(torch.float8_e4m3fn)),
    set_to("bias", torch.ones(D, device="meta"))])
def test_merge_needs_a_plain_linear(change, bias):
    base = nn.Linear(K, D, bias)
    change(base)
    with pytest.raises(TypeError, match="base must be a plain nn.Linear: .*removes Accelerate's"):
        HydraLoRALinear(base, num_heads=N).merge(GATES)


def test_merged_model_has_the_gates_of_each_name():
    model = adapted_model()
    gates = {name: GATES.roll(i) for i, name in enumerate(hydralora_layers(model))}
    with hook_gates(model, lambda name, w: gates[name].expand_as(w)):
        expected = model(IDS)
    assert merge_hydralora(model, dict(reversed(gates.items()))) is model
    close(model(IDS), expected, rtol=0, atol=1e-4)


def test_refused_merging_changes_nothing():
    model = adapted_model()
    logits, (*others, last) = model(IDS), hydralora_layers(model)
    with pytest.raises(ValueError, match="gates must be 4 finite numbers"):
        merge_hydralora(model, dict.fromkeys(others, GATES) | {last: torch.ones(3)})
    assert torch.equal(model(IDS), logits)


# ---- Gates ----
@parametrize("compiled", [False, True])
def test_gates_of_a_model_that_may_be_compiled(compiled):
    model = adapted_model()
    run = torch.compile(model, backend="eager") if compiled else model
    logits = run(IDS)
    with record_gates(model) as gates:
        run(IDS[:1])
        run(IDS)  # the last forward counts
    assert gates.keys() == hydralora_layers(model).keys()
    assert not any(w.requires_grad for w in gates.values())
    means = mean_gates(run, [collections.UserDict(tokens=IDS)]).values()
    close([*means], [w.mean((0, 1)) for w in gates.values()])
    with hook_gates(model, lambda name, w: 0 * w):
        close(run(IDS), plain_model()(IDS))
    assert torch.equal(run(IDS), logits)


def test_mean_gates_counts_each_token_of_each_call():
    layer, batches = make_layer(K, K), (randn(2, 3, K), randn(K))  # the second: a single token
    w = [layer.router(y).view(-1, N) for x in batches for y in (x, layer(x))]
    close(mean_gates(nn.Sequential(layer, layer), batches), {"0": torch.cat(w).mean(0).detach()})


def test_mean_gates_are_those_of_eval_mode():
    model, x = nn.Sequential(nn.Dropout(0.5), make_layer(), nn.Identity().eval()), randn(9, K)
    close(mean_gates(model, [x]), {"1": model[1].router(x).mean(0).detach()})
    with pytest.raises(RuntimeError):
        mean_gates(model, [x.T])
    assert model.training and [m.training for m in model] == [True, True, False]
    assert not model[1].router._forward_hooks


# ---- Files ----
OFFICIAL = {f"layers.0.q_proj.lora_{part}.weight": torch.rand(*shape) for part, *shape in [
    ("A", R, 64), ("route", 11, 64), *((f"B{i}", 64, R) for i in reversed(range(11)))]}


@parametrize("prefix", ["", "base_model.model."])
def test_official_checkpoint(prefix):
    model = inject_hydralora(plain_model(), "0.q_proj", num_heads=11, r=R)
    state = from_official_state_dict({prefix + key: t for key, t in OFFICIAL.items()})
    load_hydralora_state_dict(model, state)
    layer, (A, Wg, *B) = model.layers[0].q_proj, OFFICIAL.values()
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.router.weight, Wg)
    assert torch.equal(layer.lora_B, torch.stack(B[::-1]))  # B10 is the last, not the third


@parametrize("key", [
    "q.lora_B.weight", "q.lora_A", "q.lora_A2.weight", "q.lora_A.weight.absmax",
    "base_model.model.lora_A.weight"])
def test_other_checkpoints_are_not_official(key):
    with pytest.raises(ValueError, match=f"not an official .*: it has {key}$"):
        from_official_state_dict(OFFICIAL | {key: IDS})


@parametrize("dtype", [f32, f64])
def test_loading_copies(dtype):
    model = adapted_model("0.q_proj", TwoA)
    state = {key: t.to(dtype) + 1 for key, t in hydralora_state_dict(model).items()}
    assert load_hydralora_state_dict(model, state) is model
    for key, t in hydralora_state_dict(model).items():
        close(t, state[key].float())
        state[key].zero_()
        assert t.any()


def test_refused_loading_changes_nothing():
    model, last = adapted_model(), "layers.1.v_proj.lora_A"
    logits = model(IDS)
    state = {key: 2 * t for key, t in hydralora_state_dict(model).items()}
    for wrong in ({last: torch.ones(2)}, {"more": IDS}, {last: state[last].as_subclass(Subclass)}):
        with pytest.raises(ValueError):
            load_hydralora_state_dict(model, state | wrong)
        assert torch.equal(model(IDS), logits)


def test_export_of_layers_of_unlike_r_and_scaling():
    model, names = adapted_model("layers.1.q_proj"), ["layers.0.o_proj", "layers.1.q_proj"]
    model.layers[1].q_proj.scaling = 0.5  # no longer lora_alpha / r
    inject_hydralora(model, "layers.0.o_proj", num_heads=N, r=2, lora_alpha=5)
    nn.init.normal_(model.layers[0].o_proj.lora_B)
    state, config = export_lora(model.half(), GATES)
    assert config == dict(peft_type="LORA", target_modules=names, r=R, lora_alpha=R)
    for name, layer in hydralora_layers(model.float()).items():
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert len(A) == R == B.shape[1] and A.dtype == B.dtype == f32 and not B.requires_grad
        close(layer.merge(GATES).weight, layer.base.weight + B @ A, rtol=0, atol=1e-5)


# ---- Bad input ----
BAD_CALLS = {  # the message: a call
    "real weights, got": lambda: HydraLoRALinear(nn.Linear(2, 2, dtype=torch.cfloat)),
    "base must be an nn.Linear": lambda: HydraLoRALinear(make_layer()),
    "num_heads, r must be integers >= 1, got True, 3": lambda: make_layer(num_heads=True),
    "integers >= 1, got 4, 0": lambda: make_layer(r=0),
    "W is not finite in torch.float16": lambda: make_layer(dtype=f16, lora_alpha=1e7).merge(GATES),
    "4 finite numbers, got .*nan": lambda: make_layer().merge(GATES * math.nan),
    "no HydraLoRA layer$": lambda: mean_gates(plain_model(), [IDS]),
    "has no HydraLoRA layer": lambda: record_gates(plain_model()).__enter__(),
    "TwoA overrides forward, but not to_lora": lambda: make_layer(layer=TwoA).merge(GATES),
    "model is itself the layer": lambda: merge_hydralora(make_layer(), GATES),
    "gates are for .*'z'., but the": lambda: export_lora(adapted_model("0.q_proj"), {
        "layers.0.q_proj": GATES, "z": GATES}),
    "lora_A is on meta, .* get_model_state_dict and set": lambda: export_lora(adapted_model().to("meta"), GATES),
    "exactly one name for each layer": lambda: export_lora(make_layer(), GATES),
    "PEFT needs exactly one name": lambda: export_lora(nn.Sequential(*[make_layer()] * 2), GATES),
    "lora_alpha must be finite": lambda: make_layer(lora_alpha=math.nan),
    "has zeros: use batches without padding": lambda: mean_gates(
        adapted_model(), [collections.UserDict(attention_mask=torch.ones(1, 2, 2).tril())]),
    "batches must be a list": lambda: mean_gates(adapted_model(), IDS),
    "no token reached some": lambda: mean_gates(
        setattr(model := adapted_model(), "idle", make_layer()) or model, [IDS]),
    "q_proj has only the heads .0, 1, 2, 4, 5": lambda: from_official_state_dict(
        {key: t for key, t in OFFICIAL.items() if "B3" not in key}),
    "lora_A is on meta, or sharded": lambda: hydralora_state_dict(adapted_model().to("meta")),
    "12 keys do not match, first layers.0.q_proj.lora_A: model .3, 64., state None$": lambda:
        load_hydralora_state_dict(adapted_model(), {}),
    "a list, got one string": lambda: num_heads_from_corpus("one string"),
}


@parametrize("message", BAD_CALLS)
def test_bad_call_is_refused(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD_CALLS[message]()


@parametrize("model, targets, arguments, message", [
    (plain_model(), [], {}, "targets is empty"),
    (plain_model(), ["q_proj", "proj"], {}, "'proj' matches no nn.Linear"),
    (plain_model(), ["o_proj", "norm"], {}, "'norm' matches no nn.Linear, only LayerNorm$"),
    (nn.Linear(2, 2), "", {}, "'' matches no nn.Linear$"),
    (plain_model(), "q_proj", {"lora_dropout": 1}, "lora_dropout in"),
    (plain_model(), "q_proj", {"layer": MyLinear}, "must be HydraLoRALinear"),
    (adapted_model(), ["o_proj", "q_proj"], {}, "'q_proj' is already adapted"),
    (adapted_model(), ["o_proj", "base"], {}, "'base' is already adapted"),
    (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), ["0", "1"], {}, "1 is .*meta"),
    (nn.TransformerEncoderLayer(8, 2), "linear1", {}, "its parent reads"),
    (nn.MultiheadAttention(8, 2), "out_proj", {}, "its parent reads")])
def test_refused_injection_changes_nothing(model, targets, arguments, message):
    next(model.parameters()).requires_grad_(False)
    trained, modules = trained_names(model), [*model.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        inject_hydralora(model, targets, **arguments)
    assert trained_names(model) == trained and [*model.modules()] == modules


# ---- In real projects ----
def test_accelerate_is_removed_as_the_message_says():
    accelerate, transformers = map(pytest.importorskip, ("accelerate", "transformers"))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    inject_hydralora(llama, "q_proj")
    gates = mean_gates(llama, [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))])
    accelerate.dispatch_model(llama, {"": "cpu"}, force_hooks=True)
    with pytest.raises(TypeError, match=r"accelerate.hooks.remove_hook_from_submodules\(model\)"):
        merge_hydralora(llama, gates)
    accelerate.hooks.remove_hook_from_submodules(llama)
    assert not hydralora_layers(merge_hydralora(llama, gates))


# ---- The toy, with few steps ----
@pytest.fixture
def toy(monkeypatch):
    """train_toy.py, so short that nothing is learnt."""
    module = pytest.importorskip("train_toy")
    for name, value in dict(PRETRAIN_STEPS=2, STEPS=2, EVALUATION=90).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return module


@pytest.fixture
def task(toy):
    return toy.Task(0, "cpu")


@pytest.fixture
def adapted(toy):
    """A model with two heads that are not zero."""
    model = toy.adapt(TinyTransformer(toy.MODEL), toy.Method(1, n=2), seed=0)
    nn.init.normal_(model.layers[1].o_proj.lora_B)
    nn.init.normal_(model.layers[1].o_proj.router.weight)
    return model


def run_toy(toy, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options])
        return toy.main()


def test_toy_each_seed_and_stream_has_its_own_data(toy):
    samples = [toy.Task(seed, "cpu").sample(9, torch.zeros(3, 15, dtype=int), stream).tokens
               for seed in range(3) for stream in range(3)]
    assert len(torch.stack(samples).unique(dim=0)) == 9


@parametrize("preference, expected", [(1, 200 / 3), (4, 100)])
def test_toy_bayes_accuracy(preference, expected, toy, monkeypatch):
    """Domains of equal frequencies, and domains that can be told apart; two share a cipher."""
    monkeypatch.setattr(toy, "PREFERENCE", preference)
    task = toy.Task(0, "cpu")
    task.new = torch.stack([torch.arange(toy.SYMBOLS).roll(i) for i in (0, 1, 1)])
    task.test = task.sample(5000, task.new, stream=2)
    assert task.bayes_accuracy() == pytest.approx(expected, abs=1)


def test_toy_auxiliary_loss(toy, task, monkeypatch):
    losses = []
    monkeypatch.setattr(toy, "train", lambda loss_of, parameters, lr, data, *_: losses.append(
        (loss_of(data), data)))
    model, _ = (toy.pretrain(task, weight, print) for weight in (0, 3))
    (without, data), (with_auxiliary, _) = losses
    close(without, F.cross_entropy(toy.predict(model, data).mT, data.targets))
    del model.layers[1:]
    plain = data.tokens[:, :toy.LENGTH]
    close(with_auxiliary, without + 3 * F.cross_entropy(toy.predict(model, data).mT, plain))


def test_toy_training(toy, task):
    x, seen = nn.Parameter(torch.ones(2)), []

    def loss_of(batch):
        seen.append(batch.tokens)
        return 1 * x[0]

    toy.train(loss_of, [x], 0.1, task.training, "name", print)
    assert torch.equal(torch.cat(seen), task.training.tokens)
    assert 0.9 < x[0] < 1 and x[1] == 1  # the last step is small; AdamW would change x[1]
    assert x.grad.tolist() == [1, 0]  # of the last batch alone


def test_toy_methods_start_equal(toy):
    hydra, moe, lora, split = (
        toy.adapt(TinyTransformer(toy.MODEL), replace(toy.methods()[name], r=9), 0).layers[1].o_proj
        for name in ("HydraLoRA", "LoRA MoE", "LoRA", "LoRA-Split"))
    for A in (lora.lora_A, *moe.lora_A, *split.lora_A):
        assert torch.equal(A, hydra.lora_A)
    assert torch.equal(hydra.router.weight, moe.router.weight)
    assert not torch.equal(hydra.router.weight, hydra.lora_A[:toy.DOMAINS])
    assert not lora.router.weight.requires_grad
    assert hydra.scaling == moe.scaling == lora.scaling == split.scaling == 2


@parametrize("n", [2, 3, 5, 16])
def test_toy_methods_have_equal_sizes(n, toy):
    sizes = {}
    for name, method in toy.methods(n).items():
        trained = toy.adapt(TinyTransformer(toy.MODEL), method, 0).parameters()
        sizes[name] = sum(p.numel() for p in trained if p.requires_grad)
    assert sizes["LoRA MoE"] == pytest.approx(sizes["HydraLoRA"], rel=0.1)
    for layer in ("", " on down_proj", " on q_proj, v_proj"):
        assert 1 <= sizes[f"LoRA{layer}"] / sizes[f"HydraLoRA{layer}"] < 1.15


def test_toy_experts_compute_eq_6(toy):
    layer, x = make_layer(layer=toy.LoRAExperts), randn(9, K)
    nn.init.normal_(layer.lora_A)
    y = layer.base(x)
    for i in range(N):
        lora = x @ layer.lora_A[i].T @ layer.lora_B[i].T
        y = y + layer.scaling * layer.router(x)[..., i, None] * lora
    close(layer(x), y)
    assert make_layer(layer=toy.LoRAExperts, dtype=bf16)(x.bfloat16()).dtype == bf16


def test_toy_labels_choose_the_head(toy, task):
    model = toy.adapt(TinyTransformer(toy.MODEL), toy.methods()["LoRA-Split"], 0)
    gates = toy.gates_of(model, task.test)
    one_hot = F.one_hot(task.test.domain, toy.DOMAINS).float()
    close(gates, one_hot[:, None].expand(-1, toy.LENGTH, -1))


def test_toy_nmi(toy):
    domain = torch.arange(3).repeat(4)
    one_head_each = F.one_hot(domain).float()[:, None]
    assert toy.nmi(5 * one_head_each.roll(1, -1), domain) == pytest.approx(1)  # gates sum to 5
    assert toy.nmi(torch.ones_like(one_head_each), domain) == pytest.approx(0, abs=1e-6)
    in_turn = torch.cat([one_head_each.roll(i, -1) for i in range(3)], 1)
    assert toy.nmi(in_turn, domain) == pytest.approx(0, abs=1e-6)
    shared = one_head_each[torch.where(domain == 2, 1, domain)]  # two domains, one head
    of_head, of_domain = 0.6365, math.log(3)
    assert toy.nmi(shared, domain) == pytest.approx(2 * of_head / (of_head + of_domain), abs=1e-4)


def test_toy_variance_shares(toy, task, monkeypatch):
    """o_proj's input is one-hot: 45 pairs, and frequent ones count no more than others."""
    data, model = task.sample(500, task.new, stream=2), TinyTransformer(toy.MODEL)
    pair = data.domain[:, None] * toy.SYMBOLS + data.tokens.roll(toy.LENGTH, 1) % toy.SYMBOLS
    monkeypatch.setattr(model, "forward", lambda tokens: model.layers[1].o_proj(
        F.one_hot(pair, 64).float()))
    assert toy.variance_shares(model, data) == pytest.approx(
        dict(domain=2 / 44, symbol=14 / 44, interaction=28 / 44), abs=1e-5)


@torch.no_grad()
def test_toy_ablation_takes_a_head_away(toy, task, adapted):
    lost, before = toy.ablate_heads(adapted, task.test, 2), toy.accuracy(adapted, task.test)
    adapted.layers[1].o_proj.lora_B[1] = 0
    change = before - toy.accuracy(adapted, task.test)
    assert change.any()
    for t in range(toy.DOMAINS):
        close(lost[t, 1], change[task.test.domain == t].mean())


def test_toy_merged_accuracy(toy, task, adapted):
    gates = mean_gates(adapted, [task.training.tokens])
    merged = toy.merged_accuracy(adapted, task.training, task.test)
    with hook_gates(adapted, lambda name, w: gates[name].expand_as(w)):
        close(merged, toy.accuracy(adapted, task.test))


def test_toy_subspace_overlap(toy):
    axes = torch.eye(6)
    pair = torch.stack([axes[:, :2], axes[:, 1:3] @ torch.tensor([[1.0, 5], [2, 3]])])
    assert toy.subspace_overlap(pair) == pytest.approx(0.5)  # one of two axes in common


def test_toy_experiment(toy, tmp_path, capsys, monkeypatch):
    def num_heads_from_corpus(documents):
        assert max(map(max, documents)) < toy.SYMBOLS  # no question marks
        assert len(documents) <= toy.STEPS * toy.BATCH  # the test set has more
        return 3, [2.0, 1.0]

    def ablate_heads(model, data, n):
        assert len(data.tokens) == toy.EVALUATION  # the test set
        return torch.full((toy.DOMAINS, n), -0.01)

    def merged_accuracy(model, calibration, test):
        assert len(calibration.tokens) <= toy.STEPS * toy.BATCH
        domains = {*calibration.domain.tolist(), *test.domain.tolist()}
        return torch.full((len(test.tokens),), float(len(domains)))

    for stand_in in (num_heads_from_corpus, ablate_heads, merged_accuracy):
        monkeypatch.setattr(toy, stand_in.__name__, stand_in)
    monkeypatch.setattr(toy, "COPY_WEIGHT", None)
    file = tmp_path / "result.json"
    run_toy(toy, *f"--seed 1 --heads 2 --copy-weight 0 --json {file}".split())
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    assert (result["seed"], result["copy_weight"]) == (1, 0)
    assert (result["heads_found"], result["num_heads"], len(result["gates"][0])) == (3, 2, 2)
    assert result["merged"] == {"known": 1, "all": 3}  # domains at a time
    for name in toy.MAIN_RUN:
        accuracy = result["methods"][name]["accuracy"]
        assert re.search(rf"   {name} +[\d,]+ parameters +{accuracy:.1f}\n", printed)
    assert "-0.0" not in printed and " \n" not in printed


@parametrize("router, symbols, gain, passed, printed", [
    (0.5, 0.3, 5, True, "The heads specialise by domain.\n"),
    (0.96, 0.05, -5, False, "HydraLoRA is 5.0 points behind LoRA.\n"),
    (0.45, 0.05, 5, False, "do not specialise by domain: the symbol explains (49|50|51) % of"),
    (0.6, 0.5, 5, False, "HydraLoRA is 5.0 points ahead of LoRA.\n")])
def test_toy_check(router, symbols, gain, passed, printed, toy, adapted, monkeypatch, capsys):
    scores = iter([router, symbols])
    monkeypatch.setattr(toy, "nmi", lambda w, domain: next(scores))
    monkeypatch.setattr(toy, "gates_of", lambda model, data: sum(
        F.one_hot(which % 2).float() for which in (data.tokens, torch.arange(64)))[:, :toy.LENGTH])
    monkeypatch.setattr(toy, "fine_tune", lambda task, model, method, name, tell: (
        adapted, dict(size=1, accuracy=50.0 + gain * (name == "HydraLoRA"))))
    assert run_toy(toy, "--check", "--heads", "2") == 1 - passed
    out = capsys.readouterr().out
    assert re.search(printed, out) and out.count("\ncheck: ") == 2
    assert out.count(": NO\n") == (not passed)


def test_toy_seeds_run_in_processes():
    all_seeds = pytest.importorskip("train_toy").all_seeds
    assert all_seeds([[1, 2], [3, 4]], sorted, reverse=True) == [[2, 1], [4, 3]]


def test_toy_table(toy, monkeypatch, capsys, tmp_path):
    def all_seeds(seeds, function, names, heads, **arguments):
        assert function is toy.experiment and {*seeds}.isdisjoint(toy.TUNING_SEEDS)
        assert {*names} == {*toy.methods()} and heads == toy.DOMAINS
        for i in range(3):  # HydraLoRA gains 2, 4 and 6; on q and v it gains -1, 0 and 1
            scores = dict.fromkeys(names, 90 - i)
            scores |= {"HydraLoRA": 92 + i, "HydraLoRA on q_proj, v_proj": 89}
            methods = {name: dict(accuracy=scores[name], size=1000 + len(name)) for name in names}
            made.append(dict(methods=methods, nmi=dict(router=0.9 + i / 100),
                             input_variance={}, merged={}, overlap=dict(A=i, B=1),
                             checks={"heads specialise by domain": i != 1}))
        return made

    made, file = [], tmp_path / "result.json"
    monkeypatch.setattr(toy, "all_seeds", all_seeds)
    run_toy(toy, "--table", "--json", str(file))
    out = capsys.readouterr().out
    assert "| LoRA | 1,004:1,009 | 89.0:93.0 | +4.0 +- 2.0 | 3/3 |\n" in out
    assert "| LoRA on q_proj, v_proj | 1,022:1,027 | 89.0:89.0 | +0.0 +- 1.0 | 1/3 |\n" in out
    assert "- nmi, router: 0.91 +- 0.01, from 0.90 to 0.92\n" in out
    assert "The heads specialise by domain on 2 of 3 seeds" in out
    assert "overlap more than its B_i on 1 of 3 seeds" in out
    assert json.loads(file.read_text()) == made


def test_toy_tune(toy, monkeypatch, capsys):
    monkeypatch.setattr(toy, "all_seeds", lambda seeds, function, **arguments: [
        function(seed, **arguments) for seed in (0, 1)])
    monkeypatch.setattr(toy, "pretrain", lambda task, copy_weight, tell: copy_weight)
    monkeypatch.setattr(toy, "fine_tune", lambda task, weight, method, *_: (
        None, dict(accuracy=method.lr + method.n + 10 * task.seed + 20 * weight)))
    run_toy(toy, *"--tune --copy-weight 1".split())
    run_toy(toy, *"--tune --copy-weight 1 --method LoRA".split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(toy.RATES) * (len(toy.methods()) + 1)
    assert lines.count(f"{'LoRA':28} learning rate 0.08: mean 26.08, worst 21.1") == 2


@parametrize("options, message", [
    ("--table --check", "--check does"), ("--table --copy-weight 1", "--copy-weight does"),
    ("--copy-weight nan", "--copy-weight must be"), ("--heads 0", "--heads must be"),
    ("--seed -1", "--seed and"), ("--json /no/such/x", "/no/such/x"),
    ("--device no_such --json y", "no_such")])
def test_toy_refuses_options(options, message, toy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "Task", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(SystemExit, match="2"):
        run_toy(toy, *options.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_toy_cost(toy, capsys, monkeypatch):
    seconds = iter([2.0, 4.0, 8.0])  # of the layer, the LoRA and the loop
    monkeypatch.setattr(toy, "median", lambda t: len(t) == 1 and next(seconds))
    toy.cost("cpu", sizes=[(256, 512, 4, 3)], rounds=1)
    by_lora, by_loop = re.search(
        r"time 0.50 and 0.25, bytes (\S+) and (\S+)", capsys.readouterr().out).groups()
    assert float(by_loop) < 0.05 and 3 < float(by_lora) < 4


# ---- README ----
@pytest.fixture
def readme():
    path = Path(__file__).parent / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else pytest.skip("needs README.md")


@pytest.fixture
def example(readme, tmp_path, monkeypatch):
    """What README's blocks define, run in order."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(compile(block, "README.md", "exec"), names)
    return SimpleNamespace(**names)


def test_readme_prints_what_it_says(capsys, readme, example):
    said = re.findall(r"^ *print\(.*\) +# (.*)$", readme, re.M)
    assert capsys.readouterr().out.splitlines() == said


def test_readme_folder_is_loaded_by_peft(example, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(example.base_model(), tmp_path / "peft_adapter")
    close(loaded(IDS), example.merged(IDS), rtol=0, atol=1e-5)


def test_readme_variant_is_trained_recorded_and_merged(example):
    model = example.variant
    assert trained_names(model) == hydralora_state_dict(model).keys()
    merge_hydralora(model, mean_gates(model, [IDS]))


def test_readme_definition_is_right(example):
    def function(x, W0, bias, *others):
        return example.hydralora(x, W0, *others) + bias

    run_check("plain", function, "float32")


def test_readme_table_has_the_sizes_of_the_code(readme, toy, monkeypatch):
    rows = re.findall(r"^\| (.*) \| (.*):(.*) \| (.*):(.*) \| (\S+) .*/\d+ \|$", readme, re.M)
    monkeypatch.setattr(toy, "subspace_overlap", lambda matrices: matrices.shape[1])
    result = toy.experiment(0, "cpu", [*toy.methods()], toy.DOMAINS, tell=toy.silent)
    assert result["overlap"] == dict(A=64, B=64, chance=6 / 64)  # rows of A and columns of B
    sizes = {name: f"{method['size']:,}" for name, method in result["methods"].items()}
    assert [name for name, *_ in rows] == [name for name in sizes if "Hydra" not in name]
    for name, size, our_size, accuracy, ours, gain in rows:
        assert size == sizes[name] and our_size in sizes.values()
        assert float(gain) == pytest.approx(float(ours) - float(accuracy), abs=0.11)


@pytest.mark.skipif("TOY_RESULT" not in os.environ, reason="needs a file of train_toy.py")
def test_readme_numbers_of_seed_0_are_those_of_a_run(readme):
    """PyTorch 2.3.1 and 2.13 differ a little."""
    result = json.loads(Path(os.environ["TOY_RESULT"]).read_text())
    rows = re.findall(r"domain \d (\|.*)", readme)
    assert len(rows) == len(result["gates"])
    for row, gates, lost in zip(rows, result["gates"], result["lost"]):
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", row)]
        assert numbers[::2] == pytest.approx(gates, abs=0.02)
        assert numbers[1::2] == pytest.approx(lost, abs=2)
