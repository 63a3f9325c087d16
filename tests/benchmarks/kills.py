"""SIGKILL at random moments of a run: the same command then finishes it, with the same results.

PYTHONPATH=scripts:tests python tests/benchmarks/kills.py 50 > tests/benchmarks/kills.md

The run is done unkilled first. Then it is killed again and again until it is through, and done anew until there were
that many kills; with --each, a run is killed just once. --longest must be more than the longest job needs. Without
--folder it is the run of the tests' small configuration.
"""

import argparse
import base64
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

import small


def start(folder, log, *targets):
    """Start a run in a process group of its own, with what it prints in the file `log`."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *targets]
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=folder, stdout=stream, stderr=stream, start_new_session=True)


def wait_for(condition, process, seconds=600):
    """Wait until `condition()` holds, but not longer than the process lives; whether it held."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


def running(log):
    """Rules of the jobs that a run had started and not finished, by what it printed."""
    text = log.read_text()
    started = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    jobid: (\d+)", text, re.MULTILINE)
    finished = set(re.findall(r"^Finished jobid: (\d+)", text, re.MULTILINE))
    return sorted({rule for rule, job in started if job not in finished})


def finished_files(folder):
    """State of each result that Snakemake knows to be finished: it marks those that are not."""
    marks = folder / ".snakemake/incomplete"
    begun = {base64.urlsafe_b64decode(path.name).decode() for path in marks.rglob("*") if path.is_file()}
    found = {}
    for path in (folder / "results").rglob("*"):
        name = str(path.relative_to(folder))
        inside = any(name == mark or name.startswith(f"{mark}/") for mark in begun)
        if path.is_file() and not path.name.startswith(".") and not name.startswith("results/logs") and not inside:
            found[path] = as_it_is(path)
    return found


def differences(one, other):
    """Results that two runs do not share: CSV by bytes; of Parquet and safetensors, which hold a time, the data."""
    names = [
        {str(path.relative_to(run)) for kind in ("csv", "parquet", "safetensors") for path in run.rglob(f"*.{kind}")}
        for run in (one / "results", other / "results")
    ]
    wrong = names[0] ^ names[1]
    for name in names[0] & names[1]:
        a, b = one / "results" / name, other / "results" / name
        if name.endswith(".csv"):
            same = a.read_bytes() == b.read_bytes()
        elif name.endswith(".parquet"):
            same = pq.read_table(a).equals(pq.read_table(b))
        else:
            a, b = load_file(a), load_file(b)
            same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        wrong |= set() if same else {name}
    return sorted(wrong)


def kill(process, log):
    """Kill a run's process group; the rules that were running."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running(log)


def computed_twice(kept):
    """Files that were finished at a kill and are not as they were."""
    return sorted(str(path) for path, status in kept.items() if not path.exists() or as_it_is(path) != status)


def as_it_is(path):
    """What tells whether a file was written again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def records(folder):
    """What Snakemake remembers of the job that wrote each file or folder."""
    known = folder / ".snakemake/metadata"
    found = {}
    for path in sorted(known.rglob("*")):
        if path.is_file():
            name = "".join(part.removeprefix("@") for part in path.relative_to(known).parts)
            found[base64.urlsafe_b64decode(name).decode()] = json.loads(path.read_text())
    return found


def remove(path):
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill_jobs(folder, scratch, chosen, moments):
    """Again and again: files of random jobs of a finished run are removed, made again, killed, and made again."""
    jobs = {}
    for output, job in records(folder).items():
        jobs.setdefault((job["log"] or [""])[0], []).append(output)
    # The record of a run depends on all others: after some kills nearly the whole run would be due for it.
    jobs = [outputs for log, outputs in sorted(jobs.items()) if log and Path(log).stem != "write_provenance"]
    shutil.copytree(folder / "results", scratch / "unkilled/results", symlinks=True)
    log = scratch / "log"
    print(f"Each time files of {chosen.jobs} of {len(jobs)} jobs are removed, and made by a run that is killed.\n")
    print("| kill | after s | jobs that ran | finished before it, computed twice | results |\n|---|---|---|---|---|")
    for number in range(1, chosen.kills + 1):
        wanted = sorted({output for outputs in moments.sample(jobs, chosen.jobs) for output in outputs})
        for output in wanted:
            remove(folder / output)
        now, begin = time.time_ns(), time.monotonic()
        process = start(folder, log, *wanted, "--rerun-triggers", "input")
        seconds = moments.uniform(3, chosen.longest)
        wait_for(lambda end=begin + seconds: time.monotonic() > end, process)
        rules = ["none: it was through"] if process.poll() is not None else kill(process, log)
        # Others are made anew where they lie between two of the jobs.
        kept = {path: status for path, status in finished_files(folder).items() if status[0] >= now}
        small.snakemake(folder, *wanted, "--rerun-triggers", "input")
        twice, wrong = computed_twice(kept), differences(folder, scratch / "unkilled")
        result = ", ".join(wrong) or "identical"
        print(
            f"| {number} | {seconds:.0f} | {', '.join(rules) or 'none'} | {len(twice)} of {len(kept)} | {result} |",
            flush=True,
        )


def main():
    """Do it, and print what happened as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--folder", type=Path, help="a checkout; its results are removed")
    parser.add_argument(
        "--unkilled", type=Path, help="a checkout with a finished run to compare with, else one is made"
    )
    parser.add_argument(
        "--jobs", type=int, help="start from the finished run of --folder, without these many jobs' files"
    )
    parser.add_argument("--each", action="store_true", help="kill every run just once")
    parser.add_argument("--longest", type=float, default=90, help="seconds from a start to a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    folder = chosen.folder or small.make(scratch / "run")
    log, moments = scratch / "log", random.Random(chosen.seed)

    def new_run():
        for name in ("results", ".snakemake"):
            shutil.rmtree(folder / name, ignore_errors=True)

    print("# Kills\n\nSIGKILL of all processes of a run at random moments; then the same command again. Afterwards all")
    print("results are compared with those of a run that was not killed.\n")
    if chosen.jobs:
        kill_jobs(folder, scratch, chosen, moments)
        return
    new_run()
    unkilled = chosen.unkilled or scratch / "unkilled"
    if not chosen.unkilled:
        small.snakemake(folder, *chosen.targets)
        shutil.copytree(folder / "results", unkilled / "results", symlinks=True)
        new_run()
    print("| kill | after s | jobs that ran | finished before it, computed twice | results |\n|---|---|---|---|---|")
    kills, done = [], 0
    while done < chosen.kills:
        process, begin = start(folder, log, *chosen.targets), time.monotonic()
        seconds = moments.uniform(3, chosen.longest)
        more = done + len(kills) < chosen.kills and not (chosen.each and kills)
        if more and wait_for(lambda end=begin + seconds: time.monotonic() > end, process):
            kills.append((seconds, kill(process, log), finished_files(folder)))
        elif process.wait():
            sys.exit(f"{folder}: the run failed:\n{log.read_text()[-4000:]}")
        else:
            wrong = differences(folder, unkilled)
            for seconds, rules, kept in kills:
                done += 1
                twice, result = computed_twice(kept), ", ".join(wrong) or "identical"
                ran = ", ".join(rules) or "none"
                print(
                    f"| {done} | {seconds:.0f} | {ran} | {len(twice)} of {len(kept)} {' '.join(twice)} | {result} |",
                    flush=True,
                )
            kills.clear()
            new_run()
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
