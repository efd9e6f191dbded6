"""Contenders stepped through their system calls: every schedule with so many preemptions."""

import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from holders import leave_stale_lock
from system_calls import following, run_schedule

from avocado_vt_joblock import lock, processes
from avocado_vt_joblock.lock import JobLock, LockHeldError


class Record:
    """How many hold the lock, and how many did at the same time."""

    holders = 0
    most = 0


class Contender:
    """Takes the lock, and maybe releases it."""

    def __init__(self, directory, number, record):
        self.lock = JobLock(str(directory), f"{number:040x}")
        self.record = record
        self.won = False

    def acquire(self):
        with contextlib.suppress(LockHeldError):
            self._acquire()

    def acquire_and_release(self):
        self.acquire()
        self.release()

    def wait_and_acquire(self):
        while not self.won:
            try:
                self._acquire()
            except LockHeldError as error:
                holder = error.holder
                while holder:
                    holder = self.lock.wait(holder, timeout=1000)

    def _acquire(self):
        self.lock.acquire()
        self.won = True
        self.record.holders += 1
        self.record.most = max(self.record.most, self.record.holders)

    def release(self):
        if self.lock.held:
            self.record.holders -= 1
            self.lock.release()


class Situation:
    """What there is beside two contenders for the lock."""

    preemptions = 3
    #: The processes that there are.
    pids = ()
    #: Whether, with the guard, one of the contenders wins in any case.
    somebody_wins = True
    #: Whether, even with the guard, it happens that none of them does.
    nobody_may_win = False

    def __init__(self, directory, record):
        self.contenders = [Contender(directory, number, record) for number in (1, 2)]
        self.whats = [contender.acquire for contender in self.contenders]

    def close(self):
        """Release and end what is left."""
        for contender in self.contenders:
            contender.release()


class Nothing(Situation):
    pass


class StaleLock(Situation):
    preemptions = 2

    def __init__(self, directory, record):
        super().__init__(directory, record)
        leave_stale_lock(directory)


class HolderThatReleases(Situation):
    preemptions = 2
    somebody_wins = False
    nobody_may_win = True

    def __init__(self, directory, record):
        super().__init__(directory, record)
        self.holder = Contender(directory, 3, record)
        self.holder.acquire()
        self.whats.append(self.holder.release)


class OneThatWaits(Situation):
    """The first contender waits for a holder that releases, the second does not wait."""

    preemptions = 2

    def __init__(self, directory, record):
        super().__init__(directory, record)
        self.holder = Contender(directory, 3, record)
        self.holder.acquire()
        first, second = self.contenders
        self.whats = [first.wait_and_acquire, second.acquire_and_release, self.holder.release]


class ProcessThatEnds(Situation):
    """A process of a killed job is still there, and ends at any moment."""

    preemptions = 2
    somebody_wins = False
    nobody_may_win = True

    def __init__(self, directory, record):
        super().__init__(directory, record)
        self.path = leave_stale_lock(directory)
        variable = processes.mark(str(self.path))
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        processes.unmark(variable)
        # It begins without an environment, in the middle of its exec.
        while variable.encode() not in Path(f"/proc/{self.process.pid}/environ").read_bytes():
            pass
        self.pids = [self.process.pid]
        self.whats.append(self.end)

    def end(self):
        # One system call of what a contender sees.
        processes.os.kill(self.process.pid, 9)
        self.process.wait()

    def close(self):
        super().close()
        self.process.stdin.close()
        for contender in self.contenders:
            contender.acquire()
            contender.release()


@contextlib.contextmanager
def new_directory(parent, guard):
    """A lock directory; where there is to be no guard a stranger holds a flock on it."""
    directory = parent / "locks"
    directory.mkdir()
    stranger = os.open(directory, os.O_RDONLY)
    if not guard:
        fcntl.flock(stranger, fcntl.LOCK_EX)
    yield directory
    os.close(stranger)
    directory.rmdir()


@pytest.fixture
def same_names(monkeypatch):
    """By chance a directory is read in another order, and a schedule would not repeat."""

    def name(job_id):
        return f"avocado-vt-joblock-{job_id}-0-{job_id[-8:]}.pid"

    monkeypatch.setattr(lock, "new_name", name)


@pytest.mark.parametrize(
    "situation", [Nothing, StaleLock, HolderThatReleases, OneThatWaits, ProcessThatEnds]
)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(tmp_path, monkeypatch, same_names, guard, situation):
    if not guard:
        monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    outcomes = []
    schedule = []
    while schedule is not None:
        with new_directory(tmp_path, guard) as directory:
            record = Record()
            there = situation(directory, record)
            run = run_schedule(there.whats, schedule, there.pids)
            won = tuple(contender.won for contender in there.contenders)
            there.close()
            assert run.errors == [None] * len(there.whats), schedule
            assert record.most <= 1, schedule
            assert list(directory.iterdir()) == [], schedule
        if guard and situation.somebody_wins:
            assert any(won), schedule
        outcomes.append(won)
        schedule = following(run.steps, situation.preemptions)
    print(f"{len(outcomes)} schedules")
    if situation is OneThatWaits:
        # Whoever waits has its turn, and the other one has or has not.
        assert set(outcomes) == {(True, True), (True, False)}
    else:
        # They were different ones indeed.
        assert {(True, False), (False, True)} <= set(outcomes)
        if not guard or situation.nobody_may_win:
            assert (False, False) in outcomes
