"""Snakemake script: block each relation's best heads and random ones, with routing free and forced."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, samples, steering

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))
how = settings["head_blocking"]

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
heads = artifacts.read_table(snakemake.input.heads, "heads")
parts = anatomy.find(model)
half = ablations.split_subjects(prompts, settings["seed"])
sets, ranking = steering.choose_heads(parts, heads, prompts, half, how["top"], how["random_draws"], settings["seed"])


def measure(block):
    return [steering.measure_head_blocking(model, parts, block, half[block.index], sets, batch_size, how["lpi"])]


[blocking] = samples.in_blocks(measure, prompts, batch_size, *shard)

inherited = artifacts.table_provenance(snakemake.input.heads)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(ranking, snakemake.output.blocked_heads, "blocked_heads", made_by)
artifacts.write_table(blocking, snakemake.output.head_blocking, "head_blocking", made_by)
