# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are A, the heads and the router worth?

    python train_toy.py                                 one run: half a minute on a CPU
    python train_toy.py --seed 1100 --seeds 20 --all    README's table: 15 minutes
    python train_toy.py --seeds 10 --all --lr 0.16      all methods at this learning rate

Options can be combined: for example, --seeds 3 --proportions 85 10 5 --heads 3 makes two
of the domains rare, and also prints the means of three seeds. To read the code, start at
`run`, which is the whole experiment on one seed.

Sequences come from hidden domains, each with its own substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer learns one set of ciphers and is frozen. Then adapters learn new ciphers.

The task is designed so that a router helps. Each domain uses its own third of the
symbols (every third letter) more often, so that a sequence shows its domain. In
pre-training, an auxiliary loss makes the first block predict the plaintext symbol, so
that the attention of the last block is free to find out the domain. The adapters are on
the o_proj of this attention, and so their input x contains the domain.

Why a LoRA is not enough: the correct answer depends on domain and symbol together. On
seed 0, for example, e becomes o in domain 0 and j in domain 1. But x is nearly a domain
part plus a symbol part, and so is B A x, so that only the frozen MLP after it could
combine the two. A ReLU after A, or gates made from x, combine them in the update itself.
"""
import argparse
import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers, inject_hydralora,
    merge_hydralora, num_heads_from_corpus, record_gates)

# ---- Settings ----
DOMAINS = 3
EQUAL = [1.0] * DOMAINS  # how often each domain occurs
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
LETTERS = "abcdefghijklmno?"
PREFERENCE = 4  # how much more often a domain uses a symbol of its own third
LENGTH = 32  # plaintext symbols in a sequence, enough to tell its domain
BATCH = 24
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400  # on the new ciphers, the adapter alone
TEST = 500  # sequences
WATCHED = (5, 10, 20, 100)  # the steps after which heads are watched, as at both ends
AUXILIARY_WEIGHT = 2.0  # in pre-training; with 0, heads may follow symbols instead
MODEL = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_attention_heads=8)
RANK = 9  # r of HydraLoRA; with 9, a LoRA MoE of equal size has an integer rank, 6
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "HydraLoRA, random router", "HydraLoRA, random A",
            "LoRA MoE", "HydraLoRA")  # of `methods`; --all adds the others


# ---- The data ----
class Data(SimpleNamespace):
    """Tensors that have a row for each sequence: plain and targets (count, LENGTH), and
    domain (count,). `encode` adds x and h (count, LENGTH, width)."""

    def __getitem__(self, rows):
        return Data(**{name: t[rows] for name, t in vars(self).items()})

    def batches(self):
        return [self[i:i + BATCH] for i in range(0, len(self.domain), BATCH)]


def draw_ciphers(seed):
    """The old and the new ciphers: each (DOMAINS, SYMBOLS), symbol -> answer."""
    generator = torch.Generator().manual_seed(seed)
    ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
    return torch.stack(ciphers).split(DOMAINS)


def symbol_frequencies():
    own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
    return F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)  # (DOMAINS, SYMBOLS)


def sample(count, ciphers, proportions, seed, device):
    generator = torch.Generator().manual_seed(seed)
    domain = torch.tensor(proportions).multinomial(count, True, generator=generator)
    plain = symbol_frequencies()[domain].multinomial(LENGTH, True, generator=generator)
    targets = ciphers[domain[:, None], plain]
    return Data(plain=plain.to(device), targets=targets.to(device), domain=domain.to(device))


def best_without_domain(ciphers, proportions):
    """The best accuracy without knowing the domain: each symbol's likeliest answer."""
    p = torch.tensor(proportions) / sum(proportions)
    answers = F.one_hot(ciphers, SYMBOLS) * symbol_frequencies()[..., None]
    answers = torch.einsum("d,dsa->sa", p, answers)  # (symbols, answers)
    return 100 * answers.amax(-1).sum().item()


# ---- The model, cut at the adapter, so that the frozen part before it runs only once ----
def encode(model, data):
    """Adds the input x of the last o_proj, and h, to which its output is added. Both are
    those at the question marks."""
    first, last = model.layers
    h = first(model.embed(F.pad(data.plain, (0, LENGTH), value=SYMBOLS)))
    x = last.attention(h)  # (count, 2 LENGTH, width)
    x, h = x[:, LENGTH:].clone(), h[:, LENGTH:].clone()  # copies, so that the rest is freed
    return Data(**vars(data), x=x, h=h)


