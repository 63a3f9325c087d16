"""What a run records of itself, and that it is enough to make its tables again."""

import shutil
import subprocess
from modulefinder import ModuleFinder
from pathlib import Path

import pytest

from moescope import artifacts, record

import small


@pytest.fixture(scope="module")
def found(finished):
    return artifacts.read_json(finished / "results/provenance.json")


def test_a_run_records_all_that_its_tables_depend_on(finished, found):
    models = ("small-moe", "small-dense")
    described = {model: artifacts.read_json(finished / f"results/models/{model}/model.json") for model in models}
    assert found["models"] == described
    dataset = artifacts.table_provenance(finished / "results/facts/dataset.parquet")["dataset_digest"]
    commits = {run["model"]: (run["model_commit"], run["dataset_digest"]) for run in found["runs"]}
    assert commits == {model: (described[model]["commit"], dataset) for model in models}
    assert all(run["torch"] and run["transformers"] and run["dtype"] == "float32" for run in found["runs"])
    assert set(found["files"]) == {
        f"config/facts/{name}.yaml" for name in small.SMALL["datasets"]["facts"]["relations"]
    }
    assert found["files"]["config/facts/animal_young.yaml"] == artifacts.file_digest(
        finished / "config/facts/animal_young.yaml"
    )
    # Of those that this configuration asks for: there is one shard only.
    assert set(found["code"]) == {path.name for path in (finished / "scripts").glob("*.py")} - {"gather_shards.py"}
    tables = sorted((finished / "results/tables").glob("*.csv"))
    assert found["tables"] == {path.name: artifacts.file_digest(path) for path in tables}
    assert found["config"]["seed"] == 0
    assert found["config"]["models"]["small-moe"]["toy"]["seed"] == 0


def test_every_table_says_which_data_models_and_code_made_it(finished, found):
    tables = sorted((finished / "results/tables").glob("*.parquet"))
    assert len(tables) == len(found["tables"])
    runs = [{key: run[key] for key in ("dataset", "model", "model_commit", "dataset_digest")} for run in found["runs"]]
    for path in tables:
        made_by = artifacts.table_provenance(path)
        assert made_by["settings"]["seed"] == 0
        assert {"moescope", "pandas", "numpy"} <= made_by["versions"].keys()
        assert made_by["sources"], path
        for source in made_by["sources"]:
            assert {key: source[key] for key in runs[0]} in runs
            assert source["torch"]
            for kind, code in source["code_digests"].items():
                assert code in found["code"].values(), (path, kind)
    sources = artifacts.table_provenance(finished / "results/tables/blocking.parquet")["sources"]
    assert [source["code_digests"]["blocking"] for source in sources] == [found["code"]["block_experts.py"]]


def test_a_run_is_made_again_from_its_record(finished, copy_of_finished):
    """In a checkout with another configuration, of which nothing may come through; the trained models are there."""
    folder = small.configure(copy_of_finished, small.SMALL | {"seed": 7, "batch_size": 3, "texts": {}, "shards": 2})
    for made in ("facts/small-moe", "facts/small-dense", "tables"):
        shutil.rmtree(folder / "results" / made)
    again = ("--configfile", str(finished / "results/provenance.json"))
    table = "results/tables/routing.csv"
    printed = small.snakemake(folder, table, *again)
    assert "The record" not in printed
    assert "rule train_toy:" not in printed
    assert (folder / table).read_bytes() == (finished / table).read_bytes()
    assert not small.planned(folder, table, *again)

    # What is not as it was is said.
    facts, code = folder / "config/facts/animal_young.yaml", folder / "scripts/moescope/routing.py"
    facts.write_text(facts.read_text() + "  okapi: calf\n")
    code.write_text(code.read_text() + "EDITED = True\n")
    printed = small.snakemake(folder, "--dry-run", *again)
    assert "this run repeats: config/facts/animal_young.yaml: its content is not what it was" in printed
    assert "this run repeats: other code is below analyse_routing.py" in printed


