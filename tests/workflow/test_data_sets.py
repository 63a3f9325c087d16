"""What the target of a prompt is, which prompts are kept, and where data sets come from; on a trained toy model."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescope import artifacts

import small

CAPITALS = {"path": "config/facts", "relations": ["country_capital"]}
COLUMNS = {"subject": "country", "object": "capital", "template": "text", "aliases": "also"}
DATASETS = {
    "towns": {"format": "table", "path": "data/towns.csv", "columns": COLUMNS, "answer": "all_tokens"},
    "own": CAPITALS | {"answer": "argmax"},
    "sure": CAPITALS | {"known": 10},
}
MADE = {
    "towns": ["attribution/layers", "attribution/experts", "interventions/blocking", "interventions/keep_only"],
    "own": ["attribution/layers"],
    "sure": ["attribution/layers", "attribution/margins", "interventions/keep_only"],
}


def towns(path):
    """The facts of country_capital as a table with columns of its own."""
    facts = yaml.safe_load((small.ROOT / "config/facts/country_capital.yaml").read_text())["facts"]
    path.parent.mkdir()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["country", "capital", "text", "also"])
        for country, capitals in facts.items():
            first, *others = capitals if isinstance(capitals, list) else [capitals]
            writer.writerow([country, first, "The capital of {} is", json.dumps(others)])


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """The finished run of two toys, with further data sets that one of them is asked about."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("data") / "run", symlinks=True)
    towns(folder / "data/towns.csv")
    small.configure(folder, small.SMALL | {"datasets": small.SMALL["datasets"] | DATASETS})
    paths = [f"results/{name}/small-moe/{table}.parquet" for name, tables in MADE.items() for table in tables]
    small.snakemake(folder, *paths)
    return folder


@pytest.fixture(scope="module")
def toy(run):
    """The model and its tokenizer, loaded by nothing but their own library."""
    folder = run / "results/models/small-moe"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def table(run, dataset, name):
    return artifacts.read_table(run / f"results/{dataset}/small-moe/{name}.parquet", name.split("/")[-1])


def prompts(run, dataset, name="prompts"):
    return artifacts.read_table(run / f"results/{dataset}/small-moe/{name}.parquet", "prompts")


@torch.no_grad()
def log_probs(model, ids):
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_all_tokens_of_an_answer_are_scored_as_in_one_plain_forward_pass(run, toy):
    model, tokenizer = toy
    rows = prompts(run, "towns")
    assert len(rows) > 20
    assert rows["object_tokens"].nunique() > 1
    for row in rows.itertuples():
        targets, given = row.target_ids.tolist(), row.token_ids.tolist()
        assert tokenizer.decode(given + targets).strip() == f"{row.prompt} {row.objects[0]}"
        assert targets[0] == row.target_id
        scores = log_probs(model, given + targets)[len(given) - 1 : -1]
        of_targets = scores[torch.arange(len(targets)), targets]
        assert row.log_prob == pytest.approx(float(of_targets.sum()), abs=1e-4)
        assert row.rank == 1 + int((scores > of_targets.unsqueeze(1)).sum(1).max())


def test_answers_of_several_tokens_have_one_row_a_part(run):
    rows = prompts(run, "towns")
    layers, experts = table(run, "towns", "attribution/layers"), table(run, "towns", "attribution/experts")
    assert len(layers) == 3 * len(rows)
    assert not experts.duplicated(["prompt_id", "layer", "expert"]).any()
    # An answer token may use other experts than the one before it.
    assert experts.groupby("prompt_id").size().gt(3 * 3).any()
    kept = table(run, "towns", "interventions/keep_only")
    clean = kept[kept["shared"] & (kept["routed"] == -1)].set_index("prompt_id")["rank"]
    assert clean.loc[rows["prompt_id"]].tolist() == rows["rank"].tolist()
    blocked = table(run, "towns", "interventions/blocking")
    assert set(blocked["prompt_id"]) == set(rows["prompt_id"])


def test_the_models_own_answer_has_the_first_rank(run, toy):
    rows = prompts(run, "own")
    assert (rows["rank"] == 1).all()
    best = [log_probs(toy[0], row.token_ids.tolist())[-1].max(0) for row in rows.itertuples()]
    assert rows["target_id"].tolist() == [int(found.indices) for found in best]
    assert rows["log_prob"].tolist() == pytest.approx([float(found.values) for found in best], abs=1e-4)
    wrong = [row.target_id not in row.accepted_ids for row in rows.itertuples()]
    assert any(wrong)


def test_only_prompts_that_the_model_knows_are_analysed(run):
    captured, kept = (prompts(run, "sure", name) for name in ("captured", "prompts"))
    unknown = table(run, "sure", "unknown")
    assert kept["prompt_id"].tolist() == captured.loc[captured["rank"] <= 10, "prompt_id"].tolist()
    assert unknown["prompt_id"].tolist() == captured.loc[captured["rank"] > 10, "prompt_id"].tolist()
    assert len(kept)
    assert len(unknown)
    assert unknown["reason"].tolist() == [f"rank {rank} in the clean run, more than 10" for rank in unknown["rank"]]
    for name in MADE["sure"]:
        assert set(table(run, "sure", name)["prompt_id"]) == set(kept["prompt_id"]), name
    # The filter is all that differs from the data set that toys learn.
    all_facts = prompts(run, "facts").query("relation == 'country_capital'")
    assert captured["rank"].tolist() == all_facts["rank"].tolist()


def test_a_data_set_of_the_hub_is_what_its_commit_holds(tmp_path):
    folder = small.make(tmp_path / "run")
    (tmp_path / "files").mkdir()
    header = "subj\tprop\tobj\tquestion\tpossible_answers\n"
    for name, subject, answer in (("test", "Italy", "Rome"), ("train", "Japan", "Tokyo")):
        record = f'{subject}\tcapital\t{answer}\tWhat is the capital of {subject}?\t["{answer}"]\n'
        (tmp_path / f"files/{name}.tsv").write_text(header + record)
    small.cached(tmp_path / "files", folder / "home", "owner/facts", "datasets")

    def subjects(**settings):
        dataset = {"format": "popqa", "hub": "owner/facts", **settings}
        small.configure(folder, small.SMALL | {"datasets": small.SMALL["datasets"] | {"far": dataset}})
        small.snakemake(folder, "results/far/dataset.parquet")
        record = json.loads((folder / "results/far/source.json").read_text())
        assert record["commit"] == small.COMMIT
        return artifacts.read_table(folder / "results/far/dataset.parquet", "dataset")["subject"].tolist()

    assert subjects() == ["Italy", "Japan"]
    # Files that were fetched before and are not wanted any more are not read.
    assert subjects(files="train.*") == ["Japan"]
