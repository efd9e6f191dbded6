"""What one lock does, a second beside it, and what happens to one that is held."""

import fcntl
import os
import re
import signal
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
from others import attempt, contend, leave_lock, lock_path, names, process

from avocado_vt_joblock import lock, lockfile, processes

JOB_ID = "0123456789abcdef0123456789abcdef01234567"


def is_locked(path):
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
    path = rf"{directory}/avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid"
    assert re.fullmatch(path, made.path)
    assert names(directory) == [Path(made.path).name]


@pytest.mark.parametrize("given", ["nightly #7", "../../etc", "0x" + "1" * 38, JOB_ID + "0"])
def test_job_id_that_makes_no_name(directory, given):
    with pytest.raises(ValueError, match=re.escape(given)):
        lock.JobLock(str(directory), given)


def test_second_job_in_the_process(directory, held, new_lock):
    same_id = new_lock(lockfile.LockFile(held.path).job_id)
    with ThreadPoolExecutor() as pool:
        told = pool.submit(contend, same_id).result()
    assert (told.state, told.path) == ("LIVE", held.path)
    assert (told.pid, told.uid, told.pid_is_here) == (os.getpid(), os.getuid(), True)
    assert time.time() - 60 < told.since < time.time() + 1
    assert names(directory) == [Path(held.path).name]


@pytest.mark.parametrize("leave_file", [False, True])
def test_release(directory, new_lock, leave_file):
    made = new_lock()
    assert made.release(leave_file) is None
    for _ in range(2):
        made.acquire()
        assert (made.held, names(directory)) == (True, [Path(made.path).name])
        assert made.release(leave_file) is made.release() is None
        assert (made.held, processes.marks()) == (False, set())
        assert names(directory) == [Path(made.path).name] * leave_file
        assert (attempt(directory).state, names(directory)) == ("WON", [])


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
    path = leave_lock(directory)
    left = path.rename(directory / f".{path.name}").name
    spared = [f".{lock_path(directory, 1).name}", f".{left}", f"{left}.bak"]
    for name in spared:
        path.with_name(name).mkdir()
    # A date that any user can set tells nothing.
    assert (attempt(directory).state, names(directory)) == ("WON", sorted([left, *spared]))
    monkeypatch.setattr(lock, "CRASHED", -1)
    assert (attempt(directory).state, names(directory)) == ("WON", sorted(spared))


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
    inherited = {processes.VARIABLE: f"other:{Path(held.path).name * (state == 'OUTER')}"}
    with process(directory, env={**os.environ, **inherited}) as contender:
        assert (contender.told.state, contender.told.path) == (state, held.path)


def test_forked_child(directory, start):
    script = "import os, sys; from avocado_vt_joblock import lock; "
    script += "lock.JobLock(*sys.argv[1:]).acquire(); os.fork() and os.wait(); " + WAIT
    parent = start(directory, JOB_ID, script=script)
    for is_here in (True, False):
        told = attempt(directory)
        assert (told.state, told.pid, told.pid_is_here) == ("LIVE", parent.pid, is_here)
        os.kill(parent.pid, signal.SIGKILL)
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)


def test_python_that_was_built_against_an_old_c_library(directory):
    script = "import fcntl, runpy, sys; del fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, sys.argv[1:3]; "
    script += f"runpy.run_path({others.__file__!r}, run_name='__main__')"
    old = [sys.executable, "-c", script]
    with process(directory, *old), process(directory, *old) as contender:
        assert contender.told.state == attempt(directory).state == "LIVE"


def test_cleaners_of_tmp_see_that_a_file_is_in_use(held, start):
    """Nobody has either lock any more once it is left, nor does a program that was started."""
    ask = ["flock", "--nonblock", "--shared", held.path, "true"]
    start(close_fds=False)
    assert subprocess.run(ask, check=False).returncode == 1
    held.release(leave_file=True)
    assert subprocess.run(ask, check=False).returncode == 0
    assert not is_locked(held.path)
