"""Snakemake script: block each relation's best experts and matched random ones."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, samples

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
experts = artifacts.read_table(snakemake.input.experts, "experts")
parts = anatomy.find(model)
load = ablations.expert_load(parts, snakemake.input.activations, prompts)
half = ablations.split_subjects(prompts, settings["seed"])
of = settings["blocking"]
sets, ranking = ablations.choose_sets(experts, load, prompts, half, of["top"], of["random_draws"], settings["seed"])


def measure(block):
    return [ablations.measure_blocking(model, parts, block, half[block.index], sets, batch_size, of["how"])]


[blocking] = samples.in_blocks(measure, prompts, batch_size, *shard)

inherited = artifacts.table_provenance(snakemake.input.experts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(ranking, snakemake.output.blocked_experts, "blocked_experts", made_by)
artifacts.write_table(blocking, snakemake.output.blocking, "blocking", made_by)
