"""Real jobs that wait for their turn."""

import functools
import os
import re
import signal
import sys

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from sandbox import assert_refused, finish, running_tests, start, wait_for

pytestmark = needs_avocado_vt


def set_timeout(sandbox, seconds):
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {sandbox.lock_dir}\ntimeout = {seconds}\n")


def start_waiting(sandbox, name="waiting", change=None):
    """Start a job that finds another one at work; return it, its test and what it prints."""
    test = sandbox.vt_test(name)
    test.end()
    printed = sandbox.root / f"{name}.printed"
    with printed.open("w") as file:
        streams = {"stdout": file, "stderr": file}
        run = functools.partial(sandbox.changed, change) if change else sandbox.run
        job = run(test, **streams)
    wait_for(lambda: "Waiting" in printed.read_text(), job)
    return job, test, printed


def assert_in_turns(*tests):
    """Assert that tests have run, none beside another."""
    spans = sorted([when for _, when in test.notes()] for test in tests)
    assert all(len(span) == 2 for span in spans)
    for (_, end), (begin, _) in zip(spans, spans[1:]):
        assert end < begin


@pytest.mark.parametrize("timeout", [-1, "60.5"])
def test_waits_until_the_holder_has_ended(sandbox, holder, timeout):
    job_ahead, holding = holder
    set_timeout(sandbox, timeout)
    # Patience is told of every five minutes: here sooner.
    change = "from avocado_vt_joblock import plugin\nplugin.REMINDER_INTERVAL = 1"
    job, test, printed = start_waiting(sandbox, change=change)
    (lock,) = sandbox.locks()
    until = "for as long as it takes" if timeout == -1 else r"until [\d-]+ [\d:]+"
    still = rf"^Still waiting {until}, after 0:00:0\d\.$"
    wait_for(lambda: len(re.findall(still, printed.read_text(), re.MULTILINE)) > 1, job)
    told = printed.read_text()
    assert re.search(rf"^Waiting {until}: another job holds the lock\.$", told, re.MULTILINE)
    for fact in (f"file:   {lock}", f"PID:    {job_ahead.pid}", "user:   ", "job id: ", "since:  "):
        assert told.count(fact) == 1
    assert not test.has_begun
    holding.end()
    assert finish(job_ahead)[0] == 0
    assert finish(job)[0] == 0
    assert re.search(r"^Obtained the lock after 0:\d\d:\d\d\.$", printed.read_text(), re.MULTILINE)
    assert_in_turns(holding, test)
    assert list(sandbox.lock_dir.iterdir()) == []
    log = (sandbox.home / "avocado/job-results/latest/job.log").read_text()
    assert "Waiting" in log
    assert "Obtained" in log


def test_waits_for_what_is_left_of_a_killed_job(sandbox):
    holding = sandbox.vt_test("holder", starts="sleep 1000")
    holder = start(sandbox, holding)
    left = {*running_tests(holder), holding.guest}
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(lambda: "processes of it still run" in printed.read_text(), job)
    told = printed.read_text()
    assert left == set(map(int, re.findall(r"^ +(\d+)  \S", told, re.MULTILINE)))
    assert "\nA test is among them." in told
    assert "kill" not in told
    holding.end()
    # Told again when that changes.
    wait_for(lambda: "\nNo test is among them" in printed.read_text(), job)
    assert re.search(rf"^    kill {holding.guest}$", printed.read_text(), re.MULTILINE)
    assert not test.has_begun
    os.kill(holding.guest, signal.SIGKILL)
    assert finish(job)[0] == 0
    assert test.has_begun


def test_out_of_time(sandbox, holder):
    set_timeout(sandbox, 0.5)
    test = sandbox.vt_test("waiting")
    text = assert_refused(sandbox.run(test), test)
    assert re.search(r"out of time after 0:\d\d:\d\d: another job holds the lock\.", text)
    assert f"PID:    {holder[0].pid}" in text
    assert "set a longer plugins.vtjoblock.timeout." in text
    assert len(list(sandbox.lock_dir.iterdir())) == 1


@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=needs_recipes), signal.SIGKILL],
)
def test_signal_ends_the_waiting(sandbox, holder, signum):
    job_ahead, holding = holder
    (lock,) = sandbox.locks()
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    job.send_signal(signum)
    assert finish(job)[0] != 0, printed.read_text()
    assert not test.has_begun
    # In the moment of an attempt SIGKILL leaves its file, which the next job removes.
    assert lock in sandbox.locks()
    holding.end()
    assert finish(job_ahead)[0] == 0
    set_timeout(sandbox, 0)
    following = sandbox.vt_test("next")
    following.end()
    assert finish(sandbox.run(following))[0] == 0


def test_nobody_can_judge_stops_the_waiting(sandbox, holder):
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    odd = sandbox.lock_dir / f"avocado-vt-joblock-{1:040x}-0-00000001.pid"
    odd.touch()
    assert finish(job)[0] == 2
    assert f"cannot tell whether a job still holds {odd}" in printed.read_text()
    assert not test.has_begun


def test_five_wait_and_each_has_its_turn(sandbox, holder):
    _, holding = holder
    set_timeout(sandbox, 100)
    waiting = [start_waiting(sandbox, f"waiting{number}") for number in range(5)]
    holding.end()
    for job, _, printed in waiting:
        assert finish(job)[0] == 0, printed.read_text()
    assert_in_turns(holding, *(test for _, test, _ in waiting))


@needs_recipes
def test_has_its_turn_among_jobs_that_do_not_wait(sandbox, holder):
    """Three users try again and again, without waiting."""
    _, holding = holder
    loop = "while ! test -e {stop}; do {python} -m avocado run --disable-sysinfo -- {test}; done"
    stop = sandbox.root / "stop"
    loops = []
    for number in range(3):
        impatient = sandbox.vt_test(f"impatient{number}")
        impatient.end()
        script = loop.format(stop=stop, python=sys.executable, test=impatient.recipe)
        loops.append(sandbox.popen("sh", "-c", script, stdout=None))
    config = sandbox.root / "patient.conf"
    config.write_text("[plugins.vtjoblock]\ntimeout = -1\n")
    patient = sandbox.vt_test("patient")
    patient.end()
    job = sandbox.avocado("--config", config, "run", "--disable-sysinfo", "--", patient.recipe)
    holding.end()
    assert finish(job)[0] == 0
    assert patient.has_begun
    stop.touch()
    for process in loops:
        finish(process)


@needs_other_users
def test_waits_for_another_user(sandboxes):
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    held, test = one.vt_test("held"), other.vt_test("test")
    one.belong_to(SOME_USER)
    other.configure(f"[plugins.vtjoblock]\ndir={one.lock_dir}\ntimeout=-1\n")
    other.belong_to(SOME_USER + 1)
    job = start(one, held)
    test.end()
    waiting = other.run(test)
    held.end()
    assert finish(job)[0] == 0
    code, text = finish(waiting)
    assert code == 0, text
    assert_in_turns(held, test)
