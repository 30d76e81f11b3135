# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""A correctness oracle for HydraLoRA kernels, then the tests of this project.

A kernel is a function kernel(x, W0, bias, A, B, Wg, scaling) that returns y:

    y = W0 x + bias + scaling * sum_i w_i B_i A x,  w = softmax(Wg x)

    x (..., k)    W0 (d, k)     bias (d,) or None    scaling: a float
    A (r, k)      B (n, d, r)   Wg (n, k)            y (..., d), of x's dtype

The tests with "oracle" in their names test a kernel:

    HYDRALORA_IMPL=module:function python -m pytest test_hydralora.py -k oracle -x --tb=short

Without HYDRALORA_IMPL, they test this project's layer. HYDRALORA_DEVICE sets the device,
by default cuda if available. HYDRALORA_SHAPE=tokens,k,d,r,n adds a case "own" of your
sizes: 2048,4096,11008,16,3 is the up_proj of a 7B model.

A kernel must take any strides, any n, and any number of tokens, including none. It may
draw random numbers. It may return no gradients of W0 and bias, since the base may be
frozen. A kernel that computes in TF32 fails the fp32 tests, as intended. In 16 bits, the
tolerance is several times the error of a correct kernel, so that passing in bf16 does not
prove that a kernel adds in float32.

The id of a test, such as test_oracle_slow_results[gradients-slow-3d-tiles-aligned-bias-fp32],
says what the kernel must support. Leave out what yours does not:

    -k "oracle and not gradients"       it has no backward
    -k "oracle and 3d and aligned"      x is (batch, tokens, k); 16 divides k, d and r
    -k "oracle and nobias"              bias is None
    -k "oracle and not fp64 and not mixed and not autocast"    one dtype, at most 32 bits
    -k "oracle and not slow and fp32"   for a first verdict, in seconds

A failure names its case and mode, as in Case(dtypes='bf16'), torch.no_grad. To repeat it:

    from test_hydralora import *
    check(Call(IMPLEMENTATION, Case(dtypes='bf16'), torch.no_grad))

If the process crashes, -v shows the last test. No test runs torch.compile: for custom
ops, use torch.library.opcheck, too.

To use the oracle, stop here. The next sections are the definition, which says what is
correct, the cases, one call, the tests, the message of a failure, and mistakes that the
tests catch.
From "The layer" on, the tests are about this project alone.

To add a case, add a row to CASES, or to LARGE if it is slow. To add a test, write it
above TESTS:

    @each_case("plain")
    def test_oracle_negative_scaling(implementation, mode, case):
        check(Call(implementation, replace(case, scaling=-1.0), mode))

Then add to WRONG a mistake that your case or test catches and "plain" does not: a part of
the message, the name of the case or test, the dtypes if not fp32, and what is wrong in the
kernel (see mutant):

    mistake("y is wrong", "negative_scaling", s=lambda v: abs(v.s)),

If many kernels may make it, put it in KNOWN, with a message that names it.
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
import re
import subprocess
import sys
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
    num_heads_from_corpus, record_gates)

parametrize = pytest.mark.parametrize


# ---- The definition ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TRAINED = ("x", "A", "B", "Wg")  # these need a gradient even if the base is frozen


def definition(x, W0, bias, A, B, Wg, scaling, gates=nn.Softmax(-1)):
    """Eqs. 3 and 4, with a scaling. Computed in float64, its y and its gradients are the
    correct values. Computed in a kernel's dtypes, its errors set the tolerance."""
    y, x = F.linear(x, W0, bias), x.to(A.dtype)    # (..., d), (..., k)
    w, z = gates(F.linear(x, Wg)), F.linear(x, A)  # (..., n), (..., r)
    for w_i, B_i in zip(w.unbind(-1), B):          # (...), (d, r)
        y = y + (scaling * w_i[..., None] * F.linear(z, B_i)).to(y.dtype)
    return y


# ---- The cases ----
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # of x and y, of W0 and bias, of A, B and Wg; autocast's; the least tolerance
    "fp64": (f64, f64, f64, None, 1e-10),
    "fp32": (f32, f32, f32, None, 1e-4),  # enough for sums in any order, but not for TF32
    "bf16": (bf16, bf16, bf16, None, 2**-7),
    "fp16": (f16, f16, f16, None, 2**-9),
    "mixed-bf16": (bf16, bf16, f32, None, 2**-7),
    "autocast-bf16": (bf16, f32, f32, bf16, 2**-7),  # y may be float32
    "autocast-fp16": (f32, f32, f32, f16, 2**-9),
}


@dataclass(frozen=True)
class Case:
    name: str = "plain"
    dtypes: str = "fp32"
    lead: tuple = (2, 5)  # axes of x before k: () is one token, (5,) a sequence
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    factors: dict = field(default_factory=dict, hash=False)  # name -> multiplies this tensor
    layout: str = ""  # a row of LAYOUTS
    frozen: tuple = ()  # what does not require grad
    filled: bool = False  # PyTorch fills new memory with nan
    seed: int = 0

    def __repr__(self):
        changed = [f"{k}={v!r}" for k, v in vars(self).items() if v != getattr(Case(), k)]
        return f"Case({', '.join(changed)})"

    @property
    def inputs(self):
        return [name for name in INPUTS if self.bias or name != "bias"]

    @property
    def id(self):
        return "-".join([
            *["slow"] * (self.name in LARGE),
            f"{len(self.lead) + 1}d",  # the axes of x
            self.name,
            "odd" if self.k % 16 or self.d % 16 or self.r % 16 else "aligned",
            "bias" if self.bias else "nobias",
            self.dtypes])


def before_nan(t):
    """Returns a contiguous copy of t, in memory that goes on with nan."""
    return torch.cat([t.flatten(), t.new_full([1024], math.nan)])[:t.numel()].view(t.shape)


def with_gaps(t, axis):
    """Returns a copy of t, in memory with one more axis, of size 2."""
    return before_nan(torch.stack([t, torch.full_like(t, 9999.0)], axis)).select(axis, 0)


def swapped(t):
    return t.transpose(0, 1) if t.dim() > 1 else t


LAYOUTS = {  # how tensors lie in memory, if not contiguous
    "offset": lambda t: before_nan(torch.cat([t.new_zeros(3), t.flatten()]))[3:].view(t.shape),
    "gaps": lambda t: with_gaps(t, -1),               # as x[..., ::2]
    "wide-rows": lambda t: with_gaps(t, -2),          # as qkv[..., :k]
    "last-tokens": lambda t: with_gaps(t, 1),         # as x[:, -1:]
    "swapped": lambda t: swapped(before_nan(swapped(t))),  # as W.T, or tokens before the batch
    "transposed": lambda t: before_nan(t.mT).mT if t.dim() > 1 else t,  # the last two axes
    "expanded": lambda t: t.flatten()[0].expand(t.shape),  # as the gradient of y.sum()
    "expanded-batch": lambda t: before_nan(t[:1]).expand(t.shape),  # one for the whole batch
}
ALIGNED = dict(k=64, d=64, r=16, n=8, bias=False)
CASES = {  # how each case differs from Case()
    "plain": {},
    "square": ALIGNED,
    "equal-sizes": dict(lead=(4,), k=4, d=4, r=4, n=4),
    "part-tiles": dict(lead=(2, 40), k=192, d=32, r=32, n=6, bias=False),
    "odd-sizes": dict(lead=(2, 1, 3, 17), k=73, d=150, r=13, n=11, scaling=-0.4,
                      layout="swapped"),
    # seed 7: on these data, "softmax in 16 bits" needs three draws
    "one-token": dict(lead=(), r=40, n=20, scaling=2.0**-10, seed=7),
    "empty-batch": ALIGNED | dict(lead=(0, 5)),
    "one-head": dict(k=64, r=16, n=1),  # a LoRA
    "zero-heads": dict(lead=(2, 3, 10), k=3, d=64, bias=False, factors=dict(B=0)),
    "near-zero": dict(factors=dict(B=1e-4)),
    # exp(logit) is inf for some tokens, and 0 for both heads of others. Every second token
    # is 0, as padding
    "large-logits": ALIGNED | dict(
        lead=(60, 2), r=64, n=2, bias=True, factors=dict(Wg=100, x=[[1], [0]])),
}
for layout in LAYOUTS:
    lead = (16, 1) if layout == "last-tokens" else (3, 4)
    CASES[layout] = ALIGNED | dict(lead=lead, d=80, bias=True, layout=layout)
