# SPDX-License-Identifier: MIT
"""Do the heads of HydraLoRA specialise, and what are the router and the shared A worth?

    python train_toy.py             the experiment: a minute or so on a CPU
    python train_toy.py --paper     the README's table, ten seeds: six or seven minutes on two cores
    python train_toy.py --cost      time and memory of the layer: half a minute
    python train_toy.py --tune      each method at each learning rate, on five seeds: a quarter hour

A sequence belongs to a hidden domain, and each domain has a cipher of its own:

    d b d d a d ...  ? ? ? ? ? ? ...        read: plain symbols, and as many question marks
                     k f k k c k ...        to be said there: the same symbols, enciphered

A transformer is pre-trained on one set of ciphers and frozen, then adapters learn a new set. No
label says which domain a sequence is from. All methods see the same batches for the same steps.

The world is made for a router: the domains conflict, since a symbol becomes another one in each;
each prefers its own third of the symbols, which tells which one it is; and the frozen model has
learnt to look at that. The adapter sits on the last o_proj, where domain and symbol come together.
So the run shows what the parts of HydraLoRA do; it cannot say what they are worth in large models.
"""
import argparse
import copy
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, mean_gates, merge_hydralora,
    num_heads_from_corpus, record_gates, unmerge_hydralora)

DOMAINS = 3                 # hidden kinds of sequences
SYMBOLS = 21                # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
PREFERENCE = 4              # how much more often a domain uses each symbol of its own third
LENGTH = 24                 # plain symbols in a sequence, and question marks
PURITY = 0.9                # share of a data set that is from one domain; the rest is from any
MODEL = TinyConfig(SYMBOLS + 1, 2 * LENGTH, 96, 384, 2, 8)  # width, MLP, layers, attention heads
BATCH = 48                  # sequences in a step
PRETRAIN_STEPS = 400        # on the old ciphers, all weights
STEPS = 400                 # on the new ciphers, the adapter only
EVALUATION = 2000           # test sequences
RANK = 32                   # r of HydraLoRA
PRETRAINING, TRAINING, TEST = range(3)  # uses of the corpus; all methods see the same samples


# ---- The methods -----------------------------------------------------------------------------
class FixedGates(nn.Module):
    """In the router's place: the same gates for all tokens of a sequence, at first 1/n a head."""

    def __init__(self, n):
        super().__init__()
        self.gates = torch.full((n,), 1 / n)                                # (n,) or (b, 1, n)

    def forward(self, x):
        return self.gates.to(x).expand(*x.shape[:-1], -1)                   # (b, t, n)


class WholeLoRAs(HydraLoRALinear):
    """n LoRAs with an A each, all started from one: sum_i w_i B_i A_i x. With a router the paper's
    LoRA MoE (Eqs. 5 and 6), with labels, also in inference, its LoRA-Split."""

    def __init__(self, base, **arguments):
        super().__init__(base, **arguments)
        self.lora_A = nn.Parameter(self.lora_A.detach().repeat(self.num_heads, 1))      # (n r, k)

    def forward(self, x):
        z = F.linear(x, self.lora_A).unflatten(-1, (self.num_heads, self.r))    # (b, t, n, r)
        wz = self.gates(x).unsqueeze(-1) * z * self.scaling                     # (b, t, n, r)
        return self.base(x) + F.linear(wz.flatten(-2), self.lora_B.transpose(0, 1).flatten(1))


