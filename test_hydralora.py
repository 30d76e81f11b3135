# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pytest"]
# ///
"""An oracle for HydraLoRA, then the tests of hydralora.py in the order in which a reader asks.

The oracle runs on any function with the signature of hydralora.hydralora_forward, and needs this
file and hydralora.py alone:

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle

HYDRALORA_DEVICE=cuda runs it there; `hydralora_layer` below shows how a layer takes part. Select
with -k what your code is made for, as in -k "oracle and 3d and not float64":

    1d, 2d, 3d, 4d, 5d          the number of axes of x
    float64, float32            every case, within 1e-10 of the equations or a few float32 roundings
    bfloat16, half              a few cases where rounding is the question; half is float16
    mixed                       x, W0 and bias in bfloat16 with A, B and Wg in float32
    autocast                    float32, or mixed, under torch.autocast(dtype=torch.bfloat16)
    empty                       no tokens at all

Gradients are asked for x, A, B and Wg. W0 and bias may get none, as of a frozen base; a gradient
that they do get is checked. Second derivatives are not asked for.
"""
import collections
import contextlib
import copy
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hydralora
from hydralora import (
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, export_lora, from_official_state_dict,
    hook_gates, hydralora_delta, hydralora_forward, hydralora_layers, hydralora_state_dict,
    inject_hydralora, load_hydralora_state_dict, mean_gates, merge_hydralora,
    num_heads_from_corpus, record_gates, unmerge_hydralora)

torch.set_num_threads(1)        # the tensors are small; more threads only get in each other's way
HERE = Path(__file__).parent


def setting(name, default, read):
    """read(the environment variable); if that fails, one clear error ends the run."""
    value = os.environ.get(name, default)
    try:
        return read(value)
    except Exception as error:
        message = f"{name}={value!r}: {type(error).__name__}: {error}"
    raise pytest.Collector.CollectError(message)


def read_implementation(text):
    module, colon, function = text.partition(":")
    if not colon:
        raise ValueError("expected module:function")
    sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise TypeError(f"expected a function, got {type(found).__name__}")
    return found


def read_device(text):
    torch.ones(1, device=text).add(1).item()        # it is there and computes
    return text


NAME = os.environ.get("HYDRALORA_IMPL", "hydralora:hydralora_forward")
IMPLEMENTATION = setting("HYDRALORA_IMPL", NAME, read_implementation)
DEVICE = setting("HYDRALORA_DEVICE", "cuda" if torch.cuda.is_available() else "cpu", read_device)
VARIABLES = {"HYDRALORA_IMPL", "HYDRALORA_DEVICE"}
if unknown := {v for v in os.environ if v.startswith("HYDRALORA_")} - VARIABLES:
    raise pytest.Collector.CollectError(f"{sorted(unknown)}: is one of {sorted(VARIABLES)} meant?")


def has_products(dtype, device="cpu"):
    """The first releases of PyTorch 2 have no float16 product on a CPU."""
    try:
        F.linear(*torch.ones(2, 2, 2, dtype=dtype, device=device))
    except RuntimeError as error:
        if "not implemented for 'Half'" not in str(error):
            raise
        return False
    return True


def skip_without_products(dtype, device="cpu"):
    if not has_products(dtype, device):
        pytest.skip(f"this PyTorch has no product of {dtype} on {device}")


# ---- The equations, twice --------------------------------------------------------------------
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
        w = e / e.sum()                                                 # Eq. 4
        z = A @ v
        y[token] = W0 @ v + (0 if bias is None else bias)               # Eq. 3
        for i in range(n):
            y[token] += scaling * w[i] * (B[i] @ z)
        score = np.zeros(n)                                             # d loss / d w_i
        for i in range(n):
            back = B[i].T @ g
            score[i] = scaling * (back @ z)
            grads["B"][i] += scaling * w[i] * np.outer(g, z)
            grads["A"] += scaling * w[i] * np.outer(back, v)
            grads["x"][token] += scaling * w[i] * (A.T @ back)
        for i in range(n):
            slope = w[i] * (score[i] - w @ score)                       # through the softmax
            grads["Wg"][i] += slope * v
            grads["x"][token] += slope * Wg[i]
        grads["W0"] += np.outer(g, v)
        grads["bias"] += g
        grads["x"][token] += W0.T @ g
    return y, grads


def loop(x, W0, bias, A, B, Wg, scaling):
    """The sum of Eq. 3 as it is printed, in torch: how much a dtype rounds."""
    y, x = F.linear(x, W0, bias), x.to(A.dtype)
    high = torch.promote_types(x.dtype, torch.float32)
    w = torch.softmax(F.linear(x, Wg).to(high), -1).to(x.dtype)
    for i in range(len(B)):
        y = y + (w[..., i, None] * F.linear(F.linear(x, A), B[i]) * scaling).to(y.dtype)
    return y


# ---- The cases -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    lead: tuple = (2, 5)                    # the axes of x before k
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    logits: float = 1.0                     # standard deviation of the router's logits
    layout: str = "contiguous"              # see laid_out
    lies: str = "x W0 bias A B Wg grad_y"   # what lies so; the rest is contiguous
    needs: str = "x W0 bias A B Wg"         # what needs a gradient
    mean: float = 0.0                       # of x and grad_y; not 0: sums over tokens grow large
    unit: float = 1.0                       # x is larger by this, and W0, A and Wg are smaller
    gradient: float = 1.0                   # size of grad_y
    zero: str = ""                          # what is 0: A, B, Wg, or the first "token"
    seed: int = 0

    @property
    def axes(self):
        return f"{len(self.lead) + 1}d"


ADAPTER = "x A B Wg"                        # what needs a gradient where the base is frozen
TILES = dict(lead=(2, 161), k=200, d=328, r=8, n=3)
CASES = {
    "plain": Case(),
    "frozen-base": Case(needs=ADAPTER),
    "no-bias": Case(bias=False, needs=ADAPTER),
    # how the tensors lie in memory
    "column-major": Case(lead=(3, 5), layout="columns"),
    "flat-columns": Case(lead=(9,), layout="columns"),
    "strided-rows": Case(lead=(3, 5), layout="rows"),
    "flat-rows": Case(lead=(9,), layout="rows"),
    "every-second": Case(lead=(3, 5), layout="second"),
    "storage-offset": Case(lead=(3, 5), layout="offset"),
    "swapped-axes": Case(lead=(3, 5), layout="swapped"),
    "four-swapped": Case(lead=(3, 5, 2), layout="swapped"),
    "gaps-between": Case(lead=(3, 5), layout="gaps"),
    "square-columns": Case(lead=(9,), k=6, layout="columns", needs=ADAPTER),
    "one-for-all": Case(lead=(3, 5), layout="expanded"),
    "flat-for-all": Case(lead=(5,), layout="expanded"),
    "one-each": Case(lead=(3, 5), layout="expanded rows"),
    **{f"{name.replace('_y', '')}-by-column": Case(lead=(9,), layout="columns", lies=name)
       for name in ("x", "W0", "A", "B", "Wg", "grad_y")},
    # the axes before k
    "vector": Case(lead=()),
    "sequence": Case(lead=(9,), bias=False),
    "single": Case(lead=(1,)),
    "batch-of-one": Case(lead=(1, 6)),
    "token-each": Case(lead=(9, 1)),
    "token-in-all": Case(lead=(1, 1), k=1500, d=100, r=17, n=9),
    "third-axis-n": Case(lead=(2, 3, 4)),
    "many-axes": Case(lead=(2, 1, 3, 2), bias=False),
    "empty-flat": Case(lead=(0,)),
    "empty-batch": Case(lead=(0, 5)),
    "empty-rows": Case(lead=(2, 0)),
    # sizes
    "all-three": Case(lead=(3, 3), k=3, d=3, n=3),
    "head-alone": Case(n=1),
    "heads-eight": Case(n=8),
    "heads-even": Case(lead=(2, 9), n=32, needs=ADAPTER),
    "heads-odd": Case(lead=(2, 9), n=67, r=5, needs=ADAPTER),
    "rank-one": Case(r=1),
    "width-one": Case(k=1, d=1),
    "rank-above-width": Case(r=9),
    "rank-sixteen": Case(lead=(2, 64), k=64, d=128, r=16, n=16, needs=ADAPTER),
    "rank-forty-eight": Case(lead=(17, 3), k=64, d=64, r=48, n=2, needs=ADAPTER),
    "rank-sixty-four": Case(lead=(2, 9), k=72, d=80, r=64, n=9, needs=ADAPTER),
    "rank-odd": Case(lead=(2, 9), k=150, d=140, r=259, n=2, needs=ADAPTER),
    "whole-tiles": Case(lead=(2, 512), k=256, d=256, r=8, n=4, needs=ADAPTER),
    "tiles-and-rest": Case(**TILES),
    "first-layer": Case(**TILES, needs="A B Wg"),
    "fixed-A": Case(**TILES, needs="x B Wg"),
    "wide-input": Case(lead=(1, 3), k=4099, needs=ADAPTER),
    "wide-output": Case(lead=(1, 3), d=4099, needs=ADAPTER),
    "thousands": Case(lead=(2, 2051), k=16, d=24, r=8, n=3, mean=1.0),
    # values
    "negative-scaling": Case(scaling=-0.75),
    "zero-scaling": Case(scaling=0.0),
    "small-scaling": Case(scaling=1 / 128),
    "large-scaling": Case(scaling=1e6),
    "integer-scaling": Case(scaling=2),
    "heads-at-zero": Case(zero="B"),
    "shared-at-zero": Case(zero="A"),
    "router-at-zero": Case(zero="Wg"),
    "small-gradient": Case(gradient=2.0 ** -25),
    "token-at-zero": Case(zero="token"),
    "peaked": Case(logits=8, n=6),
    "steep": Case(logits=200),
    "saturated": Case(lead=(4, 10), logits=1e5, n=3),
    "large-x": Case(unit=2.0 ** 20),
}
half_precision = (
    "plain", "no-bias", "vector", "strided-rows", "tiles-and-rest", "first-layer", "thousands")
GROUPS = {  # word for -k: dtype of x, W0 and bias; of A, B and Wg; and the cases
    "float64": (torch.float64, torch.float64, CASES),
    "float32": (torch.float32, torch.float32, CASES),
    "bfloat16": (torch.bfloat16, torch.bfloat16, (
        *half_precision, "large-x", "steep", "small-gradient", "wide-input", "wide-output")),
    "half": (torch.float16, torch.float16, (*half_precision, "peaked", "small-scaling")),
    "mixed": (torch.bfloat16, torch.float32, (*half_precision, "small-gradient")),
    "autocast": (torch.float32, torch.float32, (*half_precision, "steep")),
    "mixed-autocast": (torch.bfloat16, torch.float32, half_precision),
}


def laid_out(t, layout, name):
    """The same numbers, lying in memory in another way."""
    if layout == "columns" and t.dim() > 1:             # matrices by column
        return t.mT.contiguous().mT
    if layout in ("rows", "second", "offset") and t.numel():
        # slices of something larger, with nan between the rows, between the numbers, or before
        step = 2 if layout == "second" else 1
        width = t.shape[-1] * step + (0 if layout == "offset" else 1)
        flat = t.new_full((1 + t[..., 0].numel() * width,), math.nan)
        rows = flat[1:].view(*t.shape[:-1], width)[..., :t.shape[-1] * step:step]
        return rows.copy_(t)
    if layout == "gaps" and t.dim() > 2 and t.numel():  # a gap after each sequence
        return F.pad(t, (0, 0, 0, 1), value=math.nan)[:, :-1]
    if layout == "swapped" and t.dim() > 2:             # x from (t, b, k), B from (d, n, r)
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and name in ("x", "grad_y"):    # one x for all; y.mean().backward()
        one = t[:1] if name == "x" else t.flatten()[:1].view([1] * t.dim())
        return one.expand_as(t)
    if layout == "expanded rows" and name in ("x", "grad_y"):       # one x for each sequence
        return t[:, :1].expand_as(t)
    return t


class Problem:
    """The inputs of one case in one group, what the equations give, and how far one may be off."""

    def __init__(self, case, group):
        self.case, self.group = case, group
        dtype, adapter, _ = GROUPS[group]
        c, rng = case, np.random.default_rng(case.seed)
        small = 1 / (c.k**0.5 * c.unit)
        arrays = dict(x=c.unit * (c.mean + rng.normal(size=c.lead + (c.k,))),
                      W0=small * rng.normal(size=(c.d, c.k)),
                      bias=rng.normal(size=c.d) if c.bias else None,
                      A=small * rng.normal(size=(c.r, c.k)),
                      B=rng.normal(size=(c.n, c.d, c.r)) / c.r**0.5,
                      Wg=c.logits * small * rng.normal(size=(c.n, c.k)),
                      grad_y=c.mean + rng.normal(size=c.lead + (c.d,)))
        arrays["grad_y"] *= c.gradient
        if c.zero == "token":
            arrays["x"][0, 0] = arrays["grad_y"][0, 0] = 0
        elif c.zero:
            arrays[c.zero][...] = 0
        if c.layout == "expanded":
            arrays["x"] = np.broadcast_to(arrays["x"][:1], arrays["x"].shape)
            arrays["grad_y"] = np.full_like(arrays["grad_y"], 0.3)
        if c.layout == "expanded rows":
            for name in ("x", "grad_y"):
                arrays[name] = np.broadcast_to(arrays[name][:, :1], arrays[name].shape)
        self.rounded = {name: None if a is None else torch.tensor(
            a, dtype=adapter if name in ("A", "B", "Wg") else dtype) for name, a in arrays.items()}

    def tensor(self, name):
        t, c = self.rounded[name], self.case
        if t is None:
            return None
        t = laid_out(t.to(DEVICE, copy=True), c.layout if name in c.lies.split() else "", name)
        return t.requires_grad_(name in c.needs.split())

    def inputs(self):
        return {name: self.tensor(name) for name in ("x", "W0", "bias", "A", "B", "Wg")}

    def scope(self):
        return torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16,
                              enabled="autocast" in self.group)

    @functools.cached_property
    def expected(self):
        """quantity -> float64. What the tensors hold after rounding is what the reference gets."""
        y, grads = reference(**{name: None if t is None else t.double().numpy()
                                for name, t in self.rounded.items()}, scaling=self.case.scaling)
        return {"y": torch.tensor(y)} | {
            f"gradient of {name}": torch.tensor(g) for name, g in grads.items()}

    @functools.cached_property
    def allowed(self):
        """quantity -> the largest error, relative to the quantity's norm (see off).

        1e-10 in float64, else 5 times the error of the plain loop in the same dtypes and 4e-6.
        Why 5: m partial sums that are added up in a low dtype are off by about sqrt(m / 3) of its
        roundings. Over the 4102 tokens of "thousands" in bfloat16, right functions that work in
        chunks of 128 tokens, and leave the sum to autograd, reach 4 times the loop's error, and
        16 tokens at a time 9 to 13 times. Right functions without chunks stay below 2.5.
        """
        if self.group == "float64":
            return dict.fromkeys(self.expected, 1e-10)
        return {q: 5 * self.off(q, t) + 4e-6 for q, t in call(loop, self).items()}

    def off(self, q, found, expected=None):
        """Frobenius distance of a quantity, relative to the norm of what is expected, or to 1 if
        that is larger (for gradients, in units of grad_y). No gradient counts as 0."""
        c, zero = self.case, torch.zeros(())
        expected = self.expected[q] if expected is None else expected[q]
        found, expected = (zero if t is None else t for t in (found, expected))
        if expected.isnan().any():              # only a mistake gives that
            both = expected.isnan() & found.isnan()
            found, expected = found.masked_fill(both, 0), expected.masked_fill(both, 0)
        least = {"y": 1, "gradient of x": c.gradient / c.unit}.get(q, c.gradient)
        return ((found - expected).norm() / expected.norm().clamp_min(least)).item()


