"""The lock directory: its guard, its files, who waits in it, what crashes left."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from avocado_vt_joblock import card, lockfile
from avocado_vt_joblock.card import Card
from avocado_vt_joblock.lockfile import LockFile

#: How long to wait for the guard before going on without it, in seconds.
GUARD_TIMEOUT = 1.0
#: How long a ticket counts after it was renewed, in seconds. A job that waits renews it
#: at the start and at the end of each attempt. Between these are 1 s for the guard, 1
#: for leases, 1.5 for other hosts and 5 for processes at most; the lock file itself is
#: there meanwhile. Between two attempts lies 1 s.
TICKET_TIMEOUT = 10.0
#: From what age on a card or an unpublished file was left by a crash, in seconds.
LITTER_AGE = 60.0

#: What belongs to a lock and is none: an unpublished file, a card, a new card. For
#: example
#: .avocado-vt-joblock-8f0a3ed06dc5353fe19db0e0ab8f3a10a9c3b6ba-1000-5f2c9d01.pid.host
_COMPANION = re.compile(
    rf"\.(?P<lock_name>{lockfile.NAME.pattern})(?P<kind>|\.host|\.host\.new)"
)


class Use(enum.Enum):
    """What a job does with its lock directory."""

    OPEN = enum.auto()  # it opens and lists it
    WRITE = enum.auto()  # it makes files in it
    LOCK = enum.auto()  # it takes the kernel lock on one of these


class DirectoryError(Exception):
    """The system refuses a use of the lock directory."""

    def __init__(self, use: Use, error: OSError) -> None:
        super().__init__(error)
        self.use = use
        self.error = error


@dataclass(frozen=True)
class Ticket:
    """What shows that a job waits: its card, without a lock file."""

    lock_name: str
    card: Card

    @property
    def turn(self) -> tuple[float, str]:
        """The order of jobs that wait: by the time at which they came, then by name."""
        return self.card.came, self.lock_name


class LockDirectory:
    """A directory in which jobs make lock files.

    It has for example, of a job that holds the lock and of one that waits for it::

        avocado-vt-joblock-8f0a3ed0...-1000-5f2c9d01.pid
        .avocado-vt-joblock-8f0a3ed0...-1000-5f2c9d01.pid.host -> hv3.lab 1a2b3c4d ...
        .avocado-vt-joblock-77d1c0aa...-1001-0b4e11f7.pid.host -> hv3.lab 1a2b3c4d ...

    :param path: its absolute path
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def join(self, name: str) -> str:
        """Return the path of a file in it."""
        return os.path.join(self.path, name)

    @contextlib.contextmanager
    def guard(self) -> Iterator[int]:
        """Keep other contenders of this host out, if that can be had in time.

        Yields its descriptor, for free_guard() and take_guard().

        :raises DirectoryError: when the directory cannot be opened
        """
        with reported_as(Use.OPEN):
            guard = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            take_guard(guard)
            yield guard
        finally:
            # An error here would say nothing of the lock.
            with contextlib.suppress(OSError):
                os.close(guard)

    def names(self) -> set[str]:
        """Return the names of all that has to do with locks.

        :raises DirectoryError: when the directory cannot be listed
        """
        with reported_as(Use.OPEN):
            return {name for name in os.listdir(self.path) if lockfile.PREFIX in name}

    def read_locks(self, names: set[str]) -> list[LockFile]:
        """Read the lock files of these names; some are not judged yet."""
        deadline = time.monotonic() + lockfile.OPEN_TIMEOUT
        files = [
            lockfile.read(self.join(name), deadline)
            for name in names
            if lockfile.NAME.fullmatch(name)
        ]
        return [file for file in files if file]

    def waiting(self, names: set[str], now: float) -> list[Ticket]:
        """Return the tickets of jobs that wait and live, in the order of their turns.

        :param names: what lies in the directory
        :param now: in seconds since the Epoch, by the clock of the file system
        """
        tickets = []
        for orphan in orphans(names):
            if orphan["kind"] != ".host":
                continue
            found = None
            with contextlib.suppress(OSError):
                found = card.read(self.join(orphan["lock_name"]))
            if found and _is_ticket(found, now):
                tickets.append(Ticket(orphan["lock_name"], found))
        return sorted(tickets, key=lambda ticket: ticket.turn)

    def remove_litter(self, names: set[str], new_file: str) -> None:
        """Remove what crashes have left and no lock file belongs to.

        :param names: what lies in the directory
        :param new_file: the path of a file that is new by the clock of the file system
        """
        for orphan in orphans(names):
            path = self.join(orphan[0])
            with contextlib.suppress(OSError):
                age = os.lstat(new_file).st_ctime - os.lstat(path).st_ctime
                # The clock of a file system may be set back.
                if abs(age) > LITTER_AGE:
                    os.unlink(path)


def _is_ticket(found: Card, now: float) -> bool:
    """Tell whether a card without a lock file is the ticket of a job that lives."""
    if found.has_left:
        return False  # avocado-vt, which knows no cards, has removed its lock file.
    if found.is_of_this_pid_namespace and not found.writer_lives:
        return False
    # A job that has just come may be about to publish its lock. It renews its card when
    # its first attempt has failed.
    has_waited = found.came < found.renewed
    # The clock of a file system may be set back.
    is_alive = abs(now - found.renewed) < TICKET_TIMEOUT
    return has_waited and is_alive


def orphans(names: set[str]) -> list[re.Match[str]]:
    """Return the cards and unpublished files without their lock file.

    :return: of each one its name (group 0), that of its lock file and its kind
    """
    matches = [_COMPANION.fullmatch(name) for name in names if name.startswith(".")]
    return [match for match in matches if match and match["lock_name"] not in names]


def take_guard(guard: int) -> None:
    """Take the guard; go on without after a while, or where it cannot be had."""
    deadline = time.monotonic() + GUARD_TIMEOUT
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.005)


def free_guard(guard: int) -> None:
    """Let others take the guard."""
    with contextlib.suppress(OSError):
        fcntl.flock(guard, fcntl.LOCK_UN)


@contextlib.contextmanager
def reported_as(use: Use) -> Iterator[None]:
    """Have what the system says reported as an error of the lock directory."""
    try:
        yield
    except OSError as error:
        # A program's own TimeoutError, for example, says nothing about the directory.
        if error.errno is None:
            raise
        raise DirectoryError(use, error) from error


def system_error(code: int) -> OSError:
    """Return the error that the system has for a number of errno(3)."""
    return OSError(code, os.strerror(code))
