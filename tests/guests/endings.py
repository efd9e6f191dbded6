"""The ways in which a job with a guest can end, and what must be so from then on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from home import Contenders, GuestHome, GuestJob, advice, digest, kill
from sandbox import finish, wait_for

#: Long enough for a guest to start, in seconds.
TIMEOUT = 30
WITH_TIMEOUT = ("--job-timeout", str(TIMEOUT))
#: How long a slow clean-up takes, in seconds.
SLOW = 20


class Ending(NamedTuple):
    """A way in which a job ends."""

    name: str
    #: Brings it about.
    act: Callable[[GuestJob], object]
    #: Whether the test cleans up, and so restores the image; else it is killed before that.
    cleans_up: bool = True
    #: A program that goes on for ever, if any.
    stays: str = ""
    #: Whether it runs under nohup(1).
    nohup: bool = False
    #: Whether its test fails.
    fails: bool = False
    #: Whether its clean-up is slow.
    slow: bool = False
    #: Options of ``avocado run``.
    options: tuple[str, ...] = ()
    #: More of Avocado's configuration.
    config: str = ""


def check(home: GuestHome, ending: Ending) -> None:
    """Have a job end, and assert that no other one runs as long as anything of it lives.

    Once nothing of it lives the next one runs, the lock directory is empty, and the image is what
    it was before the job.
    """
    home.set_up(ending.config)
    home.hang_ups("ignore" if ending.nohup else "default")
    job = home.start(
        *ending.options,
        outcome="fail" if ending.fails else "pass",
        clean_up_takes=str(SLOW if ending.slow else 0),
    )
    others = Contenders(job)
    assert others.start_one().refused
    began = time.monotonic()
    ending.act(job)
    others.start_until(job.avocado_has_ended)
    # Once more, beside a test that goes on by itself if there is one.
    others.start_one()
    job.test.end()
    others.start_until(lambda: not job.tests())
    if ending.stays:
        end_what_stays(job, others, ending.stays)
    others.start_until(lambda: not job.living())
    assert not others.start_one().refused
    assert list(home.lock_dir.iterdir()) == []
    restored = digest(home.image) == home.image_before
    gone = max(0, others.last_seen - began)
    print(
        f"{ending.name}: all gone after {gone:.1f} s, {others.refused} of {others.count} other "
        f"jobs refused, image {'restored' if restored else 'changed'}"
    )
    print(finish(job.avocado)[1])
    assert restored or not ending.cleans_up


def end_what_stays(job: GuestJob, others: Contenders, program: str) -> None:
    """Assert that a refusal names what stays, and do what it says."""
    staying = job.running(program)
    assert staying, job.living()
    attempt = others.start_one()
    assert attempt.refused
    print(attempt.text)
    assert staying <= advice(attempt.text), attempt.text
    kill(advice(attempt.text), signal.SIGTERM)
    wait_for(lambda: not job.running(program))


def nothing(job: GuestJob) -> None:
    """Wait for what is configured to happen."""


def own_end(job: GuestJob) -> None:
    """Let the test end."""
    job.test.end()


def to_avocado(signum: int) -> Callable[[GuestJob], None]:
    """Send a signal to Avocado alone."""

    def act(job: GuestJob) -> None:
        job.avocado.send_signal(signum)

    return act


def to_all(signum: int) -> Callable[[GuestJob], None]:
    """Send a signal to the process group, as a terminal does."""

    def act(job: GuestJob) -> None:
        os.killpg(job.avocado.pid, signum)

    return act


def ctrl_c_three_times(job: GuestJob) -> None:
    """Press Ctrl-C as somebody does who grows impatient."""
    for _ in range(3):
        os.killpg(job.avocado.pid, signal.SIGINT)
        time.sleep(1)


def runner_killed(job: GuestJob) -> None:
    """Kill the runner, of which Avocado hears nothing, and end Avocado."""
    kill_and_wait(job, job.runner())
    job.avocado.terminate()


def forked_test_killed(job: GuestJob) -> None:
    """Kill the test, of which its runner hears nothing, and end Avocado."""
    kill_and_wait(job, job.forked_test())
    job.avocado.terminate()


def forked_test_killed_and_timeout(job: GuestJob) -> None:
    """Kill the test; the job is ended by its timeout."""
    kill_and_wait(job, job.forked_test())


def all_but_guest_killed(job: GuestJob) -> None:
    """Kill Avocado, the runner and the test, but nothing of the guest."""
    kill([job.avocado.pid, *job.tests()])


def kill_and_wait(job: GuestJob, pid: int) -> None:
    """Kill a process of a job, and wait until it is gone."""
    kill([pid])
    wait_for(lambda: pid not in job.living())


OWN_END = Ending("own end", own_end)
SIGINT_TO_AVOCADO = Ending("SIGINT to Avocado alone", to_avocado(signal.SIGINT))
SIGKILL_TO_AVOCADO = Ending("SIGKILL to Avocado alone", to_avocado(signal.SIGKILL))
JOB_TIMEOUT = Ending("job timeout", nothing, options=WITH_TIMEOUT)
FEW = [OWN_END, SIGINT_TO_AVOCADO, SIGKILL_TO_AVOCADO, JOB_TIMEOUT]

GUEST = "/qemu-system"
# Where the helpers are killed the guest ends, unless it ignores SIGHUP: see GuestHome.hang_ups().
KILLED = {"cleans_up": False}
KILLED_BUT_GUEST = {"cleans_up": False, "stays": GUEST}
MORE = [
    Ending("failed test", own_end, fails=True),
    Ending("slow clean-up", own_end, slow=True),
    Ending("Ctrl-C", to_all(signal.SIGINT)),
    Ending("Ctrl-C with a slow clean-up", to_all(signal.SIGINT), slow=True),
    Ending("Ctrl-C three times with a slow clean-up", ctrl_c_three_times, slow=True, **KILLED),
    Ending("Ctrl-C under nohup", to_all(signal.SIGINT), nohup=True, stays="tcpdump"),
    Ending("SIGTERM to Avocado alone", to_avocado(signal.SIGTERM), **KILLED),
    Ending("SIGTERM to all", to_all(signal.SIGTERM), **KILLED),
    Ending("SIGTERM to all under nohup", to_all(signal.SIGTERM), nohup=True, **KILLED_BUT_GUEST),
    Ending("SIGKILL to all", to_all(signal.SIGKILL), **KILLED),
    Ending("SIGKILL to all under nohup", to_all(signal.SIGKILL), nohup=True, **KILLED_BUT_GUEST),
    Ending("SIGKILL to Avocado and its tests", all_but_guest_killed, **KILLED_BUT_GUEST),
    Ending("SIGHUP to Avocado alone", to_avocado(signal.SIGHUP)),
    Ending("SIGHUP to all", to_all(signal.SIGHUP), **KILLED),
    Ending("task timeout", nothing, config=f"[task.timeout]\nrunning = {TIMEOUT}\n"),
    Ending("job timeout with a slow clean-up", nothing, slow=True, options=WITH_TIMEOUT),
    Ending("runner killed, then SIGTERM", runner_killed),
    Ending("test killed, then SIGTERM", forked_test_killed, **KILLED_BUT_GUEST),
    Ending(
        "test killed, then job timeout",
        forked_test_killed_and_timeout,
        options=WITH_TIMEOUT,
        **KILLED_BUT_GUEST,
    ),
]
