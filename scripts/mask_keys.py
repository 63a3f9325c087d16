"""Snakemake script: mask each task's key neurons and key experts, and matched random ones, and measure all tasks."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, masking, samples

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings = snakemake.params.settings
batch_size, *shard = (settings[key] for key in ("batch_size", "shard", "shards"))
of = settings["masking"]

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
kinds = ("prompts", "key_neurons", "expert_tokens", "units")
prompts, *keys = (artifacts.read_table(snakemake.input[kind], kind) for kind in kinds)
# A subject that several relations of a task share is on one side.
half = ablations.split_subjects(prompts.assign(relation=prompts["task"]), settings["seed"])
masked_units = masking.choose(prompts, half, *keys, of["shares"], of["experts"], of["random_draws"], settings["seed"])
own = samples.share(prompts, batch_size, *shard)
measured = masking.measure(model, anatomy.find(model), own, half[own.index], masked_units, batch_size)

inherited = artifacts.table_provenance(snakemake.input.key_neurons)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(masked_units, snakemake.output.masked_units, "masked_units", made_by)
artifacts.write_table(measured, snakemake.output.masking, "masking", made_by)