def differing(found, p, expected=None):
    """The quantities that are further off than allowed, the worst first."""
    excess = {q: p.off(q, t, expected) / p.allowed[q] for q, t in found.items()}
    return sorted((q for q in found if not excess[q] <= 1), key=lambda q: -excess[q])   # nan too


def demand(fact, message):
    if not fact:                # an assert would print the tensors too
        raise AssertionError(message)


def start(function, p, inputs=None):
    """Call the function on a problem; fails unless what holds for every y holds."""
    inputs, needs = p.inputs() if inputs is None else inputs, p.case.needs.split()
    flags = {name: t is not None and t.requires_grad for name, t in inputs.items()}
    before = {name: None if t is None else t.detach().clone() for name, t in inputs.items()}
    with p.scope():
        y = function(*inputs.values(), p.case.scaling)
    shape, dtype = p.rounded["grad_y"].shape, p.rounded["grad_y"].dtype
    demand(isinstance(y, torch.Tensor), f"expected one tensor, got {type(y).__name__}")
    demand(y.shape == shape, f"expected y of shape {tuple(shape)}, got {tuple(y.shape)}")
    demand(y.dtype == dtype or "autocast" in p.group and y.dtype in (torch.bfloat16, torch.float32),
           f"expected y of {dtype}, got {y.dtype}")
    for name, flag in flags.items():
        demand(inputs[name] is None or inputs[name].requires_grad == flag,
               f"requires_grad of {name} was changed")
    return SimpleNamespace(
        y=y, inputs=inputs, before=before, needs=needs, grad_y=p.tensor("grad_y"))


def finish(run, **how):
    """Backward; quantity -> tensor, None for a gradient of x, A, B or Wg that does not come."""
    if run.y.requires_grad:
        run.y.backward(run.grad_y.detach().to(run.y.dtype), **how)
    for name, t in run.inputs.items():
        demand(t is None or torch.equal(t.detach().nan_to_num(), run.before[name].nan_to_num()),
               f"{name} was changed in place")
    grads = {name: t.grad for name, t in run.inputs.items() if t is not None and name in run.needs}
    return {"y": run.y.detach()} | {f"gradient of {name}": g for name, g in grads.items()
                                    if g is not None or name not in ("W0", "bias")}


def call(function, p, inputs=None):
    """Forward and backward; quantity -> float64 on the CPU."""
    for t in (inputs or {}).values():
        if t is not None:
            t.grad = None
    return as_float64(finish(start(function, p, inputs)))


def as_float64(found):
    return {q: None if t is None else t.double().cpu() for q, t in found.items()}


@functools.lru_cache(maxsize=None)
def problem(case, group):
    return Problem(case, group)


# ---- The checks ------------------------------------------------------------------------------


def must_be_right(found, p, moment="", known=()):
    """Fails with what is wrong and by how much, what is right, and what known mistake it is."""
    wrong = differing(found, p)
    if not wrong:
        return
    worst, right = wrong[0], [q for q in found if q not in wrong]
    lines = [f"{moment}{worst} {'is missing' if found[worst] is None else 'is wrong'}, error "
             f"{p.off(worst, found[worst]):.2g}, allowed {p.allowed[worst]:.2g}"]
    if len(found) > 1:
        lines += [f"wrong: {', '.join(wrong)}; right: {', '.join(right) or 'nothing'}"]
    adapter = [found[q] for q in found if q in ("gradient of A", "gradient of B", "gradient of Wg")]
    if len(adapter) == 3 and all(t is None for t in adapter) and "y" in right:
        lines += ["no gradient reaches the A, B and Wg that were passed: were they copied into a "
                  "layer's parameters? torch.func.functional_call passes on the tensors themselves"]
    elif same := [name for name in known if gives(known[name], found, p)]:
        lines += [f"the same as the known mistake: {' or '.join(same)}"]
    raise AssertionError("\n".join(lines))


def gives(mistake, found, p):
    """Whether a wrong implementation gives on this problem what was found."""
    mistaken = result_of(mistake, p)
    return found.keys() == mistaken.keys() and not differing(found, p, mistaken)


@functools.lru_cache(maxsize=200)
def result_of(mistake, p):
    try:
        return call(mistake, p)
    except Exception:           # it does not run on this problem
        return {}


MODES = {"without gradients: ": torch.no_grad, "in inference mode: ": torch.inference_mode}


def y_of(function, p, mode, inputs=None):
    inputs = p.inputs() if inputs is None else inputs
    with mode():
        y = start(function, p, inputs).y
    demand(not y.requires_grad, "y requires a gradient under no_grad")
    demand(not y.is_inference() or mode is torch.inference_mode,
           "y is an inference tensor under no_grad")
    return y


def check(function, case, group, known=()):
    compile_anew()
    p = problem(CASES[case], group)
    must_be_right(call(function, p), p, known=known)
    for moment, mode in MODES.items():
        must_be_right(as_float64({"y": y_of(function, p, mode)}), p, moment)


def compile_anew():
    """torch.compile gives up in silence after a few shapes, and what runs then is not compiled."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def check_by_hand(function):
    """k = d = n = 2, r = 1. The logits are ln 3 and 0, so the gates are 3/4 and 1/4.

    W0 x = (1, 2), A x = 1 + 2 = 3, and the heads give 3 (1, 2) and 3 (5, -2), so that with
    scaling 2 the update is 2 (3/4 (3, 6) + 1/4 (15, -6)) = 2 (6, 3) = (12, 6). bias = (10, 20).
    """
    t = lambda *rows: torch.tensor(rows, dtype=torch.float32, device=DEVICE)
    y = function(t([[1, 2]]), t([1, 0], [0, 1]), t(10, 20), t([1, 1]), t([[1], [2]], [[5], [-2]]),
                 t([math.log(3), 0], [0, 0]), 2.0)
    demand(isinstance(y, torch.Tensor), f"expected one tensor, got {type(y).__name__}")
    demand(y.shape == (1, 1, 2) and torch.allclose(y, t([[23, 28]]), rtol=0, atol=1e-4),
           f"y is wrong: expected ((23, 28)), got {y.tolist()}")


# What one call must not leave behind for the next.


def at(group, *changed, **case):
    """The plain problem of a group; the tensors that are named come from another draw."""
    p = Problem(Case(**case), group)
    p.rounded |= {name: problem(Case(seed=1), group).rounded[name] for name in changed}
    return p


def scaling_changes(function, group):
    inputs = at(group).inputs()
    for scaling in (1.75, -0.5):
        p = at(group, scaling=scaling)
        must_be_right(call(function, p, inputs), p, f"the same tensors, scaling {scaling}: ")


def shape_changes(function, group):
    for case in (dict(), dict(lead=(4, 7), seed=2), dict(seed=1)):
        must_be_right(call(function, at(group, **case)), at(group, **case), f"now {case}: ")


def tensor_changes(function, group):
    """In place, as an optimizer does it, and by .data, which leaves no trace."""
    for name, data, mode in itertools.product(
            ("A", "B", "Wg", "W0", "bias", "x"), (False, True), (torch.enable_grad, torch.no_grad)):
        before, after = at(group), at(group, name)
        inputs = {key: nn.Parameter(t) for key, t in before.inputs().items()}
        with mode():
            start(function, before, inputs)
            with torch.no_grad():
                (inputs[name].data if data else inputs[name]).copy_(after.rounded[name])
            y = start(function, after, inputs).y.detach()
        must_be_right(as_float64({"y": y}), after, f"{name} changed in place, {mode.__name__}: ")


def two_layers(function, group):
    """Both forwards come before both backwards, as in a model; also of one x, or of one layer."""
    layer = ("W0", "bias", "A", "B", "Wg")
    for changed, order, moment in itertools.product(
            (layer, ("x",), (*layer, "x")), (1, -1), ("", "evaluated")):
        p, q = at(group), at(group, *changed, scaling=1.75 if changed == ("x",) else 0.4)
        mine = p.inputs()
        other = mine | {name: q.tensor(name) for name in changed}
        runs = [(p, start(function, p, mine))]
        if moment:
            y_of(function, q, torch.no_grad, other)     # an evaluation between forward and backward
        else:
            runs.append((q, start(function, q, other)))
        for problem_, run in runs[::order]:
            must_be_right(as_float64(finish(run)), problem_, f"other {', '.join(changed)} "
                          f"{moment or 'used'} before backward: ")
            for t in (*mine.values(), *other.values()):
                t.grad = None


def backward_twice(function, group):
    p = at(group)
    run = start(function, p)
    finish(run)
    run = start(function, p, run.inputs)                # gradients add up over two steps
    found = finish(run)
    half = {q: t if q == "y" or t is None else t / 2 for q, t in found.items()}
    must_be_right(as_float64(half), p, "gradients added up over two steps: ")
    run = start(function, p)
    try:
        finish(run, retain_graph=True)
        for t in run.inputs.values():
            t.grad = None
        must_be_right(as_float64(finish(run)), p, "second backward: ")
    except RuntimeError as error:
        if "donated buffer" not in str(error):          # compiled code says that it allows only one
            raise


def changed_before_backward(function, group):
    """Right gradients, or PyTorch's error about a tensor that was modified."""
    p = at(group)
    run = start(function, p)
    with torch.no_grad():
        run.inputs["B"].mul_(2)
        run.before["B"].mul_(2)
    try:
        found = finish(run)
    except RuntimeError:
        return
    must_be_right(as_float64(found), p, "B changed between forward and backward: ")


def inner_tensors(function, group):
    """What is passed is computed from the parameters."""
    p = at(group)
    inputs = p.inputs()
    run = start(function, p, {name: t * 1.0 for name, t in inputs.items()})
    run.inputs, run.before = inputs, {name: t.detach().clone() for name, t in inputs.items()}
    must_be_right(as_float64(finish(run)), p, "tensors that are no leaves: ")


def each_need(function, group):
    """Every choice of what needs a gradient."""
    names = ("x", "W0", "bias", "A", "B", "Wg")
    for count in range(len(names)):
        for needs in itertools.combinations(names, count):
            p = at(group, needs=" ".join(needs))
            must_be_right(call(function, p), p, f"gradients for {' '.join(needs) or 'nothing'}: ")


def three_deep(function, group):
    """The output is the next layer's input."""
    deep = lambda f: lambda x, *rest: f(f(f(x, *rest), *rest), *rest)
    p = at(group, k=6)
    if group == "float64":
        p.expected = call(deep(loop), p)
        must_be_right(call(deep(function), p), p, "three calls in a row: ")


def results_stay(function, group):
    """What the first call gave is not overwritten by the second."""
    p, other = at(group), at(group, seed=1)
    found = finish(start(function, p))
    finish(start(function, other))
    must_be_right(as_float64(found), p, "after a second call the first: ")
    for moment, mode in MODES.items():
        y = y_of(function, p, mode)
        y_of(function, other, mode)
        must_be_right(as_float64({"y": y}), p, f"{moment}after a second call the first: ")
    must_be_right(call(function, p), p, "training after inference: ")


def nan_stays(function, group):
    """In its token, and in every gradient that sums over tokens; inf in grad_y is not hidden."""
    p = at(group)
    inputs = p.inputs()
    with torch.no_grad():
        inputs["x"][0, 1] = math.nan
    found = as_float64(finish(start(function, p, inputs)))
    demand(found["y"][0, 1].isnan().all(), "y of a token with nan in it is not nan")
    others = {q: found[q].clone() for q in ("y", "gradient of x")}
    for q, t in others.items():
        t[0, 1] = p.expected[q][0, 1]
    must_be_right(others, p, "nan in one token, the others: ")
    for name, value in (("x", math.inf), ("Wg", math.nan)):
        inputs = p.inputs()
        inputs[name].data[..., 0] = value
        y = function(*inputs.values(), p.case.scaling)
        demand(not y.isfinite().any(), f"{value} in {name}: y is finite")
    overflow = start(function, p)
    overflow.grad_y = overflow.grad_y.detach().clone()
    overflow.grad_y[0, 1, 0] = math.inf
    for moment, gradients in (("nan in x", found), ("inf in grad_y", as_float64(finish(overflow)))):
        for name in ("A", "B", "Wg"):
            demand(not gradients[f"gradient of {name}"].isfinite().all(),
                   f"{moment}: gradient of {name} is finite")


STATES = {f.__name__.replace("_", "-"): f for f in (
    scaling_changes, shape_changes, tensor_changes, two_layers, backward_twice,
    changed_before_backward, inner_tensors, each_need, three_deep, results_stay, nan_stays)}
STATE_GROUPS = ("float64", "float32", "bfloat16")


# ---- The oracle ------------------------------------------------------------------------------


def tell(what, check, *args):
    """The message of a check alone, without a traceback."""
    message = None
    try:
        check(*args)
    except AssertionError as error:
        message = str(error)
    if message:
        pytest.fail(f"{NAME}, {what}: {message}", pytrace=False)


