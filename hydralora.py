# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""HydraLoRA in one file: one shared matrix A, N heads B_i, and a router over the heads.

Tian et al.: "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
NeurIPS 2024, arXiv 2404.19245. W0 is frozen, whereas A, B_i and Wg are trained.

    (1)  y = W0 x + B A x                 LoRA
    (2)  W = W0 + sum_i w_i B_i A         HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x     HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)              the router, for each token

    paper  code           shape     what it is
    x      x              (..., k)  input, any leading axes, such as (b, t)
    W0     base.weight    (d, k)    frozen weight, from k features to d
    A      lora_A         (r, k)    shared by all heads; Kaiming-uniform init
    A x    z              (..., r)  the input of every head
    B_i    lora_B[i]      (d, r)    a head, the paper's expert E_i; zero init
    N      num_heads                number of heads, written n in shapes
    Wg     router.weight  (n, k)    the paper's Wg^T, as nn.Linear stores a weight
    w      w, gates       (..., n)  one gate per head, for each token; (n,) if fixed
           delta          (..., d)  the update s sum_i w_i B_i A x, with s = scaling [4]

"The layer" and "Choosing N" are to be read beside the paper, whereas the other sections
are tools. The numbers [1] to [9] refer to the choices below.

Why a router, and not a larger rank? Because a LoRA of any rank applies one matrix to all
tokens. So does HydraLoRA if w is the same for all tokens: Eq. 3 is then a LoRA of rank r,
with B = sum_i w_i B_i, for any N. But a router makes w depend on x, so tokens of
different domains can get different updates. Together, these updates can span N r
dimensions, but N r alone says little: in train_toy.py, three heads of rank 9 reach 94%
accuracy, and nine of rank 3, which are as large, 76%.

Why is A shared, and not B? Because the paper saw (Fig. 3) that the matrices A of
separately trained LoRAs "tend to converge", whereas their matrices B are
"distinguishable" (Observation II). So one A can serve all heads, "to improve parameter
efficiency" (Sec. 2.3). The paper posits that the difference is "an artifact of the
initialization schemes" (A starts random, B zero). With one A, all heads read the same
r features of x, but their updates can span N r dimensions of y, whereas one B and N
matrices A_i would read N r features, but write r dimensions. A shared A must still be
trained: in train_toy.py, a random A of rank 9 costs 45 points.

Why do the heads become different? Because Wg is random, so their gates differ. The heads
start out equal, with B_i = 0: in the first step, the gradients of A and Wg are therefore
zero, and those of the heads differ only through w_i. If the rows of Wg were equal, the
heads would stay equal, up to rounding, which AdamW may amplify.

Why do the heads specialise? Because a head's logit grows on the tokens where the head
beats the mixture, and a larger gate then makes it learn more from these tokens. Let
g = dL/dy for one token, and w = softmax(l). Then

    dL/dB_i = s w_i g (A x)^T    head i learns from each token in proportion to w_i
    dL/dw_i = s g . B_i A x      negative if more of head i would lower the loss
    dL/dl_i = w_i (dL/dw_i - sum_j w_j dL/dw_j)    how head i compares with the mixture

So if x shows which tokens these are, a small random preference grows. In train_toy.py,
the heads have mostly divided the domains after 20 of 400 steps, when little is learnt.
So specialised heads are no sign of a good fit.

A head whose gate is near zero for all tokens gets almost no gradient, so it may stay
unused [6]: in train_toy.py, three domains use three to five of six heads.

Choices where the paper is silent or the official code differs. L339 is line 339 of
https://github.com/Clin0212/HydraLoRA/blob/afb693b/HydraLoRA/peft/tuners/lora.py,
and the script is HydraLoRA/fine-tuning.sh there.

    [1] The router reads x, as in the paper's text and L339. But the paper prints Wg as
        (r, N), which would fit A x. For LoRA MoE, its Appendix A.2 has (d_m, n), which
        fits x.
    [2] The router has no bias (L279) and Kaiming-uniform init (L299), like A (L295).
    [3] The adapter is float32, or float64 if the base is; in the script, it is bf16. The
        softmax is computed in float32 or better (L339), because bf16 would round a w_i
        near 1 to 1, and its derivative w_i (1 - w_i) to 0.
    [4] The update is scaled by s = lora_alpha / r (L284, L342): here 16 / 8, in the
        script 32 / 4. The paper has no such factor.
    [5] All heads share one dropout mask, on A's input, and the router sees x without
        dropout (L339). L342 draws a mask for each head, which is enough to make heads
        different. The paper has no dropout.
    [6] Only y is returned. L347 also returns "blcls", which the official model adds to
        the loss, although it is always 0 (L344). A balance loss, cv_squared (L315), is
        never called, and the paper has no loss that keeps all heads in use.
    [7] The caller picks the layers. The paper names only q_proj and v_proj (Fig. 3), and
        its "% Param" fits these two, without the router. The script adapts gate_proj,
        up_proj and down_proj, and the authors say that they took these (their issue 26).
    [8] Merging uses one w for all tokens, which the caller chooses. The paper merges
        "based on the input" (Sec. 3.2.2), which we read as: for each token.
    [9] k-means only chooses N, as the official README says. It initialises no head.
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

