"""Contenders stepped through their system calls: every schedule with so many preemptions."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from others import job_id, leave_stale_lock, names
from schedules import following, run_schedule

from avocado_vt_joblock import lock, processes
from avocado_vt_joblock.lock import JobLock, LockInTheWayError


class Contender:
    """Takes the lock, and maybe releases it."""

    #: Who holds the lock.
    holders = frozenset()

    def __init__(self, directory, number):
        self.lock = JobLock(str(directory), job_id(number))
        self.won = False

    def acquire(self):
        with contextlib.suppress(LockInTheWayError):
            self.lock.acquire()
            self.won = True
            Contender.holders |= {self}
            assert len(Contender.holders) == 1

    def acquire_and_release(self):
        self.acquire()
        self.release()

    def wait_and_acquire(self):
        while not self.won:
            self.acquire()
            if not self.won:
                lock.time.sleep(1)

    def release(self):
        Contender.holders -= {self}
        assert self.lock.release() is None


class Situation:
    """What there is for contenders for the lock."""

    contenders = 2
    preemptions = 2
    #: The processes that there are.
    pids = ()
    #: Whether, with the guard, one of the contenders wins in any case.
    somebody_wins = True

    def __init__(self, directory):
        self.contenders = [Contender(directory, number) for number in range(self.contenders)]
        self.whats = [contender.acquire for contender in self.contenders]

    def close(self):
        """Release and end what is left."""
        for contender in self.contenders:
            contender.release()


class TwoContenders(Situation):
    preemptions = 3


class ThreeContenders(Situation):
    contenders = 3


class StaleLock(Situation):
    def __init__(self, directory):
        super().__init__(directory)
        leave_stale_lock(directory)


class HolderThatReleases(Situation):
    somebody_wins = False

    def __init__(self, directory):
        super().__init__(directory)
        self.holder = Contender(directory, 3)
        self.holder.acquire()
        self.whats.append(self.holder.release)


class OneThatWaits(HolderThatReleases):
    """The first contender waits for a holder that releases, the second does not wait."""

    somebody_wins = True

    def __init__(self, directory):
        super().__init__(directory)
        first, second = self.contenders
        self.whats[:2] = [first.wait_and_acquire, second.acquire_and_release]


class ProcessThatEnds(Situation):
    """A process of a killed job is still there, and ends at any moment."""

    somebody_wins = False

    def __init__(self, directory):
        super().__init__(directory)
        path = leave_stale_lock(directory)
        variables = {processes.VARIABLE: path.name}
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=variables)
        # It begins without an environment, in the middle of its exec.
        while not Path(f"/proc/{self.process.pid}/environ").read_bytes():
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
            contender.acquire_and_release()


SITUATIONS = [
    TwoContenders,
    ThreeContenders,
    StaleLock,
    HolderThatReleases,
    OneThatWaits,
    ProcessThatEnds,
]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(directory, monkeypatch, guard, situation):
    if not guard:
        monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    # By chance a directory is read in another order, and a schedule would not repeat.
    monkeypatch.setattr(os, "urandom", bytes)
    outcomes = []
    schedule = []
    while schedule is not None:
        there = situation(directory)
        steps = run_schedule(there.whats, schedule, there.pids)
        won = tuple(contender.won for contender in there.contenders)
        there.close()
        assert names(directory) == [], schedule
        if guard and situation.somebody_wins:
            assert any(won), schedule
        outcomes.append(won)
        schedule = following(steps, situation.preemptions)
    print(f"{len(outcomes)} schedules")
    # They were different ones indeed.
    firsts = {won[:2] for won in outcomes}
    if situation is OneThatWaits:
        # Whoever waits has its turn, and the other one has or has not.
        assert firsts == {(True, True), (True, False)}
    else:
        assert {(True, False), (False, True)} <= firsts
        assert ((False,) * len(won) in outcomes) == (not guard or not situation.somebody_wins)
