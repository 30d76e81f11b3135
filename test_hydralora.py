# SPDX-License-Identifier: MIT
"""A correctness oracle for HydraLoRA kernels, then the tests of this project.

A kernel is a function kernel(x, W0, bias, A, B, Wg, scaling) that returns y:

    y = W0 x + bias + scaling * sum_i w_i B_i A x,  w = softmax(Wg x)

    x (..., k)    W0 (d, k)     bias (d,) or None    scaling: a float
    A (r, k)      B (n, d, r)   Wg (n, k)            y (..., d), of x's dtype

The tests with "oracle" in their names test a kernel:

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle -x --tb=short

Without HYDRALORA_IMPL, they test this project's layer. HYDRALORA_DEVICE sets the device,
by default cuda if available.

A complete kernel takes any strides, any n, and any number of tokens, including none. It may
return no gradients of W0 and bias, since the base may be frozen. Under autocast, y may
have autocast's dtype or float32. A kernel that computes in TF32 fails the fp32 tests.

In 16 bits, a kernel may round each step, and add up the gradients of chunks of 32 tokens.
Smaller chunks must add up in float32. The tolerance is several times the error of such a
kernel: in bf16, an update that is 1% too large passes.

Most cases are drawn at random, always the same ones. The id of a test, such as
test_oracle_results[2-gradients-3d-odd-bias-fp32], says what the kernel must support.
Leave out what yours does not:

    -k "oracle and not gradients"       it has no backward
    -k "oracle and 3d and aligned"      x is (batch, tokens, k); 16 divides k, d and r
    -k "oracle and not empty"           there are tokens
    -k "oracle and not strided"         tensors are contiguous
    -k "oracle and nobias"              bias is None
    -k "oracle and not twice and not overwritten"    one backward, before any tensor changes
    -k "oracle and not fp64 and not mixed and not autocast"    one dtype, at most 32 bits
    -k "oracle and not slow and fp32"   for a first verdict, in seconds

test_oracle_results names the simplest case that fails in the same way, such as
Case(dtypes='bf16', bias=False). To repeat it, or to test your own sizes:

    from test_hydralora import *
    from my_module import my_kernel
    check(Call(my_kernel, Case(dtypes='bf16', bias=False)))
    check(Call(my_kernel, Case(lead=(1, 2048), k=4096, d=11008, r=16, n=3)))

This file has five rooms. To understand what is tested, read the first, and stop there:

    1  The oracle            the definition, the cases, the correct results, a call, the tests
    2  What a failure says   where, by how much, and in which simplest case
    3  Does it notice?       mistakes that it must catch, and how to add to the oracle
    4  The layer             tests of this project's hydralora.py
    5  The toy               tests of train_toy.py and of README.md
"""
import collections
import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import os
import pkgutil
import random
import re
import sys
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hydralora import (
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, export_lora, hydralora_layers,
    hydralora_state_dict, inject_hydralora, load_hydralora_state_dict, mean_gates, merge_hydralora,
    record_gates)

parametrize = pytest.mark.parametrize


# ==== 1. The oracle ====

# ---- The definition ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TRAINED = ("x", "A", "B", "Wg")  # these need a gradient even if the base is frozen


def definition(x, W0, bias, A, B, Wg, scaling, softmax=nn.Softmax(-1)):
    """Eqs. 3 and 4, with a scaling. Computed in float64, its y and its gradients are the
    correct values. Computed in a kernel's dtypes, its errors set the tolerance."""
    y = F.linear(x, W0, bias)              # (..., d)
    x = x.to(A.dtype)                      # (..., k)
    w = softmax(F.linear(x, Wg))           # (..., n)
    z = F.linear(x, A)                     # (..., r)
    for w_i, B_i in zip(w.unbind(-1), B):  # (...), (d, r)
        y = y + (scaling * w_i[..., None] * F.linear(z, B_i)).to(y.dtype)
    return y


def in_another_order(x, W0, A, B, **others):
    """The definition on 32 tokens at a time, whose gradients autograd adds up, and with the
    steps of softmax. Each B_i A is computed first and takes the place of B_i, and the
    identity takes that of A."""
    def softmax(logits):
        return F.normalize((logits - logits.amax(-1, True)).exp(), p=1, dim=-1)

    others |= dict(A=torch.eye(A.shape[1]).to(A), B=B @ A, softmax=softmax)
    y = [definition(chunk, W0, **others) for chunk in x.reshape(-1, x.shape[-1]).split(32)]
    return torch.cat(y).view(*x.shape[:-1], len(W0))


