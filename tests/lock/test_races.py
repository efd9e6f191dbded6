"""Processes freed at once: never two holders, and with the guard never none."""

import fcntl
import multiprocessing
import os

import pytest
from holders import leave_stale_lock, logged

from avocado_vt_joblock import lock
from avocado_vt_joblock.lock import JobLock, LockHeldError

HANG = 60


class Gate:
    """Holds processes back and frees them at once: an exclusive flock against shared ones."""

    def __init__(self, path):
        path.touch()
        self.path = path

    def close(self):
        self.fd = os.open(self.path, os.O_RDWR)
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def open(self):
        os.close(self.fd)

    def pass_through(self):
        fd = os.open(self.path, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.close(fd)


def contend(pipe, gate, directory, number):
    """Take part in a round whenever told to, and tell how it ended."""
    while pipe.recv():
        contender = JobLock(str(directory), f"{number:040x}")
        pipe.send("at the gate")
        gate.pass_through()
        with logged() as warnings:
            try:
                contender.acquire()
            except LockHeldError as error:
                pipe.send(error.holder.pid)
            except BaseException as error:
                pipe.send(repr(error))
                raise
            else:
                pipe.send("won")
                pipe.recv()
                contender.release()
                pipe.send(warnings)


@pytest.fixture
def processes():
    """Start processes that contend."""
    started = []

    def start(count, gate, directory):
        context = multiprocessing.get_context("fork")
        pipes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=contend, args=(theirs, gate, directory, number))
            process.start()
            started.append(process)
            theirs.close()
            pipes.append(ours)
        return pipes, [process.pid for process in started]

    yield start
    for process in started:
        process.kill()
        process.join()


def race(pipes, pids, gate):
    """Run a round, and return how many have won."""

    def hear(pipe):
        assert pipe.poll(HANG), "no answer"
        return pipe.recv()

    gate.close()
    for pipe in pipes:
        pipe.send(True)
    assert {hear(pipe) for pipe in pipes} == {"at the gate"}
    gate.open()
    answers = [hear(pipe) for pipe in pipes]
    winners = [index for index, answer in enumerate(answers) if answer == "won"]
    # The others know who it was, or met somebody who gave up as well.
    assert {answer for answer in answers if answer != "won"} <= set(pids)
    for index in winners:
        pipes[index].send(None)
        assert hear(pipes[index]) == []
    return len(winners)


@pytest.mark.parametrize(("count", "usual"), [(2, 1000), (16, 200), (64, 50)])
def test_exactly_one_wins(directory, tmp_path, processes, rounds, count, usual):
    gate = Gate(tmp_path / "gate")
    pipes, pids = processes(count, gate, directory)
    for number in rounds(usual):
        assert race(pipes, pids, gate) == 1, f"round {number}"
        assert list(directory.iterdir()) == []


def test_exactly_one_wins_over_stale_locks(directory, tmp_path, processes, rounds):
    gate = Gate(tmp_path / "gate")
    pipes, pids = processes(8, gate, directory)
    for number in rounds(200):
        for stale in range(3):
            leave_stale_lock(directory, number=stale)
            leave_stale_lock(directory, number=10 + stale, maker="avocado-vt")
        assert race(pipes, pids, gate) == 1, f"round {number}"
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize(("count", "usual"), [(2, 1000), (8, 200), (16, 100)])
def test_never_two_without_the_guard(
    directory, tmp_path, processes, monkeypatch, rounds, count, usual
):
    monkeypatch.setattr(lock, "GUARD_TIMEOUT", -1)
    stranger = os.open(directory, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    gate = Gate(tmp_path / "gate")
    pipes, pids = processes(count, gate, directory)
    winners = []
    for number in rounds(usual):
        leave_stale_lock(directory)
        winners.append(race(pipes, pids, gate))
        assert winners[-1] <= 1, f"round {number}"
        assert not [path for path in directory.iterdir() if "dead" not in path.name]
    os.close(stranger)
    # Else there was no race.
    assert 1 in winners
