"""Which processes are of a job: marks, tests, and helpers that do not count.

A job marks its own process with an environment variable, and all that it starts
inherits that: the runners, their tests, the guests, and the helpers of these. Only the
user of a process and root may read its environment. The command line of a test, which
everybody may read, names its job.
"""

from __future__ import annotations

import enum
import os
import re
import threading
from dataclasses import dataclass, field
from typing import ClassVar

from avocado_vt_joblock import procfs

#: The names of the locks that a process holds or has inherited, with a colon between
#: them. It stays as it is: jobs of different versions look for what is left of each
#: other.
VARIABLE = "AVOCADO_VT_JOBLOCK"
#: What avocado-vt starts beside its guests, and what touches no image: it does not
#: count.
HELPERS = frozenset(
    [
        "aexpect_helper",
        "dnsmasq",
        "dumpcap",  # started by tshark
        "journalctl",  # this and vmstat: Avocado's profilers of the system
        "ovs-vswitchd",
        "ovsdb-server",
        "passt",
        "qemu-pr-helper",
        "tcpdump",
        "tshark",
        "vmstat",
    ]
)
#: How long ``aexpect_helper`` may be about to start a guest, and so counts, in seconds.
HELPER_START = 10.0
#: How long to look at the processes of the host, in seconds.
LOOK_TIMEOUT = 5.0

#: For example "python3.11", "bash".
_INTERPRETER = re.compile(r"python[0-9.]*|(?:ba|da|k)?sh")
#: What aexpect adds to a command for a shell: "tcpdump -i any && echo a1b2 >
#: /dev/null".
_AEXPECT_ECHO = re.compile(r"&& echo \w+ > /dev/null\Z")
#: What a line with more than one command has.
_MORE_COMMANDS = re.compile(r"[;&|`$\n]")

# Threads that change the variable at once would lose each other's changes. Its owner
# can lock it again: a Ctrl-C in between does not lock it for ever.
_environ_lock = threading.RLock()


def own_marks() -> set[str]:
    """Return the names of the locks that this process holds or has inherited."""
    return set(os.environ.get(VARIABLE, "").split(":")) - {""}


#: The locks of the jobs that have started this process, at whatever remove.
INHERITED = own_marks()


def mark(lock_name: str) -> None:
    """Mark this process, and so all that it starts from now on."""
    with _environ_lock:
        os.environ[VARIABLE] = ":".join([*own_marks(), lock_name])


def unmark(lock_name: str) -> None:
    """Take a mark back from this process; what has inherited it keeps it."""
    with _environ_lock:
        left = own_marks() - {lock_name}
        os.environ[VARIABLE] = ":".join(left)
        if not left:
            del os.environ[VARIABLE]


@dataclass(frozen=True)
class Trace:
    """By what the processes of a job are known."""

    lock_name: str  # in their mark
    job_id: str  # in the command line of its tests
    uid: int | None  # of its user; None where that is unknown
    since: int = (
        0  # when the job's own process started, in ticks: none of them is older
    )


@dataclass(frozen=True)
class JobProcess:
    """A process that may be of a job."""

    pid: int
    started: int  # in ticks since boot
    command: str  # anybody's words; the name in brackets where there is no command line
    uid: int  # the effective user id
    marks: frozenset[str]  # the names of the locks that it is marked with
    test_of: str  # the id of the job whose test it runs; empty if it runs none
    is_ancestor: bool  # whether it has started this process, at whatever remove
    is_blank: bool  # whether nobody can tell what it is

    def is_of(self, trace: Trace) -> bool:
        """Tell whether it is, or may be, a process of a job."""
        if self.started < trace.since:
            return False
        if trace.lock_name in self.marks:
            return True
        # Users can give two jobs the same id: the marks know better.
        if self.test_of == trace.job_id and not self.marks:
            return True
        return self.is_blank and self.uid == trace.uid


class Obstacle(enum.Enum):
    """What keeps processes of a job out of sight, the weightiest first."""

    NO_PROC = enum.auto()  # /proc cannot be read: none is seen
    NO_THREAD = enum.auto()  # no thread can be started to look
    HANGING = enum.auto()  # a process does not answer: others are not looked at
    HIDDEN = enum.auto()  # /proc is mounted with hidepid
    DENIED = enum.auto()  # what may be a guest may not be read
    RESTLESS = enum.auto()  # some are new at each look
    GUESTS_OF_OTHERS = enum.auto()  # an ordinary user sees another one's tests only
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
    detail: str = ""  # the words of the system, or a PID

    @property
    def is_nothing(self) -> bool:
        """Whether it is plain that nothing is left."""
        return not self.processes and not self.obstacle


