# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are heads and router worth?

    python train_toy.py             the experiment: under a minute on a CPU
    python train_toy.py --table     README's table, twenty seeds: 15 minutes on two cores
    python train_toy.py --tune      the learning rates, ten seeds: 20 minutes
    python train_toy.py --cost      time and memory of the layer

Sequences come from hidden domains, each with its own substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen; then adapters learn new
ones. The task is designed so that a router helps. Each domain uses its own third of the
symbols more often, which tells the domains apart. In pre-training, an auxiliary loss makes
the first block predict the plaintext symbol, so that the last attention has only the
domain left to find; its o_proj, where the adapters are, gets what it finds as input.

A linear map alone cannot apply a different cipher in each domain. B ReLU(A x), without heads
and router, can, and closes most of HydraLoRA's lead over LoRA.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass, replace
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers,
    inject_hydralora, mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

DOMAINS = 3
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4  # how much more often a domain uses a symbol of its own third
LENGTH = 32  # plaintext symbols in a sequence, and as many question marks
BATCH = 24
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400  # on the new ciphers, the adapter alone
EVALUATION = 500  # test sequences
AUXILIARY_WEIGHT = 2.0  # weight of the auxiliary loss in pre-training
RANK = 9  # r of HydraLoRA: one head can hold the cipher of a domain
MODEL = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_attention_heads=8)


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
        data = F.pad(plain, (0, LENGTH), value=SYMBOLS), ciphers[domain[:, None], plain], domain
        return Data(*(t.to(self.device) for t in data))


# ---- Training, and the frozen model ----
def train(loss_of, groups, data, name):
    """One pass over the data by AdamW, with a one-cycle schedule of learning rate and beta1.
    Weight decay limits the update. groups: dicts of params and lr."""
    steps = len(data.tokens) // BATCH
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        loss = loss_of(data[step * BATCH:(step + 1) * BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"   {name}, step {step}: loss {loss.item():.2f}")


def pretrain(task, auxiliary_weight):
    """A transformer that knows the old ciphers, frozen."""
    torch.manual_seed(task.seed)
    model = TinyTransformer(MODEL).to(task.device)
    first, last = model.layers

    def loss_of(batch):
        h = first(model.embed(batch.tokens))  # (b, 2 LENGTH, width)
        early, late = (model.lm_head(model.norm(y[:, LENGTH:])) for y in (h, last(h)))
        auxiliary = F.cross_entropy(early.mT, batch.tokens[:, :LENGTH])
        return F.cross_entropy(late.mT, batch.targets) + auxiliary_weight * auxiliary

    data = task.sample(PRETRAIN_STEPS * BATCH, task.old, stream=0)
    train(loss_of, [dict(params=model.parameters(), lr=3e-3)], data, "pre-training")
    return model.requires_grad_(False)


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6), sum_i w_i B_i A_i x. The A_i start equal."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.detach().repeat(self.num_heads, 1, 1))  # (n, r, k)

    def forward(self, x):
        y = self.base(x)  # (..., d)
        x = x.to(self.lora_A.dtype)
        w = self.router(x)  # (..., n)
        z = torch.einsum("...k,nrk->...nr", self.lora_dropout(x), self.lora_A)
        delta = torch.einsum("...n,...nr,ndr->...d", w, self.scaling * z, self.lora_B)
        return y + delta.to(y.dtype)


class ReLULoRA(HydraLoRALinear):
    """B ReLU(A x): a nonlinearity, without heads and router."""

    def forward(self, x):
        z = F.linear(self.lora_dropout(x), self.lora_A).relu()  # (..., r)
        return self.base(x) + self.scaling * F.linear(z, self.lora_B[0])


class LabelRouter(nn.Module):
    """One-hot domain labels in the router's place."""
    labels = None  # (b,), set by predict

    def forward(self, x):
        w = F.one_hot(self.labels, DOMAINS).to(x)[:, None]  # (b, 1, n)
        return w.expand(-1, x.shape[1], -1)  # (b, t, n)


