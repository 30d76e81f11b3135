# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy"]
# ///
"""Do the heads of HydraLoRA specialise, and what are the router and the shared A worth?

    python train_toy.py             the experiment: below a minute on two CPU cores
    python train_toy.py --paper     the paper's claims that a toy can test: ten minutes
    python train_toy.py --cost      time and memory of the layer: half a minute
    python train_toy.py --tune      the search for every learning rate: an hour

A sequence belongs to a hidden domain, and each domain has a cipher of its own:

    plain symbols (LENGTH) | separator | the same symbols enciphered (LENGTH)
                                         the loss and the accuracy are taken here

Domains differ in how often they use a symbol, so the plain part tells what domain it may be, and
they conflict: a symbol has to become another one in each domain. No label says which domain it
is. A transformer is pre-trained on one set of ciphers and frozen, then adapters learn a new set.
Every method sees the same batches for the same steps, with the same schedule and scaling and a
learning rate from the same search.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, hook_gates, hydralora_layers,
    inject_hydralora, mean_gates, merge_hydralora, num_heads_from_corpus, record_gates,
    unmerge_hydralora)

DOMAINS = 4                 # hidden kinds of sequences
SYMBOLS = 24                # 0 .. SYMBOLS - 1; the token SYMBOLS is the separator
LENGTH = 10                 # plain symbols in a sequence, and enciphered ones
CIPHERED = slice(LENGTH, 2 * LENGTH)    # the positions whose next token is an enciphered symbol
BATCH = 64                  # sequences in a step
PRETRAIN_STEPS = 600        # on the old ciphers, all weights
STEPS = 600                 # on the new ciphers, adapters only
EVALUATION = 2000           # test sequences
TARGETS = ("o_proj",)       # where the adapters sit
RANK = 8                    # r of HydraLoRA in the main run
STREAMS = ("pre-training", "training", "test", "training labels", "test labels", "calibration")


def stream(seed, name):
    """An independent source of random numbers for each use, so that methods share their data."""
    return torch.Generator().manual_seed(1000 * seed + STREAMS.index(name))


# ---- The corpus ------------------------------------------------------------------------------


class Corpus:
    """Symbol frequencies, old ciphers and new ones of each domain; all follows from the seed."""

    def __init__(self, seed, domains):
        torch.manual_seed(seed)
        self.seed, self.domains = seed, domains
        dirichlet = torch.distributions.Dirichlet(torch.full((SYMBOLS,), 0.3))
        self.frequencies = dirichlet.sample((domains,))                     # (domains, symbols)
        self.old, self.new = (torch.stack([torch.randperm(SYMBOLS) for _ in range(domains)])
                              for _ in range(2))                            # (domains, symbols)

    def sample(self, count, name, ciphers):
        """tokens (count, 2 LENGTH + 1) and the hidden domain of each sequence (count,)."""
        random_numbers = stream(self.seed, name)
        domain = torch.randint(self.domains, (count,), generator=random_numbers)
        plain = torch.multinomial(self.frequencies[domain], LENGTH, replacement=True,
                                  generator=random_numbers)                 # (count, LENGTH)
        separator = torch.full((count, 1), SYMBOLS)
        return torch.cat([plain, separator, ciphers[domain[:, None], plain]], dim=1), domain

    def bayes_accuracy(self, tokens):
        """The limit without labels: the best guess of who knows all frequencies and ciphers.

        It weighs the domains by their posterior, given the plain symbols and the enciphered ones
        so far. A domain whose cipher has contradicted one of those is out.
        """
        plain, cipher = tokens[:, :LENGTH], tokens[:, LENGTH + 1:]          # (count, LENGTH)
        guess = self.new[:, plain]                                          # (domains, count, LENGTH)
        log_p = self.frequencies.double().log()[:, plain].sum(2, keepdim=True)
        contradicted = torch.where(guess == cipher, 0.0, -torch.inf).cumsum(2).roll(1, 2)
        contradicted[..., 0] = 0                                            # nothing is seen yet
        posterior = (log_p + contradicted).softmax(0)                       # (domains, count, LENGTH)
        votes = torch.einsum("dcl,dcls->cls", posterior, F.one_hot(guess, SYMBOLS).double())
        return (votes.argmax(2) == cipher).double().mean().item()


# ---- The methods -----------------------------------------------------------------------------
# All are made of HydraLoRALinear.


class EqualGates(nn.Module):
    """1/n for every head: a LoRA where n = 1, else Figure 6's "w/o gate"."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x.new_full((*x.shape[:-1], self.n), 1 / self.n)              # (b, t, n)


class LabelGates(EqualGates):
    """One head for each label; `labels` (b,) is set before each forward."""

    def forward(self, x):
        one_hot = F.one_hot(self.labels, self.n).to(x).unsqueeze(1)         # (b, 1, n)
        return one_hot.expand(*x.shape[:-1], self.n)                        # (b, t, n)


