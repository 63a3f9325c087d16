"""Snakemake script: who steers the routers, from the cache: logits by source, and heads that go with experts."""

from moescope import anatomy, artifacts, checkpoints, devices, logs, router_attribution

logs.to_file_and_terminal(snakemake.log[0])
devices.use(snakemake.threads)
settings = snakemake.params.settings

model, _ = checkpoints.load_described(snakemake.input.model[0], **settings["load"])
prompts = artifacts.read_table(snakemake.input.prompts, "prompts")
heads, experts = (artifacts.read_table(snakemake.input[kind], kind) for kind in ("heads", "experts"))
parts, activations = anatomy.find(model), snakemake.input.activations
split = router_attribution.attribute(model, parts, activations, prompts)
associations = router_attribution.associate(
    parts, activations, prompts, heads, experts, settings["associations"]["permutations"], settings["seed"]
)

inherited = artifacts.table_provenance(snakemake.input.heads)
made_by = artifacts.provenance(settings, snakemake.params.code, inherited)
artifacts.write_table(split, snakemake.output.router_attribution, "router_attribution", made_by)
artifacts.write_table(associations, snakemake.output.associations, "associations", made_by)
