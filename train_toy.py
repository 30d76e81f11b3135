# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are A, the heads and the router worth?

    python train_toy.py                                 one run: half a minute on a CPU
    python train_toy.py --seed 1100 --seeds 20 --all    README's table: 15 minutes

The task is to encipher sequences of symbols. There are three domains, each with its own
substitution cipher, but no label says which domain a sequence is from. In domain 0:

    input:   a m g f m j ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   b j l k j d ...    the same symbols, enciphered

A transformer of two blocks learns one set of ciphers and is frozen. Then an adapter on
o_proj, the output projection of the last attention, learns new ciphers.

The task is designed so that a router helps. The input x of o_proj shows the domain,
because each domain uses five symbols of its own four times as often as the others (in a
harder test, on which nothing is trained, twice as often). The answer depends on domain
and symbol together: on seed 0, f becomes k in domain 0, but l in domain 1. However, x
is nearly a domain part plus a symbol part, and so is a LoRA's B A x. So combining the
parts is mostly left to the MLP after it. A ReLU after A, or gates computed from
x, combine them in the update.

`run` is the experiment in five parts, each on a claim of the paper.
"""
import argparse
import copy
import math
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

from hydralora import (
    HydraLoRALinear, TinyConfig, TinyTransformer, hook_gates, hydralora_layers,
    inject_hydralora, num_heads_from_corpus, record_gates)

# ---- Settings ----
DOMAINS = 3
SYMBOLS = 15  # 0 .. SYMBOLS - 1; the token SYMBOLS is the question mark
LETTERS = "abcdefghijklmno?"
OWN = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]  # every third
FREQUENCIES, HARDER = (  # of symbols in each domain: (DOMAINS, SYMBOLS)
    F.normalize(torch.where(OWN, times, 1.0), p=1) for times in (4.0, 2.0))
LENGTH = 32  # plaintext symbols in a sequence
BATCH = 24  # sequences
STEPS = 400  # of each training
TEST = 500  # sequences
WATCHED = (0, 5, 10, 20, 100, STEPS)  # steps after which we look at the heads
EARLY = 20  # steps in part 5; A has hardly moved
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "HydraLoRA, random router", "LoRA MoE",
            "HydraLoRA, true labels", "HydraLoRA")  # of `methods`; --all adds the others

Data = namedtuple("Data", "x h targets domain")  # x and h: (count, LENGTH, width)
Row = namedtuple("Row", "size accuracy harder rarest")  # parameters; percents


# ---- The data ----
def sample(count, batch, ciphers, frequencies, seed, options):
    """A list of batches: plain and targets (batch, LENGTH), and domain (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.tensor(options.proportions).multinomial(
        count * batch, True, generator=generator)
    plain = frequencies[domain].multinomial(LENGTH, True, generator=generator)
    targets = ciphers[domain[:, None], plain]
    return [*zip(*(t.to(options.device).split(batch) for t in (plain, targets, domain)))]


def best_possible(texts, ciphers, frequencies, options):
    """The accuracy (%) of the likeliest answers, if the ciphers are known, and the domain
    is inferred: from the symbol to encipher alone, and from the whole sequence."""
    plain = texts[0].cpu()
    answers = F.one_hot(ciphers, SYMBOLS)[:, plain]  # (DOMAINS, count, LENGTH, SYMBOLS)
    prior = torch.tensor(options.proportions).log()[:, None, None]
    symbol = frequencies.log()[:, plain]  # (DOMAINS, count, LENGTH)
    for evidence in (symbol, symbol.sum(-1, keepdim=True)):
        p = (prior + evidence).softmax(0)[..., None]  # of each domain
        yield 100 * (p * answers).sum(0).amax(-1).mean().item()


def by_domain(values, domain):
    """The mean of values (count, ...) in each domain: (DOMAINS, ...)."""
    return F.normalize(F.one_hot(domain, DOMAINS).T.to(values), p=1) @ values


# ---- The model, cut at the last o_proj: what is before it runs only once ----
def encode(model, plain):
    """At the question marks, the input x of the last o_proj, and the hidden state h to
    which its output is added: each (count, LENGTH, width)."""
    first, last = model.layers
    h = first(model.embed(F.pad(plain, (0, LENGTH), value=SYMBOLS)))
    return last.attention(h)[:, LENGTH:].clone(), h[:, LENGTH:].clone()


def predict(model, data, gates=None):
    """The rest of the model: Data -> logits (count, LENGTH, SYMBOLS + 1). If given,
    gates(w, domain) replaces the router's w (count, LENGTH, n)."""
    x, h, targets, domain = data
    last = model.layers[1]
    with hook_gates(model, lambda name, w: gates(w, domain)) if gates else nullcontext():
        h = h + last.o_proj(x)
        h = h + last.mlp(h)
    return model.lm_head(model.norm(h))


def answer_loss(model, data, gates=None):
    x, h, targets, domain = data
    return F.cross_entropy(predict(model, data, gates).mT, targets)


@torch.no_grad()
def accuracy(model, data, gates=None):
    """Percent of correct symbols in each sequence: (count,)."""
    x, h, targets, domain = data
    return 100 * (predict(model, data, gates).argmax(-1) == targets).float().mean(1)


def gates_and_accuracy(model, data):
    """The gates w (count, LENGTH, n) of the adapted layer, and the accuracy (count,)."""
    with record_gates(model) as recorded:
        correct = accuracy(model, data)
    [w] = recorded.values()
    return w, correct


# ---- Training ----
def train(model, loss_of, batches, lr, router_rate=1.0, watch=lambda steps: None):
    """One pass of AdamW. The learning rate rises to lr, for a router to router_rate * lr,
    and falls again. Calls watch(steps) after 0, 1, ..., len(batches) steps. Returns the
    mean loss of each quarter."""
    others, routers = ([p for name, p in model.named_parameters() if ("router" in name) == routed]
                       for routed in (False, True))
    optimizer = torch.optim.AdamW([dict(params=others), dict(params=routers)],
                                  betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # cycle_momentum would overwrite betas
        optimizer, [lr, router_rate * lr], total_steps=len(batches), cycle_momentum=False)
    losses = []
    for steps, batch in enumerate(batches):
        watch(steps)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    watch(len(batches))
    return [quarter.mean().item() for quarter in torch.stack(losses).chunk(4)]


def pretrain(batches, seed, device):
    """A frozen model that has learnt the ciphers, and its mean loss in each quarter."""
    torch.manual_seed(seed)
    config = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_hidden_layers=2, num_attention_heads=8)
    model = TinyTransformer(config).to(device)

    def loss_of(model, batch):
        plain, targets, domain = batch
        x, h = encode(model, plain)
        # With the auxiliary loss, the first block finds which symbol each ? stands for, so
        # the last attention can find the domain. Else, heads follow it on fewer seeds.
        auxiliary = F.cross_entropy(model.lm_head(model.norm(h)).mT, plain)
        return answer_loss(model, Data(x, h, targets, domain)) + 2.0 * auxiliary

    quarters = train(model, loss_of, batches, 3e-3)
    return model.requires_grad_(False), quarters


