"""What the exhaustive expert map costs beside blocking every expert of the model in turn.

PYTHONPATH=scripts python tests/benchmarks/expert_map.py > tests/benchmarks/expert_map.md

With `small` as its argument it runs small models within a minute or two.
"""

import copy
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from moescope import anatomy, capture, expert_map, facts, toy
from moescope.intervene import block_experts, intervene

ROOT = Path(__file__).parents[2]
SMALL = "small" in sys.argv[1:]
POSITIONS = ("readout", "all")
PAIRS, PART, LENGTH = (2, 8, 8) if SMALL else (3, 16, 9)
EXPERTS, LENGTHS = ((8, 16), (6, 10)) if SMALL else ((8, 16, 32, 64), range(6, 15, 2))
SHAPE = toy.Shape(
    "olmoe", layers=2 if SMALL else 8, experts=16, experts_per_token=4, expert_width=32, hidden=64, heads=4, kv_heads=4
)
WIDE = replace(SHAPE, experts=16 if SMALL else 64, experts_per_token=8)
OLMOE_1B_7B = toy.Shape(
    "olmoe", layers=16, experts=64, experts_per_token=8, expert_width=1024, hidden=2048, heads=16, kv_heads=16
)
EQUAL = 1e-5
HIDDEN = (64, 128) if SMALL else (64, 256)
AIMS = {(SHAPE, "readout"): 25, (SHAPE, "all"): 5, (WIDE, "readout"): 80, (WIDE, "all"): 8}


def trained(shape, prompts):
    """A toy model of this shape that has learned the facts as those of the main job have; its parts and prompts."""
    tokenizer = toy.train_tokenizer(prompts)
    tokens, _ = facts.tokenise(tokenizer, prompts)
    model = toy.build(shape, len(tokenizer), seed=0)
    # Without train's check that the facts are in the FFNs, which models with few experts fail: costs are the same.
    toy._fit(model, tokens[~tokens["held_out"]], 0, toy.Recipe(), {})
    model.requires_grad_(False)
    parts = anatomy.find(model)
    held_out = tokens[tokens["held_out"]].reset_index(drop=True)
    return model, parts, capture.in_memory(model, parts, held_out, 256)[1]


def timed(run, *args):
    """Result, and seconds of this process's CPU time, which other work on the machine does not lengthen."""
    start = time.process_time()
    result = run(*args)
    return result, time.process_time() - start


def blocked(parts, layer, expert, ids, where):
    marks = torch.zeros(1, parts.layers[layer].n_experts, dtype=torch.bool)
    marks[:, expert] = True
    at = None
    if where == "readout":
        at = torch.zeros(ids.shape, dtype=torch.bool)
        at[:, -1] = True
    return intervene(parts, block_experts({layer: marks}, at=at))


@torch.no_grad()
def naive(model, parts, prompts, where, pairs):
    """Log-probability and rank of all prompts, of equal length, in one batch, with each of these experts blocked."""
    ids, target = torch.tensor(prompts["token_ids"].tolist()), torch.tensor(prompts["target_id"].tolist())
    scores = []
    for layer, expert in pairs:
        with blocked(parts, layer, expert, ids, where):
            logits = capture.readout_logits(model, ids)
        own = logits.gather(1, target[:, None])
        scores.append(((own - logits.logsumexp(1, keepdim=True))[:, 0], (logits >= own).sum(1)))
    return [torch.stack(column) for column in zip(*scores)]


def compare(model, parts, prompts, where, every=1, pairs=1):
    """Naive blocking and the map in turn: rows of naive s, ours s, ratio; the last results of both.

    With `every` above 1, naive blocking is timed on every such expert alone, and the time multiplied.
    """
    experts = [(layer.index, expert) for layer in parts.layers for expert in range(layer.n_experts)]
    rows = []
    expert_map.measure(model, parts, prompts.iloc[:8], 8, [where])
    for _ in range(pairs):
        log_probs, theirs = timed(naive, model, parts, prompts, where, experts[::every])
        found, ours = timed(expert_map.measure, model, parts, prompts, len(prompts), [where])
        rows.append([theirs * every, ours, theirs * every / ours])
    return np.array(rows), log_probs[0], found


