# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the "HydraLoRA in one file" authors
"""Do the heads of HydraLoRA specialise, and what are A, the heads and the router worth?

    python train_toy.py                                 one run: half a minute on a CPU
    python train_toy.py --target q_proj v_proj          on the paper's layers: one minute
    python train_toy.py --seed 1100 --seeds 20 --all    README's table: 15 minutes

The task is to encipher sequences of symbols. Each of three domains has its own cipher,
but no label says which domain a sequence is from. In domain 0:

    input:   a m g f m j ...  ? ? ? ? ? ? ...    plaintext, then as many question marks
    target:                   b j l k j d ...    the same symbols, enciphered

A transformer of two blocks learns one set of ciphers and is frozen. An adapter on o_proj,
the output projection of the last attention, learns new ciphers.

The task is designed so that a router helps. Each domain uses five symbols of its own
four times as often as the others (twice, in the harder test), so the input x of o_proj
shows the domain. The answer depends on domain and symbol together: on seed 0, f becomes
k in domain 0, but l in domain 1. A LoRA can hardly combine the two, because x is nearly
a domain part plus a symbol part, and B A x is linear in x. A ReLU after A can combine
them, and so can gates that depend on x. On up_proj and down_proj, a LoRA is enough.

`run` is the experiment, in five parts.
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
SYMBOLS = 15  # the token SYMBOLS is the question mark
LETTERS = "abcdefghijklmno?"
OWN = torch.arange(SYMBOLS) % DOMAINS == torch.arange(DOMAINS)[:, None]
FREQUENCIES, HARDER = (  # of symbols in each domain: (DOMAINS, SYMBOLS)
    F.normalize(torch.where(OWN, times, 1.0), p=1) for times in (4.0, 2.0))
LENGTH = 32  # plaintext symbols per sequence
BATCH = 24  # sequences
STEPS = 400  # per training
TEST = 500  # sequences
WATCHED = (0, 5, 10, 20, 100, STEPS)  # steps after which we look at heads
EARLY = 20  # steps: A has hardly moved
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # of a block
QKV = LAYERS[:3]
AT_PLAINTEXT = LAYERS[1:3]  # others' outputs there are unused
MAIN_RUN = ("LoRA", "LoRA with a ReLU", "HydraLoRA, random router", "LoRA MoE",
            "HydraLoRA, true labels", "HydraLoRA")  # --all adds others

Data = namedtuple("Data", "x h targets domain")
Row = namedtuple("Row", "size accuracy harder rarest")  # parameters, then percents


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
    """The accuracy (%) of the likeliest answers, given the ciphers: with the domain
    inferred from the symbol to encipher alone, then from the whole sequence."""
    plain = texts[0].cpu()
    answers = F.one_hot(ciphers, SYMBOLS)[:, plain]  # (DOMAINS, count, LENGTH, SYMBOLS)
    prior = torch.tensor(options.proportions).log()[:, None, None]
    symbol = frequencies.log()[:, plain]  # (DOMAINS, count, LENGTH)
    for evidence in (symbol, symbol.sum(-1, keepdim=True)):
        p = (prior + evidence).softmax(0)[..., None]  # of each domain
        yield 100 * (p * answers).sum(0).amax(-1).mean().item()


# ---- The model, cut before the adapters: what is before runs only once ----
def encode(model, plain, attention_adapted=False):
    """At the question marks, the input x of the last o_proj, and the hidden state h to
    which its output is added: each (count, LENGTH, width). If attention_adapted, x is h
    at all 2 * LENGTH positions."""
    first, last = model.layers
    x = h = first(model.embed(F.pad(plain, (0, LENGTH), value=SYMBOLS)))
    if not attention_adapted:
        x = last.attention(h)[:, LENGTH:].clone()
    return x, h[:, LENGTH:].clone()


def predict(model, data, gates=None):
    """The rest of the model: Data -> logits (count, LENGTH, SYMBOLS + 1). If given,
    gates(w, domain) replaces a router's w (count, tokens, n)."""
    x, h, targets, domain = data
    last = model.layers[1]
    with hook_gates(last, lambda name, w: gates(w, domain)) if gates else nullcontext():
        if x.shape[1] > LENGTH:  # attention_adapted
            x = last.attention(x)[:, LENGTH:]
        h = h + last.o_proj(x)
        h = h + last.mlp(h)
    return model.lm_head(model.norm(h))


