"""What lies in the directory and looks like a lock: nothing hangs, nothing is followed."""

import errno
import fcntl
import logging
import os
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
from holders import AN_HOUR, attempt_as, leave_stale_lock, lock_path, logged, names
from needs import SOME_USER, needs_root
from system_calls import intercepted

from avocado_vt_joblock.lock import LockHeldError, LockUnknownError
from avocado_vt_joblock.lockfile import take_kernel_lock


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    os.mknod(path, mode=stat.S_IFSOCK | 0o600)


def device(path):
    os.mknod(path, mode=stat.S_IFCHR | 0o600, device=os.makedev(1, 3))


def subdirectory(path):
    path.mkdir()


def dangling_link(path):
    path.symlink_to("/nonexistent")


def link_loop(path):
    path.symlink_to(path.name)


def link_to_live_pid(path):
    (path.parent / "secret").write_text(f"{os.getpid()}\n")
    path.symlink_to("secret")


@pytest.mark.parametrize("unpublished", [False, True], ids=["published", "unpublished"])
@pytest.mark.parametrize(
    "make",
    [
        fifo,
        unix_socket,
        pytest.param(device, marks=needs_root),
        subdirectory,
        dangling_link,
        link_loop,
        link_to_live_pid,
    ],
)
def test_no_regular_file_is_passed_over(directory, new_lock, warnings, make, unpublished):
    path = lock_path(directory, 7)
    if unpublished:
        path = path.with_name(f".{path.name}")
    make(path)
    before = path.lstat()
    lock = new_lock()
    lock.acquire()
    # The other is named like no lock, so nobody needs to know of it.
    expected = [] if unpublished else [True]
    assert [f"{directory} " in text and str(path) in text for text in warnings] == expected
    lock.release()
    assert path.lstat() == before


def boot_time():
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(4 * 2**30)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 10,
        b"secret",
        b"-1",
        b"0",
        b"1" * 30,
        b"%d" % 2**31,
        b"+1",
        b"1_0",
        b"12 13",
        "٣".encode(),
        b"\xff\xfe",
        b"123\n" + b" " * 100 + b"4",
        sparse,
    ],
)
def test_what_holds_no_pid_stops_the_job(directory, new_lock, content):
    path = lock_path(directory, 7)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    before = path.stat()
    with pytest.raises(LockUnknownError, match=f"still holds {path}: there is no PID") as caught:
        new_lock().acquire()
    assert "secret" not in str(caught.value)
    assert [p.name for p in directory.iterdir()] == [path.name]
    after = path.stat()
    assert (after.st_size, after.st_mtime, after.st_ino) == (
        before.st_size,
        before.st_mtime,
        before.st_ino,
    )


@pytest.mark.parametrize(("content", "age"), [(b"x", 60), (b"\0x", 60), (b"", 5), (b"", -AN_HOUR)])
def test_what_no_power_cut_leaves_stops_the_job(directory, new_lock, content, age):
    path = lock_path(directory, 7)
    path.write_bytes(content)
    os.utime(path, (boot_time() - age, boot_time() - age))
    with pytest.raises(LockUnknownError, match="there is no PID"):
        new_lock().acquire()
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 5])
def test_what_a_power_cut_leaves_is_removed(directory, new_lock, content):
    # A name can reach the disk before the content does; nobody from before the boot is left.
    path = lock_path(directory, 7)
    path.write_bytes(content)
    os.utime(path, (boot_time() - 60, boot_time() - 60))
    lock = new_lock()
    lock.acquire()
    assert not path.exists()


@needs_root
def test_unreadable_lock_stops_the_job(directory):
    path = leave_stale_lock(directory)
    path.chmod(0o600)
    outcome = attempt_as(SOME_USER, directory)
    assert f"still holds {path}: Permission denied" in outcome["error"]
    assert list(directory.iterdir()) == [path]


@needs_root
def test_stale_lock_of_another_user_in_a_sticky_directory(directory):
    path = leave_stale_lock(directory)
    outcome = attempt_as(SOME_USER, directory)
    assert "won" in outcome
    assert [
        str(path) in text and "could not be removed" in text for text in outcome["warnings"]
    ] == [True]
    assert list(directory.iterdir()) == [path]


@needs_root
def test_unpublished_lock_of_another_user_in_a_sticky_directory(directory):
    path = leave_stale_lock(directory)
    path = path.rename(path.with_name(f".{path.name}"))
    assert "won" in attempt_as(SOME_USER, directory)
    assert list(directory.iterdir()) == [path]


def test_lease_makes_nobody_wait(directory, new_lock):
    # Opening a file under a lease waits for its holder, who has 45 seconds to give it back.
    path = leave_stale_lock(directory)
    script = (
        "import fcntl, os, signal, sys\n"
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "print('leased', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "leased\n"
        began = time.monotonic()
        with pytest.raises(LockUnknownError, match=f"still holds {path}"):
            new_lock().acquire()
        assert time.monotonic() - began < 20
        holder.send_signal(signal.SIGKILL)
    assert path.exists()


def test_flock_of_a_stranger_on_the_directory_makes_nobody_wait_for_long(directory, new_lock):
    stranger = os.open(directory, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    began = time.monotonic()
    new_lock().acquire()
    assert time.monotonic() - began < 8
    os.close(stranger)


LOCKS_OF_A_STRANGER = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
    "open file description lock": lambda fd: fcntl.fcntl(
        fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)
    ),
    "lock of the process": lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH),
}


