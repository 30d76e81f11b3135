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
        guess = self.new[:, plain]                                    # (domains, count, LENGTH)
        log_p = self.frequencies.double().log()[:, plain].sum(2, keepdim=True)
        contradicted = torch.where(guess == cipher, 0.0, -torch.inf).cumsum(2).roll(1, 2)
        contradicted[..., 0] = 0                                            # nothing is seen yet
        posterior = (log_p + contradicted).softmax(0)                 # (domains, count, LENGTH)
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

    With a router the paper's LoRA MoE (Eqs. 5 and 6), with labels its LoRA-Split. The paper does
    not say how LoRA-Split chooses in inference; here it gets the label then too.
    """

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.new_empty(self.num_heads * self.r, base.in_features))
        self.reset_parameters()

    def forward(self, x):
        z = F.linear(x, self.lora_A).unflatten(-1, (self.num_heads, self.r))    # (b, t, n, r)
        wz = self.gates(x).unsqueeze(-1) * z * self.scaling                     # (b, t, n, r)
        heads = self.lora_B.transpose(0, 1).flatten(1)                          # (d, n r)
        return self.base(x) + F.linear(wz.flatten(-2), heads)                   # (b, t, d)


def methods(n=DOMAINS):
    """The methods of the main run: name -> arguments of `fine_tune`.

    lr is the best of --tune. `paper` is by how much HydraLoRA is ahead of it there. On square
    layers a LoRA of rank (r (1 + n) + n) / 2 has the size of HydraLoRA of rank r with its router,
    and n whole LoRAs of rank r (n + 1) / (2 n) have that of n heads on one A.
    """
    return {
        "LoRA, same size": dict(n=1, gates="equal", r=math.ceil((RANK * (1 + n) + n) / 2), lr=4e-2,
                                paper="+1.77 MMLU, Table 2 (no router counted)"),
        "whole LoRAs + router, same size": dict(
            n=n, whole=True, r=RANK * (n + 1) // (2 * n), lr=4e-2, paper="-"),
        "HydraLoRA": dict(n=n, lr=4e-2),
        "LoRA-Split by domain, r=8": dict(n=DOMAINS, whole=True, gates="label", purity=1, lr=32e-2,
                                          paper="+0.28 MMLU, Table 2; w/o hydra, Figure 6"),
    }


def adapt(pretrained, seed, *, n, r=RANK, gates="router", whole=False, one_A=False,
          targets=TARGETS, router_input="x"):
    """A copy of the model with adapters. Methods of one rank start from one A; with one_A, so do
    all the LoRAs of `whole`."""
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


def progress(text, last=False):
    """One line rewritten in place on a terminal, plain lines elsewhere."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r{'' if last else text:<78}\r", end="", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)


def set_labels(model, labels):
    for module in model.modules():
        if isinstance(module, LabelGates):
            module.labels = labels


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
        logits = model(batch[:, :-1])[:, positions]                         # (b, positions, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:][:, positions].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress(f"{what}: step {step} of {len(tokens)}, loss {loss.item():.3f}")
    progress(f"{what}: loss {loss.item():.3f} after {len(tokens)} steps, "
             f"{time.perf_counter() - start:.1f} s", last=True)


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
        self.train_tokens, self.train_domain = (
            t.unflatten(0, (STEPS, BATCH))
            for t in corpus.sample(STEPS * BATCH, "training", corpus.new))
        self.tokens, self.domain = corpus.sample(EVALUATION, "test", corpus.new)


def means(right, domain):
    """The mean of each domain, as a list."""
    return [right[domain == t].mean().item() for t in domain.unique()]


def fine_tune(world, name, *, lr, purity=None, domains=None, paper=None, **method):
    """Adapt the world's model by one method -> (model, what was measured)."""
    model, labels, test_labels = adapt(world.model, world.seed, **method), None, None
    if purity is not None:
        labels = data_sets(world.train_domain, purity, stream(world.seed, "training labels"))
        test_labels = data_sets(world.domain, purity, stream(world.seed, "test labels"))
    train(model, world.train_tokens, lr, name, labels=labels)
    right = accuracy(logits_of(model, world.tokens, test_labels), world.tokens)
    return model, dict(size=sum(p.numel() for p in model.parameters() if p.requires_grad),
                       accuracy=right.mean().item(), by_domain=means(right, world.domain))


