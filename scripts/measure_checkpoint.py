"""Snakemake script: what a state of a model in training makes of the prompts of the finished model."""

from pathlib import Path

from moescope import anatomy, artifacts, checkpoints, devices, logs, training

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings, source = snakemake.params.settings, snakemake.input.prompts

# A description, or a folder of a toy model's checkpoints; whether it is one file or the first of several.
path = Path(next(file for file in snakemake.input if file != source))
description = artifacts.read_json(path / settings["checkpoint"] / "model.json" if path.is_dir() else path)
model, _ = checkpoints.load(checkpoints.folder_of(description), **settings["load"])
prompts = artifacts.read_table(source, "prompts")
table = training.measure(model, anatomy.find(model), prompts, settings["batch_size"], **settings["utilization"])

identity = checkpoints.identity(model, description)
made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(source), **identity)
artifacts.write_table(table, snakemake.output.checkpoint, "checkpoint", made_by)
