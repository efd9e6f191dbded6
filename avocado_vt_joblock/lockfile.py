"""Lock files: how they are named and written, and whether the job of one still runs.

The holder of a lock keeps its file open with an open file description lock on it (fcntl(2)), here
called the kernel lock, which the kernel drops with the process. So it tells whether the holder
lives, whatever its PID means here, in another PID namespace for example. Its tests and guests may
outlive it, so without the kernel lock they are looked for. A file of avocado-vt, which takes no
kernel lock, is first judged by its PID.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from avocado_vt_joblock.processes import (
    CLOCK_SLACK,
    Process,
    Traces,
    boot_time,
    job_key,
    left_of,
    may_have_written,
)

#: What the name of every lock file has in it.
PREFIX = "avocado-vt-joblock-"
#: How a file is named until it is complete. avocado-vt takes what begins like a lock for one.
UNPUBLISHED = "."
#: How long to wait for files that are under a lease, all together, in seconds.
OPEN_TIMEOUT = 1.0

_NAME = re.compile(rf"{PREFIX}(?P<job_id>[0-9a-f]{{40}})-(?P<uid>[0-9]{{1,10}})-[0-9a-z]{{8}}\.pid")
# The empty line after the PID tells that its writer has a kernel lock on the file for as long as it
# lives. avocado-vt, which reads the PID with int(), does not mind it.
_CONTENT = re.compile(rb"(?P<pid>[0-9]{1,10})(?:(?P<has_kernel_lock>\n\n)|\s{0,9})")
_CONTENT_LIMIT = 32
_PID_LIMIT = 2**31


class Verdict(enum.Enum):
    """What becomes of a lock that a job finds."""

    #: Its job, or something of it, still runs: the new job is refused, or waits.
    LIVE = enum.auto()
    #: Nothing of its job runs any more: it is removed.
    STALE = enum.auto()
    #: Nobody can tell: the new job is stopped.
    UNKNOWN = enum.auto()
    #: It is no longer there.
    GONE = enum.auto()
    #: It is no regular file, so no job made it: it is ignored.
    NO_LOCK = enum.auto()


class Holder(NamedTuple):
    """Whose a lock is, as its file tells."""

    #: The lock file.
    path: str
    #: The job's process, by its PID in its own PID namespace; None where the file does not tell.
    pid: int | None
    #: The file's owner; None where that is not to be seen.
    uid: int | None
    #: 40 hexadecimal digits.
    job_id: str
    #: When the lock file was written, in seconds since the Epoch.
    since: float
    #: What still runs of a job whose own process has ended or has given up the lock.
    processes: tuple[Process, ...] = ()
    #: Why there may be others; empty where all could be seen.
    unseen: str = ""


class Judgement(NamedTuple):
    """A verdict on a lock file."""

    verdict: Verdict
    holder: Holder
    #: Why nobody can tell.
    reason: str = ""


def new_name(job_id: str) -> str:
    """Make up the name of a new lock file, by which all who contend for the lock know it."""
    return f"{PREFIX}{job_key(job_id)}-{os.getuid()}-{os.urandom(4).hex()}.pid"


def is_name(name: str) -> bool:
    """Tell whether a file is named like a lock."""
    return _NAME.fullmatch(name) is not None


def content() -> bytes:
    """Make the content of a lock file of this process."""
    return b"%d\n\n" % os.getpid()


def traces(path: str, owner: int | None) -> Traces:
    """Tell by what the processes of a lock's job are known.

    :param path: the lock file
    :param owner: the user id of its owner
    """
    name = os.path.basename(path)
    match = _NAME.fullmatch(name)
    assert match
    # The name has the writer's user id, since a network file system may change the owner.
    uids = {int(match["uid"])} if owner is None else {int(match["uid"]), owner}
    return Traces(name, match["job_id"], frozenset(uids))


def take_kernel_lock(fd: int) -> None:
    """Take the kernel lock on a file that is open for writing.

    :raises OSError: when somebody else has it, or the file system knows no such lock
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_of(fcntl.F_WRLCK))


def has_kernel_lock(fd: int) -> bool:
    """Tell whether somebody has the kernel lock, by another descriptor than theirs.

    A shared lock, which takes no permission to write, is none.

    :raises OSError: when the file system does not tell
    """
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock_of(fcntl.F_RDLCK))
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)


