"""The lock directory: its guard, its files, who waits in it, what crashes left.

It has for example, of a job that holds the lock and of one that waits for it::

    avocado-vt-joblock-8f0a3ed0...-1000-5f2c9d01.pid                   a lock file
    .avocado-vt-joblock-8f0a3ed0...-1000-5f2c9d01.pid.host -> hv3...   its card
    .avocado-vt-joblock-77d1c0aa...-1001-0b4e11f7.pid.host -> hv3...   a ticket
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from avocado_vt_joblock import card, lockfile
from avocado_vt_joblock.card import Card
from avocado_vt_joblock.lockfile import LockFile

#: How long to wait for the guard before going on without it, in seconds.
GUARD_TIMEOUT = 1.0
#: How long a ticket counts after it was renewed, in seconds. A job that waits renews it
#: when an attempt begins and when it ends. It is without a lock file for 7 s at most in
#: an attempt (1 for leases, 5 for processes, 1 for the guard), and for 2 s between two
#: attempts (1 for the pause, 1 for the guard).
TICKET_TIMEOUT = 10.0
#: In seconds: a card or unpublished file that is older, and has no lock file, was left
#: by a crash.
LITTER_AGE = 60.0

#: Files that belong to a lock file: a file that is not published yet, a card
#: (.host), a card that is about to replace another one (.host.new). For example
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


class ReportedAs:
    """A context manager: an error of the system becomes one of the lock directory.

    :param use: what the body of the ``with`` does
    """

    def __init__(self, use: Use) -> None:
        self._use = use

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, _type: object, error: BaseException | None, _: object) -> None:
        """Raise the error of the directory."""
        # An OSError without a number is not from the system: a handler of a signal may
        # have raised it, such as a program's own TimeoutError.
        if isinstance(error, OSError) and error.errno is not None:
            raise DirectoryError(self._use, error) from error


def system_error(code: int) -> OSError:
    """Return the error for a number of errno(3): for ENOENT a FileNotFoundError."""
    return OSError(code, os.strerror(code))


class Guard:
    """A flock on the lock directory: only one contender of a host has it at a time.

    Exclusion does not need it: a contender that cannot have it goes on without. It is
    taken and freed by a ``with``, and can be freed and taken in there.

    :param path: the lock directory
    :raises DirectoryError: when it cannot be opened
    """

    def __init__(self, path: str) -> None:
        with ReportedAs(Use.OPEN):
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> None:
        """Take the guard, if it can be had in time."""
        try:
            self.take()
        except BaseException:
            self._close()
            raise

    def __exit__(self, *_: object) -> None:
        """Free the guard."""
        self._close()

    def take(self) -> None:
        """Take the guard, or give that up after a while."""
        deadline = time.monotonic() + GUARD_TIMEOUT
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.005)

    def free(self) -> None:
        """Let others take the guard."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _close(self) -> None:
        # An error here would say nothing of the lock.
        with contextlib.suppress(OSError):
            os.close(self._fd)


@dataclass(frozen=True)
class Orphan:
    """A card, a new card or an unpublished file, without its lock file.

    It is of a job that begins an attempt or waits, or was left by a crash.
    """

    name: str
    lock_name: str  # the name of the lock file that is not there
    is_card: bool


@dataclass(frozen=True)
class Ticket:
    """A card without a lock file: its job waits."""

    lock_name: str
    card: Card

    @property
    def turn(self) -> tuple[float, str]:
        """The order of jobs that wait: by the time at which they came, then by name."""
        return self.card.came, self.lock_name


@dataclass(frozen=True)
class Listing:
    """What a lock directory had at one moment."""

    lock_names: frozenset[str]  # the names of its lock files
    orphans: list[Orphan]


class LockDirectory:
    """A directory in which jobs make lock files.

    :param path: its absolute path
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def join(self, name: str) -> str:
        """Return the path of a file in it."""
        return os.path.join(self.path, name)

    def listing(self) -> Listing:
        """List its lock files, and what belongs to them.

        :raises DirectoryError: when that is refused
        """
        with ReportedAs(Use.OPEN):
            names = [name for name in os.listdir(self.path) if lockfile.PREFIX in name]
        lock_names = frozenset(filter(lockfile.NAME.fullmatch, names))
        return Listing(lock_names, _orphans(names, lock_names))

    def read_locks(self, names: Iterable[str]) -> list[LockFile]:
        """Read lock files; some are to be judged by leftovers."""
        deadline = time.monotonic() + lockfile.OPEN_TIMEOUT
        files = [lockfile.read(self.join(name), deadline) for name in names]
        return [file for file in files if file]

    def tickets(self, listing: Listing, now: float) -> list[Ticket]:
        """Return the tickets of jobs that wait and live, in the order of their turns.

        :param listing: the listing of this directory
        :param now: in seconds since the Epoch, by the clock of the file system
        """
        tickets = []
        for orphan in listing.orphans:
            found = None
            if orphan.is_card:
                with contextlib.suppress(OSError):
                    found = card.read(self.join(orphan.lock_name))
            if found and _is_ticket(found, now):
                tickets.append(Ticket(orphan.lock_name, found))
        return sorted(tickets, key=lambda ticket: ticket.turn)

    def remove_litter(self, listing: Listing, new_file: str) -> None:
        """Remove orphans that were left by a crash: they are old.

        :param listing: the listing of this directory
        :param new_file: the path of a file that was just made: its time is now, by the
            clock of the file system
        """
        for orphan in listing.orphans:
            path = self.join(orphan.name)
            with contextlib.suppress(OSError):
                age = os.lstat(new_file).st_ctime - os.lstat(path).st_ctime
                # The clock of a file system may be set back.
                is_old = abs(age) > LITTER_AGE
                if is_old and not os.path.lexists(self.join(orphan.lock_name)):
                    os.unlink(path)


def _orphans(names: list[str], lock_names: frozenset[str]) -> list[Orphan]:
    """Find the cards and unpublished files whose lock file is not there."""
    orphans = []
    for name in names:
        match = _COMPANION.fullmatch(name)
        if match and match["lock_name"] not in lock_names:
            is_card = match["kind"] == ".host"
            orphans.append(Orphan(name, match["lock_name"], is_card))
    return orphans


def _is_ticket(found: Card, now: float) -> bool:
    """Tell whether a card without a lock file is the ticket of a job that lives."""
    if found.is_handed_over:
        # The lock file was removed, maybe by avocado-vt, but not the card.
        return False
    is_here = found.is_of_this_pid_namespace
    if is_here and not found.may_be_of(found.identity.pid):
        return False
    # A job that does not wait has such a card, too, for the moment before it publishes
    # its lock file. But only one that waits renews it, after a first failed attempt.
    has_waited = found.came < found.renewed
    # The clock of a file system may be set back.
    is_alive = abs(now - found.renewed) < TICKET_TIMEOUT
    return has_waited and is_alive
