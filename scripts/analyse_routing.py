"""Snakemake script: which experts every prompt chooses, and how clearly, from the cache."""

from moescope import artifacts, devices, logs, routing

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads)

prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
tables = routing.summarise(snakemake.input.activations, prompts)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(snakemake.params.settings, snakemake.params.code, inherited)
for kind, table in tables.items():
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