# ---- A look at the heads ---------------------------------------------------------------------


def gates_of(model, tokens):
    """w in each layer where enciphered symbols are predicted: name -> (count, LENGTH, n)."""
    with record_gates(model) as gates:
        logits_of(model, tokens)
    return {name: w[:, CIPHERED].cpu() for name, w in gates.items()}


def by_domain(w, domain):
    """Mean gates of each domain: (count, LENGTH, n) -> (domains, n)."""
    return torch.stack([w[domain == t].flatten(0, 1).mean(0) for t in domain.unique()])


def nmi(w, domain):
    """2 I(domain; head) / (H(domain) + H(head)), where each token draws its head from its gates.

    0: the gates say nothing of the domain. 1: one head for each domain, with certainty.
    """
    joint = by_domain(w, domain).double() * torch.bincount(domain)[:, None] / len(domain)
    entropy = lambda p: -torch.xlogy(p, p).sum().item()
    of_domain, of_head = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (of_domain + of_head - entropy(joint)) / (of_domain + of_head)


def of_symbol_alone(w, plain):
    """The gates (count, LENGTH, n), averaged over all tokens with the same plain symbol: what a
    router gives that sorts symbols and knows nothing else of the domain."""
    which = F.one_hot(plain, SYMBOLS).to(w)                                 # (count, LENGTH, 24)
    mean = torch.einsum("cls,cln->sn", which, w) / which.sum((0, 1))[:, None]
    return mean[plain]                                                      # (count, LENGTH, n)


