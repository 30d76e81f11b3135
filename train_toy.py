# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the authors of HydraLoRA in one file
"""Do the heads of HydraLoRA specialise, and what are the router and the shared A worth?

    python train_toy.py             the experiment: under a minute on a CPU
    python train_toy.py --paper     the README's table, ten seeds: ten minutes on two cores
    python train_toy.py --cost      time and memory of the layer: half a minute
    python train_toy.py --tune      the learning rates, on five other seeds: an hour

A sequence belongs to a hidden domain, and each domain has a cipher of its own:

    d b d d a d ...  ? ? ? ? ? ? ...        read: plain symbols, and as many question marks
                     k f k k c k ...        to be said there: the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen. Then adapters learn a new set.
No label says which domain a sequence is from. All methods see the same batches.

The world is made for a router: the domains conflict, and each prefers its own third of the
symbols, which the frozen model has learnt to look at. Adapters sit on the last o_proj, where
domain and symbol come together, unless a name says where.
"""
import argparse
import copy
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting must not cost a core
import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers, inject_hydralora,
    mean_gates, merge_hydralora, num_heads_from_corpus, record_gates, unmerge_hydralora)

DOMAINS = 3             # hidden kinds of sequences
SYMBOLS = 15            # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4          # how much more often a domain uses a symbol of its own third
LENGTH = 24             # plain symbols in a sequence, and question marks
PURITY = 0.9            # share of a data set from one domain; the rest is from any
BATCH = 48              # sequences in a step
PRETRAIN_STEPS = 400    # on the old ciphers, all weights
STEPS = 400             # on the new ciphers, the adapter only
EVALUATION = 2000       # test sequences
RANK = 9                # r of HydraLoRA
PRETRAINING, TRAINING, TEST = range(3)  # uses of the corpus
MODEL = TinyConfig(
    vocab_size=SYMBOLS + 1,
    max_position_embeddings=2 * LENGTH,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=8)


# ---- The methods ----
@dataclass
class Method:
    """What is trained, where in the last block, and at which rates."""
    lr: float               # of all but A
    lr_A: float             # of A, as a multiple of lr
    kind: str = "HydraLoRA"     # or "whole LoRAs", or "layer": no adapter, o_proj itself
    places: tuple = ("o_proj",)
    n: int = DOMAINS        # heads; one head is LoRA
    r: int = RANK
    gates: str = "router"   # or the label that names a head: "domain", "data_set"
    passes: int = 1         # over the training data


