"""Snakemake script: the strongest neurons of each prompt and relation, from the cache."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, rankings

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
arguments = {"norm": settings["lens"]["norm"], **settings["neurons"]}
tables = rankings.attribute(anatomy.find(model), snakemake.input.activations, prompts, **arguments)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
for kind, table in tables.items():
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
