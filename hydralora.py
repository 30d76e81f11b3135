# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the authors of HydraLoRA in one file
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router that mixes them.

Tian, Shi, Guo, Li, Xu: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient
Fine-Tuning", NeurIPS 2024, arXiv 2404.19245. W0 is frozen, all the rest is trained:

    (1)  y = W0 x + B A x                 LoRA
    (2)  W = W0 + sum_i w_i B_i A         HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x     HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)              the router: each token has a w of its own

    paper  code           shape     what it is
    x      x              (..., k)  input, any leading axes: (b, t, k) in a transformer
    W0     base.weight    (d, k)    frozen weight, from k features to d
    A      lora_A         (r, k)    rank r, for all heads; Kaiming-uniform at first
    B_i    lora_B[i]      (d, r)    a head, the paper's expert E_i; zero at first
    N      num_heads, n             number of heads
    Wg     router.weight  (n, k)    Eq. 4's Wg^T, stored as nn.Linear stores a weight
    w      w, gates       (..., n)  each token's mixture; (n,) where the caller fixes it

Why one A, and many B_i? Observation II (2.3): "when multiple LoRA heads are trained
individually on different data, the parameters of matrix A from different heads tend to
converge, while those of matrix B are distinguishable". So one A is shared, and what differs
from head to head is in B_i: the asymmetry.

Where the paper is silent, or at odds with the official code, this file does so. "L" is a
line of HydraLoRA/peft/tuners/lora.py in github.com/Clin0212/HydraLoRA at afb693b.

    [1] The router reads x, as in the paper's text and L339. Before Eq. 4 the paper gives
        Wg the shape (r, N), which fits A x.
    [2] The router has no bias (L279) and starts Kaiming-uniform (L299), as A does (L295).
    [3] The softmax is in float32, or float64 for float64, and cast back; L339: in float32.
    [4] The update is scaled by lora_alpha / r (L284, L342); the paper has no such factor.
    [5] One dropout mask for all heads, on the x that A reads, and none for the router
        (L339). L342 draws a mask for each head; the paper has no dropout.
    [6] y alone is returned. L347 returns a balance loss beside it, always 0 (L344); the
        paper has none.
    [7] The caller names the layers. Table 2's 0.124 % of parameters fit q and v without
        any router; the official script takes gate, up and down.
    [8] Merging takes one w, from the caller, for all tokens, which is not exact. The paper
        merges "based on the input" (3.2.2): as we read it for each token, which is exact.
        lora.py has no merge.