def with_labels(model, world):
    """The gates of a router of the same form and input that learns the domain from labels: the
    estimate of what a router could know. name -> (count, LENGTH, domains)"""
    seen, gates = {}, {}
    tokens, domain = world.corpus.sample(1000, "calibration", world.corpus.new)
    with contextlib.ExitStack() as hooks:
        for name, layer in hydralora_layers(model).items():
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda layer, inputs, name=name: seen.update({name: inputs[0][:, CIPHERED].cpu()})))
        logits_of(model, torch.cat([tokens, world.tokens]))
    for name, x in seen.items():                                            # (count, LENGTH, k)
        router = Router(x.shape[-1], world.domains)
        optimizer = torch.optim.LBFGS(
            router.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            logits = F.linear(x[:len(tokens)], router.weight).flatten(0, 1)
            loss = F.cross_entropy(logits, domain.repeat_interleave(LENGTH))
            loss.backward()
            return loss
        optimizer.step(loss)
        gates[name] = router(x[len(tokens):]).detach()
    return gates


def knock_out(model, where, world):
    """Points of accuracy that each domain loses without one head of a layer: (domains, n)."""
    def by_domain_without(head):
        def rest(name, w):
            if name == where:
                w = w * (torch.arange(w.shape[-1], device=w.device) != head)
                return w / w.sum(-1, keepdim=True).clamp_min(1e-9)
        with hook_gates(model, rest):
            return means(accuracy(logits_of(model, world.tokens), world.tokens), world.domain)
    before = by_domain_without(None)
    lost = [[a - b for a, b in zip(before, by_domain_without(head))]
            for head in range(hydralora_layers(model)[where].num_heads)]
    return [list(row) for row in zip(*lost)]


def cosine(matrices):
    """Mean cosine of two different matrices out of (n, ...)."""
    rows = F.normalize(matrices.detach().flatten(1), dim=1)                 # (n, entries)
    n = len(rows)
    return (((rows @ rows.T).sum().item() - n) / (n * (n - 1))) if n > 1 else 1.0


def specialisation(model, world):
    """Whether and where the heads go by domain, and the controls for that."""
    gates, probes = gates_of(model, world.tokens), with_labels(model, world)
    n = next(iter(gates.values())).shape[-1]
    untrained = gates_of(adapt(world.model, world.seed, n=n), world.tokens)
    shuffled = world.domain[torch.randperm(EVALUATION, generator=stream(world.seed, "test labels"))]
    layers = {name: {
        "router": nmi(w, world.domain),
        "symbol alone": nmi(of_symbol_alone(w, world.tokens[:, :LENGTH]), world.domain),
        "untrained": nmi(untrained[name], world.domain),
        "shuffled labels": nmi(w, shuffled),
        "learnt from labels": nmi(probes[name], world.domain),
        "cosine of two heads": cosine(hydralora_layers(model)[name].lora_B)}
        for name, w in gates.items()}
    best = max(layers, key=lambda name: layers[name]["router"] - layers[name]["symbol alone"])
    return dict(layers=layers, best=best, gates=by_domain(gates[best], world.domain).tolist(),
                lost=knock_out(model, best, world))


# ---- Merging ---------------------------------------------------------------------------------


def merged(model, gates, tokens):
    """Logits with the adapters merged for these gates; the model comes back as it was."""
    layers = merge_hydralora(model, gates)
    logits = logits_of(model, tokens)
    unmerge_hydralora(model, layers)
    return logits


def merging(model, world):
    """What merging costs: way to merge -> accuracy, and relative error of the logits."""
    tokens, domain = world.corpus.sample(1000, "calibration", world.corpus.new)
    mask = torch.zeros(len(tokens), 2 * LENGTH)
    mask[:, CIPHERED] = 1                                                   # these tokens count

    def mean_over(chosen):
        return mean_gates(model, [tokens[chosen, :-1].to(world.device)], [mask[chosen]])

    mean, ways = mean_over(domain >= 0), {"routed": logits_of(model, world.tokens)}
    ways["mean gates"] = merged(model, mean, world.tokens)
    ways["equal gates"] = merged(
        model, {name: torch.full_like(w, 1 / len(w)) for name, w in mean.items()}, world.tokens)
    ways["each domain's mean"] = torch.empty_like(ways["routed"])
    for t in range(world.domains):
        own = world.domain == t
        ways["each domain's mean"][own] = merged(model, mean_over(domain == t), world.tokens[own])
    with hook_gates(model, lambda name, w: mean[name].expand_as(w)):
        held = logits_of(model, world.tokens)       # not merged, but every router held at its mean
    error = lambda y, expected: ((y - expected).norm() / expected.norm()).item()
    return dict(accuracy={way: accuracy(y, world.tokens).mean().item() for way, y in ways.items()},
                error={way: error(y, ways["routed"]) for way, y in ways.items()},
                error_if_held=error(ways["mean gates"], held))


# ---- The main run ----------------------------------------------------------------------------

# --check: HydraLoRA is ahead of the LoRA, and in one layer the NMI of domain and head
MIN_NMI = 0.2               # is at least this
MIN_NMI_OVER_SYMBOL = 0.1   # and exceeds by this the NMI of a router that only sorts symbols,
MAX_NMI_SHUFFLED = 0.02     # while with shuffled labels no layer is above this


def measure(seed, heads, device):
    """Everything that the main run measures, as a dict; --json writes it."""
    world = World(seed, DOMAINS, device)
    found, sse = num_heads_from_corpus(world.train_tokens.flatten(0, 1)[:600].tolist())
    models, results = {}, {}
    for name, method in methods(heads or found).items():
        models[name], results[name] = fine_tune(world, name, **method)
    model = models["HydraLoRA"]
    special, bayes = specialisation(model, world), 100 * world.corpus.bayes_accuracy(world.tokens)
    lora, hydra = results["LoRA, same size"]["accuracy"], results["HydraLoRA"]["accuracy"]
    layers = special["layers"].values()
    best = special["layers"][special["best"]]
    specialised = (best["router"] >= max(MIN_NMI, best["symbol alone"] + MIN_NMI_OVER_SYMBOL)
                   and max(layer["shuffled labels"] for layer in layers) <= MAX_NMI_SHUFFLED)
    return dict(
        seed=seed, device=device, heads_found=found, num_heads=heads or found, sse=sse,
        frozen=accuracy(logits_of(world.model, world.tokens), world.tokens).mean().item(),
        bayes=bayes, methods=results, gain=hydra - lora, closed=(hydra - lora) / (bayes - lora),
        specialisation=special, nmi=best["router"], merging=merging(model, world),
        specialised=specialised, passed=specialised and hydra > lora)


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
    special, merge, two = m["specialisation"], m["merging"], "{:.2f}".format
    heads = [f"head {i}" for i in range(m["num_heads"])]
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {m['seed']}, {m['device']}, o_proj\n\n"
          f"1. How many heads? k-means on 600 sequences, no labels: n = {m['heads_found']}; "
          f"used: {m['num_heads']}\n   SSE of 1, 2, ... centres:", *map(round, m["sse"]))
    print("\n2. Accuracy on the enciphered symbols after fine-tuning on new ciphers, in percent\n")
    table(["method", "size", "accuracy", *(f"domain {t}" for t in range(DOMAINS))], [
        [name, f"{r['size']:,}", two(r["accuracy"]), *map(two, r["by_domain"])]
        for name, r in m["methods"].items()])
    print(f"   Without adapter {m['frozen']:.2f}; limit without labels (Bayes) {m['bayes']:.2f}:\n"
          f"   HydraLoRA goes {m['closed']:.0%} of the way there from the LoRA of its size.\n\n"
          "3. Do the heads specialise? NMI of domain and head: 0, not at all; 1, a head each\n")
    columns = list(next(iter(special["layers"].values())))
    table(["layer", *columns], [[name, *(f"{layer[column]:.3f}" for column in columns)]
                                for name, layer in special["layers"].items()])
    print(f"   Mean gates in {special['best']}\n")
    table(["", *heads], [[f"domain {t}", *(f"{w:.2f} {'#' * round(10 * w)}" for w in row)]
                         for t, row in enumerate(special["gates"])])
    print("   Points of accuracy lost without a head\n")
    table(["", *heads], [[f"domain {t}", *map(two, row)] for t, row in enumerate(special["lost"])])
    print("4. Merged into plain linear layers, for fixed gates\n")
    table(["gates", "accuracy", "error of the logits"], [
        [way, two(a), f"{merge['error'][way]:.3f}"] for way, a in merge["accuracy"].items()])
    print(f"   Exact for fixed gates: {merge['error_if_held']:.0e} from routers held at the mean\n")
    print(f"The heads {'specialise' if m['specialised'] else 'do NOT specialise'}: NMI "
          f"{m['nmi']:.2f} in {special['best']}. HydraLoRA is {m['gain']:+.2f} points from LoRA.")