class WholeLoRAs(HydraLoRALinear):
    """n LoRAs with an A each, mixed by gates: sum_i w_i B_i A_i x.

    With a router the paper's LoRA MoE (Eqs. 5 and 6), with labels its LoRA-Split.
    """

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(torch.empty(self.num_heads * self.r, base.in_features))
        self.reset_parameters()

    def forward(self, x):
        z = F.linear(x, self.lora_A).unflatten(-1, (self.num_heads, self.r))    # (b, t, n, r)
        wz = self.gates(x).unsqueeze(-1) * z * self.scaling                     # (b, t, n, r)
        heads = self.lora_B.transpose(0, 1).flatten(1)                          # (d, n r)
        return self.base(x) + F.linear(wz.flatten(-2), heads)                   # (b, t, d)


def methods(n=DOMAINS):
    """The table of methods: name -> arguments of `fine_tune`; lr is the best of --tune.

    The ranks of "same size" hold for square layers: a LoRA has the size of n heads on one A and
    their router, and whole LoRAs have that of n heads on one A, rounded down; see `sizes`.
    """
    lora, hydra = dict(n=1, gates="equal"), dict(n=n)
    whole, true_gate = dict(n=n, whole=True), dict(gates="label", purity=1)
    split = dict(n=DOMAINS, whole=True, gates="label")
    same = math.ceil((RANK * (1 + n) + n) / 2)
    of_whole = RANK * (n + 1) // (2 * n)
    attention, mlp = ("q_proj", "v_proj"), ("up_proj", "down_proj")
    table = {
        "HydraLoRA": dict(hydra, lr=4e-2),
        "LoRA, same size": dict(lora, r=same, lr=4e-2),
        "LoRA r=8 (w/o MoE)": dict(lora, lr=4e-2),
        "LoRA r=32": dict(lora, r=4 * RANK, lr=2e-2),
        "equal gates (w/o gate)": dict(hydra, gates="equal", lr=4e-2),
        "whole LoRAs + router, same size": dict(whole, r=of_whole, lr=4e-2),
        "whole LoRAs + router, r=8": dict(whole, lr=2e-2),
        "LoRA-Split by domain, r=6": dict(split, r=6, purity=1, lr=8e-2),
        "LoRA-Split by domain, r=8": dict(split, purity=1, lr=8e-2),
        "HydraLoRA, true gate": dict(hydra, **true_gate, lr=8e-2),
        "whole LoRAs, true gate, same size": dict(whole, r=of_whole, **true_gate, lr=8e-2),
        "router on A x": dict(hydra, router_input="Ax", lr=4e-2),
    }
    for purity, lr in ((0.9, 8e-2), (0.5, 4e-2)):
        table |= {f"LoRA-Split by data set, {purity:.0%} pure": dict(split, purity=purity, lr=lr),
                  f"HydraLoRA, data set as gate, {purity:.0%} pure": dict(
                      hydra, gates="label", purity=purity, lr=lr)}
    table |= {"LoRA-Split by chance": dict(split, purity=0, lr=4e-2),
              "LoRA-Split by domain, one start of A": dict(split, purity=1, one_A=True, lr=8e-2),
              "LoRA-Split by chance, one start of A": dict(split, purity=0, one_A=True, lr=4e-2)}
    table |= {f"HydraLoRA n={heads}": dict(n=heads, lr=4e-2) for heads in (2, 3, 8)}
    for place, targets in {"q,v": attention, "up,down": mlp}.items():
        table |= {f"HydraLoRA on {place}": dict(hydra, targets=targets, lr=2e-2),
                  f"LoRA, same size on {place}": dict(lora, r=same, targets=targets, lr=2e-2)}
    for r, of_whole in ((3, 2), (6, 4)):            # r (n + 1) / (2 n) of n = 3: the same size
        three = dict(domains=3, n=3)
        table |= {f"HydraLoRA r={r} of 3 domains": dict(three, r=r, lr=8e-2),
                  f"whole LoRAs r={of_whole} of 3 domains": dict(
                      three, whole=True, r=of_whole, lr=8e-2),
                  f"HydraLoRA r={r} of 3 domains, true gate": dict(three, r=r, **true_gate, lr=8e-2),
                  f"whole LoRAs r={of_whole} of 3 domains, true gate": dict(
                      three, whole=True, r=of_whole, **true_gate, lr=8e-2)}
    return table


def adapt(pretrained, seed, *, n, r=RANK, gates="router", whole=False, one_A=False,
          targets=TARGETS, router_input="x"):
    """A copy of the model with adapters. Methods of one rank start from one A, drawn by the seed;
    with one_A, so do all the LoRAs of `whole`."""
    model = copy.deepcopy(pretrained)
    arguments = dict(num_heads=n, r=r, lora_alpha=2 * r, router_input=router_input)
    inject_hydralora(model, targets, **arguments)
    for i, (name, layer) in enumerate(hydralora_layers(model).items()):
        if whole:
            layer = WholeLoRAs(layer.base, **arguments)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        torch.manual_seed(1000 * seed + i)
        layer.reset_parameters()
        if one_A:
            layer.lora_A.data.copy_(layer.lora_A[:r].repeat(n, 1))
        if gates != "router":
            layer.router = EqualGates(n) if gates == "equal" else LabelGates(n)
    return model