# ---- The methods ----
class LoRAExperts(HydraLoRALinear):
    """LoRA MoE (Eqs. 5 and 6): sum_i w_i B_i A_i x. If shared_B, there is only one B."""

    def __init__(self, base, shared_B=False, **arguments):
        super().__init__(base, **arguments)
        A = self.lora_A.new_empty(self.num_heads, self.r, self.in_features)  # (n, r, k)
        self.lora_A = nn.Parameter(A.uniform_(-1, 1) / math.sqrt(self.in_features))
        if shared_B:
            self.lora_B = nn.Parameter(self.lora_B.detach()[:1].clone())  # (1, d, r)

    def forward(self, x):
        y, x = self.base(x), x.to(self.lora_A.dtype)  # (..., d), (..., k)
        z = torch.einsum("...k,nrk->...nr", self.lora_dropout(x), self.lora_A)
        u = self.router(x)[..., None] * (self.scaling * z)  # (..., n, r)
        return y + torch.einsum("...nr,ndr->...d", u, self.lora_B).to(y.dtype)


class ReLULoRA(HydraLoRALinear):
    """B ReLU(A x), for num_heads=1, so that the only gate is 1."""

    def forward(self, x):
        y, x = self.base(x), x.to(self.lora_A.dtype)  # (..., d), (..., k)
        z = F.linear(self.lora_dropout(x), self.lora_A).relu()  # (..., r)
        u = self.router(x) * (self.scaling * z)  # gate 1, so that no .grad is None
        return y + F.linear(u, self.lora_B[0]).to(y.dtype)


