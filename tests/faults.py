"""Stand between the lock and the system: to note its calls, stop at them, or have them fail."""

import contextlib
import fcntl
import functools
import itertools
import os
import time
from unittest import mock

from avocado_vt_joblock import lock, lockfile, processes

# What it does beyond these is to read files of /proc.
CALLS = {
    *("open", "write", "fchmod", "rename", "scandir", "listdir", "fstat", "read", "close"),
    *("unlink", "kill", "lstat", "flock", "fcntl", "sleep"),
}


class _Module:
    """A module whose system calls go through a hook."""

    def __init__(self, real, hook):
        self._real, self._hook = real, hook

    def __getattr__(self, name):
        value = getattr(self._real, name)
        if name not in CALLS:
            return value
        return lambda *args, **options: self._hook(name, functools.partial(value, *args, **options))


@contextlib.contextmanager
def intercepted(hook):
    """Have the system calls of the package go through a hook.

    :param hook: called with the name of the system call, and with what does and returns it
    """
    with contextlib.ExitStack() as stack:
        for room, real in itertools.product((lock, lockfile, processes), (os, fcntl, time)):
            if hasattr(room, real.__name__):
                module = _Module(real, hook)
                stack.enter_context(mock.patch.object(room, real.__name__, module))
        yield


def only(pids, call):
    """Do a system call; of the processes, of which others come and go, show these."""
    found = call()
    if call.args == ("/proc",):
        return [name for name in found if name in {"self", *map(str, pids)}]
    return found
