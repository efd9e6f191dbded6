"""The lock: a file in a directory, held by one job at a time.

It promises, and the earlier wins over the later: exclusion, failing closed, progress,
attempts that are bounded, and no litter. ``docs/promises.rst`` says what that means.

A contender first publishes a lock file of its own and only then looks at the others, so
of two at least one sees the other: that alone keeps exclusion. The guard around both
steps, a flock on the directory, is for progress: without it two might see each other
and both give up. It is free again before anything that can take long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import time
from collections.abc import Iterator

from avocado_vt_joblock import card, leftovers, lockdir, lockfile
from avocado_vt_joblock.leftovers import LOOK_TIMEOUT, Leftovers, Obstacle
from avocado_vt_joblock.lockdir import DirectoryError, LockDirectory, Use, reported_as
from avocado_vt_joblock.lockfile import LockFile, State

#: How long to look again for jobs of other hosts that give way, in seconds.
RIVAL_TIMEOUT = 1.5
#: How far apart two jobs start together, in seconds.
RIVAL_DISTANCE = 2.0
#: How long to wait between two looks, in seconds.
PAUSE = 0.05


class JobIdError(ValueError):
    """The id of a job is not 40 hexadecimal digits: a program has set it."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id


class LockInTheWayError(Exception):
    """The lock could not be taken because of another job.

    :param file: the lock in the way; None where the job only has to wait for its turn
    :param jobs_before: how many jobs wait that came before
    """

    def __init__(self, file: LockFile | None, jobs_before: int = 0) -> None:
        super().__init__(file and file.path)
        self.file = file
        self.jobs_before = jobs_before

    @property
    def may_pass(self) -> bool:
        """Whether it is of use to wait."""
        return self.file is None or self.file.state.may_pass


class WaitedInVainError(LockInTheWayError):
    """The same, after a time for which the job has waited, in seconds."""

    def __init__(self, error: LockInTheWayError, waited: float) -> None:
        super().__init__(error.file, error.jobs_before)
        self.waited = waited


