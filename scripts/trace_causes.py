"""Snakemake script: what of a clean run brings the answer back when the subject is corrupted."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, tracing

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
arguments = {key: settings[key] for key in ("batch_size", "seed", "shard", "shards")} | settings["tracing"]
tables = tracing.trace(model, anatomy.find(model), prompts, **arguments)

made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(snakemake.input.prompts))
for kind, table in zip(("tracing", "tracing_runs"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