# ---- --paper and --tune: many methods, many seeds --------------------------------------------

GRID = (1e-2, 2e-2, 4e-2, 8e-2, 16e-2, 32e-2)           # of learning rates
TUNING_SEEDS, REPORTED_SEEDS = range(5), range(5, 10)   # no seed is both


def all_methods():
    """The main run's methods and those that --paper compares them with."""
    lora, hydra, whole = dict(n=1, gates="equal"), dict(n=DOMAINS), dict(n=DOMAINS, whole=True)
    true, three = dict(gates="label", purity=1), dict(domains=3, n=3)
    split, same = dict(whole, gates="label", paper="-"), methods()
    gated = dict(hydra, gates="label", paper="-")
    of_size = same["LoRA, same size"] | dict(paper=None)
    qv, mlp = dict(targets=("q_proj", "v_proj")), dict(targets=("up_proj", "down_proj"))
    return same | {
        "LoRA r=8 (w/o MoE)": dict(lora, lr=4e-2, paper="+4.00 MMLU, Table 2 and Figure 6"),
        "LoRA r=32": dict(lora, r=32, lr=2e-2, paper="+0.63 MMLU, Table 2"),
        "equal gates (w/o gate)": dict(hydra, gates="equal", lr=4e-2, paper="+4.41 MMLU, Figure 6"),
        "whole LoRAs + router, r=8": dict(whole, lr=4e-2, paper="+1.2 BBH, LoRA MoE in Table 3"),
        "router on A x": dict(hydra, router_input="Ax", lr=4e-2, paper="-"),
        "HydraLoRA, true gate": dict(gated, purity=1, lr=32e-2),
        "HydraLoRA, data set as gate, 90% pure": dict(gated, purity=0.9, lr=16e-2),
        "LoRA-Split by domain, r=6": dict(split, purity=1, r=6, lr=32e-2),
        "LoRA-Split by data set, 90% pure": dict(split, purity=0.9, lr=8e-2),
        "LoRA-Split by chance": dict(split, purity=0, lr=4e-2),
        "LoRA-Split by domain, from one A": dict(whole, **true, one_A=True, lr=32e-2),
        "LoRA-Split by chance, from one A": dict(
            whole, gates="label", purity=0, one_A=True, lr=4e-2),
        "whole LoRAs, true gate, same size": dict(whole, **true, r=5, lr=8e-2),
        "HydraLoRA n=2": dict(n=2, lr=4e-2),
        "HydraLoRA n=3": dict(n=3, lr=4e-2),
        "HydraLoRA n=8": dict(n=8, lr=2e-2),
        "HydraLoRA on q,v": dict(hydra, **qv, lr=2e-2),
        "LoRA, same size on q,v": of_size | dict(**qv, lr=2e-2),
        "HydraLoRA on up,down": dict(hydra, **mlp, lr=1e-2),
        "LoRA, same size on up,down": of_size | dict(**mlp, lr=2e-2),
        "HydraLoRA r=3 of 3 domains": dict(three, r=3, lr=8e-2),
        "HydraLoRA r=6 of 3 domains": dict(three, r=6, lr=4e-2),
        "whole LoRAs r=2 of 3 domains": dict(three, whole=True, r=2, lr=4e-2),
        "whole LoRAs r=4 of 3 domains": dict(three, whole=True, r=4, lr=4e-2),
        "HydraLoRA r=3 of 3 domains, true gate": dict(three, **true, r=3, lr=32e-2),
        "HydraLoRA r=6 of 3 domains, true gate": dict(three, **true, r=6, lr=32e-2),
        "whole LoRAs r=2 of 3 domains, true gate": dict(three, **true, whole=True, r=2, lr=8e-2),
        "whole LoRAs r=4 of 3 domains, true gate": dict(three, **true, whole=True, r=4, lr=16e-2),
    }


