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

In 16 bits, a kernel may round each step, and add up 8 heads or 20 chunks of 32 tokens;
longer sums must be in float32. These cases find an update in y that is 10% too large in
bf16, or 2% in fp16. Most smaller errors are left to the fp32 cases.

The id of a test, such as test_oracle_results[2-gradients-3d-odd-bias-fp32], says what the
kernel must support. Leave out what yours does not:

    -k "oracle and not gradients"       it has no backward
    -k "oracle and 3d and aligned"      x is (batch, tokens, k); 16 divides k, d and r
    -k "oracle and not empty"           there are tokens
    -k "oracle and not strided"         tensors are contiguous
    -k "oracle and nobias"              bias is None
    -k "oracle and not twice and not overwritten"    one backward, before any tensor changes
    -k "oracle and not fp64 and not mixed and not autocast"    one dtype, at most 32 bits
    -k "oracle and not slow and fp32"   for a first verdict, in seconds

test_oracle_results names the simplest case that fails in the same way. To repeat it, or to
test your own sizes:

    from test_hydralora import *
    from my_module import my_kernel
    check(Call(my_kernel, Case(dtypes='bf16', bias=False)))
    check(Call(my_kernel, Case(lead=(1, 2048), k=4096, d=11008, r=16, n=3)))

To understand what is tested, read room 1, and stop there. Room 2 is what a failure says, and
room 3 has mistakes that must be caught. Rooms 4 and 5 test the other files.
"""
import collections
import contextlib
import functools
import gc
import inspect
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
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, hydralora_layers, hydralora_state_dict,
    inject_hydralora, load_hydralora_state_dict, mean_gates, merge_hydralora, record_gates)

parametrize = pytest.mark.parametrize


# ==== 1. The oracle ====

# ---- The definition ----
INPUTS = ("x", "W0", "bias", "A", "B", "Wg")
TENSORS = (*INPUTS, "grad_y")
TRAINED = ("x", "A", "B", "Wg")  # must get a gradient


def definition(x, W0, bias, A, B, Wg, scaling):
    """Eqs. 3 and 4, with a scaling. In float64, its y and its gradients are correct."""
    y = F.linear(x, W0, bias)              # (..., d)
    x = x.to(A.dtype)                      # (..., k)
    w = F.linear(x, Wg).softmax(-1)        # (..., n)
    z = F.linear(x, A)                     # (..., r)
    for w_i, B_i in zip(w.unbind(-1), B):  # (...), (d, r)
        y = y + (scaling * w_i[..., None] * F.linear(z, B_i)).to(y.dtype)
    return y


def read_settings():
    """Returns the device and the kernel, or None for this project's layer."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("HYDRALORA_")}
    device = settings.pop("HYDRALORA_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    name = settings.pop("HYDRALORA_IMPL", None)
    kernel = name and pkgutil.resolve_name(name)
    if settings or name is not None and not callable(kernel):
        raise ValueError(f"{[*settings] or name}: use HYDRALORA_IMPL=module:function")
    return device, kernel


DEVICE, IMPLEMENTATION = read_settings()


# ---- The cases ----
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Dtypes = collections.namedtuple("Dtypes", "x base adapter autocast tolerance")
DTYPES = {  # of x and y, of W0 and bias, of A, B and Wg; autocast's; the largest error
    "fp64": Dtypes(f64, f64, f64, None, 1e-10),
    "fp32": Dtypes(f32, f32, f32, None, 1e-4),
    "bf16": Dtypes(bf16, bf16, bf16, None, 0.055),
    "fp16": Dtypes(f16, f16, f16, None, 0.01),
    "mixed-bf16": Dtypes(bf16, bf16, f32, None, 0.055),
    "mixed-fp16": Dtypes(f16, f16, f32, None, 0.01),
    "autocast-bf16": Dtypes(bf16, f32, f32, bf16, 0.055),
    "autocast-fp16": Dtypes(f32, f32, f32, f16, 0.01),
}
MODES = {"gradients": torch.enable_grad, "values": torch.no_grad, "inference": torch.inference_mode}


@dataclass
class Case:
    """All that decides what a call is given."""
    dtypes: str = "fp32"
    mode: str = "gradients"
    lead: tuple = (2, 5)  # axes of x before k: () is one token, (5,) a sequence
    k: int = 7
    d: int = 6
    r: int = 3
    n: int = 4
    bias: bool = True
    scaling: float = 1.75
    factors: dict = field(default_factory=dict)  # name -> multiplies this tensor
    layouts: dict = field(default_factory=dict)  # name -> a row of LAYOUTS
    frozen: tuple = ()    # what does not require grad
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
        odd = self.k % 16 or self.d % 16 or self.r % 16
        words = [self.mode, f"{len(self.lead) + 1}d", "odd" if odd else "aligned"]
        more = dict(empty=0 in self.lead, strided=self.layouts, frozen=self.frozen)
        words += [word for word, present in more.items() if present]
        return "-".join([*words, "bias" if self.bias else "nobias", self.dtypes])


def before_nan(t):
    """Returns a contiguous copy of t, in memory that goes on with nan."""
    return torch.cat([t.flatten(), t.new_full([1024], math.nan)])[:t.numel()].view(t.shape)


STRIDED = {  # how a tensor lies in memory, if not contiguous
    "gaps": lambda t: before_nan(torch.stack([t - 99, t], -1)).select(-1, 1),
    "wide-rows": lambda t: before_nan(torch.stack([t - 99, t], -2)).select(-2, 1),
    "transposed": lambda t: before_nan(t.mT).mT,
    "tokens-first": lambda t: before_nan(t.transpose(0, -2)).transpose(0, -2),
}
EXPANDED = {
    "one-value": lambda t: before_nan(t.flatten()[:1]).expand(t.shape),
    "one-token": lambda t: before_nan(t[..., :1, :]).expand(t.shape),
}
LAYOUTS = STRIDED | EXPANDED
SIZES = [  # of k and d, and ranks
    ((16, 32, 64, 128, 256), (16, 32, 64)),
    ((1, 3, 4, 7, 8, 20, 33, 64, 73, 128, 150, 256), (1, 3, 4, 8, 16, 33, 64))]
LEADS = ((), (1,), (1, 1), (5,), (40,), (131,), (2, 5), (0, 5), (1, 128), (2, 67), (3, 43),
         (16, 1), (300, 2), (2, 3, 10), (3, 1, 4), (2, 1, 3, 5))
LARGE_X = dict(  # out of float16's range: x is too large, grad_y too small
    x=2.0**17, W0=2.0**-17, A=2.0**-17, Wg=2.0**-17, grad_y=2.0**-50)


def random_case(dtypes, seed):
    """Returns a case, in 16 bits one whose rounding errors stay small."""
    choose = random.Random(f"{dtypes}, {seed}").choice
    factors = [{}, {}, {}, {}, {}, dict(B=0), dict(x=0)]
    if "fp16" in dtypes:
        factors += [dict(Wg=8)]  # exp(logit) may be inf
    else:
        factors += [dict(B=1e-4), LARGE_X]
    if "16" in dtypes:
        least, heads, one_of = 8, (1, 2, 3, 4), "grad_y"
    else:
        least, heads, one_of = 1, (1, 2, 3, 4, 8, 33), choose(["x", "grad_y"])
        factors += [dict(Wg=100)]  # exp(logit) may be inf, or 0 for all heads
    widths, ranks = ([size for size in sizes if size >= least] for sizes in choose(SIZES))
    strided = dict.fromkeys(TENSORS, choose([*STRIDED]))
    expanded = {one_of: choose([*EXPANDED])}  # if all were, terms would cancel
    return Case(
        dtypes, choose(["gradients", "gradients", "gradients", "values", "inference"]),
        choose(LEADS), choose(widths), choose(widths), choose(ranks), choose(heads),
        bias=choose([True, False]),
        scaling=choose([1.75, 1.75, -0.4, 1.0, 4.0]),
        factors=choose(factors),
        layouts=choose([{}, {}, strided, strided, expanded]),
        frozen=choose([(), (), tuple(name for name in INPUTS if choose([True, False]))]),
        filled=choose([True, False]), seed=seed)


RANDOM = {dtypes: [Case(dtypes)] + [
    random_case(dtypes, i) for i in range(160 if dtypes == "fp32" else 40)] for dtypes in DTYPES}
RANDOM["fp32"] += [Case(n=260)]
SQUARE = dict(k=64, d=64, r=16, n=8, bias=False)
GENERAL = [Case(dtypes, mode, **change)  # for tests with several calls
           for dtypes in DTYPES for change in ({}, SQUARE) for mode in MODES]
WITH_GRADIENTS = [case for case in GENERAL if case.mode == "gradients"]
LARGE = {
    "sequence": dict(lead=(1, 65540), k=16, d=16, r=16, n=2),  # beyond a CUDA grid's y axis
    "long-input": dict(lead=(1, 1), k=11056, d=16, r=32),  # 16 times a prime
    "long-output": dict(lead=(1, 1), k=48, d=11056, r=16),
    "wide-square": dict(lead=(1, 3), k=2048, d=2048, r=272, n=3),
    "many-wide": dict(lead=(1, 1040), k=2048, d=1040, r=16, n=3),
}


def large(name, dtypes):
    return [Case(dtypes, mode, **LARGE[name]) for mode in ("gradients", "values")]


def make(case):
    """Returns the inputs of a case, and grad_y, the gradient of y."""
    c, dtypes, made = case, DTYPES[case.dtypes], {}
    for i, (name, std, shape, dtype) in enumerate([
            ("x", 1.0, (*c.lead, c.k), dtypes.x),
            ("W0", c.k**-0.5, (c.d, c.k), dtypes.base),
            ("bias", 1.0, (c.d,), dtypes.base),
            ("A", c.k**-0.5, (c.r, c.k), dtypes.adapter),
            ("B", c.r**-0.5, (c.n, c.d, c.r), dtypes.adapter),
            ("Wg", c.k**-0.5, (c.n, c.k), dtypes.adapter),
            ("grad_y", 1.0, (*c.lead, c.d), dtypes.autocast or dtypes.x)]):
        t = torch.from_numpy(np.random.default_rng([c.seed, i]).normal(size=shape))
        t = (std * c.factors.get(name, 1.0) * t).to(DEVICE, dtype)
        layout = LAYOUTS[c.layouts[name]] if name in c.layouts and t.numel() else before_nan
        t = layout(torch.atleast_2d(t)).view(t.shape)
        made[name] = t.requires_grad_(name in INPUTS and name not in c.frozen)
    return made if c.bias else made | {"bias": None}


# ---- The correct results ----
def as_float64(t):
    return t.detach().to("cpu", f64, copy=True)


def correct(inputs, case):
    """Returns name -> (correct value, least norm) for y and the gradients of sum(grad_y * y).
    A logit's gradient is w_i (g . u_i - g . u), with g = grad_y and the update u, the mean of
    u_i by w. The terms may cancel, but not their rounding errors. So the gradients of x and
    Wg have a least norm: about that of g . u alone."""
    exact = {name: as_float64(inputs[name]).requires_grad_() for name in case.inputs}
    with torch.set_grad_enabled(case.mode == "gradients"):
        y = definition(**{"bias": None} | exact, scaling=case.scaling)
    expected = {"y": (y.detach(), 0.0)}
    if y.requires_grad:
        g = as_float64(inputs["grad_y"])
        gradients = torch.autograd.grad(y, [*exact.values()], g)
        with torch.no_grad():
            u = y - F.linear(exact["x"], exact["W0"], exact.get("bias"))
            size = (g * u).norm(dim=-1, keepdim=True)  # (..., 1), of g . u
            least = dict(x=size.norm() * exact["Wg"].norm() / case.n**0.5,  # of a row of Wg
                         Wg=(size * exact["x"]).norm())
        for name, gradient in zip(exact, gradients):
            expected[f"{name}.grad"] = gradient, float(least.get(name, 0.0))
    return expected


def norms(t):
    return dict(rows=t.norm(dim=-1), columns=t.reshape(-1, t.shape[-1]).norm(dim=0))


def errors(found, value, least):
    """Returns the norms of the errors of rows and columns, each relative to the norm of the
    correct row or column or, if that is larger, of an average one."""
    parts, off = norms(value), norms(as_float64(found).sub_(value))
    for part, each in parts.items():
        average = max(value.norm().item(), least) / max(1, each.numel())**0.5
        divisor = each.clamp_min(average or 1.0)  # if all values are 0, errors are absolute
        parts[part] = (off[part] / divisor).nan_to_num(math.inf)
    return parts


def largest(parts):
    return max(each.max().item() if each.numel() else 0.0 for each in parts.values())


# ---- A call ----
def autocast(case):
    dtype = DTYPES[case.dtypes].autocast
    return torch.autocast(torch.device(DEVICE).type, dtype or bf16, enabled=bool(dtype))


def storage_of(t):
    """Returns all bytes of the memory in which t lies, with those between and behind."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


SETTINGS = {  # what reads a global setting -> what puts it back
    torch.is_grad_enabled: torch.set_grad_enabled,
    torch.get_default_dtype: torch.set_default_dtype,
    torch.get_num_threads: torch.set_num_threads,
    torch.get_deterministic_debug_mode: torch.set_deterministic_debug_mode,
    torch.get_float32_matmul_precision: torch.set_float32_matmul_precision,
    torch.initial_seed: torch.manual_seed,
}


class Call:
    """A call of a kernel, on these inputs or those of the case. The message of a failure
    begins with `moment`."""

    def __init__(self, kernel, case, inputs=None, moment=""):
        self.case, self.moment = case, moment
        with MODES[case.mode]():
            self.inputs = dict(inputs or make(case))
        self.expected = correct(self.inputs, case)
        self.before = {name: (t, storage_of(t).clone(), t.requires_grad, t.grad)
                       for name, t in self.inputs.items() if t is not None}
        arguments = [self.inputs[name] for name in INPUTS]
        with MODES[case.mode](), autocast(case), self.guard("the call"):
            self.y = kernel(*arguments, case.scaling)

        dtypes, shape = DTYPES[case.dtypes], torch.Size((*case.lead, case.d))
        allowed = [dtypes.autocast, f32] if dtypes.autocast else [dtypes.x]
        found = getattr(self.y, "shape", type(self.y))
        if found != shape:
            self.fail(f"wrong shape: expected {shape}, found {found}")
        if self.y.dtype not in allowed:
            self.fail(f"wrong dtype: expected one of {allowed}, found {self.y.dtype}")
        self.grad_y = self.inputs["grad_y"].to(self.y.dtype)

    @contextlib.contextmanager
    def guard(self, what):
        """What the kernel does here must not raise, or change a global setting or an input."""
        if self.case.filled:
            torch.set_deterministic_debug_mode("warn")
        settings = {get: get() for get in SETTINGS}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            others = (__file__, os.path.dirname(torch.__file__))
            lines = [line for line in traceback.extract_tb(error.__traceback__)
                     if not line.filename.startswith(others)]
            self.fail(f"{what} raised {type(error).__name__}: {error}\n"
                      + "".join(traceback.format_list(lines[-3:])) + BY_DESIGN)
        finally:
            changed = [get for get in SETTINGS if get() != settings[get]]
            for get in changed:
                SETTINGS[get](settings[get])
            torch.set_deterministic_debug_mode("default")
        if changed:
            self.fail(f"{what} changed what torch.{changed[0].__name__} returns")
        what += ", or a later call," * (what == "the backward")
        for name, (t, value, requires_grad, grad) in self.before.items():
            if not torch.equal(storage_of(t), value):
                self.fail(f"{what} changed {name} in place, or memory beside it")
            if t.requires_grad != requires_grad or t.grad is not grad:
                self.fail(f"{what} changed {name}.requires_grad or {name}.grad")

    def results(self, retain_graph=False):
        """Returns y and the gradients. A missing one of x, A, B or Wg counts as 0."""
        leaves = {name: self.inputs[name] for name in self.case.inputs
                  if self.case.mode == "gradients" and name not in self.case.frozen}
        gradients = [None] * len(leaves)
        if self.y.requires_grad:
            with self.guard("the backward"):
                gradients = torch.autograd.grad(
                    self.y, [*leaves.values()], self.grad_y, retain_graph, allow_unused=True)
        return {"y": self.y.detach()} | {
            f"{name}.grad": torch.zeros_like(t) if g is None else g
            for (name, t), g in zip(leaves.items(), gradients) if g is not None or name in TRAINED}

    def compare(self, found):
        tolerance = DTYPES[self.case.dtypes].tolerance
        error = {name: largest(errors(found[name], *each))
                 for name, each in self.expected.items() if name in found}
        wrong = [name for name in error if not error[name] <= tolerance]
        if wrong:
            wrong.sort(key=lambda name: (name != "y", -error[name]))
            self.fail(describe(wrong, found, *self.expected[wrong[0]], self.case))

    def fail(self, message):
        raise AssertionError(f"{self.moment}{message}\nin {self.case}") from None


def check(*calls):
    """Runs the backward passes, neither in the order of the calls nor in reverse (a kernel may
    keep a queue or a stack). Compares at the end: one may overwrite another's results."""
    found = {call: call.results() for call in calls[::2] + calls[1::2]}
    for call in calls:
        call.compare(found[call])


# ---- The tests ----
@pytest.fixture
def implementation(monkeypatch):
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # else 300 MB
        monkeypatch.setenv(name, "8")
    torch.manual_seed(2**40)  # which no kernel sets
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield IMPLEMENTATION
    torch.set_num_threads(threads)


def each_of(cases):
    return parametrize("case", cases, ids=[f"{i}-{case.id}" for i, case in enumerate(cases)])


@each_of(sorted(itertools.chain(*RANDOM.values()), key=lambda case: case.seed))
def test_oracle_results(implementation, case):
    message = failure(implementation, case)
    if message:
        raise AssertionError(simplest(implementation, case, message))


@each_of(GENERAL + [
    replace(case, **change) for case in GENERAL[::6]  # in each dtypes
    for change in (dict(lead=(2, 0)), dict(layouts=dict.fromkeys(TENSORS, "transposed")))])
def test_oracle_calls_in_a_row(implementation, case):
    """Calls with other tokens, weights, sizes and layouts, all before the first backward, share
    the tensors that do not change. A kernel may keep no scaling, size, grid, gates or buffer of
    an earlier call."""
    changes = [
        {}, {}, dict(scaling=0.0), dict(scaling=-1.75), dict(lead=(2, 1)),
        dict(lead=(2, 67)), {}, dict(lead=(2, 1), seed=1), dict(r=32), dict(bias=False), dict(n=5),
        {}, dict(layouts={})]
    start, calls = make(case), []
    for change in changes:
        now, what = replace(case, **change), "".join(f", {k}={v}" for k, v in change.items())
        inputs = make(now)
        for name in now.inputs:
            old, new = start[name], inputs[name]
            if old is not None and old.stride() == new.stride() and torch.equal(old, new):
                inputs[name] = old
        calls.append(Call(implementation, now, inputs, f"call {len(calls) + 1}{what}: "))
    check(*calls)


@each_of(GENERAL)
def test_oracle_changed_tensors(implementation, case):
    """Between calls, the values of an input change, in place or in new memory (as by
    offloading), but not its version, sum or first element."""
    if case.mode != "gradients":  # as in generation
        case = replace(case, lead=(2, 1), frozen=INPUTS)
    inputs = make(case)
    check(Call(implementation, case, inputs))
    for name, way in itertools.product(case.inputs, ("in place", "moved")):
        t = inputs[name].detach()
        new = before_nan(torch.cat([t.flatten()[:1], t.flatten()[1:].flip(0)]).view(t.shape))
        if way == "moved":
            inputs[name].data = new
        else:
            inputs[name].data.copy_(new)
        for mode in sorted({case.mode, "values"}):
            check(Call(implementation, replace(case, mode=mode), inputs,
                       f"after {name} was changed ({way}): "))


@each_of(WITH_GRADIENTS)
def test_oracle_twice_or_overwritten(implementation, case):
    """A second backward, or one after y (as by y += residual) or an input has changed in
    place: PyTorch may refuse it, but no gradient may be wrong."""
    refused = "in-?place operation|modified inplace|donated|second time|already unpacked"
    for name in ("", "y", *case.inputs):
        moment = f"{name} was overwritten: " if name else "backward again: "
        call = Call(implementation, case, moment=moment)
        y = call.y.detach().clone()
        try:
            if name:
                (call.y if name == "y" else call.inputs[name]).detach().add_(9)
                call.before.pop(name, None)
            else:
                call.results(retain_graph=True)
            call.compare(call.results() | {"y": y})
        except AssertionError as error:
            if not re.search(refused, str(error)):
                raise


@each_of(WITH_GRADIENTS)
def test_oracle_nan_is_not_hidden(implementation, case):
    """nan in an input, or inf in grad_y (for which a GradScaler looks), reaches the results."""
    for name in (*case.inputs, "grad_y"):
        inputs, bad = make(case), math.inf if name == "grad_y" else math.nan
        inputs[name].detach()[(-1,) * inputs[name].dim()] = bad
        call = Call(implementation, case, inputs, f"with {bad} in {name}: ")
        for result, found in call.results().items():
            finite, right = found.cpu().isfinite(), call.expected[result][0].isfinite()
            hidden = finite.all() and not right.all()
            if hidden or result == "y" and (right & ~finite).any():
                call.fail(f"{result} is wrong: it must{' not' * bool(hidden)} be finite")


@each_of(GENERAL)
def test_oracle_memory_is_freed(implementation, case):
    """x, y and grad_y are freed when the test drops them."""
    for with_backward in (True, False):
        call = Call(implementation, case)
        if with_backward:
            call.results()
        kept = dict(x=call.inputs["x"], y=call.y, grad_y=call.grad_y)
        kept = {name: StorageWeakRef(t.untyped_storage()) for name, t in kept.items()}
        del call
        if not all(storage.expired() for storage in kept.values()):
            gc.collect()  # a cycle is not a leak
        alive = [name for name, storage in kept.items() if not storage.expired()]
        assert not alive, f"the kernel keeps {', '.join(alive)} alive"


@parametrize("case", [
    pytest.param(case, id=f"slow-{name}-{case.id}") for name in LARGE
    for dtypes in ("fp32", "bf16") for case in large(name, dtypes)])
def test_oracle_slow_results(implementation, case):
    check(Call(implementation, case))


# ==== 2. What a failure says ====

BY_DESIGN = "If that is by design, leave out such tests with -k."
ALONE = "If it passes in a new process, an earlier call left something behind."
LEFT_BEHIND = """\
On new tensors, the same call passes. Did another leave a cache, a workspace or a saved tensor
behind? Or was torch.empty read, or is there a race?"""
NOT_FINITE = """
Did exp(logit), a sum or float16 overflow? Or was torch.empty read, or memory past an end?"""


def describe(wrong, found, value, least, case):
    """Returns where and by how much the first of the wrong results differs from its value."""
    tolerance = DTYPES[case.dtypes].tolerance
    worst, given = wrong[0], as_float64(found[wrong[0]])
    parts, places = errors(given, value, least), []
    for part, each in parts.items():
        off = torch.argwhere(each > tolerance)
        if 0 < len(off) < each.numel():
            places.append(f" in {len(off)} of {each.numel()} {part}, first {off[0].tolist()}")
    how = ("wrong" if given.any() else "zero or missing") + ",".join(places)
    message = f"{worst} is {how}: error {largest(parts):.2g}, tolerance {tolerance:.2g}"
    factor = ((given * value).sum() / value.square().sum()).item()
    if min(abs(factor), abs(factor - 1)) > 0.01 and largest(
            errors(given / factor, value, least)) <= tolerance:
        message += (f"\n{worst} is {factor:.3g} times the correct one; "
                    f"the scaling is {case.scaling}")
    return (f"{message}\nwrong: {', '.join(wrong)}"
            + ("" if given.isfinite().all() else NOT_FINITE))


def failure(kernel, case):
    """Returns the message of a call, or ""."""
    try:
        check(Call(kernel, case))
    except AssertionError as error:
        return str(error)
    return ""


def simpler(case):
    """Yields cases with one difference fewer from Case()."""
    for name, value in vars(case).items():
        if isinstance(value, dict):
            for key in value:
                yield replace(case, **{name: {k: v for k, v in value.items() if k != key}})
        elif name != "dtypes" and value != getattr(Case(), name):
            yield replace(case, **{name: getattr(Case(), name)})


def simplest(kernel, case, message):
    """Takes back each difference from Case() without which the call fails in the same way, and
    returns the last message. If Case() fails, perhaps by design, the id stays."""
    def kind(message):  # all wrong values are of one kind
        start = re.split("[:,\n]", message)[0]
        return "wrong" if " is " in start else start

    keep_id = bool(failure(kernel, Case(case.dtypes)))
    others = simpler(case) if failure(kernel, case) else iter(())
    while other := next(others, None):
        again = failure(kernel, other) if other.id == case.id or not keep_id else ""
        if again and kind(again) == kind(message):
            case, message, others = other, again, simpler(other)
    return f"{message}\n{ALONE if failure(kernel, case) else LEFT_BEHIND}"


# ==== 3. Does the oracle notice? ====

# To add a field to Case, use it in `make` or Call, and draw it last, so that others stay. To
# add a test, write it at the end of room 1, with each_of. Then add to MISTAKES a line that
# makes a kernel wrong for your field or test, but not for Case().

TESTS = {name.removeprefix("test_oracle_"): test for name, test in globals().items()
         if name.startswith("test_oracle_")}
SLOW, FAST = TESTS.pop("slow_results"), TESTS.pop("results")


def run_check(name, kernel, dtypes):
    """Runs a test, the random cases, Case() or a row of LARGE in these dtypes."""
    if name in TESTS:
        for case in TESTS[name].pytestmark[0].args[1]:  # those of each_of
            if case.dtypes == dtypes:
                TESTS[name](kernel, case)
    elif name in LARGE:
        for case in large(name, dtypes):
            SLOW(kernel, case)
    else:
        for case in RANDOM[dtypes] if name == "random" else [Case(dtypes)]:
            FAST(kernel, case)


# ---- Mistakes ----
def mutant(lines):
    """Returns the definition with more lines: those that begin with w or z below the one that
    computes it, with y at the end, others at the start. The dict `memory` outlives a call."""
    steps = inspect.getsource(definition).splitlines()
    sizes = "(n, d, r), k, tokens = B.shape, x.shape[-1], x.shape[-2] if x.dim() > 1 else 0"
    for line in [sizes, *lines.splitlines()]:
        following = dict(w="z = ", z="for ", y="return ").get(re.match(r"\w*", line)[0], "y = ")
        place = next(i for i, step in enumerate(steps) if step.startswith("    " + following))
        steps.insert(place, "    " + line)
    scope = globals() | {"memory": {}}
    exec("\n".join(steps), scope)
    return scope["definition"]


def backward(t, change):
    """Returns t, whose gradient is changed."""
    if torch.is_grad_enabled() and t.requires_grad:
        t = t.clone()
        t.register_hook(change)
    return t


NO_MAX = "w = F.linear(x, Wg).exp()\nw = w / w.sum(-1, keepdim=True)"
MISTAKES = {  # what catches them, in fp32 by default: {lines: a part of the message}
    "plain": {
        "scaling = 1.0": "y is wrong",
        "w = w.detach()": "Wg.grad is zero or missing",
        "w = backward(w, lambda g: g / scaling)":
            "Wg.grad is 0.571 times the correct one; the scaling is 1.75",
        "y = y, w": "found <class 'tuple'>",
        "y = y.double()": "wrong dtype",
        "y = y[99]": ", in definition",
        "y = backward(y, lambda g: g.data.mul_(2))": "changed grad_y in place",
        "x.data.as_strided([1], [1], x.numel()).zero_()": "the call changed x in place",
        "A.grad = torch.zeros_like(A)": "the call changed A.requires_grad or A.grad",
        "A = A + 0 * A.detach().as_strided([1], [1], A.numel())": "memory past an end",
        **{f"torch.{change}": "the call changed what torch." for change in (
            "manual_seed(0)", "set_num_threads(2)", "set_default_dtype(f64)",
            "set_grad_enabled(False)", "set_float32_matmul_precision('high')",
            "use_deterministic_algorithms(True)")},
    },
    **{f"plain in {dtypes}": {f"y.data[..., -1].mul_(1 + {error})": "in 1 of 6 columns, first [5]"}
       for dtypes, error in dict(fp64=1.3e-10, fp32=1.3e-4, bf16=0.06, fp16=0.012).items()},
    "random": {
        "z = z * (n > 1)": "in Case(n=1)",
        "A = backward(A, lambda g: g + (x.numel() == 0))": "in Case(lead=(0, 5))",
        "w = F.linear(x, Wg)\nw = (w - w.amax(-1, keepdim=True).relu()).exp()\n"
        "w = w / w.sum(-1, keepdim=True)": "factors={'Wg': 100}",
        "z = z + 0 * torch.empty_like(z) if torch.get_deterministic_debug_mode() else z":
            "in Case(filled=True)",
        "A = backward(A, lambda g: g * x.requires_grad)": "frozen=(",
        "z = z * (not torch.is_inference_mode_enabled())": "mode='inference'",
        "y = y * (bias is None or bias.stride(0) == 1)": "layouts={'bias': 'gaps'}",
        "y = y.requires_grad_()": "the backward raised",
        "z = z * (memory.setdefault('n', []).append(1) or len(memory['n']) != 3)":
            "On new tensors, the same call passes",
        **{f"x = 2 * x if tokens > 1 and x.dim() == 3 and {strides} else x": f"'x': '{layout}'"
           for layout, strides in {
               "gaps": "x.stride(2) == 2",
               "wide-rows": "x.stride() == (2 * k * tokens, 2 * k, 1)",
               "transposed": "x.stride(1) == 1 < x.stride(2)",
               "tokens-first": "x.stride(0) == k < x.stride(1)",
               "one-value": "x.stride(2) == 0",
               "one-token": "x.stride(1) == 0 < x.stride(2)"}.items()},
    },
    **{f"random in {dtypes}": {NO_MAX: f"factors={{'Wg': {factor}}}"}
       for dtypes, factor in (("fp32", 100), ("fp16", 8))},
    "random in bf16": {"x = x.half().to(x.dtype)": "bf16', factors={'"},
    **{name: {f"z = z * (1 + ({sizes}))": "y is wrong"} for name, sizes in {
        "sequence": "tokens > 65535", "long-input": "k > 8192", "long-output": "d > 8192",
        "wide-square": "k == d > 1024", "many-wide": "min(tokens, k, d) >= 1024"}.items()},
    "calls_in_a_row": {
        "scaling = memory.setdefault(id(B), scaling)": "call 3, scaling=0.0: y is",
        "y, _ = y, memory.setdefault(y.shape, y).data.copy_(y)": "lead=(2, 1): y is wrong",
        **{"w = w.requires_grad and memory.setdefault('saved', []).append(w) or w\n"
           f"z = backward(z, lambda g: g * (memory['saved'].pop({end}) is w))":
           "A.grad is zero or missing" for end in (0, -1)},
        "memory.get('x', x) is x or memory['x'].data.zero_()\nmemory['x'] = x":
            "or a later call, changed x in place",
    },
    "changed_tensors": {
        "W0 = memory.setdefault((W0.data_ptr(), W0[0, 0].item()), W0.detach().clone())":
            "after W0 was changed (in place): y is wrong",
        "W0 = memory.setdefault(id(W0), W0.detach())": "(moved): y is",
    },
    "twice_or_overwritten": {
        "y = backward(y, lambda g: g * (y._version == 0))": "y was overwritten: ",
        "y = backward(y, lambda g: g * (bias is None or bias._version == 0))":
            "bias was overwritten: ",
        "z = backward(z, lambda g: z.data.zero_() + g)": "backward again: ",
    },
    "nan_is_not_hidden": {
        "x = torch.nan_to_num(x)": "with nan in x: y is wrong",
        "y = y + 0 * x.sum()": "y is wrong: it must be finite",
        "y = backward(y, lambda g: g.clamp(-1e4, 1e4))": "with inf in grad_y: ",
    },
    "memory_is_freed": {
        "y = backward(y, lambda g: memory.update(kept=g))": "keeps grad_y alive",
        "y, memory['x'] = y, y.requires_grad and x\n"
        "y = backward(y, lambda g: memory.clear())": "keeps x alive",
    },
}


@pytest.mark.usefixtures("implementation")
@parametrize("caught_by, lines, message", [
    pytest.param(caught_by, lines, message, id=f"{caught_by}: {lines}")
    for caught_by, rows in MISTAKES.items() for lines, message in rows.items()])
def test_mistake_is_caught(caught_by, lines, message):
    name, _, dtypes = caught_by.partition(" in ")
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_check(name, mutant(lines), dtypes or "fp32")
    if name != "plain":  # Case() must pass
        run_check("plain", mutant(lines), dtypes or "fp32")


# ---- Correct kernels ----
CORRECT = [  # changes that a kernel may make
    ("autocast-bf16", NO_MAX),
    ("bf16", "A, B = torch.eye(k).to(A), B @ A"),
    ("mixed-bf16", "A, B, Wg = A.to(x.dtype), B.to(x.dtype), Wg.to(x.dtype)"),
    ("autocast-bf16", "y = y.float()"),
]


@pytest.mark.usefixtures("implementation")
@parametrize("dtypes, lines", CORRECT)
def test_correct_kernel_passes(dtypes, lines):
    for name in ["random", *TESTS]:
        run_check(name, mutant(lines), dtypes)


def test_unknown_setting_is_refused(monkeypatch):
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
        case = replace(case, mode="gradients")
        inputs = make(case)
        exact = {name: as_float64(t) for name, t in inputs.items() if t is not None}
        arrays = {"bias": np.zeros(case.d)} | {name: t.numpy() for name, t in exact.items()}
        y, grads = definition_by_hand(**arrays, scaling=case.scaling)
        found = {"y": y} | {f"{name}.grad": g for name, g in grads.items()}
        for name, (value, _) in correct(inputs, case).items():
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
    assert not any(module.training for module in layer.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert not isinstance(layer.router, nn.Linear)
    assert not layer.lora_B.any() and not torch.equal(layer.lora_A[:3], layer.router.weight)
    for p in (layer.lora_A, layer.router.weight):  # U(-b, b) with b = 1 / sqrt(k)
        assert 0.97 / 16 < p.abs().max() <= 1 / 16
    layer = HydraLoRALinear(base.to("meta"))
    assert all(t.is_meta for t in (*layer.parameters(), layer.weight))


@each_dtype
def test_dtypes(dtype):
    layer, x = make_layer(dtype=dtype), torch.ones(3, K, dtype=dtype)
    adapter = torch.promote_types(dtype, f32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.router.weight.dtype == adapter
    assert layer.weight.dtype == dtype and not layer.weight.numel()
    assert layer(x).dtype == dtype and layer.to(dtype)(x).dtype == dtype
    assert mean_gates({"": [layer.router(x)]})[""].dtype == adapter
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
    close(gates[""], [layer.router(x).detach()])
    close(mask, 2 * (mask > 1).double())
    close(layer.eval()(x) - layer.base(x), x)
    layer.base.forward = torch.zeros_like  # as a quantised base has its own
    close(layer(x), x)


class TopTwo(Router):
    def __init__(self, k, n, **options):
        super().__init__(k, n, **options)
        self.temperature = nn.Parameter(torch.ones(1, **options))

    def forward(self, x):
        w = super().forward(x / self.temperature)
        return w * (w >= w.topk(2).values[..., -1:])


class TopTwoLayer(HydraLoRALinear):
    router_class = TopTwo


def test_variant_is_saved_recorded_and_merged():
    """A head whose gate is 0 gets no gradient."""
    layer, other = make_layer(layer=TopTwoLayer), make_layer(layer=TopTwoLayer)
    for p in (other.lora_A, other.lora_B, other.router.temperature):
        nn.init.zeros_(p)
    assert hydralora_state_dict(layer).keys() == trained_names(layer)
    assert load_hydralora_state_dict(other, hydralora_state_dict(layer)) is other
    assert other.router.temperature is p  # copied
    x = randn(1, K)
    with record_gates(layer) as gates:
        y = layer(x)
    y.sum().backward()
    means = mean_gates(gates)
    used = means[""] > 0
    assert used.sum() == 2 and torch.equal(layer.lora_B.grad.flatten(1).any(1), used)
    close(merge_hydralora(other, means)(x), y.detach())


# ---- A model ----
def test_tiny_transformer_by_its_definition():
    model = TinyTransformer(TinyConfig(max_position_embeddings=11))
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
    targets = ["0.q_proj", "down_proj", "layers.0.q_proj"]

    def layer(base, **arguments):
        built.append(TopTwoLayer(base, **arguments))
        return built[-1]

    assert inject_hydralora(model, targets, layer, lora_dropout=0.5) is model
    layers = hydralora_layers(model)
    assert [*layers] == ["layers.0.q_proj", "layers.0.down_proj", "layers.1.down_proj"]
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
    inject_hydralora(model, "k_proj", num_heads=N)
    assert first.k_proj is second.k_proj is second.v_proj
    merge_hydralora(model, {"layers.0.k_proj": GATES})
    assert first.k_proj is second.k_proj is second.v_proj and type(first.k_proj) is nn.Linear


# ---- Gates and merging ----
def test_model_merged_with_its_fixed_gates_is_the_model():
    """Merging uses a layer's current scaling."""
    model = inject_hydralora(adapted_model("0.o_proj"), "q_proj", num_heads=N, r=2)
    model.layers[0].o_proj.scaling = 0.5
    gates = {}
    for i, (name, layer) in enumerate(hydralora_layers(model).items()):
        gates[name] = GATES.roll(i)
        nn.init.normal_(layer.lora_B)
        layer.router.register_forward_hook(
            lambda router, x, w, name=name: gates[name].expand(len(w), 1, N))  # (b, 1, n)
    logits = model(IDS)
    assert merge_hydralora(model, gates) is model
    close(model(IDS), logits, rtol=0, atol=1e-4)
    assert model.state_dict().keys() == plain_model().state_dict().keys()
    assert not trained_names(model)


@each_dtype
@parametrize("adapter", [None, bf16])
def test_merge_rounds_once_and_shares_nothing(dtype, adapter):
    layer = make_layer(dtype=dtype).eval().requires_grad_()
    for p in (layer.lora_A, layer.lora_B):
        p.data = p.data.to(adapter or p.dtype)
    A, B = (p.data.to(torch.promote_types(p.dtype, f32)) for p in (layer.lora_A, layer.lora_B))
    W = (layer.base.weight + 2 * (GATES[:, None, None].to(B) * B).sum(0) @ A).to(dtype)
    with torch.autocast("cpu", dtype=bf16):
        merged = layer.merge(GATES.double())
    assert torch.equal(merged.weight, W) and torch.equal(merged.bias, layer.base.bias)
    assert type(merged) is nn.Linear and not merged.training
    for t in merged.parameters():
        t.data.zero_()
    assert all(p.all() for p in layer.parameters())


def test_recorded_gates_are_those_of_all_calls():
    model = adapted_model().eval()
    with record_gates(model) as gates:
        model(IDS[:1])
        model(IDS)
    layer, (_, w) = model.layers[0].q_proj, gates["layers.0.q_proj"]
    x = model.layers[0].attention_norm(model.embed(IDS))
    close(w, (x @ layer.router.weight.T).softmax(-1))
    w.square().sum().backward()  # as a balance loss does
    assert [*gates] == [*hydralora_layers(model)] and layer.router.weight.grad.any()
    layer.router.register_forward_hook(lambda router, x, w: w[..., :1])  # not n gates
    with pytest.raises(RuntimeError), record_gates(model) as others:
        model(IDS)
    for each in hydralora_layers(model).values():
        each.router(x)
    assert {len(ws) for ws in gates.values()} == {2}
    [[w], *none] = others.values()
    assert w.shape[-1] == 1 and not any(none)


def test_mean_gates_are_those_of_all_tokens():
    a, b, c = torch.eye(3, dtype=bf16).requires_grad_()
    calls = [torch.stack([a, b]).expand(150, 2, 3), c, a.expand(0, 3)]  # 301 tokens
    means = mean_gates({"layer": calls, "idle": [], "empty": calls[2:]})
    close(means, {"layer": torch.tensor([150, 150, 1]) / 301})
    assert not means["layer"].requires_grad


# ---- Bad input ----
def changed(change):
    layer = make_layer()
    change(layer)
    return layer


class OwnLinear(nn.Linear):
    forward = print


class OwnLayer(HydraLoRALinear):
    forward = print


class Subclass(torch.Tensor):
    pass


@parametrize("word, change", [
    ("base is", lambda layer: setattr(layer.base, "__class__", OwnLinear)),
    ("base is", lambda layer: layer.base.to("meta")),
    ("base is", lambda layer: setattr(
        layer.base, "weight", nn.Parameter(torch.ones(D, K).as_subclass(Subclass)))),
    ("base is", lambda layer: layer.base.register_forward_hook(print)),
    ("base is", lambda layer: layer.base.register_forward_pre_hook(print)),
    ("OwnLayer overrides", lambda layer: setattr(layer, "__class__", OwnLayer)),
    ("invalid", lambda layer: setattr(layer, "num_heads", 1))])
def test_refused_merge(word, change):
    with pytest.raises((TypeError, RuntimeError), match=word):
        changed(change).merge(GATES)


@parametrize("key, t", [
    ("lora_A", torch.ones(9)), ("lora_B", torch.ones(9)), ("_flat_param", torch.ones(9)),
    ("lora_A", torch.ones(R, K, device="meta")),
    ("lora_B", torch.ones(9, 9).as_subclass(Subclass))])
def test_sharded_layer_is_not_saved(key, t):
    layer = changed(lambda layer: setattr(layer, key, nn.Parameter(t)))
    with pytest.raises(ValueError, match=rf"^base\.{key} is sharded or offloaded"):
        hydralora_state_dict(nn.ModuleDict({"base": layer}))


@parametrize("target, training", [("out_proj", True), ("linear1", False)])
def test_bypassed_adapter_raises(target, training):
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True).train(training)
    with pytest.raises(AttributeError, match="bias"):
        inject_hydralora(model, target)(torch.ones(3, 5, 8))


@parametrize("targets, arguments, word", [
    (["o_proj", "norm"], {}, "named 'norm'"), ("proj", {}, "named 'proj'"),
    ("v_proj.base", {}, "named 'v_proj.base'"), ("layers.0", {}, "named 'layers.0'"),
    ("o_proj", dict(r=0), "zero")])
def test_refused_injection_changes_nothing(targets, arguments, word):
    model = inject_hydralora(plain_model(), "v_proj", TopTwoLayer).requires_grad_()
    modules, trained = [*model.modules()], trained_names(model)
    with pytest.raises((ArithmeticError, ValueError), match=word):
        inject_hydralora(model, targets, **arguments)
    assert [*model.modules()] == modules and trained_names(model) == trained
    with pytest.raises(ValueError, match="nn.Linear, got TopTwo"):
        HydraLoRALinear(model.layers[0].v_proj)
    with pytest.raises(ValueError, match="no HydraLoRA layer"):
        hydralora_state_dict(plain_model())


def test_refused_loading_and_merging_change_nothing():
    model = adapted_model()
    logits, state = model(IDS), hydralora_state_dict(model)
    doubled, (*_, last) = {key: 2 * t for key, t in state.items()}, state
    for bad, word in (({}, "model has .*0.q_proj.lora_A', 3, 64.*state ..$"),
                      (doubled | {"more": IDS}, "model has ..,.*more', 3, 11"),
                      (doubled | {last: state[last].T}, f"{last}', 4, 64.*{last}', 64, 4")):
        with pytest.raises(ValueError, match=word):
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
        patch.setattr(sys, "argv", ["train_toy.py", *options.split()])
        for name, value in settings.items():
            patch.setattr(toy, name, value)
        toy.main()
    torch.set_num_threads(threads)
    return output.getvalue()


@pytest.fixture(scope="session")
def seed_0(toy):
    numbers, run = {}, toy.run
    output = toy_output(toy, run=lambda *arguments: numbers.update(run(*arguments)))
    return SimpleNamespace(output=output, numbers=numbers)


def is_printed(line, output):
    """Whether a printed line begins so. On another CPU, a number may be a little off, and an
    answer any if it has *."""
    def agree(said, found):
        if "." in said and "." in found:
            return abs(float(said) - float(found)) <= 0.05 + 0.012 * float(said)
        return said == found or "*" in said + found

    said, *printed = (each.replace("*", " *").split() for each in (line, *output.splitlines()))
    return any(len(said) <= len(found) and all(map(agree, said, found)) for found in printed)


def test_toy_prints_its_example(toy, seed_0):
    said, answered = re.findall(r"(?:input|target): +([a-o ]+) \.", toy.__doc__)
    assert is_printed(f"plaintext {said}", seed_0.output)
    assert any(is_printed(f"head {i}, domain 0 {answered}", seed_0.output) for i in range(3))


def test_toy_shows_what_heads_do(seed_0):
    for line in ("0 400 99.4 o_proj 0.05 0.25 0.04", "15 400 98.5 o_proj 0.99 0.25 0.21",
                 "one domain, two starts, after 10 steps 0.20 0.45",
                 "two domains, one start, after 400 steps 0.46 0.54", "by chance 0.11 0.11",
                 "All LoRAs: 2,688 parameters,"):
        assert is_printed(line, seed_0.output), line
    for text, least, greatest in [
            ("o_proj, 15 differ: answers of a head alone that are its domain's (%)", 80, 95),
            ("o_proj, 0 differ: a head alone, on its own tokens (%)", 95, 100),
            ("o_proj, 0 differ: a head alone, on the others (%)", 10, 50),
            ("HydraLoRA's lead over LoRA, 15 differ (%)", 10, 20)]:
        assert least < seed_0.numbers[text] < greatest, text


def test_toy_heads_alone_by_hand(toy, monkeypatch):
    """Head i has domain i's cipher, and symbol i, 20 of 32 in that domain's text."""
    layer, model = HydraLoRALinear(nn.Linear(15, 15), r=15, lora_alpha=15), nn.Module()
    model.layers = [None, nn.ModuleDict({"o_proj": layer})]
    monkeypatch.setattr(toy, "predict", lambda model, data: model.layers[1].o_proj(
        torch.eye(15)[data.plain]))
    ciphers = toy.differ_in(15, torch.randperm(15))
    layer.lora_A.data, layer.router.weight.data = torch.eye(15), 9 * torch.eye(3, 15)
    layer.lora_B.data = 9 * torch.eye(15)[ciphers].mT
    plain = (torch.arange(3)[:, None] + torch.tensor([0] * 20 + [1] * 12)) % 3
    task = toy.Task(*[None] * 4, ciphers, [], toy.Data(plain, torch.arange(3), None))
    for i, (row, best, answers) in zip(range(3), toy.heads_alone(model, "o_proj", task)):
        assert row == [*100 * torch.eye(3)[i], 100 * 20 / 32, 100 * 12 / 64, 100]
        assert best == i and torch.equal(answers, ciphers[i][plain[0]])


def test_toy_runs_with_all_methods_on_other_layers(toy):
    output = toy_output(
        toy, "--seeds 2 --all --heads 4 --rank 5 --target v_proj down_proj --lr 0.5",
        STEPS=40, TEST=60, WATCHED=(1, 40))
    for name in (*toy.methods(4, 5, 64, 64, True), "LoRA-Split"):
        assert re.search(rf"^{name}.* \(%\)  ", output, re.M)
    assert output.count("head 3 alone") == 2 * 2 * 2  # seeds, layers, ciphers
    for options in ("--heads -1", "--rank 0", "--lr 0", "--seeds 0"):
        with pytest.raises(SystemExit):
            toy_output(toy, options)


@parametrize("n, targets", [
    (3, ["o_proj", "down_proj"]), (3, ["q_proj"]), (3, ["k_proj", "v_proj"]), (0, [])])
def test_toy_cut_model_is_the_model(n, targets, toy):
    model = TinyTransformer(TinyConfig(toy.SYMBOLS + 1, 2 * toy.LENGTH)).requires_grad_(False)
    plain = torch.randint(toy.SYMBOLS, (5, toy.LENGTH))
    data = toy.encode(model, plain)
    adapted = toy.fit(toy.Task(model, targets, 0, 0.1, None, [], data), toy.Method(n, 9))
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    tokens = F.pad(plain, (0, toy.LENGTH), value=toy.SYMBOLS)
    close(toy.predict(adapted, data), adapted(tokens)[:, toy.LENGTH:], rtol=1e-4, atol=1e-4)


def test_toy_measures_by_hand(toy):
    symbol, axes = torch.arange(15), torch.eye(4)
    w = F.one_hot(symbol % 3).double()  # a head for each third of the symbols
    assert toy.nmi(symbol, w) == pytest.approx(2 * math.log(3) / math.log(45))
    assert toy.nmi(symbol % 5, w) == pytest.approx(0, abs=1e-9)
    assert toy.overlap(axes[:, :2], axes[:, 1:3]) == pytest.approx(0.5)
    [plain] = toy.sample(1, 20_000, 0, "cpu")
    data = toy.Data(plain, torch.arange(20_000) % 3, None)
    for count in toy.DIFFER:
        answers = toy.encipher(toy.differ_in(count, torch.randperm(15)), data)
        counts = torch.bincount((15 * plain + answers).flatten(), minlength=225).view(15, 15)
        best = 100 * (counts.amax(1).sum() / counts.sum()).item()
        assert toy.best_without_domain(count) == pytest.approx(best, abs=0.5)


@parametrize("n", [2, 3, 5, 10])
def test_toy_num_heads_of_topics(n, toy):
    rng = np.random.default_rng(n)
    topic = rng.integers(2, size=(200, 30)) * (1 + np.arange(200)[:, None] % n)  # 0: none
    texts = 50 * topic + rng.integers(50, size=(200, 30))
    assert toy.choose_num_heads(torch.tensor(texts))[0] == n


@parametrize("name", ["LoRAExperts", "SharedB"])
def test_toy_formula(name, toy):
    layer = getattr(toy, name)(nn.Linear(64, 32), num_heads=3, r=5, lora_alpha=10)
    nn.init.normal_(layer.lora_B)
    x, B = torch.randn(2, 5, 64), layer.lora_B.expand(3, -1, -1)
    update = torch.einsum("btn,ndr,nrk,btk->btd", layer.router(x), B, layer.lora_A, x)
    close(layer(x), layer.base(x) + 2 * update, rtol=1e-4, atol=1e-4)


# ---- README ----
@pytest.fixture
def readme():
    path = Path(__file__).with_name("README.md")
    return path.read_text(encoding="utf-8") if path.exists() else pytest.skip("needs README.md")


def test_readme_code_is_right(readme, capsys, tmp_path, monkeypatch):
    """It prints what it says, and hydralora is Eq. 3."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(compile(block, "README.md", "exec"), names)
    said = re.findall(r"^ *print\(.*\) +# (.*)$", readme, re.M)
    assert capsys.readouterr().out.splitlines() == said
    run_check("plain", lambda x, W0, bias, *others: (
        names["hydralora"](x, W0, *others) + bias), "fp32")


def test_readme_output_is_that_of_a_toy_run(readme, seed_0):
    """The first block is the picture."""
    _, *blocks = re.findall(r"```text\n(.*?)```", readme, re.S)
    for line in "".join(blocks).splitlines():
        assert is_printed(line.removesuffix(" ..."), seed_0.output), line