def differences(parts, prompts, log_probs, found):
    """Difference of log-probability of every row of the map, and the row of its prompt."""
    row = pd.Series(np.arange(len(prompts)), prompts["prompt_id"])[found["prompt_id"]].to_numpy()
    place = found["layer"].to_numpy().astype(int) * parts.layers[0].n_experts + found["expert"].to_numpy()
    return np.abs(log_probs.numpy()[place, row] - found["log_prob"].to_numpy()), row


def in_float64(model, prompts, where):
    """Largest difference of all rows of these prompts where both are computed in float64 (and scored in float32)."""
    model = copy.deepcopy(model)
    parts = anatomy.find(model)
    model.double().set_experts_implementation("eager")
    capture.TOLERANCE[torch.float64] = capture.TOLERANCE[torch.float32]
    _, log_probs, found = compare(model, parts, prompts, where)
    return differences(parts, prompts, log_probs, found)[0].max()


def tokens_of(parts, run, *args):
    """Tokens that the layers are called with while this runs."""
    count = 0

    def add(module, args):
        nonlocal count
        count += args[0].shape[:-1].numel()

    hooks = [layer.block.register_forward_pre_hook(add) for layer in parts.layers]
    run(*args)
    for hook in hooks:
        hook.remove()
    return count


def share(prompts):
    """Distinct beginnings of prompts, as a share of their tokens."""
    ids = torch.tensor(prompts["token_ids"].tolist())
    return len(expert_map.Tree.of(ids).row) / ids.numel()


def forward_flop(shape, vocabulary, length):
    """Floating-point operations of one prompt's forward pass: (all tokens of one layer, readout)."""
    d, k = shape.hidden, shape.experts_per_token
    token = 2 * (4 * d * d + shape.experts * d + 3 * k * d * shape.expert_width)
    # The attention's kernel multiplies what the mask hides as well.
    return length * (token + 4 * length * d), 2 * d * vocabulary