@dataclass
class Method:
    """What is trained, and where."""
    lr: float  # lr and router_rate are chosen by --tune
    n: int = 1  # heads; a single head is a LoRA
    r: int = RANK
    layer: type = HydraLoRALinear
    targets: tuple = ("layers.1.o_proj",)
    router_rate: int = 1  # the router's lr is router_rate * lr
    labels: bool = False  # domain labels replace the router


def methods(n=DOMAINS):
    """Name -> Method, for n heads. Ranks make sizes about equal: if k = c d, HydraLoRA has
    (c r + n r + c n) d parameters, and a LoRA has (c + 1) r d."""
    def lora_rank(r, c=1):
        return math.ceil((c * r + n * r + c * n) / (c + 1))

    def experts_rank(n):
        return round(RANK * (1 + n) / (2 * n))

    mlp, q_v = ("layers.1.down_proj",), ("layers.1.q_proj", "layers.1.v_proj")
    return {
        "LoRA": Method(0.08, r=lora_rank(RANK)),
        "LoRA with a ReLU": Method(0.08, r=lora_rank(RANK), layer=ReLULoRA),
        "LoRA MoE": Method(0.08, n, experts_rank(n), LoRAExperts, router_rate=64),
        "LoRA MoE, same rank": Method(0.08, n, layer=LoRAExperts, router_rate=64),
        "LoRA-Split": Method(0.08, DOMAINS, experts_rank(DOMAINS), LoRAExperts, labels=True),
        "HydraLoRA with true labels": Method(0.08, DOMAINS, labels=True),
        "LoRA on down_proj": Method(0.08, r=lora_rank(4, 4), targets=mlp),
        "LoRA on q_proj, v_proj": Method(0.08, r=lora_rank(4), targets=q_v),
        "LoRA with a ReLU on q_proj, v_proj": Method(
            0.08, r=lora_rank(4), layer=ReLULoRA, targets=q_v),
        "HydraLoRA on down_proj": Method(0.08, n, 4, targets=mlp),
        "HydraLoRA on q_proj, v_proj": Method(0.08, n, 4, targets=q_v),
        "HydraLoRA": Method(0.08, n, router_rate=64)}


def adapt(model, method, seed):
    """A copy of the model with adapters. With one seed, methods of equal rank start from the
    same A, and methods of equal n from the same router."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    inject_hydralora(model, method.targets, method.layer, num_heads=method.n, r=method.r,
                     lora_alpha=2 * method.r)
    torch.manual_seed(seed + 1_000_000)  # else routers start equal to the first rows of A
    for layer in hydralora_layers(model).values():
        layer.router.reset_parameters()
        layer.router.requires_grad_(method.n > 1)  # the gate of a single head is 1
        if method.labels:
            layer.router = LabelRouter()
    return model


def predict(model, data):
    """Logits at the question marks: (count, LENGTH, vocab_size)."""
    for module in model.modules():
        if isinstance(module, LabelRouter):
            module.labels = data.domain
    return model(data.tokens)[:, LENGTH:]


@torch.no_grad()
def accuracy(model, data):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data).argmax(-1) == data.targets).float().mean(1)


def fine_tune(task, model, method, name):
    """Train a copy of the model by a method; returns the copy and results."""
    model = adapt(model, method, task.seed)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    groups = [dict(params=[p], lr=method.lr * (method.router_rate if "router" in key else 1))
              for key, p in trained.items()]
    train(lambda batch: F.cross_entropy(predict(model, batch).mT, batch.targets),
          groups, task.training, name)
    return model, dict(size=sum(p.numel() for p in trained.values()),
                       accuracy=accuracy(model, task.test).mean().item())


# ---- A look at the heads of any adapted model ----
def group_means(values, group, groups):
    """values (m, ...), group (m,) -> the mean of each group: (groups, ...)."""
    members = F.one_hot(group, groups).to(values)  # (m, groups)
    return torch.einsum("mg,m...->g...", members / members.sum(0), values)


@torch.no_grad()
def gates_of(model, data):
    """w of the last adapted layer at the question marks: (count, LENGTH, n)."""
    with record_gates(model) as gates:
        predict(model, data)
    return [*gates.values()][-1][:, LENGTH:]


def nmi(w, domain):
    """2 I(domain; head) / (H(domain) + H(head)), where each token draws its head from its
    gates w (count, LENGTH, n)."""
    w = w / w.sum(-1, keepdim=True)
    joint = F.one_hot(domain, DOMAINS).to(w).T @ w.mean(1) / len(w)  # (domains, n)
    of_domain, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * (of_domain + of_head - of_both) / (of_domain + of_head)


@torch.no_grad()
def last_o_proj(model, data):
    """Input and output of the last o_proj at the question marks: (count, LENGTH, width)."""
    seen = []
    with model.layers[-1].o_proj.register_forward_hook(lambda _, x, y: seen.extend((*x, y))):
        predict(model, data)
    return [t[:, LENGTH:] for t in seen]


def variance_shares(model, data):
    """Two-way ANOVA of the last o_proj's mean input for each domain and symbol."""
    x, _ = last_o_proj(model, data)
    pair = data.domain[:, None] * SYMBOLS + data.tokens[:, :LENGTH]  # (count, LENGTH)
    means = group_means(x.flatten(0, 1), pair.flatten(), DOMAINS * SYMBOLS)
    means = means.unflatten(0, (DOMAINS, SYMBOLS)) - means.mean(0)  # (domains, symbols, width)
    parts = dict(domain=means.mean(1, keepdim=True), symbol=means.mean(0, keepdim=True))
    parts["interaction"] = means - parts["domain"] - parts["symbol"]
    return {name: (part.square().mean() / means.square().mean()).item()
            for name, part in parts.items()}