def read_settings():
    """Returns the device and the kernel, or None for this project's layer (room 4)."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
    device = settings.pop("HYDRALORA_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    name = settings.pop("HYDRALORA_IMPL", None)
    kernel = name and pkgutil.resolve_name(name)
    if settings or not callable(kernel or print):
        raise ValueError(f"{[*settings] or name}: use HYDRALORA_IMPL=module:function")
    return device, kernel


DEVICE, IMPLEMENTATION = read_settings()


# ---- The cases ----
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Dtypes = collections.namedtuple("Dtypes", "x base adapter autocast least")
DTYPES = {  # of x and y, of W0 and bias, of A, B and Wg; autocast's; the least tolerance
    "fp64": Dtypes(f64, f64, f64, None, 1e-10),
    "fp32": Dtypes(f32, f32, f32, None, 1e-4),  # enough for sums in any order, but not for TF32
    "bf16": Dtypes(bf16, bf16, bf16, None, 2**-7),
    "fp16": Dtypes(f16, f16, f16, None, 2**-9),
    "mixed-bf16": Dtypes(bf16, bf16, f32, None, 2**-7),
    "mixed-fp16": Dtypes(f16, f16, f32, None, 2**-9),
    "autocast-bf16": Dtypes(bf16, f32, f32, bf16, 2**-7),
    "autocast-fp16": Dtypes(f32, f32, f32, f16, 2**-9),
}
MODES = {"gradients": torch.enable_grad, "values": torch.no_grad, "inference": torch.inference_mode}


@dataclass(frozen=True)
class Case:
    """All that decides what a call is given, and what the test does with it."""
    dtypes: str = "fp32"
    mode: str = "gradients"
    lead: tuple = (2, 5)  # axes of x before k: () is one token, (5,) a sequence
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    factors: dict = field(default_factory=dict, hash=False)  # name -> multiplies this tensor
    layouts: dict = field(default_factory=dict, hash=False)  # name -> a row of LAYOUTS
    reversed: str = ""  # the tensor whose elements, but for the first, are in reverse order
    spoiled: str = ""  # the tensor whose last element is nan, or inf in grad_y
    seed: int = 0
    # These change no correct result:
    frozen: tuple = field(default=(), compare=False)  # what does not require grad
    filled: bool = field(default=False, compare=False)  # PyTorch fills new memory with nan
    changed: str = field(default="", compare=False)  # y, or an input: changed before the backward
    passes: int = field(default=1, compare=False)  # backward passes

    def __repr__(self):
        changed = [f"{k}={v!r}" for k, v in vars(self).items() if v != getattr(Case(), k)]
        return f"Case({', '.join(changed)})"

    @property
    def inputs(self):
        return [name for name in INPUTS if self.bias or name != "bias"]

    @property
    def id(self):
        odd = self.k % 16 or self.d % 16 or self.r % 16
        words = [self.mode, f"{len(self.lead) + 1}d", "odd" if odd else "aligned"]
        more = dict(empty=0 in self.lead, strided=self.layouts, frozen=self.frozen,
                    nan=self.spoiled, overwritten=self.changed, twice=self.passes > 1)
        words += [word for word, present in more.items() if present]
        return "-".join([*words, "bias" if self.bias else "nobias", self.dtypes])


def before_nan(t):
    """Returns a contiguous copy of t, in memory that goes on with nan."""
    return torch.cat([t.flatten(), t.new_full([1024], math.nan)])[:t.numel()].view(t.shape)


def with_gaps(t, axis):
    """Returns a copy of t, in memory with one more axis, of size 2."""
    return before_nan(torch.stack([t, torch.full_like(t, 9999.0)], axis)).select(axis, 0)


def moved(t, axis, to):
    """Returns a copy of t, in whose memory this axis stands elsewhere."""
    return before_nan(t.movedim(axis, to)).movedim(to, axis)


def repeated(t, axis):
    """Repeats the first part of t along this axis, with stride 0."""
    return before_nan(t.narrow(axis, 0, 1)).expand(t.shape)


LAYOUTS = {  # how a tensor of two or more axes lies in memory, if not contiguous
    "offset": lambda t: before_nan(torch.cat([t.new_zeros(3), t.flatten()]))[3:].view(t.shape),
    "gaps": lambda t: with_gaps(t, -1),           # as x[..., ::2]
    "wide-rows": lambda t: with_gaps(t, -2),      # as qkv[..., :k]
    "last-tokens": lambda t: with_gaps(t, 1),     # as x[:, -1:]
    "transposed": lambda t: moved(t, -1, -2),     # as W.T
    "tokens-first": lambda t: moved(t, -2, 0),
    "one-value": lambda t: (t.flatten()[0] / 8).expand(t.shape),  # as the gradient of y.sum()
    "one-batch": lambda t: repeated(t, 0),
    "one-token": lambda t: repeated(t, -2),       # as the gradient of y.sum(-2)
}
SIZES = [  # of k and d, and ranks
    ((16, 32, 64, 128, 256), (16, 32, 64)),
    ((1, 3, 4, 7, 8, 20, 33, 64, 73, 128, 150, 256), (1, 3, 4, 8, 16, 33, 64))]
LEADS = ((), (1,), (1, 1), (5,), (40,), (131,), (2, 5), (0, 5), (1, 128), (2, 67), (3, 43),
         (16, 1), (300, 2), (2, 3, 10), (3, 1, 4), (2, 1, 3, 5))
FACTORS = ({}, {}, {}, {}, {},
           dict(B=0),     # as at the start of training
           dict(x=0),     # as padding
           dict(B=0.1),
           dict(Wg=30),   # exp(logit) may be inf or 0
           dict(x=8, W0=1 / 8, A=1 / 8, Wg=1 / 8))


def random_case(dtypes, seed):
    choose = random.Random(f"{dtypes} {seed}").choice
    sizes, ranks = choose(SIZES)
    k, d, r = choose(sizes), choose(sizes), choose(ranks)
    layout, named = choose([*LAYOUTS]), (*INPUTS, "grad_y")
    if layout.startswith("one-"):  # of all tensors, it would make gradients cancel
        named = ("W0", "bias", choose(["x", "grad_y"]))
    case = Case(
        dtypes, choose(["gradients", "gradients", "gradients", "values", "inference"]),
        choose(LEADS), k, d, r,
        n=choose([1, 2, 3, 4, 8, 11, 32, min(k, 20)]),
        bias=choose([True, False]),
        scaling=choose([1.75, 1.75, -0.4, 1.0, 4.0, 2.0**-6]),
        factors=choose(FACTORS),
        layouts=choose([{}, dict.fromkeys(named, layout)]),
        frozen=choose([(), (), tuple(name for name in INPUTS if choose([True, False]))]),
        filled=choose([True, False]), seed=seed)
    more, named = [{}, {}, {}, {}], case.inputs
    if case.mode == "gradients":
        more += [dict(passes=2), dict(changed=choose(["y", *named]))]
        named = [*named, "grad_y"]
    if case.n > 2:  # with fewer heads, a correct router may let no nan through
        more.append(dict(spoiled=choose(named)))
    return replace(case, **choose(more))


RANDOM = {dtypes: [Case(dtypes), *(random_case(dtypes, i) for i in range(100))]
          for dtypes in DTYPES}
RANDOM["fp32"] += [random_case("fp32", i) for i in range(100, 300)]
SQUARE = dict(k=64, d=64, r=16, n=8, bias=False)
GENERAL = [Case(dtypes, mode, filled=filled, **change)  # for tests with several calls
           for dtypes in DTYPES for change in ({}, SQUARE)
           for filled, mode in zip((False, True, True), MODES)]
LARGE = {
    "large-magnitude": dict(k=64, d=48, r=8, n=3, factors=dict(
        x=2.0**17, grad_y=2.0**-50, W0=2.0**-17, Wg=2.0**-17)),
    "large-logits": dict(lead=(40,), n=2, factors=dict(Wg=100)),  # exp(logit) is 0 for both
    "near-zero": dict(factors=dict(B=1e-4)),
    "many-heads": dict(lead=(2, 67), n=260),
    "past-tiles": dict(lead=(2, 67), k=577, d=131, r=33, n=35),
    "many-tokens": dict(lead=(1, 2500), k=128, d=128, r=16),
    # more blocks than a CUDA grid's y axis has
    "sequence": dict(lead=(1, 65540), k=16, d=16, r=16, n=2),
    # 11056 is 16 times a prime
    "long-input": dict(lead=(1, 1), k=11056, d=16, r=32, n=8),
    "long-output": dict(lead=(1, 1), k=48, d=11056, r=16, n=8, factors=dict(grad_y=2.0**17)),
    "wide-square": dict(lead=(1, 3), k=2048, d=2048, r=144, n=3),
    "many-wide": dict(lead=(1, 1040), k=2048, d=1040, r=16, n=3),
}


def large(name, dtypes):
    return [Case(dtypes, mode, filled=mode == "gradients", **LARGE[name])
            for mode in ("gradients", "values")]


def make(case):
    """Returns the inputs of a case, and grad_y, the gradient of y."""
    c, dtypes, made = case, DTYPES[case.dtypes], {}
    named = {*c.factors, *c.layouts, *c.frozen, c.reversed, c.spoiled, c.changed}
    if not named <= {*INPUTS, "grad_y", "y", ""}:
        raise ValueError(f"one of {named} is no tensor")
    for i, (name, std, shape, dtype) in enumerate([
            ("x", 1.0, (*c.lead, c.k), dtypes.x),
            ("W0", c.k**-0.5, (c.d, c.k), dtypes.base),
            ("bias", 1.0, (c.d,), dtypes.base),
            ("A", c.k**-0.5, (c.r, c.k), dtypes.adapter),
            ("B", c.r**-0.5, (c.n, c.d, c.r), dtypes.adapter),
            ("Wg", c.k**-0.5, (c.n, c.k), dtypes.adapter),
            ("grad_y", 1.0, (*c.lead, c.d), dtypes.autocast or dtypes.x)]):
        t = torch.from_numpy(np.random.default_rng([c.seed, i]).normal(size=shape))
        t *= std * c.factors.get(name, 1.0)
        if name == c.reversed:
            t = torch.cat([t.flatten()[:1], t.flatten()[1:].flip(0)]).view(shape)
        if name == c.spoiled and t.numel():
            t[(-1,) * t.dim()] = math.inf if name == "grad_y" else math.nan
        t = t.to(DEVICE, dtype)
        layout = LAYOUTS[c.layouts[name]] if name in c.layouts else before_nan
        try:
            t = layout(t)
        except (IndexError, RuntimeError):  # too few axes or elements
            t = before_nan(t)
        made[name] = t.requires_grad_(name in INPUTS and name not in c.frozen)
    return made if c.bias else made | {"bias": None}


# ---- The correct results ----
def as_float64(t):
    return t.detach().to("cpu", f64, copy=True)


def by_definition(tensors, case, function=definition):
    """Returns y and, in the mode "gradients", the gradients of sum(grad_y * y)."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in case.inputs}
    with torch.set_grad_enabled(case.mode == "gradients"):
        y = function(**{"bias": None} | leaves, scaling=case.scaling)
    if not y.requires_grad:
        return {"y": y}
    grads = torch.autograd.grad(y, [*leaves.values()], tensors["grad_y"].to(y.dtype))
    return {"y": y.detach()} | {f"{name}.grad": g for name, g in zip(leaves, grads)}


def finiteness(results):
    """Returns what is compared if a tensor has a nan or inf: y, and whether a gradient is not
    finite somewhere."""
    return {name: t if name == "y" else (~t.isfinite()).any().view(1, 1)
            for name, t in results.items()}


def norms_of(values, case, x, W0, A, B, Wg, grad_y, bias=None):
    """Returns the norms by which errors are divided: those of the correct values. But for x and
    Wg, a norm is at least that of the second term of softmax's derivative, with the norm of
    grad_y * update in the place of its sum. Where they cancel, rounding errors remain."""
    norms = {name: t.nan_to_num(0.0).norm().item() or 1.0 for name, t in values.items()}
    if "x.grad" in values and not case.spoiled:
        w, z = F.linear(x, Wg).softmax(-1), F.linear(x, A)
        update = case.scaling * torch.einsum("...n,...r,ndr->...d", w, z, B)
        second = w * (grad_y * update).norm(dim=-1, keepdim=True)  # (..., n)
        flat = second.reshape(-1, len(Wg)).T @ x.reshape(-1, x.shape[-1])
        for name, t in {"x.grad": second @ Wg, "Wg.grad": flat}.items():
            norms[name] = max(norms[name], t.norm().item())
    return norms


def errors(found, value, norm):
    """Returns the norms of the errors of rows and columns, relative to the norm of an
    average row or column. Where the correct value is nan, nan is no error."""
    found = as_float64(found)
    both_nan = found.isnan() & value.isnan()
    off = found.sub_(value).masked_fill_(both_nan, 0.0)
    parts = dict(rows=off.norm(dim=-1), columns=off.reshape(-1, off.shape[-1]).norm(dim=0))
    return {part: each.nan_to_num(math.inf) * each.numel()**0.5 / norm
            for part, each in parts.items()}


def largest(parts):
    return max(each.max().item() if each.numel() else 0.0 for each in parts.values())