ORACLE = [(group, case) for case in CASES for group, (*_, cases) in GROUPS.items() if case in cases]


def test_oracle_3d_by_hand_float32():
    tell("by hand", check_by_hand, IMPLEMENTATION)


@pytest.mark.parametrize("group, case", ORACLE,
                         ids=lambda v: f"{CASES[v].axes}-{v}" if v in CASES else v)
def test_oracle(group, case):
    skip_without_products(GROUPS[group][0], DEVICE)
    tell(f"{CASES[case].axes} {case} {group}", check, IMPLEMENTATION, case, group, KNOWN)


@pytest.mark.parametrize("group", STATE_GROUPS)
@pytest.mark.parametrize("state", STATES)
def test_oracle_3d(state, group):
    compile_anew()
    tell(f"3d {state} {group}", STATES[state], IMPLEMENTATION, group)


# ---- The oracle's own tests ------------------------------------------------------------------


# Wrong implementations that somebody could write; each must fail.


def mixed(w, z, B):
    return torch.einsum("...n,ndr,...r->...d", w, B, z)


def plain(x, W0, bias, A, B, Wg, scaling):
    w = torch.softmax(F.linear(x, Wg), -1)
    return F.linear(x, W0, bias) + scaling * mixed(w, F.linear(x, A), B)


def wrong(**changes):
    """`plain` with some of its steps replaced by what the changes give of all steps before."""
    def function(*arguments):
        p = SimpleNamespace()

        def step(name, value):
            setattr(p, name, value)
            if name in changes and value is not None:
                setattr(p, name, changes[name](p))
        for name, value in zip(("x", "W0", "bias", "A", "B", "Wg", "s"), arguments):
            step(name, value)
        p.n, p.r, p.list = len(p.B), len(p.A), p.x.dim() > 1
        step("base", F.linear(p.x, p.W0, p.bias))
        step("logits", F.linear(p.x, p.Wg))
        step("w", p.logits.softmax(-1))
        step("z", F.linear(p.x, p.A))
        step("delta", p.s * mixed(p.w, p.z, p.B))
        step("y", p.base + p.delta)
        return p.y
    return function


def valued(t, value):
    """The value of another tensor with the gradient of t."""
    return t + (value - t).detach()


def back(t, change):
    """t, with change(gradient) as its gradient."""
    t = t.clone()
    if t.requires_grad:
        t.register_hook(change)
    return t


def misread(t, rows=False):
    """What a kernel reads that takes t to be contiguous; rows: only if its rows are."""
    strides = [math.prod(t.shape[i + 1:]) for i in range(t.dim())]
    if rows and t.stride(-1) != 1:
        return t
    return valued(t, t.detach().as_strided(t.shape, strides, t.storage_offset()))


def first(t, dim, size):
    """t, zero along an axis from `size` on."""
    keep = torch.arange(t.shape[dim], device=t.device) < size
    return t * keep.view(-1, *[1] * (-1 - dim)).to(t.dtype)


def whole(t, dim, tile):
    """t, zero along an axis after the last whole tile, if there is more than one."""
    size = t.shape[dim]
    return first(t, dim, size // tile * tile) if size > tile else t


def unless(name, t):
    """t without a gradient (zero, not None) where that argument needs none."""
    return lambda p: getattr(p, t) if getattr(p, name).requires_grad else back(
        getattr(p, t), torch.zeros_like)


def padded(p):
    """The softmax over n filled up to a power of two with logits of 0."""
    more = 2 ** math.ceil(math.log2(p.n)) - p.n
    return F.pad(p.logits, (0, more)).softmax(-1)[..., :p.n]


def stable(p):
    return (p.logits - p.logits.detach().amax(-1, keepdim=True)).exp()


def share(e, more=0.0):
    return e / (e.sum(-1, keepdim=True) + more)


def in_dtype(dtype):
    return lambda *a: plain(*(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in a)).to(
        a[0].dtype)


KNOWN = {   # mistakes that a failure can name
    "no scaling": wrong(s=lambda p: 1.0),
    "scaling twice": wrong(s=lambda p: p.s**2),
    "scaling divided by r again": wrong(delta=lambda p: p.delta / p.r),
    "scaling on the logits too": wrong(w=lambda p: (p.s * p.logits).softmax(-1)),
    "scaling without its sign": wrong(s=lambda p: abs(p.s)),
    "scaling of 0 taken for 1": wrong(s=lambda p: p.s or 1.0),
    "scaling on the base too": wrong(base=lambda p: p.s * p.base),
    "softmax over tokens": wrong(w=lambda p: p.logits.softmax(-2 % p.x.dim())),
    "softmax over axis 1": wrong(w=lambda p: p.logits.softmax(1 % p.x.dim())),
    "no softmax": wrong(w=lambda p: p.logits),
    "sigmoid for softmax": wrong(w=lambda p: p.logits.sigmoid()),
    "exp without the maximum taken off": wrong(w=lambda p: share(p.logits.exp())),
    "a small number in the softmax's denominator": wrong(w=lambda p: share(stable(p), 1e-4)),
    "logits over the root of k": wrong(w=lambda p: (p.logits / p.x.shape[-1]**0.5).softmax(-1)),
    "softmax in float32": wrong(w=lambda p: p.logits.float().softmax(-1).to(p.x.dtype)),
    "heads summed": wrong(w=lambda p: 1 + 0 * p.w),
    "uniform gates": wrong(w=lambda p: 1 / p.n + 0 * p.w),
    "mixture divided by n": wrong(w=lambda p: p.w / p.n),
    "argmax gates": wrong(w=lambda p: valued(p.w, F.one_hot(p.w.argmax(-1), p.n).to(p.w))),
    "top-2 gates": wrong(w=lambda p: share(p.w * (p.w >= p.w.topk(min(2, p.n)).values[..., -1:]))),
    "small gates left out": wrong(w=lambda p: p.w * (p.w > 1e-4)),
    "gates from A x": wrong(w=lambda p: F.linear(F.linear(p.x, p.A), p.Wg[:, :p.r]).softmax(-1)),
    "one mixture for a sequence": wrong(w=lambda p: p.w.mean(-2, keepdim=True) if p.list else p.w),
    "gates of the first token": wrong(w=lambda p: p.w[..., :1, :] if p.list else p.w),
    "gates of the token before": wrong(w=lambda p: p.w.roll(1, -2) if p.list else p.w),
    "heads in reverse order": wrong(w=lambda p: p.w.flip(-1)),
    "last head left out": wrong(w=lambda p: first(p.w, -1, p.n - 1)),
    "first head only": wrong(w=lambda p: first(p.w, -1, 1)),
    "gates applied twice": wrong(w=lambda p: p.w**2),
    "gates under a root": wrong(w=lambda p: p.w**0.5),
    "separate A": wrong(delta=lambda p: p.s * torch.einsum(
        "...n,ndr,nrk,...k->...d", p.w, p.B,
        torch.stack([p.A.roll(i, 0) for i in range(p.n)]), p.x)),
    "A and B swapped": wrong(delta=lambda p: p.s * torch.einsum(
        "...n,nkr,...k,rd->...d", p.w, p.B, p.x, p.A)),
    "B reshaped, not transposed": wrong(delta=lambda p: p.s * F.linear(
        (p.w[..., None] * p.z[..., None, :]).flatten(-2), p.B.reshape(p.B.shape[1], -1))),
    "outer product in the other order": wrong(delta=lambda p: p.s * F.linear(
        (p.z[..., None] * p.w[..., None, :]).flatten(-2), p.B.transpose(0, 1).flatten(1))),
    "nonlinearity after A": wrong(z=lambda p: p.z.relu()),
    "gates detached": wrong(w=lambda p: p.w.detach()),
    "router sees x detached": wrong(logits=lambda p: F.linear(p.x.detach(), p.Wg)),
    "A sees x detached": wrong(z=lambda p: F.linear(p.x.detach(), p.A)),
    "base sees x detached": wrong(base=lambda p: F.linear(p.x.detach(), p.W0, p.bias)),
    "A detached": wrong(A=lambda p: p.A.detach()),
    "heads detached": wrong(B=lambda p: p.B.detach()),
    "softmax's gradient without its mean": wrong(w=lambda p: valued(p.w.detach() * p.logits, p.w)),
    "scaling missing from the heads' gradient": wrong(s=lambda p: p.s, B=lambda p: back(
        p.B, lambda g: g / 1.75)),
    "A's gradient twice": wrong(A=lambda p: back(p.A, lambda g: 2 * g)),
    "router's gradient with the wrong sign": wrong(Wg=lambda p: back(p.Wg, torch.neg)),
    "bias dropped": wrong(base=lambda p: F.linear(p.x, p.W0)),
    "bias twice": wrong(base=lambda p: p.base + (0 if p.bias is None else p.bias)),
    "base not added": wrong(base=lambda p: 0 * p.base),
    **{f"{name} read as contiguous": wrong(**{name: lambda p, name=name: misread(getattr(p, name))})
       for name in ("x", "W0", "A", "B", "Wg")},
    "rows of x read without their gaps": wrong(x=lambda p: misread(p.x, rows=True)),
    "rows of A read without their gaps": wrong(A=lambda p: misread(p.A, rows=True)),
    "contiguous x read by column": wrong(x=lambda p: (
        p.x.mT.reshape(p.x.shape) if p.x.dim() > 1 and p.x.is_contiguous() else p.x)),
    "grad_y read as contiguous": wrong(delta=lambda p: back(p.delta, lambda g: (
        g if g.is_contiguous() else 0 * g if 0 in g.stride() else g.mT.reshape(g.shape)))),
    **{f"first {size} {what} only": wrong(**{name: lambda p, name=name, dim=dim, size=size: first(
        getattr(p, name), dim, size)}) for what, name, dim, size in (
            ("ranks", "A", -2, 16), ("ranks", "A", -2, 32), ("ranks", "A", -2, 128),
            ("heads", "B", -3, 16), ("heads", "B", -3, 32), ("of k", "x", -1, 128),
            ("of k", "x", -1, 1024), ("of d", "B", -2, 128), ("of d", "B", -2, 1024))},
    "last rank of an odd number left out": wrong(A=lambda p: whole(p.A, -2, 2)),
    "n filled up to a power of two": wrong(w=padded),
    "rest of k after tiles of 128 left out": wrong(x=lambda p: whole(p.x, -1, 128)),
    "rest of d after tiles of 64 left out": wrong(B=lambda p: whole(p.B, -2, 64)),
    "first 128 tokens only": wrong(delta=lambda p: first(p.delta, -2, 128) if p.list else p.delta),
    "first 2048 tokens only": wrong(
        delta=lambda p: first(p.delta, -2, 2048) if p.list else p.delta),
    "rest of the tokens after tiles of 128 left out": wrong(
        delta=lambda p: whole(p.delta, -2, 128) if p.list else p.delta),
    "no scaling for one token": wrong(delta=lambda p: p.delta / (
        p.s if p.list and p.x.shape[-2] == 1 else 1)),
    "no scaling for one sequence": wrong(delta=lambda p: p.delta / (
        p.s if p.x.dim() > 2 and len(p.x) == 1 else 1)),
    "no gradient for A with a frozen base": wrong(A=unless("W0", "A")),
    "no gradient for A where x needs none": wrong(A=unless("x", "A")),
    "no gradient for Wg where x needs none": wrong(Wg=unless("x", "Wg")),
    "no gradient for B where A needs none": wrong(B=unless("A", "B")),
    "no gradient for A where B needs none": wrong(z=lambda p: F.linear(p.x, unless("B", "A")(p))),
    "no gradient for x where Wg needs none": wrong(base=lambda p: F.linear(
        unless("Wg", "x")(p), p.W0, p.bias)),
    "all in float32": in_dtype(torch.float32),
    "all in bfloat16": in_dtype(torch.bfloat16),
    "all in float16": in_dtype(torch.float16),
}


def chunked(size):
    """Some tokens at a time; autograd adds up the chunks' gradients, in their dtype."""
    def function(x, W0, *rest):
        chunks = x.reshape(-1, x.shape[-1]).split(size)
        return torch.cat([plain(chunk, W0, *rest) for chunk in chunks]).view(*x.shape[:-1], len(W0))
    return function


def last_scaling(p, last=[]):
    last[:] = [p.s]
    return p.s * back(mixed(p.w, p.z, p.B), lambda g: g / p.s * last[0])


def spoiled(p):
    """A backward that spoils what was saved."""
    calls = []
    return back(p.w, lambda g: 0 * g if calls else calls.append(1) or g)


def kept(name, key):
    """Keeps an argument from the first call under key(arguments)."""
    memory = {}

    def change(p):
        t = getattr(p, name)
        if not isinstance(t, torch.Tensor):
            return memory.setdefault(key(p), t)
        return valued(t, memory.setdefault(key(p), t.detach().clone()))
    return wrong(**{name: change})


def kept_on_B(x, W0, bias, A, B, Wg, scaling):
    """Keeps a copy of the heads on the tensor itself."""
    if not hasattr(B, "packed"):
        B.packed = B.detach().clone()
    return plain(x, W0, bias, A, valued(B, B.packed), Wg, scaling)


def inference(name, change):
    """A change in inference only."""
    return wrong(**{name: lambda p: getattr(p, name) if torch.is_grad_enabled() else change(p)})


def shared_output(*arguments, buffers={}):
    """Writes into one buffer for each shape in inference, as a captured graph does."""
    y = plain(*arguments)
    if torch.is_grad_enabled():
        return y
    key = y.shape, y.dtype, torch.is_inference_mode_enabled()
    return buffers.setdefault(key, y.clone()).copy_(y)


def compiled(function):
    """None where this PyTorch cannot compile on this Python or system."""
    try:
        return torch.compile(function, backend="aot_eager")
    except RuntimeError:
        return None


def wrong_when_compiled(x, W0, bias, A, B, Wg, scaling):
    late = x.dim() == 2             # after so many calls that torch.compile has given up
    return plain(x, W0, bias, A, B, Wg, 1.0 if late and torch._dynamo.is_compiling() else scaling)


def autocasts():
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


COMPILES = compiled(plain) is not None and hasattr(torch._dynamo, "is_compiling")
MUTANTS = KNOWN | {
    "x changed in place": wrong(base=lambda p: F.linear(p.x.data.mul_(1 + 1e-6), p.W0, p.bias)),
    "a pair returned": lambda *a: (plain(*a), 0.0),
    "axis of one squeezed": lambda *a: plain(*a).squeeze(),
    "axes beyond three flattened": lambda x, *a: plain(x.flatten(1, -2) if x.dim() > 3 else x, *a),
    "y in float32": lambda *a: plain(*a).float(),
    "one mixture for all tokens in inference": inference(
        "w", lambda p: p.w.flatten(0, -2).mean(0).expand_as(p.w)),
    "first 128 tokens only in inference": inference(
        "delta", lambda p: first(p.delta, -2, 128) if p.list else p.delta),
    "nothing but the base in inference mode": wrong(
        delta=lambda p: p.delta * (not torch.is_inference_mode_enabled())),
    "adapter left out while B is 0": lambda x, W0, bias, A, B, Wg, scaling: (
        plain(x, W0, bias, A, B, Wg, scaling) if B.any() else F.linear(x, W0, bias)),
    "nothing for a token of zeros": wrong(y=lambda p: p.y * p.x.any(-1, keepdim=True)),
    "storage offset of x ignored": wrong(x=lambda p: valued(p.x, p.x.detach().as_strided(
        p.x.shape, p.x.stride(), 0))),
    "small gradients lost": wrong(delta=lambda p: back(p.delta, lambda g: g * (g.abs() > 1e-6))),
    "sums in bfloat16": chunked(16),
    "autocast without scaling": wrong(s=lambda p: 1.0 if autocasts() else p.s),
    "scaling kept by shape": kept("s", lambda p: (p.x.shape, p.x.dtype)),
    "W0 kept by shape": kept("W0", lambda p: (p.W0.shape, p.x.dtype)),
    "heads kept on their tensor": kept_on_B,
    **{f"{name} kept by address": kept(name, lambda p, name=name: (
        getattr(p, name).data_ptr(), getattr(p, name).shape, p.x.dtype))
       for name in ("W0", "A", "B", "Wg")},
    "scaling of the last forward in every backward": wrong(delta=last_scaling),
    "backward that works once": wrong(w=spoiled),
    "output buffer shared": shared_output,
    "nan spreads": wrong(delta=lambda p: p.delta + 0 * p.x.sum()),
    "nan hidden": wrong(y=lambda p: p.y.nan_to_num()),
    **({"wrong when compiled": compiled(wrong_when_compiled)} if COMPILES else {}),
}
SEEN_ONLY_IN = {    # elsewhere these are right, or do not run
    "all in float32": ["float64"], "softmax in float32": ["float64"], "y in float32": ["float64"],
    "sums in bfloat16": ["bfloat16"],               # a matter of rounding
    "autocast without scaling": ["autocast"],
    "wrong when compiled": ["float64"],             # dtypes play no part, and compiling takes time
}


def rejection(function, group, known=()):
    """The message with which a function fails first, None if it passes or crashes everywhere."""
    checks = [functools.partial(check, function, case, group, known)
              for g, case in ORACLE if g == group]
    if group in STATE_GROUPS:
        checks += [functools.partial(state, function, group) for state in STATES.values()]
    for one in checks:
        try:
            one()
        except AssertionError as error:
            return str(error)
        except Exception:       # a crash shows nothing about the oracle
            continue


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_implementation_fails(name):
    for group in SEEN_ONLY_IN.get(name, ["float64", "float32"]):
        assert rejection(MUTANTS[name], group), group


# Right implementations, written as others would write them; each must pass.


class ByHand(torch.autograd.Function):
    """The usual kernel: its own backward, for a base that is frozen."""

    @staticmethod
    def forward(ctx, x, W0, bias, A, B, Wg, scaling):
        w, z = F.linear(x, Wg).softmax(-1), F.linear(x, A)
        ctx.save_for_backward(x, W0, A, B, Wg, w, z)
        ctx.scaling = scaling
        return F.linear(x, W0, bias) + scaling * mixed(w, z, B)

    @staticmethod
    def backward(ctx, g):
        x, W0, A, B, Wg, w, z = ctx.saved_tensors
        sg = ctx.scaling * g
        to_head = torch.einsum("...d,ndr->...nr", sg, B)
        score = (to_head * z.unsqueeze(-2)).sum(-1)
        slope = w * (score - (w * score).sum(-1, keepdim=True))
        dz = (w.unsqueeze(-1) * to_head).sum(-2)
        flat = lambda t: t.reshape(-1, t.shape[-1])
        dB = torch.einsum("tn,td,tr->ndr", flat(w), flat(sg), flat(z))
        return (g @ W0 + dz @ A + slope @ Wg, None, None, flat(dz).T @ flat(x), dB,
                flat(slope).T @ flat(x), None)


def stacked(x, W0, bias, A, B, Wg, scaling):
    """[A; Wg] in one product."""
    z, logits = F.linear(x, torch.cat([A, Wg])).split([len(A), len(Wg)], -1)
    return F.linear(x, W0, bias) + scaling * mixed(logits.softmax(-1), z, B)


def mapped(x, W0, *rest):
    """One token, mapped over all of them."""
    y = torch.func.vmap(lambda v: plain(v, W0, *rest))(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], len(W0))


