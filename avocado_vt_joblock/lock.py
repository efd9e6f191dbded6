"""The lock: a file in a directory, held by one job at a time.

It keeps, in the order in which they win:

1. exclusion: no two holders in one directory; no lock that may be live is removed, nothing killed;
2. fail closed: what cannot be judged is an error;
3. progress: of all who start together one gets the lock, and a holder that is gone stops nobody;
4. bounded: nothing that lies in the directory, and nobody's lock, makes an attempt last for long;
5. no litter: no partial lock file is ever seen, and what a crash leaves the next one removes.

A contender first publishes a lock file of its own and only then looks at the others, so of two at
least one sees the other: that alone keeps exclusion. The guard around both steps, a flock on the
directory, is for progress: without it two might see each other and both give up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import logging
import os
import pwd
import random
import shlex
import stat
import time
import weakref

from avocado_vt_joblock.lockfile import (
    PREFIX,
    UNPUBLISHED,
    Holder,
    Judgement,
    Verdict,
    content,
    has_kernel_lock,
    is_gone,
    is_name,
    judge,
    look_again,
    new_name,
    opened,
    take_kernel_lock,
    traces,
)
from avocado_vt_joblock.processes import Left, left_of, mark, unmark

#: How long to wait for the guard before going on without it, in seconds.
GUARD_TIMEOUT = 1.0
#: How often to publish anew where another host removes the unpublished file.
PUBLISH_ATTEMPTS = 5
#: How long to wait between two looks at a lock that somebody holds, in seconds.
POLL_INTERVAL = 1.0

LOG = logging.getLogger(__name__)


class LockError(Exception):
    """The lock could not be taken; the text says why and, where there is one, the remedy."""


class LockDirectoryError(LockError):
    """It is the directory that is no place for a lock."""


class LockHeldError(LockError):
    """A live lock is in the way.

    :param holder: whose it is
    """

    #: For how long its holder was waited for, in seconds.
    waited = 0.0

    def __init__(self, holder: Holder) -> None:
        super().__init__(f"the lock file {holder.path} is held by PID {holder.pid}")
        self.holder = holder


class LockUnknownError(LockError):
    """Nobody can tell whether a lock is live.

    :param holder: whose it is
    :param reason: why nobody can tell
    """

    def __init__(self, holder: Holder, reason: str) -> None:
        super().__init__(f"cannot tell whether a job still holds {holder.path}: {reason}")
        self.holder = holder
        self.reason = reason


# Those that are not about it are that a process or the system has run out of something, mostly.
_ABOUT_DIRECTORY = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EIO,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)


def _lock_error(what: str, error: OSError) -> LockError:
    kind = LockDirectoryError if error.errno in _ABOUT_DIRECTORY else LockError
    return kind(f"{what}: {error.strerror}.")


class JobLock:
    """A lock file in a directory in which only one job at a time holds one.

    What a user should know of though it stops nobody is logged as a warning.

    :param directory: the absolute path of an existing directory
    :param job_id: what the file is named after; anything but 40 hexadecimal digits is replaced by
                   its SHA-1, since by another name nobody would take the file for a lock
    """

    def __init__(self, directory: str, job_id: str) -> None:
        self._directory = directory
        self._job_id = job_id
        self._name = new_name(job_id)
        self._dir_fd: int | None = None
        self._fd: int | None = None
        self._mark: str | None = None

    @property
    def path(self) -> str:
        """The lock file's absolute path."""
        return os.path.join(self._directory, self._name)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._mark is not None

    def acquire(self) -> None:
        """Take the lock, to keep it until :meth:`release` or the end of all that this job starts.

        Stale locks are removed. Where it fails it leaves nothing behind.

        :raises LockHeldError: when another job holds the lock, or something of it still runs
        :raises LockUnknownError: when nobody can tell whether it does
        :raises LockDirectoryError: when the directory is no place for a lock
        :raises LockError: when the system fails
        :raises RuntimeError: when this object has the lock already
        """
        if self._dir_fd is not None:
            raise RuntimeError(f"the lock {self.path} has been acquired already")
        try:
            dir_fd = self._open_directory()
            guarded = _take_guard(dir_fd)
            self._publish(dir_fd)
            self._look_at_others(dir_fd, guarded)
            self._mark = mark(self.path)
            _drop_guard(dir_fd)
        except BaseException as error:
            # The file goes before the guard: nobody shall be refused because of one who gives up.
            self._remove_and_close()
            if isinstance(error, OSError):
                raise _lock_error(self.path, error) from error
            raise

    def wait(self, holder: Holder, timeout: float) -> Holder | None:
        """Wait until something about a live lock changes; meanwhile nobody sees that one waits.

        :param holder: whose lock it is
        :param timeout: how long to wait, in seconds
        :return: whose it is now; None where it is worth an attempt to take the lock
        """
        deadline = time.monotonic() + timeout
        while True:
            # By chance, so that those who wait on several hosts do not always meet.
            pause = POLL_INTERVAL * random.uniform(0.5, 1)
            time.sleep(max(0, min(pause, deadline - time.monotonic())))
            now = look_again(holder)
            if now != holder or time.monotonic() >= deadline:
                return now

    def left_behind(self) -> Left:
        """Find what this job has started and still runs."""
        (left,) = left_of([traces(self.path, os.geteuid())])
        return left

    def release(self) -> None:
        """Remove the lock file; without the lock, do nothing.

        What goes wrong is warned of, not raised: the file is no longer in place, so that other
        jobs may have run at the same time, or it cannot be removed.
        """
        # When a signal interrupts this it may be called again: then the file may well be gone.
        if self.held:
            self._unmark()
            if not self._is_in_place():
                LOG.warning(
                    "The lock file %s was removed or replaced while the job ran. Other jobs may "
                    "have run at the same time and changed the files that it used. Find out what "
                    "did it: a cleaner of temporary files, for example.",
                    self.path,
                )
        error = self._remove_and_close()
        if error:
            LOG.warning(
                "The lock file %s could not be removed: %s. It stops nobody once nothing of the "
                "job runs: then the next job that may remove it will.",
                self.path,
                error.strerror,
            )

    def leave(self) -> None:
        """Leave the lock file in place: it is live as long as anything runs that the job started.

        Without the lock, do nothing.
        """
        self._unmark()
        self._close()

    def _open_directory(self) -> int:
        try:
            self._dir_fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            _open_locks.add(self)
            status = os.fstat(self._dir_fd)
        except FileNotFoundError as error:
            raise LockDirectoryError(
                f"the lock directory {self._directory} does not exist."
            ) from error
        except NotADirectoryError as error:
            raise LockDirectoryError(
                f"the lock directory {self._directory} is not a directory."
            ) from error
        except OSError as error:
            what = f"the lock directory {self._directory} cannot be opened"
            raise _lock_error(what, error) from error
        except ValueError as error:
            # There are characters that no path can have.
            raise LockDirectoryError(
                f"the lock directory {self._directory!r} cannot be opened: {error}."
            ) from error
        if _others_may_remove_files(status):
            LOG.warning(
                "Others may write in the lock directory %s and, since it has no sticky bit, remove "
                "the lock while the job runs. Prevent that: chmod +t %s",
                self._directory,
                shlex.quote(self._directory),
            )
        return self._dir_fd

    def _publish(self, dir_fd: int) -> None:
        """Publish a lock file, anew if it is lost.

        Each host has a guard of its own. So a job on another one may remove the unpublished file
        before it has its kernel lock.
        """
        for attempt in range(1, PUBLISH_ATTEMPTS + 1):
            self._name = new_name(self._job_id)
            try:
                self._publish_once(dir_fd)
                break
            except OSError as error:
                lost = is_gone(error) or isinstance(error, FileExistsError)
                if not lost or attempt == PUBLISH_ATTEMPTS:
                    raise
                self._close_file()

    def _publish_once(self, dir_fd: int) -> None:
        """Give the lock file its name only when it is complete and has its kernel lock."""
        unpublished = UNPUBLISHED + self._name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            # Nobody else may open it before the kernel lock is there.
            self._fd = os.open(unpublished, flags, mode=0o600, dir_fd=dir_fd)
        except FileExistsError:
            raise
        except OSError as error:
            what = f"the lock directory {self._directory} cannot be written"
            raise _lock_error(what, error) from error
        try:
            take_kernel_lock(self._fd)
        except OSError as error:
            if is_gone(error):
                raise
            raise LockDirectoryError(
                f"the lock directory {self._directory} is on a file system that does not lock "
                f"files: {error.strerror}."
            ) from error
        text = content()
        if os.write(self._fd, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Whatever the umask: everybody may read who holds the lock.
        os.fchmod(self._fd, 0o644)
        os.rename(unpublished, self._name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def _look_at_others(self, dir_fd: int, guarded: bool) -> None:
        """Judge all other locks, remove the stale ones, and give up where one is in the way."""
        names = _list(dir_fd)
        if self._name not in names:
            raise LockError(f"the lock file {self.path} was removed. Find out what did it.")
        names.remove(self._name)
        if guarded:
            # Without the guard somebody on this host may be about to publish one.
            _remove_unpublished(dir_fd, [name for name in names if name.startswith(UNPUBLISHED)])
        paths = [os.path.join(self._directory, name) for name in names if is_name(name)]
        found: dict[Verdict, list[Judgement]] = {verdict: [] for verdict in Verdict}
        for judgement in judge(paths, dir_fd):
            found[judgement.verdict].append(judgement)
        self._ignore(found[Verdict.NO_LOCK])
        self._remove(found[Verdict.STALE], dir_fd)
        # What does not end by itself comes first: nobody shall wait and then be stopped by it.
        for judgement in found[Verdict.UNKNOWN]:
            raise LockUnknownError(judgement.holder, judgement.reason)
        for judgement in found[Verdict.LIVE]:
            raise LockHeldError(judgement.holder)

    def _ignore(self, strange: list[Judgement]) -> None:
        if strange:
            LOG.warning(
                "Ignored %d in %s that are named like a lock, but are no regular files, so that no "
                "job made them. Find out who did, and remove them. One is %s.",
                len(strange),
                self._directory,
                strange[0].holder.path,
            )

    def _remove(self, stale: list[Judgement], dir_fd: int) -> None:
        removed = 0
        for judgement in stale:
            path = judgement.holder.path
            try:
                os.unlink(os.path.basename(path), dir_fd=dir_fd)
                removed += 1
            except OSError as error:
                if not is_gone(error):
                    LOG.warning(
                        "The stale lock file %s could not be removed: %s. It does not stop this "
                        "job. Its owner's next job removes it, unless guests still run that only "
                        "the owner and root can see.",
                        path,
                        error.strerror,
                    )
        if removed:
            LOG.info("Removed %d stale lock(s) from %s.", removed, self._directory)

    def _is_in_place(self) -> bool:
        assert self._fd is not None
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._fd))
        except OSError:
            return False

    def _remove_and_close(self) -> OSError | None:
        """Remove whatever acquire() has created, and close the descriptors.

        :return: why the file could not be removed, if so
        """
        self._unmark()
        failure = None
        if self._dir_fd is not None:
            for name in (UNPUBLISHED + self._name, self._name):
                try:
                    os.unlink(name, dir_fd=self._dir_fd)
                except OSError as error:
                    if not is_gone(error):
                        failure = error
        self._close()
        return failure

    def _unmark(self) -> None:
        variable, self._mark = self._mark, None
        if variable:
            unmark(variable)

    def _close(self) -> None:
        self._mark = None
        self._close_file()
        dir_fd, self._dir_fd = self._dir_fd, None
        if dir_fd is not None:
            with contextlib.suppress(OSError):
                os.close(dir_fd)
        _open_locks.discard(self)

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


