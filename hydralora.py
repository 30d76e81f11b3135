# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router over the heads.

Tian, Shi, Guo, Li, Xu: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient
Fine-Tuning", NeurIPS 2024, arXiv 2404.19245. W0 is frozen; A, B_i and Wg are trained:

    (1)  y = W0 x + B A x                 LoRA
    (2)  W = W0 + sum_i w_i B_i A         HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x     HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)              the router, for each token

    paper  code           shape     what it is
    x      x              (..., k)  input, any leading axes, such as (b, t)
    W0     base.weight    (d, k)    frozen weight, from k features to d
    A      lora_A         (r, k)    shared by all heads; Kaiming-uniform init
    B_i    lora_B[i]      (d, r)    a head, the paper's expert E_i; zero init
    N      num_heads, n             number of heads
    Wg     router.weight  (n, k)    Eq. 4's Wg^T, stored as nn.Linear stores a weight
    w      w, gates       (..., n)  mixture weights for each token, or (n,) if fixed

Choices where the paper is silent or the official code differs. L339 is line 339 of
HydraLoRA/peft/tuners/lora.py in github.com/Clin0212/HydraLoRA at afb693b.

    [1] The router reads x, as in the paper's text and L339. But the paper prints Wg as
        (r, N), which fits A x.
    [2] The router has no bias (L279) and Kaiming-uniform init (L299), like A (L295).
    [3] The softmax runs in float32, or float64 in a float64 layer, and w gets the dtype of
        the logits; L339 always uses float32.
    [4] The update is scaled by lora_alpha / r (L284, L342); the paper has no such factor.
    [5] All heads share one dropout mask, on A's input; the router sees x without dropout
        (L339). L342 draws a mask per head; the paper has no dropout.
    [6] Only y is returned. L347 also returns a balance loss, which is 0 (L344).
    [7] The caller picks the layers. Table 2's 0.124 % counts the parameters of q and v,
        without routers; the official script adapts gate, up and down.
    [8] Merging uses one w, from the caller, for all tokens, and is exact for that w only.
        The paper merges "based on the input" (3.2.2), which we read as per token.

