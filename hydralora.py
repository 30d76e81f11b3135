# SPDX-License-Identifier: MIT
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router that mixes the heads.

Tian, Shi, Guo, Li, Xu: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
NeurIPS 2024, arXiv 2404.19245. Its equations; W0 is frozen, all the rest is trained:

    (1)  y = W0 x + B A x                        LoRA
    (2)  W = W0 + sum_i w_i B_i A                HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x            HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)                     the router: each token has a w of its own

    paper  code            shape        what it is
    x      x               (..., k)     input, any leading axes: (b, t, k) in a transformer
    W0     base.weight     (d, k)       frozen weight
    A      lora_A          (r, k)       shared by all heads; Kaiming-uniform at the start
    B_i    lora_B[i]       (d, r)       a head, the paper's expert E_i; zero at the start
    N      num_heads, n                 number of heads
    Wg     router.weight   (n, k)       Wg^T of Eq. 4, as nn.Linear keeps it; (n, r) on A x
    w      w, gates        (..., n)     the mixture of each token; (n,) where the caller fixes it
    -      scaling                      lora_alpha / r, times the update

Where the paper is silent, or at odds with the official code (L: lines of its lora.py,
github.com/Clin0212/HydraLoRA/blob/afb693b/HydraLoRA/peft/tuners/lora.py), this file does so:

    [1] The router reads x, as in the paper's text and L279. Eq. 4 prints Wg as (r, N), which
        fits A x: router_input="Ax".
    [2] The router starts Kaiming-uniform (L299) and has no bias (L279).
    [3] The softmax is taken in float32, or float64 for float64, and cast back; the official
        code always takes float32.
    [4] The update is scaled by lora_alpha / r (L284, L342); the paper has no such factor.
    [5] One dropout mask for all heads, on the x that A reads; none for the router (L339). L342
        draws a mask for each head; the paper has no dropout.
    [6] One tensor is returned; the paper has no balance loss. L344-347 return a constant 0 with it.
    [7] The caller chooses the layers. The paper's captions name q and v, its authors and the
        official script the feed-forward layers.
    [8] Merging needs gates, and none are assumed. The paper averages the heads for each token
        (3.2.2), which is exact; one static weight is not. The official code has no merge.
"""
import contextlib
import copy
import itertools
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---- The equations ---------------------------------------------------------------------------


def hydralora_gates(x, Wg):
    """Eq. 4: w = softmax(Wg^T x). x (..., k), Wg (n, k), which is Eq. 4's Wg^T -> w (..., n)."""
    logits = F.linear(x, Wg)                                                  # (..., n)
    high = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=high).to(logits.dtype)                    # (..., n) [3]


def hydralora_delta(x, A, B, gates, scaling):
    """The update in Eq. 3, scaling * sum_i w_i B_i A x, as one product for all heads.

    x (..., k), A (r, k), B (n, d, r), gates w (..., n) -> (..., d). The sum is [B_1 ... B_n] times
    the outer product of w and A x, taken as n r numbers: nothing of size (..., n, d) is made.
    """
    z = F.linear(x, A) * scaling                                              # (..., r) [4]
    wz = gates.unsqueeze(-1) * z.unsqueeze(-2)                                # (..., n, r)
    heads = B.transpose(0, 1).flatten(1)                                      # (d, n r)
    return F.linear(wz.flatten(-2), heads)                                    # (..., d)


def hydralora_forward(x, W0, bias, A, B, Wg, scaling):
    """Eqs. 3 and 4 as one function, the layer below without dropout.

    x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k) -> y (..., d). The
    update is computed in the dtype of A, B and Wg, and cast to that of W0 x before the sum.
    """
    y = F.linear(x, W0, bias)                                                 # (..., d)
    x = x.to(A.dtype)                                                         # (..., k)
    delta = hydralora_delta(x, A, B, hydralora_gates(x, Wg), scaling)         # (..., d)
    return y + delta.to(y.dtype)                                              # (..., d)