def methods(n=DOMAINS):
    """Name -> arguments of fine_tune; lr is --tune's best, `paper` by how much HydraLoRA is ahead
    there. On a square layer HydraLoRA is as large as one LoRA of rank (r (1 + n) + n) / 2, and as n
    whole LoRAs of rank r (1 + n) / (2 n) with a router."""
    same = RANK * (1 + n) + n       # times the width: the parameters of HydraLoRA
    whole, split = RANK * (1 + n) // (2 * n), round(same / (2 * DOMAINS))
    return {    # the main run's, then those of --paper alone
        "LoRA, same size": dict(n=1, r=(same + 1) // 2, gates="equal", lr=1.28,
                                paper="1.77 MMLU, Table 2, router not counted"),
        "whole LoRAs + router, same size": dict(n=n, r=whole, whole=True, lr=0.32, paper="-"),
        "LoRA-Split by 90% pure data sets": dict(
            n=DOMAINS, r=split, whole=True, gates="data_set", lr=0.64, paper="-"),
        "HydraLoRA": dict(n=n, r=RANK, lr=0.32),
        "HydraLoRA, true gate": dict(n=DOMAINS, r=RANK, gates="domain", lr=2.56, paper="-"),
        "LoRA-Split by true domain": dict(n=DOMAINS, r=split, whole=True, gates="domain", lr=0.64,
                                          paper="0.28 MMLU, Table 2, HydraLoRA half as large"),
        "equal gates": dict(n=n, r=RANK, gates="equal", lr=5.12, paper="4.41 MMLU, Figure 6"),
        "whole LoRAs + router": dict(n=n, r=RANK, whole=True, lr=0.32, paper="1.2 BBH, Table 3"),
        "HydraLoRA, r=3": dict(n=n, r=3, lr=0.64),
        "whole LoRAs + router, r=2": dict(n=n, r=2, whole=True, lr=0.32, paper="-",
                                          ours="HydraLoRA, r=3")}


class Top(nn.Module):
    """The transformer from its last o_proj on, whose input is x and whose output is added to h. All
    below is frozen, so x and h (count, LENGTH, width) are computed once."""

    def __init__(self, model):
        super().__init__()
        self.block, self.norm, self.lm_head = model.layers[-1], model.norm, model.lm_head

    def forward(self, x, h, labels=None):
        if labels is not None:
            self.block.o_proj.router.gates = F.one_hot(labels, DOMAINS)[:, None]    # (b, 1, n)
        h = h + self.block.o_proj(x)                                        # (b, t, width)
        h = h + self.block.down_proj(F.gelu(self.block.up_proj(self.block.mlp_norm(h))))
        return self.lm_head(self.norm(h))                                   # (b, t, vocabulary)


def adapt(top, seed, n, r, gates="router", whole=False):
    """A copy of `top` with an adapter. Methods of one rank start from one A."""
    top, kind = copy.deepcopy(top), WholeLoRAs if whole else HydraLoRALinear
    torch.manual_seed(seed)
    layer = top.block.o_proj = kind(top.block.o_proj, num_heads=n, r=r, lora_alpha=2 * r)
    layer.router = layer.router if gates == "router" else FixedGates(n)
    return top