# ---- Training and evaluation -----------------------------------------------------------------


class World:
    """What the methods of one seed share: the corpus, the frozen model and the data."""

    def __init__(self, seed, domains, device):
        self.seed, self.domains, self.device = seed, domains, device
        self.corpus = corpus = Corpus(seed, domains)
        torch.manual_seed(seed)
        self.model = TinyTransformer(TinyConfig(
            vocab_size=SYMBOLS + 1, max_position_embeddings=2 * LENGTH)).to(device)
        tokens, _ = corpus.sample(PRETRAIN_STEPS * BATCH, "pre-training", corpus.old)
        train(self.model, tokens.unflatten(0, (-1, BATCH)), 3e-3, "pre-training",
              positions=slice(0, 2 * LENGTH))
        self.train_tokens, self.train_domain = corpus.sample(STEPS * BATCH, "training", corpus.new)
        self.tokens, self.domain = corpus.sample(EVALUATION, "test", corpus.new)


def progress(text, last=False):
    """One line rewritten in place on a terminal, plain lines elsewhere."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{'' if last else text:<78}\r", end="", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)


def train(model, tokens, lr, what, positions=CIPHERED, labels=None):
    """AdamW on OneCycle, next-token loss; tokens (steps, BATCH, 2 LENGTH + 1)."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr,
                                  weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(tokens))
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(tokens):
        set_labels(model, None if labels is None else labels[step].to(device))
        logits = model(batch[:, :-1])[:, positions]                         # (b, positions, vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:][:, positions].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress(f"{what}: step {step} of {len(tokens)}, loss {loss.item():.3f}")
    loss, seconds = loss.item(), time.perf_counter() - start                # item() waits for a GPU
    progress(f"{what}: {len(tokens)} steps in {seconds:.1f} s, loss {loss:.3f}", last=True)


def set_labels(model, labels):
    for module in model.modules():
        if isinstance(module, LabelGates):
            module.labels = labels


@torch.no_grad()
def logits_of(model, tokens, labels=None):
    """Logits where enciphered symbols are predicted: (count, LENGTH, vocabulary)."""
    device = next(model.parameters()).device
    set_labels(model.eval(), None if labels is None else labels.to(device))
    return model(tokens[:, :-1].to(device))[:, CIPHERED].cpu()


def accuracy(logits, tokens):
    """Percent of the enciphered symbols that are right in each sequence: (count,)."""
    return 100 * (logits.argmax(-1) == tokens[:, LENGTH + 1:]).double().mean(1)


def data_sets(domain, purity, random_numbers):
    """The data set that each sequence stands in. Each data set takes a share `purity` of its
    sequences from one domain, and the rest from all domains alike."""
    by_chance = torch.rand(domain.shape, generator=random_numbers) >= purity
    any_one = torch.randint(int(domain.max()) + 1, domain.shape, generator=random_numbers)
    return torch.where(by_chance, any_one, domain)


def fine_tune(world, name, *, lr, purity=None, domains=None, **method):
    """Adapt the world's model by one method -> (model, what was measured)."""
    model = adapt(world.model, world.seed, **method)
    labels = test_labels = None
    if purity is not None:
        labels = data_sets(world.train_domain, purity, stream(world.seed, "training labels"))
        labels = labels.unflatten(0, (STEPS, BATCH))
        test_labels = data_sets(world.domain, purity, stream(world.seed, "test labels"))
    train(model, world.train_tokens.unflatten(0, (STEPS, BATCH)), lr, name, labels=labels)
    right = accuracy(logits_of(model, world.tokens, test_labels), world.tokens)
    return model, dict(
        accuracy=right.mean().item(),
        by_domain=[right[world.domain == t].mean().item() for t in range(world.domains)],
        size=sum(p.numel() for p in model.parameters() if p.requires_grad))


# ---- A look at the heads ---------------------------------------------------------------------


def gates_of(model, tokens):
    """w in each layer where enciphered symbols are predicted: name -> (count, LENGTH, n)."""
    with record_gates(model) as gates:
        logits_of(model, tokens)
    return {name: w[:, CIPHERED].cpu() for name, w in gates.items()}


def by_domain(w, domain, domains):
    """Mean gates of each domain: (count, LENGTH, n) -> (domains, n)."""
    return torch.stack([w[domain == t].flatten(0, 1).mean(0) for t in range(domains)])