# ---- The layer -------------------------------------------------------------------------------


class Router(nn.Module):
    """Eq. 4 as a module, so that a forward hook sees w. x (..., k) -> w (..., n)."""

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))   # Wg
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))                 # [2]

    def forward(self, x):
        return hydralora_gates(x, self.weight)


def _has_values(t):
    """Whether t is a plain floating-point tensor: not on meta, quantised, sharded or sparse."""
    return (type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta
            and t.layout == torch.strided and t.is_floating_point())


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear with a HydraLoRA update: Eq. 3, x (..., k) -> y (..., d).

    base: the nn.Linear (d, k); it is frozen, and stays the same object.
    num_heads: n. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.
    lora_dropout: probability in [0, 1). router_input: "x" or "Ax", see [1].

    The adapter is float32, or float64 for a float64 base, and computes in its own dtype, or in
    autocast's; y has the dtype of base(x). In float16 (after .half()) logits above 65504 make y
    nan. Raises TypeError for a base that is not an nn.Linear or is complex, else ValueError.
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0,
                 router_input="x"):
        if not isinstance(base, nn.Linear) or base.weight.is_complex():
            raise TypeError(f"base must be a real nn.Linear, got {base}")
        for name, value in (("num_heads", num_heads), ("r", r)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
        if router_input not in ("x", "Ax"):
            raise ValueError(f"router_input must be 'x' or 'Ax', got {router_input!r}")
        super().__init__()
        k, d = base.in_features, base.out_features
        self.in_features, self.out_features = k, d
        self.num_heads, self.r, self.lora_alpha = num_heads, r, lora_alpha
        self.scaling = lora_alpha / r                                         # [4]
        self.router_input = router_input
        self.base = base.requires_grad_(False)                                # W0 and bias
        self.lora_dropout = nn.Dropout(lora_dropout)
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        like = dict(device=base.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, k, **like))                 # A
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **like))      # B_1 ... B_n
        self.router = Router(k if router_input == "x" else r, num_heads, **like)
        self.reset_parameters()
        self.train(base.training)

    def reset_parameters(self):
        """A Kaiming-uniform and B zero (below Eq. 1), so that the update starts at zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.router.reset_parameters()

    def gates(self, x):
        """w of Eq. 4 for each token: x (..., k) -> w (..., n)."""
        x = x.to(self.lora_A.dtype)                                           # (..., k)
        if self.router_input == "Ax":
            x = F.linear(x, self.lora_A)                                      # (..., r)
        return self.router(x)                                                 # (..., n)

    def forward(self, x):
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.lora_A.device:
            raise ValueError(f"x must be on {self.lora_A.device}, the adapter's, got {x.device}")
        y = self.base(x)                                                      # (..., d)
        x = x.to(self.lora_A.dtype)                                           # (..., k)
        w = self.gates(x)                                                     # (..., n)
        dropped = self.lora_dropout(x)                                        # (..., k) [5]
        delta = hydralora_delta(dropped, self.lora_A, self.lora_B, w, self.scaling)  # (..., d)
        return y + delta.to(y.dtype)                                          # (..., d) [6]

    @torch.no_grad()
    def to_lora(self, gates):
        """This layer as a plain LoRA (A, B), Eq. 1, for fixed gates.

        gates (n,) -> A (r, k), B = sum_i gates_i B_i (d, r): copies in float32 or better, to be
        scaled by self.scaling. Averaging the heads' weights is averaging their outputs (3.2.2).
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        gates = torch.as_tensor(gates, device=self.lora_B.device, dtype=dtype)    # (n,)
        if gates.shape != (self.num_heads,):
            raise ValueError(f"gates must have shape ({self.num_heads},), got {tuple(gates.shape)}")
        B = (gates.view(-1, 1, 1) * self.lora_B).sum(0)                       # (d, r)
        return self.lora_A.to(dtype, copy=True), B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a new nn.Linear with the weight W0 + scaling * sum_i gates_i B_i A.

        gates (n,). Exact where the router gives these gates: for every x if n = 1, if all B_i
        are equal, or if the router is constant. Elsewhere this layer is the merged one plus
        scaling * sum_i (w_i(x) - gates_i) B_i A x [8]. The sum is taken in float32 or better and
        cast once; this layer stays as it is. Raises TypeError for a base whose weight is
        quantised, computed or sharded, or which does not compute W0 x + bias: one x is tried.
        """
        A, B = self.to_lora(gates)
        W0, kind = self.base._parameters.get("weight"), type(self.base).__name__
        if not _has_values(W0) or W0.element_size() < 2 or W0.shape != (len(B), A.shape[1]):
            raise TypeError(f"base cannot be merged: {kind} has no plain weight of shape "
                            f"{(len(B), A.shape[1])} (quantised, computed, sharded or on meta?)")
        high = torch.promote_types(W0.dtype, A.dtype)
        merged = copy.deepcopy(self.base)
        W = W0.to(high, copy=True).addmm_(B.to(high), A.to(high), alpha=self.scaling)     # (d, k)
        merged.weight.copy_(W)
        x = torch.linspace(-1, 1, A.shape[1], dtype=W0.dtype, device=W0.device)[None]     # (1, k)
        for linear in (self.base, merged):
            y, expected = linear(x), F.linear(x, linear.weight, linear.bias)  # (1, d)
            if not (y - expected).norm() <= 16 * torch.finfo(y.dtype).eps * expected.norm():
                raise TypeError(f"base cannot be merged: {kind} does not compute W0 x + bias "
                                "(a forward or a hook of its own, or an overflow?)")
        return merged

    @property
    def weight(self):
        """W0, since models ask their linear layers for it."""
        if not isinstance(self.base.weight, torch.Tensor):
            raise TypeError(f"base keeps no weight tensor: {type(self.base).__name__}")
        return self.base.weight

    bias = property(lambda self: self.base.bias)

    def _adapter(self):
        """The trained parameters: lora_A, lora_B and router.weight."""
        return {key: p for key, p in self.named_parameters() if not key.startswith("base.")}

    def extra_repr(self):
        return (f"num_heads={self.num_heads}, r={self.r}, lora_alpha={self.lora_alpha}, "
                f"router_input={self.router_input!r}")


# ---- A tiny transformer ----------------------------------------------------------------------


@dataclass
class TinyConfig:
    vocab_size: int = 64
    max_position_embeddings: int = 64   # longest sequence
    hidden_size: int = 64
    intermediate_size: int = 256        # width inside the feed-forward layer
    num_hidden_layers: int = 2
    num_attention_heads: int = 4


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, h):
        x = self.attention_norm(h)                                            # (b, t, width)
        query, key, value = (
            proj(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj))      # (b, attention heads, t, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)   # the same
        h = h + self.o_proj(mixed.transpose(1, 2).flatten(2))                 # (b, t, width)
        return h + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))     # (b, t, width)


class TinyTransformer(nn.Module):
    """A GPT-style decoder, pre-norm and causal: tokens (b, t) -> logits (b, t, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TinyBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)       # (t,)
        h = self.token_embedding(tokens) + self.position_embedding(positions)     # (b, t, width)
        for layer in self.layers:
            h = layer(h)                                                      # (b, t, width)
        return self.lm_head(self.norm(h))                                     # (b, t, vocab_size)


