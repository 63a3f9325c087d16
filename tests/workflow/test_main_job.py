"""The toy models of the default configuration: good enough to study, and with their facts in the FFNs."""

import json

import pytest
import yaml

import small


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = small.ROOT
    # What `make run` has left is taken if Snakemake finds nothing to do for it.
    if not (folder / "results/models").exists() or small.planned(folder, "models"):
        default = yaml.safe_load((small.ROOT / "config/config.yaml").read_text())
        folder = small.make(tmp_path_factory.mktemp("main") / "run", default)
        small.snakemake(folder, "models")
    paths = (folder / "results/models").glob("*/training.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def test_six_models_know_the_facts_in_words_never_seen(reports):
    assert len(reports) == 6
    for name, report in reports.items():
        assert report["prompts"] == {"training": 4668, "held_out": 1167, "dropped": 0}
        assert report["hit10"] >= 0.95, name
        assert report["mrr"] >= 0.85, name


def test_their_facts_are_in_the_ffns(reports):
    for name, report in reports.items():
        moe = bool(report["shape"]["experts"])
        assert report["mrr_without"]["ffn"] < (0.25 if moe else 0.5), name
        assert report["objects"]["several_tokens"] > 100


def test_pairs_differ_in_nothing_but_their_layers(reports):
    for moe, dense in (("toy-qwen2-moe", "toy-qwen2"), ("toy-olmoe", "toy-llama"), ("toy-mixtral", "toy-mistral")):
        for key in ("active_ffn_width", "seed", "recipe", "prompts", "vocabulary"):
            assert reports[moe][key] == reports[dense][key], (moe, key)
        assert reports[moe]["shape"]["layers"] == reports[dense]["shape"]["layers"]