@functools.lru_cache(320)
def correct(case):
    """Returns, for y and each gradient, the correct value, the norm by which errors are
    divided, and how large the error of a row or column may be:

        the least tolerance + 3 * the definition's error, in the kernel's dtypes

    In 16 bits, this error depends on the order, so it is the larger one of two orders, unless
    that takes long. In the gradients of x and Wg, it is 0 if the terms of softmax's derivative
    cancel exactly, so their least tolerance is 4 times as large, as with nan."""
    least, functions = DTYPES[case.dtypes].least, [definition]
    in_16_bits = least > 1e-4
    if in_16_bits and max(math.prod(case.lead), case.k, case.d) < 1000:
        functions.append(in_another_order)
    tensors = {name: t for name, t in make(case).items() if t is not None}
    exact = {name: as_float64(t) for name, t in tensors.items()}
    values = by_definition(exact, case)
    if "mixed" in case.dtypes:  # a kernel may compute in 16 bits
        tensors = {name: t.to(tensors["x"].dtype) for name, t in tensors.items()}
    with autocast(case):
        rounded = [by_definition(tensors, case, function) for function in functions]
    if case.spoiled:
        values, *rounded = map(finiteness, [values, *rounded])
        values = {name: as_float64(t) for name, t in values.items() if name == "y" or t.any()}

    norms, expected = norms_of(values, case, **exact), {}
    for name, value in values.items():
        error = max(largest(errors(each[name], value, norms[name])) for each in rounded)
        assert error < math.inf, f"the definition overflows in {case}"
        times = 4 if in_16_bits and (case.spoiled or name in ("x.grad", "Wg.grad")) else 1
        expected[name] = value, norms[name], times * least + 3 * error
    return expected


def wrong_ones(found, expected):
    """Returns the names of what is wrong: y, then the worst gradient first."""
    excess = {name: largest(errors(found[name], value, norm)) / allowed
              for name, (value, norm, allowed) in expected.items() if name in found}
    return sorted([name for name in excess if not excess[name] <= 1],
                  key=lambda name: (name != "y", -excess[name]))


# ---- A call ----
def autocast(case):
    dtype = DTYPES[case.dtypes].autocast
    return torch.autocast(torch.device(DEVICE).type, dtype or bf16, enabled=bool(dtype))


SETTINGS = {  # what reads a global setting -> what puts it back
    torch.is_grad_enabled: torch.set_grad_enabled,
    torch.get_default_dtype: torch.set_default_dtype,
    torch.get_num_threads: torch.set_num_threads,
    torch.get_float32_matmul_precision: torch.set_float32_matmul_precision,
    torch.get_deterministic_debug_mode: torch.set_deterministic_debug_mode,
    torch.initial_seed: torch.manual_seed,
}
REFUSED = "in-?place operation|modified inplace|donated"


class Call:
    """A call of a kernel, on these inputs or those of the case. The message of a failure
    begins with `moment`, and says whether the same call passes alone, if it is not alone."""

    def __init__(self, kernel, case, inputs=None, moment="", alone=False):
        self.kernel, self.case, self.moment, self.alone = kernel, case, moment, alone
        with MODES[case.mode]():
            self.inputs = dict(inputs or make(case))
        self.before = {name: t.detach().clone() for name, t in self.inputs.items()
                       if t is not None}
        self.leaves = {name: self.inputs[name] for name in case.inputs
                       if case.mode == "gradients" and name not in case.frozen}
        arguments = [self.inputs[name] for name in INPUTS]
        with MODES[case.mode](), autocast(case), self.guard("the call"):
            self.y = kernel(*arguments, case.scaling)
        self.check_y()
        self.grad_y = self.inputs["grad_y"].to(self.y.dtype)

    def check_y(self):
        y, dtypes, shape = self.y, DTYPES[self.case.dtypes], (*self.case.lead, self.case.d)
        allowed = [dtypes.autocast, f32] if dtypes.autocast else [dtypes.x]
        if not isinstance(y, torch.Tensor):
            self.fail(f"y is no tensor, but {type(y).__name__}")
        if y.shape != shape:
            self.fail(f"wrong shape: expected {shape}, found {(*y.shape,)}")
        if y.dtype not in allowed:
            self.fail(f"wrong dtype: expected one of {allowed}, found {y.dtype}")
        trained = TRAINED[:3] if self.case.n == 1 else TRAINED  # one gate is 1
        if y.numel() and not y.requires_grad and self.leaves.keys() & {*trained}:
            self.fail(f"y does not require grad, unlike {', '.join(self.leaves)}")

    @contextlib.contextmanager
    def guard(self, what):
        """What the kernel does here must not raise, or change a global setting or an input."""
        debug_mode = torch.get_deterministic_debug_mode()
        if self.case.filled:
            torch.set_deterministic_debug_mode("warn")  # PyTorch fills new memory
        settings = {get: get() for get in SETTINGS}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self.fail(describe_error(what, error), BY_DESIGN)
        finally:
            changed = [get for get in SETTINGS if get() != settings[get]]
            for get in changed:
                SETTINGS[get](settings[get])
            torch.set_deterministic_debug_mode(debug_mode)
        if changed:
            self.fail(f"{what} changed what torch.{changed[0].__name__} returns")
        for name, value in self.before.items():
            t = self.inputs[name]
            if not torch.allclose(t.detach(), value, rtol=0, atol=0, equal_nan=True):
                self.fail(f"{what} changed {name} in place")
            if t.requires_grad != (name in INPUTS and name not in self.case.frozen):
                self.fail(f"{what} changed {name}.requires_grad")
            if t.grad is not None:
                self.fail(f"{what} wrote to {name}.grad")

    def change(self, name):
        """Changes an element of y (as y += residual does) or of an input."""
        t = self.y if name == "y" else self.inputs[name]
        if t is not None and t.numel():
            t.detach()[(0,) * t.dim()].add_(9)
        if name in self.before:
            self.before[name] = t.detach().clone()

    def gradients(self, number=0):
        """Returns the gradients of a backward pass. A missing gradient of x, A, B or Wg counts
        as 0. PyTorch may refuse a pass after a change, or one of two. Then there is none."""
        leaves, case = self.leaves, self.case
        try:
            grads = torch.autograd.grad(self.y, [*leaves.values()], self.grad_y,
                                        retain_graph=number + 1 < case.passes, allow_unused=True)
        except RuntimeError as error:
            refused = REFUSED + "|second time|already unpacked" * (number > 0)
            if (case.changed or case.passes > 1) and re.search(refused, str(error)):
                return {}
            raise
        return {f"{name}.grad": torch.zeros_like(leaves[name]) if g is None else g
                for name, g in zip(leaves, grads) if g is not None or name in TRAINED}

    def results(self):
        """Returns y and the gradients, for each backward pass."""
        if not self.y.requires_grad:
            return [{"y": self.y}]
        y = self.y.detach()
        if self.case.changed:
            y = y.clone()
            self.change(self.case.changed)
        results = []
        for number in range(self.case.passes):
            with self.guard("the backward"):
                results.append({"y": y} | self.gradients(number))
        return results

    def compare(self, results):
        expected = correct(self.case)
        for found in results:
            if self.case.spoiled:
                found = finiteness(found)
            wrong = wrong_ones(found, expected)
            if wrong:
                self.fail(*describe(self.case, found, expected, wrong))

    def fail(self, message, advice=""):
        if not self.alone and not failure(self.kernel, self.case):
            advice = LEFT_BEHIND
        raise AssertionError("\n".join(filter(None, [
            f"{self.moment}{message}", f"in {self.case}", advice]))) from None


def check(*calls):
    """Runs the backward passes, neither in the order of the calls nor in reverse (a kernel
    may keep a queue or a stack). Compares results only then, since a call may overwrite
    those of another."""
    found = {call: call.results() for call in calls[::2] + calls[1::2]}
    for call in calls:
        call.compare(found[call])


# ---- The tests ----
@pytest.fixture
def implementation(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "8")  # not 1024, half a gigabyte
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(2**40)  # which no kernel sets
    torch.set_float32_matmul_precision("highest")
    yield IMPLEMENTATION
    torch.set_num_threads(threads)


def each_of(cases):
    return parametrize("case", [
        pytest.param(case, id=f"{i}-{case.id}") for i, case in enumerate(cases)])


@each_of(sorted(itertools.chain(*RANDOM.values()), key=lambda case: case.seed))
def test_oracle_results(implementation, case):
    message = failure(implementation, case, alone=False)
    if message:
        raise AssertionError(simplest(implementation, case, message))


@each_of(GENERAL + [
    replace(case, **change) for case in GENERAL[::6]  # in each dtypes
    for change in (dict(lead=(2, 0)), dict(layouts=dict.fromkeys(INPUTS, "tokens-first")))])
