"""Contenders stepped through their system calls: every schedule with few preemptions.

A schedule names for each step who of those that can go on makes a call: 0 is who made
the one before if it can. A step is how many could go on, who did, and whether the one
before could have.
"""

import fcntl
import itertools
import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import greenlet
import pytest
from faults import intercepted, only
from others import job_id, leave_card, leave_lock, names

from avocado_vt_joblock import card, leftovers, lock, lockdir, lockfile, marks, procfs

#: What nobody else can tell whether it has been done. A card is made before the lock
#: that it belongs to can be seen.
PRIVATE = {"write", "fchmod", "fstat", "read", "sleep", "symlink"}
# How often all may wait for each other: as long as the longest of them is willing to.
LOOKS_IN_VAIN = 2 * round(lock.RIVAL_TIMEOUT / lock.RIVAL_PAUSE)


class Actor(greenlet.greenlet):
    waits = False
    identity = None
    own_card = ""


def is_private(actor, name, call):
    if name in ("readlink", "lstat", "stat"):
        # Nobody else changes the card of a job that is at work.
        path = str(call.args[0])
        return path == actor.own_card or path.startswith("/proc/")
    return name in PRIVATE


def may_let_others_go_on(name, call):
    if name == "flock":
        return call.args[1] == fcntl.LOCK_UN
    return name in ("close", "unlink", "kill")


@pytest.fixture
def stage(monkeypatch):
    """The system calls of all actors go through its hook, which a schedule sets."""

    def in_this_thread(target, daemon):
        """A thread that is none: all that an actor does is done in its greenlet."""
        return SimpleNamespace(
            start=target, join=lambda timeout: None, is_alive=lambda: False
        )

    monkeypatch.setattr(threading, "Thread", in_this_thread)
    stage = SimpleNamespace(hook=None)
    # To stand between once is much quicker than to do so for each schedule.

    def hook(name, call):
        return stage.hook(name, call) if stage.hook else call()

    with intercepted(hook):
        yield stage


def run_schedule(stage, whats, schedule, pids=()):
    """Have actors do something by a schedule, and then whoever can go on.

    :return: all steps
    """
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        actor = greenlet.getcurrent()
        if name == "sleep" and call.args[0]:
            actor.waits = True
            run_schedule.now += call.args[0]
            return director.switch()
        if not is_private(actor, name, call):
            director.switch()
        if may_let_others_go_on(name, call):
            for other in actors:
                other.waits = other.waits and other is actor
        return only([os.getpid(), *pids], call)

    stage.hook = hook
    steps, current, looks_in_vain = [], None, 0
    for taken in itertools.chain(schedule, itertools.repeat(0)):
        living = [actor for actor in actors if not actor.dead]
        if not living:
            break
        ready = [actor for actor in living if not actor.waits]
        # If there is none time passes, and whoever waits looks again.
        looks_in_vain += not ready
        ready = ready or living
        assert looks_in_vain < LOOKS_IN_VAIN, "they wait for each other"
        steps.append((len(ready), taken, current in ready))
        current = sorted(ready, key=lambda actor: actor is not current)[taken]
        current.waits = False
        current.switch()
    stage.hook = None
    return steps


def following(steps, preemptions):
    """Return the next schedule, depth first, with at most so many preemptions.

    :return: None after the last one
    """
    taken_before = [taken for _, taken, _ in steps]
    spent = [could_go_on and taken > 0 for _, taken, could_go_on in steps]
    left = preemptions - sum(spent)
    for position in reversed(range(len(steps))):
        ready, taken, could_go_on = steps[position]
        left += spent[position]
        if taken + 1 < ready and could_go_on <= left:
            return [*taken_before[:position], taken + 1]
    return None


class Contender(lock.JobLock):
    holders = 0
    won = False
    stale = ()
    refused_by = None
    identity = card.own_identity()

    def take(self, *, waits=False):
        actor = greenlet.getcurrent()
        actor.identity, actor.own_card = self.identity, card.path_of(self.path)
        try:
            self.stale = self.acquire(waits=waits)
        except lock.LockInTheWayError as error:
            self.refused_by = error.file and error.file.path
            return
        self.won = True
        Contender.holders += 1
        assert Contender.holders == 1

    def give_back(self):
        Contender.holders -= self.is_held
        self.release()
        self.abandon()

    def wait_and_take(self):
        while not self.won:
            self.take(waits=True)
            lock.time.sleep(not self.won)


#: In these another job holds the lock at first.
RELEASES = ("holder releases", "holder releases, no cards", "first one waits")


