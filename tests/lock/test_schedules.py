"""Contenders stepped through their system calls: every schedule with so many preemptions."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from others import job_id, leave_lock, names
from schedules import following, run_schedule

from avocado_vt_joblock import lock, lockfile, processes


class Contender:
    """Takes the lock, and maybe releases it."""

    holders = 0

    def __init__(self, directory, number):
        self.lock = lock.JobLock(str(directory), job_id(number))
        self.won = False

    def acquire(self):
        with contextlib.suppress(lock.LockInTheWayError):
            self.lock.acquire()
            self.won = True
            Contender.holders += 1
            assert Contender.holders == 1

    def acquire_and_release(self):
        self.acquire()
        self.release()

    def wait_and_acquire(self):
        while not self.won:
            self.acquire()
            lock.time.sleep(not self.won)

    def release(self):
        Contender.holders -= self.lock.held
        assert self.lock.release() is None


class Situation:
    """What there is: contenders, and what they and others do; ``pids`` are the processes."""

    pids = ()

    def __init__(self, directory, contenders):
        self.directory = directory
        self.contenders = [Contender(directory, number) for number in range(contenders)]
        self.whats = [contender.acquire for contender in self.contenders]

    def nothing(self):
        pass

    def stale_lock(self):
        leave_lock(self.directory)

    def holder_that_releases(self):
        holder = Contender(self.directory, 7)
        holder.acquire()
        self.whats.append(holder.release)

    def first_one_waits(self):
        """For a holder that releases; the second one does not wait."""
        self.holder_that_releases()
        first, second = self.contenders
        self.whats[:2] = first.wait_and_acquire, second.acquire_and_release

    def process_that_ends(self):
        """One of a killed job is still there, and ends at any moment."""
        variables = {processes.VARIABLE: leave_lock(self.directory).name}
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=variables)
        # It begins without an environment, in the middle of its exec.
        while not Path(f"/proc/{process.pid}/environ").read_bytes():
            pass
        self.pids = [process.pid]
        # One system call of what a contender sees.
        self.whats.append(lambda: (processes.os.kill(process.pid, 9), process.communicate()))


@pytest.mark.parametrize(
    ("contenders", "what", "preemptions", "somebody_wins"),
    [
        (2, Situation.nothing, (3, 3), True),
        (3, Situation.nothing, (2, 2), True),
        (2, Situation.stale_lock, (2, 2), True),
        (2, Situation.holder_that_releases, (2, 2), False),
        (2, Situation.first_one_waits, (2, 1), True),
        (2, Situation.process_that_ends, (1, 1), False),
    ],
)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(
    directory, monkeypatch, guard, contenders, what, preemptions, somebody_wins
):
    if not guard:
        monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    # By chance a directory is read in another order, and a schedule would not repeat.
    monkeypatch.setattr(os, "urandom", bytes)
    # Of the locks of this package, as all are, nothing is decided by their PID.
    monkeypatch.setattr(lockfile, "may_have_written", lambda *_, **__: True)
    monkeypatch.setattr(Contender, "holders", 0)
    outcomes, schedule = set(), []
    while schedule is not None:
        there = Situation(directory, contenders)
        what(there)
        steps = run_schedule(there.whats, schedule, there.pids)
        won = tuple(contender.won for contender in there.contenders)
        assert any(won) or not (guard and somebody_wins), schedule
        for contender in there.contenders:
            contender.release()
        for path in directory.iterdir():
            # Where nobody has won nobody has seen that the process has ended.
            assert there.pids
            path.unlink()
        assert names(directory) == []
        outcomes.add(won)
        schedule = following(steps, preemptions[not guard])
    # They were different ones indeed.
    if what is Situation.first_one_waits:
        assert outcomes == {(True, True), (True, False)}
    else:
        assert len({won[:2] for won in outcomes} & {(True, False), (False, True)}) == 2
        assert ((False,) * contenders in outcomes) == (not guard or not somebody_wins)
