# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are the heads and the router worth?

    python train_toy.py             the experiment: a minute on a CPU
    python train_toy.py --table     README's table, twenty seeds: half an hour on two cores
    python train_toy.py --tune      the learning rates, ten seeds: 40 minutes on two cores
    python train_toy.py --cost      the time of the layer: two minutes

--proportions 85 10 5 --heads 3 makes two domains rare (k-means would find two domains).
The function `experiment` shows the whole run.

Sequences come from hidden domains, each with its own substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer learns one set of ciphers and is frozen. Adapters then learn new ciphers.

The task is designed so that a router helps. Each domain uses its own third of the symbols
more often, which tells the domains apart. In pre-training, an auxiliary loss makes the
first block predict the plaintext symbol. So the attention of the last block only has to
find out the domain. The adapters are on the o_proj of this attention. Their input x
contains what it has found.

Why a LoRA is not enough: the right answer depends on domain and symbol together. On seed
0, for example, e becomes o in domain 0 and j in domain 1. But x is nearly a domain part
plus a symbol part, and so B A x is such a sum too. Only the frozen MLP behind it can then
combine the two. A ReLU after A, or gates made from x, combine them in the update itself.
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
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers, inject_hydralora,
    mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

# ---- Settings ----
DOMAINS = 3
PROPORTIONS = [1] * DOMAINS  # how often each domain occurs
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
RANK = 9  # r of HydraLoRA on o_proj; with 9, a LoRA MoE of equal size has an integer rank, 6
MAIN_RUN = "LoRA", "LoRA with a ReLU", "HydraLoRA, random router", "LoRA MoE", "HydraLoRA"
ROUTER_RATE = 8  # its learning rate / that of A and B; with 1, rare domains are learnt less
TUNING_SEEDS = range(10)
TABLE_SEEDS = range(960, 980)
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

    def __init__(self, seed, device, proportions=PROPORTIONS):
        self.seed = seed
        self.device = device
        self.proportions = torch.tensor(proportions) / sum(proportions)
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)
        generator = torch.Generator().manual_seed(seed)
        ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
        self.old, self.new = torch.stack(ciphers).split(DOMAINS)  # (domains, symbols)
        self.training = self.sample(STEPS * BATCH, self.new, stream=1)
        self.test = self.sample(EVALUATION, self.new, stream=2)

    def sample(self, count, ciphers, stream):
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        domain = self.proportions.multinomial(count, True, generator=generator)
        plain = self.frequencies[domain].multinomial(LENGTH, True, generator=generator)
        tokens = F.pad(plain, (0, LENGTH), value=SYMBOLS)
        targets = ciphers[domain[:, None], plain]
        return Data(tokens.to(self.device), targets.to(self.device), domain.to(self.device))

    def floor(self):
        """The best accuracy without knowing the domain: each symbol's likeliest answer."""
        answers = F.one_hot(self.new, SYMBOLS) * self.frequencies[..., None]
        answers = torch.einsum("d,dsa->sa", self.proportions, answers)  # (symbols, answers)
        return 100 * answers.amax(-1).sum().item()


