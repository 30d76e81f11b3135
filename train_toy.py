# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the authors of HydraLoRA in one file
"""Do the heads of HydraLoRA specialise, and what are the router and the shared A worth?

    python train_toy.py             the experiment: under a minute on a CPU
    python train_toy.py --paper     README's table, ten seeds: ten minutes on two cores
    python train_toy.py --tune      the learning rates: an hour
    python train_toy.py --cost      time and memory of the layer

A sequence belongs to a hidden domain, and each domain has a cipher of its own:

    d b d d a d ...  ? ? ? ? ? ? ...        read: plain symbols, and as many question marks
                     k f k k c k ...        to be said there: the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen. Then adapters learn a new set.
No label says which domain a sequence is from.

The world was chosen so that heads go by domain. A router goes by what its layer's input says
loudest. Here each domain prefers its own third of the symbols, and the first block is trained
to fetch the symbol, so that the last attention brings the domain to o_proj, where the adapters
sit. With --fetch 0 chance decides: on seed 30 heads go by symbol, and one LoRA does as well.
"""
import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
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

DOMAINS = 3           # hidden kinds of sequences
SYMBOLS = 15          # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4        # how much more often a domain uses a symbol of its own third
LENGTH = 24           # plain symbols in a sequence, and question marks
BATCH = 48            # sequences in a step
PRETRAIN_STEPS = 400  # on the old ciphers, all weights
STEPS = 400           # on the new ciphers, the adapter alone
EVALUATION = 2000     # test sequences
RANK = 9              # r of HydraLoRA: one head can hold the cipher of a domain
MODEL = TinyConfig(
    vocab_size=SYMBOLS + 1,
    max_position_embeddings=2 * LENGTH,
    hidden_size=96,
    intermediate_size=384,
    num_attention_heads=8)


# ---- The world: a corpus, and a frozen model that knows its old ciphers ----
class World:
    """What the methods of one seed share; all see the same batches."""

    def __init__(self, seed, device, fetch=1.0):
        self.seed, self.device = seed, device
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)
        chance = torch.Generator().manual_seed(seed)
        ciphers = [torch.randperm(SYMBOLS, generator=chance) for _ in range(2 * DOMAINS)]
        self.old, self.new = torch.stack(ciphers).split(DOMAINS)  # (domains, symbols) each
        torch.manual_seed(seed)
        self.model = TinyTransformer(MODEL).to(device)
        self.top = Top(self.model)
        self.pretrain(fetch)
        self.training = self.data(STEPS * BATCH, use=1)
        self.test = self.data(EVALUATION, use=2)

    def sample(self, count, use):
        """tokens (count, 2 LENGTH), targets (count, LENGTH), domain and data_set (count,).
        use: 0 pre-training (old ciphers), 1 training, 2 test. A tenth have a data set at
        random, the others that of their domain."""
        chance = torch.Generator().manual_seed(1000 * self.seed + use)
        domain, any_domain = torch.randint(DOMAINS, (2, count), generator=chance)
        plain = torch.multinomial(
            self.frequencies[domain], LENGTH, replacement=True, generator=chance)
        tokens = F.pad(plain, (0, LENGTH), value=SYMBOLS)
        targets = (self.new if use else self.old)[domain[:, None], plain]
        mixed = torch.rand(count, generator=chance) < 0.1
        data_set = torch.where(mixed, any_domain, domain)
        data = dict(tokens=tokens, targets=targets, domain=domain, data_set=data_set)
        return SimpleNamespace(**{name: t.to(self.device) for name, t in data.items()})

    def below(self, tokens):
        """What the last block reads: h (b, 2 LENGTH, width)."""
        h = self.model.embed(tokens)
        for layer in self.model.layers[:-1]:
            h = layer(h)
        return h

    def pretrain(self, fetch):
        """fetch: the weight of a second loss: the first block has to say the plain symbol."""
        data = self.sample(PRETRAIN_STEPS * BATCH, use=0)

        def loss_of(batch):
            h = self.below(data.tokens[batch])
            said = self.model.lm_head(self.model.norm(h[:, LENGTH:]))  # after one block
            loss = (cross_entropy(self.top(h), data.targets[batch])
                    + fetch * cross_entropy(said, data.tokens[batch, :LENGTH]))
            if batch.start % (100 * BATCH) == 0:
                print(f"   pre-training, step {batch.start // BATCH}: both losses {loss:.2f}")
            return loss

        train(loss_of, [dict(params=self.model.parameters(), lr=3e-3)], PRETRAIN_STEPS)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def data(self, count, use):
        """Sequences with new ciphers, and h and x of the frozen model, computed once."""
        data = self.sample(count, use)
        data.h = torch.cat([self.below(part) for part in data.tokens.split(BATCH)])
        data.x = torch.cat([self.top.attention(part) for part in data.h.split(BATCH)])
        return data

    def bayes_accuracy(self, data):
        """The limit without labels: the best guess by all frequencies."""
        plain = data.tokens[:, :LENGTH].cpu()
        posterior = self.frequencies.log()[:, plain].sum(2).softmax(0)  # (domains, count)
        answers = F.one_hot(self.new[:, plain], SYMBOLS).float()  # of each domain
        votes = torch.einsum("dc,dcls->cls", posterior, answers)  # (count, LENGTH, symbols)
        return accuracy(votes.to(self.device), data).mean().item()


