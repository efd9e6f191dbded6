"""The lock: a file in a directory, held by one job at a time.

It promises, in this order of priority: exclusion, to fail closed, progress, attempts
that are bounded, and no litter. ``docs/promises.rst`` says what they mean.

A contender first publishes a lock file of its own and then looks at the others. So of
two contenders at least one sees the other: that alone keeps exclusion. The guard around
both steps, a flock on the directory, is for progress: without it two might see each
other and both give up. It is freed before any step that can take long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import time
from collections.abc import Iterable, Iterator

from avocado_vt_joblock import card, kernellock, leftovers, lockdir, lockfile, marks
from avocado_vt_joblock.leftovers import LOOK_TIMEOUT, Leftovers, Obstacle
from avocado_vt_joblock.lockdir import DirectoryError, LockDirectory, Use, reported_as
from avocado_vt_joblock.lockfile import LockFile, State

#: Jobs of several hosts have started together: how long the first of them waits for the
#: others to give up, in seconds.
RIVAL_TIMEOUT = 1.5
#: Two jobs whose cards are less than so many seconds apart have started together.
RIVAL_DISTANCE = 2.0
#: How long to wait between two of these looks, in seconds.
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


class JobLock:
    """A lock file in a directory in which only one job at a time holds one.

    Who holds a lock has to keep this object: the kernel lock goes with it.

    :param directory: the absolute path of an existing directory
    :param job_id: what the file is named after
    :raises JobIdError: when that is not 40 hexadecimal digits
    """

    def __init__(self, directory: str, job_id: str) -> None:
        random = os.urandom(4).hex()
        self._name = f"{lockfile.PREFIX}{job_id.lower()}-{os.getuid()}-{random}.pid"
        match = lockfile.NAME.fullmatch(self._name)
        if not match:
            raise JobIdError(job_id)
        self._job_id = match["job_id"]
        self._directory = LockDirectory(directory)
        self._unpublished = self._directory.join(f".{self._name}")
        self._file: io.FileIO | None = None  # the open lock file, as long as it is ours
        self._has_ticket = False  # whether the job waits between two attempts
        self.path = self._directory.join(self._name)  # where the lock file lies
        self.is_held = False  # whether this process holds the lock

    def acquire(self, *, waits: bool = False) -> list[LockFile]:
        """Take the lock, to keep it until it is released or left.

        An attempt that meets a lock in its way removes nothing of others. Between two
        attempts of a job that waits its card stays, as its ticket.

        :param waits: whether the job will try again if this attempt fails
        :return: the stale locks that were there; one that could not be removed says why
        :raises LockInTheWayError: when another lock is not stale, or others wait
        :raises DirectoryError: when the system refuses a use of the directory
        """
        self._has_ticket = waits
        with self._directory.guard() as guard, self._withdrawn_on_error():
            card.make(self.path)
            if waits:
                self._give_way(guard)
            self._publish()
            names, others = self._read_others(guard)
            # From here on the published file keeps others out: the guard is not needed.
            lockdir.free_guard(guard)
            lockfile.judge_by_leftovers(others, LOOK_TIMEOUT)
            in_the_way = _in_the_way(others)
            if in_the_way:
                raise LockInTheWayError(in_the_way[0])
            _remove(others)
            jobs_before = self._count_before(names)
            if jobs_before:
                raise LockInTheWayError(None, jobs_before, stale=others)
            marks.set_on_this_process(self._name)
            self.is_held = True
            self._has_ticket = False
            return others

    def find_leftovers(self, *, tests_only: bool, timeout: float) -> Leftovers:
        """Look at what the job has started and still runs.

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
        if self.is_held:
            with self._given_up():
                self._check_file()
                os.unlink(self.path)
                card.remove(self.path)

    def leave(self) -> None:
        """Leave the lock file in place; do nothing if the lock is not held.

        It counts as live while anything runs that this job has started.

        :raises FileNotFoundError: when somebody has removed or replaced it before
        :raises OSError: when the system does not tell
        """
        if self.is_held:
            with self._given_up():
                self._check_file()
                self._hand_over()

    def abandon(self) -> None:
        """Make sure that this process neither holds the lock nor waits for it.

        It comes last, also after Ctrl-C at any moment of the other methods.
        """
        if self.is_held:
            with contextlib.suppress(OSError):
                self.leave()
        elif self._file or self._has_ticket:
            self._has_ticket = False
            self._withdraw()

    @contextlib.contextmanager
    def _withdrawn_on_error(self) -> Iterator[None]:
        """Withdraw what an attempt has made, if it fails.

        As long as this process holds the guard, no contender of this host sees what was
        made and is refused because of it.
        """
        try:
            yield
        except BaseException:
            self._withdraw()
            raise

    @contextlib.contextmanager
    def _given_up(self) -> Iterator[None]:
        """Run the body, then give up the kernel lock, also if the body fails.

        After Ctrl-C in the body abandon() does it.
        """
        try:
            yield
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._hand_over()
            self._close()
            raise
        self._close()

    def _give_way(self, guard: int) -> None:
        """Make no attempt if jobs wait that came before this one.

        But if a lock is stale the attempt is made, and removes it. The jobs before it
        may be of another host or user, unable to tell that, and would wait for ever.

        :param guard: the guard, which is freed while this job looks at processes
        :raises LockInTheWayError: when the job waits on
        """
        names = self._directory.names()
        jobs_before = self._count_before(names)
        if not jobs_before:
            return
        lockdir.free_guard(guard)
        files = self._directory.read_locks(names)
        lockfile.judge_by_leftovers(files, LOOK_TIMEOUT)
        in_the_way = _in_the_way(files)
        if in_the_way:
            raise LockInTheWayError(in_the_way[0], jobs_before)
        if not any(_can_remove(file) for file in files):
            raise LockInTheWayError(None, jobs_before)
        lockdir.take_guard(guard)

    def _count_before(self, names: set[str]) -> int:
        """Count the jobs that wait and came before this one.

        :param names: what lies in the directory
        """
        own_card = self._own_card() if lockdir.orphans(names) else None
        if not own_card:
            return 0
        own_turn = (own_card.came, self._name)
        waiting = self._directory.waiting(names, own_card.renewed)
        return sum(ticket.turn < own_turn for ticket in waiting)

    def _publish(self) -> None:
        """Give the lock file its name when it is complete and has its kernel lock."""
        with reported_as(Use.WRITE):
            if self._has_ticket:
                # An earlier attempt may have failed to remove it.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._unpublished)
            # Nobody else may open it before the kernel lock is there.
            self._file = io.FileIO(self._unpublished, "x+", opener=_open_private)
        fd = self._file.fileno()
        with reported_as(Use.LOCK):
            kernellock.take(fd)
        with contextlib.suppress(OSError):
            # systemd-tmpfiles deletes no file of which it gets no flock. Never use
            # LOCK_SH or LOCK_UN: on NFS both lose the kernel lock.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with reported_as(Use.WRITE):
            text = b"%d\n\n" % os.getpid()
            if os.write(fd, text) < len(text):
                raise lockdir.system_error(errno.ENOSPC)
            with contextlib.suppress(OSError):
                # Whatever the umask: everybody may read who holds the lock. That is a
                # courtesy, and CIFS and FUSE may refuse it.
                os.fchmod(fd, 0o644)
            os.rename(self._unpublished, self.path)

    def _read_others(self, guard: int) -> tuple[set[str], list[LockFile]]:
        """Read the other locks; return what is listed, and the locks of ended jobs.

        Jobs that start together on several hosts have no common guard. If each of them
        gave up because of the others, none would get the lock. So the one whose file
        comes first by name waits until the others have given up.

        :param guard: the guard, which is freed while this job waits
        :raises LockInTheWayError: when a lock is in the way
        """
        deadline = time.monotonic() + RIVAL_TIMEOUT
        while True:
            names = self._directory.names()
            if self._name not in names:
                raise DirectoryError(Use.WRITE, lockdir.system_error(errno.ENOENT))
            self._directory.remove_litter(names, self.path)
            files = self._directory.read_locks(names - {self._name})
            in_the_way = _in_the_way(files)
            if not in_the_way:
                return names, files
            is_first = all(self._comes_before(file) for file in in_the_way)
            if not is_first or time.monotonic() > deadline:
                raise LockInTheWayError(in_the_way[0])
            # Let other contenders of this host in meanwhile: they are refused at once.
            lockdir.free_guard(guard)
            time.sleep(RIVAL_PAUSE)
            lockdir.take_guard(guard)

    def _comes_before(self, file: LockFile) -> bool:
        """Tell whether this job goes first of two that start together on two hosts."""
        own_card = self._own_card() if file.is_elsewhere else None
        if not file.card or not own_card:
            return False
        distance = abs(file.card.renewed - own_card.renewed)
        return distance < RIVAL_DISTANCE and self._name < file.name

    def _own_card(self) -> card.Card | None:
        with contextlib.suppress(OSError):
            return card.read(self.path)
        return None

    def _withdraw(self) -> None:
        """Remove what an attempt has made; a job that waits keeps its ticket."""
        with contextlib.suppress(OSError):
            os.unlink(self._unpublished)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        except OSError:
            # The file stays. It must not seem live for as long as this process runs.
            self._hand_over()
        else:
            if self._has_ticket:
                card.make(self.path)
            else:
                card.remove(self.path)
        self._close()

    def _check_file(self) -> None:
        """Check that the lock file is in place.

        :raises FileNotFoundError: when it is not, or was given up before Ctrl-C
        """
        if not self._file or self._file.closed:
            raise lockdir.system_error(errno.ENOENT)
        status = os.fstat(self._file.fileno())
        try:
            is_own = os.path.samestat(os.lstat(self.path), status)
        except FileNotFoundError:
            card.remove(self.path)  # Without its file it is litter.
            raise
        if not is_own:
            raise lockdir.system_error(errno.ENOENT)

    def _hand_over(self) -> None:
        """Make the file live only while something that the job started still runs."""
        card.leave(self.path)
        if self._file:
            with contextlib.suppress(OSError, ValueError):
                # A process that was forked has the file open, too, maybe for long.
                kernellock.drop(self._file.fileno())

    def _close(self) -> None:
        """Give up the kernel lock and the mark; after Ctrl-C it is called again."""
        marks.take_from_this_process(self._name)
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        self.is_held = False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _in_the_way(files: list[LockFile]) -> list[LockFile]:
    """Return the locks that are in the way; the user is told of the first one."""
    in_the_way = [file for file in files if file.state.is_in_the_way]
    return sorted(in_the_way, key=lambda file: file.state)


def _is_to_be_removed(file: LockFile) -> bool:
    # Only its owner and root see whether a guest of its job runs, so they remove it.
    is_for_others = file.reason is Obstacle.GUESTS_OF_OTHERS
    return file.state is State.STALE and not is_for_others


def _can_remove(file: LockFile) -> bool:
    # By inode(7) another user cannot, where the directory has the sticky bit.
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
