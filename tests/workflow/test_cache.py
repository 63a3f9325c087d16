"""The cache that checkouts share (`--cache`): what is the same is computed once, what differs never shares an entry."""

import copy
from pathlib import Path

import pytest
import torch

from moescope import artifacts

import small

SHAPE = {"architecture": "olmoe", "layers": 3, "experts": 4, "experts_per_token": 2, "expert_width": 16}
CONFIG = {
    "datasets": {
        "towns": {"path": "config/facts", "relations": ["country_capital"]},
        "animals": {"path": "config/facts", "relations": ["animal_young"]},
    },
    "models": {
        "one": {"toy": SHAPE},
        "two": {"toy": SHAPE | {"seed": 1}},
        "hub": {"hub": "owner/moe", "kind": "moe"},
    },
    "toy_training": {"dataset": "towns", "epochs": 1},
}
RUNS = [("towns", "one"), ("animals", "one"), ("towns", "two"), ("towns", "hub")]
CAPTURES = [f"results/{dataset}/{model}/activations/0.parquet" for dataset, model in RUNS]
COMMITS = {"first": "1" * 40, "second": "2" * 40}


@pytest.fixture
def checkout(tmp_path, build, tokenizer, monkeypatch):
    """A function that makes a checkout, all of which share one cache; `main` of the hub's model is the named commit."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(shared))

    def of(name, main):
        model = copy.deepcopy(build("mixtral"))
        if main == "second":
            with torch.no_grad():
                model.lm_head.weight *= 2
        model.save_pretrained(tmp_path / main)
        tokenizer.save_pretrained(tmp_path / main)
        folder = small.make(tmp_path / name, CONFIG)
        small.cached(tmp_path / main, folder / "home", "owner/moe", commit=COMMITS[main])
        return folder

    return of


def entries(folder):
    """Entries of the shared cache: keys of jobs, whose outputs lie there a file each."""
    return {path.name.split("_")[0] for path in (folder.parent / "shared").iterdir()}


def made_of(folder):
    """The model and the data that each capture says it was made of."""
    made_by = {path: artifacts.table_provenance(folder / path) for path in CAPTURES}
    return {path: (made_by[path]["model_commit"], made_by[path]["dataset_digest"]) for path in CAPTURES}


def test_checkouts_share_what_is_the_same_and_nothing_else(checkout, tmp_path, monkeypatch):
    one = checkout("one", main="first")
    small.snakemake(one, *CAPTURES, "--cache")
    made = entries(one)
    assert len(made) == 2 + len(CAPTURES), "a model, a data set or a training took the entry of another one"
    assert len(set(made_of(one).values())) == len(CAPTURES)

    # Another checkout, for which the branch of the hub has moved on.
    other = checkout("other", main="second")
    small.snakemake(other, *CAPTURES, "--cache")
    assert len(entries(other) - made) == 1, "more or less than the capture of the other revision was computed"
    assert not any(log.read_text() for log in (other / "results/logs/train_toy").glob("*")), "a toy was trained again"
    for model in ("one", "two"):
        weights = Path("results/models", model, "model.safetensors")
        assert (one / weights).resolve() == (other / weights).resolve()
    of_hub = CAPTURES[-1]
    assert made_of(other) == made_of(one) | {of_hub: (COMMITS["second"], made_of(one)[of_hub][1])}
    # Without the shared cache nothing is made again.
    assert not small.planned(other, *CAPTURES)

    # Other code: the digest of every module that the script imports is part of the key.
    made = entries(other)
    module = other / "scripts/moescope/capture.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    small.snakemake(other, CAPTURES[0], "--cache")
    assert len(entries(other) - made) == 1

    # Another version of a package: the training and the capture.
    made = entries(one)
    third = checkout("third", main="first")
    about = tmp_path / "packages/pandas-99.0.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 99.0\n")
    monkeypatch.setenv("PYTHONPATH", str(about.parents[1]))
    small.snakemake(third, CAPTURES[0], "--cache")
    assert len(entries(third) - made) == 2
    assert artifacts.table_provenance(third / CAPTURES[0])["versions"]["pandas"] == "99.0"