__version__ = "0.11.0"


# ---- The layer ----
class Router(nn.Module):  # not an nn.Linear, which a quantiser would replace
    """Eq. 4: x (..., k) -> w (..., n). A subclass may return other gates, n of them:

        class TopTwo(Router):
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
        logits = F.linear(x, self.weight)  # (..., n)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(-1, dtype=dtype).to(logits.dtype)  # (..., n) [3]


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear, base (d, k), with a HydraLoRA update: x (..., k) -> y (..., d).

    num_heads: N. r: the rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.

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
        self.num_heads = num_heads
        self.r = r
        self.scaling = lora_alpha / r  # [4]
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32  # [3]
        options = dict(device=base.weight.device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, k, **options))
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **options))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_parameters()
        self.router = self.router_class(k, num_heads, **options)
        self.base = base.requires_grad_(False)  # W0 and bias
        self.train(base.training)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def router_input(self, x):
        """The router's input, here x. A subclass that returns A x (..., r) [1] must also set
        self.router = Router(self.r, self.num_heads).to(self.lora_A) in its __init__."""
        return x

    def forward(self, x):
        """Eqs. 3 and 4: x (..., k) -> y (..., d)."""
        y = self.base(x)                                 # (..., d), W0 x + bias
        x = x.to(self.lora_A.dtype)
        w = self.router(self.router_input(x))            # (..., n), Eq. 4
        z = F.linear(self.lora_dropout(x), self.lora_A)  # (..., r), A x [5]
        delta = torch.einsum("...n,...r,ndr->...d", w, self.scaling * z, self.lora_B)  # Eq. 3
        return y + delta.to(y.dtype)                     # (..., d) [6]

    def extra_repr(self):
        return f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}"

    # Some models, such as T5, read a layer's weight.
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    # Merging, with one w for all tokens [8].
    @torch.no_grad()
    def to_lora(self, gates):
        """Eq. 1 for fixed gates (n,): A (r, k) and B = s sum_i gates_i B_i (d, r)."""
        if type(self).forward is not HydraLoRALinear.forward:
            name = type(self).__name__
            raise TypeError(f"{name} overrides forward: it needs its own to_lora or merge")
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A = self.lora_A.to(dtype, copy=True)
        heads = self.lora_B.to(dtype)
        gates = torch.as_tensor(gates).to(heads)
        if gates.shape != (self.num_heads,):
            raise ValueError(f"gates must be {self.num_heads} numbers, got {[*gates.shape]}")
        B = self.scaling * (gates[:, None, None] * heads).sum(0)
        return A, B  # (r, k), (d, r)

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a copy of base with the weight W0 + s sum_i gates_i B_i A.

        Exact, up to rounding, for tokens whose w equals gates (n,). For others, y is off by
        s sum_i (gates_i - w_i) B_i A x.
        """
        if not _is_plain_linear(self.base):
            raise TypeError("base must be a plain nn.Linear: not quantised, parametrized, hooked "
                            "(accelerate.hooks.remove_hook_from_submodules(model) helps) or on the "
                            "meta device")
        A, B = self.to_lora(gates)
        merged = copy.deepcopy(self.base)
        with torch.autocast(A.device.type, enabled=False):  # B @ A in full precision
            merged.weight += B @ A                          # (d, k), Eq. 2, rounded once
        if not merged.weight.isfinite().all():
            raise ValueError(f"the merged weight is not finite in {merged.weight.dtype}")
        return merged


def _is_plain_linear(base):
    """Whether base computes W0 x + bias, and merging can add to its weight."""
    W0 = base.weight
    return (base.forward == nn.Linear.forward.__get__(base)  # not overridden
            and not base._forward_hooks and not base._forward_pre_hooks
            and type(W0) is nn.Parameter and not W0.is_meta and W0.dtype.itemsize > 1)


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


# ---- On a model ----
def hydralora_layers(model):
    """The HydraLoRA layers: dict name -> HydraLoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, HydraLoRALinear)}


def _require_layers(model):
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRA layer")
    return layers


def _require_names(what, given, expected):
    missing = expected.keys() - given.keys()
    unknown = given.keys() - expected.keys()
    problems = [f"{len(names)} {kind}, first {min(names)!r}"
                for kind, names in [("missing", missing), ("unknown", unknown)] if names]
    if problems:
        raise ValueError(f"names in {what}: {'; '.join(problems)}")


def _for_each_layer(model, gates, method):
    """Dict name -> layer.method(its gates)."""
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
    """Replace each module that is a key of new by its value; return the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


