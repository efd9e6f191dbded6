"""Processes freed at once: never two holders, and with the guard never none."""

import contextlib
import fcntl
import multiprocessing
import os
from dataclasses import replace

import pytest
from faults import intercepted
from others import CONTENT, contend, job_id, leave_card, leave_lock, names

from avocado_vt_joblock import card, lock, lockdir

HANG = 60


def take_part(directory, number, hosts=1):
    contender = lock.JobLock(str(directory), job_id(100 + number))
    take_part.barrier.wait(HANG)
    told = contend(contender)
    while told.state == "NOT_NOW":
        told = contend(contender)
    take_part.barrier.wait(HANG)
    contender.release()
    return told.state, getattr(told, "pid", None), os.getpid()


def take_part_on_a_host(directory, number, hosts):
    """Take part as on one of several hosts, which have a guard and an identity each."""
    host = f"host{number % hosts}"
    ours = replace(card.own_identity(), host=host, boot=f"boot{number % hosts:04}")
    guard = directory.with_name(host)
    guard.mkdir(exist_ok=True)

    def hook(name, call):
        os.sched_yield()
        if name == "open" and call.args[0] == str(directory):
            return os.open(guard, *call.args[1:])
        return call()

    with pytest.MonkeyPatch.context() as patch, intercepted(hook):
        patch.setattr(card, "own_identity", lambda: ours)
        return take_part(directory, number, hosts)


@contextlib.contextmanager
def racers(directory, count, hosts=1):
    """Return what has so many processes contend once, and returns how many have won."""

    def hook(name, call):
        # On few processors hardly anything happens at once of itself.
        os.sched_yield()
        return call()

    what = take_part if hosts == 1 else take_part_on_a_host
    context = multiprocessing.get_context("fork")
    take_part.barrier = context.Barrier(count)
    with intercepted(hook), context.Pool(count) as pool:

        def race():
            arguments = [(directory, number, hosts) for number in range(count)]
            answers = pool.starmap_async(what, arguments, chunksize=1).get(2 * HANG)
            # The others know who it was, or met somebody who gave up as well.
            losers = [(state, pid) for state, pid, _ in answers if state != "WON"]
            assert set(losers) <= {("LIVE", own) for _, _, own in answers}
            return count - len(losers)

        yield race


@pytest.mark.parametrize(
    ("count", "stale", "usual"), [(2, 0, 300), (16, 0, 100), (64, 0, 10), (8, 3, 100)]
)
def test_exactly_one_wins(directory, rounds, count, stale, usual):
    with racers(directory, count) as race:
        for number in rounds(usual):
            for other in range(stale):
                path = leave_lock(directory, other, [*CONTENT][other % 2])
                if other:
                    leave_card(path)
            assert race() == 1, f"round {number}"
            assert os.listdir(directory) == []


@pytest.mark.parametrize(("count", "hosts"), [(3, 3), (5, 3)])
def test_exactly_one_wins_on_several_hosts(directory, rounds, count, hosts):
    """They have no common guard: of those who meet the first one by name waits for the
    others to give up."""
    with racers(directory, count, hosts) as race:
        for number in rounds(15):
            assert race() == 1, f"round {number}"
            assert os.listdir(directory) == []


def test_never_two_without_the_guard(directory, monkeypatch, rounds):
    monkeypatch.setattr(lockdir, "GUARD_TIMEOUT", -1)
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
