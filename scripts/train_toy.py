"""Snakemake script: train a toy model on the facts."""

import logging
from dataclasses import replace
from pathlib import Path

from moescope import artifacts, logs, toy

logs.to_file_and_terminal(snakemake.log[0])
settings, dataset = snakemake.params.settings, snakemake.input.dataset[0]

report = toy.train(
    toy.Shape(**{key: value for key, value in settings["toy"].items() if key != "seed"}),
    artifacts.read_table(dataset, "dataset"),
    folder=Path(snakemake.output[0]).parent,
    seed=settings["toy"]["seed"],
    recipe=replace(toy.Recipe(), epochs=settings["toy_training"]["epochs"]),
    name=settings["model"],
)
logging.info("trained: %s", {key: report[key] for key in ("hit10", "mrr", "mrr_without", "cpu_seconds")})
