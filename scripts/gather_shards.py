"""Snakemake script: put the shards of a table together."""

from moescope import artifacts, logs, samples

logs.to_file_and_terminal(snakemake.log[0])
settings, paths = snakemake.params.settings, snakemake.input

table = samples.gathered({path: artifacts.read_table(path, settings["kind"]) for path in paths})
made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(paths[0]))
artifacts.write_table(table, snakemake.output[0], settings["kind"], made_by)
