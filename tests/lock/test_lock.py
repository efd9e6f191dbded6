"""What one lock does, a second beside it, and what happens to one that is held."""

import fcntl
import os
import re
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import others
import pytest
from conftest import WAIT
from faults import intercepted
from needs import PID_NAMESPACE, needs_pid_namespaces
from others import attempt, contend, leave_lock, lock_path, names, process

from avocado_vt_joblock import lock, lockfile, processes

JOB_ID = "0123456789abcdef0123456789abcdef01234567"


def is_locked(path):
    """Whether somebody has the kernel lock on a file."""
    with open(path) as file:
        answer = fcntl.fcntl(file, lockfile.GETLK, lockfile.struct_flock(fcntl.F_WRLCK))
    return answer[0] != fcntl.F_UNLCK


@pytest.mark.parametrize("given", [JOB_ID, JOB_ID.upper()], ids=["lower", "upper"])
def test_file(directory, new_lock, given):
    """It is as avocado-vt knows it, and complete whenever somebody else can see or open it."""
    seen = set()

    def hook(name, call):
        for path in directory.iterdir():
            mode = stat.S_IMODE(path.stat().st_mode)
            if not path.name.startswith("."):
                seen.add((mode, path.read_text(), is_locked(path)))
            assert is_locked(path) or mode == 0o600
        return call()

    made = new_lock(given)
    with intercepted(hook):
        made.acquire()
    assert seen == {(0o644, f"{os.getpid()}\n\n", True)}
    (name,) = names(directory)
    assert re.fullmatch(rf"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid", name)
    assert made.path == str(directory / name)


@pytest.mark.parametrize("given", ["nightly #7", "../../etc", "0x" + "1" * 38, JOB_ID + "0"])
def test_job_id_that_makes_no_name(directory, given):
    with pytest.raises(ValueError, match=re.escape(given)):
        lock.JobLock(str(directory), given)


def test_second_job_in_the_process(directory, held, new_lock):
    """It is refused like any other, in a thread as well: it is not inside of the first."""
    # Avocado takes a job id from its user, too.
    same_id = new_lock(lockfile.LockFile(held.path).job_id)
    with ThreadPoolExecutor() as pool:
        told = pool.submit(contend, same_id).result()
    assert (told.state, told.path, told.pid) == ("LIVE", held.path, os.getpid())
    assert (told.uid, told.pid_is_here) == (os.getuid(), True)
    assert time.time() - 60 < told.since < time.time() + 1
    assert names(directory) == [Path(held.path).name]


@pytest.mark.parametrize("leave_file", [False, True])
def test_release(directory, new_lock, leave_file):
    made = new_lock()
    assert made.release(leave_file) is None
    # Again, once nothing of it is left.
    for _ in range(2):
        made.acquire()
        assert made.held
        assert names(directory) == [Path(made.path).name]
        assert made.release(leave_file) is None
        assert made.release() is None
        assert not made.held
        assert not processes.marks()
        assert names(directory) == [Path(made.path).name] * leave_file
        assert attempt(directory).state == "WON"
        assert names(directory) == []


@pytest.mark.parametrize("leave_file", [False, True])
@pytest.mark.parametrize("what", ["removed", "replaced", "directory replaced"])
def test_file_that_vanishes(directory, held, what, leave_file):
    place = directory if what == "directory replaced" else Path(held.path)
    place.rename(directory.with_name("aside"))
    if what != "removed":
        place.touch() if place != directory else place.mkdir()
    before = names(directory)
    assert isinstance(held.release(leave_file), FileNotFoundError)
    assert names(directory) == before
    assert held.release() is None


def test_what_a_crash_has_left(directory, monkeypatch):
    """An unpublished file is removed when it is too old for a maker that is still at work."""
    path = leave_lock(directory)
    left, directory_like_it = f".{path.name}", f".{lock_path(directory, 1).name}"
    spared = [directory_like_it, f"..{path.name}", f".{path.name}.bak"]
    path.rename(directory / left)
    for name in spared:
        path.with_name(name).mkdir()
    # A date that any user can set tells nothing.
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted([left, *spared])
    monkeypatch.setattr(lock, "CRASHED", -1)
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted(spared)


def test_marks_of_threads_are_not_lost(monkeypatch):
    monkeypatch.setenv(processes.VARIABLE, "")
    interval, names = sys.getswitchinterval(), {f"name{number}" for number in range(8)}

    def edit(name):
        for _ in range(500):
            processes.mark(name)
            processes.unmark(name)
        processes.mark(name)

    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(edit, names))
    sys.setswitchinterval(interval)
    assert processes.marks() == names


@pytest.mark.parametrize("state", ["OUTER", "LIVE"])
def test_job_inside_of_a_job(directory, held, state):
    """A lock whose name the process has inherited: who waits for it waits for ever."""
    inherited = f"other:{Path(held.path).name}" if state == "OUTER" else "other"
    with process(directory, env={**os.environ, processes.VARIABLE: inherited}) as contender:
        assert (contender.told.state, contender.told.path) == (state, held.path)


def test_program_that_is_started_has_no_kernel_lock(directory, held, start):
    start(close_fds=False)
    held.release(leave_file=True)
    assert not is_locked(held.path)


def test_forked_child(directory, start):
    """It is of the job: the lock lives on in it when its parent is killed."""
    script = "import os, sys; from avocado_vt_joblock import lock; "
    script += "lock.JobLock(*sys.argv[1:]).acquire(); os.fork() and os.wait(); " + WAIT
    parent = start(directory, JOB_ID, script=script)
    told = attempt(directory)
    assert (told.state, told.pid, told.pid_is_here) == ("LIVE", parent.pid, True)
    parent.kill()
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
    told = attempt(directory)
    assert (told.state, told.pid, told.pid_is_here) == ("LIVE", parent.pid, False)


@needs_pid_namespaces
@pytest.mark.parametrize("init", [[], ["sh", "-c", '"$@"; :', "-"]], ids=["itself", "a shell"])
def test_pid_of_another_container(directory, init):
    """There it is 1, which here is another process, maybe the contender."""
    with process(directory, *PID_NAMESPACE), process(directory, *PID_NAMESPACE, *init) as other:
        assert (other.told.state, other.told.pid, other.told.pid_is_here) == ("LIVE", 1, False)


def test_python_that_was_built_against_an_old_c_library(directory):
    script = "import fcntl, runpy, sys; del fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, sys.argv[1:3]; "
    script += f"runpy.run_path({others.__file__!r}, run_name='__main__')"
    old = [sys.executable, "-c", script]
    with process(directory, *old), process(directory, *old) as contender:
        assert contender.told.state == attempt(directory).state == "LIVE"


def test_cleaners_of_tmp_see_that_a_file_is_in_use(held):
    ask = ["flock", "--nonblock", "--shared", held.path, "true"]
    assert subprocess.run(ask, check=False).returncode == 1
    held.release(leave_file=True)
    assert subprocess.run(ask, check=False).returncode == 0
