"""Lock files: how they are named and written, and the one verdict on each.

The holder of a lock has an open file description lock on its file (fcntl(2)), here called the
kernel lock, which the kernel drops with the process. So it tells whether the holder lives, whatever
its PID means here. Its tests and guests may outlive it, so without the kernel lock they are looked
for. A file of avocado-vt, which takes no kernel lock, is first judged by its PID.
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

from avocado_vt_joblock.processes import INHERITED, Look, Process, may_have_written

#: How every lock file is named. Until it is complete there is a dot before the name, since
#: avocado-vt takes what begins like a lock for one.
PREFIX = "avocado-vt-joblock-"
NAME = re.compile(rf"{PREFIX}[0-9a-f]{{40}}-[0-9]{{1,10}}-[0-9a-z]{{8}}\.pid")
UNPUBLISHED = "."
#: How long to wait for files that are under a lease, all together, in seconds.
OPEN_TIMEOUT = 1.0

# The empty line after the PID tells that its writer has a kernel lock on the file for as long as it
# lives. avocado-vt, which reads the PID with int(), does not mind it.
_CONTENT = re.compile(rb"([0-9]{1,10})(?:(?P<has_kernel_lock>\n\n)|\s{0,9})")
#: Pythons that were built against an old C library lack the names; the numbers are Linux's.
GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
SETLK = getattr(fcntl, "F_OFD_SETLK", 37)


class State(enum.Enum):
    """What becomes of a lock that a job finds; of several the lowest one counts."""

    OUTER = 1  # its job, or something of it, runs, and has started the new one: that is refused
    UNKNOWN = 2  # nobody can tell: the new job is stopped
    LIVE = 3  # its job, or something of it, still runs: the new job is refused, or waits
    NOT_NOW = 4  # nobody can tell for now: the same as if it was live
    STALE = 5  # nothing of its job runs any more: it is removed


#: Why nobody can tell whether a lock is live, or whether what was found of its job is all.
Reason = enum.Enum(
    "Reason",
    "SYSTEM NO_PID NO_REGULAR_FILE NO_PROC HIDDEN DENIED GUESTS_OF_OTHERS HANGING RESTLESS "
    "INTERRUPTED",
)


@dataclass
class LockFile:
    """A lock file, and what is known of its job."""

    path: str
    uid: int | None = None  # its owner
    since: float = 0.0  # when it was written, in seconds since the Epoch
    pid: int = 0  # the job's process, as the file tells; 0 if it does not
    pid_is_here: bool = True  # whether that may be the process of this PID here
    state: State = State.UNKNOWN
    reason: Reason | None = None
    detail: str | None = ""  # what the reason is about: the words of the system, or a PID
    processes: list[Process] = field(default_factory=list)  # what is left where the job has ended

    def __post_init__(self) -> None:
        self.name = os.path.basename(self.path)
        self.job_id = self.name[len(PREFIX) :].partition("-")[0]


def judge(paths: list[str]) -> list[LockFile]:
    """Judge lock files, with one look at the processes for all of them.

    :param paths: where files lie that are named like a lock
    :return: a verdict on each that is still there
    """
    deadline = time.monotonic() + OPEN_TIMEOUT
    files: list[LockFile] = []
    ended: list[LockFile] = []
    for file in map(LockFile, paths):
        try:
            (ended if _writer_has_ended(file, deadline) else files).append(file)
        except OSError as error:
            # In the words of NFS it is gone when its handle is stale.
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                file.reason, file.detail = Reason.SYSTEM, error.strerror
                files.append(file)
    judge_ended(ended)
    return files + ended


def judge_ended(files: list[LockFile], tests_only: bool = False) -> None:
    """Judge locks whose writers have ended by what is left of their jobs, or by tests only."""
    if not files:
        return
    look = Look()
    for file in files:
        for process in sorted(look.processes, key=lambda process: process.pid):
            # Users can give two jobs the same id: the marks know better.
            is_its_test = process.test_of == file.job_id and not process.marks
            may_be_its = process.is_blank and process.uid == file.uid
            is_its = file.name in process.marks or is_its_test or may_be_its
            if is_its and (process.test_of or not tests_only):
                file.processes.append(process)
        _decide(file, look)


def _writer_has_ended(file: LockFile, deadline: float) -> bool:
    """Read a lock file into its value, and judge it unless its writer has ended.

    :param deadline: until when to wait for a file under a lease, by the monotonic clock in seconds
    :raises OSError: when that fails; a FileNotFoundError when the file is not there any more
    """
    status = os.lstat(file.path)
    file.uid, file.since = status.st_uid, status.st_mtime
    if not stat.S_ISREG(status.st_mode):
        file.reason = Reason.NO_REGULAR_FILE
        return False
    fd = _open(file.path, deadline)
    try:
        # A shared lock, which takes no permission to write, does not count.
        answer = fcntl.fcntl(fd, GETLK, struct_flock(fcntl.F_RDLCK))
        is_held = struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK
        status = os.fstat(fd)
        match = _CONTENT.fullmatch(os.read(fd, 32))
    finally:
        os.close(fd)
    file.uid, file.since = status.st_uid, status.st_mtime
    if match and 0 < int(match[1]) < 2**31:
        file.pid = int(match[1])
        opened = file.name if is_held else ""
        file.pid_is_here = may_have_written(file.pid, file.since, opened)
    if is_held:
        file.state = State.OUTER if file.name in INHERITED else State.LIVE
        return False
    # It may have been released meanwhile, and another one be there.
    if not os.path.samestat(os.lstat(file.path), status):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if not match or not file.pid:
        file.reason = Reason.NO_PID
    elif match["has_kernel_lock"] or not file.pid_is_here:
        return True
    else:
        file.state = State.LIVE
    return False


def _open(path: str, deadline: float) -> int:
    """Open a file of whatever kind, without following anything."""
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except BlockingIOError:
            # An NFS server has a lease for a holder on a client, and takes it back in milliseconds.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def struct_flock(kind: int) -> bytes:
    """A struct flock (fcntl(2)) for a whole file; its l_pid has to be 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def _decide(file: LockFile, look: Look) -> None:
    """Reach the verdict by what was found, and by the first thing that was not seen."""
    is_root = os.geteuid() == 0
    is_others = os.geteuid() != file.uid
    file.state = State.STALE
    for problem, reason, state in (
        (look.error, Reason.NO_PROC, State.UNKNOWN),
        (look.hanging, Reason.HANGING, State.NOT_NOW),
        (is_others and not look.sees_others, Reason.HIDDEN, State.UNKNOWN),
        (is_others and is_root and look.is_denied, Reason.DENIED, State.UNKNOWN),
        (not look.is_settled, Reason.RESTLESS, State.NOT_NOW),
        (is_others and not is_root, Reason.GUESTS_OF_OTHERS, State.STALE),
    ):
        if problem:
            file.state, file.reason, file.detail = state, reason, str(problem)
            break
    if file.processes:
        is_around = any(process.is_around for process in file.processes)
        file.state = State.OUTER if is_around else State.LIVE
