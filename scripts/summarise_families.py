"""Snakemake script: what one difference between toy models does, from the result tables of all of them."""

from pathlib import Path

from moescope import artifacts, logs, training_tables

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings

tables = {name: artifacts.read_table(path, "table") for name, path in snakemake.input.items()}
table = training_tables.families(tables, settings["members"], settings["confidence"])
sources = artifacts.table_provenance(snakemake.input[0])["sources"]
made_by = artifacts.provenance(settings, snakemake.params.code, sources=sources)
path = Path(snakemake.output[0])
artifacts.write_table(table, path.with_suffix(".parquet"), "table", made_by)
artifacts.write_csv(table, path)
