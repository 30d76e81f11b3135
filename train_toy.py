# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""Do the heads of HydraLoRA specialise, is it better than a LoRA of its size, what does merging cost?

    python train_toy.py             the experiment, below a minute on two CPU cores
    python train_toy.py --paper     every claim of the paper that a toy can test, about six minutes
    python train_toy.py --cost      time and memory of the layer, half a minute
    python train_toy.py --tune      the search for the learning rates, about forty minutes

The first gives 98.0 % for HydraLoRA, 96.8 % for a LoRA of its size, and NMI 0.50 in the second layer.

The corpus: DOMAINS domains, each with its own distribution over SYMBOLS symbols and its own
cipher, a permutation of the symbols. A sequence is LENGTH symbols of one domain, a separator,
and the same symbols enciphered. Domains look different and conflict: the same symbol must
become another one in each. No label says which domain a sequence is from. The transformer is
pre-trained with one set of ciphers and frozen; adapters learn a new set. Fairness: all methods
see the same batches in the same order, for the same steps, with the same schedule, scaling
(lora_alpha = 2 r) and search for the learning rate.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hydralora_layers, inject_hydralora,
    mean_gates, merge_hydralora, num_heads_from_corpus, record_gates, unmerge_hydralora)

DOMAINS, SYMBOLS, LENGTH = 4, 24, 10
BATCH, PRETRAIN_STEPS, STEPS, EVALUATION = 64, 600, 600, 2000    # the last in sequences
TARGETS, RANK = ("o_proj",), 8
# what --paper varies, with learning rates: the place (HydraLoRA's and LoRA's), the number of heads,
# and the share of labels that LoRA-Split keeps, the others being drawn at random
PLACES = {"q,v": (("q_proj", "v_proj"), 1e-2, 2e-2), "up,down": (("up_proj", "down_proj"), 2e-2, 2e-2)}
HEADS = {2: 4e-2, 3: 4e-2, 6: 2e-2, 8: 4e-2}
PURITIES = {0.95: 8e-2, 0.9: 8e-2, 0.8: 4e-2, 0.5: 4e-2, 0: 4e-2}
# --check asks that HydraLoRA is ahead of LoRA at its size, and that in one layer the NMI of domain and head
MIN_NMI = 0.2                   # is at least this, twice an untrained router's,
MIN_NMI_OVER_SYMBOL = 0.1       # and exceeds by this what the symbol alone gives: sorting symbols is no domain
MAX_NMI_SHUFFLED = 0.02         # and in every layer at most this with shuffled labels: the estimate's bias is less


# ---- Corpus ----------------------------------------------------------------------------------


class Corpus:
    """Symbols 0 .. SYMBOLS - 1, and SYMBOLS as the separator. Everything follows from the seed."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.seed = seed
        dirichlet = torch.distributions.Dirichlet(torch.full((SYMBOLS,), 0.3))
        self.symbols = dirichlet.sample((DOMAINS,))                         # (domains, symbols)
        self.old, self.new = (torch.stack([torch.randperm(SYMBOLS) for _ in range(DOMAINS)])
                              for _ in range(2))                            # (domains, symbols)

    def sample(self, count, stream, ciphers):
        """tokens (count, 2 LENGTH + 1) and the domain of each (count,), which stays hidden."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        domain = torch.randint(DOMAINS, (count,), generator=generator)
        plain = torch.multinomial(self.symbols[domain], LENGTH, replacement=True, generator=generator)
        separator = torch.full((count, 1), SYMBOLS)
        return torch.cat([plain, separator, ciphers[domain[:, None], plain]], dim=1), domain

    def bayes_accuracy(self, tokens):
        """The limit for any method without labels: the best guess under the domain's posterior,
        given the plain symbols and the enciphered ones so far."""
        plain, cipher = tokens[:, :LENGTH], tokens[:, LENGTH + 1:]          # (count, LENGTH)
        by_domain = self.new[:, plain]                                      # (domains, count, LENGTH)
        log_p = self.symbols.double().log()[:, plain]                       # (domains, count, LENGTH)
        match = torch.where(by_domain == cipher, 0.0, -torch.inf).cumsum(2).roll(1, 2)
        match[..., 0] = 0                                                   # nothing seen as yet
        posterior = (log_p.sum(2, keepdim=True) + match).softmax(0)         # (domains, count, LENGTH)
        votes = torch.einsum("dcl,dcls->cls", posterior, F.one_hot(by_domain, SYMBOLS).double())
        return (votes.argmax(2) == cipher).double().mean().item()


# ---- Methods: all made of HydraLoRALinear ----------------------------------------------------


class FixedGates(nn.Module):
    """1/n for every head: LoRA where n = 1, else the ablation "w/o gate" of Figure 6."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x.new_full((*x.shape[:-1], self.n), 1 / self.n)


class LabelGates(nn.Module):
    """One head for each domain, named by a label for each sequence; see set_labels."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return F.one_hot(self.labels, self.n).to(x).unsqueeze(1).expand(*x.shape[:-1], self.n)


