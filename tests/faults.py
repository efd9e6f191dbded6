"""Stand between the lock and the system: to count its calls, stop at them, or have them fail.

``count(lock.acquire)`` lists the system calls that taking a lock makes. ::

    with intercepted(at_call(3, lambda name, call: os._exit(1))):
        lock.acquire()

dies at the fourth.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import time
from pathlib import Path

from avocado_vt_joblock import lock, lockfile, processes

# What it does beyond these is to read files of /proc.
CALLS = {
    os: {
        *("open", "write", "fchmod", "rename", "scandir", "listdir", "fstat"),
        *("read", "close", "unlink", "kill", "readlink", "lstat"),
    },
    fcntl: {"flock", "fcntl"},
    time: {"sleep"},
}


class _Module:
    """A module whose system calls go through a hook."""

    def __init__(self, real, hook):
        self._real = real
        self._hook = hook

    def __getattr__(self, name):
        value = getattr(self._real, name)
        if name in CALLS[self._real]:
            return lambda *args, **options: self._hook(
                name, functools.partial(value, *args, **options)
            )
        return value


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


def at_call(number, instead):
    """Make a hook that has one system call done in another way.

    :param number: which one, from 0 on
    :param instead: called as a hook is
    """
    numbers = itertools.count()

    def hook(name, call):
        return instead(name, call) if next(numbers) == number else _alone(name, call)

    return hook


def _alone(name, call):
    """Do a system call; other processes than this one come and go, and are not shown."""
    return [str(os.getpid())] if name == "listdir" else call()


def descriptors():
    """The open descriptors of this process, with what they refer to."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = os.readlink(entry)
    return found