def prepare(what, directory, contenders):
    whats = [contender.take for contender in contenders]
    if what == "stale lock":
        leave_card(leave_lock(directory))
    if what == "several hosts":
        for number, contender in enumerate(contenders):
            host, boot = f"host{number}", f"boot{number:04}"
            contender.identity = replace(Contender.identity, host=host, boot=boot)
    if what in RELEASES:
        holder = Contender(str(directory), job_id(7))
        holder.take()
        whats.append(holder.give_back)
    if what == "first one waits":
        waiting, other = contenders
        whats[:2] = waiting.wait_and_take, lambda: (other.take(), other.give_back())
    if what != "process ends":
        return whats, []
    variables = {marks.VARIABLE: leave_lock(directory).name}
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=variables)
    # It begins without an environment, in the middle of its exec.
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        pass
    whats.append(lambda: (leftovers.os.kill(process.pid, 9), process.communicate()))
    return whats, [process.pid]


@pytest.fixture(autouse=True)
def nothing_by_chance(monkeypatch):
    """Have a schedule repeat: by chance a directory is read in another order."""
    run_schedule.now = time.monotonic()
    monkeypatch.setattr(os, "urandom", bytes)
    monkeypatch.setattr(time, "monotonic", lambda: run_schedule.now)
    # Of the locks of this package, as all are, nothing is decided by their PID.
    monkeypatch.setattr(lockfile, "_may_be_here", lambda *_, **__: True)
    monkeypatch.setattr(procfs, "ancestors", set)
    monkeypatch.setattr(Contender, "holders", 0)

    def own_identity():
        return getattr(greenlet.getcurrent(), "identity", None) or Contender.identity

    monkeypatch.setattr(card, "own_identity", own_identity)


GUARD, NO_GUARD = True, False
SITUATIONS = [
    (2, "nothing", GUARD, 3),
    (2, "nothing", NO_GUARD, 3),
    (3, "nothing", GUARD, 2),
    (3, "nothing", NO_GUARD, 2),
    (2, "stale lock", GUARD, 2),
    (2, "stale lock", NO_GUARD, 2),
    (2, "holder releases", GUARD, 2),
    (2, "holder releases", NO_GUARD, 1),
    (2, "holder releases, no cards", GUARD, 2),
    (2, "holder releases, no cards", NO_GUARD, 2),
    (2, "first one waits", GUARD, 1),
    (2, "first one waits", NO_GUARD, 1),
    (2, "process ends", GUARD, 1),
    (2, "process ends", NO_GUARD, 1),
    # They have no common one.
    (2, "several hosts", NO_GUARD, 3),
    (3, "several hosts", NO_GUARD, 1),
]


def check_refusals(contenders):
    """Nobody is refused because of one who gives up."""
    winners = {each.path for each in contenders if each.won}
    refusers = {each.refused_by for each in contenders if not each.won}
    # The other one is the holder.
    assert not any(job_id(7) not in path for path in refusers - winners)


def check_rest(directory, what, contenders):
    """What was released is gone, and not stale."""
    has_stale = what in ("stale lock", "process ends")
    for contender in contenders:
        assert has_stale or not contender.stale
        contender.give_back()
    # Where nobody has won nobody has removed what is stale.
    nobody_has_won = not any(contender.won for contender in contenders)
    assert names(directory) == [] or (has_stale and nobody_has_won)
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_every_schedule(directory, stage, monkeypatch, request, situation):
    """With as many preemptions as the situation says; with ``--stress`` one more."""
    count, what, guard, preemptions = situation
    preemptions += request.config.getoption("--stress") > 1
    if what == "holder releases, no cards":
        # A card would show that its process lives, which is this one.
        monkeypatch.setattr(card, "make", lambda path: None)
    if not guard:
        monkeypatch.setattr(lockdir, "GUARD_TIMEOUT", -1)
    outcomes, schedule = set(), []
    while schedule is not None:
        contenders = [Contender(str(directory), job_id(each)) for each in range(count)]
        whats, pids = prepare(what, directory, contenders)
        steps = run_schedule(stage, whats, schedule, pids)
        if guard and what in ("nothing", *RELEASES[:2]):
            check_refusals(contenders)
        outcomes.add(tuple(contender.won for contender in contenders))
        check_rest(directory, what, contenders)
        schedule = following(steps, preemptions)
    if what == "first one waits":
        assert outcomes == {(True, True), (True, False)}
        return
    # Somebody wins but where the lock may be live to the end.
    always_one = guard and what not in (*RELEASES[:2], "process ends")
    always_one = always_one or what == "several hosts"
    assert ((False,) * count in outcomes) == (not always_one)
    of_two = {outcome[:2] for outcome in outcomes}
    assert of_two >= {(True, False), (False, True)}
