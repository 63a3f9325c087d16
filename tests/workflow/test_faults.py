"""Bad input, kills and damaged files: a sentence, and nothing that was computed is lost."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from moescope import artifacts

import small


def write_config(folder, change):
    config = copy.deepcopy(small.SMALL)
    change(config)
    small.configure(folder, config)


def test_all_errors_come_before_any_job(tmp_path):
    folder = small.make(tmp_path / "run")

    def change(config):
        config["sed"] = 1
        config["models"]["small-moe"]["dense_partner"] = "small-dens"
        config["datasets"]["facts"]["relations"].append("nowhere")
        config["models"]["a/b"] = config["models"]["small-dense"]
        config["models"]["both"] = config["models"]["small-dense"] | {"hub": "owner/model"}
        config["models"]["unsaid"] = {"folder": "config"}
        columns = {"subject": "country", "object": "captial", "template": "text"}
        config["datasets"]["towns"] = {"format": "table", "path": "towns.csv", "columns": columns}

    write_config(folder, change)
    (folder / "towns.csv").write_text("country,capital,text\nFrance,Paris,The capital of {} is\n")
    facts = folder / "config/facts/animal_young.yaml"
    facts.write_text(facts.read_text() + "  cow: heifer\n")
    printed = small.snakemake(folder, check=False)
    for sentence in (
        "The configuration has errors; nothing was run.",
        "config/config.yaml: sed: not a known key; did you mean 'seed'?",
        "models.small-moe.dense_partner: 'small-dens' is not a model; did you mean 'small-dense'?",
        "config/facts/nowhere.yaml: no such fact file",
        "duplicate fact 'cow', first given on line",
        "models: 'a/b' is not a usable name",
        "models.both: toy and hub given; give just one of toy, hub, folder",
        "models.unsaid.kind: missing; say moe or dense",
        "datasets.towns: towns.csv: columns.object: no column 'captial'; did you mean 'capital'?",
    ):
        assert sentence in printed, printed
    assert "Traceback" not in printed
    assert not (folder / "results").exists()


def test_malformed_yaml_is_named_with_its_line(tmp_path):
    folder = small.make(tmp_path / "run")
    (folder / "config/config.yaml").write_text("models:\n\ta: 1\n")
    printed = small.snakemake(folder, check=False)
    assert "config/config.yaml:2: not valid YAML" in printed
    assert not (folder / "results").exists()


def test_a_target_of_a_misspelt_model_is_refused(tmp_path):
    folder = small.make(tmp_path / "run")
    target = "results/facts/smal-moe/prompts.parquet"
    assert "MissingRuleException" in small.snakemake(folder, target, check=False)


@pytest.mark.parametrize("stage", ["train_toy", "capture", "block_experts"])
def test_a_killed_run_is_finished_by_the_same_command(tmp_path, finished, copy_of_finished, stage):
    """SIGKILL of the whole process group in the middle of a stage; the lock is stale and the outputs half-made."""
    folder = copy_of_finished
    for made in (folder / "results").iterdir():
        if made.name != "models" or stage == "train_toy":
            shutil.rmtree(made)
    wanted = f"results/tables/{'blocking' if stage == 'block_experts' else 'efficiency'}.csv"
    command = [sys.executable, "-m", "snakemake", "--cores", "2", wanted]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: list((folder / "results/logs").glob(f"{stage}/**/*.log")), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "results/models").rglob("*") if path.is_file()}
    small.snakemake(folder, "--unlock")
    small.snakemake(folder, wanted)
    assert (folder / wanted).read_bytes() == (finished / wanted).read_bytes()
    if stage != "train_toy":
        assert kept
        assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished models were trained again"
    assert not list((folder / "results").rglob("*.part"))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("file", "rule", "target"),
    [
        ("facts/small-moe/activations/0.safetensors", "attribute", "facts/small-moe/attribution/layers.parquet"),
        ("facts/small-moe/prompts.parquet", "keep_only", "facts/small-moe/interventions/keep_only.parquet"),
        ("models/small-moe/model.safetensors", "keep_only", "facts/small-moe/interventions/keep_only.parquet"),
    ],
)
def test_a_truncated_file_is_named(copy_of_finished, file, rule, target):
    path = copy_of_finished / "results" / file
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    printed = small.snakemake(copy_of_finished, f"results/{target}", "--force", "--allowed-rules", rule, check=False)
    assert f"Error in rule {rule}" in printed
    assert "results/" + file.removesuffix("model.safetensors") in printed
    assert "delete it and run again" in printed


def test_shards_change_no_byte_of_a_table(copy_of_finished, finished):
    """Four batches of prompts in three shards, to the tables of experts and to what masking breaks."""
    folder = small.configure(copy_of_finished, small.SMALL | {"shards": 3})
    tables = [f"results/tables/{name}.csv" for name in ("blocking", "keep_only", "expert_map", "faithfulness")]
    masking = "results/facts/small-moe/interventions/masking.parquet"
    cut = ["capture", "block_experts", "keep_only", "map_experts", "find_key_neurons", "mask_keys"]
    # Of block_experts two tables, of find_key_neurons three, and one of each other.
    once = ["gather_prompts", "filter_known", "attribute", "summarise_interventions"]
    expected = dict.fromkeys(cut, 3) | dict.fromkeys(once, 1) | {"gather_shards": 8}
    assert small.planned(folder, *tables, masking) == expected
    for path in (*tables, masking):
        (folder / path).unlink()
    small.snakemake(folder, *tables, masking)
    for path in tables:
        assert (folder / path).read_bytes() == (finished / path).read_bytes(), path
    found, whole = (artifacts.read_table(run / masking, "masking") for run in (folder, finished))
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    for kind in ("activations", "interventions/blocking", "utilization/key_neurons"):
        shards = {path.name.split(".")[0] for path in (folder / f"results/facts/small-moe/{kind}").glob("?.*")}
        assert shards == {"0", "1", "2"}