@torch.no_grad()
def accuracy(model, data, gates=None):
    """Percent of correct symbols of each sequence: (count,)."""
    return 100 * (predict(model, data, gates).argmax(-1) == data[2]).float().mean(1)


def gates_and_accuracy(model, data):
    """Layer -> w (count, tokens, n), and the accuracy (count,)."""
    with record_gates(model.layers[1]) as w:
        correct = accuracy(model, data)
    return w, correct


# ---- Training ----
def adamw(model, lr, router_rate=1.0):
    """update(loss), for STEPS steps. The learning rate rises to lr, for a router to
    router_rate * lr, and falls again."""
    others, routers = ([p for name, p in model.named_parameters() if ("router" in name) == routed]
                       for routed in (False, True))
    optimizer = torch.optim.AdamW([dict(params=others), dict(params=routers)],
                                  betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # cycle_momentum would overwrite betas
        optimizer, [lr, router_rate * lr], total_steps=STEPS, cycle_momentum=False)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return update


def pretrain(batches, seed, device):
    """A frozen model that has learnt the ciphers."""
    torch.manual_seed(seed)
    config = TinyConfig(SYMBOLS + 1, 2 * LENGTH, num_hidden_layers=2, num_attention_heads=8)
    model = TinyTransformer(config).to(device)
    update = adamw(model, 3e-3)
    for plain, targets, domain in batches:
        data = Data(*encode(model, plain), targets, domain)
        # This teaches the first block which symbol each ? is, so that the last attention can
        # find the domain. Without it, heads follow the domain on fewer seeds.
        auxiliary = F.cross_entropy(model.lm_head(model.norm(data.h)).mT, plain)
        update(F.cross_entropy(predict(model, data).mT, targets) + 2.0 * auxiliary)
    print("Pre-training on old ciphers. Accuracy (%) on the last batch:",
          f"{accuracy(model, data).mean():.1f}\n")
    return model.requires_grad_(False)


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
    """B ReLU(A x), for num_heads=1."""

    def forward(self, x):
        y, x = self.base(x), x.to(self.lora_A.dtype)  # (..., d), (..., k)
        z = F.linear(self.lora_dropout(x), self.lora_A).relu()  # (..., r)
        u = self.router(x) * (self.scaling * z)  # gate 1, so that no .grad is None
        return y + F.linear(u, self.lora_B[0]).to(y.dtype)


# n: heads; one head is a LoRA. gates(w, domain) replaces the router's w. random: the
# parameter that is not trained. qkv_lr: lr on q_proj, k_proj and v_proj.
Method = namedtuple("Method", "n r lr layer gates random qkv_lr",
                    defaults=(HydraLoRALinear, None, None, None))