LARGE = {
    "large-magnitude": dict(k=64, d=48, r=8, n=3, factors=dict(  # too large for float16
        x=2.0**17, grad_y=2.0**-50, W0=2.0**-17, Wg=2.0**-17)),
    "many-heads": dict(lead=(2, 70), n=260),
    "tiles": dict(lead=(1, 128), k=128, d=256, r=32, n=32),
    "past-tiles": dict(lead=(2, 65), k=577, d=131, r=33, n=35),
    # more blocks than a CUDA grid's y axis can have
    "sequence": dict(lead=(1, 65540), k=16, d=16, r=16, n=2),
    # sizes of a 7B model, as far as a CPU can take them. 11056 is 16 times a prime
    "long-input": dict(lead=(1, 1), k=11056, d=16, r=32, n=8),
    "long-output": dict(lead=(1, 1), k=48, d=11056, r=16, n=8),
    "wide-square": ALIGNED | dict(lead=(1, 3), k=2048, d=2048, r=144, n=3),
    "many-wide-inputs": ALIGNED | dict(lead=(1, 1040), k=2048, n=3),
    "many-wide-outputs": ALIGNED | dict(lead=(1, 1040), d=2048, n=3),
}
GENERAL = ("plain", "square")  # for the tests that call a kernel several times


def cases_of(name):
    """Returns this case in all dtypes or, if it may be slow, in three. In every second one,
    new memory is filled. The length of the name decides whether the first one is."""
    dtypes = DTYPES if name in CASES else ("fp32", "bf16", "mixed-bf16")
    return [Case(name, each, **(CASES | LARGE | OWN)[name], filled=i % 2 == 0)
            for i, each in enumerate(dtypes, len(name))]


def make(case):
    """Returns the inputs of a case, and grad_y, the gradient of y."""
    c, made = case, {}
    x, base, adapter, cast, _ = DTYPES[c.dtypes]
    for i, (name, std, shape, dtype) in enumerate([
            ("x", 1.0, (*c.lead, c.k), x),
            ("W0", c.k**-0.5, (c.d, c.k), base),
            ("bias", 1.0, (c.d,), base),
            ("A", c.k**-0.5, (c.r, c.k), adapter),
            ("B", c.r**-0.5, (c.n, c.d, c.r), adapter),
            ("Wg", c.k**-0.5, (c.n, c.k), adapter),
            ("grad_y", 1.0, (*c.lead, c.d), cast or x)]):
        normal = torch.from_numpy(np.random.default_rng([c.seed, i]).normal(size=shape))
        t = std * normal * torch.tensor(c.factors.get(name, 1.0))
        t = LAYOUTS.get(c.layout, before_nan)(t.to(DEVICE, dtype))
        made[name] = t.requires_grad_(name in INPUTS and name not in c.frozen)
    return made if c.bias else made | {"bias": None}


# ---- The tolerance ----
REFERENCES = {}  # hash of the inputs -> what `reference` returned


def as_float64(t):
    return t.detach().to("cpu", f64, copy=True)


def by_definition(tensors, scaling, gates=nn.Softmax(-1)):
    """Returns y and the gradients of sum(grad_y * y)."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name in INPUTS}
    y = definition(**{"bias": None} | leaves, scaling=scaling, gates=gates)
    grads = torch.autograd.grad(y, [*leaves.values()], tensors["grad_y"].to(y.dtype))
    return {"y": y.detach()} | {f"{name}.grad": g for name, g in zip(leaves, grads)}


def uncentred(logits):
    """softmax without the second term of its derivative w_i dw_i - w_i sum_j w_j dw_j."""
    return (logits - logits.logsumexp(-1, keepdim=True).detach()).exp()


def of_definition(tensors, case):
    """Returns, for y and each gradient, the correct value, the norm by which errors are
    divided, and the definition's largest error in the kernel's dtypes.

    The norm is at least that without the second term of softmax's derivative: where the
    two terms nearly cancel, their rounding errors remain. Mixed dtypes are computed in 16
    bits, since a kernel may do so."""
    tensors = {name: t for name, t in tensors.items() if t is not None}
    exact = {name: as_float64(t) for name, t in tensors.items()}
    values = by_definition(exact, case.scaling)
    larger = by_definition(exact, case.scaling, uncentred)
    norms = {name: max(values[name].norm().item(), larger[name].norm().item()) or 1.0
             for name in values}
    if "mixed" in case.dtypes:
        tensors = {name: t.to(tensors["x"].dtype) for name, t in tensors.items()}
    with autocast(case):
        rounded = by_definition(tensors, case.scaling)
    errors = errors_of(rounded, values, norms)
    return values, norms, {name: largest(each) for name, each in errors.items()}


@functools.cache
def of_other_draws(case):
    """Returns the definition's largest errors in two more draws of a case's tensors."""
    return [of_definition(make(replace(case, seed=case.seed + i)), case)[2] for i in (1, 2)]


def reference(tensors, case):
    """Returns, for y and each gradient, the correct value, the norm by which errors are
    divided, and how large the error of a row or column may be:

        the least tolerance + 4 * the definition's largest error, in the kernel's dtypes

    In 16 bits, errors vary, so three draws are taken, unless that takes long."""
    key = hash((case.dtypes, case.scaling, *(
        (name, t.shape, as_float64(t).numpy().tobytes()) for name, t in tensors.items())))
    if key not in REFERENCES:
        values, norms, errors = of_definition(tensors, case)
        draws, least = [errors], DTYPES[case.dtypes][-1]
        if least > 1e-4 and math.prod(case.lead) * case.k * case.d < 10**7:
            draws += of_other_draws(replace(case, frozen=(), filled=False))
        allowed = {name: least + 4 * max(draw[name] for draw in draws) for name in values}
        REFERENCES[key] = values, norms, allowed
    return REFERENCES[key]


def errors_of(found, values, norms):
    """Returns the norms of the errors of each tensor's rows and columns, relative to those
    of an average row or column."""
    errors = {}
    for name, t in found.items():
        off = as_float64(t) - values[name]
        of_parts = dict(rows=off.norm(dim=-1), columns=off.reshape(-1, off.shape[-1]).norm(dim=0))
        errors[name] = {part: each.nan_to_num(math.inf) * each.numel()**0.5 / norms[name]
                        for part, each in of_parts.items()}
    return errors


def largest(errors):
    return max(norm.max().item() if norm.numel() else 0.0 for norm in errors.values())


def too_large(errors, allowed):
    """Returns the names of the tensors that are wrong: y, then the worst gradient first."""
    excess = {name: largest(each) / allowed[name] for name, each in errors.items()}
    return sorted([name for name in excess if not excess[name] <= 1],
                  key=lambda name: (name != "y", -excess[name]))


# ---- A call ----
def autocast(case):
    dtype = DTYPES[case.dtypes][3]
    return torch.autocast(torch.device(DEVICE).type, dtype or bf16, enabled=bool(dtype))


GLOBAL_STATE = {  # name -> functions that read and set it
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "float32's precision": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the use of deterministic algorithms": (
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "the generator's seed": (torch.initial_seed, torch.manual_seed)}


@contextlib.contextmanager
def new_memory_is_nan():
    """Uses a mode of PyTorch that fills new memory, and then the user's mode again."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def check(*calls):
    """Runs the backward passes, neither in the order of the calls nor in reverse (a kernel
    may keep a queue or a stack). Compares results only then, since a call may overwrite
    those of another."""
    __tracebackhide__ = True
    found = {call: call.results() for call in calls[::2] + calls[1::2]}
    for call in calls:
        call.compare(found[call])


