"""Each system call once: the process dies, it fails, it is interrupted; and real file systems."""

import contextlib
import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from faults import at_call, count, descriptors, intercepted
from needs import needs_root
from others import attempt, contend, leave_stale_lock, lock_path, names

from avocado_vt_joblock import lock as lock_module
from avocado_vt_joblock import processes

DIED = 77
ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINTR, errno.ENOLCK]


def leave_nothing(directory):
    pass


def leave_both(directory):
    """Leave a lock that is judged by its processes, and one that is judged by its PID."""
    for number, maker in enumerate(["this package", "avocado-vt"]):
        leave_stale_lock(directory, number, maker)


before = pytest.mark.parametrize("before", [leave_nothing, leave_both])


def remove_unpublished(directory):
    """Remove what a later job would remove; there is nothing else."""
    for path in directory.iterdir():
        assert path.name.startswith(".")
        path.unlink()


def dies_at(number, after, what):
    """Do something in a child that dies at a system call; return whether it came to that."""

    def die(name, call):
        try:
            if after:
                call()
        finally:
            os._exit(DIED)

    child = os.fork()
    if child == 0:
        try:
            with intercepted(at_call(number, die)):
                what()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == DIED


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@before
def test_death(directory, new_lock, before, after):
    """The next job gets the lock at once, and what is left then is unpublished."""

    def live():
        lock = new_lock()
        lock.acquire()
        lock.release()

    before(directory)
    calls = count(live)
    left = set()
    for number in range(len(calls)):
        before(directory)
        assert dies_at(number, after, live)
        left |= {name.partition("-")[0] for name in names(directory)}
        assert attempt(directory).state == "WON", calls[: number + 1]
        remove_unpublished(directory)
    assert not dies_at(len(calls), after, live)
    # Deaths that left nothing behind would show nothing.
    assert left == {".avocado", "avocado"}


def failing(code):
    """What has a system call fail; a close() closes nevertheless."""

    def fail(name, call):
        if name == "close":
            call()
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@before
def test_error_of_acquire(directory, new_lock, before, code):
    """The lock is taken properly, or the error is told and nothing is left."""
    # The guard may be missing, a stale lock may stay, and a PID may be that of a process here.
    may_fail = {"flock", "unlink", "readlink", "kill"}
    before(directory)
    lock = new_lock()
    calls = count(lock.acquire)
    lock.release()
    for number, name in enumerate(calls):
        before(directory)
        opened = descriptors()
        lock = new_lock()
        with intercepted(at_call(number, failing(code))):
            told = contend(lock)
        if told.state == "WON":
            assert name in may_fail
            assert attempt(directory).path == lock.path
        elif told.state == "ERROR":
            assert told.errno == code
        elif name != "kill":
            assert (told.state, told.detail) == ("UNKNOWN", os.strerror(code))
        assert lock.release() is None
        assert not os.path.lexists(lock.path)
        assert descriptors() == opened, name
        assert attempt(directory).state == "WON"
        assert names(directory) == [], name


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error_of_a_refused_one(directory, new_lock, code):
    """What it could not withdraw is stale, and the live lock stays."""
    live = new_lock()
    live.acquire()
    lock = new_lock()
    for number, name in enumerate(count(lambda: contend(lock))):
        opened = descriptors()
        with intercepted(at_call(number, failing(code))):
            told = contend(new_lock())
        assert told.state in ("LIVE", "UNKNOWN", "ERROR")
        assert descriptors() == opened, name
        told = attempt(directory)
        assert (told.state, told.path) == ("LIVE", live.path)
        assert names(directory) == [Path(live.path).name]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error_of_release(directory, new_lock, code):
    lock = new_lock()
    lock.acquire()
    for number, name in enumerate(count(lock.release)):
        opened = descriptors()
        lock = new_lock()
        lock.acquire()
        with intercepted(at_call(number, failing(code))):
            problem = lock.release()
        assert problem is None or problem.errno == code
        # What it cannot tell or remove is told.
        assert problem or names(directory) == [], name
        assert descriptors() == opened, name
        assert attempt(directory).state == "WON"
        assert names(directory) == [], name


