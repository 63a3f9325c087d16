"""What a run would take: jobs, tokens, disk and GPU memory, by model and stage. It is printed and written nowhere.

INPUT   the configuration, and of models and public data sets what lies here already
OUTPUT  none
"""

import sys


rule plan:
    """Count the jobs of a dry run of the same command, and estimate what they take."""

    # No benchmark file: it would count as an output, and the plan be there already the second time.
    log:
        "results/logs/plan.log",
    localrule: True
    conda:
        "../../envs/model.yaml"
    threads: 1
    resources:
        mem_mb=memory(2),
        runtime=minutes(10),
    params:
        code=code("plan.py"),
        settings=settings(*config),
        dry_run=[
            *[sys.executable, "-m", "snakemake", *(word for word in sys.argv[1:] if word != "plan")],
            *["--dry-run", "--nolock", "--quiet", "host"],
        ],
    script:
        "../../scripts/plan.py"