def test_oracle_calls_in_a_row(implementation, case):
    """The test makes calls with other tokens, weights, sizes and layouts, all before the
    first backward. They share the tensors that do not change. A correct kernel keeps no
    scaling, size, grid, gates or buffer of an earlier call. Then two calls add up in .grad."""
    changes = [
        {}, {}, dict(scaling=0.0), dict(scaling=-1.75), dict(lead=(2, 1)), dict(seed=1),
        dict(lead=(2, 67)), {}, dict(lead=(2, 1), seed=1), dict(r=32),
        dict(bias=False), dict(n=20), {}, dict(layouts={}), {}]
    start, calls = make(case), []
    for change in changes:
        now, what = replace(case, **change), ", ".join(f"{k}={v}" for k, v in change.items())
        inputs = make(now)
        for name in now.inputs:
            old, new = start[name], inputs[name]
            if old is not None and old.stride() == new.stride() and torch.equal(old, new):
                inputs[name] = old
        calls.append(Call(implementation, now, inputs, f"call {len(calls) + 1}, {what}: "))
    check(*calls)
    if start["x"].numel() and case.mode == "gradients":
        for call in [Call(implementation, case, start, "two calls: ") for _ in range(2)]:
            call.y.backward(call.grad_y)
        call.compare([{f"{name}.grad": start[name].grad / 2 for name in TRAINED}])


@each_of(GENERAL)
def test_oracle_changed_tensors(implementation, case):
    """Between calls, the test changes the values of an input, in place or in new memory
    (as offloading does), but not its version, sum or first element. A correct kernel uses
    the new values, in training and in evaluation."""
    if case.mode != "gradients":  # as in generation
        case = replace(case, lead=(2, 1), frozen=INPUTS)
    inputs = make(case)
    check(Call(implementation, case, inputs))
    for name, way in itertools.product(case.inputs, ("in place", "moved")):
        for now in (replace(case, reversed=name), case):
            new = make(now)[name].detach()
            if way == "moved":
                inputs[name].data = new
            else:
                inputs[name].data.copy_(new)
            for mode in sorted({case.mode, "values"}):
                check(Call(implementation, replace(now, mode=mode), inputs,
                           f"after {name} was changed ({way}): "))


@each_of(GENERAL)
def test_oracle_memory_is_freed(implementation, case):
    """With a correct kernel, x, y and grad_y are freed when the test drops them."""
    for with_backward in (True, False):
        call = Call(implementation, case)
        if with_backward:
            call.results()
        memory = dict(x=call.inputs["x"], y=call.y, grad_y=call.grad_y)
        memory = {name: StorageWeakRef(t.untyped_storage()) for name, t in memory.items()}
        del call
        if not all(storage.expired() for storage in memory.values()):
            gc.collect()  # a cycle is not a leak
        alive = [name for name, storage in memory.items() if not storage.expired()]
        assert not alive, f"the kernel keeps {', '.join(alive)} alive"


@parametrize("case", [
    pytest.param(case, id=f"slow-{name}-{case.id}") for name in LARGE
    for dtypes in ("fp32", "bf16") for case in large(name, dtypes)])
def test_oracle_slow_results(implementation, case):
    correct.cache_clear()
    check(Call(implementation, case))


# ==== 2. What a failure says ====

LEFT_BEHIND = """\
On new tensors, the same call may pass: the kernel seems to use what was left behind or changed
since. A cache, a workspace, a tensor saved without save_for_backward, torch.empty, a race?"""
OVERFLOW = "Did exp(logit), a sum or float16 overflow? Or 0 / 0?"
OUTSIDE = """\
nan is after each input and, if filled, in new memory: was torch.empty read, or past an end?"""
BY_DESIGN = """\
If that is by design, leave out such tests with -k, by a word of their ids. If it passes in a
new process, an earlier call left something behind."""


def describe(case, found, expected, wrong):
    """Returns what is wrong, where and by how much, and advice or ""."""
    worst = wrong[0]
    right = [name for name in found if name not in wrong]
    names = f"wrong, worst first: {', '.join(wrong)}; correct: {', '.join(right) or 'nothing'}"
    if case.spoiled and worst != "y":
        return f"{worst} is wrong: finite, but not by definition\n{names}", ""

    given, (value, norm, allowed) = as_float64(found[worst]), expected[worst]
    parts, places = errors(given, value, norm), []
    for part, each in parts.items():
        off = torch.argwhere(each > allowed)
        if 0 < len(off) < each.numel():
            places.append(f" in {len(off)} of {each.numel()} {part}, first {off[0].tolist()}")
    how = ("wrong" if given.any() else "zero or missing") + ",".join(places)
    lines = [f"{worst} is {how}: error {largest(parts):.2g}, tolerance {allowed:.2g}"]
    factor = ((given * value).sum() / value.square().sum()).item()
    if (abs(factor) > 0.01 and f"{factor:.3g}" != "1"
            and largest(errors(given / factor, value, norm)) <= allowed):
        lines.append(f"{worst} is {factor:.3g} times the correct one; "
                     f"the scaling is {case.scaling}")
    advice = ""
    if not (case.spoiled or case.layouts or given.isfinite().all()):  # they would be the cause
        overflow = given.isinf().any() or case.factors
        advice = OVERFLOW if overflow else OUTSIDE
    return "\n".join([*lines, names]), advice


def describe_error(what, error):
    """Returns what was raised, with the last lines of the kernel."""
    others = (__file__, os.path.dirname(torch.__file__))
    lines = [line for line in traceback.extract_tb(error.__traceback__)
             if not line.filename.startswith(others)]
    message = f"{what} raised {type(error).__name__}: {error}"
    return "\n".join([message, *traceback.format_list(lines[-3:])]).rstrip()


@torch.inference_mode(False)
@torch.enable_grad()
def failure(kernel, case, alone=True):
    """Returns the message of a call, or ""."""
    try:
        check(Call(kernel, case, alone=alone))
    except AssertionError as error:
        return str(error)
    return ""


def simpler(case):
    """Yields cases with one difference fewer from Case()."""
    for name, value in vars(case).items():
        if isinstance(value, dict):
            for key in value:
                yield replace(case, **{name: {k: v for k, v in value.items() if k != key}})
        elif name == "frozen":
            for key in value:
                yield replace(case, frozen=tuple(other for other in value if other != key))
        elif name != "dtypes" and value != getattr(Case(), name):
            yield replace(case, **{name: getattr(Case(), name)})


def simplest(kernel, case, message):
    """Takes back each difference from Case() without which the call fails in the same way,
    and returns the last message. If Case() fails, the kernel may not support it: then the id
    stays, by which -k selects."""
    def kind(message):  # as in "y is wrong", "the call raised TypeError"
        return re.findall(r"[\w.]+", message)[:4 if message.startswith("the call raised") else 3]

    if LEFT_BEHIND in message:
        return message
    keep_id = bool(failure(kernel, Case(case.dtypes)))
    others = simpler(case)
    while other := next(others, None):
        again = failure(kernel, other) if other.id == case.id or not keep_id else ""
        if again and kind(again) == kind(message):
            message, others = again, simpler(other)
    return message


# ==== 3. Does the oracle notice? ====

# To vary something else, add a field to Case (with compare=False only if it changes no
# correct result), use it in `make` or Call, and draw it after choose(more): then the draws
# before it stay. To add a test, write it at the end of room 1:
#
#     @each_of(GENERAL)
#     def test_oracle_negative_scaling(implementation, case):
#         check(Call(implementation, replace(case, scaling=-1.0)))
#
# Then add to MISTAKES a line that makes KERNEL wrong for your test, but not for Case():
#
#     "negative_scaling": {"scaling = abs(scaling)": "y is wrong"},

TESTS = {name.removeprefix("test_oracle_"): test for name, test in globals().items()
         if name.startswith("test_oracle_")}
SLOW, FAST = TESTS.pop("slow_results"), TESTS.pop("results")


def run_check(name, kernel, dtypes):
    """Runs, in these dtypes, a test, or the random cases, Case() or a row of LARGE."""
    if name in TESTS:
        [(_, parameters)] = [mark.args for mark in TESTS[name].pytestmark]
        for parameter in parameters:
            if parameter.values[0].dtypes == dtypes:
                TESTS[name](kernel, *parameter.values)
    elif name in LARGE:
        for case in large(name, dtypes):
            SLOW(kernel, case)
    else:
        for case in RANDOM[dtypes] if name == "random" else [Case(dtypes)]:
            FAST(kernel, case)


# ---- Mistakes ----
KERNEL = """\
def kernel(x, W0, bias, A, B, Wg, scaling):
    (n, d, r), k, tokens = B.shape, x.shape[-1], x.shape[-2] if x.dim() > 1 else 0
    base = F.linear(x, W0, bias)      # (..., d)
    h = x.to(A.dtype)                 # (..., k)
    logits = F.linear(h, Wg)          # (..., n)
    w = logits.softmax(-1)            # (..., n)
    z = F.linear(h, A)                # (..., r)
    delta = scaling * torch.einsum("...n,...r,ndr->...d", w, z, B)  # (..., d)
    y = base + delta.to(base.dtype)   # (..., d)
    return y
"""


