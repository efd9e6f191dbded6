"""Lock files and processes of others; as a script it is a job that tries its luck."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

from avocado_vt_joblock import card, lock, lockdir, lockfile, marks

CONTENT = {"this package": b"%d\n\n", "avocado-vt": b"%d"}
AN_HOUR = 3600
_RUN = os.getpid()
_DEAD = subprocess.Popen("true")
_DEAD.wait()


def cards(directory):
    """List the cards in a directory."""
    return sorted(name for name in os.listdir(directory) if name.endswith(".host"))


def names(directory):
    """List what is in a directory, but for the card of a lock that is there, too."""
    listed = set(os.listdir(directory))
    return sorted(listed - {f".{name}.host" for name in listed})


def job_id(number):
    return f"{_RUN:032x}{number:08x}"  # no other's of a test run at the same time


def lock_path(directory, number):
    name = f"{lockfile.PREFIX}{job_id(number)}-{os.getuid()}-{number:08x}.pid"
    return directory / name


def leave_lock(directory, number=0xDEAD, content="this package", pid=None, age=AN_HOUR):
    """Leave a lock file as it is after its maker was killed, without a card.

    The PID is the one of a process that has ended, unless another one is told.
    """
    path = lock_path(directory, number)
    content = CONTENT.get(content, content)
    path.write_bytes(content % (pid or _DEAD.pid) if b"%" in content else content)
    # By its date it is stale even where a process of today has been given the PID.
    os.utime(path, (time.time() - age,) * 2)
    return path


def card_path(path):
    return path.with_name(f".{path.name}.host")


def leave_card(path, text=None, *, uid=None, **fields):
    """Leave a card beside a lock file; that of a process here which has ended.

    :param path: where the lock file lies, or would lie
    :param text: the whole target of the link
    :param uid: who owns the link, if that is another user
    :param fields: those that are to be different: host, boot, pid_namespace, pid,
        started
    """
    ours = vars(card.own_identity())
    its = {**ours, "pid": _DEAD.pid, "started": ours["started"], **fields}
    text = text or "{host} {boot} {pid_namespace} {pid} {started}".format(**its)
    link = card_path(path)
    link.unlink(missing_ok=True)
    os.symlink(text, link)
    if uid is not None:
        os.lchown(link, uid, uid)
    return link


def contend(contender, *, waits=False):
    """Try to take a lock, and tell what came of it.

    The state is ``WON``, that of the lock in the way, ``NOT_YET`` where others wait for
    a free lock, or ``ERROR`` for an error of the directory.
    """
    try:
        stale = contender.acquire(waits=waits)
    except lock.LockInTheWayError as error:
        file = error.file
        if not file:
            return SimpleNamespace(state="NOT_YET", jobs_before=error.jobs_before)
        reason = file.flaw or file.leftovers.obstacle
        told = {"state": file.state.name, "reason": reason and reason.name}
        told["detail"] = file.flaw_detail or file.leftovers.detail
        told["processes"] = file.leftovers.processes
        told["pids"] = {process.pid for process in file.leftovers.processes}
        return SimpleNamespace(**{**vars(file), **told})
    except lockdir.DirectoryError as error:
        return SimpleNamespace(
            state="ERROR", use=error.use.name, errno=error.error.errno
        )
    return SimpleNamespace(state="WON", stale=stale, path=contender.path)


def attempt(directory):
    """Try once to take the lock, and give it back."""
    contender = lock.JobLock(str(directory), job_id(os.getpid()))
    told = contend(contender)
    contender.release()
    return told


def attempt_as(uid, directory):
    """Do the same as another user."""
    with multiprocessing.get_context("fork").Pool(1, os.setuid, (uid,)) as pool:
        return pool.apply(attempt, (directory,))


@contextlib.contextmanager
def process(directory, *prefix, **options):
    """Start a job, which was ``told`` what came of trying to take the lock.

    It holds the lock until the end.
    """
    command = [*prefix, sys.executable, __file__, directory]
    # It is not of a job that holds a lock here.
    options = {"env": {**os.environ, marks.VARIABLE: ""}, **options}
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
