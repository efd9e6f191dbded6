"""A job's own lock file: published, removed, or handed over.

At first the file has a dot before its name, so others do not see it. It is *published*
by its rename, when it has its content and its kernel lock. When the job ends the file
is removed. Or it is *handed over* to the processes that the job has started: it stays,
its kernel lock goes, and its card says so. It then keeps others out only as long as one
of these processes runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from avocado_vt_joblock import card, kernellock, lockdir
from avocado_vt_joblock.lockdir import ReportedAs, Use


class OwnFile:
    """The lock file of a job, seen from that job's own process.

    :param directory: the path of the lock directory
    :param name: what the file is to be called
    """

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self.path = os.path.join(directory, name)
        self._unpublished = os.path.join(directory, f".{name}")
        self._fd: int | None = None  # open as long as it has the kernel lock
        self._status: os.stat_result | None = None  # of the file while it is open

    def publish(self) -> None:
        """Make the file, and let others see it when it is complete.

        :raises DirectoryError: when the system refuses that
        """
        with ReportedAs(Use.WRITE):
            self._fd = fd = self._open_new()
            self._status = os.fstat(fd)
        with ReportedAs(Use.LOCK):
            kernellock.take(fd)
        with contextlib.suppress(OSError):
            # For systemd-tmpfiles, which deletes no file that has a flock. Never use
            # LOCK_SH or LOCK_UN: on NFS both lose the kernel lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with ReportedAs(Use.WRITE):
            text = b"%d\n\n" % os.getpid()
            if os.write(fd, text) < len(text):
                raise lockdir.system_error(errno.ENOSPC)
            with contextlib.suppress(OSError):
                # Whatever the umask: jobs of other users have to read the file to judge
                # it. CIFS and FUSE may refuse that. Then those jobs are stopped.
                os.fchmod(fd, 0o644)
            os.rename(self._unpublished, self.path)

    def check(self) -> None:
        """Check that the file is still in its place.

        :raises FileNotFoundError: when somebody has removed or replaced it, or when it
            is closed already, by an earlier call that Ctrl-C has stopped
        :raises OSError: when the system does not tell
        """
        if not self._status:
            raise lockdir.system_error(errno.ENOENT)
        try:
            status = os.lstat(self.path)
        except OSError as error:
            # ESTALE: another client of NFS has removed it.
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            card.remove(self.path)  # Without its file it is litter.
            raise lockdir.system_error(errno.ENOENT) from None
        if not os.path.samestat(status, self._status):
            # Otherwise the card would make the other file look like a live lock.
            card.hand_over(self.path)
            raise lockdir.system_error(errno.ENOENT)

    def remove(self) -> None:
        """Remove the file with its card.

        :raises OSError: when it cannot be removed
        """
        os.unlink(self.path)
        card.remove(self.path)

    def hand_over(self) -> None:
        """Let the file keep others out only while a process runs that the job started.

        With its kernel lock it would keep others out for longer: until this process has
        ended, and each child that has inherited the open file.
        """
        card.hand_over(self.path)
        fd = self._open_fd()
        if fd is not None:
            with contextlib.suppress(OSError):
                kernellock.drop(fd)

    def withdraw(self, *, keeps_card: bool) -> None:
        """Remove what there is of it after a failed attempt.

        :param keeps_card: whether the card stays, as a ticket, and is renewed
        """
        with contextlib.suppress(OSError):
            os.unlink(self._unpublished)
        if keeps_card:
            # Before it becomes a ticket: the attempt may have taken long.
            card.make(self.path)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        except OSError:
            self.hand_over()  # So the file stops nobody.
            return
        if not keeps_card:
            card.remove(self.path)

    def close(self) -> None:
        """Close the file, which drops the kernel lock."""
        fd = self._open_fd()
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fd = self._status = None

    def _open_fd(self) -> int | None:
        """Return the descriptor of the file, if it is open.

        Other code in the job's process may have closed it, and opened another file.
        """
        # After Ctrl-C in publish() there may be nothing to compare it with.
        if self._fd is None or self._status is None:
            return self._fd
        try:
            is_same = os.path.samestat(os.fstat(self._fd), self._status)
        except OSError as error:
            is_same = error.errno != errno.EBADF
        return self._fd if is_same else None

    def _open_new(self) -> int:
        """Open a new file that nobody else may open before the kernel lock is there."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(self._unpublished, flags, mode=0o600)
        except FileExistsError:
            # An earlier attempt of this job has failed to remove it.
            os.unlink(self._unpublished)
            return os.open(self._unpublished, flags, mode=0o600)
