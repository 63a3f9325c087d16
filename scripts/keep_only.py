"""Snakemake script: keep only the shared or the strongest routed experts."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, samples

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
parts, top = anatomy.find(model), settings["keep_only"]["top"]
[table] = samples.in_blocks(
    lambda block: [ablations.measure_keep_only(model, parts, block, top, batch_size)], prompts, batch_size, *shard
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(table, snakemake.output.keep_only, "keep_only", made_by)