class Top(nn.Module):
    """The last block and lm_head, at the question marks alone."""

    def __init__(self, model):
        super().__init__()
        self.block, self.norm, self.lm_head = model.layers[-1], model.norm, model.lm_head

    def attention(self, h):
        """x, what o_proj reads: h (b, 2 LENGTH, width) -> (b, LENGTH, width)."""
        return self.block.attention(h)[:, LENGTH:]

    def forward(self, h, x=None):
        """h, and x if it is known -> logits (b, LENGTH, vocabulary)."""
        if x is None or isinstance(self.block.q_proj, HydraLoRALinear):
            x = self.attention(h)
        h = self.block.feed_forward(h[:, LENGTH:] + self.block.o_proj(x))
        return self.lm_head(self.norm(h))


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(loss_of, groups, steps):
    """Adam on OneCycle, which moves beta1 too. Each step takes the next batch."""
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps)
    for step in range(steps):
        loss = loss_of(slice(step * BATCH, (step + 1) * BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(logits, data):
    """Percent of the enciphered symbols that are right in each sequence: (count,)."""
    return 100 * (logits.argmax(-1) == data.targets).float().mean(1)


def by_domain(values, domain):
    """The mean of each domain: (count, ...) -> (domains, ...)."""
    return torch.stack([values[domain == t].mean(0) for t in range(DOMAINS)])


# ---- The methods ----
@dataclass
class Method:
    """What is trained, where in the last block, and at which rates."""
    lr: float         # of all but A
    factor: float     # A's rate is so many times lr
    n: int = 1        # heads; one head is LoRA
    r: int = RANK
    kind: str = ""    # "whole": an A for each head; "layer": no adapter, o_proj itself
    labels: str = ""  # "data set" or "domain": what names the head in training
    places: tuple = ("o_proj",)


def methods(n=DOMAINS, fetch=1.0):
    """Name -> Method. Ranks make the sizes equal: on o_proj HydraLoRA has r (1 + n) + n
    vectors, a LoRA 2 r, n whole LoRAs with a router 2 r n + n. The rates are the best of
    --tune, but HydraLoRA's, where 1.28 gains 0.2; without fetch two need lower ones."""
    same = (RANK * (1 + n) + n + 1) // 2
    whole = RANK * (1 + n) // (2 * n)
    split = RANK * (1 + DOMAINS) // (2 * DOMAINS)  # as HydraLoRA without its router
    mlp, q_v = ("down_proj",), ("q_proj", "v_proj")
    return {
        "LoRA": Method(*((1.28, 0.01) if fetch else (0.08, 0.1)), r=same),
        "o_proj itself": Method(0.32 if fetch else 0.08, 1, kind="layer"),
        "LoRA MoE": Method(1.28, 0.1, n, whole, "whole"),
        "LoRA MoE, same rank": Method(1.28, 0.1, n, RANK, "whole"),
        "LoRA on down_proj": Method(0.08, 1, r=8, places=mlp),
        "HydraLoRA on down_proj": Method(0.08, 1, n, 4, places=mlp),
        "LoRA on q_proj, v_proj": Method(0.08, 0.1, r=10, places=q_v),
        "HydraLoRA on q_proj, v_proj": Method(0.08, 0.1, n, 4, places=q_v),
        "LoRA-Split, data sets": Method(1.28, 1, DOMAINS, split, "whole", "data set"),
        "LoRA-Split, domains": Method(1.28, 0.1, DOMAINS, split, "whole", "domain"),
        "HydraLoRA": Method(0.32, 1, n)}


class WholeLoRAs(nn.Module):
    """sum_i w_i B_i A_i x, from a HydraLoRA layer, whose A all A_i start from: with its router
    the paper's LoRA MoE (Eqs. 5 and 6), with labels LoRA-Split."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.router, self.scaling = layer.base, layer.router, layer.scaling
        self.lora_A = nn.Parameter(layer.lora_A.detach().repeat(layer.num_heads, 1, 1))
        self.lora_B = layer.lora_B  # (n, d, r); lora_A (n, r, k)

    def forward(self, x):
        w = self.router(x)  # (b, t, n), with labels (b, 1, n)
        z = torch.einsum("btk,nrk->btnr", x, self.lora_A)
        wz = w.unsqueeze(-1) * z * self.scaling  # (b, t, n, r)
        return self.base(x) + torch.einsum("btnr,ndr->btd", wz, self.lora_B)


class Labels(nn.Module):
    """In the router's place: a sequence has the head of its label."""
    labels = None  # (b,), set before each call

    def forward(self, x):
        return F.one_hot(self.labels, DOMAINS).to(x)[:, None]  # (b, 1, n)


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
    if method.labels:
        top.block.o_proj.router = Labels()
    if method.kind == "whole":
        top.block.o_proj = WholeLoRAs(top.block.o_proj)
    return top


def fine_tune(world, method):
    """Adapt the world's model by one method -> (top, what was measured)."""
    data, test = world.training, world.test
    top = adapt(world.top, world.seed, method)
    labels = data.domain if method.labels == "domain" else data.data_set

    def loss_of(batch):
        if method.labels:
            top.block.o_proj.router.labels = labels[batch]
        return cross_entropy(top(data.h[batch], data.x[batch]), data.targets[batch])

    trained = {name: p for name, p in top.named_parameters() if p.requires_grad}
    train(loss_of, [
        dict(params=[p], lr=method.lr * (method.factor if name.endswith("lora_A") else 1))
        for name, p in trained.items()], STEPS)
    if method.labels:  # in the test the true domain chooses
        top.block.o_proj.router.labels = test.domain
    right = accuracy(predict(top, test), test)  # (count,)
    return top, dict(size=sum(p.numel() for p in trained.values()), accuracy=right.mean().item(),
                     by_domain=by_domain(right, test.domain).tolist())


@torch.no_grad()
def predict(top, data):
    """The logits of a whole set: (count, LENGTH, vocabulary)."""
    return top(data.h, data.x)


# ---- A look at the heads, and merging ----
def gates_of(top, data):
    """w for each enciphered symbol: (count, LENGTH, n)."""
    with record_gates(top) as gates:
        predict(top, data)
    return gates["block.o_proj"]


def nmi(w, domain):
    """Normalised mutual information, 2 I(domain; head) / (H(domain) + H(head)), where each
    token draws its head from its gates w (count, LENGTH, n)."""
    share = torch.bincount(domain, minlength=DOMAINS) / len(domain)  # (domains,)
    joint = share[:, None] * by_domain(w.mean(1), domain)  # (domains, n)
    of_domain, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * (of_domain + of_head - of_both) / (of_domain + of_head)


def averaged_by_symbol(w, data):
    """What of the gates the symbols explain: w, averaged over the tokens of a symbol."""
    plain = data.tokens[:, :LENGTH]
    mean = torch.stack([w[plain == symbol].mean(0) for symbol in range(SYMBOLS)])
    return mean[plain]  # (count, LENGTH, n)


def said_by_input(data):
    """The shares of domain, symbol, and only both together in the variance of the means of
    x over the tokens of each domain and symbol."""
    plain, domain = data.tokens[:, :LENGTH], data.domain[:, None]
    mean = torch.stack([
        torch.stack([data.x[(domain == t) & (plain == s)].mean(0) for s in range(SYMBOLS)])
        for t in range(DOMAINS)])  # (domains, symbols, width)
    mean = mean - mean.mean((0, 1))
    parts = dict(domain=mean.mean(1, keepdim=True), symbol=mean.mean(0, keepdim=True))
    parts["both"] = mean - parts["domain"] - parts["symbol"]
    return {name: (part.expand_as(mean).square().sum() / mean.square().sum()).item()
            for name, part in parts.items()}


def knock_out(top, data):
    """Points of accuracy that each domain loses without one of the heads: (domains, n)."""
    n, right = top.block.o_proj.num_heads, []
    for kept in torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).to(data.x):
        with hook_gates(top, lambda name, w: w * kept):
            right.append(by_domain(accuracy(predict(top, data), data), data.domain))
    with_all, *without_one = right
    return with_all[:, None] - torch.stack(without_one, dim=1)


def merged_accuracy(top, world, chosen):
    """Accuracy of each test sequence, merged for the mean gates of training ones."""
    h, x = (t[:1000][chosen[:1000]] for t in (world.training.h, world.training.x))
    gates = mean_gates(top, [dict(h=h, x=x)])
    layers = merge_hydralora(top, gates)
    right = accuracy(predict(top, world.test), world.test)  # (count,)
    unmerge_hydralora(top, layers)
    return right


# ---- The experiment, told as it runs ----
MAIN_RUN = ["LoRA", "o_proj itself", "LoRA MoE", "LoRA on down_proj", "HydraLoRA"]


def experiment(seed, device, names, heads=None, fetch=1.0):
    """Prints what comes out, and returns it as a dict."""
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {seed}, fetch {fetch:g}, {device}")
    print("   Each domain enciphers symbols in its own way, and no label tells the domain.")
    print("   A transformer learns old ciphers and is frozen; then adapters learn new ones.\n")
    world = World(seed, device, fetch)
    test, domain = world.test, world.test.domain

    found, sse = num_heads_from_corpus(world.training.tokens[:600, :LENGTH].tolist())
    n = heads or found
    print(f"\n1. How many heads? k-means on 600 sequences: n = {found}; used: {n}")
    print("   SSE of 1, 2, ... centres:", *map(round, sse))

    print("\n2. Percent of the enciphered symbols that are right, with the new ciphers")
    print("   On the last o_proj, unless a name says where. LoRA MoE has an A for each head.\n")
    tops, results = {}, {}
    for name in names:
        tops[name], results[name] = fine_tune(world, methods(n, fetch)[name])
        print("   {:28}{size:6,} parameters {accuracy:6.1f}".format(name, **results[name]))
    bayes = world.bayes_accuracy(test)
    print(f"   The limit without labels: {bayes:.1f}")

    top = tops["HydraLoRA"]
    said, w = said_by_input(test), gates_of(top, test)
    print("\n3. Do the heads, the matrices B_i, go by domain? What the layer reads differs by")
    print("  ", ", ".join(f"{name}: {100 * share:.0f} %" for name, share in said.items()),
          "(of the variance of its means over each domain and symbol).")
    print("   A sequence of each domain, and the head with the largest gate at each symbol:\n")
    for t in range(DOMAINS):
        first = domain.tolist().index(t)
        print(f"   domain {t}  ", *(chr(97 + i) for i in test.tokens[first, :LENGTH]))
        print("   head      ", *w[first].argmax(-1).tolist())
    print("\n   Mean gate of each head, and points of accuracy that are lost without it:\n")
    gates, lost = by_domain(w.mean(1), domain), knock_out(top, test)
    for t in range(DOMAINS):
        print(f"   domain {t}", *(f"| {gate:.2f} {points:5.1f} "
                                  for gate, points in zip(gates[t], lost[t])))
    by_symbol = averaged_by_symbol(w, test)
    scores = dict(router=nmi(w, domain), symbols=nmi(by_symbol, domain))
    print("\n   NMI, how much a head says of the domain, from 0, nothing, to 1, a head each:")
    print(f"   {scores['router']:.2f}; what symbols explain of it: {scores['symbols']:.2f}")

    known = [merged_accuracy(top, world, world.training.domain == t)[domain == t]
             for t in range(DOMAINS)]
    merged = dict(known=torch.cat(known).mean().item(),
                  all=merged_accuracy(top, world, world.training.domain >= 0).mean().item())
    print("\n4. Merged into one plain layer for the sequence's domain, told by a label: "
          f"{merged['known']:.1f}; for all: {merged['all']:.1f}\n")

    gain = results["HydraLoRA"]["accuracy"] - results["LoRA"]["accuracy"]
    checks = {"NMI is 0.5 or more": scores["router"] >= 0.5,
              "symbols explain 0.2 less of it": scores["symbols"] <= scores["router"] - 0.2,
              "HydraLoRA is ahead of LoRA": gain > 0}
    if all([*checks.values()][:2]):
        print("The heads go by domain.")
    else:
        explained = (by_symbol.var((0, 1)).sum() / w.var((0, 1)).sum()).nan_to_num()
        print(f"The heads do not go by domain: {DOMAINS} domains have "
              f"{len(gates.argmax(1).unique())} main heads,\n"
              f"and the symbol explains {100 * explained:.0f} % of the gates.")
    for name in ("LoRA", "LoRA MoE", "LoRA on down_proj"):
        points = results["HydraLoRA"]["accuracy"] - results[name]["accuracy"]
        print(f"HydraLoRA is {abs(points):.1f} points {'ahead of' if points > 0 else 'behind'} "
              f"{name}.")
    return dict(
        seed=seed, fetch=fetch, device=device, heads_found=found, num_heads=n, sse=sse, bayes=bayes,
        input=said, methods=results, nmi=scores, gates=gates.tolist(), lost=lost.tolist(),
        merged=merged, gain=gain, checks=checks, passed=all(checks.values()))


# ---- --paper and --tune: all methods on several seeds ----
TUNING_SEEDS = range(5)
REPORTED_SEEDS = range(40, 50)  # no rate was chosen on them
RATES, FACTORS = (0.005, 0.02, 0.08, 0.32, 1.28), (1, 0.1, 0.01)


def paper_seed(seed, device):
    return experiment(seed, device, list(methods()), DOMAINS)


def tune_seed(seed, device):
    world, results = World(seed, device), {}
    for (name, method), factor, lr in itertools.product(methods().items(), FACTORS, RATES):
        _, measured = fine_tune(world, replace(method, lr=lr, factor=factor))
        results[name, factor, lr] = measured["accuracy"]
    return results


def start_process():
    torch.set_num_threads(1)
    sys.stdout = None  # an experiment speaks where it is alone


def all_seeds(function, seeds, device):
    """function(seed, device) of each seed, in as many processes as cores."""
    results = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_process) as pool:
        for result in pool.imap(functools.partial(function, device=device), seeds):
            results.append(result)
            print(f"{len(results)} of {len(seeds)} seeds", file=sys.stderr)
    return results