# n: heads; one head is a LoRA. gates(w, domain) replaces the router's w. random: the
# parameter that stays at its random start.
Method = namedtuple("Method", "n r lr layer gates random",
                    defaults=(HydraLoRALinear, None, None))


def methods(n, r, k, d):
    """Name -> Method, for an adapted layer of shape (d, k).

    Ranks are set for about HydraLoRA's size, r k + n r d + n k parameters, except where
    a name says "full rank", "same rank", "random" or "true labels". Learning rates are the
    best of .02, .08, .16, .32 and .64 (--seeds 10 --all --lr X).
    """
    size = r * k + n * r * d  # without a router, which a LoRA does not have
    lora_rank = math.ceil((size + n * k) / (k + d))

    def rank(size_per_rank):
        return max(1, round(size / size_per_rank))

    def labels(w, domain):
        return F.one_hot(domain, DOMAINS).to(w)[:, None].expand_as(w)

    return {
        "LoRA": Method(1, lora_rank, 0.08),
        "LoRA, full rank": Method(1, min(k, d), 0.08),
        "LoRA with a ReLU": Method(1, lora_rank, 0.16, ReLULoRA),
        "HydraLoRA, equal gates": Method(  # Fig. 6, w/o gate
            n, r, 0.16, gates=lambda w, domain: torch.full_like(w, 1 / n)),
        "HydraLoRA, random router": Method(n, r, 0.16, random="router.weight"),
        "HydraLoRA, random A": Method(n, r, 0.32, random="lora_A"),
        "LoRA MoE": Method(n, rank(n * (k + d)), 0.16, LoRAExperts),
        "LoRA MoE, same rank": Method(n, r, 0.16, LoRAExperts),
        "one A per head, shared B": Method(
            n, rank(n * k + d), 0.16, partial(LoRAExperts, shared_B=True)),
        "LoRA-Split": Method(DOMAINS, rank(DOMAINS * (k + d)), 0.16, LoRAExperts, labels),
        "HydraLoRA, true labels": Method(DOMAINS, r, 0.16, gates=labels),
        "HydraLoRA": Method(n, r, 0.32)}  # 0.16 is as good


def adapt(frozen, method, target, seed):
    """A copy of the frozen model with an adapter, and the adapted layer.

    Methods of equal n start from the same Wg, and methods with one A of equal rank from the
    same A. The offsets keep them apart from pretrain's random numbers.
    """
    model = copy.deepcopy(frozen)
    torch.manual_seed(seed + 1_000_000)
    inject_hydralora(model, f"layers.1.{target}", method.layer,
                     num_heads=method.n, r=method.r, lora_alpha=2 * method.r)
    [layer] = hydralora_layers(model).values()
    torch.manual_seed(seed + 2_000_000)
    layer.router.reset_parameters()
    layer.router.requires_grad_(method.n > 1 and not method.gates)
    if method.random:
        layer.get_parameter(method.random).requires_grad_(False)
    return model, layer


# ---- Parts 3 to 5 ----
def nmi(w, domain):
    """Normalised mutual information of domain and head, if each token's head is drawn with
    the probabilities w (count, LENGTH, n): 2 I(domain; head) / (H(domain) + H(head))."""
    joint = F.one_hot(domain).to(w).T @ w.mean(1) / len(w)  # (domains, n)
    of_domain, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * (of_domain + of_head - of_both) / (of_domain + of_head or 1.0)