# ---- Training, and the frozen model ----
def train(loss_of, model, lr, data):
    """One pass over the data by AdamW. Prints the loss, loss_of(batch), every 100 steps."""
    routers = [p for name, p in model.named_parameters() if "router" in name]
    others = [p for name, p in model.named_parameters() if "router" not in name]
    optimizer = torch.optim.AdamW(
        [dict(params=others), dict(params=routers)], betas=(0.9, 0.95), weight_decay=0.1)
    steps = len(data.tokens) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # cycle_momentum would overwrite betas
        optimizer, [lr, ROUTER_RATE * lr], total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        loss = loss_of(data[step * BATCH:(step + 1) * BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{loss.item():6.2f}", end="", flush=True)


def pretrain(task):
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
        return F.cross_entropy(answers.mT, batch.targets) + AUXILIARY_WEIGHT * auxiliary

    data = task.sample(PRETRAIN_STEPS * BATCH, task.old, stream=0)
    print(f"   {'pre-training':27}", end="")
    train(loss_of, model, 3e-3, data)
    print("   with the auxiliary loss")
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
    train_router: bool = True
    target: str = "layers.1.o_proj"
    lr: float = 0.16
    partner: str = "HydraLoRA"  # the row it is compared with in --table


def methods(n=DOMAINS):
    """Name -> Method, for n heads.

    Ranks are set for about equal sizes: HydraLoRA has r k + n r d + n k parameters, a LoRA
    r k + r d, with k = d in o_proj and k = 4 d in down_proj. Each lr is the one of RATES
    with the best mean accuracy on TUNING_SEEDS (--tune).
    """
    lora_rank = math.ceil((RANK + n * RANK + n) / 2)
    experts_rank = round(RANK * (1 + n) / (2 * n))
    down_proj = dict(target="layers.1.down_proj", partner="HydraLoRA on down_proj", lr=0.08)
    return {
        "LoRA": Method(r=lora_rank, lr=0.08),
        "LoRA, full rank": Method(r=MODEL.hidden_size, lr=0.08),
        "LoRA with a ReLU": Method(r=lora_rank, layer=ReLULoRA),
        "HydraLoRA without router": Method(n, gates=equal_gates),  # Fig. 6, w/o gate
        "HydraLoRA, random router": Method(n, train_router=False),
        "LoRA MoE": Method(n, experts_rank, LoRAExperts),
        "LoRA MoE, same rank": Method(n, layer=LoRAExperts, lr=0.08),
        "one A per head, shared B": Method(n, layer=SharedB),
        "LoRA-Split": Method(DOMAINS, experts_rank, LoRAExperts, true_labels),
        "HydraLoRA with true labels": Method(DOMAINS, gates=true_labels),
        "HydraLoRA": Method(n, lr=0.32),
        "LoRA on down_proj": Method(r=math.ceil((16 + 4 * n + 4 * n) / 5), **down_proj),
        "HydraLoRA on down_proj": Method(n, r=4, **down_proj)}


# ---- The adapters ----
def adapt(model, method, seed):
    """A copy of the model with an adapter.

    With the same seed, adapters of equal n start from the same Wg, and adapters of equal r
    from the same A (LoRAExperts draws its own A_i).
    """
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    inject_hydralora(model, [method.target], method.layer, num_heads=method.n, r=method.r,
                     lora_alpha=2 * method.r)
    [layer] = hydralora_layers(model).values()
    torch.manual_seed(seed + 1_000_000)  # Wg must not depend on r, nor repeat A's numbers
    layer.router.reset_parameters()
    layer.router.requires_grad_(method.train_router and method.gates is None and method.n > 1)
    return model


def predict(model, data, gates=None):
    """Logits at the question marks (count, LENGTH, vocab_size).

    gates(data, w), if given, replaces the router's w (count, t, n).
    """
    if gates is None:
        return model(data.tokens)[:, LENGTH:]
    with hook_gates(model, lambda name, w: gates(data, w)):
        return model(data.tokens)[:, LENGTH:]


@torch.no_grad()
def accuracy(model, data, gates=None):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data, gates).argmax(-1) == data.targets).float().mean(1)


def group_means(values, group, groups):
    """values (m, ...), group (m,) -> the mean of each group: (groups, ...)."""
    return torch.stack([values[group == i].mean(0) for i in range(groups)])


def fine_tune(task, frozen, name, method):
    """A copy of the model that has learnt the new ciphers, and its results. Prints a row."""
    model = adapt(frozen, method, task.seed)

    def loss_of(batch):
        return F.cross_entropy(predict(model, batch, method.gates).mT, batch.targets)

    print(f"   {name:27}", end="")
    train(loss_of, model, method.lr, task.training)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reached = accuracy(model, task.test, method.gates)  # (count,)
    by_domain = group_means(reached, task.test.domain, DOMAINS).tolist()
    result = dict(size=size, accuracy=reached.mean().item(), by_domain=by_domain)
    print("{size:13,}{accuracy:11.1f}   ".format(**result), *map("{:3.0f}".format, by_domain))
    return model, result


# ---- A look inside ----
@torch.no_grad()
def variance_shares(model, data):
    """Two-way ANOVA, by domain and symbol, of the mean input x of the last o_proj."""
    inputs = []
    with model.layers[-1].o_proj.register_forward_pre_hook(lambda _, x: inputs.extend(x)):
        predict(model, data)
    x = inputs[0][:, LENGTH:].flatten(0, 1)  # (tokens, width)
    pair = (data.domain[:, None] * SYMBOLS + data.tokens[:, :LENGTH]).flatten()
    means = group_means(x, pair, DOMAINS * SYMBOLS)
    means = means.unflatten(0, (DOMAINS, SYMBOLS)) - means.mean(0)  # (domains, symbols, width)
    domain = means.mean(1, keepdim=True)
    symbol = means.mean(0, keepdim=True)
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
    intact = accuracy(model, data)
    lost = []
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
    """A dict: mean gates and accuracy lost without each head, both (domains, n), and more."""
    with record_gates(model) as gates:
        answers = predict(model, data).argmax(-1)  # (count, LENGTH)
    [w] = gates.values()
    w = w[:, LENGTH:]  # (count, LENGTH, n)
    domain = data.domain.repeat_interleave(LENGTH)  # (tokens,)
    return dict(
        examples=examples(data, answers, w.argmax(-1)),
        gates=group_means(w.mean(1), data.domain, DOMAINS).tolist(),
        lost=ablate_heads(model, data, w.shape[-1]).tolist(),
        nmi=nmi(w.flatten(0, 1), domain))


