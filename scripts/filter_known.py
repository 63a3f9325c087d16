"""Snakemake script: keep the prompts that the model knows."""

import logging

from moescope import artifacts, facts, logs

logs.to_file_and_terminal(snakemake.log[0])
settings, code, source = snakemake.params.settings, snakemake.params.code, snakemake.input.prompts

kept, unknown = facts.known(artifacts.read_table(source, "prompts"), settings["known"])
logging.info("%d prompts are analysed, %d are unknown", len(kept), len(unknown))
made_by = artifacts.provenance(settings, code, artifacts.table_provenance(source))
artifacts.write_table(unknown, snakemake.output.unknown, "unknown", made_by)
artifacts.write_table(kept, snakemake.output.prompts, "prompts", made_by)