def nmi(w, domain, domains):
    """2 I(domain; head) / (H(domain) + H(head)), where each token draws its head from its gates.

    0: the gates say nothing of the domain. 1: one head for each domain, with certainty.
    """
    share = torch.bincount(domain, minlength=domains).double() / len(domain)
    joint = by_domain(w, domain, domains).double() * share[:, None]         # (domains, n)
    entropy = lambda p: -torch.xlogy(p, p).sum().item()
    of_domain, of_head = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (of_domain + of_head - entropy(joint)) / (of_domain + of_head)


def of_symbol_alone(w, plain):
    """The gates (count, LENGTH, n), averaged over all tokens with the same plain symbol: what a
    router gives that sorts symbols and knows nothing else of the domain."""
    which = F.one_hot(plain, SYMBOLS).to(w)                                 # (count, LENGTH, symbols)
    mean = torch.einsum("cls,cln->sn", which, w) / which.sum((0, 1))[:, None]
    return mean[plain]                                                      # (count, LENGTH, n)


def with_labels(model, world):
    """The gates of a router that is trained to name the domain, on the inputs of this one: what
    a router of this form could know. name -> (count, LENGTH, domains)"""
    def inputs(tokens):
        seen = {}
        with contextlib.ExitStack() as hooks:
            for name, layer in hydralora_layers(model).items():
                hooks.enter_context(layer.register_forward_pre_hook(
                    lambda layer, args, name=name: seen.update({name: args[0][:, CIPHERED].cpu()})))
            logits_of(model, tokens)
        return seen                                                         # name -> (count, LENGTH, k)

    tokens, domain = world.corpus.sample(1000, "calibration", world.corpus.new)
    labels, best = domain.repeat_interleave(LENGTH), {}
    test = inputs(world.tokens)
    for name, x in inputs(tokens).items():
        router = Router(x.shape[-1], world.domains)
        optimizer = torch.optim.LBFGS(router.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, router.weight).flatten(0, 1), labels)
            loss.backward()
            return loss
        optimizer.step(loss)
        best[name] = router(test[name]).detach()
    return best


def knock_out(model, where, world, before):
    """Points of accuracy that domain t loses without head h of one layer: domain by head."""
    lost = []
    for head in range(hydralora_layers(model)[where].num_heads):
        def without(name, w):
            if name == where:
                rest = w * (torch.arange(w.shape[-1], device=w.device) != head)
                return rest / rest.sum(-1, keepdim=True).clamp_min(1e-9)
        with hook_gates(model, without):
            right = accuracy(logits_of(model, world.tokens), world.tokens)
        lost.append([before[t] - right[world.domain == t].mean().item()
                     for t in range(world.domains)])
    return [list(row) for row in zip(*lost)]


def cosine(matrices):
    """Mean cosine of two different matrices out of (n, ...)."""
    rows = F.normalize(matrices.detach().flatten(1), dim=1)                 # (n, entries)
    n = len(rows)
    return (((rows @ rows.T).sum().item() - n) / (n * (n - 1))) if n > 1 else 1.0


def specialisation(model, world, before):
    """Whether and where the heads go by domain, and the controls for that."""
    gates, probes = gates_of(model, world.tokens), with_labels(model, world)
    n = next(iter(gates.values())).shape[-1]
    untrained = gates_of(adapt(world.model, world.seed, n=n), world.tokens)
    shuffled = world.domain[torch.randperm(EVALUATION, generator=stream(world.seed, "test labels"))]
    score = lambda w, domain=world.domain: nmi(w, domain, world.domains)
    layers = {name: dict(
        trained=score(w), symbol=score(of_symbol_alone(w, world.tokens[:, :LENGTH])),
        untrained=score(untrained[name]), shuffled=score(w, shuffled), labels=score(probes[name]),
        labels_right=(probes[name].argmax(-1) == world.domain[:, None]).double().mean().item(),
        cosine=cosine(hydralora_layers(model)[name].lora_B)) for name, w in gates.items()}
    best = max(layers, key=lambda name: layers[name]["trained"] - layers[name]["symbol"])
    return dict(layers=layers, best=best,
                gates=by_domain(gates[best], world.domain, world.domains).tolist(),
                lost=knock_out(model, best, world, before))


# ---- Merging ---------------------------------------------------------------------------------


def merged(model, gates, tokens):
    """Logits with the adapters merged for these gates; the model comes back as it was."""
    layers = merge_hydralora(model, gates)
    logits = logits_of(model, tokens)
    unmerge_hydralora(model, layers)
    return logits


