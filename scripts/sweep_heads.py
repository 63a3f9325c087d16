"""Snakemake script: block every head alone at the readout position, and see what the routers do."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, samples, steering

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
parts, lpi = anatomy.find(model), settings["head_sweep"]["lpi"]
tables = samples.in_blocks(
    lambda block: steering.sweep(model, parts, block, batch_size, lpi), prompts, batch_size, *shard
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
for kind, table in zip(("head_map", "head_router"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
