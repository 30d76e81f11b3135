# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router over the heads.

Tian et al.: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
NeurIPS 2024, arXiv 2404.19245. W0 is frozen; A, B_i and Wg are trained.

    (1)  y = W0 x + B A x                 LoRA
    (2)  W = W0 + sum_i w_i B_i A         HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x     HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)              the router, for each token

    paper  code           shape     what it is
    x      x              (..., k)  input, any leading axes, such as (b, t)
    W0     base.weight    (d, k)    frozen weight, from k features to d
    A      lora_A         (r, k)    shared by all heads; starts random
    A x    z              (..., r)  the input of every head
    B_i    lora_B[i]      (d, r)    a head, the paper's expert E_i; starts at zero
    N      num_heads                number of heads, written n in shapes
    Wg     router.weight  (n, k)    the paper's Wg^T, as nn.Linear stores a weight
    w      w, gates       (..., n)  one gate per head, for each token; (n,) if fixed

The code scales the update by s = scaling. All N heads run on each token. [1] to [9] refer
to "Choices". "The layer" and "Choosing N" follow the paper.
"""
import copy
import math
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.13.0"


# ---- The layer ----
# MIT License, (c) 2026 the "HydraLoRA in one file" authors. A copy needs
# import copy, math, torch, torch.nn.functional as F; from torch import nn
# Freeze the model, then wrap. Modules that only read .weight bypass the update:
# nn.MultiheadAttention, nn.TransformerEncoderLayer in eval mode, Mamba.
class Router(nn.Module):  # not an nn.Linear, which a quantiser would replace
    """Eq. 4: x (..., k) -> gates w (..., n).

    A router of whole sequences must return (b, 1, n), because (b, n) would mean b tokens,
    without an error if t is b or 1. Such a router sees the future, so a KV cache changes
    its gates. A subclass may return any gates, but there must be n of them:

        class TopTwo(Router):  # for two heads or more
            def forward(self, x):
                w = super().forward(x)
                return w * (w >= w.topk(2).values[..., -1:])  # not rescaled

        class TopTwoLayer(HydraLoRALinear):
            router_class = TopTwo
    """

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg
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

    num_heads: N. r: the rank. lora_alpha: scaling = lora_alpha / r.

    Example: with W0 the identity, bias (10, 20), A = (1, 1), B_1 = (1, 2), B_2 = (5, -2),
    Wg = ((ln 3, 0), (0, 0)) and scaling 2:

        x = (1, 2):  W0 x + bias = (11, 22),  A x = 3,  w = softmax(ln 3, 0) = (3/4, 1/4)
        y = (11, 22) + 2 (3/4 (3, 6) + 1/4 (15, -6)) = (23, 28)
    """
    router_class = Router

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0):
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {base}")
        if num_heads < 1 or r < 1:
            raise ValueError(f"num_heads and r must be 1 or more, got {num_heads}, {r}")
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

    def router_input(self, x):
        """A subclass that returns A x (..., r) must also set, in its __init__,
        self.router = self.router_class(self.r, self.num_heads).to(self.lora_A)."""
        return x

    def forward(self, x):
        y = self.base(x)                                 # (..., d), W0 x + bias
        x = x.to(self.lora_A.dtype)
        w = self.router(self.router_input(x))            # (..., n), Eq. 4, reads x [1]
        z = F.linear(self.lora_dropout(x), self.lora_A)  # (..., r), A x, one mask for all heads [5]
        u = w.unflatten(-1, (self.num_heads, 1)) * (self.scaling * z)[..., None, :]  # (..., n, r)
        delta = torch.einsum("...nr,ndr->...d", u, self.lora_B)  # (..., d), Eq. 3
        return y + delta.to(y.dtype)                     # (..., d), only y [6]

    def extra_repr(self):
        return f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"

    weight = property(lambda self: self.base.weight)  # T5 reads it
    bias = property(lambda self: self.base.bias)

    @torch.no_grad()
    def to_lora(self, gates):
        """Eq. 1 for fixed gates (n,) [8]: A (r, k) and B = s sum_i gates_i B_i (d, r)."""
        if type(self).forward is not HydraLoRALinear.forward:
            raise TypeError(f"{type(self).__name__} overrides forward, but not to_lora or merge")
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, heads = self.lora_A.to(dtype, copy=True), self.lora_B.to(dtype)
        gates = torch.as_tensor(gates).to(heads)
        if gates.shape != (self.num_heads,) or not gates.isfinite().all():
            raise ValueError(
                f"gates must be finite, and {self.num_heads} numbers, got {[*gates.shape]}")
        B = self.scaling * (gates[:, None, None] * heads).sum(0)
        return A, B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a copy of base with the weight W0 + s sum_i gates_i B_i A.

        Exact, up to rounding, for tokens whose w equals gates (n,). For others, y is off by
        s sum_i (gates_i - w_i) B_i A x.
        """
        base, W0 = self.base, self.base.weight
        if (base.forward != nn.Linear.forward.__get__(base)
                or base._forward_hooks or base._forward_pre_hooks
                or type(W0) is not nn.Parameter or W0.is_meta or W0.dtype.itemsize == 1):
            raise TypeError(
                "base must be a plain nn.Linear, not adapted, quantised, parametrized, on meta, or "
                "hooked (accelerate.hooks.remove_hook_from_submodules(model))")
        A, B = self.to_lora(gates)
        merged = copy.deepcopy(base)
        with torch.autocast(A.device.type, enabled=False):
            merged.weight += B @ A  # (d, k), Eq. 2, rounded once
        if not merged.weight.isfinite().all():
            raise ValueError(f"the merged weight is not finite in {merged.weight.dtype}")
        return merged


# ---- Why it works ----
# Why a router, and not a larger rank?
# A LoRA's update, B A x, is linear in x at any rank. If x is the sum of a part for the
# domain (a topic or task) and a part for the word, so is the update, which then cannot
# treat a word differently in two domains. Nor can HydraLoRA with one w for all tokens,
# because Eq. 3 is then a LoRA with B = sum_i w_i B_i. A router makes w depend on x, so
# tokens of different domains get different matrices. On MMLU, the paper reports 42.81
# for equal w_i, 45.45 for a LoRA of HydraLoRA's size, 46.59 for one twice as large, and
# 47.22 for HydraLoRA. But next to a non-linearity, no router may be needed: on the
# up_proj and down_proj of train_toy.py, a LoRA is as good.
#
# Why is A shared, and not B?
# In the paper, LoRAs of different tasks have A's that "tend to converge" and B's that
# are "distinguishable" (Observation II). It posits "an artifact of the initialization
# schemes", with A "inclined toward capturing commonalities across domains". Two things
# make A's similar:
#
# - A common start. While A has hardly moved, A's are alike in all domains, and B's, which
#   start at 0, are not. On LLaMA2-7B, A hardly moves, so A's from two starts differ
#   even for one task (Ban and Ji, 2025, arXiv 2509.25414).
# - A common domain. In train_toy.py, trained LoRAs of one domain overlap by 0.85 in A
#   and 0.88 in B, even from two starts. Those of two domains overlap less, by 0.39 in A
#   and 0.49 in B, even from one start (1: the same subspace; 0.14: chance).
#
# So similar A's show a common start or a common domain, and not that domains can share
# an A. The reason left is size: N LoRAs have N r (k + d) parameters, but one A with N
# heads has r (k + N d). Sharing B, as Ban and Ji do, saves as much if k = d, but then the
# heads write to only r dimensions of y. With one A, they write to N r, but read only r
# features of x. In train_toy.py, sharing A is better by a point.
#
# Why do the heads differ, and divide the domains?
# For one token, let g = dL/dy, let l = Wg^T x be the logits, so that w = softmax(l),
# and let sum_j w_j B_j A x be the mixture. Then
#
#     dL/dB_i = s w_i g (A x)^T            a token counts for head i in proportion to w_i
#     dL/dA   = s sum_i w_i B_i^T g x^T    A learns through all heads
#     dL/dw_i = s g . B_i A x              negative if more of head i would lower the loss
#     dL/dl_i = w_i (dL/dw_i - sum_j w_j dL/dw_j)    head i, compared with the mixture
#     dL/dWg  = x (dL/dl)^T                of shape (k, n)
#
# At the start, all B_i are 0, so the gradients of A and Wg are 0, and those of the
# heads differ only by w_i. If the rows of router.weight started equal, the heads would
# stay equal.
#
# Later, a token raises the logits of heads that lower its loss more than the mixture,
# and lowers the others. It then counts more in the gradients of the better heads. Hence
# a small random preference grows, if the router can recognise similar tokens from x.
# What the heads have in common cancels in dL/dl, so only their differences move the
# router. If a word needs different answers in two domains, no single head suits both, so
# no head takes all tokens.
#
# Summed over tokens, dL/dWg tends to turn the router first to what varies most in x. On
# the o_proj of train_toy.py, this is the domain, and in most runs the heads divide the
# domains within 20 of 400 steps. On q_proj, it is the word, and the heads follow the
# word. On v_proj, it is the word, too, but the heads rather follow the domain: we do not
# know why.
#
# What does AdamW change, and can a head stay unused?
# If w_i is nearly 0 for all tokens, so are the gradients of B_i and of row i of
# router.weight, and SGD leaves both as they are. AdamW divides each gradient by its
# usual size. So a head with small gates moves as fast as one with gates near 1, until
# its gradients, which have the factor w_i, come near eps, 1e-8. Gates decide from which
# tokens a head learns, but not how fast. So an unused head can come back, if it would
# lower the loss. Otherwise, it usually stays unused.


# ---- Choices ----
# Where the paper is silent or unclear, or the official code differs. L339 is line 339
# of https://github.com/Clin0212/HydraLoRA/blob/afb693b/HydraLoRA/peft/tuners/lora.py;
# the script is HydraLoRA/fine-tuning.sh.
#
# [1] The router reads x, as in the paper's text and L339. The paper prints Wg as
#     (r, N), which fits A x, and as (d_m, n), which fits x, for LoRA MoE (App. A.2).
# [2] The router has no bias (L279). Wg (L299) starts like A (L295).
# [3] The adapter is float32, or float64 if the base is; the script has bf16. The
#     softmax is in float32 (L339) or float64: bf16 rounds a w_i near 1 to 1, which makes
#     its derivative, w_i (1 - w_i), 0.
# [4] The update is scaled by lora_alpha / r (L284, L342): 16 / 8, in the script 32 / 4.
# [5] The router sees x without dropout (L339). All heads share one dropout mask. L342
#     draws one per head, so heads differ even with equal gates.
# [6] Only y is returned. L347 also returns "blcls", always 0 (L344), for the official
#     model's loss.
# [7] The caller picks the layers. The paper's parameter counts fit q_proj and v_proj
#     (Figs. 3 and 9). The script and issue 26 use gate_proj, up_proj and down_proj.
# [8] Merging uses one w for all tokens. The paper merges "based on the input" (Sec.
#     3.2.2), which we read as: for each token.
# [9] k-means sets only N, as in the official README.


# ---- Choosing N, Appendix B ----
def tf_idf(texts):
    """X (m documents, terms), with scikit-learn's smoothed idf and rows of norm 1."""
    counts = [Counter(text) for text in texts]
    terms = sorted(set().union(*counts))
    X = torch.tensor([[float(count[term]) for term in terms] for count in counts])
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))  # rare terms weigh more
    return F.normalize(X)


