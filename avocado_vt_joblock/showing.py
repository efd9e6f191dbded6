"""``avocado vt-joblock show``: who holds the lock, and who waits."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from avocado_vt_joblock import formats, leftovers, lockfile, messages, options
from avocado_vt_joblock.leftovers import LOOK_TIMEOUT, JobProcess
from avocado_vt_joblock.lockdir import DirectoryError, LockDirectory, Ticket, Use
from avocado_vt_joblock.lockfile import LockFile, State


@dataclass
class Survey:
    """What is found in a lock directory."""

    directory: str
    files: list[LockFile] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    #: What of the job of a live lock is seen to run, by the path of its file.
    processes: dict[str, list[JobProcess]] = field(default_factory=dict)
    #: Why a job would be stopped, whatever the locks are.
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


def show(directory: object, json_file: str | None) -> int:
    """Show the lock of a directory.

    :param directory: the lock directory, as it is set
    :param json_file: where to write the same as JSON; "-" for standard output
    :return: the exit code: 0 if a job would get the lock, 2 if not
    """
    survey = _survey(directory)
    if json_file:
        text = json.dumps(_as_json(survey), indent=4)
        if json_file == "-":
            _print(text)
        else:
            with open(json_file, "w", encoding="utf-8") as file:
                file.write(f"{text}\n")
    if json_file != "-":
        is_free = survey.verdict == "free"
        _print(messages.overview(survey.directory, survey.waiting, is_free=is_free))
        if survey.problem:
            _print(survey.problem)
        for lock_file in survey.files:
            processes = survey.processes.get(lock_file.path, [])
            _print(messages.shown(lock_file, processes))
    return 0 if survey.verdict == "free" else 2


def _survey(directory: object) -> Survey:
    survey = Survey(str(directory))
    try:
        survey.directory = options.directory(directory)
        lock_directory = LockDirectory(survey.directory)
        names = lock_directory.names()
        survey.files = lock_directory.read_locks(names)
        lockfile.judge_by_leftovers(survey.files, LOOK_TIMEOUT)
        survey.files.sort(key=lambda file: file.state)
        survey.waiting = lock_directory.waiting(names, time.time())
        survey.processes = _processes_of_live(survey.files)
        if not os.access(survey.directory, os.W_OK | os.X_OK):
            raise DirectoryError(Use.WRITE, _no_permission())
    except (DirectoryError, options.OptionError) as error:
        survey.problem = messages.refusal(error, directory, log="")
    return survey


def _processes_of_live(files: list[LockFile]) -> dict[str, list[JobProcess]]:
    """Return what is seen to run of jobs whose own process lives, too."""
    live = [file for file in files if file.is_held_here]
    if not live:
        return {}
    look = leftovers.Look.take(min(file.trace.since for file in live), LOOK_TIMEOUT)
    return {file.path: look.leftovers_of(file.trace).processes for file in live}


def _as_json(survey: Survey) -> dict[str, Any]:
    """Return what ``--json`` writes; the manual promises these keys."""
    return {
        "directory": survey.directory,
        "verdict": survey.verdict,
        "problem": survey.problem or None,
        "locks": [
            {
                "file": file.path,
                "state": file.state.name.lower(),
                "reason": messages.reason(file) or None,
                **_whose(file.host, file.pid, file.uid),
                "command": file.command() or None,
                "job_id": file.job_id,
                "since": formats.iso_time(file.since),
                "processes": [
                    {
                        "pid": process.pid,
                        "command": process.command,
                        "uid": process.uid,
                        "user": formats.user(process.uid),
                    }
                    for process in file.processes or survey.processes.get(file.path, [])
                ],
            }
            for file in survey.files
        ],
        "waiting": [
            {
                **_whose(
                    ticket.card.identity.host, ticket.card.identity.pid, ticket.card.uid
                ),
                "since": formats.iso_time(ticket.card.came),
            }
            for ticket in survey.waiting
        ],
    }


def _whose(host: str | None, pid: int, uid: int | None) -> dict[str, Any]:
    user = None if uid is None else formats.user(uid)
    return {"host": host, "pid": pid or None, "uid": uid, "user": user}


def _print(text: str) -> None:
    # Avocado shows it on standard output.
    logging.getLogger(messages.USER_LOG).info("%s", text)


def _no_permission() -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES))
