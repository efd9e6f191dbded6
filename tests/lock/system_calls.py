"""Stand between the lock and the system: to count its calls, stop at them, or have them fail."""

import contextlib
import fcntl
import functools
import itertools
import os
import time
from pathlib import Path

import greenlet

from avocado_vt_joblock import lock

CALLS = {
    os: [
        "open",
        "write",
        "fchmod",
        "rename",
        "scandir",
        "fstat",
        "read",
        "close",
        "unlink",
        "kill",
        "readlink",
        "lstat",
    ],
    fcntl: ["flock"],
    time: ["sleep"],
}


class _Module:
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
    """Have the lock's system calls go through a hook.

    :param hook: called with the name of the system call and what does and returns it
    """
    for module in CALLS:
        setattr(lock, module.__name__, _Module(module, hook))
    try:
        yield
    finally:
        for module in CALLS:
            setattr(lock, module.__name__, module)


def count(what):
    """The system calls that something makes."""
    calls = []

    def hook(name, call):
        calls.append(name)
        return call()

    with intercepted(hook):
        what()
    return calls


# What no other process can tell whether it has been done, or, of a published file, when.
PRIVATE = {"write", "fchmod", "fstat", "read", "lstat", "readlink"}


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


def run_schedule(whats, prefix):
    """Run actors by a schedule.

    :param whats: what each actor does
    :param prefix: which of the options is taken at each step; the first one after its end
    :return: for each step the number of options, the one taken, and whether another one than the
             first means a preemption; and the exception of each actor, or None
    """
    actors = [Actor(what) for what in whats]
    director = greenlet.getcurrent()

    def hook(name, call):
        if name == "sleep":
            # It polls for the guard: in vain before somebody else has let go of something.
            greenlet.getcurrent().waits = True
            director.switch()
            return None
        if name not in PRIVATE:
            director.switch()
        if name in ("flock", "close"):
            for actor in actors:
                actor.waits = False
        return call()

    with intercepted(hook):
        trace = []
        current = None
        for choice in itertools.chain(prefix, itertools.repeat(0)):
            ready = [actor for actor in actors if not actor.dead and not actor.waits]
            if not ready:
                assert all(actor.dead for actor in actors), "they wait for each other"
                break
            continues = current in ready
            options = sorted(ready, key=lambda actor: actor is not current)
            current = options[choice]
            trace.append((len(options), choice, continues))
            current.switch()
    return trace, [actor.error for actor in actors]


def schedules(preemptions):
    """Go through all schedules with up to so many preemptions, depth first.

    :return: a generator of prefixes for ``run_schedule``, to which its trace is to be sent
    """
    prefix = []
    while True:
        trace = yield prefix
        spent = list(
            itertools.accumulate((cont and choice > 0 for _, choice, cont in trace), initial=0)
        )
        for position in reversed(range(len(trace))):
            options, choice, continues = trace[position]
            if choice + 1 < options and spent[position] + continues <= preemptions:
                prefix = [step[1] for step in trace[:position]] + [choice + 1]
                break
        else:
            return


def descriptors():
    """The open descriptors of this process, with what they refer to."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found