class WholeLoRAs(HydraLoRALinear):
    """Several LoRAs with an A each, mixed: sum_i w_i B_i A_i x. lora_A is (n r, k)."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(torch.empty(self.num_heads * self.r, base.in_features))
        self.reset_parameters()

    def forward(self, x):
        z = F.linear(x, self.lora_A).unflatten(-1, (self.num_heads, self.r))    # (..., n, r)
        wz = self.gates(x).unsqueeze(-1) * z * self.scaling                     # (..., n, r)
        heads = self.lora_B.transpose(0, 1).flatten(1)                          # (d, n r)
        return self.base(x) + F.linear(wz.flatten(-2), heads)                   # (..., d)


def adapt(pretrained, seed, *, n=1, r=RANK, gates="router", whole=False, same_A=False, targets=TARGETS,
          **arguments):
    """A copy of the model with adapters. gates: "router", "fixed" or "labels". Methods of one
    rank start from one A; with same_A, all the LoRAs of `whole` do."""
    model = copy.deepcopy(pretrained).cpu()
    arguments |= dict(num_heads=n, r=r, lora_alpha=2 * r)
    inject_hydralora(model, targets, **arguments)
    for i, (name, layer) in enumerate(hydralora_layers(model).items()):
        if whole:
            layer = WholeLoRAs(layer.base, **arguments)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        torch.manual_seed(1000 * seed + i)
        layer.reset_parameters()
        if same_A:
            layer.lora_A.data.copy_(layer.lora_A[:r].repeat(n, 1))
        if gates != "router":
            layer.router = FixedGates(n) if gates == "fixed" else LabelGates(n)
    return model


def methods_for(e, n):
    """Everything that is compared: name -> arguments of Experiment.run. Each learning rate is the one with
    the best mean accuracy in --tune."""
    def rank(targets=TARGETS):          # of the LoRA that has HydraLoRA's size
        return equal_rank(adapt(e.model, e.seed, n=n, targets=targets))

    hydra, lora, split = dict(n=n), dict(gates="fixed"), dict(n=DOMAINS, whole=True, gates="labels")
    methods = {
        "lora_equal": lora | dict(r=rank(), lr=4e-2),
        "lora_large": lora | dict(r=max(n, 2) * RANK, lr=2e-2),
        "hydralora": hydra | dict(lr=4e-2),
        "lora_split_labels": split | dict(purity=1, lr=8e-2),
        "w/o hydra": hydra | dict(whole=True, lr=2e-2),
        # n A and n B of this rank have at most the size of one A and n B of RANK, where k = d
        "w/o hydra, small": hydra | dict(whole=True, r=RANK * (n + 1) // (2 * n), lr=4e-2),
        "w/o gate": hydra | dict(gates="fixed", lr=4e-2),
        "w/o MoE": lora | dict(lr=4e-2),
        "Ax": hydra | dict(router_input="Ax", lr=4e-2),
        "split same A": split | dict(purity=1, same_A=True, lr=8e-2)}
    methods |= {f"n={heads}": dict(n=heads, lr=lr) for heads, lr in HEADS.items()}
    methods |= {f"split {purity}": split | dict(purity=purity, lr=lr) for purity, lr in PURITIES.items()}
    for place, (targets, lr_hydra, lr_lora) in PLACES.items():
        methods[f"hydra on {place}"] = hydra | dict(targets=targets, lr=lr_hydra)
        methods[f"lora on {place}"] = lora | dict(targets=targets, r=rank(targets), lr=lr_lora)
    return methods


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def equal_rank(model):
    """The least rank at which a LoRA has at least as many parameters as this model's adapter."""
    per_rank = sum(m.in_features + m.out_features for m in hydralora_layers(model).values())
    return math.ceil(trainable(model) / per_rank)


# ---- Training and evaluation -----------------------------------------------------------------