# ---- On a model ------------------------------------------------------------------------------


def _replace(model, new):
    """Put new[module] in the place of each module, under every name that holds it."""
    if model in new:
        raise ValueError("model is itself the layer: it has no parent in which to replace it")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def hydralora_layers(model, remove_duplicate=True):
    """The model's HydraLoRA layers: dict name -> HydraLoRALinear, empty if there is none.

    remove_duplicate=False: under all their names, as in nn.Module.named_modules.
    """
    return {name: module for name, module in model.named_modules(remove_duplicate=remove_duplicate)
            if isinstance(module, HydraLoRALinear)}


def inject_hydralora(model, targets, **layer_arguments):
    """Freeze the model and wrap the nn.Linear layers that the targets name; returns the model.

    targets: names such as "q_proj" or "layers.0.q_proj": a layer is meant if its dotted name is
    a target or ends in "." + target [7]. layer_arguments: those of HydraLoRALinear. A layer that
    the model holds under several names gets one adapter. Adapters of an earlier injection stay.

    Raises an error, with the model as it was, for a target that matches no nn.Linear, that is
    injected already, or that nn.MultiheadAttention or nn.TransformerEncoderLayer hold: those read
    the weight and never call the layer. Models of other libraries may do so too: run one under
    record_gates, and such layers are missing.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = hydralora_layers(model, remove_duplicate=False)
    bases = {layer.base for layer in adapted.values()}
    linears = {name: m for name, m in modules.items()
               if isinstance(m, nn.Linear) and m not in bases and m is not model}
    meant = {target: [name for name in [*adapted, *linears] if f".{name}".endswith(f".{target}")]
             for target in targets}
    for target, names in meant.items():
        if not names:
            raise ValueError(f"targets: {target!r} matches no nn.Linear of the model; it has "
                             + (", ".join(linears) or "none"))
        for name in names:
            parent = modules[name.rpartition(".")[0]]
            if name in adapted:
                raise ValueError(f"targets: {target!r} is injected already, at {name}")
            if modules[name].weight.is_complex():
                raise TypeError(f"targets: {name!r} is not a real nn.Linear, it is complex")
            if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
                raise ValueError(f"targets: {name!r} cannot be adapted, its "
                                 f"{type(parent).__name__} reads the weight without calling it")
    if not targets:
        raise ValueError("targets must name at least one nn.Linear, got none")
    names = [name for name in linears if any(name in found for found in meant.values())]
    layers = {linears[name]: HydraLoRALinear(linears[name], **layer_arguments) for name in names}
    adapters = {p for layer in adapted.values() for p in layer._adapter().values()}
    for p in set(model.parameters()) - adapters:
        p.requires_grad_(False)
    _replace(model, layers)
    return model


def _some_layers(model, with_values=True):
    """The layers by name; ValueError if there are none, or adapters without values."""
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRALinear: not injected, or merged already")
    for name, layer in layers.items():
        if with_values and not all(map(_has_values, layer._adapter().values())):
            raise ValueError(f"layer {name!r} has no values: its adapter is on meta, or sharded")
    return layers


@contextlib.contextmanager
def hook_gates(model, f):
    """Context manager: f(name, w) is called with each router's w (..., n) in a forward.

    What f returns, unless it is None, replaces w. A model compiled before has to be compiled anew.
    """
    with contextlib.ExitStack() as hooks:
        for name, layer in _some_layers(model, with_values=False).items():
            hooks.enter_context(layer.router.register_forward_hook(
                lambda router, inputs, w, name=name: f(name, w)))
        yield


@contextlib.contextmanager
def record_gates(model):
    """Context manager: a dict name -> w (..., n) of the last forward inside it, detached."""
    gates = {}
    with hook_gates(model, lambda name, w: gates.update({name: w.detach()})):
        yield gates


@torch.no_grad()
def mean_gates(model, batches, masks=None):
    """Mean w over all tokens of calibration inputs: dict name -> (n,), to merge with.

    batches: inputs of the model, each a tensor or a dict of keyword arguments. masks: for each
    batch a tensor (b, t), true where a token counts, such as attention_mask; for adapted layers
    that see (b, t) tokens. The model runs in eval mode. Raises ValueError if a layer saw no token.
    """
    total, count = {}, {}

    def add(name, w):
        w = w if mask is None else w[mask.to(w.device, torch.bool)]
        w = w.reshape(-1, w.shape[-1])                                        # (tokens, n)
        total[name] = total.get(name, 0) + w.float().sum(0)                   # (n,)
        count[name] = count.get(name, 0) + len(w)

    modes = {module: module.training for module in model.modules()}
    try:
        with hook_gates(model.eval(), add):
            for batch, mask in zip(batches, itertools.repeat(None) if masks is None else masks,
                                   strict=masks is not None):
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    unseen = [name for name in hydralora_layers(model) if not count.get(name)]
    if unseen:
        raise ValueError(f"batches: no token reached {unseen}")
    return {name: total[name] / count[name] for name in count}


def _gates_by_name(layers, gates):
    """gates: one tensor (n,) for all layers, or a dict name -> (n,) with every layer in it."""
    if not isinstance(gates, Mapping):
        return dict.fromkeys(layers, gates)
    if gates.keys() != layers.keys():
        raise ValueError(f"gates: missing layers {sorted(layers.keys() - gates.keys())}, "
                         f"unknown layers {sorted(gates.keys() - layers.keys())}")
    return gates


def merge_hydralora(model, gates):
    """Put layer.merge(gates) in the place of each HydraLoRA layer; returns the layers by name.

    gates: one tensor (n,) for all layers, or a dict name -> (n,) with every layer in it, such as
    mean_gates gives. Raises what HydraLoRALinear.merge raises, with the model as it was.
    """
    layers = _some_layers(model)
    gates = _gates_by_name(layers, gates)
    _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})
    return layers


def unmerge_hydralora(model, layers):
    """Put back the layers that merge_hydralora returned: all weights as before, bit for bit."""
    modules = dict(model.named_modules())
    wrong = [name for name in layers if not isinstance(modules.get(name), nn.Linear)]
    if wrong:
        raise ValueError(f"layers: the model has no merged nn.Linear at {wrong}")
    _replace(model, {modules[name]: layer.train(modules[name].training)
                     for name, layer in layers.items()})


# ---- Files -----------------------------------------------------------------------------------


def hydralora_state_dict(model):
    """The adapter alone: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k or r).

    Keep the arguments of inject_hydralora beside it: lora_alpha and router_input cannot be told
    from the state. After FSDP2, call torch.distributed.checkpoint.state_dict.get_model_state_dict
    with full_state_dict and ignore_frozen_params, and load what it gives into an unsharded copy.
    """
    return {f"{name}.{key}": p.detach() for name, layer in _some_layers(model).items()
            for key, p in layer._adapter().items()}


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy an adapter into an injected model. Raises ValueError, with nothing copied, if the state
    has other keys than the model, or under one of them another shape or no values."""
    own = hydralora_state_dict(model)
    wrong = {key: f"{type(state[key]).__name__} {tuple(getattr(state[key], 'shape', ()))} for "
                  f"{tuple(t.shape)}" for key, t in own.items() if key in state
             and not (_has_values(state[key]) and state[key].shape == t.shape)}
    if own.keys() != state.keys() or wrong:
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        raise ValueError(f"state does not fit the model: missing {sorted(missing)}, unexpected "
                         f"{sorted(unexpected)}, wrong {wrong}")
    for key, value in own.items():
        value.copy_(state[key])


