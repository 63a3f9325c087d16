"""Snakemake script: block every expert that a prompt uses, one at a time."""

from moescope import anatomy, artifacts, checkpoints, devices, expert_map, logs, samples

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
parts, positions = anatomy.find(model), settings["expert_map"]["positions"]
[table] = samples.in_blocks(
    lambda block: [expert_map.measure(model, parts, block, batch_size, positions)], prompts, batch_size, *shard
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(table, snakemake.output.expert_map, "expert_map", made_by)