class Call:
    """A call of a kernel. `moment` begins a failure's message."""

    def __init__(self, kernel, case, mode=torch.enable_grad, inputs=None, moment=""):
        __tracebackhide__ = True
        self.kernel, self.case, self.mode, self.moment = kernel, case, mode, moment
        with mode():
            self.inputs = dict(inputs or make(case))
        self.before = {name: t.detach().clone() for name, t in self.inputs.items()
                       if t is not None}
        self.trainable = [name for name in self.before if self.inputs[name].requires_grad]
        self.required = self.trainable if mode is torch.enable_grad else []
        with mode(), autocast(case):
            self.y = self.guarded(
                "the call", kernel, *(self.inputs[name] for name in INPUTS), case.scaling)
        self.check_y()
        self.grad_y = self.inputs["grad_y"].to(self.y.dtype)

    def guarded(self, what, action, *arguments):
        """Returns the action's result. It must not raise, or change global state or inputs."""
        __tracebackhide__ = True
        with new_memory_is_nan() if self.case.filled else contextlib.nullcontext():
            state = {name: get() for name, (get, _) in GLOBAL_STATE.items()}
            try:
                result = action(*arguments)
            except Exception as error:
                self.fail(f"{what} raised {type(error).__name__}: {error}",
                          "If that is by design, use -k to leave out such tests.")
            for name, (get, put_back) in GLOBAL_STATE.items():
                if get() != state[name]:
                    put_back(state[name])
                    self.fail(f"{what} changed {name}")
        for name, value in self.before.items():
            now = self.inputs[name].detach()
            same = torch.equal(now, value) or torch.equal(now.nan_to_num(), value.nan_to_num())
            self.require(same, f"{what} changed {name} in place")
            same = self.inputs[name].requires_grad == (name in self.trainable)
            self.require(same, f"{what} changed {name}.requires_grad")
        return result

    def check_y(self):
        __tracebackhide__ = True
        y, (x, *_, cast, _) = self.y, DTYPES[self.case.dtypes]
        shape, dtypes = (*self.case.lead, self.case.d), [cast, f32] if cast else [x]
        self.require(y.shape == shape, f"wrong shape: expected {shape}, found {(*y.shape,)}")
        self.require(y.dtype in dtypes, f"wrong dtype: expected one of {dtypes}, found {y.dtype}")
        self.require(y.requires_grad or not {*self.required} & {*TRAINED},
                     f"y does not require grad, unlike {', '.join(self.required)}")

    def gradients(self):
        """Returns the gradients. A missing gradient of x, A, B or Wg counts as 0."""
        if not self.y.requires_grad:
            return {}
        leaves = [self.inputs[name] for name in self.required]
        grads = torch.autograd.grad(self.y, leaves, self.grad_y, allow_unused=True)
        return {f"{name}.grad": torch.zeros_like(leaf) if g is None else g
                for name, leaf, g in zip(self.required, leaves, grads)
                if g is not None or name in TRAINED}

    def results(self):
        """Returns y, and the gradients of the inputs that require one."""
        __tracebackhide__ = True
        grads = self.guarded("the backward", self.gradients)
        written = [name for name in self.required if self.inputs[name].grad is not None]
        self.require(not written, f"the backward wrote to .grad of {', '.join(written)}")
        return {"y": self.y} | grads

    def errors(self, found):
        """Returns the errors, and the names of the tensors that are wrong."""
        values, norms, allowed = reference(self.before, self.case)
        errors = errors_of(found, values, norms)
        return errors, too_large(errors, allowed)

    def compare(self, found):
        __tracebackhide__ = True
        errors, wrong = self.errors(found)
        if wrong:
            self.fail(describe(self, found, errors, wrong), cause(self, found, errors, wrong))

    def require(self, condition, message):
        __tracebackhide__ = True
        if not condition:
            self.fail(message)

    def fail(self, message, advice=""):
        __tracebackhide__ = True
        shapes = ", ".join(f"{name} {(*t.shape,)}" for name, t in self.before.items())
        lines = [f"{self.moment}{message}", f"{self.case}, torch.{self.mode.__name__}",
                 shapes, advice]
        raise AssertionError("\n".join(filter(None, lines)))


# ---- The tests ----
def hydralora_layer(x, W0, bias, A, B, Wg, scaling, device="meta"):
    """HydraLoRALinear on these tensors. Copies of them would keep the gradients."""
    n, d, r = B.shape
    base = nn.Linear(A.shape[1], d, bias is not None, device, W0.dtype)
    layer = HydraLoRALinear(base, num_heads=n, r=r, lora_alpha=scaling * r)
    weights = {"base.weight": W0, "lora_A": A, "lora_B": B, "router.weight": Wg}
    if bias is not None:
        weights["base.bias"] = bias
    return torch.func.functional_call(layer, weights, x)


