"""Bad input, kills and damaged files: a sentence, and nothing that was computed is lost."""

import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from benchmarks import kills

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


STAGES = ["train_toy", "capture", "gather_prompts", "attribute", "keep_only", "summarise_attribution", "plot"]


def test_a_run_killed_in_every_stage_is_finished_by_the_same_command(tmp_path, finished, copy_of_finished):
    """SIGKILL of the whole process group in the middle of each stage in turn: the results are the same in the end."""
    folder, log, moments = copy_of_finished, tmp_path / "log", random.Random(7)
    targets = ["figures/facts.efficiency.svg", "facts/small-moe/interventions/keep_only.parquet"]
    targets = [f"results/{target}" for target in targets]
    for made in ("models/small-moe", "facts/small-moe", "tables", "figures", "logs"):
        shutil.rmtree(folder / "results" / made)
    killed = []
    for stage in STAGES:
        process = kills.start(folder, log, *targets)
        place = folder / "results/logs"
        if kills.wait_for(lambda: [*place.glob(f"{stage}.log"), *place.glob(f"{stage}/**/*.log")], process):  # noqa: B023
            time.sleep(moments.uniform(0, 2))
            killed.append((kills.kill(process, log), kills.finished_files(folder)))
    small.snakemake(folder, *targets)
    assert {rule for rules, _ in killed for rule in rules} >= {"train_toy", "capture", "attribute", "keep_only"}
    for rules, kept in killed:
        assert kept
        assert not kills.computed_twice(kept), rules
    made = {str(path.relative_to(folder / "results")) for path in (folder / "results").rglob("*.*")}
    assert made >= {"tables/efficiency.csv", "facts/small-moe/interventions/keep_only.parquet"}
    assert not made & set(kills.differences(folder, finished))
    assert not list((folder / "results").rglob("*.part"))


@pytest.mark.parametrize(
    ("file", "rule", "target"),
    [
        ("facts/small-moe/activations/0.safetensors", "attribute", "facts/small-moe/attribution/layers.parquet"),
        ("models/small-moe/model.safetensors", "keep_only", "facts/small-moe/interventions/keep_only.parquet"),
    ],
)
def test_a_file_with_one_flipped_bit_is_named(copy_of_finished, file, rule, target):
    path = copy_of_finished / "results" / file
    stat, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    printed = small.snakemake(copy_of_finished, f"results/{target}", "--force", "--allowed-rules", rule, check=False)
    assert f"Error in rule {rule}" in printed
    assert f"results/{file}: damaged: its content is not what was written; delete it and run again" in printed


def test_two_runs_at_once_a_killed_job_and_ctrl_c(tmp_path, finished, copy_of_finished):
    """Each ends with a sentence, and the same command then finishes with the same tables."""
    folder, log = copy_of_finished, tmp_path / "log"
    targets = ["results/tables/efficiency.csv"]
    shutil.rmtree(folder / "results/tables")
    shutil.rmtree(folder / "results/facts/small-moe/attribution")

    def job():
        """The process of the job that runs: the script's name is on its command line."""
        found = subprocess.run(["pgrep", "-f", f"{folder}/.snakemake/scripts"], capture_output=True, text=True).stdout
        return [int(line) for line in found.split()]

    first = kills.start(folder, log, *targets)
    assert kills.wait_for(job, first)
    stopped = job()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    refused = small.snakemake(folder, *targets, check=False)
    assert f"results/: another run is at work here (process {first.pid} on" in refused
    assert "Traceback" not in refused
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    assert first.wait() == 1
    assert re.search(r"^\w+ \(log: results/logs/\S+\.log\) was killed, most often", log.read_text(), re.M)

    second = kills.start(folder, log, *targets)
    assert kills.wait_for(job, second)
    os.killpg(second.pid, signal.SIGINT)
    assert second.wait() == 1
    assert "The run was stopped" in log.read_text()

    # Snakemake alone is killed: its job does not go on in its back.
    started = folder / "results/logs/attribute/facts/small-moe.log"
    started.unlink(missing_ok=True)
    alone = kills.start(folder, log, *targets)
    assert kills.wait_for(started.exists, alone)
    alone.kill()
    alone.wait()
    end = time.monotonic() + 60
    while job():
        assert time.monotonic() < end

    small.snakemake(folder, *targets)
    assert (folder / targets[0]).read_bytes() == (finished / targets[0]).read_bytes()
    assert not list((folder / "results").rglob("*.part"))


DISKS = """
set -eu
mount -t tmpfs -o size=100m tmpfs disk
cp -a results/. disk/
mount --bind disk results
mount -o remount,bind,ro results
{run} > read-only.txt 2>&1 && exit 2
umount results
mount --move disk results
cat /dev/zero > results/filler 2> /dev/null || true
truncate -s -{free} results/filler
{run} > full.txt 2>&1 && exit 3
find results -name "*.part" > left.txt
rm results/filler
{run} > freed.txt 2>&1
cp {target} again.csv
"""


def test_a_read_only_folder_and_a_full_disk(finished, copy_of_finished):
    """Real ones: a small tmpfs in a mount namespace of its own, gone with the process."""
    folder, target = copy_of_finished, "results/tables/efficiency.csv"
    (folder / "disk").mkdir()
    shutil.rmtree(folder / "results/tables")
    run = f"{sys.executable} -m snakemake --cores 2 {target}"
    root = [] if os.getuid() == 0 else ["--map-root-user"]
    script = DISKS.format(run=run, target=target, free=20_000)
    subprocess.run(["unshare", "--mount", *root, "sh", "-c", script], cwd=folder, check=True)
    said = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    assert "results/: cannot be written" in said["read-only"]
    assert "make its folder writable, then run the same command" in said["read-only"]
    assert "rule summarise_attribution" not in said["read-only"]
    assert "the disk is full; free space, then run the same command" in said["full"]
    assert "results/tables/efficiency" in said["full"].split("the disk is full")[0].splitlines()[-1]
    assert not said["left"]
    assert (folder / "again.csv").read_bytes() == (finished / target).read_bytes()


def test_a_clock_that_was_wrong_neither_repeats_nor_hides_work(copy_of_finished):
    folder, ahead = copy_of_finished, 36 * 3600 * 10**9
    for path in (folder / "results").rglob("*"):
        when = path.lstat().st_mtime_ns + ahead
        os.utime(path, ns=(when, when), follow_symlinks=False)
    table = folder / "results/tables/efficiency.csv"
    table.unlink()
    assert "files were dated in the future" in small.snakemake(folder, "results/tables/efficiency.csv")
    assert table.exists()
    assert small.planned(folder, "tables") == {}
    facts = folder / "config/facts/animal_young.yaml"
    facts.write_text(facts.read_text() + "  newt: eft\n")
    assert "write_dataset" in small.planned(folder, "tables")


def test_shards_change_no_byte_of_a_table(copy_of_finished, finished):
    """Four batches of prompts in two shards, to the tables of experts and to what masking breaks."""
    folder = small.configure(copy_of_finished, small.SMALL | {"shards": 2})
    tables = [f"results/tables/{name}.csv" for name in ("blocking", "keep_only", "expert_map", "faithfulness")]
    masking = "results/facts/small-moe/interventions/masking.parquet"
    cut = ["capture", "block_experts", "keep_only", "map_experts", "find_key_neurons", "mask_keys"]
    # Of find_key_neurons three tables, of the four others one that is asked for.
    once = ["gather_prompts", "filter_known", "attribute", "summarise_interventions"]
    expected = dict.fromkeys(cut, 2) | dict.fromkeys(once, 1) | {"gather_shards": 7}
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
        assert shards == {"0", "1"}