def sse_curve(X, max_centres):
    """The SSE of k-means, sum_i min_j |X_i - C_j|^2, for 1, ..., max_centres centres.

    The paper starts from random centres. We use fast global k-means (Likas et al., 2003):
    each new centre is the document that lowers the SSE most.
    """
    between = torch.cdist(X, X).square()  # (m, m)
    C = X.mean(0, keepdim=True)  # (1, terms)
    sse = []
    for n in range(1, max_centres + 1):
        for _ in range(10):  # usually enough
            squared, owner = torch.cdist(X, C).square().min(1)  # (m,), Eq. 7
            S = F.one_hot(owner, n).to(X)  # (m, n)
            size = S.sum(0)[:, None]  # (n, 1)
            C = torch.where(size > 0, S.T @ X / size, C)  # (n, terms), Eq. 8
        sse.append(squared.sum().item())
        gain = (squared[:, None] - between).clamp_min(0).sum(0)  # (m,)
        C = torch.cat([C, X[gain.argmax()][None]])  # (n + 1, terms)
    return sse


def num_heads_from_corpus(documents, max_heads=10):
    """N by TF-IDF, k-means and the elbow of the SSE curve [9].

    documents: a few hundred strings (split at spaces), or token sequences without padding.
    Returns N, at least 2, and the SSE of 1, ..., max_heads centres.

    At the elbow, "the rate of decrease in SSE slows down". Our N is the n that maximises
    (SSE_{n-1} - SSE_n) / (SSE_n - SSE_{n+1}). This finds the domains if the documents of a
    domain share most of their words. For real paragraphs, it is unreliable.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list, got one string")
    texts = [d.split() if isinstance(d, str) else [*map(str, d)] for d in documents]
    texts = [text for text in texts if text]
    if min(len(texts), max_heads) < 2:
        raise ValueError("needs 2 or more documents with words, and max_heads >= 2")
    sse = sse_curve(tf_idf(texts), max_heads + 1)
    gains = -torch.tensor(sse).diff()  # SSE_{n-1} - SSE_n for n = 2, ..., max_heads + 1
    next_gains = gains[1:].clamp_min(1e-5 * sse[0])  # smaller gains are rounding errors
    return 2 + (gains[:-1] / next_gains).argmax().item(), sse[:max_heads]


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
        """The input x of o_proj: h (b, t, width) -> (b, t, width)."""
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
    """A GPT-style decoder to adapt: tokens (b, t) -> logits (b, t, vocab_size)."""

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
    """Dict name -> HydraLoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _require_layers(model):
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRA layer")
    return layers


