"""What `serve run` does not do by itself: end, with one line, where the application cannot start.

Given a config file it submits it and waits for ever, whatever becomes of it. Owns which failures
end it and how; what a start needs is known to `build` and to the deployments, which use this.
"""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from app import ray_private
from app.ray_private import ServeRun
from app.registry.client import NAMESPACE
from slora_core.errors import SLoRAError

logger = logging.getLogger(__name__)

# What arguments, files and machines can be wrong in; anything else is a defect, with its traceback.
EXPECTED = (SLoRAError, ValueError, OSError)
MAX_LINE_CHARS = 1000
# How long Ray may need to bring a line from here to the terminal.
LOG_DELAY_S = 1.0
# Each and how long it may take. `serve run` cleans up at no signal with a status that is not 0 and
# without a stack of its own, and Ray ends with it. Where it is a container's first process it can
# only be asked: at the second SIGINT it ends with status 1. SIGINT is ignored by what a script
# started in the background.
SIGNALS = (
    (signal.SIGKILL, 5.0),
    (signal.SIGINT, 0.05),
    (signal.SIGINT, 15.0),
    (signal.SIGTERM, 15.0),
)


@contextmanager
def ended_by_failure() -> Iterator[None]:
    """What fails inside ends the `serve run` that waits for this start, if one does.

    The error is raised again where none does: after `serve deploy` or a driver of one's own, and
    where an engine has started since that `serve run` began; Serve's status then tells of it.
    """
    try:
        yield
    except Exception as error:
        try:
            serve_run = _waiting_serve_run()
        except RayError:
            logger.exception("it is not known whether `serve run` waits")
            serve_run = None
        if serve_run is not None:
            _end(serve_run, error)
        raise


def started() -> None:
    """From now on what fails does not end `serve run`: Serve tries again."""
    serve_run = ray_private.find_serve_run()
    if serve_run is not None:
        ray_private.write_to_cluster(NAMESPACE, _started_key(serve_run), b"1")


def as_line(error: Exception) -> str:
    """An error's message without line breaks, at most `MAX_LINE_CHARS` long."""
    line = " ".join(str(error).split())
    if not isinstance(error, EXPECTED) or not line:
        line = f"{type(error).__name__}: {line}"
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…"


def _waiting_serve_run() -> ServeRun | None:
    if not ray.is_initialized():
        return None
    serve_run = ray_private.find_serve_run()
    if serve_run is None or ray_private.read_from_cluster(NAMESPACE, _started_key(serve_run)):
        return None
    return serve_run


def _started_key(serve_run: ServeRun) -> str:
    return f"started:{serve_run.job_id}"


def _end(serve_run: ServeRun, error: Exception) -> None:
    """Returns where it is still there; else this process ends with it, or with its cluster."""
    if not isinstance(error, EXPECTED):
        traceback.print_exception(error)
    sys.stderr.write(f"the start failed: {as_line(error)}\n")
    sys.stderr.flush()
    time.sleep(LOG_DELAY_S)
    try:
        for signal_number, pause_s in SIGNALS:
            os.kill(serve_run.pid, signal_number)
            time.sleep(pause_s)
    except OSError:
        # It has ended, on a cluster that goes on without it.
        pass
