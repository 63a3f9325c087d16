"""Snakemake script: one figure of one data set, from the result tables."""

from moescope import artifacts, logs, plots

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings

tables = {name: artifacts.read_table(path, "table") for name, path in snakemake.input.items()}
tables = {name: table[table["dataset"] == settings["dataset"]] for name, table in tables.items()}
about = {key: settings[key] for key in ("seed", "models", "toys", "figure")}
note = plots.note(tables[settings["figure"]], **settings["statistics"], **about)
plots.draw(settings["figure"], tables, settings["models"], note, snakemake.output.figure)
