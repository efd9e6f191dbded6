"""Lock files: how they are named and written, and the verdict on each.

The holder of a lock has the kernel lock on its file. The card beside the file is a
second witness that it lives. Its tests and guests may run longer than the holder: where
both witnesses are silent, leftovers are looked for. A file of avocado-vt has neither
kernel lock nor card. It is first judged by its PID.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import stat
import time
from dataclasses import dataclass, field

from avocado_vt_joblock import card, kernellock, marks, procfs
from avocado_vt_joblock.card import Card
from avocado_vt_joblock.leftovers import Leftovers, Look, Obstacle, Trace

#: How the name of every lock file begins. avocado-vt treats every file with this prefix
#: as a lock. Cards, and files that are not published yet, therefore begin with a dot.
PREFIX = "avocado-vt-joblock-"
#: avocado-vt-joblock-8f0a3ed06dc5353fe19db0e0ab8f3a10a9c3b6ba-1000-5f2c9d01.pid: the id
#: of the job, the number of its user, and a random part. What is named otherwise is no
#: lock, and is left alone: a copy or a note of somebody stops no job.
NAME = re.compile(
    rf"{PREFIX}(?P<job_id>[0-9a-f]{{40}})-[0-9]{{1,10}}-[0-9a-z]{{8}}\.pid"
)
#: How long it may take to read all lock files, in seconds. It takes long only if they
#: are under a lease, or very many.
OPEN_TIMEOUT = 1.0
#: How far the clocks that date a file and a process may be apart, in seconds.
CLOCK_SLACK = 10.0

#: "4242\n\n". The empty line tells that the writer has the kernel lock on the file for
#: as long as it lives. avocado-vt writes "4242", and reads the PID with int(), which
#: does not mind the empty line.
_CONTENT = re.compile(rb"(?P<pid>[0-9]{1,10})(?:(?P<uses_kernel_lock>\n\n)|\s{0,9})")


class State(enum.IntEnum):
    """What a lock means for a contender; of several locks the lowest state counts."""

    OUTER = 1  # its job has started the contender, which is refused at once
    UNKNOWN = 2  # nobody can tell: the contender is stopped
    LIVE = 3  # something of its job still runs: the contender is refused, or waits
    NOT_NOW = 4  # nobody can tell for now: treated like LIVE
    ENDED = 5  # no verdict yet: the job has ended, and what is left of it decides
    STALE = 6  # nothing of its job is seen to run: it is not in the way

    @property
    def is_in_the_way(self) -> bool:
        """Whether it keeps the contender from taking its own lock."""
        return self < State.ENDED

    @property
    def may_pass(self) -> bool:
        """Whether it is of use to wait."""
        return self in (State.LIVE, State.NOT_NOW)


class Flaw(enum.Enum):
    """What is wrong with a lock file itself."""

    SYSTEM = enum.auto()  # the system refuses to show it
    NO_REGULAR_FILE = enum.auto()  # no job makes such a thing
    NO_PID = enum.auto()  # nobody knows whose it is
    LEASED = enum.auto()  # another program, such as a file server, has a lease on it


@dataclass
class LockFile:
    """A lock file, what is known of its job, and the verdict on it."""

    path: str
    # What is read.
    card: Card | None = None
    uid: int | None = None  # its owner
    since: float = 0.0  # when it was written, in seconds since the Epoch; 0: unknown
    is_regular: bool = True
    is_held: bool = False  # whether a process has the kernel lock on it
    uses_kernel_lock: bool = True  # whether its writer takes one: avocado-vt does not
    pid: int = 0  # the job's own process, as the file tells; 0 if it does not
    pid_may_be_here: bool = True  # whether the process of this PID here may be that
    flaw: Flaw | None = None  # what is wrong with the file itself
    flaw_detail: str = ""  # of Flaw.SYSTEM: the words of the system
    # The verdict.
    state: State = State.UNKNOWN
    leftovers: Leftovers = field(default_factory=Leftovers)  # of a job that has ended
    not_removed: str = ""  # why a stale one is still there, in the words of the system

    @property
    def name(self) -> str:
        """The name of the file in its directory."""
        return os.path.basename(self.path)

    @property
    def job_id(self) -> str:
        """The id of the job, as the name tells."""
        match = NAME.fullmatch(self.name)
        return match["job_id"] if match else ""

    @property
    def is_elsewhere(self) -> bool:
        """Whether its job runs on another host."""
        return self.card is not None and self.card.is_of_another_host

    @property
    def own_card(self) -> Card | None:
        """Its card, if that was made by the owner of the file, not by a stranger."""
        if not self.card or self.card.uid != self.uid or self.card.is_hard_link:
            return None
        return self.card

    @property
    def trace(self) -> Trace:
        """What the processes of its job are recognized by."""
        earliest_start = self.own_card.earliest_start if self.own_card else 0
        return Trace(self.name, self.job_id, self.uid, earliest_start)

    def command(self) -> str:
        """Return the command line of its job's own process, where that is seen."""
        if not self.pid or not self.pid_may_be_here or not procfs.shows_own_namespace():
            return ""
        words = procfs.read_command_in_time(self.pid)
        return os.fsdecode(words).rstrip("\0").replace("\0", " ")


