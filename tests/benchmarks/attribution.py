"""What the attribution of neurons costs beside brute force and beside the published notebook of Gated-LPI.

PYTHONPATH=scripts python tests/benchmarks/attribution.py > tests/benchmarks/attribution.md

With `small` as its argument it runs a small model within a minute.
"""

import ctypes
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moescope import activations, anatomy, artifacts, attribution, capture, lens, rankings, toy
from moescope.bounds import followed_tokens

VOCABULARY, LENGTH, TOP, PROMPTS, PAIRS = 50_304, 6, 100, 32, 3
EPS = 1e-6
RANKED = ("neurons", "attention_neurons", "relation_neurons")
# Logits with a standard deviation of 4: neither uniform nor certain, as the result shows.
WEIGHTS = {"embedding_std": 1.0, "down_scale": 1.0}
LOGITS_STD = 4.0
SHAPES = {
    "large": toy.Shape(
        "olmoe", layers=8, experts=32, experts_per_token=8, expert_width=512, hidden=512, heads=8, kv_heads=8
    ),
    "small": toy.Shape(
        "olmoe", layers=3, experts=8, experts_per_token=4, expert_width=64, hidden=64, heads=4, kv_heads=4
    ),
}
OLMOE_1B_7B = toy.Shape(
    "olmoe", layers=16, experts=64, experts_per_token=8, expert_width=1024, hidden=2048, heads=16, kv_heads=16
)


def build(shape, vocabulary):
    recipe = toy.Recipe(unembedding_std=LOGITS_STD * shape.hidden**-0.5, **WEIGHTS)
    return toy.build(shape, vocabulary, seed=0, recipe=recipe).eval().requires_grad_(False)