def mutant(*lines):
    """Returns KERNEL with more lines. "w = 2 * w" goes below the line that computes w, and a
    line that begins with an argument goes above `base`. The dict `memory` outlives a call."""
    steps = KERNEL.splitlines()
    for line in lines:
        name = re.match(r"\w*", line)[0]
        step = "base" if name in (*INPUTS, "scaling") else name
        places = [i for i, each in enumerate(steps) if each.startswith(f"    {step} = ")]
        steps.insert(max(places) + (step == name), "    " + line)
    scope = globals() | {"memory": {}}
    exec("\n".join(steps), scope)
    return scope["kernel"]


def backward(t, change):
    """Returns t, whose gradient is changed."""
    if torch.is_grad_enabled() and t.requires_grad:
        t = t.clone()
        t.register_hook(change)
    return t


def reads(t, value):
    """Returns `value` with the gradient of t."""
    return t + (value - t).detach()


def first(t, size, dim=-1):
    """Returns t, zero from index `size` of this axis on."""
    t, rest = t.tensor_split([size], dim)
    return torch.cat([t, 0 * rest], dim)


def lies_as(t, row):
    """Whether t lies in memory as by this row of LAYOUTS, and by no other."""
    if t.dim() != 3 or min(t.shape) < 2:
        return False
    other = LAYOUTS[row](t.detach())
    return (t.stride(), t.storage_offset()) == (other.stride(), other.storage_offset())


MISTAKES = {  # what catches them, in fp32 if it says no other: {lines: a part of the message}
    "plain": {
        **dict.fromkeys([
            "scaling = 1.0", "B = B.roll(1, 0)", "base = F.linear(x, W0)", "w = 0 * w + 1",
            "w = logits.softmax(-2)", "logits = F.linear(h, A) @ Wg[:, :r].mT"], "y is wrong"),
        "w = (logits - logits.logsumexp(-1, True).detach()).exp()": "Wg.grad is wrong",
        "logits = F.linear(h.detach(), Wg)": "x.grad is wrong",
        "w = w.detach()": "Wg.grad is zero or missing",
        "A, B, Wg = A.detach(), B.detach(), Wg.detach()": "B.grad is zero or missing",
        "Wg = backward(Wg, lambda g: g / scaling)":
            "Wg.grad is 0.571 times the correct one; the scaling is 1.75",
        "y = y.double()": "wrong dtype",
        "y = y[99]": ", in kernel",
        "y = backward(y, lambda g: g.data.mul_(2))": "the backward changed grad_y in place",
        "y, A.grad = y, torch.zeros_like(A)": "the call wrote to A.grad",
        "A = A + 0 * A.detach().as_strided([1], [1], A.numel())": "nan is after each input",
        **{f"y, _ = y, torch.{change}": "the call changed what torch." for change in (
            "set_grad_enabled(False)", "set_default_dtype(f64)", "set_num_threads(2)",
            "set_float32_matmul_precision('high')", "set_deterministic_debug_mode('warn')",
            "manual_seed(0)")},
    },
    **{f"plain in {dtypes}": {f"y.data[..., -1].mul_(1 + {error})": "in 1 of 6 columns, first [5]"}
       for dtypes, error in dict(fp64=1.3e-10, fp32=1.3e-4, bf16=0.06, fp16=0.012).items()},
    "random": {  # the simplest case names the cause
        "delta = delta * (n > 1)": "in Case(n=1)",
        "y, _ = y, n > 1 or torch.set_num_threads(2)": "in Case(n=1)",
        "y = y if tokens else y[None]": "in Case(lead=())",
        "A = backward(A, lambda g: g + (x.numel() == 0))": "in Case(lead=(0, 5))",
        "delta = first(delta, tokens - tokens % 2, -2) if tokens > 9 else delta":
            "rows, first [",
        "delta = delta * B.any()": "in Case(factors={'B': 0})",
        "w = logits.exp() / logits.exp().sum(-1, keepdim=True)": "factors={'Wg': 30}",
        "z = z + 0 * torch.empty_like(z) if torch.get_deterministic_debug_mode() else z":
            "in Case(filled=True)",
        "A = backward(A, lambda g: g * x.requires_grad)": "frozen=('x',)",
        "Wg.requires_grad_()": "changed Wg.requires_grad",
        "y = y if x.requires_grad else y.detach()": "y does not require grad, unlike ",
        "delta = delta * (not torch.is_inference_mode_enabled())": "mode='inference'",
        "W0 = W0.T if k == d else W0": "in Case(k=",
        "delta = delta * (bias is not None)": "bias=False",
        "y = backward(y, lambda g: g if g.is_contiguous() else 2 * g)": "'grad_y': '",
        **{f"x = 2 * x if lies_as(x, {row!r}) else x": f"'x': {row!r}" for row in LAYOUTS},
        "x = torch.nan_to_num(x)": "spoiled='x'",
        "y = y + 0 * x.sum()": "spoiled='x'",
        "y = backward(y, lambda g: g.clamp(-1e4, 1e4))": "spoiled='grad_y'",
        "y = backward(y, lambda g: g * (y._version == 0))": "changed='y'",
        "logits = backward(logits, lambda g: w.data.zero_() + g)": "passes=2",
    },
    # sizes
    "large-magnitude in bf16": {"x = reads(x, x.half().to(x))": "y is wrong"},
    "large-logits": {
        "w = (logits - logits.amax(-1, keepdim=True).clamp(0)).exp()\n"
        "w = w / w.sum(-1, keepdim=True)": "y is wrong"},
    "near-zero": {"A = backward(A, lambda g: g * (g.norm() > 0.01))": "A.grad is zero or missing"},
    "many-heads": {"w = first(w, 128 if tokens > 64 else n)": "y is wrong"},
    "past-tiles": {"A = first(A, 512)": "y is wrong"},
    "many-tokens": {"delta = first(delta, 2048, -2) if tokens > 2048 and k > 16 else delta":
                    "y is wrong in 452 of 2500 rows"},
    "sequence": {"delta = first(delta, 65535, -2) if tokens else delta":
                 "y is wrong in 5 of 65540 rows, first [0, 65535]"},
    "long-input": {"A = A * (1 + (k > 8192))": "y is wrong"},
    "long-output": {"bias = first(bias, 8192)": "y is wrong",
                    "A = backward(A, lambda g: g.clamp(-65504, 65504))": "A.grad is wrong"},
    "wide-square": {"A = A * (1 + (k >= 2048 <= d))": "y is wrong"},
    "many-wide": {"A = A * (1 + (min(tokens, k, d) >= 1024))": "y is wrong"},
    # several calls
    "calls_in_a_row": {
        "scaling = memory.setdefault(id(B), scaling)": "call 3, scaling=0.0: y is",
        "y, _ = y, memory.setdefault(y.shape, y).data.copy_(y)": "lead=(2, 1): y is wrong",
        "w = memory['w'] = w.clone()\n"
        "delta = backward(delta, lambda g: g * (memory['w'] is w))": "B.grad is zero or missing",
        **{"w = w.requires_grad and memory.setdefault('saved', []).append(w) or w\n"
           f"delta = backward(delta, lambda g: g * (memory['saved'].pop({end}) is w))":
           "B.grad is zero or missing" for end in (0, -1)},  # a queue, a stack
        "A = backward(A, lambda g, A=A: g - (0 if A.grad is None else A.grad))":
            "two calls: A.grad is",
    },
    "changed_tensors": {
        "A = reads(A, memory.setdefault((A.data_ptr(), A[0, 0].item()), A.detach().clone()))":
            "after A was changed (in place): y is wrong",
        "A = reads(A, memory.setdefault(id(A), A.detach()))": "(moved): y is",
        "B = reads(B, memory.setdefault((B.data_ptr(), B.shape), B.detach().clone()))":
            "the same call may pass",
    },
    "memory_is_freed": {
        "y = backward(y, lambda g: memory.update(kept=g))": "keeps grad_y alive",
        "y, memory['x'] = y, y.requires_grad and x\n"
        "y = backward(y, lambda g: memory.clear())": "keeps x alive"},
}


@pytest.mark.usefixtures("implementation")
@parametrize("caught_by, lines, message", [
    pytest.param(caught_by, lines, message, id=f"{caught_by}: {lines}")
    for caught_by, rows in MISTAKES.items() for lines, message in rows.items()])
def test_mistake_is_caught(caught_by, lines, message):
    name, _, dtypes = caught_by.partition(" in ")
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_check(name, mutant(*lines.splitlines()), dtypes or "fp32")
    if name != "plain":  # Case() must pass
        run_check("plain", mutant(*lines.splitlines()), dtypes or "fp32")


def test_each_large_case_and_test_has_a_mistake():
    found = {caught_by.partition(" in ")[0] for caught_by in MISTAKES}
    assert found == {"plain", "random", *LARGE, *TESTS}


