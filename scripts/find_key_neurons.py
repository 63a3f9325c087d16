"""Snakemake script: the key neurons of every sample, and the experts that its response tokens use."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, utilization

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.gpu)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
parts = anatomy.find(model)
how = settings["utilization"]
key_neurons, expert_tokens = utilization.find(model, parts, prompts, settings["batch_size"], **how)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(utilization.units(parts), snakemake.output.units, "units", made_by)
artifacts.write_table(key_neurons, snakemake.output.key_neurons, "key_neurons", made_by)
artifacts.write_table(expert_tokens, snakemake.output.expert_tokens, "expert_tokens", made_by)