def random_prompts(n, vocabulary):
    ids = torch.randint(vocabulary, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    return pd.DataFrame({"prompt_id": np.arange(n, dtype="int32"), "token_ids": ids.tolist(), "length": LENGTH})


def cached(model, parts, tokens, path):
    """Record the prompts, the target being the model's own first token as in the notebook; the table of prompts."""
    with artifacts.writing_tensors(path, "activations", len(tokens)) as cache:
        return capture.capture(model, parts, tokens, len(tokens), cache.put, "argmax")[0]


def timed(run, *args):
    """Result, and seconds of this process's CPU time, which other work on the machine does not lengthen."""
    start = time.process_time()
    result = run(*args)
    return result, time.process_time() - start


@torch.no_grad()
def brute_force(parts, path, prompt):
    """The 100 FFN neurons with the largest LPI of one prompt: every neuron against the whole vocabulary.

    Batched matrix products and a logsumexp in chunks, no loop over neurons. Returns {(layer, expert, neuron): LPI}.
    """
    weight = parts.unembedding.weight * parts.final_norm.gain
    found, names = [], []
    with activations.opened([path], prompt) as cache:
        row = np.arange(1)
        scale = torch.rsqrt(cache.get("resid_final", row).pow(2).mean(-1) + EPS)
        for layer in parts.layers:
            here, down = cache.layer(layer.index, row), layer.experts.module.down_proj
            ids = here["expert_ids"][0].long()
            amounts = here["expert_weights"][0].unsqueeze(1) * here["expert_acts"][0]
            vectors = (down[ids].transpose(1, 2) * (scale * amounts.unsqueeze(-1))).flatten(0, 1)
            logits = (here["resid_mid"][0] * scale) @ weight.T
            change = vectors @ weight[cache.target[0]]
            for chunk, own in zip(vectors.split(512), change.split(512)):
                found.append(own - torch.addmm(logits, chunk, weight.T).logsumexp(1) + logits.logsumexp(0))
            names += [(layer.index, expert, neuron) for expert in ids.tolist() for neuron in range(amounts.shape[1])]
    best = torch.cat(found).topk(TOP)
    return {names[i]: lpi for i, lpi in zip(best.indices.tolist(), best.values.tolist())}


class Published:
    """The steps of the published notebook, anew: one prompt, each step a method; `record` is its forward pass.

    States are read with the norm scale of the real final state. Its order of operations is kept: unembedding,
    softmax, logarithm, for one expert's neurons or one layer's attention neurons of all source positions at a time.
    What it also does is left out: states as lists and in five files of their own, figures, tokens of the best neurons.
    """

    @torch.no_grad()
    def __init__(self, model, parts, ids):
        self.model, self.target, self.patterns, self.values = model, None, [], []
        model.set_attn_implementation("eager")
        hooks = []
        for layer in model.model.layers:
            attention = layer.self_attn
            hooks.append(attention.register_forward_hook(lambda m, i, out: self.patterns.append(out[1][0, :, -1])))
            hooks.append(attention.v_proj.register_forward_hook(lambda m, i, out: self.values.append(out[0])))
        self.found, logits = capture.record(model, parts, torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("sdpa")
        self.target = int(logits[0].argmax())
        self.scale = torch.rsqrt(self.found["resid_final"][0].pow(2).mean() + EPS)
        self.heads = model.config.num_attention_heads

    def at(self, layer, name):
        return self.found[f"{layer}.{name}"][0]

    def probabilities(self, vectors):
        return self.model.lm_head(vectors * self.scale * self.model.model.norm.weight).softmax(-1)

    def log_p(self, vectors):
        return self.probabilities(vectors)[..., self.target].log()

    def subvalues(self, layer):
        """[heads positions head_dim]: attention-weighted values of each source position."""
        values = self.values[layer].unflatten(-1, (self.heads, -1)).transpose(0, 1)
        return self.patterns[layer].unsqueeze(-1) * values

    def columns(self, layer):
        """[heads head_dim d_model]: the output projection's columns."""
        return self.model.model.layers[layer].self_attn.o_proj.weight.T.unflatten(0, (self.heads, -1))

    def layers(self):
        before = [self.at(i, "resid_pre") for i in range(len(self.values))]
        middle = [self.at(i, "resid_mid") for i in range(len(self.values))]
        after = [*before[1:], self.found["resid_final"][0]]
        attention = [(self.log_p(u) - self.log_p(h)).item() for h, u in zip(before, middle)]
        ffn = [(self.log_p(h) - self.log_p(u)).item() for u, h in zip(middle, after)]
        return {
            "attn_list": [[str(i), x] for i, x in enumerate(attention)],
            "ffn_list": [[str(i), x] for i, x in enumerate(ffn)],
        }

    def head_level(self):
        found = []
        for i in range(len(self.values)):
            h = self.at(i, "resid_pre")
            origin = self.log_p(h)
            vectors = torch.bmm(self.subvalues(i), self.columns(i)).sum(1)
            increases = self.probabilities(vectors + h).log()[:, self.target] - origin
            found += [[f"{i}_{head}", round(x.item(), 4)] for head, x in enumerate(increases)]
        return {"all_head_increase": found}

    def ffn_neurons(self):
        """LPI [neurons] of each chosen expert, by (layer, expert)."""
        found = {}
        for i in range(len(self.values)):
            u, down = self.at(i, "resid_mid"), self.model.model.layers[i].mlp.experts.down_proj
            chosen = zip(self.at(i, "expert_ids").tolist(), self.at(i, "expert_weights"), self.at(i, "expert_acts"))
            for expert, weight, coefficients in chosen:
                origin = self.log_p(u)
                vectors = (coefficients * down[expert]).T
                found[i, expert] = self.log_p(vectors * weight + u) - origin
        return found

    def attention_neurons(self):
        """LPI [positions heads head_dim] of each layer."""
        found = []
        for i in range(len(self.values)):
            h = self.at(i, "resid_pre")
            origin = self.log_p(h)
            vectors = self.columns(i) * self.subvalues(i).transpose(0, 1).unsqueeze(-1)
            # In one piece in memory: as the notebook has it, this product takes half as long again.
            found.append(self.probabilities((vectors + h).contiguous()).log()[..., self.target] - origin)
        return found

    def neurons_by_name(self, ffn, attention):
        """Both kinds of neurons into lists of (name, LPI), one by one, the largest first."""
        experts, values = [], []
        for (layer, expert), increases in ffn.items():
            experts += [(f"{layer}_{expert}_{i}", increase.item()) for i, increase in enumerate(increases)]
        for layer, increases in enumerate(attention):
            for at in range(increases.shape[0]):
                for head in range(increases.shape[1]):
                    for i in range(increases.shape[2]):
                        values.append((f"{layer}_{head}_{i}_{at}", increases[at][head][i].item()))
        return [sorted(found, key=itemgetter(1))[::-1] for found in (experts, values)]

    def run(self, folder, seconds):
        """All steps, their files written to `folder`; `seconds` of each are noted. Returns the two lists of neurons."""
        layers, seconds["layers"] = timed(self.layers)
        heads, seconds["heads"] = timed(self.head_level)
        ffn, seconds["FFN neurons"] = timed(self.ffn_neurons)
        attention, seconds["attention neurons"] = timed(self.attention_neurons)

        named, sorting = timed(self.neurons_by_name, ffn, attention)
        _, writing = timed(write_json, folder, layers, heads, *named)
        seconds["lists and JSON"] = sorting + writing
        return named


def write_json(folder, layers, heads, experts, values):
    """The four files of the published format; returns their bytes."""
    parts = [([int(x) for x in name.split("_")], increase) for name, increase in experts]
    experts = [{"layer": a, "experts": b, "neuron": c, "increase": increase} for (a, b, c), increase in parts]
    values = [{"neuron": name, "increase": increase} for name, increase in values]
    files = {
        "layer_level_increase": json.dumps(layers),
        "head_level_increase": json.dumps(heads),
        "experts_FFN_neuron_increase": json.dumps(experts, indent=4),
        "attn_neuron_increase": json.dumps(values, indent=4),
    }
    return sum((folder / f"{name}.json").write_text(text) for name, text in files.items())


def units(parts, path, prompts):
    """Layers, heads and experts of all prompts."""
    return attribution.attribute(parts, [path], prompts, "reference")


def strongest(parts, path, prompts, top=TOP):
    """The tables of both kinds of neurons of all prompts, no relations ranked."""
    return rankings.attribute(parts, [path], prompts, "reference", top, bottom=0, by_relation=False)


def with_relations(parts, path, prompts):
    """The same with the weakest neurons and the ranking of relations: what rankings.attribute does unless told."""
    return rankings.attribute(parts, [path], prompts, "reference")


def without_attention(parts):
    return replace(parts, layers=tuple(replace(layer, attention=None) for layer in parts.layers))


def published_flop(shape, vocabulary):
    """Matrix products of the notebook's steps on one prompt, in floating-point operations (two for each product)."""
    layers, d, k, m = shape.layers, shape.hidden, shape.experts_per_token, shape.expert_width
    rows = {
        "layers": layers * 4,
        "heads": layers * (1 + shape.heads),
        "FFN neurons": layers * k * (1 + m),
        "attention neurons": layers * (1 + LENGTH * d),
    }
    flop = {name: 2 * d * vocabulary * n for name, n in rows.items()}
    flop["heads"] += layers * 2 * LENGTH * d * d
    return flop


def our_flop(shape, vocabulary, prompts, looks):
    """The same of ours, per prompt, with `prompts` prompts together; for each, `looks` vectors are evaluated exactly.

    What depends on the weights alone is done once for all prompts: the Gram matrix of the vocabulary, and the
    quadratic form in it of every neuron that any prompt uses, routing taken as uniform.
    """
    layers, d, k, m, experts = shape.layers, shape.hidden, shape.experts_per_token, shape.expert_width, shape.experts
    readout, widths = 2 * d * vocabulary, (k * m, d)
    followed = [min(followed_tokens(width), vocabulary) for width in widths]
    met = experts * (1 - (1 - k / experts) ** prompts)
    return {
        "layers, heads, experts": readout + layers * ((2 + shape.heads + k) * readout + 2 * d * d + 2 * k * m * d),
        "weights only": (d * readout + 2 * d * d * layers * (met * m + d)) / prompts,
        "bounds": layers
        * sum(2 * readout + 2 * width * ((tokens + 1) * d + tokens) for width, tokens in zip(widths, followed)),
        "exact neurons": looks * readout,
    }


class Rows(TorchDispatchMode):
    """Counts the vectors that are multiplied with the whole unembedding."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.mm and result.shape[1] == self.vocabulary:
            self.count += len(result)
        return result


def counted(run, *args):
    """Floating-point operations of the matrix products that `run` makes."""
    with FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def looks_of(parts, path, prompts, top=TOP):
    """Vectors and states that each prompt evaluates against the vocabulary beyond those that bounds need."""
    with Rows(len(parts.unembedding.weight)) as rows:
        strongest(parts, path, prompts, top)
    return rows.count / len(prompts) - 2 * len(parts.layers)


def memory(name):
    """GiB: the most that this process holds while it attributes neurons, and what it holds before."""
    with tempfile.TemporaryDirectory() as folder:
        _, parts, path, prompts, _ = ready(name, folder)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the most held so far becomes what is held now
        before = most_held()
        with_relations(parts, path, prompts)
        print(most_held(), before)


def most_held():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def ready(name, folder):
    model = build(SHAPES[name], VOCABULARY)
    parts, path = anatomy.find(model), Path(folder) / "0.safetensors"
    prompts, seconds = timed(cached, model, parts, random_prompts(PROMPTS, VOCABULARY), path)
    return model, parts, path, prompts.assign(relation="one"), seconds / PROMPTS


def say(text):
    """A paragraph, wrapped."""
    print(fill(" ".join(text.split()), 118))


def table(header, *rows):
    print("\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)) + "\n")


def spread(values):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def predictions(parts, path, prompts):
    """Probability of the target and entropy of the next token (nats) of each prompt."""
    with activations.opened([path], prompts) as cache, torch.no_grad():
        rows = np.arange(len(cache))
        final = cache.get("resid_final", rows)
        log_p = lens.Readout.of(parts).log_probs(final, lens.norm_scale(parts, final))
    return np.exp(prompts["log_prob"]), -(log_p.exp() * log_p).sum(1)


def agreement(found, best):
    """Whether `best` ({(layer, expert, neuron): LPI}) are the neurons found for the prompt; the largest difference."""
    ours = {(row.layer, row.expert, row.neuron): row.lpi for row in found.itertuples()}
    return ours.keys() == best.keys(), max(abs(ours[name] - best[name]) for name in ours.keys() & best.keys())


def measure_brute_force(parts, path, prompts):
    ratios, checks = [], []
    for i in range(PAIRS):
        prompt = prompts.iloc[[i]]
        best, theirs = timed(brute_force, parts, path, prompt)
        tables, ours = timed(strongest, without_attention(parts), path, prompts)
        found = tables["neurons"]
        checks.append(agreement(found[found["prompt_id"] == prompt["prompt_id"].item()], best))
        ratios.append([theirs, ours / len(prompts), theirs / ours * len(prompts), found["exact"].mean()])
    theirs, ours, ratio, exact = zip(*ratios)
    same, difference = zip(*checks)
    print(f"## The {TOP} strongest FFN neurons\n")
    say(
        """Brute force multiplies all FFN neurons that the prompt uses with the whole vocabulary, in batches, and takes
        a logsumexp. Ours finds them by bounds, all prompts at once, and says how concentrated the LPIs of all are."""
    )
    table(
        ["brute force, s per prompt", "ours, s per prompt", "ratio", "same neurons", "difference (nats)", "certain"],
        [spread(theirs), spread(ours), spread(ratio), f"{sum(same)} of {PAIRS}", f"{max(difference):.0e}", min(exact)],
    )


def measure_notebook(model, parts, path, prompts, recording):
    steps, ours, sizes = [], [], []
    for i in range(PAIRS):
        notebook, forward = timed(Published, model, parts, prompts["token_ids"][i])
        seconds = {"forward pass": forward}
        with tempfile.TemporaryDirectory() as folder:
            named = notebook.run(Path(folder), seconds)
            sizes.append(sum(file.stat().st_size for file in Path(folder).iterdir()))
        steps.append(seconds)
        whole = {}
        of_units, whole["layers, heads, experts"] = timed(units, parts, path, prompts)
        of_neurons, whole["both kinds of neurons"] = timed(strongest, parts, path, prompts)
        default, whole["neurons by default"] = timed(with_relations, parts, path, prompts)
        ours.append({"forward pass": recording} | {name: x / len(prompts) for name, x in whole.items()})
    steps, ours = pd.DataFrame(steps), pd.DataFrame(ours)
    print("## The whole attribution\n")
    say("CPU seconds per prompt: the notebook's steps, one prompt at a time, and ours, all prompts in one go.")
    rows = [["notebook", name, spread(values)] for name, values in steps.items()]
    table(["", "step", "s per prompt"], *rows, *([["ours", name, spread(values)] for name, values in ours.items()]))
    without, by_default = steps.drop(columns="forward pass"), ours.pop("neurons by default")
    our_part = ours.drop(columns="forward pass").sum(axis=1)
    unsplit = without.sum(axis=1) - without["attention neurons"] * (1 - 1 / LENGTH)
    say(
        """Ratios of the sums. The notebook scores attention neurons for each source position, ours summed over them:
        one row counts one position only of that step. Neurons by default are also the 10 weakest and a ranking of the
        relation, which the notebook does not make: the last row."""
    )
    table(
        ["notebook / ours", "ratio"],
        ["attribution", spread(without.sum(axis=1) / our_part)],
        ["with the forward pass", spread(steps.sum(axis=1) / ours.sum(axis=1))],
        ["attribution, attention neurons of one source position", spread(unsplit / our_part)],
        [
            "attribution, neurons by default",
            spread(without.sum(axis=1) / (ours["layers, heads, experts"] + by_default)),
        ],
    )
    certain = ", ".join(f"{default[kind]['exact'].mean():.1%} of {kind}" for kind in RANKED)
    say(f"By default the bounds certify the place among the strongest (or weakest) of {certain}; all values are exact.")
    print()
    return named, sizes[-1], of_units, of_neurons


def parquet_bytes(tables):
    """Size of tables as files of this project."""
    with tempfile.TemporaryDirectory() as folder:
        path, total = Path(folder) / "table.parquet", 0
        for found in tables:
            artifacts.write_table(found, path, "table", {})
            total += path.stat().st_size
    return total


def json_bytes(layers, heads, experts, values):
    """Size of these rows of our tables, of one prompt, in the published format."""
    with tempfile.TemporaryDirectory() as folder:
        return write_json(
            Path(folder),
            {
                "attn_list": [[str(row.layer), float(row.attention)] for row in layers.itertuples()],
                "ffn_list": [[str(row.layer), float(row.ffn)] for row in layers.itertuples()],
            },
            {"all_head_increase": [[f"{row.layer}_{row.head}", round(row.lpi, 4)] for row in heads.itertuples()]},
            [(f"{row.layer}_{row.expert}_{row.neuron}", row.lpi) for row in experts.itertuples()],
            [(f"{row.layer}_{row.head}_{row.neuron}_{LENGTH - 1}", row.lpi) for row in values.itertuples()],
        )


def measure_disk(named, published, of_units, of_neurons):
    layers, heads, experts, margins = of_units
    both = of_neurons["neurons"], of_neurons["attention_neurons"]
    every = [
        pd.DataFrame([[int(x) for x in name.split("_")] for name, _ in found], dtype="int16")
        .rename(columns=str)
        .assign(lpi=np.array([lpi for _, lpi in found], "float32"))
        for found in named
    ]
    same = layers, heads, *both
    sizes = {
        "all that is written": (
            published,
            parquet_bytes([*same, experts, margins, of_neurons["concentration"], of_neurons["neuron_sums"]]) / PROMPTS,
        ),
        f"layers, heads, the {TOP} strongest neurons of both kinds": (
            json_bytes(*(found[found["prompt_id"] == 0] for found in same)),
            parquet_bytes(same) / PROMPTS,
        ),
        "every neuron (and source position), one prompt": (published, parquet_bytes(every)),
    }
    print("## Disk\n")
    say(
        """kB per prompt: the published format, a folder of JSON files for each prompt, against Parquet files of all
        prompts together. The notebook writes every neuron, ours the strongest and what holds of all together. The
        second row puts the same rows into both formats; the third all that the notebook writes."""
    )
    rows = [[name, f"{a / 1e3:.1f}", f"{b / 1e3:.1f}", f"{a / b:.3g}"] for name, (a, b) in sizes.items()]
    table(["content", "JSON", "Parquet", "ratio"], *rows)


def check_counts():
    """Formulas against counted operations on a small model: rows of a table."""
    shape, vocabulary, prompts = SHAPES["small"], 2000, 4
    model = build(shape, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        parts, path = anatomy.find(model), Path(folder) / "0.safetensors"
        table = cached(model, parts, random_prompts(prompts, vocabulary), path).assign(relation="one")
        notebook = Published(model, parts, table["token_ids"][0])
        steps = notebook.layers, notebook.head_level, notebook.ffn_neurons, notebook.attention_neurons
        found = {f"notebook: {name}": flop for name, flop in published_flop(shape, vocabulary).items()}
        counts = [counted(step) for step in steps]
        looks = looks_of(parts, path, table)
        ours = our_flop(shape, vocabulary, prompts, looks)
        found["ours: layers, heads, experts"] = ours.pop("layers, heads, experts") * prompts
        found["ours: neurons"] = sum(ours.values()) * prompts
        counts += [counted(run, parts, path, table) for run in (units, strongest)]
    return [
        [step, f"{a / 1e6:.1f}", f"{b / 1e6:.1f}", f"{a / b - 1:+.1%}"] for (step, a), b in zip(found.items(), counts)
    ]


def measure_counts(parts, path, prompts):
    n = PROMPTS // 2
    looks = {k: looks_of(parts, path, prompts.iloc[:n], k) for k in (10, TOP, 1000)}

    def row(label, shape=OLMOE_1B_7B, vocabulary=VOCABULARY, together=1000, k=TOP):
        ours = our_flop(shape, vocabulary, together, looks[k])
        whole, published = sum(ours.values()), sum(published_flop(shape, vocabulary).values())
        gflop = [f"{x / 1e9:.4g}" for x in (published, whole, *ours.values())]
        return [label, *gflop[:2], f"{published / whole:.0f}", *gflop[2:]]

    header = ["notebook", "ours", "ratio", "layers, heads, experts", "weights only", "bounds", "exact neurons"]
    print("## Counted arithmetic\n")
    say(
        """Floating-point operations of all matrix products but those with a single vector; softmax and the like are not
        counted. First the formulas against torch's counter on a small model (MFLOP; 4 prompts together in ours, routing
        taken as uniform)."""
    )
    table(["step", "formula", "counted", "difference"], *check_counts())
    say(
        f"""Then by formula for OLMoE-1B-7B, prompts of {LENGTH} tokens (GFLOP per prompt; the forward pass is on
        neither side), with as many exact evaluations of vectors and states as a prompt took in the model of the times
        above, {n} prompts together: {", ".join(f"{count:.0f} for the {k} strongest" for k, count in looks.items())}."""
    )
    table(["prompts together", *header], *(row(n, together=n) for n in (1, 32, 1000, 10_000)))
    say(
        """The same for 1000 prompts together over vocabularies, numbers of experts (8 for each token) and numbers of
        strongest neurons."""
    )
    table(["vocabulary", *header], *(row(v, vocabulary=v) for v in (32_000, VOCABULARY, 151_936, 262_144)))
    table(["experts", *header], *(row(e, replace(OLMOE_1B_7B, experts=e)) for e in (16, 64, 256)))
    table(["strongest", *header], *(row(k, k=k) for k in looks))


def main():
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2])
        return
    name = "small" if "small" in sys.argv[1:] else "large"
    shape = SHAPES[name]
    # First of all: a child counts what its parent held when it was started.
    child = subprocess.run([sys.executable, __file__, "memory", name], capture_output=True, check=True)
    most, before = map(float, child.stdout.split())
    with tempfile.TemporaryDirectory() as folder:
        model, parts, path, prompts, recording = ready(name, folder)
        p, entropy = predictions(parts, path, prompts)
        print("# What attribution costs\n")
        say(
            f"""Written by `PYTHONPATH=scripts python tests/benchmarks/attribution.py`; one thread, float32, random
            weights, torch {torch.__version__.split("+")[0]}, {platform.machine()} CPU. An OLMoE with {shape.hidden}
            dimensions, {shape.layers} layers, {shape.heads} heads, {shape.experts_per_token} of {shape.experts} experts
            of width {shape.expert_width} and {VOCABULARY} tokens; {PROMPTS} prompts of {LENGTH} random tokens, one
            relation. Weights are drawn so that logits have a standard deviation of {LOGITS_STD:.0f}, neither uniform
            nor certain: the target, the model's own first token, has probability {spread(p)}, the entropy is
            {spread(entropy)} nats of {np.log(VOCABULARY):.1f}. CPU time, measured side by side: median (quartiles) of
            {PAIRS} pairs run in turn."""
        )
        print()
        measure_brute_force(parts, path, prompts)
        measured = measure_notebook(model, parts, path, prompts, recording)
        measure_counts(parts, path, prompts)
        measure_disk(*measured)
    print("## Memory\n")
    say(
        f"""The most that a process holds while it attributes the neurons of {PROMPTS} prompts, beside what it holds
        before (model and libraries)."""
    )
    table(["before (GiB)", "most (GiB)", "extra (GiB)"], [f"{x:.3f}" for x in (before, most, most - before)])


if __name__ == "__main__":
    main()
