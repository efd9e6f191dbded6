"""Many real jobs: at once, and ended at random moments."""

import os
import random
import signal
import subprocess

import pytest
from sandbox import finish, wait_for

JOBS = 6


def test_one_of_six_runs(sandbox, rounds):
    tests = []
    for number in rounds(3):
        round_ = [sandbox.vt_test(f"round{number}-{job}") for job in range(JOBS)]
        jobs = [sandbox.run(test) for test in round_]
        # The one that has the lock keeps it until the others have ended.
        wait_for(lambda: sum(job.poll() is not None for job in jobs) >= JOBS - 1)  # noqa: B023
        assert sum(job.poll() is None for job in jobs) == 1, [job.poll() for job in jobs]
        wait_for(lambda: any(test.has_begun for test in round_))  # noqa: B023
        assert [test.has_begun for test in round_] == [job.poll() is None for job in jobs]
        for test in round_:
            test.end()
        assert sorted(finish(job)[0] for job in jobs) == [0] + [2] * (JOBS - 1)
        assert sandbox.locks() == []
        tests += round_
    spans = sorted([when for _, when in test.notes()] for test in tests if test.has_begun)
    assert len(spans) == number + 1
    for (_, end), (begin, _) in zip(spans, spans[1:]):
        assert end < begin


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_next_job_runs_after_an_end_at_any_moment(sandbox, rounds, signum):
    for number in rounds(4):
        test = sandbox.vt_test(f"ended{number}")
        if random.random() < 0.5:
            test.end()
        job = sandbox.run(test)
        moment = random.uniform(0, 2.5)
        print(f"{signal.Signals(signum).name} after {moment:.3f} s")
        # More than one, since the first may be lost: before Avocado heeds it, for example. One that
        # interrupts Avocado while it logs may have it wait for itself for ever.
        for wait, sent in ((moment, signum), (2, signum), (2, signum), (20, signal.SIGKILL)):
            try:
                job.wait(wait)
                break
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, sent)
        job.wait()
        test.end()
        wait_for(lambda: not sandbox.living())
        following = sandbox.vt_test(f"following{number}")
        following.end()
        code, text = finish(sandbox.run(following))
        assert code == 0, text
        assert list(sandbox.lock_dir.iterdir()) == []
