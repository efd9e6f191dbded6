"""The lock: a file in a directory, held by one job at a time.

What it promises, the most important first; ``docs/promises.rst`` has the details:

1. exclusion: no two jobs hold it at once;
2. it fails closed: where nobody can tell whether it is held, no job gets it. But of
   guests of other users, which an ordinary user never sees, a job is only warned;
3. progress: one of several jobs that start together gets it;
4. bounded attempts: each one succeeds or fails within seconds;
5. no litter: what a killed job has left is removed.

A contender first publishes a lock file of its own, and then reads those of others. So
of two contenders at least one sees the other: that alone keeps exclusion. Without more,
each might see the other, and both would give up. So contenders of one host take turns:
each does both steps while it has the guard of the directory. It frees the guard before
any step that can take long.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import time
from collections.abc import Iterable

from avocado_vt_joblock import card, leftovers, lockdir, lockfile, marks
from avocado_vt_joblock.leftovers import LOOK_TIMEOUT, Leftovers, Obstacle
from avocado_vt_joblock.lockdir import (
    DirectoryError,
    Guard,
    Listing,
    LockDirectory,
    Ticket,
    Use,
)
from avocado_vt_joblock.lockfile import LockFile, State
from avocado_vt_joblock.ownfile import OwnFile

#: Jobs of several hosts have no common guard. How long the first of those that start
#: together waits for the others to give up, in seconds.
RIVAL_TIMEOUT = 1.5
#: Two jobs start together if their cards were renewed less than so many seconds apart.
RIVAL_DISTANCE = 2.0
#: How often the first one looks whether the others have given up, in seconds.
RIVAL_PAUSE = 0.05


class JobIdError(ValueError):
    """The id of a job is not 40 hexadecimal digits: a program has set it."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class LockInTheWayError(Exception):
    """The lock could not be taken because of another job.

    :param file: the lock in the way; None where the job only has to wait for its turn
    :param jobs_before: how many earlier jobs are waiting
    :param stale: the stale locks that were there; see :meth:`JobLock.acquire`
    """

    def __init__(
        self,
        file: LockFile | None,
        jobs_before: int = 0,
        stale: Iterable[LockFile] = (),
    ) -> None:
        super().__init__(file.path if file else "")
        self.file = file
        self.jobs_before = jobs_before
        self.stale = list(stale)

    @property
    def may_pass(self) -> bool:
        """Whether it is of use to wait."""
        return self.file is None or self.file.state.may_pass


class WaitedInVainError(LockInTheWayError):
    """The lock could not be taken though the job has waited for it.

    :param error: what was in its way at the end
    :param waited: how long it has waited, in seconds
    """

    def __init__(self, error: LockInTheWayError, waited: float) -> None:
        super().__init__(error.file, error.jobs_before)
        self.waited = waited


class Phase(enum.Enum):
    """What this process does with the lock."""

    OUT = enum.auto()  # nothing, not yet or not any more
    TRYING = enum.auto()  # it makes an attempt, or waits for the next one
    HOLDING = enum.auto()  # it holds the lock