Beside the paper, read down to "On a model"; with math and torch that part stands alone.
"""
import math
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.4.0"


# ---- The equations ----
def hydralora_gates(x, Wg):
    """Eq. 4: w = softmax(Wg x), where our Wg is the paper's Wg^T.

    x (..., k), Wg (n, k) -> w (..., n).
    """
    logits = F.linear(x, Wg)  # (..., n)
    high = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=high).to(logits.dtype)  # (..., n) [3]


def hydralora_delta(x, A, B, gates, scaling: float):
    """The update in Eq. 3, scaling * sum_i w_i B_i A x, as one product for all heads:

        sum_i w_i B_i z  =  [B_1 ... B_n] [w_1 z; ...; w_n z],    z = scaling * A x.

    So it costs about as much as one LoRA of rank n r.
    x (..., k), A (r, k), B (n, d, r), gates w (..., n) -> (..., d).
    """
    z = F.linear(x, A) * scaling                # (..., r) [4]
    wz = gates.unsqueeze(-1) * z.unsqueeze(-2)  # (..., n, r)
    heads = B.transpose(0, 1).flatten(1)        # (d, n r)
    return F.linear(wz.flatten(-2), heads)      # (..., d)


def hydralora_forward(x, W0, bias, A, B, Wg, scaling):
    """Eqs. 3 and 4, the layer without dropout, as a function that the oracle can test.

    x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k) -> y (..., d).
    The update has the dtype of A, B and Wg. By hand, with W0 the identity,
    bias (10, 20), A = (1, 1), B_1 = (1, 2), B_2 = (5, -2), Wg = ((ln 3, 0), (0, 0)),
    scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(ln 3, 0) = (3/4, 1/4)
        y = (11, 22) + 2 (3/4 (3, 6) + 1/4 (15, -6)) = (23, 28)
    """
    y = F.linear(x, W0, bias)                     # (..., d)
    x = x.to(A.dtype)                             # (..., k)
    w = hydralora_gates(x, Wg)                    # (..., n)
    delta = hydralora_delta(x, A, B, w, scaling)  # (..., d)
    return y + delta.to(y.dtype)                  # (..., d)


# ---- The layer ----
class Router(nn.Module):
    """Eq. 4 as a module, so that a forward hook sees w: x (..., k) -> w (..., n).

    It is no nn.Linear: quantisers would exchange it, and its softmax with it.
    """

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # [2]

    def forward(self, x):
        return hydralora_gates(x, self.weight)  # (..., n)


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: n. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.
    lora_dropout: its probability. The adapter is float32, or float64 for a float64 base
    (official script: bfloat16), and y has the dtype of base(x).
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear) or base.weight.is_complex():
            raise TypeError(f"base must be an nn.Linear with real weights, got {base}")
        if num_heads < 1 or r < 1:
            raise ValueError("needs num_heads, r >= 1")
        if not math.isfinite(lora_alpha) or not 0 <= lora_dropout < 1:
            raise ValueError("needs a finite lora_alpha and 0 <= lora_dropout < 1")
        super().__init__()
        k, d = base.in_features, base.out_features
        self.in_features = k
        self.out_features = d
        self.num_heads = num_heads
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r  # [4]
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        like = dict(device=base.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, k, **like))
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **like))
        self.router = Router(k, num_heads, **like)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_parameters()
        self.base = base.requires_grad_(False)  # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)     # the update is zero at first (below Eq. 1)
        self.router.reset_parameters()

    def gates(self, x):
        """w of Eq. 4 for each token: x (..., k), of any dtype -> w (..., n)."""
        return self.router(x.to(self.lora_A.dtype))  # (..., n) [1]

    def forward(self, x):
        """Eqs. 3 and 4, L336-347: x (..., k) -> y (..., d)."""
        y = self.base(x)                # (..., d)
        x = x.to(self.lora_A.dtype)     # (..., k)
        w = self.gates(x)               # (..., n)
        dropped = self.lora_dropout(x)  # (..., k) [5]
        delta = hydralora_delta(dropped, self.lora_A, self.lora_B, w, self.scaling)
        return y + delta.to(y.dtype)  # (..., d) [6]

    @property
    def weight(self):  # some models ask a layer for it
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    @torch.no_grad()
    def to_lora(self, gates):
        """Eq. 1 for fixed gates (n,): copies of A (r, k) and sum_i gates_i B_i (d, r).

        Averaging the heads' weights averages their outputs (3.2.2). Both are float32 or
        float64, and not scaled.
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        gates = torch.as_tensor(gates, dtype=dtype)  # (n,)
        if gates.shape != (self.num_heads,) or not gates.isfinite().all():
            raise ValueError(f"gates must be {self.num_heads} finite numbers, got {gates}")
        gates = gates.to(self.lora_B.device).view(-1, 1, 1)  # (n, 1, 1)
        B = (gates * self.lora_B).sum(0)                     # (d, r)
        return self.lora_A.to(dtype, copy=True), B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a new nn.Linear with the weight W0 + scaling * sum_i gates_i B_i A.

        gates (n,). It is exact for a token whose mixture is `gates`. For a mixture w, y
        is off by scaling * sum_i (gates_i - w_i) B_i A x [8]. W is cast to W0's dtype
        once. Hooks of base are not carried over. TypeError if base is seen to do more
        than W0 x + bias, or if its dtype cannot hold W.
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):
            W0, bias = _plain_linear(self.base)             # (d, k), (d,) or None
            A, B = self.to_lora(gates)                      # (r, k), (d, r)
            W = (W0 + self.scaling * (B @ A)).to(W0.dtype)  # (d, k), Eq. 2
        if not W.isfinite().all():
            raise TypeError(f"base cannot be merged: W is not finite in {W.dtype}")
        d, k = W.shape
        merged = nn.Linear(k, d, bias is not None, device="meta")
        merged.weight = nn.Parameter(W, requires_grad=W0.requires_grad)
        if bias is not None:
            merged.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)
        return merged.train(self.base.training)