def is_gone(error: OSError) -> bool:
    """Tell whether an error means that a file is no longer there; ESTALE is what NFS says."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


@contextlib.contextmanager
def opened(path: str, dir_fd: int | None, deadline: float) -> Iterator[int]:
    """Open a file of whatever kind, without following anything.

    :param path: the file, relative to the directory ``dir_fd`` if there is one
    :param deadline: how long to wait for a file under a lease, by the monotonic clock in seconds
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    while True:
        try:
            fd = os.open(path, flags, dir_fd=dir_fd)
            break
        except BlockingIOError:
            # An NFS server has one for a holder on a client, and takes it back within milliseconds.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
    try:
        yield fd
    finally:
        os.close(fd)


def judge(paths: Sequence[str], dir_fd: int) -> list[Judgement]:
    """Judge lock files, with one pass over the processes for all of them.

    :param paths: where files lie that are named like a lock
    :param dir_fd: their directory
    """
    deadline = time.monotonic() + OPEN_TIMEOUT
    judgements = [_judge_file(path, dir_fd, deadline) for path in paths]
    ended = [this.holder for this in judgements if this.verdict is Verdict.STALE]
    if not ended:
        return judgements
    found = left_of([traces(holder.path, holder.uid) for holder in ended])
    left_by_path = {holder.path: left for holder, left in zip(ended, found)}

    def with_processes(this: Judgement) -> Judgement:
        if this.verdict is not Verdict.STALE:
            return this
        left = left_by_path[this.holder.path]
        if left.processes:
            holder = this.holder._replace(processes=tuple(left.processes), unseen=left.unseen)
            return Judgement(Verdict.LIVE, holder)
        if left.unseen:
            return Judgement(
                Verdict.UNKNOWN,
                this.holder,
                "its process has ended, but /proc does not show whether tests or guests still run "
                f"({left.unseen})",
            )
        return this

    return [with_processes(this) for this in judgements]


def look_again(holder: Holder) -> Holder | None:
    """Look at a live lock once more, without looking for processes that are not known.

    :return: whose it is now, with the processes that still run; None where another judgement is due
    """
    verdict = _judge_file(holder.path, None, time.monotonic() + OPEN_TIMEOUT).verdict
    if verdict is Verdict.STALE:
        running = tuple(process for process in holder.processes if process.is_running())
        return holder._replace(processes=running) if running else None
    return holder if verdict is Verdict.LIVE else None


def _judge_file(path: str, dir_fd: int | None, deadline: float) -> Judgement:
    """Judge a lock file by itself: stale is what nothing holds but maybe tests and guests."""
    where = path if dir_fd is None else os.path.basename(path)
    holder = Holder(path, None, None, traces(path, None).job_id, 0.0)
    try:
        status = os.stat(where, dir_fd=dir_fd, follow_symlinks=False)
        holder = holder._replace(uid=status.st_uid, since=status.st_mtime)
        if not stat.S_ISREG(status.st_mode):
            return Judgement(Verdict.NO_LOCK, holder)
        with opened(where, dir_fd, deadline) as fd:
            is_held = has_kernel_lock(fd)
            status = os.fstat(fd)
            text = os.read(fd, _CONTENT_LIMIT)
        if not is_held:
            # It may have been released meanwhile: then it is gone.
            os.stat(where, dir_fd=dir_fd, follow_symlinks=False)
    except OSError as error:
        if is_gone(error):
            return Judgement(Verdict.GONE, holder)
        return Judgement(Verdict.UNKNOWN, holder, os.strerror(error.errno or 0))
    match = _CONTENT.fullmatch(text)
    pid = int(match["pid"]) if match else 0
    if not match or not 0 < pid < _PID_LIMIT:
        if is_held:
            return Judgement(Verdict.LIVE, holder)
        if _lost_in_power_cut(text, status):
            return Judgement(Verdict.STALE, holder)
        return Judgement(Verdict.UNKNOWN, holder, "there is no PID in it")
    holder = Holder(path, pid, status.st_uid, holder.job_id, status.st_mtime)
    if is_held or (not match["has_kernel_lock"] and may_have_written(pid, status.st_mtime)):
        return Judgement(Verdict.LIVE, holder)
    return Judgement(Verdict.STALE, holder)


def _lost_in_power_cut(text: bytes, status: os.stat_result) -> bool:
    """Tell whether a file's name reached the disk before a power cut but its content did not."""
    blank = len(text) == status.st_size and not text.strip(b"\0")
    return blank and status.st_mtime + CLOCK_SLACK < boot_time()


def _lock_of(kind: int) -> bytes:
    """Make a struct flock (fcntl(2)) for a whole file; its l_pid has to be 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
