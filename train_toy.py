# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are the heads and the router worth?

    python train_toy.py             the experiment: a minute on a CPU
    python train_toy.py --table     README's table, twenty seeds: half an hour on two cores
    python train_toy.py --tune      the learning rates, ten seeds: half an hour on two cores
    python train_toy.py --cost      time and memory of the layer: a minute

Sequences come from hidden domains, each with its own substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen. Then adapters learn new
ciphers. The task is designed so that a router helps: each domain uses its own third of the
symbols more often, which tells the domains apart. In pre-training, an auxiliary loss makes
the first block predict the plaintext symbol, so that the last attention has only the
domain left to find. The adapters are on its o_proj, whose input x is what it has found.

Edit the settings for more: README has STEPS = 1600 and PREFERENCE = 1, each with
TABLE_SEEDS = range(900, 903) and --table.
"""
import argparse
import copy
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
    HydraLoRALinear, Router, TinyConfig, TinyTransformer, hook_gates, hydralora_layers,
    inject_hydralora, mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

# ---- Settings ----
DOMAINS = 3
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4  # how much more often a domain uses a symbol of its own third
LENGTH = 32  # plaintext symbols in a sequence, and as many question marks
BATCH = 24
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400  # on the new ciphers, the adapter alone
EVALUATION = 500  # test sequences
AUXILIARY_WEIGHT = 2.0  # in pre-training
MODEL = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_attention_heads=8)
RANK = 9  # r of HydraLoRA on o_proj
ROUTER_RATE = 8  # a router learns this many times as fast as A and B
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "LoRA MoE", "HydraLoRA")
TABLE_SEEDS = range(900, 920)
TUNING_SEEDS = range(10)
RATES = (0.02, 0.08, 0.16)  # of --tune
SIZES = (2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)  # tokens, width, r, n


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

    def best_without_domain(self):
        """The floor: percent right of a table with the likeliest answer to each symbol."""
        answers = F.one_hot(self.new, SYMBOLS) * self.frequencies[..., None]
        return 100 * answers.mean(0).amax(-1).sum().item()  # of (domains, symbols, answers)


# ---- Training, and the frozen model ----
def train(loss_of, groups, data, name):
    """One pass over the data by AdamW, whose weight decay limits the update. groups: dicts of
    params, a list, and lr. Returns the number of trained parameters."""
    size = sum(p.numel() for group in groups for p in group["params"])
    print(f"   {name:28}{size:8,}  ", end="")
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
    return size


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
    train(loss_of, [dict(params=[*model.parameters()], lr=3e-3)], data, "frozen model")
    return model.requires_grad_(False)


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6): sum_i w_i B_i A_i x. The A_i start equal."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.detach().repeat(self.num_heads, 1, 1))  # (n, r, k)

    def forward(self, x):
        w = self.router(x)  # (..., n)
        z = torch.einsum("...k,nrk->...nr", x, self.lora_A)
        delta = torch.einsum("...n,...nr,ndr->...d", w, self.scaling * z, self.lora_B)
        return self.base(x) + delta  # (..., d)


class UnequalExperts(LoRAExperts):
    """LoRA MoE whose A_i start different."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        nn.init.kaiming_uniform_(self.lora_A.detach().flatten(0, 1), a=math.sqrt(5))


class SharedB(UnequalExperts):
    """The reverse of HydraLoRA: B sum_i w_i A_i x. With equal A_i, w would change nothing."""

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


class LabelRouter(Router):
    """The gates are one-hot domain labels, whatever x is; n is DOMAINS."""
    domain = None  # (b,), set by predict

    def forward(self, x):
        w = F.one_hot(self.domain, DOMAINS).to(x)[:, None]  # (b, 1, n)
        return w.expand(-1, x.shape[1], -1)  # (b, t, n)


class UniformRouter(Router):
    """All gates are 1/n."""

    def forward(self, x):
        n, _ = self.weight.shape
        return x.new_full((*x.shape[:-1], n), 1 / n)  # (..., n)


@dataclass
class Method:
    """What is trained, and where."""
    n: int = 1  # heads; a single head is a LoRA
    r: int = RANK
    layer: type = HydraLoRALinear
    router: type = Router
    target: str = "layers.1.o_proj"
    lr: float = 0.08  # another if --tune gains over half a point
    partner: str = "HydraLoRA"  # compared with it in --table


