"""Lock files: how they are named and written, and the one verdict on each.

The holder of a lock has an open file description lock on its file (fcntl(2)), here
called the kernel lock, which the kernel drops with the process. Its tests and guests
may outlive it, so without the kernel lock they are looked for. The card beside the file
is a second witness. A file of avocado-vt, which has neither, is first judged by its
PID.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import stat
import struct
import time
from dataclasses import dataclass, field

from avocado_vt_joblock import card, leftovers, procfs
from avocado_vt_joblock.card import Card
from avocado_vt_joblock.leftovers import INHERITED, JobProcess, Leftovers, Obstacle

#: How every lock file begins. avocado-vt takes all that begins so for a lock; so what
#: is none, or not complete yet, has a dot before.
PREFIX = "avocado-vt-joblock-"
#: avocado-vt-joblock-8f0a3ed06dc5353fe19db0e0ab8f3a10a9c3b6ba-1000-5f2c9d01.pid: the id
#: of the job, the number of its user, and chance. What is named otherwise is no lock,
#: and is left alone: a copy or a note of somebody stops no job.
NAME = re.compile(
    rf"{PREFIX}(?P<job_id>[0-9a-f]{{40}})-[0-9]{{1,10}}-[0-9a-z]{{8}}\.pid"
)
#: How long to wait for files that are under a lease, all together, in seconds.
OPEN_TIMEOUT = 1.0

#: "4242\n\n". The empty line tells that the writer has a kernel lock on the file for as
#: long as it lives. avocado-vt writes "4242", and reads the PID with int(), which does
#: not mind.
_CONTENT = re.compile(rb"(?P<pid>[0-9]{1,10})(?:(?P<has_kernel_lock>\n\n)|\s{0,9})")
#: Pythons that were built against an old C library lack the names; the numbers are
#: Linux's.
_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)


class State(enum.IntEnum):
    """What becomes of a lock that a job finds; of several the lowest one counts."""

    OUTER = 1  # something of its job has started the new job: that is refused at once
    UNKNOWN = 2  # nobody can tell: the new job is stopped
    LIVE = 3  # something of its job still runs: the new job is refused, or waits
    NOT_NOW = 4  # nobody can tell for now: the same as if it was live
    ENDED = 5  # no verdict yet: the job has ended, and what is left of it decides
    STALE = 6  # nothing of its job runs any more: it is removed

    @property
    def may_pass(self) -> bool:
        """Whether it is of use to wait."""
        return self in (State.LIVE, State.NOT_NOW)


class Flaw(enum.Enum):
    """What is wrong with a lock file itself."""

    SYSTEM = enum.auto()  # the system refuses to show it
    NO_REGULAR_FILE = enum.auto()  # no job makes such a thing
    NO_PID = enum.auto()  # nobody knows whose it is
    LEASED = (
        enum.auto()
    )  # another program, a file server for example, has a lease on it


@dataclass
class LockFile:
    """A lock file, what is known of its job, and the verdict on it."""

    path: str
    uid: int | None = None  # its owner
    since: float = 0.0  # when it was written, in seconds since the Epoch
    pid: int = 0  # the job's own process, as the file tells; 0 if it does not
    pid_is_here: bool = True  # whether that may be the process of this PID here
    card: Card | None = None
    state: State = State.UNKNOWN
    reason: Flaw | Obstacle | None = None  # why nobody can tell, or may miss something
    detail: str = ""  # what the reason is about: the words of the system, or a PID
    processes: list[JobProcess] = field(default_factory=list)  # what is left of its job
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
    def own_card(self) -> Card | None:
        """Its card, if that is as much to be believed as the file is."""
        return self.card if self.card and self.card.uid == self.uid else None

    @property
    def host(self) -> str | None:
        """The name of the host that its job runs on, if it is known."""
        return self.card.identity.host if self.card else None

    def command(self) -> str:
        """Return the command line of its job's own process, where that is seen."""
        if not self.pid or not self.pid_is_here or not procfs.shows_own_namespace():
            return ""
        try:
            words = procfs.read_command(self.pid)
        except OSError:
            return ""
        return os.fsdecode(words).rstrip("\0").replace("\0", " ")

    @property
    def is_held_here(self) -> bool:
        """Whether its job's own process lives, and what it runs can be seen here."""
        is_elsewhere = self.card is not None and self.card.is_of_another_host
        return self.state < State.ENDED and not self.processes and not is_elsewhere

    @property
    def trace(self) -> leftovers.Trace:
        """By what the processes of its job are known."""
        since = self.own_card.start_here if self.own_card else 0
        return leftovers.Trace(self.name, self.job_id, self.uid, since)


def read(path: str, deadline: float) -> LockFile | None:
    """Read a lock file, and judge it unless what is left of its job decides.

    :param path: where a file lies that is named like a lock
    :param deadline: until when to wait for a file under a lease, by the monotonic clock
    :return: None where the file is not there any more
    """
    file = LockFile(path)
    try:
        state = _read_into(file, deadline)
    except BlockingIOError:
        state, file.reason = State.NOT_NOW, Flaw.LEASED
    except OSError as error:
        # In the words of NFS it is gone when its handle is stale.
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        state, file.reason = State.UNKNOWN, Flaw.SYSTEM
        file.detail = error.strerror or repr(error)
    if state is None:
        return None
    file.state = state
    return file