class Look:
    """A look at what is left of jobs.

    :param since: a start time in ticks; what has started before is not looked at
    :param timeout: how long it may take, in seconds
    :raises Exception: whatever nobody has foreseen
    """

    #: The last one that was left behind with a process that hangs.
    _hanging: ClassVar[Look | None] = None

    def __init__(self, since: int, timeout: float) -> None:
        self._found: list[JobProcess] = []
        self._ancestors = procfs.ancestors()
        self._scan: procfs.Scan | None = None
        try:
            self._scan = procfs.Scan(since, self._visit)
        except RuntimeError:
            return
        self._scan.wait(timeout)

    @classmethod
    def take(cls, since: int = 0, timeout: float = LOOK_TIMEOUT) -> Look:
        """Look at what is left of jobs; while one look hangs there is no second one.

        :param since: a start time in ticks; what has started before is not looked at
        :param timeout: how long it may take, in seconds
        """
        if cls._hanging and cls._hanging.hangs_for(since):
            return cls._hanging
        look = cls(since, timeout)
        if look.hangs_for(since):
            cls._hanging = look
        return look

    def hangs_for(self, since: int) -> bool:
        """Tell whether it hangs, and one with this start time would hang as well."""
        if not self._scan or not self._scan.is_running or not self._scan.hanging:
            return False
        return since <= self._scan.hanging.started

    def leftovers_of(self, trace: Trace, *, tests_only: bool = False) -> Leftovers:
        """Return what is left of a job.

        :param trace: by what its processes are known
        :param tests_only: whether nothing else counts
        """
        found = [
            process
            for process in sorted(self._found, key=lambda process: process.pid)
            if process.is_of(trace) and (process.test_of or not tests_only)
        ]
        if self._scan and self._scan.hanging:
            # The look may be an old one.
            found = [
                this for this in found if procfs.is_running(this.pid, this.started)
            ]
        obstacle, detail = self._obstacle(trace)
        return Leftovers(found, obstacle, detail)

    def _obstacle(self, trace: Trace) -> tuple[Obstacle | None, str]:
        scan = self._scan
        is_root = os.geteuid() == 0
        is_others = os.geteuid() != trace.uid
        if not scan:
            return Obstacle.NO_THREAD, ""
        if scan.problem:
            return Obstacle.NO_PROC, scan.problem.strerror or repr(scan.problem)
        if scan.hanging:
            return Obstacle.HANGING, str(scan.hanging.pid)
        if is_others and scan.hides_others:
            return Obstacle.HIDDEN, ""
        denied = [this for this in scan.denied if self._may_be_a_guest(this, trace)]
        if denied:
            return Obstacle.DENIED, str(denied[0].stat.pid)
        if not scan.is_complete:
            return Obstacle.RESTLESS, ""
        if is_others and not is_root:
            return Obstacle.GUESTS_OF_OTHERS, ""
        return None, ""

    def _may_be_a_guest(self, process: procfs.Process, trace: Trace) -> bool:
        """Tell whether a process that may not be read may be a guest of a job."""
        if process.stat.started < trace.since:
            return False
        if self._scan and self._scan.is_in_user_namespace:
            return True
        is_others = os.geteuid() != trace.uid
        if os.geteuid() == 0:
            return is_others  # Root lacks a capability here.
        # Its user, who is the same, may have started it under another group (newgrp(1),
        # sg(1), a service), or with capabilities.
        return not is_others and process.uid == trace.uid

    def _visit(self, process: procfs.Process) -> None:
        """Keep a process if it may be of a job."""
        marks = _marks_in(process.environ or b"")
        test_of = _job_id_in(process.command)
        words = os.fsdecode(process.command).split("\0")[:-1]
        if not (marks or test_of or process.is_blank) or _is_helper(
            words, process.stat
        ):
            return
        self._found.append(
            JobProcess(
                pid=process.stat.pid,
                started=process.stat.started,
                command=" ".join(words) or f"[{process.stat.name}]",
                uid=process.uid,
                marks=marks,
                test_of=test_of,
                is_ancestor=process.stat.pid in self._ancestors,
                is_blank=process.is_blank,
            )
        )


def _marks_in(environ: bytes) -> frozenset[str]:
    r"""Return the names of locks in an environment.

    For example b"HOME=/root\\0AVOCADO_VT_JOBLOCK=avocado-vt-joblock-8f0a...pid\\0".
    """
    _, _, rest = (b"\0" + environ).partition(f"\0{VARIABLE}=".encode())
    value = rest.partition(b"\0")[0]
    return frozenset(os.fsdecode(value).split(":")) - {""}


def _job_id_in(command: bytes) -> str:
    r"""Return the id of the job whose test has this command line, if any.

    For example
    b"/usr/bin/python3\\0/usr/bin/avocado-runner-avocado-vt\\0task-run\\0-i\\0"
    b"1-boot\\0-j\\08f0a3ed06dc5353fe19db0e0ab8f3a10a9c3b6ba\\0-k\\0avocado-vt\\0...".
    """
    _, _, options = command.partition(b"\0task-run\0")
    _, _, rest = (b"\0" + options).partition(b"\0-j\0")
    return os.fsdecode(rest.partition(b"\0")[0]).lower()


def _is_helper(words: list[str], stat: procfs.Stat) -> bool:
    """Tell whether a command line is of one of the ``HELPERS``."""
    name = os.path.basename(_program(words))
    if name == "aexpect_helper" and procfs.age(stat.started) <= HELPER_START:
        return False
    return name in HELPERS


def _program(words: list[str]) -> str:
    """Return the program that a command line runs, by itself or by an interpreter.

    For example of ["bash", "-c", "tcpdump -i any && echo a1b2 > /dev/null"] "tcpdump",
    and of ["/usr/bin/python3", "/usr/bin/aexpect_helper"] the second word.
    """
    program, *arguments = words or [""]
    if not _INTERPRETER.fullmatch(os.path.basename(program)):
        return program
    line = next((word for word in arguments if not word.startswith("-")), "")
    line = _AEXPECT_ECHO.sub("", line)
    if _MORE_COMMANDS.search(line):
        return ""
    first, *_ = line.split(maxsplit=1) or [""]
    return first
