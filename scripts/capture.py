"""Snakemake script: run the prompts of a shard and record the activation cache."""

from pathlib import Path

import torch

from moescope import artifacts, capture, facts, logs, models

logs.to_file_and_terminal(snakemake.log[0])
torch.set_num_threads(snakemake.threads)
settings, output = snakemake.params.settings, snakemake.output
folder = Path(snakemake.input.model[0]).parent

model, tokenizer = models.load(folder, settings["device"])
dataset = artifacts.read_table(snakemake.input.dataset, "dataset")
prompts = facts.select(dataset, settings["templates"]).iloc[int(settings["shard"]) :: settings["shards"]]
tokens, dropped = facts.tokenise(tokenizer, prompts)
tensors, scored, errors = capture.capture(model, models.anatomy(model), tokens, settings["batch_size"])

made_by = artifacts.provenance(
    settings,
    snakemake.params.code,
    artifacts.table_provenance(snakemake.input.dataset),
    **models.identity(model, folder),
    verified=errors,
)
artifacts.write_table(dropped, output.dropped, "dropped", made_by)
artifacts.write_table(scored, output.prompts, "prompts", made_by)
artifacts.write_tensors(tensors, output.activations, "activations", made_by)
