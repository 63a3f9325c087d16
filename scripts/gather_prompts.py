"""Snakemake script: put the shards' prompts together and index the cache."""

import pandas as pd

from moescope import artifacts, logs

logs.to_file_and_terminal(snakemake.log[0])
settings, code = snakemake.params.settings, snakemake.params.code

for kind in ("prompts", "dropped"):
    shards = [artifacts.read_table(path, kind) for path in snakemake.input[kind]]
    table = pd.concat(shards, ignore_index=True).sort_values("prompt_id", ignore_index=True)
    made_by = artifacts.provenance(settings, code, artifacts.table_provenance(snakemake.input[kind][0]))
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
index = artifacts.tensor_index(snakemake.input.activations, "activations")
artifacts.write_json(index, snakemake.output.index)
