"""Snakemake script: result tables of all data sets and models, as CSV and Parquet."""

from pathlib import Path

from moescope import artifacts, logs, tables

logs.to_file_and_terminal(snakemake.log[0])
settings, code = snakemake.params.settings, snakemake.params.code

runs = {tuple(run): {} for run in settings["runs"]}
sources = {run: {"dataset": run[0], "model": run[1], "code_digests": {}} for run in runs}
for kind, paths in snakemake.input.items():
    for run, path in zip(runs, paths, strict=True):
        runs[run][kind] = artifacts.read_table(path, kind)
        source = artifacts.table_provenance(path)
        sources[run] |= artifacts.names(source)
        sources[run]["code_digests"][kind] = source["code_digest"]
made_by = artifacts.provenance(settings, code, sources=list(sources.values()))

folder = Path(snakemake.output[0]).parent
bootstrap = tables.Bootstrap(**settings["statistics"], seed=settings["seed"])
of = (settings["tables"], runs, settings["partners"], bootstrap, settings["published"], settings["expert_share"])
for name, table in tables.tables(*of):
    artifacts.write_table(table, folder / f"{name}.parquet", "table", made_by)
    artifacts.write_csv(table, folder / f"{name}.csv")