# ---- Training and evaluation -----------------------------------------------------------------
def train(model, inputs, targets, lr, what):
    """AdamW on OneCycle, cross-entropy at the last positions: targets (count, positions)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0)   # 0.999 is slow here
    steps, start = len(targets) // BATCH, time.perf_counter()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        *batch, target = (t[step * BATCH:(step + 1) * BATCH] for t in (*inputs, targets))
        logits = model(*batch)[:, -target.shape[1]:]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{what}: loss {loss.item():.3f}, {time.perf_counter() - start:.1f} s", file=sys.stderr)


class World:
    """What the methods of one seed share: the corpus, the frozen model and the data."""

    def __init__(self, seed, device):
        torch.set_num_threads(1)        # small tensors, and the same result on any machine
        torch.manual_seed(seed)
        self.seed, self.device, chance = seed, device, torch.Generator().manual_seed(seed)
        own = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
        self.frequencies = F.normalize(torch.where(own, PREFERENCE, 1.0), p=1)  # (domains, symbols)
        self.old, self.new = (torch.stack([
            torch.randperm(SYMBOLS, generator=chance) for _ in range(DOMAINS)]) for _ in range(2))
        self.model = TinyTransformer(MODEL).to(device)
        tokens, targets, *_ = self.sample(PRETRAIN_STEPS * BATCH, PRETRAINING, self.old)
        train(self.model, [tokens], targets, 3e-3, "pre-training")
        self.top = Top(self.model.requires_grad_(False))
        self.training, self.test = self.data(STEPS * BATCH, TRAINING), self.data(EVALUATION, TEST)

    def sample(self, count, use, ciphers):
        """tokens (count, 2 LENGTH), targets (count, LENGTH), domain and data set (count,)."""
        chance = torch.Generator().manual_seed(1000 * self.seed + use)
        domain, any_domain = torch.randint(DOMAINS, (2, count), generator=chance)
        pure = torch.rand(count, generator=chance) < PURITY
        plain = torch.multinomial(self.frequencies[domain], LENGTH, replacement=True,
                                  generator=chance)                         # (count, LENGTH)
        drawn = (F.pad(plain, (0, LENGTH), value=SYMBOLS), ciphers[domain[:, None], plain], domain,
                 torch.where(pure, domain, any_domain))
        return [t.to(self.device) for t in drawn]

    def data(self, count, use):
        """Sequences with new ciphers, and what Top reads at their question marks."""
        tokens, targets, domain, data_set = self.sample(count, use, self.new)
        block, x, h = self.model.layers[-1], [], []
        keep = lambda seen: lambda _, inputs: seen.append(inputs[0][:, LENGTH:].clone())
        hooks = [block.o_proj.register_forward_pre_hook(keep(x)),
                 block.register_forward_pre_hook(keep(h))]
        for batch in tokens.split(BATCH):
            self.model(batch)
        for hook in hooks:
            hook.remove()
        return SimpleNamespace(tokens=tokens, targets=targets, domain=domain, data_set=data_set,
                               x=torch.cat(x), h=torch.cat(h))

    def bayes_accuracy(self, data):
        """The limit without labels, in percent: the best guess by all frequencies and ciphers."""
        plain = data.tokens[:, :LENGTH].cpu()                               # (count, LENGTH)
        posterior = self.frequencies.log()[:, plain].sum(2).softmax(0)      # (domains, count)
        answers = F.one_hot(self.new[:, plain], SYMBOLS).float()            # of each domain
        votes = torch.einsum("dc,dcls->cls", posterior, answers)
        return accuracy(votes.to(self.device), data).mean().item()


@torch.no_grad()
def logits_of(top, data, gates="router"):
    return top(data.x, data.h, getattr(data, gates, None))            # (count, LENGTH, vocab)


def accuracy(logits, data):
    """Percent of the enciphered symbols that are right in each sequence: (count,)."""
    return 100 * (logits.argmax(-1) == data.targets).float().mean(1)


def by_domain(values, domain):
    """The mean of each domain: (count, ...) -> (domains, ...)."""
    return torch.stack([values[domain == t].mean(0) for t in range(DOMAINS)])


def fine_tune(world, name, n, r, lr, gates="router", whole=False, paper=None, ours=None):
    """Adapt the world's model by one method -> (top, what was measured)."""
    top, data = adapt(world.top, world.seed, n, r, gates, whole), world.training
    labels = [getattr(data, gates)] if hasattr(data, gates) else []
    train(top, [data.x, data.h, *labels], data.targets, lr, name)
    right = accuracy(logits_of(top, world.test, gates), world.test)
    size = sum(p.numel() for p in top.parameters() if p.requires_grad)
    return top, dict(size=size, accuracy=right.mean().item(),
                     by_domain=by_domain(right, world.test.domain).tolist())


# ---- A look at the heads, and merging --------------------------------------------------------
def gates_of(top, data):
    """w for each enciphered symbol: (count, LENGTH, n)."""
    with record_gates(top) as gates:
        logits_of(top, data)
    return gates["block.o_proj"]


def nmi(w, domain):
    """2 I(domain; head) / (H(domain) + H(head)), where each token draws its head from its gates.
    0: the gates say nothing of the domain. 1: one head for each domain, with certainty."""
    share = torch.bincount(domain, minlength=DOMAINS)[:, None] / len(domain)
    joint = by_domain(w.mean(1), domain) * share                            # (domains, n)
    entropy = lambda p: -torch.xlogy(p, p).sum().item()
    of_domain, of_head = entropy(joint.sum(1)), entropy(joint.sum(0))
    return 2 * (of_domain + of_head - entropy(joint)) / (of_domain + of_head)


def symbol_alone(w, data):
    """The gates of a router that sorts symbols alone: w, averaged over the tokens of a symbol."""
    plain = data.tokens[:, :LENGTH]                                         # (count, LENGTH)
    which = F.one_hot(plain, SYMBOLS).to(w)                            # (count, LENGTH, symbols)
    return (torch.einsum("cls,cln->sn", which, w) / which.sum((0, 1))[:, None])[plain]


def knock_out(top, data):
    """Points of accuracy that each domain loses without one of the heads: (domains, n)."""
    def without(head):
        with hook_gates(top, lambda name, w: F.normalize(w * (heads != head), p=1, dim=-1)):
            return by_domain(accuracy(logits_of(top, data), data), data.domain)
    heads = torch.arange(top.block.o_proj.num_heads, device=data.domain.device)
    return without(-1)[:, None] - torch.stack([without(head) for head in heads], dim=1)


