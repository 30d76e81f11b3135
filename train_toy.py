# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are the router and the shared A worth?

    python train_toy.py             the experiment: under a minute on a CPU
    python train_toy.py --table     README's table, twenty seeds: 15 minutes on two cores
    python train_toy.py --tune      the learning rates: 40 minutes
    python train_toy.py --cost      time and memory of the layer

Sequences come from hidden domains, each with its own substitution cipher:

    input:   d b d d a d ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   k f k k c k ...    the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen; then adapters learn new ones.
The task is designed so that the heads specialise by domain: a router follows whatever
dominates its input. Each domain prefers its own third of the symbols, and an auxiliary
loss makes the first block predict the plaintext symbol, so that the domain dominates the
input of the last o_proj, where the adapters are. With --copy-weight 0 it depends on the
seed: on 304 the heads specialise by symbol.
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
import time
from dataclasses import dataclass, replace
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers,
    inject_hydralora, mean_gates, merge_hydralora, num_heads_from_corpus, record_gates)

DOMAINS = 3
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4  # how much more often a domain uses a symbol of its own third
LENGTH = 32  # plaintext symbols in a sequence, and question marks
BATCH = 24
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400  # on the new ciphers, the adapter alone
EVALUATION = 1000  # test sequences
COPY_WEIGHT = 2.0  # of the auxiliary loss
RANK = 9  # r of HydraLoRA: one head can hold the cipher of a domain
MODEL = TinyConfig(SYMBOLS + 1, max_position_embeddings=2 * LENGTH, num_attention_heads=8)


# ---- The data ----
@dataclass
class Data:
    tokens: torch.Tensor   # (count, 2 LENGTH): plaintext, question marks
    targets: torch.Tensor  # (count, LENGTH): ciphertext
    domain: torch.Tensor   # (count,)

    def __getitem__(self, index):
        return Data(self.tokens[index], self.targets[index], self.domain[index])


class Task:
    """The old and new ciphers of one seed, and sequences sampled from them."""

    def __init__(self, seed, device):
        self.seed, self.device = seed, device
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)
        generator = torch.Generator().manual_seed(seed)
        ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
        self.old, self.new = torch.stack(ciphers).split(DOMAINS)  # (domains, symbols) each
        self.training = self.sample(STEPS * BATCH, self.new, stream=1)
        self.test = self.sample(EVALUATION, self.new, stream=2)

    def sample(self, count, ciphers, stream):
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        domain = torch.randint(DOMAINS, (count,), generator=generator)
        plain = self.frequencies[domain].multinomial(LENGTH, True, generator=generator)
        data = F.pad(plain, (0, LENGTH), value=SYMBOLS), ciphers[domain[:, None], plain], domain
        return Data(*(t.to(self.device) for t in data))

    def bayes_accuracy(self):
        """Bayes-optimal accuracy, without labels, in percent."""
        plain = self.test.tokens[:, :LENGTH].cpu()
        posterior = self.frequencies.log()[:, plain].sum(2).softmax(0)  # (domains, count)
        answers = F.one_hot(self.new[:, plain], SYMBOLS).float()
        votes = torch.einsum("dc,dcls->cls", posterior, answers)  # (count, LENGTH, symbols)
        return 100 * (votes.argmax(-1) == self.test.targets.cpu()).float().mean().item()


# ---- Training, and the frozen model ----
def train(loss_of, parameters, lr, data, name, tell):
    """Adam, with a one-cycle schedule of rate and beta1; one pass over the data."""
    steps = len(data.tokens) // BATCH
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))  # the schedule sets beta1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        loss = loss_of(data[step * BATCH:(step + 1) * BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            tell(f"   {name}, step {step}: loss {loss.item():.2f}")


