"""What one lock does, a second beside it, and what happens to one that is held."""

import fcntl
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import others
import pytest
from faults import intercepted
from needs import PID_NAMESPACE, needs_pid_namespaces
from others import attempt, job_id, kill, leave_stale_lock, names, pids, process

from avocado_vt_joblock import lock as lock_module
from avocado_vt_joblock import lockfile, processes
from avocado_vt_joblock.lock import JobLock

JOB_ID = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def held(new_lock):
    lock = new_lock(JOB_ID)
    lock.acquire()
    return lock


def variable_of(process):
    """What a process has in its environment for the lock."""
    environ = Path(f"/proc/{process.pid}/environ").read_bytes()
    return [word for word in environ.split(b"\0") if word.startswith(b"AVOCADO_VT_JOBLOCK=")]


def is_locked(path):
    """Whether somebody has the kernel lock on a file."""
    with path.open() as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, lockfile.whole_file(fcntl.F_WRLCK))
    return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK


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

    umask = os.umask(0o077)
    try:
        lock = new_lock(given)
        with intercepted(hook):
            lock.acquire()
    finally:
        os.umask(umask)
    assert seen == {(0o644, f"{os.getpid()}\n\n", True)}
    (name,) = names(directory)
    assert re.fullmatch(rf"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid", name)
    assert lock.path == str(directory / name)
    assert int(Path(lock.path).read_text()) == os.getpid()


@pytest.mark.parametrize("given", ["nightly #7", "../../etc", "0x" + "1" * 38, JOB_ID + "0"])
def test_job_id_that_makes_no_name(directory, given):
    with pytest.raises(ValueError, match=re.escape(given)):
        JobLock(str(directory), given)


def test_held_lock_refuses(directory, held, new_lock):
    told = attempt(directory)
    assert (told.state, told.path, told.pid) == ("LIVE", held.path, os.getpid())
    assert told.pid_is_here
    assert told.uid == os.getuid()
    assert time.time() - 60 < told.since < time.time() + 1
    # Avocado takes a job id from its user too.
    with pytest.raises(lock_module.LockInTheWayError):
        new_lock(JOB_ID).acquire()
    assert names(directory) == [Path(held.path).name]
    assert held.release() is None
    assert names(directory) == []
    assert attempt(directory).state == "WON"


@pytest.mark.parametrize("leave_file", [False, True])
def test_release(directory, new_lock, leave_file):
    lock = new_lock()
    assert lock.release(leave_file) is None
    lock.acquire()
    assert lock.held
    for _ in range(2):
        assert lock.release(leave_file) is None
        assert lock.release() is None
    assert not lock.held
    assert [Path(lock.path).name] * leave_file == names(directory)
    assert processes.VARIABLE not in os.environ
    # Nothing of it is left.
    assert attempt(directory).state == "WON"
    assert names(directory) == []
    lock.acquire()
    assert len(names(directory)) == 1


def remove(path):
    path.unlink()


def replace(path):
    path.rename(path.with_name("aside"))
    path.write_text(str(os.getpid()))


def rename_directory(path):
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.mkdir()


@pytest.mark.parametrize("leave_file", [False, True])
@pytest.mark.parametrize("vanish", [remove, replace, rename_directory])
def test_file_that_vanishes(directory, held, vanish, leave_file):
    vanish(Path(held.path))
    before = names(directory)
    assert isinstance(held.release(leave_file), FileNotFoundError)
    assert names(directory) == before
    assert held.release() is None


