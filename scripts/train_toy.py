"""Snakemake script: train a toy model on the facts."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from moescope import artifacts, checkpoints, logs, toy

logs.to_file_and_terminal(snakemake.log[0])
settings, dataset = snakemake.params.settings, snakemake.input.dataset[0]
folder = Path(snakemake.output[0]).parent

report = toy.train(
    toy.Shape(**{key: value for key, value in settings["toy"].items() if key != "seed"}),
    artifacts.read_table(dataset, "dataset"),
    folder=folder,
    seed=settings["toy"]["seed"],
    recipe=replace(toy.Recipe(), epochs=settings["toy_training"]["epochs"]),
    name=settings["model"],
)
logging.info("trained: %s", {key: report[key] for key in ("hit10", "mrr", "mrr_without", "cpu_seconds")})
artifacts.write_text(json.dumps(checkpoints.describe(folder, source="toy"), indent=2), folder / "model.json")