def _plain_linear(base):
    """W0 (d, k) and bias (d,) of a base that gives W0 x + bias; TypeError if it does not.

    A hook, a forward of its own or an old copy of the weight may give more. So base is
    asked, on (negative) unit vectors, where no sum rounds.
    """
    W0, bias = base._parameters.get("weight"), base.bias
    if type(W0) is not nn.Parameter or not W0.is_floating_point() or W0.is_meta:
        raise TypeError("base cannot be merged: its weight is computed, quantised, sharded "
                        f"or offloaded: {base}")
    k = W0.shape[1]
    columns = torch.arange(0, k, 1 + k // 64, device=W0.device)  # (m,), m <= 64
    x = -F.one_hot(columns, k)[None].to(W0.dtype)                # (1, m, k)
    y, eps = F.linear(x, W0, bias), torch.finfo(W0.dtype).eps    # (1, m, d)
    if not torch.allclose(base(x).to(y), y, rtol=eps, atol=0, equal_nan=True):
        raise TypeError(f"base cannot be merged: it gives more than W0 x + bias: {base}")
    return W0, bias


# ---- On a model ----
def hydralora_layers(model):
    """The model's HydraLoRA layers: dict name -> HydraLoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _replace(model, new):
    """Put new[module] in the place of module, under each of its names."""
    if model in new:
        raise ValueError("model is itself the layer: it has no parent")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def inject_hydralora(model, targets, **layer_arguments):
    """Freeze the model and wrap the nn.Linear layers that the targets name; returns the model.

    targets: "q_proj", "layers.0.q_proj" or a list of such [7]. A layer is meant if its
    name is a target or ends in "." + target. layer_arguments: those of HydraLoRALinear.
    Load the base's weights first: q_proj.weight is q_proj.base.weight afterwards. A
    second injection adds to the first.

    ValueError, with the model as it was, if a target matches nothing, or a layer on
    meta, or one whose parent reads its weight and does not call it
    (nn.MultiheadAttention). Another such parent is not noticed: the adapter does
    nothing, and record_gates has no entry for it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parents = {name: modules[name.rpartition(".")[0]] for name in modules}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)
               and name and not isinstance(parents[name], HydraLoRALinear)]
    chosen = []
    for target in [targets] if isinstance(targets, str) else targets:
        found = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"{target!r} matches no nn.Linear: there are {linears[:10]} ...")
        chosen += found
    if not chosen:
        raise ValueError("targets is empty")
    for name in chosen:
        if isinstance(parents[name], (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{name}: its parent reads its weight and does not call it")
        if modules[name].weight.is_meta:
            raise ValueError(f"{name} is on meta: load the base's weights first; a layer that "
                             "is offloaded cannot be adapted")
    flags = {p: p.requires_grad for p in model.parameters()}
    for layer in hydralora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B, layer.router.weight):
            flags.pop(p, None)      # an earlier injection's adapters stay as they are
    try:
        new = {modules[name]: HydraLoRALinear(modules[name], **layer_arguments)
               for name in chosen}
    except Exception:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        raise
    for p in flags:
        p.requires_grad_(False)
    _replace(model, new)
    return model


@contextmanager
def hook_gates(model, f):
    """Context manager: f(name, w) gets each router's w (..., n) and may return another.

    With `lambda name, w: 0 * w` the adapters are off.
    """
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRALinear: not injected, or merged already")
    hooks = []
    for name, layer in layers.items():
        def hook(router, inputs, w, name=name):
            return f(name, w)
        hooks.append(layer.router.register_forward_hook(hook))
    try:
        torch.compiler.reset()      # compiled code does not notice hooks that come or go
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.compiler.reset()


@contextmanager
def record_gates(model):
    """Context manager: a dict name -> w (..., n) of the last forward in it, detached."""
    gates = {}

    def record(name, w):
        gates[name] = w.detach()

    with hook_gates(model, record):
        yield gates


@torch.no_grad()
def mean_gates(model, batches, masks=None):
    """Mean w over all tokens of calibration inputs, in eval mode: dict name -> (n,).

    batches: a list of tensors, or of dicts of keyword arguments. masks: a tensor (b, t) for
    each, 1 where a token counts. A batch's own attention_mask is not looked at.
    **A fixed mixture can ruin the model: train_toy.py falls from 97.6 to 32.7 %.**
    """
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError("batches must be a list of batches")
    pairs = ((batch, None) for batch in batches)
    if masks is not None:
        pairs = zip(batches, masks, strict=True)
    total = dict.fromkeys(hydralora_layers(model), 0)
    count = dict.fromkeys(total, 0)
    training = [module for module in model.modules() if module.training]
    seen = []
    try:
        with hook_gates(model.eval(), lambda name, w: seen.append((name, w))):
            for batch, mask in pairs:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                for name, w in seen:
                    if mask is not None:
                        w = w[mask.to(w.device) == 1]
                    w = w.float().reshape(-1, w.shape[-1])  # (tokens, n)
                    total[name] += w.sum(0)                 # (n,)
                    count[name] += len(w)
                seen.clear()
    finally:
        for module in training:
            module.training = True
    if not all(count.values()):
        raise ValueError(f"no token reached some of these layers: {count}")
    return {name: total[name] / count[name] for name in total}


def _gates_by_name(layers, gates):
    if not isinstance(gates, Mapping):
        gates = dict.fromkeys(layers, gates)
    if not layers or gates.keys() != layers.keys():
        raise ValueError(f"gates are for {list(gates)}, the model's layers are {list(layers)}")
    return gates


def merge_hydralora(model, gates):
    """Put layer.merge(gates) in the place of each HydraLoRA layer; returns these by name.

    gates: one (n,) for all, or a dict name -> (n,) of every layer, such as mean_gates
    gives. If one layer cannot be merged, the model stays as it was.
    """
    layers = hydralora_layers(model)
    gates = _gates_by_name(layers, gates)
    _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})
    return layers


