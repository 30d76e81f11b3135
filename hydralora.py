# SPDX-License-Identifier: MIT
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router over the heads.

Tian et al.: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
NeurIPS 2024, arXiv 2404.19245. W0 is frozen; A, B_i and Wg are trained.

    (1)  y = W0 x + B A x                 LoRA
    (2)  W = W0 + sum_i w_i B_i A         HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x     HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)              the router, for each token

    paper  code           shape     what it is
    x      x              (..., k)  input, such as (b, t, k)
    W0     base.weight    (d, k)    frozen weight, from k features to d
    A      lora_A         (r, k)    shared by all heads; starts random
    A x    z              (..., r)  the input of every head
    B_i    lora_B[i]      (d, r)    a head, the paper's expert E_i; starts at zero
    N      num_heads                number of heads, n in shapes
    Wg^T   router.weight  (n, k)    as nn.Linear stores a weight
    w      w, gates       (..., n)  one gate per head, for each token; (n,) in merging

The code scales the update by s = scaling. [1] to [9] refer to "Choices".
"""
import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.19.0"


# ---- The layer ----
# MIT License, (c) 2026 the "HydraLoRA in one file" authors. To copy this section, also
# import copy, math, torch, torch.nn.functional as F; from torch import nn
#
# Freeze a model, then put HydraLoRALinear(linear) in the place of linear.
class Router(nn.Module):  # not an nn.Linear, which a quantiser would replace
    """Eq. 4: x (..., k) -> gates w (..., n).

    A subclass may return other gates (..., n), or (b, 1, n) for whole sequences. In a
    decoder, such gates see later tokens, and with a cache only the newest.
    """

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg^T
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # U(-1, 1) / sqrt(k) [2]

    def forward(self, x):
        logits = F.linear(x, self.weight)  # (..., n), no bias [2]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        w = logits.softmax(-1, dtype=dtype)  # (..., n) [3]
        return w.to(logits.dtype)


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: N [8]. r: the rank. lora_alpha: scaling = lora_alpha / r.

    Example: with W0 the identity, bias (10, 20), A = (1, 1), B_1 = (1, 2), B_2 = (5, -2),
    Wg = ((0, ln 3), (0, 0)) and scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(0, ln 3) = (1/4, 3/4)
        y = (11, 22) + 2 (1/4 (3, 6) + 3/4 (15, -6)) = (35, 16)
    """
    router_class = Router  # or a subclass

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear):
            raise ValueError(f"base must be an nn.Linear, got {type(base).__name__}")
        if num_heads < 1 or r < 1:
            raise ValueError(f"num_heads and r must be at least 1, got {num_heads} and {r}")
        super().__init__()
        k, d = base.in_features, base.out_features
        self.in_features, self.out_features = k, d
        self.num_heads, self.r = num_heads, r
        self.scaling = lora_alpha / r  # [4]
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        options = dict(device=base.weight.device, dtype=dtype)  # [3]
        self.lora_A = nn.Parameter(torch.empty(r, k, **options))
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **options))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_parameters()
        self.router = self.router_class(k, num_heads, **options)
        self.base = base.requires_grad_(False)  # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as Wg [2]
        nn.init.zeros_(self.lora_B)

    def forward(self, x):
        y = self.base(x)  # (..., d), W0 x + bias
        x = x.to(self.lora_A.dtype)
        w = self.router(x)  # (..., n), Eq. 4 [1]
        if w.dim() != x.dim() or w.shape[-1] != self.num_heads:
            raise ValueError(f"gates must be (..., {self.num_heads}) with as many axes as x, "
                             f"got {[*w.shape]} for x {[*x.shape]}")
        z = F.linear(self.lora_dropout(x), self.lora_A)  # (..., r), A x, one mask [5]
        u = w[..., None] * (self.scaling * z)[..., None, :]  # (..., n, r)
        delta = torch.einsum("...nr,ndr->...d", u, self.lora_B)  # (..., d), Eq. 3
        return y + delta.to(y.dtype).expand_as(y)  # an error if gates made delta larger

    def extra_repr(self):
        return f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"

    # nn.MultiheadAttention, Mamba and WavLM read a layer's weight and bias and do not call it.
    # They would miss the update, so here weight is empty, and there is no bias: they fail.
    weight = property(lambda self: torch.empty(0, 0).to(self.base.weight))  # T5 reads its dtype

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2 for fixed gates (n,) [7]: a copy of base with W0 + s sum_i gates_i B_i A.

        Exact, up to rounding, for tokens whose w equals gates. For others, y is off by
        s sum_i (gates_i - w_i) B_i A x.
        """
        if type(self).forward is not HydraLoRALinear.forward:
            raise TypeError(f"{type(self).__name__} overrides forward, but not merge")
        base = self.base
        own = getattr(base.forward, "__func__", None) is not nn.Linear.forward  # as by accelerate
        hooked = base._forward_hooks or base._forward_pre_hooks
        if own or hooked or type(base.weight) is not nn.Parameter or base.weight.is_meta:
            got = (f"{type(base).__name__} with a weight of type {type(base.weight).__name__} "
                   f"on {base.weight.device}")
            got += ", with hooks" if hooked else ""
            got += ", with its own forward" if own else ""
            raise TypeError("base is quantised, sharded, offloaded or hooked: expected a plain "
                            f"nn.Linear, got {got}")
        dtype = torch.promote_types(self.lora_B.dtype, torch.float32)
        A, heads = self.lora_A.to(dtype), self.lora_B.to(dtype)
        gates = torch.as_tensor(gates).to(heads)
        if gates.shape != (self.num_heads,):
            raise ValueError(f"gates must be {self.num_heads} numbers, got shape {[*gates.shape]}")
        B = self.scaling * (gates[:, None, None] * heads).sum(0)  # (d, r)
        merged = copy.deepcopy(base)
        with torch.autocast(A.device.type, enabled=False):
            merged.weight += B @ A  # (d, k), rounded once
        return merged


# ---- Why it works ----
# The toy is train_toy.py. Its tokens have a domain and a symbol. Unless said otherwise,
# 15 symbols differ: their right answers depend on both. Numbers are means of 20 seeds
# (README), +- standard deviations.
#
# Why a router, and not a larger rank?
# A LoRA's update, B A x, is linear in x at any rank. If x is the sum of a part for the
# domain and a part for the symbol, so is the update: between two domains, it changes by
# the same vector for every symbol. Such logits could still be mostly right, but in the toy,
# 300 steps of training end not far above the 75% that the symbol alone allows. HydraLoRA
# with one w for all tokens is no better, because Eq. 3 is then a LoRA with B = sum_i w_i B_i.
# A router makes w depend on x, so tokens of different domains get different matrices. But
# it must learn: in the toy, HydraLoRA has 98% right answers, with a frozen random router
# 85%, and LoRA has 80%.
#
# Why is A shared, and not B?
# In the paper, LoRAs of different tasks have A's that "tend to converge" and B's that
# are "distinguishable" (Observation II). But LoRAs of random parts of one task do, too
# (Fig. 9), so this is no proof that tasks can share an A. In the toy, the spaces of two
# LoRAs' A's, and of their B's, overlap (random ones by 0.11, or by 0.47 in 15 dimensions):
#
#                                   10 steps: A, B   300 steps: A, B
#     two domains, one start of A       0.73, 0.19         0.40, 0.51
#     one domain, two starts            0.23, 0.48         0.92, 0.94
#
# So A's are alike early because of their start. Later, both A's and B's are alike if
# their domain is the same, and only then.
#
# The other argument for one A is size. N LoRAs have N r (k + d) parameters, but one A
# with N heads has r (k + N d). In the toy, at equal size, HydraLoRA is ahead of N LoRAs
# with a router by 1.7 +- 1.1 points. But A of rank 9 must learn: with a random one,
# HydraLoRA is 17 points behind LoRA.
#
# Why do the heads differ?
# For one token, let g = dL/dy, let l = Wg^T x be the logits, and let sum_j w_j B_j A x
# be the mixture. Then
#
#     dL/dB_i = s w_i g (A x)^T            a token counts for head i in proportion to w_i
#     dL/dA   = s sum_i w_i B_i^T g x^T    A learns through all heads
#     dL/dw_i = s g . B_i A x              negative if more of head i would lower the loss
#     dL/dl_i = w_i (dL/dw_i - sum_j w_j dL/dw_j)    head i, compared with the mixture
#     dL/dWg  = x (dL/dl)^T
#
# At the start, all B_i are 0, so the gradients of A and Wg are 0, and those of the heads
# differ only by w_i. Without the random start of Wg, the heads would stay equal. Later,
# a token raises the logits of the heads that lower its loss more than the mixture does.
# If w_i rises, the token counts more for head i. So small preferences grow.
#
# Why do the heads divide the tokens, and by what?
# By dL/dWg, a step of SGD for x changes the logits of x' in proportion to x . x'. So
# tokens come to prefer one head if they are similar, and keep it if they need the same.
# The toy uses AdamW, so this holds only roughly. There, the domain explains 0.70 of
# x's variance, in 2 directions, and the symbol 0.45, in 14 (they overlap, because each
# domain has symbols of its own). Pairs of tokens (%) that have their largest gates at the
# same head:
#
#     symbols that differ               0                    15
#     after steps                  20       300         20        300
#     same domain, other symbol   97 +- 7    46 +- 9    96 +- 9   100 +- 1
#     same symbol, other domain    6 +- 12   67 +- 11    9 +- 14    1 +- 1
#
# So domains mostly come first. If they need different answers, this stays. If not, heads
# turn to the symbols. The domain's part of x is the cause. If the router alone sees it
# larger or smaller (commit 0e00215), the normalised mutual information (NMI) of heads
# and domains changes:
#
#     times              0.2           0.5             1             3
#     0 differ      0.01 +- 0.01  0.03 +- 0.02  0.07 +- 0.04  0.57 +- 0.20
#     15 differ     0.05 +- 0.03  0.41 +- 0.27  0.90 +- 0.02  0.97 +- 0.01


# ---- Choices ----
# On these points, the paper is silent or unclear. The official code is commit afb693b of
# https://github.com/Clin0212/HydraLoRA, the script is its fine-tuning.sh. There, lora_A
# is lora_A.weight, lora_B is lora_B0.weight, lora_B1.weight and so on, and router.weight
# is lora_route.weight.
#
# [1] The router reads x, as in Eq. 4 and the official code. But the paper prints Wg as
#     (r, N), which fits A x.
# [2] The router has no bias, and Wg starts like A, as in the official code.
# [3] The adapter is float32, or float64 if the base is; the script has bf16. The
#     softmax is at least float32, because bf16 rounds a w_i near 1 to 1. Its derivative,
#     w_i (1 - w_i), would then be 0.
# [4] The update is scaled by lora_alpha / r, as in LoRA; in the script, by 32 / 4.
# [5] The router sees x without dropout. All heads share one dropout mask. The official
#     code draws one for each head.
# [6] The paper's parameter counts fit q_proj and v_proj (Figs. 3, 9). But the script
#     adapts gate_proj, up_proj and down_proj, as did the authors (issues 6, 7, 26).
# [7] Merging uses one w for all tokens. The paper merges "based on the input" (Sec.
#     3.2.2), which we read as: for each token.
# [8] k-means sets only N, as in the official README: choose_num_heads in train_toy.py.
# [9] There is no balance loss. The official layer's is always 0 (lora.py, L344) since
#     commit d212d98.


# ---- A small transformer ----
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
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4))
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def attention(self, h):
        """Causal attention without o_proj: h (b, t, width) -> (b, t, width)."""
        x = self.attention_norm(h)
        # q, k, v: (b, attention heads, t, head width)
        q, k, v = (proj(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.transpose(1, 2).flatten(2)

    def mlp(self, h):
        return self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))

    def forward(self, h):
        h = h + self.o_proj(self.attention(h))
        return h + self.mlp(h)


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

    def embed(self, tokens):
        return self.token_embedding(tokens) + self.position_embedding.weight[:tokens.shape[1]]

    def forward(self, tokens):
        h = self.embed(tokens)  # (b, t, width)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h))


# ---- On a model ----
def hydralora_layers(model):
    """Dict name -> HydraLoRALinear. ValueError if none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}
    if not layers:
        raise ValueError("model has no HydraLoRA layer")
    return layers


