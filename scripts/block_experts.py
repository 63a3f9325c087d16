"""Snakemake script: block each relation's best experts and matched random ones."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.gpu)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
experts = artifacts.read_table(snakemake.input.experts, "experts")
parts = anatomy.find(model)
load = ablations.expert_load(parts, snakemake.input.activations, prompts)
half = ablations.split_subjects(prompts, settings["seed"])
of = settings["blocking"]
sets, ranking = ablations.choose_sets(experts, load, prompts, half, of["top"], of["random_draws"], settings["seed"])
blocking = ablations.measure_blocking(model, parts, prompts, half, sets, settings["batch_size"], of["how"])

inherited = artifacts.table_provenance(snakemake.input.experts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(ranking, snakemake.output.blocked_experts, "blocked_experts", made_by)
artifacts.write_table(blocking, snakemake.output.blocking, "blocking", made_by)