def print_inside(examples, gates, lost, nmi):
    print("   One sequence of each domain, the model's answer (* before an error), and the head\n"
          "   with the largest gate (which head takes which domain is chance):\n")
    for i, shown in enumerate(examples):
        print(f"   domain {i} {shown['plaintext']}\n   answer   {shown['answer']}\n"
              f"   head     {shown['head']}\n")
    print("   Mean gate of each head, and accuracy (in points) lost without that head:\n\n"
          "            |", "      | ".join(f"head {i}" for i in range(len(gates[0]))))
    for i in range(DOMAINS):
        points = [round(value, 1) + 0.0 for value in lost[i]]  # 0.0 for -0.0
        print(f"   domain {i}", *map("{:.2f} {:6.1f}".format, gates[i], points), sep=" | ")
    print(f"\n   Normalised mutual information (NMI) of head and domain: {nmi:.2f}\n"
          "   (0: independent, 1: each determines the other)")


# ---- Merging ----
def merge_both_ways(task, model):
    """The accuracy with a merge for each sequence, and with one merge for all.

    A merge for each sequence is imitated by constant gates, which compute the same: the w
    of the sequence's last plaintext symbol.
    """
    def of_last_plaintext(data, w):
        return w[:, LENGTH - 1:LENGTH].expand_as(w)  # (count, t, n)

    gates = mean_gates(model, [task.training.tokens[:1000]])
    merged = merge_hydralora(copy.deepcopy(model), gates)
    reached = dict(
        each_sequence=accuracy(model, task.test, of_last_plaintext),
        all=accuracy(merged, task.test))  # each (count,)
    return {way: values.mean().item() for way, values in reached.items()}


