"""Stand between the lock and the system: to count its calls, stop at them, or have them fail.

``count(lock.acquire)`` lists the system calls that taking a lock makes. ::

    with intercepted(at_call(3, lambda name, call: os._exit(1))):
        lock.acquire()

dies at the fourth. And ::

    run = run_schedule([first.acquire, second.acquire], schedule=[1, 0, 0])

has two contenders make one system call after the other, as the schedule says.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import greenlet

from avocado_vt_joblock import lock, lockfile, processes

# What it does beyond these is to read files of /proc.
CALLS = {
    os: {
        "open",
        "write",
        "fchmod",
        "rename",
        "scandir",
        "listdir",
        "stat",
        "fstat",
        "read",
        "close",
        "unlink",
        "kill",
        "readlink",
        "lstat",
    },
    fcntl: {"flock", "fcntl"},
    time: {"sleep"},
}
#: How often actors that all wait may look again in vain.
PATIENCE = 20
# What nobody else can tell whether it has been done, or, of a published file, when.
PRIVATE = {"write", "fchmod", "fstat", "read", "lstat", "readlink"}


class _Module:
    """A module whose system calls go through a hook."""

    def __init__(self, real, hook):
        self._real = real
        self._hook = hook

    def __getattr__(self, name):
        value = getattr(self._real, name)
        if name in CALLS[self._real]:
            return functools.partial(self._call, name, value)
        return value

    def _call(self, name, function, *arguments, **options):
        return self._hook(name, functools.partial(function, *arguments, **options))


@contextlib.contextmanager
def intercepted(hook):
    """Have the system calls of the package go through a hook.

    :param hook: called with the name of the system call, and with what does and returns it
    """
    replaced = [
        (room, module)
        for room in (lock, lockfile, processes)
        for module in CALLS
        if hasattr(room, module.__name__)
    ]
    for room, module in replaced:
        setattr(room, module.__name__, _Module(module, hook))
    try:
        yield
    finally:
        for room, module in replaced:
            setattr(room, module.__name__, module)


def count(what):
    """The names of the system calls that something makes."""
    calls = []

    def hook(name, call):
        calls.append(name)
        return _alone(name, call)

    with intercepted(hook):
        what()
    return calls


def _alone(name, call):
    """Do a system call; other processes than this one come and go, and are not shown."""
    return [str(os.getpid())] if name == "listdir" else call()


def at_call(number, instead):
    """Make a hook that has one system call done in another way.

    :param number: which one, from 0 on
    :param instead: called as a hook is
    """
    numbers = itertools.count()

    def hook(name, call):
        return instead(name, call) if next(numbers) == number else _alone(name, call)

    return hook


class Step(NamedTuple):
    """A step of a schedule: somebody goes on to their next system call."""

    #: How many could have.
    ready: int
    #: Which of them has, from 0 on; the first is the one that made the step before, if it can.
    taken: int
    #: Whether any other than the first one would have been a preemption.
    could_go_on: bool

    @property
    def is_preemption(self):
        return self.could_go_on and self.taken > 0


class Run(NamedTuple):
    """What came of a schedule."""

    steps: list
    #: What each actor has raised, or None.
    errors: list


class _InThisThread:
    """A thread that is none: all that an actor does is done in its own greenlet."""

    def __init__(self, target, daemon):
        self.start = target

    def join(self, timeout):
        pass


class Actor(greenlet.greenlet):
    """Does something one system call at a time, each when it is told to."""

    waits = False
    error = None

    def __init__(self, what):
        super().__init__(self._run)
        self.what = what

    def _run(self):
        try:
            self.what()
        except Exception as error:
            self.error = error


def run_schedule(whats, schedule, pids=()):
    """Have actors do something by a schedule.

    :param whats: what each of them does
    :param schedule: who makes each step, as in ``Step.taken``; after its end whoever can go on does
    :param pids: the processes that they see, for those that come and go are in no schedule
    """
    visible = {"self", str(os.getpid()), *map(str, pids)}
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        actor = greenlet.getcurrent()
        if name == "sleep":
            # It waits: in vain before somebody else has changed something.
            actor.waits = True
            director.switch()
            return None
        if name not in PRIVATE:
            director.switch()
        if name in ("flock", "close", "unlink", "kill"):
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
    return Run(steps, [actor.error for actor in actors])


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


def descriptors():
    """The open descriptors of this process, with what they refer to."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found