def pretrain(task, copy_weight, tell):
    """A transformer that knows the old ciphers, frozen."""
    torch.manual_seed(task.seed)
    model = TinyTransformer(MODEL).to(task.device)
    first, last = model.layers

    def loss_of(batch):
        h = first(model.embed(batch.tokens))  # (b, 2 LENGTH, width)
        early, late = (model.lm_head(model.norm(y[:, LENGTH:])) for y in (h, last(h)))
        auxiliary = F.cross_entropy(early.mT, batch.tokens[:, :LENGTH])
        return F.cross_entropy(late.mT, batch.targets) + copy_weight * auxiliary

    data = task.sample(PRETRAIN_STEPS * BATCH, task.old, stream=0)
    train(loss_of, model.parameters(), 3e-3, data, "pre-training", tell)
    return model.requires_grad_(False)


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6), sum_i w_i B_i A_i x. All A_i start equal."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.detach().repeat(self.num_heads, 1, 1))  # (n, r, k)

    def forward(self, x):
        y = self.base(x)  # (..., d)
        x = x.to(self.lora_A.dtype)
        z = torch.einsum("...k,nrk->...nr", self.lora_dropout(x), self.lora_A)
        wz = self.router(x).unsqueeze(-1) * z * self.scaling  # (..., n, r)
        return y + torch.einsum("...nr,ndr->...d", wz, self.lora_B).to(y.dtype)


class LabelRouter(nn.Module):
    """In the router's place, for LoRA-Split: domain labels choose the head."""
    labels = None  # (b,), set by predict

    def forward(self, x):
        w = F.one_hot(self.labels, DOMAINS).to(x)[:, None]  # (b, 1, n)
        return w.expand(-1, x.shape[1], -1)  # (b, t, n)


@dataclass
class Method:
    """What is trained, and on which layers."""
    lr: float  # the best of --tune; at --copy-weight 0, within a point (main run)
    n: int = 1  # heads; a single head is a LoRA
    r: int = RANK
    layer: type = HydraLoRALinear  # None: full fine-tuning
    targets: tuple = ("layers.1.o_proj",)
    labels: bool = False  # domain labels choose the head


def methods(n=DOMAINS):
    """Name -> Method. Ranks make sizes about equal: where k = c d, HydraLoRA has
    (c r + n r + c n) d parameters, a LoRA (c + 1) r d."""
    def lora_rank(r, c=1):
        return math.ceil((c * r + n * r + c * n) / (c + 1))

    def experts_rank(n):
        return round(RANK * (1 + n) / (2 * n))

    mlp, q_v = ("layers.1.down_proj",), ("layers.1.q_proj", "layers.1.v_proj")
    return {
        "LoRA": Method(1.28, r=lora_rank(RANK)),
        "full fine-tuning of o_proj": Method(0.32, layer=None),
        "LoRA MoE": Method(0.32, n, experts_rank(n), LoRAExperts),
        "LoRA MoE, same rank": Method(5.12, n, layer=LoRAExperts),
        "LoRA-Split": Method(
            1.28, DOMAINS, experts_rank(DOMAINS), LoRAExperts, labels=True),
        "LoRA on down_proj": Method(0.32, r=lora_rank(4, 4), targets=mlp),
        "LoRA on q_proj, v_proj": Method(0.02, r=lora_rank(4), targets=q_v),
        "HydraLoRA on down_proj": Method(0.08, n, 4, targets=mlp),
        "HydraLoRA on q_proj, v_proj": Method(0.02, n, 4, targets=q_v),
        "HydraLoRA": Method(1.28, n)}


def adapt(model, method, seed):
    """A copy of the model with the method's adapters. At one seed, all A of one rank start
    equal, and all routers of one n."""
    model = copy.deepcopy(model)
    if method.layer is None:
        model.layers[-1].o_proj.requires_grad_(True)
        return model
    torch.manual_seed(seed)
    inject_hydralora(model, method.targets, method.layer, num_heads=method.n, r=method.r,
                     lora_alpha=2 * method.r)
    torch.manual_seed(seed + 1_000_000)  # else a router may start as the first rows of A
    for layer in hydralora_layers(model).values():
        layer.router.reset_parameters()
        layer.router.requires_grad_(method.n > 1)  # the gate of a single head is 1
        if method.labels:
            layer.router = LabelRouter()
    return model


