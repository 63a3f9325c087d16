"""Snakemake script: check the facts of a data set and write their prompts."""

import logging
from pathlib import Path

from moescope import artifacts, facts, logs, sources

logs.to_file_and_terminal(snakemake.log[0])
settings, code = snakemake.params.settings, snakemake.params.code

if settings["format"] == "facts":
    table = facts.prompt_table(facts.load_relations([Path(f) for f in snakemake.input.facts], settings["tasks"]))
    counts = {"rows": len(table)}
else:
    fetched = Path(snakemake.input.facts[0]).with_suffix("")
    path = Path(settings["path"]) if settings["path"] else fetched
    wanted = {"relations": settings["wanted"], "columns": settings["columns"]}
    table, counts = sources.read(settings["format"], path, name=settings["dataset"], **wanted)
logging.info("%s: %s", settings["dataset"], counts)
made_by = artifacts.provenance(settings, code, dataset_digest=facts.dataset_digest(table), reading=counts)
artifacts.write_json(counts, snakemake.output.reading)
artifacts.write_table(table, snakemake.output.table, "dataset", made_by)
