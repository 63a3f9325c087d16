"""How much of a finished run's wall time is not its jobs: Snakemake's own work, and cores that wait.

python tests/benchmarks/overhead.py CHECKOUT [CORES] > tests/benchmarks/overhead.md

Read from the benchmark files and from Snakemake's log of a checkout in which all jobs were done in one run, such as
after `make run`.
"""

import re
import sys
from datetime import datetime
from pathlib import Path

TIME = r"^\[\w+ (.{20})\]\n"


def main():
    """Print the shares as Markdown."""
    folder, cores = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    measured = {}
    for path in (folder / "results/logs").rglob("*.benchmark.tsv"):
        measured[str(path.relative_to(folder))] = float(path.read_text().splitlines()[1].split("\t")[0])
    [log] = [path for path in (folder / ".snakemake/log").glob("*.log") if "(100%) done" in path.read_text()]
    text = log.read_text()
    ended = {job: seconds(when) for when, job in re.findall(TIME + r"Finished jobid: (\d+)", text, re.M)}
    begun = re.findall(TIME + r"(?:local)?rule (\w+):\n((?: {4}.*\n)+)", text, re.M)
    wall = log.stat().st_mtime - datetime.strptime(log.name[:24], "%Y-%m-%dT%H%M%S.%f").timestamp()
    of_files, of_log = 0.0, 0.0
    for when, rule, body in begun:
        job, benchmark = re.search(r"jobid: (\d+)", body)[1], re.search(r"benchmark: (\S+)", body)
        if benchmark:
            of_files += measured[benchmark[1]]
        elif rule != "all":
            of_log += ended[job] - seconds(when)
    outside = 1 - (of_files + of_log) / (cores * wall)
    print(
        f"# What a run of the default main job spends outside of its jobs\n\n"
        f"Written by `python tests/benchmarks/overhead.py CHECKOUT {cores}` after `make run` on {cores} cores.\n"
        f"A job is counted from its process's start to its end, with starting Python and importing torch. Jobs that\n"
        f"Snakemake cannot benchmark (trainings, captures: a shared cache may hold them) are counted by its log.\n\n"
        f"| jobs | wall time (s) | jobs by benchmark (s) | by log (s) | outside of jobs |\n|---|---|---|---|---|\n"
        f"| {len(begun) - 1} | {wall:.0f} | {of_files:.0f} | {of_log:.0f} | {outside:.0%} of {cores} cores |\n\n"
        f"Outside of jobs are Snakemake's own work (reading the workflow, choosing jobs, looking at files) and cores\n"
        f"that wait since no job is ready. Where Snakemake works while jobs run, they take longer by it. Aim: <= 25%."
    )


def seconds(when):
    """Seconds of a time in Snakemake's log."""
    return datetime.strptime(when, "%b %d %H:%M:%S %Y").timestamp()


if __name__ == "__main__":
    main()
