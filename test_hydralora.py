# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""A correctness oracle for HydraLoRA, then the tests of this project.

The oracle tests any function (x, W0, bias, A, B, Wg, scaling) -> y that computes

    y = W0 x + bias + scaling * sum_i w_i B_i A x,    w = softmax(Wg x),

with x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k), y (..., d):

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle -x

Without HYDRALORA_IMPL, it tests `hydralora_layer`. HYDRALORA_DEVICE sets the device, by
default cuda if there is one. W0 and bias need not get a gradient (frozen base).

The id of a test, such as test_oracle[gradients-3d-tiles-aligned-nobias-bf16], says what a
kernel must support: values, inference-values or gradients; the number of axes of x; the case
(see CASES); aligned (k, d and r are multiples of 16) or odd; bias or nobias; dtypes (GROUPS):

    -k "oracle and 3d and aligned and (nobias-bf16 or nobias-fp32)"
    -k "oracle and 2d and aligned and (nobias-bf16 or nobias-fp32)"    x is (tokens, k)
    -k "oracle and not gradients"                                      no backward
    -k "oracle and not autocast and not fp64"                          float32 inside

A new case or test needs a row in WRONG: a mistake that it must catch.

On two cores the oracle takes half a minute, the whole file a minute. While editing, run
-k "not oracle and not implementation", -k toy or -k readme. README's numbers are printed by
train_toy.py, --table, --tune and --cost.
"""
import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import pkgutil
import re
import sys
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


def read_settings():
    """The device and the function that the environment names; stops with a sentence."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
    device = settings.pop("HYDRALORA_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    name = settings.pop("HYDRALORA_IMPL", None)
    try:
        if settings:
            raise ValueError(f"{[*settings]} unknown: use HYDRALORA_IMPL and HYDRALORA_DEVICE")
        torch.empty(1, device=device)
        function = pkgutil.resolve_name(name) if name else None
        if name and not callable(function):
            raise TypeError(f"HYDRALORA_IMPL={name} is no function: use module:function")
    except Exception as error:
        pytest.exit(str(error).splitlines()[0], returncode=4)
    return device, function


DEVICE, IMPLEMENTATION = read_settings()
parametrize = pytest.mark.parametrize


# ---- The equations, twice ----
def reference(x, W0, bias, A, B, Wg, scaling, grad_y):
    """Eqs. 3 and 4, and their derivatives by hand: y and the gradients of sum(grad_y * y)."""
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
        dw = np.zeros(n)
        for i in range(n):
            back = B[i].T @ g  # (r,)
            dw[i] = scaling * (back @ z)
            grads["B"][i] += scaling * w[i] * np.outer(g, z)
            grads["A"] += scaling * w[i] * np.outer(back, v)
            grads["x"][token] += scaling * w[i] * (A.T @ back)
        for i in range(n):
            dlogit = w[i] * (dw[i] - w @ dw)
            grads["Wg"][i] += dlogit * v
            grads["x"][token] += dlogit * Wg[i]
        grads["W0"] += np.outer(g, v)
        grads["bias"] += g
        grads["x"][token] += W0.T @ g
    return y, grads


def softmax(logits):
    return logits.softmax(-1)


def uncentred(logits):
    """softmax, but its derivative w_i dw_i - w_i sum_j w_j dw_j lacks the second term."""
    return (logits - logits.logsumexp(-1, keepdim=True).detach()).exp()


def loop(x, W0, bias, A, B, Wg, scaling, gates=softmax):
    """Eqs. 3 and 4 in torch, for autograd."""
    y, x = F.linear(x, W0, bias), x.to(A.dtype)    # (..., d), (..., k)
    w, z = gates(F.linear(x, Wg)), F.linear(x, A)  # (..., n), (..., r)
    for i in range(len(B)):
        y = y + (w[..., i, None] * F.linear(z, B[i]) * scaling).to(y.dtype)
    return y


# ---- Cases and their tensors ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TENSORS = (*INPUTS, "grad_y")
ACTIVATIONS = ("x", "grad_y")
WEIGHTS = INPUTS[1:]
TRAINED = ("x", "A", "B", "Wg")  # what requires grad over a frozen base

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
GROUPS = {  # dtypes: of x and y, of W0 and bias, of A, B and Wg, and of autocast
    "fp64": (f64, f64, f64, None),
    "fp32": (f32, f32, f32, None),
    "bf16": (bf16, bf16, bf16, None),
    "fp16": (f16, f16, f16, None),
    "mixed-bf16": (bf16, bf16, f32, None),  # A, B and Wg may be cast to 16 bits
    "mixed-fp16": (f16, f16, f32, None),
    "autocast-bf16": (f32, f32, f32, bf16),  # y may be in 16 bits or float32
    "autocast-fp16": (f32, f32, f32, f16),
    "autocast-norm": (f32, bf16, f32, bf16),  # x as from a LayerNorm
}


@dataclass(frozen=True)
class Case:
    group: str = ""
    name: str = ""
    lead: tuple = (2, 5)  # axes of x before k: () is one token, (5,) a sequence
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    magnitude: float = 1.0  # multiplies x and grad_y, divides W0 and Wg
    Wg_scale: float = 1.0
    B_scale: float = 1.0
    mean: float = 0.0  # of x and grad_y
    layout: str = "contiguous"
    requires_grad: tuple = field(default=INPUTS, compare=False)
    seed: int = 0
    resampled: tuple = ()  # tensors drawn with the next seed

    def __repr__(self):
        changed = {name: v for name, v in vars(self).items() if v != getattr(Case, name)}
        return f"Case({', '.join(f'{name}={v!r}' for name, v in changed.items())})"

    @property
    def id(self):
        sizes = "odd" if self.k % 16 or self.d % 16 or self.r % 16 else "aligned"
        bias, axes = "bias" if self.bias else "nobias", f"{len(self.lead) + 1}d"
        return "-".join(filter(None, [axes, self.name, sizes, bias, self.group]))

    @property
    def inputs(self):
        return [name for name in INPUTS if self.bias or name != "bias"]

    @property
    def dtypes(self):
        x, base, adapter, autocast = GROUPS[self.group]
        return dict(x=x, W0=base, bias=base, A=adapter, B=adapter, Wg=adapter, grad_y=autocast or x)


@functools.cache
def normal(shape, *seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def tensors(case, names=TENSORS):
    c, made, std = case, {}, case.k**-0.5
    sizes = dict(  # standard deviation and shape
        x=(c.magnitude, (*c.lead, c.k)), W0=(std / c.magnitude, (c.d, c.k)), bias=(1.0, (c.d,)),
        A=(std, (c.r, c.k)), B=(c.B_scale * c.r**-0.5, (c.n, c.d, c.r)),
        Wg=(c.Wg_scale * std / c.magnitude, (c.n, c.k)), grad_y=(c.magnitude, (*c.lead, c.d)))
    axes, laid_out, lay_out = LAYOUTS[c.layout]
    for name in names:
        std, shape = sizes[name]
        t = normal(shape, c.seed + (name in c.resampled), TENSORS.index(name))
        t = std * (t + c.mean * (name in ACTIVATIONS))
        t = t.to(DEVICE, c.dtypes[name])
        if name in laid_out and t.dim() >= axes:
            t = lay_out(t)
        made[name] = nn.Parameter(t) if name in c.requires_grad else t
    return made if c.bias else made | {"bias": None}


def as_float64(found):
    return {name: t.detach().to("cpu", f64, copy=True) for name, t in found.items()
            if t is not None}


def is_small(case):
    """Whether the NumPy loops are fast enough."""
    return math.prod(case.lead) * case.n <= 64 and case.d * case.r <= 1e4


@functools.cache
def expected(case):
    """y and the gradients of sum(grad_y * y) in float64, from the rounded tensors."""
    return by_loops(case) if is_small(case) else by_autograd(case)


def by_loops(case):
    inputs = {"bias": torch.zeros(case.d)} | as_float64(tensors(case))
    y, grads = reference(**{name: t.numpy() for name, t in inputs.items()}, scaling=case.scaling)
    return {"y": torch.from_numpy(y)} | {
        f"{name}.grad": torch.from_numpy(grads[name]) for name in case.inputs}


@functools.cache
def by_autograd(case, gates=softmax):
    leaves = {"bias": None} | as_float64(tensors(case))
    grad_y = leaves.pop("grad_y")
    y = loop(**{name: t if t is None else t.requires_grad_() for name, t in leaves.items()},
             scaling=case.scaling, gates=gates)
    y.backward(grad_y)
    return {"y": y.detach()} | {f"{name}.grad": leaves[name].grad for name in case.inputs}


# ---- Tolerances ----
@functools.cache
def tolerance(case):
    """The largest allowed errors: eps + 4 * the error of `loop` in the same dtypes.

    For example 0.031 for A.grad of many-tokens in bf16, where eps is 0.0078 and the loop's error
    0.0058: a kernel may round the sum over 4096 tokens after each of 32 chunks, but not of 114.
    In fp32, 5e-5 more: float32 sums in any order, but no TF32. In fp64, 1e-10 more.
    """
    all_cast = replace(case, group=case.group.removeprefix("mixed-"), requires_grad=INPUTS)
    eps, more = torch.finfo(case.dtypes["grad_y"]).eps, {"fp64": 1e-10, "fp32": 5e-5}
    return {name: eps + 4 * error_of(name, t, case) + more.get(case.group, 0.0)
            for name, t in as_float64(compute(loop, all_cast)).items()}


@functools.cache
def size_of(name, case):
    """The norm of the right value, or of its first term where large terms cancel."""
    terms = expected(case), by_autograd(case, uncentred)
    return max(of_name[name].norm().item() for of_name in terms) or 1.0


def errors_of(name, found, case):
    """The errors of the rows (a row is a token) and columns: the norm of the difference, relative
    to an average row or column of the right value."""
    off = found - expected(case)[name]
    both = off.norm(dim=-1), off.reshape(-1, off.shape[-1]).norm(dim=0)
    return [norms.nan_to_num(math.inf) * norms.numel()**0.5 / size_of(name, case)
            for norms in both]


def error_of(name, found, case):
    return torch.cat([errors.flatten() for errors in errors_of(name, found, case)]).max().item()


HINTS = {  # up to which error they are given
    "fp64": (1e-4, "a float32 kernel? Leave out fp64: -k 'oracle and not fp64'"),
    "fp32": (3e-3, "TF32? Its errors are about 5e-4")}


def assert_correct(found, case, moment=""):
    """Fails with what is wrong, where, by how much, and matching known mistakes."""
    __tracebackhide__ = True
    found, allowed = as_float64(found), tolerance(case)
    errors = {name: error_of(name, t, case) for name, t in found.items()}
    wrong = [name for name in found if errors[name] > allowed[name]]
    if not wrong:
        return
    worst = "y" if "y" in wrong else max(wrong, key=lambda name: errors[name] / allowed[name])
    how = "wrong" if found[worst].any() else "zero or missing"
    rows, _ = errors_of(worst, found[worst], case)
    if 0 < len(off := torch.argwhere(rows > allowed[worst])) < rows.numel():
        how += f" in {len(off)} of {rows.numel()} rows, first {off[0].tolist()}"
    correct = ", ".join(name for name in found if name not in wrong) or "nothing"
    message = (f"{moment}{worst} is {how}: error {errors[worst]:.2g}, tolerance "
               f"{allowed[worst]:.2g}\nwrong: {', '.join(wrong)}; correct: {correct}\n{case}")
    largest, hint = HINTS.get(case.group, (0, ""))
    if max(errors.values()) < largest:
        raise AssertionError(f"{message}\n{hint}")
    known = [row.message for row in KNOWN if matches(row.steps, found, case)]
    if len(known) in (1, 2, 3):
        message += f"\nmatches a known mistake: {' or '.join(known)}"
    raise AssertionError(message)


def matches(steps, found, case):
    """Whether the layer with these steps gives what was found, nan and inf included."""
    mode, allowed = torch.enable_grad if len(found) > 1 else torch.no_grad, tolerance(case)
    try:
        given = as_float64(compute(mutant(**steps), case, mode))
    except Exception:  # it does not run on this case
        return False
    return all(torch.allclose(
        found[name], t, allowed[name], allowed[name] * size_of(name, case) / t.numel()**0.5,
        equal_nan=True) for name, t in given.items() if name in found)


# ---- One call ----
GLOBAL_STATE = {
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the random seed": (torch.initial_seed, torch.manual_seed),
    "float32's precision": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)}


def require(condition, message, case):
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(f"{message}; {case}")


def call_kernel(function, arguments, case, moment):
    """Fails if the function raises or changes the global state."""
    __tracebackhide__ = True
    before = {name: get() for name, (get, _) in GLOBAL_STATE.items()}
    try:
        returned = function(*arguments)
    except Exception as error:
        raise AssertionError(
            f"{moment} raised {type(error).__name__}: {error}\n{case}\nto leave out such tests: "
            f"-k 'oracle and not ...' with a part of {case.id}") from error
    for name, (get, put_back) in GLOBAL_STATE.items():
        if (now := get()) != before[name]:
            put_back(before[name])  # for later calls
            require(False, f"{moment} changed {name} to {now}", case)
    return returned


def assert_unchanged(call, moment):
    __tracebackhide__ = True
    for name, value in call.before.items():
        now = call.inputs[name].detach()
        same = torch.equal(now.nan_to_num(), value.nan_to_num())
        require(same, f"{moment} changed {name} in place", call.case)


def forward(function, case, mode=torch.enable_grad, inputs=None):
    __tracebackhide__ = True
    with mode():
        inputs = inputs or tensors(case)
    cast = GROUPS[case.group][3]
    before = {name: t.detach().clone() for name, t in inputs.items() if t is not None}
    required = [name for name in before if mode is torch.enable_grad and inputs[name].requires_grad]
    arguments = (*(inputs[name] for name in INPUTS), case.scaling)
    with torch.autocast(torch.device(DEVICE).type, cast or bf16, bool(cast)), mode():
        y = call_kernel(function, arguments, case, "the call")
    require(isinstance(y, torch.Tensor), f"expected a tensor, got a {type(y).__name__}", case)
    shape, dtype = (*case.lead, case.d), case.dtypes["grad_y"]
    require(y.shape == shape, f"wrong shape: expected {shape}, got {tuple(y.shape)}", case)
    require(y.dtype in (dtype, f32 if cast else dtype),
            f"wrong dtype: expected {dtype}, got {y.dtype}", case)
    require(torch._debug_has_internal_overlap(y) != 1, "y overlaps itself in memory", case)
    require(required or not y.requires_grad, "y requires grad, but no input does", case)
    require(y.requires_grad or {*required} <= {"W0", "bias"},
            f"y does not require grad, though {', '.join(required)} do: no backward (-k 'oracle "
            "and not gradients')? Copied weights (see hydralora_layer)?", case)
    require(mode is torch.inference_mode or not y.is_inference(), "y is an inference tensor", case)
    call = SimpleNamespace(case=case, inputs=inputs, before=before, required=required, y=y,
                           grad_y=inputs["grad_y"].to(y.dtype))
    assert_unchanged(call, "the call")
    return call


def gradients(call):
    """The gradients that are required. A missing one of x, A, B or Wg counts as 0."""
    grads = {name: call.inputs[name].grad for name in call.required}
    return {f"{name}.grad": torch.zeros_like(call.inputs[name]) if g is None else g
            for name, g in grads.items() if g is not None or name in TRAINED}


def backward(call):
    __tracebackhide__ = True
    for name in call.before:
        call.inputs[name].grad = None
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
LAYOUTS = {  # fewest axes, tensors, function; the last two change values
    "contiguous": (0, (), None),
    "slice": (1, TENSORS, lambda t: F.pad(t, (3, 5) * t.dim(), value=GAP)[
        (slice(3, -5),) * t.dim()]),  # of a larger tensor, in all axes
    "gaps": (3, TENSORS, lambda t: F.pad(t, (0, 0, 0, 1), value=GAP)[..., :-1, :]),
    "stride-2": (1, TENSORS, lambda t: F.pad(t[..., None], (0, 1), value=GAP)[..., 0]),
    "column-major": (2, TENSORS, lambda t: swapped(t, -2, -1)),
    "batch-second": (3, TENSORS, lambda t: swapped(t, 0, 1)),  # x from (t, b, k)
    "heads-first": (4, TENSORS, lambda t: swapped(t, -3, -2)),  # x from (b, heads, t, k)
    "zero-token": (2, ("x",), lambda t: torch.cat([0 * t[:1], t[1:]])),
    "expanded": (1, ACTIVATIONS, lambda t: t.flatten()[0].expand(t.shape)),
}


# ---- Cases ----
ALIGNED = dict(k=64, d=64, r=16, n=8, bias=False)  # kernels often have a fast path for it
CASES = {
    "plain": Case(),
    "tokens": Case(lead=(40,), **ALIGNED),
    "tiles": Case(lead=(2, 64), k=128, d=192, r=32, n=8, bias=False),
    "past-tiles": Case(lead=(2, 65), k=193, d=131, r=33, n=17),
    "one-token": Case(lead=(), scaling=2.0**-10),
    "empty-batch": Case(lead=(0, 5), **ALIGNED),
    "one-head": Case(k=48, d=8208, r=16, n=1),  # LoRA
    "two-heads": Case(lead=(2, 60), **ALIGNED | dict(n=2), Wg_scale=100.0),  # logits below -88
    "many-heads": Case(n=70, Wg_scale=1000.0),
    "large-B": Case(lead=(2, 150), k=16, d=528, r=528, n=2, bias=False),
    "many-tokens": Case(lead=(512, 8), k=32, d=32, r=16, n=3, mean=1.0, bias=False),
    "grid-limit": Case(lead=(65540,), k=3, d=2, r=1, n=2, requires_grad=TRAINED),
    "wide": Case(lead=(3,), k=1104, d=1056, r=16, n=2, bias=False),
    "zero-heads": Case(lead=(2, 30), k=3, d=10, bias=False, B_scale=0.0),  # as training begins
    "near-zero": Case(B_scale=2e-3),  # soon after
    "zero-token": Case(layout="zero-token"),
    "large-magnitude": Case(magnitude=2.0**17),
    "decode": Case(lead=(1, 1), k=16400, d=80, r=16, n=2, bias=False),
    **{layout: Case(lead=(3, 4), layout=layout, **ALIGNED)
       for layout in ("slice", "gaps", "column-major", "batch-second", "expanded")},
    "heads-first": Case(lead=(2, 3, 4), layout="heads-first", **ALIGNED),
    "stride-2": Case(lead=(3, 4), layout="stride-2", **ALIGNED | dict(bias=True)),
}
TILES, ANY = (64, 128, 192), (*range(1, 33), *range(33, 200, 8))
RANDOM = {  # k, d, r, n and tokens, drawn anew in each group
    "drawn-tiles": (TILES, TILES, (16, 32, 64), (4, 8, 16), (64, 128)),
    "drawn-any": (ANY, ANY, range(1, 17), range(1, 17), ANY),
}
LARGE = ("large-B", "wide", "large-magnitude", "decode")  # slow, or beyond float16
MODES = {"values": torch.no_grad, "inference-values": torch.inference_mode,
         "gradients": torch.enable_grad}


def draw_case(name, group):
    rng = np.random.default_rng([1, [*RANDOM].index(name), [*GROUPS].index(group)])

    def one_of(*values):
        return values[rng.integers(len(values))]

    k, d, r, n, tokens = (one_of(*sizes) for sizes in RANDOM[name])
    lead = (one_of(1, 2), one_of(1, 2), one_of(1, 3), tokens)[one_of(0, 1, 2, 3):]
    return Case(
        group, name, lead, k, d, r, n, bias=bool(name != "drawn-tiles" and rng.random() < 0.7),
        scaling=rng.normal(), layout=one_of(*[*LAYOUTS][:-2]),
        requires_grad=one_of(INPUTS, TRAINED))


def cases_of(name, group):
    if name in RANDOM:
        return [draw_case(name, group)]
    if name in CASES:
        return [replace(CASES[name], group=group, name=name)]
    cases = [Case(group), Case(group, **ALIGNED), Case(group, lead=(10,), **ALIGNED)]
    return cases[:1] if name == "gradients_compiled" else cases


def groups_of(name):
    if name == "gradients_compiled":
        return ["fp32"]
    return ["fp32", "bf16", "mixed-bf16", "autocast-bf16"] if name in LARGE else [*GROUPS]


def all_cases(*names):
    return parametrize("case", [
        case for name in names for group in groups_of(name) for case in cases_of(name, group)],
        ids=lambda case: case.id)


# ---- The tests of an implementation ----
@pytest.fixture
def implementation():
    """In one thread: the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20)  # not 0
    yield IMPLEMENTATION or hydralora_layer
    torch.set_num_threads(threads)


each_mode = parametrize("mode", MODES.values(), ids=MODES)
each_state = all_cases("a test")


@all_cases(*CASES, *RANDOM)
@each_mode
def test_oracle(implementation, mode, case):
    assert_correct(compute(implementation, case, mode), case)


@each_state
@each_mode
def test_oracle_calls_in_a_row(implementation, mode, case):
    """The same again, other values, other layers, one token after a sequence, more ranks or
    heads, then fewer; then the backwards, half of them in order, half in reverse."""
    inputs, calls, axes = tensors(case), [], len(case.lead)
    token = ACTIVATIONS, dict(lead=(1, 1)[-axes:])
    for new, change in [
            ((), {}), ((), dict(scaling=0.0)), (WEIGHTS, {}), (ACTIVATIONS, {}),
            (ACTIVATIONS, dict(lead=(4, 7)[-axes:])), token, token,
            (TENSORS, dict(lead=(2, 1)[-axes:])), (("bias",), dict(bias=False)),
            (("A", "B"), dict(r=32)), (("B", "Wg"), dict(n=20)), ((), {}),
            (INPUTS, dict(layout="column-major")),
            *((TENSORS, dict(seed=i % 5, scaling=i % 5 - 1.5)) for i in range(57 * case.bias))]:
        now = replace(case, resampled=new, **change)
        calls.append(forward(implementation, now, mode, inputs | tensors(now, new)))
    half = len(calls) // 2
    results = [(backward(call), call.case) for call in calls[:half] + calls[:half - 1:-1]]
    for found, now in results:  # only now: a later call may overwrite a result
        assert_correct(found, now, f"one of {len(calls)} calls: ")


@each_state
@each_mode
def test_oracle_changed_tensors(implementation, mode, case):
    """An input changes between calls, in place or in other memory, as offloading does: by .data,
    which keeps its version, and with the same sum."""
    changes = itertools.product((case, replace(case, lead=(2, 1)[-len(case.lead):])), case.inputs)
    aligned = replace(case, **ALIGNED | dict(bias=True))
    for now, name in [*changes] + [(aligned, "bias")] * case.bias:
        inputs, right = tensors(now), tensors(now)[name].data
        for way in ("in place", "in other memory"):
            inputs[name].data.copy_(right.flip(0))
            for _ in range(2):
                forward(implementation, now, mode, inputs)
            if way == "in place":
                inputs[name].data.copy_(right)
            else:
                inputs[name].data = right.clone()
            found = compute(implementation, now, mode, inputs)
            assert_correct(found, now, f"after the test changed {name} {way}: ")


@each_state
@each_mode
def test_oracle_nan_propagates(implementation, mode, case):
    """nan in an input, and inf in grad_y, which a GradScaler looks for, reach what they reach in
    `loop`, and no other element of y."""
    for name, value in [*((name, math.nan) for name in case.inputs), ("grad_y", math.inf)]:
        results = []
        for function in (loop, implementation):
            inputs = tensors(case)
            inputs[name].data[(0,) * inputs[name].dim()] = value
            results.append(as_float64(compute(function, case, mode, inputs)))
        right, found = results
        reached = right["y"].isnan()
        require(found["y"][reached].isnan().all(), f"{value} in {name}: y is not nan", case)
        rest = torch.where(reached, expected(case)["y"], found["y"])
        assert_correct({"y": rest}, case, f"{value} in {name}, the rest: ")
        finite = [key for key in found if found[key].isfinite().all() > right[key].isfinite().all()]
        require(not finite, f"{value} in {name}, but finite {', '.join(finite)}", case)


@each_state
@each_mode
def test_oracle_memory_is_freed(implementation, mode, case):
    """The memory of x, y and the graph is freed with the last reference to y."""
    for with_backward in (True, False):
        call = forward(implementation, case, mode)
        if with_backward:
            backward(call)
        memory = [StorageWeakRef(t.untyped_storage()) for t in (call.inputs["x"], call.y)]
        del call
        if not all(storage.expired() for storage in memory):
            gc.collect()  # a reference cycle is no leak
        require(all(storage.expired() for storage in memory), "the kernel keeps x or y alive", case)


@each_state
def test_oracle_gradients_accumulate(implementation, case):
    """Two layers on one x, one layer that is called twice, or inputs that are not leaves; in one
    backward or two, after calls without gradients."""
    case = replace(case, requires_grad=TRAINED)
    for new, at_once in itertools.product((WEIGHTS, ("x",), ("grad_y",), ()), (True, False)):
        leaves, other = tensors(case), replace(case, resampled=new)
        inputs = leaves if new else leaves | {name: leaves[name] * 1.0 for name in TRAINED}
        for mode in (torch.inference_mode, torch.no_grad):
            forward(implementation, case, mode, inputs)
        first = second = forward(implementation, case, inputs=inputs)
        if new:
            second = forward(implementation, other, inputs=inputs | tensors(other, new))
        ys, grads = (first.y, second.y), (first.grad_y, second.grad_y)
        for y, g in [(ys, grads)] if at_once else zip(ys, grads):
            call_kernel(torch.autograd.backward, (y, g, True), case, "the backward")
        first.inputs = leaves
        both = as_float64(gradients(first))
        rest = {name: (both[name] - expected(other)[name] + expected(case)[name]) / 2
                for name in both if name[:-5] not in new}  # the mean of two errors
        calls = f"calls that differ in {', '.join(new)}" if new else "backwards of one call"
        assert_correct(rest, case, f"two {calls}{', at once' * at_once}: ")


@each_state
def test_oracle_gradients_after_a_change(implementation, case):
    """y or an input changes before the backward: the gradients are right, or autograd raises."""
    for name in ("y", *case.inputs):
        call = forward(implementation, case)
        with torch.no_grad():
            (call.inputs | {"y": call.y})[name].mul_(2)
        with contextlib.suppress(RuntimeError):
            call.y.backward(call.grad_y)
            assert_correct(gradients(call), case, f"after the test changed {name}, the backward: ")


@each_state
def test_oracle_gradients_of_each_subset(implementation, case):
    """Every subset of the inputs requires grad in turn."""
    inputs = tensors(case)
    for chosen in itertools.product((False, True), repeat=len(case.inputs)):
        now = replace(case, requires_grad=tuple(itertools.compress(case.inputs, chosen)))
        for name in case.inputs:
            inputs[name].requires_grad_(name in now.requires_grad)
        assert_correct(compute(implementation, now, inputs=inputs), now)


@all_cases("gradients_compiled")
def test_oracle_gradients_compiled(implementation, case):
    """Under torch.compile, as far as it can compile."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: implementation(*inputs), backend="eager")
    with torch._dynamo.config.patch(suppress_errors=True):
        assert_correct(compute(compiled, case), case, "under torch.compile: ")


TESTS = {name.removeprefix("test_oracle_"): test for name, test in globals().items()
         if name.startswith("test_oracle_")}


def run_check(name, function, group):
    """Runs the case or the test of this name, in all its modes."""
    test = TESTS.get(name, test_oracle)
    for case in cases_of(name, group)[:2]:
        if "gradients" in name:
            test(function, case)
        else:
            for mode in MODES.values():
                test(function, mode, case)


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
    doubles the gradient of w. v has the inputs, the sizes and the steps; v.memory lasts."""
    names, memory = (*INPUTS, "s"), {}

    def function(*inputs):
        v = SimpleNamespace(**dict(zip(names, inputs)), inputs=inputs, memory=memory)
        (v.n, v.d, v.r), v.k = v.B.shape, v.x.shape[-1]
        v.tokens = v.x.shape[-2] if v.x.dim() > 1 else 0
        for name in (*names, *STEPS):
            if name in STEPS:
                setattr(v, name, STEPS[name](v))
            if name in changed:
                setattr(v, name, changed[name](v))
            if "d" + name in changed and isinstance(t := getattr(v, name), torch.Tensor):
                setattr(v, name, t := t.clone())
                if t.requires_grad:
                    t.register_hook(functools.partial(changed["d" + name], v))
        return v.y

    return function


correct = mutant()


def straight_through(t, value):
    """`value` with the gradient of t."""
    return t + (value - t).detach()


def as_contiguous(t, offset=0):
    """What a kernel reads if it assumes that t is contiguous from this offset on."""
    strides = [math.prod(t.shape[i + 1:]) for i in range(t.dim())]
    return straight_through(t, t.detach().as_strided(t.shape, strides, offset))


def zero_from(t, dim, size):
    """t, zero from index `size` on."""
    t, rest = t.tensor_split([size], dim)
    return torch.cat([t, 0 * rest], dim)


def scaled(t, factor, index=...):
    """t, its part at an index multiplied, with the gradient of t."""
    value = t.detach().clone()
    value[index] *= factor
    return straight_through(t, value)


def chunks(v, count):
    parts = [correct(part, *v.inputs[1:]) for part in v.x.reshape(-1, v.k).split(count)]
    return torch.cat(parts).view(v.y.shape)


def softmax_less(v, maximum):
    exp = (v.logits - maximum).exp()
    return exp / exp.sum(-1, keepdim=True)


def half_of_x(v):
    return straight_through(v.x, v.x.half().to(v.x))


def read_once(t, copy=torch.clone):
    """What was read of this tensor the first time."""
    if not hasattr(t, "kept"):
        t.kept = copy(t.detach())
    return straight_through(t, t.kept)


def first_tile_of_ranks(v):
    """A, up to the multiple of 16 that the first layer of the same k and d needed."""
    return zero_from(v.A, 0, v.memory.setdefault((v.k, v.d), -(-v.r // 16) * 16))


def overwrite_first_output(v):
    v.memory.setdefault(v.y.shape, v.y).data.copy_(v.y)
    return v.y


def gates_of_the_prompt(v):
    if v.tokens > 1:
        v.memory["w"] = v.w.detach().flatten(0, -2)[-1]
    return v.memory.get("w", v.w).expand_as(v.w) if v.tokens == 1 else v.w


def queue(v):
    if v.delta.requires_grad:
        v.memory.setdefault("queue", []).append(v)
    return v.delta


def double_x(v):
    v.x.data.mul_(2)
    return v.y


def set_seed(v):
    torch.manual_seed(0)
    return v.y


KEPT = []


def keep(t):
    KEPT.append(t)
    return t


# Changes to gradients; None keeps the gradient.
def double_bias(v, g):
    v.bias.data.mul_(2)


def drop_A_grad(v, g):
    v.inputs[3].grad = None


def set_A_grad(v, g):
    v.inputs[3].grad = g
    return 0 * g


def clear_w(v, g):
    v.w.data.zero_()


def only_if_unchanged(i):
    return lambda v, g: g * (v.inputs[i]._version == 0)


Wrong = collections.namedtuple("Wrong", "message caught_by steps groups")


def wrong(message, caught_by="plain", groups="fp32 bf16", **steps):
    """What the oracle must say of a mutant, and the case or test that must catch it, after the
    case "plain" has passed."""
    return Wrong(message, caught_by, steps, groups.split())


def wrong_for_each(names, message, caught_by, change):
    return [wrong(message.format(name), caught_by,
                  **{name: lambda v, name=name: change(getattr(v, name))}) for name in names]


KNOWN = [  # a failure that looks like one of these is named after it
    wrong("no scaling", s=lambda v: 1.0),
    wrong("lora_alpha instead of lora_alpha / r", s=lambda v: v.s * v.r),
    wrong("softmax over tokens", w=lambda v: v.logits.softmax(-2)),
    wrong("softmax over heads padded with 0",
          w=lambda v: F.pad(v.logits, (0, -v.n % 16)).softmax(-1)[..., :v.n]),
    wrong("no softmax", w=lambda v: v.logits),
    wrong("top-1 gates", w=lambda v: v.w * F.one_hot(v.w.argmax(-1), v.n)),
    wrong("uniform gates", w=lambda v: 0 * v.w + 1 / v.n),
    wrong("heads summed", w=lambda v: 0 * v.w + 1),
    wrong("gates averaged over the sequence", w=lambda v: v.w.mean(-2, keepdim=True)),
    wrong("router on A x", logits=lambda v: F.linear(F.linear(v.h, v.A), v.Wg[:, :v.r])),
    wrong("router's input detached", logits=lambda v: F.linear(v.h.detach(), v.Wg)),
    wrong("gates detached", w=lambda v: v.w.detach()),
    wrong("weights copied into a layer (see hydralora_layer)",
          A=lambda v: v.A.detach(), B=lambda v: v.B.detach(), Wg=lambda v: v.Wg.detach()),
    wrong("B reshaped, not transposed", B=lambda v: v.B.reshape(v.d, v.n, v.r).transpose(0, 1)),
    wrong("no bias", base=lambda v: F.linear(v.x, v.W0)),
    wrong("W0 transposed if square", "tokens", W0=lambda v: v.W0.T if v.k == v.d else v.W0),
    wrong("wrong in whole tiles", "tiles", A=lambda v: v.A * (1 + (v.tokens % 64 + v.r % 32 == 0))),
    wrong("wrong for k and d of 64 or more", "drawn-tiles", A=lambda v: v.A * (
        1 + (v.k > 64 and v.k % 64 + v.d % 64 == 0))),
    wrong("first 64 tokens only", "past-tiles", delta=lambda v: zero_from(v.delta, -2, 64)),
    wrong("no tail after vectors of 8", "drawn-any", x=lambda v: zero_from(
        v.x, -1, v.k // 8 * 8 or v.k)),
    wrong("first 512 of d only, in B.grad", "large-B", dB=lambda v, g: zero_from(g, 1, 512)),
    wrong("first 8192 of d only", "one-head", delta=lambda v: zero_from(v.delta, -1, 8192)),
    wrong("first 8192 of k only", "decode", x=lambda v: zero_from(v.x, -1, 8192)),
    wrong("first 65535 tokens only", "grid-limit", delta=lambda v: zero_from(v.delta, -2, 65535)),
    wrong("single token not scaled", "one-token", s=lambda v: v.s if v.tokens else 1.0),
    wrong("no update with one head", "one-head", delta=lambda v: v.delta * (v.n > 1)),
    wrong("maximum over padding with 0", "two-heads",
          w=lambda v: softmax_less(v, v.logits.amax(-1, keepdim=True).clamp(min=0))),
    wrong("softmax without subtracting the maximum", "many-heads", w=lambda v: softmax_less(v, 0)),
    wrong("no update while B is 0", "zero-heads", delta=lambda v: v.delta * v.B.any()),
    wrong("small gradient of A dropped", "near-zero", dA=lambda v, g: g * (g.norm() > 0.1)),
    wrong("no gradient for padding", "zero-token", dx=lambda v, g: g * v.x.any(-1, keepdim=True)),
    wrong("rounded to float16", "large-magnitude", "bf16", x=half_of_x),
    wrong("W0 read as contiguous", "slice",
          W0=lambda v: as_contiguous(v.W0, v.W0.storage_offset())),
    wrong("x read as contiguous if its rows are", "gaps",
          x=lambda v: as_contiguous(v.x) if v.x.stride()[-2:] == (v.k, 1) else v.x),
    wrong("bias read as contiguous", "stride-2", bias=lambda v: as_contiguous(v.bias)),
    wrong("W0 read as contiguous if column-major", "column-major",
          W0=lambda v: as_contiguous(v.W0) if v.W0.stride(0) == 1 else v.W0),
    wrong("x read as contiguous if batch-second", "batch-second",
          x=lambda v: as_contiguous(v.x) if v.x.stride(0) < v.x.stride(1) else v.x),
    wrong("x of 4 axes read as contiguous", "heads-first",
          x=lambda v: as_contiguous(v.x) if v.x.dim() == 4 else v.x),
    wrong("grad_y read as contiguous if expanded", "expanded",
          dy=lambda v, g: as_contiguous(g) if g.stride(-1) == 0 else g),
]
WRONG = [
    *KNOWN,
    wrong("y is wrong in 1 of 10 rows, first [1, 4]: error inf",
          y=lambda v: scaled(v.y, math.nan, (-1, -1))),
    wrong("y requires grad, but no input does", y=lambda v: v.y.requires_grad_()),
    wrong("y is an inference tensor", y=lambda v: torch.inference_mode()(torch.clone)(v.y)),
    wrong("y is wrong", s=lambda v: 0 if torch.is_inference_mode_enabled() else v.s),
    wrong("wrong dtype", groups="bf16 fp16 autocast-bf16 autocast-fp16",
          y=lambda v: v.y.double() if v.x.dtype == f32 else v.y.float()),
    wrong("x.grad is zero or missing", x=lambda v: v.x.detach()),
    wrong("the call changed x in place", y=double_x),
    wrong("the call raised RuntimeError", groups="mixed-bf16 mixed-fp16", h=lambda v: v.x),
    wrong("the call raised RuntimeError", groups="autocast-norm",
          base=torch.autocast(torch.device(DEVICE).type, enabled=False)(STEPS["base"])),
    wrong("the call changed the random seed to 0", y=set_seed),
    wrong("the backward changed bias in place", dy=double_bias),
    wrong("the backward changed the number of threads to 2",
          dy=lambda v, g: torch.set_num_threads(2)),
    wrong("the backward changed float32's precision to high",
          dy=lambda v, g: torch.set_float32_matmul_precision("high")),
    wrong("a float32 kernel?", groups="fp64", y=lambda v: v.y.float().double()),
    wrong("TF32?", "wide", "fp32", x=lambda v: half_of_x(v) if v.k * v.d > 2**20 else v.x),
    wrong("wrong shape", "decode", y=lambda v: v.y.squeeze()),
    wrong("y overlaps itself in memory", "expanded",
          y=lambda v: v.y if v.x.stride(-1) else v.y[:1].expand(v.y.shape)),
    wrong("y does not require grad", "empty-batch",
          y=lambda v: v.y if v.y.numel() else v.y.detach()),
    wrong("one of 70 calls: ", "calls_in_a_row", s=lambda v: v.memory.setdefault("s", v.s)),
    wrong("one of 70 calls: ", "calls_in_a_row", A=first_tile_of_ranks),
    wrong("one of 70 calls: y is wrong", "calls_in_a_row", y=overwrite_first_output),
    wrong("one of 70 calls: y is wrong", "calls_in_a_row", w=gates_of_the_prompt),
    *(wrong("one of 70 calls: ", "calls_in_a_row", delta=queue, ddelta=lambda v, g, i=i: g * (
        v.memory["queue"].pop(i) is v)) for i in (0, -1)),
    wrong("one of 70 calls: ", "calls_in_a_row", delta=queue, ddelta=lambda v, g: g * any(
        call is v for call in v.memory["queue"][-64:])),
    *wrong_for_each(INPUTS, "after the test changed {} in place", "changed_tensors", read_once),
    wrong("after the test changed A in other memory", "changed_tensors",
          A=lambda v: read_once(v.A, torch.detach)),
    wrong("after the test changed bias in place", "changed_tensors",
          bias=lambda v: v.bias if v.k % 16 else read_once(v.bias)),
    *wrong_for_each(INPUTS, "nan in {}: y is not nan", "nan_propagates", torch.nan_to_num),
    wrong("nan in x, the rest: ", "nan_propagates", y=lambda v: v.y + 0 * v.x.sum()),
    wrong("inf in grad_y, but finite", "nan_propagates", dy=lambda v, g: g.clamp(-1e4, 1e4)),
    *wrong_for_each("xy", "keeps x or y alive", "memory_is_freed", keep),
    wrong("two calls that differ in ", "gradients_accumulate", dA=drop_A_grad),
    wrong("A.grad is ", "gradients_accumulate", dA=set_A_grad),
    wrong("two backwards of one call", "gradients_accumulate", dlogits=clear_w),
    *(wrong(f"after the test changed {name}, the backward: ", "gradients_after_a_change",
            **{f"d{name}": only_if_unchanged(i)}) for i, name in enumerate(INPUTS)),
    wrong("after the test changed y, the backward: ", "gradients_after_a_change",
          dy=lambda v, g: g * (v.y._version == 0)),
    wrong("y does not require grad, though Wg do", "gradients_of_each_subset",
          y=lambda v: v.y if v.x.requires_grad else v.y.detach()),
    wrong("Wg.grad is zero or missing", "gradients_of_each_subset",
          dWg=lambda v, g: g * v.B.requires_grad),
    wrong("under torch.compile: ", "gradients_compiled", "fp32",
          s=lambda v: 1.0 if torch.compiler.is_compiling() else v.s),
    wrong("error 1.3e-10, tolerance 1e-10", groups="fp64", y=lambda v: scaled(v.y, 1 + 9e-11)),
    wrong("error 7e-05, tolerance 5.1e-05", groups="fp32", y=lambda v: scaled(v.y, 1 + 4.9e-5)),
    wrong("y is wrong: error", groups="fp32", y=lambda v: scaled(v.y, 1 + 7e-5, (..., -1))),
    wrong("B.grad is wrong", "many-tokens", "bf16", y=lambda v: chunks(v, 36)),
]


@pytest.mark.usefixtures("implementation")
@parametrize("row", WRONG, ids=lambda row: row.message)
def test_wrong_implementation_is_caught(row):
    for group in row.groups:
        if row.caught_by != "plain":
            run_check("plain", mutant(**row.steps), group)
        with pytest.raises(AssertionError, match=re.escape(row.message)):
            run_check(row.caught_by, mutant(**row.steps), group)


def test_each_case_has_a_wrong_implementation():
    assert {row.caught_by for row in WRONG} == {*CASES, *RANDOM, *TESTS}, "see WRONG"
    assert {group for row in WRONG for group in row.groups} == {*GROUPS}


# ---- Right implementations ----
class Flash(torch.autograd.Function):
    """FlashAttention's backward: w from the log-sum-exp, and sum_i w_i dw_i as g delta."""

    @staticmethod
    def forward(ctx, logits, heads):  # (..., n), (..., n, d)
        logits = logits.to(torch.promote_types(logits.dtype, f32))
        lse = logits.logsumexp(-1, keepdim=True)
        delta = torch.einsum("...n,...nd->...d", (logits - lse).exp().to(heads), heads)
        ctx.save_for_backward(logits, heads, lse, delta)
        return delta

    @staticmethod
    def backward(ctx, g):
        logits, heads, lse, delta = ctx.saved_tensors
        w, g, heads = (logits - lse).exp(), g.to(lse), heads.to(lse)
        dw = torch.einsum("...d,...nd->...n", g, heads)
        dlogits = w * (dw - (g * delta).sum(-1, keepdim=True))
        return dlogits, w[..., None] * g[..., None, :]


def split_k(v):
    half = v.k // 2
    return F.linear(v.h[..., :half], v.A[:, :half]) + F.linear(v.h[..., half:], v.A[:, half:])


def exp2_softmax(v):
    """Logits in the dtype of x; the first gate is 1 minus the others."""
    logits = v.logits.to(v.x.dtype)
    exp = ((logits - logits.amax(-1, keepdim=True)) * math.log2(math.e)).exp2().to(v.h)
    others = (exp / exp.sum(-1, keepdim=True))[..., 1:]
    return torch.cat([1 - others.sum(-1, keepdim=True), others], -1)


def in_a_cycle(v):
    v.itself = v
    return v.y


CORRECT = {
    "plain loop": loop,
    "flash": mutant(delta=lambda v: Flash.apply(
        v.logits, v.s * torch.einsum("...r,ndr->...nd", v.z, v.B))),
    "frozen base": mutant(base=lambda v: F.linear(v.x, *(
        t if t is None else t.detach() for t in (v.W0, v.bias)))),
    "32 chunks of tokens": mutant(y=lambda v: chunks(v, max(8, v.x[..., 0].numel() // 32))),
    "strided output, in a cycle": mutant(y=in_a_cycle, base=lambda v: (
        v.base.mT.contiguous().mT if v.tokens else v.base)),
    "adapter cast to the dtype of x": mutant(y=lambda v: correct(
        v.x, v.W0, v.bias, *(t.to(v.x.dtype) for t in (v.A, v.B, v.Wg)), v.s)),
    "split k, exp2": mutant(z=split_k, w=exp2_softmax),
}


@pytest.mark.usefixtures("implementation")
@parametrize("style", CORRECT)
def test_correct_implementation_passes(style):
    """Each style in each case and test, each time in the next group."""
    for i, name in enumerate([*CASES, *RANDOM, *TESTS], list(CORRECT).index(style)):
        groups = groups_of(name)
        run_check(name, CORRECT[style], groups[i % len(groups)])


# ---- The reference and the settings ----
def test_reference_by_hand():
    """The example of hydralora.py, where dw is (6, 30), and dlogit (-4.5, 4.5)."""
    inputs = dict(
        x=[[1, 2]], W0=np.eye(2), bias=[10, 20], A=[[1, 1]], B=[[[1], [2]], [[5], [-2]]],
        Wg=[[math.log(3), 0], [0, 0]], grad_y=[[1, 0]])
    y, grads = reference(scaling=2.0, **{name: np.array(v, float) for name, v in inputs.items()})
    np.testing.assert_allclose(y, [[23, 28]])
    by_hand = dict(
        x=[[5 - 4.5 * math.log(3), 4]], W0=[[1, 2], [0, 0]], bias=[1, 0], A=[[4, 8]],
        B=[[[4.5], [0]], [[1.5], [0]]], Wg=[[-4.5, -9], [4.5, 9]])
    for name, g in by_hand.items():
        np.testing.assert_allclose(grads[name], g, err_msg=name)


@parametrize("group", ["fp64", "bf16"])
def test_small_cases_are_computed_by_loops(group):
    """The loops agree with autograd, in these cases at least."""
    names = [name for name in CASES if is_small(CASES[name])]
    assert {*names} >= {"plain", "one-token", "empty-batch", "near-zero", "zero-token"}
    for (case,) in (cases_of(name, group) for name in names):
        torch.testing.assert_close(expected(case), by_autograd(case), rtol=1e-9, atol=1e-9)
        assert expected(case)["y"].tolist() == by_loops(case)["y"].tolist()


def test_tolerance_of_its_example():
    for group, value in ("fp16", 0.0031), ("bf16", 0.031):
        (case,) = cases_of("many-tokens", group)
        assert tolerance(case)["A.grad"] == pytest.approx(value, rel=0.1)
    found = as_float64(compute(CORRECT["32 chunks of tokens"], case))
    assert error_of("A.grad", found["A.grad"], case) > 0.015  # half of it


@parametrize("name, value, sentence", [
    ("HYDRALORA_DEVISE", "cpu", "DEVISE.* unknown: use HYDRALORA_IMPL and HYDRALORA_DEVICE"),
    ("HYDRALORA_DEVICE", "gpu", "gpu"),
    ("HYDRALORA_IMPL", "hydralora", "HYDRALORA_IMPL=hydralora is no function")])
def test_bad_setting_stops_with_a_sentence(name, value, sentence, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(pytest.exit.Exception, match=sentence):
        read_settings()


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


def adapted_model(target_modules=("q_proj", "v_proj"), layer=HydraLoRALinear):
    model = inject_hydralora(plain_model(), target_modules, layer, num_heads=N, r=R)
    for adapter in hydralora_layers(model).values():
        nn.init.normal_(adapter.lora_B, std=0.3)
        nn.init.normal_(adapter.router.weight)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_defaults():
    base = nn.Linear(2, 5, device="meta").eval()
    layer = HydraLoRALinear(base)
    assert "num_heads=3, r=8, scaling=2" in str(layer) and layer.lora_dropout.p == 0
    assert (layer.in_features, layer.out_features, layer.training) == (2, 5, False)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not isinstance(layer.router, nn.Linear)  # which quantisers replace
    assert {name: (*p.shape, p.is_meta) for name, p in layer.named_parameters()
            if p.requires_grad} == {"lora_A": (8, 2, True), "lora_B": (3, 5, 8, True),
                                    "router.weight": (3, 2, True)}


@each_dtype
def test_dtypes(dtype):
    layer, x = make_layer(dtype=dtype), torch.ones(2, K, dtype=dtype)
    adapter = torch.promote_types(dtype, f32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.router.weight.dtype == adapter
    assert layer(x).dtype == dtype and layer.to(dtype)(x).dtype == dtype
    assert mean_gates(nn.Sequential(layer), [x])["0"].dtype == adapter
    with torch.autocast("cpu", dtype=bf16):
        assert layer(x).dtype == layer.base(x).dtype


def test_initialisation():
    layer = HydraLoRALinear(nn.Linear(256, 8), r=16, num_heads=16)
    Wg = layer.router.weight.clone()
    nn.init.ones_(layer.lora_B)
    layer.reset_parameters()  # not the router's
    assert not layer.lora_B.any() and torch.equal(layer.router.weight, Wg)
    for p in (layer.lora_A, Wg):  # U(-b, b) with b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16


def test_first_step_trains_the_heads_alone():
    layer, x = HydraLoRALinear(nn.Linear(K, D)), torch.randn(9, K)
    layer(x).square().sum().backward()
    assert not layer.lora_A.grad.any() and not layer.router.weight.grad.any()
    assert all(g.any() for g in layer.lora_B.grad)


@parametrize("equal", [True, False])
def test_random_router_makes_the_heads_different(equal):
    layer, x = HydraLoRALinear(nn.Linear(K, D, dtype=f64)), randn(9, K)
    if equal:
        layer.router.weight.data[:] = layer.router.weight.data[0].clone()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).sin().sum().backward()
        optimizer.step()
    first, *others = layer.lora_B.detach()
    assert all(torch.allclose(B, first, rtol=1e-9) == equal and B.any() for B in others)


def test_dropout_has_one_mask_on_x_and_skips_the_router():
    layer, x = make_layer(6, 6, r=6, lora_alpha=6, lora_dropout=0.5), randn(50, 6)
    with torch.no_grad():  # if each B_i is the inverse of A, the update is x after dropout
        layer.lora_B.copy_(torch.linalg.inv(layer.lora_A).expand(N, 6, 6))
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


def test_parts_need_no_others():
    """The part beside the paper, and the lines to copy."""
    source = Path(hydralora.__file__).read_text(encoding="utf-8")
    start, end, model = map(source.index, (
        "# ---- The layer", "# ---- Choosing N", "# ---- A tiny transformer"))
    upper, copied = {"__name__": "upper"}, {}
    exec(source[:model], upper)
    assert upper["num_heads_from_corpus"](["a b", "a b", "c d", "c d", "e f"])[0] == 3
    exec(source[:end], copied)
    copied["HydraLoRALinear"](nn.Linear(K, D)).merge([0, 0, 1])


# ---- A model ----
def test_tiny_transformer_step_by_step():
    model = plain_model()
    h = model.token_embedding(IDS) + model.position_embedding.weight[:11]
    for layer in model.layers:
        x = layer.attention_norm(h)
        q, k, v = ((x @ proj.weight.T).view(3, 11, 4, 16).transpose(1, 2)
                   for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        future = torch.ones(11, 11).triu(1).bool()
        x = (q @ k.mT / 4).masked_fill(future, -math.inf).softmax(-1) @ v
        h = h + x.transpose(1, 2).reshape(3, 11, 64) @ layer.o_proj.weight.T
        h = h + layer.down_proj(F.gelu(layer.up_proj(layer.mlp_norm(h))))
    close(model(IDS), model.lm_head(model.norm(h)))


def test_injection_changes_no_output_and_no_mode():
    model = plain_model()
    model.layers[0].eval()
    logits = model(IDS)
    assert inject_hydralora(model, ["0.q_proj", "layers.1.down_proj"], lora_dropout=0.5) is model
    assert [*hydralora_layers(model)] == ["layers.0.q_proj", "layers.1.down_proj"]
    assert torch.equal(model(IDS), logits)
    assert {m.training for m in model.layers[0].modules()} == {False}
    assert {m.training for m in model.layers[1].modules()} == {True}
    on_meta = inject_hydralora(plain_model().to("meta"), "q_proj")
    assert on_meta(IDS.to("meta")).is_meta and len(hydralora_layers(on_meta)) == 2


class TwoA(HydraLoRALinear):
    """A variant with a parameter and a buffer of its own."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.A2 = nn.Parameter(torch.ones_like(self.lora_A))
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return super().forward(x) + self.factor * F.linear(x, self.A2).mean(-1, keepdim=True)


def test_second_injection_adds_to_the_first():
    model = inject_hydralora(plain_model(), "0.q_proj", TwoA)
    assert trained_names(model) | {"layers.0.q_proj.factor"} == hydralora_state_dict(model).keys()
    model.layers[0].q_proj.lora_A.requires_grad_(False)  # the caller's choice stays
    model.layers[0].q_proj.base.weight.requires_grad_(True)  # a base is frozen again
    inject_hydralora(model, ["o_proj", "v_proj"])
    assert hydralora_state_dict(model).keys() - trained_names(model) == {
        "layers.0.q_proj.lora_A", "layers.0.q_proj.factor"}
    assert trained_names(model) < hydralora_state_dict(model).keys()


class MyLinear(nn.Linear):
    pass


def test_layer_with_two_names_gets_one_adapter():
    shared = MyLinear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, shared])})
    inject_hydralora(model, iter(["a"]))
    assert model["a"] is model["b"][0] is model["b"][1] and model["a"].base is shared
    merge_hydralora(model, torch.ones(3))
    assert model["a"] is model["b"][1] and type(model["a"]) is MyLinear


def test_bare_layer_is_a_model():
    layer, other, x = make_layer(), make_layer(num_heads=N), randn(9, K)
    nn.init.ones_(other.lora_B)
    load_hydralora_state_dict(other, {k: t.clone() for k, t in hydralora_state_dict(layer).items()})
    assert torch.equal(other(x), layer(x))
    gates = mean_gates(layer, [x])
    close(gates[""], layer.router(x).mean(0).detach())
    close(merge_hydralora(layer, gates).weight, layer.merge(gates[""]).weight)
    assert isinstance(inject_hydralora(nn.Linear(2, 2), ""), HydraLoRALinear)


# ---- Choosing N ----
@parametrize("sizes", [[240 // n] * n for n in range(2, 11)] + [[144, 72, 24]])
def test_num_heads_of_domains(sizes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        topics = rng.dirichlet(np.full(40, 0.2), len(sizes)).repeat(sizes, axis=0)
        documents = [rng.choice(40, size=25, p=topic).tolist() for topic in topics]
        assert num_heads_from_corpus(documents)[0] == len(sizes)


@parametrize("documents", [
    ["a c", "b  c\n", "a a c", "b b c"],
    [[], [1, 3], [2, 3], [1, 1, 3], "", [2, 2, 3]],
    [torch.tensor(ids) for ids in ([1, 3], [2, 3], [1, 1, 3], [2, 2, 3])]])
def test_sse_by_hand(documents):
    n, sse = num_heads_from_corpus(iter(documents), max_heads=3)
    assert n == 2
    np.testing.assert_allclose(sse, [1.659844, 0.069862, 0.034931], atol=1e-5)


# ---- Merging ----
def test_fixed_gates_make_one_lora():
    """In forward, merge and export alike, with the scaling that the layer has now."""
    model, x = nn.Sequential(make_layer()), randn(9, K)
    model[0].scaling = 0.5
    with hook_gates(model, lambda name, w: GATES.double().expand_as(w)):
        y = model(x)
    A, B = model[0].to_lora(GATES.tolist())
    close(y, model[0].base(x) + x @ A.T @ B.T)
    state, _ = export_lora(model, GATES)
    assert torch.equal(state["base_model.model.0.lora_B.weight"], B)
    close(merge_hydralora(model, GATES)(x), y)


@each_dtype
@parametrize("size", [1e-6, 1e-3, 1, 30])  # of the update, relative to W0
@torch.no_grad()
def test_merge_rounds_once(size, dtype):
    layer = make_layer(dtype=dtype, lora_alpha=size * R).eval()
    A, B = layer.to_lora(GATES.double())
    W = (layer.weight.to(A.dtype) + B @ A).to(dtype)
    with torch.autocast("cpu", dtype=bf16):
        merged = layer.merge(GATES)
    assert type(merged) is nn.Linear and not merged.training
    assert torch.equal(merged.weight, W) and torch.equal(merged.bias, layer.bias)
    for t in (*merged.parameters(), A, B):
        t.zero_()
    assert all(p.all() for p in layer.parameters())  # nothing is shared


class OwnForward(nn.Linear):
    forward = nn.Bilinear.forward


class Subclass(torch.Tensor):
    pass


def set_to(name, value):
    if isinstance(value, torch.Tensor):
        value = nn.Parameter(value, requires_grad=False)
    return lambda base: setattr(base, name, value)


@parametrize("change", [
    set_to("forward", nn.Linear(K, D).forward),
    set_to("__class__", OwnForward),
    lambda base: base.register_forward_hook(print),
    lambda base: base.register_forward_pre_hook(print),
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.spectral_norm,
    set_to("weight", torch.ones(D, K).as_subclass(Subclass)),
    set_to("weight", torch.ones(D, K).to(torch.int8)),
    set_to("weight", torch.ones(D, K).to(torch.float8_e4m3fn)),
    set_to("weight", torch.ones(D, K, device="meta"))])
def test_merge_needs_a_plain_linear(change):
    layer = HydraLoRALinear(nn.Linear(K, D), num_heads=N)
    change(layer.base)
    with pytest.raises(TypeError, match="plain nn.Linear"):
        layer.merge(GATES)


def test_merged_model_has_the_gates_of_each_name():
    model = adapted_model()
    gates = {name: GATES.roll(i) for i, name in enumerate(hydralora_layers(model))}
    with hook_gates(model, lambda name, w: gates[name].expand_as(w)):
        logits = model(IDS)
    assert merge_hydralora(model, dict(reversed(gates.items()))) is model
    close(model(IDS), logits, rtol=0, atol=1e-4)


def test_refused_merging_changes_nothing():
    model = adapted_model()
    logits, (*others, last) = model(IDS), hydralora_layers(model)
    for wrong in ({last: torch.ones(3)}, {last: torch.ones(33, N)}, {last: 1e39 * GATES}, {}):
        with pytest.raises((ValueError, KeyError)):
            merge_hydralora(model, dict.fromkeys(others, GATES) | wrong)
        assert torch.equal(model(IDS), logits)


# ---- Gates ----
@parametrize("compiled", [False, True])
def test_gates_of_a_model_that_may_be_compiled(compiled):
    model = adapted_model()
    run = torch.compile(model, backend="eager") if compiled else model
    logits = run(IDS)
    with record_gates(model) as gates:
        run(IDS[:1])
        run(IDS)
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


def test_mean_gates_of_16_bits_are_summed_in_float32():
    layer = make_layer(dtype=bf16).to(bf16)
    found = mean_gates(layer, [torch.ones(3000, K, dtype=bf16)])[""]
    close(found, layer.router(torch.ones(K, dtype=bf16)).float().detach())


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
    assert torch.equal(layer.lora_B, torch.stack(B[::-1]))


def test_loading_copies():
    model = adapted_model("0.q_proj", TwoA).eval()
    before = model(IDS)
    state = {key: t + 1 for key, t in hydralora_state_dict(model).items()}
    assert load_hydralora_state_dict(model, state) is model
    assert not torch.equal(model(IDS), before)
    for key, t in hydralora_state_dict(model).items():
        close(t, state[key])
        state[key].zero_()
        assert t.any()


def test_refused_loading_changes_nothing():
    model = adapted_model()
    logits = model(IDS)
    state = {key: 2 * t for key, t in hydralora_state_dict(model).items()}
    for wrong in (state | {"more": IDS}, dict([*state.items()][1:]), {}):
        with pytest.raises(ValueError, match="keys differ"):
            load_hydralora_state_dict(model, wrong)
        assert torch.equal(model(IDS), logits)


def test_export_pads_ranks_and_scales():
    model = adapted_model("layers.1.q_proj")
    inject_hydralora(model, "layers.0.o_proj", num_heads=N, r=2, lora_alpha=5)
    nn.init.normal_(model.layers[0].o_proj.lora_B)
    state, config = export_lora(model.half(), GATES)
    assert config == dict(peft_type="LORA", r=R, lora_alpha=R,
                          target_modules=["layers.0.o_proj", "layers.1.q_proj"])
    for name, layer in hydralora_layers(model.float()).items():
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert len(A) == R == B.shape[1] and A.dtype == B.dtype == f32
        close(layer.merge(GATES).weight, layer.base.weight + B @ A, rtol=0, atol=1e-5)


# ---- Bad input ----
def shared_router():
    model = adapted_model()
    model.layers[0].q_proj.router = model.layers[1].q_proj.router
    return model


@parametrize("word, call", [
    ("nn.Linear", lambda: HydraLoRALinear(make_layer())),
    ("num_heads", lambda: make_layer(num_heads=0)),
    ("r must", lambda: make_layer(r=0)),
    ("float16", lambda: make_layer(dtype=f16, lora_alpha=1e7).merge(GATES)),
    ("4 numbers", lambda: make_layer().to_lora(GATES[None])),
    ("TwoA .* to_lora", lambda: make_layer(layer=TwoA).merge(GATES)),
    ("no HydraLoRA layer", lambda: merge_hydralora(plain_model(), GATES)),
    ("no HydraLoRA layer", lambda: mean_gates(plain_model(), [IDS])),
    ("no HydraLoRA layer", lambda: hydralora_state_dict(plain_model())),
    ("share a router", lambda: mean_gates(shared_router(), [IDS])),
    ("attention_mask", lambda: mean_gates(
        adapted_model(), [collections.UserDict(attention_mask=torch.ones(1, 2, 2).tril())])),
    ("get_model_state_dict", lambda: export_lora(adapted_model().to("meta"), GATES)),
    ("PEFT needs a name", lambda: export_lora(make_layer(), GATES)),
    ("q.lora_B.weight", lambda: from_official_state_dict(OFFICIAL | {"q.lora_B.weight": IDS})),
    ("one string", lambda: num_heads_from_corpus("one string")),
])
def test_bad_call_is_refused(word, call):
    with pytest.raises((TypeError, ValueError), match=word):
        call()


@parametrize("model, target_modules, word", [
    (plain_model(), ["o_proj", "norm"], "LayerNorm"),
    (plain_model(), "proj", "nothing"),
    (adapted_model(), ["o_proj", "q_proj"], "HydraLoRALinear"),
    (nn.TransformerEncoderLayer(8, 2), "linear1", "bypass"),
    (nn.MultiheadAttention(8, 2), "out_proj", "bypass")])
def test_refused_injection_changes_nothing(model, target_modules, word):
    next(model.parameters()).requires_grad_(False)
    trained, modules = trained_names(model), [*model.modules()]
    with pytest.raises(ValueError, match=word):
        inject_hydralora(model, target_modules)
    assert trained_names(model) == trained and [*model.modules()] == modules


def test_accelerate_is_removed_as_the_message_says():
    hooks = pytest.importorskip("accelerate").hooks
    model = nn.Sequential(make_layer())
    hooks.add_hook_to_module(model[0].base, hooks.ModelHook())
    with pytest.raises(TypeError, match=r"accelerate.hooks.remove_hook_from_submodules\(model\)"):
        merge_hydralora(model, GATES)
    hooks.remove_hook_from_submodules(model)
    assert type(merge_hydralora(model, GATES)[0]) is nn.Linear


# ---- The toy, with few steps ----
@pytest.fixture
def toy(monkeypatch):
    module = pytest.importorskip("train_toy")
    for name, value in dict(PRETRAIN_STEPS=2, STEPS=2, EVALUATION=90).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    return module


@pytest.fixture
def task(toy):
    return toy.Task(0, "cpu")


def run_toy(toy, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options])
        return toy.main()


def test_toy_data_differ(toy):
    data = [toy.Task(seed, "cpu").sample(9, torch.zeros(3, 15, dtype=int), stream).tokens
            for seed in (0, 1) for stream in (0, 1)]
    assert len(torch.stack(data).unique(dim=0)) == 4


def test_toy_auxiliary_loss(toy, task, monkeypatch):
    found = []
    monkeypatch.setattr(toy, "train", lambda loss_of, groups, data, *_, **__: found.append(
        (loss_of(data), data)))
    model, _ = (toy.pretrain(task, weight) for weight in (0, 3))
    (plain, data), (more, _) = found
    close(plain, F.cross_entropy(toy.predict(model, data).mT, data.targets))
    del model.layers[1:]
    copied = F.cross_entropy(toy.predict(model, data).mT, data.tokens[:, :toy.LENGTH])
    close(more, plain + 3 * copied)


def test_toy_learning_rates(toy, task, monkeypatch):
    rates = {}
    monkeypatch.setattr(toy, "train", lambda loss_of, groups, *_, **__: rates.update(
        (tuple(p.shape), group["lr"]) for group in groups for p in group["params"]))
    for n in (1, 2):  # a single head's router is not trained
        toy.fine_tune(task, TinyTransformer(toy.MODEL), toy.Method(3, n, r=5, router_rate=7), "")
    width = toy.MODEL.hidden_size
    assert rates == {(5, width): 3, (1, width, 5): 3, (2, width, 5): 3, (2, width): 21}


def test_toy_methods_start_equal(toy):
    methods = {name: replace(method, r=9) for name, method in toy.methods().items()
               if method.targets == toy.methods()["HydraLoRA"].targets}
    layers = {name: toy.adapt(TinyTransformer(toy.MODEL), method, 0).layers[1].o_proj
              for name, method in methods.items()}
    A, Wg = layers["HydraLoRA"].lora_A, layers["HydraLoRA"].router.weight
    for layer in layers.values():
        assert torch.equal(layer.lora_A, A.expand_as(layer.lora_A)) and layer.scaling == 2
    assert torch.equal(Wg, layers["LoRA MoE"].router.weight) and not torch.equal(Wg, A[:len(Wg)])


@parametrize("n", [2, 3, 5, 16])
def test_toy_methods_have_equal_sizes(n, toy):
    sizes = {}
    for name, method in toy.methods(n).items():
        trained = toy.adapt(TinyTransformer(toy.MODEL), method, 0).parameters()
        sizes[name] = sum(p.numel() for p in trained if p.requires_grad)
    assert sizes["LoRA MoE"] == pytest.approx(sizes["HydraLoRA"], rel=0.1)
    for name in sizes:
        lora, on, where = name.partition(" on ")
        hydra = sizes.get(f"HydraLoRA{on}{where}")
        if hydra and lora in ("LoRA", "LoRA with a ReLU"):
            assert 1 <= sizes[name] / hydra < 1.1


@parametrize("name", ["LoRA-Split", "HydraLoRA with true labels"])
def test_toy_labels_choose_the_head(name, toy, task):
    model = toy.adapt(TinyTransformer(toy.MODEL), toy.methods()[name], 0)
    gates = toy.gates_of(model, task.test)
    one_hot = F.one_hot(task.test.domain, toy.DOMAINS).float()
    close(gates, one_hot[:, None].expand(-1, toy.LENGTH, -1))


def test_toy_nmi(toy):
    domain = torch.arange(3).repeat(4)
    w = F.one_hot(domain).float()[:, None]
    assert toy.nmi(5 * w.roll(1, -1), domain) == pytest.approx(1)
    assert toy.nmi(torch.ones_like(w), domain) == pytest.approx(0, abs=1e-6)
    of_head, of_domain = 0.6365, math.log(3)
    assert toy.nmi(w[torch.where(domain == 2, 1, domain)], domain) == pytest.approx(
        2 * of_head / (of_head + of_domain), abs=1e-4)


def test_toy_subspace_overlap(toy):
    axes = torch.eye(6)
    pair = torch.stack([axes[:, :2], axes[:, 1:3] @ torch.tensor([[1.0, 5], [2, 3]])])
    assert toy.subspace_overlap(pair) == pytest.approx(0.5)


@pytest.fixture
def result(toy):
    return toy.experiment(0, "cpu", heads=6)


def test_toy_experiment(toy, capsys, monkeypatch):
    for name in ("accuracy", "last_o_proj", "gates_of"):
        def on_test_data(model, data, measure=getattr(toy, name)):
            assert len(data.tokens) == toy.EVALUATION
            return measure(model, data)
        monkeypatch.setattr(toy, name, on_test_data)

    def merged_accuracy(model, calibration, test):
        assert len(calibration.tokens) <= toy.STEPS * toy.BATCH
        return torch.tensor([len({*calibration.domain.tolist(), *test.domain.tolist()})]).float()

    monkeypatch.setattr(toy, "merged_accuracy", merged_accuracy)
    result = toy.experiment(1, "cpu", heads=6, auxiliary_weight=0.5)
    assert (result["seed"], result["auxiliary_weight"], len(result["gates"][0])) == (1, 0.5, 6)
    assert result["merged"] == dict(true_domain=1, all_domains=3)
    assert all("loss" in line for line in capsys.readouterr().out.splitlines())


def test_toy_experiment_without_hydralora(toy, capsys):
    result = toy.experiment(0, "cpu", ["LoRA", "LoRA-Split"])
    assert result["update"] is None and "A" in result["overlap"]
    assert not any(result[key] for key in ("nmi", "gates", "lost", "examples", "merged", "checks"))
    toy.report(result)


@parametrize("router, symbols, passed", [
    (0.9, 0.2, True), (0.89, 0.05, False), (0.95, 0.21, False)])
def test_toy_check_of_the_heads(router, symbols, passed, toy, monkeypatch):
    scores = iter([router, symbols])
    monkeypatch.setattr(toy, "nmi", lambda w, domain: next(scores))
    checks = toy.experiment(0, "cpu", ["HydraLoRA"])["checks"]
    assert checks["heads specialise by domain"] == passed


def test_toy_report(toy, result, capsys):
    hydra = result["methods"]["HydraLoRA"]["accuracy"]
    result["methods"]["LoRA"]["accuracy"] = hydra - 5
    result["methods"]["LoRA MoE"]["accuracy"] = hydra + 2
    result["lost"][2][1], result["checks"]["heads specialise by domain"] = -0.01, False
    toy.report(result)
    printed = capsys.readouterr().out
    assert "5.0 points ahead of LoRA.\n" in printed and "2.0 points behind LoRA MoE." in printed
    assert "do not specialise" in printed and "-0.0" not in printed and " \n" not in printed
    assert max(map(len, printed.splitlines())) <= 100


@parametrize("passed", [True, False])
def test_toy_main(passed, toy, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "report", print)
    monkeypatch.setattr(toy, "experiment", lambda *seed, **options: options | dict(
        seed=seed, checks={"one": passed, "two": True}))
    options = f"--seed 3 --heads 2 --auxiliary-weight 0 --check --json {tmp_path / 'file'}"
    assert run_toy(toy, *options.split()) == 1 - passed
    result = json.loads((tmp_path / "file").read_text())
    assert result | dict(seed=[3, "cpu"], heads=2, auxiliary_weight=0) == result
    assert capsys.readouterr().out.count(": NO\n") == 1 - passed


def test_toy_seeds_run_in_processes_of_one_thread():
    all_seeds = pytest.importorskip("train_toy").all_seeds
    assert all_seeds(["__import__('torch').get_num_threads()", "1 + 1"], eval) == [1, 2]


def test_toy_table(toy, result, capsys, monkeypatch):
    seeds = []
    for i in range(3):  # HydraLoRA gains 2, 4 and 6; on down_proj it gains -1, 0 and 1
        accuracy = {"LoRA": 90 - i, "HydraLoRA": 92 + i, "LoRA on down_proj": 90 - i,
                    "HydraLoRA on down_proj": 89}
        methods = {name: dict(accuracy=accuracy[name], size=1000) for name in accuracy}
        seeds.append(result | dict(methods=methods, checks={"heads specialise by domain": i != 1}))
    monkeypatch.setattr(toy, "all_seeds", lambda used, *_, **__: (
        seeds if len({*used} - {*toy.TUNING_SEEDS}) == 20 else []))
    run_toy(toy, "--table")
    printed = capsys.readouterr().out
    assert "| LoRA | 1,000:1,000 | 89.0:93.0 | +4.0 +- 2.0 | 3/3 |\n" in printed
    assert "| LoRA on down_proj | 1,000:1,000 | 89.0:89.0 | +0.0 +- 1.0 | 1/3 |\n" in printed
    assert "- methods, LoRA, accuracy: 89.00 +- 1.00, from 88.00 to 90.00\n" in printed
    assert "The heads specialise by domain on 2 of 3 seeds" in printed


def test_toy_tune(toy, monkeypatch, capsys):
    monkeypatch.setattr(toy, "fine_tune", lambda task, model, method, name: (
        None, dict(accuracy=method.lr + method.router_rate + 100 * task.seed)))
    monkeypatch.setattr(toy, "all_seeds", lambda seeds, function, **arguments: [
        function(seed, **arguments) for seed in (0, 2)])
    run_toy(toy, "--tune")
    lines = capsys.readouterr().out.splitlines()
    assert "HydraLoRA, lr 0.08, router_rate 64: mean 164.08, worst 64.1" in lines
    assert [line.split(":")[0] for line in lines if line.startswith("LoRA-Split")] == [
        f"LoRA-Split, lr {lr}, router_rate 1" for lr in toy.RATES]


@parametrize("options, message", [
    ("--table --check", "--check does"), ("--tune --auxiliary-weight 1", "--auxiliary-weight does"),
    ("--auxiliary-weight nan", "--auxiliary-weight must be"), ("--heads 0", "--heads must be"),
    ("--seed -1", "--seed and"), ("--seed 99999999999999999999", "--seed and"),
    ("--json /no/such/x", "/no/such/x"), ("--device no_such --json y", "no_such")])
def test_toy_refuses_options(options, message, toy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "Task", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(SystemExit, match="2"):
        run_toy(toy, *options.split())
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_toy_cost(toy, capsys):
    toy.cost("cpu", sizes=[(256, 64, 64, 3)], rounds=1)
    numbers = re.findall(r"\(([\d.]+)\)", capsys.readouterr().out)
    assert numbers[:2] == ["1.00", "1.00"]
    assert float(numbers[-1]) > 1.2  # it is 1.0 if the loop computes A x once


# ---- README ----
@pytest.fixture
def readme():
    path = Path(__file__).parent / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else pytest.skip("needs README.md")


@pytest.fixture
def example(readme, tmp_path, monkeypatch):
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
    with record_gates(model) as gates:
        model(IDS)
    assert all((w > 0).sum() == 2 * IDS.numel() for w in gates.values())
    merge_hydralora(model, mean_gates(model, [IDS]))


def test_readme_definition_is_right(example):
    def function(x, W0, bias, *others):
        return example.hydralora(x, W0, *others) + bias

    for group in GROUPS:
        if "mixed" not in group:
            run_check("plain", function, group)


def test_readme_table_has_the_rows_and_sizes_of_the_code(readme, toy):
    rows = re.findall(r"^\| (.*) \| ([\d,]+):.* \| (.*):(.*) \| (\S+) .*/\d+ \|$", readme, re.M)
    methods = toy.experiment(0, "cpu", [*toy.methods()], toy.DOMAINS)["methods"]
    names = [name for name in methods if "HydraLoRA" not in name or "labels" in name]
    assert [row[:2] for row in rows] == [(name, f"{methods[name]['size']:,}") for name in names]
    for _, _, its, ours, gain in rows:
        assert float(gain) == pytest.approx(float(ours) - float(its), abs=0.11)


@pytest.mark.skipif("TOY_RESULT" not in os.environ, reason="needs train_toy.py --json's file")
def test_readme_numbers_of_seed_0_are_those_of_a_run(readme):
    result = json.loads(Path(os.environ["TOY_RESULT"]).read_text())
    rows = re.findall(r"domain \d (\|.*)", readme)
    assert len(rows) == len(result["gates"])
    for row, gates, lost in zip(rows, result["gates"], result["lost"]):
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", row)]
        assert numbers[::2] == pytest.approx(gates, abs=0.02)
        assert numbers[1::2] == pytest.approx(lost, abs=2)
    for label, key in (("domain 1 ", "plaintext"), ("answer   ", "answer")):
        assert f"{label} {' '.join(result['examples'][1][key][:9])} ..." in readme
    result["methods"] = {name: method["accuracy"] for name, method in result["methods"].items()}
    measured = dict(
        frozen=17.7, update=3.2, nmi=dict(router=0.97, symbols=0.06),
        merged=dict(true_domain=94.7, all_domains=34.7),
        input_variance=dict(domain=0.93, symbol=0.06, interaction=0.02), methods={
            "LoRA": 78, "LoRA with a ReLU": 91.3, "LoRA MoE": 90.9, "HydraLoRA": 94.6})
    for key, value in measured.items():
        assert result[key] == pytest.approx(value, rel=0.05, abs=0.02)