def run(world, name, lr):
    """One method -> what was measured; with lr=None the table's."""
    method = all_methods()[name] | ({} if lr is None else dict(lr=lr))
    model, result = fine_tune(world, name, **method)
    layers = hydralora_layers(model).values()
    if name.startswith("LoRA-Split"):
        result["cosine of A"] = statistics.mean(
            cosine(m.lora_A.unflatten(0, (m.num_heads, -1))) for m in layers)
        result["cosine of B"] = statistics.mean(cosine(m.lora_B) for m in layers)
    if name.startswith("HydraLoRA") and method.get("gates") is None:
        result["nmi"] = max(nmi(w, world.domain) for w in gates_of(model, world.tokens).values())
    if name == "HydraLoRA" and lr is None:
        result["merged"] = merging(model, world)["accuracy"]
    return result


def run_world(jobs):
    """job -> result, for jobs that share a World: one seed, one number of domains."""
    seed, name, _, device = jobs[0]
    world = World(seed, all_methods()[name].get("domains", DOMAINS), device)
    return {job: run(world, *job[1:3]) for job in jobs}


def start_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches the parent, which ends all


def run_all(seeds, names, lrs, device):
    """name -> for each seed a list with one result for each lr; in as many processes as cores."""
    worlds, results = {}, {}
    for job in itertools.product(seeds, names, lrs, [device]):
        domains = all_methods()[job[1]].get("domains", DOMAINS)
        worlds.setdefault((job[0], domains), []).append(job)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_worker) as pool:
        for done in pool.imap(run_world, sorted(worlds.values(), key=len, reverse=True)):
            results |= done
    return {name: [[results[seed, name, lr, device] for lr in lrs] for seed in seeds]
            for name in names}


def tune(device):
    """name -> mean accuracy at each learning rate, over the tuning seeds."""
    got = run_all(TUNING_SEEDS, all_methods(), GRID, device)
    mean = lambda results: statistics.mean(result["accuracy"] for result in results)
    return {name: list(map(mean, zip(*rows))) for name, rows in got.items()}


def show_tune(means):
    print(f"Mean accuracy over seeds {', '.join(map(str, TUNING_SEEDS))}, by learning rate\n")
    table(["method", *GRID], [
        [name, *(f"**{a:.2f}**" if a == max(row) else f"{a:.2f}" for a in row)]
        for name, row in means.items()])


SHARING = [(f"3 domains, r={r} against {of_whole}{gate or ', router'}",
            f"HydraLoRA r={r} of 3 domains{gate}", f"whole LoRAs r={of_whole} of 3 domains{gate}")
           for r, of_whole in ((3, 2), (6, 4)) for gate in (", true gate", "")] + [
    ("4 domains, r=8 against 5, true gate",
     "HydraLoRA, true gate", "whole LoRAs, true gate, same size"),
    ("4 domains, r=8 against 5, router", "HydraLoRA", "whole LoRAs + router, same size")]