def unmerge_hydralora(model, layers):
    """Put back the layers that merge_hydralora returned: all weights as before, bit for bit.

    They go back into the model that they came from. Its .half() or .to(dtype) in between
    does not reach them.
    """
    old = {}
    for name, layer in layers.items():
        merged = model.get_submodule(name)
        if not isinstance(merged, nn.Linear):
            raise ValueError(f"the model has no merged nn.Linear at {name}")
        old[merged] = layer.train(merged.training)
    _replace(model, old)


# ---- Files ----
def hydralora_state_dict(model):
    """The adapter: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k).

    Keep inject_hydralora's arguments beside it: it has no lora_alpha. It follows training;
    copy it to keep it. Wrappers (DistributedDataParallel, torch.compile, AveragedModel)
    change the names: pass the model inside. ValueError on meta or sharded: under FSDP2 use
    get_model_state_dict with full_state_dict and ignore_frozen_params; load it unsharded.
    """
    state = {}
    for name, layer in hydralora_layers(model).items():
        for key, t in layer.state_dict().items():
            if not key.startswith("base."):
                state[f"{name}.{key}"] = t
    if not state or any(type(t) is not torch.Tensor or t.is_meta for t in state.values()):
        raise ValueError("model has no adapters, or they are on meta, or sharded")
    return state


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy an adapter into an injected model, all of it or, with a ValueError, nothing."""
    own = hydralora_state_dict(model)  # shares the parameters' memory
    fits = {(key, t.shape) for key, t in own.items()}
    given = {(key, t.shape) for key, t in state.items() if not t.is_meta}
    if fits != given:
        raise ValueError(f"only in the model {fits - given}, only in state {given - fits}")
    for key, t in own.items():
        t.copy_(state[key])


def from_official_state_dict(state):
    """Official keys to ours: NAME.lora_A.weight, lora_B0.weight ..., lora_route.weight.

    PEFT's prefix may stand before them. None holds lora_alpha: inject with the run's.
    """
    rest = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    if len(rest) < len(state):
        raise ValueError("state has a key with PEFT's prefix and without")
    ours = {}
    for name in dict.fromkeys(key.rpartition(".lora_")[0] or key for key in rest):
        for part in ("lora_A", "lora_B0", "lora_route"):
            if f"{name}.{part}.weight" not in rest:
                raise ValueError(f"no official HydraLoRA checkpoint: {name} has no {part}")
        heads = []
        while f"{name}.lora_B{len(heads)}.weight" in rest:
            heads.append(rest.pop(f"{name}.lora_B{len(heads)}.weight"))  # (d, r)
        ours[f"{name}.lora_A"] = rest.pop(f"{name}.lora_A.weight")  # (r, k)
        ours[f"{name}.lora_B"] = torch.stack(heads)  # (n, d, r)
        ours[f"{name}.router.weight"] = rest.pop(f"{name}.lora_route.weight")  # (n, k)
    if rest or not ours:
        raise ValueError(f"no official HydraLoRA checkpoint: it has {list(rest)}")
    return ours


def export_lora(model, gates):
    """A plain LoRA for fixed gates, as for merge_hydralora: returns (state, config).

    For PEFT's adapter_model.safetensors and adapter_config.json, from PEFT 0.10 on, or
    0.15 if layers differ in r. Auto classes want base_model_name_or_path and task_type.
    **One fixed mixture can ruin the model, see mean_gates.**
    """
    hydralora_state_dict(model)  # refuses adapters without values
    layers = hydralora_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in modules if isinstance(modules[name], HydraLoRALinear)]
    if names != list(layers) or "" in layers:
        raise ValueError("PEFT needs one name for each layer")
    state, ranks = {}, {}
    for name, w in _gates_by_name(layers, gates).items():
        layer = layers[name]
        A, B = layer.to_lora(w)
        state[f"base_model.model.{name}.lora_A.weight"] = A                  # (r, k)
        state[f"base_model.model.{name}.lora_B.weight"] = layer.scaling * B  # (d, r)
        ranks[f"^{re.escape(name)}"] = layer.r
    r = max(ranks.values())  # lora_alpha = r in each layer: PEFT's scaling is 1
    return state, dict(peft_type="LORA", target_modules="|".join(map(re.escape, layers)),
                       r=r, lora_alpha=r, rank_pattern=ranks, alpha_pattern=ranks)


# ---- A tiny transformer, projections named as in Llama ----
@dataclass
class TinyConfig:
    vocab_size: int = 64
    max_position_embeddings: int = 64
    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def attention(self, h):
        """What o_proj reads, (b, t, width)."""
        split = (self.num_attention_heads, -1)
        x = self.attention_norm(h)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)  # (b, heads, t, -1)
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.transpose(1, 2).flatten(2)

    def forward(self, h):
        h = h + self.o_proj(self.attention(h))  # (b, t, width)
        return h + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))


class TinyTransformer(nn.Module):
    """A GPT-style decoder: tokens (b, t) -> logits (b, t, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(TinyBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (t,)
        h = self.token_embedding(tokens) + self.position_embedding(positions)  # (b, t, width)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h))  # (b, t, vocab_size)


# ---- Choosing N, Appendix B ----
def tf_idf(rows, columns):
    """X (documents, terms): how often a document has a term, times how rare the term is.

    Token j is term columns[j] of document rows[j]. Each X_i has length 1.
    """
    X = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1)
    X.index_put_((rows, columns), torch.ones(()), accumulate=True)
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))
    return F.normalize(X)