def read_settings():
    """Returns what the environment names: the device, the kernel and the case "own"."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
    device = settings.pop("HYDRALORA_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    name, shape = settings.pop("HYDRALORA_IMPL", None), settings.pop("HYDRALORA_SHAPE", None)
    kernel, own = pkgutil.resolve_name(name) if name else hydralora_layer, {}
    if settings or not callable(kernel):
        raise ValueError(f"{[*settings] or name}: use HYDRALORA_IMPL=module:function")
    if shape and not re.fullmatch(r"\d+(,0*[1-9]\d*){4}", shape):
        raise ValueError(f"HYDRALORA_SHAPE={shape}: use tokens,k,d,r,n")
    if shape:
        tokens, *sizes = map(int, shape.split(","))
        own["own"] = dict(zip("kdrn", sizes), lead=(1, tokens), bias=False)
    torch.empty(1, device=device)
    return device, kernel, own


DEVICE, IMPLEMENTATION, OWN = read_settings()


@pytest.fixture
def implementation():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(2**40)  # which no kernel sets
    torch.set_float32_matmul_precision("highest")  # whatever the kernel's module set
    yield IMPLEMENTATION
    torch.set_num_threads(threads)


MODES = {"inference": torch.inference_mode, "values": torch.no_grad, "gradients": torch.enable_grad}


def each_case(*names, modes=MODES):
    return parametrize("mode, case", [
        pytest.param(MODES[mode], case, id=f"{mode}-{case.id}")
        for name in names for case in cases_of(name) for mode in modes])


@each_case(*CASES, *OWN)
def test_oracle_results(implementation, mode, case):
    check(Call(implementation, case, mode))


@each_case(*GENERAL)
def test_oracle_calls_in_a_row(implementation, mode, case):
    """The test makes calls with other tokens, weights, sizes and layouts, all before the
    first backward. They share the tensors that do not change. A correct kernel keeps no
    scaling, size, grid, gates or buffer of an earlier call."""
    start, calls = make(case), []
    times = 5 if case.name == "plain" and mode is torch.enable_grad else 2  # 75 calls or 30
    for change in times * [
            {}, {}, dict(scaling=0.0), dict(scaling=-1.75), dict(lead=(2, 1)), dict(seed=1),
            dict(lead=(2, 70)), dict(lead=(2, 0)), dict(lead=(2, 1), seed=1), dict(r=32),
            dict(bias=False), dict(n=20), {}, dict(layout="swapped"), {}]:
        now = replace(case, **change)
        inputs = make(now)
        for name in now.inputs:
            old, new = start[name], inputs[name]
            if old is not None and old.stride() == new.stride() and torch.equal(old, new):
                inputs[name] = old
        what = ", ".join(f"{key}={value}" for key, value in change.items())
        moment = f"call {len(calls) + 1}, {what or 'like the first'}: "
        calls.append(Call(implementation, now, mode, inputs, moment))
    check(*calls)


@each_case(*GENERAL)
def test_oracle_changed_tensors(implementation, mode, case):
    """Between calls, the test changes the values of an input, in place or in new memory
    (as offloading does), but not its version, sum or first element. A correct kernel uses
    the new values, in training and in evaluation."""
    if mode is not torch.enable_grad:  # as in generation
        case = replace(case, lead=(2, 1), frozen=INPUTS)
    inputs, moment = make(case), ""
    for way, name in [("", ""), *itertools.product(("in place", "moved"), case.inputs)]:
        if name:
            start, rest = inputs[name].detach().flatten().tensor_split([1])
            changed = torch.cat([start, rest.flip(0)]).view(inputs[name].shape)
            moment = f"after the test changed {name} ({way}): "
            if way == "moved":
                inputs[name].data = changed
            else:
                inputs[name].data.copy_(changed)
        for each in (mode, torch.no_grad):
            check(Call(implementation, case, each, inputs, moment))


@each_case(*GENERAL, modes=["gradients"])
def test_oracle_gradients_of_each_subset(implementation, mode, case):
    """Each subset of the inputs requires grad."""
    inputs = make(case)
    for size in range(len(case.inputs), -1, -1):
        for frozen in itertools.combinations(case.inputs, size):
            for name in case.inputs:
                inputs[name].requires_grad_(name not in frozen)
            moment = f"if {', '.join(frozen) or 'nothing'} is frozen: "
            check(Call(implementation, case, mode, inputs, moment))


@each_case(*GENERAL, modes=["gradients"])
def test_oracle_gradients_accumulate(implementation, mode, case):
    """Two calls add up in .grad, and so do two backward passes of one call, or PyTorch
    raises an error (as it does for a compiled kernel)."""
    for what, calls, passes in (("two calls", 2, 1), ("two backward passes", 1, 2)):
        inputs = make(case)
        made = [Call(implementation, case, mode, inputs, f"{what}: ") for _ in range(calls)]
        with contextlib.suppress(RuntimeError):
            for _ in range(passes):
                torch.autograd.backward([call.y for call in made], [call.grad_y for call in made],
                                        retain_graph=passes > 1)
            made[0].compare({f"{name}.grad": inputs[name].grad / 2 for name in TRAINED})


@each_case(*GENERAL, modes=["gradients"])
def test_oracle_gradients_after_a_change(implementation, mode, case):
    """After the call, the test changes y in place (as y += residual does) or an input.
    With a correct kernel, gradients are correct, or PyTorch raises an error."""
    for name in ("y", *case.inputs):
        moment = f"after the test changed {name}, the backward: "
        call = Call(implementation, case, mode, None, moment)
        with contextlib.suppress(RuntimeError):
            (call.y if name == "y" else call.inputs[name].detach()).add_(1)
            call.compare(call.gradients())


@each_case(*GENERAL)
def test_oracle_nan_propagates(implementation, mode, case):
    """The test puts a nan into an input, or an inf into grad_y (which a GradScaler looks
    for). With a correct kernel, y is nan where it is by definition, and there alone; a
    gradient that is not finite by definition is not finite."""
    for name in (*case.inputs, "grad_y"):
        inputs, value = make(case), math.inf if name == "grad_y" else math.nan
        inputs[name].data[(-1,) * inputs[name].dim()] = value
        call = Call(implementation, case, mode, inputs, f"{value} in {name}: ")
        found = {key: as_float64(t) for key, t in call.results().items()}
        correct, _, _ = reference(call.before, case)
        call.require(torch.equal(found["y"].isnan(), correct["y"].isnan()),
                     "y is nan at other elements than by definition")
        finite = [key for key in found
                  if found[key].isfinite().all() and not correct[key].isfinite().all()]
        call.require(not finite, f"this should not be finite, but is: {', '.join(finite)}")


@each_case(*GENERAL)
def test_oracle_memory_is_freed(implementation, mode, case):
    """With a correct kernel, x, y and grad_y are freed when the test drops them."""
    for with_backward in (True, False):
        call = Call(implementation, case, mode)
        if with_backward:
            call.results()
        memory = dict(x=call.inputs["x"], y=call.y, grad_y=call.grad_y)
        memory = {name: StorageWeakRef(t.untyped_storage()) for name, t in memory.items()}
        del call
        if not all(storage.expired() for storage in memory.values()):
            gc.collect()  # a cycle is not a leak
        alive = [name for name, storage in memory.items() if not storage.expired()]
        assert not alive, f"the kernel keeps {', '.join(alive)} alive"


@each_case(*LARGE)
def test_oracle_slow_results(implementation, mode, case):
    check(Call(implementation, case, mode))


TESTS = {name.removeprefix("test_oracle_"): test for name, test in globals().items()
         if name.startswith("test_oracle_")}
SLOW, FAST = TESTS.pop("slow_results"), TESTS.pop("results")


def run_check(name, kernel, dtypes):
    """Runs, in these dtypes, test_oracle_{name} or, if name is a case, the results of it."""
    test = TESTS.get(name) or (SLOW if name in LARGE else FAST)
    [(_, parameters)] = [mark.args for mark in test.pytestmark]
    chosen = [each.values for each in parameters if each.values[1].dtypes == dtypes
              and (name in TESTS or each.values[1].name == name)]
    if not chosen:
        raise ValueError(f"there is no test or case {name} in {dtypes}")
    for mode, case in chosen:
        test(kernel, mode, case)


# ---- The message ----
PASSES_ALONE = (
    "The same call passes alone, on copies of its inputs. So the kernel seems to use what was\n"
    "left behind or changed since: a cache keyed by an address, a workspace or y overwritten\n"
    "later, a tensor saved without save_for_backward, memory that nobody wrote (torch.empty)\n"
    "or past a tensor's end, a race?")


def passes_alone(call):
    """Whether the same call passes when it is repeated on copies of its inputs."""
    copies = {name: copy.deepcopy(call.inputs[name].detach()).requires_grad_(
        name in call.trainable) for name in call.before}
    with contextlib.suppress(Exception):
        again = Call(call.kernel, call.case, call.mode, {"bias": None} | copies)
        return not again.errors(again.results())[1]
    return False


def describe(call, found, errors, wrong):
    """Returns what is wrong, where, and by how much."""
    values, norms, allowed = reference(call.before, call.case)
    worst, places = wrong[0], []
    for part, each in errors[worst].items():
        off = torch.argwhere(each > allowed[worst])
        if 0 < len(off) < each.numel():
            places.append(f" in {len(off)} of {each.numel()} {part}, first {off[0].tolist()}")
    given, value = as_float64(found[worst]), values[worst]
    at = torch.unravel_index((given - value).abs().nan_to_num(math.inf).argmax(), value.shape)
    correct = [name for name in found if name not in wrong]
    lines = [
        f"{worst} is {'wrong' if given.any() else 'zero or missing'}{','.join(places)}: "
        f"error {largest(errors[worst]):.2g}, tolerance {allowed[worst]:.2g}",
        f"worst element {[i.item() for i in at]}: "
        f"found {given[at]:.9g}, expected {value[at]:.9g}",
        f"wrong: {', '.join(wrong)}; correct: {', '.join(correct) or 'nothing'}"]
    factor = ((given * value).sum() / value.square().sum()).item()
    of_scaled = errors_of({worst: given / factor}, values, norms)
    if abs(factor) > 0.01 and not too_large(of_scaled, allowed):
        lines.insert(1, f"{worst} is {factor:.3g} times the correct one; "
                        f"the scaling is {call.case.scaling}")
    return "\n".join(lines)


def cause(call, found, errors, wrong):
    """Returns what may have gone wrong, or ""."""
    if passes_alone(call):
        return PASSES_ALONE
    _, norms, allowed = reference(call.before, call.case)
    results, known = {name: as_float64(t).nan_to_num() for name, t in found.items()}, []
    norms = {name: max(norms[name], t.norm().item()) for name, t in results.items()}
    for row in KNOWN if call.y.numel() < 50_000 else []:
        with contextlib.suppress(Exception):  # it does not run on this case
            other = Call(mutant(**row.steps), call.case, call.mode, call.inputs).results()
            other = {name: other[name].nan_to_num() for name in found}
            if not too_large(errors_of(other, results, norms), allowed):
                known.append(row.message)
    if 0 < len(known) < 4:
        return f"matches a known mistake: {' or '.join(known)}"
    if found[wrong[0]].isnan().any():
        return ("nan is in new memory and after each input" if call.case.filled else
                "nan is after each input") + ": was torch.empty read, or past an end? Or 0 / 0?"
    if call.case.dtypes == "fp32" and max(map(largest, errors.values())) < 3e-3:
        return "Errors of this size are those of products in TF32 or bfloat16."
    return ""


# ---- Mistakes ----
STEPS = dict(  # of a correct kernel
    base=lambda v: F.linear(v.x, v.W0, v.bias),  # (..., d)
    h=lambda v: v.x.to(v.A.dtype),               # (..., k)
    logits=lambda v: F.linear(v.h, v.Wg),        # (..., n)
    w=lambda v: v.logits.softmax(-1),            # (..., n)
    z=lambda v: F.linear(v.h, v.A),              # (..., r)
    delta=lambda v: v.s * torch.einsum("...n,...r,ndr->...d", v.w, v.z, v.B),
    y=lambda v: v.base + v.delta.to(v.base.dtype))  # (..., d)


def mutant(**changed):
    """Returns a kernel with some steps changed: s=lambda v: 1.0 drops the scaling, and
    dw=lambda v, g: 2 * g doubles the gradient of w. v has the inputs, n, d, r, k,
    tokens, and the steps so far, this one included. v.memory outlives the call."""
    names, memory = (*INPUTS, "s"), {}
    unknown = changed.keys() - {d + name for name in (*names, *STEPS) for d in ("", "d")}
    if unknown:
        raise ValueError(f"no such step: {', '.join(unknown)}")

    def kernel(*inputs):
        v = SimpleNamespace(**dict(zip(names, inputs)), inputs=inputs, memory=memory)
        (v.n, v.d, v.r), v.k = v.B.shape, v.x.shape[-1]
        v.tokens = v.x.shape[-2] if v.x.dim() > 1 else 0
        for name in (*names, *STEPS):
            if name in STEPS:
                setattr(v, name, STEPS[name](v))
            if name in changed:
                setattr(v, name, changed[name](v))
            hook = changed.get("d" + name)
            if hook and torch.is_grad_enabled() and getattr(v, name).requires_grad:
                t = getattr(v, name).clone()
                t.register_hook(functools.partial(hook, v))
                setattr(v, name, t)
        return v.y

    return kernel


unchanged = mutant()


def straight_through(t, value):
    """Returns `value` with the gradient of t."""
    return t + (value - t).detach()


def as_contiguous(t):
    """Returns what a kernel reads if it assumes that t is contiguous."""
    return straight_through(t, t.detach().as_strided(t.shape, torch.empty(t.shape).stride()))


def first(t, size, dim=-1):
    """Returns t, zero from index `size` of this axis on."""
    t, rest = t.tensor_split([size], dim)
    return torch.cat([t, 0 * rest], dim)


def kept(v, t, key, copy=torch.clone):
    """Returns t as it was when it was first read with this key."""
    return straight_through(t, v.memory.setdefault(key, copy(t.detach())))


def also(action):
    """Returns a step y with only a side effect."""
    return lambda v: (action(v), v.y)[1]


def mistake(message, caught_by="plain", dtypes="fp32", **steps):
    """A mistake that the case or test `caught_by` catches, with this part of a message. The
    case "plain" does not catch it, unless it is `caught_by`."""
    return SimpleNamespace(message=message, caught_by=caught_by, dtypes=dtypes, steps=steps)


KNOWN = [  # named in the message of a failure with the same results
    mistake("no scaling", s=lambda v: 1.0),
    mistake("heads in another order", B=lambda v: v.B.roll(1, 0)),
    mistake("no gradient from the router to x", logits=lambda v: F.linear(v.h.detach(), v.Wg)),
    mistake("softmax over tokens", w=lambda v: v.logits.softmax(-2)),
    mistake("softmax's backward without - sum_i w_i dw_i", w=lambda v: uncentred(v.logits)),
    mistake("heads summed", w=lambda v: 0 * v.w + 1),
    mistake("router on A x", logits=lambda v: F.linear(v.h, v.A) @ v.Wg[:, :v.r].mT),
    mistake("weights copied into a layer (see hydralora_layer)",
            A=lambda v: v.A.detach(), B=lambda v: v.B.detach(), Wg=lambda v: v.Wg.detach()),
    mistake("no bias", base=lambda v: F.linear(v.x, v.W0)),
    mistake("W0 transposed if square", "square", W0=lambda v: v.W0.T if v.k == v.d else v.W0),
    mistake("heads transposed if square", "part-tiles",
            B=lambda v: v.B.mT if v.d == v.r else v.B),
    mistake("Wg.grad transposed if square", "equal-sizes",
            dWg=lambda v, g: g.mT if v.n == v.k else g),
    mistake("gates of the first sequence only", "odd-sizes",
            w=lambda v: v.w[0].expand_as(v.w) if v.x.dim() == 5 else v.w),
    mistake("no update with one head", "one-head", delta=lambda v: v.delta * (v.n > 1)),
    mistake("no update while B is 0", "zero-heads", delta=lambda v: v.delta * v.B.any()),
    mistake("small gradient of A dropped", "near-zero", dA=lambda v, g: g * (g.norm() > 0.01)),
    mistake("softmax without its maximum", "large-logits",
            w=lambda v: v.logits.exp() / v.logits.exp().sum(-1, keepdim=True)),
    mistake("x rounded to float16", "large-magnitude", "bf16",
            x=lambda v: straight_through(v.x, v.x.half().to(v.x))),
    *(mistake(f"{name} read as contiguous", layout,
              **{name: lambda v, name=name: as_contiguous(getattr(v, name))})
      for name, layout in dict(x="last-tokens", W0="wide-rows", bias="gaps",
                               A="swapped", B="transposed", Wg="expanded").items()),
    mistake("A read without its offset", "offset", A=lambda v: straight_through(
        v.A, v.A.detach().as_strided(v.A.shape, v.A.stride(), 0))),
    mistake("grad_y read as contiguous", "expanded-batch", dy=lambda v, g: as_contiguous(g)),
    mistake("wrong in whole tiles", "tiles",
            A=lambda v: v.A * (1 + (v.tokens % 64 + v.k % 64 + v.d % 64 == 0))),
    mistake("first 64 tokens only", "past-tiles", delta=lambda v: first(v.delta, 64, -2)),
]
WRONG = [
    *KNOWN,
    *(mistake("y is wrong", name, A=lambda v, when=when: v.A * (1 + when(v))) for name, when in [
        ("long-input", lambda v: v.k > 8192),
        ("wide-square", lambda v: v.k >= 2048 <= v.d),
        ("many-wide-inputs", lambda v: v.tokens >= 1024 <= v.k),
        ("many-wide-outputs", lambda v: v.tokens >= 1024 <= v.d)]),
    mistake("y is wrong in 5 of", "sequence", delta=lambda v: first(v.delta, 65535, -2)),
    mistake("bias.grad is wrong", "sequence", "bf16", y=lambda v: torch.cat(
        [unchanged(chunk, *v.inputs[1:]) for chunk in v.x.split(64, -2)], -2)),
    mistake("Wg.grad is 0.571 times the correct one; the scaling is 1.75",
            dWg=lambda v, g: g / v.s),
    mistake("y is wrong", "square", s=lambda v: (  # if new memory is not filled
        v.s if torch.are_deterministic_algorithms_enabled() else 1.0)),
    mistake("grad_y read as contiguous", "gaps",  # and rounded otherwise
            dy=lambda v, g: as_contiguous(g) * (1 + 1e-5)),
    mistake("the call raised RuntimeError", dtypes="mixed-bf16", h=lambda v: v.x),
    mistake("wrong dtype", dtypes="autocast-fp16", y=lambda v: v.y.bfloat16()),
    mistake("TF32", y=also(lambda v: v.y.data[..., -1].mul_(1 + 1.3e-4))),  # in one column
    mistake("and after each input: was",
            A=lambda v: v.A + 0 * v.A.detach().as_strided([1], [1], v.A.numel())),
    mistake("y is wrong", "long-output", bias=lambda v: first(v.bias, 8192)),
    mistake("y is wrong", "many-heads", w=lambda v: first(v.w, 128 if v.tokens > 64 else v.n)),
    mistake("A.grad is wrong", "empty-batch", dA=lambda v, g: g + (v.y.numel() == 0)),
    mistake("wrong shape", "one-token", y=lambda v: v.y if v.tokens else v.y[None]),
    mistake("the call changed float32's precision",
            y=also(lambda v: torch.set_float32_matmul_precision("high"))),
    mistake("the call changed Wg.requires_grad", "gradients_of_each_subset",
            y=also(lambda v: v.Wg.requires_grad_())),
    mistake("y does not require grad, unlike ", "gradients_of_each_subset",
            y=lambda v: v.y if v.x.requires_grad else v.y.detach()),
    mistake("the backward changed grad_y in place", dy=lambda v, g: g.data.mul_(2)),
    mistake("the backward wrote to .grad of A",
            dA=lambda v, g: setattr(v.inputs[INPUTS.index("A")], "grad", g)),
    mistake("scaling=0.0: y is wrong", "calls_in_a_row",
            s=lambda v: v.memory.setdefault("s", v.s)),
    mistake("lead=(2, 1): y is wrong", "calls_in_a_row",
            y=also(lambda v: v.memory.setdefault(v.y.shape, v.y).data.copy_(v.y))),
    mistake("lead=(2, 70): y is wrong", "calls_in_a_row", delta=lambda v: first(
        v.delta, v.memory.setdefault((v.k, v.d, v.r, v.n), -(-v.tokens // 64) * 64), -2)),
    *(mistake("B.grad is zero", "calls_in_a_row", ddelta=ddelta, delta=lambda v: (
              v.delta.requires_grad and v.memory.setdefault("calls", []).append(v)) or v.delta)
      for ddelta in [lambda v, g: g * (v.memory["calls"].pop(0) is v),
                     lambda v, g: g * any(call is v for call in v.memory["calls"][-64:])]),
    mistake("after the test changed A (in place)", "changed_tensors",
            A=lambda v: kept(v, v.A, (v.A.data_ptr(), v.A[0, 0].item(), v.A.requires_grad))),
    mistake("after the test changed A (moved)", "changed_tensors",
            A=lambda v: kept(v, v.A, id(v.A), torch.detach)),
    mistake("The same call passes alone", "changed_tensors",
            B=lambda v: kept(v, v.B, (v.B.data_ptr(), v.B.shape))),
    mistake("two backward passes: ", "gradients_accumulate",
            dlogits=lambda v, g: v.w.data.zero_() + g),
    mistake("after the test changed y, the backward: ", "gradients_after_a_change",
            dy=lambda v, g: g * (v.y._version == 0)),
    mistake("nan in x: y is nan at other", "nan_propagates", x=lambda v: torch.nan_to_num(v.x)),
    mistake("inf in grad_y: this should not be finite", "nan_propagates",
            dy=lambda v, g: g.clamp(-1e4, 1e4)),
    mistake("y, grad_y alive", "memory_is_freed", dy=lambda v, g: v.memory.update(kept=g)),
    mistake("nan is in new memory", dA=lambda v, g: g + 0 * torch.empty_like(g)),
]


@pytest.mark.usefixtures("implementation")
@parametrize("row", WRONG, ids=lambda row: f"{row.caught_by}: {row.message}")
def test_mistake_is_caught(row):
    with pytest.raises(AssertionError, match=re.escape(row.message)):
        run_check(row.caught_by, mutant(**row.steps), row.dtypes)
    if row.caught_by != "plain":
        try:
            run_check("plain", mutant(**row.steps), row.dtypes)
        except AssertionError:
            pytest.fail(f'"plain" catches it, too: the row does not show what {row.caught_by} adds')


def test_each_case_and_test_has_a_mistake():
    found, names = {row.caught_by for row in WRONG}, {*CASES, *LARGE, *TESTS}
    assert found == names, f"{found ^ names}: no mistake in WRONG, or no such case or test"


# ---- Correct kernels ----
CORRECT = {  # and the dtypes in which it is tested
    "a module with random weights": (
        "fp32", lambda *inputs: hydralora_layer(*inputs, device=DEVICE)),
    "a view on which y += 1 raises an error": (
        "bf16", mutant(y=lambda v: v.y[None].unbind()[0])),
    "softmax in 16 bits": ("fp16", mutant(w=lambda v: F.normalize(
        (v.logits - v.logits.amax(-1, keepdim=True)).exp(), p=1, dim=-1))),
    "strided output": (
        "fp16", mutant(base=lambda v: v.base.mT.contiguous().mT if v.tokens else v.base)),
    "adapter cast to the dtype of x": ("mixed-bf16", mutant(y=lambda v: unchanged(
        v.x, v.W0, v.bias, *(t.to(v.x.dtype) for t in (v.A, v.B, v.Wg)), v.s))),
    "float32 under autocast": (
        "autocast-bf16", mutant(y=lambda v: v.base.float() + v.delta.float())),
}


@pytest.mark.usefixtures("implementation")
@parametrize("style", CORRECT)
def test_correct_kernel_passes(style):
    for name in [*CASES, *TESTS]:
        run_check(name, CORRECT[style][1], CORRECT[style][0])


# ---- The settings ----
@parametrize("slip", [lambda: mutant(AA=None), lambda: run_check("AA", unchanged, "fp32")])
def test_misspelt_mistake_is_refused(slip):
    with pytest.raises(ValueError, match="AA"):
        slip()


def test_setting_of_the_user_is_put_back():
    with new_memory_is_nan():
        run_check("plain", unchanged, "fp32")
        assert torch.get_deterministic_debug_mode() == 1


def test_chosen_kernel_is_tested(monkeypatch):
    monkeypatch.setenv("HYDRALORA_IMPL", "math:fsum")
    monkeypatch.setenv("HYDRALORA_SHAPE", "2048,4096,11008,16,3")
    _, kernel, own = read_settings()
    assert kernel is math.fsum
    assert own["own"] == dict(lead=(1, 2048), k=4096, d=11008, r=16, n=3, bias=False)
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


@parametrize("name", ["plain", "one-token", "empty-batch", "zero-heads"])
def test_definition_by_hand_agrees(name):
    for case in cases_of(name):
        exact = {name: as_float64(t) for name, t in make(case).items() if t is not None}
        correct = by_definition(exact, case.scaling)
        arrays = {"bias": np.zeros(case.d)} | {name: t.numpy() for name, t in exact.items()}
        y, grads = definition_by_hand(**arrays, scaling=case.scaling)
        found = {"y": y} | {f"{name}.grad": g for name, g in grads.items()}
        for name, value in correct.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


# ---- The layer ----
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
    """It runs its example with the imports that its first lines name."""
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


# ---- Choosing N ----
@parametrize("sizes", [[240 // n] * n for n in range(2, 11)] + [[144, 72, 24]])
def test_num_heads_of_domains(sizes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        topics = rng.dirichlet(np.full(40, 0.2), len(sizes)).repeat(sizes, axis=0)
        documents = [rng.choice(40, size=25, p=topic).tolist() for topic in topics]
        assert num_heads_from_corpus(documents)[0] == len(sizes)


def test_sse_by_hand():
    texts = ["a c", "\n", "b  c\n", "a a c", "b b c"]
    tokens = [[], *(torch.tensor(ids) for ids in ([1, 3], [2, 3], [1, 1, 3], [2, 2, 3]))]
    for documents in (texts, tokens):
        n, sse = num_heads_from_corpus(documents, max_heads=3)
        assert n == 2
        np.testing.assert_allclose(sse, [1.659844, 0.069862, 0.034931], atol=1e-5)
    assert num_heads_from_corpus(["a b", "c d", "e f"] * 5 + [9 * "a b " + "z"])[0] == 3
    n, sse = num_heads_from_corpus(["a b", "c d", "e f"] * 5)
    assert n == 3
    np.testing.assert_allclose(sse, [10, 5] + 8 * [0], atol=1e-5)


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
    close(w, (x @ layer.router.weight.T).softmax(-1).detach())
    assert len(gates) == 3 and not w.requires_grad and not layer.router._forward_hooks
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
    ("head", lambda: make_layer(num_heads=0)),
    (r"4 numbers, got \[4, 1\]", lambda: make_layer().to_lora(GATES[:, None])),
    ("Own overrides forward", lambda: make_layer(
        layer=type("Own", (HydraLoRALinear,), dict(forward=print))).to_lora(GATES)),
    *(("plain nn.Linear", lambda change=change: merged_after(change)) for change in (
        lambda base: setattr(base, "forward", nn.Linear(K, D).forward),
        lambda base: setattr(base, "weight", nn.Parameter(torch.ones(D, K).as_subclass(Subclass))),
        lambda base: base.register_forward_hook(print))),
    ("no HydraLoRA layer", lambda: hydralora_state_dict(plain_model())),
    ("layers share a router", lambda: mean_gates(
        nn.Sequential(layer := make_layer(), copy.copy(layer)).eval(), [])),
    *((f"^{mask} has zeros", lambda mask=mask: mean_gates(
        adapted_model().eval(), [collections.UserDict({mask: torch.ones(2, 2).triu()})]))
      for mask in ("attention_mask", "decoder_attention_mask")),
    ("q_proj got no token", lambda: mean_gates(adapted_model().eval(), [])),
    ("a batch has no token", lambda: mean_gates(make_layer().eval(), [randn(0, K)])),
    *((f"{name} is sharded or", lambda name=name: hydralora_state_dict(
        layer_with(name, torch.ones(9)))) for name in ("lora_A", "lora_B")),
    ("B is sharded or", lambda: hydralora_state_dict(
        layer_with("lora_B", torch.ones(9, 9).as_subclass(Subclass)))),
    *(("A is sharded or", lambda use=use: use(adapted_model().to("meta"), {}))
      for use in (merge_hydralora, export_lora)),
    ("is adapted", lambda: export_lora(
        inject_hydralora(adapted_model("0.q_proj"), "q_proj.base"), {})),
    *(("list of two", lambda given=given: num_heads_from_corpus(given))
      for given in ("one string", [["a"], []])),
])
def test_bad_call_is_refused(word, call):
    with pytest.raises((TypeError, ValueError), match=word):
        call()


@parametrize("model, target_modules, word", [
    (plain_model(), ["o_proj", "norm"], "named 'norm'"),
    (plain_model(), "proj", "named 'proj'"),
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
    for bad, key in (({}, "layers.0.q_proj.lora_A"), (doubled | {"more": IDS}, "more"),
                     (doubled | {last: state[last].T}, last)):
        with pytest.raises(ValueError, match=f"first in '{key}'"):
            load_hydralora_state_dict(model, bad)
    with pytest.raises(KeyError, match="layers.1.v_proj"):
        merge_hydralora(model, dict.fromkeys([*hydralora_layers(model)][:-1], GATES))
    assert torch.equal(model(IDS), logits)


# ---- The toy ----
@pytest.fixture(scope="session")
def toy():
    if not Path(__file__).with_name("train_toy.py").exists():
        pytest.skip("needs train_toy.py")
    return pkgutil.resolve_name("train_toy")


def toy_output(toy, options="", **settings):
    """What train_toy.py prints, on the CPU, with these options and settings."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", ["train_toy.py", "--device", "cpu", *options.split()])
        for name, value in settings.items():
            patch.setattr(toy, name, value)
        toy.main()
    torch.set_num_threads(threads)
    return output.getvalue()


