"""Snakemake script: fill the templates of a text task with its records."""

import logging
from pathlib import Path

from moescope import artifacts, facts, logs, texts

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings

path = Path(settings["path"] or Path(snakemake.input.files[0]).with_suffix(""))
templates = {key: settings[key] for key in ("prompt", "response", "task")}
table, counts = texts.read(
    path, name=settings["dataset"], **templates, samples=settings["samples"], seed=settings["seed"]
)
logging.info("%s: %s", settings["dataset"], counts)

digest = facts.dataset_digest(table)
made_by = artifacts.provenance(settings, snakemake.params.code, dataset_digest=digest, reading=counts)
artifacts.write_table(table, snakemake.output.texts, "texts", made_by)
