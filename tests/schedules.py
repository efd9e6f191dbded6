"""Step contenders through their system calls, as a schedule says.

It names for each step who of those that can go on makes a call: 0 is the one that made the call
before if it can. A step is how many could go on, who did, and whether the one before could have.
"""

import itertools
import os
import threading
from types import SimpleNamespace
from unittest import mock

import greenlet
from faults import intercepted, only

# What nobody else can tell whether it has been done.
PRIVATE = {"write", "fchmod", "fstat", "read", "readlink", "sleep"}


class Actor(greenlet.greenlet):
    """Does something one system call at a time, each when it is told to."""

    waits = False


def _in_this_thread(target, daemon):
    """A thread that is none: all that an actor does is done in its own greenlet."""
    return SimpleNamespace(start=target, join=lambda timeout: None, is_alive=lambda: False)


def run_schedule(whats, schedule, pids=()):
    """Have actors do something by a schedule, and then whoever can go on; return all steps.

    Of the processes, of which others come and go, they see those with these PIDs.
    """
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        actor = greenlet.getcurrent()
        if name == "sleep" and call.args[0]:
            # It waits: in vain before somebody else has changed something.
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
            if not ready:
                # Time passes, and whoever waits looks again.
                ready = living
                looks_in_vain += 1
                assert looks_in_vain < 20, "they wait for each other"
            steps.append((len(ready), taken, current in ready))
            current = sorted(ready, key=lambda actor: actor is not current)[taken]
            current.waits = False
            current.switch()
    return steps


def following(steps, preemptions):
    """The schedule after the one of these steps, depth first; None after the last one.

    In each one that could go on has to wait so often at most.
    """
    for position in reversed(range(len(steps))):
        before, (ready, taken, could_go_on) = steps[:position], steps[position]
        spent = sum(could and other > 0 for _, other, could in before)
        if taken + 1 < ready and spent + could_go_on <= preemptions:
            return [other for _, other, _ in before] + [taken + 1]
    return None
