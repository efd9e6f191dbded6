"""What one lock does, a second beside it, and what happens to one that is held."""

import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import others
import pytest
from faults import intercepted
from needs import PID_NAMESPACE, needs_pid_namespaces
from others import attempt, contend, leave_stale_lock, names, process

from avocado_vt_joblock import lock as lock_module
from avocado_vt_joblock import lockfile, processes
from avocado_vt_joblock.lock import JobLock

JOB_ID = "0123456789abcdef0123456789abcdef01234567"


def is_locked(path):
    """Whether somebody has the kernel lock on a file."""
    with open(path) as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, lockfile.whole_file(fcntl.F_WRLCK))
    return answer[:2] != lockfile.whole_file(fcntl.F_UNLCK)[:2]


@pytest.mark.parametrize("given", [JOB_ID, JOB_ID.upper()], ids=["lower", "upper"])
def test_file(directory, new_lock, given):
    """It is as avocado-vt knows it, and complete whenever somebody else can see or open it."""
    seen = set()

    def hook(name, call):
        for path in directory.iterdir():
            mode = stat.S_IMODE(path.stat().st_mode)
            if not path.name.startswith("."):
                seen.add((mode, path.read_text(), is_locked(path)))
            elif not is_locked(path):
                assert mode == 0o600
        return call()

    lock = new_lock(given)
    umask = os.umask(0o077)
    try:
        with intercepted(hook):
            lock.acquire()
    finally:
        os.umask(umask)
    assert seen == {(0o644, f"{os.getpid()}\n\n", True)}
    (name,) = names(directory)
    assert re.fullmatch(rf"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid", name)
    assert lock.path == str(directory / name)


@pytest.mark.parametrize("given", ["nightly #7", "../../etc", "0x" + "1" * 38, JOB_ID + "0"])
def test_job_id_that_makes_no_name(directory, given):
    with pytest.raises(ValueError, match=re.escape(given)):
        JobLock(str(directory), given)


def test_held_lock_refuses(directory, new_lock):
    held = new_lock(JOB_ID)
    held.acquire()
    told = attempt(directory)
    assert (told.state, told.path, told.pid) == ("LIVE", held.path, os.getpid())
    assert (told.uid, told.pid_is_here) == (os.getuid(), True)
    assert time.time() - 60 < told.since < time.time() + 1
    # Avocado takes a job id from its user too.
    assert contend(new_lock(JOB_ID)).state == "LIVE"
    assert names(directory) == [Path(held.path).name]


@pytest.mark.parametrize("leave_file", [False, True])
def test_release(directory, new_lock, leave_file):
    lock = new_lock()
    assert lock.release(leave_file) is None
    lock.acquire()
    assert lock.held
    assert lock.release(leave_file) is None
    assert lock.release() is None
    assert not lock.held
    assert names(directory) == [Path(lock.path).name] * leave_file
    assert processes.VARIABLE not in os.environ
    # Nothing of it is left.
    assert attempt(directory).state == "WON"
    assert names(directory) == []
    lock.acquire()
    assert names(directory) == [Path(lock.path).name]


def replace(path):
    path.rename(path.with_name("aside"))
    path.write_text(str(os.getpid()))


def rename_directory(path):
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.mkdir()


@pytest.mark.parametrize("leave_file", [False, True])
@pytest.mark.parametrize("vanish", [os.unlink, replace, rename_directory])
def test_file_that_vanishes(directory, held, vanish, leave_file):
    vanish(Path(held.path))
    before = names(directory)
    assert isinstance(held.release(leave_file), FileNotFoundError)
    assert names(directory) == before
    assert held.release() is None


