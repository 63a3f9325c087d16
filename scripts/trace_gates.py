"""Snakemake script: integrated gradients of gate probabilities over the heads' outputs, on a sample of prompts."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, samples, steering

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
of = settings["gate_gradients"]
parts, sample = anatomy.find(model), ablations.sample_subjects(prompts, of["prompts"], settings["seed"])
tables = samples.in_blocks(
    lambda block: steering.gate_gradients(model, parts, block, batch_size, of["steps"]), sample, batch_size, *shard
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
for kind, table in zip(("gate_gradients", "gate_paths"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