def map_flop(shape, vocabulary, length):
    """The same of the readout map of one prompt in a batch of one: clean run, check, experts, variants, readout."""
    d, k, layers = shape.hidden, shape.experts_per_token, shape.layers
    layer, readout = forward_flop(shape, vocabulary, length)
    token = layer / length - 4 * length * d

    def tokens(n):
        """n tokens of this prompt in blocks; each sees the other positions and the block."""
        size = min(expert_map.BLOCK, n)
        filled = -(-n // size) * size
        return filled * (token + 4 * d * (length - 1 + size))

    again = length - length // 2
    return {
        "clean run": layers * layer + 2 * readout,
        "check": (layers - 2) * again * (token + 4 * d * length) + token + 4 * d * length + (again - 1) * 6 * d * d,
        "contributions": layers * k * 6 * d * shape.expert_width,
        "variants": sum(tokens(k * below) for below in range(1, layers)),
        "readouts": layers * k * readout,
    }


def counted(run, *args):
    """Floating-point operations of the matrix products that `run` makes."""
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def measure_counts():
    shape, vocabulary, length = replace(SHAPE, layers=6, experts=16, experts_per_token=4), 500, 10
    model = toy.build(shape, vocabulary, seed=0).eval().requires_grad_(False)
    # Products of the other implementations are not counted.
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    parts = anatomy.find(model)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    prompt = pd.DataFrame({"prompt_id": [0], "token_ids": ids.tolist(), "target_ids": [[1]]})
    layer, readout = forward_flop(shape, vocabulary, length)
    formula = shape.layers * layer + readout, sum(map_flop(shape, vocabulary, length).values())
    counts = counted(capture.readout_logits, model, ids), counted(expert_map.measure, model, parts, prompt, 1)
    print("## Counted arithmetic\n")
    say(
        f"""Floating-point operations of all matrix products of the readout map, for one prompt of {length} tokens alone
        (in a batch the check is of its first prompt only). First the formulas against torch's counter on a small model
        ({shape.layers} layers, {shape.hidden} dimensions, top-{shape.experts_per_token} of {shape.experts})."""
    )
    table(
        ["MFLOP", "formula", "counted", "difference"],
        *(
            [name, f"{a / 1e6:.2f}", f"{b / 1e6:.2f}", f"{a / b - 1:+.1%}"]
            for name, a, b in zip(("forward pass", "readout map"), formula, counts)
        ),
    )
    vocabulary = 50_304
    rows = []
    for n in (6, 10, 14):
        layer, readout = forward_flop(OLMOE_1B_7B, vocabulary, n)
        forward, pieces = OLMOE_1B_7B.layers * layer + readout, map_flop(OLMOE_1B_7B, vocabulary, n)
        whole = sum(pieces.values())
        everything = OLMOE_1B_7B.layers * OLMOE_1B_7B.experts
        gflop = [f"{x / 1e9:.1f}" for x in (forward, whole, *pieces.values())]
        rows.append(
            [n, gflop[0], gflop[1], f"{whole / forward:.1f}", f"{everything * forward / whole:.0f}", *gflop[2:]]
        )
    say(
        """Then by formula for OLMoE-1B-7B (GFLOP per prompt): the map in forward passes' worth, and what blocking all
        of its 1024 experts in turn costs beside it."""
    )
    pieces = list(map_flop(SHAPE, 1, 2))
    table(["tokens", "forward pass", "map", "passes", "naive / map", *pieces], *rows)


def say(text):
    """A paragraph, wrapped."""
    print(fill(" ".join(text.split()), 118))


def table(header, *rows):
    print("\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)) + "\n")
    sys.stdout.flush()


def spread(values):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def name_of(shape):
    return f"{shape.layers} layers, {shape.experts} experts top-{shape.experts_per_token}"


def measure_ratios(models):
    print("## Ratios\n")
    say(
        f"""Naive blocking runs a full forward pass of all prompts of {LENGTH} tokens for every expert of the model, in
        one batch; after the first pair it is timed on one expert in {PART} and multiplied. The map measures the
        experts that each prompt uses (used: a share of all). Differences of log-probabilities (nats) are those of all
        rows of the map. Prompts with one above {EQUAL:.0e} are run again in float64, all rows of theirs: what is left
        there is the method's, the rest is rounding, which near ties of a router enlarge. Tokens are those that layers
        are called with: what naive blocking computes beside the map. No ratio can be much larger; with all positions
        blocked most tokens of a prompt see a blocked one, and in the layers above all of those are computed for each
        expert."""
    )
    rows = []
    for shape, (model, parts, prompts) in models.items():
        prompts = prompts[prompts["length"] == LENGTH].reset_index(drop=True)
        for where in POSITIONS:
            times, log_probs, found = compare(model, parts, prompts, where)
            times = np.concatenate([times, compare(model, parts, prompts, where, PART, PAIRS - 1)[0]])
            off, row = differences(parts, prompts, log_probs, found)
            naive_s, ours, ratio = map(spread, times.T)
            of = len(prompts) * shape.layers * shape.experts
            above = f"{(off > EQUAL).sum()} of {len(off)}"
            exact = "-"
            if (off > EQUAL).any():
                exact = f"{in_float64(model, prompts.iloc[np.unique(row[off > EQUAL])], where):.0e}"
            rows.append([name_of(shape), where, len(prompts), f"{len(found) / of:.2f}", naive_s, ours, ratio])
            one = tokens_of(parts, naive, model, parts, prompts, where, [(0, 0)]) * shape.layers * shape.experts
            fewer = one / tokens_of(parts, expert_map.measure, model, parts, prompts, len(prompts), [where])
            rows[-1] += [AIMS[shape, where], f"{fewer:.3g}", f"{off.max():.0e}", above, exact]
    header = ["model", "positions", "prompts", "used", "naive, s", "map, s", "ratio", "aim", "tokens, naive / map"]
    header.append("largest difference")
    table([*header, f"above {EQUAL:.0e}", "those prompts in float64"], *rows)


def measure_widths(models, prompts):
    print("## Wider layers\n")
    say(
        f"""Ratios again where layers are wider (experts half as wide as the residual stream), naive blocking run for
        one expert in {PART} and its time multiplied: beside the arithmetic of a layer, what the map itself does weighs
        less. {PAIRS} pairs; differences are those of the experts that naive blocking was run for."""
    )
    rows = []
    for narrow in (SHAPE, WIDE):
        for hidden in HIDDEN:
            shape = replace(narrow, hidden=hidden, expert_width=hidden // 2)
            model, parts, known = models.get(shape) or trained(shape, prompts)
            known = known[known["length"] == LENGTH].reset_index(drop=True)
            for where in POSITIONS:
                times, log_probs, found = compare(model, parts, known, where, PART, PAIRS)
                number = found["layer"].astype(int) * shape.experts + found["expert"]
                sampled = found[number % PART == 0].assign(layer=0, expert=number // PART)
                off, _ = differences(parts, known, log_probs, sampled)
                naive_s, ours, ratio = map(spread, times.T)
                of = len(known) * shape.layers * shape.experts
                rows.append([name_of(shape), hidden, where, f"{len(found) / of:.2f}", naive_s, ours, ratio])
                rows[-1] += [AIMS[narrow, where], f"{off.max():.0e}"]
    header = ["model", "dimensions", "positions", "used", "naive, s", "map, s", "ratio", "aim", "largest difference"]
    table(header, *rows)


def measure_curves(models, prompts):
    print("## Curves\n")
    say(
        f"""The same of one pair of runs, naive blocking timed on one expert in {PART} and multiplied. First over
        numbers of experts (top-4; prompts of {LENGTH} tokens), then over lengths of prompts; a node is a beginning that
        prompts share, computed once."""
    )

    def row(label, model, parts, prompts):
        ratios = [f"{compare(model, parts, prompts, where, every=PART)[0][0, 2]:.3g}" for where in POSITIONS]
        return [label, len(prompts), f"{share(prompts):.2f}", *ratios]

    def of_length(prompts, length):
        return prompts[prompts["length"] == length].reset_index(drop=True)

    header = ["prompts", "nodes / tokens", *(f"ratio, {where}" for where in POSITIONS)]
    rows = []
    for n in EXPERTS:
        shape = replace(SHAPE, experts=n)
        model, parts, known = models.get(shape) or trained(shape, prompts)
        rows.append(row(n, model, parts, of_length(known, LENGTH)))
    table(["experts", *header], *rows)
    for shape, (model, parts, known) in models.items():
        print(name_of(shape))
        table(["tokens", *header], *(row(n, model, parts, of_length(known, n)) for n in LENGTHS))


def measure_default(prompts):
    print("## The default models\n")
    say("CPU seconds of the whole map of all held-out prompts of the default models, batches of 256.")
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]
    rows = []
    for name in settings:
        shape = toy.Shape(**settings[name]["toy"])
        if shape.architecture in toy.MOE and not SMALL:
            model, parts, known = trained(shape, prompts)
            row = [name, len(known)]
            for where in POSITIONS:
                found, seconds = timed(expert_map.measure, model, parts, known, 256, [where])
                row += [f"{seconds:.1f}", len(found)]
            rows.append(row)
    table(["model", "prompts", "readout, s", "rows", "all positions, s", "rows"], *rows)


def main():
    torch.set_num_threads(1)
    paths = sorted((ROOT / "config/facts").glob("*.yaml"))
    prompts = facts.prompt_table(facts.load_relations(paths, ["geography", "object_attributes", "entity"]))
    print("# What the exhaustive expert map costs\n")
    say(
        f"""Written by `PYTHONPATH=scripts python tests/benchmarks/expert_map.py`; one thread, float32, torch
        {torch.__version__.split("+")[0]}, {platform.machine()} CPU. OLMoE-like models with {SHAPE.hidden} dimensions
        and experts of width {SHAPE.expert_width}, trained on config/facts as those of the main job; prompts
        are its held-out ones, all of a length in one batch. CPU time, measured side by side: median (quartiles) of
        {PAIRS} pairs run in turn."""
    )
    print()
    models = {shape: trained(shape, prompts) for shape in (SHAPE, WIDE)}
    measure_ratios(models)
    measure_widths(models, prompts)
    measure_curves(models, prompts)
    measure_counts()
    measure_default(prompts)


if __name__ == "__main__":
    main()