def inject_hydralora(model, target_modules, layer=HydraLoRALinear, **arguments):
    """Freeze the model, wrap the nn.Linear layers that match, and return the model.

    target_modules: "q_proj", "layers.0.q_proj" or a list of them [7]. A layer matches
    if its name is a target or ends in "." + target. layer: HydraLoRALinear or a subclass,
    called as layer(base, **arguments). Other modules, such as fused MoE experts, are
    skipped. If a model reads a layer's weight instead of calling the layer, as Mamba does
    with dt_proj, the adapter has no effect, and mean_gates raises an error.

    A second call adapts more layers. Each call freezes all but the adapters, even a new
    output layer: unfreeze that after the last call, and save it yourself.
    """
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
                raise ValueError(f"{name}: {type(parent)} may not call its forward")
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
    """Context manager: f(name, w) gets each router's w (..., n), and may return another.

    The other must have n gates, too. `lambda name, w: 0 * w` turns the adapters off.
    `gates.__setitem__` collects w in a dict, for a loss on gates. In training, enter it
    once, around the loop: since compiled code does not notice hooks, entry and exit reset
    torch.compiler for the whole process.

    Activation checkpointing repeats the forward in the backward. So run the backward inside
    the context: after it, the repeat uses the router's own gates. use_reentrant=True then
    gives silently wrong gradients. use_reentrant=False raises an error, except if the router
    is frozen and x needs no gradient: then gradients are silently wrong, too. With
    use_reentrant=True, a loss on gates silently has no gradient.
    """
    layers = _require_layers(model)
    if len({layer.router for layer in layers.values()}) < len(layers):
        raise ValueError("layers share a router: hooks cannot tell them apart")

    def call(name, w):
        w = f(name, w)
        # Autograd saves the 1. Checkpointing (use_reentrant=False) notices a repeat without it.
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

    batches: tensors, or dicts of keyword arguments, without padding. Merging with mean
    gates can ruin the model, because w varies, but a merged weight does not.
    """
    total = dict.fromkeys(_require_layers(model), 0)
    count = dict.fromkeys(total, 0)

    def add(name, w):
        w = w.reshape(-1, w.shape[-1])  # (tokens, n)
        total[name] += w.sum(0, dtype=torch.promote_types(w.dtype, torch.float32))
        count[name] += len(w)

    def run(**arguments):
        mask = arguments.get("attention_mask")
        if mask is not None and not mask.all():
            raise ValueError("attention_mask has zeros: use batches without padding")
        model(**arguments)

    training = [m for m in model.modules() if m.training]
    try:
        with hook_gates(model.eval(), add):
            for batch in batches:
                model(batch) if isinstance(batch, torch.Tensor) else run(**batch)
    finally:
        for m in training:
            m.training = True
    if unused := [name for name in count if not count[name]]:
        raise ValueError(f"{unused[0]!r} got no token: no batch, or the model never calls it")
    return {name: total[name] / count[name] for name in total}


def merge_hydralora(model, gates):
    """Replace each HydraLoRA layer by layer.merge(gates), or raise and change nothing.

    gates: one (n,) for all layers, or a dict name -> (n,), as from mean_gates. Zeros drop
    the adapters. Returns the model; to keep the adapters, merge a copy.deepcopy of it.
    """
    merged = _for_each_layer(model, gates, "merge")
    return _replace(model, {layer: merged[name]
                            for name, layer in hydralora_layers(model).items()})


# ---- Files ----
def _adapter(model):
    return {f"{name}.{key}".removeprefix("."): t for name, layer in _require_layers(model).items()
            for key, t in layer.state_dict().items() if not key.startswith("base.")}


def hydralora_state_dict(model):
    """The adapter: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k).

    Save inject_hydralora's arguments too: lora_alpha and layer are not in the adapter.
    """
    state = _adapter(model)
    for key, t in state.items():
        if type(t) is not torch.Tensor or t.is_meta:
            raise ValueError(
                f"{key} is on meta or sharded. With FSDP2, save by get_model_state_dict "
                "(full_state_dict=True, ignore_frozen_params=True), and load by "
                "set_model_state_dict (full_state_dict=True, strict=False)")
    return state


def load_hydralora_state_dict(model, state):
    """Copy the adapter into the model, or raise and change nothing. Returns the model."""
    own = hydralora_state_dict(model)
    _require_names("state", state, own)
    for key, t in own.items():
        if state[key].shape != t.shape:
            raise ValueError(f"{key} must be {[*t.shape]}, got {[*state[key].shape]}")
    model.load_state_dict(state, strict=False)  # without the base
    return model


def from_official_state_dict(state):
    """Convert official keys: NAME.lora_A.weight, lora_B0.weight ..., lora_route.weight.

    PEFT's prefix is allowed. Inject with the lora_alpha of the training.
    """
    rest = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    ours = {}
    end = ".lora_route.weight"
    for name in [key.removesuffix(end) for key in rest if key.endswith(end)]:
        Wg = rest.pop(name + end)  # (n, k)
        B = [rest.pop(f"{name}.lora_B{i}.weight") for i in range(len(Wg))]  # each (d, r)
        ours |= {f"{name}.lora_A": rest.pop(f"{name}.lora_A.weight"),
                 f"{name}.lora_B": torch.stack(B), f"{name}.router.weight": Wg}
    if rest:
        raise ValueError(f"not an official HydraLoRA checkpoint: it has {min(rest)}")
    return ours


def export_lora(model, gates):
    """(state, config): a LoRA for PEFT with fixed gates, given as in merge_hydralora.

    Save them as adapter_model.safetensors (or .bin) and adapter_config.json. Where PEFT
    warns about missing keys, as in many MoE models, merge instead.
    """
    hydralora_state_dict(model)  # refuses what is on meta or sharded
    loras = _for_each_layer(model, gates, "to_lora")
    if "" in loras:
        raise ValueError("PEFT needs a name for each layer: export the model around it")
    r = max(len(A) for A, _ in loras.values())
    state = {}
    for name, (A, B) in loras.items():
        prefix = f"base_model.model.{name}"
        pad = r - len(A)
        state[f"{prefix}.lora_A.weight"] = F.pad(A, (0, 0, 0, pad))  # (r, k)
        state[f"{prefix}.lora_B.weight"] = F.pad(B, (0, pad))        # (d, r)
    config = dict(peft_type="LORA", target_modules=[*loras], r=r, lora_alpha=r)
    return state, config  # PEFT scales by lora_alpha / r = 1


# ---- Choosing N, Appendix B ----
def tf_idf(texts):
    """X (documents, terms), with scikit-learn's smoothed idf and rows of norm 1."""
    counts = [Counter(text) for text in texts]
    terms = sorted(set().union(*counts))
    X = torch.tensor([[float(count[term]) for term in terms] for count in counts])
    X *= 1 + torch.log((1 + len(X)) / (1 + (X > 0).sum(0)))  # rare terms weigh more
    return F.normalize(X)


