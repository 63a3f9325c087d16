"""Snakemake script: record what made the tables of this run."""

from moescope import artifacts, logs, record

logs.to_file_and_terminal(snakemake.log[0])
settings, code = snakemake.params.settings, snakemake.params.code_of_all

found = record.of_run(settings["config"], code, **dict(snakemake.input.items()))
artifacts.write_json(found, snakemake.output.record)
