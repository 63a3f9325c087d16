"""Snakemake script: what was measured of all states of a model, with their training steps."""

import pandas as pd

from moescope import artifacts, logs

logs.to_file_and_terminal(snakemake.log[0])
settings, paths = snakemake.params.settings, snakemake.input.checkpoints

steps = dict(settings["checkpoints"])
for path in snakemake.input.training:
    steps["final"] = artifacts.read_json(path)["steps"]
tables = [artifacts.read_table(path, "checkpoint") for path in paths]
columns = zip(tables, steps.items(), strict=True)
table = pd.concat([t.assign(checkpoint=name, step=step) for t, (name, step) in columns], ignore_index=True)

made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(paths[-1]))
artifacts.write_table(table, snakemake.output.checkpoints, "checkpoints", made_by)
