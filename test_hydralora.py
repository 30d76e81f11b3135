# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the authors of HydraLoRA in one file
"""An oracle for HydraLoRA, then the tests of hydralora.py in the order in which a reader asks.

The oracle calls any function with the signature of hydralora.hydralora_forward. It needs
this file and hydralora.py alone:

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle -x

It runs on the GPU if there is one; HYDRALORA_DEVICE=cpu, cuda:1 ... chooses. A layer takes
part as `hydralora_layer` does below. A failure says what is wrong, where, and in which Case.
To see what is asked, read `reference`, CASES, GROUPS, `tolerance`, `forward` and STATES, in
this order. Select what your code is made for by words, as in -k "oracle and values" for a
kernel without a backward, or -k "oracle and 3d and half":

    values, gradients   y where no gradient is asked for; y and the gradients
    1d, 2d, 3d, 4d, 5d  the number of axes of x
    plain, drawn ...    the case, see CASES, or the state, see STATES
    float32, mixed ...  the dtypes, see GROUPS

W0 and bias may get no gradient, as of a frozen base; one that they do get is checked. No
second derivatives are asked for.
"""
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import pkgutil
import sys
import traceback
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

torch.set_num_threads(1)  # the tensors are small

SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
NAME = SETTINGS.get("HYDRALORA_IMPL", "hydralora:hydralora_forward")
DEVICE = SETTINGS.get("HYDRALORA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
sys.path.insert(0, os.getcwd())
try:
    if unknown := SETTINGS.keys() - {"HYDRALORA_IMPL", "HYDRALORA_DEVICE"}:
        raise ValueError(f"unknown setting {unknown}")
    IMPLEMENTATION = pkgutil.resolve_name(NAME)
    if not callable(IMPLEMENTATION):
        raise TypeError(f"expected module:function, got a {type(IMPLEMENTATION).__name__}")
    torch.ones(1, device=DEVICE).add(1).item()  # the device is there and computes
except Exception as error:  # a message ends the run
    raise pytest.exit.Exception(f"{SETTINGS}: {type(error).__name__}: {error}", 2) from None

# ---- The equations, twice ----
# The reference is NumPy and plain loops, and uses nothing from hydralora.py.

def reference(x, W0, bias, A, B, Wg, scaling, grad_y):
    """Eqs. 3 and 4, and their derivatives by hand: y, and the gradients of sum(grad_y * y)."""
    n, d, r = B.shape
    y = np.zeros(x.shape[:-1] + (d,))
    grads = {name: np.zeros_like(v) for name, v in
             dict(x=x, W0=W0, bias=np.zeros(d), A=A, B=B, Wg=Wg).items()}
    for token in np.ndindex(x.shape[:-1]):
        v, g = x[token], grad_y[token]
        e = np.exp(Wg @ v - np.max(Wg @ v))
        w = e / e.sum()  # Eq. 4
        z = A @ v
        y[token] = W0 @ v + (0 if bias is None else bias)  # Eq. 3
        for i in range(n):
            y[token] += scaling * w[i] * (B[i] @ z)
        score = np.zeros(n)  # d loss / d w_i
        for i in range(n):
            back = B[i].T @ g
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
    """The sum of Eq. 3 as it is printed, in torch. It shows how much a dtype rounds, and in
    float64 it is the reference where NumPy is slow."""
    y, x = F.linear(x, W0, bias), x.to(A.dtype)
    w, z = F.linear(x, Wg).softmax(-1), F.linear(x, A)
    for i in range(len(B)):
        y = y + (w[..., i, None] * F.linear(z, B[i]) * scaling).to(y.dtype)
    return y

# ---- What is checked: the cases ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TENSORS = (*INPUTS, "grad_y")
ALL = " ".join(INPUTS)  # everything needs a gradient
ADAPTER = "x A B Wg"  # the base is frozen
LAYER = "W0 bias A B Wg"  # what two layers do not share

@dataclass(frozen=True)
class Case:
    lead: tuple = (2, 5)  # the axes of x before k
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    logits: float = 1.0  # their deviation
    heads: float = 1.0  # size of B
    needs: str = ALL  # these need a gradient
    layouts: tuple = ()  # pairs (tensor, layout); others are contiguous
    mean: float = 0.0  # of x and grad_y; sums over tokens grow with it
    unit: float = 1.0  # x is larger by this, and W0 and Wg are smaller
    gradient: float = 1.0  # size of grad_y
    first_token: float = 1.0  # factor of the first token of x
    seed: int = 0
    anew: str = ""  # these tensors are drawn from the next seed

ALIGNED = dict(k=64, d=64, r=16, n=8)  # where other code often runs

CHOSEN = {
    "plain": Case(),
    # shapes at which code turns elsewhere
    "vector": Case(lead=(), scaling=2.0 ** -10),
    "all-three": Case(lead=(3, 3), k=3, d=3, r=3, n=3),
    "empty-batch": Case(lead=(0, 5), **ALIGNED),
    "empty-rows": Case(lead=(5, 0), bias=False),
    "width-one": Case(lead=(1, 1), k=1, d=1, r=1, logits=0.0),
    "only-head": Case(k=320, d=256, r=16, n=1),  # a LoRA
    "heads-odd": Case(lead=(2, 9), n=67, r=5, needs=ADAPTER, layouts=(("x", "second"),)),
    "last-tokens": Case(lead=(99, 1), k=64, d=64, r=8, n=3, layouts=(("x", "gaps"),)),
    "whole-tiles": Case(lead=(2, 64), k=128, d=256, r=16, n=8),  # usual
    "thousands": Case(lead=(512, 8), k=64, d=64, r=8, n=3, mean=1.0),  # sums far from 0
    "grid-limit": Case(lead=(65540,), k=3, d=2, r=1, n=2, needs=ADAPTER),  # > 65535
    # values
    "zero-scaling": Case(scaling=0.0),
    "large-scaling": Case(scaling=1e6),
    "heads-at-zero": Case(heads=0.0),  # at the start
    "near-zero": Case(heads=2e-4),  # soon after
    "token-at-zero": Case(first_token=0.0),  # padding has a gradient too
    "steep": Case(logits=100, n=20),  # exp needs its maximum off
    "saturated": Case(lead=(4, 10), logits=1e5, n=3),
    "small-gradient": Case(gradient=2.0 ** -25),
    "large-all": Case(unit=2.0 ** 17, gradient=2.0 ** 16),
}
NOT_IN_FLOAT16 = ("saturated", "large-scaling", "small-gradient", "large-all")

LARGE = {  # slow, so in four groups
    "decode-long": Case(lead=(1, 1), k=9001, d=70, r=32, n=8, needs=ADAPTER),
    "decode-wide": Case(lead=(1, 1), k=72, d=9001, r=16, n=10, needs=ADAPTER),
    "model-size": Case(lead=(2, 80), k=1024, d=1024, r=8, n=3, needs=ADAPTER),
    "both-wide": Case(lead=(3,), k=1100, d=1050, r=8, n=2, needs=ADAPTER),
    "many-wide": Case(lead=(1100,), k=5, d=1100, r=2, n=2, needs=ADAPTER),
}
LARGE_IN = ("float32", "bfloat16", "half", "mixed")

def swapped(t, a, b):
    return t.transpose(a, b).contiguous().transpose(a, b)

GAP = 9999.0  # not nan: some of PyTorch's own products multiply gaps by 0
LAYOUTS = {  # how many axes it takes at least, and how the numbers then lie
    "columns": (2, lambda t: swapped(t, -2, -1)),  # matrices by column
    "rows": (1, lambda t: F.pad(t, (0, 8), value=GAP)[..., :-8]),
    "second": (1, lambda t: F.pad(t[..., None], (0, 1), value=GAP).flatten(-2)[..., ::2]),
    "offset": (1, lambda t: F.pad(t.flatten(), (1, 0), value=GAP)[1:].view(t.shape)),
    "swapped": (3, lambda t: swapped(t, 0, 1)),  # x from (t, b, k)
    "gaps": (3, lambda t: F.pad(t, (0, 0, 0, 1), value=GAP)[..., :-1, :]),
    "inner": (4, lambda t: swapped(t, -3, -2)),  # from (b, heads, t, k)
    "outer": (4, lambda t: F.pad(t, (0, 0, 0, 0, 0, 1), value=GAP)[..., :-1, :, :]),
    "last": (3, lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)),
    "first": (2, lambda t: t[:1].expand_as(t)),  # one x for all
    "each": (2, lambda t: t[:, :1].expand_as(t)),  # one for each sequence
    "number": (1, lambda t: t.flatten()[0].expand(t.shape)),
}
EXPANDED = ("first", "each", "number")  # of x and grad_y alone
AXES = dict(W0=2, bias=1, A=2, B=3, Wg=2)  # x and grad_y have those of the case

def fits(name, layout, axes):
    """Whether a tensor can lie in this way, where x and grad_y have so many axes."""
    least, _ = LAYOUTS[layout]
    return least <= AXES.get(name, axes) and not (layout in EXPANDED and name in AXES)

def laid(layout, axes):
    """The layout for every tensor that can lie so."""
    return tuple((name, layout) for name in TENSORS if fits(name, layout, axes))

LAID = {f"laid-{layout}": Case(lead, **ALIGNED, layouts=laid(layout, len(lead) + 1))
        for layout, (least, _) in LAYOUTS.items()
        for lead in [(2, 3, 4) if least == 4 else (3, 4)]}

SMALL, FEW, HUGE = range(1, 41), range(3, 9), range(12001, 20001)
TILE, TILES, ODD = (64, 128), (64, 128, 192, 256, 512), range(65, 576, 2)
ANY = (*SMALL, *TILES * 4, *ODD[::10])
SIZES = dict(k=ANY, d=ANY, r=range(1, 48), n=FEW, tokens=range(1, 201),
             sequences=range(1, 4), axes=range(1, 6))
LITTLE = dict(r=range(1, 25), n=(2, 3, 4))
KINDS = {  # of drawn cases: what is not as in SIZES; something is large, or odd
    "rank-32": dict(k=TILE, d=TILES, r=(32,), n=(16,), tokens=TILE, axes=(2,)),
    "rank-64": dict(k=TILE, d=TILE, r=(64,), tokens=TILE, axes=(2,)),
    "odd-tokens": LITTLE | dict(k=TILE, d=TILE, tokens=ODD, axes=(3,)),
    "odd-layer": LITTLE | dict(k=ODD[:32], d=ODD[:32], tokens=TILES),
    "odd-d": dict(k=TILES, d=ODD),
    "odd-k": dict(k=ODD, d=TILES),
    "large-r": dict(r=range(129, 257), d=SMALL, tokens=FEW),
    "many-heads": dict(n=range(33, 68), r=range(33, 65), k=SMALL, d=SMALL, tokens=FEW),
    "huge-k": LITTLE | dict(k=HUGE, d=FEW, tokens=FEW, axes=(1, 2, 3)),
    "huge-d": LITTLE | dict(k=FEW, d=HUGE, r=FEW, tokens=FEW, axes=(2, 3)),
    "huge-tokens": LITTLE | dict(k=FEW, d=FEW, r=FEW, tokens=HUGE, axes=(2,)),
}

