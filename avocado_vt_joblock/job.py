"""A job with VT tests: what is set for its lock, its turn, its end, and what its user is told."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import pwd
import shlex
import sys
import time
import weakref
from typing import TYPE_CHECKING

from avocado_vt_joblock.lock import (
    JobLock,
    LockDirectoryError,
    LockError,
    LockHeldError,
    LockUnknownError,
)
from avocado_vt_joblock.processes import Left
from avocado_vt_joblock.settings import DIR, TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from avocado.core.job import Job

    from avocado_vt_joblock.lockfile import Holder
    from avocado_vt_joblock.processes import Process

#: How long to wait at the end of a job for what is left of it, in seconds.
END_TIMEOUT = 5.0
#: How often a job that waits for the lock says so, in seconds.
REMINDER_INTERVAL = 300.0
#: How many processes are described, and how many characters of the command line of each: long paths
#: shall not hide that it is a test's.
PROCESS_LIMIT = 20
COMMAND_LIMIT = 160
#: What ``avocado.core.exit_codes.AVOCADO_JOB_INTERRUPTED`` is.
JOB_INTERRUPTED = 8

LOG = logging.getLogger(__name__)


class _ToAvocado(logging.Handler):
    """Passes on what this package logs: to the job's log, and warnings to the users of Avocado."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("avocado.job").handle(record)
        # Of these only warnings go to standard error. Standard output may be the job's results.
        if record.levelno >= logging.WARNING:
            logging.getLogger("avocado.app").handle(record)


_package_log = logging.getLogger(__package__)
_package_log.setLevel(logging.INFO)
_package_log.propagate = False
_package_log.addHandler(_ToAvocado())


class TimeoutSettingError(LockError):
    """What is set as the time to wait for the lock makes no sense."""


class LockedJob:
    """A job with VT tests, and its lock.

    :param job: the job
    :raises LockError: when an option makes no sense
    """

    def __init__(self, job: Job) -> None:
        self._timeout = _timeout(job.config[TIMEOUT])
        self._lock = JobLock(_directory(job.config[DIR]), str(job.unique_id))
        # For a job that does not come to its end(), after one Ctrl-C too many for example.
        weakref.finalize(self, _release_or_leave, self._lock, 0)

    def begin(self) -> None:
        """Take the lock, and wait for it if that is set.

        :raises LockError: when it could not be taken
        """
        started = time.monotonic()
        deadline = started + self._timeout
        told: Holder | None = None
        while True:
            try:
                self._lock.acquire()
                break
            except LockHeldError as error:
                if time.monotonic() >= deadline:
                    error.waited = time.monotonic() - started if self._timeout else 0
                    raise
                holder: Holder | None = error.holder
            while holder and (remaining := deadline - time.monotonic()) > 0:
                if holder != told:
                    LOG.warning("Waiting %s: %s", _until(deadline), _describe(holder))
                else:
                    LOG.warning("Still waiting %s, after %s.", _until(deadline), _since(started))
                told = holder
                holder = self._lock.wait(holder, min(REMINDER_INTERVAL, remaining))
        if told:
            LOG.warning("Obtained the lock after %s.", _since(started))

    def end(self, job: Job) -> None:
        """Release the lock, unless something of the job still runs.

        :param job: the job that has ended, in whatever way
        """
        if _tests_have_ended(job):
            # Then a guest that runs on is left on purpose.
            self._lock.release()
        else:
            _release_or_leave(self._lock, END_TIMEOUT)


def explain(error: BaseException, job: Job) -> str:
    """Tell the user of a job why it was stopped, and what to do.

    :param error: what stopped it
    :param job: the job
    """
    if isinstance(error, LockHeldError):
        waited = f"out of time after {_duration(error.waited)}: " if error.waited else ""
        return f"{waited}{_describe(error.holder)}{_remedy(error)}"
    if isinstance(error, LockUnknownError):
        owner = _user(error.holder.uid)
        who = owner if owner == "root" else f"{owner} or root"
        return (
            f"{error}.\nIts owner is {owner}. If no job, test or guest of {owner} runs any more "
            f"(pgrep -u {owner} -af 'avocado|qemu'),\nthen {who} can remove it:\n"
            f"    rm {shlex.quote(error.holder.path)}"
        )
    if isinstance(error, TimeoutSettingError):
        return f"{error}\n{_where_to_change(TIMEOUT)}"
    if isinstance(error, LockDirectoryError):
        return (
            f"{error} Correct that, or set another lock directory.\n"
            f"It is {DIR} = {job.config[DIR]!r}.\n{_where_to_change(DIR)}"
        )
    if isinstance(error, LockError):
        return str(error)
    return f"{type(error).__name__}: {error}. Details are in {job.logfile}."


def _timeout(value: object) -> float:
    """Check what is set as the time to wait; return seconds, or infinity."""
    seconds = math.nan
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            seconds = float(value)
    if seconds == -1:
        return math.inf
    if not 0 <= seconds < math.inf:
        raise TimeoutSettingError(
            f"{TIMEOUT} = {value!r} is not a time to wait. That is a number of seconds, 0 to fail "
            "at once, or -1 to wait for as long as it takes."
        )
    return seconds