def methods(n=DOMAINS):
    """Name -> Method, for n heads. Ranks make sizes about equal: HydraLoRA has
    r k + n r d + n k parameters, a LoRA r k + r d; k is d in o_proj, 4 d in down_proj."""
    lora_rank = math.ceil((RANK + n * RANK + n) / 2)
    experts_rank = round(RANK * (1 + n) / (2 * n))
    down_proj = dict(target="layers.1.down_proj", partner="HydraLoRA on down_proj")
    return {
        "LoRA": Method(r=lora_rank),
        "LoRA with a ReLU": Method(r=lora_rank, layer=ReLULoRA),
        "HydraLoRA without router": Method(n, router=UniformRouter),  # Fig. 6, w/o gate
        "LoRA MoE": Method(n, experts_rank, LoRAExperts, lr=0.16),
        "LoRA MoE, same rank": Method(n, layer=LoRAExperts),
        "one A per head, shared B": Method(n, layer=SharedB),
        "LoRA-Split": Method(DOMAINS, experts_rank, LoRAExperts, LabelRouter, lr=0.16),
        "HydraLoRA with true labels": Method(DOMAINS, router=LabelRouter),
        "HydraLoRA": Method(n, lr=0.16),
        "LoRA on down_proj": Method(r=math.ceil((16 + 4 * n + 4 * n) / 5), **down_proj),
        "HydraLoRA on down_proj": Method(n, r=4, **down_proj)}


def adapt(model, method, seed):
    """A copy of the model with an adapter. If r is equal, methods start from the same A, and if
    n is equal, from the same router."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    inject_hydralora(model, [method.target], method.layer, num_heads=method.n, r=method.r,
                     lora_alpha=2 * method.r)
    [layer] = hydralora_layers(model).values()
    torch.manual_seed(seed + 1_000_000)  # not A's numbers once more
    layer.router = method.router(layer.in_features, method.n).to(layer.lora_A)
    layer.router.requires_grad_(method.router is Router and method.n > 1)
    return model


def predict(model, data):
    """Logits at the question marks: (count, LENGTH, vocab_size)."""
    LabelRouter.domain = data.domain
    return model(data.tokens)[:, LENGTH:]


@torch.no_grad()
def accuracy(model, data):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data).argmax(-1) == data.targets).float().mean(1)


def fine_tune(task, model, method, name):
    """Train a copy of the model; returns it, and its size and accuracy."""
    model = adapt(model, method, task.seed)
    groups = [dict(params=[p], lr=method.lr * (ROUTER_RATE if "router" in key else 1))
              for key, p in model.named_parameters() if p.requires_grad]
    size = train(lambda batch: F.cross_entropy(predict(model, batch).mT, batch.targets),
                 groups, task.training, name)
    reached = accuracy(model, task.test).mean().item()
    print(f"{reached:14.1f}")
    return model, dict(size=size, accuracy=reached)


# ---- A look inside ----
def group_means(values, group, groups):
    """values (m, ...), group (m,) -> the mean of each group: (groups, ...)."""
    members = F.one_hot(group, groups).to(values)  # (m, groups)
    return torch.einsum("mg,m...->g...", members / members.sum(0), values)


@torch.no_grad()
def variance_shares(model, data):
    """Two-way ANOVA of the mean input x of the last o_proj for each domain and symbol."""
    seen, o_proj = [], model.layers[-1].o_proj
    with o_proj.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs)):
        predict(model, data)
    x = seen[0][:, LENGTH:]  # (count, LENGTH, width)
    pair = data.domain[:, None] * SYMBOLS + data.tokens[:, :LENGTH]  # (count, LENGTH)
    means = group_means(x.flatten(0, 1), pair.flatten(), DOMAINS * SYMBOLS)
    means = means.unflatten(0, (DOMAINS, SYMBOLS)) - means.mean(0)  # (domains, symbols, width)
    parts = dict(domain=means.mean(1, keepdim=True), symbol=means.mean(0, keepdim=True))
    parts["interaction"] = means - parts["domain"] - parts["symbol"]
    return {name: (part.square().mean() / means.square().mean()).item()
            for name, part in parts.items()}


@torch.no_grad()
def gates_of(model, data):
    """w at the question marks: (count, LENGTH, n)."""
    with record_gates(model) as gates:
        predict(model, data)
    [w] = gates.values()
    return w[:, LENGTH:]


def nmi(w, domain):
    """Normalised mutual information, 2 I(domain; head) / (H(domain) + H(head)), where each
    token draws its head from its gates w (count, LENGTH, n)."""
    joint = F.one_hot(domain, DOMAINS).to(w).T @ w.mean(1) / len(w)  # (domains, n)
    of_domain, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * (of_domain + of_head - of_both) / (of_domain + of_head)


def ablate_heads(model, data, n):
    """Points of accuracy that each domain loses when a head's gate is 0: (domains, n)."""
    results = []
    for kept in torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).to(data.tokens.device):
        with hook_gates(model, lambda name, w: w * kept):
            results.append(group_means(accuracy(model, data), data.domain, DOMAINS))
    return results[0][:, None] - torch.stack(results[1:], dim=1)