def predict(model, data, gates=None):
    """The rest of the model: logits (count, LENGTH, vocab_size).

    gates(data, w), if given, replaces the router's w (count, LENGTH, n).
    """
    last = model.layers[1]
    with hook_gates(model, lambda name, w: gates(data, w)) if gates else nullcontext():
        h = data.h + last.o_proj(data.x)
        h = h + last.mlp(h)
    return model.lm_head(model.norm(h))


@torch.no_grad()
def accuracy(model, data, gates=None):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data, gates).argmax(-1) == data.targets).float().mean(1)


def by_domain(values, data):
    """values (count, ...) -> the mean of each domain: (DOMAINS, ...)."""
    return torch.stack([values[data.domain == i].mean(0) for i in range(DOMAINS)])


# ---- Training ----
def train(model, loss_of, batches, lr, router_rate=1.0, snapshots=None):
    """One pass over the batches by AdamW. Prints loss_of(batch) after 0, 100, ... steps.

    A router learns at router_rate * lr. If snapshots is a dict, it gets copies of the
    model: number of steps -> model.
    """
    routers = [p for name, p in model.named_parameters() if "router" in name]
    others = [p for name, p in model.named_parameters() if "router" not in name]
    optimizer = torch.optim.AdamW(
        [dict(params=others), dict(params=routers)], betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # cycle_momentum would overwrite betas
        optimizer, [lr, router_rate * lr], total_steps=len(batches), cycle_momentum=False)
    for step, batch in enumerate(batches, 1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 1:
            print(f"{loss.item():7.2f}", end="", flush=True)
        if snapshots is not None and step in (*WATCHED, len(batches)):
            snapshots[step] = copy.deepcopy(model)


def pretrain(seed, ciphers, proportions, device):
    """A transformer that has learnt the ciphers, frozen."""
    torch.manual_seed(seed)
    model = TinyTransformer(MODEL).to(device)

    def loss_of(batch):
        batch = encode(model, batch)
        symbols = model.lm_head(model.norm(batch.h))
        auxiliary = F.cross_entropy(symbols.mT, batch.plain)
        answers = predict(model, batch)
        return F.cross_entropy(answers.mT, batch.targets) + AUXILIARY_WEIGHT * auxiliary

    data = sample(PRETRAIN_STEPS * BATCH, ciphers, proportions, 1000 * seed, device)
    train(model, loss_of, data.batches(), lr=3e-3)
    return model.requires_grad_(False)


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6): sum_i w_i B_i A_i x."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        A = self.lora_A.new_empty(self.num_heads, self.r, self.in_features)
        self.lora_A = nn.Parameter(A.uniform_(-1, 1) / math.sqrt(self.in_features))  # (n, r, k)

    def forward(self, x):
        w = self.router(x)  # (..., n)
        z = torch.einsum("...k,nrk->...nr", x, self.lora_A)
        delta = torch.einsum("...n,...nr,ndr->...d", w, self.scaling * z, self.lora_B)
        return self.base(x) + delta  # (..., d)