def methods(n, r, k, d):
    """Name -> Method, for adapted layers of the mean shape (d, k).

    Ranks are set for about HydraLoRA's size, r k + n r d + n k parameters, except where
    a name says "full rank", "same rank", "random" or "true labels". lr is the best of .02,
    .08, .16, .32 and .64 on o_proj (seeds 0 to 9), and qkv_lr of .02, .04, .08, .16 and .32
    on q_proj and v_proj (rank 4, seeds 0 to 4).
    """
    size = r * k + n * r * d  # without a router, which a LoRA does not have
    lora_rank = math.ceil((size + n * k) / (k + d))

    def rank(size_per_rank):
        return max(1, round(size / size_per_rank))

    def labels(w, domain):
        return F.one_hot(domain, DOMAINS).to(w)[:, None].expand_as(w)

    return {
        "LoRA": Method(1, lora_rank, 0.08),
        "LoRA, full rank": Method(1, min(k, d), 0.08, qkv_lr=0.02),
        "LoRA with a ReLU": Method(1, lora_rank, 0.16, ReLULoRA),
        "HydraLoRA, equal gates": Method(  # Fig. 6, w/o gate
            n, r, 0.16, gates=lambda w, domain: torch.full_like(w, 1 / n)),
        "HydraLoRA, random router": Method(n, r, 0.16, random="router.weight"),
        "HydraLoRA, random A": Method(n, r, 0.32, random="lora_A"),
        "LoRA MoE": Method(n, rank(n * (k + d)), 0.16, LoRAExperts),
        "LoRA MoE, same rank": Method(n, r, 0.16, LoRAExperts, qkv_lr=0.08),
        "one A per head, shared B": Method(
            n, rank(n * k + d), 0.16, partial(LoRAExperts, shared_B=True)),
        "LoRA-Split": Method(DOMAINS, rank(DOMAINS * (k + d)), 0.16, LoRAExperts, labels),
        "HydraLoRA, true labels": Method(DOMAINS, r, 0.16, gates=labels),
        "HydraLoRA": Method(n, r, 0.32, qkv_lr=0.16)}


def adapt(frozen, method, targets, seed):
    """A copy of the frozen model with adapters in the last block, and a list of these.

    On each layer, methods of equal n and rank start from the same A and Wg. The offsets
    keep them apart from pretrain's random numbers.
    """
    model = copy.deepcopy(frozen)
    block = model.layers[1]
    for i, target in enumerate(sorted(targets, key=LAYERS.index)):
        torch.manual_seed(seed + 1_000_000 + 10_000 * i)
        inject_hydralora(block, target, method.layer,
                         num_heads=method.n, r=method.r, lora_alpha=2 * method.r)
        layer = block.get_submodule(target)
        torch.manual_seed(seed + 2_000_000 + 10_000 * i)
        layer.router.reset_parameters()
        layer.router.requires_grad_(method.n > 1 and not method.gates)
        if method.random:
            layer.get_parameter(method.random).requires_grad_(False)
    return model, [*hydralora_layers(block).values()]


# ---- Parts 3 to 5: each returns its numbers ----
def nmi(w, label):
    """Normalised mutual information of label (count,) and head, if each token's head is
    drawn with the probabilities w (count, tokens, n): 2 I / (H(label) + H(head))."""
    joint = F.one_hot(label).to(w).T @ w.mean(1) / len(w)  # (labels, n)
    of_label, of_head, of_both = (
        torch.special.entr(p).sum().item() for p in (joint.sum(1), joint.sum(0), joint))
    return 2 * max(0.0, of_label + of_head - of_both) / (of_label + of_head or 1.0)


def print_sequences(model, gates, heads, test, plain):
    answers = predict(model, test).argmax(-1)  # (count, LENGTH)
    for domain in range(DOMAINS):
        i = test.domain.tolist().index(domain)
        pairs = zip(answers[i], test.targets[i])
        print(f"   domain {domain}", *(LETTERS[symbol] for symbol in plain[i]))
        print("   answer  ", *(" *"[a != target] + LETTERS[a] for a, target in pairs), sep="")
        print("   head    ", *heads[i].tolist())
        for layer, w in gates.items():
            means = w[test.domain == domain].mean((0, 1))
            print(f"   gates of {layer} in domain {domain}:", *map("{:.2f}".format, means))
        print()