def update_ratio(model, data):
    """Mean norm of the last o_proj's update at the question marks, relative to W0 x's."""
    x, y = last_o_proj(model, data)
    base = model.layers[-1].o_proj.base(x)
    return ((y - base).norm(dim=-1).mean() / base.norm(dim=-1).mean()).item()


def ablate_heads(model, data, n):
    """Points of accuracy that each domain loses when a head's gate is 0: (domains, n)."""
    results = []
    for kept in torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).to(data.tokens.device):
        with hook_gates(model, lambda name, w: w * kept):
            results.append(group_means(accuracy(model, data), data.domain, DOMAINS))
    return results[0][:, None] - torch.stack(results[1:], dim=1)


def merged_accuracy(model, calibration, test):
    """Accuracy in each test sequence, merged with the calibration data's mean gates."""
    gates = mean_gates(model, [calibration.tokens])
    return accuracy(merge_hydralora(copy.deepcopy(model), gates), test)


def examples(model, data, w):
    """A sequence of each domain: plaintext, answer (errors in capitals), head by gates w."""
    answers, shown = predict(model, data).argmax(-1), []  # (count, LENGTH)
    for i in range(DOMAINS):
        row = data.domain.tolist().index(i)
        pairs = zip(answers[row].tolist(), data.targets[row].tolist())
        shown.append(dict(
            plaintext=[chr(ord("a") + symbol) for symbol in data.tokens[row, :LENGTH].tolist()],
            answer=[chr(ord("a" if symbol == right else "A") + symbol) for symbol, right in pairs],
            head=w[row].argmax(-1).tolist()))
    return shown


@torch.no_grad()
def subspace_overlap(matrices):
    """Mean squared cosine between the column spaces of pairs of (width, r) matrices."""
    Q = torch.linalg.qr(matrices.cpu()).Q
    pairs = itertools.combinations(Q, 2)
    return mean((a.T @ b).square().sum().item() / a.shape[1] for a, b in pairs)


# ---- The experiment ----
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "LoRA MoE", "HydraLoRA")


