"""What happens to a lock that is held: to its file, its directory and its process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from holders import attempt, process
from system_calls import at_call, count, descriptors, intercepted

from avocado_vt_joblock.lock import LockHeldError

BROKEN = "was removed or replaced while the job ran"


@pytest.fixture
def held(new_lock):
    lock = new_lock()
    lock.acquire()
    return lock


def test_file_is_removed(directory, held, new_lock, warnings):
    Path(held.path).unlink()
    other = new_lock()
    other.acquire()
    held.release()
    assert [BROKEN in text and held.path in text for text in warnings] == [True]
    assert list(directory.iterdir()) == [Path(other.path)]
    held.release()
    assert len(warnings) == 1


def test_file_is_replaced(held, warnings):
    path = Path(held.path)
    path.rename(path.with_name("aside"))
    path.write_text(str(os.getpid()))
    held.release()
    assert [BROKEN in text for text in warnings] == [True]


def test_directory_is_renamed(directory, held, warnings):
    aside = directory.rename(directory.with_name("aside"))
    directory.mkdir()
    held.release()
    assert [BROKEN in text for text in warnings] == [True]
    assert list(aside.iterdir()) == []


def test_directory_is_removed(directory, held, warnings):
    Path(held.path).unlink()
    directory.rmdir()
    held.release()
    assert [BROKEN in text for text in warnings] == [True]
    directory.mkdir()


def test_second_job_in_the_same_process(held, new_lock, warnings):
    second = new_lock()
    with pytest.raises(LockHeldError) as caught:
        second.acquire()
    assert caught.value.holder.pid == os.getpid()
    second.release()
    assert Path(held.path).exists()
    held.release()
    second.acquire()
    assert warnings == []


def test_released_while_somebody_looks_at_it(held, new_lock):
    """Its file is open there already; what is left on purpose does not count."""
    asked = []

    def hook(name, call):
        if name == "fcntl":
            asked.append(call)
            # After the kernel lock of its own.
            if len(asked) == 2:
                held.release()
        return call()

    other = new_lock()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE):
        with intercepted(hook):
            other.acquire()
        assert other.held
    assert not held.held


def test_waiting_takes_time(held, new_lock):
    """Whatever has changed: an attempt is dearer than a look."""
    with pytest.raises(LockHeldError) as caught:
        new_lock().acquire()
    held.release()
    answers = []
    calls = count(lambda: answers.append(held.wait(caught.value.holder, timeout=60)))
    assert calls[0] == "sleep"
    assert answers == [None]


def fork(what):
    """Call something in a child, and wait for its end, which is an orderly one."""
    child = os.fork()
    if child == 0:
        try:
            what()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_child_does_not_release(held, new_lock, warnings):
    fork(held.release)
    assert Path(held.path).exists()
    with pytest.raises(LockHeldError):
        new_lock().acquire()
    held.release()
    assert warnings == []


def test_child_is_refused(directory, held):
    def contend():
        _, outcome = attempt(directory)
        assert outcome["held"]["path"] == held.path

    fork(contend)


CHILD_OUTLIVES = """
import os, sys
sys.path.insert(0, sys.argv[2])
from holders import attempt
lock, outcome = attempt(sys.argv[1])
if os.fork() == 0:
    os.setsid()
    print("child", flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


def test_child_that_outlives_the_job_has_no_kernel_lock(directory, new_lock):
    command = [sys.executable, "-c", CHILD_OUTLIVES, directory, Path(__file__).parent]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "child\n"
        with pytest.raises(LockHeldError):
            new_lock().acquire()
        holder.kill()
        holder.wait()
        assert len(list(directory.iterdir())) == 1
        new_lock().acquire()


def test_program_that_is_started_has_no_kernel_lock(directory, held, new_lock):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        held.release()
        new_lock().acquire()


def test_two_locks_across_a_fork(directory, held, new_lock, tmp_path, warnings):
    other = new_lock(where=tmp_path)
    other.acquire()

    def release_both():
        held.release()
        other.release()
        assert warnings == []

    fork(release_both)
    for lock in (held, other):
        assert Path(lock.path).exists()
        lock.release()
    assert warnings == []


def test_killed_holder(directory, new_lock, warnings):
    with process(directory) as holder:
        holder.kill()
    (path,) = directory.iterdir()
    new_lock().acquire()
    assert not path.exists()
    # All is well: nothing to warn of.
    assert warnings == []


class Interruption(BaseException):
    """Raised in the middle of a system call, as the handler of a signal may do."""


# An iterator that is interrupted before it has a name is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("phase", ["acquire", "release"])
def test_interrupted_at_every_system_call(directory, new_lock, warnings, phase, after):
    def interrupt(name, call):
        try:
            if after:
                call()
        finally:
            raise Interruption

    def begin():
        lock = new_lock()
        if phase == "release":
            lock.acquire()
        return lock, getattr(lock, phase)

    lock, what = begin()
    calls = count(what)
    lock.release()
    for number in range(len(calls)):
        before = descriptors()
        lock, what = begin()

        with intercepted(at_call(number, interrupt)), pytest.raises(Interruption):
            what()
        # As the plugin does after whatever has come.
        lock.release()
        assert list(directory.iterdir()) == [], calls[: number + 1]
        # What was interrupted while it was opened or closed is lost to the process.
        if calls[number] not in ("open", "close"):
            assert descriptors() == before
        heir = new_lock()
        heir.acquire()
        heir.release()
        assert warnings == []
