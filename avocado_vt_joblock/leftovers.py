"""Leftovers: what still runs of a job that has ended, and what may hide some of that.

The processes of a job are its tests, its guests, and what else these have started. Each
has the job's mark in its environment (see ``marks``), which only the same user and root
may read. A test names its job in its command line, too, which everybody may read. So
everybody sees the tests of a job, but only its user and root see its guests.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import ClassVar

from avocado_vt_joblock import helpers, marks, procfs
from avocado_vt_joblock.scan import Process, Scan

#: How long a look at the processes of the host may take, in seconds.
LOOK_TIMEOUT = 5.0


@dataclass(frozen=True)
class Trace:
    """What the processes of a job are recognized by."""

    lock_name: str  # in their mark
    job_id: str  # in the command line of its tests
    uid: int | None  # of its user; None where that is unknown
    since: int = 0  # none has started before that, in ticks; 0 where it is unknown


@dataclass(frozen=True)
class JobProcess:
    """A process that may be of a job."""

    pid: int
    started: int  # in ticks since boot
    command: str  # untrusted text; the name in brackets where there is no command line
    uid: int  # the effective user id
    marks: frozenset[str]  # the names of the locks that it is marked with
    test_of: str  # the id of the job whose test it runs; empty if it runs none
    is_ancestor: bool  # whether it has started this process, directly or not
    is_blank: bool  # whether nobody can tell what it is

    def may_be_of(self, trace: Trace) -> bool:
        """Tell whether it may be a process of a job."""
        if self.started < trace.since:
            return False
        if trace.lock_name in self.marks:
            return True
        # A user can give two jobs the same id. So the id does not count if the process
        # has a mark: the mark names another job.
        if self.test_of == trace.job_id and not self.marks:
            return True
        # It may be a test or guest whose exec(2) hangs.
        return self.is_blank and self.uid == trace.uid


class Obstacle(enum.Enum):
    """What may hide processes of a job."""

    NO_PROC = enum.auto()  # /proc cannot be read: none is seen
    NO_THREAD = enum.auto()  # no thread can be started for the look
    HANGING = enum.auto()  # a process does not answer: others are not looked at
    HIDDEN = enum.auto()  # /proc is mounted with hidepid
    DENIED = enum.auto()  # a process that may be a guest cannot be read
    RESTLESS = enum.auto()  # processes start and end too fast to read them all
    GUESTS_OF_OTHERS = enum.auto()  # this user sees another's tests, but not guests
    INTERRUPTED = enum.auto()  # Ctrl-C has ended the look

    @property
    def may_pass(self) -> bool:
        """Whether the next look may see more."""
        return self in (Obstacle.NO_THREAD, Obstacle.HANGING, Obstacle.RESTLESS)


@dataclass(frozen=True)
class Leftovers:
    """What is left of a job, as far as it can be seen."""

    processes: list[JobProcess] = field(default_factory=list)
    obstacle: Obstacle | None = None  # why there may be more
    detail: str = ""  # what the obstacle is about: the words of the system, or a PID

    @property
    def is_nothing(self) -> bool:
        """Whether it is certain that nothing is left."""
        return not self.processes and not self.obstacle


class Look:
    """A look at the processes of the host, for the leftovers of one or several jobs.

    Call :meth:`take` to get one.
    """

    #: The last look that was given up because a process did not answer.
    _hanging: ClassVar[Look | None] = None

    def __init__(self, since: int, timeout: float) -> None:
        self._found: list[JobProcess] = []
        self._ancestors = procfs.ancestors()
        self._scan: Scan | None = None
        try:
            self._scan = Scan(since, timeout, self._visit)
        except RuntimeError:
            return
        self._scan.wait()

    @classmethod
    def take(cls, since: int, timeout: float) -> Look:
        """Look at the processes of the host.

        If an earlier look still hangs, it is returned again: a new one would hang at
        the same process. Each look that hangs leaves a thread behind, and a job that
        waits looks every second.

        :param since: a start time in ticks; what has started before is not looked at
        :param timeout: how long it may take, in seconds
        :raises Exception: an unforeseen error of the scan
        """
        if cls._hanging and cls._hanging.still_hangs_for(since):
            return cls._hanging
        look = cls(since, timeout)
        if look.still_hangs_for(since):
            cls._hanging = look
        return look

    def still_hangs_for(self, since: int) -> bool:
        """Tell whether a new look from this start time on would hang, too."""
        if not self._scan or not self._scan.is_running or not self._scan.hanging:
            return False
        return since <= self._scan.hanging.started

    def leftovers_of(self, trace: Trace, *, tests_only: bool = False) -> Leftovers:
        """Return what is left of a job.

        :param trace: what its processes are recognized by
        :param tests_only: whether nothing but tests counts
        """
        found = []
        for process in sorted(self._found, key=lambda process: process.pid):
            counts = process.test_of or not tests_only
            if counts and process.may_be_of(trace) and self._still_runs(process):
                found.append(process)
        obstacle, detail = self._obstacle(trace)
        return Leftovers(found, obstacle, detail)

    def _still_runs(self, process: JobProcess) -> bool:
        if not self._scan or not self._scan.hanging:
            return True  # The look was taken just now.
        # A look that hangs is used again, so this process may have ended since.
        return procfs.is_running(process.pid, process.started)

    def _obstacle(self, trace: Trace) -> tuple[Obstacle | None, str]:
        """Return the worst thing that may hide processes of a job, and its detail."""
        scan = self._scan
        if not scan:
            return Obstacle.NO_THREAD, ""
        if scan.problem:
            return Obstacle.NO_PROC, scan.problem.strerror or repr(scan.problem)
        if scan.hanging:
            return Obstacle.HANGING, str(scan.hanging.pid)
        is_of_other_user = os.geteuid() != trace.uid
        if is_of_other_user and scan.hides_others:
            return Obstacle.HIDDEN, ""
        denied = [this for this in scan.denied if _counts_as_guest(this, trace, scan)]
        if denied:
            return Obstacle.DENIED, str(denied[0].stat.pid)
        if not scan.is_complete:
            return Obstacle.RESTLESS, ""
        if is_of_other_user and os.geteuid() != 0:
            return Obstacle.GUESTS_OF_OTHERS, ""
        return None, ""

    def _visit(self, process: Process) -> None:
        """Keep a process if it may be of a job."""
        found_marks = marks.found_in(process.environ or b"")
        test_of = job_id_in(process.command)
        if not found_marks and not test_of and not process.is_blank:
            return
        words = os.fsdecode(process.command).split("\0")[:-1]
        if helpers.is_helper(words, process.stat.started):
            return
        self._found.append(
            JobProcess(
                pid=process.stat.pid,
                started=process.stat.started,
                command=" ".join(words) or f"[{process.stat.name}]",
                uid=process.uid,
                marks=found_marks,
                test_of=test_of,
                is_ancestor=process.stat.pid in self._ancestors,
                is_blank=process.is_blank,
            )
        )


def _counts_as_guest(process: Process, trace: Trace, scan: Scan) -> bool:
    """Tell whether a process may be a guest of a job; its environment is denied."""
    is_of_other_user = os.geteuid() != trace.uid
    if process.stat.started < trace.since or process.stat.is_kernel_thread:
        return False
    if scan.is_in_user_namespace:
        return True  # In a toolbox processes of the same user are denied, too.
    if os.geteuid() == 0:
        return is_of_other_user  # Root without CAP_SYS_PTRACE, as in many containers.
    if is_of_other_user:
        return False  # It may be one: _obstacle() says so by GUESTS_OF_OTHERS.
    # A process of the same user is denied if it has another group: sg(1), newgrp(1).
    return process.uid == trace.uid


def job_id_in(command: bytes) -> str:
    """Return the id of the job whose test has this command line, or "".

    :param command: as /proc shows it, for example, with | for NUL:
        python3|avocado-runner-avocado-vt|task-run|-i|1-boot|-j|8f0a3ed0...|-k|...
    """
    _, _, options = command.partition(b"\0task-run\0")
    _, _, rest = (b"\0" + options).partition(b"\0-j\0")
    return os.fsdecode(rest.partition(b"\0")[0]).lower()