def agree(said, found, tolerances=(None, 1.2, 0.06)):  # for one decimal, for two
    """Whether two words are equal, or two decimal numbers up to another CPU's rounding."""
    said, found = said.rstrip("%"), found.rstrip("%")
    decimals = len(said.partition(".")[2])
    if decimals and re.fullmatch(r"[\d.]+ [\d.]+", f"{said} {found}"):
        return abs(float(said) - float(found)) <= tolerances[decimals]
    return said == found


PINNED = {  # options -> the numbers with decimals or a comma of each printed line, in 40 steps
    "--all": """
13.3
7.8
3.2
0.58
8.0 0.02 0.00
13.0 0.42 0.05
14.6 0.68 0.07
0.00 1.00 0.00
0.97 0.03 0.00
1.00 0.00 0.00
3.2
14.6
13.3
14.5
2,496 14.6
2,560 12.4
2,560 13.0
2,496 14.0
8,192 13.5
2,496 13.4
1,920 12.8
2,304 13.2
2,688 13.0
0.22 0.49
0.39 0.59
0.76 0.17
0.54 0.32
0.11 0.11""",
    "--seed 3 --heads 4 --rank 5 --lr 0.05 --target v_proj down_proj": """
15.2
8.3
3.2
0.68
8.3 0.01 0.02 0.00 0.00
8.3 0.01 0.03 0.01 0.00
13.4 0.16 0.27 0.73 0.09
0.09 0.11 0.61 0.19
0.00 0.00 0.00 1.00
0.23 0.42 0.15 0.20
1.00 0.00 0.00 0.00
0.48 0.10 0.09 0.33
0.99 0.00 0.00 0.01
3.2
13.4
13.1
13.5
5,440 13.4
5,824 13.6
5,824 13.2
4,864 13.2
6,720 12.4
0.17 0.52
0.30 0.65
0.95 0.11
0.63 0.21
0.02 0.08"""}