def draw_case(kind, seed):
    """A name and a case of this kind, all else at random."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    sizes = (SIZES | KINDS[kind]).values()
    k, d, r, n, tokens, sequences, axes = (one_of(*size) for size in sizes)
    lead = (one_of(1, 2, 3), one_of(1, 2, 3), sequences, tokens)[5 - axes:]
    if math.prod(lead) * k * (d + n * r) > 1.6e7:
        lead = (*lead[:-1], min(tokens, 8))  # so that a call takes milliseconds
    share = one_of(0, 0.6, 0.9)  # of the tensors that do not lie contiguous
    layouts = tuple((name, one_of(*(word for word in LAYOUTS if fits(name, word, axes))))
                    for name in TENSORS if rng.random() < share)
    some = " ".join(name for name in INPUTS if rng.random() < 0.5)
    name = f"drawn-{kind}-{seed}-{'x'.join(map(str, lead)) or 1}-k{k}-d{d}-r{r}-n{n}"
    return name, Case(
        lead, k, d, r, n, bias=rng.random() < 0.7, layouts=layouts, seed=seed,
        scaling=one_of(1.0, 2.0, 0.5, float(rng.normal())),
        logits=one_of(0.5, 1.0, 1.0, 2.0),
        needs=one_of(ALL, ADAPTER, ADAPTER, some, one_of(*INPUTS)))

DRAWN = dict(draw_case(kind, seed) for seed, kind in enumerate([*KINDS, *KINDS]))
CASES = CHOSEN | LAID | DRAWN | LARGE

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
GROUPS = {  # the dtypes of x and y; of W0 and bias; of A, B and Wg; and autocast's
    "float64": (f64, f64, f64, None),
    "float32": (f32, f32, f32, None),  # not TF32, which is off by some 5e-4
    "bfloat16": (bf16, bf16, bf16, None),
    "half": (f16, f16, f16, None),
    "mixed": (bf16, bf16, f32, None),  # A, B and Wg may be cast to 16 bits
    "mixfp16": (f16, f16, f32, None),
    "autocast": (f32, f32, f32, bf16),  # y in 16 bits or float32, here and below
    "autofp16": (f32, f32, f32, f16),
    "automix": (bf16, bf16, f32, bf16),
    "autonorm": (f32, bf16, f32, bf16),  # x as from a LayerNorm
}

@functools.cache
def numbers(case):
    """The tensors of a case, as NumPy arrays in float64."""
    c, small, arrays = case, 1 / (case.k**0.5 * case.unit), {}
    sizes = dict(
        x=(c.unit, (*c.lead, c.k)), W0=(small, (c.d, c.k)), bias=(1, (c.d,)),
        A=(c.k**-0.5, (c.r, c.k)), B=(c.heads * c.r**-0.5, (c.n, c.d, c.r)),
        Wg=(c.logits * small, (c.n, c.k)), grad_y=(c.gradient, (*c.lead, c.d)))
    for i, (name, (size, shape)) in enumerate(sizes.items()):
        rng = np.random.default_rng([c.seed + (name in c.anew.split()), i])
        mean = c.mean if name in ("x", "grad_y") else 0
        arrays[name] = size * (rng.normal(size=shape) + mean)
    arrays["x"].reshape(-1, c.k)[:1] *= c.first_token
    arrays["grad_y"].reshape(-1, c.d)[-1:] *= c.first_token
    if not c.bias:
        arrays["bias"] = None
    return arrays

class Problem:
    """A case in a group: its tensors, what is right, and what is allowed."""

    def __init__(self, case, group):
        x, W0, A, self.autocast = GROUPS[group]
        self.case, self.group, self.y_dtype = case, group, self.autocast or x
        self.dtypes = dict(x=x, W0=W0, bias=W0, A=A, B=A, Wg=A, grad_y=self.y_dtype)

    @property
    def expected(self):  # what needs a gradient does not change the numbers
        return solution(replace(self.case, needs=ALL), self.group)

    @property
    def allowed(self):
        return tolerance(replace(self.case, needs=ALL), self.group)

    def tensor(self, name):
        """One of the tensors, made anew."""
        array = numbers(self.case)[name]
        if array is None:
            return None
        t = torch.from_numpy(array).to(DEVICE, self.dtypes[name], copy=True)
        if layout := dict(self.case.layouts).get(name):
            _, lay = LAYOUTS[layout]
            t = lay(t)
        return torch.nn.Parameter(t) if name in self.case.needs.split() else t

    def inputs(self):
        return {name: self.tensor(name) for name in TENSORS}

def named(y, grads):
    return {"y": y} | {f"gradient of {name}": g for name, g in grads.items()}

def as_float64(found, copy=False):
    return {quantity: None if t is None else t.detach().to("cpu", torch.float64, copy=copy)
            for quantity, t in found.items()}

def by_numpy(tensors, scaling):
    arrays = {name: t if t is None else t.numpy() for name, t in tensors.items()}
    y, grads = reference(**arrays, scaling=scaling)
    return named(torch.tensor(y), {name: torch.tensor(g) for name, g in grads.items()})

def by_torch(tensors, scaling):
    leaves = {name: tensors[name] for name in INPUTS}
    present = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    y = loop(**leaves, scaling=scaling)
    y.backward(tensors["grad_y"])
    return named(y.detach(), {name: t.grad for name, t in present.items()})

@functools.cache
def solution(case, group):
    """quantity -> float64, from what the tensors hold after rounding. A test holds the two
    ways to compute it against each other."""
    slow = math.prod(case.lead) * case.n > 64 or case.d * case.r > 1e4
    return (by_torch if slow else by_numpy)(as_float64(Problem(case, group).inputs()), case.scaling)

# ---- What is allowed ----

@functools.cache
def tolerance(case, group):
    """quantity -> the largest error: 1e-10 in float64; else 9 times the plain loop's, or
    6 eps (3 for y) if that is more, plus 5e-5. In bfloat16 sums over 4096 tokens may be
    rounded after each of 32 chunks, but not after each of 256."""
    p = Problem(case, group)
    if group == "float64":
        return dict.fromkeys(p.expected, 1e-10)
    all_cast = Problem(case, dict(mixed="bfloat16", mixfp16="half").get(group, group))
    eps = torch.finfo(p.y_dtype).eps
    rounded = as_float64(result(loop, all_cast))
    return {q: max(9 * error_of(q, t, p), (3 if q == "y" else 6) * eps) + 5e-5
            for q, t in rounded.items()}

def by_rows(found, right):
    return torch.atleast_2d((0 if found is None else found) - right).flatten(0, -2)

def error_of(quantity, found, p, right=None):
    """How far a quantity is off in its worst row (one token) or column: the norm of the
    difference, by that of an average row or column of what is right, or by its usual size
    if that is more. None counts as 0."""
    right, c = p.expected[quantity] if right is None else right, p.case
    squares = by_rows(found, right).square()
    if not squares.numel():
        return 0.0
    usual = c.gradient * {
        "y": 1 / c.gradient, "gradient of x": max(1.0, c.logits),
        "gradient of A": c.heads or 1.0, "gradient of Wg": c.heads or 1.0}.get(quantity, 1.0)
    rows, columns = squares.shape
    worst = torch.stack([squares.sum(1).max() * rows, squares.sum(0).max() * columns])
    return worst.nan_to_num(math.inf).max().item()**0.5 / max(right.norm().item(), usual)

class Finding(Exception):
    """What the oracle finds wrong. Every other error is the function's own."""

def must_be_right(found, p, moment="", known={}):
    """Raises a Finding that says what is wrong, where, by how much, and by what mistake."""
    found = as_float64(found)
    errors = {q: error_of(q, t, p) for q, t in found.items()}
    wrong = [q for q in found if errors[q] > p.allowed[q]]
    if not wrong:
        return
    worst = "y" if "y" in wrong else max(wrong, key=lambda q: errors[q] / p.allowed[q])
    error, allowed = errors[worst], p.allowed[worst]
    right = ", ".join(q for q in found if q not in wrong) or "nothing"
    how = "missing" if found[worst] is None else "wrong"
    lines = [f"{moment}{worst} is {how}, error {error:.2g}, allowed {allowed:.2g}"
             f"{where(worst, found[worst], p)}",
             f"wrong: {', '.join(wrong)}; right: {right}", str(p.case)]
    names = [name for name, mistake in known.items() if is_mistake(mistake, found, p)]
    if names and error > 3 * allowed:
        lines += [f"the same as the known mistake: {' or '.join(names)}"]
    raise Finding("\n".join(lines))

def where(quantity, found, p):
    """Which rows are wrong, if not all are."""
    right = p.expected[quantity]
    off = by_rows(found, right).norm(dim=1)
    allowed = p.allowed[quantity] * right.norm() / len(off)**0.5
    wrong = (~(off <= allowed)).nonzero().flatten().tolist()
    if not 0 < len(wrong) < len(off):
        return ""
    rows = "tokens" if quantity in ("y", "gradient of x") else "rows"
    first = tuple(int(i) for i in np.unravel_index(wrong[0], right.shape[:-1]))
    return f"; {len(wrong)} of {len(off)} {rows}, first {first}"

# ---- One call ----
MODES = dict(values=[torch.no_grad, torch.inference_mode], gradients=[torch.enable_grad])

def fail_unless(p, fact, message):
    if not fact:
        raise Finding(f"{message}\n{p.case}")

def surroundings():
    """What a call has to leave as it is."""
    one = torch.ones(1, 1, device=DEVICE)
    return dict(grad_mode=torch.is_grad_enabled(), default_dtype=torch.get_default_dtype(),
                autocast=F.linear(one, one).dtype, threads=torch.get_num_threads(),
                precision=torch.get_float32_matmul_precision())

@contextlib.contextmanager
def same_surroundings(p, moment):
    before = surroundings()
    yield
    for name, now in surroundings().items():
        fail_unless(p, now == before[name], f"{moment} has changed {name} to {now}")

def unchanged(run, moment):
    for name, (before, needed) in run.before.items():
        now = run.inputs[name].detach()
        same = torch.equal(now.nan_to_num(), before.nan_to_num())
        fail_unless(run.p, same, f"{name} was changed in place by {moment}")
        fail_unless(run.p, run.inputs[name].requires_grad == needed,
                    f"requires_grad of {name} was changed by {moment}")

def forward(function, p, inputs=None, mode=torch.enable_grad):
    """Calls the function; fails unless what holds for every y holds."""
    inputs, cast, before = inputs or p.inputs(), p.autocast, {}
    for name, t in inputs.items():
        if t is not None:
            t.grad, before[name] = None, (t.detach().clone(), t.requires_grad)
    asked = [name for name in before if mode is torch.enable_grad and inputs[name].requires_grad]
    with torch.autocast(torch.device(DEVICE).type, cast or torch.bfloat16, bool(cast)), mode():
        with same_surroundings(p, "the call"):
            y = function(*(inputs[name] for name in INPUTS), p.case.scaling)
    shape, dtypes = (*p.case.lead, p.case.d), {p.y_dtype, torch.float32 if cast else p.y_dtype}
    fail_unless(p, isinstance(y, torch.Tensor), f"expected one tensor, got {type(y).__name__}")
    fail_unless(p, y.shape == shape, f"expected y of shape {shape}, got {tuple(y.shape)}")
    fail_unless(p, y.dtype in dtypes, f"expected y of {dtypes}, got {y.dtype}")
    fail_unless(p, asked or not y.requires_grad, "y needs a gradient where none is asked for")
    fail_unless(p, y.requires_grad or set(asked) <= {"W0", "bias"}, "y has no gradient. "
                'No backward? -k "oracle and values". Copied weights? See hydralora_layer')
    fail_unless(p, mode is torch.inference_mode or not y.is_inference(), "y is an inference tensor")
    fail_unless(p, all(stride or size < 2 for size, stride in zip(shape, y.stride())),
                "y overlaps itself in memory, so that it cannot be changed in place")
    run = SimpleNamespace(p=p, y=y, inputs=inputs, before=before, asked=asked,
                          grad_y=inputs["grad_y"].to(y.dtype))
    unchanged(run, "the call")
    return run

def backward(run):
    """quantity -> tensor, None for a gradient of x, A, B or Wg that does not come."""
    if run.y.requires_grad:
        with same_surroundings(run.p, "the backward"):
            run.y.backward(run.grad_y)
        unchanged(run, "the backward")
    grads = {name: run.inputs[name].grad for name in run.asked}
    return named(run.y, {name: g for name, g in grads.items()
                         if g is not None or name not in ("W0", "bias")})

def result(function, p, inputs=None, mode=torch.enable_grad):
    return backward(forward(function, p, inputs, mode))

# ---- States: what calls must not leave behind, and other ways to call autograd ----
# Each yields a problem, what was found, and at what moment. All is compared at the end: so
# what a later call overwrites is found too.

def problem(group, **fields):
    return Problem(Case(**fields), group)

def calls_in_a_row(function, group, mode):
    """Two layers in turn, other x, one token after a sequence; inference tensors."""
    for now, size in ((mode, {}), (torch.no_grad, ALIGNED), (torch.inference_mode, {}),
                      (mode, ALIGNED)):
        with mode():
            inputs = problem(group, **size).inputs()
        for fields in (
                {}, dict(scaling=-0.5), dict(anew=LAYER, scaling=0.4), dict(anew="x"),
                dict(lead=(4, 7), anew=ALL), dict(lead=(2, 1)),
                dict(lead=(2, 1), anew=LAYER, scaling=0.4), dict(lead=(2, 1), anew="x")):
            p = problem(group, **size, **fields)
            other = p.case.anew.split() + ["x", "grad_y"] * ("lead" in fields)
            found = result(function, p, inputs | {name: p.tensor(name) for name in other}, now)
            yield p, found, f"a later call, {now.__name__}, now {fields}: "

def unlike_layers(function, group, mode):
    """Layers of one shape in turn: without a bias, with one and in another layout."""
    for size in ({}, ALIGNED):
        for fields in (dict(bias=False), dict(layouts=laid("columns", 3)), dict(bias=False)):
            p = problem(group, **size, **fields)
            yield p, result(function, p, mode=mode), "layers of one shape in turn: "

def tensor_changes(function, group, mode):
    """Between calls, in place as by an optimizer, by .data, which leaves no trace, or as
    other memory, as by offloading. The sum stays the same."""
    alive = []  # so that no address is used twice
    for name, way, (needs, size) in itertools.product(
            INPUTS, ("in place", "by .data", "as new .data"),
            ((ALL, {}), ("x", ALIGNED), ("x", dict(lead=(2, 1))))):
        p = problem(group, needs=needs, **size)
        inputs, right = p.inputs(), p.tensor(name).detach()
        alive += inputs.values()
        inputs[name].detach().copy_(right.flip(0))
        for _ in range(12):
            forward(function, p, inputs, mode)
        if way == "in place":
            inputs[name].detach().copy_(right)
        elif way == "by .data":
            inputs[name].data.copy_(right)
        else:
            inputs[name].data = right
        yield p, result(function, p, inputs, mode), f"{name} was changed {way}: "

def many_layers(function, group, mode):
    """All forwards of a model, then all backwards."""
    for count, order in ((9, 1), (70 if mode is torch.enable_grad else 9, -1)):
        problems = [problem(group, seed=i % 11, scaling=i % 11 - 4.5) for i in range(count)]
        runs = [forward(function, p, mode=mode) for p in problems]
        for run in runs[::order]:
            yield run.p, backward(run), f"{count} layers, then their backwards: "

