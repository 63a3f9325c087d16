"""Locks, clocks and the sentences on jobs that died without a word."""

import os
import re
import subprocess
import sys
import time

import pytest

from moescope import faults

HOLD = "import sys; from pathlib import Path; from moescope import faults; faults.begin(Path(sys.argv[1]))"


def another_run(folder, then):
    """Begin a run in another process."""
    command = [sys.executable, "-c", f"{HOLD}; {then}", str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)


def test_a_second_run_is_refused_until_the_first_is_gone_even_if_it_was_killed(tmp_path):
    folder = tmp_path / "results"
    with another_run(folder, "print('held', flush=True); input()") as first:
        first.stdout.readline()
        with pytest.raises(
            faults.FaultError, match=rf"another run is at work here \(process {first.pid} on .*wait for"
        ):
            faults.begin(folder)
        first.kill()
    with another_run(folder, "") as second:
        assert second.wait() == 0


def test_jobs_do_not_hold_the_lock_of_their_run(tmp_path):
    job = "import subprocess; p = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL); print(p.pid)"
    with another_run(tmp_path, job) as first:
        pid = int(first.stdout.readline())
    try:
        with another_run(tmp_path, "") as second:
            assert second.wait() == 0
    finally:
        os.kill(pid, 9)


def test_what_killed_jobs_left_half_written_is_removed(tmp_path):
    (tmp_path / "facts/.layers.parquet.12.part").parent.mkdir()
    (tmp_path / "facts/.layers.parquet.12.part").write_text("half")
    (tmp_path / "models/.small.x1.part/checkpoints").mkdir(parents=True)
    (tmp_path / "facts/layers.parquet").write_text("whole")
    with another_run(tmp_path, "") as run:
        assert run.wait() == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "facts", "layers.parquet", "models"]


def test_a_full_disk_is_named(tmp_path):
    [sentence] = faults.full(tmp_path, least=2**62)
    assert re.search(rf"{tmp_path}/: its disk is full \(\d+ bytes left\); free space, then run the same", sentence)
    assert not faults.full(tmp_path, least=0)


def dated(folder, **seconds):
    now = time.time_ns()
    for name, ahead in seconds.items():
        (folder / name).write_text("")
        os.utime(folder / name, ns=(now + ahead * 10**9,) * 2)


def order(folder):
    return [path.name for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)]


def test_files_of_the_future_follow_the_others_in_their_order(tmp_path):
    dated(tmp_path, c=3600, a=-7200, d=3601, e=10**7, b=-7000)
    assert faults.mend_times(tmp_path) == 3
    assert order(tmp_path) == ["a", "b", "c", "d", "e"]
    newest = (tmp_path / "e").stat().st_mtime
    assert time.time() - 7001 < newest < time.time() - 6999
    assert faults.mend_times(tmp_path) == 0


def test_clocks_that_differ_a_little_and_logs_are_left_alone(tmp_path):
    (tmp_path / "logs").mkdir()
    dated(tmp_path / "logs", a=3600)
    dated(tmp_path, b=5)
    assert faults.mend_times(tmp_path) == 0
    assert faults.mend_times(tmp_path / "nowhere") == 0


def test_if_all_are_of_the_future_any_source_is_newer(tmp_path):
    dated(tmp_path, b=4000, a=3600)
    faults.mend_times(tmp_path)
    assert order(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").stat().st_mtime < 10


# As Snakemake 9.27 and its SLURM plugin 2.8 write it.
STAMP = "[Mon Nov 23 20:40:15 2026]\n"
COMMAND = (
    "RuleException:\nCalledProcessError in file \"w/rules/a.smk\", line 13:\nCommand 'set -euo pipefail;  python s.py' "
)
KILLED, FAILED = f"{COMMAND}died with <Signals.SIGKILL: 9>.\n", f"{COMMAND}returned non-zero exit status 1.\n"


def error(rule, jobid, message="None", content="started\n", more=""):
    log = f"results/logs/{rule}/{jobid}.log"
    head = f"Logfile {log}:"
    shown = f"{head}\n{'=' * len(head)}\n{content}{'=' * len(head)}\n"
    logs = f"{log}, .snakemake/slurm_logs/{jobid}.log" if message != "None" else log
    return (
        f"{STAMP}Error in rule {rule}:\n    message: {message}\n    jobid: {jobid}\n    input: a, b\n"
        f"    output: c\n    log: {logs} (check log file(s) for error details)\n{more}{shown}"
    )


def slurm(status):
    return (
        f"SLURM-job '7' failed, SLURM status is: '{status}'. Reason: Unknown.For further error details see the"
        " cluster/cloud log and the log files of the involved rule(s)."
    )


SAID = "2026-11-23 20:40:15,123 CRITICAL ArtifactError: x.parquet: damaged; delete it and run again\nTraceback\n"
CASES = {
    "killed": (
        KILLED + error("capture", 3),
        [r"capture \(log: results/logs/capture/3.log\) was killed, .* \(memory_gb"],
    ),
    "its own words": (FAILED + error("capture", 3, content=SAID), []),
    "silent failure": (FAILED + error("capture", 3), [r"capture .*3.log\) ended without a word in its log: mend what"]),
    "two at once": (
        FAILED + KILLED + error("trace", 5) + error("capture", 3, content=SAID),
        ["trace .* was killed"],
    ),
    "restarted in vain": (
        f"{KILLED}{error('capture', 3)}Trying to restart job 3.\n{KILLED}{error('capture', 3)}",
        ["capture .* was killed"],
    ),
    "restarted with success": (
        f"{KILLED}{error('capture', 3)}Trying to restart job 3.\n{FAILED}{error('trace', 4, content=SAID)}",
        [],
    ),
    "words of a log are no events": (KILLED + error("a", 1, content=error("b", 2)), ["a .* was killed"]),
    "time": (
        error("trace", 5, slurm("TIMEOUT")),
        [r"trace \(log: .*5.log, .*slurm_logs/5.log\) ran out of time: .*runtime="],
    ),
    "cancelled": (
        error("trace", 5, slurm("CANCELLED")),
        ["trace .* was cancelled: .* then run the same command again"],
    ),
    "memory on SLURM": (error("trace", 5, slurm("OUT_OF_MEMORY")), [r"trace .* was killed, .* \(memory_gb"]),
    "node": (error("trace", 5, slurm("NODE_FAIL")), ["trace .* lost its node"]),
    "clock": (
        'WorkflowError in rule trace in file "x", line 3:\nOutput results/a has older modification time (2026-11-23)'
        f" than input b (2027-01-01). This could\n{STAMP}{error('trace', 5)}",
        ["trace .* has an input dated in the future: set the clock right and touch that input"],
    ),
    "disk": (
        f"WorkflowError:\nOSError: [Errno 28] No space left on device: 'x.tsv'\n{error('trace', 5)}",
        ["trace .* found the disk full: free space"],
    ),
    "Ctrl-C": (
        f"Terminating processes on user request, this might take some time.\n{KILLED}{error('trace', 5)}",
        ["The run was stopped .* run the same command to go on"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failed_run_ends_with_what_happened_to_which_job_and_what_to_do(name):
    log, expected = CASES[name]
    found = faults.explain(f"Building DAG of jobs...\n{log}Shutting down, this might take some time.\n")
    assert len(found) == len(expected), found
    for sentence, pattern in zip(found, expected):
        assert re.search(pattern, sentence), sentence
