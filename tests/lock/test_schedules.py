"""Contenders stepped through their system calls: every schedule with so many preemptions."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from others import job_id, leave_lock, names
from schedules import following, run_schedule

from avocado_vt_joblock import lock, lockfile, processes


class Contender(lock.JobLock):
    """A lock that knows whether it was ever held, and how many of all are."""

    holders = 0
    won = False
    stale = ()

    def take(self):
        with contextlib.suppress(lock.LockInTheWayError):
            self.stale = self.acquire()
            self.won = True
            Contender.holders += 1
            assert Contender.holders == 1

    def give_back(self):
        Contender.holders -= self.held
        assert self.release() is None

    def wait_and_take(self):
        while not self.won:
            self.take()
            lock.time.sleep(not self.won)


def prepare(what, directory, contenders):
    """Make the situation; return what all do, and the processes that there are."""
    whats = [contender.take for contender in contenders]
    if what == "stale lock":
        leave_lock(directory)
    if what in ("holder releases", "first one waits"):
        holder = Contender(str(directory), job_id(7))
        holder.take()
        whats.append(holder.give_back)
    if what == "first one waits":
        waiting, other = contenders
        whats[:2] = waiting.wait_and_take, lambda: (other.take(), other.give_back())
    if what != "process ends":
        return whats, []
    # One of a killed job is still there, and ends at any moment.
    variables = {processes.VARIABLE: leave_lock(directory).name}
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=variables)
    # It begins without an environment, in the middle of its exec.
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        pass
    # One system call of what a contender sees.
    whats.append(lambda: (processes.os.kill(process.pid, 9), process.communicate()))
    return whats, [process.pid]


@pytest.mark.parametrize(
    ("count", "what", "preemptions", "somebody_wins"),
    [
        (2, "nothing", (3, 3), True),
        (3, "nothing", (2, 2), True),
        (2, "stale lock", (2, 2), True),
        (2, "holder releases", (2, 2), False),
        (2, "first one waits", (2, 1), True),
        (2, "process ends", (1, 1), False),
    ],
)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(directory, monkeypatch, guard, count, what, preemptions, somebody_wins):
    if not guard:
        monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    # By chance a directory is read in another order, and a schedule would not repeat.
    monkeypatch.setattr(os, "urandom", bytes)
    # Of the locks of this package, as all are, nothing is decided by their PID.
    monkeypatch.setattr(lockfile, "may_have_written", lambda *_, **__: True)
    monkeypatch.setattr(Contender, "holders", 0)
    outcomes, schedule = set(), []
    while schedule is not None:
        contenders = [Contender(str(directory), job_id(number)) for number in range(count)]
        whats, pids = prepare(what, directory, contenders)
        steps = run_schedule(whats, schedule, pids)
        outcome = tuple(contender.won for contender in contenders)
        assert any(outcome) or not (guard and somebody_wins), schedule
        for contender in contenders:
            # What was released is gone, and not stale.
            assert not contender.stale or what in ("stale lock", "process ends")
            contender.give_back()
        for path in directory.iterdir():
            # Where nobody has won nobody has seen that the process has ended.
            assert pids
            path.unlink()
        assert names(directory) == []
        outcomes.add(outcome)
        schedule = following(steps, preemptions[not guard])
    # They were different ones indeed.
    if what == "first one waits":
        assert outcomes == {(True, True), (True, False)}
    else:
        assert len({outcome[:2] for outcome in outcomes} & {(True, False), (False, True)}) == 2
        assert ((False,) * count in outcomes) == (not guard or not somebody_wins)
