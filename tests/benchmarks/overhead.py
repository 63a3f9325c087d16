"""How much of a finished run's wall time is not its jobs: Snakemake's own work, and cores that wait.

python tests/benchmarks/overhead.py CHECKOUT [CORES] > tests/benchmarks/overhead.md

Read from what Snakemake and its log keep of the last run of a checkout that did all jobs, such as after `make run`.
"""

import json
import re
import sys
from datetime import datetime
from pathlib import Path


def main():
    """Print the shares as Markdown."""
    folder, cores = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    jobs = {}
    for path in (folder / ".snakemake/metadata").rglob("*"):
        if path.is_file():
            made = json.loads(path.read_text())
            jobs[made["rule"], made["starttime"]] = made["endtime"]
    [log] = [path for path in (folder / ".snakemake/log").glob("*.log") if "steps (100%) done" in path.read_text()]
    text = log.read_text()
    begin = datetime.strptime(log.name[:24], "%Y-%m-%dT%H%M%S.%f").timestamp()
    wall = log.stat().st_mtime - begin
    busy = sum(end - start for (_, start), end in jobs.items())
    steps = int(re.findall(r"of (\d+) steps \(100%\)", text)[-1])
    outside = 1 - busy / (cores * wall)
    print(
        f"# What a run of the default main job spends outside of its jobs\n\n"
        f"Written by `python tests/benchmarks/overhead.py CHECKOUT {cores}` after `make run` on {cores} cores.\n"
        f"A job is counted from its start to its end, with starting Python and importing torch.\n\n"
        f"| jobs | wall time (s) | jobs, summed (s) | outside of jobs |\n|---|---|---|---|\n"
        f"| {steps} | {wall:.0f} | {busy:.0f} | {outside:.0%} of {cores} cores |\n\n"
        f"Outside of jobs is Snakemake's own work (reading the workflow, choosing jobs, looking at files), and cores that\n"
        f"wait since no job is ready: an upper bound of Snakemake's overhead. Aim: at most 25%.\n"
    )


if __name__ == "__main__":
    main()