def print_heads(models, test, plain):
    """models: steps -> HydraLoRA after these."""
    print("\n3. Do HydraLoRA's heads specialise by domain (Sec. 3.2.1)?\n")
    print("   NMI of head and domain (0: independent, 1: each determines the other):\n")
    seen = {steps: gates_and_accuracy(model, test) for steps, model in models.items()}
    gates, _ = seen[STEPS]
    print("   after steps            ", *map("{:5}".format, seen))
    for layer in gates:
        course = [nmi(w[layer], test.domain) for w, _ in seen.values()]
        tokens = "all positions" if layer in QKV else "question marks"
        print(f"   {f'{layer}, {tokens}':23}", *map("{:5.2f}".format, course))
    print("   accuracy (%)           ", *(f"{correct.mean():5.0f}" for _, correct in seen.values()))
    numbers = {f"NMI after {steps} steps": x for steps, x in zip(seen, course)}
    numbers["NMI of head and domain"] = course[-1]

    print("\n   A sequence of each domain, the answer (* before an error), the head of "
          f"{layer}\n   with the largest gate, and mean gates in all sequences of its domain:\n")
    used = {layer: w[:, :LENGTH] if layer in AT_PLAINTEXT else w[:, -LENGTH:]
            for layer, w in gates.items()}
    print_sequences(models[STEPS], gates, used[layer].argmax(-1), test, plain)

    for layer, w in used.items():
        found = nmi(w, test.domain), nmi(w.flatten(0, 1)[:, None], plain.flatten())
        numbers |= zip((f"NMI of {layer} and {what}" for what in ("domain", "symbol")), found)
        tokens = "plaintext" if layer in AT_PLAINTEXT else "question marks"
        print(f"   {layer}, {tokens}: NMI with domain, symbol", *map("{:.2f}".format, found))
        (most, one), (_, other) = sorted(zip(found, ("domain", "symbol")), reverse=True)
        said = f"the {one} more than the {other}" if most > 0.2 else "neither"
        print(f"   {layer}'s heads follow {said}.")
    return numbers


def print_merged(model, batches, test):
    print("\n4. Merging needs the same gates for all tokens. What is left (Sec. 3.2.2)?\n")
    seen = [gates_and_accuracy(model, data)[0] for data in batches]
    domain = torch.cat([data.domain for data in batches])
    w = {layer: torch.cat([gates[layer].mean(1) for gates in seen]) for layer in seen[0]}
    once = {layer: [w[layer].mean(0)] * DOMAINS for layer in w}  # for each domain: (n,)
    each = {layer: [w[layer][domain == i].mean(0) for i in range(DOMAINS)] for layer in w}

    def merged(gates):  # one model for each domain
        correct = []
        for i in range(DOMAINS):
            block = (copied := copy.deepcopy(model)).layers[1]
            for layer in gates:
                setattr(block, layer, block.get_submodule(layer).merge(gates[layer][i]))
            own = Data(*(t[test.domain == i] for t in test))
            correct.append(accuracy(copied, own))
        return torch.cat(correct).mean().item()

    ways = {"not merged": {}, "merged once, for all": once, "merged for each domain": each}
    if len(each) > 1:
        ways |= {f"only {layer}, for each domain": {layer: each[layer]} for layer in each}
    numbers = {f"{way} (%)": merged(gates) for way, gates in ways.items()}
    for way, correct in numbers.items():
        print(f"   {way:35}{correct:8.1f}")
    print("\n   Merged once, {1:.1f}% of answers are right, not {0:.1f}%. Merged for each domain\n"
          "   (which must be known), {2:.1f}% are right.\n".format(*numbers.values()))
    return numbers


def overlap(one, other):
    """Of two LoRAs' row spaces of A, then column spaces of B: the mean squared cosine of
    the principal angles."""
    for U, V in ((one.lora_A.T, other.lora_A.T), (one.lora_B[0], other.lora_B[0])):
        U, V = torch.linalg.qr(U).Q, torch.linalg.qr(V).Q
        yield (U.T @ V).square().sum().item() / U.shape[1]


