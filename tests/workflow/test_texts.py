"""Free-text tasks beside facts: from a file of questions to their key neurons and what masking them breaks."""

import json

import pandas as pd
import pytest
from pyroaring import BitMap

from moescope import artifacts

import small

SUMS = [{"question": f"What is {a} and {b}?", "answer": f"It is {a + b}."} for a in range(6) for b in range(4)]
TEXTS = {
    "sums": {"path": "sums.jsonl", "prompt": "{question}", "response": " {answer}", "tokens": 8},
    "asked": {"path": "sums.jsonl", "prompt": "{question}", "samples": 5, "tokens": 3},
}


def test_texts_are_samples_like_facts(copy_of_finished):
    (copy_of_finished / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    small.configure(copy_of_finished, small.SMALL | {"texts": TEXTS})
    masking, generated = (
        "results/sums/small-moe/interventions/masking.parquet",
        "results/asked/small-moe/prompts.parquet",
    )
    small.snakemake(copy_of_finished, masking, generated)
    prompts = artifacts.read_table(copy_of_finished / "results/sums/small-moe/prompts.parquet", "prompts")
    assert (prompts["prompt"] + prompts["response"]).tolist() == [f"{s['question']} {s['answer']}" for s in SUMS]
    assert prompts["target_ids"].str.len().le(8).all()
    keys = artifacts.read_table(
        copy_of_finished / "results/sums/small-moe/utilization/key_neurons.parquet", "key_neurons"
    )
    assert keys["tokens"].tolist() == prompts["target_ids"].str.len().tolist()
    assert all(len(BitMap.deserialize(found)) >= 6 for found in keys["keys"])
    measured = artifacts.read_table(copy_of_finished / masking, "masking")
    assert set(measured["prompt_id"]) == set(prompts["prompt_id"])
    asked = artifacts.read_table(copy_of_finished / generated, "prompts")
    assert 0 < len(asked) <= 5
    assert asked["generated"].all()
    assert asked["target_ids"].str.len().between(1, 3).all()
    made_by = artifacts.table_provenance(copy_of_finished / masking)
    assert made_by["model_commit"]
    assert made_by["dataset_digest"]
    # The tables of facts need no text, and those of utilization hold both.
    planned = small.planned(copy_of_finished, "results/figures/sums.utilization.svg")
    assert {"find_key_neurons", "summarise_utilization", "plot_utilization"} <= planned.keys()
    assert "attribute" not in planned


def test_families_are_models_that_the_whole_workflow_knows(copy_of_finished):
    base = small.SMALL["models"]["small-moe"]["toy"]
    family = {"base": base, "variants": {"two": {}, "one": {"experts_per_token": 1}}, "seeds": [0, 1]}
    small.configure(copy_of_finished, small.SMALL | {"families": {"active": family}})
    planned = small.planned(copy_of_finished, "results/figures/facts.families.svg")
    assert planned["train_toy"] == planned["block_experts"] == planned["find_key_neurons"] == 4
    # What the models of the run gave is taken as theirs: tables, rule and figure are real, the training is spared.
    members = [f"active-{variant}-{seed}" for variant in ("two", "one") for seed in (0, 1)]
    tables = [copy_of_finished / f"results/tables/{name}.parquet" for name in ("utilization", "efficiency", "blocking")]
    for path in tables:
        table = artifacts.read_table(path, "table")
        own = table[table["model"] == "small-moe"]
        every = pd.concat([table, *(own.assign(model=member) for member in members)], ignore_index=True)
        artifacts.write_table(every, path, "table", artifacts.table_provenance(path))
    targets = ["results/tables/families.parquet", "results/figures/facts.families.svg"]
    rules = ["--allowed-rules", "summarise_families", "plot_families", "--rerun-triggers", "mtime"]
    small.snakemake(copy_of_finished, *targets, *rules)
    found = artifacts.read_table(copy_of_finished / targets[0], "table")
    mui = artifacts.read_table(tables[0], "table").query("model == 'small-moe' and scope == 'all'")["mui"].item()
    assert set(found["variant"]) == {"two", "one"}
    of_mui = found[found["metric"] == "mui"].set_index("variant")
    assert of_mui["mean"].tolist() == pytest.approx([mui, mui])
    assert of_mui.loc["one", "difference"] == pytest.approx(0)
    assert of_mui["seeds"].tolist() == [2, 2]