# The lock is the job's alone: a child must neither keep the kernel lock when the job is gone, nor
# remove the file. The mark it keeps, since it is of the job.
_open_locks: weakref.WeakSet[JobLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)


def _take_guard(dir_fd: int) -> bool:
    """Keep other contenders on this host out, if that can be had in time.

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


def _drop_guard(dir_fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(dir_fd, fcntl.LOCK_UN)


def _list(dir_fd: int) -> list[str]:
    """List what in a directory is named like a lock, published or not."""
    # By a descriptor of its own: on some file systems one shows only what was there when it was
    # opened, which dir_fd was before the lock file was published.
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
    try:
        with os.scandir(listing) as entries:
            return [
                entry.name
                for entry in entries
                if PREFIX in entry.name and is_name(entry.name.removeprefix(UNPUBLISHED))
            ]
    finally:
        os.close(listing)


def _remove_unpublished(dir_fd: int, names: list[str]) -> None:
    """Remove what processes left that died before they published their lock."""
    for name in names:
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                with opened(name, dir_fd, deadline=0) as fd:
                    if not has_kernel_lock(fd):
                        os.unlink(name, dir_fd=dir_fd)


def _others_may_remove_files(status: os.stat_result) -> bool:
    """Tell whether other users than its owner may remove files from a directory."""
    if status.st_mode & stat.S_ISVTX:
        return False
    if status.st_mode & stat.S_IWGRP:
        # In many systems each user has a group of the same name, with nobody else in it.
        try:
            private = grp.getgrgid(status.st_gid).gr_name == pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            private = False
        if not private:
            return True
    return bool(status.st_mode & stat.S_IWOTH)