def accumulated(function, group, mode):
    """Calls without gradients, two forwards, two backwards that add up."""
    p, q = (problem(group, scaling=1.3, anew=anew) for anew in ("", "x"))
    inputs = p.inputs()
    for now in MODES["values"][::-1]:
        forward(function, p, inputs, now)
    first = forward(function, p, inputs)
    second = forward(function, q, inputs | dict(x=q.tensor("x")))
    yield p, as_float64(backward(first), copy=True), "the first of two backwards: "
    both = as_float64(backward(second))
    yield q, {quantity: t if t is None else t - p.expected[quantity] for quantity, t in
              both.items() if quantity not in ("y", "gradient of x")}, "gradients that add up: "

def output_changes(function, group, mode):
    """y changed in place, as in y *= 2. The backward then is right, or a RuntimeError."""
    run = forward(function, problem(group), mode=mode)
    try:
        with mode():
            run.y.mul_(2)
    except RuntimeError as error:
        fail_unless(run.p, False, f"y cannot be changed in place: {error}")
    if run.asked:
        with contextlib.suppress(RuntimeError):
            halved = {quantity: t / 2 for quantity, t in backward(run).items()}
            yield run.p, halved, "y changed in place, then backward: "
    yield run.p, result(function, run.p, run.inputs, mode), "an earlier y was changed: "

def nan_stays(function, group, mode):
    """In its token or its output; from x, Wg and grad_y also in the gradients, as inf of
    grad_y, which a GradScaler looks for."""
    p, first, output = problem(group), (0, 1, 0), (..., 2)
    for name, value, index, reached in (
            ("x", math.nan, first, (0, 1)), ("W0", math.nan, (2, 0), output),
            ("bias", math.nan, 2, output), ("A", math.nan, (0, 0), ...),
            ("B", math.nan, (0, 2, 0), output), ("Wg", math.nan, (0, 0), ...),
            ("grad_y", math.nan, first, slice(0)), ("grad_y", math.inf, first, slice(0))):
        inputs, moment = p.inputs(), f"{value} in {name}: "
        inputs[name].data[index] = value
        found = as_float64(result(function, p, inputs, mode), copy=True)
        fail_unless(p, found["y"][reached].isnan().all(), f"{moment}y is not nan there")
        found["y"][reached] = p.expected["y"][reached]
        yield p, {"y": found["y"]}, f"{moment}the rest: "
        if name in ("x", "Wg", "grad_y"):
            gradients = [q for q in found if q.split()[-1] in ADAPTER.split()]
            finite = [q for q in gradients if found[q].isfinite().all()]
            fail_unless(p, not finite, f"{moment}finite: {', '.join(finite)}")

def random_state(function, group, mode):
    """A call may use random numbers, but may not set the generator to a state of its own."""
    p, after = problem(group), []
    for _ in range(2):
        yield p, result(function, p, mode=mode), ""
        after.append(torch.randn(1, device=DEVICE))
    fail_unless(p, after[0] != after[1], "the call has set the random state")

def nothing_kept(function, group, mode):
    """x, y and with them the graph are given back with the last reference to them."""
    p = problem(group)
    run = forward(function, p, mode=mode)
    yield p, as_float64(backward(run), copy=True), ""
    kept = {name: StorageWeakRef(t.untyped_storage())
            for name, t in dict(x=run.inputs["x"], y=run.y).items()}
    del run
    for name, storage in kept.items():
        fail_unless(p, storage.expired(), f"{name} is kept alive by the call")

def two_threads(function, group, mode):
    """Two threads that share one call; then a smoke test of two that call at once."""
    if group in LARGE_IN:  # slow where others compute
        torch.set_num_threads(2)
        try:
            found = result(function, problem(group), mode=mode)
        finally:
            torch.set_num_threads(1)
        yield problem(group), found, "two threads for one call: "
    problems = [problem(group, seed=i % 2, scaling=1.75 - i % 2) for i in range(16)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda p: result(function, p, mode=mode), problems)
        yield from zip(problems, found, itertools.repeat("two calls at once: "))

def within_compile(function, group, mode):
    """Only PyTorch may refuse, and not because an operation of the function fails."""
    p = problem(group)
    compiled = torch.compile(lambda *inputs: function(*inputs), backend="eager")
    try:
        found = result(compiled, p)
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        refused = last.filename.startswith(os.path.dirname(torch.__file__))
        if isinstance(error, torch._dynamo.exc.TorchRuntimeError):  # an operation that fails
            refused = "no fake impl" in str(error)
        if refused:
            pytest.skip(f"PyTorch does not compile it: {error}")
        raise
    yield p, found, "under torch.compile: "

def autograd_grad(function, group, mode):
    """Twice, unless compiled code refuses that; .grad stays as it is; x, A, B are no leaves."""
    leaves, p = problem(group).inputs(), problem(group, needs=ADAPTER)
    wanted = {name: leaves[name] for name in ADAPTER.split()}
    run = forward(function, p, leaves | {name: leaves[name] * 1.0 for name in ("x", "A", "B")})
    for again in (True, False):
        try:
            grads = torch.autograd.grad(run.y, [*wanted.values()], run.grad_y,
                                        retain_graph=again, allow_unused=True)
            yield p, named(run.y, dict(zip(wanted, grads))), "torch.autograd.grad: "
        except RuntimeError as error:
            if not again or "donated buffer" not in str(error):
                raise
    fail_unless(p, all(t.grad is None for t in leaves.values()), "autograd.grad has set .grad")

def changed_before_backward(function, group, mode):
    """Right gradients, or a RuntimeError, as PyTorch's about a tensor that was modified."""
    for name in INPUTS:
        run = forward(function, problem(group))
        run.before[name][0].copy_(run.inputs[name].detach().mul_(2))
        with contextlib.suppress(RuntimeError):
            yield run.p, backward(run), f"{name} changed between forward and backward: "

def each_need(function, group, mode):
    """Every choice of what needs a gradient, switched on the same tensors."""
    for names, size in ((INPUTS, {}), (ADAPTER.split(), ALIGNED)):
        inputs = problem(group, **size).inputs()
        for chosen in itertools.product((False, True), repeat=len(names)):
            needs = [*itertools.compress(names, chosen)]
            for name in INPUTS:
                inputs[name].requires_grad_(name in needs)
            p = problem(group, needs=" ".join(needs), **size)
            yield p, result(function, p, inputs), ""

def shared_input(function, group, mode):
    """Two layers on one x, as q_proj and v_proj are, or one on two, and one backward."""
    for size, anew in (({}, LAYER), (ALIGNED, LAYER), ({}, "x"), ({}, "grad_y")):
        p, q = problem(group, **size), problem(group, anew=anew, **size)
        first = p.inputs()
        second = first | {name: q.tensor(name) for name in anew.split()}
        runs = [forward(function, p, first), forward(function, q, second)]
        torch.autograd.backward([run.y for run in runs], [run.grad_y for run in runs])
        shared = [name for name in ADAPTER.split() if name not in anew.split()]
        both = as_float64({f"gradient of {name}": first[name].grad for name in shared})
        only_p = {quantity: t if t is None else t - q.expected[quantity]
                  for quantity, t in both.items()}
        yield p, only_p, f"two calls, {anew} anew, one backward: "

ONLY_GRADIENTS = (accumulated, within_compile, autograd_grad, changed_before_backward,
                  each_need, shared_input)
STATES = {state.__name__.replace("_", "-"): state for state in (
    calls_in_a_row, unlike_layers, tensor_changes, many_layers, output_changes, nan_stays,
    random_state, nothing_kept, two_threads, *ONLY_GRADIENTS)}

# ---- The oracle ----
def groups_of(name):
    if name in NOT_IN_FLOAT16:
        return [group for group in GROUPS if group not in ("half", "mixfp16", "autofp16")]
    return LARGE_IN if name in LARGE else GROUPS

CHECKS = [(compared, name, group) for name in [*CASES, *STATES] for compared in MODES
          for group in groups_of(name)
          if not (compared == "values" and STATES.get(name) in ONLY_GRADIENTS)]

def check(function, compared, name, group, known={}):
    """Raises a Finding if the function is wrong in a case or a state."""
    if "torch._dynamo" in sys.modules:  # it gives up in silence after a few shapes
        sys.modules["torch._dynamo"].reset()
    modes = MODES[compared]
    if name in DRAWN or name in LARGE:  # one is enough for sizes
        modes = modes[:1]
    for mode in modes:
        if name in STATES:
            found = list(STATES[name](function, group, mode))
        else:
            p = Problem(CASES[name], group)
            found = [(p, result(function, p, mode=mode), "")]
        for p, quantities, moment in found:
            must_be_right(quantities, p, f"{mode.__name__}, {moment}", known)

def verdict(function, compared, name, group):
    """What is wrong, or None. An assert or a sys.exit of the function is an error too."""
    try:
        check(function, compared, name, group, KNOWN)
    except Finding as finding:
        return str(finding)
    except BaseException as error:
        refused = name == "within-compile" and isinstance(error, pytest.skip.Exception)
        if refused or isinstance(error, KeyboardInterrupt):
            raise
        *_, last = traceback.extract_tb(error.__traceback__)
        return (f"{type(error).__name__}: {error}\nat {last.filename}:{last.lineno}; dtypes of "
                f"x, W0, A, autocast: {GROUPS[group]}; leave it out with "
                f"-k 'oracle and not {group}' or -k 'oracle and not {name}'")

@pytest.mark.parametrize("compared, name, group", [pytest.param(
    *one, id="{}-{}d-{}-{}".format(one[0], len(CASES.get(one[1], Case()).lead) + 1, *one[1:]))
    for one in CHECKS])
def test_oracle(compared, name, group, request):
    """If the check fails, the test fails with a message instead of a traceback."""
    if message := verdict(IMPLEMENTATION, compared, name, group):
        pytest.fail(f"{NAME}, {request.node.callspec.id}: {message}", pytrace=False)

# ---- The oracle's own tests ----
# What follows uses hydralora.py; the oracle does not.
import collections
import copy
import json
import linecache
import re
import runpy
import subprocess
import time
from pathlib import Path

from torch import nn

import hydralora
from hydralora import (
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, export_lora, from_official_state_dict,
    hook_gates, hydralora_delta, hydralora_forward, hydralora_layers, hydralora_state_dict,
    inject_hydralora, load_hydralora_state_dict, mean_gates, merge_hydralora,
    num_heads_from_corpus, record_gates, unmerge_hydralora)

HERE = Path(__file__).parent

# Wrong implementations that somebody could write: EINSUM with one line more, after the line
# that sets the same name, at the top for an argument, or else at the end. Each has to fail
# in the cases and states that it stands under, in the groups named there or in float32 and
# bfloat16, with what stands after =>. All but those under plain have to pass plain. So
# each case, state and check is needed. $ is each of the inputs in turn.

EINSUM = """
def changed(x, W0, bias, A, B, Wg, s):
    (n, d, r), k, t = B.shape, x.shape[-1], x.shape[-2] if x.dim() > 1 else 0
    rest = (W0, bias, A, B, Wg, s)
    base = F.linear(x, W0, bias)
    h = x.to(A.dtype)
    logits = F.linear(h, Wg)
    w = logits.softmax(-1)
    z = F.linear(h, A)
    delta = s * mix(w, z, B)
    y = base + delta.to(base.dtype)
    return y
"""

def with_line(line):
    """The function, with a memory of its own, and its source for tracebacks."""
    *_, name = "y", *re.findall(r"(\w+) = ", line)
    lines, file = EINSUM.strip().splitlines(), f"<{line}>"
    at = max((i for i, own in enumerate(lines) if own.startswith(f"    {name} = ")), default=1)
    source = "\n".join([*lines[:at + 1], f"    {line}", *lines[at + 1:]])
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    space = dict(globals(), memory={})
    exec(compile(source, file, "exec"), space)
    return space["changed"]

def table(text):
    """name -> line, from "code  # name  => said" under "[cases, states and groups]"."""
    table, places, groups = {}, [], []
    for line in re.sub(r"\\\n\s+", "", text).strip().splitlines():
        if line[0] == "[":
            words = line.strip("[]").split()
            places = [word for word in words if word not in GROUPS]
            groups = [word for word in words if word in GROUPS] or ["float32", "bfloat16"]
            continue
        for each in INPUTS if "$" in line else [""]:
            line_of_each, _, said = line.replace("$", each).partition("  => ")
            code, _, name = line_of_each.partition("  # ")
            table[name or code] = SimpleNamespace(
                code=code, places=places, groups=groups, said=said)
    return table

def mix(w, z, B):
    return torch.einsum("...nr,ndr->...d", w[..., None] * z[..., None, :], B)

def valued(t, value):
    """The value of another tensor with the gradient of t."""
    return t + (value - t).detach()

def hooked(t, change):
    """t, with change(gradient) as its gradient."""
    t = t.clone()
    if t.requires_grad:
        t.register_hook(change)
    return t

def misread(t, *strides):
    """What a kernel reads that takes t to be contiguous, or to have these strides."""
    strides = strides or [math.prod(t.shape[i + 1:]) for i in range(t.dim())]
    return valued(t, t.detach().as_strided(t.shape, strides, t.storage_offset()))

def until(t, dim, size):
    """t, zero from `size` on along an axis, if it has that axis."""
    if -dim > t.dim():
        return t
    keep = torch.arange(t.shape[dim], device=t.device) < size
    return t * keep.view(-1, *[1] * (-1 - dim)).to(t.dtype)