def merging(model, world):
    """way to merge -> accuracy, and the relative error of the logits against the routed model."""
    tokens, domain = world.corpus.sample(1000, "calibration", world.corpus.new)
    inputs = tokens[:, :-1].to(world.device)
    mask = (torch.arange(2 * LENGTH) >= LENGTH).expand(len(inputs), -1)     # enciphered tokens only
    gates_for = lambda chosen: mean_gates(model, [inputs[chosen.to(world.device)]], [mask[chosen]])
    routed, mean = logits_of(model, world.tokens), gates_for(domain >= 0)
    with_own = torch.empty_like(routed)
    for t in range(world.domains):
        own = world.domain == t
        with_own[own] = merged(model, gates_for(domain == t), world.tokens[own])
    equal = {name: torch.full_like(w, 1 / len(w)) for name, w in mean.items()}
    logits = dict(routed=routed, mean=merged(model, mean, world.tokens), by_domain=with_own,
                  equal=merged(model, equal, world.tokens))
    with hook_gates(model, lambda name, w: mean[name].expand_as(w)):        # routers held
        held = logits_of(model, world.tokens)
    error = lambda y, expected: ((y - expected).norm() / expected.norm()).item()
    return dict(accuracy={way: accuracy(y, world.tokens).mean().item() for way, y in logits.items()},
                error={way: error(y, routed) for way, y in logits.items()},
                error_for_held_gates=error(logits["mean"], held))


# ---- The main run ----------------------------------------------------------------------------

MAIN = ("LoRA, same size", "whole LoRAs + router, same size", "HydraLoRA", "LoRA-Split by domain, r=8")
# --check: HydraLoRA is ahead of the LoRA, and in one layer the NMI of domain and head
MIN_NMI = 0.2               # is at least this
MIN_NMI_OVER_SYMBOL = 0.1   # and exceeds by this the NMI of a router that only sorts symbols,
MAX_NMI_SHUFFLED = 0.02     # while with shuffled labels it is at most this


def measure(seed, heads, device):
    """Everything that the main run measures, as a dict; --json writes it."""
    world = World(seed, DOMAINS, device)
    found, sse = num_heads_from_corpus(world.train_tokens[:600].tolist())
    n = heads or found
    models, results = {}, {}
    for name in MAIN:
        models[name], results[name] = fine_tune(world, name, **methods(n)[name])
    hydra, lora = results["HydraLoRA"], results["LoRA, same size"]
    frozen = accuracy(logits_of(world.model, world.tokens), world.tokens).mean().item()
    bayes = 100 * world.corpus.bayes_accuracy(world.tokens)
    heads = specialisation(models["HydraLoRA"], world, hydra["by_domain"])
    best = heads["layers"][heads["best"]]
    specialised = (best["trained"] >= MIN_NMI
                   and best["trained"] - best["symbol"] >= MIN_NMI_OVER_SYMBOL
                   and all(m["shuffled"] <= MAX_NMI_SHUFFLED for m in heads["layers"].values()))
    return dict(
        seed=seed, device=device, heads_found=found, num_heads=n, sse=sse, methods=results,
        frozen=frozen, bayes=bayes, specialisation=heads, merging=merging(models["HydraLoRA"], world),
        closed=(hydra["accuracy"] - lora["accuracy"]) / (bayes - lora["accuracy"]),
        specialised=specialised, passed=specialised and hydra["accuracy"] > lora["accuracy"])


def table(header, rows):
    """Markdown whose columns line up."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


def show(m):
    """The main run's measurements as a story in four sections."""
    results, heads, merge = m["methods"], m["specialisation"], m["merging"]
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {m['seed']}, {m['device']}, {', '.join(TARGETS)}\n")
    print(f"1. How many heads? k-means on 600 training sequences, no labels: n = {m['heads_found']}"
          + f", --heads: n = {m['num_heads']}" * (m["num_heads"] != m["heads_found"]))
    print("   SSE of 1, 2, ... centres:", *(f"{sse:.0f}" for sse in m["sse"]))
    print("\n2. Accuracy on the enciphered symbols after fine-tuning on new ciphers, in percent\n")
    table(["method", "size", "accuracy", *(f"domain {t}" for t in range(DOMAINS))],
          [[name, f"{r['size']:,}", f"{r['accuracy']:.2f}", *(f"{a:.2f}" for a in r["by_domain"])]
           for name, r in results.items()])
    print(f"   No adapter: {m['frozen']:.2f}. The limit without labels (Bayes): {m['bayes']:.2f}.")
    print(f"   HydraLoRA goes {m['closed']:.0%} of the way from the LoRA of its size to the limit.")
    print("\n3. Do the heads specialise? NMI of domain and head, 0: not at all, 1: a head each\n")
    table(["layer", "router", "symbol alone", "untrained", "shuffled labels", "router trained with labels",
           "cosine of two heads"],
          [[name, *(f"{layer[key]:.3f}" for key in (
              "trained", "symbol", "untrained", "shuffled", "labels", "cosine"))]
           for name, layer in heads["layers"].items()])
    head_names = [f"head {i}" for i in range(m["num_heads"])]
    print(f"   Mean gates in {heads['best']}\n")
    table(["", *head_names], [[f"domain {t}", *(f"{w:.2f} {'#' * round(10 * w)}" for w in row)]
                              for t, row in enumerate(heads["gates"])])
    print("   Points of accuracy lost without a head\n")
    table(["", *head_names], [[f"domain {t}", *(f"{points:.2f}" for points in row)]
                              for t, row in enumerate(heads["lost"])])
    print("4. Merging into plain linear layers\n")
    table(["gates", "accuracy", "error of the logits", ""],
          [[way, f"{merge['accuracy'][way]:.2f}", f"{merge['error'][way]:.3f}", meaning] for way, meaning in (
              ("routed", "not merged: each token has its own mixture"),
              ("mean", "one static weight, for the mean gates of 1000 other sequences"),
              ("by_domain", "one for each domain, for the domain's mean gates; needs labels"),
              ("equal", "one static weight, 1/n for each head"))])
    print(f"   Merging is exact for fixed gates: {merge['error_for_held_gates']:.0e} away from routers held "
          "at the mean gates.\n")
    best = heads["layers"][heads["best"]]["trained"]
    print(f"The heads {'specialise' if m['specialised'] else 'do NOT specialise'} (NMI {best:.2f} in "
          f"{heads['best']}); HydraLoRA is {results['HydraLoRA']['accuracy'] - results['LoRA, same size']['accuracy']:+.2f} "
          f"points from the LoRA of its size.")


