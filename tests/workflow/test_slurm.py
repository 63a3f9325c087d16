"""The workflow on a real SLURM cluster of two nodes on this machine, through the profile as it is.

Four runs at the same time, since most of what they take is waiting: the main job on two toy models, in which the
controller is away for a while; jobs that run out of time and that are cancelled; a job on a GPU, asked for in both
ways.
"""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cluster
import small

# The profile waits for big models on busy clusters; toy models on an idle one need not.
AT_ONCE = ["--slurm-init-seconds-before-status-checks", "2", "--max-status-checks-per-second", "1"]
# Longer than the plugin waits for an answer.
AWAY = 12
LIMIT = 1500
# Scripts of a job that takes too long at its first attempt, or always; and of one that writes what it sees of GPUs.
SLOW = """
import time

if snakemake.resources.runtime == 1 or "dense" in snakemake.output[0]:
    print("waiting", flush=True)
    time.sleep(600)
"""
SEEING = """
import os
from pathlib import Path

for path in snakemake.output:
    Path(path).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""


CANCELLED = "train_toy_small-dense"
ASKED = ("JobState", "TimeLimit", "MinMemoryNode")


@dataclass
class Run:
    """A run of the workflow; its jobs as SLURM knows them, by rule and wildcards, one for each attempt."""

    folder: Path
    process: subprocess.Popen
    jobs: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    survived: list[str] = field(default_factory=list)

    @property
    def printed(self):
        return (self.folder / "printed").read_text()

    def ask(self, slurm):
        jobs = {}
        for job in slurm.jobs():
            if job["WorkDir"] == str(self.folder):
                name = job["Comment"].removeprefix("rule_").replace("_wildcards", "")
                jobs.setdefault(name, []).append(job)
        self.jobs = jobs or self.jobs

    def reports(self, job, log):
        """Whether a failed job is named with its state and its logs."""
        said = (
            rf"Error in rule \w+:\n +message: SLURM-job '{job['JobId']}' failed, SLURM status is: '{job['JobState']}'"
        )
        return re.search(rf"{said}.*?\n +log: {log}, \S+/{job['JobId']}\.log ", self.printed, re.S)

    def running(self):
        return [job["JobId"] for jobs in self.jobs.values() for job in jobs if job["JobState"] == "RUNNING"]


def start(slurm, folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", "workflow/profiles/slurm", *AT_ONCE]
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            [*command, *arguments], cwd=folder, env=slurm.environment, stdout=printed, stderr=subprocess.STDOUT
        )
    return Run(folder, process)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def with_trouble(folder):
    """Two models to train within a minute, which takes longer."""
    small.make(folder)
    change(folder / "workflow/rules/models.smk", "runtime=minutes(30)", "runtime=minutes(1)")
    logged = "logs.to_file_and_terminal(snakemake.log[0])\n"
    change(folder / "scripts/train_toy.py", logged, logged + SLOW)
    return folder


def on_a_gpu(finished, folder, request):
    """A finished run, with one model on a GPU, which is asked for in one of the ways."""
    shutil.copytree(finished, folder, symlinks=True)
    models = small.SMALL["models"] | {"small-dense": small.SMALL["models"]["small-dense"] | {"device": "auto"}}
    small.configure(folder, small.SMALL | {"models": models})
    change(folder / "workflow/profiles/slurm/config.yaml", "gpu_request: gpus", f"gpu_request: {request}")
    (folder / "scripts/capture.py").write_text(SEEING)
    return folder


@pytest.fixture(scope="module")
def slurm():
    with cluster.running() as running:
        yield running


@pytest.fixture(scope="module")
def runs(slurm, finished, tmp_path_factory):
    """The four runs when they have ended; the controller was away, and one job cancelled whenever it ran."""
    base = tmp_path_factory.mktemp("slurm")
    trained = [f"results/models/{model}/model.json" for model in ("small-moe", "small-dense")]
    captured = "results/facts/small-dense/activations/0.parquet"
    runs = {
        "main": start(slurm, small.make(base / "main"), "--jobs", "6", "tables"),
        "trouble": start(slurm, with_trouble(base / "trouble"), "--retries", "1", "--keep-going", *trained),
        "gpus": start(slurm, on_a_gpu(finished, base / "gpus", "gpus"), captured),
        "gres": start(slurm, on_a_gpu(finished, base / "gres", "gres:toy"), captured),
    }
    try:
        end = time.monotonic() + LIMIT
        going = True
        while going and time.monotonic() < end:
            time.sleep(1)
            going = any(run.process.poll() is None for run in runs.values())
            for run in runs.values():
                run.ask(slurm)
            for job in runs["trouble"].jobs.get(CANCELLED, []):
                if job["JobState"] == "RUNNING":
                    slurm.ask("scancel", job["JobId"])
            main = runs["main"]
            if not main.survived and len(main.jobs) > 4 and main.running():
                main.survived = main.running()
                slurm.stop("slurmctld")
                time.sleep(AWAY)
                slurm.start_controller()
        yield runs
    finally:
        for run in runs.values():
            run.process.kill()
            run.process.wait()


def test_the_main_job_gives_the_same_tables_though_the_controller_was_away(runs, finished):
    run = runs["main"]
    assert run.process.returncode == 0, run.printed[-4000:]
    assert {job["JobState"] for jobs in run.jobs.values() for job in jobs} == {"COMPLETED"}
    assert all(len(jobs) == 1 for jobs in run.jobs.values())
    assert run.survived
    assert "Falling back" not in run.printed
    expected = {path.name: path.read_bytes() for path in (finished / "results/tables").glob("*.csv")}
    assert {path.name: path.read_bytes() for path in (run.folder / "results/tables").glob("*.csv")} == expected


def test_rules_of_a_second_or_two_are_no_jobs(runs):
    rules = {name.removesuffix("_facts_small-moe") for name in runs["main"].jobs}
    assert {"attribute", "summarise_attribution"} <= rules
    assert not rules & {"write_dataset_facts", "gather_prompts", "filter_known", "gather_checkpoints"}


def test_a_job_out_of_time_is_sent_again_with_more_of_it(runs):
    run = runs["trouble"]
    first, second = run.jobs["train_toy_small-moe"]
    assert [first[key] for key in ASKED] == ["TIMEOUT", "00:01:00", "2000M"]
    assert [second[key] for key in ASKED] == ["COMPLETED", "00:02:00", "4000M"]
    assert (run.folder / "results/models/small-moe/model.json").exists()
    assert run.reports(first, "results/logs/train_toy/small-moe.log")


def test_a_job_cancelled_again_and_again_is_reported_with_its_log(runs):
    run = runs["trouble"]
    assert [[job[key] for key in ASKED] for job in run.jobs[CANCELLED]] == [
        ["CANCELLED", "00:01:00", "2000M"],
        ["CANCELLED", "00:02:00", "4000M"],
    ]
    assert run.process.returncode == 1
    assert all(run.reports(job, "results/logs/train_toy/small-dense.log") for job in run.jobs[CANCELLED])
    assert not (run.folder / "results/models/small-dense/model.json").exists()


@pytest.mark.parametrize(("way", "asked"), [("gpus", ["gres:gpu:1", None]), ("gres", [None, "gres:gpu:toy:1"])])
def test_a_gpu_is_asked_for_as_the_profile_says(runs, way, asked):
    run = runs[way]
    assert run.process.returncode == 0, run.printed[-4000:]
    [[job]] = run.jobs.values()
    assert [job.get("TresPerJob"), job.get("TresPerNode")] == asked
    assert (run.folder / "results/facts/small-dense/activations/0.parquet").read_text() == "0"


def test_a_way_to_ask_for_gpus_that_is_none_is_refused(tmp_path):
    printed = small.snakemake(small.make(tmp_path), "--dry-run", "--default-resources", "gpu_request=gpu", check=False)
    assert "default-resources.gpu_request: gpu is neither gpus nor gres; mend the profile" in printed
