"""The mark: an environment variable that all processes of a job have.

A job marks its own process while it holds a lock, and all that it starts inherits that:
the runners, their tests, the guests, and the helpers of these. The variable has the
names of the lock files, with a colon between them. ``env -u AVOCADO_VT_JOBLOCK
COMMAND`` starts a process that is not of the job.
"""

import os
import threading

#: Do not rename it: jobs of other versions look for this name.
VARIABLE = "AVOCADO_VT_JOBLOCK"

# Two threads that change the variable at once would lose one of the changes. It is an
# RLock: Ctrl-C may leave it taken, and the same thread must then be able to take it.
_lock = threading.RLock()


def own() -> set[str]:
    """Return the names of the locks that this process holds or has inherited."""
    return set(os.environ.get(VARIABLE, "").split(":")) - {""}


#: The locks of the jobs that have started this process, directly or not.
INHERITED = own()


def set_on_this_process(lock_name: str) -> None:
    """Mark this process, and so all that it starts from now on."""
    with _lock:
        os.environ[VARIABLE] = ":".join([*own(), lock_name])


def take_from_this_process(lock_name: str) -> None:
    """Take a mark back from this process; what has inherited it keeps it."""
    with _lock:
        others = own() - {lock_name}
        if others:
            os.environ[VARIABLE] = ":".join(others)
        else:
            os.environ.pop(VARIABLE, None)


def found_in(environ: bytes) -> frozenset[str]:
    r"""Return the names of the locks that an environment has.

    :param environ: as /proc shows it:
        b"HOME=/root\0AVOCADO_VT_JOBLOCK=avocado-vt-...\0"
    """
    _, _, rest = (b"\0" + environ).partition(f"\0{VARIABLE}=".encode())
    value = rest.partition(b"\0")[0]
    return frozenset(os.fsdecode(value).split(":")) - {""}