def tune(device):
    seeds = all_seeds(tune_seed, TUNING_SEEDS, device)
    for name, factor in itertools.product(methods(), FACTORS):
        means = [statistics.mean(seed[name, factor, lr] for seed in seeds) for lr in RATES]
        print(f"{name:28} A x{factor:<5}", *(f"{lr}: {mean:.2f}" for lr, mean in zip(RATES, means)))


def spread(values, sign=""):
    deviation = statistics.stdev(values)
    digits = 1 if deviation >= 0.5 else 2
    return f"{statistics.mean(values):{sign}.{digits}f} +- {deviation:.{digits}f}"


def paper(device):
    """Prints Markdown for README.md, returns what was measured."""
    seeds = all_seeds(paper_seed, REPORTED_SEEDS, device)
    right = {name: [seed["methods"][name]["accuracy"] for seed in seeds] for name in methods()}
    print("| HydraLoRA against | parameters, its:ours | accuracy | ahead by +- std | seeds ahead |")
    print("| --- | --- | --- | --- | --- |")
    for name, its in right.items():
        if not name.startswith("HydraLoRA"):
            ours = f"Hydra{name}" if f"Hydra{name}" in right else "HydraLoRA"
            size, our_size = (seeds[0]["methods"][key]["size"] for key in (name, ours))
            ahead = [a - b for a, b in zip(right[ours], its)]  # on the same seed
            print(f"| {name} | {size:,}:{our_size:,} | {statistics.mean(its):.1f} "
                  f"| {spread(ahead, '+')} | {sum(a > 0 for a in ahead)}/{len(ahead)} |")
    lines = dict(right)
    for what, key in (("merged", "known"), ("merged", "all"), ("nmi", "router"),
                      ("nmi", "symbols"), ("input", "domain")):
        lines[f"{what}, {key}"] = [seed[what][key] for seed in seeds]
    for what, values in lines.items():
        print(f"- {what}: {spread(values)}, from {min(values):.2f} to {max(values):.2f}")
    return seeds