def progress(text, last=False):
    """One line rewritten in place on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{'' if last else text:<70}\r", end="", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)


def train(model, tokens, lr, device, what, from_position=LENGTH, labels=None):
    """AdamW with OneCycle on next-token loss; tokens (steps, BATCH, length). Returns ms a step."""
    model.to(device).train()
    tokens, labels = tokens.to(device), None if labels is None else labels.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(tokens))
    start = time.perf_counter()
    for step, batch in enumerate(tokens):
        set_labels(model, None if labels is None else labels[step])
        logits = model(batch[:, :-1])[:, from_position:]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1 + from_position:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress(f"{what}: step {step} of {len(tokens)}, loss {loss.item():.3f}")
    loss, seconds = loss.item(), time.perf_counter() - start    # item() waits for a GPU
    progress(f"{what}: {len(tokens)} steps in {seconds:.1f} s, loss {loss:.3f}", last=True)
    return 1000 * seconds / len(tokens)


def set_labels(model, labels):
    for module in model.modules():
        if isinstance(module, LabelGates):
            module.labels = labels


@torch.no_grad()
def logits_of(model, tokens, labels=None):
    """Logits at the positions that predict enciphered symbols: (count, LENGTH, vocabulary)."""
    device = next(model.parameters()).device
    set_labels(model.eval(), None if labels is None else labels.to(device))
    return model(tokens[:, :-1].to(device))[:, LENGTH:].cpu()


def accuracy(logits, tokens, domain):
    """Share of enciphered symbols that are right: on all sequences, and by domain."""
    right = (logits.argmax(-1) == tokens[:, LENGTH + 1:]).double().mean(1)
    return right.mean().item(), [right[domain == t].mean().item() for t in range(DOMAINS)]


class Experiment:
    """Corpus, pre-trained model and data for one seed; `run` fine-tunes one method on them."""

    def __init__(self, seed, device):
        self.seed, self.device, self.corpus = seed, device, Corpus(seed)
        c = self.corpus
        torch.manual_seed(seed)
        self.model = TinyTransformer(TinyConfig(
            vocab_size=SYMBOLS + 1, max_position_embeddings=2 * LENGTH))
        tokens, _ = c.sample(PRETRAIN_STEPS * BATCH, 0, c.old)
        train(self.model, tokens.unflatten(0, (-1, BATCH)), 3e-3, device, "pre-training", from_position=0)
        self.train_tokens, self.train_domain = (
            t.unflatten(0, (STEPS, BATCH)) for t in c.sample(STEPS * BATCH, 1, c.new))
        self.tokens, self.domain = c.sample(EVALUATION, 2, c.new)
        self.bayes = c.bayes_accuracy(self.tokens)
        self.frozen, _ = accuracy(logits_of(self.model, self.tokens), self.tokens, self.domain)

    def run(self, what, lr, purity=None, **method):
        """purity: with it the method gets labels, each replaced with chance 1 - purity by a
        random one, in training and in evaluation alike."""
        model = adapt(self.model, self.seed, **method)
        noisy = lambda domain, stream: None if purity is None else noisy_labels(
            domain, purity, 1000 * self.seed + stream)
        ms = train(model, self.train_tokens, lr, self.device, what, labels=noisy(self.train_domain, 3))
        overall, per_task = accuracy(logits_of(model, self.tokens, noisy(self.domain, 4)), self.tokens, self.domain)
        return model, dict(trainable=trainable(model), accuracy=overall, per_task=per_task, ms_per_step=ms)

    def closed(self, result, lora):
        """Share of the way from a LoRA's accuracy to the Bayes limit that a result goes."""
        return (result["accuracy"] - lora["accuracy"]) / (self.bayes - lora["accuracy"])


def noisy_labels(domain, purity, seed):
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(domain.shape, generator=generator) >= purity
    return torch.where(wrong, torch.randint(DOMAINS, domain.shape, generator=generator), domain)


# ---- Specialisation --------------------------------------------------------------------------


def gates_of(model, tokens):
    """Gates of each layer where enciphered symbols are predicted: name -> (count, LENGTH, n)."""
    with record_gates(model) as gates:
        logits_of(model, tokens)
    return {name: w[:, LENGTH:].cpu() for name, w in gates.items()}


def by_domain(gates, domain):
    """Mean gates: (count, LENGTH, n) -> (domains, n)."""
    return torch.stack([gates[domain == t].flatten(0, 1).mean(0) for t in range(DOMAINS)])


def nmi(gates, domain):
    """2 I(domain; head) / (H(domain) + H(head)), each token drawing its head from its gates.

    0: the gates say nothing of the domain. 1: one head for each domain, with certainty. In between, a
    router that only sorts symbols gets a share too, since some symbols are frequent in one domain alone.
    """
    share = torch.bincount(domain, minlength=DOMAINS).double() / len(domain)
    joint = by_domain(gates, domain).double() * share[:, None]              # (domains, n)
    entropy = lambda p: -torch.xlogy(p, p).sum().item()
    H_domain, H_head = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (H_domain + H_head - entropy(joint)) / (H_domain + H_head)


def of_symbol_alone(gates, plain):
    """The gates (count, LENGTH, n) as far as they follow from the symbol to be enciphered: its mean."""
    which = F.one_hot(plain, SYMBOLS).to(gates)                             # (count, LENGTH, symbols)
    mean = torch.einsum("cls,cln->sn", which, gates) / which.sum((0, 1))[:, None]
    return mean[plain]                                                      # (count, LENGTH, n)


def knockout(model, name, x, domain, per_task):
    """Accuracy lost on domain t when head h of one layer is removed and the gates renormalised."""
    layer = hydralora_layers(model)[name]
    lost = []
    for head in range(layer.num_heads):
        def without(router, inputs, w):
            rest = w * (torch.arange(w.shape[-1], device=w.device) != head)
            return rest / rest.sum(-1, keepdim=True).clamp_min(1e-9)
        with layer.router.register_forward_hook(without):
            left = accuracy(logits_of(model, x), x, domain)[1]
        lost.append([before - after for before, after in zip(per_task, left)])
    return [list(row) for row in zip(*lost)]                                # domain by head


