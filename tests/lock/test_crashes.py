"""The process dies before or after each of its system calls: the next one gets the lock at once."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess

import pytest
from holders import leave_stale_lock, names
from needs import needs_root
from system_calls import at_call, count, intercepted

from avocado_vt_joblock.lockfile import take_kernel_lock

DIED = 77


def life(lock):
    lock.acquire()
    lock.release()


def die_at(number, after, what):
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


def leave_nothing(directory):
    pass


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("before", [leave_nothing, leave_stale_lock])
def test_death_at_every_system_call(directory, new_lock, before, after):
    before(directory)
    calls = count(lambda: life(new_lock()))
    assert {"open", "fcntl", "write", "rename", "scandir", "unlink", "close"} <= set(calls)
    left = set()
    for number in range(len(calls)):
        assert names(directory) == []
        before(directory)
        assert die_at(number, after, lambda: life(new_lock()))
        left |= {re.sub(r"[0-9a-f]{40}.*", "", name) for name in names(directory)}
        heir = new_lock()
        heir.acquire()
        assert names(directory) == [os.path.basename(heir.path)], calls[: number + 1]
        heir.release()
    assert not die_at(len(calls), after, lambda: life(new_lock()))
    # Deaths that left nothing behind would show nothing.
    assert left == {".avocado-vt-joblock-", "avocado-vt-joblock-"}


def test_unpublished_lock_that_somebody_holds_is_left_alone(directory, new_lock):
    unpublished = directory / f".avocado-vt-joblock-{0:040x}-0-00000000.pid"
    with unpublished.open("w") as file:
        take_kernel_lock(file.fileno())
        lock = new_lock()
        lock.acquire()
        lock.release()
        assert unpublished.exists()


def test_unpublished_lock_is_left_alone_without_the_guard(directory, new_lock, monkeypatch):
    # Its maker may be about to publish it, likewise without the guard.
    monkeypatch.setattr("avocado_vt_joblock.lock.GUARD_TIMEOUT", -1)
    unpublished = directory / f".avocado-vt-joblock-{0:040x}-0-00000000.pid"
    unpublished.touch()
    stranger = os.open(directory, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    lock = new_lock()
    lock.acquire()
    lock.release()
    assert unpublished.exists()
    os.close(stranger)
    new_lock().acquire()
    assert not unpublished.exists()


def mount_image(image, where):
    command = ["mount", "-o", "loop,commit=1", image, where]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("mounting is not permitted here")


@needs_root
def test_power_cut(directory, new_lock, tmp_path):
    # What it leaves on the disk is what a copy of the image of a mounted file system holds.
    image, copy, mounted = tmp_path / "image", tmp_path / "copy", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    with contextlib.ExitStack() as stack:
        mount_image(image, mounted)
        stack.callback(subprocess.run, ["umount", mounted], check=True)
        lock = new_lock(where=mounted)
        lock.acquire()
        stack.callback(lock.release)

        def cut():
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            mount_image(copy, directory)
            return list(directory.glob("avocado-vt-joblock-*"))

        while not (left := cut()):
            subprocess.run(["umount", directory], check=True)
        stack.callback(subprocess.run, ["umount", directory], check=True)
        # As a rule the name is there before the content is.
        print(f"{left[0].stat().st_size} bytes reached the disk")
        # There was no reboot, so the file has to be older.
        os.utime(left[0], (0, 0))
        heir = new_lock()
        heir.acquire()
        heir.release()
        assert not left[0].exists()
