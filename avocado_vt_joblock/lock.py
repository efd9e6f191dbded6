"""The lock: a file in a directory, held by one process at a time.

It keeps, in the order in which they win:

1. exclusion: no two holders in one directory, and no lock that may be live is ever removed;
2. fail closed: what cannot be judged is an error;
3. progress: of all who start together one gets the lock, and a holder that is gone stops nobody;
4. bounded: nothing that lies in the directory, and nobody's flock, makes it wait for long;
5. no litter: no partial lock file is ever seen, and what a crash leaves the next one removes.

A contender first publishes a lock file of its own and only then looks at the others, so of two at
least one sees the other: that alone keeps exclusion. The guard around both steps, a flock on the
directory, is for progress: without it two might see each other and both give up.

The holder keeps its file open with a flock on it, which the kernel drops with the process: it tells
whether the holder lives, whatever its PID means here, in another PID namespace for example. A file
whose maker took no flock, as avocado-vt does, is judged by its PID.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
import weakref
from collections.abc import Iterator
from typing import Callable, NamedTuple

#: How long to wait for the guard before going on without it, in seconds.
GUARD_TIMEOUT = 1.0
#: How far the clocks that date a file and a process may be apart, in seconds.
CLOCK_SLACK = 10.0

_PREFIX = "avocado-vt-joblock-"
# avocado-vt takes for a lock whatever begins like one, so an unpublished one begins otherwise.
_UNPUBLISHED = "."
_JOB_ID = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(
    rf"(?P<unpublished>\.?){_PREFIX}(?P<job_id>{_JOB_ID.pattern})-[0-9]+-[0-9a-z]{{8}}\.pid"
)
# The empty line after the PID tells that its writer holds a flock on the file for as long as it
# lives. avocado-vt, which reads the PID with int(), does not mind it.
_CONTENT = re.compile(rb"(?P<pid>[0-9]{1,10})(?:(?P<writer_flocks>\n\n)|\s{0,9})")
_CONTENT_LIMIT = 32
_PID_LIMIT = 2**31


class LockError(Exception):
    """The lock could not be taken; the text says why and, where there is one, the remedy."""


class Holder(NamedTuple):
    """Who holds a lock, as its file tells."""

    #: The lock file.
    path: str
    #: The process, by its number in its own PID namespace; None where the file does not tell.
    pid: int | None
    #: The file's owner.
    uid: int
    #: 40 hexadecimal digits.
    job_id: str
    #: When the lock file was written, in seconds since the Epoch.
    since: float


class LockHeldError(LockError):
    """Another job holds the lock.

    :param holder: who it is
    """

    def __init__(self, holder: Holder) -> None:
        super().__init__(f"the lock file {holder.path} is held by PID {holder.pid}")
        self.holder = holder


class JobLock:
    """A lock file in a directory in which only one job at a time holds one.

    :param directory: the absolute path of an existing directory
    :param job_id: what the file is named after; anything but 40 hexadecimal digits is replaced by
                   its SHA-1, since by another name nobody would take the file for a lock
    :param warn: called with a text where a user should know of something that stops nobody
    """

    def __init__(self, directory: str, job_id: str, warn: Callable[[str], object]) -> None:
        job_id = job_id.lower()
        if not _JOB_ID.fullmatch(job_id):
            job_id = hashlib.sha1(job_id.encode(errors="surrogatepass")).hexdigest()
        self._name = f"{_PREFIX}{job_id}-{os.getuid()}-{os.urandom(4).hex()}.pid"
        self._directory = directory
        self._warn = warn
        self._dir_fd: int | None = None
        self._fd: int | None = None
        #: Whether this process holds the lock.
        self.held = False

    @property
    def path(self) -> str:
        """The lock file's absolute path."""
        return self._path_of(self._name)

    def acquire(self) -> None:
        """Take the lock, to keep it until :meth:`release` or the end of this process.

        Locks whose holder is gone are removed. Where it fails it leaves nothing behind.

        :raises LockHeldError: when another job holds the lock
        :raises LockError: when the directory is no place for a lock, when a lock in it cannot be
                           judged, or when the system fails
        """
        try:
            dir_fd = self._open_directory()
            guarded = _guard(dir_fd)
            self._publish(dir_fd)
            self._look_at_others(dir_fd, guarded)
        except BaseException as error:
            # The file goes before the guard: nobody shall be turned away by one who gives up.
            self._withdraw()
            if isinstance(error, OSError):
                raise LockError(
                    f"{self.path}: {error.strerror}. Correct that, or set another lock directory."
                ) from error
            raise
        with contextlib.suppress(OSError):
            fcntl.flock(dir_fd, fcntl.LOCK_UN)
        self.held = True

    def release(self) -> None:
        """Remove the lock file and let go of the lock; without the lock, do nothing.

        What goes wrong is warned of, not raised: the file is no longer in place, so that other
        jobs may have run at the same time, or it cannot be removed.
        """
        # When a signal interrupts this it may be called again: then the file may well be gone.
        if self.held:
            self.held = False
            if not self._in_place():
                self._warn(
                    f"The lock file {self.path} was removed or replaced while the job ran. Other "
                    "jobs may have run at the same time and changed the files that it used. Find "
                    "out what did it: a cleaner of temporary files, for example."
                )
        error = self._withdraw()
        if error:
            self._warn(
                f"The lock file {self.path} could not be removed: {error.strerror}. It stops "
                "nobody: the next job that may remove it will."
            )

    def _open_directory(self) -> int:
        try:
            self._dir_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:
            raise LockError(
                f"the lock directory {self._directory} does not exist. Create it, or set another."
            ) from error
        except NotADirectoryError as error:
            raise LockError(
                f"the lock directory {self._directory} is not a directory. Set another."
            ) from error
        except (OSError, ValueError) as error:
            # A ValueError is about characters that no path can have.
            raise LockError(
                f"the lock directory {self._directory!r} cannot be opened: {error}. "
                "Correct that, or set another."
            ) from error
        _open_locks.add(self)
        return self._dir_fd

    def _publish(self, dir_fd: int) -> None:
        """Give the lock file its name only when it is complete and under flock."""
        unpublished = _UNPUBLISHED + self._name
        try:
            # Nobody else may open it before the flock is there.
            self._fd = os.open(
                unpublished, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600, dir_fd=dir_fd
            )
        except OSError as error:
            raise LockError(
                f"the lock directory {self._directory} cannot be written: {error.strerror}. "
                "Correct that, or set another."
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockError(
                f"the lock directory {self._directory} allows no flock: {error.strerror}. "
                "Set one on a local file system."
            ) from error
        content = b"%d\n\n" % os.getpid()
        if os.write(self._fd, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Whatever the umask: everybody may read who holds the lock.
        os.fchmod(self._fd, 0o644)
        os.rename(unpublished, self._name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def _look_at_others(self, dir_fd: int, guarded: bool) -> None:
        # By a descriptor of its own: on some file systems one shows only what was there when it was
        # opened, which dir_fd was before the lock file was published.
        listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            with os.scandir(listing) as entries:
                regular = {
                    entry.name: entry.is_file(follow_symlinks=False)
                    for entry in entries
                    if _PREFIX in entry.name
                }
        finally:
            os.close(listing)
        if not regular.pop(self._name, False):
            raise LockError(f"the lock file {self.path} was removed. Find out what did it.")
        strange = []
        removed = 0
        for name, is_regular in regular.items():
            match = _NAME.fullmatch(name)
            if not match:
                continue
            if not is_regular:
                strange.append(name)
            elif not match["unpublished"]:
                removed += self._look_at_lock(dir_fd, name, match["job_id"])
            elif guarded:
                # Without the guard somebody may be about to publish it.
                _sweep(dir_fd, name)
        if strange:
            self._warn(
                f"Passed over {len(strange)} in {self._directory} that are named like a lock, but "
                f"are no regular files, so that no job made them. One is {strange[0]}."
            )
        if removed:
            self._warn(
                f"Removed {removed} stale lock(s) from {self._directory}. Their jobs were killed: "
                "tests and guests that they started may still be running."
            )

    def _look_at_lock(self, dir_fd: int, name: str, job_id: str) -> bool:
        """Remove the lock if it is stale, and raise if it is not.

        :return: whether it was there and could be removed
        """
        path = self._path_of(name)
        try:
            with _opened(dir_fd, name) as fd:
                flocked = _is_flocked(fd)
                status = os.fstat(fd)
                content = os.read(fd, _CONTENT_LIMIT)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise LockError(
                f"the lock file {path} cannot be judged: {error.strerror}. "
                "Remove it if you are sure that no job holds it."
            ) from error
        pid, writer_flocks = _parse(content)
        if flocked or (pid and not writer_flocks and _may_hold(pid, status.st_mtime)):
            raise LockHeldError(Holder(path, pid, status.st_uid, job_id, status.st_mtime))
        if not pid and not _lost_in_power_cut(content, status):
            raise LockError(
                f"the lock file {path} cannot be judged: there is no PID in it. "
                "Remove it if you are sure that no job holds it."
            )
        try:
            os.unlink(name, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn(
                f"The stale lock file {path} could not be removed: {error.strerror}. It stops "
                "nobody, and its owner's next job will remove it. Its job was killed: tests and "
                "guests that it started may still be running."
            )
            return False
        return True

    def _in_place(self) -> bool:
        assert self._fd is not None
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def _withdraw(self) -> OSError | None:
        """Remove whatever acquire() has created, and close the descriptors.

        :return: why the file could not be removed, if so
        """
        failure = None
        if self._dir_fd is not None:
            for name in (_UNPUBLISHED + self._name, self._name):
                try:
                    os.unlink(name, dir_fd=self._dir_fd)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    failure = error
        self._close()
        return failure

    def _close(self) -> None:
        fds = (self._fd, self._dir_fd)
        self._fd = self._dir_fd = None
        self.held = False
        for fd in fds:
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        _open_locks.discard(self)

    def _path_of(self, name: str) -> str:
        return os.path.join(self._directory, name)


# The lock is the job's alone: a child must neither keep the flock when the job is gone, nor remove
# the file.
_open_locks: weakref.WeakSet[JobLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)


def _guard(dir_fd: int) -> bool:
    """Keep other contenders out if that can be had in time.

    :param dir_fd: the lock directory; closing it lets the others in
    :return: whether they are kept out
    """
    deadline = time.monotonic() + GUARD_TIMEOUT
    while True:
        try:
            fcntl.flock(dir_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        except OSError:
            return False
        time.sleep(0.005)


@contextlib.contextmanager
def _opened(dir_fd: int, name: str) -> Iterator[int]:
    """Open a file of whatever kind, without following or waiting for anything."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_flocked(fd: int) -> bool:
    """Tell whether somebody holds the flock; it is shared, so that two who ask do not collide."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _parse(content: bytes) -> tuple[int | None, bool]:
    """Read the PID, and whether its process holds a flock as long as it lives."""
    match = _CONTENT.fullmatch(content)
    if not match or not 0 < int(match["pid"]) < _PID_LIMIT:
        return None, False
    return int(match["pid"]), match["writer_flocks"] is not None


def _sweep(dir_fd: int, name: str) -> None:
    """Remove what a process left that died before it published its lock."""
    with contextlib.suppress(OSError), _opened(dir_fd, name) as fd:
        if not _is_flocked(fd):
            os.unlink(name, dir_fd=dir_fd)


def _may_hold(pid: int, written: float) -> bool:
    """Tell whether a process may be the one that wrote its PID into a file.

    The facts are from kill(2) and proc_pid_stat(5).

    :param pid: the process, in the PID namespace of this one
    :param written: when the file was written, in seconds since the Epoch
    :return: False only where there is no such process, or where it started after that
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return True  # This /proc shows another PID namespace.
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field, a name in parentheses, may hold anything.
            fields = file.read().rpartition(b")")[2].split()
        state, started = fields[0], int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return True
    return state not in (b"Z", b"X") and _boot_time() + started <= written + CLOCK_SLACK


def _lost_in_power_cut(content: bytes, status: os.stat_result) -> bool:
    """Tell whether a file's name reached the disk before a power cut but its content did not."""
    blank = len(content) == status.st_size and not content.strip(b"\0")
    return blank and status.st_mtime + CLOCK_SLACK < _boot_time()


def _boot_time() -> float:
    """Tell when this system started, in seconds since the Epoch by the clock as it is set now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