class JobLock:
    """The lock of a directory, as one job takes it and gives it back.

    :param directory: the absolute path of an existing directory
    :param job_id: what the lock file is named after
    :raises JobIdError: when that is not 40 hexadecimal digits
    """

    def __init__(self, directory: str, job_id: str) -> None:
        random = os.urandom(4).hex()
        name = f"{lockfile.PREFIX}{job_id.lower()}-{os.getuid()}-{random}.pid"
        match = lockfile.NAME.fullmatch(name)
        if not match:
            raise JobIdError(job_id)
        self._job_id = match["job_id"]
        self._directory = LockDirectory(directory)
        self._file = OwnFile(directory, name)
        self._phase = Phase.OUT

    @property
    def path(self) -> str:
        """Where the lock file lies."""
        return self._file.path

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lock."""
        return self._phase is Phase.HOLDING

    def acquire(self, *, waits: bool = False) -> list[LockFile]:
        """Make one attempt to take the lock.

        A failed attempt leaves nothing, except the card of a job that will try again.
        This is the job's ticket: it keeps the job's place among those that wait.

        :param waits: whether the job will try again if this attempt fails
        :return: the stale locks that were there; one that could not be removed tells
            why by its ``not_removed``
        :raises LockInTheWayError: when another lock is not stale, or others wait
        :raises DirectoryError: when the system refuses a use of the directory
        """
        self._phase = Phase.TRYING
        guard = Guard(self._directory.path)
        with guard:
            try:
                return self._attempt(guard, waits=waits)
            except BaseException:
                # Before the guard is freed: the file of a failed attempt must not
                # refuse the next contender.
                self._withdraw(waits=waits)
                raise

    def find_leftovers(self, *, tests_only: bool, timeout: float) -> Leftovers:
        """Find the processes that the job has started and that still run.

        :param tests_only: whether nothing but tests counts
        :param timeout: how long that may take, in seconds
        """
        since = card.own_start()
        trace = leftovers.Trace(self._file.name, self._job_id, os.geteuid(), since)
        look = leftovers.Look.take(since, timeout)
        return look.leftovers_of(trace, tests_only=tests_only)

    def release(self) -> None:
        """Remove the lock file; do nothing if the lock is not held.

        :raises FileNotFoundError: when somebody has removed or replaced it before
        :raises OSError: when it cannot be removed
        """
        self._give_back(removes=True)

    def hand_over(self) -> None:
        """Leave the lock file to the leftovers; do nothing if the lock is not held.

        It keeps others out as long as a process runs that this job has started.

        :raises FileNotFoundError: when somebody has removed or replaced it before
        :raises OSError: when the system does not tell
        """
        self._give_back(removes=False)

    def abandon(self) -> None:
        """Make sure that this process neither holds the lock nor waits for it.

        Callers do this last, since Ctrl-C may have cut short any other method.
        """
        if self._phase is Phase.HOLDING:
            with contextlib.suppress(OSError):
                self.hand_over()
        elif self._phase is Phase.TRYING:
            self._withdraw(waits=False)

    # One attempt, step by step.

    def _attempt(self, guard: Guard, *, waits: bool) -> list[LockFile]:
        """Make an attempt; if it fails, the caller removes what it has made."""
        card.make(self.path)
        if waits:
            self._give_way(guard)
        self._file.publish()
        listing, others = self._read_others(guard)
        # From here on the published file keeps others out: the guard is not needed.
        guard.free()
        lockfile.judge_by_leftovers(others, LOOK_TIMEOUT)
        in_the_way = _in_the_way(others)
        if in_the_way:
            raise LockInTheWayError(in_the_way[0])
        _remove(others)
        # The directory is free. But jobs that came before this one go first.
        jobs_before = self._count_before(listing)
        if jobs_before:
            raise LockInTheWayError(None, jobs_before, stale=others)
        marks.set_on_this_process(self._file.name)
        self._phase = Phase.HOLDING
        return others

    def _give_way(self, guard: Guard) -> None:
        """Make no attempt if other jobs wait that came before this one.

        There is one exception: a stale lock that this job can remove. Maybe the jobs
        before it cannot, since they are of another host or user, and would wait for
        ever. Then the attempt is made, and fails only after the removal.

        :param guard: the guard, which is freed while this job looks at processes
        :raises LockInTheWayError: when no attempt is to be made
        """
        listing = self._directory.listing()
        jobs_before = self._count_before(listing)
        if not jobs_before:
            return
        guard.free()
        files = self._directory.read_locks(listing.lock_names)
        lockfile.judge_by_leftovers(files, LOOK_TIMEOUT)
        in_the_way = _in_the_way(files)
        if in_the_way:
            raise LockInTheWayError(in_the_way[0], jobs_before)
        if not any(_can_remove(file) for file in files):
            raise LockInTheWayError(None, jobs_before)
        guard.take()

    def _count_before(self, listing: Listing) -> int:
        """Count the jobs that wait and came before this one."""
        # Every ticket is an orphan. So if there are no orphans, nobody waits.
        own_card = self._own_card() if listing.orphans else None
        if not own_card:
            return 0
        own_turn = Ticket(self._file.name, own_card).turn
        # The time of this attempt, by the clock of the file system.
        tickets = self._directory.tickets(listing, now=own_card.renewed)
        return sum(ticket.turn < own_turn for ticket in tickets)

    def _read_others(self, guard: Guard) -> tuple[Listing, list[LockFile]]:
        """Read the locks of others; return only if all are of jobs that have ended.

        Jobs of several hosts have no common guard. If they start together they may see
        each other, and if each of them gave up, none would get the lock. So the one
        whose lock file is the first by name looks again until the others have given up.

        :param guard: the guard, which is freed between two of these looks
        :return: what is in the directory, and the locks of jobs that have ended
        :raises LockInTheWayError: when another lock is in the way
        """
        deadline = time.monotonic() + RIVAL_TIMEOUT
        while True:
            listing = self._directory.listing()
            # If somebody has removed the new file, others do not see this job.
            if self._file.name not in listing.lock_names:
                raise DirectoryError(Use.WRITE, lockdir.system_error(errno.ENOENT))
            self._directory.remove_litter(listing, self.path)
            names = listing.lock_names - {self._file.name}
            files = self._directory.read_locks(names)
            in_the_way = _in_the_way(files)
            if not in_the_way:
                return listing, files
            goes_first = all(self._goes_before(file) for file in in_the_way)
            if not goes_first or time.monotonic() > deadline:
                raise LockInTheWayError(in_the_way[0])
            # Let other contenders of this host in meanwhile: they are refused at once.
            guard.free()
            time.sleep(RIVAL_PAUSE)
            guard.take()

    def _goes_before(self, file: LockFile) -> bool:
        """Tell whether this job goes before that of a lock file which is in the way.

        It does if they start together on two hosts, and its own name comes first.
        """
        own_card = self._own_card() if file.is_elsewhere else None
        if not file.card or not own_card:
            return False
        distance = abs(file.card.renewed - own_card.renewed)
        return distance < RIVAL_DISTANCE and self._file.name < file.name

    def _own_card(self) -> card.Card | None:
        with contextlib.suppress(OSError):
            return card.read(self.path)
        return None

    # The end of an attempt, and of the lock.

    def _withdraw(self, *, waits: bool) -> None:
        """Remove what an attempt has made; a job that waits keeps its ticket."""
        self._file.withdraw(keeps_card=waits)
        self._drop(Phase.TRYING if waits else Phase.OUT)

    def _give_back(self, *, removes: bool) -> None:
        """Give the lock back, if it is held.

        After Ctrl-C in here it still counts as held, so abandon() hands it over.

        :param removes: whether to remove the file, or to hand it over
        """
        if not self.is_held:
            return
        try:
            self._file.check()
            if removes:
                self._file.remove()
            else:
                self._file.hand_over()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                # The file stays. It must not keep others out only because this process
                # runs on.
                self._file.hand_over()
            self._drop(Phase.OUT)
            raise
        self._drop(Phase.OUT)

    def _drop(self, phase: Phase) -> None:
        """Drop the kernel lock and the mark, and note what this process does now."""
        marks.take_from_this_process(self._file.name)
        self._file.close()
        self._phase = phase


def _in_the_way(files: list[LockFile]) -> list[LockFile]:
    """Return the locks that are in the way; users are told of the first, the worst."""
    in_the_way = [file for file in files if file.state.is_in_the_way]
    return sorted(in_the_way, key=lambda file: file.state)


def _is_to_be_removed(file: LockFile) -> bool:
    """Tell whether a lock is stale, and this job should remove it."""
    # Only its owner and root see whether a guest of its job runs, so they remove it.
    is_for_its_owner = file.leftovers.obstacle is Obstacle.GUESTS_OF_OTHERS
    return file.state is State.STALE and not is_for_its_owner


def _can_remove(file: LockFile) -> bool:
    """Tell whether this job should remove a lock, and the system will let it."""
    # By inode(7) no other user can, if the directory has the sticky bit, as it should.
    is_own = os.geteuid() in (0, file.uid)
    return _is_to_be_removed(file) and is_own


def _remove(stale: list[LockFile]) -> None:
    """Remove stale locks, each with its card; note why one could not be removed."""
    for file in filter(_is_to_be_removed, stale):
        try:
            os.unlink(file.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            file.not_removed = error.strerror or repr(error)
            continue
        card.remove(file.path)
