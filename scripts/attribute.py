"""Snakemake script: attribute the targets to layers, heads and experts, from the cache alone."""

from pathlib import Path

import torch

from moescope import artifacts, attribution, logs, models

logs.to_file_and_terminal(snakemake.log[0])
torch.set_num_threads(snakemake.threads)

model, _ = models.load(Path(snakemake.input.model[0]).parent)
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
tables = attribution.attribute(models.anatomy(model), snakemake.input.activations, prompts)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(snakemake.params.settings, snakemake.params.code, inherited)
for kind, table in zip(("layers", "heads", "experts"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