@parametrize("options", PINNED)
def test_toy_short_run(options, toy):
    """A change of a formula, rate, rank, seed or schedule changes a number. The runs are so
    short that other rounding does not."""
    close_enough = functools.partial(agree, tolerances=(None, 0.4, 0.015))
    output = toy_output(toy, options, STEPS=40, TEST=60, WATCHED=(1, 4, 40), EARLY=6)
    lines = [line for line in output.splitlines() if re.search(r"\d[.,]\d", line)]
    found = [re.findall(r"\d[\d,]*[.,]\d+", line) for line in lines]
    pinned = [line.split() for line in PINNED[options].split("\n")[1:]]
    to_paste = "\n".join(map(" ".join, found))
    assert [*map(len, found)] == [*map(len, pinned)], f"to paste:\n{to_paste}"
    wrong = [line for line, numbers, pins in zip(lines, found, pinned)
             if not all(map(close_enough, pins, numbers))]
    assert not wrong, "\n".join([*wrong, "to paste:", to_paste])


@pytest.fixture(scope="session")
def seed_0(toy):
    """Three methods."""
    table = toy.methods
    return toy_output(toy, methods=lambda *sizes: dict([*table(*sizes).items()][:3]))


REAL = """
On new ciphers, 17.8% of the old answers are right.
The curve bends most at 3. Using 3 heads.
20 10.9 0.93 0.13
400 96.6 0.98 0.12
merged for each domain 96.7
HydraLoRA 2,496 96.6
LoRA 2,560 78.7
LoRA with a ReLU 2,560 93.0
LoRA-Split 2,688 96.4
two domains, one start, after 20 steps 0.79 0.10
two domains, one start, after 400 steps 0.41 0.42"""


