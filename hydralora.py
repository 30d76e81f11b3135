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
    W0     base.weight     (d, k)       frozen weight, from k features to d
    A      lora_A          (r, k)       rank r, shared by all heads; Kaiming-uniform at the start
    B_i    lora_B[i]       (d, r)       a head, the paper's expert E_i; zero at the start
    N      num_heads, n                 number of heads
    Wg     router.weight   (n, k)       Eq. 4's Wg^T, stored as nn.Linear stores a weight
    w      w, gates        (..., n)     the mixture of each token; (n,) where the caller fixes it

Where the paper is silent, or at odds with the official code (L: lines of its lora.py,
github.com/Clin0212/HydraLoRA/blob/afb693b/HydraLoRA/peft/tuners/lora.py), this file does so:

    [1] The router reads x, as in the paper's text and L279. Eq. 4 prints Wg as (r, N), fit for A x.
    [2] The router starts Kaiming-uniform (L299) and has no bias (L279).
    [3] The softmax is in float32, or float64 for float64, and cast back; L339: always float32.
    [4] The update is scaled by lora_alpha / r (L284, L342); the paper has no such factor.
    [5] One dropout mask for all heads, on the x that A reads; none for the router (L339). L342
        draws a mask for each head; the paper has no dropout.
    [6] y alone is returned. L347 returns a balance loss beside it, always 0; the paper has none.
    [7] The caller names the layers; paper: q, v in captions; official script: gate, up, down.
    [8] Merging needs one w for all tokens, which the caller gives. The paper averages the heads for
        each token (3.2.2), which is exact; one w for all is not. The official code has no merge.

