"""A job's turn: attempts to take the lock, and what is told meanwhile."""

from __future__ import annotations

import math
import random
import sys
import time
from typing import NamedTuple

from avocado_vt_joblock import messages
from avocado_vt_joblock.formats import duration
from avocado_vt_joblock.lock import JobLock, LockInTheWayError, WaitedInVainError
from avocado_vt_joblock.lockdir import DirectoryError
from avocado_vt_joblock.lockfile import LockFile, State

#: How long a waiting job waits between two attempts at most, in seconds.
ATTEMPT_INTERVAL = 1.0
#: How often it says that it still waits, in seconds.
REMINDER_INTERVAL = 300.0
#: How long it puts up with what may pass by itself, in seconds.
TROUBLE_TIMEOUT = 60.0

#: What clears a line on a terminal, by console_codes(4).
_CLEAR_LINE = "\r\x1b[K"


def acquire(lock: JobLock, timeout: float) -> list[LockFile]:
    """Take the lock, and wait for it as long as that is of use.

    :param lock: the lock of this job
    :param timeout: how long to wait, in seconds; infinity without limit
    :return: the stale locks that were there
    :raises LockInTheWayError: when another job is in the way
    :raises DirectoryError: when the system refuses a use of the directory
    """
    if not timeout:
        return lock.acquire()
    wait = _Wait(timeout)
    try:
        while True:
            try:
                stale = lock.acquire(waits=True)
            except (LockInTheWayError, DirectoryError) as error:
                wait.go_on(error)
            else:
                wait.tell_obtained()
                return stale
    except (KeyboardInterrupt, SystemExit):
        wait.tell_stopped()
        raise
    finally:
        if not lock.held:
            lock.abandon()


class _Situation(NamedTuple):
    """What a waiting job tells once, and again when it changes."""

    path: str
    state: State | None
    has_processes: bool
    has_tests: bool


class _Wait:
    """The wait of a job for its turn.

    :param timeout: how long it may take, in seconds
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._started = time.monotonic()
        self._trouble_since: float | None = None
        self._told: set[_Situation | str] = set()
        self._told_at = self._started
        self._is_first = True

    def go_on(self, error: LockInTheWayError | DirectoryError) -> None:
        """Pause until the next attempt, if the job is to wait on.

        :param error: what has stopped the last attempt; raised where it is of no use
        """
        self._check_use(error)
        waited = self._waited()
        if waited >= self._timeout:
            if isinstance(error, LockInTheWayError):
                raise WaitedInVainError(error, waited) from None
            raise error
        self._is_first = False
        self._tell(error)
        self._show_on_terminal(error)
        pause = ATTEMPT_INTERVAL * random.uniform(0.5, 1)
        time.sleep(min(pause, self._timeout - waited))

    def tell_obtained(self) -> None:
        """Tell how long the job has waited, if it has."""
        self._clear_terminal()
        if not self._is_first:
            waited = duration(self._waited())
            messages.tell(messages.OBTAINED.format(waited=waited))

    def tell_stopped(self) -> None:
        """Tell the user that the wait was stopped from outside."""
        self._clear_terminal()
        waited = duration(self._waited())
        text = messages.STOPPED.format(waited=waited)
        messages.tell(text, loggers=(messages.USER_LOG,))

    def _waited(self) -> float:
        return time.monotonic() - self._started

    def _check_use(self, error: LockInTheWayError | DirectoryError) -> None:
        """Raise an error that does not pass by itself, or has not for too long."""
        if isinstance(error, LockInTheWayError):
            if error.may_pass:
                self._trouble_since = None
                return
            if error.file and error.file.state is State.OUTER:
                raise error
        # A full disk, a server that does not answer for a moment, or a file that
        # somebody is writing.
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        if self._is_first or now - self._trouble_since >= TROUBLE_TIMEOUT:
            self._clear_terminal()
            raise error

    def _tell(self, error: LockInTheWayError | DirectoryError) -> None:
        """Tell what the job waits for, if that is new or was told long ago."""
        now = time.monotonic()
        until = messages.until(self._timeout - self._waited())
        situation = _situation(error)
        if situation not in self._told:
            self._told.add(situation)
            text = messages.waiting(error, until)
        elif now - self._told_at > REMINDER_INTERVAL:
            waited = duration(self._waited())
            text = messages.STILL_WAITING.format(until=until, waited=waited)
        else:
            return
        self._told_at = now
        self._clear_terminal()
        messages.tell(text)

    def _show_on_terminal(self, error: LockInTheWayError | DirectoryError) -> None:
        if not sys.stderr.isatty():
            return
        limit = "" if self._timeout == math.inf else duration(self._timeout)
        before = error.jobs_before if isinstance(error, LockInTheWayError) else 0
        waited = duration(self._waited())
        line = messages.on_terminal(waited, limit, before)
        sys.stderr.write(f"{_CLEAR_LINE}{line}")
        sys.stderr.flush()

    def _clear_terminal(self) -> None:
        if not self._is_first and sys.stderr.isatty():
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()


def _situation(error: LockInTheWayError | DirectoryError) -> _Situation | str:
    if isinstance(error, DirectoryError):
        return str(error)
    if not error.file:
        return _Situation("", None, has_processes=False, has_tests=False)
    processes = error.file.processes
    has_tests = any(process.test_of for process in processes)
    return _Situation(error.file.path, error.file.state, bool(processes), has_tests)