# ---- --cost ----
def loop_over_heads(layer, x):
    """The official code's way: A x, and a result of y's size, for each head."""
    y, w = layer.base(x), layer.router(x)
    for i in range(layer.num_heads):
        z = F.linear(x, layer.lora_A)  # (tokens, r)
        y = y + w[..., i, None] * F.linear(z, layer.lora_B[i]) * layer.scaling
    return y


def saved_bytes(function, x, inputs):
    """Bytes that autograd keeps for backward, beside the inputs."""
    kept = {}  # address -> bytes

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def cost(device, sizes=((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)), rounds=15):
    """Prints time and bytes of the layer, as multiples of others'."""
    print("Forward and backward, and bytes kept between: of the layer, as a multiple of one\n"
          "LoRA of rank n r, and of a loop over heads")
    for tokens, width, r, n in sizes:
        layer = HydraLoRALinear(nn.Linear(width, width, device=device), num_heads=n, r=r)
        A = nn.Linear(width, n * r, bias=False, device=device)
        B = nn.Linear(n * r, width, bias=False, device=device)
        x = torch.randn(tokens, width, device=device, requires_grad=True)
        ways = [layer, lambda x: layer.base(x) + B(A(x) * layer.scaling),
                lambda x: loop_over_heads(layer, x)]
        inputs, seconds = [x, A.weight, B.weight, *layer.parameters()], [[], [], []]
        for _ in range(3 + rounds):  # 3 to warm up
            for way in torch.randperm(3):
                for t in inputs:
                    t.grad = None
                start = time.perf_counter()
                ways[way](x).backward(torch.ones_like(x))
                x.grad[0, 0].item()  # waits for a GPU
                seconds[way].append(time.perf_counter() - start)
        ours, of_lora, of_loop = (statistics.median(t[3:]) for t in seconds)
        kept, by_lora, by_loop = (saved_bytes(way, x, inputs) for way in ways)
        print(f"{tokens} tokens, width {width}, r {r}, n {n}: time {ours / of_lora:.2f} and "
              f"{ours / of_loop:.2f}, bytes {kept / by_lora:.2f} and {kept / by_loop:.2f}")