def test_toy_real_run(seed_0):
    printed = [line.split() for line in seed_0.splitlines()]
    for line in REAL.strip().splitlines():
        words = line.split()
        assert any(len(words) == len(other) and all(map(agree, words, other))
                   for other in printed), line


def test_toy_prints_its_answers(toy, seed_0):
    """The docstring's example is seed 0's domain 0. A * marks each error."""
    generator = torch.Generator().manual_seed(0)
    ciphers = [torch.randperm(15, generator=generator).tolist() for _ in range(6)][3:]
    said, answered = re.findall(r"(?:input|target): +([a-o ]+) \.", toy.__doc__)
    assert f"domain 0  {said} " in seed_0 and f"answer    {answered} " in seed_0
    for domain, cipher in enumerate(ciphers):
        plain, answers = re.search(rf"domain {domain}  (.+)\n   answer   (.+)", seed_0).groups()
        for letter, mark, answer in zip(plain[::2], answers[::2], answers[1::2], strict=True):
            right = toy.LETTERS[cipher[toy.LETTERS.index(letter)]] == answer
            assert mark == (" " if right else "*")


@parametrize("targets", [["o_proj"], ["q_proj", "v_proj"], ["down_proj", "k_proj"]])
def test_toy_cut_model_is_the_model(targets, toy):
    model = TinyTransformer(TinyConfig(toy.SYMBOLS + 1, 2 * toy.LENGTH))
    plain = torch.randint(toy.SYMBOLS, (5, toy.LENGTH))
    data = toy.encode(model, (plain, None, None))
    adapted = toy.adapt(model, toy.Method(3, 9, 0.1), targets, 0)
    for layer in hydralora_layers(adapted).values():
        nn.init.normal_(layer.lora_B)
    tokens = F.pad(plain, (0, toy.LENGTH), value=toy.SYMBOLS)
    close(toy.predict(adapted, data), adapted(tokens)[:, toy.LENGTH:], rtol=1e-4, atol=1e-4)