def test_directories(directory, held, new_lock, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    told = attempt(tmp_path / "link")
    assert told.path == str(tmp_path / "link" / Path(held.path).name)
    assert attempt(tmp_path).state == "WON"
    (tmp_path / "file").touch()
    for place in (tmp_path / "missing", tmp_path / "file"):
        told = attempt(place)
        assert (told.state, told.filename) == ("ERROR", str(place))
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


def test_second_job_in_the_process(directory, held, new_lock):
    """It waits for the first like any other, in a thread as well: it is not inside of it."""
    told = []
    thread = threading.Thread(target=lambda: told.append(attempt(directory)))
    thread.start()
    thread.join()
    assert [(this.state, this.path) for this in told] == [("LIVE", held.path)]
    assert names(directory) == [Path(held.path).name]
    held.release()
    assert attempt(directory).state == "WON"


def test_marks_of_threads_are_not_lost():
    def edit(number):
        name = f"name{number}"
        for _ in range(500):
            processes.mark(name)
            assert name in processes.marks()
            processes.unmark(name)
            assert name not in processes.marks()
        processes.mark(name)

    results = []
    threads = [
        threading.Thread(target=lambda n=number: results.append(edit(n))) for number in range(8)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        marks = processes.marks()
        for name in marks:
            processes.unmark(name)
    assert len(results) == len(marks) == len(threads)
    assert processes.VARIABLE not in os.environ


def test_job_inside_of_a_job(directory, held):
    """A lock whose name the process has inherited: who waits for it waits for ever."""
    inherited = f"some-other:{Path(held.path).name}"
    with process(directory, env={**os.environ, processes.VARIABLE: inherited}) as contender:
        assert (contender.told.state, contender.told.path) == ("OUTER", held.path)
    with process(directory, env={**os.environ, processes.VARIABLE: "some-other"}) as contender:
        assert (contender.told.state, contender.told.path) == ("LIVE", held.path)


def test_what_the_process_starts_is_marked(new_lock, held, tmp_path, start):
    other = new_lock(where=tmp_path)
    other.acquire()
    marks = [Path(lock.path).name for lock in (held, other)]
    assert variable_of(start()) == [b"AVOCADO_VT_JOBLOCK=" + ":".join(sorted(marks)).encode()]
    other.release()
    assert variable_of(start()) == [b"AVOCADO_VT_JOBLOCK=" + marks[0].encode()]
    held.release(leave_file=True)
    assert variable_of(start()) == []


def test_program_that_is_started_has_no_kernel_lock(directory, new_lock, start):
    lock = new_lock()
    lock.acquire()
    start(close_fds=False)
    lock.release()
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


def test_forked_child(directory):
    """It is of the job: refused as its parent is, and its lock lives on when that is killed."""
    command = [sys.executable, "-c", CHILD_OUTLIVES, directory, JOB_ID]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    with subprocess.Popen(command, **pipes) as parent:
        assert parent.stdout.readline() == "LIVE\n"
        told = attempt(directory)
        assert (told.state, told.pid, told.pid_is_here) == ("LIVE", parent.pid, True)
        os.kill(parent.pid, 9)
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        told = attempt(directory)
        assert (told.state, told.pid, told.pid_is_here) == ("LIVE", parent.pid, False)
        assert pids(told) == []
        parent.stdin.close()
        parent.stdout.read()
    assert attempt(directory).state == "WON"


@needs_pid_namespaces
@pytest.mark.parametrize("init", [[], ["sh", "-c", '"$@"; :', "-"]], ids=["itself", "a shell"])
def test_pid_of_another_container(directory, init):
    """There it is 1, which here is another process, maybe the contender."""
    with process(directory, *PID_NAMESPACE), process(directory, *PID_NAMESPACE, *init) as other:
        assert (other.told.state, other.told.pid) == ("LIVE", 1)
        assert not other.told.pid_is_here


def test_killed_holder(directory):
    with process(directory) as holder:
        kill(holder)
        (name,) = names(directory)
        told = attempt(directory)
    assert [(file.path, file.state) for file in told.stale] == [(str(directory / name), "STALE")]
    assert names(directory) == []


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
    script = (
        "import fcntl, runpy, sys\n"
        "del fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK\n"
        "del sys.argv[1:3]\n"
        f"runpy.run_path({others.__file__!r}, run_name='__main__')\n"
    )
    with process(directory, sys.executable, "-c", script) as holder:
        assert holder.told.state == "WON"
        assert attempt(directory).state == "LIVE"
        with process(directory, sys.executable, "-c", script) as contender:
            assert contender.told.state == "LIVE"
    assert attempt(directory).state == "WON"


def test_cleaners_of_tmp_see_that_a_file_is_in_use(directory, new_lock):
    lock = new_lock(job_id(1))
    lock.acquire()
    ask = ["flock", "--nonblock", "--shared", lock.path, "true"]
    assert subprocess.run(ask, check=False).returncode == 1
    assert is_locked(Path(lock.path))
    lock.release(leave_file=True)
    assert subprocess.run(ask, check=False).returncode == 0
