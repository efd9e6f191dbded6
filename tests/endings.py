"""The ways in which a job ends before its test, for those in a sandbox and with real
guests alike.

A job is the process of Avocado, which leads its session and process group.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from sandbox import Popen, running_tests, wait_for


@dataclass(frozen=True)
class Ending:
    """A way in which a job ends while it runs its only test."""

    name: str
    act: Callable[[Popen], object]  # brings it about
    # Avocado's configuration; {} is a number of seconds, enough for the test to start.
    config: str = ""
    # Whether the test cleans up; else it is killed, maybe before that.
    cleans_up: bool = True
    guest_stays: bool = False  # whether a real guest goes on for ever
    may_hang: bool = False  # whether a test of avocado-vt may, with its guest


def nothing(job):
    """Wait for a timeout."""


def to_avocado(signum):
    return lambda job: job.send_signal(signum)


def to_all(signum, times=1):
    """Send a signal to the process group, as a terminal does."""

    def act(job):
        for _ in range(times):
            os.killpg(job.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(1)

    return act


def kill_of(which, then=signal.SIGTERM):
    """Kill the runner (0) or its child, which runs the test (1); signal Avocado, which
    hangs."""

    def act(job):
        pid = sorted(running_tests(job))[which]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in running_tests(job))
        job.send_signal(then)

    return act


def kill_of_avocado_and_tests(job):
    """Kill all but the guest and what avocado-vt has started for it."""
    for pid in [job.pid, *running_tests(job)]:
        os.kill(pid, signal.SIGKILL)


JOB_TIMEOUT = "[job.run]\ntimeout = {}\n"
TASK_TIMEOUT = "[task.timeout]\nrunning = {}\n"
KILLED = {"cleans_up": False}
# A real guest ends with its terminal, which helpers of avocado-vt have: here these live
# on.
BUT_GUEST = {"cleans_up": False, "guest_stays": True}
ENDINGS = [
    Ending("SIGINT to Avocado alone", to_avocado(signal.SIGINT)),
    Ending("SIGKILL to Avocado alone", to_avocado(signal.SIGKILL)),
    Ending("SIGTERM to Avocado alone", to_avocado(signal.SIGTERM), **KILLED),
    Ending("SIGHUP to Avocado alone", to_avocado(signal.SIGHUP)),
    Ending("Ctrl-C", to_all(signal.SIGINT)),
    Ending(
        "Ctrl-C three times", to_all(signal.SIGINT, times=3), may_hang=True, **KILLED
    ),
    Ending("SIGTERM to all", to_all(signal.SIGTERM), **KILLED),
    Ending("SIGKILL to all", to_all(signal.SIGKILL), **KILLED),
    Ending("SIGHUP to all", to_all(signal.SIGHUP), **KILLED),
    Ending("SIGKILL to Avocado and its tests", kill_of_avocado_and_tests, **BUT_GUEST),
    Ending("runner killed, then SIGTERM", kill_of(0)),
    Ending("test killed, then SIGTERM", kill_of(1), **BUT_GUEST),
    Ending(
        "test killed, then job timeout", kill_of(1, then=0), JOB_TIMEOUT, **BUT_GUEST
    ),
    Ending("job timeout", nothing, config=JOB_TIMEOUT),
    Ending("task timeout", nothing, config=TASK_TIMEOUT),
]
