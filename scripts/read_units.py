"""Snakemake script: the tokens that each relation's strongest experts, heads and neurons promote and suppress."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, reading

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads)
settings, source = snakemake.params.settings, snakemake.input

model, tokenizer = checkpoints.load_described(source.model[0], **settings["load"])
kinds = ("prompts", "relation_neurons", "heads", "experts")
tables = [artifacts.read_table(source[kind], kind) for kind in kinds]
readings = reading.read(
    anatomy.find(model),
    source.activations,
    *tables,
    decode=lambda token: tokenizer.decode([token]),
    n_units=settings["readings"]["units"],
    n_tokens=settings["readings"]["tokens"],
    norm=settings["lens"]["norm"],
)
made_by = artifacts.provenance(settings, snakemake.params.code, artifacts.table_provenance(source.prompts))
artifacts.write_table(readings, snakemake.output.readings, "readings", made_by)