def methods(n=DOMAINS):
    """Name -> Method. Sizes are made equal by the ranks: on o_proj HydraLoRA has r (1 + n) + n
    vectors, a LoRA 2 r, n whole LoRAs with a router 2 r n + n. The rates are the best of --tune.
    They are larger than usual, since a run has 400 steps and B starts at zero."""
    same = RANK * (1 + n) + n
    whole = RANK * (1 + n) // (2 * n)
    split = RANK * (1 + DOMAINS) // (2 * DOMAINS)  # as HydraLoRA without its router
    mlp, q_v = ("up_proj", "down_proj"), ("q_proj", "v_proj")
    return {
        "LoRA, same size": Method(0.08, 0.1, n=1, r=(same + 1) // 2),
        "o_proj itself, tuned": Method(0.08, 1, "layer"),
        "whole LoRAs + router, same size": Method(1.28, 0.1, "whole LoRAs", n=n, r=whole),
        "LoRA-Split by 90% pure data sets": Method(
            1.28, 0.1, "whole LoRAs", r=split, gates="data_set"),
        "LoRA on up_proj and down_proj": Method(0.08, 0.1, places=mlp, n=1, r=round(same / 10)),
        "HydraLoRA": Method(1.28, 1, n=n),
        "HydraLoRA, true gate": Method(1.28, 0.1, gates="domain"),
        "LoRA-Split by true domain": Method(1.28, 1, "whole LoRAs", r=split, gates="domain"),
        "whole LoRAs + router, same rank": Method(0.32, 0.1, "whole LoRAs"),
        "LoRA of full rank, 4 passes": Method(0.08, 0.1, n=1, r=96, passes=4),
        "LoRA on q_proj and v_proj": Method(0.08, 0.1, places=q_v, n=1, r=10),
        "HydraLoRA on q_proj and v_proj": Method(0.08, 0.1, places=q_v, r=4)}


class FixedGates(nn.Module):
    """In the router's place: gates that the caller sets before each call."""
    gates = None  # (b, 1, n)

    def forward(self, x):
        return self.gates.to(x).expand(*x.shape[:-1], -1)  # (b, t, n)


def give_labels(top, labels):
    """Set the gates so that each sequence has the head of its label: labels (b,)."""
    top.block.o_proj.router.gates = F.one_hot(labels, DOMAINS)[:, None]


class WholeLoRAs(nn.Module):
    """sum_i w_i B_i A_i x, made from a HydraLoRA layer, whose A all A_i start from. With a router
    it is the paper's LoRA MoE (Eqs. 5 and 6), with labels its LoRA-Split."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.router, self.scaling = layer.base, layer.router, layer.scaling
        self.lora_A = nn.Parameter(layer.lora_A.detach().repeat(layer.num_heads, 1, 1))
        self.lora_B = layer.lora_B  # (n, d, r); lora_A (n, r, k)

    def forward(self, x):
        w = self.router(x)  # (b, t, n)
        z = torch.einsum("btk,nrk->btnr", x, self.lora_A)
        wz = w.unsqueeze(-1) * z * self.scaling  # (b, t, n, r)
        return self.base(x) + torch.einsum("btnr,ndr->btd", wz, self.lora_B)


def adapt(top, seed, method):
    """A copy of `top` with what the method trains. Methods of one rank start from one A."""
    top = copy.deepcopy(top)
    if method.kind == "layer":
        top.block.o_proj.requires_grad_(True)
        return top
    inject_hydralora(
        top, method.places, num_heads=method.n, r=method.r, lora_alpha=2 * method.r)
    torch.manual_seed(seed)
    for layer in hydralora_layers(top).values():
        layer.reset_parameters()
        if method.n == 1:
            layer.router.requires_grad_(False)  # the gate of one head is 1
        if method.gates != "router":
            layer.router = FixedGates()
    if method.kind == "whole LoRAs":
        top.block.o_proj = WholeLoRAs(top.block.o_proj)
    return top


class Top(nn.Module):
    """The last block and lm_head, at the question marks alone: h (b, 2 LENGTH, width) -> logits
    (b, LENGTH, vocabulary). x is what o_proj reads, computed once, if the attention is frozen."""

    def __init__(self, model):
        super().__init__()
        self.block, self.norm, self.lm_head = model.layers[-1], model.norm, model.lm_head

    def attention(self, h):
        return self.block.attention(h)[:, LENGTH:]  # (b, LENGTH, width)

    def forward(self, h, x=None):
        if x is None or isinstance(self.block.q_proj, HydraLoRALinear):
            x = self.attention(h)  # (b, LENGTH, width)
        h = h[:, LENGTH:] + self.block.o_proj(x)
        h = h + self.block.down_proj(F.gelu(self.block.up_proj(self.block.mlp_norm(h))))
        return self.lm_head(self.norm(h))  # (b, LENGTH, vocabulary)


# ---- Training and evaluation ----
def train(model, inputs, targets, lr, what, lr_A=1, labels=None, passes=1):
    """AdamW on OneCycle, cross-entropy. Each step takes the next BATCH of the inputs, each
    (count, ...), targets (count, positions) and labels (count,), if there are any."""
    groups = [dict(params=[p], lr=lr * lr_A if name.endswith("lora_A") else lr)
              for name, p in model.named_parameters() if p.requires_grad]
    steps, rates = passes * len(targets) // BATCH, [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)  # 0.999 is slow
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        first = step * BATCH % len(targets)
        batch = slice(first, first + BATCH)
        if labels is not None:
            give_labels(model, labels[batch])
        logits = model(*[t[batch] for t in inputs])  # (BATCH, positions, classes)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{what}: loss {loss:.3f}", file=sys.stderr)


class World:
    """What the methods of one seed share: the corpus, the frozen model and the data."""

    def __init__(self, seed, device):
        self.seed, self.device = seed, device
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)
        chance = torch.Generator().manual_seed(seed)
        ciphers = [torch.randperm(SYMBOLS, generator=chance) for _ in range(2 * DOMAINS)]
        self.old = torch.stack(ciphers[:DOMAINS])  # (domains, symbols), as the frequencies
        self.new = torch.stack(ciphers[DOMAINS:])
        torch.manual_seed(seed)
        model = TinyTransformer(MODEL).to(device)
        self.top, self.bottom = Top(model), model
        self.bottom.layers = model.layers[:-1]  # tokens -> h
        self.bottom.norm = self.bottom.lm_head = nn.Identity()
        both = nn.Sequential(self.bottom, self.top)
        tokens, targets, _, _ = self.sample(PRETRAIN_STEPS * BATCH, PRETRAINING, self.old)
        train(both, [tokens], targets, 3e-3, "pre-training")
        both.requires_grad_(False)
        self.training = self.data(STEPS * BATCH, TRAINING)
        self.test = self.data(EVALUATION, TEST)

    def sample(self, count, use, ciphers):
        """tokens (count, 2 LENGTH), targets (count, LENGTH), domain and data set (count,)."""
        chance = torch.Generator().manual_seed(1000 * self.seed + use)
        domain, any_domain = torch.randint(DOMAINS, (2, count), generator=chance)
        pure = torch.rand(count, generator=chance) < PURITY
        plain = torch.multinomial(
            self.frequencies[domain], LENGTH, replacement=True, generator=chance)
        tokens = F.pad(plain, (0, LENGTH), value=SYMBOLS)
        targets = ciphers[domain[:, None], plain]
        data_set = torch.where(pure, domain, any_domain)
        return [t.to(self.device) for t in (tokens, targets, domain, data_set)]

    @torch.no_grad()
    def data(self, count, use):
        """Sequences with new ciphers, and what Top reads there, computed once."""
        tokens, targets, domain, data_set = self.sample(count, use, self.new)
        h = torch.cat([self.bottom(part) for part in tokens.split(BATCH)])
        x = torch.cat([self.top.attention(part) for part in h.split(BATCH)])
        return SimpleNamespace(
            tokens=tokens, targets=targets, domain=domain, data_set=data_set, h=h, x=x)

    def bayes_accuracy(self, data):
        """The limit without labels, in percent: the best guess by all frequencies and ciphers."""
        plain = data.tokens[:, :LENGTH].cpu()
        posterior = self.frequencies.log()[:, plain].sum(2).softmax(0)  # (domains, count)
        answers = F.one_hot(self.new[:, plain], SYMBOLS).float()  # of each domain
        votes = torch.einsum("dc,dcls->cls", posterior, answers)  # (count, LENGTH, symbols)
        return accuracy(votes.to(self.device), data).mean().item()


@torch.no_grad()
def predict(top, data, labels=None):
    """The logits of a whole set: (count, LENGTH, vocabulary)."""
    if labels is not None:
        give_labels(top, labels)
    return top(data.h, data.x)


def accuracy(logits, data):
    """Percent of the enciphered symbols that are right in each sequence: (count,)."""
    return 100 * (logits.argmax(-1) == data.targets).float().mean(1)


def by_domain(values, domain):
    """The mean of each domain: (count, ...) -> (domains, ...)."""
    return torch.stack([values[domain == t].mean(0) for t in range(DOMAINS)])


def fine_tune(world, name, method):
    """Adapt the world's model by one method -> (top, what was measured)."""
    data, test = world.training, world.test
    top = adapt(world.top, world.seed, method)
    labels = getattr(data, method.gates, None)
    train(top, [data.h, data.x], data.targets, method.lr, name,
          lr_A=method.lr_A, labels=labels, passes=method.passes)
    right = accuracy(predict(top, test, getattr(test, method.gates, None)), test)  # (count,)
    size = sum(p.numel() for p in top.parameters() if p.requires_grad)
    return top, dict(size=size, accuracy=right.mean().item(),
                     by_domain=by_domain(right, test.domain).tolist())


# ---- A look at the heads, and merging ----
PLACE = "last o_proj"
WHAT_THEY_ARE = {
    "router": "HydraLoRA's own",
    "symbol alone": "those that a router which sorts symbols alone would give",
    "shuffled labels": "HydraLoRA's own, but with the domains of other sequences"}


def gates_of(top, data):
    """w for each enciphered symbol: (count, LENGTH, n)."""
    with record_gates(top) as gates:
        predict(top, data)
    return gates["block.o_proj"]


def entropy(p):
    return -torch.xlogy(p, p).sum().item()


def nmi(w, domain):
    """2 I(domain; head) / (H(domain) + H(head)), where each token draws its head from its gates.
    0: the gates say nothing of the domain. 1: one head for each domain, with certainty."""
    share = torch.bincount(domain, minlength=DOMAINS) / len(domain)  # (domains,)
    joint = share[:, None] * by_domain(w.mean(1), domain)  # (domains, n)
    of_domain, of_head = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (of_domain + of_head - entropy(joint)) / (of_domain + of_head)


def symbol_alone(w, data):
    """The gates of a router that sorts symbols alone: w, averaged over the tokens of a symbol."""
    plain = data.tokens[:, :LENGTH]
    which = F.one_hot(plain, SYMBOLS).to(w)  # (count, LENGTH, symbols)
    total = torch.einsum("cls,cln->sn", which, w)  # (symbols, n)
    mean = total / which.sum((0, 1))[:, None]
    return mean[plain]  # (count, LENGTH, n)


def knock_out(top, data):
    """Points of accuracy that each domain loses without one of the heads: (domains, n)."""
    def right_by_domain():
        return by_domain(accuracy(predict(top, data), data), data.domain)

    n = top.block.o_proj.num_heads
    with_all, lost = right_by_domain(), []
    for head in range(n):
        def without_it(name, w):
            rest = w * (torch.arange(n, device=w.device) != head)
            return F.normalize(rest, p=1, dim=-1)  # the others sum to 1 again
        with hook_gates(top, without_it):
            lost.append(with_all - right_by_domain())
    return torch.stack(lost, dim=1)


def specialisation(top, world):
    """Whether the heads go by domain, and the controls for that."""
    w, domain = gates_of(top, world.test), world.test.domain
    scores = {"router": nmi(w, domain),
              "symbol alone": nmi(symbol_alone(w, world.test), domain),
              "shuffled labels": nmi(w, domain.roll(1))}
    return dict(layers={PLACE: scores}, lost=knock_out(top, world.test).tolist(),
                gates=by_domain(w.mean(1), domain).tolist())


def merging(top, world):
    """Accuracy after merging for mean gates: of a sequence's own domain, and of all."""
    test, training = world.test, world.training

    def merged_for(chosen):  # training sequences
        gates = mean_gates(top, [dict(h=training.h[chosen], x=training.x[chosen])])
        layers = merge_hydralora(top, gates)
        right = accuracy(predict(top, test), test)  # (count,)
        unmerge_hydralora(top, layers)
        return right

    first = torch.arange(len(training.domain), device=world.device) < 1000
    known = [merged_for(first & (training.domain == t))[test.domain == t] for t in range(DOMAINS)]
    return {"mean gates of the sequence's domain": torch.cat(known).mean().item(),
            "mean gates of all": merged_for(first).mean().item()}


# ---- The main run ----
MAIN_RUN = list(methods())[:6]
SPLIT = "LoRA-Split by true domain"


def verdict(scores, gain):
    """What --check asks: heads that go by domain, more than symbols explain, and a gain."""
    specialised = (scores["router"] >= 0.5
                   and scores["router"] >= scores["symbol alone"] + 0.2
                   and scores["shuffled labels"] <= 0.02)
    return dict(specialised=specialised, passed=specialised and gain > 0)


def cosine(matrices):
    """The mean cosine of each matrix and the next."""
    flat = matrices.flatten(1)
    return F.cosine_similarity(flat, flat.roll(1, 0)).mean().item()


def measure(seed, device, heads, names):
    """All that is measured on one seed, as a dict."""
    world, tops, results = World(seed, device), {}, {}
    found, sse = num_heads_from_corpus(world.training.tokens[:600].tolist())
    n = heads or found
    for name in names:
        tops[name], results[name] = fine_tune(world, name, methods(n)[name])
    if SPLIT in names:
        layer = tops[SPLIT].block.o_proj
        results[SPLIT]["cosines"] = [cosine(layer.lora_A), cosine(layer.lora_B)]
    special = specialisation(tops["HydraLoRA"], world)
    gain = results["HydraLoRA"]["accuracy"] - results["LoRA, same size"]["accuracy"]
    return dict(
        seed=seed, device=device, heads_found=found, num_heads=n, sse=sse, methods=results,
        bayes=world.bayes_accuracy(world.test), gain=gain, specialisation=special,
        merging=merging(tops["HydraLoRA"], world), **verdict(special["layers"][PLACE], gain))


def two(number):
    return f"{number:.2f}"


def table(header, rows):
    """Markdown whose columns line up."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("|", " | ".join(map(str.ljust, row, widths)), "|")
    print()


def show_rows(rows):
    table(rows[0], [row.values() for row in rows])


def show(m):
    """The main run's measurements in four sections."""
    special = m["specialisation"]
    domains = [f"domain {t}" for t in range(DOMAINS)]
    heads = [f"head {i}" for i in range(m["num_heads"])]
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {m['seed']}, {m['device']}")
    print("\n1. How many heads? k-means on 600 sequences, no labels: "
          f"n = {m['heads_found']}; used: {m['num_heads']}")
    print("   SSE of 1, 2, ... centres:", *map(round, m["sse"]))
    print("\n2. Accuracy on the enciphered symbols after fine-tuning on new ciphers, in percent\n")
    table(["method", "parameters", "accuracy", *domains], [
        [name, f"{of['size']:,}", two(of["accuracy"]), *map(two, of["by_domain"])]
        for name, of in m["methods"].items()])
    print(f"   On the last o_proj, which has {MODEL.hidden_size ** 2:,} weights, "
          "unless a name says where.")
    print(f"   The limit without labels (Bayes) is {two(m['bayes'])}.")
    print("\n3. Do the heads go by domain? NMI of domain and head: 0, not at all; 1, a head each\n")
    table(["gates", "NMI", "what they are"], [
        [gates, f"{score:.3f}", WHAT_THEY_ARE[gates]]
        for gates, score in special["layers"][PLACE].items()])
    table(["mean gates", *heads], [
        [domain, *(f"{two(w)} {'#' * round(10 * w)}" for w in row)]
        for domain, row in zip(domains, special["gates"])])
    table(["points lost without", *heads], [
        [domain, *map(two, row)] for domain, row in zip(domains, special["lost"])])
    print("4. Accuracy after merging into one plain linear layer\n")
    table(["merged for", "accuracy"], [[way, two(of)] for way, of in m["merging"].items()])
    print("The heads go by domain." if m["specialised"] else "The heads do not go by domain alone.")
    print(f"HydraLoRA is {m['gain']:+.2f} points from the LoRA of its size in the same place.")


# ---- --paper and --tune: all methods on several seeds ----
TUNING_SEEDS, REPORTED_SEEDS = range(5), range(30, 40)
RATES, RATES_OF_A = (0.005, 0.02, 0.08, 0.32, 1.28), (1, 0.1, 0.01)
OURS = {"LoRA on q_proj and v_proj": "HydraLoRA on q_proj and v_proj"}  # else HydraLoRA


def tune_seed(seed, device):
    """All methods on one seed: name -> (lr, lr_A) -> accuracy."""
    world, results = World(seed, device), {}
    for name, method in methods().items():
        results[name] = {}
        for lr, lr_A in itertools.product(RATES, RATES_OF_A):
            top, result = fine_tune(world, name, replace(method, lr=lr, lr_A=lr_A))
            results[name][lr, lr_A] = result["accuracy"]
    return results


def start_process():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone


def all_seeds(function, seeds, *arguments):
    """function(seed, *arguments) of each seed, from as many processes as cores."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_process) as pool:
        return pool.starmap(function, [(seed, *arguments) for seed in seeds], chunksize=1)


def tune(device):
    """Rows of mean accuracies."""
    seeds, rows = all_seeds(tune_seed, TUNING_SEEDS, device), []
    for name in methods():
        for lr_A in RATES_OF_A:
            rows.append({"method": name, "rate of A": f"x{lr_A}"})
            for lr in RATES:
                mean = statistics.mean(seed[name][lr, lr_A] for seed in seeds)
                rows[-1][f"lr {lr}"] = two(mean)
    return rows


def spread(values, sign=""):
    return f"{statistics.mean(values):{sign}.2f} +- {statistics.stdev(values):.2f}"


def show_paper(seeds):
    """Markdown, as it stands in README.md."""
    def of(name, key="accuracy"):
        return [seed["methods"][name][key] for seed in seeds]

    rows = []
    for name in methods():
        if name not in ("HydraLoRA", *OURS.values()):
            ours = OURS.get(name, "HydraLoRA")
            ahead = [a - b for a, b in zip(of(ours), of(name))]  # on the same seed
            rows.append([
                name, f"{of(name, 'size')[0]:,}:{of(ours, 'size')[0]:,}",
                two(statistics.mean(of(name))), spread(ahead, "+"),
                f"{sum(a > 0 for a in ahead)}/{len(ahead)}"])
    table(["HydraLoRA against", "parameters, its:ours", "accuracy", "ahead by +- std",
           "seeds ahead"], rows)
    lines = {name: of(name) for name in methods()}
    lines["Bayes"] = [seed["bayes"] for seed in seeds]
    for way in seeds[0]["merging"]:
        lines[f"HydraLoRA merged for {way}"] = [seed["merging"][way] for seed in seeds]
    for gates in ("router", "symbol alone"):
        layers = [seed["specialisation"]["layers"] for seed in seeds]
        lines[f"NMI of domain and head, {gates}"] = [layer[PLACE][gates] for layer in layers]
    for i, matrix in enumerate("AB"):
        lines[f"{SPLIT}, all from one A: cosine of two {matrix}"] = [
            cosines[i] for cosines in of(SPLIT, "cosines")]
    for what, values in lines.items():
        print(f"- {what}: {spread(values)}; by seed", *map(two, values))


# ---- --cost ----
def loop_over_heads(layer, x):
    """The official code's way: A x, and a result of y's size, for each head."""
    y, w = layer.base(x), layer.router(x)
    for i in range(layer.num_heads):
        z = F.linear(x, layer.lora_A)  # (tokens, r)
        y = y + w[..., i, None] * F.linear(z, layer.lora_B[i]) * layer.scaling
    return y


def saved_bytes(function, x, inputs):
    """Bytes that autograd keeps for backward, without the inputs themselves."""
    kept = {}  # address -> bytes

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def cost(device, sizes=((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)), rounds=25):
    """Medians of forward and backward, in another order each round, and bytes kept for backward,
    beside a LoRA of rank n r, a loop over heads, and the bound: A x, w, their product, heads."""
    rows = []
    for tokens, width, r, n in sizes:
        base = nn.Linear(width, width, bias=False, device=device)
        layer = HydraLoRALinear(base, num_heads=n, r=r)
        A = nn.Linear(width, n * r, bias=False, device=device)
        B = nn.Linear(n * r, width, bias=False, device=device)
        x = torch.randn(tokens, width, device=device, requires_grad=True)

        def lora(x):
            return base(x) + B(A(x) * layer.scaling)

        def loop(x):
            return loop_over_heads(layer, x)

        ways, seconds = [layer, lora, loop], [[], [], []]
        inputs = [x, A.weight, B.weight, *layer.parameters()]
        for _ in range(5 + rounds):
            for way in torch.randperm(3):
                for t in inputs:
                    t.grad = None
                start = time.perf_counter()
                ways[way](x).backward(torch.ones_like(x))
                if device != "cpu":
                    getattr(torch, device).synchronize()
                seconds[way].append(time.perf_counter() - start)
        ours, of_lora, of_loop = [statistics.median(t[5:]) for t in seconds]
        kept, _, kept_by_loop = [saved_bytes(way, x, inputs) for way in ways]
        bound = 4 * (tokens * (r + n + n * r) + n * width * r)
        rows.append({
            "tokens, width, r, n": f"{tokens}, {width}, {r}, {n}",
            "time / LoRA of rank n r": round(ours / of_lora, 3),
            "time / loop": round(ours / of_loop, 3),
            "bytes / loop": round(kept / kept_by_loop, 3),
            "bytes / bound": round(kept / bound, 3)})
    return rows


# ---- Options ----
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train_toy.py: {message}\n")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for mode in ("paper", "cost", "tune"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--heads", type=int, choices=range(1, 33), metavar="N")
    parser.add_argument("--check", action="store_true", help="exit 1 unless passed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    seed, device = options.seed or 0, options.device
    if options.mode and (options.check or (options.seed, options.heads) != (None, None)):
        parser.error("--seed, --heads and --check belong to the main run")
    if not 0 <= seed < 1e9:
        parser.error("--seed has to be from 0 to 999,999,999")
    try:  # fail before training, if at all
        torch.ones(1, device=device)
        open(options.json or os.devnull, "a").close()
    except Exception as error:
        parser.error(str(error).splitlines()[0])
    if options.mode == "paper":
        result = all_seeds(measure, REPORTED_SEEDS, device, DOMAINS, list(methods()))
        display = show_paper
    elif options.mode == "tune":
        result, display = tune(device), show_rows
    elif options.mode == "cost":
        result, display = cost(device), show_rows
    else:
        torch.set_num_threads(2)  # on one core they give the same digits
        result, display = measure(seed, device, options.heads, MAIN_RUN), show
    with open(options.json or os.devnull, "w") as file:
        json.dump(result, file, indent=1)
    display(result)
    print(end="", flush=True)
    return int(options.check and not result["passed"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # piped to head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
