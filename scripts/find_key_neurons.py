"""Snakemake script: the key neurons of every sample, and the experts that its response tokens use."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, samples, utilization

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
parts = anatomy.find(model)
how = settings["utilization"]
key_neurons, expert_tokens = samples.in_blocks(
    lambda block: utilization.find(model, parts, block, batch_size, **how), prompts, batch_size, *shard
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(utilization.units(parts), snakemake.output.units, "units", made_by)
artifacts.write_table(key_neurons, snakemake.output.key_neurons, "key_neurons", made_by)
artifacts.write_table(expert_tokens, snakemake.output.expert_tokens, "expert_tokens", made_by)
