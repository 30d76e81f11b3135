# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the authors of HydraLoRA in one file
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router that mixes them.

Tian, Shi, Guo, Li, Xu: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient
Fine-Tuning", NeurIPS 2024, arXiv 2404.19245. W0 is frozen; A, B_i and Wg are trained:

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

Where the paper is silent, or at odds with the official code, this file does so. "L" is a
line of HydraLoRA/peft/tuners/lora.py in github.com/Clin0212/HydraLoRA at afb693b.

    [1] The router reads x, as in the paper's text and L339. Before Eq. 4 the paper gives
        Wg the shape (r, N), which fits A x.
    [2] The router has no bias (L279) and starts Kaiming-uniform (L299), as A does (L295).
    [3] The softmax is in float32, or float64 for float64, and cast back; L339: always float32.
    [4] The update is scaled by lora_alpha / r (L284, L342); the paper has no such factor.
    [5] One dropout mask for all heads, on the x that A reads, and none for the router
        (L339). L342 draws a mask for each head; the paper has no dropout.
    [6] y alone is returned. L347 returns a balance loss beside it, always 0 (L344).
    [7] The caller names the layers. Table 2's 0.124 % of parameters fit q and v without
        any router; the official script takes gate, up and down.
    [8] Merging takes one w, from the caller, for all tokens: not exact. The paper merges
        "based on the input" (3.2.2), as we read it for each token; lora.py never does.

Read it beside the paper down to "On a model": what stands above needs nothing below.
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

__version__ = "0.5.0"


# ---- The equations ----
def hydralora_gates(x, Wg):
    """Eq. 4: w = softmax(Wg x), where our Wg is the paper's Wg^T.

    x (..., k), Wg (n, k) -> w (..., n). In float16 a logit beyond 65,504 gives nan.
    """
    logits = F.linear(x, Wg)  # (..., n)
    high = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=high).to(logits.dtype)  # (..., n) [3]


def hydralora_delta(x, A, B, gates, scaling):
    """The update in Eq. 3, scaling * sum_i w_i B_i A x, as one product for all heads:

        sum_i w_i B_i z  =  [B_1 ... B_n] [w_1 z; ...; w_n z],    z = scaling * A x.

    x (..., k), A (r, k), B (n, d, r), gates w (..., n) -> (..., d).
    """
    z = F.linear(x, A) * scaling                # (..., r) [4]
    wz = gates.unsqueeze(-1) * z.unsqueeze(-2)  # (..., n, r)
    heads = B.transpose(0, 1).flatten(1)        # (d, n r)
    return F.linear(wz.flatten(-2), heads)      # (..., d)


# ---- The layer ----
class Router(nn.Module):
    """Eq. 4 as a module, so that a forward hook sees w: x (..., k) -> w (..., n).

    No subclass of nn.Linear: a quantiser would replace it, softmax included.
    """

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # U(-1, 1) / sqrt(k) [2]

    def forward(self, x):
        return hydralora_gates(x, self.weight)


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: n. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.
    lora_dropout: its probability. The adapter is float32, or float64 for a float64 base,
    and y has the dtype of base(x).

    By hand, with W0 the identity, bias (10, 20), A = (1, 1), B_1 = (1, 2), B_2 = (5, -2),
    Wg = ((ln 3, 0), (0, 0)) and scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(ln 3, 0) = (3/4, 1/4)
        y = (11, 22) + 2 (3/4 (3, 6) + 1/4 (15, -6)) = (23, 28)
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear) or base.weight.is_complex():
            raise TypeError(f"base must be an nn.Linear with real weights, got {base}")
        if num_heads < 1 or num_heads % 1 or r < 1 or r % 1:
            raise ValueError(f"needs whole num_heads, r >= 1, got {num_heads}, {r}")
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
        self.reset_parameters()  # the router again
        self.base = base.requires_grad_(False)  # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1, 1) / sqrt(k)
        nn.init.zeros_(self.lora_B)  # the update is zero at first (below Eq. 1)
        self.router.reset_parameters()

    def extra_repr(self):
        return f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"

    def gates(self, x):
        """w of Eq. 4 for each token: x (..., k), of any dtype -> w (..., n)."""
        return self.router(x.to(self.lora_A.dtype))  # (..., n) [1]

    def forward(self, x):
        """Eqs. 3 and 4, L336-347: x (..., k) -> y (..., d)."""
        y = self.base(x)                # (..., d)
        x = x.to(self.lora_A.dtype)
        w = self.gates(x)               # (..., n)
        dropped = self.lora_dropout(x)  # (..., k) [5]
        delta = hydralora_delta(dropped, self.lora_A, self.lora_B, w, self.scaling)
        return y + delta.to(y.dtype)  # (..., d) [6]

    @property
    def weight(self):  # some models ask for it
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    @torch.no_grad()
    def to_lora(self, gates):
        """Eq. 1 for fixed gates (n,): copies of A (r, k) and sum_i gates_i B_i (d, r).

        Averaging the heads' weights averages their outputs (3.2.2). A and the sum are
        float32 or float64, not scaled.
        """
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

        Exact for a token whose mixture is gates (n,). For a mixture w, y is off by
        scaling * sum_i (gates_i - w_i) B_i A x [8]. W is cast to W0's dtype once. Hooks
        of base are lost. TypeError if base is seen to do more than W0 x + bias, or if
        its dtype cannot hold W.
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):  # B @ A unrounded
            W0, bias = _plain_linear(self.base)             # (d, k), (d,) or None
            A, B = self.to_lora(gates)                      # (r, k), (d, r)
            W = (W0 + self.scaling * (B @ A)).to(W0.dtype)  # (d, k), Eq. 2
        if not W.isfinite().all():
            raise TypeError(f"base cannot be merged: W is not finite in {W.dtype}")
        d, k = W.shape
        merged = nn.Linear(k, d, bias is not None, device="meta")  # weights follow
        merged.weight = nn.Parameter(W, requires_grad=W0.requires_grad)
        if bias is not None:
            merged.bias = nn.Parameter(bias.clone(), requires_grad=bias.requires_grad)
        return merged.train(self.base.training)


