"""Snakemake script: keep only the shared or the strongest routed experts."""

from pathlib import Path

import torch

from moescope import ablations, artifacts, logs, models

logs.to_file_and_terminal(snakemake.log[0])
torch.set_num_threads(snakemake.threads)
settings = snakemake.params.settings

model, _ = models.load(Path(snakemake.input.model[0]).parent, settings["device"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
table = ablations.measure_keep_only(
    model, models.anatomy(model), prompts, settings["keep_only"]["top"], settings["batch_size"]
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(table, snakemake.output.keep_only, "keep_only", made_by)