# ---- Correct kernels ----
CORRECT = [  # lines that change no more than a kernel may change, in these dtypes
    ("fp16", "w = F.normalize((logits - logits.amax(-1, keepdim=True)).exp(), p=1, dim=-1)\n"
             "base = base.mT.contiguous().mT if tokens else base"),
    ("bf16", "delta = scaling * torch.einsum('ndk,...k,...n->...d', B @ A, h, w)"),
    ("mixed-bf16", "A, B, Wg = A.to(x.dtype), B.to(x.dtype), Wg.to(x.dtype)"),
    ("autocast-bf16", "y = base.float() + delta.float()"),
]


@pytest.mark.usefixtures("implementation")
@parametrize("dtypes, lines", CORRECT)
def test_correct_kernel_passes(dtypes, lines):
    for name in ["random", *TESTS]:
        run_check(name, mutant(*lines.splitlines()), dtypes)


@pytest.mark.usefixtures("implementation")
@parametrize("dtypes", DTYPES)
def test_tolerance_is_small(dtypes):
    """But for a few with Wg times 30."""
    tolerances = [allowed for case in RANDOM[dtypes][:20]
                  for _, _, allowed in correct(case).values()]
    assert sum(each > 0.5 for each in tolerances) <= 0.02 * len(tolerances)


# ---- The settings ----
def test_chosen_kernel_is_tested(monkeypatch):
    monkeypatch.setenv("HYDRALORA_IMPL", "math:fsum")
    assert read_settings()[1] is math.fsum
    monkeypatch.setenv("HYDRALORA_DEVISE", "cpu")
    with pytest.raises(ValueError, match="HYDRALORA_DEVISE"):
        read_settings()


# ---- By hand ----
def definition_by_hand(x, W0, bias, A, B, Wg, scaling, grad_y):
    """y by Eqs. 3 and 4, and the gradients of sum(grad_y * y), derived by hand."""
    v, g = x.reshape(-1, A.shape[1]), grad_y.reshape(-1, len(W0))  # (t, k), (t, d)
    e = np.exp(v @ Wg.T - (v @ Wg.T).max(-1, keepdims=True))
    w, z = e / e.sum(-1, keepdims=True), v @ A.T  # (t, n) Eq. 4, (t, r)
    y = v @ W0.T + bias + scaling * np.einsum("tn,tr,ndr->td", w, z, B)  # Eq. 3
    back = scaling * np.einsum("td,ndr->tnr", g, B)
    dw, dz = np.einsum("tnr,tr->tn", back, z), np.einsum("tnr,tn->tr", back, w)
    dlogits = w * (dw - (w * dw).sum(-1, keepdims=True))
    return y.reshape(grad_y.shape), dict(
        x=(g @ W0 + dz @ A + dlogits @ Wg).reshape(x.shape), W0=g.T @ v, bias=g.sum(0),
        A=dz.T @ v, B=scaling * np.einsum("tn,td,tr->ndr", w, g, z), Wg=dlogits.T @ v)


@parametrize("dtypes", DTYPES)
def test_definition_by_hand_agrees(dtypes):
    for case in RANDOM[dtypes][:20]:
        case = replace(case, mode="gradients", spoiled="")
        exact = {name: as_float64(t) for name, t in make(case).items() if t is not None}
        correct = by_definition(exact, case)
        arrays = {"bias": np.zeros(case.d)} | {name: t.numpy() for name, t in exact.items()}
        y, grads = definition_by_hand(**arrays, scaling=case.scaling)
        found = {"y": y} | {f"{name}.grad": g for name, g in grads.items()}
        for name, value in correct.items():
            scale = 1e-9 * max(1.0, value.abs().max().item() if value.numel() else 0)
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=scale, err_msg=name)


# ==== 4. This project's layer ====

# ---- The layer ----
def hydralora_layer(x, W0, bias, A, B, Wg, scaling):
    """HydraLoRALinear on these tensors. Copies of them would keep the gradients."""
    n, d, r = B.shape
    base = nn.Linear(A.shape[1], d, bias is not None, "meta", W0.dtype)
    layer = HydraLoRALinear(base, num_heads=n, r=r, lora_alpha=scaling * r)
    weights = {"base.weight": W0, "lora_A": A, "lora_B": B, "router.weight": Wg}
    if bias is not None:
        weights["base.bias"] = bias
    return torch.func.functional_call(layer, weights, x)


IMPLEMENTATION = IMPLEMENTATION or hydralora_layer


N, K, D, R = 4, 7, 5, 3  # heads, features in and out, rank
GATES = torch.tensor([0.1, 0.2, -0.3, 0.4])
IDS = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(3))
randn = functools.partial(torch.randn, dtype=f64)
close = torch.testing.assert_close
each_dtype = parametrize("dtype", [f64, f32, bf16, f16], ids=str)


def make_layer(k=K, d=D, dtype=f64, layer=HydraLoRALinear, **arguments):
    """A layer whose heads are not zero, and whose gates vary."""
    torch.manual_seed(0)
    arguments = dict(num_heads=N, r=R, lora_alpha=2 * R) | arguments
    made = layer(nn.Linear(k, d, dtype=dtype), **arguments)
    nn.init.normal_(made.lora_B)
    for p in made.router.parameters():
        nn.init.normal_(p)
    return made


def plain_model():
    torch.manual_seed(0)
    return TinyTransformer(TinyConfig())


