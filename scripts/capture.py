"""Snakemake script: run the prompts of a shard and record the activation cache."""

from moescope import anatomy, artifacts, capture, checkpoints, devices, facts, logs

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.gpu)
settings, output = snakemake.params.settings, snakemake.output

description = artifacts.read_json(snakemake.input.model[0])
model, tokenizer = checkpoints.load(checkpoints.folder_of(description), **settings["load"])
dataset = artifacts.read_table(snakemake.input.dataset, "dataset")
prompts = facts.select(dataset, settings["templates"]).iloc[int(settings["shard"]) :: settings["shards"]]
tokens, dropped = facts.tokenise(tokenizer, prompts)
parts = anatomy.find(model)
anatomy.check_kind(parts, settings["moe"])
rows = capture.rows(tokens, settings["answer"])
with artifacts.writing_tensors(output.activations, "activations", len(rows)) as cache:
    scored, errors = capture.capture(model, parts, tokens, settings["batch_size"], cache.put, settings["answer"])
    cache.made_by = artifacts.provenance(
        settings,
        snakemake.params.code,
        artifacts.table_provenance(snakemake.input.dataset),
        **checkpoints.identity(model, description),
        verified=errors,
        levels=anatomy.levels(parts),
    )
    artifacts.write_table(dropped, output.dropped, "dropped", cache.made_by)
    artifacts.write_table(scored, output.prompts, "prompts", cache.made_by)