def distance(matrices):
    """Mean of 1 - cosine over pairs of n matrices: 0 if they are alike, 1 if orthogonal."""
    rows = F.normalize(matrices.detach().flatten(1), dim=1)                 # (n, entries)
    n = len(rows)
    return ((n * n - (rows @ rows.T).sum()) / max(n * (n - 1), 1)).item()


# ---- Merging ---------------------------------------------------------------------------------


def merged(model, gates, tokens):
    """Logits of the model with its adapters merged for these gates; the model comes back as it was."""
    layers = merge_hydralora(model, gates)
    logits = logits_of(model, tokens)
    unmerge_hydralora(model, layers)
    return logits


def held(model, gates, tokens):
    """Logits of the model, not merged, with every router's output replaced by these gates."""
    with contextlib.ExitStack() as hooks:
        for name, layer in hydralora_layers(model).items():
            hooks.enter_context(layer.router.register_forward_hook(
                lambda router, inputs, w, name=name: gates[name].expand_as(w)))
        return logits_of(model, tokens)


def merge_in_each_way(e, model):
    """name -> (accuracy, relative error of the logits) for each way to merge, and the relative
    difference between merging for the mean gates and holding the routers at them."""
    calibration, domain = e.corpus.sample(1000, 5, e.corpus.new)
    inputs, mask = calibration[:, :-1].to(e.device), (torch.arange(2 * LENGTH) >= LENGTH).expand(1000, -1)
    gates_for = lambda chosen: mean_gates(model, [inputs[chosen.to(e.device)]], [mask[chosen]])
    routed, mean = logits_of(model, e.tokens), gates_for(domain >= 0)
    per_task = torch.empty_like(routed)
    for t in range(DOMAINS):
        per_task[e.domain == t] = merged(model, gates_for(domain == t), e.tokens[e.domain == t])
    uniform = {name: torch.full_like(w, 1 / len(w)) for name, w in mean.items()}
    logits = dict(routed=routed, mean=merged(model, mean, e.tokens), per_task=per_task,
                  uniform=merged(model, uniform, e.tokens))
    error = lambda y, expected: ((y - expected).norm() / expected.norm()).item()
    return ({name: (accuracy(y, e.tokens, e.domain)[0], error(y, routed)) for name, y in logits.items()},
            error(logits["mean"], held(model, mean, e.tokens)))


# ---- The experiment, section by section ------------------------------------------------------


def choose_heads(e):
    n, sse = num_heads_from_corpus(e.train_tokens.flatten(0, 1)[:600].tolist(), seed=e.seed)
    print(f"\n1. How many heads? TF-IDF, k-means and elbow on 600 training sequences, no labels: n = {n}")
    print("   SSE for 1, 2, ... centres: " + " ".join(f"{s:.0f}" for s in sse))
    return n, sse


def compare_methods(e, n):
    plan, models, methods = methods_for(e, n), {}, {}
    labels = dict(
        lora_equal=f"LoRA r={plan['lora_equal']['r']}", lora_large=f"LoRA r={plan['lora_large']['r']}",
        hydralora=f"HydraLoRA r={RANK} n={n}", lora_split_labels=f"LoRA-Split {DOMAINS} x r={RANK}, uses labels")
    for name, label in labels.items():
        models[name], methods[name] = e.run(label, **plan[name])
    print("\n2. Fine-tuning on new ciphers: accuracy on the enciphered symbols, in percent")
    print(f"   {'method':<32}{'trainable':>10}{'all':>8}  "
          + "".join(f"{f'dom. {t}':>8}" for t in range(DOMAINS)) + f"{'ms/step':>9}")
    for name, m in methods.items():
        print(f"   {labels[name]:<32}{m['trainable']:>10,}{100 * m['accuracy']:>8.2f}  "
              + "".join(f"{100 * a:>8.2f}" for a in m["per_task"]) + f"{m['ms_per_step']:>9.1f}")
    print(f"   {'no adapter':<42}{100 * e.frozen:>8.2f}\n   {'Bayes limit without labels':<42}{100 * e.bayes:>8.2f}")
    gain = methods["hydralora"]["accuracy"] - methods["lora_equal"]["accuracy"]
    closed = e.closed(methods["hydralora"], methods["lora_equal"])
    print(f"   HydraLoRA against LoRA at its size: {100 * gain:+.1f} points, {closed:.0%} of the way to the limit.")
    return models["hydralora"], methods