class JobLock:
    """A lock file in a directory in which only one job at a time holds one.

    :param directory: the absolute path of an existing directory
    :param job_id: what the file is named after
    :raises JobIdError: when that is not 40 hexadecimal digits
    """

    def __init__(self, directory: str, job_id: str) -> None:
        chance = os.urandom(4).hex()
        self._name = f"{lockfile.PREFIX}{job_id.lower()}-{os.getuid()}-{chance}.pid"
        match = lockfile.NAME.fullmatch(self._name)
        if not match:
            raise JobIdError(job_id)
        self._job_id = match["job_id"]
        self._directory = LockDirectory(directory)
        self._unpublished = self._directory.join(f".{self._name}")
        self._file: io.FileIO | None = None  # as long as there is one to give up
        self._is_in_line = False  # whether the job waits, and has a ticket
        self.path = self._directory.join(self._name)  # where the lock file lies
        self.held = False  # whether this process holds the lock

    def acquire(self, *, waits: bool = False) -> list[LockFile]:
        """Take the lock, to keep it until it is released or left.

        An attempt that fails removes nothing but what it has made itself.

        :param waits: whether the job comes again, and has its turn after those before
            it
        :return: the stale locks that were there; of some it is told why they still are
        :raises LockInTheWayError: when another lock is not stale, or others wait
        :raises DirectoryError: when the system refuses a use of the directory
        """
        self._is_in_line = waits
        with self._directory.guard() as guard, self._withdrawn_on_error():
            card.make(self.path)
            if waits:
                self._check_turn(self._directory.names())
            self._publish()
            names, others = self._look_at_others(guard)
            # From here on the published file keeps others out, and they fail at once.
            lockdir.free(guard)
            lockfile.judge_by_leftovers(others, LOOK_TIMEOUT)
            in_the_way = [file for file in others if file.state is not State.STALE]
            if in_the_way:
                raise LockInTheWayError(_first(in_the_way))
            self._check_turn(names)
            _remove(others)
            leftovers.mark(self._name)
            self.held = True
            return others

    def find_leftovers(self, *, tests_only: bool, timeout: float) -> Leftovers:
        """Look at what still runs of the job, but for this process.

        :param tests_only: whether nothing else counts
        :param timeout: how long the look may take, in seconds
        """
        since = card.own_start()
        trace = leftovers.Trace(self._name, self._job_id, os.geteuid(), since)
        look = leftovers.Look.take(since, timeout)
        return look.leftovers_of(trace, tests_only=tests_only)

    def release(self) -> None:
        """Remove the lock file; do nothing if the lock is not held.

        :raises FileNotFoundError: when somebody has removed or replaced it before
        :raises OSError: when it cannot be removed
        """
        if not self.held:
            return
        try:
            self._check_file()
            os.unlink(self.path)
        except FileNotFoundError:
            self._close()
            raise
        except OSError:
            # The file stays, but this process does not keep it live.
            card.leave(self.path)
            self._close()
            raise
        card.remove(self.path)
        self._close()

    def leave(self) -> None:
        """Leave the lock file, live as long as anything runs that this job has started.

        It does nothing if the lock is not held.

        :raises FileNotFoundError: when somebody has removed or replaced it before
        """
        if not self.held:
            return
        try:
            self._check_file()
        except FileNotFoundError:
            self._close()
            raise
        except OSError:
            card.leave(self.path)
            self._close()
            raise
        card.leave(self.path)
        self._close()

    def abandon(self) -> None:
        """Leave the lock, or give up the wait for it, whatever came before."""
        if self.held:
            with contextlib.suppress(OSError):
                self.leave()
        elif self._file or self._is_in_line:
            self._is_in_line = False
            self._withdraw()

    @contextlib.contextmanager
    def _withdrawn_on_error(self) -> Iterator[None]:
        """Remove what an attempt has made before the guard is free.

        Nobody shall be refused because of one who gives up.
        """
        try:
            yield
        except BaseException:
            self._withdraw()
            raise

    def _check_turn(self, names: set[str]) -> None:
        """Give up if jobs wait that came before this one."""
        own_card = self._own_card() if lockdir.orphans(names) else None
        if not own_card:
            return
        own_turn = (own_card.came, self._name)
        waiting = self._directory.waiting(names, own_card.renewed)
        before = [ticket for ticket in waiting if ticket.turn < own_turn]
        if before:
            files = self._directory.read_locks(names - {self._name})
            in_the_way = [file for file in files if file.state < State.ENDED]
            file = _first(in_the_way) if in_the_way else None
            raise LockInTheWayError(file, len(before))

    def _publish(self) -> None:
        """Give the lock file its name when it is complete and has its kernel lock."""
        with reported_as(Use.WRITE):
            # Nobody else may open it before the kernel lock is there.
            self._file = io.FileIO(self._unpublished, "x+", opener=_open_private)
        fd = self._file.fileno()
        with reported_as(Use.LOCK):
            lockfile.set_kernel_lock(fd)
        with contextlib.suppress(OSError):
            # systemd-tmpfiles spares a file of which it gets no shared flock. Never
            # LOCK_SH or LOCK_UN: on NFS both lose the kernel lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with reported_as(Use.WRITE):
            text = b"%d\n\n" % os.getpid()
            if os.write(fd, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with contextlib.suppress(OSError):
                # Whatever the umask: everybody may read who holds the lock. That is a
                # courtesy, and CIFS and FUSE may refuse it.
                os.fchmod(fd, 0o644)
            os.rename(self._unpublished, self.path)

    def _look_at_others(self, guard: int) -> tuple[set[str], list[LockFile]]:
        """Read all other locks; return what was listed, and the locks that have ended.

        Jobs that start together on several hosts do not have one guard. So that not all
        of them give up, the first one by name waits for the others to do so.
        """
        deadline = time.monotonic() + RIVAL_TIMEOUT
        while True:
            names = self._directory.names()
            if self._name not in names:
                raise DirectoryError(Use.WRITE, lockdir.gone())
            self._directory.remove_litter(names, self.path)
            files = self._directory.read_locks(names - {self._name})
            in_the_way = [file for file in files if file.state < State.ENDED]
            if not in_the_way:
                return names, files
            is_first = all(self._is_before(file) for file in in_the_way)
            if not is_first or time.monotonic() > deadline:
                raise LockInTheWayError(_first(in_the_way))
            # Others of this host are refused meanwhile, and need not wait for that.
            lockdir.free(guard)
            time.sleep(PAUSE)
            lockdir.take(guard)

    def _is_before(self, file: LockFile) -> bool:
        """Tell whether a job of another host has just started, and gives way."""
        if not file.card or not file.card.is_of_another_host:
            return False
        own_card = self._own_card()
        if not own_card:
            return False
        distance = abs(file.card.renewed - own_card.renewed)
        return distance < RIVAL_DISTANCE and self._name < file.name

    def _own_card(self) -> card.Card | None:
        with contextlib.suppress(OSError):
            return card.read(self.path)
        return None

    def _withdraw(self) -> None:
        """Remove what an attempt has made; who waits keeps a ticket."""
        for path in (self.path, self._unpublished):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._is_in_line:
            card.make(self.path)
        else:
            card.remove(self.path)
        self._close()

    def _check_file(self) -> None:
        if not self._file or self._file.closed:
            raise lockdir.gone()  # To give it up was interrupted, and comes again.
        status = os.fstat(self._file.fileno())
        try:
            is_own = os.path.samestat(os.lstat(self.path), status)
        except FileNotFoundError:
            card.remove(self.path)  # Without its file it is litter.
            raise
        if not is_own:
            raise lockdir.gone()

    def _close(self) -> None:
        """Give up the kernel lock and the mark; to be interrupted does no harm."""
        leftovers.unmark(self._name)
        if self._file:
            with contextlib.suppress(OSError, ValueError):
                # A process that was forked off has the file open, too, maybe for long.
                lockfile.drop_kernel_lock(self._file.fileno())
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        self.held = False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _first(files: list[LockFile]) -> LockFile:
    """Return the one that a user is to be told of."""
    return min(files, key=lambda file: file.state)


def _remove(stale: list[LockFile]) -> None:
    """Remove stale locks, each with its card; note why one could not be removed."""
    for file in stale:
        # Its guests are seen by its owner and by root: only these can tell.
        if file.reason is Obstacle.GUESTS_OF_OTHERS:
            continue
        try:
            os.unlink(file.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            file.not_removed = error.strerror or repr(error)
            continue
        card.remove(file.path)