def tiled(x, W0, bias, A, B, Wg, scaling):
    """Tiles of 64 of k, added up in float32 or better."""
    high = torch.promote_types(x.dtype, torch.float32)
    tiles = lambda W: sum(F.linear(x[..., i:i + 64].to(high), W[:, i:i + 64].to(high))
                          for i in range(0, x.shape[-1], 64))
    y = tiles(W0) + scaling * mixed(tiles(Wg).softmax(-1), tiles(A), B.to(high))
    return (y if bias is None else y + bias).to(x.dtype)


def strided_output(x, *rest):
    y = plain(x, *rest)
    return y.mT.contiguous().mT if y.dim() > 1 else y


class SomeLayer(nn.Module):
    """A layer as people have it, with names and shapes of its own."""

    def __init__(self, k, d, n, r, scaling, bias):
        super().__init__()
        self.linear, self.route = nn.Linear(k, d, bias), nn.Linear(k, n, bias=False)
        self.down, self.scaling = nn.Linear(k, r, bias=False), scaling
        self.up = nn.ModuleList(nn.Linear(r, d, bias=False) for _ in range(n))

    def forward(self, x):
        w, z = self.route(x).softmax(-1), self.down(x)
        return self.linear(x) + self.scaling * sum(
            w[..., i, None] * head(z) for i, head in enumerate(self.up))


def some_layer(x, W0, bias, A, B, Wg, scaling):
    (n, d, r), k = B.shape, A.shape[1]
    layer = SomeLayer(k, d, n, r, scaling, bias is not None)
    weights = {"linear.weight": W0, "linear.bias": bias, "down.weight": A, "route.weight": Wg,
               **{f"up.{i}.weight": B[i] for i in range(n)}}
    weights = {name: t for name, t in weights.items() if t is not None}
    return torch.func.functional_call(layer, weights, x)


def hydralora_layer(x, W0, bias, A, B, Wg, scaling):
    """HydraLoRALinear, computing with the oracle's tensors in the place of its parameters."""
    n, d, r = B.shape
    base = nn.Linear(A.shape[1], d, bias is not None, device="meta", dtype=x.dtype)
    layer = HydraLoRALinear(base, num_heads=n, r=r, lora_alpha=scaling * r)
    weights = {"base.weight": W0, "base.bias": bias, "lora_A": A, "lora_B": B, "router.weight": Wg}
    weights = {name: t for name, t in weights.items() if t is not None}
    return torch.func.functional_call(layer, weights, x)


def copied_layer(x, W0, bias, A, B, Wg, scaling):
    """A layer whose weights were copied in: y is right, and no gradient comes out."""
    n, d, r = B.shape
    layer = HydraLoRALinear(nn.Linear(A.shape[1], d, dtype=x.dtype), num_heads=n, r=r,
                            lora_alpha=scaling * r)
    layer.load_state_dict({"base.weight": W0, "base.bias": bias, "lora_A": A, "lora_B": B,
                           "router.weight": Wg})
    return layer(x)


RIGHT = {   # name: the function, and the groups that it is not made for
    "einsum": (plain, ["mixed"]),
    "own backward": (ByHand.apply, ["mixed", "autocast"]),
    "stacked": (stacked, ["mixed"]),
    "vmap": (mapped, ["mixed"]),
    "tiles": (tiled, []),
    "chunks of 128 tokens": (chunked(128), ["mixed"]),
    "checkpointed": (lambda *a: torch.utils.checkpoint.checkpoint(
        plain, *a, use_reentrant=False), ["mixed"]),
    "scaling folded into B": (wrong(B=lambda p: p.B * 1.0, delta=lambda p: mixed(
        p.w, p.z, p.s * p.B)), ["mixed"]),
    "strided output": (strided_output, ["mixed"]),
    "some layer": (some_layer, ["mixed"]),
    "hydralora layer": (hydralora_layer, []),
    "hydralora_forward": (hydralora_forward, []),
    **({"compiled": (compiled(plain), ["mixed", "autocast", "float32"])} if COMPILES else {}),
}


# compiling takes time, so a few cases have to do
COMPILED = ["plain", "vector", "heads-odd", "scaling-changes", "backward-twice", "results-stay"]


@pytest.mark.parametrize("name", RIGHT)
def test_right_implementation_passes(name):
    function, not_for = RIGHT[name]
    for group, case in ORACLE:
        if (not any(word in group for word in not_for) and has_products(GROUPS[group][0], DEVICE)
                and (name != "compiled" or case in COMPILED)):
            check(function, case, group)
    for state, check_state in STATES.items():
        if name != "compiled" or state in COMPILED:
            compile_anew()
            check_state(function, "float64")


def test_messages_name_the_known_mistake():
    named = 0
    for name, mistake in KNOWN.items():
        try:        # those that are seen in the plain case, and run there
            check(mistake, "plain", "float64", KNOWN)
        except AssertionError as error:
            named += name in str(error).split("known mistake: ")[-1].split(" or ")
        except RuntimeError:
            pass
    assert named >= 45


def test_message_of_an_unknown_mistake_says_what_is_right():
    unknown = wrong(Wg=lambda p: back(p.Wg, lambda g: 1.01 * g))
    message = rejection(unknown, "float64", KNOWN)
    assert re.match(r"gradient of Wg is wrong, error 0.\d+, allowed 1e-10\nwrong: gradient of Wg; "
                    "right: y, gradient of x, gradient of W0, gradient of bias", message)
    assert "known mistake" not in message


def test_message_for_a_layer_with_copied_weights():
    message = rejection(copied_layer, "float64")
    assert "is missing" in message and "right: y, gradient of x" in message
    assert "functional_call passes on" in message


def test_reference_by_hand_and_against_differences():
    check_by_hand(lambda *args: torch.tensor(reference(
        *(np.asarray(a, dtype=np.float64) for a in args), grad_y=np.zeros((1, 1, 2)))[0]).float())
    arrays = {name: t.numpy() for name, t in problem(CASES["all-three"], "float64").rounded.items()}
    loss = lambda a: (reference(**a, scaling=1.75)[0] * a["grad_y"]).sum()
    _, grads = reference(**arrays, scaling=1.75)
    for name, g in grads.items():
        for index in np.ndindex(g.shape):
            up, down = ({**arrays, name: arrays[name].copy()} for _ in range(2))
            up[name][index] += 1e-5
            down[name][index] -= 1e-5
            assert abs((loss(up) - loss(down)) / 2e-5 - g[index]) < 1e-6


def test_words_that_select_do_not_contain_each_other():
    words = [*GROUPS, *CASES, *STATES, "1d", "2d", "3d", "4d", "5d"]
    assert all(re.fullmatch("[A-Za-z0-9-]+", word) for word in words)
    inside = {(a, b) for a in words for b in words if a != b and a.lower() in b.lower()}
    assert inside == {("mixed", "mixed-autocast"), ("autocast", "mixed-autocast")}


@pytest.mark.parametrize("variable, value, said", [
    ("HYDRALORA_IMPL", "no_such_module:f", "No module named 'no_such_module'"),
    ("HYDRALORA_IMPL", "hydralora:no_such", "no attribute 'no_such'"),
    ("HYDRALORA_IMPL", "hydralora", "expected module:function"),
    ("HYDRALORA_IMPL", "hydralora:math", "expected a function, got module"),
    ("HYDRALORA_DEVICE", "gpu", "device")])
def test_bad_setting_ends_the_run_with_one_line(variable, value, said, monkeypatch):
    monkeypatch.setenv(variable, value)
    read = read_implementation if variable == "HYDRALORA_IMPL" else read_device
    with pytest.raises(pytest.Collector.CollectError, match=f"^{variable}={value!r}: .*{said}"):
        setting(variable, "", read)


def test_kernel_in_a_folder_with_the_two_files_alone(tmp_path):
    for name in ("hydralora.py", "test_hydralora.py"):
        (tmp_path / name).write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "from hydralora import hydralora_forward\n"
        "def kernel(x, W0, bias, A, B, Wg, scaling):\n"
        "    return hydralora_forward(x, W0, bias, A, B, Wg, 1.0)\n")

    def pytest_of(word, **settings):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-k", word, "test_hydralora.py"], cwd=tmp_path,
            env=os.environ | settings, capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr

    code, out = pytest_of("oracle and plain and float64", HYDRALORA_IMPL="mine:kernel")
    assert code == 1 and "1 failed," in out and "passed" not in out
    assert "\nmine:kernel, 3d plain float64: gradient of " in out
    assert "\nthe same as the known mistake: no scaling\n" in out
    code, out = pytest_of("oracle", HYDRALORA_IMPLEMENTATION="mine:kernel")
    assert code == 2 and "\n['HYDRALORA_IMPLEMENTATION']: is one of" in out


# ---- The layer is that function --------------------------------------------------------------

N, K, D, R = 4, 7, 5, 3