def predict(model, data):
    """Logits at the question marks: (count, LENGTH, vocab_size)."""
    LabelRouter.labels = data.domain
    return model(data.tokens)[:, LENGTH:]


@torch.no_grad()
def accuracy(model, data):
    """Percent of correct symbols in each sequence: (count,)."""
    return 100 * (predict(model, data).argmax(-1) == data.targets).float().mean(1)


def group_means(values, group, groups):
    """values (m, ...), group (m,) -> the mean of each group: (groups, ...)."""
    members = F.one_hot(group, groups).to(values)  # (m, groups)
    return torch.einsum("mg,m...->g...", members / members.sum(0), values)


def fine_tune(task, model, method, name, tell):
    """Train a copy of the model by one method; returns the copy and its results."""
    model = adapt(model, method, task.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    train(lambda batch: F.cross_entropy(predict(model, batch).mT, batch.targets),
          trained, method.lr, task.training, name, tell)
    correct = accuracy(model, task.test)
    return model, dict(size=sum(p.numel() for p in trained),
                       accuracy=correct.mean().item(),
                       by_domain=group_means(correct, task.test.domain, DOMAINS).tolist())


# ---- A look at the heads of any adapted model ----
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
def variance_shares(model, data):
    """Two-way ANOVA of the mean input of the last o_proj for each (domain, symbol) pair: the
    share of the variance that each explains."""
    inputs = []
    with model.layers[-1].o_proj.register_forward_pre_hook(lambda _, x: inputs.extend(x)):
        model(data.tokens)
    x = inputs[0][:, LENGTH:].flatten(0, 1)  # (count LENGTH, width)
    pair = data.domain[:, None] * SYMBOLS + data.tokens[:, :LENGTH]  # (count, LENGTH)
    means = group_means(x, pair.flatten(), DOMAINS * SYMBOLS).unflatten(0, (DOMAINS, SYMBOLS))
    means = means - means.mean((0, 1))  # (domains, symbols, width)
    parts = dict(domain=means.mean(1, keepdim=True), symbol=means.mean(0, keepdim=True))
    parts["interaction"] = means - parts["domain"] - parts["symbol"]
    return {name: (part.expand_as(means).norm() / means.norm()).square().item()
            for name, part in parts.items()}


def ablate_heads(model, data, n):
    """Points of accuracy that each domain loses when a head's gate is 0: (domains, n)."""
    results = []
    for kept in torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).to(data.tokens.device):
        with hook_gates(model, lambda name, w: w * kept):
            results.append(group_means(accuracy(model, data), data.domain, DOMAINS))
    return results[0][:, None] - torch.stack(results[1:], dim=1)


def merged_accuracy(model, calibration, test):
    """Accuracy in each test sequence, merged with the mean gates of training data."""
    gates = mean_gates(model, [calibration.tokens])
    return accuracy(merge_hydralora(copy.deepcopy(model), gates), test)


@torch.no_grad()
def subspace_overlap(matrices):
    """Mean squared cosine between the column spaces of pairs of (width, r) matrices."""
    Q = torch.linalg.qr(matrices.cpu()).Q
    pairs = itertools.combinations(Q, 2)
    return mean((a.T @ b).square().sum().item() / a.shape[1] for a, b in pairs)


# ---- The experiment ----
MAIN_RUN = ("LoRA", "LoRA MoE", "LoRA on down_proj", "HydraLoRA")