def read(path: str, deadline: float) -> LockFile | None:
    """Read a lock file, and judge it; if only leftovers can tell, its state is ENDED.

    :param path: where a file lies that is named like a lock
    :param deadline: until when to wait for it, by the monotonic clock
    :return: None where the file is not there any more
    """
    file = LockFile(path)
    try:
        if not _read_facts(file, deadline):
            return None
        file.state, file.flaw = _judge(file)
    except BlockingIOError:
        file.state, file.flaw = State.NOT_NOW, Flaw.LEASED
    except OSError as error:
        # ESTALE: another client of NFS has removed the file meanwhile.
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        file.state, file.flaw = State.UNKNOWN, Flaw.SYSTEM
        file.flaw_detail = error.strerror or repr(error)
    return file


def judge_by_leftovers(files: list[LockFile], timeout: float) -> None:
    """Judge the lock files of jobs that have ended, with one look.

    :param files: those that were read
    :param timeout: how long the look may take, in seconds
    """
    ended = [file for file in files if file.state is State.ENDED]
    if not ended:
        return
    look = Look.take(min(file.trace.since for file in ended), timeout)
    for file in ended:
        file.leftovers = look.leftovers_of(file.trace)
        file.state = _state_by(file.leftovers)


def _judge(file: LockFile) -> tuple[State, Flaw | None]:
    """Reach the verdict by what was read: the first rule that fits counts.

    :return: the state, and the flaw of the file that makes it UNKNOWN
    """
    if file.is_elsewhere:
        return State.LIVE, None
    if not file.is_regular:
        return State.UNKNOWN, Flaw.NO_REGULAR_FILE
    if file.is_held or (file.card and file.card.writer_lives):
        return (State.OUTER if _has_started_this(file) else State.LIVE), None
    if file.own_card and not file.own_card.is_of_this_boot:
        return State.STALE, None  # This host was booted since.
    if not file.pid:
        return State.UNKNOWN, Flaw.NO_PID
    if file.uses_kernel_lock or not file.pid_may_be_here:
        return State.ENDED, None
    return State.LIVE, None  # It is a lock of avocado-vt, and its job may be here.


def _state_by(left: Leftovers) -> State:
    """Reach the verdict on a job that has ended by what is left of it."""
    if any(process.is_ancestor for process in left.processes):
        return State.OUTER
    if left.processes:
        return State.LIVE
    if left.obstacle in (None, Obstacle.GUESTS_OF_OTHERS):
        return State.STALE
    if left.obstacle.may_pass:
        return State.NOT_NOW
    return State.UNKNOWN


def _has_started_this(file: LockFile) -> bool:
    """Tell whether the job of a lock that is held has started this process."""
    if file.name in marks.INHERITED:
        return True
    # sudo(8) and env -i take the mark away.
    if not file.pid_may_be_here or file.pid not in procfs.ancestors():
        return False
    if file.own_card:
        return True  # By the card this PID is certainly that of the job.
    # Every container has a PID 1, and it is an ancestor of all in it. So check that
    # this one has the file open.
    try:
        return procfs.has_open(file.pid, file.name)
    except OSError:
        return False


def _read_facts(file: LockFile, deadline: float) -> bool:
    """Read a lock file and its card; return whether the file is still there.

    :raises OSError: when the system does not show them
    """
    file.card = card.read(file.path)
    if file.card and file.is_elsewhere:
        # The file itself is not touched. To do so might hang for as long as the
        # holder's host is silent, or take a delegation (NFS) from it.
        file.uid, file.since = file.card.uid, file.card.came
        file.pid, file.pid_may_be_here = file.card.identity.pid, False
        return True
    status = os.lstat(file.path)
    file.uid, file.since = status.st_uid, status.st_mtime
    file.is_regular = stat.S_ISREG(status.st_mode)
    if not file.is_regular:
        return True
    fd = _open(file.path, deadline)
    try:
        file.is_held = kernellock.is_held(fd)
        status = os.fstat(fd)
        match = _CONTENT.fullmatch(os.read(fd, 32))
    finally:
        os.close(fd)
    # By fstat(): another file may have come in its place between lstat() and open().
    file.uid, file.since = status.st_uid, status.st_mtime
    file.uses_kernel_lock = bool(match and match["uses_kernel_lock"])
    if match and 0 < int(match["pid"]) < 2**31:
        file.pid = int(match["pid"])
        file.pid_may_be_here = _may_be_here(file, deadline)
    # If nobody has the kernel lock, the file may have been removed since. If there is
    # another one in its place, that can be ignored: its writer sees this contender.
    return file.is_held or os.path.samestat(os.lstat(file.path), status)


def _open(path: str, deadline: float) -> int:
    """Open a file of whatever kind, without following anything."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        try:
            return os.open(path, flags)
        except BlockingIOError:
            # An NFS server has a lease on the file while a client holds the lock. The
            # server ends the lease within milliseconds.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _may_be_here(file: LockFile, deadline: float) -> bool:
    """Tell whether the process with the PID of a lock file may be its writer.

    :param deadline: until when to look closely at a file without a card
    :return: False only if it is certain that it is another process, or none
    """
    if file.own_card:
        return file.own_card.may_be_of(file.pid)
    if not procfs.may_run(file.pid):
        return False
    # Anybody can make very many lock files, and a look may take a while for each.
    if time.monotonic() > deadline or not procfs.shows_own_namespace():
        return True
    try:
        return _may_have_written(file)
    except OSError:
        return True


def _may_have_written(file: LockFile) -> bool:
    """Tell whether the process of this PID may be the writer of a file without a card.

    :raises OSError: when it cannot be read
    """
    if file.is_held:
        try:
            return procfs.has_open(file.pid, file.name)
        except PermissionError:
            pass  # It is another user's: only the times can be compared.
    started = time.time() - procfs.age(procfs.read_stat(file.pid).started)
    return started <= file.since + CLOCK_SLACK