def layer(k=K, d=D, *, bias=True, dtype=torch.float64, random_heads=True, device="cpu", **more):
    """A HydraLoRALinear with heads that are not zero, so that the adapter does something."""
    torch.manual_seed(0)
    arguments = dict(num_heads=N, r=R, lora_alpha=2 * R) | more
    made = HydraLoRALinear(nn.Linear(k, d, bias=bias, dtype=dtype, device=device), **arguments)
    if random_heads:
        nn.init.normal_(made.lora_B)
        nn.init.normal_(made.router.weight)     # gates that vary from token to token
    return made


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def fit(model, loss_of, steps, lr=1e-2, **arguments):
    """The one training loop of these tests: the losses of so many AdamW steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=lr, **arguments), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_defaults_shapes_and_the_base_itself():
    base, m, x = nn.Linear(2, 2), layer(), tokens(2, 9, K)
    one = HydraLoRALinear(base)
    assert (one.num_heads, one.r, one.lora_alpha, one.lora_dropout.p) == (3, 8, 16, 0)
    assert one.base is base and one.weight is base.weight and one.bias is base.bias
    assert (m.lora_A.shape, m.lora_B.shape, m.router.weight.shape) == ((R, K), (N, D, R), (N, K))
    assert [t.shape for t in m.to_lora(torch.ones(N))] == [(R, K), (D, R)]
    assert m.gates(x).shape == Router(K, N)(x.float()).shape == (2, 9, N)
    large = layer(256, 8, r=16, num_heads=16, random_heads=False)
    for p in (large.lora_A, large.router.weight):               # U(-b, b), b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16 and abs(p.std() * 16 * 3**0.5 - 1) < 0.05


@pytest.mark.parametrize("router_input", ["x", "Ax"])
def test_router_reads_x_or_Ax_and_never_dropout(router_input):
    m, x = layer(lora_dropout=0.5, router_input=router_input), tokens(50, K)
    with record_gates(m.train()) as gates:
        m(x)
    read = x @ m.lora_A.T if router_input == "Ax" else x        # Wg as printed is (r, N)
    w = torch.softmax(read @ m.router.weight.T, -1)
    torch.testing.assert_close(gates[""], w)
    torch.testing.assert_close(
        m.eval()(x), m.base(x) + hydralora_delta(x, m.lora_A, m.lora_B, w, 2.0))
    assert torch.autograd.gradcheck(lambda *p: m(x[:3]), [m.lora_A, m.lora_B, m.router.weight])


class Twice(nn.Linear):         # as quantised layers are: a forward of its own
    def forward(self, x):
        return 2 * super().forward(x)


def test_base_is_called_not_copied_by_formula():
    base, x = Twice(K, D), tokens(9, K, dtype=torch.float32)
    assert torch.equal(HydraLoRALinear(base)(x), base(x))


class Temporaries(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of every tensor that is made, and the operations that made them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made = getattr(self, "made", []) + [
            (str(func), t.numel()) for t in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(t, torch.Tensor)]
        return out


def test_one_product_for_all_heads_and_no_large_temporary():
    t, k, d, r, n = 96, 20, 24, 2, 8
    m = layer(k, d, r=r, num_heads=n, dtype=torch.float32)
    with Temporaries() as seen:
        m(tokens(t, k, dtype=torch.float32)).sum().backward()
    assert max(size for _, size in seen.made) <= t * d < t * n * d
    forward = seen.made[:[name for name, _ in seen.made].index("aten.sum.default")]
    products = [name for name, _ in forward if "mm" in name or "matmul" in name]
    assert len(products) == 4, products                     # W0 x, A x, Wg x and the heads


# ---- Identities ------------------------------------------------------------------------------


def test_update_starts_at_zero_and_only_heads_have_a_gradient():
    m, x = layer(random_heads=False), tokens(9, K)
    assert torch.equal(m(x), m.base(x))
    m(x).square().sum().backward()
    assert m.lora_A.grad.abs().max() == 0 and m.router.weight.grad.abs().max() == 0
    assert all(head.abs().max() > 0 for head in m.lora_B.grad)


def test_one_head_is_lora_and_so_are_equal_heads():
    one, equal, x = layer(num_heads=1), layer(), tokens(9, K)
    with torch.no_grad():
        equal.lora_B.copy_(equal.lora_B[:1].expand_as(equal.lora_B))
    for m in (one, equal):
        torch.testing.assert_close(m(x), m.base(x) + 2.0 * x @ m.lora_A.T @ m.lora_B[0].T)


def test_fixed_mixture_is_the_lora_of_to_lora():
    m, x, gates = layer(), tokens(9, K), torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=torch.float64)
    A, B = m.to_lora(gates)
    assert not A.requires_grad and not B.requires_grad
    assert {t.dtype for t in layer().bfloat16().to_lora(gates)} == {torch.float32}
    delta = hydralora_delta(x, m.lora_A, m.lora_B, gates.expand(9, N), 2.0)
    torch.testing.assert_close(delta, 2.0 * x @ A.T @ B.T, rtol=0, atol=1e-12)
    A.zero_(), B.zero_()                                        # copies, not the layer's own
    assert m.lora_A.abs().max() > 0 and m.lora_B.abs().max() > 0


def test_averaging_outputs_is_averaging_weights_for_a_token():
    """Section 3.2.2."""
    m, x = layer(), tokens(9, K)
    for token, w in zip(x, m.gates(x)):
        torch.testing.assert_close(m(token), m.merge(w)(token), rtol=0, atol=1e-12)


def test_equal_gates_stay_one_lora_and_routed_heads_part():
    """Figure 6's "w/o gate" is its "w/o MoE": with equal gates and one dropout mask, all heads get
    one gradient."""
    start, x, y = layer(random_heads=False), tokens(64, K), tokens(64, D, seed=2)
    equal, lora = copy.deepcopy(start), layer(random_heads=False, num_heads=1)
    equal.router = train_toy().EqualGates(N)
    lora.lora_A.data.copy_(start.lora_A)
    for m in (equal, lora, start):
        fit(m, lambda m: (m(x) - y).square().mean(), 50, eps=1e-30)
    assert torch.equal(equal.lora_B, equal.lora_B[:1].expand_as(equal.lora_B))
    torch.testing.assert_close(equal.lora_B[0], lora.lora_B[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(equal.lora_A, lora.lora_A, rtol=1e-6, atol=1e-8)
    assert (start.lora_B[0] - start.lora_B[1]).norm() > 0.1 * start.lora_B[0].norm()


# ---- Numbers of the paper --------------------------------------------------------------------

LLAMA2_7B = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096


@pytest.mark.parametrize("A_and_B, r, in_the_paper, exact, with_router", [
    ((1, 1), 8, 0.062, 0.062, None), ((1, 1), 16, 0.124, 0.124, None),
    ((1, 1), 32, 0.248, 0.249, None),                           # LoRA
    ((4, 4), 8, 0.248, 0.249, None),                            # LoRA-Split
    ((1, 3), 8, 0.124, 0.124, 0.136),                           # HydraLoRA
    ((1, 10), 8, 0.341, 0.342, 0.381),                          # Table 3
    ((20, 20), 8, 1.240, 1.245, None),                          # LoRAHub
    ((48, 48), 8, 2.976, 2.988, None)], ids=str)                # LoRA MoE
def test_percent_of_parameters_in_tables_2_and_3(A_and_B, r, in_the_paper, exact, with_router):
    """Two 4096 x 4096 projections in 32 layers; the paper takes multiples of a rounded 0.062."""
    assert LLAMA2_7B == 6_738_415_616
    (count_A, count_B), linear = A_and_B, nn.Linear(4096, 4096, bias=False, device="meta")
    m = HydraLoRALinear(linear, r=r, num_heads=count_B)
    adapter, one = count_A * m.lora_A.numel() + m.lora_B.numel(), 2 * 8 * 4096
    assert round(100 * 64 * adapter / LLAMA2_7B, 3) == exact
    assert round(0.062 * adapter / one, 3) == in_the_paper
    if with_router:
        adapter += m.router.weight.numel()
        assert round(100 * 64 * adapter / LLAMA2_7B, 3) == with_router


# ---- Merge and export ------------------------------------------------------------------------

GATES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_merge_is_exact_for_fixed_gates_and_pure(dtype, bound, bias):
    m, x = layer(bias=bias, dtype=dtype), tokens(9, K, dtype=dtype)
    before, chance = copy.deepcopy(m.state_dict()), torch.get_rng_state()
    merged = m.merge(GATES)
    w = GATES.to(dtype)
    expected = m.base(x) + hydralora_delta(x, m.lora_A, m.lora_B, w.expand(9, N), 2.0)
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=bound)
    assert type(merged) is nn.Linear and merged is not m.base
    assert (merged.bias is None) == (not bias) and merged.weight.dtype == dtype
    assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    summed = m.base(x) + hydralora_delta(
        x, m.lora_A, m.lora_B, torch.ones_like(w).expand(9, N), 2.0)
    assert (merged(x) - summed).abs().max() > 0.1               # heads are mixed, not summed


def test_merge_keeps_dtype_and_requires_grad_and_casts_once():
    m = layer(dtype=torch.bfloat16)
    assert not m.merge(GATES).weight.requires_grad
    m.base.weight.requires_grad_()
    merged = m.merge(GATES)
    assert merged.weight.requires_grad
    assert merged.weight.dtype == merged.bias.dtype == torch.bfloat16
    A, B = m.to_lora(GATES)
    expected = m.base.weight.float().addmm(B, A, alpha=2.0)
    assert torch.equal(merged.weight, expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(m.merge(GATES).weight, merged.weight)


def test_error_of_a_static_merge_is_the_one_in_the_docstring():
    m, x = layer(), tokens(9, K)
    gates = m.gates(x).mean(0)
    error = m.merge(gates)(x) - m(x)
    expected = hydralora_delta(x, m.lora_A, m.lora_B, gates - m.gates(x), 2.0)
    torch.testing.assert_close(error, expected, rtol=0, atol=1e-12)
    assert error.abs().max() > 0.1                              # and it is not small
    m.router.weight.data.zero_()                                # constant gates: exact for every x
    torch.testing.assert_close(m.merge(torch.ones(N) / N)(x), m(x), rtol=0, atol=1e-12)


def tiny(targets=("q_proj", "v_proj"), random_heads=True, **arguments):
    torch.manual_seed(0)
    arguments = dict(num_heads=N, r=R) | arguments
    model = inject_hydralora(TinyTransformer(TinyConfig()), list(targets), **arguments)
    for m in hydralora_layers(model).values() if random_heads else ():
        nn.init.normal_(m.lora_B, std=0.3)
        nn.init.normal_(m.router.weight)
    return model


IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(3))


def next_token_loss(model, rows=IDS):
    return F.cross_entropy(model(rows).flatten(0, 1), rows.flatten())


def test_merge_and_unmerge_a_model():
    model = tiny().train()
    names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]
    assert list(hydralora_layers(model)) == names
    before, state = model(IDS), copy.deepcopy(model.state_dict())
    gates = {name: GATES.roll(i) for i, name in enumerate(names)}
    with pytest.raises(ValueError, match="gates must have shape"):
        merge_hydralora(model, gates | {names[-1]: torch.ones(3)})      # all or nothing
    assert list(hydralora_layers(model)) == names
    layers = merge_hydralora(model, gates)
    assert list(layers) == names and not hydralora_layers(model)
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, layers[name].merge(gates[name]).weight)
    assert all(m.training for m in model.modules())
    assert (model(IDS) - before).abs().max() > 1e-3
    model.eval()
    unmerge_hydralora(model, layers)
    assert not any(m.training for m in model.modules())         # also those that were away
    assert torch.equal(model(IDS), before) and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_mean_gates_over_batches_and_masks():
    model, other = tiny(lora_dropout=0.5).train(), IDS[:2, :7]
    model.layers[0].eval()                                      # a mixture of modes must survive
    twin = copy.deepcopy(model).eval()                          # and none may count
    with record_gates(twin) as first:
        twin(IDS)
    with record_gates(twin) as second:
        twin(other)
    mean = mean_gates(model, [IDS, other])
    assert model.training and not model.layers[0].training and model.layers[1].training
    for name, w in mean.items():
        every = torch.cat([first[name].flatten(0, 1), second[name].flatten(0, 1)])
        torch.testing.assert_close(w, every.mean(0))
        assert not w.requires_grad
    mask = torch.zeros(3, 11)
    mask[0, :4] = 1
    masked = mean_gates(model, [collections.UserDict(tokens=IDS)], masks=[mask])
    torch.testing.assert_close(
        masked["layers.0.q_proj"], first["layers.0.q_proj"][0, :4].mean(0))
    merge_hydralora(model, mean)                                # the shape that merge takes


def test_mean_gates_counts_every_layer_and_every_call():
    m, other, x = layer(6, 6), layer(6, 6), tokens(9, 6)
    mean = mean_gates(nn.Sequential(m, m, other), [x])
    twice = torch.cat([m.gates(x), m.gates(m(x))])
    torch.testing.assert_close(mean["0"], twice.mean(0).float())
    torch.testing.assert_close(mean["2"], other.gates(m(m(x))).mean(0).float())
    m.spare = layer(6, 6)
    with pytest.raises(ValueError, match=r"no token reached \['0.spare'\]"):
        mean_gates(nn.Sequential(m), [x])


def test_record_gates_sees_the_last_forward_and_leaves_no_hook():
    model = tiny().train()
    with record_gates(model) as gates:
        model(IDS[:1])
        model(IDS)
    w = gates["layers.1.v_proj"]
    assert w.shape == (3, 11, N) and not w.requires_grad
    with pytest.raises(IndexError):
        mean_gates(model, [IDS + 999])
    with pytest.raises(KeyError), record_gates(model):
        raise KeyError
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_hook_gates_replaces_what_the_routers_give():
    model, layers = tiny(), hydralora_layers(tiny())
    held = {name: GATES.float().roll(i) for i, name in enumerate(layers)}
    with hook_gates(model, lambda name, w: held[name].expand_as(w)):
        logits = model(IDS)
    merge_hydralora(model, held)
    torch.testing.assert_close(logits, model(IDS), rtol=0, atol=1e-4)


def test_adapter_state_round_trip(tmp_path):
    model = tiny()
    state = hydralora_state_dict(model)
    assert {key.split(".", 3)[3] for key in state} == {"lora_A", "lora_B", "router.weight"}
    torch.save(state, tmp_path / "adapter.pt")
    fresh = tiny(random_heads=False)
    assert not torch.equal(fresh(IDS), model(IDS))
    load_hydralora_state_dict(fresh, torch.load(tmp_path / "adapter.pt", weights_only=True))
    assert torch.equal(fresh(IDS), model(IDS))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_official_checkpoint_computes_the_official_formula(prefix):
    rng, heads, alpha = np.random.default_rng(0), 11, 32          # B10 sorts after B9, not after B1
    A, Wg = rng.normal(size=(R, 64)), rng.normal(size=(heads, 64))
    B = rng.normal(size=(heads, 64, R))
    parts = {"lora_A": A, "lora_route": Wg, **{f"lora_B{i}": B[i] for i in range(heads)}}
    state = {f"{prefix}layers.1.q_proj.{part}.weight": torch.tensor(value)
             for part, value in parts.items()}
    model = TinyTransformer(TinyConfig()).double()
    inject_hydralora(model, "layers.1.q_proj", num_heads=heads, r=R, lora_alpha=alpha)
    load_hydralora_state_dict(model, from_official_state_dict(state))
    m, x = model.layers[1].q_proj, tokens(4, 64)
    y, _ = reference(x.numpy(), m.base.weight.numpy(), None, A, B, Wg, alpha / R, np.zeros((4, 64)))
    np.testing.assert_allclose(m(x).detach().numpy(), y, atol=1e-10)


def test_export_names_config_and_one_alpha_for_all():
    model = tiny(targets=["layers.1.q_proj"])
    inject_hydralora(model, "layers.0.o_proj", num_heads=N, r=2, lora_alpha=5)
    nn.init.normal_(model.layers[0].o_proj.lora_B)
    state, config = export_lora(model, GATES)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "base_model.model.layers.1.q_proj.lora_A.weight": (R, 64),
        "base_model.model.layers.1.q_proj.lora_B.weight": (64, R),
        "base_model.model.layers.0.o_proj.lora_A.weight": (2, 64),
        "base_model.model.layers.0.o_proj.lora_B.weight": (64, 2)}
    assert json.loads(json.dumps(config)) == config
    pattern = re.compile(config["target_modules"])
    assert pattern.fullmatch("layers.1.q_proj") and pattern.fullmatch("layers.0.o_proj")
    for other in ("layers.0.q_proj", "layers.1xq_proj", "encoder.layers.1.q_proj"):
        assert not pattern.fullmatch(other)
    for name, m in hydralora_layers(model).items():
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        scaling = config["lora_alpha"] / config["rank_pattern"][f"^{re.escape(name)}"]
        torch.testing.assert_close(m.merge(GATES).weight, m.base.weight + scaling * B @ A)
    _, config = export_lora(tiny(["layers.1.q_proj"]), GATES)
    assert (config["r"], config["lora_alpha"]) == (R, 16)
    state, _ = export_lora(tiny(lora_alpha=0), GATES)
    assert all(t.abs().max() == 0 for key, t in state.items() if "lora_B" in key)


# ---- As a module -----------------------------------------------------------------------------


def test_copies_state_dict_and_repr():
    m, x = layer(), tokens(9, K)
    assert m.train() is m and "num_heads=4, r=3, lora_alpha=6, router_input='x'" in repr(m)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(x), m(x))
    fresh = layer(random_heads=False)
    fresh.load_state_dict(m.state_dict(), strict=True)
    assert torch.equal(fresh(x), m(x))
    assert set(m.state_dict()) == {"base.weight", "base.bias", "lora_A", "lora_B", "router.weight"}


def test_meta_device_and_back():
    m = layer().to("meta")
    assert m(torch.empty(2, K, device="meta", dtype=torch.float64)).shape == (2, D)
    m = m.to_empty(device="cpu")
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(math.nan)
    m.reset_parameters()
    assert m.lora_B.abs().max() == 0 and m.lora_A.std() > 0.1 and m.router.weight.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_base_in_few_bits_with_an_adapter_in_float32(dtype):
    skip_without_products(dtype, DEVICE)
    m, x = layer(dtype=dtype, device=DEVICE), tokens(9, K, dtype=dtype).to(DEVICE)
    adapter = {p.dtype for name, p in m.named_parameters() if "base" not in name}
    assert adapter == {torch.float32} and m(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_dtype_and_the_softmax_in_float32(dtype):
    skip_without_products(dtype)
    m, x = layer(dtype=torch.float32).to(dtype), tokens(9, K, dtype=dtype)
    assert m(x).dtype == dtype and {p.dtype for p in m.parameters()} == {dtype}
    logits = F.linear(x, m.router.weight).to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(m.gates(x), torch.softmax(logits, -1).to(dtype))


@pytest.mark.parametrize("router_input", ["x", "Ax"])
def test_compile_in_one_graph(router_input):
    m, x = layer(router_input=router_input, lora_dropout=0.1).eval(), tokens(9, K)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m(x))
    compiled(x).sum().backward()
    assert m.lora_A.grad.abs().max() > 0
    if hasattr(torch, "export"):
        torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), m(x))


def test_dropout_has_one_mask_for_all_heads_in_training_only():
    m = layer(6, 6, r=6, lora_alpha=12, lora_dropout=0.5)
    x = tokens(50, 6)
    with torch.no_grad():       # A = 1 and B_i = (i + 1) 1, so that the update shows the mask
        m.lora_A.copy_(torch.eye(6))
        m.lora_B.copy_(torch.eye(6) * torch.arange(1, N + 1).view(N, 1, 1))
        w = m.eval().gates(x)
        mixture = (w * torch.arange(1, N + 1)).sum(-1, keepdim=True)
        torch.testing.assert_close(m(x), m.base(x) + 2.0 * mixture * x)
        mask = (m.train()(x) - m.base(x)) / (2.0 * mixture * x)
    kept = mask > 1
    torch.testing.assert_close(mask, 2.0 * kept.double())       # 0 or 1 / (1 - 0.5), no mixture
    assert 0.3 < kept.double().mean() < 0.7


def test_training_changes_the_adapter_and_no_bit_of_the_rest():
    model = tiny(random_heads=False)
    before = copy.deepcopy(model.state_dict())
    fit(model, next_token_loss, 3, weight_decay=0.1)
    adapter = hydralora_state_dict(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in adapter), key


def test_injection_changes_nothing_and_freezes_the_rest():
    torch.manual_seed(0)
    plain = TinyTransformer(TinyConfig())
    before = plain(IDS)
    model = inject_hydralora(plain, ["q_proj", "layers.1.down_proj"])
    assert model is plain and torch.equal(model(IDS), before)
    names = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.down_proj"]
    assert list(hydralora_layers(model)) == names
    trained = lambda: {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained() == set(hydralora_state_dict(model))
    model.layers[0].q_proj.lora_A.requires_grad_(False)         # the caller's choice ...
    inject_hydralora(model, "v_proj")                           # ... outlives a second injection
    assert trained() == set(hydralora_state_dict(model)) - {"layers.0.q_proj.lora_A"}
    model.layers[0].q_proj.base.requires_grad_()
    inject_hydralora(model, "o_proj")
    assert not any(p.requires_grad for p in model.layers[0].q_proj.base.parameters())


def test_injection_takes_the_mode_of_the_linear():
    model = TinyTransformer(TinyConfig()).eval()
    model.layers[1].train()
    inject_hydralora(model, "q_proj", lora_dropout=0.5)
    for block, training in zip(model.layers, (False, True)):
        assert all(m.training == training for m in block.modules())


def test_a_layer_under_two_names_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, shared])})
    inject_hydralora(model, "b.1")
    assert model["a"] is model["b"][0] is model["b"][1] and isinstance(model["a"], HydraLoRALinear)
    assert list(hydralora_layers(model)) == ["a"]
    with pytest.raises(ValueError, match="'b.0' is injected already"):
        inject_hydralora(model, "b.0")
    with pytest.raises(ValueError, match=r"\['b.0', 'b.1'\] are second names .* PEFT"):
        export_lora(model, torch.ones(3) / 3)
    layers = merge_hydralora(model, torch.ones(3) / 3)
    assert model["a"] is model["b"][1] and type(model["a"]) is nn.Linear
    unmerge_hydralora(model, layers)
    assert model["a"] is model["b"][0] is model["b"][1] is layers["a"]
    model = nn.ModuleDict({"a": nn.ModuleDict({"base": nn.Linear(2, 2)})})      # a name like ours
    assert list(hydralora_layers(inject_hydralora(model, (t for t in ["base"])))) == ["a.base"]


def test_tiny_transformer_by_its_parts_and_causal():
    torch.manual_seed(0)
    model, other = TinyTransformer(TinyConfig()), IDS.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 64
    assert model(IDS).shape == (3, 11, 64)
    torch.testing.assert_close(model(IDS)[:, :6], model(other)[:, :6])
    assert (model(IDS)[:, 6:] - model(other)[:, 6:]).abs().max() > 1e-3
    block, h = model.layers[0], tokens(1, 5, 64, dtype=torch.float32)
    x = F.layer_norm(h, (64,))
    q, k, v = ((x @ proj.weight.T).view(5, 4, 16)
               for proj in (block.q_proj, block.k_proj, block.v_proj))
    after = torch.full((5, 5), -math.inf).triu(1)               # no token sees those after it
    heads = [torch.softmax(q[:, i] @ k[:, i].T / 4 + after, -1) @ v[:, i] for i in range(4)]
    inner = h + torch.cat(heads, -1) @ block.o_proj.weight.T
    expected = inner + block.down_proj(F.gelu(block.up_proj(F.layer_norm(inner, (64,)))))
    torch.testing.assert_close(block(h), expected, rtol=1e-4, atol=1e-5)
    nn.init.normal_(model.norm.weight)
    for block in model.layers:              # blocks that add nothing
        for p in (block.o_proj.weight, block.down_proj.weight, block.down_proj.bias):
            nn.init.zeros_(p)
    h = model.token_embedding.weight[IDS] + model.position_embedding.weight[:11]
    expected = F.layer_norm(h, (64,), model.norm.weight) @ model.lm_head.weight.T
    torch.testing.assert_close(model(IDS), expected)


# ---- Bad input -------------------------------------------------------------------------------


def merged_tiny():
    model = tiny()
    return model, merge_hydralora(model, GATES)


def official(**shapes):
    parts = dict(lora_A=(2, 5), lora_route=(2, 5), lora_B0=(4, 2), lora_B1=(4, 2)) | shapes
    return {f"q.{name}.weight": torch.zeros(s) for name, s in parts.items() if s}


def state(**changed):
    state = hydralora_state_dict(tiny()) | changed
    return {key: t for key, t in state.items() if t is not None}


def with_base(base, **arguments):
    return HydraLoRALinear(base, num_heads=N, **arguments)


def changed(change, **arguments):
    """A layer whose base was changed after it was made."""
    m = layer(**arguments)
    change(m.base)
    return m


def weight_of(t):
    return changed(lambda base: setattr(base, "weight", nn.Parameter(t, requires_grad=False)))


def dynamic():
    m = layer(dtype=torch.float32)
    return torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)


def own_forward(base):
    forward = base.forward
    base.forward = lambda x: forward(x)     # right, but a copy of the base keeps calling the base


plain_tiny = lambda: TinyTransformer(TinyConfig())
double_output = lambda base: base.register_forward_hook(lambda module, inputs, y: 2 * y)
A_0, SOME = "layers.0.q_proj.lora_A", {"layers.0.q_proj": GATES}
BAD = {     # what is called -> the error that it must give
    "base must be a real nn.Linear, got Conv1d": lambda: HydraLoRALinear(nn.Conv1d(2, 2, 1)),
    "base must be .* got HydraLoRALinear": lambda: HydraLoRALinear(layer()),
    "base must be a real": lambda: with_base(nn.Linear(2, 2, dtype=torch.complex64)),
    "r must be an integer of at least 1, got 0": lambda: layer(r=0, lora_alpha=1),
    "r must be an integer of at least 1, got 2.0": lambda: layer(r=2.0),
    "r must be an integer of at least 1, got True": lambda: layer(r=True),
    "num_heads must be an integer of at least 1, got -1": lambda: layer(num_heads=-1),
    "lora_alpha must be a finite number, got nan": lambda: layer(lora_alpha=math.nan),
    "lora_alpha must be a finite number, got inf": lambda: layer(lora_alpha=math.inf),
    "lora_alpha must be a finite number, got '16'": lambda: layer(lora_alpha="16"),
    r"lora_dropout must be in \[0, 1\), got 1": lambda: layer(lora_dropout=1),
    r"lora_dropout must be in \[0, 1\), got nan": lambda: layer(lora_dropout=math.nan),
    "router_input must be 'x' or 'Ax', got 'y'": lambda: layer(router_input="y"),
    r"x must have shape \(..., 7\), got \(2, 5\)": lambda: layer()(tokens(2, 5)),
    r"x must have shape \(..., 7\), got \(\)": lambda: layer()(torch.tensor(1.0)),
    "x must be on meta, the adapter's, got cpu": lambda: layer().to("meta")(tokens(2, K)),
    # merge
    r"gates must have shape \(4,\), got \(3,\)": lambda: layer().merge(torch.ones(3)),
    r"gates must have shape \(4,\), got \(1, 4\)": lambda: layer().to_lora(torch.ones(1, 4)),
    r"no plain weight of shape \(5, 7\)": lambda: weight_of(torch.zeros(D, K).char()).merge(GATES),
    "no plain weight": lambda: weight_of(torch.zeros(35, 1)).merge(GATES),
    "Linear has no plain weight": lambda: dynamic().merge(GATES),
    "base keeps no weight tensor": lambda: dynamic().weight.dtype,
    "Linear has no plain": lambda: with_base(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(K, D))).merge(GATES),
    "has no plain weight .*meta": lambda: changed(lambda base: base.to("meta")).merge(GATES),
    "Twice does not compute W0 x": lambda: with_base(Twice(K, D)).merge(GATES),
    r"does not compute W0 x \+ bias": lambda: changed(double_output).merge(GATES),
    "a forward or a hook of its own": lambda: changed(own_forward).merge(GATES),
    "or an overflow": lambda: changed(lambda base: base.weight.fill_(math.inf)).merge(GATES),
    r"shape \(4,\)": lambda: merge_hydralora(tiny(), torch.ones(3)),
    "gates: missing layers .*'layers.1.v_proj'": lambda: merge_hydralora(tiny(), SOME),
    r"unknown layers \['z'\]": lambda: export_lora(tiny(["layers.0.q_proj"]), SOME | {"z": GATES}),
    "no HydraLoRALinear": lambda: merge_hydralora(merged_tiny()[0], GATES),
    "model has no HydraLoRA": lambda: record_gates(merged_tiny()[0]).__enter__(),
    "has no HydraLoRALinear: not": lambda: hydralora_state_dict(merged_tiny()[0]),
    "no merged nn.Linear at": lambda: unmerge_hydralora(tiny(), merged_tiny()[1]),
    r"nn.Linear at \['z'\]": lambda: unmerge_hydralora(merged_tiny()[0], {"z": layer()}),
    "model is itself the layer": lambda: merge_hydralora(layer(), GATES),
    "batches: no token reached .*layers.0.q_proj": lambda: mean_gates(tiny(), []),
    "shorter": lambda: mean_gates(tiny(), [IDS, IDS], [torch.ones(3, 11)]),
    # inject
    "it has none": lambda: inject_hydralora(nn.Linear(2, 2), ""),
    "'qkv' matches no nn.Linear .* layers.0.q_proj, layers.0.k_proj":
        lambda: inject_hydralora(plain_tiny(), ["q_proj", "qkv"]),
    "'proj' matches no": lambda: inject_hydralora(plain_tiny(), "proj"),
    "at least one nn.Linear, got none": lambda: inject_hydralora(plain_tiny(), []),
    "'q_proj' is injected already, at layers.0.q_proj": lambda: inject_hydralora(tiny(), "q_proj"),
    "'q_proj.base' matches no nn.Linear": lambda: inject_hydralora(tiny(), "q_proj.base"),
    "r must be": lambda: inject_hydralora(plain_tiny(), "q_proj", r=0),
    "'linear1' cannot be adapted, its TransformerEncoderLayer reads the weight":
        lambda: inject_hydralora(nn.TransformerEncoderLayer(8, 2), "linear1"),
    "'self_attn.out_proj' cannot be adapted, its MultiheadAttention":
        lambda: inject_hydralora(nn.TransformerDecoderLayer(8, 2), "out_proj"),
    # files
    **{f"layer 'layers.0.q_proj' has no values{some}": call for some, call in {
        "": lambda: load_hydralora_state_dict(tiny().to("meta"), state()),
        ": ": lambda: merge_hydralora(tiny().to("meta"), GATES),
        ": its": lambda: hydralora_state_dict(tiny().to("meta")),
        ": its ": lambda: export_lora(tiny().to("meta"), GATES)}.items()},
    r"missing \['layers.0.q_proj.lora_A'\]": lambda: load_hydralora_state_dict(
        tiny(), state(**{A_0: None})),
    r"unexpected \['z'\]": lambda: load_hydralora_state_dict(tiny(), state(z=torch.zeros(1))),
    r"lora_A': 'Tensor \(2, 64\) for \(3, 64\)'": lambda: load_hydralora_state_dict(
        tiny(), state(**{A_0: torch.zeros(2, 64)})),
    "'ndarray ": lambda: load_hydralora_state_dict(tiny(), state(**{A_0: np.zeros((R, 64))})),
    r"Tensor \(3, 64\) for": lambda: load_hydralora_state_dict(
        tiny(), state(**{A_0: torch.zeros(R, 64, device="meta")})),
    "'q.weight' is no key": lambda: from_official_state_dict({"q.weight": torch.zeros(1)}),
    "'q.lora_A.bias' is no": lambda: from_official_state_dict({"q.lora_A.bias": torch.zeros(2)}),
    "'q' needs .* got .*lora_B2": lambda: from_official_state_dict(
        official(lora_B1=None, lora_B2=(4, 2))),
    "'q' needs lora_A": lambda: from_official_state_dict(official(lora_route=None)),
    "needs lora_A": lambda: from_official_state_dict(official(lora_B0=None, lora_B1=None)),
    r"lora_B1': \(3, 2\)": lambda: from_official_state_dict(official(lora_B1=(3, 2))),
    r"'lora_A': \(2,\)": lambda: from_official_state_dict(official(lora_A=(2,))),
    "state: is empty": lambda: from_official_state_dict({}),
    r"lora_route': \(3, 5\)": lambda: from_official_state_dict(official(lora_route=(3, 5))),
    "'q' has lora_A with and without the prefix": lambda: from_official_state_dict(
        official() | {f"base_model.model.{key}": t for key, t in official().items()}),
    # choosing n
    "number of documents, 2, got 3": lambda: num_heads_from_corpus([[1], [2]], max_heads=3),
    "max_heads must be .* got 0": lambda: num_heads_from_corpus([[1], [2]], max_heads=0),
    "got one string": lambda: num_heads_from_corpus("one string"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


def test_bad_input_changes_nothing():
    model = plain_tiny()
    for targets, arguments in ((["q_proj", "x"], {}), (["q_proj"], {"lora_dropout": 2})):
        with pytest.raises(ValueError):
            inject_hydralora(model, targets, **arguments)
        assert not hydralora_layers(model) and all(p.requires_grad for p in model.parameters())
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="'1' is not a real nn.Linear"):
        inject_hydralora(model, ["0", "1"])
    assert not hydralora_layers(model) and all(p.requires_grad for p in model.parameters())
    model = tiny()
    before, logits = copy.deepcopy(hydralora_state_dict(model)), model(IDS)
    last = {"layers.1.v_proj.router.weight": np.zeros((N, 64))}
    doubled = {key: 2 * t for key, t in before.items()}
    for call, argument in ((merge_hydralora, SOME), (merge_hydralora, torch.ones(3)),
                           (load_hydralora_state_dict, doubled | last)):
        with pytest.raises(ValueError):
            call(model, argument)
        assert all(torch.equal(t, before[key]) for key, t in hydralora_state_dict(model).items())
        assert torch.equal(model(IDS), logits)


def test_a_harmless_hook_or_forward_on_the_base_can_be_merged():
    m, seen, x = layer(), [], tokens(9, K)
    m.base.register_forward_hook(lambda module, inputs, y: seen.append(len(inputs)))

    class Same(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)
    other = with_base(Same(K, D, dtype=torch.float64))
    nn.init.normal_(other.lora_B)
    for m in (m, other):
        A, B = m.to_lora(GATES)
        expected = m.base(x) + m.scaling * x @ A.T @ B.T
        torch.testing.assert_close(m.merge(GATES)(x), expected, rtol=0, atol=1e-12)


# ---- Choosing n ------------------------------------------------------------------------------


def corpus(domains, seed, documents=240, vocabulary=40, length=25, shares=None):
    """Documents of token ids; each domain has its own distribution over the vocabulary."""
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(vocabulary, 0.2), size=domains)
    which = np.arange(documents) % domains if shares is None else rng.choice(
        domains, documents, p=shares)
    return [rng.choice(vocabulary, size=length, p=topics[i]).tolist() for i in which]


@pytest.mark.parametrize("domains", range(1, 11))
def test_num_heads_finds_the_domains_and_invents_none(domains):
    found = [num_heads_from_corpus(corpus(domains, seed))[0] for seed in range(10)]
    assert found.count(domains) >= 9, found


def test_num_heads_of_other_corpora(monkeypatch):
    rng = np.random.default_rng(0)
    disjoint = [(50 * (i % 10) + rng.integers(0, 50, 40)).tolist() for i in range(200)]
    assert num_heads_from_corpus(disjoint)[0] == 10
    large = corpus(4, 0, vocabulary=1000, length=60, documents=300)
    assert num_heads_from_corpus(large)[0] == 4
    for seed in range(5):
        assert num_heads_from_corpus(corpus(3, seed, shares=[0.6, 0.3, 0.1]))[0] == 3
    monkeypatch.setattr(hydralora, "MOST_DOCUMENTS", 100)
    one, other = (num_heads_from_corpus(disjoint, seed=seed)[1] for seed in (1, 2))
    assert one != other


def test_num_heads_of_strings_tensors_and_seeds():
    documents = corpus(3, 0)
    n, sse = num_heads_from_corpus(documents)
    assert n == 3 and len(sse) == 10 and all(a >= b for a, b in zip(sse, sse[1:]))
    words = [[f"word{i}" for i in d] for d in documents]
    for same in (documents, [torch.tensor(d) for d in documents], words,
                 [list(map(torch.tensor, d)) for d in documents],
                 ["  ".join(d) + "\n" for d in words]):
        assert num_heads_from_corpus(same, seed=7) == (n, sse)


@pytest.mark.parametrize("gains, n, factor", [
    ([40, 20, 4, 4, 4, 4], 3, 5),           # by a factor, not by a difference
    ([10, 4, 12, 1, 1, 1], 4, 4),           # the least gain so far counts: 4 of 10, 4, 12
    ([12, 4, 4, 4, 4, 5], 2, 2.4),          # the three after max_heads count too
    ([50, 1e-5, 1e-9, 0, 0, 0], 2, 5e4)])   # rounding alone is no gain
def test_elbow_by_hand(gains, n, factor, monkeypatch):
    sse = [100 - sum(gains[:i]) for i in range(7)]
    monkeypatch.setattr(hydralora, "_k_means_sse", lambda X, largest, max_heads: sse[:largest])
    assert hydralora._elbow([[i] for i in range(20)], 4) == (n, pytest.approx(factor), sse[:4])


def test_elbow_has_to_exceed_chance_by_half(monkeypatch):
    documents, seen = [list(range(i, i + 7)) for i in range(20)], []
    for factor, chance, n in ((2.31, 1, 3), (2.29, 1, 1), (4.51, 3, 3), (4.49, 3, 1)):
        results = iter([(3, factor, []), *((2, chance + c, []) for c in (0, -0.5, 0.5))])
        monkeypatch.setattr(hydralora, "_elbow", lambda documents, max_heads: (
            seen.append(documents), next(results))[1])
        assert num_heads_from_corpus(documents)[0] == n
    for dealt in seen[1:4]:                         # the same tokens, in documents of the same size
        assert sorted(sum(dealt, [])) == sorted(sum(documents, [])) and dealt != documents
        assert [len(d) for d in dealt] == [7] * 20


def test_tf_idf_by_hand():
    a, b = 2 * (1 + math.log(3 / 2)), 1             # a in one of two documents, b in both
    cosine = b / math.hypot(a, b)
    torch.testing.assert_close(hydralora._tf_idf_products([list("aab"), ["b"]]),
                               torch.tensor([[1, cosine], [cosine, 1]]))
    assert hydralora._tf_idf_products([[], ["a"]]).tolist() == [[0, 0], [0, 1]]


def test_sse_of_cases_by_hand():
    """Two documents each of two words that never meet: unit vectors at a distance of sqrt 2.

    One centre, at their middle, is 1/sqrt 2 from each of the four: SSE 4/2 = 2. Two: SSE 0.
    """
    n, sse = num_heads_from_corpus(["a", "b", "a a", "b b"], max_heads=3)
    np.testing.assert_allclose(sse, [2, 0, 0], atol=1e-5)
    X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).double()
    sse = hydralora._k_means_sse((X @ X.T).float(), 3, 3)
    assert sse[0] == pytest.approx((X - X.mean(0)).square().sum().item(), rel=1e-4)


# ---- The toy ---------------------------------------------------------------------------------


def train_toy():
    return importlib.import_module("train_toy")


def test_nmi_of_cases_by_hand():
    toy, domain = train_toy(), torch.arange(4).repeat(5)
    sure = F.one_hot(domain, 4).float()[:, None]                    # a head for each domain
    assert toy.nmi(sure, domain) == pytest.approx(1)
    assert toy.nmi(torch.full((20, 1, 4), 0.25), domain) == pytest.approx(0, abs=1e-9)
    pairs = F.one_hot(domain // 2, 4).float()[:, None]              # I = ln 2, H = ln 4 and ln 2
    assert toy.nmi(pairs, domain) == pytest.approx(2 / 3)


def test_gates_as_far_as_the_symbol_alone_gives_them():
    domain = torch.arange(4).repeat_interleave(24)
    plain = torch.arange(24).repeat(4)[:, None]         # each domain has each symbol once
    by_symbol = F.one_hot(plain % 4, 4).float()
    alone = train_toy().of_symbol_alone
    torch.testing.assert_close(alone(by_symbol, plain), by_symbol)
    by_domain = F.one_hot(domain, 4).float()[:, None]
    torch.testing.assert_close(alone(by_domain, plain), torch.full((96, 1, 4), 0.25))


@pytest.fixture
def short(monkeypatch):
    """The toy with few steps."""
    toy = train_toy()
    for name, value in dict(PRETRAIN_STEPS=15, STEPS=15, EVALUATION=500).items():
        monkeypatch.setattr(toy, name, value)
    return toy


def test_cosine_knock_out_and_a_router_with_labels(short):
    assert short.cosine(torch.eye(3).view(3, 1, 3)) == pytest.approx(0)
    assert short.cosine(torch.eye(3)[:1].repeat(4, 2, 1)) == pytest.approx(1)
    world = short.World(0, 4, "cpu")
    model = short.adapt(world.model, 0, n=2)
    where, B = "layers.1.o_proj", hydralora_layers(model)["layers.1.o_proj"].lora_B.data
    right = lambda: short.means(short.accuracy(
        short.logits_of(model, world.tokens), world.tokens), world.domain)
    frozen = right()
    nn.init.normal_(B[0])                               # head 0 acts, head 1 is zero
    before = right()
    lost = np.array(short.knock_out(model, where, world))
    np.testing.assert_allclose(lost[:, 0], np.array(before) - frozen)
    assert abs(lost[:, 0]).max() > 1 and not np.array_equal(lost[:, 1], lost[:, 0])
    B[1] = B[0]                                         # equal heads: the other takes it all over
    np.testing.assert_allclose(short.knock_out(model, where, world), 0, atol=0.2)
    probe = short.with_labels(model, world)[where]
    assert (probe.argmax(-1) == world.domain[:, None]).double().mean() > 0.5


def test_bayes_accuracy_of_a_case_by_hand():
    toy = train_toy()
    c = toy.Corpus(0, 4)
    c.frequencies = torch.full_like(c.frequencies, 1 / toy.SYMBOLS)     # domains look alike,
    c.new = torch.stack([torch.arange(toy.SYMBOLS).roll(i) for i in range(4)])
    tokens, _ = c.sample(20000, "test", c.new)      # so the first symbol is a guess among 4
    expected = 1 - 0.75 / toy.LENGTH                # ciphers, and then gives the cipher away
    assert c.bayes_accuracy(tokens) == pytest.approx(expected, abs=0.005)


def test_data_sets_have_their_purity():
    toy, domain = train_toy(), torch.arange(4).repeat(5000)
    for purity in (0, 0.5, 1):
        data_set = toy.data_sets(domain, purity, toy.stream(0, "test labels"))
        own = (data_set == domain).double().mean().item()
        assert own == pytest.approx(purity + (1 - purity) / 4, abs=0.01)


def test_methods_are_what_their_names_say():
    toy, x = train_toy(), tokens(3, 8, 64, dtype=torch.float32)
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig())
    fresh = lambda **method: toy.adapt(model, 0, **{"n": 4} | method).layers[1].o_proj
    m = fresh(whole=True)
    nn.init.normal_(m.lora_B)
    expected, A = m.base(x), m.lora_A.unflatten(0, (4, toy.RANK))
    for i in range(4):
        expected = expected + m.gates(x)[..., i, None] * (x @ A[i].T @ m.lora_B[i].T) * 2.0
    torch.testing.assert_close(m(x), expected)
    m = fresh(gates="label")
    m.router.labels = torch.tensor([2, 0, 3])
    one_hot = F.one_hot(m.router.labels, 4).float()[:, None]
    assert torch.equal(m.gates(x), one_hot.expand(3, 8, 4))
    assert torch.equal(fresh(gates="equal").gates(x), torch.full((3, 8, 4), 0.25))
    assert torch.equal(fresh(gates="equal").lora_A, fresh().lora_A)         # one start for all
    A = fresh(whole=True, one_A=True).lora_A
    assert torch.equal(A, A[:toy.RANK].repeat(4, 1))


def test_sizes_are_equal_where_the_table_says_so():
    toy, model, size = train_toy(), TinyTransformer(TinyConfig()), {}
    for name, method in toy.all_methods().items():
        adapter = {key: v for key, v in method.items() if key not in (
            "lr", "purity", "domains", "paper")}
        parameters = toy.adapt(model, 0, **adapter).parameters()
        size[name] = sum(p.numel() for p in parameters if p.requires_grad)
    same = {name: name.replace("LoRA, same size", "HydraLoRA") for name in size if " on " in name}
    same |= {name: "HydraLoRA" for name in size if name.endswith("same size")}
    same |= {name: name.replace("whole LoRAs r=2", "HydraLoRA r=3").replace(
        "whole LoRAs r=4", "HydraLoRA r=6") for name in size if name.startswith("whole LoRAs r=")}
    same["whole LoRAs, true gate, same size"] = "HydraLoRA, true gate"
    same.pop("router on A x")
    assert len(same) == 11 and all(size[a] == size[b] for a, b in same.items())


def go(toy, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options])
    return toy.main()


def test_toy_writes_what_it_measured_and_repeats_itself(short, monkeypatch, tmp_path, capsys):
    file = tmp_path / "result.json"
    file.write_text("kept until the end")
    results = []
    for _ in range(2):
        assert go(short, monkeypatch, "--json", str(file)) == 0
        results.append(json.loads(file.read_text()))
    result = results[0]
    assert results[1] == result and os.listdir(tmp_path) == ["result.json"]
    assert list(result["methods"]) == list(short.methods()) and result["num_heads"] == 4
    for method in result["methods"].values():
        assert method["accuracy"] == pytest.approx(sum(method["by_domain"]) / 4, abs=2)
    assert 99 < result["bayes"] < 100
    assert np.allclose(np.array(result["specialisation"]["gates"]).sum(1), 1, atol=1e-5)
    assert np.array(result["specialisation"]["lost"]).shape == (4, 4)
    merge = result["merging"]
    assert merge["accuracy"]["routed"] == result["methods"]["HydraLoRA"]["accuracy"]
    assert merge["error"]["mean gates"] > merge["error"]["routed"] == 0
    assert merge["error_if_held"] < 1e-5
    assert "HydraLoRA is " in capsys.readouterr().out


@pytest.mark.parametrize("options, said", [
    (["--seed", "-1"], "--seed"), (["--heads", "0"], "--heads: must be from 1"),
    (["--json", "/no/such/folder/x"], "--json: /no/such/folder/x: "), (["--json", "/"], "folder"),
    (["--paper", "--seed", "1"], "belong to the main run"), (["--cost", "--tune"], "not allowed"),
    (["--device", "mps" if torch.cuda.is_available() else "cuda"], "PyTorch finds none")], ids=str)
def test_toy_refuses_options_in_one_line(options, said, short, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        go(short, monkeypatch, *options)
    message = capsys.readouterr().err
    assert end.value.code == 2 and said in message and message.count("\n") == 1


def test_toy_check_fails_where_the_heads_cannot_specialise(short, monkeypatch):
    assert go(short, monkeypatch, "--check", "--heads", "1", "--seed", "3") == 1


def test_paper_and_tune_print_the_tables_of_the_readme(short, monkeypatch, capsys):
    for name, value in dict(PRETRAIN_STEPS=1, STEPS=1, EVALUATION=60, GRID=(1e-2,)).items():
        monkeypatch.setattr(short, name, value)
    monkeypatch.setattr(short, "num_heads_from_corpus", lambda documents: (4, []))
    pool = SimpleNamespace(imap=map)
    monkeypatch.setattr(short.multiprocessing, "get_context", lambda how: SimpleNamespace(
        Pool=lambda *arguments: contextlib.nullcontext(pool)))
    for seeds in ("REPORTED_SEEDS", "TUNING_SEEDS"):
        monkeypatch.setattr(short, seeds, range(2))
    assert go(short, monkeypatch, "--paper") == 0
    number = r"[-+]?\d[\d.,]*( \+- [\d.]+)?( of \d)?"
    words = lambda line: re.sub(r"[-|\s]+", " ", re.sub(number, "", line))
    printed = {words(line) for line in capsys.readouterr().out.splitlines() if line}
    missing = printed - {words(line) for line in README.splitlines()}
    assert len(printed) > 25 and not missing, missing
    assert go(short, monkeypatch, "--tune") == 0
    assert all(f"| {name} " in out for out in [capsys.readouterr().out] for name in short.methods())


def test_bytes_kept_for_backward_are_those_it_needs(monkeypatch):
    toy = train_toy()
    for row in toy.cost("cpu", rounds=1, warm_up=0)["rows"]:
        saved = row["saved_bytes"]
        assert 40 * saved["hydralora"] < saved["loop"]
        assert row["bound_bytes"] <= saved["hydralora"] < 1.01 * row["bound_bytes"]


# ---- README ----------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""


def test_readme_python_blocks_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        if "transformers" in block and not importlib.util.find_spec("transformers"):
            continue
        capsys.readouterr()
        exec(compile(block, "README.md", "exec"), {})
        said = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
        promised = re.findall(r"^ *print\(.*\) +# (.*)$", block, re.M)
        assert said[-len(promised):] == promised if promised else True, block


def test_readme_names_exist():
    """Every name in code type in the README's tables is in one of the three files."""
    rows = [line for line in README.splitlines() if line.startswith("|")]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    options = (HERE / "train_toy.py").read_text(encoding="utf-8")
    for name in names:
        if name.startswith("--"):
            assert name[2:] in options, name
        else:
            owner, *attributes = re.sub(r"\(.*", "", name).split(".")
            places = [p for p in (hydralora, train_toy()) if hasattr(p, owner)]
            assert (HERE / name).exists() or places and (
                not attributes or hasattr(getattr(places[0], owner), attributes[0])), name