# ---- --paper and --tune: many methods, many seeds --------------------------------------------

GRID = (1e-2, 2e-2, 4e-2, 8e-2, 16e-2)                  # of learning rates
TUNING_SEEDS, REPORTED_SEEDS = range(5), range(5, 10)   # no seed is both


@functools.lru_cache(maxsize=None)
def world_of(seed, domains, device):
    return World(seed, domains, device)


def run(job):
    """One method on one seed -> what was measured; lr=None is the table's."""
    seed, name, lr, device = job
    method = methods()[name]
    world = world_of(seed, method.get("domains", DOMAINS), device)
    model, result = fine_tune(world, name, **method | ({} if lr is None else dict(lr=lr)))
    layers = hydralora_layers(model).values()
    if method.get("whole"):
        result["cosine_A"] = statistics.mean(cosine(m.lora_A.unflatten(0, (m.num_heads, -1))) for m in layers)
    result["cosine_B"] = statistics.mean(cosine(m.lora_B) for m in layers)
    if method.get("gates", "router") == "router":
        result["nmi"] = max(nmi(w, world.domain, world.domains)
                            for w in gates_of(model, world.tokens).values())
    if name == "HydraLoRA" and lr is None:
        result["merged"] = merging(model, world)["accuracy"]
    return result


def run_all(seeds, names, lrs, device):
    """name -> one list for each seed, of one result for each lr; as many processes as cores."""
    jobs = [(seed, name, lr, device) for seed in seeds for name in names for lr in lrs]
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)    # Ctrl-C ends them
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count()), ignore) as pool:
        results = iter(list(pool.imap(run, jobs)))
    got = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            got[name].append([next(results) for _ in lrs])
    return got


def tune(device):
    """Accuracy of each method at each learning rate, on the tuning seeds."""
    got = run_all(TUNING_SEEDS, methods(), GRID, device)
    return {name: [statistics.mean(column) for column in zip(*(
        [result["accuracy"] for result in row] for row in rows))] for name, rows in got.items()}


def show_tune(means):
    print(f"Mean accuracy in percent over seeds {', '.join(map(str, TUNING_SEEDS))}, by learning rate\n")
    table(["method", *GRID], [[name, *(f"**{a:.2f}**" if a == max(row) else f"{a:.2f}" for a in row)]
                              for name, row in means.items()])


PAPER = {   # opponents of HydraLoRA in the table of methods, and by how much it is ahead in the paper
    "LoRA r=8 (w/o MoE)": "+4.00 MMLU, Table 2 and Figure 6",
    "equal gates (w/o gate)": "+4.41 MMLU, Figure 6",
    "LoRA, same size": "+1.77 MMLU, r=16 in Table 2",
    "LoRA r=32": "+0.63 MMLU, Table 2",
    "whole LoRAs + router, same size": "",
    "whole LoRAs + router, r=8": "+1.2 BBH, LoRA MoE in Table 3",
    "LoRA-Split by domain, r=6": "",
    "LoRA-Split by domain, r=8": "+0.28 MMLU, Table 2 and Figure 6 (w/o hydra)",
    "HydraLoRA, true gate": "",
    "router on A x": "",
    "LoRA-Split by data set, 90% pure": "", "LoRA-Split by data set, 50% pure": "",
    "LoRA-Split by chance": "", "HydraLoRA, data set as gate, 90% pure": "",
    "HydraLoRA, data set as gate, 50% pure": "",
}


def paper(device):
    got = run_all(REPORTED_SEEDS, methods(), [None], device)
    corpora = [(seed, Corpus(seed, DOMAINS)) for seed in range(10)]
    return dict(runs={name: [row[0] for row in rows] for name, rows in got.items()}, heads_found=[
        num_heads_from_corpus(c.sample(600, "training", c.new)[0].tolist(), seed=seed)[0]
        for seed, c in corpora])