def print_apart(frozen, training, options, seed):
    print("5. Of LoRAs that are trained apart, are the A's alike, and the B's not (Fig. 3)?\n")
    kept = {EARLY: [], STEPS: []}
    for only, start in ((0, seed), (0, seed + 500_000), (1, seed))[:DOMAINS + 1]:
        own = (t[training.domain == only].split(BATCH) for t in training)
        batches = ([*map(Data, *own)] * STEPS)[:STEPS]
        model, layers = adapt(frozen, Method(1, options.rank, 0.04), options.target, start)
        update = adamw(model, 0.04)
        for steps, batch in enumerate(batches, 1):
            update(F.cross_entropy(predict(model, batch).mT, batch.targets))
            if steps in kept:
                kept[steps].append(copy.deepcopy(layers[-1]))

    print(f"   Overlap (1: the same space) early (after {EARLY} steps) and at the end:\n")
    columns = ("A early", "B early", "A at end", "B at end")
    chance = [min(1.0, options.rank / width) for width in reversed(layers[-1].weight.shape)] * 2
    bounds = [(x + 2) / 3 for x in chance]  # two thirds of the way to 1
    print(" " * 27, *map("{:>9}".format, columns))
    numbers, sentences = {}, []
    for pair, i, j, cause in (("two domains, one start", 0, 2, "start"),
                              ("one domain, two starts", 0, 1, "domain"),
                              ("two domains, two starts", 1, 2, None)):
        if j == 2 and DOMAINS == 1:
            continue
        found = [x for each in kept.values() for x in overlap(each[i], each[j])]
        print(f"   {pair:24}", *map("{:9.2f}".format, found))
        numbers |= zip((f"{pair}, {column}" for column in columns), found)
        alike = [round(x, 3) > bound for x, bound in zip(found, bounds)]
        early, end = (("neither", "the A's", "the B's", "both")[a + 2 * b]
                      for a, b in (alike[:2], alike[2:]))
        if cause:
            said = f"makes {early} alike early, and {end} at the end."
            sentences += [f"   A common {cause} {said}"]
    print(f"   {'by chance':24}", *map("{:9.2f}".format, chance))
    print(f"   {'alike if above':24}", *map("{:9.2f}".format, bounds))
    print("", *sentences, sep="\n")
    return numbers


