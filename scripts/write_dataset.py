"""Snakemake script: check the fact files and write their prompts."""

from pathlib import Path

from moescope import artifacts, facts, logs

logs.to_file_and_terminal(snakemake.log[0])
settings, code = snakemake.params.settings, snakemake.params.code

relations = facts.load_relations([Path(file) for file in snakemake.input.facts], settings["tasks"])
table = facts.prompt_table(relations)
made_by = artifacts.provenance(settings, code, dataset_digest=facts.dataset_digest(table))
artifacts.write_table(table, snakemake.output.table, "dataset", made_by)
