# SPDX-License-Identifier: MIT
"""HydraLoRA in one file: a shared matrix A, n heads B_i, and a router that mixes the heads.

Paper: Tian, Shi, Guo, Li, Xu, "HydraLoRA: An Asymmetric LoRA Architecture for Efficient
Fine-Tuning", NeurIPS 2024, arXiv 2404.19245. Equation numbers are the paper's.

    (1)  y = W0 x + B A x                        LoRA
    (2)  W = W0 + sum_i w_i B_i A                HydraLoRA as one weight, for a fixed w
    (3)  y = W0 x + sum_i w_i B_i A x            HydraLoRA as a layer
    (4)  w = softmax(Wg^T x)                     the router: w depends on each x
    (7)  c_j = argmin_i |v_j - m_i|              k-means: the centre that is nearest to v_j
    (8)  m_i = mean of the v_j with c_j = i      k-means: each centre moves to its mean

    paper  code            shape        what it is
    x      x               (..., k)     input: any leading axes, (b, t, k) in a transformer
    W0     base.weight     (d, k)       frozen weight
    A      lora_A          (r, k)       shared by all heads, Kaiming-uniform at the start
    B_i    lora_B[i]       (d, r)       head (the paper's expert E_i), zero at the start
    N      num_heads, n                 number of heads
    Wg     router.weight   (n, k)       the paper's Wg transposed, as nn.Linear keeps it
    w      gates           (..., n)     one mixture for each token
    -      scaling                      lora_alpha / r, times the update

Where the paper is silent or at odds with the official code, this file does as follows.
    router input   x, as in the paper's text and the official code; router_input="Ax" fits
                   the shape of Wg as printed, (r, N)
    router start   Kaiming-uniform, no bias: official code
    softmax        in float32, cast back: official code
    scaling        lora_alpha / r: official code; the paper's equations have none
    dropout        one mask on x before A for all heads, none for the router; the official
                   code draws a mask for each head
    output         one tensor; the official code returns a pair whose second part is always 0
    balance loss   none: the paper
    targets        the caller's choice: the paper adapts q_proj and v_proj, the official script
                   gate_proj, up_proj and down_proj
    merging        Eq. 2 for gates that the caller names; the official code has none
"""
import contextlib
import copy
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---- The equations (section 3) ---------------------------------------------------------------


def hydralora_gates(x, Wg):
    """Eq. 4: w = softmax(Wg^T x). x (..., k), Wg (n, k), the paper's transposed -> (..., n)."""
    logits = F.linear(x, Wg)                                                  # (..., n)
    w = logits.softmax(-1, dtype=_at_least_float32(logits))                   # (..., n)
    return w.to(logits.dtype)           # float32 inside and cast back, as in the official code


def hydralora_delta(x, A, B, gates, scaling):
    """The update in Eq. 3: scaling * sum_i gates_i B_i A x.

    x (..., k), A (r, k), B (n, d, r), gates (..., n) -> (..., d). By definition it is

        sum(gates[..., i, None] * (x @ A.T @ B[i].T) for i in range(n)) * scaling

    and it is computed as [B_1 ... B_n] outer(w, A x), the outer product flattened to n r
    numbers: one matrix product for all heads, and nothing of size (..., n, d).
    """
    z = F.linear(x, A) * scaling                                              # (..., r)
    wz = gates.unsqueeze(-1) * z.unsqueeze(-2)                                # (..., n, r)
    heads = B.transpose(0, 1).flatten(1)                                      # (d, n r)
    return F.linear(wz.flatten(-2), heads)                                    # (..., d)


def hydralora_forward(x, W0, bias, A, B, Wg, scaling):
    """Eq. 3 with the router of Eq. 4: the layer without dropout and casts, as one function.

    x (..., k), W0 (d, k), bias (d,) or None, A (r, k), B (n, d, r), Wg (n, k) -> (..., d).
    """
    gates = hydralora_gates(x, Wg)                                            # (..., n)
    return F.linear(x, W0, bias) + hydralora_delta(x, A, B, gates, scaling)   # (..., d)