Beside the paper, read the first two sections, down to "On a model"; with copy, math and torch they
stand alone. Then come use in a model, and files. Last come a tiny transformer, for train_toy.py and
the tests, and Appendix B.
"""
import contextlib
import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---- The equations ---------------------------------------------------------------------------
def hydralora_gates(x, Wg):
    """Eq. 4, its Wg^T as our Wg: w = softmax(Wg x). x (..., k), Wg (n, k) -> w (..., n)."""
    logits = F.linear(x, Wg)                                                  # (..., n)
    high = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=high).to(logits.dtype)                    # (..., n) [3]


def hydralora_delta(x, A, B, gates, scaling):
    """The update in Eq. 3, scaling * sum_i w_i B_i A x, as one product for all heads:

        sum_i w_i B_i z  =  [B_1 ... B_n] [w_1 z; ...; w_n z],    z = scaling * A x.

    x (..., k), A (r, k), B (n, d, r), gates w (..., n) -> (..., d). Nothing has size (..., n, d).
    """
    z = F.linear(x, A) * scaling                                              # (..., r) [4]
    wz = gates.unsqueeze(-1) * z.unsqueeze(-2)                                # (..., n, r)
    heads = B.transpose(0, 1).flatten(1)                                      # (d, n r)
    return F.linear(wz.flatten(-2), heads)                                    # (..., d)


def hydralora_forward(x, W0, bias, A, B, Wg, scaling):
    """Eqs. 3 and 4 as one function, what the tests' oracle asks for: the layer without dropout.

    x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k) -> y (..., d). The
    update has the dtype of A, B and Wg. By hand, with W0 the identity, bias (10, 20), A = (1, 1),
    B_1 = (1, 2), B_2 = (5, -2), Wg = ((ln 3, 0), (0, 0)), scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(ln 3, 0) = (3/4, 1/4),
        y = (11, 22) + 2 (3/4 (3, 6) + 1/4 (15, -6)) = (23, 28).
    """
    y = F.linear(x, W0, bias)                                                 # (..., d)
    x = x.to(A.dtype)                                                         # (..., k)
    delta = hydralora_delta(x, A, B, hydralora_gates(x, Wg), scaling)         # (..., d)
    return y + delta.to(y.dtype)                                              # (..., d)


# ---- The layer -------------------------------------------------------------------------------
class Router(nn.Linear):
    """Eq. 4 as a module, so that a forward hook sees w. x (..., k) -> w (..., n)."""

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__(k, n, bias=False, device=device, dtype=dtype)        # weight: Wg [2]

    def forward(self, x):
        return hydralora_gates(x, self.weight)


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: n. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r. The
    adapter is float32, or float64 for a float64 base, and y has the dtype of base(x). A quantised
    base will do, but not for merge. In float16 (.half(), autocast) logits above 65504 make y nan.
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear) or base.weight.is_complex():
            raise TypeError(f"base must be an nn.Linear with real weights, got {base}")
        if num_heads < 1 or r < 1 or not math.isfinite(lora_alpha) or not 0 <= lora_dropout < 1:
            raise ValueError("needs num_heads, r >= 1, a finite lora_alpha, 0 <= lora_dropout < 1")
        super().__init__()
        self.in_features, self.out_features = k, d = base.in_features, base.out_features
        self.num_heads, self.r, self.lora_alpha = num_heads, r, lora_alpha
        self.scaling = lora_alpha / r       # [4] used from here on; lora_alpha is not read again
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        like = dict(device=base.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, k, **like))                 # A
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **like))      # B_1 ... B_n
        self.router = Router(k, num_heads, **like)                            # Wg
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_parameters()
        self.base = base.requires_grad_(False)                                # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)     # so that the update starts at zero (below Eq. 1)
        self.router.reset_parameters()

    def gates(self, x):
        """w of Eq. 4 for each token: x (..., k) -> w (..., n)."""
        return self.router(x.to(self.lora_A.dtype))                           # (..., n)

    def forward(self, x):
        """Eqs. 3 and 4, L336-347: x (..., k) -> y (..., d)."""
        y = self.base(x)                                                      # (..., d)
        x = x.to(self.lora_A.dtype)                                           # (..., k)
        w = self.gates(x)                                                     # (..., n)
        dropped = self.lora_dropout(x)                                        # (..., k) [5]
        delta = hydralora_delta(dropped, self.lora_A, self.lora_B, w, self.scaling)  # (..., d)
        return y + delta.to(y.dtype)                                          # (..., d) [6]

    @torch.no_grad()
    def to_lora(self, gates):
        """Eq. 1 for fixed gates (n,): A (r, k) and B = sum_i gates_i B_i (d, r), unscaled, float32
        or float64. To average the heads' weights is to average their outputs (3.2.2)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        gates = torch.as_tensor(gates, device=self.lora_B.device, dtype=dtype)    # (n,)
        if gates.shape != (self.num_heads,):
            raise ValueError(f"gates must have shape ({self.num_heads},), got {tuple(gates.shape)}")
        B = (gates.view(-1, 1, 1) * self.lora_B).sum(0)                       # (d, r)
        return self.lora_A.to(dtype, copy=True), B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a new nn.Linear with the weight W0 + scaling * sum_i gates_i B_i A, gates (n,).

        A token with mixture w loses scaling * sum_i (w_i - gates_i) B_i A x [8]: nothing if w is
        gates, or if all B_i are equal and gates sums to 1. W is taken in float32 or float64 and
        cast once. TypeError if base is not a plain W0 x + bias, see `_with_weight`.
        """
        W0 = self.base._parameters.get("weight")
        if type(W0) is not nn.Parameter or not W0.is_floating_point():
            raise TypeError(f"base cannot be merged, its weight is no plain parameter: {self.base}")
        A, B = self.to_lora(gates)
        with torch.autocast(A.device.type, enabled=False):
            W = W0 + self.scaling * (B @ A)                                   # (d, k), Eq. 2
            return _with_weight(self.base, W)

    weight = property(lambda self: self.base.weight)    # models ask their linear layers for them
    bias = property(lambda self: self.base.bias)


def _with_weight(base, W):
    """A copy of base with the weight W; TypeError unless base computes W0 x + bias.

    A base with a forward of its own may still use an old weight, and a small update not show that.
    So a second copy is tried with -W, and without the bias, since a large one hides it."""
    merged, trial = copy.deepcopy(base), copy.deepcopy(base)
    trial.weight.copy_(-W)
    if trial.bias is not None:
        trial.bias.zero_()
    x = torch.linspace(-1, 1, W.shape[1], dtype=base.weight.dtype, device=W.device)[None, None]
    for mode in (True, False):
        y, expected = trial.train(mode)(x).cpu().double(), F.linear(x, trial.weight).cpu().double()
        if not (y - expected).norm() <= 4 * torch.finfo(x.dtype).eps * expected.norm() < math.inf:
            raise TypeError(f"base cannot be merged: not W0 x + bias, or W overflows: {base}")
    merged.weight.copy_(W)
    return merged


# ---- On a model ------------------------------------------------------------------------------
def hydralora_layers(model):
    """The model's HydraLoRA layers: dict name -> HydraLoRALinear, empty if there is none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _replace(model, new):
    """Put new[module] in the place of each module, under every name that holds it."""
    if model in new:
        raise ValueError("model is itself the layer: it has no parent in which to replace it")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def inject_hydralora(model, targets, **layer_arguments):
    """Freeze the model and wrap the nn.Linear layers that the targets name; returns the model.

    targets: "q_proj" or "layers.0.q_proj": a layer is meant if its dotted name is a target or ends
    in "." + target [7]. layer_arguments: those of HydraLoRALinear. A second injection adds to the
    first. Load the base's weights before it: q_proj.weight is q_proj.base.weight afterwards.

    ValueError, with the model as it was, if a target matches no nn.Linear, or one whose weight its
    parent reads (nn.MultiheadAttention). Under other such parents, record_gates does not see it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parent = {name: modules[name.rpartition(".")[0]] for name in modules}
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)
               and m is not model and not isinstance(parent[name], HydraLoRALinear)}
    found = {target: [name for name in linears if f".{name}".endswith(f".{target}")]
             for target in ([targets] if isinstance(targets, str) else targets)}
    names = dict.fromkeys(sum(found.values(), []))
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    if not all(found.values()) or not names or any(isinstance(parent[n], readers) for n in names):
        raise ValueError(f"targets: {found}; each has to match an nn.Linear that its parent calls, "
                         f"of {list(linears)}")
    adapters = {p for layer in hydralora_layers(model).values()
                for p in (layer.lora_A, layer.lora_B, layer.router.weight)}
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        new = {m: HydraLoRALinear(m, **layer_arguments) for m in {linears[n]: 0 for n in names}}
    except Exception:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        raise
    for p in flags.keys() - adapters:
        p.requires_grad_(False)
    _replace(model, new)
    return model


@contextlib.contextmanager
def hook_gates(model, f):
    """Context manager: f(name, w) is called with each router's w (..., n) in a forward; what it
    returns, unless None, replaces w. lambda name, w: 0 * w switches the adapters off."""
    hooks = [layer.router.register_forward_hook(lambda _, inputs, w, name=name: f(name, w))
             for name, layer in hydralora_layers(model).items()]
    if not hooks:
        raise ValueError("model has no HydraLoRALinear: not injected, or merged already")
    try:
        torch.compiler.reset()      # compiled code does not notice hooks that come or go
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.compiler.reset()


@contextlib.contextmanager
def record_gates(model):
    """Context manager: a dict name -> w (..., n) of the last forward inside it, detached."""
    gates = {}
    with hook_gates(model, lambda name, w: gates.update({name: w.detach()})):
        yield gates


@torch.no_grad()
def mean_gates(model, batches, masks=None):
    """Mean w over all tokens of calibration inputs, in eval mode: dict name -> (n,).

    batches: each a tensor or a dict of keyword arguments. masks: for each batch a tensor (b, t),
    true where a token counts; a batch's own attention_mask is not looked at. ValueError if a layer
    gets no token. **A fixed mixture can ruin the model: train_toy.py falls from 98.0 to 39.0 %.**
    """
    total = dict.fromkeys(hydralora_layers(model), 0)
    pairs = ((b, None) for b in batches) if masks is None else zip(batches, masks, strict=True)
    training = [module for module in model.modules() if module.training]

    def add(name, w):
        w = w if mask is None else w[mask.to(w.device, torch.bool)]
        total[name] += w.float().reshape(-1, w.shape[-1]).sum(0)              # (n,)
    try:
        with hook_gates(model.eval(), add):
            for batch, mask in pairs:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module in training:
            module.training = True
    if not all(torch.as_tensor(w).any() for w in total.values()):
        raise ValueError(f"batches: no token reached some of these layers: {total}")
    return {name: w / w.sum() for name, w in total.items()}     # w.sum() is the number of tokens


def _by_name(layers, gates):
    """A dict of gates from what merge_hydralora takes; ValueError if it does not fit the layers."""
    gates = gates if isinstance(gates, Mapping) else dict.fromkeys(layers, gates)
    if not layers or gates.keys() != layers.keys():
        raise ValueError(f"gates are for {list(gates)}, the model's layers are {list(layers)}")
    return gates


def merge_hydralora(model, gates):
    """Put layer.merge(gates) in the place of each HydraLoRA layer; returns these layers by name. If
    one cannot be merged, the model stays as it was. gates: one (n,) for all, or a dict name -> (n,)
    with every layer in it, such as mean_gates gives."""
    layers = hydralora_layers(model)
    merged = {layers[name]: layers[name].merge(w) for name, w in _by_name(layers, gates).items()}
    _replace(model, merged)
    return layers


def unmerge_hydralora(model, layers):
    """Put back the layers that merge_hydralora returned: all weights as before, bit for bit."""
    merged = {name: model.get_submodule(name) for name in layers}
    if not all(isinstance(module, nn.Linear) for module in merged.values()):
        raise ValueError(f"layers: the model has no merged nn.Linear at some of {list(layers)}")
    _replace(model, {merged[name]: layer.train(merged[name].training)
                     for name, layer in layers.items()})


# ---- Files -----------------------------------------------------------------------------------
def hydralora_state_dict(model):
    """The adapter alone: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k). Keep
    the arguments of inject_hydralora beside it. ValueError on meta or sharded: under FSDP2 use
    get_model_state_dict with full_state_dict and ignore_frozen_params, and load it unsharded."""
    state = {f"{name}.{key}": t for name, layer in hydralora_layers(model).items()
             for key, t in layer.state_dict().items() if not key.startswith("base.")}
    if not state or any(type(t) is not torch.Tensor or t.is_meta for t in state.values()):
        raise ValueError("model has no adapters, or they have no values: on meta, or sharded")
    return state


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy an adapter into an injected model, all of it or, with a ValueError, nothing."""
    own = hydralora_state_dict(model)
    a, b = ({(key, t.shape) for key, t in s.items() if not t.is_meta} for s in (own, state))
    if a != b:
        raise ValueError(f"state does not fit: only in the model {a - b}, only in state {b - a}")
    for key, t in own.items():
        t.copy_(state[key])     # own's tensors share the parameters' memory


