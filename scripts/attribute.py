"""Snakemake script: attribute the targets to layers, heads and experts, from the cache."""

from moescope import anatomy, artifacts, attribution, checkpoints, devices, logs

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
tables = attribution.attribute(anatomy.find(model), snakemake.input.activations, prompts, settings["lens"]["norm"])

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
for kind, table in zip(("layers", "heads", "experts", "margins"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
