"""Snakemake script: fetch a model or look into its folder, check its structure in miniature, describe it."""

import logging

from moescope import artifacts, checkpoints, logs, miniature

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings
trust = settings["trust_remote_code"]

if settings["hub"]:
    description = checkpoints.fetch(settings["hub"], settings["revision"], trust)
else:
    description = checkpoints.describe(settings["folder"], trust_remote_code=trust)
foreseen = miniature.foresee(checkpoints.config_of(description, trust), moe=settings["kind"] == "moe")
logging.info("%s: %s", description["commit"], foreseen)
artifacts.write_json(description | {"foreseen": foreseen}, snakemake.output.description)
