"""Logging of a job: to its log file and to the terminal, with the traceback in both. And its end."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
from pathlib import Path
from types import TracebackType

PR_SET_PDEATHSIG = 1


def to_file_and_terminal(path: str | Path) -> None:
    """Send the root logger, warnings and any uncaught exception to `path` and to standard error.

    From here on the job dies with the process that started it: it would write to the files of the next run.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    handlers: list[logging.Handler] = [
        logging.FileHandler(path, mode="w", encoding="utf-8"),
        logging.StreamHandler(sys.stderr),
    ]
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers, force=True
    )
    logging.captureWarnings(True)
    sys.excepthook = _log_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