class SharedB(LoRAExperts):
    """The reverse of HydraLoRA: B sum_i w_i A_i x."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_B = nn.Parameter(self.lora_B.detach()[0].clone())  # (d, r)

    def forward(self, x):
        z = torch.einsum("...k,nrk,...n->...r", x, self.lora_A, self.router(x))
        return self.base(x) + self.scaling * F.linear(z, self.lora_B)  # (..., d)


class ReLULoRA(HydraLoRALinear):
    """B ReLU(A x), for num_heads=1: a single head, whose gate w is 1."""

    def forward(self, x):
        w = self.router(x)  # (..., 1), so that each parameter has a gradient
        z = F.linear(x, self.lora_A).relu()  # (..., r)
        return self.base(x) + self.scaling * w * F.linear(z, self.lora_B[0])  # (..., d)


def equal_gates(data, w):
    return torch.full_like(w, 1 / w.shape[-1])


def true_labels(data, w):
    return F.one_hot(data.domain, DOMAINS).to(w)[:, None].expand_as(w)  # (count, LENGTH, n)


@dataclass
class Method:
    """What is trained, and where."""
    n: int  # heads; a single head is a LoRA
    r: int
    lr: float  # its peak; the best of .02, .08, .16, .32, .64 (--seeds 10 --all --lr X)
    layer: type = HydraLoRALinear
    gates: Callable | None = None  # gates(data, w) in place of the router's w
    random: str = ""  # the parameter that keeps its random start
    target: str = "o_proj"  # in the last block
    router_rate: float = 1.0  # the router's learning rate, divided by lr


def methods(n, r, target="o_proj"):
    """Name -> Method, for n heads of rank r.

    Ranks are set for about HydraLoRA's size, r k + n r d + n k parameters, except where
    a name says "full rank", "same rank", "random" or "true labels".
    """
    width, inner = MODEL.hidden_size, MODEL.intermediate_size
    k = inner if target == "down_proj" else width
    d = inner if target == "up_proj" else width
    size = r * k + n * r * d  # without a router, which a LoRA does not have
    lora_rank = math.ceil((size + n * k) / (k + d))
    experts_rank = max(1, round(size / (n * (k + d))))
    shared_b_rank = max(1, round(size / (n * k + d)))
    split_rank = max(1, round(size / (DOMAINS * (k + d))))
    chosen = {
        "LoRA": Method(1, lora_rank, 0.08),
        "LoRA, full rank": Method(1, min(k, d), 0.08),
        "LoRA with a ReLU": Method(1, lora_rank, 0.16, ReLULoRA),
        "HydraLoRA, equal gates": Method(n, r, 0.16, gates=equal_gates),  # Fig. 6, w/o gate
        "HydraLoRA, random router": Method(n, r, 0.16, random="router.weight"),
        "HydraLoRA, random A": Method(n, r, 0.32, random="lora_A"),
        "LoRA MoE": Method(n, experts_rank, 0.16, LoRAExperts),
        "LoRA MoE, same rank": Method(n, r, 0.16, LoRAExperts),
        "one A per head, shared B": Method(n, shared_b_rank, 0.16, SharedB),
        "LoRA-Split": Method(DOMAINS, split_rank, 0.16, LoRAExperts, true_labels),
        "HydraLoRA, true labels": Method(DOMAINS, r, 0.16, gates=true_labels),
        "HydraLoRA": Method(n, r, 0.32)}  # 0.16 is as good
    return {name: replace(method, target=target) for name, method in chosen.items()}


def adapt(frozen, method, seed):
    """A copy of the model with an adapter.

    Methods with equal n start from the same Wg, and those with a single A of equal rank
    from the same A. The seed of `pretrain` would repeat the model's random numbers.
    """
    model = copy.deepcopy(frozen)
    torch.manual_seed(seed + 1_000_000)
    inject_hydralora(model, f"layers.1.{method.target}", method.layer, num_heads=method.n,
                     r=method.r, lora_alpha=2 * method.r)
    [layer] = hydralora_layers(model).values()
    torch.manual_seed(seed + 2_000_000)
    layer.router.reset_parameters()
    layer.router.requires_grad_(method.n > 1 and method.gates is None)
    if method.random:
        layer.get_parameter(method.random).requires_grad_(False)
    return model


def fine_tune(frozen, method, batches, seed, snapshots=None):
    """A copy of the model with an adapter that has learnt the new ciphers."""
    model = adapt(frozen, method, seed)
    train(model,
          lambda batch: F.cross_entropy(predict(model, batch, method.gates).mT, batch.targets),
          batches, method.lr, method.router_rate, snapshots)
    return model


# ---- The four steps, each of which prints what it finds ----
def choose_n(training, heads):
    """N: heads, or if this is None, as many as k-means finds domains."""
    print("1. How many heads?\n")
    found, sse = num_heads_from_corpus(training.plain[:600].tolist())
    n = heads or found
    print("   k-means on the plaintexts, error (SSE) with 1, 2, ... centres:")
    print("  ", *map(round, sse))
    print(f"   From {found} on, it hardly falls. Using {n} heads.\n")
    return n


@dataclass
class Row:
    """What a method reaches. Accuracies are in percent."""
    method: Method
    size: int  # trained parameters
    accuracy: float
    by_domain: list


def compare(frozen, chosen, batches, test, seed):
    """Returns name -> Row, and copies of HydraLoRA's model: number of steps -> model."""
    width = max(map(len, chosen))
    print("2. What do adapters learn?\n")
    print(f"   {'':{width}}loss after 0, 100, ... steps  parameters  accuracy (%)  by domain")
    rows, snapshots = {}, {0: adapt(frozen, chosen["HydraLoRA"], seed)}
    for name, method in chosen.items():
        print(f"   {name:{width}}", end="")
        model = fine_tune(
            frozen, method, batches, seed, snapshots if name == "HydraLoRA" else None)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        correct = accuracy(model, test, method.gates)  # (count,)
        domains = by_domain(correct, test).tolist()
        rows[name] = Row(method, size, correct.mean().item(), domains)
        print(f"{size:12,}{rows[name].accuracy:14.1f}", *map("{:4.0f}".format, domains))
    return rows, snapshots


