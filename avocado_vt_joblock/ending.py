"""The end of a job: wait for its leftovers, then release the lock or hand it over."""

from __future__ import annotations

import contextlib
import time

from avocado_vt_joblock import messages, procfs, telling
from avocado_vt_joblock.leftovers import Leftovers, Obstacle
from avocado_vt_joblock.lock import JobLock

#: How long to wait for leftovers, in seconds.
END_TIMEOUT = 5.0
#: How much of that is for a last look, in seconds.
LAST_LOOK_TIME = 1.0
#: How long to wait before looking again for processes that are known, in seconds.
PAUSE = 0.1


def give_back(lock: JobLock, *, looks: bool, tests_only: bool = False) -> None:
    """Release a lock, or hand it over if something of the job may still run.

    :param lock: the lock, which is held
    :param looks: whether to look for leftovers; False if they were left on purpose
    :param tests_only: whether nothing but tests counts
    """
    left = Leftovers()
    if looks:
        left = Leftovers(obstacle=Obstacle.INTERRUPTED)  # if Ctrl-C ends the look
        with contextlib.suppress(KeyboardInterrupt):
            left = _wait_for_leftovers(lock, tests_only=tests_only)
    problem: OSError | None = None
    try:
        if left.is_nothing:
            lock.release()
        else:
            lock.hand_over()
    except OSError as error:
        problem = error
    if not left.is_nothing:
        telling.tell(messages.left_behind(left, lock.path, is_in_place=not problem))
    if problem:
        telling.tell(messages.not_released(problem, lock.path))


def _wait_for_leftovers(lock: JobLock, *, tests_only: bool) -> Leftovers:
    """Wait a while for the leftovers of a job to end; return those that still run."""
    deadline = time.monotonic() + END_TIMEOUT
    left = lock.find_leftovers(tests_only=tests_only, timeout=END_TIMEOUT)
    if left.processes:
        telling.tell(messages.ending(left, END_TIMEOUT))
    # Ctrl-C ends the wait: what was seen by then is told.
    with contextlib.suppress(KeyboardInterrupt):
        while left.processes or (left.obstacle and left.obstacle.may_pass):
            _wait_for(left, deadline - LAST_LOOK_TIME)
            time_left = deadline - time.monotonic()
            if time_left <= 0:
                break
            left = lock.find_leftovers(tests_only=tests_only, timeout=time_left)
            if time_left <= LAST_LOOK_TIME:
                break  # That was the last look.
    return left


def _wait_for(left: Leftovers, deadline: float) -> None:
    """Wait until the processes that were found have ended, or until a deadline.

    If none was found, wait for one pause.
    """
    time.sleep(PAUSE)
    while time.monotonic() < deadline:
        if not any(
            procfs.is_running(each.pid, each.started) for each in left.processes
        ):
            return
        time.sleep(PAUSE)