Alongside the paper, read as far as "On a model"; nothing before it uses what follows.
"""
import math
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.7.0"


# ---- The layer ----
class Router(nn.Module):  # not an nn.Linear, which a quantiser would replace
    """Eq. 4, w = softmax(Wg^T x): x (..., k) -> w (..., n).

    The layer uses w exactly as returned here or by a subclass (for top-k, say), and hooks see
    the same w. A float16 logit above 65,504 gives nan.
    """

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # U(-1, 1) / sqrt(k) [2]

    def forward(self, x):
        logits = F.linear(x, self.weight)  # (..., n)
        high = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(-1, dtype=high).to(logits.dtype)  # (..., n) [3]


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: n. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.
    lora_dropout: probability. The adapter is float32, or float64 for a float64 base,
    and y has the dtype of base(x).

    Example: with W0 the identity, bias (10, 20), A = (1, 1), B_1 = (1, 2), B_2 = (5, -2),
    Wg = ((ln 3, 0), (0, 0)) and scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(ln 3, 0) = (3/4, 1/4)
        y = (11, 22) + 2 (3/4 (3, 6) + 1/4 (15, -6)) = (23, 28)
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear) or base.weight.is_complex():
            raise TypeError(f"base must be an nn.Linear with real weights, got {base}")
        if any(type(size) is not int or size < 1 for size in (num_heads, r)):
            raise ValueError(f"num_heads, r must be integers >= 1, got {num_heads!r}, {r!r}")
        if not math.isfinite(lora_alpha) or not 0 <= lora_dropout < 1:
            raise ValueError("lora_alpha must be finite, and lora_dropout in [0, 1)")
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
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_parameters()
        self.router = Router(k, num_heads, **like)
        self.base = base.requires_grad_(False)  # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1, 1) / sqrt(k)
        nn.init.zeros_(self.lora_B)  # the update starts at zero

    def extra_repr(self):
        return f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"

    def router_input(self, x):
        """The router's input, here x (..., k) [1]. A variant may override this."""
        return x

    def forward(self, x):
        """Eqs. 3 and 4, L336-347: x (..., k) -> y (..., d).

        einsum multiplies w and z first, so all heads together take one matrix product.
        """
        y = self.base(x)                                 # (..., d)
        x = x.to(self.lora_A.dtype)
        w = self.router(self.router_input(x))            # (..., n), Eq. 4
        z = F.linear(self.lora_dropout(x), self.lora_A)  # (..., r) [5]
        delta = torch.einsum("...n,...r,ndr->...d", w, self.scaling * z, self.lora_B)  # Eq. 3 [4]
        return y + delta.to(y.dtype)                     # (..., d) [6]

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    @torch.no_grad()
    def to_lora(self, gates):
        """The LoRA of Eq. 1 for fixed gates (n,): A (r, k) and sum_i gates_i B_i (d, r).

        Heads are linear, so a sum of B_i gives the sum of their outputs (3.2.2). Both matrices
        are new, unscaled, and float32 or float64.
        """
        if type(self).forward is not HydraLoRALinear.forward:
            raise TypeError(f"{type(self).__name__} overrides forward: it needs its own to_lora")
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        gates = torch.as_tensor(gates, dtype=dtype)
        if gates.shape != (self.num_heads,) or not gates.isfinite().all():
            raise ValueError(f"gates must be {self.num_heads} finite numbers, got {gates}")
        gates = gates.to(self.lora_B.device).view(-1, 1, 1)  # (n, 1, 1)
        B = (gates * self.lora_B).sum(0)                     # (d, r)
        return self.lora_A.to(dtype, copy=True), B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a new nn.Linear with the weight W0 + scaling * sum_i gates_i B_i A.

        Exact for a token whose w equals gates (n,); for any other w, y is off by
        scaling * sum_i (gates_i - w_i) B_i A x [8]. Only W is rounded to W0's dtype.
        TypeError if base is not a plain nn.Linear, or if W overflows its dtype.
        """
        if not _is_plain_linear(self.base):
            raise TypeError("base must be a plain nn.Linear: not quantised, meta, parametrized or "
                            "hooked. accelerate.hooks.remove_hook_from_submodules(model) removes "
                            f"Accelerate's hooks. Got {self.base}")
        W0, bias = self.base.weight, self.base.bias         # (d, k), (d,) or None
        with torch.autocast(W0.device.type, enabled=False):  # B @ A in full precision
            A, B = self.to_lora(gates)                      # (r, k), (d, r)
            W = (W0 + self.scaling * (B @ A)).to(W0.dtype)  # (d, k), Eq. 2
        if not W.isfinite().all():
            raise TypeError(f"W is not finite in {W.dtype}")
        d, k = W.shape
        merged = nn.Linear(k, d, bias is not None, device="meta")  # weights follow
        merged.weight = nn.Parameter(W, requires_grad=W0.requires_grad)
        if bias is not None:
            merged.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)
        return merged.train(self.base.training)


def _is_plain_linear(base):
    """Whether base computes W0 x + bias from its two parameters alone."""
    return (base.forward == nn.Linear.forward.__get__(base)
            and not base._forward_hooks and not base._forward_pre_hooks
            and base._parameters.keys() == {"weight", "bias"}  # no parametrization
            and all(type(p) is nn.Parameter and not p.is_meta and p.is_floating_point()
                    and p.dtype.itemsize > 1 for p in base.parameters(recurse=False)))


# ---- A tiny transformer with Llama's projection names ----
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

    def forward(self, h):
        x = self.attention_norm(h)  # (b, t, width)
        q, k, v = (proj(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # each (b, attention heads, t, head width)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o_proj(x.transpose(1, 2).flatten(2))
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

    def embed(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (t,)
        return self.token_embedding(tokens) + self.position_embedding(positions)

    def forward(self, tokens):
        h = self.embed(tokens)  # (b, t, width)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h))  # (b, t, vocab_size)


# ---- Choosing N, Appendix B ----
def tf_idf(texts):
    """X (documents, terms), like scikit-learn's TfidfVectorizer: smoothed idf, rows of norm 1."""
    column = {}  # term -> its column
    columns = [column.setdefault(str(term), len(column)) for text in texts for term in text]
    rows = [row for row, text in enumerate(texts) for _ in text]
    X = torch.zeros(len(texts), len(column))
    X.index_put_((torch.tensor(rows), torch.tensor(columns)), torch.ones(()), accumulate=True)
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))
    return F.normalize(X)