def _replace(model, new):
    """Replace the modules that are keys of new; return the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def _find(model, target):
    """The nn.Linear layers that match a name. ValueError if none, with what has this name."""
    def matching(named):
        return [found for name, found in named if f".{name}".endswith(f".{target}")]

    adapted = {m.base for m in model.modules() if isinstance(m, HydraLoRALinear)}
    modules = matching(model.named_modules())
    bases = [m for m in modules if isinstance(m, nn.Linear) and m not in adapted]
    if bases:
        return bases
    if any(isinstance(m, HydraLoRALinear) or m in adapted for m in modules):
        raise ValueError(f"{target!r} is adapted already")
    if modules:
        kind = type(modules[0])
        raise ValueError(f"{target!r} is a {kind.__name__} of {kind.__module__}, "
                         "and not an nn.Linear")
    if matching(model.named_parameters()):
        raise ValueError(f"{target!r} is a parameter, and not an nn.Linear")
    raise ValueError(f"no module is named {target!r}")


def inject_hydralora(model, target_modules, layer=HydraLoRALinear, **arguments):
    """Wrap the nn.Linear layers that match, freeze the rest, and return the model.

    target_modules: one or more names, or their last parts, such as "q_proj" [6]. Inject
    before the model is sharded, or each process trains adapters of its own, and before the
    optimizer is made, or it trains nothing.
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    bases = [base for target in targets for base in _find(model, target)]
    bases = dict.fromkeys(bases)  # each once, in order: a seed gives the same adapters
    new = {base: layer(base, **arguments) for base in bases}
    for made in new.values():
        if not isinstance(made, HydraLoRALinear):
            raise ValueError(f"layer must make a HydraLoRALinear of {__name__}, "
                             f"got {type(made).__name__} of {type(made).__module__}")
    model = _replace(model, new)
    adapters = {p for m in hydralora_layers(model).values() for p in m.parameters()}
    for p in set(model.parameters()) - adapters:
        p.requires_grad_(False)
    return model


