"""Contenders stepped through their system calls: every schedule with so many preemptions.

A schedule names for each step who of those that can go on makes a call: 0 is who made the one
before if it can. A step is how many could go on, who did, and whether the one before could have.
"""

import contextlib
import itertools
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import greenlet
import pytest
from faults import intercepted, only
from others import job_id, leave_lock, names

from avocado_vt_joblock import lock, lockfile, processes

# What nobody else can tell whether it has been done.
PRIVATE = {"write", "fchmod", "fstat", "read", "readlink", "sleep"}


class Actor(greenlet.greenlet):
    waits = False


def _in_this_thread(target, daemon):
    """A thread that is none: all that an actor does is done in its own greenlet."""
    return SimpleNamespace(start=target, join=lambda timeout: None, is_alive=lambda: False)


def run_schedule(whats, schedule, pids=()):
    """Have actors do something by a schedule, and then whoever can go on; return all steps."""
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        actor = greenlet.getcurrent()
        if name == "sleep" and call.args[0]:
            actor.waits = True
            return director.switch()
        if name not in PRIVATE:
            director.switch()
        if name in ("close", "unlink", "kill"):
            for other in actors:
                other.waits = other.waits and other is actor
        return only([os.getpid(), *pids], call)

    steps, current, looks_in_vain = [], None, 0
    with intercepted(hook), mock.patch.object(threading, "Thread", _in_this_thread):
        for taken in itertools.chain(schedule, itertools.repeat(0)):
            living = [actor for actor in actors if not actor.dead]
            if not living:
                break
            ready = [actor for actor in living if not actor.waits]
            # If there is none time passes, and whoever waits looks again.
            looks_in_vain += not ready
            ready = ready or living
            assert looks_in_vain < 20, "they wait for each other"
            steps.append((len(ready), taken, current in ready))
            current = sorted(ready, key=lambda actor: actor is not current)[taken]
            current.waits = False
            current.switch()
    return steps


def following(steps, preemptions):
    """The schedule after these steps, depth first, with at most so many; None after the last."""
    for position in reversed(range(len(steps))):
        before, (ready, taken, could_go_on) = steps[:position], steps[position]
        spent = sum(could and other > 0 for _, other, could in before)
        if taken + 1 < ready and spent + could_go_on <= preemptions:
            return [other for _, other, _ in before] + [taken + 1]
    return None


class Contender(lock.JobLock):
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
    variables = {processes.VARIABLE: leave_lock(directory).name}
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=variables)
    # It begins without an environment, in the middle of its exec.
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        pass
    whats.append(lambda: (processes.os.kill(process.pid, 9), process.communicate()))
    return whats, [process.pid]


SITUATIONS = [(2, "nothing", (3, 3)), (3, "nothing", (2, 2)), (2, "stale lock", (2, 2))]
SITUATIONS += [(2, "holder releases", (2, 2)), (2, "first one waits", (2, 1))]
SITUATIONS += [(2, "process ends", (1, 1))]


@pytest.mark.parametrize(("count", "what", "preemptions"), SITUATIONS)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(directory, monkeypatch, guard, count, what, preemptions):
    somebody_wins = what not in ("holder releases", "process ends")
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
    if what == "first one waits":
        assert outcomes == {(True, True), (True, False)}
    else:
        assert len({outcome[:2] for outcome in outcomes} & {(True, False), (False, True)}) == 2
        assert ((False,) * count in outcomes) == (not guard or not somebody_wins)