def specialisation(e, model, per_task):
    gates = gates_of(model, e.tokens)
    start = adapt(e.model, e.seed, n=next(iter(gates.values())).shape[-1]).to(e.device)
    untrained, plain = gates_of(start, e.tokens), e.tokens[:, :LENGTH]
    shuffled = e.domain[torch.randperm(len(e.domain), generator=torch.Generator().manual_seed(e.seed))]
    scores = {name: dict(trained=nmi(w, e.domain), symbol=nmi(of_symbol_alone(w, plain), e.domain),
                         untrained=nmi(untrained[name], e.domain), shuffled=nmi(w, shuffled),
                         distance=distance(hydralora_layers(model)[name].lora_B)) for name, w in gates.items()}
    best = max(scores, key=lambda name: scores[name]["trained"] - scores[name]["symbol"])
    table, lost = by_domain(gates[best], e.domain).tolist(), knockout(model, best, e.tokens, e.domain, per_task)
    heads = "".join(f"{f'head {i}':<16}" for i in range(len(table[0]))).rstrip()
    print("\n3. Do the heads specialise? NMI of domain and head: 0, gates say nothing of it; 1, one head for each")
    print(f"   {'layer':<17}{'trained':>9}{'from the symbol alone':>23}{'untrained router':>18}"
          f"{'shuffled labels':>17}{'distance of heads':>19}")
    for name, score in scores.items():
        print(f"   {name:<17}{score['trained']:>9.3f}{score['symbol']:>23.3f}{score['untrained']:>18.3f}"
              f"{score['shuffled']:>17.4f}{score['distance']:>19.2f}")
    print("   Distance of heads: mean 1 - cosine of two heads; at the start all are zero, hence equal.")
    print(f"\n   Mean gates in {best}\n{'':15}{heads}")
    for t, row in enumerate(table):
        print(f"     domain {t}  " + "".join(f"{v:.2f} {'#' * round(10 * v):<11}" for v in row).rstrip())
    print(f"\n   Accuracy lost, in points, when a head of {best} is removed\n{'':15}{heads}")
    for t, row in enumerate(lost):
        print(f"     domain {t}  " + "".join(f"{100 * v:<16.2f}" for v in row).rstrip())
    return dict(nmi={name: score["trained"] for name, score in scores.items()},
                nmi_shuffled=max(score["shuffled"] for score in scores.values()), scores=scores, layer=best,
                gates={name: by_domain(w, e.domain).tolist() for name, w in gates.items()}, knockout=lost)


def merging(e, model):
    report, exact = merge_in_each_way(e, model)
    print("\n4. Merging into plain linear layers: accuracy in percent, relative error of the logits")
    for name, meaning in (("routed", "not merged: each token has its own mixture"),
                          ("mean", "merged once, with the mean gates of 1000 other sequences"),
                          ("per_task", "merged for each domain, with the domain's mean gates (uses labels)"),
                          ("uniform", "merged once, with 1/n for each head")):
        print(f"   {name:<10}{100 * report[name][0]:>8.2f}{report[name][1]:>9.3f}   {meaning}")
    print(f"   Exact for gates that are fixed (merged, against routers held at the mean gates: {exact:.0e}), "
          "not for gates that vary.")
    return report


def main_run(seed, heads, device):
    """Prints the story, returns everything measured."""
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {seed}, device {device}, adapters on {', '.join(TARGETS)}")
    e = Experiment(seed, device)
    n, sse = choose_heads(e)
    if heads is not None:
        n = heads
        print(f"   --heads: n = {n}")
    model, methods = compare_methods(e, n)
    found = specialisation(e, model, methods["hydralora"]["per_task"])
    report = merging(e, model)

    score = found["scores"][found["layer"]]
    specialized = (score["trained"] >= MIN_NMI and score["trained"] - score["symbol"] >= MIN_NMI_OVER_SYMBOL
                   and found["nmi_shuffled"] <= MAX_NMI_SHUFFLED)
    ahead = methods["hydralora"]["accuracy"] > methods["lora_equal"]["accuracy"]
    print(f"\nVerdict: the heads {'specialise' if specialized else 'do NOT specialise'} (NMI {score['trained']:.2f} in "
          f"{found['layer']}), HydraLoRA is {'ahead of' if ahead else 'NOT ahead of'} LoRA at its size.")
    return dict(
        config=dict(seed=seed, device=device, targets=TARGETS, r=RANK, steps=STEPS, batch=BATCH),
        num_heads=n, sse=sse, bayes_accuracy=e.bayes, frozen_accuracy=e.frozen,
        closed=e.closed(methods["hydralora"], methods["lora_equal"]),
        methods=methods, specialization=found, merge={name: a for name, (a, _) in report.items()},
        merge_error={name: error for name, (_, error) in report.items()},
        specialized=specialized, passed=specialized and ahead)


# ---- --paper ---------------------------------------------------------------------------------


def paper_runs(seed, device):
    """Every number that the table needs, for one seed."""
    e, models, results = Experiment(seed, device), {}, {}
    for name, arguments in methods_for(e, DOMAINS).items():
        models[name], results[name] = e.run(f"seed {seed}, {name}", **arguments)
    got = {name: 100 * result["accuracy"] for name, result in results.items()}
    got |= {f"size {name}": result["trainable"] for name, result in results.items()}
    got["closed"] = 100 * e.closed(results["hydralora"], results["lora_equal"])
    for place, hydra, lora in [("o", "hydralora", "lora_equal"), *(
            (place, f"hydra on {place}", f"lora on {place}") for place in PLACES)]:
        got[f"gain on {place}"] = got[hydra] - got[lora]
        got[f"nmi on {place}"] = max(nmi(w, e.domain) for w in gates_of(models[hydra], e.tokens).values())
    for name in ("split same A", "lora_split_labels"):
        layers = hydralora_layers(models[name]).values()
        for part, matrices in (("A", lambda m: m.lora_A.unflatten(0, (DOMAINS, -1))), ("B", lambda m: m.lora_B)):
            got[f"cosine of {part}, {name}"] = statistics.mean(1 - distance(matrices(m)) for m in layers)
    got["spread w/o gate"] = max((m.lora_B - m.lora_B[:1]).abs().max().item()
                                 for m in hydralora_layers(models["w/o gate"]).values())
    for name, (a, _) in merge_in_each_way(e, models["hydralora"])[0].items():
        got[f"merged {name}"] = 100 * a
    return got