def print_heads(model, test, plain):
    """Part 3, after training."""
    print("\n   A sequence of each domain, the answer (* before an error), and the head with the\n"
          "   largest gate:\n")
    w, correct = gates_and_accuracy(model, test)
    answers = predict(model, test).argmax(-1)  # (count, LENGTH)
    for i in map(test.domain.tolist().index, range(DOMAINS)):
        marks = (" *"[wrong] for wrong in answers[i] != test.targets[i])
        print(f"   domain {test.domain[i]}", *(f" {LETTERS[s]}" for s in plain[i]), sep="")
        print("   answer  ", *(mark + LETTERS[a] for mark, a in zip(marks, answers[i])), sep="")
        print("   head    ", *(f" {head}" for head in w[i].argmax(-1)), "\n", sep="")

    print("   Mean gate of each head, and points of accuracy lost without it:\n")
    n = w.shape[-1]
    gates = by_domain(w.mean(1), test.domain)  # (DOMAINS, n)
    lost = [by_domain(correct - accuracy(model, test, lambda w, _: w * others), test.domain)
            for others in 1 - torch.eye(n, device=w.device)]
    print("            ", *(f" gate {i} lost " for i in range(n)), sep="|")
    for i in range(DOMAINS):
        points = (each[i].round(decimals=1) + 0 for each in lost)  # + 0: no -0.0
        print(f"   domain {i} ", *map("  {:.2f} {:5.1f} ".format, gates[i], points), sep="|")


def print_merged(model, batches, tests):
    """Part 4. Returns its numbers."""
    print("\n4. Merging needs the same gates for all tokens. What is left (Sec. 3.2.2)?\n")
    w = torch.cat([gates_and_accuracy(model, data)[0].mean(1) for data in batches])
    once, each = w.mean(0), by_domain(w, torch.cat([data.domain for data in batches]))
    ways = {  # with fixed gates, a layer computes the same as when merged
        "not merged": None,
        "merged once, for all": lambda w, domain: once.expand_as(w),
        "merged for each domain": lambda w, domain: each[domain, None].expand_as(w)}
    print("                             accuracy (%)  worst domain  harder test (%)")
    numbers = {}
    for way, gates in ways.items():
        correct, harder = (accuracy(model, data, gates) for data in tests)
        worst = by_domain(correct, tests[0].domain).min()
        found = [t.item() for t in (correct.mean(), worst, harder.mean())]
        print("   {:25}{:13.1f}{:14.1f}{:17.1f}".format(way, *found))
        numbers |= zip((f"{way} (%)", f"{way}, worst domain", f"{way}, harder test"), found)
    gain = numbers["merged for each domain (%)"] - numbers["not merged (%)"]
    print("\n   Gates are means in training. The last line needs the domain, as true labels do.\n")
    return numbers | {"merged for each domain - not merged": gain}


def overlap(one, other):
    """Of two LoRAs: the overlap of the row spaces of A, and of the column spaces of B,
    which is the mean squared cosine of the principal angles."""
    for U, V in ((one.lora_A.T, other.lora_A.T), (one.lora_B[0], other.lora_B[0])):
        U, V = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q
        yield (U.T @ V).square().sum().item() / U.shape[1]


def is_observation_2(of_A, of_B):
    """Whether A is alike and B is not: 1 - of_A is at most half of 1 - of_B."""
    return 1 - of_A <= (1 - of_B) / 2


def print_apart(frozen, training, test, options, seed):
    """Part 5. Returns its numbers."""
    print("5. Of LoRAs that are trained apart, are the A's alike, and the B's not (Fig. 3)?\n")
    layers, learnt = {EARLY: [], STEPS: []}, {EARLY: [], STEPS: []}
    for only, start in ((0, seed), (1 % DOMAINS, seed), (0, seed + 500_000)):
        own, own_test = (Data(*(t[data.domain == only] for t in data)) for data in (training, test))
        batches = ([*map(Data, *(t.split(BATCH) for t in own))] * STEPS)[:STEPS]
        model, layer = adapt(frozen, Method(1, options.rank, 0.04), options.target, start)

        def watch(steps):
            if steps in layers:
                learnt[steps].append(accuracy(model, own_test).mean().item())
                layers[steps].append(copy.deepcopy(layer))

        train(model, answer_loss, batches, 0.04, watch=watch)

    print(f"   Overlap (1: the same space) after {EARLY} steps, near the start, and at the end:\n")
    columns, numbers = ("A early", "B early", "A at end", "B at end"), {}
    print(f"   {'':24}", *map("{:>9}".format, columns))
    for pair, i, j in (("two domains, one start", 0, 1), ("one domain, two starts", 0, 2),
                       ("two domains, two starts", 1, 2)):
        found = [value for each in layers.values() for value in overlap(each[i], each[j])]
        print(f"   {pair:24}", *map("{:9.2f}".format, found))
        numbers |= zip((f"{pair}, {column}" for column in columns), found)
    chance = [min(1.0, options.rank / width) for width in reversed(layer.weight.shape)]
    print(f"   {'by chance':24}", *map("{:9.2f}".format, chance * 2))
    print("   accuracy on own domain {:11.1f}{:20.1f}\n".format(*map(mean, learnt.values())))
    first = [*numbers.values()]
    print("   Observation II, A alike and B not in the first row: {} early, {} at the end.".format(
        *(("no", "yes")[is_observation_2(*first[i:i + 2])] for i in (0, 2))))
    return numbers