def from_official_state_dict(state):
    """The official repository's checkpoint keys, with or without its prefix, to ours.

    NAME.lora_A.weight (r, k), NAME.lora_B0.weight ... (d, r), NAME.lora_route.weight (n, k) ->
    NAME.lora_A, NAME.lora_B (n, d, r), NAME.router.weight. Raises ValueError for any other key
    and for a layer that is there twice, is not complete or whose shapes do not fit together.
    """
    layers = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_(?:A|B\d+|route))\.weight", key)
        if not match:
            raise ValueError(f"state: {key!r} is no key of an official HydraLoRA checkpoint")
        parts = layers.setdefault(match[1], {})
        if match[2] in parts:
            raise ValueError(f"state: {match[1]!r} has {match[2]} with and without the prefix")
        parts[match[2]] = value
    if not layers:
        raise ValueError("state: is empty")
    ours = {}
    for name, parts in layers.items():
        shapes = {part: tuple(value.shape) for part, value in parts.items()}
        (r, k), (d, _) = ((*shapes.get(part, ()), 0, 0)[:2] for part in ("lora_A", "lora_B0"))
        heads = [f"lora_B{i}" for i in range(max(1, len(parts) - 2))]
        if shapes != dict.fromkeys(heads, (d, r)) | dict(lora_A=(r, k), lora_route=(len(heads), k)):
            raise ValueError(f"state: {name!r} needs lora_A (r, k), lora_B0, lora_B1, ... (d, r) "
                             f"and lora_route (n, k), got {shapes}")
        ours |= {f"{name}.lora_A": parts["lora_A"], f"{name}.router.weight": parts["lora_route"],
                 f"{name}.lora_B": torch.stack([parts[head] for head in heads])}      # (n, d, r)
    return ours


