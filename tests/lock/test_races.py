"""Processes freed at once: never two holders, and with the guard never none."""

import contextlib
import fcntl
import multiprocessing
import os

import pytest
from faults import intercepted
from others import CONTENT, contend, job_id, leave_lock, names

from avocado_vt_joblock import lock

HANG = 60


def take_part(directory, number):
    contender = lock.JobLock(str(directory), job_id(100 + number))
    take_part.barrier.wait(HANG)
    told = contend(contender)
    while told.state == "NOT_NOW":
        told = contend(contender)
    take_part.barrier.wait(HANG)
    assert contender.release() is None
    return told.state, getattr(told, "pid", None), os.getpid()


@contextlib.contextmanager
def racers(directory, count):
    """What has so many processes contend once, and returns how many have won."""

    def hook(name, call):
        # On few processors hardly anything happens at once of itself.
        os.sched_yield()
        return call()

    context = multiprocessing.get_context("fork")
    take_part.barrier = context.Barrier(count)
    with intercepted(hook), context.Pool(count) as pool:

        def race():
            arguments = [(directory, number) for number in range(count)]
            answers = pool.starmap_async(take_part, arguments, chunksize=1).get(2 * HANG)
            # The others know who it was, or met somebody who gave up as well.
            losers = [(state, pid) for state, pid, _ in answers if state != "WON"]
            assert set(losers) <= {("LIVE", own) for _, _, own in answers}
            return count - len(losers)

        yield race


@pytest.mark.parametrize(
    ("count", "stale", "usual"), [(2, 0, 1000), (16, 0, 300), (64, 0, 30), (8, 3, 300)]
)
def test_exactly_one_wins(directory, rounds, count, stale, usual):
    with racers(directory, count) as race:
        for number in rounds(usual):
            for other in range(stale):
                leave_lock(directory, other, [*CONTENT][other % 2])
            assert race() == 1, f"round {number}"
            assert names(directory) == []


def test_never_two_without_the_guard(directory, monkeypatch, rounds):
    monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    winners = set()
    with racers(directory, 8) as race:
        for number in rounds(200):
            stale = leave_lock(directory)
            winners.add(race())
            assert max(winners) <= 1, f"round {number}"
            assert set(names(directory)) <= {stale.name}
    assert winners == {0, 1}


def test_stranger_who_keeps_the_guard(directory, new_lock):
    stranger = os.open(directory, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    assert contend(new_lock()).state == "WON"
    assert contend(new_lock()).state == "LIVE"
    os.close(stranger)
