"""What recording costs beside a plain forward pass, and how much memory it takes with many prompts.

PYTHONPATH=scripts python tests/benchmarks/capture.py > tests/benchmarks/capture.md
"""

import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch

from moescope import anatomy, artifacts, capture, facts, toy

ROOT = Path(__file__).parents[2]
BATCH = 64
TOY = toy.Shape("olmoe", layers=4, experts=32, experts_per_token=4, expert_width=32)
MIDDLE = toy.Shape(
    "olmoe", layers=4, experts=32, experts_per_token=8, expert_width=128, hidden=256, heads=8, kv_heads=8
)
LARGE = toy.Shape(
    "olmoe", layers=4, experts=32, experts_per_token=8, expert_width=512, hidden=1024, heads=8, kv_heads=8
)
PAIRS = {"64 dimensions, top-4 of 32 experts (toy)": (TOY, 61), "1024 dimensions, top-8 of 32 experts": (LARGE, 15)}
PROMPTS = (500, 2000, 8000, 32000)


def prompts():
    """The tokenizer of the toy models, and the held-out prompts."""
    paths = sorted((ROOT / "config/facts").glob("*.yaml"))
    table = facts.prompt_table(facts.load_relations(paths, ["geography", "object_attributes", "entity"]))
    tokenizer = toy.train_tokenizer(table)
    return tokenizer, facts.tokenise(tokenizer, table[table["held_out"]])[0]


def timed(run):
    """Seconds of this process's CPU time, which other work on the machine does not lengthen."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(one, other, pairs):
    """Median over interleaved pairs of the time of `one` divided by that of `other`, and its quartiles."""
    one(), other()
    ratios = [timed(one) / timed(other) for _ in range(pairs)]
    return median(ratios), *np.quantile(ratios, [0.25, 0.75])


@torch.no_grad()
def speed(model, tokens, pairs):
    """Recording of a batch against a plain forward pass; and a whole capture to a file against plain passes."""
    parts = anatomy.find(model)
    batches = list(capture.batches(tokens["length"].to_numpy(), BATCH))
    ids = [capture.token_tensor(tokens, rows, torch.device("cpu")) for rows in batches]
    usual = sorted(ids, key=lambda i: (len(i) == BATCH, -abs(i.shape[1] - tokens["length"].median())))[-1]
    batch = ratio(lambda: capture.record(model, parts, usual), lambda: capture.readout_logits(model, usual), pairs)
    with tempfile.TemporaryDirectory() as folder:
        whole = ratio(
            lambda: to_file(model, parts, tokens, Path(folder)),
            lambda: [capture.readout_logits(model, i) for i in ids],
            3,
        )
    return tuple(usual.shape), batch, whole


def to_file(model, parts, tokens, folder):
    path = folder / "0.safetensors"
    with artifacts.writing_tensors(path, "activations", len(tokens)) as cache:
        capture.capture(model, parts, tokens, BATCH, cache.put)
    return path.stat().st_size


def peak(n):
    """Capture n prompts in this process: MB of the file, of the table of tokens, and the most that the process held."""
    tokenizer, tokens = prompts()
    # All of one length, so that every batch is as large as any other.
    tokens = tokens[tokens["length"] == tokens["length"].median()]
    tokens = pd.concat([tokens] * (n // len(tokens) + 1), ignore_index=True).head(n)
    tokens["prompt_id"] = np.arange(n, dtype="int32")
    model = toy.build(MIDDLE, len(tokenizer), seed=0).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        size = to_file(model, anatomy.find(model), tokens, Path(folder))
    table = tokens.memory_usage(deep=True).sum() + sum(sys.getsizeof(ids) for ids in tokens["token_ids"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(size / 1e6, table / 1e6, most / 1e6)


def main():
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        peak(int(sys.argv[1]))
        return
    # First of all: a child counts what its parent held when it was started.
    most = {n: subprocess.run([sys.executable, __file__, str(n)], capture_output=True, check=True) for n in PROMPTS}
    print("# What recording costs\n")
    print("Written by `PYTHONPATH=scripts python tests/benchmarks/capture.py`; one thread, float32, random weights,")
    print(f"torch {torch.__version__.split('+')[0]}, {platform.machine()} CPU.\n")
    print("CPU time with recording, divided by that of plain passes: median of pairs run in turn (and quartiles).")
    print(
        f"Batches of at most {BATCH} of the held-out prompts; a whole run checks its first batch a second time, scores"
    )
    print("the answers and writes everything to a file.\n")
    print("| model, 4 layers | batch (prompts, tokens) | recording / plain | whole run / plain passes |")
    print("| --- | --- | --- | --- |", flush=True)
    tokenizer, tokens = prompts()
    for name, (shape, pairs) in PAIRS.items():
        model = toy.build(shape, len(tokenizer), seed=0).eval().requires_grad_(False)
        size, *ratios = speed(model, tokens, pairs)
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in ratios]
        print(f"| {name} | {size[0]}, {size[1]} | {cells[0]} | {cells[1]} |", flush=True)
    print("\nThe most memory that a process held while it captured prompts of one length to a file, in batches of")
    print("one size (256 dimensions, top-8 of 32 experts, 4 layers); the libraries and the model are in it.\n")
    print("| prompts | file (MB) | table of tokens (MB) | most memory (MB) |")
    print("| --- | --- | --- | --- |")
    for n, done in most.items():
        print(f"| {n} | {' | '.join(f'{float(x):.0f}' for x in done.stdout.split())} |")


if __name__ == "__main__":
    main()