def _plain_linear(base):
    """W0 (d, k) and bias (d,) of a base that gives W0 x + bias; TypeError if it does not.

    A hook or a forward of its own may give more. So base is asked: for -2 times up to 64
    unit vectors it has to give that of W0's columns, plus bias. The minus shows a ReLU
    before W0, the 2 a clip. One eps is for a product that rounds in another way; nan is
    nan, since merge names a W that is not finite.
    """
    W0, bias = base._parameters.get("weight"), base.bias
    if type(W0) is not nn.Parameter or not W0.is_floating_point() or W0.is_meta:
        raise TypeError("base cannot be merged: its weight is computed, quantised, sharded "
                        f"or offloaded: {base}")
    k = W0.shape[1]
    columns = torch.arange(0, k, 1 + k // 64, device=W0.device)  # (m,), m <= 64
    x = -2 * F.one_hot(columns, k)[None].to(W0.dtype)  # (1, m, k)
    y, eps = F.linear(x, W0, bias), torch.finfo(W0.dtype).eps  # (1, m, d)
    if not torch.allclose(base(x).to(y), y, rtol=eps, atol=0, equal_nan=True):
        raise TypeError(f"base cannot be merged: it gives more than W0 x + bias: {base}")
    return W0, bias


# ---- A tiny transformer, named as in Llama ----
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
        x = self.attention_norm(h)
        q, k, v = (proj(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (b, heads, t, -1)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x.transpose(1, 2).flatten(2)

    def feed_forward(self, h):
        return h + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))

    def forward(self, h):
        h = h + self.o_proj(self.attention(h))  # (b, t, width)
        return self.feed_forward(h)


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
    """X (documents, terms): how often a document has a term, times how rare the term is
    (the usual smoothed idf). Each X_i has length 1."""
    number = {}  # term -> column
    columns = [number.setdefault(str(term), len(number)) for text in texts for term in text]
    rows = [row for row, text in enumerate(texts) for _ in text]
    X = torch.zeros(len(texts), len(number))
    X.index_put_((torch.tensor(rows), torch.tensor(columns)), torch.ones(()), accumulate=True)
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))
    return F.normalize(X)


