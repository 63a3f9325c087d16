"""Snakemake script: run the prompts of a shard and record the activation cache."""

from moescope import anatomy, artifacts, capture, checkpoints, devices, facts, logs, samples

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads, snakemake.resources.get("gpu", 0))
settings, output = snakemake.params.settings, snakemake.output
batch_size, shard, shards = (settings[key] for key in ("batch_size", "shard", "shards"))

description = artifacts.read_json(snakemake.input.model[0])
model, tokenizer = checkpoints.load(checkpoints.folder_of(description), **settings["load"])
dataset = artifacts.read_table(snakemake.input.dataset, "dataset")
tokens, dropped = facts.tokenise(tokenizer, facts.select(dataset, settings["templates"]))
parts = anatomy.find(model)
anatomy.check_kind(parts, settings["moe"])
rows = capture.rows(samples.share(tokens, batch_size, shard, shards), settings["answer"])
with artifacts.writing_tensors(output.activations, "activations", len(rows)) as cache:
    scored, errors = capture.capture(model, parts, tokens, batch_size, cache.put, settings["answer"], shard, shards)
    cache.made_by = artifacts.provenance(
        settings,
        snakemake.params.code,
        artifacts.table_provenance(snakemake.input.dataset),
        **checkpoints.identity(model, description),
        verified=errors,
        levels=anatomy.levels(parts),
    )
    artifacts.write_table(dropped[shard::shards], output.dropped, "dropped", cache.made_by)
    artifacts.write_table(scored, output.prompts, "prompts", cache.made_by)