# ---- The experiment ----
def run(seed, options):
    """The experiment on one seed. Returns name -> Row and name -> number."""
    torch.set_num_threads(1)  # the same digits on any number of cores
    print(f"HydraLoRA on {DOMAINS} hidden domains: seed {seed}\n")
    generator = torch.Generator().manual_seed(seed)
    ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
    old, new = torch.stack(ciphers).split(DOMAINS)  # each (DOMAINS, SYMBOLS): symbol -> answer
    pretraining = sample(STEPS, BATCH, old, FREQUENCIES, 1000 * seed, options)
    training = sample(STEPS, BATCH, new, FREQUENCIES, 1000 * seed + 1, options)
    [test] = sample(1, TEST, new, FREQUENCIES, 1000 * seed + 2, options)
    [harder] = sample(1, TEST, new, HARDER, 1000 * seed + 3, options)
    plain, _, domain = test

    print("1. How many heads (Appendix B)?\n")
    corpus = torch.cat([texts[0] for texts in training[:25]])
    found, sse = num_heads_from_corpus(corpus.tolist())
    n = options.heads or found
    print(f"   Error (SSE) of k-means on {len(corpus)} plaintexts with 1, 2, ... centres:")
    print("  ", *map(round, sse))
    print(f"   The elbow of this curve is at {found}. Using {n} heads.\n")

    print("Pre-training on old ciphers. Mean loss of each quarter, with the auxiliary one:")
    frozen, quarters = pretrain(pretraining, seed, options.device)
    print("  ", *map("{:6.2f}".format, quarters))
    batches, tests = ([Data(*encode(frozen, texts[0]), *texts[1:]) for texts in some]
                      for some in (training, (test, harder)))

    print("\n2. Which adapters learn the new ciphers (Tables 2 and 3, Fig. 6)?\n")
    print("                              parameters  accuracy (%)  harder test (%)"
          "  mean loss of each quarter")
    bound = "   {:37}{:14.1f}{:17.1f}".format
    print(bound("before adapting", *(accuracy(frozen, data).mean() for data in tests)))
    d, k = frozen.layers[1].get_submodule(options.target).weight.shape
    rare = min(options.proportions)
    rows, models, course = {}, {}, {}

    def watch(steps):  # name: in the loop
        if name == "HydraLoRA" and steps in WATCHED:
            w, correct = gates_and_accuracy(models[name], tests[0])
            course[steps] = nmi(w, domain), correct.mean().item()

    for name, method in methods(n, options.rank, k, d).items():
        if not (options.all or name in MAIN_RUN):
            continue
        models[name], _ = adapt(frozen, method, options.target, seed)
        quarters = train(models[name], partial(answer_loss, gates=method.gates), batches,
                         options.lr or method.lr, options.router_rate, watch)
        size = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        correct, on_harder = (accuracy(models[name], data, method.gates) for data in tests)
        rarest = by_domain(correct, domain)[options.proportions.index(rare)].item()
        rows[name] = Row(size, correct.mean().item(), on_harder.mean().item(),
                         rarest if rare < max(options.proportions) else None)
        print("   {:25}{:12,}{:14.1f}{:17.1f} ".format(name, *rows[name][:3]),
              *map("{:6.2f}".format, quarters))
    without, inferred = zip(best_possible(test, new, FREQUENCIES, options),
                            best_possible(harder, new, HARDER, options))
    print(bound("best possible without the domain", *without))
    print(bound("best possible, domain inferred", *inferred))
    print("\n   Losses start high, as the frozen model is sure of the old answers. True labels\n"
          "   can beat the last line: they tell the domain.\n")

    print("3. Do HydraLoRA's heads specialise by domain (Sec. 3.2.1)?\n")
    print("   NMI of head and domain (0: independent, 1: each determines the other):\n")
    agreement, learnt = zip(*course.values())
    print("   after steps ", *map("{:5}".format, course))
    print("   NMI         ", *map("{:5.2f}".format, agreement))
    print("   accuracy (%)", *map("{:5.0f}".format, learnt))
    print_heads(models["HydraLoRA"], tests[0], plain)

    numbers = {f"NMI after {steps} steps": value for steps, (value, _) in course.items()}
    numbers["NMI of head and domain"] = agreement[-1]
    for what, pair in (("without the domain", without), ("with it inferred", inferred)):
        numbers |= zip((f"best {what} (%)", f"best {what}, harder test"), pair)
    numbers |= {f"lead over {name}, harder test": rows["HydraLoRA"].harder - row.harder
                for name, row in rows.items() if name != "HydraLoRA"}
    numbers |= print_merged(models["HydraLoRA"], batches, tests)
    everything = Data(*map(torch.cat, zip(*batches)))
    return rows, numbers | print_apart(frozen, everything, tests[0], options, seed)


