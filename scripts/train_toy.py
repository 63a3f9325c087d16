"""Snakemake script: train a toy model on the facts."""

import logging
from dataclasses import replace
from pathlib import Path

from moescope import artifacts, checkpoints, logs, toy

logs.to_file_and_terminal(snakemake.log[0])
settings, dataset = snakemake.params.settings, snakemake.input.dataset[0]
folder, shape = Path(snakemake.output[0]).parent, dict(settings["toy"])
steps = settings["checkpoints"]
seed, load_balancing = shape.pop("seed"), shape.pop("load_balancing", toy.Recipe.load_balancing)

report = toy.train(
    toy.Shape(**shape),
    artifacts.read_table(dataset, "dataset"),
    folder=folder,
    seed=seed,
    recipe=replace(toy.Recipe(), epochs=settings["toy_training"]["epochs"], load_balancing=load_balancing),
    name=settings["model"],
    checkpoints=steps,
)
(folder / "checkpoints").mkdir(exist_ok=True)
logging.info("trained: %s", {key: report[key] for key in ("hit10", "mrr", "mrr_without", "cpu_seconds")})
for place in [*(folder / "checkpoints" / name for name in steps), folder]:
    artifacts.write_json(checkpoints.describe(place, source="toy"), place / "model.json")