def sse_curve(X, max_centres):
    """The SSE of k-means, sum_i min_j |X_i - C_j|^2, for 1, ..., max_centres centres.

    The paper starts from random centres. We use fast global k-means (Likas et al., 2003):
    it keeps the centres found so far, and adds the document that lowers the SSE most.
    """
    between = torch.cdist(X, X).square()  # (documents, documents)
    C = X.mean(0, keepdim=True)           # (1, terms)
    sse = []
    for n in range(1, max_centres + 1):
        for _ in range(10):  # close to convergence
            squared, owner = torch.cdist(X, C).square().min(1)  # (documents,), Eq. 7
            S = F.one_hot(owner, n).to(X)                       # (documents, n)
            size = S.sum(0)[:, None]                            # (n, 1)
            C = torch.where(size > 0, S.T @ X / size, C)        # (n, terms), Eq. 8
        sse.append(squared.sum().item())
        gain = (squared[:, None] - between).clamp_min(0).sum(0)  # (documents,)
        C = torch.cat([C, X[gain.argmax()][None]])               # (n + 1, terms)
    return sse


def num_heads_from_corpus(documents, max_heads=10):
    """Appendix B: N by TF-IDF, k-means and the elbow of the SSE curve [9].

    documents: a few hundred strings (split at spaces), or token sequences without
    padding. Returns n >= 2, even for one domain, and the SSE of 1, ..., max_heads centres.

    At the elbow, "the rate of decrease in SSE slows down". Our rule: n maximises
    (SSE_{n-1} - SSE_n) / (SSE_n - SSE_{n+1}). It finds the domains if the documents of a
    domain have most of their words in common. For real paragraphs, it is unreliable.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list, got one string")
    texts = [d.split() if isinstance(d, str) else [*map(str, d)] for d in documents]
    texts = [text for text in texts if text]
    if min(len(texts), max_heads) < 2:
        raise ValueError("needs 2 or more documents that have words, and max_heads >= 2")
    sse = sse_curve(tf_idf(texts), max_heads + 1)
    gains = -torch.tensor(sse).diff()  # SSE_{n-1} - SSE_n for n = 2, ..., max_heads + 1
    next_gains = gains[1:].clamp_min(1e-5 * sse[0])  # smaller gains are rounding errors
    return 2 + (gains[:-1] / next_gains).argmax().item(), sse[:max_heads]
