"""A stopped job: it undoes nothing, and is red in every result.

At the end of each job Avocado calls ``post_tests`` of other plugins, and runs the
post-job scripts. It does so also if the job was stopped before its tests. That could
undo what the holder of the lock has set up. So a job that has not got the lock is
disarmed.
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
#: Where a job keeps what it was disarmed of, and what its results were before they
#: showed that it was stopped: Avocado makes new plugins for each run of it.
_DISARMED = "_vt_joblock_disarmed"
_RESULTS = "_vt_joblock_results"


def disarm(job: Job) -> None:
    """Keep a job from undoing what the holder of the lock has set up."""
    kept = vars(job)
    if _DISARMED not in kept:
        scripts = {key: job.config.get(key) for key in _NO_SCRIPTS}
        kept[_DISARMED] = (job.post_tests, scripts)
    kept["post_tests"] = lambda: None
    job.config.update(_NO_SCRIPTS)


def rearm(job: Job) -> None:
    """Give a job back what it was disarmed of, if it was."""
    kept = vars(job)
    if _DISARMED in kept:
        post_tests, scripts = kept[_DISARMED]
        kept["post_tests"] = post_tests
        job.config.update(scripts)
        del kept[_DISARMED]


def forget(job: Job) -> None:
    """If an earlier run of this job was stopped, undo what that changed in it."""
    rearm(job)
    results = vars(job).pop(_RESULTS, None)
    if results:
        job.status, shown = results
        vars(job.result).update(shown)


def stop(job: Job, error: BaseException, directory: object) -> BaseException:
    """Tell why a job is stopped, and have its results show that.

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
    with contextlib.suppress(Exception):
        from avocado.core import extension_manager
        from avocado.core.exceptions import JobError

        # From 105.0 on this error of a plugin stops the job; before, it is lost.
        if hasattr(extension_manager, "JobBaseException"):
            return JobError(text)
    telling.tell(text, logging.ERROR, loggers=(telling.USER_LOG,))
    return SystemExit(getattr(job, "exitcode", 0) | _JOB_FAIL)


def _show_in_results(job: Any, text: str, headline: str) -> None:
    """Have the results of a job that runs no test show an error, for a CI to see."""
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
    shown = {**vars(result), "tests": list(result.tests)}
    vars(job)[_RESULTS] = (job.status, shown)
    result.tests_total = 1
    result.check_test(state)
    # Avocado writes no HTML report for a job whose status is ERROR.
    job.status = "INTERRUPTED"
    _show_in_tap(job, state)


def _show_in_tap(job: Job, state: dict[str, Any]) -> None:
    """Have Avocado's TAP plugin write the error: there is no event for it.

    It is a new object: if the program runs the job again, that of the job would write
    into files that are closed.
    """
    from avocado.plugins.tap import TAPResult

    if "result_events.tap" in job.config.get("plugins.disable", []):
        return
    tap = TAPResult(job.config)
    tap.pre_tests(job)
    tap.end_test(job.result, state)
    tap.post_tests(job)