# ---- The run ----
def experiment(seed, device, heads=None, names=MAIN_RUN, proportions=PROPORTIONS):
    """The run on one seed. names: the methods, with LoRA and HydraLoRA among them."""
    print(f"HydraLoRA on {DOMAINS} hidden domains, each with a cipher: seed {seed}, {device}")
    task = Task(seed, device, proportions)

    print("\n1. How many heads? k-means on the plaintexts:\n")
    found, sse = num_heads_from_corpus(task.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    print(f"   it finds {found}; using {n}. SSE with 1, 2, ... centres:\n  ", *map(round, sse))

    print("\n2. Training: all weights on the old ciphers, then an adapter on the new ones\n\n"
          f"{'loss after 0, 100, ... steps':>54}{'parameters':>13}{'accuracy':>11}   by domain (%)")
    frozen = pretrain(task)
    no_adapter = accuracy(frozen, task.test).mean().item()
    floor = task.floor()
    print(f"   {'no adapter, on the new ciphers':64}{no_adapter:11.1f}\n"
          f"   {'floor: best without knowing the domain':64}{floor:11.1f}")
    chosen = methods(n)
    models = {}
    results = {}
    for name in names:
        models[name], results[name] = fine_tune(task, frozen, name, chosen[name])
    shares = variance_shares(frozen, task.test)
    print("\n   Variance of x, the adapters' input: domain {domain:.1%}, symbol {symbol:.1%}, "
          "their combination {interaction:.1%}\n".format(**shares))

    print("3. Do the heads B_i specialise by domain?\n")
    inside = look_inside(models["HydraLoRA"], task.test)
    print_inside(**inside)

    print(f"\n4. Merging: one w for all tokens makes the heads one LoRA of rank {RANK}\n")
    ours = results["HydraLoRA"]["accuracy"]
    merged = dict(not_merged=ours) | merge_both_ways(task, models["HydraLoRA"])
    print("   not merged                {not_merged:6.1f}%\n"
          "   merged for each sequence  {each_sequence:6.1f}%, with w of its last symbol\n"
          "   merged once for all       {all:6.1f}%, with the mean w\n".format(**merged))
    checks = {"HydraLoRA is ahead of LoRA": ours > results["LoRA"]["accuracy"]}
    if n >= DOMAINS:  # with fewer heads, NMI cannot reach 0.9
        checks["heads specialise by domain"] = inside["nmi"] >= 0.9
    for what, passed in checks.items():
        print(f"{what}: {'yes' if passed else 'NO'}")
    return dict(
        seed=seed, device=device, proportions=proportions, heads_found=found, sse=sse,
        num_heads=n, no_adapter=no_adapter, floor=floor, methods=results,
        input_variance=shares, merged=merged, checks=checks, **inside)


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
    names = [*methods()]
    results = all_seeds(experiment, TABLE_SEEDS, device, DOMAINS, names)
    reached = {name: [result["methods"][name]["accuracy"] for result in results]
               for name in names}
    print("| method | parameters | accuracy (%) | HydraLoRA's lead (points) +- std | seeds won |\n"
          "|---|---|---|---|---|")
    for name, method in methods().items():
        size = results[0]["methods"][name]["size"]
        compared = "|" if name == method.partner else lead(reached[method.partner], reached[name])
        print(f"| {name} | {size:,} | {mean(reached[name]):.1f} | {compared} |")

    print(f"\nfloor: {mean(result['floor'] for result in results):.1f}%")
    print(f"NMI of head and domain: at least {min(result['nmi'] for result in results):.2f}")
    for way in results[0]["merged"]:
        print(f"merged, {way}: {mean(result['merged'][way] for result in results):.1f}%")
    return results


def tune_seed(seed, device):
    task = Task(seed, device)
    frozen = pretrain(task)
    reached = {}
    for name, method in methods().items():
        for lr in RATES:
            _, result = fine_tune(task, frozen, name, replace(method, lr=lr))
            reached[f"{name}, lr {lr}"] = result["accuracy"]
    return reached


def tune(device):
    """The accuracy of each method at each learning rate, on other seeds."""
    results = all_seeds(tune_seed, TUNING_SEEDS, device)
    for candidate in results[0]:
        values = [result[candidate] for result in results]
        print(f"{candidate}: mean {mean(values):.2f}, worst {min(values):.1f}")
    return results


# ---- --cost ----
def cost(device):
    """Prints how long a forward and backward take, relative to a LoRA of rank n r."""
    costs = []
    for tokens, width, r, n in COST_SIZES:
        layer = HydraLoRALinear(nn.Linear(width, width), num_heads=n, r=r).to(device)
        A = nn.Linear(width, n * r, bias=False).to(device)
        B = nn.Linear(n * r, width, bias=False).to(device)
        x = torch.randn(tokens, width, device=device, requires_grad=True)

        def loop(x):  # as in the official code
            y = layer.base(x)
            for w_i, B_i in zip(layer.router(x).unbind(-1), layer.lora_B):
                y = y + layer.scaling * w_i[:, None] * F.linear(F.linear(x, layer.lora_A), B_i)
            return y

        timers = [Timer("way(x).sum().backward()", globals=dict(way=way, x=x))
                  for way in (lambda x: layer.base(x) + B(A(x)), layer, loop)]
        turns = [[timer.timeit(3).median for timer in timers] for _ in range(7)]
        of_lora, of_layer, of_loop = map(median, zip(*turns))
        costs.append(dict(tokens=tokens, width=width, r=r, n=n,
                          layer=round(of_layer / of_lora, 2), loop=round(of_loop / of_lora, 2)))
        print(costs[-1])
    return costs


# ---- Options ----
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for mode in (table, tune, cost):
        modes.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode)
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--heads", type=int, help="number of heads (default: by k-means)")
    add("--proportions", type=float, nargs=DOMAINS, default=PROPORTIONS, metavar="P",
        help="how often each domain occurs, such as 85 10 5 (default: equal)")
    add("--check", action="store_true", help="exit with 1 if a check fails")
    add("--json", metavar="FILE", default=os.devnull, help="write the results to this file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if available")
    options = parser.parse_args()
    single_run = ("seed", "heads", "proportions", "check")
    if options.mode and any(getattr(options, o) != parser.get_default(o) for o in single_run):
        parser.error("--table, --tune and --cost only take --device and --json")
    if options.heads is not None and options.heads < 1:
        parser.error("--heads must be 1 or more")
    if not min(options.proportions) > 0.02 * sum(options.proportions):
        parser.error("each of --proportions must be over 2% of their sum")
    try:
        torch.ones(1, device=options.device).item()
        open(options.json, "a").close()  # keeps an old file
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])

    torch.set_num_threads(1)  # the same digits on any number of cores
    if options.mode:
        result = options.mode(options.device)
    else:
        result = experiment(
            options.seed, options.device, options.heads, proportions=options.proportions)
    with open(options.json, "w") as file:
        json.dump(result, file, indent=1)
    return int(options.check and not all(result["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
