"""What Avocado calls before and after a job.

Avocado leaves out a plugin that does not load, and goes on after an exception that it does not
know: both would run the tests without the lock. So whatever goes wrong becomes one that it knows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import time
from typing import TYPE_CHECKING

from avocado.core.plugin_interfaces import JobPost, JobPre

from avocado_vt_joblock import DIR, TIMEOUT

_missing: Exception | None = None
try:
    from avocado_vt_joblock import messages
    from avocado_vt_joblock.lock import JobLock, LockInTheWayError
    from avocado_vt_joblock.lockfile import LockFile, Reason, State
except Exception as error:  # a half-done upgrade, for example
    _missing = error
if TYPE_CHECKING:
    from avocado.core.job import Job
    from avocado.core.nrunner.runnable import Runnable

_JOB_FAIL = 2  # avocado.core.exit_codes.AVOCADO_JOB_FAIL
#: How long to wait at the end of a job for what is left of it, in seconds.
END_TIMEOUT = 5.0
#: How long a waiting job waits between two attempts at most, and how often it says so, in seconds.
ATTEMPT_INTERVAL, REMINDER_INTERVAL = 1.0, 300.0
_JOB_LOG, _USER, _POST_SCRIPTS = "avocado.job", "avocado.app", "plugins.jobscripts.post"
# What a job keeps for this package, since Avocado makes new plugins for each run of it.
_LOCK, _HELD_BACK = "_vt_joblock", "_vt_joblock_held_back"


class VTJobLock(JobPre):
    """Takes the lock: the first thing that a job does."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock"
    priority = 101  # above PluginPriority.VERY_HIGH: a refused job runs no other plugin's pre()

    def pre(self, job: Job) -> None:
        """Take the lock if the job contains VT tests.

        :param job: the job that is about to run
        :raises JobError: when it could not be taken; SystemExit on Avocado 103.0 and 104.0
        """
        try:
            # In a dry run no test is of that kind.
            if any(test.kind == "avocado-vt" for test in _tests(job)):
                _hold_back(job)
                _take_turn(job)
                _let_go(job)
        except BaseException as error:
            stop: BaseException = SystemExit(_JOB_FAIL)
            try:
                stop = _refuse(error, job)
            finally:
                # Whatever comes now, a signal for example, Avocado must not go on.
                raise stop from None


class VTJobUnlock(JobPost):
    """Gives the lock back: the last thing that a job does, after the post-job scripts."""

    name = "vt-joblock-release"
    description = "Avocado-VT job lock: the release"
    priority = -1  # below PluginPriority.LAST_RESORT

    def post(self, job: Job) -> None:
        """Release the lock if the job has it, unless something of the job still runs.

        :param job: the job that has ended, in whatever way
        """
        try:
            _let_go(job)
            _give_back(job)
        finally:
            # After one Ctrl-C too many the next job judges what is left.
            lock: JobLock | None = vars(job).get(_LOCK)
            if lock:
                lock.release(leave_file=lock.held)


def _tests(job: Job) -> list[Runnable]:
    # A suite whose references are not resolved yet has None for tests.
    suites = [suite for suite in job.test_suites if getattr(suite, "enabled", True)]
    return [test for suite in suites for test in suite.tests or ()]


def _hold_back(job: Job) -> None:
    """Keep a job without the lock from undoing what the holder has set up, when it ends."""
    kept = vars(job)
    held_back = kept.setdefault(_HELD_BACK, (job.post_tests, job.config.get(_POST_SCRIPTS)))
    # It puts itself back, since a program may run its job again.
    kept["post_tests"] = lambda: kept.update(post_tests=held_back[0])
    job.config[_POST_SCRIPTS] = os.devnull


def _let_go(job: Job) -> None:
    held_back = vars(job).pop(_HELD_BACK, None)
    if held_back:
        vars(job)["post_tests"], job.config[_POST_SCRIPTS] = held_back


def _take_turn(job: Job) -> None:
    """Take the lock, and wait for it if that is set."""
    if _missing:
        raise _missing
    seconds = messages.timeout(job.config[TIMEOUT])
    path = messages.directory(job.config[DIR])
    lock = JobLock(path, str(job.unique_id))
    # Before the first attempt: to give back what is not held does no harm.
    vars(job)[_LOCK] = lock
    for file in _wait_for_turn(lock, seconds):
        if file.reason is Reason.SYSTEM:
            _tell(messages.NOT_REMOVED.format(file.path, file.detail))
        else:
            _tell(messages.REMOVED.format(file.path), logging.INFO, _JOB_LOG)
    # By inode(7): writable by others, and no sticky bit.
    if os.stat(path).st_mode & 0o1002 == 0o0002:
        _tell(messages.NO_STICKY_BIT.format(path))