@torch.no_grad()
def gates_of(model, data):
    """w (count, LENGTH, n) of the only HydraLoRA layer."""
    with record_gates(model) as gates:
        predict(model, data)
    return [*gates.values()][0]


def nmi(w, domain):
    """Normalised mutual information of domain and head, if each token's head is drawn
    with the probabilities w (count, LENGTH, n): 2 I(domain; head) / (H(domain) + H(head)).

    0: independent. 1: each determines the other.
    """
    joint = F.one_hot(domain).to(w).T @ w.mean(1) / len(w)  # (domains, n)
    of_domain, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * (of_domain + of_head - of_both) / (of_domain + of_head or 1.0)


def print_examples(model, data, w):
    answers = predict(model, data).argmax(-1)  # (count, LENGTH)
    for domain in range(DOMAINS):
        i = data.domain.tolist().index(domain)
        marks = ["*" if wrong else " " for wrong in answers[i] != data.targets[i]]
        print(f"   domain {domain}", *(f" {LETTERS[symbol]}" for symbol in data.plain[i]), sep="")
        print("   answer  ", *(mark + LETTERS[a] for mark, a in zip(marks, answers[i])), sep="")
        print("   head    ", *(f" {head}" for head in w[i].argmax(-1).tolist()), "\n", sep="")


def look_inside(snapshots, test):
    print("\n3. Do HydraLoRA's heads specialise by domain?\n")
    course = {step: (nmi(gates_of(model, test), test.domain), accuracy(model, test).mean().item())
              for step, model in snapshots.items()}
    print("   NMI of head and domain (0: independent, 1: each determines the other):\n")
    shared, correct = zip(*course.values())
    print("   after steps ", *map("{:5}".format, course))
    print("   NMI         ", *map("{:5.2f}".format, shared))
    print("   accuracy (%)", *map("{:5.0f}".format, correct))

    print("\n   A sequence of each domain, the answer (* before an error), and the head with the\n"
          "   largest gate:\n")
    model = snapshots[STEPS]
    w = gates_of(model, test)
    n = w.shape[-1]
    print_examples(model, test, w)

    gates = by_domain(w.mean(1), test)  # (DOMAINS, n)
    intact, lost = accuracy(model, test), []
    for others in 1 - torch.eye(n, device=w.device):
        without = accuracy(model, test, lambda data, w: w * others)
        lost.append(by_domain(intact - without, test))
    lost = torch.stack(lost, dim=1)  # (DOMAINS, n)
    print("   Mean gate of each head, and points of accuracy that are lost without it:\n")
    print("           ", *(f"  head {i}   " for i in range(n)), sep="|")
    for domain in range(DOMAINS):
        cells = zip(gates[domain], lost[domain])
        print(f"   domain {domain} ", *(f" {w_i:.2f} {points:5.1f} " for w_i, points in cells),
              sep="|")
    return SimpleNamespace(course=course, nmi=shared[-1], gates=gates, lost=lost)


def merge_both_ways(model, test):
    print("\n4. What is left after merging, which needs the same gates for all tokens?\n")
    w = gates_of(model, test)
    # One w for all tokens of a sequence computes the same as a merge for this sequence.
    each = accuracy(model, test, lambda data, w: w[:, :1].expand_as(w)).mean().item()
    merged = merge_hydralora(copy.deepcopy(model), w.mean((0, 1)))
    once = accuracy(merged, test).mean().item()
    print(f"   not merged                {accuracy(model, test).mean():6.1f}%\n"
          f"   merged for each sequence  {each:6.1f}%, with the gates of its first question mark\n"
          f"   merged once, for all      {once:6.1f}%, with the mean gates of these sequences\n")
    return {"merged for each sequence (%)": each, "merged once, for all (%)": once}


