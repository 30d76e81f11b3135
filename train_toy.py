# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are the heads and the router worth?

    python train_toy.py             the experiment: a minute on a CPU
    python train_toy.py --table     README's table, twenty seeds: half an hour on two cores
    python train_toy.py --tune      the learning rates, ten seeds: 40 minutes on two cores
    python train_toy.py --cost      the time that the layer takes: a minute

`experiment` shows the whole run. Sequences come from hidden domains, each with its own
substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer learns one set of ciphers and is frozen. Adapters then learn new ciphers. The
task is designed so that a router helps: each domain uses its own third of the symbols more
often, which tells the domains apart. In pre-training, an auxiliary loss makes the first
block predict the plaintext symbol, so that the last attention has only the domain left to
find. The adapters are on its o_proj, whose input x is what it has found.

Why a LoRA is not enough: a cipher pairs domain and symbol, as e may be b in one domain and
m in another. But x is nearly a domain part plus a symbol part. B A x is again such a sum,
and leaves the pairing to the frozen MLP behind it. A ReLU after A, or gates made from x,
can pair domain and symbol in the update.
"""
import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers, inject_hydralora,
    mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

# ---- Settings ----
# README also has STEPS = 1600 and PREFERENCE = 1, both on seeds 940 to 942.
DOMAINS = 3
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4  # how much more often a domain uses a symbol of its own third
LENGTH = 32  # plaintext symbols in a sequence, enough to tell its domain
BATCH = 24
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400  # on the new ciphers, the adapter alone
EVALUATION = 500  # test sequences
AUXILIARY_WEIGHT = 2.0  # in pre-training; with 0, heads may follow symbols instead
LETTERS = "abcdefghijklmno?"
MODEL = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_attention_heads=8)
RANK = 9  # r of HydraLoRA on o_proj: at equal size, LoRA MoE then has a whole rank, 6
ROUTER_RATE = 8  # times that of A and B: then heads specialise from more starts
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "LoRA MoE", "HydraLoRA")
TUNING_SEEDS = range(10)
TABLE_SEEDS = range(920, 940)
RATES = (0.02, 0.08, 0.16, 0.32)
COST_SIZES = (2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)  # tokens, width, r, n


# ---- The data ----
@dataclass
class Data:
    tokens: torch.Tensor   # (count, 2 LENGTH): plaintext, question marks
    targets: torch.Tensor  # (count, LENGTH): ciphertext
    domain: torch.Tensor   # (count,)

    def __getitem__(self, index):
        return Data(self.tokens[index], self.targets[index], self.domain[index])


class Task:
    """Old and new ciphers, and sequences drawn from them."""

    def __init__(self, seed, device):
        self.seed, self.device = seed, device
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)
        generator = torch.Generator().manual_seed(seed)
        ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
        self.old, self.new = torch.stack(ciphers).split(DOMAINS)  # (domains, symbols)
        self.training = self.sample(STEPS * BATCH, self.new, stream=1)
        self.test = self.sample(EVALUATION, self.new, stream=2)

    def sample(self, count, ciphers, stream):
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        domain = torch.randint(DOMAINS, (count,), generator=generator)
        plain = self.frequencies[domain].multinomial(LENGTH, True, generator=generator)
        tokens = F.pad(plain, (0, LENGTH), value=SYMBOLS)
        targets = ciphers[domain[:, None], plain]
        return Data(tokens.to(self.device), targets.to(self.device), domain.to(self.device))

    def best_without_domain(self):
        """The floor: the accuracy of always giving each symbol's likeliest answer."""
        answers = F.one_hot(self.new, SYMBOLS) * self.frequencies[..., None]
        return 100 * answers.mean(0).amax(-1).sum().item()  # of (domains, symbols, answers)