def experiment(seed, device, names=MAIN_RUN, heads=None, copy_weight=COPY_WEIGHT, tell=print):
    """Tells what it finds, and returns it as a dict."""
    tell(f"HydraLoRA on {DOMAINS} hidden domains: seed {seed}, {device}\n"
         "   Each domain has its own substitution cipher; domain labels are never given.\n"
         "   A transformer learns old ciphers and is frozen; then adapters learn new ones.\n")
    task = Task(seed, device)
    test, domain = task.test, task.test.domain
    model = pretrain(task, copy_weight, tell)

    found, sse = num_heads_from_corpus(task.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    tell(f"\n1. How many heads? k-means on 600 sequences suggests n = {found}; using n = {n}\n"
         "   SSE of 1, 2, ... centres:", *map(round, sse))

    tell("\n2. Adapters on the last o_proj, unless named. LoRA MoE has one A per head.\n")
    models, results = {}, {}
    for name in names:
        models[name], results[name] = fine_tune(task, model, methods(n)[name], name, tell)
    bayes = task.bayes_accuracy()
    tell("\n   Test accuracy on the new ciphers, in percent:\n")
    for name, result in results.items():
        tell("   {:28}{size:6,} parameters {accuracy:6.1f}".format(name, **result))
    tell(f"   {'Bayes-optimal, without labels':46}{bayes:6.1f}")

    hydra, shares = models["HydraLoRA"], variance_shares(model, test)
    w, plain = gates_of(hydra, test), test.tokens[:, :LENGTH]  # (count, LENGTH, n)
    by_symbol = group_means(w.flatten(0, 1), plain.flatten(), SYMBOLS)[plain]
    gates = group_means(w.mean(1), domain, DOMAINS)  # (domains, n)
    lost = ablate_heads(hydra, test, n)
    scores = dict(router=nmi(w, domain), symbols=nmi(by_symbol, domain))
    tell("\n3. Do the heads B_i specialise by domain? Variance of o_proj's mean input:\n  ",
         ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares.items()))
    tell("\n   One sequence per domain, and the head with the largest gate at each symbol:\n")
    for t in range(DOMAINS):
        row = domain.tolist().index(t)
        tell(f"   domain {t}  ", *(chr(ord("a") + symbol) for symbol in plain[row]))
        tell("   head      ", *w[row].argmax(-1).tolist())
    tell("\n   Mean gate of each head, and accuracy lost (in points) without it:\n")
    tell("            |", "      | ".join(f"head {i}" for i in range(n)))
    for t in range(DOMAINS):
        points = [round(value, 1) + 0.0 for value in lost[t].tolist()]  # 0.0 for -0.0
        tell(f"   domain {t}", *map("{:.2f} {:6.1f}".format, gates[t], points), sep=" | ")
    tell("\n   NMI of head and domain (0: independent, 1: one head per domain): "
         f"{scores['router']:.2f};\n   from the symbol alone: {scores['symbols']:.2f}")

    sample = task.training[:1000]
    known = [merged_accuracy(hydra, sample[sample.domain == t], test[domain == t])
             for t in range(DOMAINS)]
    merged = dict(known=torch.cat(known).mean().item(),
                  all=merged_accuracy(hydra, sample, test).mean().item())
    tell("\n4. Accuracy merged, with the mean gates of the true domain: "
         f"{merged['known']:.1f}; of all domains: {merged['all']:.1f}\n")

    specialised = scores["router"] >= 0.5 and scores["symbols"] <= scores["router"] - 0.2
    symbol_share = (by_symbol.var((0, 1)).sum() / w.var((0, 1)).sum()).nan_to_num()
    tell("The heads specialise by domain." if specialised else
         "The heads do not specialise by domain: the symbol explains "
         f"{100 * symbol_share:.0f} % of the gates' variance.")
    ours = results["HydraLoRA"]["accuracy"]
    for name in names:
        if name != "HydraLoRA":
            points = ours - results[name]["accuracy"]
            place = "ahead of" if points > 0 else "behind"
            tell(f"HydraLoRA is {abs(points):.1f} points {place} {name}.")
    gain = ours - results["LoRA"]["accuracy"]
    checks = {"heads specialise by domain": specialised, "HydraLoRA is ahead of LoRA": gain > 0}
    overlap = {}
    if "LoRA-Split" in models:
        split = models["LoRA-Split"].layers[-1].o_proj
        overlap = dict(A=subspace_overlap(split.lora_A.mT), B=subspace_overlap(split.lora_B),
                       chance=split.r / split.in_features)
    return dict(
        seed=seed, copy_weight=copy_weight, device=device, heads_found=found, num_heads=n,
        sse=sse, bayes=bayes, input_variance=shares, methods=results, nmi=scores,
        gates=gates.tolist(), lost=lost.tolist(), merged=merged, overlap=overlap, gain=gain,
        checks=checks, passed=all(checks.values()))