@pytest.mark.parametrize("kind", LOCKS_OF_A_STRANGER)
def test_who_may_only_read_a_stale_lock_cannot_make_it_look_live(directory, new_lock, kind):
    path = leave_stale_lock(directory)
    stranger = os.open(path, os.O_RDONLY)
    LOCKS_OF_A_STRANGER[kind](stranger)
    new_lock().acquire()
    assert not path.exists()
    os.close(stranger)


def test_its_owner_can_make_a_stale_lock_look_live(directory, new_lock):
    path = leave_stale_lock(directory)
    with path.open("r+") as file:
        take_kernel_lock(file.fileno())
        with pytest.raises(LockHeldError) as caught:
            new_lock().acquire()
    assert caught.value.holder.path == str(path)
    assert path.exists()


def test_lease_that_is_given_back_soon(directory, new_lock):
    """As an NFS server does with the delegation of a client that holds a lock."""
    path = leave_stale_lock(directory)
    tries = []

    def hook(name, call):
        if name == "open" and call.args[0] == path.name and len(tries) < 3:
            tries.append(name)
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        return call()

    with intercepted(hook):
        new_lock().acquire()
    assert not path.exists()


def test_many_leases_make_nobody_wait_for_long(directory, new_lock):
    for number in range(100):
        leave_stale_lock(directory, number)

    def hook(name, call):
        if (
            name == "open"
            and "avocado-vt-joblock-" in call.args[0]
            and call.args[1] & os.O_NONBLOCK
        ):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        return call()

    began = time.monotonic()
    with intercepted(hook), pytest.raises(LockUnknownError):
        new_lock().acquire()
    assert time.monotonic() - began < 20
    assert len(names(directory)) == 100


def test_file_turns_into_a_link_while_it_is_looked_at(directory, new_lock):
    path = leave_stale_lock(directory)
    (directory / "secret").write_bytes(path.read_bytes())

    def hook(name, call):
        if name == "open" and call.args[0] == path.name:
            path.unlink()
            path.symlink_to("secret")
        return call()

    with intercepted(hook), pytest.raises(LockUnknownError, match=f"still holds {path}"):
        new_lock().acquire()
    assert path.is_symlink()


def test_blank_file_of_some_size_from_before_the_start_stops_the_job(directory, new_lock):
    path = lock_path(directory, 7)
    sparse(path)
    os.utime(path, (0, 0))
    with pytest.raises(LockUnknownError, match=f"still holds {path}: there is no PID"):
        new_lock().acquire()
    assert path.exists()


def test_hard_link_to_a_file_outside(directory, new_lock):
    outside = directory.parent / "outside"
    outside.write_text("secret")
    path = lock_path(directory, 7)
    os.link(outside, path)
    with pytest.raises(LockUnknownError):
        new_lock().acquire()
    assert outside.read_text() == "secret"


def test_names_that_only_resemble_a_lock(directory, new_lock, warnings):
    name = lock_path(directory, 7).name
    others = [f"{name}.bak", f"{name}\n", f"x{name}", f"..{name}", name.upper()]
    others += [name.replace("0-", "-", 1), name.replace("-00000007", "-٠٠٠٠٠٠٠٧")]
    for other in others:
        (directory / other).write_bytes(b"%d" % os.getpid())
    (directory / os.fsdecode(b"avocado-vt-joblock-\xff\xfe")).touch()
    (directory / os.fsdecode(b"\xff\xfe")).touch()
    before = sorted(os.listdir(bytes(directory)))
    lock = new_lock()
    lock.acquire()
    lock.release()
    assert sorted(os.listdir(bytes(directory))) == before
    assert warnings == []


def test_many_entries(directory, new_lock):
    for number in range(100_000):
        os.close(os.open(directory / f"unrelated-{number}", os.O_CREAT))
    lock = new_lock()
    lock.acquire()
    lock.release()
    tracemalloc.start()
    lock.acquire()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    lock.release()
    assert len(os.listdir(directory)) == 100_000


def test_many_stale_locks(directory, new_lock, warnings):
    for number in range(1000):
        leave_stale_lock(directory, number, maker="this package" if number % 2 else "avocado-vt")
    lock = new_lock()
    with logged(logging.INFO) as told:
        lock.acquire()
    assert names(directory) == [os.path.basename(lock.path)]
    assert told == [f"Removed 1000 stale lock(s) from {directory}."]
    assert warnings == []


def test_stale_lock_that_somebody_else_removes_does_not_count(directory, new_lock):
    gone, stays = leave_stale_lock(directory, 1), leave_stale_lock(directory, 2)

    def hook(name, call):
        if name == "unlink" and call.args[0] == gone.name:
            gone.unlink()
        return call()

    with intercepted(hook), logged(logging.INFO) as told:
        new_lock().acquire()
    assert not stays.exists()
    assert told == [f"Removed 1 stale lock(s) from {directory}."]


def test_stale_lock_is_removed_though_a_live_one_is_there(directory, new_lock):
    new_lock().acquire()
    stale = leave_stale_lock(directory)
    with logged(logging.INFO) as told, pytest.raises(LockHeldError):
        new_lock().acquire()
    assert not stale.exists()
    assert told == [f"Removed 1 stale lock(s) from {directory}."]


def test_what_nobody_can_judge_comes_before_what_is_live(directory, new_lock):
    # Whoever waits for the live one would be stopped in the end.
    new_lock().acquire()
    for number in range(10):
        lock_path(directory, number).touch()
    with pytest.raises(LockUnknownError):
        new_lock().acquire()
