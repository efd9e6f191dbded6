"""A stopped job: its clean-up does not run, and all its results show an error.

At the end of each job Avocado calls ``post_tests`` of other plugins and runs the
post-job scripts. For a job that was stopped before its tests it does so, too. But then
they may undo what another job needs: the one that holds the lock, with the same images.
So a job is *disarmed*, which means that both are switched off, until it has the lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from avocado_vt_joblock import messages, telling

if TYPE_CHECKING:
    from avocado.core.job import Job

#: The name of the only test that the results of a stopped job have.
TEST_NAME = "vt-joblock"
_JOB_FAIL = 2  # avocado.core.exit_codes.AVOCADO_JOB_FAIL
_JOB_INTERRUPTED = 8  # avocado.core.exit_codes.AVOCADO_JOB_INTERRUPTED
#: With these settings Avocado runs no post-job script, and does not complain of that.
_NO_SCRIPTS = {
    "plugins.jobscripts.post": os.devnull,
    "plugins.jobscripts.warn_non_existing_dir": False,
}
# A program may run the same job again after it was stopped, and Avocado makes new
# plugins for each run. So what is to be restored is kept in two attributes of the job.
#: What disarm() has switched off.
_DISARMED = "_vt_joblock_disarmed"
#: Its status and its results before stop() changed them.
_RESULTS = "_vt_joblock_results"


def disarm(job: Job) -> None:
    """Keep a job from calling ``post_tests`` and from running post-job scripts."""
    attributes = vars(job)
    if _DISARMED not in attributes:
        scripts = {key: job.config.get(key) for key in _NO_SCRIPTS}
        attributes[_DISARMED] = (job.post_tests, scripts)
    attributes["post_tests"] = lambda: None
    job.config.update(_NO_SCRIPTS)


def rearm(job: Job) -> None:
    """Restore what disarm() has switched off, if it has."""
    attributes = vars(job)
    if _DISARMED in attributes:
        attributes["post_tests"], scripts = attributes[_DISARMED]
        job.config.update(scripts)
        del attributes[_DISARMED]


def undo_stop(job: Job) -> None:
    """Undo what stop() has changed in an earlier run of this job, if there was one."""
    rearm(job)
    before = vars(job).pop(_RESULTS, None)
    if before:
        job.status, attributes = before
        vars(job.result).update(attributes)


def stop(job: Job, error: BaseException, directory: object) -> BaseException:
    """Tell why a job is stopped, and make its results show that.

    The job is stopped even if some of that fails.

    :param job: the job; a program may have changed it in any way
    :param error: what stops it
    :param directory: the lock directory, as it is set
    :return: the exception by which Avocado stops it
    """
    with contextlib.suppress(Exception):
        disarm(job)
    text = f"{type(error).__name__}: {error}"
    with contextlib.suppress(Exception):
        text = messages.refusal(error, directory, job.logfile)
    # A traceback looks like a crash, so only an unforeseen error is told with one.
    unforeseen = None if messages.is_foreseen(error) else error
    telling.tell(text, logging.ERROR, loggers=(telling.JOB_LOG,), error=unforeseen)
    with contextlib.suppress(Exception):
        _show_in_results(job, text, messages.headline(error, text))
    if isinstance(error, SystemExit):
        return error
    if isinstance(error, KeyboardInterrupt):
        # For a KeyboardInterrupt Avocado would write a crash log.
        return SystemExit(getattr(job, "exitcode", 0) | _JOB_INTERRUPTED)
    return _exception_of_avocado(job, text)


def _exception_of_avocado(job: Job, text: str) -> BaseException:
    """Return what stops a job; where Avocado would not tell the user why, do so."""
    with contextlib.suppress(Exception):
        from avocado.core import extension_manager
        from avocado.core.exceptions import JobError

        # From 105.0 on this error of a plugin stops the job; older versions ignore it.
        if hasattr(extension_manager, "JobBaseException"):
            return JobError(text)
    telling.tell(text, logging.ERROR, loggers=(telling.USER_LOG,))
    return SystemExit(getattr(job, "exitcode", 0) | _JOB_FAIL)


def _show_in_results(job: Any, text: str, headline: str) -> None:
    """Make the results of a job that runs no test show an error, for a CI to see."""
    from avocado.core.test_id import TestID

    class LockID(TestID):
        """What Avocado's summary shows beside ERROR."""

        def __str__(self) -> str:
            return messages.TEST_ID

    name = LockID(0, TEST_NAME)
    now = time.time()
    logdir = os.path.join(job.test_results_path, name.str_filesystem)
    log = os.path.join(logdir, "debug.log")
    os.makedirs(logdir, exist_ok=True)
    with open(log, "w", encoding="utf-8", errors="replace") as file:
        file.write(f"{text}\n")
    state = {
        "name": name,
        "class_name": TEST_NAME,
        "status": "ERROR",
        "fail_class": "JobError",
        "fail_reason": headline,
        "traceback": text,
        "logdir": logdir,
        "logfile": log,
        "time_start": now,
        "time_end": now,
        "actual_time_start": now,
        "actual_time_end": now,
        "time_elapsed": 0.0,
    }
    result = job.result
    before = {**vars(result), "tests": list(result.tests)}
    vars(job)[_RESULTS] = (job.status, before)
    result.tests_total = 1
    result.check_test(state)
    # With "ERROR" Avocado would write no HTML report.
    job.status = "INTERRUPTED"
    _show_in_tap(job, state)


def _show_in_tap(job: Job, state: dict[str, Any]) -> None:
    """Make Avocado's TAP plugin write the error.

    Other reports are made from the results at the end of the job. But that plugin
    writes at events, and a stopped job has none. A new object of it is used, with files
    of its own: the job's own object is needed if a program runs the job again.
    """
    from avocado.plugins.tap import TAPResult

    if "result_events.tap" in job.config.get("plugins.disable", []):
        return
    tap = TAPResult(job.config)
    tap.pre_tests(job)
    tap.end_test(job.result, state)
    tap.post_tests(job)