# ---- In real projects ------------------------------------------------------------------------
# Random weights from small configurations: nothing is downloaded.

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = SMALL | dict(vocab_size=99)
GROUPED = TEXT | dict(num_key_value_heads=2)
T5 = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
          decoder_start_token_id=0)
ARCHITECTURES = {   # name: configuration, its arguments, model class, targets
    "Llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM", ["q_proj", "v_proj"]),
    "Qwen2": ("Qwen2Config", GROUPED, "Qwen2ForCausalLM", ["q_proj", "v_proj", "o_proj"]),
    "GPTNeoX": ("GPTNeoXConfig", TEXT, "GPTNeoXForCausalLM", ["query_key_value"]),
    "T5": ("T5Config", T5, "T5ForConditionalGeneration", ["q", "v", "wo"]),
    "ViT": ("ViTConfig", SMALL | dict(image_size=8, patch_size=4, num_labels=5),
            "ViTForImageClassification", ["attention.q_proj", "attention.v_proj"]),
}


def hugging_face(name):
    """A small random model, its targets and inputs with labels."""
    transformers = pytest.importorskip("transformers")
    config, arguments, model_class, targets = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config)(**arguments)).eval()
    ids = torch.randint(2, 99, (4, 12), generator=torch.Generator().manual_seed(1))
    inputs = dict(input_ids=ids, labels=ids) if name != "ViT" else dict(
        pixel_values=tokens(4, 3, 8, 8, dtype=torch.float32), labels=torch.arange(4))
    return model, targets, inputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_injection_training_and_generation(name):
    model, targets, inputs = hugging_face(name)
    model.requires_grad_(False)         # PyTorch picks another attention kernel for T5's position
    before = model(**inputs).logits     # bias where that needs a gradient
    frozen = copy.deepcopy(model.state_dict())
    inject_hydralora(model, targets, r=4)
    assert torch.equal(model(**inputs).logits, before)
    losses = fit(model.train(), lambda model: model(**inputs).loss, 20, lr=3e-2)
    assert losses[-1] < 0.97 * losses[0]
    for key, value in model.state_dict().items():
        key = key.replace(".base.", ".")
        assert key not in frozen or torch.equal(value, frozen[key])
    model.eval()
    if name != "ViT":
        settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        one, other = (model.generate(inputs["input_ids"], use_cache=cache, **settings)
                      for cache in (True, False))
        assert torch.equal(one, other)
    fresh, _, _ = hugging_face(name)
    load_hydralora_state_dict(inject_hydralora(fresh, targets, r=4), hydralora_state_dict(model))
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


