"""What Avocado calls before and after a job.

Avocado leaves out a plugin that does not load, and goes on after an exception that it
does not know: both would run the tests without the lock. So every error in pre()
becomes an exception that Avocado knows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import TYPE_CHECKING, Any, cast

from avocado.core.plugin_interfaces import JobPost, JobPre

from avocado_vt_joblock import DIR, TIMEOUT

_import_error: Exception | None = None
try:
    from avocado_vt_joblock import ending, messages, options, refusal, telling, waiting
    from avocado_vt_joblock.lock import JobLock
except Exception as error:  # a half-done upgrade, for example
    _import_error = error
if TYPE_CHECKING:
    from avocado.core.job import Job
    from avocado.core.nrunner.runnable import Runnable

_JOB_FAIL = 2  # avocado.core.exit_codes.AVOCADO_JOB_FAIL
#: Where a job keeps its lock: Avocado makes new plugins for each run of it.
_LOCK = "_vt_joblock"


class VTJobLock(JobPre):
    """Takes the lock: the first thing that a job does."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock"
    # Above PluginPriority.VERY_HIGH: a refused job runs no other plugin's pre().
    priority = 101

    def pre(self, job: Job) -> None:
        """Take the lock if the job contains VT tests.

        :param job: the job that is about to run
        :raises JobError: when it could not be taken; SystemExit on Avocado 103.0 and
            104.0, and after Ctrl-C
        """
        try:
            # In a dry run no test is of this kind.
            if any(test.kind == "avocado-vt" for test in _tests(job)):
                _acquire(job)
        except BaseException as error:
            exception: BaseException = SystemExit(_JOB_FAIL)
            try:
                exception = _stop_without_package(job) or _stop(job, error)
            finally:
                # Also after an exception in the line above: Avocado must not go on.
                raise exception from None


class VTJobUnlock(JobPost):
    """Gives the lock back: the last thing that a job does."""

    name = "vt-joblock-release"
    description = "Avocado-VT job lock: the release"
    # Below PluginPriority.LAST_RESORT.
    priority = -1

    def post(self, job: Job) -> None:
        """Release the lock if the job has it, or hand it over to what still runs of it.

        :param job: the job that has ended, in whatever way
        """
        try:
            if not _import_error:
                refusal.rearm(job)
                _give_back(job)
        finally:
            # If Ctrl-C has stopped the above, the next job judges what is left.
            lock: JobLock | None = vars(job).get(_LOCK)
            if lock:
                lock.abandon()


def _tests(job: Job) -> list[Runnable]:
    # A suite whose references are not resolved yet has None for tests.
    suites = [suite for suite in job.test_suites if getattr(suite, "enabled", True)]
    return [test for suite in suites for test in suite.tests or ()]


def _stop(job: Job, error: BaseException) -> BaseException:
    directory = None
    with contextlib.suppress(Exception):
        directory = _config_of(job).get(DIR)
    return refusal.stop(job, error, directory)


def _stop_without_package(job: Job) -> BaseException | None:
    """Stop a job where this package does not load; return None where it does."""
    if not _import_error:
        return None
    # Nothing of this package may be used here, neither messages nor refusal.
    text = f"Failure trying to set Avocado-VT job lock: {_import_error}"
    logging.getLogger("avocado.app").error(text)
    # The holder of the lock may be at work: see the first lines of refusal.py.
    vars(job)["post_tests"] = lambda: None
    job.config["plugins.jobscripts.post"] = os.devnull
    return SystemExit(_JOB_FAIL)


def _acquire(job: Job) -> None:
    """Take the lock, and wait for it if that is set."""
    if _import_error:
        raise _import_error
    # A program may run the same job again after it was stopped.
    refusal.undo_stop(job)
    refusal.disarm(job)
    config = _config_of(job)
    options.check_order(_order_of_plugins())
    timeout = options.timeout(config[TIMEOUT])
    directory = options.directory(config[DIR])
    lock = JobLock(directory, str(job.unique_id))
    # Before the first attempt, so that post() can give the lock back in any case.
    vars(job)[_LOCK] = lock
    telling.tell_of_stale(waiting.acquire(lock, timeout))
    with contextlib.suppress(Exception):
        _warn(directory)
    refusal.rearm(job)


def _config_of(job: Job) -> dict[str, Any]:
    """Return what is set for a job."""
    config: dict[str, Any] = job.config
    if config.get("job.replay.enabled"):
        # The configuration is that of the replayed job, maybe of long ago.
        from avocado.core.settings import settings

        config = settings.as_dict()
    return config


def _order_of_plugins() -> list[str] | None:
    """Return the order of the plugins of jobs that is set, if one is.

    Avocado takes it from its own settings, not from the configuration of the job, which
    a program may have changed.
    """
    from avocado.core.settings import settings

    key = "plugins.job.prepost.order"
    # To make a dictionary of all settings would cost as much as the whole attempt.
    namespaces: dict[str, Any] = getattr(settings, "_namespaces", {})
    if key in namespaces:
        return cast("list[str] | None", namespaces[key].value)
    return cast("list[str] | None", settings.as_dict().get(key))


def _warn(directory: str) -> None:
    """Warn of what makes the lock weak, and of settings without effect."""
    from avocado.core.settings import settings

    mode = os.stat(directory).st_mode
    # By inode(7) only the sticky bit keeps others from removing what is not theirs.
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        telling.tell(messages.no_sticky_bit(directory))
    for key in options.unknown_keys(settings.config):
        telling.tell(messages.unknown_key(key))


def _give_back(job: Job) -> None:
    """Give the lock back if the job has it."""
    lock: JobLock | None = vars(job).get(_LOCK)
    if lock and lock.is_held:
        # Tests that have passed may leave guests on purpose. With this setting all
        # tests do.
        keeps_guests = job.config.get("vt.setup.keep_guest_running") is True
        looks = not _all_passed(job)
        ending.give_back(lock, looks=looks, tests_only=keeps_guests)


def _all_passed(job: Job) -> bool:
    """Tell whether every test of a job has passed, and nothing else went wrong.

    If a test ends in any other way its clean-up may have failed, too, and avocado-vt
    does not say so. The status is PASS only if all suites have run, without exception.
    """
    if job.status != "PASS" or job.exitcode or not job.result:
        return False
    results = [test["status"] for test in job.result.tests]
    return len(results) >= len(_tests(job)) and set(results) == {"PASS"}