def test_directories(directory, held, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    assert attempt(tmp_path / "link").path == str(tmp_path / "link" / Path(held.path).name)
    assert attempt(tmp_path).state == "WON"
    (tmp_path / "file").touch()
    for place in (tmp_path / "missing", tmp_path / "file"):
        assert attempt(place).filename == str(place)
    assert names(tmp_path) == ["file", "link"]


def test_what_a_crash_has_left(directory, monkeypatch):
    """An unpublished file is removed when it is too old for a maker that is still at work."""
    path = leave_stale_lock(directory)
    path = path.rename(path.with_name(f".{path.name}"))
    others = [path.with_name(f".{path.name}"), path.with_name(f"{path.name}.bak")]
    for other in others:
        other.touch()
    # A date that any user can set tells nothing.
    assert attempt(directory).state == "WON"
    assert path.exists()
    monkeypatch.setattr(lock_module, "CRASHED", -1)
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted(other.name for other in others)
    path.mkdir()
    assert attempt(directory).state == "WON"
    assert path.exists()


def test_second_job_in_the_process(directory, held):
    """It waits for the first like any other, in a thread as well: it is not inside of it."""
    told = []
    thread = threading.Thread(target=lambda: told.append(attempt(directory)))
    thread.start()
    thread.join()
    assert [(this.state, this.path) for this in told] == [("LIVE", held.path)]
    held.release()
    assert attempt(directory).state == "WON"


def test_marks_of_threads_are_not_lost(monkeypatch):
    monkeypatch.setenv(processes.VARIABLE, "")
    interval = sys.getswitchinterval()

    def edit(name):
        for _ in range(500):
            processes.mark(name)
            processes.unmark(name)
        processes.mark(name)

    threads = [threading.Thread(target=edit, args=(f"name{number}",)) for number in range(8)]
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert processes.marks() == {f"name{number}" for number in range(8)}


@pytest.mark.parametrize("state", ["OUTER", "LIVE"])
def test_job_inside_of_a_job(directory, held, state):
    """A lock whose name the process has inherited: who waits for it waits for ever."""
    inherited = f"other:{Path(held.path).name}" if state == "OUTER" else "other"
    with process(directory, env={**os.environ, processes.VARIABLE: inherited}) as contender:
        assert (contender.told.state, contender.told.path) == (state, held.path)


def test_what_the_process_starts_is_marked(new_lock, held, tmp_path, start):
    def marks_of(popen):
        environ = Path(f"/proc/{popen.pid}/environ").read_text().split("\0")
        return [set(word.split("=")[1].split(":")) for word in environ if "VT_JOBLOCK=" in word]

    other = new_lock(where=tmp_path)
    other.acquire()
    assert marks_of(start()) == [{Path(held.path).name, Path(other.path).name}]
    other.release()
    assert marks_of(start()) == [{Path(held.path).name}]
    held.release(leave_file=True)
    assert marks_of(start()) == []


def test_program_that_is_started_has_no_kernel_lock(directory, held, start):
    start(close_fds=False)
    held.release()
    assert attempt(directory).state == "WON"


CHILD_OUTLIVES = """
import os, sys
from avocado_vt_joblock.lock import JobLock, LockInTheWayError
lock = JobLock(*sys.argv[1:])
lock.acquire()
if os.fork():
    os.wait()
try:
    JobLock(*sys.argv[1:]).acquire()
except LockInTheWayError as error:
    print(error.file.state.name, flush=True)
sys.stdin.read()
"""


def test_forked_child(directory, start):
    """It is of the job: refused as its parent is, and its lock lives on when that is killed."""
    parent = start(directory, JOB_ID, script=CHILD_OUTLIVES)
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
        assert (other.told.state, other.told.pid) == ("LIVE", 1)
        assert not other.told.pid_is_here


def test_released_while_somebody_looks_at_it(directory, held, start):
    """Its file is open there already; what is left on purpose does not count."""
    asked = []

    def hook(name, call):
        if name == "fcntl":
            asked.append(call)
            # The first is for the kernel lock of its own.
            if len(asked) == 2:
                held.release()
        return call()

    start()
    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.stale, held.held) == ("WON", [], False)


def test_python_that_was_built_against_an_old_c_library(directory):
    script = "import fcntl, runpy, sys; del fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, sys.argv[1:3]; "
    script += f"runpy.run_path({others.__file__!r}, run_name='__main__')"
    old = [sys.executable, "-c", script]
    with process(directory, *old) as holder, process(directory, *old) as contender:
        assert (holder.told.state, contender.told.state) == ("WON", "LIVE")
        assert attempt(directory).state == "LIVE"
    assert attempt(directory).state == "WON"


def test_cleaners_of_tmp_see_that_a_file_is_in_use(held):
    ask = ["flock", "--nonblock", "--shared", held.path, "true"]
    assert subprocess.run(ask, check=False).returncode == 1
    assert is_locked(held.path)
    held.release(leave_file=True)
    assert subprocess.run(ask, check=False).returncode == 0
