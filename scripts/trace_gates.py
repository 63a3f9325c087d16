"""Snakemake script: integrated gradients of gate probabilities over the heads' outputs, on a sample of prompts."""

from moescope import ablations, anatomy, artifacts, checkpoints, devices, logs, steering

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.gpu)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
sample = ablations.sample_subjects(prompts, settings["gate_gradients"]["prompts"], settings["seed"])
tables = steering.gate_gradients(
    model, anatomy.find(model), sample, settings["batch_size"], settings["gate_gradients"]["steps"]
)

inherited = artifacts.table_provenance(snakemake.input.prompts)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
for kind, table in zip(("gate_gradients", "gate_paths"), tables, strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
