"""GPUs of a job: distinct ones for jobs that run at once. No GPU is needed to hand out names."""

import os
import subprocess
import sys

import pytest

JOB = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from moescope import devices
print("has", *devices.use(1, int(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start a job that takes GPUs and keeps them until its standard input is closed."""
    started = []

    def of(gpus, visible="0,1,GPU-5e/7", **environment):
        names = {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": "scripts", **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        inherited = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
        started.append(subprocess.Popen([sys.executable, "-c", JOB, str(gpus)], env=inherited | names, **pipes))
        return started[-1]

    yield of
    for process in started:
        process.kill()
        process.wait()


def has(process):
    """What a job has taken, as soon as it has."""
    for line in process.stdout:
        if line.startswith("has"):
            return line.split()[1:]
    raise AssertionError("the job ended without a word")


def test_jobs_have_distinct_gpus_and_wait_for_those_of_others(start):
    two, one = start(2), start(1)
    assert sorted(has(two) + has(one)) == ["0", "1", "GPU-5e/7"]
    waiting = start(2)
    assert waiting.stdout.readline() == "waiting for 2 of the GPUs 0, 1, GPU-5e/7: other jobs have them\n"
    # A killed job gives its GPUs back: nothing is left to clean up.
    two.kill()
    assert len(has(waiting)) == 2


def test_a_job_that_sees_too_few_gpus_says_so(start):
    none, few = start(1, visible=""), start(2, visible="3")
    assert none.stdout.readline().startswith("this job asks for 1 GPU and sees none; check the driver")
    assert has(none) == []
    assert few.stdout.readline().startswith("this job asks for 2 GPUs and sees 1; check the driver")
    assert has(few) == ["3"]


def test_what_a_scheduler_gave_is_kept(start):
    of_slurm = {"SLURM_JOB_ID": "7"}
    one, other = start(1, visible="0", **of_slurm), start(1, visible="0", **of_slurm)
    # SLURM may number the GPUs of each job from 0.
    assert has(one) == has(other) == ["0"]
