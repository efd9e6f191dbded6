"""Lock files of other processes, live and dead.

As a script ``holders.py DIRECTORY`` is such a process: it tries to take the lock, prints what came
of it as JSON, and holds the lock until its standard input ends. With ``holders.py DIRECTORY
COMMAND...`` it starts that command, in a session of its own as avocado-vt's tests start guests,
when it has the lock.
"""

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import time

from avocado_vt_joblock.lock import JobLock, LockError, LockHeldError

CONTENT = {"this package": b"%d\n\n", "avocado-vt": b"%d"}
AN_HOUR = 3600

_RUN = os.getpid()


class _Texts(logging.Handler):
    def __init__(self, level):
        super().__init__(level)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def logged(level=logging.WARNING):
    """Collect what the package logs."""
    handler = _Texts(level)
    logger = logging.getLogger("avocado_vt_joblock")
    logger.addHandler(handler)
    logger.setLevel(level)
    yield handler.texts
    logger.removeHandler(handler)


def names(directory):
    """The names of the files in a directory."""
    return sorted(path.name for path in directory.iterdir())


def job_id(number):
    """The id of a job, which is no other's of a test run at the same time."""
    return f"{_RUN:032x}{number:08x}"


def lock_path(directory, number, uid=None):
    """Where a job's lock file lies."""
    uid = os.getuid() if uid is None else uid
    return directory / f"avocado-vt-joblock-{job_id(number)}-{uid}-{number:08x}.pid"


def dead_pid():
    """The PID of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# One for all lock files, since a process for each takes long.
_same_dead_pid = functools.cache(dead_pid)


def leave_stale_lock(directory, number=0xDEAD, maker="this package", pid=None):
    """Leave a lock file as it is after its maker was killed; a dead one's unless told."""
    if pid is None:
        pid = _same_dead_pid()
    path = lock_path(directory, number)
    path.write_bytes(CONTENT[maker] % pid)
    # By its date it is stale even where a process of today has been given the PID.
    date_back(path, AN_HOUR)
    return path


def date_back(path, seconds):
    """Have a file look as if it was written earlier."""
    when = time.time() - seconds
    os.utime(path, (when, when))


def attempt(directory):
    """Try to take the lock; return it if so, and what came of it."""
    lock = JobLock(str(directory), f"{os.getpid():040x}")
    with logged() as warnings:
        try:
            lock.acquire()
        except LockHeldError as error:
            return None, {"held": error.holder._asdict()}
        except LockError as error:
            return None, {"error": str(error)}
    return lock, {"won": lock.path, "warnings": warnings}


def as_user(uid, what):
    """Return what something returns that is called as another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(writer, json.dumps(what()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def attempt_as(uid, directory):
    """Try to take the lock as another user, and return what came of it."""

    def what():
        lock, outcome = attempt(directory)
        if lock:
            lock.release()
        return outcome

    return as_user(uid, what)


class Process:
    """A process that tries to take the lock and then holds it.

    :param prefix: a command to run it by
    :param starts: a command that it starts
    :ivar outcome: what came of it, as ``attempt`` returns it
    """

    def __init__(self, directory, *prefix, starts=(), **options):
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, __file__, directory, *starts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        line = self.popen.stdout.readline()
        if not line:
            self.release()
            raise AssertionError(f"{self.popen.args} exited with {self.popen.returncode}")
        self.outcome = json.loads(line)

    def release(self):
        """Have it release the lock, or end without it."""
        self.popen.communicate()

    def kill(self):
        """Kill the process that holds the lock, and wait until it is gone."""
        self.popen.kill()
        # Of a prefix the child is the one, and ends later.
        self.popen.stdout.read()
        self.release()


@contextlib.contextmanager
def process(directory, *prefix, **options):
    """A ``Process`` that is ended in the end."""
    made = Process(directory, *prefix, **options)
    try:
        yield made
    finally:
        made.release()


def main(directory, *starts):
    lock, outcome = attempt(directory)
    if starts:
        guest = subprocess.Popen(
            starts, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        outcome["guest"] = guest.pid
    print(json.dumps(outcome), flush=True)
    sys.stdin.read()
    if lock:
        lock.release()


if __name__ == "__main__":
    main(*sys.argv[1:])