# ---- Options ----
def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train_toy.py: {message}\n")
    modes = parser.add_mutually_exclusive_group()
    for mode in (paper, tune, cost):
        modes.add_argument(f"--{mode.__name__}", dest="mode", action="store_const", const=mode,
                           help="see above")
    parser.add_argument("--seed", type=int, help="0 unless given")
    parser.add_argument("--heads", type=int, help="1 to 32; found by k-means unless given")
    parser.add_argument("--fetch", type=float, metavar="WEIGHT",
                        help="of the first block's own loss; 1 unless given")
    parser.add_argument("--check", action="store_true",
                        help="exit 1 unless heads go by domain and beat one LoRA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, mps ...; a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="for the experiment's or --paper's numbers")
    options = parser.parse_args()
    own = (options.seed, options.heads, options.fetch)
    if options.mode and (options.check or own != (None, None, None)):
        parser.error("--seed, --heads, --fetch, --check belong to the experiment")
    for name, value, low, high in zip(
            ("seed", "heads", "fetch"), own, (0, 1, 0), (999_999_999, 32, 1000)):
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} has to be from {low} to {high}")
    try:  # fail before training, if at all
        open(options.json or os.devnull, "a").close()
        torch.ones(1, device=options.device)
    except OSError as error:
        parser.error(str(error))
    except Exception:
        parser.error(f"there is no device {options.device!r} here")
    return options


def main():
    options = read_options()
    sys.stdout.reconfigure(line_buffering=True)  # also through a pipe
    if options.mode:
        result = options.mode(options.device)
    else:
        torch.set_num_threads(2)  # the same digits on one core
        fetch = 1.0 if options.fetch is None else options.fetch
        result = experiment(options.seed or 0, options.device, MAIN_RUN, options.heads, fetch)
    if options.json and result:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    if options.check:
        for what, passed in result["checks"].items():
            print("check:", what, "- yes" if passed else "- NO")
    return int(options.check and not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
