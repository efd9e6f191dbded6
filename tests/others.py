"""Lock files and processes of others; as a script it is one that tries to take the lock."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

from avocado_vt_joblock import lock, lockfile, processes

CONTENT = {"this package": b"%d\n\n", "avocado-vt": b"%d"}
AN_HOUR = 3600
_RUN = os.getpid()
_DEAD = subprocess.Popen("true")
_DEAD.wait()


def names(directory):
    return sorted(os.listdir(directory))


def job_id(number):
    return f"{_RUN:032x}{number:08x}"  # no other's of a test run at the same time


def lock_path(directory, number):
    return directory / f"{lockfile.PREFIX}{job_id(number)}-{os.getuid()}-{number:08x}.pid"


def leave_lock(directory, number=0xDEAD, content="this package", pid=None, age=AN_HOUR):
    """Leave a lock file as it is after its maker was killed; a dead one's unless told."""
    path = lock_path(directory, number)
    content = CONTENT.get(content, content)
    path.write_bytes(content % (pid or _DEAD.pid) if b"%" in content else content)
    # By its date it is stale even where a process of today has been given the PID.
    os.utime(path, (time.time() - age,) * 2)
    return path


def contend(contender):
    """Try to take a lock; the state is ``WON``, ``ERROR``, or that of the one in the way."""
    try:
        return SimpleNamespace(state="WON", stale=contender.acquire(), path=contender.path)
    except lock.LockInTheWayError as error:
        file = error.file
        told = {"state": file.state.name, "reason": file.reason and file.reason.name}
        told["pids"] = {process.pid for process in file.processes}
        return SimpleNamespace(**{**vars(file), **told})
    except OSError as error:
        return SimpleNamespace(state="ERROR", errno=error.errno, filename=error.filename)


def attempt(directory):
    contender = lock.JobLock(str(directory), job_id(os.getpid()))
    told = contend(contender)
    contender.release()
    return told


def attempt_as(uid, directory):
    with multiprocessing.get_context("fork").Pool(1, os.setuid, (uid,)) as pool:
        return pool.apply(attempt, (directory,))


@contextlib.contextmanager
def process(directory, *prefix, **options):
    """One that was ``told`` what came of trying to take the lock, and holds it until the end."""
    command = [*prefix, sys.executable, __file__, directory]
    # It is not of a job that holds a lock here.
    options = {"env": {**os.environ, processes.VARIABLE: ""}, **options}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, **options) as popen:
        popen.told = pickle.load(popen.stdout)
        yield popen
        popen.stdin.close()
        popen.stdout.read()


if __name__ == "__main__":
    contender = lock.JobLock(sys.argv[1], job_id(os.getpid()))
    pickle.dump(contend(contender), sys.stdout.buffer)
    sys.stdout.flush()
    sys.stdin.read()
    contender.release()