def tiles(t, dim, tile):
    """t, zero after the last whole tile along an axis, if there is more than one."""
    size = t.shape[max(dim, -t.dim())]
    return until(t, dim, size // tile * tile) if size > tile else t

def cast_to(dtype, *tensors):
    return [None if t is None else t.to(dtype) for t in tensors]

def kept(memory, t, *key):
    """What was there at the first call with this key, shape and dtype. With t.__dict__ for a
    memory it is kept as if by id(t), and no id is used twice."""
    return valued(t, memory.setdefault((t.shape, t.dtype, *key), t.detach().clone()))

def read_again(t, by):
    """`by`, with a gradient that is wrong if t changes before the backward."""
    norm = t.detach().norm()
    return hooked(by, lambda g: g * t.detach().norm() / norm)

training = torch.is_grad_enabled
by_einsum = with_line("y = y")
KNOWN_LINES = table(r"""
[plain float64 float32 bfloat16 half mixed mixfp16 autocast autofp16 automix autonorm]
s = 1.0  # no scaling
[plain]
delta = delta / r  # scaling divided by r again
w = logits.softmax(-2 % x.dim())  # softmax over tokens
w = logits.softmax(1 % x.dim())  # softmax over axis 1
w = logits  # no softmax
w = 1 + 0 * w  # heads summed
w = 1 / n + 0 * w  # uniform gates
w = valued(w, F.one_hot(w.argmax(-1), n).to(w))  # argmax gates
w = w.mean(-2, keepdim=True) if t else w  # one mixture for a sequence
As = torch.stack([A.roll(i, 0) for i in range(n)]); \
    delta = s * torch.einsum("...n,ndr,nrk,...k->...d", w, B, As, h)  # separate A
delta = s * F.linear((w[..., None] * z[..., None, :]).flatten(-2), \
    B.reshape(d, -1))  # B reshaped, not transposed
w = w.detach()  # gates detached
A = A.detach()  # A detached
B = B.detach()  # heads detached
A, B, Wg = A.detach(), B.detach(), Wg.detach()  # weights copied into a layer (see hydralora_layer)
w = valued(w.detach() * logits, w)  # softmax's gradient without its mean
B = hooked(B, lambda g: g / 1.75)  # scaling missing from the heads' gradient
Wg = hooked(Wg, torch.neg)  # router's gradient with the wrong sign
base = F.linear(x, W0)  # bias dropped
base = 0 * base  # base not added
[plain float64]
y = by_einsum(*cast_to(torch.float32, x, W0, bias, A, B, Wg), s).to(x.dtype)  # all in float32
[plain float64 float32]
x, W0, A, B, Wg = (valued(v, v.half().to(v)) for v in (x, W0, A, B, Wg))  # rounded as by TF32
[steep]
w = logits.exp() / logits.exp().sum(-1, keepdim=True)  # exp without the maximum taken off
[all-three]
W0 = W0.T if k == d else W0  # W0 transposed where it is square
[zero-scaling]
s = s or 1.0  # scaling of 0 taken for 1
[laid-second]
$ = misread($)  # $ read as contiguous
[laid-columns laid-rows laid-swapped laid-gaps laid-inner laid-outer laid-last]
x = misread(x)  # layout of x not seen
[laid-columns laid-rows laid-second]
delta = hooked(delta, lambda g: g if g.is_contiguous() else g.flip(0))  # grad_y read as contiguous
[laid-first laid-each laid-number]
delta = hooked(delta, lambda g: 0 * g if 0 in g.stride() else g)  # expanded grad_y lost
[drawn-large-r]
A = until(A, -2, 64)  # first 64 ranks only
[heads-odd drawn-many-heads]
B = until(B, -3, 32)  # first 32 heads only
[drawn-huge-k]
x = tiles(x, -1, 128)  # rest of k after tiles of 128 left out
[drawn-huge-d]
B = tiles(B, -2, 64)  # rest of d after tiles of 64 left out
[drawn-huge-tokens]
delta = tiles(delta, -2, 128)  # rest of the tokens after tiles left out
[last-tokens]
s = 1.0 if t == 1 else s  # no scaling for one token
[each-need]
A = A if W0.requires_grad else A.detach()  # no gradient for A with a frozen base
""")
OTHER_LINES = table(r"""
[plain]
base = F.linear(x.data.mul_(1.01), W0, bias)  => x was changed in place by
bias.requires_grad_(False)  => requires_grad of bias was changed by the call
y = (y, 0.0)  => expected one tensor, got tuple
y = y if training() else y.requires_grad_()  => where none is asked for
y = y.detach()  => y has no gradient
y = y if training() else torch.inference_mode()(by_einsum)(x, *rest)  => y is an inference tensor
delta = delta * (not torch.is_inference_mode_enabled())  # only the base in inference mode
delta = hooked(delta, lambda g: g.mul_(1.01))  => in place by the backward
[plain float32]
torch.set_grad_enabled(False)  => the call has changed grad_mode
torch.set_default_dtype(torch.float16)  => has changed default_dtype
torch.set_num_threads(2)  => has changed threads
torch.set_float32_matmul_precision("medium")  => has changed precision
y = hooked(y, lambda g: torch.set_num_threads(2))  => the backward has changed
[plain autocast]
torch.autocast(x.device.type, enabled=False).__enter__(); \
    torch.autocast_decrement_nesting()  => has changed autocast
[plain float64 bfloat16]
y = y.float()  => expected y of
[vector]
s = 1.0 if x.dim() == 1 else s
[empty-batch empty-rows]
y = y if y.numel() else y.detach()
[width-one]
y = y.squeeze()  => expected y of shape
[width-one float64]
w = w if Wg.any() else 0 * w
[only-head]
delta = delta if n > 1 else 0 * delta
[last-tokens]
x = misread(x, k, k, 1) if x.dim() == 3 and t == 1 else x
delta = until(delta, -3, 32) if t == 1 else delta
[whole-tiles drawn-rank-32 drawn-rank-64]
A = A if r % 16 or k % 64 or d % 64 or t % 64 else 2 * A
[thousands bfloat16]
y = torch.cat([by_einsum(c, *rest) for c in x.reshape(-1, k).split(16)]).view( \
    y.shape)  # sums in bfloat16
[grid-limit]
delta = until(delta, -2, 65535)
[large-scaling]
delta = delta.clamp(-65504, 65504)
[heads-at-zero]
delta = delta if B.any() else 0 * base.detach()  # adapter left out while B is 0
[near-zero]
A = hooked(A, lambda g: g * (g.norm() > 0.1))
[token-at-zero]
delta = hooked(delta, lambda g: g * (c := g.norm(dim=-1, keepdim=True)) / c)
y = y * x.any(-1, keepdim=True)
[saturated]
logits = logits.clamp(-1000, 1000)
[small-gradient]
delta = hooked(delta, lambda g: g * (g.abs() > 1e-6))
[large-all]
delta = hooked(delta, lambda g: g.clamp(-1000, 1000))
[laid-rows laid-gaps laid-swapped]
x = x if k % 8 else misread(x)
[laid-offset]
x = valued(x, x.detach().as_strided(x.shape, x.stride(), 0))
[laid-first laid-number]
y = y if x.stride(0) else y[:1].expand_as(y)  => y overlaps itself
[drawn-odd-tokens]
delta = tiles(delta, -2, 64) if k % 64 == 0 else delta
[drawn-odd-layer]
x = tiles(x, -1, 64) if t and t % 64 == 0 else x
[drawn-odd-d]
B = tiles(B, -2, 64) if k % 64 == 0 else B
[drawn-odd-k]
x = tiles(x, -1, 64) if d % 64 == 0 else x
[decode-long]
x = until(x, -1, 8192) if n * r > 128 else x
[decode-wide]
B = until(B, -2, 8192) if n * r > 128 else B
[model-size]
x = until(x, -1, 512) if k % 8 == 0 and d > 512 else x
[both-wide]
x = until(x, -1, 1024) if d > 1024 else x
[many-wide]
delta = until(delta, -1, 1024) if t > 1024 else delta
[calls-in-a-row]
s = memory.setdefault((x.shape, x.dtype), s)  => now {'scaling': -0.5}
W0 = kept(memory, W0)  => now {'anew': 'W0 bias
z = kept(A.__dict__, z)  => now {'anew': 'x'}
o = memory.setdefault(k, w.numel()); \
    w = w if o == w.numel() else w.flip(-1)  => now {'lead': (4, 7)
B = kept(memory, B) if t == 1 else B  => 1), 'anew': 'W0
z = kept(A.__dict__, z) if t == 1 else z  => 1), 'anew': 'x'
B = kept(memory, B) if k % 8 == 0 else B  => k=64
Wg = kept(memory, Wg) if k % 8 else Wg  => k=7
w = w if memory.setdefault(0, training()) == training() else w.flip(-1)  => later call, no_grad
memory.update({0: 1} if torch.is_inference_mode_enabled() else {}); \
    w = w.detach() if training() and memory else w  # no gradient after inference mode
s = 0 * s if W0.is_inference() else s  # inference tensors without the adapter
[unlike-layers]
o = memory.setdefault(k, bias); base = F.linear(x, W0) if o is None and k > 7 else base  => k=64
o = torch.is_inference_mode_enabled(), d; memory.update({} if bias is None else {o: bias}); \
    bias = memory.get(o)  => bias=False
o = memory.setdefault(k, W0.stride()) == W0.stride(); W0 = W0 if o or k > 7 else W0.flip(0)  => k=7
[tensor-changes]
$ = kept($.__dict__, $)  => $ was changed in place:
B = kept(B.__dict__, B, 0 if B.is_inference() else B._version)  => by .data
A = kept(A.__dict__, A, round(A.double().sum().item(), 3)) if k % 8 else A  => k=7
A = valued(A, A.__dict__.setdefault("own", A.detach()))  => A was changed as new
A = A if A.requires_grad or not training() else kept(A.__dict__, A)  => needs='x'
o = A.__dict__; o["calls"] = o.get("calls", 0) + 1; \
    A = kept(o, A) if o["calls"] > 9 else A  # A kept from the tenth call
A = kept(A.__dict__, A) if t == 1 else A  => (2, 1)
[many-layers]
o = memory.setdefault(0, []); o.append(s) if training() else 0; \
    delta = hooked(delta, lambda g: g / s * o.pop())  # a stack  => 9 layers
o = memory.setdefault(0, []); o.append(s) if training() else 0; \
    delta = hooked(delta, lambda g: g / s * o.pop(0))  # a queue  => 70 layers
i = memory[0] = memory.get(0, 0) + 1; memory[i % 64, 1] = s; \
    delta = hooked(delta, lambda g: g / s * memory[i % 64, 1])  # a ring  => 70 layers
i = memory[0] = memory.get(0, 0) + 1; y = y if training() else memory.setdefault( \
    (i % 8, y.shape), y.clone()).copy_(y)  # y in one of eight buffers
[output-changes]
o = y.detach(); c = o.norm(); delta.requires_grad and delta.register_hook( \
    lambda g: g * o.norm() / c); y = y  # y read again  => then backward
y = y if training() else x.__dict__.setdefault("y", y)  => an earlier y was changed
y = y.unsqueeze(0).unbind(0)[0]  => y cannot be changed
[nan-stays]
$ = $.nan_to_num()  => nan in $: y is not nan
delta = delta + 0 * x.sum()  => the rest: y is wrong
A = hooked(A, torch.nan_to_num)  => nan in x: finite
B = hooked(B, lambda g: g.nan_to_num() if Wg.isnan().any() else g)  => nan in Wg: f
delta = hooked(delta, torch.nan_to_num)  => nan in grad_y: finite
delta = hooked(delta, lambda g: g.masked_fill(g.isinf(), 0))  => inf in grad_y
[random-state]
torch.manual_seed(0)  # random state set
[nothing-kept]
memory.setdefault(0, []).append(x)  => x is kept
memory.setdefault(0, []).append(y)  => y is kept
[two-threads]
delta = until(delta, -2, t // torch.get_num_threads())  => threads for one
memory["s"] = s; time.sleep(1e-3); s = memory["s"]  => two calls at once
[within-compile float64]
s = 1.0 if torch.compiler.is_compiling() else s
[accumulated]
o = A.__dict__; o["norm"] = c = x.detach().norm(); \
    delta = hooked(delta, lambda g: g * o["norm"] / c)  # saved by layer  => the first of two
o = A; A = hooked(A, lambda g: setattr(o, "grad", None))  => that add up
B = B if A.__dict__.setdefault("first", training()) else hooked(B, torch.zeros_like)
[autograd-grad]
o = []; w = hooked(w, lambda g: 0 * g if o else o.append(1))
A = A if A.is_leaf else A.detach()
o = Wg; Wg = hooked(Wg, lambda g: setattr(o, "grad", 0 * g))  => has set .grad
[changed-before-backward]
o = $; x, W0, A, B, Wg = (read_again(o, v) for v in (x, W0, A, B, Wg))  => $ changed between
[each-need]
w = w if k > 7 or any(v.requires_grad for v in (x, A, B)) else w.detach()
A = A if A.__dict__.setdefault("needs", A.requires_grad) else A.detach()
A = A if k % 8 or W0.requires_grad else A.detach()  => k=64
[shared-input]
o = A.__dict__; A = hooked(A, lambda g: o.setdefault("g", g.clone()).copy_(g))  => x anew
o = A.__dict__; x = hooked(x, lambda g: o.setdefault("g", g.clone()).copy_(g))  => grad_y an
x = x if k > 7 else hooked(x, lambda g: memory.setdefault(0, g.clone()).copy_(g))
x = x if k < 8 else hooked(x, lambda g: memory.setdefault(0, g.clone()).copy_(g))  => k=64
""")
WRONG = KNOWN_LINES | OTHER_LINES
KNOWN = {name: with_line(line.code) for name, line in KNOWN_LINES.items()}

def is_mistake(mistake, found, p):
    """Whether a wrong implementation gives what was found, as far as both give it."""
    try:
        run = forward(mistake, p, mode=torch.enable_grad if len(found) > 1 else torch.no_grad)
        given = as_float64(backward(run))
        for quantity in given.keys() & found.keys():
            t = given[quantity]
            t = torch.zeros_like(p.expected[quantity]) if t is None else t
            if not error_of(quantity, found[quantity], p, t) <= p.allowed[quantity]:
                return False
        return True
    except Exception:  # it does not run on this problem
        return False

def finding(line, place, group):
    """What is found wrong in a case, a kind of drawn cases or a state, each with a new memory."""
    for compared, name, its_group in CHECKS:
        if its_group == group and (name == place or name in DRAWN and name.startswith(place + "-")):
            try:
                check(with_line(line.code), compared, name, group)
            except Finding as found:
                return str(found)
            finally:  # some wrong implementations change the surroundings
                torch.set_default_dtype(torch.float32)
                torch.set_num_threads(1)
                torch.set_float32_matmul_precision("highest")
    return None

@pytest.mark.parametrize("name", WRONG)
def test_wrong_implementation_fails_where_it_should(name):
    line = WRONG[name]
    for group in line.groups:
        assert line.places == ["plain"] or not finding(line, "plain", group)
        for place in line.places:
            message = finding(line, place, group)
            assert message and line.said in message, (group, place, message)

def test_every_case_and_state_is_needed():
    kinds = [f"drawn-{kind}" for kind in KINDS]
    assert {place for line in WRONG.values() for place in line.places} == {
        *CHOSEN, *LAID, *LARGE, *kinds, *STATES}

# Right implementations, written as others would write them; each must pass.

class Recomputed(torch.autograd.Function):
    """A usual kernel: its own backward, in float32 or better, for a base that is frozen."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:-1])
        ctx.scaling = inputs[-1]
        with torch.autocast(inputs[0].device.type, enabled=False):
            high = torch.promote_types(inputs[3].dtype, torch.float32)
            return by_einsum(*cast_to(high, *inputs[:-1]), ctx.scaling).to(inputs[0].dtype)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            inputs = [None if t is None else t.detach() for t in ctx.saved_tensors]
            high = torch.promote_types(inputs[3].dtype, torch.float32)
            trained = [inputs[i].requires_grad_() for i in (0, 3, 4, 5)]
            y = by_einsum(*cast_to(high, *inputs), ctx.scaling)
            dx, *others = torch.autograd.grad(y, trained, g.to(high))
        return dx, None, None, *others, None

class Inherited(Recomputed):
    @staticmethod
    def backward(ctx, g):  # PyTorch 2.13 refuses to compile this
        return Recomputed.backward(ctx, g)

def hydralora_layer(x, W0, bias, A, B, Wg, scaling):
    """HydraLoRALinear, computing with the oracle's tensors in the place of its parameters:
    copies in them would take the gradients."""
    n, d, r = B.shape
    base = nn.Linear(A.shape[1], d, bias is not None, device="meta", dtype=W0.dtype)
    layer = HydraLoRALinear(base, num_heads=n, r=r, lora_alpha=scaling * r)
    weights = {"base.weight": W0, "lora_A": A, "lora_B": B, "router.weight": Wg}
    if bias is not None:
        weights["base.bias"] = bias
    return torch.func.functional_call(layer, weights, x)

RIGHT = {name: with_line(line.code) for name, line in table(r"""
W0, bias = W0.detach(), bias if bias is None else bias.detach()  # base detached
o = x.reshape(-1, k); y = torch.cat([by_einsum(c, *rest) for c in o.split( \
    len(o) // 32 + 1)]).view(y.shape)  # 32 chunks of tokens
y = torch.utils.checkpoint.checkpoint(by_einsum, x, *rest, use_reentrant=False)  # checkpointed
y = y.mT.contiguous().mT if t else y  # strided output
y = by_einsum(x, W0, bias, *cast_to(x.dtype, A, B, Wg), s)  # adapter cast to the dtype of x
delta = s * F.linear((w[..., None] * z[..., None, :]).flatten(-2), \
    B.transpose(0, 1).flatten(1))  # one product
""").items()} | {
    "own backward": Recomputed.apply, "inherited": Inherited.apply,
    "hydralora layer": hydralora_layer}

@pytest.mark.parametrize("name", RIGHT)
def test_right_implementation_passes(name):
    """Each takes a part of the checks; together they take half of all."""
    offset = list(RIGHT).index(name)
    for one in CHECKS[2 * offset::2 * len(RIGHT)]:
        with contextlib.suppress(pytest.skip.Exception):
            check(RIGHT[name], *one)

def test_message_names_the_known_mistake():
    for name in ("no scaling", "separate A", "A detached", "router's gradient with the wrong sign",
                 "weights copied into a layer (see hydralora_layer)"):
        def frozen(x, W0, bias, *others):
            return KNOWN[name](x, W0.detach(), bias.detach(), *others)

        for function in (KNOWN[name], frozen):
            message = verdict(function, "gradients", "plain", "float64")
            assert f"\nthe same as the known mistake: {name}" in message

def test_only_pytorch_may_refuse_to_compile():
    raises = with_line("y = y.view(99) if torch.compiler.is_compiling() else y")
    assert "invalid for input" in verdict(raises, "gradients", "within-compile", "float64")
    assert "Skipped" in verdict(lambda *_: pytest.skip("mine"), "values", "plain", "float64")
    with contextlib.suppress(pytest.skip.Exception):  # of PyTorch 2.13, but not of 2.3
        check(Inherited.apply, "gradients", "within-compile", "float64")

def test_reference_by_hand():
    by_hand = [np.array(a, dtype=float) for a in (  # see hydralora_forward's docstring
        [[1, 2]], np.eye(2), [10, 20], [[1, 1]], [[[1], [2]], [[5], [-2]]],
        [[math.log(3), 0], [0, 0]])]
    y, _ = reference(*by_hand, 2.0, np.zeros((1, 2)))
    for y in (y, hydralora_forward(*map(torch.from_numpy, by_hand), 2.0)):
        np.testing.assert_allclose(y, [[23, 28]], rtol=1e-14)

def test_loop_in_torch_is_the_reference():
    for case in CASES.values():
        if 0 < math.prod(case.lead) * case.n * (case.k + case.d) * case.r < 3e5:
            p = Problem(case, "float64")
            by_loops, fast = (solve(as_float64(p.inputs()), case.scaling)
                              for solve in (by_numpy, by_torch))
            for quantity, t in fast.items():
                assert error_of(quantity, t, p, by_loops[quantity]) < 1e-12, (case, quantity)

def test_words_that_select_do_not_contain_each_other():
    words = [*GROUPS, *CASES, *STATES, *MODES, "1d", "2d", "3d", "4d", "5d", "oracle"]
    assert all(re.fullmatch("[a-z0-9A-Z-]+", word) for word in words)
    assert not [(a, b) for a in words for b in words if a != b and a.lower() in b.lower()]

@pytest.mark.parametrize("setting, said", [
    ("IMPL=no_such:f", "No module named 'no_such'"), ("IMPL=hydralora", "got a module"),
    ("DEVISE=cpu", "unknown setting {'HYDRALORA_DEVISE'}")])
def test_bad_setting_ends_the_run_with_a_message(setting, said, monkeypatch):
    monkeypatch.setenv(*f"HYDRALORA_{setting}".split("="))
    with pytest.raises(pytest.exit.Exception, match=f"HYDRALORA_.*: .*{said}") as end:
        runpy.run_path(__file__)
    assert end.value.returncode == 2

KERNEL = """
import sys
from hydralora import hydralora_forward

def kernel(x, W0, bias, A, B, Wg, scaling):
    assert len(B) > 1
    if scaling == 1e6:
        raise KeyboardInterrupt
    y = hydralora_forward(x, W0, bias, A, B, Wg, scaling or 1.0)
    if y.requires_grad and scaling == 0:
        y.register_hook(lambda grad: sys.exit("no backward"))
    return y
"""

def test_command_of_a_user_in_a_folder_with_the_two_files_alone(tmp_path):
    for name in ("hydralora.py", "test_hydralora.py"):
        (tmp_path / name).write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.py").write_text(KERNEL)
    words = "oracle and float64 and (plain or only-head or zero-scaling or large-scaling)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "test_hydralora.py", "-q", "-k", words], cwd=tmp_path,
        env=os.environ | dict(HYDRALORA_IMPL="mine:kernel"), text=True, capture_output=True)
    for said in ("\nmine:kernel, values-3d-only-head-float64: AssertionError: \nat ",
                 f"{os.sep}mine.py:6; dtypes of x, ",
                 "leave it out with -k 'oracle and not float64' or -k 'oracle and not only-head'",
                 "gradients-3d-zero-scaling-float64: SystemExit: no backward\n",
                 "\nthe same as the known mistake: no scaling or scaling of 0 taken for 1\n",
                 "\n4 failed, 2 passed,"):
        assert said in done.stdout, done.stdout
    assert done.returncode == 2  # KeyboardInterrupt ends the run

# ---- The layer is that function ----
N, K, D, R = 4, 7, 5, 3
GATES = torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(3))
each_dtype = pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.bfloat16, torch.float16])

def layer(k=K, d=D, *, dtype=torch.float64, random_heads=True, device="cpu", **more):
    """A HydraLoRALinear whose heads are not zero, so that the adapter does something."""
    torch.manual_seed(0)
    made = HydraLoRALinear(nn.Linear(k, d, dtype=dtype, device=device),
                           **dict(num_heads=N, r=R, lora_alpha=2 * R) | more)
    if random_heads:
        nn.init.normal_(made.lora_B)
        nn.init.normal_(made.router.weight)  # gates that vary from token to token
    return made

def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))

def fit(model, loss_of, steps, lr=1e-2, **arguments):
    """The last loss of so many AdamW steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, **arguments)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss := loss_of(model)).backward()
        optimizer.step()
    return loss

def test_defaults_shapes_and_start():
    base, m, x = nn.Linear(2, 2), layer(), tokens(2, 9, K)
    one = HydraLoRALinear(base)
    assert (one.num_heads, one.r, one.scaling, one.lora_dropout.p) == (3, 8, 2, 0)
    assert one.base is base and one.weight is base.weight and not one.bias.requires_grad
    assert m.gates(x).shape == Router(K, N)(x.float()).shape == (2, 9, N)
    assert {key: tuple(t.shape) for key, t in m.state_dict().items()} == {
        "lora_A": (R, K), "lora_B": (N, D, R), "router.weight": (N, K),
        "base.weight": (D, K), "base.bias": (D,)}
    large = layer(256, 8, r=16, num_heads=16, random_heads=False)
    for p in (large.lora_A, large.router.weight):  # U(-b, b), b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16
        assert abs(p.std() * 16 * 3**0.5 - 1) < 0.05

def test_layer_is_the_reference_and_its_router_sees_no_dropout():
    m, x = layer(lora_dropout=0.5).eval(), tokens(2, 9, K)
    weights = (m.base.weight, m.base.bias, m.lora_A, m.lora_B, m.router.weight)
    arrays = [t.detach().numpy() for t in (x, *weights)]
    y, _ = reference(*arrays, 2.0, np.zeros((2, 9, D)))
    for f in (m, torch.compile(m, fullgraph=True, backend="aot_eager")):
        np.testing.assert_allclose(f(x).detach().numpy(), y, atol=1e-12)
        assert len(torch.autograd.grad(f(x).sum(), weights[2:])) == 3
    with record_gates(m.train()) as gates:
        m(x)
    torch.testing.assert_close(gates[""], torch.softmax(x @ m.router.weight.T, -1))
    m.base.register_forward_hook(lambda base, inputs, y: 2 * y)  # base is called, not rebuilt
    torch.testing.assert_close(m.eval()(x) - torch.tensor(y), F.linear(x, *weights[:2]))

def test_gates_survive_what_exchanges_every_linear_layer():
    """As quantisers do."""
    model = tiny()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, nn.Linear(child.in_features, child.out_features))
    with record_gates(model) as gates:
        model(IDS)
    for w in gates.values():
        torch.testing.assert_close(w.sum(-1), torch.ones(3, 11))

@pytest.mark.skipif(sys.version_info >= (3, 14), reason="no TorchScript there")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layer_becomes_torchscript():
    m, x = layer(), tokens(2, 9, K)
    assert torch.equal(torch.jit.script(m)(x), m(x))

# ---- Identities ----
def test_update_starts_at_zero_and_only_heads_have_a_gradient():
    m, x = layer(random_heads=False), tokens(9, K)
    assert torch.equal(m(x), m.base(x))
    m(x).square().sum().backward()
    assert not m.lora_A.grad.any() and not m.router.weight.grad.any()
    assert all(head.any() for head in m.lora_B.grad)

def test_one_head_is_lora_and_so_are_equal_heads():
    one, equal, x = layer(num_heads=1), layer(), tokens(9, K)
    nn.init.constant_(equal.lora_B, 0.3)
    for m in (one, equal):
        torch.testing.assert_close(m(x), m.base(x) + 2.0 * x @ m.lora_A.T @ m.lora_B[0].T)

def test_fixed_mixture_is_one_lora_and_its_error_is_the_one_in_the_docstring():
    m, x = layer(), tokens(9, K)
    m.lora_alpha, m.scaling = 99, 0.5  # `scaling` is the one truth about the scale
    A, B = m.to_lora(GATES)
    assert {t.dtype for t in layer().bfloat16().to_lora(GATES)} == {torch.float32}
    delta = hydralora_delta(x, m.lora_A, m.lora_B, GATES.expand(9, N), 0.5)
    torch.testing.assert_close(delta, 0.5 * x @ A.T @ B.T, rtol=0, atol=1e-12)
    error = m.merge(GATES)(x) - m(x)
    expected = hydralora_delta(x, m.lora_A, m.lora_B, GATES - m.gates(x), 0.5)
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-12)
    assert error.abs().max() > 0.1
    m.router.weight.data.zero_()  # constant gates: exact for every x
    torch.testing.assert_close(m.merge(torch.ones(N) / N)(x), m(x), rtol=0, atol=1e-12)
    A.zero_(), B.zero_()
    assert m.lora_A.all() and m.lora_B.all()  # they were copies