# ---- --table and --tune: all methods on several seeds ----
TABLE_SEEDS = range(50, 70)  # not used for tuning
TUNING_SEEDS = range(10)
RATES = (0.005, 0.02, 0.08, 0.32, 1.28, 5.12, 20.48)


def silent(*_, **__):
    pass


def all_seeds(seeds, function, **arguments):
    """function(seed, **arguments) of each seed, in as many processes as cores."""
    results, spawn = [], multiprocessing.get_context("spawn")
    with spawn.Pool(min(os.cpu_count(), len(seeds)), torch.set_num_threads, (1,)) as pool:
        for result in pool.imap(functools.partial(function, **arguments), seeds):
            results.append(result)
            print(f"{len(results)} of {len(seeds)} seeds", file=sys.stderr)
    return results


def table(device):
    """Prints README's table, returns the results of each seed."""
    seeds = all_seeds(TABLE_SEEDS, experiment, device=device, names=[*methods()],
                      heads=DOMAINS, tell=silent)
    print("| baseline | parameters, its:ours | accuracy, its:ours | HydraLoRA gains +- std | "
          "seeds won |\n|---|---|---|---|---|")
    hydra = {method.targets: name for name, method in methods().items()
             if name.split(" on ")[0] == "HydraLoRA"}
    for name, method in methods().items():
        if name not in hydra.values():
            pair = name, hydra.get(method.targets, "HydraLoRA")
            size = [seeds[0]["methods"][key]["size"] for key in pair]
            scores = [[seed["methods"][key]["accuracy"] for seed in seeds] for key in pair]
            gains = [ours - its for its, ours in zip(*scores)]  # on the same seed
            print("| {} | {:,}:{:,} | {:.1f}:{:.1f} | {:+.1f} +- {:.1f} | {}/{} |".format(
                name, *size, *map(mean, scores), mean(gains), stdev(gains),
                sum(gain > 0 for gain in gains), len(gains)))
    print()
    for what in ("nmi", "input_variance", "merged", "overlap"):
        for key in seeds[0][what]:
            values = [seed[what][key] for seed in seeds]
            print(f"- {what}, {key}: {mean(values):.2f} +- {stdev(values):.2f}, "
                  f"from {min(values):.2f} to {max(values):.2f}")
    specialised = sum(seed["checks"]["heads specialise by domain"] for seed in seeds)
    more = sum(seed["overlap"]["A"] > seed["overlap"]["B"] for seed in seeds)
    print(f"- The heads specialise by domain on {specialised} of {len(seeds)} seeds.\n"
          f"- LoRA-Split's A_i overlap more than its B_i on {more} of {len(seeds)} seeds.")
    return seeds


def tune_seed(seed, device, names, copy_weight):
    """The accuracy of each method at each learning rate."""
    task = Task(seed, device)
    model = pretrain(task, copy_weight, silent)
    return [[fine_tune(task, model, replace(methods()[name], lr=lr), name, silent)[1]["accuracy"]
             for lr in RATES] for name in names]