def experiment(seed, device, names=MAIN_RUN, heads=None, auxiliary_weight=AUXILIARY_WEIGHT):
    """Train all methods and measure; `report` prints the results."""
    task = Task(seed, device)
    found, sse = num_heads_from_corpus(task.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    frozen = pretrain(task, auxiliary_weight)
    models, results, chosen = {}, {}, methods(n)
    for name in names:
        models[name], results[name] = fine_tune(task, frozen, chosen[name], name)

    result = dict(
        seed=seed, device=device, auxiliary_weight=auxiliary_weight, heads_found=found,
        sse=sse, num_heads=n, frozen=accuracy(frozen, task.test).mean().item(),
        methods=results, input_variance=variance_shares(frozen, task.test),
        update=None, nmi={}, gates=[], lost=[], examples=[], merged={}, overlap={}, checks={})
    if "HydraLoRA" in names:
        result |= look_at_heads(task, models["HydraLoRA"], n)
    if {"LoRA", "HydraLoRA"} <= {*names}:
        result["checks"]["HydraLoRA is ahead of LoRA"] = (
            results["HydraLoRA"]["accuracy"] > results["LoRA"]["accuracy"])
    if "LoRA-Split" in names:
        split = models["LoRA-Split"].layers[-1].o_proj
        result["overlap"] = dict(
            A=subspace_overlap(split.lora_A.mT), B=subspace_overlap(split.lora_B),
            chance=split.r / split.in_features)
    return result


def look_at_heads(task, model, n):
    test, domain, plain = task.test, task.test.domain, task.test.tokens[:, :LENGTH]
    w = gates_of(model, test)  # (count, LENGTH, n)
    by_symbol = group_means(w.flatten(0, 1), plain.flatten(), SYMBOLS)[plain]
    scores = dict(router=nmi(w, domain), symbols=nmi(by_symbol, domain))
    sample = task.training[:1000]
    merged = [merged_accuracy(model, sample[sample.domain == i], test[domain == i])
              for i in range(DOMAINS)]
    return dict(
        update=update_ratio(model, test[:100]), nmi=scores,
        gates=group_means(w.mean(1), domain, DOMAINS).tolist(),
        lost=ablate_heads(model, test, n).tolist(), examples=examples(model, test[:100], w),
        merged=dict(true_domain=torch.cat(merged).mean().item(),
                    all_domains=merged_accuracy(model, sample, test).mean().item()),
        checks={"heads specialise by domain":
                scores["router"] >= 0.9 and scores["symbols"] <= 0.2})


def report(result):
    """Print an experiment's results, each with its cause."""
    print("\n1. How many heads? k-means suggests {heads_found}; using {num_heads}".format(**result))
    print("   SSE of 1, 2, ... centres:", *map(round, result["sse"]))
    print("\n2. Accuracy (%) on the new ciphers, with adapters on the last o_proj:\n")
    print(f"   {'frozen model':46}{result['frozen']:6.1f}")
    for name, method in result["methods"].items():
        print("   {:28}{size:6,} parameters {accuracy:6.1f}".format(name, **method))
    print("\n   A linear map alone, as in LoRA, cannot apply a different cipher in each domain;\n"
          "   with a ReLU it can. The frozen model answers in the old ciphers.")
    if "HydraLoRA" in result["methods"]:
        report_heads(result)


def report_heads(result):
    scores, merged = result["nmi"], result["merged"]
    shares = [f"{100 * v:.0f} % {name}" for name, v in result["input_variance"].items()]
    print(f"   HydraLoRA's update is {result['update']:.0f} times as large as W0 x, "
          "so it dominates the output.")
    print("\n3. Do the heads B_i specialise by domain? Their router reads o_proj's input.\n"
          "   Variance of its mean:", ", ".join(shares))
    print("\n   One sequence per domain, the answer (errors in capitals), and the head with\n"
          "   the largest gate:")
    for i, example in enumerate(result["examples"]):
        print(f"\n   domain {i} ", *example["plaintext"])
        print("   answer   ", *example["answer"])
        print("   head     ", *example["head"])
    print("\n   Mean gate of each head, and accuracy (in points) lost without that head:\n")
    print("            |", "      | ".join(f"head {i}" for i in range(result["num_heads"])))
    for i, (gates, lost) in enumerate(zip(result["gates"], result["lost"])):
        points = [round(value, 1) + 0.0 for value in lost]  # 0.0 for -0.0
        print(f"   domain {i}", *map("{:.2f} {:6.1f}".format, gates, points), sep=" | ")
    print(f"\n   NMI of head and domain: {scores['router']:.2f} (0: independent, 1: one head per\n"
          f"   domain). With gates by symbol alone: {scores['symbols']:.2f}.")
    print("\n4. Merging leaves one LoRA, for fixed gates. Accuracy with the mean gates of the\n"
          f"   true domain: {merged['true_domain']:.1f}; of all domains: "
          f"{merged['all_domains']:.1f}, which averages the heads.\n")
    specialise = result["checks"]["heads specialise by domain"]
    print("The heads", "specialise" if specialise else "do not specialise", "by domain.")
    for name, method in result["methods"].items():
        points = result["methods"]["HydraLoRA"]["accuracy"] - method["accuracy"]
        if name != "HydraLoRA":
            place = "ahead of" if points > 0 else "behind"
            print(f"HydraLoRA is {abs(points):.1f} points {place} {name}.")


# ---- --table and --tune: all methods on several seeds ----
TABLE_SEEDS = range(540, 560)  # unused in tuning
TUNING_SEEDS = range(10)
RATES = (0.005, 0.02, 0.08)  # higher rates are no better
ROUTER_RATES = (1, 64)  # a fast router rarely leaves heads unused


def start_worker():
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # the losses of several seeds would mix


def all_seeds(seeds, function, **arguments):
    """function(seed, **arguments) for each seed, in as many processes as cores."""
    results, spawn = [], multiprocessing.get_context("spawn")
    with spawn.Pool(min(os.cpu_count(), len(seeds)), start_worker) as pool:
        for result in pool.imap(functools.partial(function, **arguments), seeds):
            results.append(result)
            print(f"{len(results)} of {len(seeds)} seeds", file=sys.stderr)
    return results


def print_table(seeds):
    """README's table, and the numbers below it, from the results of each seed."""
    def values(*keys):
        return [functools.reduce(dict.get, keys, seed) for seed in seeds]

    print("| baseline | parameters, baseline:HydraLoRA | accuracy (%), baseline:HydraLoRA | "
          "gain in points +- std | seeds won |\n|---|---|---|---|---|")
    names = seeds[0]["methods"]
    for name in names:
        hydra = "HydraLoRA" + "".join(name.partition(" on ")[1:])  # on the same layers
        if name != hydra and hydra in names:
            size = [values("methods", key, "size")[0] for key in (name, hydra)]
            its, ours = (values("methods", key, "accuracy") for key in (name, hydra))
            gains = [b - a for a, b in zip(its, ours)]
            print("| {} | {:,}:{:,} | {:.1f}:{:.1f} | {:+.1f} +- {:.1f} | {}/{} |".format(
                name, *size, mean(its), mean(ours), mean(gains), stdev(gains),
                sum(gain > 0 for gain in gains), len(gains)))
    print()
    rows = [("methods", name, "accuracy") for name in names] + [("frozen",), ("update",)]
    for what in ("nmi", "input_variance", "merged", "overlap"):
        rows += [(what, key) for key in seeds[0][what]]
    for row in rows:
        found = values(*row)
        print(f"- {', '.join(row)}: {mean(found):.2f} +- {stdev(found):.2f}, "
              f"from {min(found):.2f} to {max(found):.2f}")
    specialised = sum(values("checks", "heads specialise by domain"))
    print(f"- The heads specialise by domain on {specialised} of {len(seeds)} seeds.")


def tune_seed(seed, device):
    """The accuracy of each method at each lr, and router_rate if it has a router."""
    task = Task(seed, device)
    model, scores = pretrain(task, AUXILIARY_WEIGHT), {}
    for (name, method), lr, ratio in itertools.product(methods().items(), RATES, ROUTER_RATES):
        if ratio == 1 or method.n > 1 and not method.labels:
            candidate = replace(method, lr=lr, router_rate=ratio)
            _, result = fine_tune(task, model, candidate, name)
            scores[f"{name}, lr {lr}, router_rate {ratio}"] = result["accuracy"]
    return scores


def tune(device):
    seeds = all_seeds(TUNING_SEEDS, tune_seed, device=device)
    for candidate in seeds[0]:
        scores = [seed[candidate] for seed in seeds]
        print(f"{candidate}: mean {mean(scores):.2f}, worst {min(scores):.1f}")


# ---- --cost ----
SIZES = (2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)  # tokens, width, r, n


def saved_bytes(function, x, inputs):
    """Bytes that autograd saves for backward, inputs excepted."""
    saved = {}  # address -> bytes

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    for t in inputs:
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def cost(device, sizes=SIZES, rounds=7):
    """Time and memory of the layer, one LoRA of rank n r, and a loop over the heads."""
    for tokens, width, r, n in sizes:
        with torch.device(device):
            layer = HydraLoRALinear(nn.Linear(width, width), num_heads=n, r=r)
            A, B = nn.Linear(width, n * r, False), nn.Linear(n * r, width, False)
            x = torch.randn(tokens, width, requires_grad=True)

        def loop(x):  # as in the official code, which computes A x for each head
            y, w = layer.base(x), layer.router(x)
            for i in range(n):
                y = y + layer.scaling * w[:, i, None] * (x @ layer.lora_A.T @ layer.lora_B[i].T)
            return y

        ways = {"HydraLoRA": layer, "LoRA": lambda x: layer.base(x) + B(A(x)), "loop": loop}
        times = {name: [] for name in ways}
        for name, way in [*ways.items()] * rounds:  # in turns
            timer = Timer("way(x).sum().backward()", globals=dict(way=way, x=x))
            times[name].append(1e3 * timer.timeit(3).median)
        inputs = [x, A.weight, B.weight, *layer.parameters()]
        costs = {name: (median(times[name]), saved_bytes(way, x, inputs) / 1e6)
                 for name, way in ways.items()}
        our_ms, our_mb = costs["HydraLoRA"]
        print(f"{tokens} tokens, width {width}, r {r}, n {n} (relative to HydraLoRA):")
        for name, (ms, mb) in costs.items():
            print(f"   {name:10}{ms:8.1f} ms ({ms / our_ms:.2f}) "
                  f"{mb:8.2f} MB saved for backward ({mb / our_mb:.2f})")


# ---- Options ----
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for mode in ("table", "tune", "cost"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--heads", type=int, help="number of heads (default: by k-means)")
    add("--auxiliary-weight", type=float, default=AUXILIARY_WEIGHT,
        help="weight of the auxiliary loss (default: %(default)s)")
    add("--check", action="store_true", help="exit 1 unless heads specialise and LoRA is behind")
    add("--json", metavar="FILE", help="write the results to FILE, also of --table")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, mps ... (default: cuda if any)")
    options = parser.parse_args()

    allowed = ["mode", "device"] + ["json"] * (options.mode == "table")
    for name, value in vars(options).items():
        if options.mode and value != parser.get_default(name) and name not in allowed:
            parser.error(f"--{name.replace('_', '-')} does not apply to --{options.mode}")
    if options.heads is not None and options.heads < 1:
        parser.error("--heads must be 1 or more")
    if not all(0 <= value <= 2**50 for value in (options.seed, options.auxiliary_weight)):
        parser.error("--seed and --auxiliary-weight must be from 0 to 2**50")
    try:
        torch.ones(1, device=options.device).item()
        open(options.json or os.devnull, "a").close()
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    return options


def main():
    options = read_options()
    sys.stdout.reconfigure(line_buffering=True)  # also in a pipe
    torch.set_num_threads(1)  # the same digits on any number of cores
    if options.mode in ("tune", "cost"):
        return {"tune": tune, "cost": cost}[options.mode](options.device)
    if options.mode == "table":
        result = all_seeds(TABLE_SEEDS, experiment, device=options.device, names=[*methods()],
                           heads=DOMAINS)
        print_table(result)
    else:
        print(f"HydraLoRA on {DOMAINS} hidden domains, each with an old and a new cipher: "
              f"seed {options.seed}, {options.device}\n")
        result = experiment(options.seed, options.device, heads=options.heads,
                            auxiliary_weight=options.auxiliary_weight)
        report(result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    if options.check:
        for what, passed in result["checks"].items():
            print(f"check: {what}: {'yes' if passed else 'NO'}")
        return int(not all(result["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