def test_equal_gates_stay_one_lora_and_routed_heads_part():
    """Figure 6's "w/o gate" is its "w/o MoE": equal gates give all heads one gradient."""
    routed, x, y = layer(random_heads=False), tokens(64, K), tokens(64, D, seed=2)
    equal, lora = copy.deepcopy(routed), layer(random_heads=False, num_heads=1)
    lora.lora_A.data.copy_(routed.lora_A)
    with hook_gates(equal, lambda name, w: torch.full_like(w, 1 / N)):
        for m in (equal, lora, routed):
            fit(m, lambda m: (m(x) - y).square().mean(), 50, eps=1e-30)
    assert torch.equal(equal.lora_B, equal.lora_B[:1].expand_as(equal.lora_B))
    torch.testing.assert_close(equal.lora_A, lora.lora_A)
    torch.testing.assert_close(equal.lora_B[0], lora.lora_B[0])
    assert (routed.lora_B[0] - routed.lora_B[1]).norm() > 0.1 * routed.lora_B[0].norm()

def test_table_2_counts_q_and_v_without_a_router():
    """LLaMA2-7B has 6,738,415,616 parameters and 32 layers, 4096 wide. N = 3, r = 8."""
    m = HydraLoRALinear(nn.Linear(4096, 4096, bias=False, device="meta"))
    adapter, router = m.lora_A.numel() + m.lora_B.numel(), m.router.weight.numel()
    assert round(6400 * adapter / 6738415616, 3) == 0.124
    assert round(6400 * (adapter + router) / 6738415616, 3) == 0.136