def run(seed, options):
    """The experiment on one seed."""
    print(f"HydraLoRA on {DOMAINS} hidden domains, each with a cipher: seed {seed}\n")
    old, new = draw_ciphers(seed)
    training = sample(STEPS * BATCH, new, options.proportions, 1000 * seed + 1, options.device)
    test = sample(TEST, new, options.proportions, 1000 * seed + 2, options.device)

    n = choose_n(training, options.heads)
    print("Pre-training on the old ciphers. Loss after 0, 100, ... steps:", end="")
    frozen = pretrain(seed, old, options.proportions, options.device)
    print("\n")
    batches = [encode(frozen, batch) for batch in training.batches()]
    test = encode(frozen, test)
    chosen = {name: replace(method, router_rate=options.router_rate, lr=options.lr or method.lr)
              for name, method in methods(n, options.rank, options.target).items()
              if options.all or name in MAIN_RUN}
    rows, snapshots = compare(frozen, chosen, batches, test, seed)
    best = best_without_domain(new, options.proportions)
    print(f"\n   Before: {accuracy(frozen, test).mean():.1f}%, where old and new ciphers agree. "
          f"Without knowing the domain,\n   at most {best:.1f}% would be possible.")
    inside = look_inside(snapshots, test)
    numbers = {"best without the domain (%)": best, "NMI of head and domain": inside.nmi}
    numbers |= merge_both_ways(snapshots[STEPS], test)
    ahead = rows["HydraLoRA"].accuracy > rows["LoRA"].accuracy
    print("HydraLoRA is ahead of LoRA:", "yes" if ahead else "NO")
    if n >= DOMAINS:  # fewer heads cannot take a domain each
        print("Its heads specialise by domain:", "yes" if inside.nmi >= 0.9 else "NO")
    return SimpleNamespace(rows=rows, numbers=numbers, inside=inside)


# ---- Several seeds ----
def print_means(results, proportions):
    """README's table, and the other numbers. If a domain is rare, also its accuracy."""
    rarest = proportions.index(min(proportions)) if len({*proportions}) > 1 else None
    header = ["method", "parameters", "accuracy (%)", "HydraLoRA's lead (points) +- std",
              "seeds won"] + ["rarest domain (%): mean, least"] * (rarest is not None)
    print("\n|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for name in results[0].rows:
        rows = [result.rows[name] for result in results]
        leads = [result.rows["HydraLoRA"].accuracy - row.accuracy
                 for result, row in zip(results, rows)]
        won = sum(lead > 0 for lead in leads)
        cells = [name, f"{rows[0].size:,}", f"{mean(row.accuracy for row in rows):.1f}", "", ""]
        if name != "HydraLoRA":
            cells[3:] = f"{mean(leads):+.1f} +- {stdev(leads):.1f}", f"{won}/{len(leads)}"
        if rarest is not None:
            reached = [row.by_domain[rarest] for row in rows]
            cells.append(f"{mean(reached):.0f}, {min(reached):.0f}")
        print("|", " | ".join(cells), "|")
    print()
    for what in results[0].numbers:
        values = [result.numbers[what] for result in results]
        print(f"{what}: mean {mean(values):.2f}, least {min(values):.2f}")


def parse(arguments=None):
    """The options. Stops with one line if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="how many, from --seed on; prints their means")
    add("--all", action="store_true", help="all methods of README's table")
    add("--heads", type=int, help="N (default: by k-means)")
    add("--rank", type=int, default=RANK, help=f"r of HydraLoRA (default: {RANK})")
    add("--target", choices=("o_proj", "up_proj", "down_proj"), default="o_proj",
        help="the adapted layer of the last block (default: o_proj)")
    add("--lr", type=float, help="one learning rate for all methods (default: each its best)")
    add("--router-rate", type=float, default=1.0, metavar="X",
        help="the router's learning rate, relative to that of A and B; 8 helps rare domains")
    add("--proportions", type=float, nargs=DOMAINS, default=EQUAL, metavar="P",
        help="how often each domain occurs, such as 85 10 5 (default: equally often)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if available")
    options = parser.parse_args(arguments)
    for name in ("seeds", "heads", "rank", "lr", "router_rate"):
        value = getattr(options, name)
        if not (value is None or 0 < value < math.inf):
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not min(options.proportions) > 0.02 * sum(options.proportions):
        parser.error("each of --proportions must be over 2% of their sum")
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def main():
    options = parse()
    torch.set_num_threads(1)  # the same digits on any number of cores
    results = [run(options.seed + i, options) for i in range(options.seeds)]
    if options.seeds > 1:
        print_means(results, options.proportions)


if __name__ == "__main__":
    main()