# ---- The experiment ----
def run(seed, options):
    """Returns name -> Row, and text -> number."""
    torch.set_num_threads(1)  # the same digits on any number of cores
    print(f"HydraLoRA on {DOMAINS} hidden domains (seed {seed})\n")
    generator = torch.Generator().manual_seed(seed)
    ciphers = [torch.randperm(SYMBOLS, generator=generator) for _ in range(2 * DOMAINS)]
    old, new = torch.stack(ciphers).split(DOMAINS)  # each (DOMAINS, SYMBOLS): symbol -> answer
    pretraining = sample(STEPS, BATCH, old, FREQUENCIES, 1000 * seed, options)
    training = sample(STEPS, BATCH, new, FREQUENCIES, 1000 * seed + 1, options)
    [test] = sample(1, TEST, new, FREQUENCIES, 1000 * seed + 2, options)
    [harder] = sample(1, TEST, new, HARDER, 1000 * seed + 3, options)
    plain = test[0]
    bounds = (best_possible(test, new, FREQUENCIES, options),
              best_possible(harder, new, HARDER, options))

    print("1. How many heads (Appendix B)?\n")
    corpus = torch.cat([texts[0] for texts in training[:25]])
    found, sse = num_heads_from_corpus(corpus.tolist())
    n = options.heads or found
    print("   SSE of k-means with 1, 2, ... centres:", *map(round, sse))
    print(f"   The elbow of this curve is at {found}. Using {n} heads.\n")

    frozen = pretrain(pretraining, seed, options.device)
    qkv = bool({*QKV} & {*options.target})
    batches, (test, harder) = (
        [Data(*encode(frozen, texts[0], qkv), *texts[1:]) for texts in some]
        for some in (training, (test, harder)))

    print("2. Which adapters learn the new ciphers (Tables 2 and 3, Fig. 6)?\n")
    print("                              parameters  accuracy (%)  harder test (%)  last loss")
    shapes = [frozen.layers[1].get_submodule(target).weight.shape for target in options.target]
    d, k = (sum(sizes) // len(sizes) for sizes in zip(*shapes))  # means: sizes add up
    uneven = len({*options.proportions}) > 1
    rarest = options.proportions.index(min(options.proportions))
    rows, trained = {}, {}
    for name, method in methods(n, options.rank, k, d).items():
        if not (options.all or name in MAIN_RUN):
            continue
        model, _ = adapt(frozen, method, options.target, seed)
        lr = options.lr or (qkv and method.qkv_lr) or method.lr
        update = adamw(model, lr, options.router_rate)
        if name == "HydraLoRA":
            trained[0] = copy.deepcopy(model)
        for steps, batch in enumerate(batches, 1):
            loss = F.cross_entropy(predict(model, batch, method.gates).mT, batch.targets)
            update(loss)
            if name == "HydraLoRA" and steps in WATCHED:
                trained[steps] = copy.deepcopy(model)

        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        correct, on_harder = (accuracy(model, data, method.gates) for data in (test, harder))
        rows[name] = Row(size, correct.mean().item(), on_harder.mean().item(),
                         correct[test.domain == rarest].mean().item() if uneven else None)
        print("   {:25}{:12,}{:14.1f}{:17.1f}{:11.2f}".format(name, *rows[name][:3], loss))

    numbers = {}
    for what, usual, on_harder in zip((" without the domain", " without labels"), *bounds):
        print(f"   {f'best possible{what}':37}{usual:14.1f}{on_harder:17.1f}")
        numbers[f"best{what} (%)"] = usual
    if uneven:
        numbers |= {f"{name}, rarest domain (%)": row.rarest for name, row in rows.items()}
    print()
    for name, row in rows.items():
        if name in ("LoRA", "LoRA with a ReLU"):
            lead = round(rows["HydraLoRA"].accuracy, 1) - round(row.accuracy, 1)
            print("   HydraLoRA is {:.1f} points {} {}.".format(
                abs(lead), "ahead of" if lead >= 0 else "behind", name))

    numbers |= print_heads(trained, test, plain)
    numbers |= print_merged(trained[STEPS], batches, test)
    everything = Data(*map(torch.cat, zip(*batches)))
    return rows, numbers | print_apart(frozen, everything, options, seed)


# ---- Several seeds ----
def print_means(results):
    print("\n| method | parameters | accuracy (%) | HydraLoRA's lead (points) +- std | seeds won "
          "| harder test (%) |\n|---|---|---|---|---|---|")
    for name in results[0][0]:
        sizes, accuracies, harder, _ = zip(*(rows[name] for rows, _ in results))
        leads = [rows["HydraLoRA"].accuracy - rows[name].accuracy for rows, _ in results]
        won = sum(lead > 0 for lead in leads)
        lead = f"{mean(leads):+.1f} +- {stdev(leads):.1f} | {won}/{len(leads)}"
        lead = " | " if name == "HydraLoRA" else lead
        print(f"| {name} | {sizes[0]:,} | {mean(accuracies):.1f} | {lead} | {mean(harder):.1f} |")
    print()
    for what in results[0][1]:
        values = [numbers[what] for _, numbers in results]
        print(f"{what}: mean {mean(values):.2f}, {min(values):.2f} to {max(values):.2f}")


def parse(arguments=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of data and weights")
    add("--seeds", type=int, default=1, help="from two on, prints means")
    add("--all", action="store_true", help="all methods in README")
    add("--heads", type=int, help="N; by default, k-means")
    add("--rank", type=int, default=9, help="r of HydraLoRA")
    add("--target", nargs="+", choices=LAYERS, default=["o_proj"],
        help="layers of the last block")
    add("--lr", type=float, help="for all methods; by default, each method's best")
    add("--router-rate", type=float, default=1.0,
        help="router's learning rate over others'; 8 helps rare domains")
    add("--proportions", type=float, nargs=DOMAINS, default=[1.0] * DOMAINS,
        help="how often each domain occurs, such as 85 10 5")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("seeds", "heads", "rank", "lr", "router_rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if len({*options.target}) < len(options.target):
        parser.error("--target names a layer twice")
    if not min(options.proportions) > 0.02 * sum(options.proportions):
        parser.error("--proportions must each be over 2% of their sum")
    return options


def main():
    options = parse()
    results = [run(options.seed + i, options) for i in range(options.seeds)]
    if options.seeds > 1:
        print_means(results)


if __name__ == "__main__":
    main()