def from_official_state_dict(state):
    """The official keys, with or without PEFT's prefix, to ours: NAME.lora_A.weight, lora_B0.weight
    ..., lora_route.weight. None holds lora_alpha: inject with that of the run (script: 32)."""
    rest, ours = {key.removeprefix("base_model.model."): t for key, t in state.items()}, {}
    twice = len(rest) < len(state)      # a key stands there with the prefix and without
    for name in [key[:-len(".lora_A.weight")] for key in rest if key.endswith(".lora_A.weight")]:
        heads = []
        while f"{name}.lora_B{len(heads)}.weight" in rest:
            heads.append(rest.pop(f"{name}.lora_B{len(heads)}.weight"))       # (d, r)
        ours |= {f"{name}.lora_A": rest.pop(f"{name}.lora_A.weight"),
                 f"{name}.lora_B": torch.stack(heads),                        # (n, d, r)
                 f"{name}.router.weight": rest.pop(f"{name}.lora_route.weight")}
    if rest or twice or not ours:
        raise ValueError(f"state is no official HydraLoRA checkpoint: {list(rest or state)}")
    return ours


def export_lora(model, gates):
    """A plain LoRA for fixed gates, as for merge_hydralora: (state, config), for PEFT's files
    adapter_model.safetensors and adapter_config.json. PEFT 0.10 or newer reads them, 0.15 if the
    layers differ in r; its auto classes want base_model_name_or_path and task_type in config too.
    **One fixed mixture can ruin the model: mean gates take train_toy.py from 98.0 to 39.0 %.**
    """
    hydralora_state_dict(model)     # refuses adapters without values
    layers, state = hydralora_layers(model), {}
    modules = [m for _, m in model.named_modules(remove_duplicate=False)]
    if sum(m in layers.values() for m in modules) > len(layers) or "" in layers:
        raise ValueError("model: PEFT needs one name for each layer, and some have two or none")
    for name, w in _by_name(layers, gates).items():
        A, B = layers[name].to_lora(w)
        state[f"base_model.model.{name}.lora_A.weight"] = A                   # (r, k)
        state[f"base_model.model.{name}.lora_B.weight"] = layers[name].scaling * B    # (d, r)
    ranks = {f"^{re.escape(name)}": layer.r for name, layer in layers.items()}
    r = max(ranks.values())     # lora_alpha = r in every layer: PEFT's own scaling is 1
    return state, dict(peft_type="LORA", target_modules="|".join(map(re.escape, layers)),
                       r=r, lora_alpha=r, rank_pattern=ranks, alpha_pattern=ranks)