def k_means(X, max_centres):
    """The SSE, sum_i min_j |X_i - C_j|^2, of 1, ..., max_centres centres.

    The paper starts from random ones. Here K centres start from those found for K - 1
    and one more, the mean of a document and those most like it: the one that lowers the
    SSE most.
    """
    def squared_distances(C):  # |X_i| = 1: (centres, terms) -> (documents, centres)
        return (1 - 2 * X @ C.T + C.square().sum(1)).clamp_min(0)

    count = max(1, len(X) // (2 * max_centres))  # half a cluster
    nearest = (X @ X.T).topk(count).indices                     # (documents, count)
    means = torch.stack([X[near].mean(0) for near in nearest])  # (documents, terms)
    to_means = squared_distances(means)                         # (documents, documents)
    C = X.mean(0, keepdim=True)                                 # (1, terms)
    sse = []
    for K in range(1, max_centres + 1):
        for _ in range(10):
            squared, owner = squared_distances(C).min(1)  # (documents,), Eq. 7
            S = F.one_hot(owner, K).to(X)                 # (documents, K)
            size = S.sum(0)[:, None]                      # (K, 1)
            C = torch.where(size > 0, S.T @ X / size, C)  # (K, terms), Eq. 8
        sse.append(squared.sum().item())
        gain = (squared[:, None] - to_means).clamp_min(0).sum(0)  # (documents,)
        C = torch.cat([C, means[gain.argmax()][None]])            # (K + 1, terms)
    return sse


def elbow(sse):
    """The K after which "the rate of decrease in SSE slows down" most."""
    gains = [before - after for before, after in zip(sse, sse[1:])]  # of K = 2, 3, ...
    least = 1e-5 * sse[0]
    sharpness = [gain / max(after, least) for gain, after in zip(gains, gains[1:])]
    return 2 + sharpness.index(max(sharpness)) if sharpness else 1


def num_heads_from_corpus(documents, max_heads=10, seed=0):
    """Appendix B: N from the corpus alone, by TF-IDF, k-means and the elbow of the SSE curve.

    documents: sequences of token ids or strings, not padded, or strings to split at
    white space. Returns n and the SSE of 1, ..., max_heads centres. The paper has no rule
    for the elbow; ours is reliable for 1 to 10 domains with words of their own, documents
    of 25 tokens or more. Real text has kinds within kinds: choose n (Figure 8: 2 to 4).
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list of documents, got one string")
    texts = [d.split() if isinstance(d, str) else list(d) for d in documents]
    texts = [text for text in texts if text]    # empty documents do not count
    rows = torch.tensor([row for row, text in enumerate(texts) for _ in text])
    terms = [t.item() if isinstance(t, torch.Tensor) else t for text in texts for t in text]
    number = {term: i for i, term in enumerate(dict.fromkeys(terms))}
    columns = torch.tensor([number[term] for term in terms])
    sse = k_means(tf_idf(rows, columns), max_heads + 1)
    # Every curve has an elbow, also that of the same tokens, dealt out at random.
    deal = torch.Generator().manual_seed(seed)
    by_chance = 0
    for _ in range(3):
        dealt = columns[torch.randperm(len(columns), generator=deal)]
        one, two = k_means(tf_idf(rows, dealt), 2)
        by_chance = max(by_chance, one - two)
    n = elbow(sse) if sse[0] - sse[1] > 1.4 * by_chance else 1
    return n, sse[:max_heads]