# ---- The layer -------------------------------------------------------------------------------


class Router(nn.Module):
    """Eq. 4 as a module, so that a forward hook sees the gates. x (..., k) -> (..., n)."""

    def __init__(self, k, n, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype))  # Wg
        self.reset_parameters()

    def reset_parameters(self):         # as in the official code; the paper does not say
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x):
        return hydralora_gates(x, self.weight)


class HydraLoRALinear(nn.Module):
    """A frozen nn.Linear with a HydraLoRA update: Eq. 3, x (..., k) -> (..., d).

    base: the nn.Linear (d, k); kept as the same object, and frozen.
    num_heads: n. r: rank of A and of each B_i. lora_alpha: scaling = lora_alpha / r.
    lora_dropout: probability in [0, 1), on the x that A sees. The router sees all of x.
    router_input: "x", or "Ax" to route on the r numbers A x (then router.weight is (n, r)).

    The adapter is made in float32, or float64 for a float64 base, and computes in its own
    dtype (or autocast's); the output has the dtype of the base's output. Raises TypeError for
    a base that is no nn.Linear, ValueError for the other arguments and for x of another width.
    """

    def __init__(self, base, *, num_heads=3, r=8, lora_alpha=16, lora_dropout=0.0,
                 router_input="x"):
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be an nn.Linear, got {type(base).__name__}")
        for name, value in (("num_heads", num_heads), ("r", r)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
        if router_input not in ("x", "Ax"):
            raise ValueError(f"router_input must be 'x' or 'Ax', got {router_input!r}")
        super().__init__()
        k, d = base.in_features, base.out_features
        self.in_features, self.out_features = k, d
        self.num_heads, self.r, self.lora_alpha = num_heads, r, lora_alpha
        self.scaling = lora_alpha / r   # as in the official code; the paper's equations have none
        self.router_input = router_input
        self.base = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(lora_dropout)
        like = dict(device=base.weight.device, dtype=_at_least_float32(base.weight))
        self.lora_A = nn.Parameter(torch.empty(r, k, **like))
        self.lora_B = nn.Parameter(torch.empty(num_heads, d, r, **like))
        self.router = Router(k if router_input == "x" else r, num_heads, **like)
        self.reset_parameters()

    def reset_parameters(self):
        """A Kaiming-uniform and B zero (below Eq. 1), so that the update starts at zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.router.reset_parameters()

    def gates(self, x):
        """The mixture w of Eq. 4 for each token: x (..., k) -> (..., n)."""
        x = x.to(self.lora_A.dtype)                                           # (..., k)
        if self.router_input == "Ax":   # of x without dropout, unlike the A x in hydralora_delta
            x = F.linear(x, self.lora_A)                                      # (..., r)
        return self.router(x)                                                 # (..., n)

    def forward(self, x):
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must have shape (..., {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.lora_A.device:      # an adapter left on meta would give noise
            raise ValueError(f"x must be on {self.lora_A.device}, the adapter's, got {x.device}")
        y = self.base(x)                                                      # (..., d)
        x = x.to(self.lora_A.dtype)                                           # (..., k)
        dropped = self.lora_dropout(x)  # one mask for all heads; the official code draws n
        delta = hydralora_delta(dropped, self.lora_A, self.lora_B, self.gates(x), self.scaling)
        return y + delta.to(y.dtype)    # (..., d), one tensor: no balance loss beside it

    @torch.no_grad()
    def to_lora(self, gates):
        """The LoRA (A, B) of Eq. 1 that equals this layer for fixed gates.

        gates (n,) -> A (r, k), B = sum_i gates_i B_i (d, r), both copies, to be scaled by
        self.scaling. Section 3.2.2: averaging the heads is averaging their outputs.
        """
        dtype = _at_least_float32(self.base.weight)
        gates = torch.as_tensor(gates, device=self.lora_B.device, dtype=dtype)  # (n,)
        if gates.shape != (self.num_heads,):
            raise ValueError(f"gates must have shape ({self.num_heads},), got {tuple(gates.shape)}")
        B = (gates.view(-1, 1, 1) * self.lora_B).sum(0)                       # (d, r)
        return self.lora_A.to(dtype, copy=True), B

    @torch.no_grad()
    def merge(self, gates):
        """Eq. 2: a new nn.Linear with the weight W0 + scaling * sum_i gates_i B_i A.

        gates (n,). Exact for each x to which the router gives these gates: for every x if
        n = 1, if all B_i are equal, or if the router is constant. For any other x the layer
        exceeds the merged one by scaling * sum_i (w_i(x) - gates_i) B_i A x: a static weight
        cannot follow a router. The layer is left as it was; the sum is taken in float32 or
        better and cast once. Raises TypeError if base.weight is quantised or computed from
        other tensors.
        """
        A, B = self.to_lora(gates)
        W0 = self.base.weight
        if (not isinstance(W0, nn.Parameter) or W0.shape != (self.out_features, self.in_features)
                or W0.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
            raise TypeError("base.weight must be a plain floating-point Parameter of shape "
                            f"{(self.out_features, self.in_features)} to be merged, got "
                            f"{type(W0).__name__} {tuple(W0.shape)} of {W0.dtype}")
        merged = copy.deepcopy(self.base)
        # in place, so that autocast leaves it alone
        W = W0.to(A.dtype, copy=True).addmm_(B, A, alpha=self.scaling)        # (d, k)
        merged.weight.copy_(W)
        return merged

    # models read weight.dtype and bias of their linear layers: these are the frozen ones
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return (f"num_heads={self.num_heads}, r={self.r}, lora_alpha={self.lora_alpha}, "
                f"router_input={self.router_input!r}")


def _at_least_float32(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ---- On a model ------------------------------------------------------------------------------


def inject_hydralora(model, targets, **layer_arguments):
    """Freeze the model and wrap the nn.Linear layers that the targets name; returns the model.

    targets: names such as "q_proj" or "layers.0.q_proj"; a layer is meant when its dotted name
    is a target or ends in "." + target. layer_arguments: those of HydraLoRALinear. A layer
    that the model holds under several names gets one adapter, in force under all of them.
    Raises ValueError, with the model as it was, for a target that matches no nn.Linear, that
    is injected already, or that belongs to nn.MultiheadAttention or nn.TransformerEncoderLayer:
    those read the weight and never call the layer. So do models that use their functions; a
    layer that record_gates misses after a forward is one of them.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    adapted = hydralora_layers(model)
    skip = {model, *(layer.base for layer in adapted.values())}
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if isinstance(module, nn.Linear) and module not in skip}

    def meant(names, target):
        return [name for name in names if f".{name}".endswith(f".{target}")]

    for target in targets:
        if meant(adapted, target):
            raise ValueError(f"targets: {target!r} is injected already, "
                             f"at {meant(adapted, target)}")
        if not meant(linears, target):
            raise ValueError(f"targets: {target!r} matches no nn.Linear of the model; it has "
                             + (", ".join(linears) or "none"))
    if not targets:
        raise ValueError("targets must name at least one nn.Linear, got none")
    names = [name for name in linears if any(meant([name], target) for target in targets)]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"targets: {name!r} cannot be adapted, its {type(parent).__name__} "
                             "reads the weight without calling the layer")
    layers = {linears[name]: HydraLoRALinear(linears[name], **layer_arguments) for name in names}
    adapters = {p for layer in adapted.values() for p in layer.parameters()}
    for p in set(model.parameters()) - adapters:
        p.requires_grad_(False)
    _replace(model, layers)
    return model


