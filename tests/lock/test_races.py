"""Processes freed at once: never two holders, and with the guard never none."""

import fcntl
import multiprocessing
import os

import pytest
from faults import intercepted
from others import contend, job_id, leave_stale_lock, names

from avocado_vt_joblock import lock
from avocado_vt_joblock.lock import JobLock

HANG = 60


def take_part(pipe, gate, directory, number):
    """Take part in a round whenever told to, and tell how it ended."""
    while pipe.recv():
        contender = JobLock(str(directory), job_id(number))
        pipe.send("at the gate")
        with gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        told = contend(contender)
        pipe.send((told.state, getattr(told, "pid", None)))
        if told.state == "WON":
            pipe.recv()
            pipe.send(contender.release())


@pytest.fixture
def race(directory, tmp_path):
    """Free processes at once, which contend for the lock, and return how many have won."""
    gate = tmp_path / "gate"
    gate.touch()
    started = []

    def hear(pipe):
        assert pipe.poll(HANG), "no answer"
        return pipe.recv()

    def race(count):
        while len(started) < count:
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            arguments = (theirs, gate, directory, 100 + len(started))
            process = context.Process(target=take_part, args=arguments)
            process.start()
            theirs.close()
            started.append((process, ours))
        pipes = [pipe for _, pipe in started]
        with gate.open() as closed:
            fcntl.flock(closed, fcntl.LOCK_EX)
            for pipe in pipes:
                pipe.send(True)
            assert {hear(pipe) for pipe in pipes} == {"at the gate"}
        answers = [hear(pipe) for pipe in pipes]
        winners = [pipe for pipe, answer in zip(pipes, answers) if answer[0] == "WON"]
        # The others know who it was, or met somebody who gave up as well.
        others = [answer for answer in answers if answer[0] != "WON"]
        assert set(others) <= {("LIVE", process.pid) for process, _ in started}
        for pipe in winners:
            pipe.send(None)
            assert hear(pipe) is None
        return len(winners)

    yield race
    for process, pipe in started:
        process.kill()
        process.join()
        pipe.close()


@pytest.mark.parametrize(("count", "usual"), [(2, 1000), (16, 300), (64, 30)])
def test_exactly_one_wins(directory, race, rounds, count, usual):
    for number in rounds(usual):
        assert race(count) == 1, f"round {number}"
        assert names(directory) == []


def test_exactly_one_wins_over_stale_locks(directory, race, rounds):
    for number in rounds(300):
        for stale in range(3):
            leave_stale_lock(directory, stale, ["this package", "avocado-vt"][stale % 2])
        assert race(8) == 1, f"round {number}"
        assert names(directory) == []


def test_never_two_without_the_guard(directory, race, monkeypatch, rounds):
    monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    winners = set()
    # On few processors hardly anything happens at once of itself.
    with intercepted(lambda name, call: (os.sched_yield(), call())[1]):
        for number in rounds(200):
            stale = leave_stale_lock(directory)
            winners.add(race(8))
            assert max(winners) <= 1, f"round {number}"
            assert set(names(directory)) <= {stale.name}
    # Else there was no race.
    assert winners == {0, 1}


def test_stranger_who_keeps_the_guard(directory, new_lock):
    """It makes nobody wait for long, nor keeps anybody out."""
    stranger = os.open(directory, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    assert contend(new_lock()).state == "WON"
    assert contend(new_lock()).state == "LIVE"
    os.close(stranger)