# ---- Training, and the frozen model ----
def train(loss_of, groups, data):
    """One pass over the data by AdamW, whose weight decay limits the update. groups:
    dicts of lr and params, a list. Prints the losses."""
    steps = len(data.tokens) // BATCH
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps)
    for step in range(steps):
        loss = loss_of(data[step * BATCH:(step + 1) * BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{loss.item():6.2f}", end="", flush=True)


def pretrain(task, auxiliary_weight):
    """A transformer that knows the old ciphers, frozen."""
    torch.manual_seed(task.seed)
    model = TinyTransformer(MODEL).to(task.device)
    first, last = model.layers

    def loss_of(batch):
        early = first(model.embed(batch.tokens))  # (b, 2 LENGTH, width)
        late = last(early)
        symbols = model.lm_head(model.norm(early[:, LENGTH:]))
        answers = model.lm_head(model.norm(late[:, LENGTH:]))
        auxiliary = F.cross_entropy(symbols.mT, batch.tokens[:, :LENGTH])
        return F.cross_entropy(answers.mT, batch.targets) + auxiliary_weight * auxiliary

    data = task.sample(PRETRAIN_STEPS * BATCH, task.old, stream=0)
    train(loss_of, [dict(params=[*model.parameters()], lr=3e-3)], data)
    return model.requires_grad_(False)


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6): sum_i w_i B_i A_i x. The A_i start out equal."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.detach().repeat(self.num_heads, 1, 1))  # (n, r, k)

    def forward(self, x):
        w = self.router(x)  # (..., n)
        z = torch.einsum("...k,nrk->...nr", x, self.lora_A)
        delta = torch.einsum("...n,...nr,ndr->...d", w, self.scaling * z, self.lora_B)
        return self.base(x) + delta  # (..., d)


class UnequalExperts(LoRAExperts):
    """LoRA MoE whose A_i start out different."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        nn.init.kaiming_uniform_(self.lora_A.detach().flatten(0, 1), a=math.sqrt(5))


class SharedB(UnequalExperts):
    """The reverse of HydraLoRA: B sum_i w_i A_i x. With equal A_i, w would cancel."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_B = nn.Parameter(self.lora_B.detach()[0].clone())  # (d, r)

    def forward(self, x):
        z = torch.einsum("...k,nrk,...n->...r", x, self.lora_A, self.router(x))
        return self.base(x) + self.scaling * F.linear(z, self.lora_B)  # (..., d)


class ReLULoRA(HydraLoRALinear):
    """B ReLU(A x), without heads and router."""

    def forward(self, x):
        z = F.linear(x, self.lora_A).relu()  # (..., r)
        return self.base(x) + self.scaling * F.linear(z, self.lora_B[0])  # (..., d)


def equal_gates(data, w):
    return torch.full_like(w, 1 / w.shape[-1])


def true_labels(data, w):
    return F.one_hot(data.domain, DOMAINS).to(w)[:, None].expand_as(w)  # (count, t, n)


@dataclass
class Method:
    """What is trained, and where."""
    n: int = 1  # heads; a single head is a LoRA
    r: int = RANK
    layer: type = HydraLoRALinear
    gates: Callable | None = None  # gates(data, w) in place of the router's w
    target: str = "layers.1.o_proj"
    lr: float = 0.16
    partner: str = "HydraLoRA"  # the row it is compared with in --table


def methods(n=DOMAINS):
    """Name -> Method, for n heads.

    Ranks are set for about equal sizes: HydraLoRA has r k + n r d + n k parameters, a LoRA
    r k + r d; k is d in o_proj, 4 d in down_proj. Each lr is the method's best mean in
    --tune, of RATES, on TUNING_SEEDS.
    """
    lora_rank = math.ceil((RANK + n * RANK + n) / 2)
    experts_rank = round(RANK * (1 + n) / (2 * n))
    down_proj = dict(target="layers.1.down_proj", partner="HydraLoRA on down_proj", lr=0.08)
    return {
        "LoRA": Method(r=lora_rank, lr=0.08),
        "LoRA, full rank": Method(r=MODEL.hidden_size, lr=0.08),
        "LoRA with a ReLU": Method(r=lora_rank, layer=ReLULoRA),
        "HydraLoRA without router": Method(n, gates=equal_gates),  # Fig. 6, w/o gate
        "LoRA MoE": Method(n, experts_rank, LoRAExperts),
        "LoRA MoE, same rank": Method(n, layer=LoRAExperts),
        "one A per head, shared B": Method(n, layer=SharedB, lr=0.08),
        "LoRA-Split": Method(DOMAINS, experts_rank, LoRAExperts, true_labels),
        "HydraLoRA with true labels": Method(DOMAINS, gates=true_labels),
        "HydraLoRA": Method(n),
        "LoRA on down_proj": Method(r=math.ceil((16 + 4 * n + 4 * n) / 5), **down_proj),
        "HydraLoRA on down_proj": Method(n, r=4, **down_proj)}


# ---- The adapters ----
def adapt(model, method, seed):
    """A copy of the model with an adapter. Equal r give equal A, equal n equal Wg."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    inject_hydralora(model, [method.target], method.layer, num_heads=method.n, r=method.r,
                     lora_alpha=2 * method.r)
    [layer] = hydralora_layers(model).values()
    torch.manual_seed(seed + 1_000_000)  # else the router repeats A's numbers
    layer.router.reset_parameters()
    layer.router.requires_grad_(method.gates is None and method.n > 1)
    return model


def predict(model, data, gates=None):
    """Logits at the question marks (count, LENGTH, vocab_size); gates(data, w) is used
    for w."""
    if gates is None:
        return model(data.tokens)[:, LENGTH:]
    with hook_gates(model, lambda name, w: gates(data, w)):
        return model(data.tokens)[:, LENGTH:]


@torch.no_grad()
def accuracy(model, data, gates=None):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data, gates).argmax(-1) == data.targets).float().mean(1)


def fine_tune(task, frozen, method):
    """A copy of the model that has learnt the new ciphers, its size and accuracy."""
    model = adapt(frozen, method, task.seed)
    groups = [dict(params=[p], lr=method.lr * (ROUTER_RATE if "router" in name else 1))
              for name, p in model.named_parameters() if p.requires_grad]
    train(lambda batch: F.cross_entropy(predict(model, batch, method.gates).mT, batch.targets),
          groups, task.training)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reached = accuracy(model, task.test, method.gates).mean().item()
    return model, dict(size=size, accuracy=reached)


# ---- A look inside ----
def group_means(values, group, groups):
    """values (m, ...), group (m,) -> the mean of each group: (groups, ...)."""
    members = F.one_hot(group, groups).to(values)  # (m, groups)
    return torch.einsum("mg,m...->g...", members / members.sum(0), values)


@torch.no_grad()
def variance_shares(model, data):
    """Two-way ANOVA, by domain and symbol, of the mean input x of the last o_proj."""
    inputs, o_proj = [], model.layers[-1].o_proj
    with o_proj.register_forward_pre_hook(lambda module, x: inputs.extend(x)):
        predict(model, data)
    x = inputs[0][:, LENGTH:].flatten(0, 1)  # (tokens, width)
    pair = (data.domain[:, None] * SYMBOLS + data.tokens[:, :LENGTH]).flatten()
    means = group_means(x, pair, DOMAINS * SYMBOLS)
    means = means.unflatten(0, (DOMAINS, SYMBOLS)) - means.mean(0)  # (domains, symbols, width)
    domain, symbol = means.mean(1, keepdim=True), means.mean(0, keepdim=True)
    parts = dict(domain=domain, symbol=symbol, interaction=means - domain - symbol)
    return {name: (part.square().mean() / means.square().mean()).item()
            for name, part in parts.items()}


def nmi(w, group):
    """Normalised mutual information, 2 I(group; head) / (H(group) + H(head)), of each
    token's group (tokens,) and a head drawn from its gates w (tokens, n)."""
    def entropy(p):
        return torch.special.entr(p).sum().item()

    joint = F.one_hot(group).to(w).T @ w / len(w)  # (groups, n)
    of_both = entropy(joint.sum(1)) + entropy(joint.sum(0))
    return 2 * (of_both - entropy(joint)) / of_both


def ablate_heads(model, data, n):
    """Points of accuracy that each domain loses without each head: (domains, n)."""
    intact, lost = accuracy(model, data), []
    for others in 1 - torch.eye(n, device=intact.device):
        ablated = accuracy(model, data, lambda data, w: w * others)
        lost.append(group_means(intact - ablated, data.domain, DOMAINS))
    return torch.stack(lost, dim=1)


def examples(data, answers, heads):
    """A sequence of each domain: plaintext, answer (* before an error), head."""
    shown = []
    for domain in range(DOMAINS):
        i = data.domain.tolist().index(domain)
        marks = ["*" if wrong else " " for wrong in answers[i] != data.targets[i]]
        shown.append(dict(
            plaintext="".join(" " + LETTERS[a] for a in data.tokens[i, :LENGTH]),
            answer="".join(mark + LETTERS[a] for mark, a in zip(marks, answers[i])),
            head="".join(f"{head:2}" for head in heads[i].tolist())))
    return shown


@torch.no_grad()
def look_inside(model, data):
    """What the heads do. gates and lost: (domains, n). symbols: those of each head."""
    with record_gates(model) as gates:
        answers = predict(model, data).argmax(-1)  # (count, LENGTH)
    [w] = gates.values()
    w, n = w[:, LENGTH:].flatten(0, 1), w.shape[-1]  # (tokens, n)
    domain = data.domain.repeat_interleave(LENGTH)  # (tokens,)
    symbol = data.tokens[:, :LENGTH].flatten()
    head_of = group_means(w, symbol, SYMBOLS).argmax(-1).tolist()
    return dict(
        examples=examples(data, answers, w.argmax(-1).view(-1, LENGTH)),
        gates=group_means(w, domain, DOMAINS).tolist(),
        lost=ablate_heads(model, data, n).tolist(),
        nmi=dict(domain=nmi(w, domain), symbol=nmi(w, symbol)),
        nmi_by_domain=nmi(F.one_hot(domain).to(w), symbol),  # if heads follow domains alone
        symbols=["".join(LETTERS[a] for a in range(SYMBOLS) if head_of[a] == i)
                 for i in range(n)])


def print_inside(examples, gates, lost, nmi, nmi_by_domain, symbols):
    print("   A sequence of each domain, its answer (* before an error), likeliest head:\n")
    for i, shown in enumerate(examples):
        print(f"   domain {i} {shown['plaintext']}\n   answer   {shown['answer']}\n"
              f"   head     {shown['head']}\n")
    print("   Mean gate of each head, and accuracy (in points) lost without that head:\n\n"
          "            |", "      | ".join(f"head {i}" for i in range(len(symbols))))
    for i in range(DOMAINS):
        points = [round(value, 1) + 0.0 for value in lost[i]]  # 0.0 for -0.0
        print(f"   domain {i}", *map("{:.2f} {:6.1f}".format, gates[i], points), sep=" | ")
    print("\n   Normalised mutual information (NMI; 0: independent, 1: one decides the other)\n"
          f"   of head and domain: {nmi['domain']:.2f}\n   of head and symbol: {nmi['symbol']:.2f} "
          f"({nmi_by_domain:.2f} if heads follow domains alone)")
    if nmi["symbol"] > nmi["domain"]:
        print("   Symbols of each head:", ", ".join(symbols))


@torch.no_grad()
def overlaps(model):
    """Mean squared cosine between two subspaces, of LoRA-Split's A_i and of its B_i."""
    layer, found = model.layers[-1].o_proj, {}
    for name, matrices in dict(A=layer.lora_A.mT, B=layer.lora_B).items():  # (n, width, r)
        pairs = combinations(torch.linalg.qr(matrices.cpu()).Q, 2)
        found[name] = mean((a.T @ b).square().sum().item() / layer.r for a, b in pairs)
    return found


# ---- Merging ----
def merge_both_ways(task, model):
    """Accuracy when merged with the mean w of each domain, and of all domains."""
    def merged_accuracy(calibration, test):
        gates = mean_gates(model, [calibration.tokens])
        return accuracy(merge_hydralora(copy.deepcopy(model), gates), test)  # (count,)

    sample, test = task.training[:1000], task.test
    by_domain = [merged_accuracy(sample[sample.domain == i], test[test.domain == i])
                 for i in range(DOMAINS)]
    return dict(true_domain=torch.cat(by_domain).mean().item(),
                all_domains=merged_accuracy(sample, test).mean().item())


# ---- The run ----
SHARES = """
   x is the adapters' input. Of the variance of its means by domain and symbol, {domain:.0%}
   is due to the domain, {symbol:.0%} to the symbol, {interaction:.0%} to the pair. Where x is
   a domain part plus a symbol part, so is B A x: a cipher's pairs are left to the frozen
   MLP. Gates made from x, or a ReLU after A, can pair domain and symbol in the update.
"""
MERGED = """   not merged              {:6.1f}%
   merged for each domain  {true_domain:6.1f}%, with its mean w
   merged for all domains  {all_domains:6.1f}%: the mean w averages the heads
"""


def experiment(seed, device, heads=None, auxiliary_weight=AUXILIARY_WEIGHT, names=MAIN_RUN):
    """The run on one seed. names: the methods, with LoRA and HydraLoRA among them."""
    print(f"HydraLoRA on {DOMAINS} hidden domains, each with a cipher: seed {seed}, {device}")
    print("\n1. How many heads?\n")
    task = Task(seed, device)
    found, sse = num_heads_from_corpus(task.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    print(f"   k-means finds {found}; using {n}. SSE of 1, 2, ... centres:\n  ", *map(round, sse))

    print("\n2. Training: all weights on the old ciphers, then an adapter on the new ones\n\n"
          f"{'loss after 0, 100 ... steps':>59}   parameters   accuracy (%)\n"
          f"   {'frozen model':28}", end="")
    frozen, floor = pretrain(task, auxiliary_weight), task.best_without_domain()
    before = accuracy(frozen, task.test).mean().item()
    print(f"{before:30.1f}\n   {'floor: best answers without the domain':72}{floor:6.1f}")
    models, scores = {}, {}
    for name in names:
        print(f"   {name:28}", end="")
        models[name], scores[name] = fine_tune(task, frozen, methods(n)[name])
        print("{size:16,}{accuracy:14.1f}".format(**scores[name]))
    shares = variance_shares(frozen, task.test)
    print(SHARES.format(**shares))

    print("3. Do the heads B_i specialise by domain?\n")
    inside = look_inside(models["HydraLoRA"], task.test)
    print_inside(**inside)

    print(f"\n4. Merging: one w for all tokens makes the heads one LoRA of rank {RANK}\n")
    ours, merged = scores["HydraLoRA"]["accuracy"], merge_both_ways(task, models["HydraLoRA"])
    print(MERGED.format(ours, **merged))
    checks = {"HydraLoRA is ahead of LoRA": ours > scores["LoRA"]["accuracy"]}
    if n >= DOMAINS:  # with fewer heads, NMI cannot reach 0.9
        checks["heads specialise by domain"] = inside["nmi"]["domain"] >= 0.9
    for what, passed in checks.items():
        print(f"{what}: {'yes' if passed else 'NO'}")
    result = dict(
        seed=seed, device=device, auxiliary_weight=auxiliary_weight, heads_found=found, sse=sse,
        num_heads=n, frozen=before, without_domain=floor, methods=scores, input_variance=shares,
        merged=merged, checks=checks, **inside)
    if "LoRA-Split" in names:  # Observation II
        split = replace(methods(n)["LoRA-Split"], layer=UnequalExperts)
        different, _ = fine_tune(task, frozen, split)
        result["overlap"] = dict(
            equal=overlaps(models["LoRA-Split"]), different=overlaps(different))
    return result


# ---- --table and --tune: several seeds ----
def start_worker():
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")


def all_seeds(function, seeds, *arguments):
    """function(seed, *arguments) for each seed, one process per core."""
    results = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_worker) as pool:
        runs = [pool.apply_async(function, (seed, *arguments)) for seed in seeds]
        for run in runs:
            results.append(run.get())
            print(f"{len(results)} of {len(seeds)} seeds", file=sys.stderr)
    return results


def lead(ours, theirs):
    """Two cells of the table: mean and std of the differences, and seeds won."""
    points = [a - b for a, b in zip(ours, theirs)]
    won = sum(point > 0 for point in points)
    return f"{mean(points):+.1f} +- {stdev(points):.1f} | {won}/{len(points)}"


def table(device):
    """README's table and numbers."""
    seeds = all_seeds(experiment, TABLE_SEEDS, device, DOMAINS, AUXILIARY_WEIGHT, [*methods()])
    reached = {name: [seed["methods"][name]["accuracy"] for seed in seeds] for name in methods()}
    print("| method | parameters | accuracy (%) | HydraLoRA's lead (points) +- std | seeds won |\n"
          "|---|---|---|---|---|")
    for name, method in methods().items():
        size = seeds[0]["methods"][name]["size"]
        compared = "|" if name == method.partner else lead(reached[method.partner], reached[name])
        print(f"| {name} | {size:,} | {mean(reached[name]):.1f} | {compared} |")

    floor = [seed["without_domain"] for seed in seeds]
    print(f"\nbest answers without the domain: {mean(floor):.1f}%")
    print("LoRA's lead over them:", lead(reached["LoRA"], floor))
    print("LoRA-Split's lead over LoRA:", lead(reached["LoRA-Split"], reached["LoRA"]))
    for what in ("input_variance", "nmi", "merged"):
        for key in seeds[0][what]:
            values = [seed[what][key] for seed in seeds]
            print(f"{what}, {key}: mean {mean(values):.2f}, {min(values):.2f} to {max(values):.2f}")
    overlap = [mean(seed["overlap"][start][matrix] for seed in seeds)
               for start in ("equal", "different") for matrix in "AB"]
    chance = methods()["LoRA-Split"].r / MODEL.hidden_size
    print("overlap of LoRA-Split's A_i and of its B_i: {:.2f} and {:.2f} if the A_i start out "
          "equal, else {:.2f} and {:.2f}; by chance {:.2f}".format(*overlap, chance))
    return seeds


def tune_seed(seed, device):
    task, scores = Task(seed, device), {}
    frozen = pretrain(task, AUXILIARY_WEIGHT)
    for name, method in methods().items():
        for lr in RATES:
            _, score = fine_tune(task, frozen, replace(method, lr=lr))
            scores[f"{name}, lr {lr}"] = score["accuracy"]
    return scores


def tune(device):
    """The accuracy of each method at each learning rate, on other seeds."""
    seeds = all_seeds(tune_seed, TUNING_SEEDS, device)
    for candidate in seeds[0]:
        scores = [seed[candidate] for seed in seeds]
        print(f"{candidate}: mean {mean(scores):.2f}, worst {min(scores):.1f}")
    return seeds


# ---- --cost ----
def cost(device):
    """Time of the layer, of a LoRA of rank n r, and of a loop over the heads."""
    costs = []
    for tokens, width, r, n in COST_SIZES:
        with torch.device(device):
            layer = HydraLoRALinear(nn.Linear(width, width), num_heads=n, r=r)
            A, B = nn.Linear(width, n * r, False), nn.Linear(n * r, width, False)
            x = torch.randn(tokens, width, requires_grad=True)

        def loop(x):  # as in the official code
            y, w = layer.base(x), layer.router(x)
            for i in range(n):
                y = y + layer.scaling * w[:, i, None] * (x @ layer.lora_A.T @ layer.lora_B[i].T)
            return y

        ways = {"HydraLoRA": layer, "LoRA": lambda x: layer.base(x) + B(A(x)), "loop": loop}
        times = {name: [] for name in ways}
        for name, way in [*ways.items()] * 7:  # in turns
            timer = Timer("way(x).sum().backward()", globals=dict(way=way, x=x))
            times[name].append(1e3 * timer.timeit(3).median)
        print(f"{tokens} tokens, width {width}, r {r}, n {n}")
        for name in ways:
            ms, lora = median(times[name]), median(times["LoRA"])
            print(f"   {name:10}{ms:8.1f} ms, {ms / lora:.2f} of the LoRA's")
            costs.append(dict(layer=name, ms=ms))
    return costs


# ---- Options ----
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for mode in (table, tune, cost):
        modes.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode)
    add("--seed", type=int, default=0)
    add("--heads", type=int, help="number of heads (default: by k-means)")
    add("--auxiliary-weight", type=float, default=AUXILIARY_WEIGHT)
    add("--check", action="store_true", help="exit with 1 if a check fails")
    add("--json", metavar="FILE", default=os.devnull, help="for the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if available")
    options = parser.parse_args()
    run = options.seed, options.device, options.heads, options.auxiliary_weight
    if options.mode and (*run, options.check) != (0, run[1], None, AUXILIARY_WEIGHT, False):
        parser.error("--table, --tune and --cost only take --device and --json")
    if not 0 <= options.seed <= 2**50 or options.heads is not None and options.heads < 1:
        parser.error("--seed must be from 0 to 2**50, and --heads 1 or more")
    try:
        torch.ones(1, device=options.device).item()
        open(options.json, "a").close()  # keeps an old file
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])

    torch.set_num_threads(1)  # the same digits on any number of cores
    result = options.mode(options.device) if options.mode else experiment(*run)
    with open(options.json, "w") as file:
        json.dump(result, file, indent=1)
    return int(options.check and not all(result["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