# ---- Merge and export ----
class OwnForward(nn.Linear):
    """Adds up in another order, as transformers' FalconLinear does."""
    def forward(self, x):
        y = F.linear(x[..., 3:], self.weight[:, 3:]) + x[..., :3] @ self.weight[:, :3].T
        return y if self.bias is None else y + self.bias

class OldWeight(nn.Linear):
    """Goes on with the weight that it had at its first call."""
    def forward(self, x):
        self.old = getattr(self, "old", self.weight.clone())
        return F.linear(x, self.old, self.bias)

def called_and_changed(base):
    base(torch.ones(1, K, dtype=base.weight.dtype))
    base.weight *= 1.01

def wrapped(base):
    """As Accelerate does it."""
    forward = base.forward
    base.forward = lambda x: forward(x)

def with_hook(change):
    return lambda base: base.register_forward_hook(lambda base, inputs, y: change(y))

def int8(base):
    base.weight = nn.Parameter((99 * base.weight).char(), requires_grad=False)

MERGED = {"plain": (nn.Linear, None), "own forward": (OwnForward, None),
          "wrapped": (nn.Linear, wrapped),
          "harmless hook": (nn.Linear, with_hook(lambda y: None))}
MORE = "it gives more than W0 x"
NO_WEIGHT = "its weight is computed, quantised, sharded or offloaded"
REFUSED = {
    "old weight": (OldWeight, called_and_changed, MORE),
    "doubled": (nn.Linear, with_hook(lambda y: 2 * y), MORE),
    "int8": (nn.Linear, int8, NO_WEIGHT),
    "offloaded": (nn.Linear, lambda base: base.to("meta"), NO_WEIGHT),
    "spectral norm": (nn.Linear, nn.utils.parametrizations.spectral_norm, NO_WEIGHT),
    "weight norm": (nn.Linear, nn.utils.parametrizations.weight_norm, NO_WEIGHT),
    "old weight norm": (nn.Linear, nn.utils.weight_norm, NO_WEIGHT)}

@pytest.mark.parametrize("kind", MERGED)
@each_dtype
@torch.no_grad()
def test_merge_gives_a_plain_layer_that_holds_every_update(kind, dtype):
    """Updates from 1e-6 of W0 to 30 times W0; no bias, a usual one and a huge one."""
    (base_class, change), high = MERGED[kind], torch.promote_types(dtype, torch.float32)
    for size, bias in itertools.product((1e-6, 1e-3, 1, 30), (0, 1, 3e4)):
        base, x = base_class(K, D, bias=bias > 0, dtype=dtype).eval(), tokens(9, K).to(dtype)
        if bias:
            base.bias *= bias
        if change:
            change(base)
        m = HydraLoRALinear(base, num_heads=N, r=R)
        nn.init.normal_(m.lora_B)
        A, B = m.to_lora(GATES)
        m.lora_B *= size * base.weight.to(high).norm() / (m.scaling * B @ A).norm()
        A, B = m.to_lora(GATES)
        W = (base.weight.to(high) + m.scaling * (B @ A)).to(dtype)  # cast once
        before, merged = m(x), m.merge(GATES)
        assert type(merged) is nn.Linear and torch.equal(merged.weight, W)
        assert not merged.training
        assert torch.equal(merged(x), F.linear(x, W, base.bias))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(m.merge(GATES).weight, W)
        for p in merged.parameters():
            p.zero_()
        assert torch.equal(m(x), before)  # nothing is shared

@pytest.mark.parametrize("kind", REFUSED)
@each_dtype
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_merge_refuses_a_base_that_is_more_than_linear(kind, dtype):
    (base_class, change, reason), first = REFUSED[kind], layer(dtype=dtype)
    for bias in (False, True):
        base = base_class(K, D, bias=bias, dtype=dtype).eval()
        m = HydraLoRALinear(base, num_heads=N, r=R)
        change(base)
        model = nn.ModuleList([first, m])
        with pytest.raises(TypeError, match=f"base cannot be merged: {reason}"):
            merge_hydralora(model, GATES)
        assert model[0] is first and model[1] is m

def test_merge_refuses_a_weight_that_the_dtype_cannot_hold():
    m = layer(dtype=torch.float16)
    m.scaling = 1e6
    with pytest.raises(TypeError, match="W is not finite in torch.float16"):
        m.merge(GATES)

def tiny(targets=("q_proj", "v_proj"), random_heads=True, **config):
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(**config))
    inject_hydralora(model, targets, num_heads=N, r=R)
    for m in hydralora_layers(model).values() if random_heads else ():
        nn.init.normal_(m.lora_B, std=0.3)
        nn.init.normal_(m.router.weight)
    return model

def next_token_loss(model, rows=IDS):
    return F.cross_entropy(model(rows).flatten(0, 1), rows.flatten())

@pytest.mark.parametrize("how", ["as it is", "torch.compile(model)", "model.compile()"])
def test_gates_merge_and_unmerge_also_of_a_model_compiled_before(how):
    config = dict(num_hidden_layers=2 if how == "as it is" else 1)
    model = run = tiny(**config)
    if how == "torch.compile(model)":
        run = torch.compile(model, backend="eager")
    if how == "model.compile()":
        model.compile(backend="eager")
    before = run(IDS)
    with hook_gates(model, lambda name, w: 0 * w):  # the adapters are off
        torch.testing.assert_close(run(IDS), tiny(random_heads=False, **config)(IDS))
    assert torch.equal(run(IDS), before)
    with record_gates(model) as gates:
        run(IDS[:1]), run(IDS)  # the last forward counts
    assert list(gates) == list(hydralora_layers(model))
    means = list(mean_gates(run, [IDS]).values())
    torch.testing.assert_close(means, [w.mean((0, 1)) for w in gates.values()])
    held = {name: GATES.roll(i).float() for i, name in enumerate(gates)}
    with hook_gates(model, lambda name, w: held[name].expand_as(w)):
        expected = run(IDS)
    model.layers[0].q_proj.base.requires_grad_()
    layers = merge_hydralora(model, held)
    torch.testing.assert_close(run(IDS), expected, rtol=0, atol=1e-4)
    merged = [model.get_submodule(name) for name in layers]
    assert all(m.training for m in model.modules()) and not hydralora_layers(model)
    assert [m.weight.requires_grad for m in merged] == [True, *[False] * (len(gates) - 1)]
    unmerge_hydralora(model.eval(), layers)
    assert not any(m.training for m in model.modules())  # also those that were away
    assert torch.equal(run(IDS), before)

def test_hooks_reset_compiled_code_as_they_come_and_go(monkeypatch):
    model, hooks_there = tiny(["layers.0.q_proj"]), []
    hooks = model.layers[0].q_proj.router._forward_hooks
    monkeypatch.setattr(torch.compiler, "reset", lambda: hooks_there.append(len(hooks)))
    with record_gates(model):
        pass
    assert hooks_there == [1, 0]  # PyTorch 2.3 crashes without the second reset

def test_mean_gates_counts_every_token_once_and_leaves_the_modes():
    model, batches, name = tiny(), (IDS, IDS[:2, :7]), "layers.1.v_proj"
    model.layers[1].eval()  # a mixture of modes must survive
    model.layers[0].q_proj.lora_dropout.p = 0.5  # off where gates are averaged
    twin = copy.deepcopy(model).eval()
    with record_gates(twin) as gates:
        seen = [(twin(batch), gates[name])[1] for batch in batches]
    mean = mean_gates(model, batches)[name]
    torch.testing.assert_close(mean, torch.cat([w.flatten(0, 1) for w in seen]).mean(0))
    assert model.training and model.layers[0].training and not model.layers[1].training
    mask = (torch.arange(33) < 4).view(3, 11).long()
    masked = mean_gates(model, [collections.UserDict(tokens=IDS)], masks=[mask])
    torch.testing.assert_close(masked[name], seen[0][0, :4].mean(0))
    with pytest.raises(IndexError):
        mean_gates(model.train(), [IDS + 999])
    assert all(m.training and not m._forward_hooks for m in model.modules())
    model.spare = layer()
    with pytest.raises(ValueError, match="no token reached .*'spare': 0"):
        mean_gates(model, [IDS])

def test_official_checkpoint_computes_the_formula_and_state_round_trip(tmp_path):
    heads = 11  # B10 is the last, not the third
    A, B, Wg = tokens(R, K), tokens(heads, D, R), tokens(heads, K, seed=2)
    m, x = layer(num_heads=heads, random_heads=False), tokens(4, K, seed=3)
    weights = (t.detach().numpy() for t in (x, m.weight, m.bias, A, B, Wg))
    y, _ = reference(*weights, 2.0, np.zeros((4, D)))
    parts = {"lora_A": A, "lora_route": Wg, **{f"lora_B{i}": B[i] for i in range(heads)}}
    model = nn.ModuleDict({"q": layer(num_heads=heads)})
    for prefix in ("", "base_model.model."):
        state = {f"{prefix}q.{part}.weight": value for part, value in parts.items()}
        load_hydralora_state_dict(model, from_official_state_dict(state))
        np.testing.assert_allclose(model["q"](x).detach().numpy(), y, atol=1e-10)
    for wrong, said in (
            ({}, "no official HydraLoRA"), ({"q.weight": A}, "q.weight has no lora_A"),
            *[({key: t for key, t in state.items() if part not in key}, f"q has no {part}")
              for part in ("lora_A", "lora_B0", "lora_route")],
            ({key: t for key, t in state.items() if "B3" not in key}, "lora_B4"),
            (state | {"q.lora_A.weight": A}, "prefix and without")):
        with pytest.raises(ValueError, match=said):
            from_official_state_dict(wrong)
    assert set(hydralora_state_dict(model)) == {"q.lora_A", "q.lora_B", "q.router.weight"}
    torch.save(hydralora_state_dict(model), tmp_path / "adapter.pt")
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    load_hydralora_state_dict(nn.ModuleDict({"q": m}), saved)
    assert torch.equal(m(x), model["q"](x))

