"""Ratios of the main job's costs, measured side by side in one run on one thread.

PYTHONPATH=scripts python tests/benchmarks/main_job.py > tests/benchmarks/main_job.md
"""

import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
import yaml

from moescope import (
    ablations,
    anatomy,
    artifacts,
    attribution,
    capture,
    checkpoints,
    facts,
    queries,
    rankings,
    reading,
    toy,
)

ROOT = Path(__file__).parents[2]
SHAPES = {
    "toy (64 dimensions, 4 layers, 32 experts top-4)": toy.Shape(
        "olmoe", layers=4, experts=32, experts_per_token=4, expert_width=32
    ),
    "512 dimensions, 4 layers, 32 experts top-8": toy.Shape(
        "olmoe", layers=4, experts=32, experts_per_token=8, expert_width=256, hidden=512, heads=8, kv_heads=8
    ),
}


def paired(one, other, pairs):
    """Median over interleaved pairs of the time of `one` divided by that of `other`."""
    ratios = []
    for _ in range(pairs):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return median(ratios)


@torch.no_grad()
def capture_against_plain(model, tokens):
    """Recording of one batch against a plain forward pass of the same batch."""
    parts = anatomy.find(model)
    lengths = tokens["length"].to_numpy()
    rows = max(capture.batches(lengths, 128), key=len)
    ids = capture.token_tensor(tokens, rows, torch.device("cpu"))
    return paired(lambda: capture.record(model, parts, ids), lambda: capture.readout_logits(model, ids), 15)


def blocking_against_singles(model, tokens):
    """One prompt and one set of experts at a time against many of both in a batch, per measurement."""
    parts = anatomy.find(model)
    _, prompts, _ = capture.in_memory(model, parts, tokens, 128)
    rng = np.random.default_rng(0)
    prompts = prompts.iloc[rng.choice(len(prompts), 48, replace=False)].reset_index(drop=True)
    prompts["relation"] = "one"
    half = np.zeros(len(prompts), int)
    sets = [
        ablations.ExpertSet("one", 0, 5, draw, tuple((int(x), int(y)) for x, y in rng.integers(0, 4, (5, 2))))
        for draw in range(20)
    ]
    found: dict[int, pd.DataFrame] = {}

    def together(batch_size):
        found[batch_size] = ablations.measure_blocking(model, parts, prompts, half, sets, batch_size)

    ratio = paired(lambda: together(1), lambda: together(256), 3)
    difference = (found[1]["log_prob"] - found[256]["log_prob"]).abs().max()
    return ratio, difference


def attribution_against_training(name, settings, prompts):
    """CPU seconds of a model's training, and of its attribution from the cache: units, neurons, queries, readings."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        toy.train(toy.Shape(**settings["models"][name]["toy"]), prompts, folder=Path(folder), seed=0)
        training = time.process_time() - start
        model, tokenizer = checkpoints.load(folder)
        parts, path = anatomy.find(model), Path(folder) / "0.safetensors"
        tokens, _ = facts.tokenise(tokenizer, prompts[prompts["held_out"]])
        with artifacts.writing_tensors(path, "activations", len(tokens)) as cache:
            known, _ = capture.capture(model, parts, tokens, 256, cache.put)
        start = time.process_time()
        _, heads, experts, _ = attribution.attribute(parts, [path], known)
        found = rankings.attribute(parts, [path], known, **settings["neurons"])
        queries.attribute(model, parts, known, found["neurons"], found["attention_neurons"], 256)
        reading.read(parts, [path], known, found["relation_neurons"], heads, experts, str)
        return training, time.process_time() - start


def main():
    torch.set_num_threads(1)
    paths = sorted((ROOT / "config/facts").glob("*.yaml"))
    prompts = facts.prompt_table(facts.load_relations(paths, ["geography", "object_attributes", "entity"]))
    tokenizer = toy.train_tokenizer(prompts)
    tokens, _ = facts.tokenise(tokenizer, prompts[prompts["held_out"]])
    print("# The main job's costs as ratios\n")
    print("Written by `PYTHONPATH=scripts python tests/benchmarks/main_job.py`; one thread, float32,")
    print(f"random weights, torch {torch.__version__.split('+')[0]}, {platform.machine()} CPU.\n")
    print("| model | recording / plain forward pass | blocking one by one / batched | largest difference (nats) |")
    print("| --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        model = toy.build(shape, len(tokenizer), seed=0).eval().requires_grad_(False)
        ratio, difference = blocking_against_singles(model, tokens)
        print(f"| {name} | {capture_against_plain(model, tokens):.2f} | {ratio:.1f} | {difference:.0e} |", flush=True)
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    costs = {model: attribution_against_training(model, settings, prompts) for model in settings["models"]}
    print("\nCPU seconds on one thread, default main job, without starting processes and loading models.")
    print("Attribution is of layers, heads, experts and neurons, with queries and readings, from the cache.\n")
    print("| model | training | attribution | attribution / training |")
    print("| --- | --- | --- | --- |")
    costs["all six"] = tuple(map(sum, zip(*costs.values(), strict=True)))
    for name, (training, attributing) in costs.items():
        print(f"| {name} | {training:.1f} | {attributing:.1f} | {attributing / training:.2f} |")


if __name__ == "__main__":
    main()
