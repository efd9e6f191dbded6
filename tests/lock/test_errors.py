"""Each system call fails once; full, inode-less and read-only file systems."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest
from holders import leave_stale_lock, lock_path
from needs import needs_root
from system_calls import at_call, count, descriptors, intercepted

from avocado_vt_joblock.lock import LockDirectoryError, LockError, LockHeldError

ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINTR, errno.ENOLCK]


def failing(code):
    """What has a system call fail; a close() closes nevertheless."""

    def fail(name, call):
        if name == "close":
            call()
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def live_lock(directory, new_lock):
    def acquire():
        lock = new_lock()
        lock.acquire()
        return Path(lock.path)

    return acquire


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("stale", [False, True], ids=["empty", "stale"])
def test_acquire(directory, new_lock, code, stale):
    # The guard may be missing, and a stale lock may stay.
    may_fail = {"flock", "unlink"}

    def prepare():
        if stale:
            leave_stale_lock(directory)
        return new_lock()

    lock = prepare()
    calls = count(lock.acquire)
    lock.release()
    for number, name in enumerate(calls):
        before = descriptors()
        lock = prepare()
        with intercepted(at_call(number, failing(code))):
            if name in may_fail:
                lock.acquire()
            else:
                with pytest.raises(LockError) as caught:
                    lock.acquire()
        if name in may_fail:
            with pytest.raises(LockHeldError):
                new_lock().acquire()
            lock.release()
        else:
            assert not isinstance(caught.value, LockHeldError)
            assert str(directory) in str(caught.value)
            assert os.strerror(code) in str(caught.value)
        assert not os.path.lexists(lock.path)
        assert descriptors() == before, name
        heir = new_lock()
        heir.acquire()
        assert os.listdir(directory) == [os.path.basename(heir.path)], name
        heir.release()


@pytest.mark.parametrize("stale", [False, True], ids=["live", "stale"])
def test_lock_on_another_host_is_gone_when_its_handle_is_stale(directory, new_lock, stale):
    """What a system call on a file says (ESTALE) that was removed by another client of NFS."""
    path = leave_stale_lock(directory) if stale else lock_path(directory, 7)
    path.write_bytes(path.read_bytes() if stale else b"%d" % os.getpid())
    lock = new_lock()

    def hook(name, call):
        mine = name in ("stat", "open") and call.args[0] == path.name
        if mine:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call()

    with intercepted(hook):
        lock.acquire()
    assert lock.held


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_being_refused(directory, new_lock, live_lock, code):
    live = live_lock()

    def be_refused(lock):
        with pytest.raises(LockHeldError):
            lock.acquire()

    lock = new_lock()
    calls = count(lambda: be_refused(lock))
    for number, name in enumerate(calls):
        before = descriptors()
        lock = new_lock()
        with intercepted(at_call(number, failing(code))), pytest.raises(LockError) as caught:
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


def test_too_many_open_files_are_not_about_the_directory(directory, new_lock):
    """No other lock directory is advised then: that would not keep jobs apart."""
    calls = count(new_lock().acquire)
    for path in directory.iterdir():
        path.unlink()
    for number, name in enumerate(calls):
        if name == "open":
            with (
                intercepted(at_call(number, failing(errno.EMFILE))),
                pytest.raises(LockError) as caught,
            ):
                new_lock().acquire()
            assert os.strerror(errno.EMFILE) in str(caught.value)
            assert not isinstance(caught.value, LockDirectoryError)


def test_short_write(directory, new_lock):
    def write_less(name, call):
        return os.write(call.args[0], call.args[1][:1]) if name == "write" else call()

    lock = new_lock()
    with intercepted(write_less), pytest.raises(LockError, match=os.strerror(errno.ENOSPC)):
        lock.acquire()
    assert list(directory.iterdir()) == []


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
        with intercepted(at_call(number, failing(code))):
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


@needs_root
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
