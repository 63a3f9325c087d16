"""Snakemake script: which earlier components raise the activations of each prompt's strongest neurons."""

import logging

from moescope import anatomy, artifacts, checkpoints, devices, logs, queries

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings, source = snakemake.params.settings, snakemake.input

model, _ = checkpoints.load_described(source.model[0], **settings["load"])
kinds = ("prompts", "neurons", "attention_neurons")
tables = [artifacts.read_table(source[kind], kind) for kind in kinds]
sizes = {"n_values": settings["queries"]["values"], "n_neurons": settings["queries"]["neurons"]}
found = queries.attribute(model, anatomy.find(model), *tables, settings["batch_size"], **sizes)
for where, reason in found[2].items():
    logging.warning("%s: not followed back: %s", where, reason)

made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(source.prompts))
for kind, table in zip(("queries", "value_layers"), found[:2], strict=True):
    artifacts.write_table(table, snakemake.output[kind], kind, made_by)