def k_means(X, max_centres):
    """The SSE, sum_i min_j |X_i - C_j|^2, for each K = 1, ..., max_centres.

    The paper starts from random centres. This is fast global k-means (Likas, Vlassis and
    Verbeek, 2003): step K starts from the K - 1 centres of the step before and the candidate
    that lowers the SSE most. A candidate is the mean of a document's nearest neighbours.
    """
    def squared_distances(C):  # (centres, terms) -> (documents, centres), as |X_i| = 1
        return (1 - 2 * X @ C.T + C.square().sum(1)).clamp_min(0)

    nearest = (X @ X.T).topk(max(1, len(X) // (2 * max_centres))).indices  # half a mean cluster
    candidates = torch.stack([X[near].mean(0) for near in nearest])  # (documents, terms)
    to_candidates = squared_distances(candidates)  # (documents, documents)
    C = X.mean(0, keepdim=True)  # (1, terms)
    sse = []
    for K in range(1, max_centres + 1):
        for _ in range(10):  # enough to converge
            squared, owner = squared_distances(C).min(1)  # (documents,), Eq. 7
            S = F.one_hot(owner, K).to(X)                 # (documents, K)
            size = S.sum(0)[:, None]                      # (K, 1)
            C = torch.where(size > 0, S.T @ X / size, C)  # (K, terms), Eq. 8
        sse.append(squared.sum().item())
        gain = (squared[:, None] - to_candidates).clamp_min(0).sum(0)  # (documents,)
        C = torch.cat([C, candidates[gain.argmax()][None]])  # (K + 1, terms)
    return sse


def num_heads_from_corpus(documents, max_heads=10):
    """Appendix B: N from the corpus, by TF-IDF, k-means and the elbow of the SSE curve.

    documents: a list of strings, split at white space, or of unpadded sequences of tokens.
    Returns n >= 2 and the SSE of 1, ..., max_heads centres. At n "the rate of decrease in
    SSE slows down" most; this rule is ours. It finds domains that differ in vocabulary, but
    every curve has an elbow, even one domain's: look at the SSE. A few hundred documents
    are enough; 3,000 with 20,000 distinct words take half a minute and 1 GB.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list, got one string")
    if max_heads < 2:
        raise ValueError(f"max_heads must be 2 or more, got {max_heads}")
    texts = [d.split() if isinstance(d, str) else list(d) for d in documents]
    texts = [text for text in texts if text]  # empty documents do not count
    if not texts:
        raise ValueError("documents are all empty")
    sse = k_means(tf_idf(texts), max_heads + 1)
    gains = -torch.tensor(sse).diff()  # of the centres 2, ..., max_heads + 1
    next_gains = gains[1:].clamp_min(1e-5 * sse[0])  # smaller is rounding
    return 2 + (gains[:-1] / next_gains).argmax().item(), sse[:max_heads]


# ---- On a model ----
def hydralora_layers(model):
    """The HydraLoRA layers: dict name -> HydraLoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _adapted_layers(model):
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRA layer")
    return layers


def _replace(model, new):
    """Replace each module with new[module], under all its names."""
    if model in new:
        raise ValueError("model is itself a layer: call its merge")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def _find_targets(model, targets):
    """The nn.Linear layers that match targets, each once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parents = {name: modules[name.rpartition(".")[0]] for name in modules}
    found = {}
    for target in [targets] if isinstance(targets, str) else targets:
        names = [name for name in modules if name and f".{name}".endswith(f".{target}")]
        linears = {name: modules[name] for name in names if isinstance(modules[name], nn.Linear)
                   and not isinstance(parents[name], HydraLoRALinear)}
        if not linears:
            if any(isinstance(m, HydraLoRALinear) for name in names
                   for m in (modules[name], parents[name])):
                raise ValueError(f"{target!r} is already adapted")
            kinds = {type(modules[name]).__name__ for name in names}  # such as Conv1D
            only = f", only {', '.join(sorted(kinds))}" if kinds else ""
            raise ValueError(f"{target!r} matches no nn.Linear{only}")
        found |= linears
    if not found:
        raise ValueError("targets is empty")
    for name, base in found.items():
        if isinstance(parents[name], (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{name}: its parent may bypass the layer's forward")
        if base.weight.is_complex() or base.weight.is_meta:
            raise ValueError(f"{name} is complex, or on meta (load its weights first)")
    return dict.fromkeys(found.values())


def inject_hydralora(model, targets, layer=HydraLoRALinear, **arguments):
    """Freeze the model, wrap the nn.Linear layers that match targets, and return the model.

    targets: "q_proj", "layers.0.q_proj" or a list of them [7]. A layer matches if its
    name is a target or ends in "." + target. layer: HydraLoRALinear or a subclass, called
    as layer(base, **arguments). Load the base's weights first: q_proj.weight becomes
    q_proj.base.weight. A second injection adds to the first. On ValueError the model is
    unchanged. If a module reads layer.weight without calling layer, the adapter has no
    effect, and record_gates omits the layer.
    """
    if not (isinstance(layer, type) and issubclass(layer, HydraLoRALinear)):
        raise TypeError(f"layer must be HydraLoRALinear or a subclass, got {layer!r}")
    bases = _find_targets(model, targets)
    adapters = set()  # parameters of an earlier injection
    for adapted in hydralora_layers(model).values():
        adapters |= {*adapted.parameters()} - {*adapted.base.parameters()}
    new = {base: layer(base, **arguments) for base in bases}
    for p in model.parameters():
        if p not in adapters:
            p.requires_grad_(False)
    _replace(model, new)
    return model


@contextmanager
def hook_gates(model, f):
    """Context manager: f(name, w) gets each router's w (..., n), and may return another.

    `lambda name, w: 0 * w` turns the adapters off. Entry and exit reset torch.compiler for
    the whole process, since compiled code does not notice hooks.
    """
    def reset_compiler():
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch.compiler.reset()

    hooks = [layer.router.register_forward_hook(lambda router, x, w, name=name: f(name, w))
             for name, layer in _adapted_layers(model).items()]
    try:
        reset_compiler()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        reset_compiler()


@contextmanager
def record_gates(model):
    """Context manager: yields a dict name -> w (..., n) of the last forward, detached."""
    gates = {}
    with hook_gates(model, lambda name, w: gates.update({name: w.detach()})):
        yield gates


@torch.no_grad()
def mean_gates(model, batches):
    """Mean w over all tokens of calibration inputs, in eval mode: dict name -> (n,).

    batches: a list of tensors, or of dicts of keyword arguments; ValueError if an
    attention_mask shows padding. **Merging with them can ruin the model.**
    """
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError("batches must be a list of batches")
    total = dict.fromkeys(hydralora_layers(model), 0)
    count = dict.fromkeys(total, 0)

    def add(name, w):
        w = w.reshape(-1, w.shape[-1])  # (tokens, n)
        total[name] += w.sum(0, dtype=torch.promote_types(w.dtype, torch.float32))
        count[name] += len(w)

    training = [module for module in model.modules() if module.training]
    try:
        with hook_gates(model.eval(), add):
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if mask is not None and not mask.all():
                    raise ValueError("attention_mask has zeros: use batches without padding")
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module in training:
            module.training = True
    if not all(count.values()):
        raise ValueError(f"no token reached some of these layers: {count}")
    return {name: total[name] / count[name] for name in total}


def _gates_by_name(layers, gates):
    if not isinstance(gates, Mapping):
        gates = dict.fromkeys(layers, gates)
    if gates.keys() != layers.keys():
        raise ValueError(f"gates are for {[*gates]}, but the layers are {[*layers]}")
    return gates


def merge_hydralora(model, gates):
    """Replace each HydraLoRA layer with layer.merge(gates), or raise and change nothing.

    Returns the model; copy.deepcopy it first to keep the adapters. gates: one (n,) for all
    layers, or a dict with all names, as from mean_gates. Zero gates drop the adapters.
    """
    layers = _adapted_layers(model)
    gates = _gates_by_name(layers, gates)
    _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})
    return model


# ---- Files ----
def hydralora_state_dict(model):
    """The adapter: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k).

    Save inject_hydralora's arguments too, such as lora_alpha. The tensors are the model's
    own: clone them for a snapshot.
    """
    state = {f"{name}.{key}": t for name, layer in _adapted_layers(model).items()
             for key, t in layer.state_dict().items() if not key.startswith("base.")}
    _refuse_meta_and_sharded(state)
    return state


def _refuse_meta_and_sharded(state):
    for key, t in state.items():
        if type(t) not in (torch.Tensor, nn.Parameter) or t.is_meta:
            raise ValueError(f"{key} is on meta, sharded or no tensor (with FSDP2, use get_model_"
                             "state_dict and set_model_state_dict, with full_state_dict=True)")


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Return the model with the adapter copied into it. On ValueError, nothing is copied."""
    own = hydralora_state_dict(model)
    _refuse_meta_and_sharded(state)
    shapes, given = ({key: (*t.shape,) for key, t in tensors.items()} for tensors in (own, state))
    wrong = [key for key in given | shapes if shapes.get(key) != given.get(key)]
    if wrong:
        raise ValueError(f"{len(wrong)} keys do not match, first {wrong[0]}: model "
                         f"{shapes.get(wrong[0])}, state {given.get(wrong[0])}")
    for key, t in own.items():
        t.copy_(state[key])
    return model


def from_official_state_dict(state):
    """Convert official keys: NAME.lora_A.weight, lora_B0.weight ..., lora_route.weight.

    PEFT's prefix is allowed. lora_alpha is not stored: inject with the run's value.
    ValueError for any other key, or a gap among the heads.
    """
    ours, heads = {}, {}
    for key, t in state.items():
        official = re.fullmatch(r"(.+)\.lora_(A|route|B(\d+))\.weight",
                                key.removeprefix("base_model.model."))
        if not official:
            raise ValueError(f"not an official HydraLoRA checkpoint: it has {key}")
        name, part, i = official.groups()
        if i:
            heads.setdefault(name, {})[int(i)] = t  # (d, r)
        else:
            ours[name + {"A": ".lora_A", "route": ".router.weight"}[part]] = t
    for name, B in heads.items():
        if len(B) <= max(B):
            raise ValueError(f"{name} has only the heads {sorted(B)}")
        ours[f"{name}.lora_B"] = torch.stack([B[i] for i in sorted(B)])  # (n, d, r)
    return ours


def export_lora(model, gates):
    """A plain LoRA, (state, config), for fixed gates, given as for merge_hydralora.

    Save them as PEFT's adapter_model.safetensors (or .bin) and adapter_config.json. Lower
    ranks are zero-padded. In many MoE models, PEFT 0.20+ mistakes gate_proj, up_proj and
    down_proj for fused experts and, with a warning, loads nothing: merge instead.
    """
    layers = _adapted_layers(model)
    hydralora_state_dict(model)  # refuses what is on meta or sharded
    names = [name for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, HydraLoRALinear)]
    if names != [*layers] or "" in layers:
        raise ValueError("PEFT needs exactly one name for each layer")
    gates = _gates_by_name(layers, gates)
    loras = {name: layer.to_lora(gates[name]) for name, layer in layers.items()}
    r = max(len(A) for A, _ in loras.values())
    state = {}
    for name, (A, B) in loras.items():
        prefix, pad = f"base_model.model.{name}", r - len(A)
        state[f"{prefix}.lora_A.weight"] = F.pad(A, (0, 0, 0, pad))  # (r, k)
        state[f"{prefix}.lora_B.weight"] = F.pad(layers[name].scaling * B, (0, pad))  # (d, r)
    config = dict(peft_type="LORA", target_modules=[*layers], r=r, lora_alpha=r)
    return state, config  # PEFT scales by lora_alpha / r = 1