def specialisation(top, world):
    """Whether the heads go by domain, and the controls for that."""
    test, training, domain = world.test, world.training, world.test.domain
    w = gates_of(top, test)                                                 # (count, LENGTH, n)
    probe = nn.Linear(MODEL.hidden_size, DOMAINS, bias=False).to(world.device)  # told the labels
    train(probe, [training.x], training.domain[:, None].expand(-1, LENGTH), 1e-2, "labelled router")
    untrained = gates_of(adapt(world.top, world.seed, w.shape[-1], RANK), test)
    scores = {"router": nmi(w, domain), "symbol alone": nmi(symbol_alone(w, test), domain),
              "untrained": nmi(untrained, domain), "shuffled labels": nmi(w, domain.roll(1)),
              "learnt from labels": nmi(probe(test.x).softmax(-1), domain)}
    return dict(layers={"last o_proj": scores}, gates=by_domain(w.mean(1), domain).tolist(),
                lost=knock_out(top, test).tolist())


def merging(top, world):
    """What merging costs: way to merge -> accuracy, and relative error of the logits."""
    def merged(gates):
        layers = merge_hydralora(top, gates)
        logits = logits_of(top, test)
        unmerge_hydralora(top, layers)
        return logits

    test, n = world.test, top.block.o_proj.num_heads
    x, h, domain = (getattr(world.training, name)[:1000] for name in ("x", "h", "domain"))
    mean_over = lambda chosen: mean_gates(top, [dict(x=x[chosen], h=h[chosen])])
    own = torch.stack([merged(mean_over(domain == t)) for t in range(DOMAINS)])
    ways = {"routed": logits_of(top, test), "mean gates": merged(mean_over(domain >= 0)),
            "equal gates": merged(torch.ones(n) / n),
            "its domain's mean": own[test.domain, torch.arange(EVALUATION)]}
    error = lambda y: ((y - ways["routed"]).norm() / ways["routed"].norm()).item()
    return dict(accuracy={way: accuracy(y, test).mean().item() for way, y in ways.items()},
                error={way: error(y) for way, y in ways.items()})


# ---- The main run ----------------------------------------------------------------------------
# --check: HydraLoRA is ahead of the LoRA of its size, and the heads specialise: the NMI is half of
# the best, well above that of a router that sorts symbols, and nothing for shuffled labels.
MIN_NMI, MIN_NMI_OVER_SYMBOL, MAX_NMI_SHUFFLED = 0.5, 0.2, 0.02


def measure(seed, heads, device):
    """Everything that the main run measures, as a dict; --json writes it."""
    world, tops, results = World(seed, device), {}, {}
    found, sse = num_heads_from_corpus(world.training.tokens[:600].tolist())
    for name, method in list(methods(heads or found).items())[:5]:
        tops[name], results[name] = fine_tune(world, name, **method)
    special, merge = (f(tops["HydraLoRA"], world) for f in (specialisation, merging))
    nmis = special["layers"]["last o_proj"]
    gain = results["HydraLoRA"]["accuracy"] - results["LoRA, same size"]["accuracy"]
    specialised = (nmis["router"] >= max(MIN_NMI, nmis["symbol alone"] + MIN_NMI_OVER_SYMBOL)
                   and nmis["shuffled labels"] <= MAX_NMI_SHUFFLED)
    return dict(seed=seed, device=device, heads_found=found, num_heads=heads or found, sse=sse,
                frozen=accuracy(logits_of(world.top, world.test), world.test).mean().item(),
                bayes=world.bayes_accuracy(world.test), methods=results,
                gain=gain, specialisation=special, merging=merge,
                specialised=specialised, passed=specialised and gain > 0)