@contextmanager
def record_gates(model):
    """Context manager: a dict name -> list of w (..., n), one for each call of the layer.

        with torch.no_grad(), record_gates(model.eval()) as gates:
            model(x)
        merge_hydralora(model, mean_gates(gates))

    With gradients enabled, w keeps its graph [9]. With checkpointing, a backward inside the
    context records w again. A model that was compiled and called before records nothing.
    """
    gates = {}
    hooks = []
    for name, layer in hydralora_layers(model).items():
        ws = gates[name] = []
        hooks.append(layer.router.register_forward_hook(lambda router, x, w, ws=ws: ws.append(w)))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def mean_gates(gates):
    """The mean w over all recorded tokens: dict name -> (n,).

    Layers without tokens are left out. Padding counts as tokens, and dropout in the
    model changes w, so record without both.
    """
    means = {}
    for name, ws in gates.items():
        if any(w.numel() for w in ws):
            w = torch.cat([w.detach().reshape(-1, w.shape[-1]) for w in ws])  # (tokens, n)
            means[name] = w.mean(0, dtype=torch.promote_types(w.dtype, torch.float32))
    return means


def merge_hydralora(model, gates):
    """Replace each HydraLoRA layer by layer.merge(gates[name]), and return the model.

    gates: dict name -> (n,), as from mean_gates. Compare the model before and after: one
    w for all tokens can ruin it.
    """
    layers = hydralora_layers(model)
    for name in layers:
        if name not in gates:
            raise ValueError(f"no gates were recorded for {name!r}")
    return _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})


# ---- Files ----
def hydralora_state_dict(model):
    """The adapter: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k).

    It lacks lora_alpha: save all arguments. Raises ValueError if a process holds a part.
    """
    state = {f"{name}.{key}".removeprefix("."): t
             for name, layer in hydralora_layers(model).items()
             for key, t in layer.state_dict().items() if not key.startswith("base.")}
    for key, t in state.items():
        if t.is_meta:
            raise ValueError(f"{key} has no values here: end offloading, or inject before it")
        flat = t.dim() < 2 and key.endswith(("lora_A", "lora_B", "flat_param"))  # by FSDP
        if flat or type(t) is not torch.Tensor:
            raise ValueError(f"{key} is sharded: first gather it")
    return state


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy the adapter into the model, and return the model.

    Raises ValueError, with the first wrong key, if keys or shapes differ.
    """
    own = hydralora_state_dict(model)
    for key in own | state:
        here, there = ([*t[key].shape] if key in t else "missing" for t in (own, state))
        if here != there:
            raise ValueError(f"{key}: in the model {here}, but in state {there}")
    for key, t in own.items():
        t.copy_(state[key])
    return model