def _wait_for_turn(lock: JobLock, seconds: float) -> list[LockFile]:
    started = told_at = time.monotonic()
    deadline = started + seconds
    until = messages.until(deadline)
    told = set()
    while True:
        try:
            stale = lock.acquire()
            break
        except LockInTheWayError as error:
            file, now = error.file, time.monotonic()
            if file.state not in (State.LIVE, State.NOT_NOW) or now >= deadline:
                error.waited = now - started if seconds else 0.0
                raise
        # What is told again when it changes.
        tests = any(process.test_of for process in file.processes)
        what = (file.path, file.state, bool(file.processes), tests)
        if what not in told or now - told_at > REMINDER_INTERVAL:
            text = messages.STILL_WAITING if what in told else messages.WAITING
            waited, lock_file = messages.duration(now - started), messages.describe(file)
            _tell(text.format(until=until, waited=waited, lock_file=lock_file))
            told.add(what)
            told_at = now
        time.sleep(min(ATTEMPT_INTERVAL * random.uniform(0.5, 1), deadline - now))
    if told:
        _tell(messages.OBTAINED.format(messages.duration(time.monotonic() - started)))
    return stale


def _give_back(job: Job) -> None:
    """Release the lock, or leave its file if something of the job may still run."""
    lock: JobLock | None = vars(job).get(_LOCK)
    if not lock or not lock.held:
        return
    # What a passed test leaves is left on purpose.
    left = LockFile(lock.path, state=State.STALE)
    if not _all_passed(job):
        left = LockFile(lock.path, reason=Reason.INTERRUPTED)
        # avocado-vt leaves guests for the next job then.
        tests_only = job.config.get("vt.setup.keep_guest_running") is True
        with contextlib.suppress(KeyboardInterrupt):
            left = lock.left(tests_only)
            if left.processes:
                _tell(messages.ENDING.format(len(left.processes), END_TIMEOUT))
            deadline = time.monotonic() + END_TIMEOUT
            while left.state is not State.STALE and time.monotonic() < deadline:
                time.sleep(0.1)
                left = lock.left(tests_only)
    problem = lock.release(leave_file=left.state is not State.STALE)
    for text in messages.end(left, problem):
        _tell(text)


def _all_passed(job: Job) -> bool:
    """Whether a job has ended well: after any other end of a test avocado-vt hides what it left."""
    # Avocado calls post() while an exception is on its way out of the job, too.
    if sys.exc_info()[0] or job.status != "PASS" or job.exitcode or not job.result:
        return False
    results = [test["status"] for test in job.result.tests]
    return len(results) >= len(_tests(job)) and set(results) == {"PASS"}


def _refuse(error: BaseException, job: Job) -> BaseException:
    """Tell why a job is stopped; return the exception by which Avocado stops it."""
    with contextlib.suppress(Exception):
        _hold_back(job)
    text = type(error).__name__
    with contextlib.suppress(Exception):
        text += f": {error}"
        text = messages.refusal(error, job.config.get(DIR), job.logfile)
    _tell(text, logging.ERROR, _JOB_LOG)
    with contextlib.suppress(Exception):
        _add_to_results(text, job)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    with contextlib.suppress(Exception):
        from avocado.core import extension_manager
        from avocado.core.exceptions import JobError

        # From 105.0 on Avocado lets these out of a plugin.
        if issubclass(JobError, getattr(extension_manager, "JobBaseException", ())):
            return JobError(text)
    _tell(text, loggers=_USER)
    return SystemExit(getattr(job, "exitcode", 0) | _JOB_FAIL)


def _add_to_results(text: str, job: Job) -> None:
    """Have the results of a job that runs no test show an error: some read nothing else."""
    from avocado.core.test_id import TestID

    assert job.result
    times = ("time_start", "time_end", "actual_time_start", "actual_time_end")
    state = {"name": TestID(0, VTJobLock.name), "class_name": VTJobLock.name, "status": "ERROR"}
    why = {"fail_class": "JobError", "fail_reason": text.partition("\n")[0], "traceback": text}
    logs = {"logdir": job.logdir, "logfile": job.logfile, "time_elapsed": 0.0}
    job.result.check_test({**dict.fromkeys(times, time.time()), **state, **why, **logs})
    job.status = "INTERRUPTED"  # With ERROR there would be no report in HTML.


def _tell(text: str, level: int = logging.WARNING, loggers: str = f"{_JOB_LOG} {_USER}") -> None:
    """Tell ``job.log`` and the user; whatever log handlers raise, nothing changes."""
    for logger in loggers.split():
        try:
            logging.getLogger(logger).log(level, text, exc_info=level >= logging.ERROR)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            pass