def table(header, rows):
    """Markdown whose columns line up."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


def show(m):
    """The main run's measurements in four sections."""
    two, special, merge = "{:.2f}".format, m["specialisation"], m["merging"]
    domains, heads = ([f"{what} {i}" for i in range(count)]
                      for what, count in (("domain", DOMAINS), ("head", m["num_heads"])))
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {m['seed']}, {m['device']}\n\n"
          f"1. How many heads? k-means on 600 sequences, no labels: n = {m['heads_found']}; "
          f"used: {m['num_heads']}\n   SSE of 1, 2, ... centres:", *map(round, m["sse"]))
    print("\n2. Accuracy on the enciphered symbols after fine-tuning on new ciphers, in percent\n")
    table(["method", "parameters", "accuracy", *domains], [
        [name, f"{r['size']:,}", two(r["accuracy"]), *map(two, r["by_domain"])]
        for name, r in m["methods"].items()])
    print(f"   Without adapter {m['frozen']:.2f}; limit without labels (Bayes) {m['bayes']:.2f}\n\n"
          "3. Do the heads specialise? NMI of domain and head: 0, not at all; 1, a head each\n")
    scores = special["layers"]["last o_proj"]
    table(list(scores), [[f"{score:.3f}" for score in scores.values()]])
    table(["mean gates", *heads], [[domain, *(f"{w:.2f} {'#' * round(10 * w)}" for w in row)]
                                   for domain, row in zip(domains, special["gates"])])
    table(["points lost without", *heads], [
        [domain, *map(two, row)] for domain, row in zip(domains, special["lost"])])
    print("4. Merged into one plain linear layer, for fixed gates\n")
    table(["gates", "accuracy", "error of the logits"], [
        [way, two(a), f"{merge['error'][way]:.3f}"] for way, a in merge["accuracy"].items()])
    print(f"The heads {'specialise' if m['specialised'] else 'do NOT specialise'}. "
          f"HydraLoRA is {m['gain']:+.2f} points from the LoRA of its size.")


# ---- --paper and --tune: all methods on several seeds ----------------------------------------
TUNING_SEEDS, REPORTED_SEEDS = range(5), range(20, 30)      # no seed is both
GRID = 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24            # of learning rates


def one_seed(seed, device, grid):
    """All methods at each learning rate of the grid or, without one, at their own."""
    world, results = World(seed, device), {}
    for name, method in methods().items():
        for lr in grid or [method["lr"]]:
            top, result = fine_tune(world, name, **method | dict(lr=lr))
            results.setdefault(name, []).append(result)
        if name == "HydraLoRA":
            w, domain = gates_of(top, world.test), world.test.domain
            result |= dict(nmi=nmi(w, domain), symbol=nmi(symbol_alone(w, world.test), domain),
                           merged=merging(top, world)["accuracy"]["mean gates"])
        if name == "LoRA-Split by true domain":
            layer = top.block.o_proj
            result["cosines of A and B"] = [    # of a domain's and the next one's
                F.cosine_similarity(m.flatten(1), m.flatten(1).roll(1, 0)).mean().item()
                for m in (layer.lora_A.unflatten(0, (DOMAINS, -1)), layer.lora_B)]
    return results