def export_lora(model, gates):
    """A plain LoRA of rank r for fixed gates, under PEFT's names: (state, config).

    gates as for merge_hydralora. state: tensors by key, for adapter_model.safetensors. config: a
    dict for adapter_config.json, whose patterns match whole names, so that no other layer is
    adapted. PEFT reads it from 0.10 on, layers of different r from 0.15 on. For PEFT's auto classes
    or AutoModelForCausalLM add config |= dict(base_model_name_or_path=..., task_type="CAUSAL_LM").
    """
    layers = _some_layers(model)
    second = sorted(hydralora_layers(model, remove_duplicate=False).keys() - layers.keys())
    if second:
        raise ValueError(f"model: {second} are second names of layers, of which PEFT would adapt "
                         "the first alone")
    gates, state = _gates_by_name(layers, gates), {}
    first = next(iter(layers.values()))
    alpha = first.lora_alpha or 1       # one for all layers: B makes up for another alpha
    for name, layer in layers.items():
        A, B = layer.to_lora(gates[name])
        state[f"base_model.model.{name}.lora_A.weight"] = A                   # (r, k)
        state[f"base_model.model.{name}.lora_B.weight"] = B * (layer.lora_alpha / alpha)  # (d, r)
    config = dict(peft_type="LORA", r=first.r, lora_alpha=alpha,
                  target_modules="|".join(map(re.escape, layers)),
                  rank_pattern={f"^{re.escape(name)}": m.r for name, m in layers.items()})
    return state, config