def for_each_seed(function, seeds, device):
    """function(seed, device) of each seed, in as many processes as there are cores."""
    with ProcessPoolExecutor(min(len(seeds), os.cpu_count()), multiprocessing.get_context("spawn"),
                             torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, seeds, itertools.repeat(device)))


def percent_of_llama(heads, router):
    """%Param of Tables 2 and 3: q_proj and v_proj of LLaMA2-7B, 32 layers of 4096 x 4096, r = 8."""
    m = HydraLoRALinear(nn.Linear(4096, 4096, bias=False, device="meta"), r=8, num_heads=heads)
    return 100 * 64 * (m.lora_A.numel() + m.lora_B.numel() + router * m.router.weight.numel()) / 6_738_415_616


def paper(seeds, device):
    """One row a claim. Reproduced is True if it holds for every seed, False if for none, else None."""
    runs = for_each_seed(paper_runs, seeds, device)
    corpora = [(seed, Corpus(seed)) for seed in range(10)]
    found = [num_heads_from_corpus(c.sample(600, 1, c.new)[0].tolist(), seed=seed)[0] for seed, c in corpora]

    def spread(values, digits=2):
        mean = round(statistics.mean(values), digits) + 0.0     # no -0.00
        return f"{mean:.{digits}f} +- {statistics.stdev(values):.{digits}f}"

    def show(*names, digits=2):
        return " / ".join(spread([got[name] for got in runs], digits) for name in names)

    def verdict(holds):
        return all(holds) if all(holds) or not any(holds) else None

    def ahead(high, low, what):
        """What the toy shows of the claim that high is above low, and whether it is."""
        differences = [got[high] - got[low] for got in runs]
        return f"{what}: {show(high, low)}; difference {spread(differences)}", verdict([d > 0 for d in differences])

    def sizes(name):
        return f"full / without, {runs[0]['size hydralora']:,} / {runs[0][f'size {name}']:,} parameters"

    splits = {1: "lora_split_labels"} | {purity: f"split {purity}" for purity in PURITIES}
    counts = dict(sorted(({DOMAINS: "hydralora"} | {n: f"n={n}" for n in HEADS}).items()))
    beaten = [str(p) for p, split in splits.items() if all(got["hydralora"] > got[split] for got in runs)]
    best = sum(got["hydralora"] > max(got["lora_equal"], got["lora_large"]) for got in runs)
    apart = max(got["spread w/o gate"] for got in runs)
    moved = max(abs(got["w/o gate"] - got["w/o MoE"]) for got in runs)
    percents = {n: (percent_of_llama(n, router=False), percent_of_llama(n, router=True)) for n in (3, 10)}
    rows = [
        ("Observation I: at one size, several small LoRAs, one a task, beat one large LoRA",
         "4 x r=8: 46.94, r=32: 46.59", *ahead("lora_split_labels", "lora_large", "4 x r=8 with labels / r=32")),
        ("Observation II: LoRAs trained apart end with A more alike than B", "t-SNE, Figure 3",
         "mean cosine of two A / two B, from one A at the start: "
         + show("cosine of A, split same A", "cosine of B, split same A"),
         verdict([got["cosine of A, split same A"] > got["cosine of B, split same A"] for got in runs])),
        ("... and that is due to the common start", "the authors' caveat",
         "the same, from A drawn apart: " + show("cosine of A, lora_split_labels", "cosine of B, lora_split_labels"),
         verdict([abs(got["cosine of A, lora_split_labels"]) < 0.1 for got in runs])),
        ("Table 2: LoRA at HydraLoRA's size < LoRA of the next size < HydraLoRA", "45.45 < 46.59 < 47.22",
         f"{show('lora_equal', 'lora_large', 'hydralora')}; HydraLoRA is above both for {best} of {len(runs)} seeds, "
         f"and goes {show('closed', digits=0)} % of the way from the first to the Bayes limit",
         verdict([got["lora_equal"] < got["lora_large"] < got["hydralora"] for got in runs])),
        ("Table 2: HydraLoRA beats LoRA-Split, which has more parameters", "47.22, 46.94",
         *ahead("hydralora", "lora_split_labels", "HydraLoRA / LoRA-Split with true labels")),
        ("Outperforms approaches that rely on domain knowledge", "BBH: 41.5, LoRAMoE 40.3",
         f"LoRA-Split with {' / '.join(map(str, splits))} of the labels kept, the others drawn at random: "
         f"{show(*splits.values())}; HydraLoRA is above for every seed at {', '.join(beaten) or 'none'}",
         verdict([got["hydralora"] > got[split] for got in runs for split in splits.values()])),
        ("Figure 6: w/o MoE (a LoRA r=8) is worse", "worse", *ahead("hydralora", "w/o MoE", sizes("w/o MoE"))),
        ("Figure 6: w/o gate (gates 1/n) is worse", "worse", *ahead(
            "hydralora", "w/o gate", "equal gates and zero B give all heads one gradient: in the end they differ "
            f"by {apart:.1g}, and the model by at most {moved:.2f} points from the LoRA r=8 above. Full / without")),
        ("Figure 6: w/o hydra (whole LoRAs, a router) is worse", "worse",
         *ahead("hydralora", "w/o hydra", sizes("w/o hydra"))),
        ("... also at HydraLoRA's size", "-", *ahead("hydralora", "w/o hydra, small", sizes("w/o hydra, small"))),
        ("Figure 7: k-means on TF-IDF gives n", "yes",
         f"{DOMAINS} domains, n for seeds 0 to 9: {' '.join(map(str, found))}", verdict([n == DOMAINS for n in found])),
        ("Figure 8: not sensitive to n (none loses more than 0.42 to n=4)", "n=3 loses 0.42 to n=4",
         f"n = {' / '.join(map(str, counts))}: {show(*counts.values())}",
         verdict([got["hydralora"] - got[name] <= 0.42 for got in runs for name in counts.values()])),
        ("%Param of LLaMA2-7B, r=8: n=3 (Table 2), n=10 (Table 3)", "0.124, 0.341 (11/2 of a rounded 0.062)",
         "; ".join(f"n={n}: {heads:.3f}, with the router {router:.3f}" for n, (heads, router) in percents.items()),
         verdict([abs(percents[n][0] - in_paper) < 0.0015 for n, in_paper in ((3, 0.124), (10, 0.341))])),
        ("The router's input: x (text) or A x (shape of Wg)", "both", ahead("hydralora", "Ax", "x / A x")[0], None),
        ("Merging: one combined adapter serves inference (within a point)", "yes",
         "routed / merged with mean gates / with a domain's mean gates / with 1/n: "
         + show(*(f"merged {way}" for way in ("routed", "mean", "per_task", "uniform"))),
         verdict([got["merged mean"] > got["merged routed"] - 1 for got in runs])),
        *((f"Ahead of LoRA at its size with adapters on {place}", note,
           f"gain / NMI of the best layer: {show(f'gain on {place}', f'nmi on {place}')}",
           verdict([got[f"gain on {place}"] > 0 for got in runs]))
          for place, note in (
              ("o", "-"), ("q,v", "the paper's place"), ("up,down", "the script's, without gate_proj")))]
    print(f"Accuracy in percent, mean +- standard deviation over seeds {', '.join(map(str, seeds))}. The paper's\n"
          "numbers are MMLU unless it says otherwise. Reproduced: yes, for every seed; no, for none;\nopen, for some "
          "seeds or settings, or the paper takes no side.\n")
    widths = (34, 22, 50, 12)
    for claim, in_paper, toy, reproduced in [("claim", "paper", "toy", "reproduced"), *rows]:
        answer = {True: "yes", False: "no", None: "open"}.get(reproduced, reproduced)
        cells = [textwrap.wrap(cell, width - 2) for cell, width in zip((claim, in_paper, toy, answer), widths)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            print("".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        print()
    return dict(paper=[dict(zip(("claim", "paper", "toy", "reproduced"), row)) for row in rows], runs=runs)


# ---- --cost ----------------------------------------------------------------------------------


def official_loop(x, W0, A, B, Wg, scaling):
    """The official code's way, from its description: A x and a (tokens, d) result for each head."""
    gates = F.linear(x, Wg).softmax(-1)
    y = F.linear(x, W0)
    for i in range(len(B)):
        y = y + gates[..., i, None] * F.linear(F.linear(x, A), B[i]) * scaling
    return y


def lora(x, W0, A, B, scaling):
    return F.linear(x, W0) + F.linear(F.linear(x, A) * scaling, B)


def saved_bytes(function, inputs):
    """Bytes that autograd keeps for backward, without the inputs themselves."""
    known, kept = {t.untyped_storage().data_ptr() for t in inputs}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def cost(device, rounds=25, warm_up=5):
    """Forward and backward, gradients for x and the adapter, float32. Each round runs all in another order,
    since a function's time depends on the memory that the one before it leaves behind."""
    card = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"Forward and backward, medians of {rounds} rounds, on {device}: {card}")
    print(f"{'tokens, width, r, n':<21}" + "".join(f"{title:>9}" for title in (
        "linear", "LoRA r", "LoRA nr", "Hydra", "loop", "/LoRA nr", "/loop", "MB", "loop MB", "/loop MB", "/bound")))
    rows = []
    for tokens, width, r, n in ((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)):
        torch.manual_seed(0)
        make = lambda *shape: torch.randn(*shape, device=device).div_(shape[-1]**0.5).requires_grad_()
        layer = HydraLoRALinear(nn.Linear(width, width, bias=False, device=device), num_heads=n, r=r)
        x, grad = make(tokens, width), make(tokens, width).detach()
        W0, A, B, Wg = layer.weight, layer.lora_A, layer.lora_B, layer.router.weight
        A1, B1, An, Bn = make(r, width), make(width, r), make(n * r, width), make(width, n * r)
        inputs = (x, W0, A, B, Wg, A1, B1, An, Bn)
        functions = dict(linear=lambda: F.linear(x, W0), lora_r=lambda: lora(x, W0, A1, B1, layer.scaling),
                         lora_nr=lambda: lora(x, W0, An, Bn, layer.scaling), hydralora=lambda: layer(x),
                         loop=lambda: official_loop(x, W0, A, B, Wg, layer.scaling))
        times, order = {name: [] for name in functions}, random.Random(0)
        for _ in range(warm_up + rounds):
            for name in order.sample(list(functions), len(functions)):
                for tensor in inputs:
                    tensor.grad = None
                start = time.perf_counter()
                functions[name]().backward(grad)
                if device != "cpu":
                    getattr(torch, device).synchronize()
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(t[warm_up:]) for name, t in times.items()}
        saved = {name: saved_bytes(f, inputs) for name, f in functions.items()}
        bound = 4 * (tokens * (r + n + n * r) + n * width * r)
        hydra, kept = median["hydralora"], saved["hydralora"]
        print(f"{f'{tokens}, {width}, {r}, {n}':<21}{1000 * median['linear']:>6.1f} ms"
              + "".join(f"{median[name] / median['linear']:>9.2f}" for name in list(median)[1:])
              + f"{hydra / median['lora_nr']:>9.2f}{hydra / median['loop']:>9.2f}{kept / 1e6:>9.2f}"
              + f"{saved['loop'] / 1e6:>9.1f}{'1/' + str(round(saved['loop'] / kept)):>9}{kept / bound:>9.2f}")
        rows.append(dict(tokens=tokens, width=width, r=r, n=n, device=card, seconds=median, saved_bytes=saved,
                         bound_bytes=bound))
    print("\nLoRA r to loop: time in units of the frozen linear layer's. LoRA nr: LoRA of rank n r. Hydra:\n"
          "HydraLoRALinear. loop: A x and a (tokens, width) result for each head, the official code's way.\n"
          "MB: what autograd keeps for backward besides inputs and weights; bound: tokens x (r + n + n r) + n d r\n"
          "numbers, that is A x, the gates, their product, and one copy of the heads.")
    return dict(cost=rows)


