"""Snakemake script: the figures of one data set that a group of result tables makes."""

from moescope import artifacts, logs, plots

logs.to_file_and_terminal(snakemake.log[0])
settings = snakemake.params.settings

about = {"seed": settings["seed"], "toys": settings["toys"], **settings["statistics"]}
for figure, path in snakemake.output.items():
    table = artifacts.read_table(snakemake.input[figure], "table")
    table, models = table[table["dataset"] == settings["dataset"]], settings["models"][figure]
    note = plots.note(table, figure=figure, models=models, **about)
    plots.draw(figure, {figure: table}, models, note, path)