def test_transformers_gradient_checkpointing_and_compile():
    model, targets, inputs = hugging_face("Llama")
    inject_hydralora(model, targets, r=4)
    fit(model, lambda model: model(**inputs).loss, 3)
    compiled, ids = torch.compile(model, fullgraph=True, backend="aot_eager"), inputs["input_ids"]
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits,
                               model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(*gradients)


def test_transformers_conv1d_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(ValueError, match="'c_attn' matches no nn.Linear .* lm_head"):
        inject_hydralora(transformers.GPT2LMHeadModel(config), "c_attn")


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_peft_loads_the_exported_lora(name, tmp_path):
    peft, safetensors = pytest.importorskip("peft"), pytest.importorskip("safetensors.torch")
    model, targets, inputs = hugging_face(name)
    inject_hydralora(model, targets if name == "T5" else ["0.self_attn.q_proj"], r=4)
    if name == "Llama":         # another rank and alpha, and a name that ends like another layer's
        inject_hydralora(model, "1.self_attn.v_proj", r=2, lora_alpha=3)
    fit(model, lambda model: model(**inputs).loss, 5)
    gates = mean_gates(model, [inputs])
    adapter, config = export_lora(model, gates)
    safetensors.save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = peft.PeftModel.from_pretrained(hugging_face(name)[0], tmp_path).eval()
    lora = peft.tuners.lora.LoraLayer
    adapted = {n for n, m in loaded.named_modules() if isinstance(m, lora)}
    assert adapted == {f"base_model.model.{n}" for n in hydralora_layers(model)}
    merge_hydralora(model, gates)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, fresh = tiny(), tiny(random_heads=False)
    safetensors.save_file(hydralora_state_dict(model), tmp_path / "adapter.safetensors")
    load_hydralora_state_dict(fresh, safetensors.load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(fresh(IDS), model(IDS))


# Two processes on the loopback interface; each compares with one process.

WORKER = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
from test_hydralora import *
rank, mode = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method={rendezvous!r}, rank=rank, world_size=2)
ids = torch.cat([IDS, IDS.flip(1)])[:4]
mine = ids[2 * rank:2 * rank + 2]

