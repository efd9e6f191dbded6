"""Each system call once: the process dies, it fails, it is interrupted; and real file systems."""

import contextlib
import errno
import os
import shutil
import subprocess
import threading

import pytest
from faults import at_call, count, descriptors, intercepted
from needs import needs_root
from others import attempt, contend, leave_stale_lock, lock_path, names

from avocado_vt_joblock import lock as lock_module
from avocado_vt_joblock import processes

DIED = 77
ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINTR, errno.ENOLCK]


def leave_both(directory):
    """Leave a lock that is judged by its processes, and one that is judged by its PID."""
    for number, maker in enumerate(["this package", "avocado-vt"]):
        leave_stale_lock(directory, number, maker)


def begin(directory, new_lock, phase, stale):
    """Make a lock, and what takes it or gives it back."""
    if stale:
        leave_both(directory)
    lock = new_lock()
    if phase == "release":
        lock.acquire()
    return lock, getattr(lock, phase)


def calls_of(directory, new_lock, phase, stale):
    """The system calls of that."""
    lock, what = begin(directory, new_lock, phase, stale)
    calls = count(what)
    lock.release()
    return calls


def assert_free(directory, calls):
    """The next job gets the lock at once; what is left then is unpublished, and a later job's."""
    assert attempt(directory).state == "WON", calls
    for path in directory.iterdir():
        assert path.name.startswith("."), calls
        path.unlink()


phases = pytest.mark.parametrize("phase", ["acquire", "release"])
stales = pytest.mark.parametrize("stale", [False, True], ids=["empty", "stale"])
afters = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@phases
@stales
@afters
def test_death(directory, new_lock, phase, stale, after):
    def die(name, call):
        try:
            if after:
                call()
        finally:
            os._exit(DIED)

    calls = calls_of(directory, new_lock, phase, stale)
    for number in range(len(calls)):
        child = os.fork()
        if child == 0:
            _, what = begin(directory, new_lock, phase, stale)
            with intercepted(at_call(number, die)):
                what()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED
        assert_free(directory, calls[: number + 1])


def failing(code):
    """What has a system call fail; a close() closes nevertheless."""

    def fail(name, call):
        if name == "close":
            call()
        raise OSError(code, os.strerror(code))

    return fail


@stales
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error_of_acquire(directory, new_lock, stale, code):
    """The lock is taken properly, or the error is told and nothing is left."""
    # The guard may be missing, a stale lock may stay, and a PID may be that of a process here.
    may_fail = {"flock", "unlink", "readlink", "kill"}
    for number, name in enumerate(calls_of(directory, new_lock, "acquire", stale)):
        opened = descriptors()
        lock, _ = begin(directory, new_lock, "acquire", stale)
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
        assert descriptors() == opened, name
        assert not os.path.lexists(lock.path)
        assert_free(directory, name)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error_of_a_refused_one(directory, held, new_lock, code):
    """What it could not withdraw is stale, and the live lock stays."""
    for number, name in enumerate(count(lambda: contend(new_lock()))):
        opened = descriptors()
        with intercepted(at_call(number, failing(code))):
            assert contend(new_lock()).state in ("LIVE", "UNKNOWN", "ERROR")
        assert descriptors() == opened, name
        assert attempt(directory).path == held.path
        assert names(directory) == [os.path.basename(held.path)]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error_of_release(directory, new_lock, code):
    for number, name in enumerate(calls_of(directory, new_lock, "release", False)):
        opened = descriptors()
        _, what = begin(directory, new_lock, "release", False)
        with intercepted(at_call(number, failing(code))):
            problem = what()
        # What it cannot see or remove is told.
        assert problem.errno == code if problem else names(directory) == [], name
        assert descriptors() == opened, name
        assert_free(directory, name)


@pytest.mark.parametrize(
    ("name", "instead", "code", "filename"),
    [
        ("write", lambda name, call: os.write(call.args[0], b"1"), errno.ENOSPC, None),
        # As some sandboxes are.
        ("fcntl", failing(errno.EINVAL), errno.EINVAL, lock_module.KERNEL_LOCK),
    ],
    ids=["short write", "no such locks"],
)
def test_other_errors(directory, new_lock, name, instead, code, filename):
    number = calls_of(directory, new_lock, "acquire", False).index(name)
    with intercepted(at_call(number, instead)):
        told = contend(new_lock())
    assert (told.state, told.errno, told.filename) == ("ERROR", code, filename)
    assert names(directory) == []


class InterruptionError(BaseException):
    """Raised in the middle of a system call, as the handler of a signal may do."""


# An iterator that is interrupted before it has a name is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@phases
@stales
@afters
def test_interruption(directory, new_lock, phase, stale, after):
    """Who gives the lock up then, as the plugin does, has none, and stops nobody."""

    def interrupt(name, call):
        # Handlers run in the main thread.
        if threading.current_thread() is not threading.main_thread():
            return call()
        if after:
            call()
        raise InterruptionError

    calls = calls_of(directory, new_lock, phase, stale)
    for number, name in enumerate(calls):
        opened = descriptors()
        lock, what = begin(directory, new_lock, phase, stale)
        with intercepted(at_call(number, interrupt)), contextlib.suppress(InterruptionError):
            what()
        lock.release()
        assert not os.path.lexists(lock.path), calls[: number + 1]
        assert not lock.held
        assert processes.VARIABLE not in os.environ
        # What was interrupted while it was opened or closed is lost to the process.
        assert name in ("open", "close") or descriptors() == opened, calls[: number + 1]
        assert_free(directory, calls[: number + 1])


@contextlib.contextmanager
def mounted(directory, *options):
    """Mount a file system of its own over the lock directory."""
    command = ["mount", *options, directory]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
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


# On ext4 without types, as on some others, one has to ask for the type of each entry.
MKFS = ["ext4 -q", "ext4 -q -O ^filetype", "btrfs --quiet", "xfs -q", "vfat"]


@needs_root
@pytest.mark.parametrize("mkfs", MKFS)
def test_file_system(directory, new_lock, tmp_path, mkfs):
    command = [*f"mkfs.{mkfs}".split(), tmp_path / "image"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    with command[-1].open("wb") as file:
        file.truncate(400 * 2**20)
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
