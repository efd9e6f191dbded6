"""What one lock does, a second beside it, and what happens to one that is held."""

import errno
import fcntl
import os
import re
import shutil
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
from others import attempt, cards, contend, leave_lock, lock_path, names, process

from avocado_vt_joblock import card, kernellock, lock, lockdir, lockfile, marks

JOB_ID = "0123456789abcdef0123456789abcdef01234567"
ends = pytest.mark.parametrize("end", ["release", "hand_over"])


def is_locked(path):
    question = kernellock._struct_flock(fcntl.F_WRLCK)
    with open(path) as file:
        answer = fcntl.fcntl(file, kernellock._GETLK, question)
    return answer[0] != fcntl.F_UNLCK


@pytest.mark.parametrize("given", [JOB_ID, JOB_ID.upper()], ids=["lower", "upper"])
def test_file(directory, new_lock, given):
    """It is as avocado-vt knows it, and complete whenever somebody else can see or open
    it."""
    seen = set()

    def hook(name, call):
        for path in directory.iterdir():
            if path.is_symlink():
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            if not path.name.startswith("."):
                seen.add((mode, path.read_text(), is_locked(path)))
                assert cards(directory) == [f".{path.name}.host"]
            assert is_locked(path) or mode == 0o600
        return call()

    made = new_lock(given)
    with intercepted(hook):
        made.acquire()
        assert seen == {(0o644, f"{os.getpid()}\n\n", True)}
        assert names(directory) == [Path(made.path).name]
        made.release()
    pattern = rf"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid"
    assert re.fullmatch(rf"{directory}/{pattern}", made.path)
    assert os.listdir(directory) == []


@pytest.mark.parametrize(
    "given", ["nightly #7", "../../etc", "0x" + "1" * 38, JOB_ID + "0"]
)
def test_job_id_that_makes_no_name(directory, given):
    with pytest.raises(lock.JobIdError, match=re.escape(given)):
        lock.JobLock(str(directory), given)


def test_second_job_in_the_process(directory, held, new_lock):
    same_id = new_lock(lockfile.LockFile(held.path).job_id)
    with ThreadPoolExecutor() as pool:
        told = pool.submit(contend, same_id).result()
    assert (told.state, told.path) == ("LIVE", held.path)
    assert (told.pid, told.uid, told.pid_may_be_here) == (
        os.getpid(),
        os.getuid(),
        True,
    )
    assert time.time() - 60 < told.since < time.time() + 1
    assert names(directory) == [Path(held.path).name]


@ends
def test_end(directory, new_lock, end):
    made = new_lock()
    give_up = getattr(made, end)
    give_up()
    for _ in range(2):
        made.acquire()
        assert (made.is_held, names(directory)) == (True, [Path(made.path).name])
        give_up()
        made.release()
        made.hand_over()
        assert (made.is_held, marks.own()) == (False, set())
        stays = end == "hand_over"
        assert names(directory) == [Path(made.path).name] * stays
        assert len(cards(directory)) == stays
        assert attempt(directory).state == "WON"
        assert os.listdir(directory) == []


def test_lock_that_a_job_has_left_after_it_has_waited_stays(
    directory, held, new_lock, start
):
    """Whoever ends a job abandons its lock last of all. What was left for a guest is
    no ticket then."""
    made = new_lock()
    assert contend(made, waits=True).state == "LIVE"
    held.release()
    made.acquire(waits=True)
    guest = start()
    made.hand_over()
    made.abandon()
    assert names(directory) == [Path(made.path).name]
    assert cards(directory) == [f".{Path(made.path).name}.host"]
    told = attempt(directory)
    assert (told.state, told.path, told.pids) == ("LIVE", made.path, {guest.pid})
    guest.kill()
    guest.wait()
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


@pytest.mark.parametrize("waits", [False, True])
def test_lock_that_a_job_abandons_while_it_holds_it_stays(directory, new_lock, waits):
    """It was interrupted: nobody has looked for what is left of it."""
    made = new_lock()
    made.acquire(waits=waits)
    made.abandon()
    made.abandon()
    assert not made.is_held
    assert names(directory) == [Path(made.path).name]
    assert attempt(directory).state == "WON"


@ends
@pytest.mark.parametrize("what", ["removed", "replaced", "directory replaced"])
def test_file_that_vanishes(directory, held, what, end):
    """The job is told, and what is there instead is another's: it stays."""
    place = directory if what == "directory replaced" else Path(held.path)
    place.rename(directory.with_name("aside"))
    if what != "removed":
        place.touch() if place != directory else place.mkdir()
    stay = [] if what == "removed" else sorted(os.listdir(directory))
    with pytest.raises(FileNotFoundError):
        getattr(held, end)()
    assert sorted(os.listdir(directory)) == stay
    getattr(held, end)()
    assert not held.is_held
    # It does not seem to be this job's, which goes on.
    found = card.read(held.path)
    assert found is None or found.is_handed_over


def test_descriptor_that_other_code_has_closed(directory, held, tmp_path):
    """Its number is that of another file now: that is neither asked nor closed."""
    fd = held._file._fd
    os.close(fd)
    with (tmp_path / "other").open("w") as other:
        os.dup2(other.fileno(), fd)
        held.release()
        assert os.listdir(directory) == []
        os.write(fd, b"written")
        os.close(fd)
    assert (tmp_path / "other").read_text() == "written"