def tune(device, method, copy_weight):
    names = [method] if method else [*methods()]
    seeds = all_seeds(TUNING_SEEDS, tune_seed, device=device, names=names, copy_weight=copy_weight)
    for name, of_seeds in zip(names, zip(*seeds)):
        for lr, scores in zip(RATES, zip(*of_seeds)):
            print(f"{name:28} learning rate {lr}: mean {mean(scores):.2f}, "
                  f"worst {min(scores):.1f}")


# ---- --cost ----
def saved_bytes(function, x, inputs):
    """Bytes that autograd saves for backward, without those of the inputs."""
    saved = {}  # address -> bytes

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    for t in inputs:
        saved.pop(t.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def cost(device, sizes=((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)), rounds=15):
    """Time and memory of the layer, relative to two other ways."""
    print("Time of forward + backward, and bytes saved for backward: the layer relative to\n"
          "one LoRA of rank n r, and to a loop over the heads")
    for tokens, width, r, n in sizes:
        with torch.device(device):
            layer = HydraLoRALinear(nn.Linear(width, width), num_heads=n, r=r)
            A, B = nn.Linear(width, n * r, False), nn.Linear(n * r, width, False)
            x = torch.randn(tokens, width, requires_grad=True)

        def loop(x):  # as in the official code, which computes A x for each head
            y, w = layer.base(x), layer.router(x)
            for i in range(n):
                z = F.linear(x, layer.lora_A)  # (tokens, r)
                y = y + w[..., i, None] * F.linear(z, layer.lora_B[i]) * layer.scaling
            return y

        ways = layer, lambda x: layer.base(x) + B(A(x)), loop
        inputs, seconds = [x, A.weight, B.weight, *layer.parameters()], ([], [], [])
        trained = [t for t in inputs if t.requires_grad]
        for _ in range(3 + rounds):  # 3 to warm up
            for way in torch.randperm(3):
                start = time.perf_counter()
                dx, *_ = torch.autograd.grad(ways[way](x).sum(), trained, allow_unused=True)
                dx[0, 0].item()  # waits for a GPU
                seconds[way].append(time.perf_counter() - start)
        ours, of_lora, of_loop = (median(t[3:]) for t in seconds)
        saved, by_lora, by_loop = (saved_bytes(way, x, inputs) for way in ways)
        print(f"{tokens} tokens, width {width}, r {r}, n {n}: "
              f"time {ours / of_lora:.2f} and {ours / of_loop:.2f}, "
              f"bytes {saved / by_lora:.2f} and {saved / by_loop:.2f}")


# ---- Options ----
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for mode in ("table", "tune", "cost"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    add("--heads", type=int, help="n (default: found by k-means)")
    add("--copy-weight", type=float, default=COPY_WEIGHT,
        help="of the auxiliary loss (default: %(default)s)")
    add("--method", choices=methods(), metavar="NAME", help="for --tune (default: all)")
    add("--check", action="store_true", help="exit 1 unless both checks pass")
    add("--json", metavar="FILE", help="for the results, also of --table")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, mps ... (default: a GPU if there is one)")
    options = parser.parse_args()

    allowed = dict(table=["json"], tune=["method", "copy_weight"], cost=[]).get(
        options.mode, ["seed", "heads", "copy_weight", "check", "json"])
    for name, value in vars(options).items():
        if value != parser.get_default(name) and name not in (*allowed, "mode", "device"):
            parser.error(f"--{name.replace('_', '-')} does not belong to this run")
    if options.heads is not None and options.heads < 1:
        parser.error("--heads must be 1 or more")
    if options.seed < 0 or not 0 <= options.copy_weight < math.inf:
        parser.error("--seed and --copy-weight must be 0 or more")
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
    if options.mode == "tune":
        return tune(options.device, options.method, options.copy_weight)
    if options.mode == "cost":
        return cost(options.device)
    result = table(options.device) if options.mode else experiment(
        options.seed, options.device, heads=options.heads, copy_weight=options.copy_weight)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    if options.check:
        for what, passed in result["checks"].items():
            print(f"check: {what}: {'yes' if passed else 'NO'}")
        return int(not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