def test_short_write(directory, new_lock):
    def write_less(name, call):
        return os.write(call.args[0], call.args[1][:1]) if name == "write" else call()

    with intercepted(write_less):
        told = contend(new_lock())
    assert (told.state, told.errno) == ("ERROR", errno.ENOSPC)
    assert names(directory) == []


def test_system_without_such_locks(directory, new_lock):
    """As some sandboxes are: the error tells that it is about the kernel lock."""
    lock = new_lock()
    number = count(lock.acquire).index("fcntl")
    lock.release()
    with intercepted(at_call(number, failing(errno.EINVAL))):
        told = contend(lock)
    assert (told.errno, told.filename) == (errno.EINVAL, lock_module.KERNEL_LOCK)
    assert names(directory) == []


class InterruptionError(BaseException):
    """Raised in the middle of a system call, as the handler of a signal may do."""


# An iterator that is interrupted before it has a name is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("phase", ["acquire", "release"])
@before
def test_interruption(directory, new_lock, before, phase, after):
    """Who gives the lock up then, as the plugin does, has none, and stops nobody."""

    def interrupt(name, call):
        # Handlers run in the main thread.
        if threading.current_thread() is not threading.main_thread():
            return call()
        if after:
            call()
        raise InterruptionError

    def begin():
        before(directory)
        lock = new_lock()
        if phase == "release":
            lock.acquire()
        return lock, getattr(lock, phase)

    lock, what = begin()
    calls = count(what)
    lock.release()
    for number, name in enumerate(calls):
        opened = descriptors()
        lock, what = begin()
        with intercepted(at_call(number, interrupt)), contextlib.suppress(InterruptionError):
            what()
        lock.release()
        assert not os.path.lexists(lock.path), calls[: number + 1]
        assert not lock.held
        assert processes.VARIABLE not in os.environ
        # What was interrupted while it was opened or closed is lost to the process.
        if name not in ("open", "close"):
            assert descriptors() == opened, calls[: number + 1]
        assert attempt(directory).state == "WON"
        remove_unpublished(directory)


@contextlib.contextmanager
def mounted(directory, *options):
    """Mount a file system of its own over the lock directory."""
    done = subprocess.run(
        ["mount", *options, directory], check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        pytest.skip(f"here that cannot be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def fill(directory):
    with contextlib.suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@needs_root
@pytest.mark.parametrize(
    ("options", "use_up", "code"),
    [
        ("size=16k", fill, errno.ENOSPC),
        ("nr_inodes=2", lambda directory: (directory / "last").touch(), errno.ENOSPC),
        ("ro", lambda directory: None, errno.EROFS),
    ],
    ids=["full", "no inodes", "read-only"],
)
def test_file_system_that_takes_nothing(directory, options, use_up, code):
    with mounted(directory, "-t", "tmpfs", "-o", options, "none"):
        use_up(directory)
        before = names(directory)
        told = attempt(directory)
        assert (told.state, told.errno) == ("ERROR", code)
        assert names(directory) == before


@needs_root
@pytest.mark.parametrize(
    "mkfs",
    [
        "mkfs.ext4 -q",
        # As on some others, one has to ask for the type of each entry.
        "mkfs.ext4 -q -O ^filetype",
        "mkfs.btrfs --quiet",
        "mkfs.xfs -q",
        "mkfs.vfat",
    ],
)
def test_file_system(directory, new_lock, tmp_path, mkfs):
    command = mkfs.split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    with (tmp_path / "image").open("wb") as file:
        file.truncate(400 * 2**20)
    command.append(tmp_path / "image")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with mounted(directory, "-o", "loop", tmp_path / "image"):
        before = names(directory)
        leave_both(directory)
        lock = new_lock()
        assert contend(lock).state == "WON"
        assert attempt(directory).state == "LIVE"
        lock.release()
        assert names(directory) == before
        lock_path(directory, 7).mkdir()
        assert attempt(directory).state == "UNKNOWN"