def all_seeds(seeds, device, grid=None):
    """one_seed's results, from as many processes as cores; Ctrl-C is for their parent alone."""
    with multiprocessing.get_context("spawn").Pool(
            os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return pool.starmap(one_seed, [(seed, device, grid) for seed in seeds], chunksize=1)


def tune(device):
    seeds = all_seeds(TUNING_SEEDS, device, GRID)
    return [dict(method=name) | {f"lr {lr}": round(statistics.mean(
        seed[name][i]["accuracy"] for seed in seeds), 2) for i, lr in enumerate(GRID)}
        for name in methods()]


def show_paper(seeds):
    """Markdown, as it stands in README.md."""
    of = lambda name, key="accuracy": [seed[name][0][key] for seed in seeds]
    spread = lambda v, sign="": f"{statistics.mean(v):{sign}.2f} +- {statistics.stdev(v):.2f}"
    rows, split, hydra = [], "LoRA-Split by true domain", "HydraLoRA"
    for name, method in methods().items():
        if "paper" in method:
            ours = method.get("ours", hydra)
            ahead = [a - b for a, b in zip(of(ours), of(name))]             # of one seed each
            rows.append([name, f"{of(name, 'size')[0]:,}", spread(of(name)),
                         f"{ours}, {of(ours, 'size')[0]:,}", spread(ahead, "+"),
                         f"{sum(a > 0 for a in ahead)} of {len(ahead)}", method["paper"]])
    table(["opponent", "parameters", "accuracy", "HydraLoRA", "is ahead by", "seeds ahead",
           "in the paper"], rows)
    print(f"- HydraLoRA {spread(of(hydra))}; merged for mean gates {spread(of(hydra, 'merged'))}")
    print("- NMI of domain and head, seed by seed:", *(f"{v:.2f}" for v in of(hydra, "nmi")),
          "and by symbol alone", spread(of(hydra, "symbol")))
    print(f"- Observation I: {split} {spread(of(split))}, one LoRA {spread(of('LoRA, same size'))}")
    print("- Observation II, cosine of two A and of two B of that LoRA-Split, all from one A:",
          " and ".join(map(spread, zip(*of(split, "cosines of A and B")))))


# ---- --cost ----------------------------------------------------------------------------------
def saved_bytes(function, inputs):
    """Bytes that autograd keeps for backward, without the inputs themselves."""
    kept, storage = {}, lambda t: t.untyped_storage().data_ptr()
    pack = lambda t: (kept.update({storage(t): t.untyped_storage().nbytes()}), t)[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values()) - sum(kept.get(storage(t), 0) for t in inputs)


def cost(device, sizes=((2048, 1024, 8, 3), (2048, 1024, 8, 10), (512, 4096, 8, 3)), rounds=25):
    """Medians of forward and backward, in another order each round, since a time depends on the
    memory that the one before leaves behind; and bytes kept for backward, beside inputs and
    weights. Their bound is A x, w, their product and one copy of the heads."""
    rows, chance = [], torch.Generator().manual_seed(0)
    for tokens, width, r, n in sizes:
        layer = HydraLoRALinear(nn.Linear(width, width, bias=False), num_heads=n, r=r).to(device)
        x, A1, B1 = (torch.randn(*shape, device=device, requires_grad=True)
                     for shape in ((tokens, width), (n * r, width), (width, n * r)))
        A, B, s = layer.lora_A, layer.lora_B, layer.scaling

        def loop():     # the official code's way: A x and a (tokens, width) result for each head
            y, w = layer.base(x), layer.router(x)
            return sum((w[..., i, None] * F.linear(F.linear(x, A), B[i]) * s for i in range(n)), y)
        lora = lambda: layer.base(x) + F.linear(F.linear(x, A1) * s, B1)
        ways, seconds = [lambda: layer(x), lora, loop], [[], [], []]
        inputs = [x, A1, B1, *layer.parameters()]
        for _ in range(5 + rounds):
            for way in torch.randperm(3, generator=chance):
                for t in inputs:
                    t.grad = None
                start = time.perf_counter()
                ways[way]().backward(torch.ones_like(x))
                if device != "cpu":
                    getattr(torch, device).synchronize()
                seconds[way].append(time.perf_counter() - start)
        ours, of_lora, of_loop = (statistics.median(t[5:]) for t in seconds)
        kept, _, kept_by_loop = (saved_bytes(way, inputs) for way in ways)
        bound = 4 * (tokens * (r + n + n * r) + n * width * r)
        rows.append({"tokens, width, r, n": f"{tokens}, {width}, {r}, {n}",
                     "time / LoRA of rank n r": round(ours / of_lora, 3),
                     "time / loop": round(ours / of_loop, 3),
                     "bytes / loop": round(kept / kept_by_loop, 3),
                     "bytes / bound": round(kept / bound, 3)})
    return rows


# ---- Options ---------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train_toy.py: {message}\n")
    modes = parser.add_mutually_exclusive_group()
    for mode in ("paper", "cost", "tune"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.add_argument("--seed", type=int, help="of the main run, 0 if not given")
    parser.add_argument("--heads", type=int, choices=range(1, 33), metavar="N", help="N itself")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the heads specialise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured")
    options = parser.parse_args()
    if options.mode and (options.check or (options.seed, options.heads) != (None, None)):
        parser.error("--seed, --heads and --check belong to the main run")
    try:                                # what would fail after training fails before it
        torch.ones(1, device=options.device)
        open(options.json or os.devnull, "a").close()
    except Exception as error:
        parser.error(str(error).splitlines()[0])
    show_rows = lambda rows: table(rows[0], [row.values() for row in rows])
    result, display = (
        (cost(options.device), show_rows) if options.mode == "cost" else
        (tune(options.device), show_rows) if options.mode == "tune" else
        (all_seeds(REPORTED_SEEDS, options.device), show_paper) if options.mode == "paper" else
        (measure(options.seed or 0, options.heads, options.device), show))
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
    except BrokenPipeError:             # piped to head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