def _refuse_wrapper(model):
    kinds = {"DistributedDataParallel", "DataParallel", "AveragedModel", "OptimizedModule"}
    if kinds & {kind.__name__ for kind in type(model).__mro__}:
        raise ValueError(f"give the model inside this {type(model).__name__}")


def _require_names(what, given, expected):
    wrong = dict(missing=expected.keys() - given.keys(), unknown=given.keys() - expected.keys())
    problems = [f"{len(names)} {kind}, first {min(names)!r}"
                for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(f"names in {what}: {'; '.join(problems)}")


def _each_layer(model, gates, method):
    layers = _require_layers(model)
    if not isinstance(gates, dict):
        gates = dict.fromkeys(layers, gates)
    _require_names("gates", gates, layers)
    results = {}
    for name, layer in layers.items():
        try:
            results[name] = getattr(layer, method)(gates[name])
        except (TypeError, ValueError) as error:
            error.args = (f"{name or 'model'}: {error}",)
            raise
    return results


def _replace(model, new):
    """Replace the modules that are keys of new; return the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def inject_hydralora(model, target_modules, layer=HydraLoRALinear, **arguments):
    """Freeze the model, wrap the nn.Linear layers that match, and return the model.

    target_modules: one or more names, or their last parts, such as "q_proj" [7]. Other
    matches, such as fused MoE experts, are skipped.

    A second call adapts more layers. Each call freezes all but the adapters. Print
    hydralora_layers(model) to see what was adapted. A trainable parameter whose .grad is
    None after a backward is in a layer that the model never called, or in an MoE expert
    without tokens.
    """
    _refuse_wrapper(model)
    modules = dict(model.named_modules())
    bases = {}
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        names = [name for name in modules if f".{name}".endswith(f".{target}")]
        linears = [name for name in names if isinstance(modules[name], nn.Linear)]
        if not linears:
            kinds = {type(modules[name]) for name in names} or "nothing"
            raise ValueError(f"{target!r} matches no nn.Linear: it matches {kinds}")
        for name in linears:
            parent = modules[name.rpartition(".")[0]]
            if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
                raise ValueError(f"{name}: {type(parent)} may not call it, but read its weight")
            bases[name] = modules[name]
    model = _replace(model, {base: layer(base, **arguments).train(base.training)
                             for base in bases.values()})
    adapter = _adapter(model)
    for name, p in model.named_parameters():
        if name not in adapter:
            p.requires_grad_(False)
    return model


def _reset_compiler():
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


@contextmanager
def hook_gates(model, f):
    """Context manager: calls f(name, w) with each router's gates w (..., n).

    If f returns a tensor of this shape, the layer uses it: `lambda name, w: 0 * w` turns
    the adapters off. For a loss on gates, `hook_gates(model, d.__setitem__)` collects them
    in a dict d. Enter the context once, around the training loop: compiled code ignores
    new hooks, so entering resets torch.compiler.

    Checkpointing repeats the forward in the backward, and so calls f again. If f returns
    gates, run the backward inside the context. Outside, the router's own gates cause an
    error or, with use_reentrant=True or a frozen router, wrong gradients. With
    use_reentrant=True, a loss on gates has no gradient.
    """
    layers = _require_layers(model)
    if len({layer.router for layer in layers.values()}) < len(layers):
        raise ValueError("layers share a router: hooks cannot tell them apart")

    def call(name, w):
        w = f(name, w)
        # Autograd saves this 1. Checkpointing raises an error if its repeat does not.
        return None if w is None else w * w.new_ones(())

    hooks = [layer.router.register_forward_hook(lambda router, x, w, name=name: call(name, w))
             for name, layer in layers.items()]
    try:
        _reset_compiler()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _reset_compiler()


@contextmanager
def record_gates(model):
    """Context manager: a dict name -> w (..., n) of the last forward, detached."""
    gates = {}
    with hook_gates(model, lambda name, w: gates.update({name: w.detach()})):
        yield gates


@torch.no_grad()
def mean_gates(model, batches):
    """The mean w over all tokens of calibration inputs, in eval mode: dict name -> (n,).

    batches: the model's inputs, tensors or dicts of keyword arguments. Do not pad, because
    padding counts. Zeros in an attention mask raise an error, but padded labels do not.
    Merging with mean gates can ruin the model, because w varies.
    """
    layers, total, count = hydralora_layers(model), Counter(), Counter()

    def add(name, w):
        w = w.reshape(-1, w.shape[-1])  # (tokens, n)
        total[name] += w.sum(0, dtype=torch.promote_types(w.dtype, torch.float32))
        count[name] += len(w)

    def run_mapping(**arguments):
        for key in ("attention_mask", "decoder_attention_mask"):
            mask = arguments.get(key)
            if mask is not None and not mask.all():
                raise ValueError(f"{key} has zeros: use batches without padding")
        model(**arguments)

    training = [m for m in model.modules() if m.training]
    try:
        with hook_gates(model.eval(), add):
            for batch in batches:
                model(batch) if isinstance(batch, torch.Tensor) else run_mapping(**batch)
    finally:
        for m in training:
            m.training = True
    for name in layers:
        if not count[name]:
            raise ValueError(f"{name!r} got no token: no batch, none routed to this expert, "
                             "or the model never calls it")
    return {name: total[name] / count[name] for name in layers}


def merge_hydralora(model, gates):
    """Replace each HydraLoRA layer by layer.merge(gates), or raise and change nothing.

    gates: (n,) for all layers, or a dict name -> (n,), as from mean_gates. Returns the
    model. To keep the adapters, merge a copy.deepcopy.
    """
    merged = _each_layer(model, gates, "merge")
    return _replace(model, {layer: merged[name]
                            for name, layer in hydralora_layers(model).items()})


# ---- Files ----
def _adapter(model):
    return {f"{name}.{key}".removeprefix("."): t for name, layer in _require_layers(model).items()
            for key, t in layer.state_dict().items() if not key.startswith("base.")}


def hydralora_state_dict(model):
    """The adapter: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k).

    It shares memory with the model. It lacks lora_alpha: save inject_hydralora's arguments,
    too, except layer, which is a class.
    """
    _refuse_wrapper(model)
    state = _adapter(model)
    for key, t in state.items():
        matrix = key.endswith(("lora_A", "lora_B", "router.weight"))
        if "_fsdp_wrapped_module" in key or matrix and t.dim() < 2:
            advice = ("FSDP1, save from model.state_dict() under FULL_STATE_DICT the keys that "
                      "this function returned before wrapping")
        elif type(t) is not torch.Tensor:
            advice = ("FSDP2, use get_model_state_dict and set_model_state_dict with "
                      "full_state_dict=True (also ignore_frozen_params=True or strict=False)")
        elif t.is_meta:
            advice = "accelerate, call accelerate.hooks.remove_hook_from_submodules(model)"
        else:
            continue
        raise ValueError(f"{key} is sharded or on meta: with {advice}")
    return state


def load_hydralora_state_dict(model, state):
    """Copy the adapter into the model and return it, or raise and change nothing."""
    own = hydralora_state_dict(model)
    _require_names("state", state, own)
    for key, t in own.items():
        if state[key].shape != t.shape:
            raise ValueError(f"{key} must be {[*t.shape]}, got {[*state[key].shape]}")
    model.load_state_dict(state, strict=False)
    return model


def from_official_state_dict(state):
    """Convert official keys: NAME.lora_A.weight, lora_B0.weight ..., lora_route.weight.

    PEFT's prefix is allowed. Inject with the lora_alpha of the training.
    """
    rest = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    ours, end = {}, ".lora_route.weight"
    for name in [key.removesuffix(end) for key in rest if key.endswith(end)]:
        Wg = rest.pop(name + end)  # (n, k)
        B = [rest.pop(f"{name}.lora_B{i}.weight") for i in range(len(Wg))]  # each (d, r)
        ours |= {f"{name}.lora_A": rest.pop(f"{name}.lora_A.weight"),
                 f"{name}.lora_B": torch.stack(B), f"{name}.router.weight": Wg}
    if rest:
        raise ValueError(f"not an official checkpoint: it has {min(rest)}")
    return ours


def export_lora(model, gates):
    """(state, config) of a LoRA for PEFT, with fixed gates, as in merge_hydralora.

    If PEFT warns about missing keys, as in many MoE models, merge instead.
    """
    hydralora_state_dict(model)  # refuses meta and sharded
    for name, layer in hydralora_layers(model).items():
        if isinstance(layer.base, HydraLoRALinear):
            raise ValueError(f"{name}.base is adapted, too: first merge it, base.merge(gates)")
    loras = _each_layer(model, gates, "to_lora")
    if "" in loras:
        raise ValueError("PEFT needs a name for each layer: export the model around it")
    r = max(len(A) for A, _ in loras.values())
    config = dict(peft_type="LORA", target_modules=[*loras], r=r, lora_alpha=r)  # scaling 1
    state = {}
    for name, (A, B) in loras.items():
        prefix, pad = f"base_model.model.{name}", r - len(A)
        state[f"{prefix}.lora_A.weight"] = F.pad(A, (0, 0, 0, pad))  # (r, k)
        state[f"{prefix}.lora_B.weight"] = F.pad(B, (0, pad))  # (d, r)
    return state, config