# ---- Choosing N (Appendix B) -----------------------------------------------------------------
# X_i: TF-IDF vector of document i, of length 1. S_j: a cluster, C_j: its centre. Each centre is a
# weighted sum of documents, C_j = sum_i M_ij X_i, so the products X_i.X_l are all that is needed:
#     |X_i - C_j|^2 = X_i.X_i - 2 sum_l X_i.X_l M_lj + sum_lm M_lj X_l.X_m M_mj

MOST_DOCUMENTS = 3000


def _tf_idf_products(documents):
    """X_i.X_l. X: counts times 1 + log((1 + documents) / (1 + those with the term)), length 1."""
    column = {}
    index = [(i, column.setdefault(token, len(column)))
             for i, document in enumerate(documents) for token in document]
    X = torch.zeros(len(documents), len(column))                              # (documents, terms)
    index = torch.tensor(index, dtype=torch.long).view(-1, 2).T               # (2, all tokens)
    X.index_put_(tuple(index), torch.ones(()), accumulate=True)
    X *= 1 + torch.log((1 + len(documents)) / (1 + (X > 0).sum(0)))
    X /= X.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return X @ X.T                                                        # (documents, documents)


def _k_means_sse(products, largest, max_heads):
    """SSE of K = 1 .. largest centres. The paper draws the first ones at random. Here the candidate
    that lowers the SSE most is added to the best K centres: nothing random, and SSE only falls."""
    def squared_distances(M):           # (documents, centres) -> the same
        PM = products @ M
        return products.diagonal()[:, None] - 2 * PM + (M * PM).sum(0)

    count = len(products)
    near = products.topk(max(1, count // (2 * max_heads)), dim=0).indices     # (some, documents)
    means = torch.zeros_like(products).scatter_(0, near, 1 / len(near))
    to_new = squared_distances(means)   # new centres are tried at the mean of a document's nearest
    owner, sse = torch.zeros(count, dtype=torch.long), []
    for K in range(1, largest + 1):
        if K > 1:
            best = (nearest[:, None] - to_new).clamp_min_(0).sum(0).argmax()
            owner = torch.where(to_new[:, best] < nearest, K - 1, owner)
        for _ in range(100):
            members = F.one_hot(owner, K).float()                             # S_j: (documents, K)
            distances = squared_distances(members / members.sum(0).clamp_min(1))      # Eq. 8
            distances[:, members.sum(0) == 0] = math.inf
            before, owner = owner, distances.argmin(1)                        # Eq. 7
            if torch.equal(before, owner):
                break
        nearest = distances.amin(1).clamp_min(0)                              # (documents,)
        sse.append(nearest.sum().item())
    return sse


def _elbow(documents, max_heads):
    """The K of the elbow, by what factor its gains exceed the later ones, and the SSE curve."""
    sse = _k_means_sse(_tf_idf_products(documents), min(max_heads + 3, len(documents)), max_heads)
    gains = [before - after for before, after in zip(sse, sse[1:])]           # gains[K - 2] at K
    rounding = 1e-5 * sse[0] + 1e-12
    factors = {K: min(gains[:K - 1]) / max(*gains[K - 1:], rounding)
               for K in range(2, min(max_heads, len(gains)) + 1)}
    n = max(factors, key=factors.get, default=1)
    return n, factors.get(n, 0), sse[:max_heads]


def num_heads_from_corpus(documents, max_heads=10, seed=0):
    """Appendix B: N from the corpus alone, by TF-IDF, k-means and the elbow of the SSE curve.

    documents: sequences of token ids or strings; a document that is one string is split at white
    space. Returns (n, sse): sse[K - 1] is the sum of squared distances to the nearest of K centres,
    K = 1 .. max_heads. The elbow is where "the rate of decrease in SSE slows down"; the paper has
    no rule for it. Here it is the K whose gains, sse(K-1) - sse(K) and those before it, exceed all
    later ones by the largest factor. One domain has such a K too. So n is 1 unless the factor is at
    least 2.3, and 1.5 times that of the same tokens dealt out to the documents at random.

    Trust it for up to 10 domains of different words, in documents of 25 tokens or more. Real text
    has kinds within kinds: four kinds of source files gave 1. Then n is your choice; in Figure 8
    2 to 4 do well. The same for any seed up to 3000 documents; of more, it draws 3000. Memory:
    documents x (terms + 6 documents) floats. Raises ValueError for fewer documents than max_heads.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of documents, got one string")
    documents = [d.split() if isinstance(d, str) else
                 [token.item() if isinstance(token, torch.Tensor) else token for token in d]
                 for d in documents]
    if not 1 <= max_heads <= len(documents):
        raise ValueError(f"max_heads must be from 1 to the number of documents, "
                         f"{len(documents)}, got {max_heads}")
    if len(documents) > MOST_DOCUMENTS:
        documents = random.Random(seed).sample(documents, MOST_DOCUMENTS)
    n, factor, sse = _elbow(documents, max_heads)
    tokens, chance = [token for document in documents for token in document], []
    for deal in range(3):
        random.Random(deal).shuffle(tokens)
        dealt = iter(tokens)
        chance += [_elbow([list(itertools.islice(dealt, len(d))) for d in documents], max_heads)[1]]
    return (n if factor >= max(2.3, 1.5 * sum(chance) / 3) else 1), sse