# ---- Several seeds ----
def print_means(results):
    """README's table, with the rarest domain if one is rare, and the other numbers."""
    rare = results[0][0]["HydraLoRA"].rarest is not None
    header = ["method", "parameters", "accuracy (%)", "HydraLoRA's lead (points) +- std",
              "seeds won", "harder test (%)"]
    header += ["rarest domain (%): mean, least, greatest"] * rare
    print("\n|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for name in results[0][0]:
        sizes, accuracies, harder, rarest = zip(*(rows[name] for rows, _ in results))
        leads = [rows["HydraLoRA"].accuracy - rows[name].accuracy for rows, _ in results]
        won = sum(lead > 0 for lead in leads)
        lead = [f"{mean(leads):+.1f} +- {stdev(leads):.1f}", f"{won}/{len(leads)}"]
        cells = [name, f"{sizes[0]:,}", f"{mean(accuracies):.1f}",
                 *(["", ""] if name == "HydraLoRA" else lead), f"{mean(harder):.1f}"]
        if rare:
            cells.append(f"{mean(rarest):.0f}, {min(rarest):.0f}, {max(rarest):.0f}")
        print("|", " | ".join(cells), "|")
    print()
    for what in results[0][1]:
        values = [numbers[what] for _, numbers in results]
        print(f"{what}: mean {mean(values):.2f}, {min(values):.2f} to {max(values):.2f}")


def parse(arguments=None):
    """The options. Stops with one line if one is wrong."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of ciphers, data and weights")
    add("--seeds", type=int, default=1, help="how many; from two on, prints means")
    add("--all", action="store_true", help="all methods of README's table")
    add("--heads", type=int, help="N; by default, by k-means")
    add("--rank", type=int, default=9, help="r of HydraLoRA")
    add("--target", choices=("o_proj", "up_proj", "down_proj"), default="o_proj",
        help="the adapted layer of the last block")
    add("--lr", type=float, help="for all methods; by default, each method's best")
    add("--router-rate", type=float, default=1.0,
        help="the router's learning rate, relative to A's and B's; 8 helps rare domains")
    add("--proportions", type=float, nargs=DOMAINS, default=[1.0] * DOMAINS,
        help="how often each domain occurs, such as 85 10 5")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    options = parser.parse_args(arguments)
    for name in ("seeds", "heads", "rank", "lr", "router_rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not min(options.proportions) > 0.02 * sum(options.proportions):
        parser.error("--proportions must each be over 2% of their sum")
    try:
        torch.zeros(1, device=options.device).item()
    except Exception:
        parser.error(f"--device {options.device} is not available")
    return options


def main():
    options = parse()
    results = [run(options.seed + i, options) for i in range(options.seeds)]
    if options.seeds > 1:
        print_means(results)


if __name__ == "__main__":
    main()