def _directory(value: object) -> str:
    """Check what is set as the lock directory, short of looking whether it is there."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not path or not isinstance(path, str):
        raise LockDirectoryError("no lock directory is set.")
    path = os.path.expanduser(path)
    if not os.path.isabs(path):
        raise LockDirectoryError(
            f"the lock directory {path} is not an absolute path. ~ and ~USER are expanded if there "
            "is such a user; variables and quotes are taken as they are."
        )
    return path


def _tests_have_ended(job: Job) -> bool:
    """Tell whether every test of a job has ended by itself, so that none outlives the job."""
    try:
        # Avocado calls post() while an exception is on its way out of the job, too.
        if sys.exc_info()[0] or job.status != "PASS" or job.exitcode & JOB_INTERRUPTED:
            return False
        tests = sum(len(suite.tests or ()) for suite in job.test_suites if suite.enabled)
        results = [test["status"] for test in job.result.tests]  # type: ignore[union-attr]
    except Exception:
        return False
    return len(results) >= tests and not {"INTERRUPTED", "ERROR"} & set(results)


def _release_or_leave(lock: JobLock, timeout: float) -> None:
    """Release the lock if nothing of the job runs any more, and else leave the lock file.

    :param timeout: how long to wait for that, in seconds; Ctrl-C ends the waiting
    """
    if not lock.held:
        # An interruption may have left it half taken, or half released.
        lock.release()
        return
    try:
        left = _wait_for_the_rest(lock, timeout)
        if left.processes:
            LOG.warning(
                "%d process(es) of the job still run.%s\n%s\n"
                "Until they have ended no other job with VT tests runs in this lock directory, and "
                "the lock file stays: %s. The next job removes it.",
                len(left.processes),
                _list(left.processes),
                _advice(left, os.geteuid()),
                lock.path,
            )
        elif left.unseen:
            LOG.warning(
                "/proc does not show whether tests or guests of the job still run (%s). So its "
                "lock file stays: %s. The next job looks again, and says what to do if that does "
                "not help.",
                left.unseen,
                lock.path,
            )
        else:
            lock.release()
    finally:
        lock.leave()


def _wait_for_the_rest(lock: JobLock, timeout: float) -> Left:
    deadline = time.monotonic() + timeout
    with contextlib.suppress(KeyboardInterrupt):
        left = lock.left_behind()
        if left.processes and time.monotonic() < deadline:
            LOG.warning(
                "The job has ended, but %d process(es) of it still run: waiting up to %g s for "
                "them. Ctrl-C ends the waiting.",
                len(left.processes),
                timeout,
            )
        while (left.processes or left.unseen) and time.monotonic() < deadline:
            time.sleep(0.1)
            if not left.processes or not all(process.is_running() for process in left.processes):
                left = lock.left_behind()
        return left
    with contextlib.suppress(KeyboardInterrupt):
        return lock.left_behind()
    return Left([], "Ctrl-C ended the look")


def _describe(holder: Holder) -> str:
    """Tell whose a live lock is, and what ends that does not end by itself."""
    if holder.processes:
        what = "a job has ended, but processes of it still run."
        pid = ""
        left = Left(list(holder.processes), holder.unseen)
        advice = f"\n{_advice(left, holder.uid)}"
    else:
        what = "another job holds the lock."
        pid = f"\n    PID:    {holder.pid or 'unknown'}"
        advice = ""
    return f"""{what}
    file:   {holder.path}{pid}
    user:   {_user(holder.uid)}
    job id: {holder.job_id}
    since:  {_local_time(holder.since)}{_list(holder.processes)}{advice}"""


def _remedy(error: LockHeldError) -> str:
    if error.holder.processes:
        return ""
    wait = f"set a longer {TIMEOUT}" if error.waited else f"set {TIMEOUT} to have this one wait"
    return f"""
Wait until that job is done, or {wait}.
Only if your jobs share no guest images and other files with that one, give them a lock directory
of their own: {DIR}."""


def _list(processes: Sequence[Process]) -> str:
    """List processes, each in a line; command lines are anybody's words, so they are tamed."""
    lines = [f"\n    {this.pid:>7}  {_printable(this.command)}" for this in processes]
    if len(lines) > PROCESS_LIMIT:
        lines[PROCESS_LIMIT:] = [f"\n    and {len(lines) - PROCESS_LIMIT} more"]
    return "".join(lines)


def _advice(left: Left, uid: int | None) -> str:
    """Tell what to do about what is left of a user's job."""
    pids = " ".join(str(process.pid) for process in left.processes)
    needs_root = uid == 0 or any(process.uid == 0 for process in left.processes)
    who = "root" if needs_root else f"{_user(uid)} or root"
    lines = []
    if left.unseen:
        lines.append(f"There may be more, tests too: /proc does not show all ({left.unseen}).")
    elif os.geteuid() not in (0, uid):
        lines.append(f"There may be guests, too, that only {who} can see.")
    has_test = any(process.is_test for process in left.processes)
    if has_test or left.unseen:
        lines += [
            "A test is among them. It may be cleaning up and restoring images: wait some minutes."
            if has_test
            else "A test may be cleaning up and restoring images: wait some minutes.",
            f"If it hangs, {who} can end them all, and has to check the images then:",
        ]
    else:
        lines += [
            "No test is among them that could end a guest and restore images.",
            f"What is still there in a minute, {who} has to end, and to check the images then:",
        ]
    return "\n".join([*lines, f"    kill {pids}"])


def _printable(text: str) -> str:
    tame = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:COMMAND_LIMIT])
    return tame if len(text) <= COMMAND_LIMIT else f"{tame[:COMMAND_LIMIT]}..."


def _user(uid: int | None) -> str:
    if uid is None:
        return "unknown"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _local_time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _until(deadline: float) -> str:
    if deadline == math.inf:
        return "for as long as it takes"
    return f"until {_local_time(time.time() + deadline - time.monotonic())}"


def _since(started: float) -> str:
    return _duration(time.monotonic() - started)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _where_to_change(option: str) -> str:
    section, _, key = option.rpartition(".")
    # As Avocado chooses the file of a user, which may not be there yet.
    home = os.environ.get("VIRTUAL_ENV", "~")
    return (
        f"Set {key} in section [{section}] of {home}/.config/avocado/avocado.conf. Only a file of "
        "--config and a program that uses the Job API win over that."
    )
