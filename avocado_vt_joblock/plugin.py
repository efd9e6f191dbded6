"""The plugin: takes the lock before a job with VT tests, and lets go of it after."""

from __future__ import annotations

import os
import pwd
import sys
import time
import weakref
from typing import NoReturn

from avocado.core import exit_codes, extension_manager
from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.output import LOG_JOB, LOG_UI
from avocado.core.plugin_interfaces import JobPost, JobPre
from avocado.utils import process

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
                lock = JobLock(directory, str(job.unique_id), LOG_UI.warning)
                # For a job that ends without post(): by a second Ctrl-C, for example.
                weakref.finalize(self, lock.release)
                lock.acquire()
                self._lock = lock
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
            try:
                _end_tests(job)
            finally:
                self._lock.release()


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
    if not isinstance(value, (str, os.PathLike)) or not (path := os.fspath(value)):
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


def _end_tests(job: Job) -> None:
    """Wait for the job's tests that still run, and end those that do not end by themselves.

    Avocado ends the processes that it has started when a job is interrupted or takes too long, but
    avocado-vt runs a test in a child of such a process, which goes on.
    """
    deadline = time.monotonic() + TESTS_TIMEOUT
    while tests := _running_tests(job):
        if time.monotonic() > deadline:
            for pid in tests:
                process.kill_process_tree(pid)
            LOG_UI.warning(
                "Killed tests of the job that still ran (PIDs %s). Guests that they started may "
                "still be running.",
                ", ".join(map(str, tests)),
            )
            return
        time.sleep(0.05)


def _running_tests(job: Job) -> list[int]:
    """Find the job's tests by the command line that they have inherited from Avocado's runner."""
    # Not by the job id: that may have been given to two jobs.
    output = f"output_dir={job.test_results_path}{os.sep}".encode(errors="surrogateescape")
    tests = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if b"task-run" in words and any(word.startswith(output) for word in words):
                tests.append(int(entry.name))
    return tests
