"""Step contenders through their system calls. ::

    run = run_schedule([first.acquire, second.acquire], schedule=[1, 0, 0])

has two of them make one system call after the other, as the schedule says, and ``following`` makes
the schedule that comes next.
"""

import itertools
import os
import threading
from typing import NamedTuple
from unittest import mock

import greenlet
from faults import intercepted

#: How often actors that all wait may look again in vain.
PATIENCE = 20
# What nobody else can tell whether it has been done.
PRIVATE = {"write", "fchmod", "fstat", "read", "readlink", "sleep"}


class Step(NamedTuple):
    """A step of a schedule: somebody goes on to their next system call."""

    ready: int  # how many could have
    taken: int  # which of them has; 0 is the one that made the step before, if it can
    could_go_on: bool  # whether any other than that one would have been a preemption

    @property
    def is_preemption(self):
        return self.could_go_on and self.taken > 0


class _InThisThread:
    """A thread that is none: all that an actor does is done in its own greenlet."""

    def __init__(self, target, daemon):
        self.start = target

    def join(self, timeout):
        pass

    def is_alive(self):
        return False


class Actor(greenlet.greenlet):
    """Does something one system call at a time, each when it is told to."""

    waits = False


def run_schedule(whats, schedule, pids=()):
    """Have actors do something by a schedule; return its steps.

    :param whats: what each of them does
    :param schedule: who makes each step, as in ``Step.taken``; after its end whoever can go on does
    :param pids: the processes that they see, for those that come and go are in no schedule
    """
    visible = {"self", str(os.getpid()), *map(str, pids)}
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        actor = greenlet.getcurrent()
        if name == "sleep" and call.args[0]:
            # It waits: in vain before somebody else has changed something.
            actor.waits = True
            director.switch()
            return None
        if name not in PRIVATE:
            director.switch()
        if name in ("close", "unlink", "kill"):
            for other in actors:
                other.waits = other.waits and other is actor
        return [entry for entry in call() if entry in visible] if name == "listdir" else call()

    with intercepted(hook), mock.patch.object(threading, "Thread", _InThisThread):
        steps = []
        current = None
        looks_in_vain = 0
        for taken in itertools.chain(schedule, itertools.repeat(0)):
            ready = [actor for actor in actors if not actor.dead and not actor.waits]
            if not ready:
                # Time passes, and whoever waits looks again.
                ready = [actor for actor in actors if not actor.dead]
                looks_in_vain += 1
                assert looks_in_vain < PATIENCE, "they wait for each other"
            if not ready:
                break
            steps.append(Step(len(ready), taken, current in ready))
            current = sorted(ready, key=lambda actor: actor is not current)[taken]
            current.waits = False
            current.switch()
    return steps


def following(steps, preemptions):
    """Make the schedule that comes next, depth first; None after the last one.

    :param steps: the steps of the run before
    :param preemptions: how many of them there may be in a schedule
    """
    for position in reversed(range(len(steps))):
        step = steps[position]
        spent = sum(before.is_preemption for before in steps[:position])
        if step.taken + 1 < step.ready and spent + step.could_go_on <= preemptions:
            return [before.taken for before in steps[:position]] + [step.taken + 1]
    return None