def adapted_model(target_modules=("q_proj", "v_proj")):
    model = inject_hydralora(plain_model(), target_modules, num_heads=N, r=R)
    for layer in hydralora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
        nn.init.normal_(layer.router.weight)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_defaults():
    base = nn.Linear(256, 5).eval()
    layer = HydraLoRALinear(base)
    assert "num_heads=3, r=8, scaling=2" in str(layer) and layer.lora_dropout.p == 0
    assert (layer.in_features, layer.out_features) == (256, 5)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not any(module.training for module in layer.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert not isinstance(layer.router, nn.Linear)
    assert not layer.lora_B.any() and not torch.equal(layer.lora_A[:3], layer.router.weight)
    for p in (layer.lora_A, layer.router.weight):  # U(-b, b) with b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16


@each_dtype
def test_dtypes(dtype):
    layer, x = make_layer(dtype=dtype), torch.ones(3, K, dtype=dtype)
    adapter = torch.promote_types(dtype, f32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.router.weight.dtype == adapter
    assert layer(x).dtype == dtype and layer.to(dtype)(x).dtype == dtype
    assert {(t.dtype, t.requires_grad) for t in layer.to_lora(GATES)} == {(adapter, False)}
    close(mean_gates(layer.eval(), [x])[""], layer.router(x)[0].detach().to(adapter))
    with torch.autocast("cpu", dtype=bf16):
        assert layer(x).dtype == layer.base(x).dtype


def test_layer_can_be_copied_alone():
    file = Path(sys.modules[HydraLoRALinear.__module__].__file__).read_text(encoding="utf-8")
    section, names = re.search("# ---- The layer(.*?)\n# ---- ", file, re.S)[1], {}
    exec(re.search("# (import .*)", section)[1] + "\n#" + section, names)
    layer = names["HydraLoRALinear"](nn.Linear(2, 2), num_heads=2, r=1, lora_alpha=2)
    example = [1, 1, 1, 2, 5, -2, math.log(3), 0, 0, 0, 1, 0, 0, 1, 10, 20]  # A, B, Wg, W0, bias
    nn.utils.vector_to_parameters(torch.tensor(example), layer.parameters())
    for kind in (layer, layer.merge([3 / 4, 1 / 4])):
        close(kind(torch.tensor([1.0, 2.0])), torch.tensor([23.0, 28.0]))


def test_router_of_16_bits_learns_at_a_gate_near_1():
    router = Router(1, 2).to(bf16)
    router.weight.data[:, 0] = torch.tensor([7.0, 0.0])
    router(torch.ones(1, dtype=bf16))[0].backward()
    assert router.weight.grad[0].item() == pytest.approx(9e-4, rel=0.05)


def test_dropout_has_one_mask_on_x_and_skips_the_router():
    layer, x = make_layer(6, 6, r=6, lora_alpha=6, lora_dropout=0.5), randn(50, 6)
    with torch.no_grad():  # B_i inverts A: delta is x after dropout
        layer.lora_B.copy_(torch.linalg.inv(layer.lora_A).expand(N, 6, 6))
    with record_gates(layer) as gates:
        mask = (layer(x) - layer.base(x)) / x
    close(gates[""], layer.router(x).detach())
    close(mask, 2 * (mask > 1).double())
    close(layer.eval()(x) - layer.base(x), x)


class TopTwo(Router):
    def forward(self, x):
        w = super().forward(x)
        return w * (w >= w.topk(2).values[..., -1:])


class TopTwoLayer(HydraLoRALinear):
    router_class = TopTwo


class TopTwoOfAx(HydraLoRALinear):
    """The router reads A x, so that Wg is (n, r)."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        first = nn.Linear(self.in_features, self.r, bias=False)
        first.weight = self.lora_A
        self.router = nn.Sequential(first, TopTwo(self.r, self.num_heads)).to(self.lora_A)


@parametrize("variant", [TopTwoLayer, TopTwoOfAx])
def test_variant_is_saved_recorded_and_merged(variant):
    """A head whose gate is 0 gets no gradient."""
    layer, other, x = make_layer(layer=variant), make_layer(layer=variant), randn(1, K)
    for p in (other.lora_A, other.lora_B):
        nn.init.zeros_(p)
    assert hydralora_state_dict(layer).keys() >= trained_names(layer)
    assert load_hydralora_state_dict(other, hydralora_state_dict(layer)) is other
    assert other.lora_B is p  # copied
    with record_gates(layer) as gates:
        y = layer(x)
    y.sum().backward()
    used = gates[""] > 0
    assert used.sum() == 2 and torch.equal(layer.lora_B.grad.flatten(1).any(1), used[0])
    merged = merge_hydralora(other, {"": gates[""][0]})
    assert type(merged) is nn.Linear
    close(merged(x), y.detach())


# ---- A model ----
def test_tiny_transformer_by_its_definition():
    model = plain_model()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    h = model.token_embedding(IDS) + model.position_embedding.weight[:11]
    later = torch.full((11, 11), -math.inf).triu(1)
    for layer in model.layers:
        x, heads = layer.attention_norm(h), []
        for rows in torch.arange(64).chunk(4):
            q, k, v = (F.linear(x, getattr(layer, name).weight[rows])
                       for name in ("q_proj", "k_proj", "v_proj"))
            heads.append((q @ k.mT / 4 + later).softmax(-1) @ v)
        h = h + layer.o_proj(torch.cat(heads, -1))
        h = h + layer.down_proj(F.gelu(layer.up_proj(layer.mlp_norm(h))))
    close(model(IDS), model.lm_head(model.norm(h)), rtol=0, atol=1e-4)


def test_injection_changes_no_output_and_no_mode():
    model, built = plain_model(), []
    model.layers[0].eval()
    logits = model(IDS)
    targets = ["0.q_proj", "layers.1.down_proj", "layers.0.q_proj"]

    def layer(base, **arguments):
        built.append(TopTwoLayer(base, **arguments))
        return built[-1]

    assert inject_hydralora(model, targets, layer, lora_dropout=0.5) is model
    layers = hydralora_layers(model)
    assert [*layers] == ["layers.0.q_proj", "layers.1.down_proj"]
    assert [*layers.values()] == built
    assert torch.equal(model(IDS), logits)
    for layer, training in zip(model.layers, (False, True)):
        assert {m.training for m in layer.modules()} == {training}


def test_second_injection_adds_to_the_first():
    model = inject_hydralora(plain_model(), "0.q_proj")
    model.layers[0].q_proj.lora_A.requires_grad_(False)  # the caller's choice stays
    inject_hydralora(model, ["o_proj", "v_proj"])
    frozen = hydralora_state_dict(model).keys() ^ trained_names(model)
    assert frozen == {"layers.0.q_proj.lora_A"}


def test_linear_in_three_places_gets_one_adapter():
    model = plain_model()
    first, second = model.layers
    second.k_proj = second.v_proj = first.k_proj
    for change, kind in (
            (lambda: inject_hydralora(model, "k_proj", num_heads=N), HydraLoRALinear),
            (lambda: merge_hydralora(model, {"layers.0.k_proj": GATES}), nn.Linear)):
        change()
        assert first.k_proj is second.k_proj is second.v_proj and type(first.k_proj) is kind


# ---- Gates and merging ----
def test_fixed_gates_make_one_lora():
    """Forward, merge and export agree, with a layer's current scaling."""
    model = inject_hydralora(adapted_model("0.o_proj"), "q_proj", num_heads=N, r=2)
    model.layers[0].o_proj.scaling = 0.5
    gates = {}
    for i, (name, layer) in enumerate(hydralora_layers(model).items()):
        gates[name] = GATES.roll(i)
        nn.init.normal_(layer.lora_B)
        layer.router.register_forward_hook(
            lambda router, x, w, name=name: gates[name].expand(len(w), 1, N))  # (b, 1, n)
    logits = model(IDS)
    state, config = export_lora(model, gates)
    assert config == dict(peft_type="LORA", target_modules=[*gates], r=R, lora_alpha=R)
    weights = {}
    for name, layer in hydralora_layers(model).items():
        A, B = (state.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        weights[f"{name}.weight"] = layer.weight + B @ A
        assert len(A) == R  # padded
    assert not state
    assert merge_hydralora(model, gates) is model
    close(model(IDS), logits, rtol=0, atol=1e-4)
    close({name: model.get_parameter(name).detach() for name in weights}, weights)


@each_dtype
def test_merge_rounds_once_and_shares_nothing(dtype):
    layer = make_layer(dtype=dtype).eval().requires_grad_()
    A, B = layer.to_lora(GATES.double())
    W = (layer.weight.to(A.dtype) + B @ A).to(dtype)
    with torch.autocast("cpu", dtype=bf16):
        merged = layer.merge(GATES.tolist())
    assert torch.equal(merged.weight, W) and torch.equal(merged.bias, layer.bias)
    assert type(merged) is nn.Linear and not merged.training
    for t in (*merged.parameters(), A, B):
        t.data.zero_()
    assert all(p.all() for p in layer.parameters())


def test_recorded_gates_are_those_of_the_last_forward():
    model = adapted_model()
    with record_gates(model) as gates:
        model(IDS[:1])
        model(IDS)
    layer, w = model.layers[0].q_proj, gates.pop("layers.0.q_proj")
    x = model.layers[0].attention_norm(model.embed(IDS))
    close(w, (x @ layer.router.weight.T).softmax(-1))
    w.square().sum().backward()  # as a balance loss does
    assert len(gates) == 3 and layer.router.weight.grad.any() and not layer.router._forward_hooks
    layer.router.register_forward_hook(lambda router, x, w: w[..., :1])  # not n gates
    with pytest.raises(RuntimeError):
        model(IDS)


def test_mean_gates_are_those_of_all_calls():
    class Twice(nn.Sequential):
        def forward(self, x, attention_mask=None):
            return self[0](self[0](x))

    layer = make_layer(K, K)
    model = Twice(layer).eval()
    x, y = randn(2, 3, K), randn(1, K)
    w = [layer.router(v).flatten(0, -2) for v in (x, layer(x), y, layer(y))]
    means = mean_gates(model, [x, dict(x=y, attention_mask=None)])
    close(means, {"0": torch.cat(w).mean(0).detach()})
    assert not means["0"].requires_grad
    with pytest.raises(RuntimeError):
        mean_gates(model, [x.mT])
    assert not layer.router._forward_hooks
    layer.train()
    with pytest.raises(ValueError, match="eval"):
        mean_gates(model, [x])


# ---- Bad input ----
def layer_with(name, t):
    layer = make_layer()
    setattr(layer, name, nn.Parameter(t))
    return layer


def merged_after(change):
    layer = make_layer()
    change(layer.base)
    return layer.merge(GATES)


class Subclass(torch.Tensor):
    pass


@parametrize("word, call", [
    ("nn.Linear", lambda: HydraLoRALinear(make_layer())),
    *(("at least 1", lambda name=name: make_layer(**{name: 0})) for name in ("num_heads", "r")),
    (r"4 numbers, got \[4, 1\]", lambda: make_layer().to_lora(GATES[:, None])),
    ("Own overrides forward", lambda: make_layer(
        layer=type("Own", (HydraLoRALinear,), dict(forward=print))).to_lora(GATES)),
    *(("plain nn.Linear", lambda change=change: merged_after(change)) for change in (
        lambda base: setattr(base, "forward", nn.Linear(K, D).forward),
        lambda base: setattr(base, "weight", nn.Parameter(torch.ones(D, K).as_subclass(Subclass))),
        lambda base: base.register_forward_hook(print),
        lambda base: base.register_forward_pre_hook(print))),
    ("no HydraLoRA layer", lambda: hydralora_state_dict(plain_model())),
    ("layers share a router", lambda: mean_gates(
        nn.Sequential(layer := make_layer(), copy.copy(layer), make_layer()).eval(), [])),
    *((f"^{mask} has zeros", lambda mask=mask: mean_gates(
        adapted_model().eval(), [collections.UserDict({mask: torch.ones(2, 2).triu()})]))
      for mask in ("attention_mask", "decoder_attention_mask")),
    ("q_proj got no token", lambda: mean_gates(adapted_model().eval(), [])),
    ("a batch has no token", lambda: mean_gates(make_layer().eval(), [randn(0, K)])),
    *((f"{name} is sharded or", lambda name=name: hydralora_state_dict(
        layer_with(name, torch.ones(9)))) for name in ("lora_A", "lora_B", "flat_param")),
    ("B is sharded or", lambda: hydralora_state_dict(
        layer_with("lora_B", torch.ones(9, 9).as_subclass(Subclass)))),
    *(("A is sharded or", lambda use=use: use(adapted_model().to("meta"), {}))
      for use in (merge_hydralora, export_lora)),
])
def test_bad_call_is_refused(word, call):
    with pytest.raises((TypeError, ValueError), match=word):
        call()


@parametrize("model, target_modules, word", [
    (plain_model(), ["o_proj", "norm"], "named 'norm'"),
    (plain_model(), "proj", "named 'proj'"),
    (adapted_model(), "q_proj", "adapted already"),
    (adapted_model(), "q_proj.base", "adapted already"),
    (nn.TransformerEncoderLayer(8, 2), "linear1", "TransformerEncoderLayer may bypass"),
    (type("Own", (nn.MultiheadAttention,), {})(8, 2), "out_proj", "Own may bypass")])
def test_refused_injection_changes_nothing(model, target_modules, word):
    modules, trained = [*model.modules()], trained_names(model)
    with pytest.raises(ValueError, match=word):
        inject_hydralora(model, target_modules)
    assert [*model.modules()] == modules and trained_names(model) == trained


def test_refused_loading_and_merging_change_nothing():
    model = adapted_model()
    logits, state = model(IDS), hydralora_state_dict(model)
    doubled, (*_, last) = {key: 2 * t for key, t in state.items()}, state
    for bad, word in (({}, "q_proj.lora_A', which is missing"),
                      (doubled | {"more": IDS}, "more', which is unknown"),
                      (doubled | {last: state[last].T}, f"{last}', which has another")):
        with pytest.raises(ValueError, match=f"first in .*{word}"):
            load_hydralora_state_dict(model, bad)
    with pytest.raises(KeyError, match="layers.1.v_proj"):
        merge_hydralora(model, dict.fromkeys([*hydralora_layers(model)][:-1], GATES))
    assert torch.equal(model(IDS), logits)


# ==== 5. The toy and the README ====

# ---- The toy ----
@pytest.fixture(scope="session")
def toy():
    return pytest.importorskip("train_toy")


def toy_output(toy, options="", **settings):
    """What train_toy.py prints, with these options and settings."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options.split()])
        for name, value in settings.items():
            patch.setattr(toy, name, value)
        toy.main()
    torch.set_num_threads(threads)
    return output.getvalue()


@pytest.fixture(scope="session")
def seed_0(toy):
    """What a run prints and returns."""
    numbers, run = {}, toy.run
    output = toy_output(toy, run=lambda *arguments: numbers.update(run(*arguments)))
    return SimpleNamespace(output=output, numbers=numbers)


def test_toy_prints_its_answers(toy, seed_0):
    """The docstring's example is seed 0's domain 0."""
    said, answered = re.findall(r"(?:input|target): +([a-o ]+) \.", toy.__doc__)
    right_or_marked = "".join(rf"( {letter}|\*.)" for letter in answered.split())
    assert f"domain 0  {said} " in seed_0.output
    assert re.search("gates of domain 0" + right_or_marked, seed_0.output)


def test_toy_shows_what_heads_do(seed_0):
    for text, least, greatest in [
            ("NMI of o_proj's heads and domain, 15 differ", 0.9, 1),
            ("NMI of o_proj's heads and domain, 0 differ", 0, 0.1),
            ("NMI of o_proj's heads and symbol, 0 differ", 0.15, 0.35),
            ("o_proj merged, 15 differ: own gates (%)", 95, 99),
            ("o_proj merged, 15 differ: another domain's (%)", 0.2, 3),
            ("o_proj merged, 15 differ: answers of the gates' domain (%)", 85, 97),
            ("o_proj merged, 15 differ: gates of all (%)", 15, 40),
            *((f"o_proj merged, 0 differ: {what} (%)", 70, 92)
              for what in ("own gates", "another domain's", "gates of all")),
            ("HydraLoRA's lead over LoRA-Split, 15 differ", -1.5, 1.5),
            ("A's of two domains, one start, after 20 steps", 0.6, 0.85)]:
        assert least < seed_0.numbers[text] < greatest, text


def test_toy_runs_with_all_methods_on_other_layers(toy):
    """--lr is the adapters' rate, not that of pre-training and of full fine-tuning."""
    rates, train = [], toy.train
    output = toy_output(
        toy, "--seeds 2 --all --heads 4 --rank 5 --target v_proj down_proj --lr 0.5",
        STEPS=40, TEST=60, WATCHED=(1, 40), EARLY=6,
        train=lambda model, lr, *others: rates.append(lr) or train(model, lr, *others))
    for name in (*toy.methods(4, 5, 64, 64), "LoRA-Split"):
        assert re.search(rf"^{name}.* \(%\)  ", output, re.M)
    assert "v_proj, down_proj merged, 15 differ\n" in output and "\n   down_proj merged" in output
    assert (rates.count(0.003), rates.count(0.5)) == (10, 74)


@parametrize("n, targets", [
    (3, ["o_proj", "down_proj"]), (3, ["q_proj"]), (3, ["k_proj", "v_proj"]), (0, [])])
def test_toy_cut_model_is_the_model(n, targets, toy):
    model = TinyTransformer(TinyConfig(toy.SYMBOLS + 1, 2 * toy.LENGTH)).requires_grad_(False)
    plain = torch.randint(toy.SYMBOLS, (5, toy.LENGTH))
    data = toy.encode(model, (plain, None, None))
    adapted = toy.adapt(toy.Task(model, targets, 0, [], data), toy.Method(n, 9, 0.1))
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    tokens = F.pad(plain, (0, toy.LENGTH), value=toy.SYMBOLS)
    close(toy.predict(adapted, data), adapted(tokens)[:, toy.LENGTH:], rtol=1e-4, atol=1e-4)


def test_toy_best_without_domain_by_counting(toy):
    for count, best in zip(toy.DIFFER, (100, 88.9, 77.8, 66.7)):
        ciphers = toy.differ_in(count, torch.randperm(15))
        [(plain, targets, _)] = toy.sample(1, 20_000, ciphers, 0, "cpu")
        counts = torch.bincount((15 * plain + targets).flatten(), minlength=225).view(15, 15)
        assert 100 * counts.amax(1).sum() / counts.sum() == pytest.approx(best, abs=0.5)
        assert toy.best_without_domain(ciphers) == pytest.approx(best, abs=0.1)


def test_toy_measures_by_hand(toy):
    symbol, axes = torch.arange(15), torch.eye(4)
    w = F.one_hot(symbol % 3).double()  # a head for each third of the symbols
    assert toy.nmi(symbol, w) == pytest.approx(2 * math.log(3) / math.log(45))
    assert toy.nmi(symbol % 5, w) == pytest.approx(0, abs=1e-9)
    assert toy.overlap(axes[:, :2], axes[:, 1:3]) == pytest.approx(0.5)


@parametrize("n", [2, 3, 5, 10])
def test_toy_num_heads_of_topics(n, toy):
    rng = np.random.default_rng(n)
    topic = rng.integers(2, size=(200, 30)) * (1 + np.arange(200)[:, None] % n)  # 0: none
    texts = 50 * topic + rng.integers(50, size=(200, 30))
    assert toy.choose_num_heads(texts.tolist())[0] == n


@parametrize("name", ["LoRA MoE", "one A per head, shared B"])
def test_toy_formula(name, toy):
    method = toy.methods(3, 9, 64, 32)[name]
    layer = method.layer(nn.Linear(64, 32), num_heads=3, r=method.r, lora_alpha=2 * method.r)
    nn.init.normal_(layer.lora_B)
    x, B = torch.randn(2, 5, 64), layer.lora_B.expand(3, -1, -1)
    update = torch.einsum("btn,ndr,nrk,btk->btd", layer.router(x), B, layer.lora_A, x)
    close(layer(x), layer.base(x) + 2 * update, rtol=1e-4, atol=1e-4)


@parametrize("options", ["--heads 0", "--lr 0", "--seeds 0", "--target proj", "--device foo"])
def test_toy_refuses(options, toy, capsys):
    with pytest.raises(SystemExit):
        toy_output(toy, options)
    assert re.search(f"error: .*{options.split()[0]}.*\n$", capsys.readouterr().err)


# ---- README ----
@pytest.fixture
def readme():
    path = Path(__file__).with_name("README.md")
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


def test_readme_definition_is_right(example):
    def function(x, W0, bias, *others):
        return example.hydralora(x, W0, *others) + bias

    for dtypes in DTYPES:
        if "mixed" not in dtypes:
            run_check("plain", function, dtypes)


def agree(said, found):
    """Whether two words are equal, or two numbers, up to another CPU's rounding."""
    if re.fullmatch(r"[\d.]+ [\d.]+", f"{said} {found}"):
        return abs(float(said) - float(found)) <= (1.2 if "." in said else 0)
    return said == found


def test_readme_output_is_that_of_a_toy_run(readme, seed_0):
    """The first block is the picture."""
    printed = [line.split() for line in seed_0.output.splitlines()]
    _, *blocks = re.findall(r"```text\n(.*?)```", readme, re.S)
    for line in "".join(blocks).splitlines():
        said = line.removesuffix(" ...").split()
        assert any(len(said) <= len(found) and all(map(agree, said, found))
                   for found in printed), line
