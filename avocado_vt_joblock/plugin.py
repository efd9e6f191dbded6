"""What Avocado loads as the plugin: a shell that needs nothing of Avocado but the interface.

A plugin that does not load is left out, and the tests run without it. So whatever else may be
missing, from a later Avocado for example, is imported inside, where that stops the job.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from avocado.core.plugin_interfaces import JobPost, JobPre

if TYPE_CHECKING:
    from avocado.core.job import Job

    from avocado_vt_joblock.job import LockedJob

VT_KIND = "avocado-vt"
#: What ``avocado.core.exit_codes.AVOCADO_JOB_FAIL`` is.
JOB_FAIL = 2


class VTJobLock(JobPre, JobPost):
    """Keeps two jobs with VT tests from running at once; Avocado makes one object for each job."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock"
    # PluginPriority.VERY_HIGH: before all others, so that a refused job runs no pre-job script.
    priority = 100

    def __init__(self) -> None:
        self._locked: LockedJob | None = None

    def pre(self, job: Job) -> None:
        """Take the lock if the job contains VT tests.

        :param job: the job that is about to run
        :raises JobError: on Avocado 105.0 and newer, when the lock could not be taken, for
                          whatever reason; ``Job.run()`` prints it and returns an exit code
        :raises SystemExit: the same on others, where nothing else would stop the job
        """
        try:
            if _has_vt_tests(job):
                from avocado_vt_joblock.job import LockedJob

                self._locked = LockedJob(job)
                self._locked.begin()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            # Avocado goes on after anything else that gets out of here, and would run the tests.
            raise _what_stops(job, error) from error

    def post(self, job: Job) -> None:
        """Release the lock if the job has it, unless something of the job still runs.

        :param job: the job that has ended, in whatever way
        """
        if self._locked:
            self._locked.end(job)


def _has_vt_tests(job: Job) -> bool:
    # A suite whose references are not resolved yet has None for tests. In a dry run no test is of
    # the VT kind.
    return any(
        runnable.kind == VT_KIND
        for suite in job.test_suites
        if getattr(suite, "enabled", True)
        for runnable in suite.tests or ()
    )


def _what_stops(job: Job, error: BaseException) -> BaseException:
    """Tell the user why the job is stopped, and make the exception that stops it.

    :param error: the reason, which is being handled
    """
    message = f"Failure trying to set Avocado-VT job lock: {_reason(error, job)}"
    logging.getLogger("avocado.job").error(message, exc_info=True)
    # Post-job scripts run for this job as well: they can tell by its status.
    with contextlib.suppress(Exception):
        job.status = "ERROR"
    job_error = _job_error()
    if job_error:
        return job_error(message)
    logging.getLogger("avocado.app").error(message)
    return SystemExit(getattr(job, "exitcode", 0) | JOB_FAIL)


def _reason(error: BaseException, job: Job) -> str:
    try:
        from avocado_vt_joblock.job import explain

        return explain(error, job)
    except Exception:
        return f"{type(error).__name__}: {error}. Details are in job.log."


def _job_error() -> type[Exception] | None:
    """Find what Avocado lets out of a plugin and stops the job by: job errors, from 105.0 on."""
    try:
        from avocado.core import extension_manager
        from avocado.core.exceptions import JobError
    except ImportError:
        return None
    let_out = getattr(extension_manager, "JobBaseException", ())
    return JobError if issubclass(JobError, let_out) else None