@parametrize("name", ["LoRA MoE", "LoRA with a ReLU"])
def test_toy_formula(name, toy):
    method = toy.methods(3, 9, 64, 32)[name]
    layer = method.layer(
        nn.Linear(64, 32), num_heads=method.n, r=method.r, lora_alpha=2 * method.r)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 64)
    z = torch.einsum("nrk,btk->btnr", layer.lora_A.expand(method.n, -1, -1), x)
    z = z.relu() if "ReLU" in name else z
    delta = torch.einsum("btn,ndr,btnr->btd", layer.router(x), layer.lora_B, z)
    close(layer(x), layer.base(x) + 2 * delta, rtol=1e-4, atol=1e-4)


def test_toy_prints_means(toy):
    output = toy_output(toy, "--seed 5 --seeds 2", run=lambda seed, _: {"LoRA (%)": 10.0 * seed})
    assert output.split()[4:] == ["LoRA", "(%)", "55.00", "7.07", "50.00", "60.00"]


@parametrize("options", [
    "--heads 0", "--lr 0", "--seeds 0", "--target proj", "--target o_proj o_proj"])
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


def test_readme_output_is_that_of_a_toy_run(readme, seed_0):
    """Up to another CPU's rounding. The first block is the picture."""
    def begins(line, said):
        words = said.removesuffix(" ...").split()
        return len(words) <= len(line.split()) and all(map(agree, words, line.split()))

    printed, (_, *blocks) = seed_0.splitlines(), re.findall(r"```text\n(.*?)```", readme, re.S)
    for part in "\n".join(blocks).split("\n\n"):
        lines = part.strip("\n").splitlines()
        starts = range(len(printed) - len(lines) + 1)
        assert any(all(map(begins, printed[i:], lines)) for i in starts), part


TABLE = "python train_toy.py --seed 1100 --seeds 20 --all"


def toy_table(readme):
    """Method -> accuracy, HydraLoRA's lead."""
    rows = re.findall(r"^\| ([^|]+) \| [\d,]+ \| ([\d.]+) \| ([-+\d.]*)", readme, re.M)
    return {name: (float(accuracy), float(lead or 0)) for name, accuracy, lead in rows}


def test_readme_toy_table_has_the_methods(readme, toy):
    table = toy_table(readme)
    assert TABLE in readme and {*table} == {*toy.methods(3, 9, 64, 64), "LoRA-Split"}
    for accuracy, lead in table.values():
        assert lead == pytest.approx(table["HydraLoRA"][0] - accuracy, abs=0.11)


@pytest.mark.skipif("TOY_TABLE" not in os.environ, reason="set TOY_TABLE=1")
def test_readme_toy_table_is_that_of_a_run(readme):
    command = [sys.executable, *TABLE.split()[1:], "--device", "cpu"]
    text = subprocess.check_output(command, cwd=Path(__file__).parent, text=True)
    print(text)
    found = dict(re.findall(r"^(.*?) +(-?[\d.]+) +[\d.]+ +-?[\d.]+ +-?[\d.]+$", text, re.M))
    for name, (accuracy, lead) in toy_table(readme).items():
        assert float(found[f"{name} (%)"]) == pytest.approx(accuracy, abs=1.0), name
        if name != "HydraLoRA":
            assert float(found[f"HydraLoRA's lead over {name}"]) == pytest.approx(lead, abs=1.0)
