"""Each system call fails once; full, inode-less and read-only file systems."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
from holders import leave_stale_lock
from system_calls import count, descriptors, intercepted

from avocado_vt_joblock.lock import LockError, LockHeldError

ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINTR, errno.ENOLCK]


def failing(number, code):
    """A hook that has one system call fail; a close() closes nevertheless."""
    seen = 0

    def hook(name, call):
        nonlocal seen
        seen += 1
        if seen - 1 == number:
            if name == "close":
                call()
            raise OSError(code, os.strerror(code))
        return call()

    return hook


@pytest.fixture
def live_lock(directory, new_lock):
    def acquire():
        lock = new_lock()
        lock.acquire()
        return Path(lock.path)

    return acquire


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("stale", [False, True], ids=["empty", "stale"])
def test_acquire(directory, new_lock, warnings, code, stale):
    def prepare():
        if stale:
            leave_stale_lock(directory)

    prepare()
    lock = new_lock()
    calls = count(lock.acquire)
    lock.release()
    failed = []
    for number, name in enumerate(calls):
        prepare()
        before = descriptors()
        lock = new_lock()
        try:
            with intercepted(failing(number, code)):
                lock.acquire()
        except LockError as error:
            assert not isinstance(error, LockHeldError)
            assert str(directory) in str(error)
            assert os.strerror(code) in str(error)
            assert not os.path.lexists(lock.path)
            failed.append(name)
        else:
            assert os.path.lexists(lock.path)
            with pytest.raises(LockHeldError):
                new_lock().acquire()
            lock.release()
        assert descriptors() == before, name
        heir = new_lock()
        heir.acquire()
        assert os.listdir(directory) == [os.path.basename(heir.path)], name
        heir.release()
    # It goes on without the guard, where that cannot be ended, and with a stale lock left.
    harmless = ["flock", "flock", *(["unlink"] if stale else [])]
    assert sorted([*failed, *harmless]) == sorted(calls)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_being_turned_away(directory, new_lock, live_lock, code):
    live = live_lock()

    def turned_away(lock):
        with pytest.raises(LockHeldError):
            lock.acquire()

    lock = new_lock()
    calls = count(lambda: turned_away(lock))
    for number, name in enumerate(calls):
        before = descriptors()
        lock = new_lock()
        with intercepted(failing(number, code)), pytest.raises(LockError) as caught:
            lock.acquire()
        assert str(directory) in str(caught.value)
        assert descriptors() == before, name
        assert live.exists()
        # What could not be withdrawn is stale.
        left = [path for path in directory.iterdir() if path != live]
        assert left == [] or name == "unlink"
        with pytest.raises(LockHeldError) as caught:
            new_lock().acquire()
        assert caught.value.holder.path == str(live)
        for path in left:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_release(directory, new_lock, warnings, code):
    lock = new_lock()
    lock.acquire()
    calls = count(lock.release)
    for number, name in enumerate(calls):
        before = descriptors()
        lock = new_lock()
        lock.acquire()
        warnings.clear()
        with intercepted(failing(number, code)):
            lock.release()
        assert descriptors() == before, name
        assert all(lock.path in text for text in warnings)
        if name == "unlink":
            assert os.strerror(code) in warnings[0]
        assert len(warnings) == (name != "close")
        heir = new_lock()
        heir.acquire()
        assert os.listdir(directory) == [os.path.basename(heir.path)], name
        heir.release()


@pytest.fixture
def mounted(directory):
    """Mount a small file system of its own over the lock directory."""
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    with contextlib.ExitStack() as stack:

        def mount(options):
            command = ["mount", "-t", "tmpfs", "-o", options, "none", directory]
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", directory], check=True)

        yield mount


def fill(directory):
    with contextlib.suppress(OSError), (directory / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    ("options", "use_up", "complaint"),
    [
        ("size=16k", fill, os.strerror(errno.ENOSPC)),
        ("nr_inodes=2", lambda directory: (directory / "last").touch(), os.strerror(errno.ENOSPC)),
        ("ro", lambda directory: None, os.strerror(errno.EROFS)),
    ],
    ids=["full", "no inodes", "read-only"],
)
def test_file_system(directory, new_lock, mounted, options, use_up, complaint):
    mounted(options)
    use_up(directory)
    before = sorted(directory.iterdir())
    with pytest.raises(LockError, match=complaint) as caught:
        new_lock().acquire()
    assert str(directory) in str(caught.value)
    assert sorted(directory.iterdir()) == before