def test_moving_revisions_are_recorded_as_the_commits_that_they_were(tmp_path):
    config = {
        "models": {
            "a": {"hub": "owner/a", "revision": "main", "checkpoint_revisions": {"half": "step1", "start": "step0"}},
            "b": {"folder": "b", "revision": "main"},
        },
        "datasets": {"c": {"hub": "owner/c", "revision": "v1"}, "d": {"path": "d", "revision": "main"}},
        "texts": {},
    }
    for name in ("models/a/model.json", "models/b/model.json", "c/source.json"):
        artifacts.write_json({"commit": f"commit of {name}"}, tmp_path / name)
    models = [str(tmp_path / f"models/{name}/model.json") for name in "ab"]
    states = [str(tmp_path / f"models/a/checkpoints/{state}/model.json") for state in ("start", "half", "end")]
    for number, path in enumerate(states):
        artifacts.write_json({"commit": f"commit {number}"}, Path(path))
    found = record.of_run(config, {}, models, states, [str(tmp_path / "c/source.json")], [], [], [])
    revisions = {
        name: entry["revision"]
        for section in ("models", "datasets")
        for name, entry in found["config"][section].items()
    }
    assert revisions == {"a": "commit of models/a/model.json", "b": "main", "c": "commit of c/source.json", "d": "main"}
    pinned = found["config"]["models"]["a"]["checkpoint_revisions"]
    assert pinned == {"start": "commit 0", "half": "commit 1", "end": "commit 2"}
    assert (config["models"]["a"]["revision"], config["models"]["a"]["checkpoint_revisions"]["half"]) == (
        "main",
        "step1",
    )


def test_the_code_of_a_rule_is_its_script_and_all_that_python_would_import(tmp_path):
    scripts = shutil.copytree(small.ROOT / "scripts", tmp_path / "scripts")
    for script in scripts.glob("*.py"):
        finder = ModuleFinder(path=[str(scripts)])
        finder.run_script(str(script))
        files = {Path(module.__file__) for module in finder.modules.values() if module.__file__}
        assert record.reached(script) == files
        # The same in every checkout.
        assert record.code_digest(script) == record.code_digest(small.ROOT / "scripts" / script.name)


def test_imports_are_found_wherever_they_stand(tmp_path):
    def tree(folder, deepest):
        for name in ("library/__init__", "library/a", "library/b", "beside", "other"):
            (folder / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.py").write_text("import os\n")
        listed = "import beside as other\nfrom library import (\n    a as other,  # other\n    b,\n)\n"
        (folder / "script.py").write_text(f"{listed}print('import other')\n")
        (folder / "library/a.py").write_text("def load():\n    import library.c\n")
        (folder / "library/c.py").write_text(deepest)
        return folder / "script.py"

    script = tree(tmp_path / "one", deepest="import os\n")
    reached = {str(path.relative_to(script.parent)) for path in record.reached(script)}
    assert reached == {"script.py", "beside.py", *(f"library/{name}.py" for name in ("__init__", "a", "b", "c"))}
    edited = tree(tmp_path / "two", deepest="import os, sys\n")
    assert record.code_digest(script) != record.code_digest(edited)


def test_a_checkout_says_its_commit_and_whether_it_was_edited(tmp_path):
    assert record.checkout(tmp_path) == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("a = 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = record.checkout(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["edits"] == ""
    (tmp_path / "code.py").write_text("a = 2\n")
    edited = record.checkout(tmp_path)
    assert edited["commit"] == clean["commit"]
    assert edited["edits"]


def test_other_versions_and_files_are_named():
    found = {"versions": {"numpy": "0.1"}, "code": {}, "checkout": {}, "files": {"gone.yaml": "x"}}
    sentences = list(record.differences(found, {}, ["new.yaml"]))
    assert any(sentence.endswith("here, the record was made with 0.1") for sentence in sentences)
    assert "gone.yaml: part of the record, but not read here" in sentences
    assert "new.yaml: not part of the record" in sentences