if mode == "ddp":
    model, single = tiny(), tiny()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):          # the second forward fails if a parameter had no gradient
        model.zero_grad()
        next_token_loss(parallel, mine).backward()
    next_token_loss(single, ids).backward()
    for p, q in zip(model.parameters(), single.parameters()):
        if q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)
else:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model, single = tiny(random_heads=False), tiny(random_heads=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    fit(model, lambda model: next_token_loss(model, mine), 5)
    fit(single, lambda model: next_token_loss(model, ids), 5)
    state = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, ignore_frozen_params=True))
    for call, *arguments in ((hydralora_state_dict,), (load_hydralora_state_dict, state),
                             (merge_hydralora, GATES), (export_lora, GATES)):
        with pytest.raises(ValueError, match="layer 'layers.0.q_proj' has no values"):
            call(model, *arguments)
    plain = tiny(random_heads=False)
    load_hydralora_state_dict(plain, state)
    for key, value in hydralora_state_dict(single).items():
        torch.testing.assert_close(hydralora_state_dict(plain)[key], value, rtol=0, atol=1e-4)
    merge_hydralora(plain, GATES), merge_hydralora(single, GATES)
    torch.testing.assert_close(plain(IDS), single(IDS), rtol=0, atol=1e-3)
dist.destroy_process_group()
os._exit(0)                     # PyTorch's threads sometimes abort an orderly exit
'''


def has_fsdp2():
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return False
    return callable(fully_shard)


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32",
                    reason="needs gloo")
@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(
    not has_fsdp2(), reason="this torch has no fully_shard"))])
def test_two_processes_train_as_one(mode, tmp_path):
    script = tmp_path / "worker.py"
    rendezvous = (tmp_path / "rendezvous").as_uri()
    script.write_text(WORKER.format(here=str(HERE), rendezvous=rendezvous))
    loopback = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    settings = dict(stderr=subprocess.PIPE, text=True, env=loopback)
    workers = [subprocess.Popen([sys.executable, str(script), str(rank), mode], **settings)
               for rank in range(2)]
    try:
        results = [(worker.communicate(timeout=120)[1], worker.returncode) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(code == 0 for _, code in results), "\n".join(text for text, _ in results)
