"""Snakemake script: tokenise a text task, and let the model write the responses that it lacks."""

import pandas as pd

from moescope import artifacts, checkpoints, devices, logs, responses, texts

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings, output = snakemake.params.settings, snakemake.output

description = artifacts.read_json(snakemake.input.model[0])
model, tokenizer = checkpoints.load(checkpoints.folder_of(description), **settings["load"])
table = artifacts.read_table(snakemake.input.texts, "texts")
prompts, dropped = texts.tokenise(tokenizer, table, settings["tokens"], responses.context(model))
prompts, ended = responses.generate(model, tokenizer, prompts, settings["tokens"], settings["batch_size"])

inherited = artifacts.table_provenance(snakemake.input.texts)
named = checkpoints.identity(model, description)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited, **named)
artifacts.write_table(pd.concat([dropped, ended], ignore_index=True), output.dropped, "dropped", made_by)
artifacts.write_table(prompts, output.prompts, "prompts", made_by)
