"""The plugin: takes the lock before a job with VT tests, and lets go of it after."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from avocado.core import exit_codes, extension_manager
from avocado.core.exceptions import JobError
from avocado.core.job import Job
from avocado.core.output import LOG_JOB, LOG_UI
from avocado.core.plugin_interfaces import JobPost, JobPre

from avocado_vt_joblock.lock import Holder, JobLock, LockError, LockHeldError
from avocado_vt_joblock.settings import OPTION

VT_KIND = "avocado-vt"


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
                self._lock.acquire()
        except LockHeldError as error:
            _stop(job, _describe(error.holder))
        except LockError as error:
            _stop(job, f"{error}\nThe setting is {OPTION} = {job.config[OPTION]!r}.")
        except Exception as error:
            _stop(job, f"{type(error).__name__}: {error}. Details are in {job.logfile}.")

    def post(self, job: Job) -> None:
        """Let go of the lock if the job has it.

        :param job: the job that has ended, in whatever way
        """
        if self._lock:
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
            f"the lock directory {path} is a relative path, which would be another lock from "
            "every working directory. Set an absolute one."
        )
    return path


def _describe(holder: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    return f"""another job holds the lock.
    file:   {holder.path}
    PID:    {holder.pid or "unknown"}
    user:   {holder.user}
    job id: {holder.job_id}
    since:  {since}
Wait until that job is done. If your jobs use a data directory of their own, then give them a lock
directory of their own as well: set {OPTION}."""


def _stop(job: Job, reason: str) -> NoReturn:
    """Stop the job with a message; to be called while an exception is handled."""
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