def examples(model, data, w):
    """A sequence of each domain: plaintext, answer (*: an error), head of the largest gate."""
    answers, letters, shown = predict(model, data).argmax(-1), "abcdefghijklmno", []
    for i in range(DOMAINS):
        row = data.domain.tolist().index(i)
        plain, answer, right, head = (t[row].tolist() for t in (
            data.tokens[:, :LENGTH], answers, data.targets, w.argmax(-1)))
        shown.append(dict(
            plaintext="".join(" " + letters[a] for a in plain),
            answer="".join((" " if a == b else "*") + letters[a] for a, b in zip(answer, right)),
            head="".join(f"{a:2}" for a in head)))
    return shown


def look_at_heads(task, model, n):
    """Print and return what the heads do."""
    print("   A sequence of each domain, the answer (*: an error), the head of the largest gate:\n")
    w = gates_of(model, task.test)  # (count, LENGTH, n)
    shown = examples(model, task.test[:100], w)
    for i, example in enumerate(shown):
        print(f"   domain {i} {example['plaintext']}\n   answer   {example['answer']}\n"
              f"   head     {example['head']}\n")
    print("   Mean gate of each head, and accuracy (in points) lost without that head:\n\n"
          "            |", "      | ".join(f"head {i}" for i in range(n)))
    gates = group_means(w.mean(1), task.test.domain, DOMAINS).tolist()  # (domains, n)
    lost = ablate_heads(model, task.test, n).tolist()  # (domains, n)
    for i in range(DOMAINS):
        points = [round(value, 1) + 0.0 for value in lost[i]]  # 0.0 for -0.0
        print(f"   domain {i}", *map("{:.2f} {:6.1f}".format, gates[i], points), sep=" | ")
    score = nmi(w, task.test.domain)
    print(f"\n   Normalised mutual information (NMI) of head and domain: {score:.2f}\n"
          "   (0: the gates say nothing about the domain, 1: each domain has its own head)")
    return dict(examples=shown, gates=gates, lost=lost, nmi=score)


# ---- Merging ----
def merge(task, model):
    """Accuracy when merged with the mean gates of each domain, and of all domains."""
    def merged_accuracy(calibration, test):
        gates = mean_gates(model, [calibration.tokens])
        return accuracy(merge_hydralora(copy.deepcopy(model), gates), test)

    sample, test = task.training[:1000], task.test
    by_domain = [merged_accuracy(sample[sample.domain == i], test[test.domain == i])
                 for i in range(DOMAINS)]
    return dict(true_domain=torch.cat(by_domain).mean().item(),
                all_domains=merged_accuracy(sample, test).mean().item())


