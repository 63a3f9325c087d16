"""What finding key neurons costs: seconds, beside one sample at a time, and memory against the number of samples.

PYTHONPATH=scripts python tests/benchmarks/utilization.py > tests/benchmarks/utilization.md

With `small` as its argument it runs fewer samples. Each measurement is a process of its own.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
import torch

from moescope import anatomy, toy, utilization

SHAPES = {
    "qwen2_moe": toy.Shape("qwen2_moe", layers=7, experts=16, experts_per_token=4, expert_width=16, shared_width=64),
    "olmoe": toy.Shape("olmoe", layers=4, experts=32, experts_per_token=4, expert_width=32),
    "mixtral": toy.Shape("mixtral", layers=6, experts=8, experts_per_token=2, expert_width=64),
    "llama": toy.Shape("llama", layers=4, ffn_width=128),
}
VOCABULARY, RESPONSE, PROMPT, BATCH, LIMIT = 2000, 64, (8, 40), 64, 60


def made(architecture, n):
    """An untrained toy model, its parts, and random samples for it."""
    torch.set_num_threads(1)
    model = toy.build(SHAPES[architecture], VOCABULARY, seed=0).eval().requires_grad_(False)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(VOCABULARY, size=draw.integers(*PROMPT)).tolist() for _ in range(n)]
    table = pd.DataFrame({"prompt_id": np.arange(n, dtype="int32"), "token_ids": prompts})
    table["target_ids"] = draw.integers(VOCABULARY, size=(n, RESPONSE)).tolist()
    return model, anatomy.find(model), table.assign(target_id=table["target_ids"].str[0])


def one_token(model, parts, prompts, batch_size):
    """Every response token in a forward pass of its own: no batches, no teacher forcing."""
    rows = prompts.itertuples()
    steps = [(row.token_ids + row.target_ids[:t], y) for row in rows for t, y in enumerate(row.target_ids)]
    for number, (given, y) in enumerate(steps):
        alone = pd.DataFrame({"prompt_id": [number], "token_ids": [given], "target_id": [y], "target_ids": [[y]]})
        utilization.find(model, parts, alone, 1)


def one_sample(model, parts, prompts, batch_size):
    """One sample at a time."""
    for number in range(len(prompts)):
        utilization.find(model, parts, prompts[number : number + 1], 1)


def most_held():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def measure(how, architecture, n):
    """Seconds (wall, CPU) and growth of the most memory held (MiB)."""
    model, parts, prompts = made(architecture, n)
    utilization.find(model, parts, prompts[:2], BATCH)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the most held so far becomes what is held now
    before, wall, cpu = most_held(), time.perf_counter(), time.process_time()
    {"find": utilization.find, "one sample": one_sample, "one token": one_token}[how](model, parts, prompts, BATCH)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, most_held() - before]))


def alone(how, architecture, n, **allocator):
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "measure", how, architecture, str(n)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | allocator).stdout
    )


def say(text):
    print(fill(" ".join(text.split()), 118))


def table(header, *rows):
    print("\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)) + "\n")


def main(small):
    n, some = (100, 8) if small else (1000, 40)
    say("""# What finding key neurons costs""")
    print()
    say(f"""Written by `PYTHONPATH=scripts python tests/benchmarks/utilization.py`; one thread, float32, random
        weights and tokens, torch {torch.__version__.split("+")[0]}, {platform.machine()} CPU. The shapes of the main
        job's models; prompts of {PROMPT[0]} to {PROMPT[1] - 1} tokens, batches of {BATCH} samples. Each number is of a
        process of its own.""")
    print(f"\n## {n:,} samples of {RESPONSE} response tokens\n")
    say(f"""Beside one sample at a time and, as a model that generates would read them, one response token at a time; of
        these {some} and {max(1, some // 10)} samples were run, and CPU seconds are scaled to {n:,}. Each call of either
        also runs one token forward first, to learn how many neurons a token uses, as the batched one does once.""")
    rows = []
    for name in SHAPES:
        wall, cpu, _ = alone("find", name, n)
        each = [alone(how, name, m)[1] / m * n for how, m in (("one sample", some), ("one token", max(1, some // 10)))]
        rows.append((name, f"{wall:.1f}", f"{cpu:.1f}", *(f"{x:.0f} ({x / cpu:.1f} x)" for x in each)))
        assert wall <= LIMIT, (name, wall)
    table(("model", "s", "CPU s", "one sample at a time, CPU s", "one token at a time, CPU s"), *rows)
    print("## Memory\n")
    counts = [n // 4, n // 2, n, 2 * n]
    say("""The most memory held while key neurons are found, above what is held before, in MiB. The C library's
        allocator keeps freed pieces of many sizes; told to hand pieces of 1 MB and more back at once
        (`MALLOC_MMAP_THRESHOLD_=1000000`), it shows what is in use.""")
    rows = [
        (name, kind, *(f"{alone('find', name, m, **how)[2]:.0f}" for m in counts))
        for name in ("olmoe", "qwen2_moe")
        for kind, how in (("as it comes", {}), ("in use", {"MALLOC_MMAP_THRESHOLD_": "1000000"}))
    ]
    table(("model", "allocator", *(f"{m:,} samples" for m in counts)), *rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main("small" in sys.argv[1:])
