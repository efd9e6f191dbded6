"""What one lock does, and a second beside it."""

import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from holders import leave_stale_lock, lock_path, names
from needs import needs_root
from system_calls import at_call, count, descriptors, intercepted

from avocado_vt_joblock.lock import LockDirectoryError, LockHeldError

JOB_ID = "0123456789abcdef0123456789abcdef01234567"


def test_lock_file(directory, new_lock):
    umask = os.umask(0o077)
    try:
        lock = new_lock(JOB_ID)
        lock.acquire()
    finally:
        os.umask(umask)
    (name,) = names(directory)
    assert re.fullmatch(rf"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-[0-9a-z]{{8}}\.pid", name)
    assert lock.path == str(directory / name)
    # As avocado-vt reads it.
    assert int(Path(lock.path).read_text()) == os.getpid()
    assert stat.S_IMODE(Path(lock.path).stat().st_mode) == 0o644


def test_release_removes_the_file(directory, new_lock, warnings):
    lock = new_lock()
    lock.acquire()
    lock.release()
    assert names(directory) == []
    lock.release()
    assert warnings == []


def test_release_without_the_lock_does_nothing(directory, new_lock, warnings):
    lock = new_lock()
    lock.release()
    assert names(directory) == []
    assert warnings == []


def test_held_lock_refuses(directory, new_lock):
    before = time.time()
    first = new_lock(JOB_ID)
    first.acquire()
    second = new_lock()
    with pytest.raises(LockHeldError) as caught:
        second.acquire()
    holder = caught.value.holder
    assert (holder.path, holder.pid, holder.job_id) == (first.path, os.getpid(), JOB_ID)
    assert holder.uid == os.getuid()
    assert before - 1 < holder.since < time.time() + 1
    assert names(directory) == [Path(first.path).name]
    first.release()
    second.acquire()
    assert names(directory) == [Path(second.path).name]


@pytest.mark.parametrize(
    ("job_id", "expected"),
    [
        (JOB_ID.upper(), JOB_ID),
        # By sha1sum(1).
        ("nightly #7", "7f75f82c543debf63f9e213c1cc575c72ea69f06"),
        ("../../etc", "7baf5cb685c8d7104291da30b112470f4440d967"),
        ("0x" + "1" * 38, "e8701ea7dcf96e0dae4b3c4d6fe04e1ce23c99bd"),
        # Characters that are not to be had in UTF-8.
        ("\udc80", "4e256a6c8fad1c5380c376eb6136cad1dbe40adf"),
    ],
)
def test_any_job_id_makes_a_name_that_others_honour(directory, new_lock, job_id, expected):
    lock = new_lock(job_id)
    lock.acquire()
    (name,) = names(directory)
    assert name.startswith(f"avocado-vt-joblock-{expected}-{os.getuid()}-")
    with pytest.raises(LockHeldError):
        new_lock().acquire()


def test_one_job_id_twice(directory, new_lock):
    # Avocado takes a job id from its user too.
    new_lock(JOB_ID).acquire()
    with pytest.raises(LockHeldError):
        new_lock(JOB_ID).acquire()


