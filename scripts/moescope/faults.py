"""What a bad day does to a run: two runs at once, a folder that cannot be written, a wrong clock, jobs that die."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path

from moescope.artifacts import ArtifactError, one_line, sentences_of_the_disk

# Clocks of machines that share a folder differ by less.
SECONDS_OFF = 60
STOPPED = "The run was stopped (Ctrl-C or SIGTERM). What is finished is kept; run the same command to go on."
AGAIN = "then run the same command again; what is finished is kept"
CANCELLED = ("was cancelled", "see who cancelled it")
# What Snakemake and its SLURM plugin write of a job that ended badly: what it means, and what to do.
ENDS = {
    r"'(TIMEOUT|DEADLINE)'": ("ran out of time", "give its rule more (--set-resources <rule>:runtime=<minutes>)"),
    r"'(NODE_FAIL|BOOT_FAIL|PREEMPTED)'|node failure": ("lost its node", "wait for the cluster to be well"),
    r"'CANCELLED'": CANCELLED,
    r"SIGKILL|exit status 137|'OUT_OF_MEMORY'|oom.kill": (
        "was killed, most often because the memory was full",
        "ask for more (memory_gb of the model) or let fewer jobs run at once (--cores, --jobs)",
    ),
    r"SIGTERM|SIGINT|exit status 143": CANCELLED,
    r"No space left|quota exceeded": ("found the disk full", "free space"),
    r"older modification time": ("has an input dated in the future", "set the clock right and touch that input"),
    r"sbatch failed": ("could not be submitted", "mend what sbatch complains about above"),
    "": ("ended without a word in its log", "mend what is said of it above"),
}
LOG_FILE = re.compile(r"^Logfile (.+):\n(=+)\n((?:.*\n)*?)\2$", re.MULTILINE)
EVENT = re.compile(
    r"^Trying to restart job (?P<restarted>\d+)\."
    r"|^Error in rule (?P<rule>.+):\n(?P<error>(?: {4}.*\n)+)"
    r"|^(?!    )(?P<cause>.*(?:died with <Signals|non-zero exit status|No space left|older modification time).*)",
    re.MULTILINE,
)


class FaultError(RuntimeError):
    """A run that cannot start: one sentence with the mend."""


def begin(folder: Path) -> None:
    """Make `folder` this process's own until it ends, however it ends, and remove what killed jobs left half-written.

    Raises FaultError if another run is at work there, or nothing can be written.
    """
    try:
        with sentences_of_the_disk(f"{folder}/"):
            folder.mkdir(parents=True, exist_ok=True)
            # Never closed: the lock goes with the process, a killed one too. Its jobs do not inherit it.
            held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            _take(held, folder)
            # First of all: it may be what fills the disk.
            for path in folder.rglob(".*.part"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.ftruncate(held, 0)
            os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}".encode(), 0)
    except ArtifactError as error:
        raise FaultError(str(error)) from error


def _take(held: int, folder: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.pread(held, 1000, 0).decode(errors="replace")
        raise FaultError(
            f"{folder}/: another run is at work here ({other}); wait for it to end or stop it,"
            " then run the same command"
        ) from None
    except OSError as error:
        logging.warning("%s/: no locks on this disk (%s); let no two runs work here at once", folder, one_line(error))


def mend_times(folder: Path) -> int:
    """Give files of `folder` that are dated in the future times in the past, in their order; how many there were.

    The clock was turned back. Snakemake would fail jobs that read such files, and would not see that a source was
    edited since. They are now older than any later edit, and newer than the other results.
    """
    latest = time.time_ns() + SECONDS_OFF * 10**9
    files = [path for path in folder.rglob("*") if path.is_file() and (folder / "logs") not in path.parents]
    times = {path: path.lstat().st_mtime_ns for path in files}
    ahead = sorted({when for when in times.values() if when > latest})
    start = max((when for when in times.values() if when <= latest), default=0)
    # In steps of ten microseconds, which are not lost where Snakemake takes times as floats.
    mended = {when: start + 10**4 * rank for rank, when in enumerate(ahead, 1)}
    future = [path for path in files if times[path] in mended]
    for path in future:
        os.utime(path, ns=(mended[times[path]],) * 2, follow_symlinks=False)
    return len(future)


def full(folder: Path, least: int = 10**6) -> list[str]:
    """A sentence if the disk of `folder` has fewer than `least` bytes left: Snakemake's own log may lack the end."""
    free = shutil.disk_usage(folder).free
    return [f"{folder}/: its disk is full ({free} bytes left); free space, {AGAIN}."] if free < least else []


def explain(log: str) -> list[str]:
    """Sentences on a failed run from Snakemake's own log: which job ended how, its log file, and what to do.

    Nothing is said of jobs whose own log ends with their error, as Snakemake shows it.
    """
    if re.search("^(Terminating processes on user request|Will exit after finishing)", log, re.MULTILINE):
        return [STOPPED]
    shown = {path: content for path, _, content in LOG_FILE.findall(log)}
    sentences: dict[str, str] = {}
    causes: list[str] = []
    for event in EVENT.finditer(LOG_FILE.sub("", log)):
        if event["restarted"]:
            sentences.pop(event["restarted"], None)
        elif event["cause"]:
            causes.append(event["cause"])
        else:
            [job] = re.findall(r"^    jobid: (\d+)", event["error"], re.MULTILINE)
            logs = re.findall(r"^    log: (.+) \(check log", event["error"], re.MULTILINE)
            paths = logs[0].split(", ") if logs else []
            spoken = any(" CRITICAL " in shown.get(path, "") for path in paths)
            own = [cause for cause in causes if cause.endswith("exit status 1.") == spoken] or causes
            cause = own[0] if own else ""
            causes = [other for other in causes if other != cause]
            if spoken:
                continue
            texts = [event["error"], cause, *(shown.get(path, "") for path in paths[1:])]
            what, mend = next(end for pattern, end in ENDS.items() if re.search(pattern, "\n".join(texts), re.I))
            where = f"{event['rule']} (log: {', '.join(paths)})" if paths else event["rule"]
            sentences[job] = f"{where} {what}: {mend}, {AGAIN}."
    return list(sentences.values())
