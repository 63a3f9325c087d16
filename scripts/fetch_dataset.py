"""Snakemake script: fetch the files of a data set of the hub, and record their commit."""

import shutil
from pathlib import Path

from moescope import artifacts, logs, sources

logs.to_file_and_terminal(snakemake.log[0])
settings, output = snakemake.params.settings, Path(snakemake.output.source)

# What an earlier revision or pattern left there would be read too.
shutil.rmtree(output.with_suffix(""), ignore_errors=True)
commit = sources.fetch(settings["hub"], settings["revision"], settings["files"], output.with_suffix(""))
record = {"hub": settings["hub"], "requested": settings["revision"], "commit": commit, "files": settings["files"]}
artifacts.write_json(record, output)