def k_means(X, max_centres):
    """The SSE, sum_i min_j |X_i - C_j|^2, of 1, ..., max_centres centres.

    The paper starts from random centres, this is fast global k-means (Likas, Vlassis and
    Verbeek, 2003): K centres start from the K - 1 found before and the candidate that
    lowers the SSE most. Candidates are means of neighbours, half a cluster each.
    """
    def squared_distances(C):  # |X_i| = 1: (centres, terms) -> (documents, centres)
        return (1 - 2 * X @ C.T + C.square().sum(1)).clamp_min(0)

    nearest = (X @ X.T).topk(max(1, len(X) // (2 * max_centres))).indices
    candidates = torch.stack([X[near].mean(0) for near in nearest])  # (documents, terms)
    to_candidates = squared_distances(candidates)  # (documents, documents)
    C = X.mean(0, keepdim=True)  # (1, terms)
    sse = []
    for K in range(1, max_centres + 1):
        for _ in range(10):  # it settles
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

    documents: sequences of token ids or strings, not padded, or strings to split at
    white space. Returns n >= 2 and the SSE of 1, ..., max_heads centres. n is where "the
    rate of decrease in SSE slows down" most; the paper has no rule. It finds domains with
    words of their own, but every curve has an elbow, also that of one domain: look at the
    SSE, and choose (Figure 8: 2 to 4). Some hundred documents are enough: 3,000 with
    20,000 words take half a minute and 1 GB; time grows with documents^2 x words.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list, got one string")
    if max_heads < 2:
        raise ValueError(f"max_heads must be 2 or more, got {max_heads}")
    texts = [d.split() if isinstance(d, str) else list(d) for d in documents]
    texts = [text for text in texts if text]  # empty documents do not count
    if not texts:
        raise ValueError("documents has no document with a word in it")
    sse = k_means(tf_idf(texts), max_heads + 1)
    gains = -torch.tensor(sse).diff()  # of the centres 2, ..., max_heads + 1
    next_gains = gains[1:].clamp_min(1e-5 * sse[0])  # less is rounding
    return 2 + (gains[:-1] / next_gains).argmax().item(), sse[:max_heads]


# ---- On a model ----
def hydralora_layers(model):
    """The HydraLoRA layers: dict name -> HydraLoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _adapted_layers(model):
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRALinear: not injected, or merged already")
    return layers


def _replace(model, new):
    """Put new[module] in the place of module, under each of its names."""
    if model in new:
        raise ValueError("model is itself the layer: it has no parent")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def _find_targets(model, targets):
    """The nn.Linear layers that the targets name, all fit to be adapted."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parents = {name: modules[name.rpartition(".")[0]] for name in modules}
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)
               and name and not isinstance(parents[name], HydraLoRALinear)}
    chosen = {}
    for target in [targets] if isinstance(targets, str) else targets:
        names = [name for name in modules if f".{name}".endswith(f".{target}")]
        found = {name: linears[name] for name in names if name in linears}
        done = [name for name in names if isinstance(modules[name], HydraLoRALinear)]
        if not found and done:
            raise ValueError(f"{done[0]} is adapted already")
        if not found:
            raise ValueError(f"{target!r} matches no nn.Linear: there are {[*linears][:10]} ...")
        chosen |= found
    if not chosen:
        raise ValueError("targets is empty")
    for name, base in chosen.items():
        if isinstance(parents[name], (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{name}: its parent reads its weight and does not call it")
        if base.weight.is_complex():
            raise ValueError(f"{name} has complex weights")
        if base.weight.is_meta:
            raise ValueError(f"{name} is on meta: load the base's weights first; a layer that "
                             "is offloaded cannot be adapted")
    return chosen.values()


def inject_hydralora(model, targets, **layer_arguments):
    """Freeze the model and wrap the nn.Linear layers that the targets name; returns the model.

    targets: "q_proj", "layers.0.q_proj" or a list of such [7]. A layer is meant if its
    name is a target or ends in "." + target. layer_arguments: those of HydraLoRALinear.
    Load the base's weights first: q_proj.weight is q_proj.base.weight afterwards. A
    second injection adds to the first. With a ValueError the model stays as it was. Where
    a module reads a layer's weight and does not call the layer, the adapter does nothing:
    record_gates has no entry for it.
    """
    bases, trained = _find_targets(model, targets), set()
    for layer in hydralora_layers(model).values():  # of an earlier injection
        trained.update([layer.lora_A, layer.lora_B, layer.router.weight])
    new = {base: HydraLoRALinear(base, **layer_arguments) for base in bases}
    for p in model.parameters():
        if p not in trained:
            p.requires_grad_(False)
    _replace(model, new)
    return model


@contextmanager
def hook_gates(model, f):
    """Context manager: f(name, w) gets each router's w (..., n) and may return another.

    With `lambda name, w: 0 * w` the adapters are off. All compiled code of the process is
    compiled anew, inside and afterwards: it does not notice hooks.
    """
    def compile_anew():
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and this takes seconds
            torch.compiler.reset()

    hooks = [layer.router.register_forward_hook(lambda router, x, w, name=name: f(name, w))
             for name, layer in _adapted_layers(model).items()]
    try:
        compile_anew()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        compile_anew()


@contextmanager
def record_gates(model):
    """Context manager: a dict name -> w (..., n) of the last forward in it, detached."""
    gates = {}
    with hook_gates(model, lambda name, w: gates.update({name: w.detach()})):
        yield gates


@torch.no_grad()
def mean_gates(model, batches):
    """Mean w over all tokens of calibration inputs, in eval mode: dict name -> (n,).

    batches: a list of tensors, or of dicts of keyword arguments. Tokens with a 0 in a
    dict's attention_mask (b, t) do not count; ValueError if a layer saw other tokens.
    **A fixed mixture can ruin the model: accuracy in train_toy.py falls from 96.4 to 36.7 %.**
    """
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError("batches must be a list of batches")
    total = dict.fromkeys(hydralora_layers(model), 0)
    count = dict.fromkeys(total, 0)
    training = [module for module in model.modules() if module.training]
    seen = []
    try:
        with hook_gates(model.eval(), lambda name, w: seen.append((name, w))):
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                padded = mask is not None and not mask.all()
                if padded and (mask.dim() != 2 or (mask < 0).any()):
                    raise ValueError("attention_mask must be (b, t), with a 0 for padding")
                for name, w in seen:
                    saw, w = list(w.shape[:-1]), w.reshape(-1, w.shape[-1])  # (tokens, n)
                    if padded:
                        if saw not in ([*mask.shape], [mask.numel()]):
                            raise ValueError(f"{name} saw {saw} tokens, not {[*mask.shape]}")
                        w = w[mask.flatten().to(w.device) != 0]
                    total[name] += w.sum(0, dtype=torch.promote_types(w.dtype, torch.float32))
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
    if gates.keys() != layers.keys():
        raise ValueError(f"gates are for {list(gates)}, the layers are {list(layers)}")
    return gates


def merge_hydralora(model, gates):
    """Put layer.merge(gates) in the place of each HydraLoRA layer, or raise before any.

    Returns the layers that it took out, by name. gates: one (n,) for all, or a dict of all
    names, as from mean_gates. Gates of zero take the adapters out: W equals W0.
    """
    layers = _adapted_layers(model)
    gates = _gates_by_name(layers, gates)
    _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})
    return layers