def test_directory_by_another_path_is_the_same(directory, new_lock, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    new_lock().acquire()
    other = new_lock(where=tmp_path / "link")
    with pytest.raises(LockHeldError) as caught:
        other.acquire()
    assert caught.value.holder.path.startswith(str(tmp_path / "link"))


def test_other_directories_are_other_locks(directory, new_lock, tmp_path):
    new_lock().acquire()
    (tmp_path / "other").mkdir()
    new_lock(where=tmp_path / "other").acquire()
    assert len(names(directory)) == len(names(tmp_path / "other")) == 1


def test_second_acquire_is_an_error(directory, new_lock):
    lock = new_lock()
    lock.acquire()
    before = descriptors()
    with pytest.raises(RuntimeError, match=lock.path):
        lock.acquire()
    assert lock.held
    assert descriptors() == before
    lock.release()
    assert names(directory) == []


@pytest.mark.parametrize(
    ("mode", "owner", "warns"),
    [
        (0o1777, None, False),
        (0o3770, None, False),
        (0o777, None, True),
        (0o707, None, True),
        (0o755, None, False),
        # A group of the owner's name has nobody else in it, as a rule.
        (0o770, (0, 0), False),
        pytest.param(0o770, (0, 1), True, marks=needs_root),
        pytest.param(0o770, (0, 54321), True, marks=needs_root),
        pytest.param(0o770, (54321, 0), True, marks=needs_root),
    ],
)
def test_directory_in_which_others_can_remove_files(
    directory, new_lock, warnings, mode, owner, warns
):
    if owner and os.getuid() == 0:
        os.chown(directory, *owner)
    directory.chmod(mode)
    new_lock().acquire()
    assert [f"chmod +t {directory}" in text for text in warnings] == [True] * warns


def test_unpublished_file_that_is_lost_is_made_anew(directory, new_lock):
    """Another host, which has a guard of its own, may remove it before its lock is there."""

    def lose(name, call):
        for path in directory.glob(".avocado-vt-joblock-*"):
            path.unlink()
        return call()

    calls = count(new_lock().acquire)
    for number in range(calls.index("rename") + 1):
        for lock in list(directory.iterdir()):
            lock.unlink()
        lock = new_lock()
        with intercepted(at_call(number, lose)):
            lock.acquire()
        assert names(directory) == [Path(lock.path).name], calls[:number]
        lock.release()


def test_unpublished_file_that_is_always_lost_is_an_error(directory, new_lock):
    lost = []

    def hook(name, call):
        if name == "rename":
            for path in directory.glob(".avocado-vt-joblock-*"):
                lost.append(path.name)
                path.unlink()
        return call()

    before = descriptors()
    with intercepted(hook), pytest.raises(LockDirectoryError, match="No such file"):
        new_lock().acquire()
    assert len(set(lost)) == len(lost) > 1
    assert names(directory) == []
    assert descriptors() == before


def test_unpublished_name_that_is_there_already_is_left_alone(directory, new_lock):
    occupied = []

    def occupy(name, call):
        if name == "open" and call.args[0].startswith(".avocado") and not occupied:
            occupied.append(call.args[0])
            (directory / occupied[0]).write_text("somebody's")
            (directory / occupied[0]).chmod(0)
        return call()

    lock = new_lock()
    with intercepted(occupy):
        lock.acquire()
    # Then it takes another name. What is no lock of a job is removed like what a crash has left.
    assert occupied[0] not in (f".{Path(lock.path).name}", None)
    assert lock.held


def test_missing_directory_is_not_created(directory, new_lock):
    directory.rmdir()
    with pytest.raises(LockDirectoryError, match=f"{directory} does not exist"):
        new_lock().acquire()
    assert not directory.exists()


def test_file_for_a_directory(directory, new_lock):
    directory.rmdir()
    directory.touch()
    with pytest.raises(LockDirectoryError, match=f"{directory} is not a directory"):
        new_lock().acquire()


def test_file_is_complete_before_it_is_published(directory, new_lock):
    seen = {}

    def hook(name, call):
        for path in directory.iterdir():
            if path.name.startswith("."):
                status = path.stat()
                mode = stat.S_IMODE(status.st_mode)
                seen.setdefault(name, (mode, has_lock(status.st_ino), path.read_bytes()))
        return call()

    with intercepted(hook):
        new_lock().acquire()
    # Nobody else can open it before its lock is there, and everybody once it is published.
    assert seen["fcntl"] == (0o600, False, b"")
    assert seen["rename"] == (0o644, True, b"%d\n\n" % os.getpid())


def has_lock(inode):
    """Whether proc_locks(5) shows an exclusive open file description lock."""
    locks = [line.split()[1:6] for line in Path("/proc/locks").read_text().splitlines()]
    return any(
        lock[:3] == ["OFDLCK", "ADVISORY", "WRITE"] and lock[4].endswith(f":{inode}")
        for lock in locks
    )


def test_directory_is_read_by_a_descriptor_opened_after_publishing(new_lock):
    # btrfs shows a directory as it was when it was opened.
    done = []

    def hook(name, call):
        result = call()
        done.append((name, result if name == "open" else call.args))
        return result

    with intercepted(hook):
        new_lock().acquire()
    calls = [name for name, _ in done]
    published, read = calls.index("rename"), calls.index("scandir")
    (descriptor,) = done[read][1]
    assert ("open", descriptor) in done[published:read]


@needs_root
@pytest.mark.parametrize(
    "mkfs",
    [
        pytest.param(["mkfs.ext4", "-q"], id="ext4"),
        # As on some others, one has to ask for the type of each entry.
        pytest.param(["mkfs.ext4", "-q", "-O", "^filetype"], id="ext4 without types"),
        pytest.param(["mkfs.btrfs", "--quiet"], id="btrfs"),
        pytest.param(["mkfs.xfs", "-q"], id="xfs"),
        pytest.param(["mkfs.vfat"], id="vfat"),
    ],
)
def test_file_system(directory, new_lock, tmp_path, warnings, mkfs):
    if shutil.which(mkfs[0]) is None:
        pytest.skip(f"there is no {mkfs[0]}")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * 2**20)
    subprocess.run([*mkfs, image], check=True, stdout=subprocess.DEVNULL)
    if subprocess.run(["mount", "-o", "loop", image, directory], check=False).returncode:
        pytest.skip("mounting is not permitted, or this system does not know the file system")
    try:
        before = names(directory)
        stale = leave_stale_lock(directory)
        strange = lock_path(directory, 7)
        strange.mkdir()
        lock = new_lock()
        lock.acquire()
        assert names(directory) == sorted([*before, strange.name, Path(lock.path).name])
        with pytest.raises(LockHeldError):
            new_lock().acquire()
        lock.release()
        assert names(directory) == sorted([*before, strange.name])
        assert not stale.exists()
        assert [strange.name in text for text in warnings] == [True, True]
    finally:
        subprocess.run(["umount", directory], check=True)