# ---- --tune ----------------------------------------------------------------------------------

GRID = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)


def tune_runs(seed, device):
    e = Experiment(seed, device)
    return {name: [100 * e.run(f"seed {seed}, {name}, lr {lr}", **arguments | dict(lr=lr))[1]["accuracy"]
                   for lr in GRID] for name, arguments in methods_for(e, DOMAINS).items()}


def tune(seeds, device):
    """Mean accuracy of each method at each learning rate."""
    runs = for_each_seed(tune_runs, seeds, device)
    print(f"Mean accuracy in percent over seeds {', '.join(map(str, seeds))}\n{'learning rate':<20}"
          + "".join(f"{lr:>10}" for lr in GRID))
    for name in runs[0]:
        means = [statistics.mean(column) for column in zip(*(got[name] for got in runs))]
        print(f"{name:<20}" + "".join(f"{mean:>10.2f}" for mean in means))
    return dict(grid=GRID, runs=runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, help="of the main run, 0 if not given")
    parser.add_argument("--heads", type=int, help="n, instead of the number found in the corpus")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--check", action="store_true", help="exit 1 unless heads specialise and HydraLoRA is ahead")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--paper", action="store_true", help="every claim of the paper that a toy can test, seeds 5 to 8")
    mode.add_argument("--cost", action="store_true", help="the layer's time and memory")
    mode.add_argument("--tune", action="store_true", help="the search for the learning rates, seeds 0 to 4")
    options = parser.parse_args()
    if (options.paper or options.cost or options.tune) and (options.check or {options.seed, options.heads} != {None}):
        parser.error("--seed, --heads and --check belong to the main run")
    if options.heads is not None and options.heads < 1:
        parser.error(f"--heads must be at least 1, got {options.heads}")
    file = open(options.json, "w") if options.json else None
    sys.stdout.reconfigure(line_buffering=True)     # in step with the progress on stderr
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not options.cost:
        torch.set_num_threads(1)    # the tensors are small, and the result is the same for any number of cores
    if options.tune:
        result = tune(range(5), device)
    elif options.paper:
        result = paper(range(5, 9), device)      # seeds that --tune has not seen
    elif options.cost:
        result = cost(device)
    else:
        result = main_run(options.seed or 0, options.heads, device)
    if file:
        with file:
            json.dump(result, file, indent=1)
    return 1 if options.check and not result["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