def test_export_of_layers_that_differ_in_r_and_scaling():
    model = tiny("layers.1.q_proj")
    model.layers[1].q_proj.scaling = 0.5  # no longer lora_alpha / r
    inject_hydralora(model, "layers.0.o_proj", num_heads=N, r=2, lora_alpha=5)
    nn.init.normal_(model.layers[0].o_proj.lora_B)
    state, config = export_lora(model, GATES)
    assert json.loads(json.dumps(config)) == config and len(state) == 4
    for other in ("layers.0.q_proj", "layers.1xq_proj", "x.layers.1.q_proj"):
        assert not re.fullmatch(config["target_modules"], other)
    for name, m in hydralora_layers(model).items():
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        for pattern in ("rank_pattern", "alpha_pattern"):  # alike: PEFT scales by 1
            assert config[pattern][f"^{re.escape(name)}"] == m.r == len(A)
        assert re.fullmatch(config["target_modules"], name)
        torch.testing.assert_close(m.merge(GATES).weight, m.base.weight + B @ A)

# ---- As a module ----
@each_dtype
def test_dtypes_of_the_adapter_and_of_y(dtype):
    m, x = layer(dtype=dtype, device=DEVICE), tokens(9, K, dtype=dtype).to(DEVICE)
    high = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in (m.lora_A, m.lora_B, m.router.weight, m.gates(x))} == {high}
    delta = hydralora_delta(x.to(high), m.lora_A, m.lora_B, m.gates(x), m.scaling)
    y = m(x)
    assert y.dtype == dtype and torch.equal(y, m.base(x) + delta.to(dtype))
    assert m.to(dtype)(x).dtype == dtype and {p.dtype for p in m.parameters()} == {dtype}

def test_dropout_has_one_mask_for_all_heads_in_training_only():
    m, x = layer(6, 6, r=6, lora_alpha=12, lora_dropout=0.5), tokens(50, 6)
    with torch.no_grad():  # A = 1 and B_i = (i + 1) 1, so that the update shows the mask
        m.lora_A.copy_(torch.eye(6))
        m.lora_B.copy_(torch.eye(6) * torch.arange(1, N + 1).view(N, 1, 1))
        mixture = (m.eval().gates(x) * torch.arange(1, N + 1)).sum(-1, keepdim=True)
        torch.testing.assert_close(m(x), m.base(x) + 2.0 * mixture * x)
        mask = (m.train()(x) - m.base(x)) / (2.0 * mixture * x)
    torch.testing.assert_close(mask, 2.0 * (mask > 1).double())  # 0 or 1 / (1 - 0.5), no mixture
    assert 0.3 < mask.mean() / 2 < 0.7

def test_injection_and_training_change_no_bit_of_the_rest():
    torch.manual_seed(0)
    names = ["layers.0.q_proj", "layers.1.down_proj"]
    plain = TinyTransformer(TinyConfig()).eval()
    plain.layers[1].train()
    logits = plain(IDS)
    model = inject_hydralora(plain, ["0.q_proj", names[1]], lora_dropout=0.5)
    assert torch.equal(model(IDS), logits) and list(hydralora_layers(plain)) == names
    for block, training in zip(model.layers, (False, True)):  # as the linear layers were
        assert all(m.training == training for m in block.modules())
    before, adapter = copy.deepcopy(model.state_dict()), set(hydralora_state_dict(model))
    fit(model, next_token_loss, 3, weight_decay=0.1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in adapter), key
    model.layers[0].q_proj.lora_A.requires_grad_(False)  # the caller's choice ...
    model.layers[0].q_proj.base.requires_grad_()
    inject_hydralora(model, "v_proj")  # ... outlives a second injection
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(hydralora_state_dict(model)) - {"layers.0.q_proj.lora_A"}

def test_a_layer_under_two_names_gets_one_adapter():
    shared, equal = nn.Linear(4, 4), torch.ones(3) / 3
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    inject_hydralora(model, iter(["b.0"]))
    assert model["a"] is model["b"][0] and list(hydralora_layers(model)) == ["a"]
    with pytest.raises(ValueError, match="one name for each layer"):
        export_lora(model, equal)
    layers = merge_hydralora(model, equal)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear
    unmerge_hydralora(model, layers)
    assert model["a"] is model["b"][0] is layers["a"]

def test_tiny_transformer_is_causal():
    torch.manual_seed(0)
    model, later = TinyTransformer(TinyConfig()), IDS.clone()
    later[:, 7:] = 0
    torch.testing.assert_close(model(IDS)[:, :7], model(later)[:, :7])

# ---- Bad input ----
plain_tiny = lambda: TinyTransformer(TinyConfig())
offloaded, sharded = plain_tiny(), tiny("q_proj")
offloaded.layers[1].to("meta")

class Sharded(torch.Tensor):
    """As a DTensor."""

sharded.layers[0].q_proj.lora_A = nn.Parameter(torch.ones(3, 64).as_subclass(Sharded))
BAD = r"""
HydraLoRALinear(nn.Linear(2, 2, dtype=torch.complex64))  # an nn.Linear with real weights
layer(r=0, lora_alpha=1)  # r >= 1
layer(num_heads=0)  # num_heads, r >= 1
layer(lora_alpha=math.nan)  # finite lora_alpha
layer(lora_dropout=math.nan)  # lora_dropout < 1
layer().merge([1, 2, 3])  # gates must be 4 finite numbers, got tensor\(\[1
layer().merge(GATES / 0)  # gates must be 4 finite numbers, got tensor\(\[inf
export_lora(tiny(), GATES * math.nan)  # 4 finite numbers, got tensor\(\[nan
merge_hydralora(plain_tiny(), GATES)  # the model's layers are \[\]
merge_hydralora(layer(), GATES)  # model is itself the layer
export_lora(tiny(), {"z": GATES})  # gates are for \['z'\], the model's layers are \['layers.0.q
export_lora(tiny().to("meta"), GATES)  # on meta
export_lora(layer(), GATES)  # one name for each layer
record_gates(plain_tiny()).__enter__()  # no HydraLoRALinear
mean_gates(tiny(), [IDS, IDS], [torch.ones(3, 11)])  # shorter
mean_gates(tiny(), [IDS], [torch.zeros(3, 11)])  # no token reached
mean_gates(tiny(), IDS)  # batches must be a list
mean_gates(tiny(), dict(tokens=IDS))  # batches must be a list
inject_hydralora(plain_tiny(), [])  # targets is empty
inject_hydralora(plain_tiny(), "proj")  # 'proj' matches no nn.Linear: there are \['la
inject_hydralora(tiny(), ["v_proj.base", "router"])  # 'v_proj.base' matches
inject_hydralora(nn.TransformerEncoderLayer(8, 2), "linear1")  # its parent reads its weight
inject_hydralora(nn.MultiheadAttention(8, 2), "out_proj")  # its parent reads its weight
inject_hydralora(offloaded, ["q_proj", "v_proj"])  # layers.1.q_proj is on meta: load the
hydralora_state_dict(plain_tiny())  # no adapters
hydralora_state_dict(sharded)  # or sharded
load_hydralora_state_dict(tiny(), hydralora_state_dict(tiny("q_proj")))  # in the model {
load_hydralora_state_dict(tiny("q_proj"), hydralora_state_dict(tiny()))  # only in state {
num_heads_from_corpus("one string")  # got one string
"""

@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_is_refused(line):
    call, said = line.split("  # ")
    with pytest.raises((TypeError, ValueError), match=said) as error:
        eval(call)
    assert str(error.value).count("layers.") <= 10  # not all names of a large model

def test_bad_input_changes_nothing():
    for targets, arguments in (["0", "x"], {}), (["0"], {"lora_dropout": 2}), (["0", "1"], {}):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
        with pytest.raises((ValueError, TypeError)):
            inject_hydralora(model, targets, **arguments)
        assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(ValueError):
        inject_hydralora(offloaded, ["layers.0.q_proj", "layers.1.q_proj"])
    assert not hydralora_layers(offloaded)
    assert all(p.requires_grad for p in offloaded.parameters())
    model, last = tiny(), "layers.1.v_proj"
    logits, gates = model(IDS), dict.fromkeys(hydralora_layers(model), GATES)
    state = {key: 2 * t for key, t in hydralora_state_dict(model).items()}
    for call, argument in (
            (merge_hydralora, {last: GATES}),
            (merge_hydralora, gates | {last: torch.ones(3)}),
            (load_hydralora_state_dict, state | {f"{last}.lora_A": torch.ones(2)}),
            (load_hydralora_state_dict, {key: t.to("meta") for key, t in state.items()}),
            (unmerge_hydralora, hydralora_layers(tiny()))):
        with pytest.raises(ValueError):
            call(model, argument)
        assert len(hydralora_layers(model)) == 4 and torch.equal(model(IDS), logits)

# ---- Choosing N ----
def corpus(domains, seed, documents=240, vocabulary=40, length=25, shares=None):
    """Documents of token ids; each domain has its own distribution over the vocabulary."""
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(vocabulary, 0.2), size=domains)
    which = np.arange(documents) % domains
    if shares:
        which = rng.choice(domains, documents, p=shares)
    return [rng.choice(vocabulary, size=length, p=topics[i]).tolist() for i in which]

@pytest.mark.parametrize("domains", range(1, 11))
def test_num_heads_finds_the_domains_and_invents_none(domains):
    for seed in range(5):
        assert num_heads_from_corpus(corpus(domains, seed))[0] == domains

def test_num_heads_of_other_corpora():
    large = corpus(4, 0, vocabulary=1000, length=60, documents=300)
    unequal = [corpus(3, seed, shares=[0.6, 0.3, 0.1]) for seed in range(5)]
    assert [num_heads_from_corpus(c)[0] for c in (large, *unequal)] == [4, 3, 3, 3, 3, 3]
    n, sse = num_heads_from_corpus(documents := corpus(3, 0))
    assert n == 3 and len(sse) == 10 and all(a >= b for a, b in zip(sse, sse[1:]))
    texts = ["  ".join(f"word{i}" for i in document) + "\n" for document in documents]
    rows = [torch.tensor(document) for document in documents]
    with_empty_ones = [[], *documents[:9], "", *documents[9:], []]
    for same in (texts, (d for d in documents), rows, with_empty_ones):
        assert num_heads_from_corpus(same, seed=7) == (n, sse)
    assert num_heads_from_corpus(documents, max_heads=1)[0] == 1

def test_sse_by_hand():
    _, sse = num_heads_from_corpus(["a", "b", "a a", "b b"], max_heads=3)
    np.testing.assert_allclose(sse, [2, 0, 0], atol=1e-5)  # 4 unit vectors, sqrt 1/2 off
    _, sse = num_heads_from_corpus(["a c", "b c", "a c", "b c"], max_heads=3)
    square = (1 + math.log(5 / 3)) ** 2  # of a and b; c, in all, counts 1
    np.testing.assert_allclose(sse, [2 * square / (square + 1), 0, 0], atol=1e-5)