def test_file_that_another_client_of_nfs_has_removed(directory, held):
    def hook(name, call):
        if name == "lstat" and call.args[0] == held.path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call()

    Path(held.path).unlink()
    with intercepted(hook), pytest.raises(FileNotFoundError):
        held.hand_over()
    assert os.listdir(directory) == []


def test_what_a_crash_has_left(directory, monkeypatch):
    path = leave_lock(directory)
    left = path.rename(directory / f".{path.name}").name
    spared = [f".{lock_path(directory, 1).name}", f".{left}", f"{left}.bak"]
    for name in spared:
        path.with_name(name).mkdir()
    # A date that any user can set tells nothing.
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted([left, *spared])
    monkeypatch.setattr(lockdir, "LITTER_AGE", -1)
    assert (attempt(directory).state, names(directory)) == ("WON", sorted(spared))


def test_attempt_that_fails_removes_nothing_of_others(directory, held):
    stale = leave_lock(directory)
    assert attempt(directory).path == held.path
    assert stale.exists()
    held.release()
    (removed,) = attempt(directory).stale
    assert (removed.path, removed.not_removed) == (str(stale), "")
    assert os.listdir(directory) == []


def test_guard_is_free_while_the_processes_are_looked_at(directory):
    """That may take seconds. Whoever comes meanwhile is refused at once."""
    leave_lock(directory)
    rivals = []

    def hook(name, call):
        if name == "listdir" and call.args == ("/proc",) and not rivals:
            rivals.append(None)
            began = time.monotonic()
            rivals[0] = attempt(directory)
            assert time.monotonic() - began < lockdir.GUARD_TIMEOUT
        return call()

    # The look is done by another thread, which has its own marks and locks.
    with intercepted(hook):
        assert attempt(directory).state == "WON"
    assert rivals[0].state == "LIVE"


def test_no_look_when_another_lock_is_in_the_way(directory, held):
    leave_lock(directory)
    listed = []

    def hook(name, call):
        if name == "listdir":
            listed.extend(call.args)
        return call()

    with intercepted(hook):
        assert attempt(directory).path == held.path
    assert listed == [str(directory)]


def test_marks_of_threads_are_not_lost(monkeypatch):
    monkeypatch.setenv(marks.VARIABLE, "")
    interval, names = sys.getswitchinterval(), {f"name{number}" for number in range(8)}

    def edit(name):
        for _ in range(500):
            marks.set_on_this_process(name)
            marks.take_from_this_process(name)
        marks.set_on_this_process(name)

    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(edit, names))
    sys.setswitchinterval(interval)
    assert marks.own() == names


@pytest.mark.parametrize("state", ["OUTER", "LIVE"])
def test_job_that_has_the_mark_of_another(directory, state):
    """It was started by that one at some remove: who waits for it waits for ever."""
    with process(directory) as holder:
        name = Path(holder.told.path).name if state == "OUTER" else "one-more"
        inherited = {marks.VARIABLE: f"other:{name}"}
        with process(directory, env={**os.environ, **inherited}) as inner:
            assert (inner.told.state, inner.told.path) == (state, holder.told.path)


CLEAN = [["env", "-i"], ["sh", "-c", 'env -i "$@"; :', "-"], ["setsid", "--wait"]]
if os.getuid() == 0 and shutil.which("sudo"):
    CLEAN.append(["sudo"])


@pytest.mark.parametrize("prefix", CLEAN, ids=" ".join)
def test_job_that_the_holder_has_started_without_its_mark(directory, held, prefix):
    """sudo(8) and "env -i" take the mark away; the parents tell as well."""
    with process(directory, *prefix) as inner:
        assert (inner.told.state, inner.told.path) == ("OUTER", held.path)


HOLDER_THAT_FORKS = f"""
import os, sys
from avocado_vt_joblock import lock
made = lock.JobLock(*sys.argv[1:])
made.acquire()
os.fork() and os.wait()
{WAIT}
"""


def test_forked_child_of_a_holder_that_was_killed(directory, start):
    """It has the file open, and so the kernel lock: nobody can tell what it does."""
    parent = start(directory, JOB_ID, script=HOLDER_THAT_FORKS)
    for is_here in (True, False):
        told = attempt(directory)
        assert (told.state, told.pid) == ("LIVE", parent.pid)
        assert told.pid_may_be_here == is_here
        os.kill(parent.pid, signal.SIGKILL)
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)


@ends
def test_forked_child_of_a_holder_that_has_ended_well(directory, held, end):
    """A pool of workers may live on. Only what is seen of the job keeps its lock live,
    and what has no mark is not of it."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(its)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    getattr(held, end)()
    assert not (os.path.exists(held.path) and is_locked(held.path))
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []
    os.close(its)
    assert os.waitpid(child, 0) == (child, 0)


def test_python_that_was_built_against_an_old_c_library(directory):
    script = f"""
import fcntl, runpy, sys
del fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, sys.argv[1:3]
runpy.run_path({others.__file__!r}, run_name='__main__')
"""
    old = [sys.executable, "-c", script]
    with process(directory, *old), process(directory, *old) as contender:
        assert contender.told.state == attempt(directory).state == "LIVE"


def test_cleaners_of_tmp_see_that_a_file_is_in_use(held, start):
    """Nobody has either lock any more once it is left, nor does a program that was
    started."""
    ask = ["flock", "--nonblock", "--shared", held.path, "true"]
    start(close_fds=False)
    assert subprocess.run(ask, check=False).returncode == 1
    held.hand_over()
    assert subprocess.run(ask, check=False).returncode == 0
    assert not is_locked(held.path)