def hydralora_layers(model):
    """The model's HydraLoRA layers: dict name -> HydraLoRALinear, empty if there is none."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, HydraLoRALinear)}


@contextlib.contextmanager
def record_gates(model):
    """Context manager: a dict name -> gates (..., n) of the last forward inside it, detached.

    It works by hooks, so a model that was compiled and run before must be compiled anew.
    """
    gates = {}
    with contextlib.ExitStack() as hooks:
        for name, layer in _some_layers(model).items():
            def save(router, inputs, w, name=name):
                gates[name] = w.detach()
            hooks.enter_context(layer.router.register_forward_hook(save))
        yield gates


@torch.no_grad()
def mean_gates(model, batches, masks=None):
    """Mean gates over all tokens of calibration inputs: dict name -> (n,), to merge with.

    batches: inputs of the model, each a tensor or a dict of keyword arguments. masks: for each
    batch a tensor (b, t), true where a token counts, such as attention_mask; for models whose
    adapted layers all see these (b, t) tokens. The model runs in eval mode and comes back as
    it was. Raises ValueError if a layer saw no token.
    """
    pairs = zip(batches, masks, strict=True) if masks is not None else (
        (batch, None) for batch in batches)
    layers = _some_layers(model)
    total, count = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            def add(router, inputs, w, name=name):
                w = w if mask is None else w[mask.to(w.device, torch.bool)]
                w = w.reshape(-1, w.shape[-1])                                # (tokens, n)
                total[name] += w.float().sum(0)                               # (n,)
                count[name] += len(w)
            stack.enter_context(layer.router.register_forward_hook(add))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for batch, mask in pairs:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    unseen = [name for name in layers if not count[name]]
    if unseen:
        raise ValueError(f"batches: no token reached {unseen}")
    return {name: total[name] / count[name] for name in layers}


def merge_hydralora(model, gates):
    """Put layer.merge(gates) in the place of each HydraLoRA layer; returns the layers by name.

    gates: one tensor (n,) for all layers, or a dict name -> (n,) with every layer in it, such
    as mean_gates gives. No default: see HydraLoRALinear.merge for what the choice means. Raises
    ValueError or TypeError, with the model as it was.
    """
    layers, gates = _layers_and_gates(model, gates)
    _replace(model, {layer: layer.merge(gates[name]) for name, layer in layers.items()})
    return layers


def unmerge_hydralora(model, layers):
    """Put back the layers that merge_hydralora returned: every weight is what it was, bit for bit.

    The layers come back in the mode (train or eval) of what stood in for them.
    """
    modules = dict(model.named_modules())
    wrong = [name for name in layers if not isinstance(modules.get(name), nn.Linear)]
    if wrong:
        raise ValueError(f"layers: the model has no merged nn.Linear at {wrong}")
    _replace(model, {modules[name]: layer.train(modules[name].training)
                     for name, layer in layers.items()})


def _replace(model, new):
    """Put new[module] in the place of each module, under every name that holds it."""
    if model in new:
        raise ValueError("model is itself the layer: it has no parent in which to replace it")
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def _some_layers(model):
    layers = hydralora_layers(model)
    if not layers:
        raise ValueError("model has no HydraLoRALinear: not injected, or merged already")
    return layers


def _layers_and_gates(model, gates):
    """The layers by name, and the gates, one tensor (n,) or a dict, by the same names."""
    layers = _some_layers(model)
    if not isinstance(gates, Mapping):
        return layers, dict.fromkeys(layers, gates)
    if gates.keys() != layers.keys():
        raise ValueError(f"gates: missing layers {sorted(layers.keys() - gates.keys())}, "
                         f"unknown layers {sorted(gates.keys() - layers.keys())}")
    return layers, gates


# ---- In and out ------------------------------------------------------------------------------


def hydralora_state_dict(model):
    """The adapter alone: NAME.lora_A (r, k), NAME.lora_B (n, d, r), NAME.router.weight (n, k or r).

    As in nn.Module.state_dict, the tensors are the model's own, without copies.
    """
    return {f"{name}.{key}": value for name, layer in _some_layers(model).items()
            for key, value in layer.state_dict().items() if not key.startswith("base.")}


@torch.no_grad()
def load_hydralora_state_dict(model, state):
    """Copy an adapter into an injected model.

    The state must have the model's keys and shapes, else ValueError names those that differ
    and nothing is copied. lora_alpha and router_input are arguments of inject_hydralora and
    not in the state.
    """
    own = hydralora_state_dict(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{key}: expected {tuple(own[key].shape)}, got {tuple(state[key].shape)}"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"state does not fit the model: missing {missing}, unexpected "
                         f"{unexpected}, wrong shapes {sorted(shapes)}")
    for key, value in own.items():
        value.copy_(state[key])


def from_official_state_dict(state):
    """The official repository's checkpoint keys, with or without its prefix, to ours.

    NAME.lora_A.weight (r, k), NAME.lora_B0.weight ... (d, r), NAME.lora_route.weight (n, k) ->
    NAME.lora_A, NAME.lora_B (n, d, r), NAME.router.weight. Raises ValueError for any other key
    and for a layer that is not complete.
    """
    layers = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B\d+|route)\.weight", key)
        if not match:
            raise ValueError(f"state: {key!r} is no key of an official HydraLoRA checkpoint")
        layers.setdefault(match[1], {})[match[2]] = value
    ours = {}
    for name, parts in layers.items():
        heads = [f"B{i}" for i in range(len(parts) - 2)]
        if not heads or parts.keys() != {"A", "route", *heads}:
            raise ValueError(f"state: {name!r} needs lora_A, lora_route and lora_B0, lora_B1, ..., "
                             f"got {sorted('lora_' + part for part in parts)}")
        ours |= {f"{name}.lora_A": parts["A"], f"{name}.router.weight": parts["route"],
                 f"{name}.lora_B": torch.stack([parts[head] for head in heads])}  # (n, d, r)
    return ours


def export_lora(model, gates):
    """A plain LoRA of rank r for fixed gates, under PEFT's names: (state, config).

    gates as for merge_hydralora. state: tensors by key, for adapter_model.safetensors. config:
    adapter_config.json as a dict. target_modules is a pattern that matches whole names, so that
    no layer is adapted there but those that are here.
    """
    layers, gates = _layers_and_gates(model, gates)
    state = {}
    for name, layer in layers.items():
        A, B = layer.to_lora(gates[name])
        state[f"base_model.model.{name}.lora_A.weight"] = A                   # (r, k)
        state[f"base_model.model.{name}.lora_B.weight"] = B                   # (d, r)
    first = next(iter(layers.values()))
    config = dict(
        peft_type="LORA", r=first.r, lora_alpha=first.lora_alpha,
        target_modules="|".join(map(re.escape, layers)),
        rank_pattern={f"^{re.escape(name)}": layer.r for name, layer in layers.items()},
        alpha_pattern={f"^{re.escape(name)}": layer.lora_alpha for name, layer in layers.items()})
    return state, config


# ---- Choosing n (Appendix B) -----------------------------------------------------------------


def num_heads_from_corpus(documents, max_heads=10, seed=0):
    """Appendix B: n from the corpus alone, by TF-IDF, k-means and the elbow of the SSE curve.

    documents: sequences of token ids or of strings; a document that is one string is split at
    white space. Returns (n, sse): sse[K - 1] is the sum of squared distances to the nearest of
    K centres, K = 1 .. max_heads. The paper names the elbow and no rule for it; here it is the
    K whose gain, sse(K-1) - sse(K), exceeds that of every later K by the largest factor. Any
    curve has such a K, so it counts only if it is 1.5 times as sharp as that of a control: the
    same tokens dealt out to the documents at random. Otherwise the corpus shows no domains, or
    more than max_heads, and n is 1, a plain LoRA. Very short documents (below 10 tokens or so)
    show too little. Deterministic for a seed. Memory: documents x vocabulary. Raises ValueError
    for fewer documents than max_heads.
    """
    documents = [d.split() if isinstance(d, str) else d.tolist()
                 if isinstance(d, torch.Tensor) else list(d) for d in documents]
    if not 1 <= max_heads <= len(documents):
        raise ValueError(f"max_heads must be from 1 to the number of documents, "
                         f"{len(documents)}, got {max_heads}")
    dealt = [token for d in documents for token in d]
    random.Random(seed).shuffle(dealt)
    control = [[dealt.pop() for _ in d] for d in documents]
    n, sharpness, sse = _elbow(documents, max_heads, seed)
    _, chance, _ = _elbow(control, max_heads, seed)
    return (n if sharpness > 1.5 * chance else 1), sse


def _elbow(documents, max_heads, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = _tf_idf(documents)
    largest = min(max_heads + 3, len(documents))        # max_heads, and 3 later gains to exceed
    sse = [_k_means_sse(vectors, K, generator) for K in range(1, largest + 1)]
    gains = [before - after for before, after in zip(sse, sse[1:])]           # gains[K - 2] at K
    floor = max(1e-6 * sse[0], 1e-12)                   # rounding alone is no gain
    sharpness = {K: gains[K - 2] / max([*gains[K - 1:], floor]) for K in range(2, max_heads + 1)}
    n = max(sharpness, key=sharpness.get, default=1)
    return n, sharpness.get(n, 0.0), sse[:max_heads]


def _tf_idf(documents):
    """A unit row for each document: its counts times 1 + log((1 + documents) / (1 + with term))."""
    column = {}
    index = [[column.setdefault(token, len(column)) for token in d] for d in documents]
    counts = torch.stack([torch.bincount(torch.tensor(i, dtype=torch.long), minlength=len(column))
                          for i in index]).float()                            # (documents, terms)
    idf = torch.log((1 + len(documents)) / (1 + (counts > 0).float().sum(0))) + 1
    return F.normalize(counts * idf, dim=1)                                   # (documents, terms)


def _k_means_sse(vectors, K, generator, starts=8, steps=30):
    """The least sum of squared distances over several k-means runs, run side by side."""
    def squared_distances(centres):     # (starts K, terms) -> (docs, starts, K)
        return torch.cdist(vectors, centres).square().unflatten(1, (starts, -1))
    pick = torch.randint(len(vectors), (starts, 1), generator=generator)      # (starts, 1)
    for _ in range(K - 1):              # k-means++: far documents are likelier to be centres
        nearest = squared_distances(vectors[pick.flatten()]).amin(2) + 1e-12  # (docs, starts)
        pick = torch.cat([pick, torch.multinomial(nearest.T, 1, generator=generator)], dim=1)
    centres = vectors[pick.flatten()]                                         # (starts K, terms)
    for _ in range(steps):
        owner = squared_distances(centres).argmin(2)                      # Eq. 7: (docs, starts)
        members = F.one_hot(owner, K).flatten(1).T.float()                    # (starts K, docs)
        size = members.sum(1, keepdim=True)                                   # (starts K, 1)
        centres = torch.where(size > 0, members @ vectors / size, centres)    # Eq. 8
    return squared_distances(centres).amin(2).sum(0).min().item()


# ---- A model to try it on --------------------------------------------------------------------


@dataclass
class TinyConfig:
    vocab_size: int = 64
    max_position_embeddings: int = 64   # longest sequence
    hidden_size: int = 64               # k and d of the attention projections
    intermediate_size: int = 256        # width inside the feed-forward layer
    num_hidden_layers: int = 2
    num_attention_heads: int = 4


class TinyTransformer(nn.Module):
    """A GPT-style decoder: tokens (b, t) -> logits (b, t, vocab_size), pre-norm, causal."""

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
        h = self.token_embedding(tokens) + self.position_embedding(positions)  # (b, t, k)
        for layer in self.layers:
            h = layer(h)                                                      # (b, t, k)
        return self.lm_head(self.norm(h))                                     # (b, t, vocab_size)


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        k, inner = config.hidden_size, config.intermediate_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(k), nn.LayerNorm(k)
        self.q_proj, self.k_proj = nn.Linear(k, k, bias=False), nn.Linear(k, k, bias=False)
        self.v_proj, self.o_proj = nn.Linear(k, k, bias=False), nn.Linear(k, k, bias=False)
        self.up_proj, self.down_proj = nn.Linear(k, inner), nn.Linear(inner, k)

    def forward(self, h):
        x = self.attention_norm(h)                                            # (b, t, k)
        q, k, v = (proj(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))   # (b, heads, t, k / heads)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)       # (b, heads, t, k / heads)
        h = h + self.o_proj(a.transpose(1, 2).flatten(2))                     # (b, t, k)
        return h + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(h))))     # (b, t, k)
