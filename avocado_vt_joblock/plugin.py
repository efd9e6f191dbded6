"""The plugin: takes the lock before a job with VT tests, and lets go of it after."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import time
import weakref
from typing import NoReturn

from avocado.core import exit_codes, extension_manager
from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.output import LOG_JOB, LOG_UI
from avocado.core.plugin_interfaces import JobPost, JobPre

from avocado_vt_joblock.lock import JobLock, LockError, LockHeldError
from avocado_vt_joblock.settings import KEY, OPTION, SECTION

VT_KIND = "avocado-vt"
_WHERE = f"Set {OPTION} ({KEY} in section [{SECTION}]) in a config file that avocado config lists."
#: How long to wait for tests that still run when their job has ended, in seconds.
TESTS_TIMEOUT = 5.0


class VTJobLock(JobPre, JobPost):
    """Keeps two jobs with VT tests from running at once; Avocado makes one object for each job."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock"
    # The first of all, so that a job that is turned away runs no pre-job script.
    priority = extension_manager.PluginPriority.VERY_HIGH

    def __init__(self) -> None:
        self._lock: JobLock | None = None

    def pre(self, job: Job) -> None:
        """Take the lock if the job contains VT tests.

        :param job: the job that is about to run
        :raises JobError: on Avocado 105.0 and newer, when the lock could not be taken, for
                          whatever reason; ``Job.run()`` prints it and returns an exit code
        :raises SystemExit: the same on older ones, where nothing else would stop the job
        """
        try:
            if _has_vt_tests(job):
                directory = _lock_directory(job.config[OPTION])
                self._lock = JobLock(directory, str(job.unique_id), LOG_UI.warning)
                # For a job that ends without post(), by one Ctrl-C too many for example.
                weakref.finalize(self, _let_go, self._lock, job.test_results_path)
                self._lock.acquire()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            # Avocado goes on after anything else that gets out of here, and would run the tests.
            _stop(job, error)

    def post(self, job: Job) -> None:
        """Let go of the lock if the job has it, as soon as none of its tests runs any more.

        :param job: the job that has ended, in whatever way
        """
        if self._lock:
            _let_go(self._lock, job.test_results_path, TESTS_TIMEOUT)


def _has_vt_tests(job: Job) -> bool:
    # A suite whose references are not resolved yet has None for tests. In a dry run no test is of
    # the VT kind.
    return any(
        getattr(runnable, "kind", None) == VT_KIND
        for suite in job.test_suites
        for runnable in suite.tests or ()
    )


def _lock_directory(value: object) -> str:
    """Check what is set as the lock directory, short of looking whether it is there."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not path or not isinstance(path, str):
        raise LockError("no lock directory is set. Set the absolute path of a directory.")
    path = os.path.expanduser(path)
    if not os.path.isabs(path):
        raise LockError(
            f"the lock directory {path} is no absolute path. Set one: ~ and ~USER are expanded if "
            "there is such a user; variables and quotes are taken as they are."
        )
    return path


def _stop(job: Job, error: BaseException) -> NoReturn:
    """Stop the job; to be called while the error is handled."""
    try:
        reason = _describe(error, job)
    except Exception:
        reason = f"{type(error).__name__}. Details are in the job's log."
    message = f"Failure trying to set Avocado-VT job lock: {reason}"
    LOG_JOB.error(message, exc_info=True)
    # Post-job scripts run for this job as well: they can tell by its status.
    job.status = "ERROR"
    # Avocado lets a job exception out of a plugin, and so stops the job, only from 105.0 on, when
    # its extension manager came to know them.
    if hasattr(extension_manager, "JobBaseException"):
        raise JobError(message)
    LOG_UI.error(message)
    sys.exit(job.exitcode | exit_codes.AVOCADO_JOB_FAIL)


def _describe(error: BaseException, job: Job) -> str:
    if isinstance(error, LockHeldError):
        holder = error.holder
        return f"""another job holds the lock.
    file:   {holder.path}
    PID:    {holder.pid or "unknown"}
    user:   {_user(holder.uid)}
    job id: {holder.job_id}
    since:  {_local_time(holder.since)}
Wait until that job is done. If your jobs use a data directory of their own, then give them a lock
directory of their own as well.
{_WHERE}"""
    if isinstance(error, LockError):
        return f"{error}\nIt is {OPTION} = {job.config[OPTION]!r}.\n{_WHERE}"
    return f"{type(error).__name__}: {error}. Details are in {job.logfile}."


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _local_time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _let_go(lock: JobLock, results: str, patience: float = 0) -> None:
    """Release the lock, and before that end the tests of the job that still run.

    Avocado ends the processes that it has started when a job is interrupted or takes too long, but
    avocado-vt runs a test in a child of such a process, which goes on.

    :param results: the directory of the tests' results
    :param patience: how long to wait for tests to end by themselves, in seconds
    """
    try:
        if lock.held and _wait_for_tests(results, patience):
            _kill_tests(results)
    except BaseException:
        # However impatient a user is with Ctrl-C, no test goes on without the lock.
        _kill_tests(results)
        raise
    finally:
        lock.release()


def _wait_for_tests(results: str, patience: float) -> list[int]:
    """Wait until no test runs, and return those that do in the end."""
    deadline = time.monotonic() + patience
    while (tests := _running_tests(results)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return tests


def _kill_tests(results: str) -> None:
    tests = _running_tests(results)
    for pid in tests:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if tests:
        pids = ", ".join(map(str, tests))
        LOG_UI.warning(
            "Killed tests of the job that still ran (PIDs %s). Guests that they started may still "
            "be running.",
            pids,
        )
        if _wait_for_tests(results, TESTS_TIMEOUT):
            LOG_UI.warning("They have not ended yet. Wait for that before the next job.")


def _running_tests(results: str) -> list[int]:
    """Find a job's tests by the command line that they have inherited from Avocado's runner."""
    # Not by the job id: that may have been given to two jobs.
    output = f"output_dir={results}{os.sep}".encode(errors="surrogateescape")
    tests: list[int] = []
    # A /proc that shows another PID namespace has other processes by these numbers.
    if os.path.realpath("/proc/self") != f"/proc/{os.getpid()}":
        return tests
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                if b"task-run" in words and any(word.startswith(output) for word in words):
                    tests.append(int(entry.name))
    return tests