def paper(device):
    got = run_all(REPORTED_SEEDS, all_methods(), [None], device)
    corpora = [Corpus(seed, DOMAINS) for seed in range(10)]
    samples = [c.sample(600, "training", c.new)[0].tolist() for c in corpora]
    return dict(runs={name: [row[0] for row in rows] for name, rows in got.items()},
                heads_found=[num_heads_from_corpus(sample)[0] for sample in samples])


def spread(values):
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.2f} +- {deviation:.2f}".replace("-0.00", "0.00")


def show_paper(measured):
    """Markdown, as it stands in README.md."""
    def of(name, key="accuracy"):
        return [result[key] for result in measured["runs"][name]]

    def ahead(name, opponent):
        return [a - b for a, b in zip(of(name), of(opponent))]      # of one seed each

    def cells(name, opponent):
        differences = ahead(name, opponent)
        return [spread(of(opponent)), spread(differences),
                f"{sum(d > 0 for d in differences)} of {len(differences)}"]

    def points(differences):
        return f"{statistics.mean(differences):+.2f}"

    ways = of("HydraLoRA", "merged")
    router = ahead("HydraLoRA", "LoRA, same size")
    labels = ahead("HydraLoRA", "HydraLoRA, true gate")
    print(f"**Points of accuracy: a router instead of one LoRA, same size, {points(router)}; one "
          f"shared A instead of whole LoRAs, same size, {points(ahead(*SHARING[1][1:]))} at rank 3 "
          f"and {points(ahead(*SHARING[5][1:]))} at rank 8; the router instead of true labels "
          f"{points(labels)}; one static weight instead of the router "
          f"{points([m['mean gates'] - m['routed'] for m in ways])}.**")
    print(f"\nHydraLoRA r={RANK}, n={DOMAINS}, {of('HydraLoRA', 'size')[0]:,} parameters: "
          f"{spread(of('HydraLoRA'))} percent, against\n")
    opponents = {name: m["paper"] for name, m in all_methods().items() if m.get("paper")}
    table(["opponent", "size", "accuracy", "HydraLoRA ahead by", "seeds ahead", "in the paper"], [
        [name, f"{of(name, 'size')[0]:,}", *cells("HydraLoRA", name), opponents[name]]
        for name in sorted(opponents, key=lambda name: statistics.mean(of(name)))])
    table(["sharing A at exactly equal size", "shared A", "whole LoRAs", "ahead by", "seeds ahead"],
          [[what, spread(of(shared)), *cells(shared, whole)] for what, shared, whole in SHARING])
    apart = {"on domains, from one A": "LoRA-Split by domain, from one A",
             "on parts by chance, from one A": "LoRA-Split by chance, from one A",
             "on domains, from an A each": "LoRA-Split by domain, r=8",
             "on parts by chance, from an A each": "LoRA-Split by chance"}
    print("- Observation II, cosine of two A and of two B of LoRAs trained apart:", "; ".join(
        f"{what} {spread(of(name, 'cosine of A'))} and {spread(of(name, 'cosine of B'))}"
        for what, name in apart.items()))
    places = []
    for place, on in (("o", ""), ("q,v", " on q,v"), ("up,down", " on up,down")):
        _, difference, seeds = cells("HydraLoRA" + on, "LoRA, same size" + on)
        places += [f"on {place} {difference}, {seeds}, {spread(of('HydraLoRA' + on, 'nmi'))}"]
    print("- Ahead of LoRA, same size, seeds ahead, NMI of the best layer:", "; ".join(places))
    heads = {2: "HydraLoRA n=2", 3: "HydraLoRA n=3", 4: "HydraLoRA", 8: "HydraLoRA n=8"}
    llama = "; ".join(f"N={n} {percent_of_llama(n, router=False):.3f}, with the router "
                      f"{percent_of_llama(n, router=True):.3f}" for n in (3, 10))
    print("- Figure 8, heads:", "; ".join(f"n={n} {spread(of(name))}" for n, name in heads.items()))
    print(f"- Figure 7, n from k-means for {DOMAINS} domains, 10 seeds:", *measured["heads_found"])
    print("- Merged:", "; ".join(f"{way} {spread([m[way] for m in ways])}" for way in ways[0]))
    print(f"- %Param of LLaMA2-7B, r=8: {llama}; paper: 0.124 and, from a rounded 0.062, 0.341")


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
    """Forward and backward, gradients for x and the adapter, float32. Each round takes another
    order, since a function's time depends on the memory that the one before it leaves behind."""
    rows = []
    for tokens, width, r, n in ((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)):
        torch.manual_seed(0)
        linear = nn.Linear(width, width, bias=False, device=device)
        layer = HydraLoRALinear(linear, num_heads=n, r=r)
        make = lambda *shape: torch.randn(*shape, device=device, requires_grad=True)
        x, grad, A1, B1 = (make(*shape) for shape in (
            (tokens, width), (tokens, width), (n * r, width), (width, n * r)))
        W0, A, B, Wg, scaling = (layer.weight, layer.lora_A, layer.lora_B, layer.router.weight,
                                 layer.scaling)
        inputs = (x, W0, A, B, Wg, A1, B1)
        functions = dict(lora=lambda: lora(x, W0, A1, B1, scaling), hydralora=lambda: layer(x),
                         loop=lambda: official_loop(x, W0, A, B, Wg, scaling))
        times, order = {name: [] for name in functions}, random.Random(0)
        for _ in range(warm_up + rounds):
            for name in order.sample(list(functions), len(functions)):
                for tensor in inputs:
                    tensor.grad = None
                start = time.perf_counter()
                functions[name]().backward(grad.detach())
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
    print(f"Forward and backward, {m['rounds']} rounds, {m['device']}, {m['threads']} threads\n")
    rows = []
    for row in m["rows"]:
        time, kept = row["seconds"], row["saved_bytes"]
        rows.append(["{tokens}, {width}, {r}, {n}".format(**row),
                     *(f"{time['hydralora'] / time[other]:.2f}" for other in ("lora", "loop")),
                     *(f"{kept[name] / 1e6:.2f}" for name in ("hydralora", "loop")),
                     f"{kept['hydralora'] / row['bound_bytes']:.2f}"])
    table(["tokens, width, r, n", "time / LoRA of rank n r", "time / loop", "MB kept",
           "MB kept by the loop", "MB / bound"], rows)
    print("Medians. loop: A x and a (tokens, width) result for each head, the official code's\n"
          "way. MB kept: by autograd for backward, without inputs and weights. bound: A x, w,\n"
          "their product and one copy of the heads.")