# ---- In real projects ----
def test_transformers_train_and_peft_loads_the_exported_lora(tmp_path):
    transformers, peft, safetensors = map(
        pytest.importorskip, ("transformers", "peft", "safetensors.torch"))
    torch.manual_seed(0)  # a small random Llama; nothing is downloaded
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99)).eval()
    plain, ids = copy.deepcopy(model), torch.randint(2, 99, (4, 12))
    inject_hydralora(model, "0.self_attn.q_proj", r=4)
    inject_hydralora(model, "1.self_attn.v_proj", r=2, lora_alpha=3)  # another rank and alpha
    fresh, inputs = copy.deepcopy(model), dict(input_ids=ids, labels=ids)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    last = fit(model, lambda model: model(**inputs).loss, 20, lr=3e-2)
    assert last < 0.97 * plain(**inputs).loss
    load_hydralora_state_dict(fresh, hydralora_state_dict(model))
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    fresh.gradient_checkpointing_enable(dict(use_reentrant=False))
    for m in (model, fresh.train()):
        m.zero_grad()
        m(**inputs).loss.backward()
    for p, q in zip(model.parameters(), fresh.parameters()):
        assert p.grad is q.grad is None or torch.allclose(p.grad, q.grad)
    adapter, config = export_lora(model, gates := mean_gates(model, [inputs]))
    safetensors.save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    scaling = {name: m.scaling["default"] for name, m in loaded.named_modules()
               if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scaling == {f"base_model.model.{name}": 1 for name in hydralora_layers(model)}
    merge_hydralora(model, gates)
    merged = model(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, merged, rtol=0, atol=1e-5)

def test_accelerate_offloads_layers_beside_adapted_ones(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    for place in ("cpu", "disk"):
        model = plain_tiny()
        if place == "cpu":
            accelerate.cpu_offload(model.layers[1], "cpu")
        else:
            accelerate.disk_offload(model.layers[1], tmp_path, "cpu")
        before = model(IDS)
        with pytest.raises(ValueError, match="on meta: .* that is offloaded cannot be adapted"):
            inject_hydralora(model, "q_proj")
        inject_hydralora(model, "layers.0.q_proj")
        assert torch.equal(model(IDS), before)

# ---- The toy, with few steps ----
@pytest.fixture(scope="module")
def toy():
    """train_toy.py, with runs so short that nothing is learnt."""
    module = pytest.importorskip("train_toy")
    module.PRETRAIN_STEPS, module.STEPS, module.EVALUATION = 3, 5, 60
    module.all_seeds = lambda function, seeds, *arguments: [  # in this process
        function(seed, *arguments) for seed in seeds[:2]]
    return module

@pytest.fixture(scope="module")
def world(toy):
    return toy.World(0, "cpu")

close = torch.testing.assert_close

def run_toy(toy, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options])
        patch.setattr(torch, "set_num_threads", lambda threads: None)
        return toy.main()

def test_toy_world_by_hand(toy, world, monkeypatch):
    top, h = world.top, world.bottom(world.test.tokens)
    logits = top.lm_head(top.norm(top.block(h)))[:, toy.LENGTH:]
    close(toy.predict(top, world.test), logits)
    close(top(h), logits)
    for data, use in (world.training, toy.TRAINING), (world.test, toy.TEST):
        assert torch.equal(data.tokens, world.sample(len(data.tokens), use, world.new)[0])
    samples = torch.stack([world.sample(9, use, world.new)[0] for use in range(3)])
    assert len(samples.unique(dim=0)) == 3
    new = torch.stack([torch.arange(toy.SYMBOLS).roll(i) for i in range(3)])
    monkeypatch.setattr(world, "new", new)
    own = torch.arange(toy.SYMBOLS) % 3 == torch.arange(3)[:, None]
    for frequencies, limit in ((torch.ones(own.shape), 100 / 3), (own.float(), 100)):
        monkeypatch.setattr(world, "frequencies", F.normalize(frequencies, p=1))
        tokens, targets, domain, data_set = world.sample(20000, toy.TEST, new)
        data = SimpleNamespace(tokens=tokens, targets=targets)
        assert world.bayes_accuracy(data) == pytest.approx(limit, abs=0.5)
    assert torch.equal(targets, (tokens[:, :toy.LENGTH] - domain[:, None]) % toy.SYMBOLS)
    assert (data_set == domain).double().mean().item() == pytest.approx(0.9 + 0.1 / 3, abs=0.01)

def test_toy_training_by_hand(toy):
    class Model(nn.Module):  # its logits depend on the position alone
        def forward(self, x):
            seen.append((x, router.gates[:, 0].argmax(1)))
            return (self.B + self.lora_A).expand(len(x), 3, 4)
    model, router, seen = Model(), toy.FixedGates(), []
    model.block = SimpleNamespace(o_proj=SimpleNamespace(router=router))
    model.B, model.lora_A = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    x, targets = torch.arange(96), torch.tensor([2, 0, 3]).expand(96, 3)
    toy.train(model, [x], targets, 0.1, "", lr_A=0, labels=x % 3, passes=2)
    for (batch, labels), expected in zip(seen, 2 * x.split(48), strict=True):
        assert torch.equal(batch, expected) and torch.equal(labels, expected % 3)
    assert model.B.argmax(1).tolist() == [2, 0, 3] and not model.lora_A.any()

@pytest.mark.parametrize("gates", ["domain", "data_set"])
def test_toy_whole_loras_chosen_by_labels(gates, toy, world, monkeypatch):
    monkeypatch.setattr(world.training, gates, torch.ones(240, dtype=torch.int64))
    top, _ = toy.fine_tune(world, "", toy.Method(0.1, 1, "whole LoRAs", gates=gates))
    layer, x, own = top.block.o_proj, world.test.x, getattr(world.test, gates) == 1
    assert layer.lora_B.flatten(1).any(1).tolist() == [False, True, False]
    update = own[:, None, None] * 2 * (x @ layer.lora_A[1].T @ layer.lora_B[1].T)
    close(layer(x), layer.base(x) + update)

def test_toy_nmi_by_hand(toy):
    domain = torch.arange(3).repeat(4)
    own = F.one_hot(domain, 3).float()[:, None]
    assert toy.nmi(own.roll(1, -1), domain) == pytest.approx(1)
    assert toy.nmi(own * 0 + 1 / 3, domain) == pytest.approx(0, abs=1e-6)
    shared = own[torch.where(domain == 2, 1, domain)]  # two domains have one head
    of_domain, of_head = math.log(3), math.log(3) - 2 / 3 * math.log(2)
    assert toy.nmi(shared, domain) == pytest.approx(2 * of_head / (of_domain + of_head))

def test_toy_controls_by_hand(toy, world, monkeypatch):
    plain = torch.tensor([[0] * 24, [0] * 8 + [1] * 16])  # 32 tokens are of symbol 0
    w = torch.tensor([[[1.0, 0]], [[0.5, 0.5]]]).expand(-1, 24, -1)
    alone = toy.symbol_alone(w, SimpleNamespace(tokens=plain))
    assert alone[1].tolist() == [[28 / 32, 4 / 32]] * 8 + [[0.5, 0.5]] * 16
    test = copy.copy(world.test)
    test.domain = test.domain.sort().values  # the next sequence has mostly the same
    own = F.one_hot(test.domain, 3).float()[:, None].expand(-1, 24, -1)
    monkeypatch.setattr(toy, "gates_of", lambda top, data: own)
    monkeypatch.setattr(toy, "knock_out", lambda top, data: own)
    scores = toy.specialisation(None, SimpleNamespace(test=test))["layers"]["last o_proj"]
    assert scores["router"] == pytest.approx(1) and 0.5 < scores["shuffled labels"] < 0.95
    assert scores["symbol alone"] == toy.nmi(toy.symbol_alone(own, test), test.domain)

def test_toy_knock_out_and_merging_by_hand(toy, world):
    test, domain = world.test, world.training.domain
    top = toy.adapt(world.top, 0, toy.Method(1, 1, n=2))
    layer = top.block.o_proj
    def right(change=lambda name, w: w):
        with hook_gates(top, change):
            return toy.accuracy(toy.predict(top, test), test)
    frozen = right()
    nn.init.normal_(layer.lora_B[0].data)  # head 0 acts, head 1 is zero
    lost = toy.by_domain(right() - frozen, test.domain)
    close(toy.knock_out(top, test)[:, 0], lost)
    assert lost.abs().max() > 0.5
    layer.lora_B.data[1] = layer.lora_B.data[0]  # equal heads replace each other
    close(toy.knock_out(top, test), torch.zeros(3, 2))
    nn.init.normal_(layer.lora_B[1].data)
    nn.init.normal_(layer.router.weight)
    w = toy.gates_of(top, world.training)
    def merged_for(chosen):
        mean = w[chosen].mean((0, 1))
        return right(lambda name, w: mean.expand_as(w))
    known = torch.cat([merged_for(domain == t)[test.domain == t] for t in range(3)])
    expected = [known.mean().item(), merged_for(domain >= 0).mean().item()]
    assert list(toy.merging(top, world).values()) == pytest.approx(expected, abs=1e-3)
    assert len({*expected, right().mean().item()}) == 3

def test_toy_writes_what_it_measured(toy, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert run_toy(toy, "--json", str(file), "--heads", "2") == 0
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    right = {name: method["accuracy"] for name, method in result["methods"].items()}
    assert list(right) == toy.MAIN_RUN and result["seed"] == 0 and 99 < result["bayes"]
    assert result["gain"] == right["HydraLoRA"] - right["LoRA, same size"]
    assert re.findall(r"\n(\d)\. ", printed) == list("1234")
    assert len(result["specialisation"]["gates"][0]) == 2

@pytest.mark.parametrize("scores, gain, passed", [
    ((0.96, 0.05, 0), 5, True), ((0.96, 0.05, 0), -5, False), ((0.45, 0.05, 0), 5, False),
    ((0.6, 0.5, 0), 5, False), ((0.96, 0.05, 0.5), 5, False)])
def test_toy_check(scores, gain, passed, toy, monkeypatch):
    verdict = toy.verdict(dict(zip(toy.WHAT_THEY_ARE, scores)), gain)
    assert verdict == dict(specialised=passed or gain < 0, passed=passed)
    monkeypatch.setattr(toy, "measure", lambda *arguments: verdict)
    monkeypatch.setattr(toy, "show", lambda result: None)
    assert run_toy(toy, "--check") == 1 - passed and run_toy(toy) == 0

def test_toy_paper_by_hand(toy, capsys):
    seeds = []
    for i in range(3):  # HydraLoRA is ahead by 2, 4 and 6 points, on q and v by -1, 0 and 1
        methods = {name: dict(accuracy=90 - i, size=len(name)) for name in toy.methods()}
        methods["HydraLoRA"]["accuracy"] = 92 + i
        methods["HydraLoRA on q_proj and v_proj"]["accuracy"] = 89
        methods[toy.SPLIT]["cosines"] = [0.5 + i / 10, 0.1]
        layers = {"last o_proj": {"router": 0.9 + i / 100, "symbol alone": 0.05}}
        seeds.append(dict(methods=methods, bayes=99, specialisation=dict(layers=layers),
                          merging={"mean gates": 40 + i}))
    toy.show_paper(seeds)
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for text in ("| LoRA, same size | 15:9 | 89.00 | +4.00 +- 2.00 | 3/3 |",
                 "| LoRA on q_proj and v_proj | 25:30 | 89.00 | +0.00 +- 1.00 | 1/3 |",
                 "LoRA, same size: 89.00 +- 1.00; by seed 90.00 89.00 88.00",
                 "gates: 41.00 +- 1.00", "router: 0.91 +- 0.01; by seed 0.90 0.91 0.92",
                 "two A: 0.60 +- 0.10", "two B: 0.10 +- 0.00"):
        assert text in printed, text

def test_toy_paper_and_tune_to_their_end(toy, monkeypatch, capsys):
    assert set(toy.TUNING_SEEDS).isdisjoint(toy.REPORTED_SEEDS)
    monkeypatch.setattr(toy, "RATES", (0.01,))
    monkeypatch.setattr(toy, "RATES_OF_A", (1,))
    assert run_toy(toy, "--paper") == run_toy(toy, "--tune") == 0
    printed = capsys.readouterr().out
    assert all(f"\n| {name} " in printed for name in toy.methods()) and "lr 0.01" in printed

@pytest.mark.parametrize("options, said", [
    (["--paper", "--seed", "1"], "belong to"),
    (["--json", "/no/such/x"], "/no/such/x"),
    (["--device", "no_such"], "no_such"), (["--seed", "9" * 20], "--seed")], ids=str)
def test_toy_refuses_options_in_one_line(options, said, toy, capsys):
    with pytest.raises(SystemExit) as end:
        run_toy(toy, *options)
    message = capsys.readouterr().err
    assert end.value.code == 2 and said in message and message.count("\n") == 1

def test_toy_cost_compares_equals(toy):
    layer, x = HydraLoRALinear(nn.Linear(6, 5), num_heads=3, r=2), tokens(4, 6).float()
    nn.init.normal_(layer.lora_B)
    close(toy.loop_over_heads(layer, x), layer(x))
    row, = toy.cost("cpu", sizes=[(256, 512, 4, 3)], rounds=1)
    assert row["bytes / loop"] < 0.05 and 1 <= row["bytes / bound"] < 1.1

# ---- README ----
README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)

@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_python_block_prints_what_it_says(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", block, re.M)
    assert capsys.readouterr().out.splitlines() == promised

@pytest.mark.skipif(not README, reason="needs README.md")
def test_readme_definition_passes_the_oracle():
    definition = {}
    exec(BLOCKS[0], definition)
    def function(x, W0, bias, *others):
        return definition["hydralora"](x, W0, *others) + (0 if bias is None else bias)
    check(function, "gradients", "both-wide", "float32")

def test_readme_names_and_results_fit_the_code_and_each_other(toy, world):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines()
            if line.startswith("|")]
    for name in {name for row in rows for name in re.findall(r"`([^`]+)`", " ".join(row))}:
        owner, *attributes = name.split(".")
        found = getattr(hydralora, owner, None) or getattr(toy, owner)
        assert not attributes or hasattr(found, attributes[0]), name
    size = {name: f"{toy.fine_tune(world, name, method)[1]['size']:,}"
            for name, method in toy.methods().items()}
    results = {row[0]: row[1:] for row in rows if re.fullmatch(r"\d+/10", row[-1])}
    assert not README or len(results) == 8
    for name, (sizes, right, ahead, seeds) in results.items():
        ours = toy.OURS.get(name, "HydraLoRA")
        assert sizes == f"{size[name]}:{size[ours]}", name
        mean = float(ahead.split(" +- ")[0])
        place = ours.removeprefix("HydraLoRA on ") if name in toy.OURS else "o_proj"
        our_right = float(re.search(rf"(\d+\.\d\d) % on {place}", README)[1])
        assert mean == pytest.approx(our_right - float(right), abs=0.011), name
        assert seeds != ("0/10" if mean > 0 else "10/10"), name

@pytest.mark.skipif("TOY_RESULT" not in os.environ, reason="needs a file of train_toy.py")
def test_readme_numbers_of_seed_0_are_those_of_a_run():
    result = json.loads(Path(os.environ["TOY_RESULT"]).read_text())
    gates, lost = (torch.tensor(result["specialisation"][key]) for key in ("gates", "lost"))
    own, other = lost[gates > 0.5], lost[gates < 0.5]
    right = [result["methods"][name]["accuracy"] for name in (
        "HydraLoRA", "LoRA, same size", "o_proj itself, tuned", "LoRA on up_proj and down_proj")]
    text = README[README.index("| mean gates"):README.index("## In your")]
    said = [float(number) for number in re.findall(r"\d+\.\d\d", text)]
    # PyTorch 2.3.1 and 2.13 differ by 0.005 here, 0.44 points lost and 0.13 points right.
    assert said[:9] == pytest.approx(gates.flatten().tolist(), abs=0.02)
    lost = [own.min().item(), own.max().item(), other.max().item()]
    assert said[9:12] == pytest.approx(lost, abs=2) and said[12:] == pytest.approx(right, abs=1)