def spread(values):
    return f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}"


def show_paper(measured):
    """Markdown, as it stands in README.md."""
    runs = measured["runs"]
    of = lambda name, key="accuracy": [result[key] for result in runs[name]]

    def ahead(name, opponent):
        """The cells: accuracy of both, paired difference, seeds ahead."""
        differences = [a - b for a, b in zip(of(name), of(opponent))]
        count = sum(d > 0 for d in differences)
        return (spread(of(name)), spread(of(opponent)), spread(differences).replace("-0.00", "0.00"),
                f"{count} of {len(differences)}")

    mean = lambda name, opponent: statistics.mean(of(name)) - statistics.mean(of(opponent))
    static = statistics.mean(m["mean"] - m["routed"] for m in of("HydraLoRA", "merged"))
    print(f"**In points of accuracy: a router instead of one LoRA of the same size "
          f"{mean('HydraLoRA', 'LoRA, same size'):+.2f}; sharing A at the same size "
          f"{mean('HydraLoRA r=3 of 3 domains', 'whole LoRAs r=2 of 3 domains'):+.2f} at r = 3 against 2, "
          f"{mean('HydraLoRA', 'whole LoRAs + router, same size'):+.2f} at r = 8 against 5; the router "
          f"instead of true labels {mean('HydraLoRA', 'HydraLoRA, true gate'):+.2f}; one static weight instead "
          f"of the router {static:+.2f}.**\n")
    print(f"HydraLoRA, {runs['HydraLoRA'][0]['size']:,} parameters, {spread(of('HydraLoRA'))} %, against:\n")
    rows = [[name, f"{runs[name][0]['size']:,}", *ahead("HydraLoRA", name)[1:], says or "-"]
            for name, says in PAPER.items()]
    table(["opponent", "size", "accuracy", "HydraLoRA ahead by", "seeds ahead", "in the paper"],
          sorted(rows, key=lambda row: -mean("HydraLoRA", row[0])))
    print("Sharing A at exactly the same size:\n")
    table(["domains, shared A against whole LoRAs", "gate", "shared A", "whole LoRAs", "ahead by", "seeds ahead"], [
        [what, gate, *ahead(a, b)] for what, gate, a, b in [
            *((f"3, r={r} against {whole}", gate, f"HydraLoRA r={r} of 3 domains{suffix}",
               f"whole LoRAs r={whole} of 3 domains{suffix}") for r, whole in ((3, 2), (6, 4))
              for gate, suffix in (("true", ", true gate"), ("router", ""))),
            ("4, r=8 against 5", "true", "HydraLoRA, true gate", "whole LoRAs, true gate, same size"),
            ("4, r=8 against 5", "router", "HydraLoRA", "whole LoRAs + router, same size")]])
    print("Observation II: mean cosine of two A and of two B of LoRAs that were trained apart:\n")
    table(["trained on", "A at the start", "cosine of A", "cosine of B"], [
        [what, start, spread(of(name, "cosine_A")), spread(of(name, "cosine_B"))] for what, start, name in (
            ("domains", "one", "LoRA-Split by domain, one start of A"),
            ("parts drawn by chance (Figure 9)", "one", "LoRA-Split by chance, one start of A"),
            ("domains", "each its own", "LoRA-Split by domain, r=8"),
            ("parts drawn by chance (Figure 9)", "each its own", "LoRA-Split by chance"))])
    print("Other places for the adapters:\n")
    table(["place", "HydraLoRA", "LoRA, same size", "ahead by", "seeds ahead", "NMI of the best layer"], [
        [place, *ahead(f"HydraLoRA{on}", f"LoRA, same size{on}"), spread(of(f"HydraLoRA{on}", "nmi"))]
        for place, on in (("o", ""), ("q,v", " on q,v"), ("up,down", " on up,down"))])
    heads = {2: "HydraLoRA n=2", 3: "HydraLoRA n=3", 4: "HydraLoRA", 8: "HydraLoRA n=8"}
    print("- Figure 8, number of heads: " + "; ".join(
        f"n={n} {spread(of(name))}" for n, name in heads.items()) + ".")
    print(f"- Figure 7, n from k-means for {DOMAINS} domains, seeds 0 to 9: "
          + " ".join(map(str, measured["heads_found"])) + ".")
    print("- Merging: " + "; ".join(f"{what} {spread([m[way] for m in of('HydraLoRA', 'merged')])}" for way, what in (
        ("routed", "routed"), ("mean", "one weight for the mean gates"),
        ("by_domain", "one for each domain"), ("equal", "one for equal gates"))) + ".")
    print("- %Param of LLaMA2-7B, r=8: " + "; ".join(
        f"N={n} {percent_of_llama(n, False):.3f}, with the router {percent_of_llama(n, True):.3f}"
        for n in (3, 10)) + ". In the paper 0.124 and 0.341.")


