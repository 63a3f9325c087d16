"""Snakemake script: print what the jobs of a dry run would take."""

import subprocess

from moescope import logs, plan

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings

dry_run = subprocess.run(snakemake.params.dry_run, stdout=subprocess.PIPE, text=True, check=True).stdout
trusted = [name for name, model in settings["models"].items() if model["trust_remote_code"]]
print(plan.report(*plan.estimate(plan.jobs_of(dry_run), settings, trusted)))