def judge_by_leftovers(files: list[LockFile], timeout: float) -> None:
    """Judge the lock files whose state is ENDED, with one look for all of them.

    :param files: those that were read
    :param timeout: how long the look may take, in seconds
    """
    ended = [file for file in files if file.state is State.ENDED]
    if not ended:
        return
    look = leftovers.Look.take(min(file.trace.since for file in ended), timeout)
    for file in ended:
        left = look.leftovers_of(file.trace)
        file.state = _state_by(left)
        file.processes = left.processes
        file.reason = left.obstacle
        file.detail = left.detail


def set_kernel_lock(fd: int) -> None:
    """Take the kernel lock on an open file.

    :raises OSError: when the file system or the kernel refuses it
    """
    fcntl.fcntl(fd, _SETLK, _struct_flock(fcntl.F_WRLCK))


def drop_kernel_lock(fd: int) -> None:
    """Give the kernel lock up for all processes that have inherited the file.

    :raises OSError: when the system refuses that
    """
    fcntl.fcntl(fd, _SETLK, _struct_flock(fcntl.F_UNLCK))


def _read_into(file: LockFile, deadline: float) -> State | None:
    """Read a lock file into its value; return its state, or None if it has gone."""
    file.card = card.read(file.path)
    if file.card and file.card.is_of_another_host:
        # The file itself is not touched: that might hang for as long as the holder's
        # host is silent, or take the file from it.
        file.uid, file.since = file.card.uid, file.card.came
        file.pid, file.pid_is_here = file.card.identity.pid, False
        return State.LIVE
    status = os.lstat(file.path)
    file.uid, file.since = status.st_uid, status.st_mtime
    if not stat.S_ISREG(status.st_mode):
        file.reason = Flaw.NO_REGULAR_FILE
        return State.UNKNOWN
    status, is_held, match = _read_content(file.path, deadline)
    # Another file may have come in its place since.
    file.uid, file.since = status.st_uid, status.st_mtime
    if match and 0 < int(match["pid"]) < 2**31:
        file.pid = int(match["pid"])
        file.pid_is_here = _is_pid_here(file, is_held=is_held)
    if is_held or (file.card and file.card.writer_lives):
        return State.OUTER if _has_started_this(file) else State.LIVE
    # It may have been released meanwhile, and another one be there.
    if not os.path.samestat(os.lstat(file.path), status):
        return None
    has_kernel_lock = bool(match and match["has_kernel_lock"])
    return _state_of_unheld(file, has_kernel_lock=has_kernel_lock)


def _state_of_unheld(file: LockFile, *, has_kernel_lock: bool) -> State:
    """Return the state of a lock file whose kernel lock nobody holds.

    :param has_kernel_lock: whether its writer has one for as long as it lives
    """
    if file.own_card and not file.own_card.is_of_this_boot:
        return State.STALE  # Its host was booted since, and this is it.
    if not file.pid:
        file.reason = Flaw.NO_PID
        return State.UNKNOWN
    if has_kernel_lock or not file.pid_is_here:
        return State.ENDED
    return State.LIVE


def _read_content(
    path: str, deadline: float
) -> tuple[os.stat_result, bool, re.Match[bytes] | None]:
    """Return the status of a file, whether its kernel lock is held, and its content."""
    fd = _open(path, deadline)
    try:
        # A read lock, which takes no permission to write, does not count.
        answer = fcntl.fcntl(fd, _GETLK, _struct_flock(fcntl.F_RDLCK))
        is_held = struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK
        return os.fstat(fd), is_held, _CONTENT.fullmatch(os.read(fd, 32))
    finally:
        os.close(fd)


def _open(path: str, deadline: float) -> int:
    """Open a file of whatever kind, without following anything."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        try:
            return os.open(path, flags)
        except BlockingIOError:
            # An NFS server has a lease for a holder on a client, and takes it back in
            # milliseconds.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _struct_flock(kind: int) -> bytes:
    """Make a struct flock (fcntl(2)) for a whole file; its l_pid has to be 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def _is_pid_here(file: LockFile, *, is_held: bool) -> bool:
    """Tell whether the process with the PID of a lock file may be its writer.

    :return: False only where it is plain that it is another process, or none
    """
    if file.own_card and not file.own_card.is_of_this_pid_namespace:
        return False
    try:
        os.kill(file.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if not procfs.shows_own_namespace():
        return True
    try:
        return _may_have_written(file, is_held=is_held)
    except OSError:
        return True


def _may_have_written(file: LockFile, *, is_held: bool) -> bool:
    process = procfs.read_stat(file.pid)
    if process.has_ended:
        return False
    if file.own_card:
        return process.started == file.own_card.identity.started
    if is_held:
        try:
            return procfs.has_open(file.pid, file.name)
        except PermissionError:
            pass  # It is another user's.
    return time.time() - procfs.age(process.started) <= file.since + card.CLOCK_SLACK


def _has_started_this(file: LockFile) -> bool:
    """Tell whether the job of a lock that is held has started this process."""
    if file.name in INHERITED:
        return True
    # sudo(8) and env -i take the mark away.
    is_ancestor = file.pid_is_here and file.pid in procfs.ancestors()
    if not is_ancestor or not procfs.shows_own_namespace():
        return False
    if file.card:
        return True
    # The PID alone may be one of another namespace: each has a process 1.
    try:
        return procfs.has_open(file.pid, file.name)
    except OSError:
        return False


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