# ---- Options ---------------------------------------------------------------------------------


def new_file(path):
    """A path that can be written; nothing is written yet."""
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("is a folder")
        tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(path))).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}")
    return path


def number(least, below):
    def read(text):
        if not text.isdigit() or not least <= int(text) < below:
            raise argparse.ArgumentTypeError(f"must be from {least} to {below - 1}, got {text}")
        return int(text)
    return read


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=number(0, 2**40), help="of the main run, 0 if not given")
    parser.add_argument("--heads", type=number(1, 1000), help="n, not that found in the corpus")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--check", action="store_true",
                        help="exit 1 unless the heads specialise and HydraLoRA is ahead")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all that was measured")
    mode = parser.add_mutually_exclusive_group()
    for name in ("paper", "cost", "tune"):
        mode.add_argument(f"--{name}", action="store_true", help="see above")
    parser.error = lambda message: parser.exit(2, f"train_toy.py: {message}\n")
    options = parser.parse_args()
    available = dict(
        cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = options.device if options.device != "auto" else max(available, key=available.get)
    if not available[device]:
        parser.error(f"--device {device}: PyTorch finds none here")
    if (options.paper or options.cost or options.tune) and (
            options.check or (options.seed, options.heads) != (None, None)):
        parser.error("--seed, --heads and --check belong to the main run")

    if not options.cost:
        torch.set_num_threads(1)    # small tensors; and the result is the same on any machine
    if options.tune:
        result, display = tune(device), show_tune
    elif options.paper:
        result, display = paper(device), show_paper
    elif options.cost:
        result, display = cost(device), show_cost
    else:
        result, display = measure(options.seed or 0, options.heads, device), show
    if options.json:
        with open(options.json + ".part", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(file.name, options.json)
    display(result)
    return 1 if options.check and not result["passed"] else 0


if __name__ == "__main__":
    try:
        code = main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:             # piped to head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
