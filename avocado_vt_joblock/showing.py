"""``avocado vt-joblock show``: who holds the lock, and who waits.

It changes nothing in the lock directory.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from avocado_vt_joblock import (
    DIR,
    TIMEOUT,
    advice,
    formats,
    leftovers,
    lockdir,
    lockfile,
    messages,
    options,
    telling,
)
from avocado_vt_joblock.leftovers import LOOK_TIMEOUT, JobProcess
from avocado_vt_joblock.lockdir import DirectoryError, LockDirectory, Ticket, Use
from avocado_vt_joblock.lockfile import LockFile, State

#: The exit code where a file for JSON cannot be written.
NOT_WRITTEN = 1


@dataclass
class Survey:
    """What is found in a lock directory."""

    directory: str
    files: list[LockFile] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    #: What is seen to run of jobs whose own process lives, by the paths of their files.
    processes: dict[str, list[JobProcess]] = field(default_factory=dict)
    #: What is wrong with the settings or the directory, so that each job is stopped.
    problem: str = ""

    @property
    def verdict(self) -> str:
        """What becomes of a job with VT tests that starts now, and does not wait.

        It is "free" if the job gets the lock, "refused" if another job is in its way,
        and "stopped" if something is wrong.
        """
        states = {file.state for file in self.files} - {State.STALE}
        if self.problem or (states and min(states) is State.UNKNOWN):
            return "stopped"
        return "refused" if states or self.waiting else "free"


def show(config: dict[str, Any], json_file: str | None) -> int:
    """Show the lock of a directory.

    :param config: the settings
    :param json_file: where to write the same as JSON; "-" for standard output
    :return: the exit code: 0 if a job would get the lock, 2 if not, ``NOT_WRITTEN``
    """
    survey = _survey(config)
    if f"job.prepost.{options.FIRST_PLUGIN}" in config.get("plugins.disable", []):
        telling.tell(messages.SWITCHED_OFF)
    if json_file == "-":
        _print(json.dumps(_as_json(survey), indent=4))
    else:
        _show_text(survey)
    if json_file and json_file != "-":
        try:
            with open(json_file, "w", encoding="utf-8") as file:
                json.dump(_as_json(survey), file, indent=4)
        except OSError as error:
            telling.tell(f"{json_file}: {error.strerror}")
            return NOT_WRITTEN
    return 0 if survey.verdict == "free" else 2


def _survey(config: dict[str, Any]) -> Survey:
    survey = Survey(str(config[DIR]))
    try:
        survey.directory = options.directory(config[DIR])
        directory = LockDirectory(survey.directory)
        listing = directory.listing()
        survey.files = directory.read_locks(listing.lock_names)
        lockfile.judge_by_leftovers(survey.files, LOOK_TIMEOUT)
        survey.files.sort(key=lambda file: file.state)
        # By the clock of this host. That of the file system is seen in new files only,
        # and this makes none.
        survey.waiting = directory.tickets(listing, time.time())
        survey.processes = _processes_of_living(survey.files)
        # These come last: they stop a job, but all of the above can be shown.
        options.check_order(config.get("plugins.job.prepost.order"))
        options.timeout(config[TIMEOUT])
        if not os.access(survey.directory, os.W_OK | os.X_OK):
            raise DirectoryError(Use.WRITE, lockdir.system_error(errno.EACCES))
    except (DirectoryError, options.OptionError, options.OrderError) as error:
        survey.problem = messages.why_stopped(error, config[DIR])
    return survey


def _processes_of_living(files: list[LockFile]) -> dict[str, list[JobProcess]]:
    """Return what is seen to run of jobs whose own process lives on this host."""
    living = [
        file
        for file in files
        if file.state in (State.LIVE, State.OUTER)
        and not file.leftovers.processes
        and not file.is_elsewhere
    ]
    if not living:
        return {}
    look = leftovers.Look.take(min(file.trace.since for file in living), LOOK_TIMEOUT)
    return {file.path: look.leftovers_of(file.trace).processes for file in living}


def _show_text(survey: Survey) -> None:
    _print(messages.overview(survey.directory, survey.verdict, survey.waiting))
    if survey.problem:
        _print(survey.problem)
    for file in survey.files:
        _print(advice.on_showing(file, survey.processes.get(file.path, [])))


def _as_json(survey: Survey) -> dict[str, Any]:
    """Return what ``--json`` writes; the manual promises these keys."""
    return {
        "directory": survey.directory,
        "verdict": survey.verdict,
        "problem": survey.problem or None,
        "locks": [_lock_as_json(survey, file) for file in survey.files],
        "waiting": [
            {
                "host": ticket.card.identity.host,
                "pid": ticket.card.identity.pid,
                "uid": ticket.card.uid,
                "user": formats.user(ticket.card.uid),
                "since": formats.iso_time(ticket.card.came),
            }
            for ticket in survey.waiting
        ],
    }


def _lock_as_json(survey: Survey, file: LockFile) -> dict[str, Any]:
    processes = file.leftovers.processes or survey.processes.get(file.path, [])
    return {
        "file": file.path,
        "state": file.state.name.lower(),
        "reason": advice.why_unknown(file) or None,
        "host": file.card.identity.host if file.card else None,
        "pid": file.pid or None,
        "command": file.command() or None,
        "uid": file.uid,
        "user": None if file.uid is None else formats.user(file.uid),
        "job_id": file.job_id,
        "since": formats.iso_time(file.since),
        "processes": [
            {
                "pid": process.pid,
                "command": process.command,
                "uid": process.uid,
                "user": formats.user(process.uid),
            }
            for process in processes
        ],
    }


def _print(text: str) -> None:
    # Avocado shows it on standard output.
    logging.getLogger(telling.USER_LOG).info("%s", text)