# ---- A tiny transformer, for the toy and the tests; projections named as in Llama ------------
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
        split = lambda t: t.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        x = self.attention_norm(h)                                            # (b, t, width)
        q, k, v = map(split, (self.q_proj(x), self.k_proj(x), self.v_proj(x)))    # (b, heads, t, _)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)           # (b, heads, t, _)
        h = h + self.o_proj(mixed.transpose(1, 2).flatten(2))                 # (b, t, width)
        return h + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))     # (b, t, width)


class TinyTransformer(nn.Module):
    """A GPT-style decoder, pre-norm and causal: tokens (b, t) -> logits (b, t, vocab_size)."""

    def __init__(self, config):
        super().__init__()
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


# ---- Choosing N, Appendix B ------------------------------------------------------------------
def _elbow(rows, columns, max_heads):
    """Sharpness of the elbow, K there, SSE by K. Token j is term columns[j] of document rows[j]."""
    # X_i is the TF-IDF vector of document i: how often it has each term, times how few documents
    # have that term, scaled to length 1.
    X = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1)              # (documents, terms)
    X.index_put_((rows, columns), torch.ones(()), accumulate=True)
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))
    X /= X.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def squared_distances(C):           # |X_i - C_j|^2, where |X_i| = 1: (documents, centres)
        return (1 - 2 * (X @ C.T) + C.square().sum(1)).clamp_min(0)
    # k-means for K = 1, 2, ... The paper starts from random centres. Here K starts from those of
    # K - 1 and one more, the mean of a document and its nearest that lowers the SSE most.
    near = (X @ X.T).topk(max(1, len(X) // (2 * max_heads))).indices   # (documents, half a domain)
    starts = F.embedding_bag(near, X, mode="mean")                            # (documents, terms)
    to_starts = squared_distances(starts)                               # (documents, documents)
    C, sse = X.mean(0, keepdim=True), []                                      # (K, terms)
    for K in range(1, max_heads + 4):   # three more, so that the last K has later gains as well
        owner = torch.full((len(X),), -1)                                     # (documents,)
        for _ in range(100):            # it settles much earlier
            before, (squared, owner) = owner, squared_distances(C).min(1)     # Eq. 7
            if torch.equal(before, owner):
                break
            S = F.one_hot(owner, K).to(X)                                     # (documents, K)
            C = torch.where(S.sum(0)[:, None] > 0, S.T @ X / S.sum(0)[:, None], C)      # Eq. 8
        sse.append(squared.sum().item())
        gain = (squared[:, None] - to_starts).clamp_min(0).sum(0)             # (documents,)
        C = torch.cat([C, starts[gain.argmax()][None]])                       # (K + 1, terms)
    # The elbow is the K where the least gain up to K is the largest multiple of the largest after.
    gains = [before - after for before, after in zip(sse, sse[1:])]           # gains[K - 2]: to K
    sharpness, n = max(((min(gains[:K - 1]) / max(*gains[K - 1:], 1e-5 * sse[0], 1e-12), K)
                        for K in range(2, max_heads + 1)), default=(0, 1))
    return sharpness, n, sse[:max_heads]


def num_heads_from_corpus(documents, max_heads=10, seed=0):
    """Appendix B: N from the corpus alone, by TF-IDF, k-means and the elbow of the SSE curve, where
    "the rate of decrease in SSE slows down". The paper has no rule for it; this one is ours.

    documents: sequences of token ids or strings, or strings to split at white space. Returns n and
    the SSE of 1, ..., max_heads centres. Reliable for 1 to 10 domains with words of their own and
    documents of 25 tokens or more. Real text has kinds within kinds; choose n there (Figure 8: 2 to
    4 do well)."""
    if isinstance(documents, str):
        raise TypeError("documents must be a sequence of documents, got one string")
    tokens = [(row, token.item() if isinstance(token, torch.Tensor) else token)
              for row, document in enumerate(documents)
              for token in (document.split() if isinstance(document, str) else document)]
    column = {token: i for i, token in enumerate(dict.fromkeys(token for _, token in tokens))}
    rows, columns = torch.tensor([(row, column[token]) for row, token in tokens]).T
    sharpness, n, sse = _elbow(rows, columns, max_heads)
    # Every curve has an elbow. For comparison the same tokens are dealt out to the documents at
    # random, three times: all one domain then. A real single domain is up to twice as sharp.
    deal = torch.Generator().manual_seed(seed)
    by_chance = sum(_elbow(rows, columns[torch.randperm(len(columns), generator=deal)],
                           max_heads)[0] / 3 for _ in range(3))
    return (n if sharpness > 2 * by_chance else 1), sse
