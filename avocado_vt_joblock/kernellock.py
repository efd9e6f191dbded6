"""The kernel lock: an open file description lock of fcntl(2) on a whole lock file.

The kernel drops it when the last process that has the file open closes it or ends. So
it tells whether the holder lives, or a child with the same open file. On NFS the server
keeps it, and clients and server see it alike. A flock(2) is another kind of lock. On a
local file system the two do not affect each other; for NFS see ``ownfile``.
"""

import fcntl
import os
import struct

# Pythons that were built against an old C library lack the names. The numbers are those
# of Linux, on every processor.
_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)


def take(fd: int) -> None:
    """Take the kernel lock on a file that is open for reading and writing.

    :raises BlockingIOError: when another open file has it
    :raises OSError: when the file system or the kernel has no such locks
    """
    fcntl.fcntl(fd, _SETLK, _struct_flock(fcntl.F_WRLCK))


def drop(fd: int) -> None:
    """Drop the kernel lock, also for processes that have inherited the open file.

    :raises OSError: when the system refuses that
    """
    fcntl.fcntl(fd, _SETLK, _struct_flock(fcntl.F_UNLCK))


def is_held(fd: int) -> bool:
    """Tell whether another open file has the kernel lock.

    Anybody who may read the file can set a read lock on it. That does not count.

    :raises OSError: when the system does not tell
    """
    answer = fcntl.fcntl(fd, _GETLK, _struct_flock(fcntl.F_RDLCK))
    kind: int = struct.unpack_from("h", answer)[0]
    return kind != fcntl.F_UNLCK


def _struct_flock(kind: int) -> bytes:
    """Make a struct flock for a whole file; its l_pid has to be 0."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
