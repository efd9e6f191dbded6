"""The lock: a file in a directory, held by one job at a time.

It promises, and the earlier wins over the later: exclusion, failing closed, progress, attempts that
are bounded, and no litter. ``docs/promises.rst`` says what that means.

A contender first publishes a lock file of its own and only then looks at the others, so of two at
least one sees the other: that alone keeps exclusion. The guard around both steps, a flock on the
directory, is for progress: without it two might see each other and both give up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time

from avocado_vt_joblock import lockfile
from avocado_vt_joblock.lockfile import LockFile, Reason, State
from avocado_vt_joblock.processes import mark, unmark

#: How long to wait for the guard before going on without it, in seconds.
GUARD_TIMEOUT = 1.0
#: From what age on an unpublished file is one that a crash has left, in seconds.
CRASHED = 60.0
#: The file name of an error that is about the kernel lock.
KERNEL_LOCK = "F_OFD_SETLK"


class LockInTheWayError(Exception):
    """The lock could not be taken because of another one."""

    def __init__(self, file: LockFile) -> None:
        super().__init__(file.path)
        self.file = file
        self.waited = 0.0  # for how long the job has waited for it, in seconds


class JobLock:
    """A lock file in a directory in which only one job at a time holds one.

    :param directory: the absolute path of an existing directory
    :param job_id: what the file is named after
    :raises ValueError: when that is not 40 hexadecimal digits
    """

    def __init__(self, directory: str, job_id: str) -> None:
        self._name = f"{lockfile.PREFIX}{job_id.lower()}-{os.getuid()}-{os.urandom(4).hex()}.pid"
        if not lockfile.NAME.fullmatch(self._name):
            raise ValueError(f"the job id {job_id!r} is not 40 hexadecimal digits.")
        self._directory = directory
        self._unpublished = os.path.join(directory, lockfile.UNPUBLISHED + self._name)
        self._fd: int | None = None
        self.path = os.path.join(directory, self._name)  # where the lock file lies
        self.held = False  # whether this process holds the lock

    def acquire(self) -> list[LockFile]:
        """Take the lock, to keep it until :meth:`release` or the end of all that this job starts.

        :return: the stale locks that were there; one that could not be removed has Reason.SYSTEM
        :raises LockInTheWayError: when another lock is not stale
        :raises OSError: when the system refuses something; its file name tells what it is about
        """
        guard = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _wait_for_guard(guard)
            self._publish()
            stale = self._look_at_others()
            mark(self._name)
            self.held = True
            return stale
        except BaseException:
            # The file goes before the guard: nobody shall be refused because of one who gives up.
            self.release()
            raise
        finally:
            os.close(guard)

    def left(self, tests_only: bool) -> LockFile:
        """The verdict on this lock if it were given up now, and maybe only tests counted."""
        file = LockFile(self.path, uid=os.geteuid())
        lockfile.judge_ended([file], tests_only)
        return file

    def release(self, leave_file: bool = False) -> OSError | None:
        """Give the lock up, or what an attempt to take it has left; else do nothing.

        :param leave_file: whether the lock stays live until all has ended that this job has started
        :return: what went wrong; a FileNotFoundError if the file was not in place any more
        """
        if self._fd is None:
            return None
        problem: OSError | None = None
        try:
            if self.held and not os.path.samestat(os.lstat(self.path), os.fstat(self._fd)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if not leave_file:
                os.unlink(self.path)
        except OSError as error:
            problem = error
        with contextlib.suppress(OSError):
            os.unlink(self._unpublished)
        unmark(self._name)
        # Before that it is not given up, and must not be removed instead if this is interrupted.
        fd, self._fd = self._fd, None
        self.held = False
        with contextlib.suppress(OSError):
            os.close(fd)
        return problem

    def _publish(self) -> None:
        """Give the lock file its name only when it is complete and has its kernel lock."""
        # Nobody else may open it before the kernel lock is there.
        self._fd = os.open(self._unpublished, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
        try:
            fcntl.fcntl(self._fd, lockfile.SETLK, lockfile.struct_flock(fcntl.F_WRLCK))
        except OSError as error:
            raise OSError(error.errno, error.strerror, KERNEL_LOCK) from error
        with contextlib.suppress(OSError):
            # systemd-tmpfiles spares a file of which it gets no shared flock. Never LOCK_SH or
            # LOCK_UN: on NFS both lose the kernel lock.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = b"%d\n\n" % os.getpid()
        if os.write(self._fd, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Whatever the umask: everybody may read who holds the lock.
        os.fchmod(self._fd, 0o644)
        os.rename(self._unpublished, self.path)

    def _look_at_others(self) -> list[LockFile]:
        """Judge all other locks, remove the stale ones, and give up where one is in the way."""
        names = {name for name in os.listdir(self._directory) if lockfile.PREFIX in name}
        if self._name not in names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        self._remove_crashed(names)
        others = [name for name in names - {self._name} if lockfile.NAME.fullmatch(name)]
        files = lockfile.judge([os.path.join(self._directory, name) for name in others])
        stale = [file for file in files if file.state is State.STALE]
        for file in stale:
            try:
                os.unlink(file.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                file.reason, file.detail = Reason.SYSTEM, error.strerror
        if len(files) > len(stale):
            raise LockInTheWayError(min(files, key=lambda file: file.state.value))
        return stale

    def _remove_crashed(self, names: set[str]) -> None:
        """Remove old unpublished files, by the clock of the file system."""
        for name in names:
            path = os.path.join(self._directory, name)
            if name.startswith(lockfile.UNPUBLISHED) and lockfile.NAME.fullmatch(name[1:]):
                with contextlib.suppress(OSError):
                    if os.lstat(self.path).st_ctime - os.lstat(path).st_ctime > CRASHED:
                        os.unlink(path)


def _wait_for_guard(guard: int) -> None:
    """Keep other contenders on this host out, if that can be had in time."""
    deadline = time.monotonic() + GUARD_TIMEOUT
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