def unmerge_hydralora(model, layers):
    """Put back the layers that merge_hydralora returned, as they were: .half() or
    .to() of the model in between does not reach them."""
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

    Keep inject_hydralora's arguments beside it: it has no lora_alpha. Its tensors are the
    model's own: clone them to keep a state.
    """
    state = {f"{name}.{key}": t for name, layer in _adapted_layers(model).items()
             for key, t in layer.state_dict().items() if not key.startswith("base.")}
    if any(type(t) is not torch.Tensor or t.is_meta for t in state.values()):
        raise ValueError("the adapters are on meta, or sharded")
    return state


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy an adapter into an injected model, all of it or, with a ValueError, nothing."""
    own = hydralora_state_dict(model)  # shares the parameters' memory
    fits, given = ({key: "meta" if t.is_meta else tuple(t.shape) for key, t in tensors.items()}
                   for tensors in (own, state))
    wrong = [key for key in {**given, **fits} if fits.get(key) != given.get(key)]
    if wrong:
        raise ValueError(f"{len(wrong)} keys do not fit, first {wrong[0]}: model "
                         f"{fits.get(wrong[0])}, state {given.get(wrong[0])}")
    for key, t in own.items():
        t.copy_(state[key])


def from_official_state_dict(state):
    """Official keys to ours: NAME.lora_A.weight, lora_B0.weight ..., lora_route.weight.

    PEFT's prefix may stand before them. None holds lora_alpha: inject with the run's.
    ValueError for another key, or heads with a gap.
    """
    ours, heads = {}, {}
    for key, t in state.items():
        official = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_(A|route|B(\d+))\.weight", key)
        if not official:
            raise ValueError(f"no official HydraLoRA checkpoint: it has {key}")
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
    """A plain LoRA for fixed gates, as for merge_hydralora: returns (state, config).
    **One fixed mixture can ruin the model, see mean_gates.**

    For PEFT's adapter_model.safetensors (or .bin) and adapter_config.json. Lower ranks are
    filled up with zeros. PEFT matches the ends of names: another layer may get an adapter
    of zeros, which changes nothing. From 0.20 on PEFT takes gate_proj, up_proj and down_proj
    of mixture-of-experts models (deepseek_v3, glm4_moe, qwen3_moe, qwen3_next ...) for the
    fused experts' and, with a warning, loads nothing: merge there.
    """
    hydralora_state_dict(model)  # refuses adapters without values
    layers = hydralora_layers(model)
    names = [name for name, module in model.named_modules(remove_duplicate=False)
             if isinstance(module, HydraLoRALinear)]
    if names != list(layers) or "" in layers:
        raise ValueError("PEFT needs one name for each layer")
    gates, state = _gates_by_name(layers, gates), {}
    r = max(layer.r for layer in layers.values())
    for name, layer in layers.items():
        A, B = layer.to_lora(gates[name])
        A = F.pad(A, (0, 0, 0, r - layer.r))            # (r, k)
        B = F.pad(layer.scaling * B, (0, r - layer.r))  # (d, r)
        state[f"base_model.model.{name}.lora_A.weight"] = A
        state[f"base_model.model.{name}.lora_B.weight"] = B
    config = dict(peft_type="LORA", target_modules=list(layers), r=r, lora_alpha=r)
    return state, config  # PEFT scales by lora_alpha / r = 1