# ---- The run ----
def experiment(seed, device, heads=None, auxiliary_weight=AUXILIARY_WEIGHT, table=False):
    """Everything on one seed, printed and returned; with table, all methods."""
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {seed}, {device}")
    task = Task(seed, device)

    print("\n1. How many heads?\n")
    found, sse = num_heads_from_corpus(task.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    print(f"   k-means finds {found}; using {n}. SSE of 1, 2, ... centres:")
    print("  ", *map(round, sse))

    print("\n2. Training: all weights on the old ciphers, then an adapter on the new ones\n\n",
          " " * 26, "parameters   loss after 0, 100 ... steps  accuracy (%)")
    model, trained, scores = pretrain(task, auxiliary_weight), {}, {}
    frozen, floor = accuracy(model, task.test).mean().item(), task.best_without_domain()
    print(f"{frozen:14.1f}\n   {'best answers without domain':74}{floor:.1f}")
    for name, method in methods(n).items():
        if table or name in MAIN_RUN:
            trained[name], scores[name] = fine_tune(task, model, method, name)
    shares = variance_shares(model, task.test)
    print("""
   x is the adapters' input. Of the variance of its mean for each domain and symbol,
   {:.0%} is due to the domain, {:.0%} to the symbol, {:.0%} to the pair. As far as x is a
   domain part plus a symbol part, B A x is such a sum too, and only the frozen MLP behind
   it can pair them, as a cipher must. A ReLU after A, or gates made from x, can do so in
   the update.""".format(*shares.values()))

    print("\n3. Do the heads B_i specialise by domain?\n")
    result = dict(
        seed=seed, device=device, auxiliary_weight=auxiliary_weight, heads_found=found, sse=sse,
        num_heads=n, frozen=frozen, without_domain=floor, methods=scores, input_variance=shares)
    result |= look_at_heads(task, trained["HydraLoRA"], n)

    print(f"\n4. Merging: one w for all tokens makes the heads one LoRA of rank {RANK}\n")
    result["merged"] = merge(task, trained["HydraLoRA"])
    conclude(result)
    if table:
        result["overlap"] = observation_2(task, model)
    return result


def conclude(result):
    """Print section 4, and the checks."""
    ours, lora = (result["methods"][name]["accuracy"] for name in ("HydraLoRA", "LoRA"))
    print("   HydraLoRA, not merged   {:6.1f}%\n"
          "   merged for each domain  {true_domain:6.1f}%, with its mean w\n"
          "   merged for all domains  {all_domains:6.1f}%: the mean w averages the heads\n"
          "   LoRA                    {:6.1f}%\n".format(ours, lora, **result["merged"]))
    result["checks"] = {"HydraLoRA is ahead of LoRA": ours > lora}
    if result["num_heads"] >= DOMAINS:  # with fewer heads, NMI cannot reach 0.9
        result["checks"]["heads specialise by domain"] = result["nmi"] >= 0.9
    for what, passed in result["checks"].items():
        print(f"{what}: {'yes' if passed else 'NO'}")


# ---- Observation II ----
@torch.no_grad()
def subspace_overlap(matrices):
    """Mean squared cosine between the column spaces of pairs of (width, r) matrices."""
    pairs = itertools.combinations(torch.linalg.qr(matrices.cpu()).Q, 2)
    return mean((a.T @ b).square().sum().item() / a.shape[1] for a, b in pairs)


def observation_2(task, model):
    """Overlap of LoRA-Split's A_i and of its B_i, from equal and from different A_i. At the low
    learning rate, the start still shows. Chance is r / width."""
    split, overlap = methods()["LoRA-Split"], {}
    for start, layer in dict(equal=LoRAExperts, different=UnequalExperts).items():
        for lr in (0.08, 0.001):
            tuned, _ = fine_tune(task, model, replace(split, layer=layer, lr=lr), "LoRA-Split")
            experts = tuned.layers[-1].o_proj
            overlap[f"A from {start} A_i, lr {lr}"] = subspace_overlap(experts.lora_A.mT)
            overlap[f"B from {start} A_i, lr {lr}"] = subspace_overlap(experts.lora_B)
    return overlap


# ---- --table and --tune: several seeds ----
def start_worker():
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")


def all_seeds(seeds, function, **arguments):
    """function(seed, **arguments) for each seed, in a process a core."""
    results, spawn = [], multiprocessing.get_context("spawn")
    with spawn.Pool(min(os.cpu_count(), len(seeds)), start_worker) as pool:
        for run in [pool.apply_async(function, [seed], arguments) for seed in seeds]:
            results.append(run.get())
            print(f"{len(results)} of {len(seeds)} seeds", file=sys.stderr)
    return results


def lead(ours, theirs):
    """Two cells of the table: mean and standard deviation of the differences, and seeds won."""
    points = [a - b for a, b in zip(ours, theirs)]
    won = sum(point > 0 for point in points)
    return f"{mean(points):+.1f} +- {stdev(points):.1f} | {won}/{len(points)}"


def table(device):
    """README's table and numbers."""
    seeds = all_seeds(TABLE_SEEDS, experiment, device=device, heads=DOMAINS, table=True)
    reached = {name: [seed["methods"][name]["accuracy"] for seed in seeds] for name in methods()}
    print("| method | parameters | accuracy (%) | HydraLoRA's lead (points) +- std | seeds won |\n"
          "|---|---|---|---|---|")
    for name, method in methods().items():
        compared = lead(reached[method.partner], reached[name]) if method.partner != name else "|"
        size = seeds[0]["methods"][name]["size"]
        print(f"| {name} | {size:,} | {mean(reached[name]):.1f} | {compared} |")

    rows = {key: [seed[key] for seed in seeds] for key in ("without_domain", "nmi")}
    for what in ("input_variance", "merged", "overlap", "checks"):
        for key in seeds[0][what]:
            rows[f"{what}, {key}"] = [seed[what][key] for seed in seeds]
    print("\nLoRA-Split's lead over LoRA:", lead(reached["LoRA-Split"], reached["LoRA"]))
    print("LoRA's lead over the best answers without domain:",
          lead(reached["LoRA"], rows["without_domain"]))
    for what, values in rows.items():
        print(f"{what}: mean {mean(values):.2f}, from {min(values):.2f} to {max(values):.2f}")
    return seeds


def tune_seed(seed, device):
    """The accuracy of each method at each learning rate."""
    task = Task(seed, device)
    model, scores = pretrain(task, AUXILIARY_WEIGHT), {}
    for (name, method), lr in itertools.product(methods().items(), RATES):
        _, result = fine_tune(task, model, replace(method, lr=lr), name)
        scores[f"{name}, lr {lr}"] = result["accuracy"]
    return scores


def tune(device):
    seeds = all_seeds(TUNING_SEEDS, tune_seed, device=device)
    for candidate in seeds[0]:
        scores = [seed[candidate] for seed in seeds]
        print(f"{candidate}: mean {mean(scores):.2f}, worst {min(scores):.1f}")
    return seeds


# ---- --cost ----
def saved_bytes(function, x, inputs):
    """Bytes that autograd keeps for the backward, without the inputs."""
    saved = {}  # address -> bytes

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(saved.values()) - sum(saved.get(t.data_ptr(), 0) for t in inputs)


def cost(device, sizes=SIZES, rounds=7):
    """Time and memory of the layer, of one LoRA of rank n r, and of a loop over the heads."""
    costs = []
    for tokens, width, r, n in sizes:
        with torch.device(device):
            layer = HydraLoRALinear(nn.Linear(width, width), num_heads=n, r=r)
            A, B = nn.Linear(width, n * r, False), nn.Linear(n * r, width, False)
            x = torch.randn(tokens, width, requires_grad=True)

        def loop(x):  # as in the official code, with A x for each head
            y, w = layer.base(x), layer.router(x)
            for i in range(n):
                y = y + layer.scaling * w[:, i, None] * (x @ layer.lora_A.T @ layer.lora_B[i].T)
            return y

        ways = {"HydraLoRA": layer, "LoRA": lambda x: layer.base(x) + B(A(x)), "loop": loop}
        times = {name: [] for name in ways}
        for name, way in [*ways.items()] * rounds:  # in turns
            timer = Timer("way(x).sum().backward()", globals=dict(way=way, x=x))
            times[name].append(1e3 * timer.timeit(3).median)
        print(f"{tokens} tokens, width {width}, r {r}, n {n}")
        for name, way in ways.items():
            mb = saved_bytes(way, x, [x, A.weight, B.weight, *layer.parameters()]) / 1e6
            costs.append(dict(layer=name, ms=median(times[name]), mb=mb))
            print("   {layer:10}{ms:7.1f} ms {mb:7.2f} MB saved for backward".format(**costs[-1]))
    return costs


# ---- Options ----
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for mode in (table, tune, cost):
        modes.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode)
    add("--seed", type=int, default=0)
    add("--heads", type=int, help="number of heads (default: by k-means)")
    add("--auxiliary-weight", type=float, default=AUXILIARY_WEIGHT)
    add("--check", action="store_true", help="exit with 1 if a check at the end fails")
    add("--json", metavar="FILE", help="write the results to FILE")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if there is one")
    options = parser.parse_args()
    others = options.seed, options.heads, options.auxiliary_weight, options.check
    if options.mode and others != (0, None, AUXILIARY_WEIGHT, False):
        parser.error("--table, --tune and --cost only take --device and --json")
    if not 0 <= options.seed <= 2**50 or options.heads is not None and options.heads < 1:
        parser.error("--seed must be from 0 to 2**50, and --heads 1 or more")
    try:
        torch.ones(1, device=options.device).item()
        open(options.json or os.devnull, "a").close()
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).splitlines()[0])
    return options


def main():
    options = read_options()
    torch.set_num_threads(1)  # the same digits on any number of cores
    if options.mode:
        result = options.mode(options.device)
    else:
        result = experiment(options.seed, options.device, options.heads, options.auxiliary_weight)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    return int(options.check and not all(result["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
