"""Contenders stepped through their system calls: every schedule with up to three preemptions."""

import contextlib
import fcntl
import itertools
import os

import pytest
from holders import leave_stale_lock
from system_calls import run_schedule, schedules

from avocado_vt_joblock import lock
from avocado_vt_joblock.lock import JobLock, LockHeldError

PREEMPTIONS = 3


class Contender:
    """Takes the lock, and maybe lets go of it; tells how many hold it at the same time."""

    def __init__(self, directory, number, record):
        self.lock = JobLock(str(directory), f"{number:040x}", lambda text: None)
        # By chance a directory is read in another order, and a schedule does not repeat.
        self.lock._name = f"avocado-vt-joblock-{number:040x}-0-{number:08}.pid"
        self.record = record
        self.won = False

    def acquire(self):
        try:
            self.lock.acquire()
        except LockHeldError:
            return
        self.won = True
        self.record.holders += 1
        self.record.most = max(self.record.most, self.record.holders)

    def release(self):
        self.record.holders -= 1
        self.lock.release()


class Record:
    holders = 0
    most = 0


@contextlib.contextmanager
def new_directory(parent, guard):
    """A lock directory; where there is to be no guard a stranger holds a flock on it."""
    directory = parent / "locks"
    directory.mkdir()
    stranger = os.open(directory, os.O_RDONLY)
    if not guard:
        fcntl.flock(stranger, fcntl.LOCK_EX)
    yield directory
    os.close(stranger)
    directory.rmdir()


@pytest.mark.parametrize("situation", ["empty", "stale lock", "holder that releases"])
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_every_schedule(tmp_path, monkeypatch, guard, situation):
    if not guard:
        monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    generator = schedules(PREEMPTIONS)
    prefix = next(generator)
    outcomes = set()
    for number in itertools.count(1):  # noqa: B007
        with new_directory(tmp_path, guard) as directory:
            trace, winners = run_once(directory, prefix, situation)
        outcomes.add(winners)
        if guard and situation != "holder that releases":
            assert any(winners), prefix
        try:
            prefix = generator.send(trace)
        except StopIteration:
            break
    print(f"{number} schedules")
    # They were different ones indeed.
    assert {(True, False), (False, True)} <= outcomes
    if not guard or situation == "holder that releases":
        assert (False, False) in outcomes


def run_once(directory, prefix, situation):
    record = Record()
    contenders = [Contender(directory, number, record) for number in (1, 2)]
    whats = [contender.acquire for contender in contenders]
    if situation == "stale lock":
        leave_stale_lock(directory)
    elif situation == "holder that releases":
        holder = Contender(directory, 3, record)
        holder.acquire()
        whats.append(holder.release)
    trace, errors = run_schedule(whats, prefix)
    assert errors == [None] * len(whats), prefix
    assert record.most <= 1, prefix
    for contender in contenders:
        if contender.won:
            contender.release()
    assert list(directory.iterdir()) == [], prefix
    return trace, tuple(contender.won for contender in contenders)
