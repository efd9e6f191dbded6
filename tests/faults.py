"""Stand between the lock and the system: note its calls, stop there, let them fail."""

import contextlib
import fcntl
import functools
import itertools
import os
import time
from types import SimpleNamespace
from unittest import mock

from avocado_vt_joblock import (
    card,
    kernellock,
    leftovers,
    lock,
    lockdir,
    lockfile,
    marks,
    ownfile,
    procfs,
    scan,
)

ROOMS = (
    *(lock, ownfile, lockdir, lockfile, kernellock),
    *(card, leftovers, marks, scan, procfs),
)
# What it does beyond these is to read files of /proc.
CALLS = {
    *("open", "write", "fchmod", "rename", "scandir", "listdir", "fstat", "read"),
    *("close", "unlink", "kill", "lstat", "flock", "fcntl", "sleep"),
    *("symlink", "readlink", "utime", "stat"),
}


def _module(real, hook):
    def hooked(name, call):
        return lambda *args, **options: hook(
            name, functools.partial(call, *args, **options)
        )

    calls = {
        name: hooked(name, call) for name, call in vars(real).items() if name in CALLS
    }
    return SimpleNamespace(**{**vars(real), **calls})


@contextlib.contextmanager
def intercepted(hook):
    """Have a hook be given each system call of the package: its name, what does it."""
    with contextlib.ExitStack() as stack:
        for room, real in itertools.product(ROOMS, (os, fcntl, time)):
            if hasattr(room, real.__name__):
                stack.enter_context(
                    mock.patch.object(room, real.__name__, _module(real, hook))
                )
        yield


def only(pids, call):
    """Do a system call; of the processes, of which others come and go, show these."""
    found = call()
    if call.args == ("/proc",):
        return [name for name in found if name in {"self", *map(str, pids)}]
    return found