def percent_of_llama(n, router):
    """%Param of Tables 2 and 3: two 4096 x 4096 projections in each of 32 layers, r = 8."""
    m = HydraLoRALinear(nn.Linear(4096, 4096, bias=False, device="meta"), r=8, num_heads=n)
    one = m.lora_A.numel() + m.lora_B.numel() + router * m.router.weight.numel()
    return 100 * 64 * one / 6_738_415_616


# ---- --cost ----------------------------------------------------------------------------------


def official_loop(x, W0, A, B, Wg, scaling):
    """The official code's way, from its description: A x and a (tokens, d) result for each head."""
    w = F.linear(x, Wg).softmax(-1)
    y = F.linear(x, W0)
    for i in range(len(B)):
        y = y + w[..., i, None] * F.linear(F.linear(x, A), B[i]) * scaling
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
    """Forward and backward, gradients for x and the adapter, float32. Each round runs all in another
    order, since a function's time depends on the memory that the one before it leaves behind."""
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
        rows.append(dict(
            tokens=tokens, width=width, r=r, n=n,
            seconds={name: statistics.median(t[warm_up:]) for name, t in times.items()},
            saved_bytes={name: saved_bytes(f, inputs) for name, f in functions.items()},
            bound_bytes=4 * (tokens * (r + n + n * r) + n * width * r)))
    return dict(device=torch.cuda.get_device_name() if device == "cuda" else device,
                threads=torch.get_num_threads(), rounds=rounds, rows=rows)


def show_cost(m):
    print(f"Forward and backward, medians of {m['rounds']} rounds, {m['device']}, {m['threads']} threads\n")
    rows = []
    for row in m["rows"]:
        t, kept = row["seconds"], row["saved_bytes"]
        rows.append(["{tokens}, {width}, {r}, {n}".format(**row), f"{1000 * t['linear']:.1f} ms",
                     *(f"{t[name] / t['linear']:.2f}" for name in ("lora_r", "lora_nr", "hydralora", "loop")),
                     f"{t['hydralora'] / t['lora_nr']:.2f}", f"{t['hydralora'] / t['loop']:.2f}",
                     f"{kept['hydralora'] / 1e6:.2f}", f"{kept['loop'] / 1e6:.2f}",
                     f"{kept['hydralora'] / row['bound_bytes']:.2f}"])
    table(["tokens, width, r, n", "frozen linear", "LoRA r", "LoRA n r", "HydraLoRA", "loop", "/ LoRA n r",
           "/ loop", "MB kept", "by the loop", "/ bound"], rows)
    print("LoRA r to loop: time in units of the frozen linear layer's. LoRA n r: a LoRA of rank n r.\n"
          "loop: A x and a (tokens, width) result for each head, the official code's way. MB kept: by\n"
          "autograd for backward, without inputs and weights; bound: A x, w, their product and one copy\n"
          "of the heads.")


# ---- Options ---------------------------------------------------------------------------------


def seed_of(text):
    seed = int(text)
    if not 0 <= seed < 2**40:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**40 - 1, got {seed}")
    return seed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=seed_of, help="of the main run, 0 if not given")
    parser.add_argument("--heads", type=int, help="n, instead of the number found in the corpus")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--check", action="store_true",
                        help="exit 1 unless the heads specialise and HydraLoRA is ahead")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    mode = parser.add_mutually_exclusive_group()
    for name in ("paper", "cost", "tune"):
        mode.add_argument(f"--{name}", action="store_true", help="see above")
    parser.error = lambda message: parser.exit(2, f"train_toy.py: {message}\n")
    options = parser.parse_args()
    device, available = options.device, {"cpu": True, "cuda": torch.cuda.is_available(),
                                         "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if (options.paper or options.cost or options.tune) and (
            options.check or (options.seed, options.heads) != (None, None)):
        parser.error("--seed, --heads and --check belong to the main run")
    if options.heads is not None and options.heads < 1:
        parser.error(f"--heads must be at least 1, got {options.heads}")
    if not available[device]:
        parser.error(f"--device {device}: PyTorch finds none here")
    folder = os.path.dirname(os.path.abspath(options.json or ""))
    try:
        tempfile.TemporaryFile(dir=folder).close()
        if os.path.isdir(options.json or ""):
            raise IsADirectoryError("is a folder")
    except OSError as error:
        parser.error(f"--json {options.json}: {error}")

    torch.set_num_threads(torch.get_num_threads() if options.cost else 1)   # small tensors; same result
    if options.tune:
        result, display = tune(device), show_tune
    elif options.paper:
        result, display = paper(device), show_paper
    elif options.cost:
        result, display = cost(device), show_cost
    else:
        result, display = measure(options.seed or 0, options.heads, device), show
    if options.json:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(result, file, indent=1)
        os.replace(file.name, options.json)
    display(result)
    return 1 if options.check and not result["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
