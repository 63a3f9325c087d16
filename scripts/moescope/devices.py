"""The processors of a job: CPU threads, and GPUs that no other job on this machine has."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def use(threads: int, gpus: int = 0) -> list[str]:
    """Give this process its threads and, where no scheduler has done so, GPUs of its own; their names.

    Snakemake counts the GPUs of a machine but does not hand them out. Each is held by a lock that ends with the
    process; a job waits while others have all of them. What CUDA_VISIBLE_DEVICES lists is what there is to give, and
    it is narrowed to what was taken. To be called before CUDA is. A job that sees fewer GPUs than it asked for says
    so in its log; whether it can go on is for checkpoints.load to say.
    """
    torch.set_num_threads(threads)
    if not gpus:
        return []
    visible = _visible()
    if len(visible) < gpus:
        logging.warning(
            "this job asks for %d GPU%s and sees %s; check the driver and CUDA_VISIBLE_DEVICES,"
            " or set the model's device to cpu",
            gpus,
            "s" if gpus > 1 else "",
            len(visible) or "none",
        )
    if "SLURM_JOB_ID" not in os.environ:
        visible = take(visible, min(gpus, len(visible)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    logging.info("GPUs of this job: %s", ", ".join(visible) or "none")
    return visible


def take(names: Sequence[str], count: int, pause: float = 1.0) -> list[str]:
    """`count` of these GPUs, locked until this process ends; while others have them it looks every `pause` seconds."""
    folder = Path(tempfile.gettempdir()) / f"moescope-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    waited = False
    while True:
        taken: dict[str, int] = {}
        for name in names:
            if len(taken) < count:
                lock = os.open(folder / name.replace("/", "_"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    taken[name] = lock
                except BlockingIOError:
                    os.close(lock)
        if len(taken) == count:
            return list(taken)
        # Two jobs that each hold a part of what they need would wait for each other.
        for lock in taken.values():
            os.close(lock)
        if not waited:
            logging.info("waiting for %d of the GPUs %s: other jobs have them", count, ", ".join(names))
            waited = True
        time.sleep(pause)


def _visible() -> list[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in listed.split(",") if name.strip()]
