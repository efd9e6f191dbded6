"""A job's turn: attempts to take the lock, and what is told meanwhile."""

from __future__ import annotations

import random
import shutil
import sys
import time

from avocado_vt_joblock import messages, telling
from avocado_vt_joblock.lock import JobLock, LockInTheWayError, WaitedInVainError
from avocado_vt_joblock.lockdir import DirectoryError
from avocado_vt_joblock.lockfile import LockFile, State

#: How long a waiting job waits between two attempts at most, in seconds.
ATTEMPT_INTERVAL = 1.0
#: How often it says that it still waits, in seconds.
REMINDER_INTERVAL = 300.0
#: How long it waits in spite of a trouble, such as a full disk, in seconds.
TROUBLE_TIMEOUT = 60.0

#: What clears a line of a terminal, by console_codes(4).
_CLEAR_LINE = "\r\x1b[K"


def acquire(lock: JobLock, timeout: float, what: str = "test") -> list[LockFile]:
    """Take the lock, and wait for it as long as that is of use.

    :param lock: the lock of this job
    :param timeout: how long to wait, in seconds; infinity without limit
    :param what: what does not run if the wait is stopped
    :return: the stale locks that were there
    :raises LockInTheWayError: when another job is in the way
    :raises DirectoryError: when the system refuses a use of the directory
    """
    if not timeout:
        return _attempt(lock)
    wait = _Wait(timeout)
    try:
        while True:
            try:
                stale = lock.acquire(waits=True)
            except (LockInTheWayError, DirectoryError) as error:
                wait.pause_or_raise(error)
            else:
                wait.tell_obtained()
                return stale
    except (KeyboardInterrupt, SystemExit):
        wait.tell_stopped(what)
        raise
    finally:
        # At once: others would wait for its ticket.
        if not lock.is_held:
            lock.abandon()


def _attempt(lock: JobLock) -> list[LockFile]:
    """Try once; tell of stale locks that a failed attempt has removed."""
    try:
        return lock.acquire()
    except LockInTheWayError as error:
        telling.tell_of_stale(error.stale)
        raise


class _Wait:
    """The wait of a job for its turn.

    :param timeout: how long it may take, in seconds
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._started = time.monotonic()
        self._trouble_since: float | None = None
        self._told: set[tuple[object, ...]] = set()  # situations
        self._told_stale: set[str] = set()  # the paths of stale locks
        self._told_at = self._started
        self._has_waited = False

    def pause_or_raise(self, error: LockInTheWayError | DirectoryError) -> None:
        """Wait until the next attempt, or give up.

        :param error: what has stopped the last attempt; it is raised to give up
        """
        if isinstance(error, LockInTheWayError):
            self._tell_of_stale(error.stale)
        if not self._decide(error):
            self._clear_terminal()
            raise error
        waited = time.monotonic() - self._started
        if waited >= self._timeout:
            self._clear_terminal()
            if isinstance(error, LockInTheWayError):
                raise WaitedInVainError(error, waited) from None
            raise error
        self._has_waited = True
        self._tell(error, waited)
        self._show_on_terminal(error, waited)
        # It is random, so that jobs that came together do not try together again.
        pause = ATTEMPT_INTERVAL * random.uniform(0.5, 1)
        time.sleep(min(pause, self._timeout - waited))

    def tell_obtained(self) -> None:
        """Tell how long the job has waited, if it has."""
        self._clear_terminal()
        if self._has_waited:
            telling.tell(messages.obtained(time.monotonic() - self._started))

    def tell_stopped(self, what: str) -> None:
        """Tell the user that the wait was stopped, and what has not run."""
        self._clear_terminal()
        text = messages.stopped_waiting(time.monotonic() - self._started, what)
        telling.tell(text, loggers=(telling.USER_LOG,))

    def _decide(self, error: LockInTheWayError | DirectoryError) -> bool:
        """Decide whether to wait on, and note since when there is trouble.

        Another job ends at some time. A job that has started this one waits for it, so
        this one gives up. Anything else is a trouble: a full disk, a server that does
        not answer, a lock that nobody can judge. At the first attempt it is most likely
        a mistake that stays. Later it may pass in a minute.
        """
        if isinstance(error, LockInTheWayError):
            if error.may_pass:
                self._trouble_since = None
                return True
            if error.file and error.file.state is State.OUTER:
                return False
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        return self._has_waited and now - self._trouble_since < TROUBLE_TIMEOUT

    def _tell_of_stale(self, files: list[LockFile]) -> None:
        """Tell once of each stale lock: one that cannot be removed is met each time."""
        new = [file for file in files if file.path not in self._told_stale]
        self._told_stale.update(file.path for file in new)
        telling.tell_of_stale(new)

    def _tell(self, error: LockInTheWayError | DirectoryError, waited: float) -> None:
        """Tell once what the job waits for, and remind of that from time to time."""
        seconds_left = self._timeout - waited
        situation = _situation(error)
        now = time.monotonic()
        if situation not in self._told:
            self._told.add(situation)
            text = messages.waiting(error, seconds_left)
        elif now - self._told_at > REMINDER_INTERVAL:
            text = messages.still_waiting(waited, seconds_left)
        else:
            return
        self._told_at = now
        self._clear_terminal()
        telling.tell(text)

    def _show_on_terminal(
        self, error: LockInTheWayError | DirectoryError, waited: float
    ) -> None:
        if not _has_terminal():
            return
        before = error.jobs_before if isinstance(error, LockInTheWayError) else 0
        line = messages.on_terminal(waited, self._timeout, before)
        # A line that is too long would become two, of which only one is cleared.
        columns = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"{_CLEAR_LINE}{line[:columns]}")
        sys.stderr.flush()

    def _clear_terminal(self) -> None:
        if self._has_waited and _has_terminal():
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()


def _has_terminal() -> bool:
    # It is None in a program that was started without standard error.
    return sys.stderr is not None and sys.stderr.isatty()


def _situation(error: LockInTheWayError | DirectoryError) -> tuple[object, ...]:
    """Return a key of the situation: each situation is told in full only once."""
    if isinstance(error, DirectoryError):
        return (str(error),)
    file = error.file
    if not file:
        return ()
    has_test = any(process.test_of for process in file.leftovers.processes)
    return (file.path, file.state, bool(file.leftovers.processes), has_test)
