"""Real jobs that wait for their turn."""

import fcntl
import os
import re
import signal
import sys

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from sandbox import (
    HERE,
    assert_refused,
    assert_runs,
    finish,
    running_tests,
    start,
    wait_for,
)

pytestmark = needs_avocado_vt


def set_timeout(sandbox, seconds):
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {sandbox.lock_dir}\ntimeout = {seconds}\n")


def start_waiting(sandbox, name="waiting", command=()):
    """Start a job that finds another one at work; return it, its test and what it printed.

    :param command: what runs a job with the recipe that follows, if it is not to be Avocado
    """
    test = sandbox.vt_test(name)
    test.end()
    printed = sandbox.root / f"{name}.printed"
    with printed.open("w") as file:
        streams = {"stdout": file, "stderr": file}
        if command:
            job = sandbox.popen(*command, test.recipe, **streams)
        else:
            job = sandbox.run(test, **streams)
    wait_for(lambda: "Waiting" in printed.read_text(), job)
    return job, test, printed


@pytest.mark.parametrize("timeout", [-1, "-1.0", 100, "60.5"])
def test_waits_until_the_holder_has_ended(sandbox, holder, timeout):
    job_ahead, holding = holder
    set_timeout(sandbox, timeout)
    job, test, printed = start_waiting(sandbox)
    assert len(list(sandbox.lock_dir.iterdir())) == 1
    (lock,) = sandbox.locks()
    told = printed.read_text()
    until = "for as long as it takes" if str(timeout).startswith("-") else r"until [\d-]+ [\d:]+"
    assert re.search(rf"^Waiting {until}: another job holds the lock\.$", told, re.MULTILINE)
    for fact in (f"file:   {lock}", f"PID:    {job_ahead.pid}", "user:   ", "job id: ", "since:  "):
        assert told.count(fact) == 1
    assert not test.has_begun
    holding.end()
    assert finish(job_ahead)[0] == 0
    assert finish(job)[0] == 0
    assert re.search(r"^Obtained the lock after 0:\d\d:\d\d\.$", printed.read_text(), re.MULTILINE)
    assert holding.notes()[-1][1] < test.notes()[0][1]
    assert list(sandbox.lock_dir.iterdir()) == []
    log = (sandbox.home / "avocado/job-results/latest/job.log").read_text()
    assert "Waiting" in log
    assert "Obtained" in log


def test_waits_for_what_is_left_of_a_killed_job(sandbox):
    holding = sandbox.vt_test("holder", guest=True)
    holder = start(sandbox, holding)
    left = {*running_tests(holder), holding.guest}
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(lambda: "processes of it still run" in printed.read_text(), job)
    told = printed.read_text()
    assert f"{holding.guest}  sleep 1000" in told
    assert left == set(map(int, re.findall(r"^ +(\d+)  \S", told, re.MULTILINE)))
    assert "\nA test is among them." in told
    assert re.search(rf"^    kill .*\b{holding.guest}\b", told, re.MULTILINE)
    holding.end()
    # Told again when that changes.
    wait_for(lambda: "\nNo test is among them" in printed.read_text(), job)
    assert not test.has_begun
    os.kill(holding.guest, signal.SIGKILL)
    assert finish(job)[0] == 0
    assert test.has_begun
    assert list(sandbox.lock_dir.iterdir()) == []


@pytest.mark.parametrize("attempt", ["at once", "longer than that"])
def test_out_of_time(sandbox, holder, attempt):
    job_ahead, _ = holder
    set_timeout(sandbox, 0.5)
    directory = os.open(sandbox.lock_dir, os.O_RDONLY)
    if attempt != "at once":
        # It waits for the guard then.
        fcntl.flock(directory, fcntl.LOCK_EX)
    test = sandbox.vt_test("waiting")
    text = assert_refused(sandbox.run(test), test)
    assert re.search(r"out of time after 0:\d\d:\d\d: another job holds the lock\.", text)
    assert f"PID:    {job_ahead.pid}" in text
    assert "set a longer plugins.vtjoblock.timeout." in text
    assert len(list(sandbox.lock_dir.iterdir())) == 1
    os.close(directory)


def test_0_does_not_wait(sandbox, holder):
    set_timeout(sandbox, 0)
    test = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(test), test)
    assert "aiting" not in text


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, None),
        pytest.param(signal.SIGTERM, None, marks=needs_recipes),
        (signal.SIGKILL, -9),
    ],
)
def test_signal_ends_the_waiting(sandbox, holder, signum, code):
    job_ahead, holding = holder
    (lock,) = sandbox.locks()
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    job.send_signal(signum)
    ended = finish(job)[0]
    assert ended == code or (code is None and ended != 0), printed.read_text()
    assert not test.has_begun
    assert list(sandbox.lock_dir.iterdir()) == [lock]
    holding.end()
    assert finish(job_ahead)[0] == 0
    set_timeout(sandbox, 0)
    assert_runs(sandbox, "next")


def test_nobody_can_judge_stops_the_waiting(sandbox, holder):
    job_ahead, holding = holder
    set_timeout(sandbox, -1)
    job, test, printed = start_waiting(sandbox)
    odd = sandbox.lock_dir / f"avocado-vt-joblock-{1:040x}-0-00000001.pid"
    odd.touch()
    holding.end()
    assert finish(job_ahead)[0] == 0
    assert finish(job)[0] == 2
    assert f"cannot tell whether a job still holds {odd}" in printed.read_text()
    assert not test.has_begun
    assert list(sandbox.lock_dir.iterdir()) == [odd]


def test_bad_directory_stops_at_once(sandbox):
    set_timeout(sandbox, -1)
    sandbox.lock_dir.rmdir()
    test = sandbox.vt_test("test")
    assert "does not exist" in assert_refused(sandbox.run(test), test)


def test_five_wait_and_each_has_its_turn(sandbox, holder):
    job_ahead, holding = holder
    set_timeout(sandbox, 100)
    waiting = [start_waiting(sandbox, f"waiting{number}") for number in range(5)]
    # They are nobody's obstacle: a job that does not wait has only the holder in its way.
    assert len(list(sandbox.lock_dir.iterdir())) == 1
    holding.end()
    assert finish(job_ahead)[0] == 0
    for job, _, printed in waiting:
        assert finish(job)[0] == 0, printed.read_text()
    spans = sorted([when for _, when in test.notes()] for _, test, _ in waiting)
    for (_, end), (begin, _) in zip(spans, spans[1:]):
        assert end < begin
    assert list(sandbox.lock_dir.iterdir()) == []


@needs_recipes
def test_has_its_turn_among_jobs_that_do_not_wait(sandbox, holder):
    """Three users try again and again, without waiting."""
    loop = "while ! test -e {stop}; do {python} -m avocado run --disable-sysinfo -- {test}; done"
    job_ahead, holding = holder
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
    command = ("--config", config, "run", "--disable-sysinfo", "--", patient.recipe)
    job = sandbox.avocado(*command)
    holding.end()
    assert finish(job_ahead)[0] == 0
    assert finish(job)[0] == 0
    assert patient.has_begun
    stop.touch()
    for process in loops:
        finish(process)


@needs_other_users
def test_waits_for_another_user(sandboxes):
    holder, other = sandboxes(), sandboxes()
    holder.lock_dir.chmod(0o1777)
    held, test = holder.vt_test("held"), other.vt_test("test")
    holder.belong_to(SOME_USER)
    other.configure(f"[plugins.vtjoblock]\ndir={holder.lock_dir}\ntimeout=-1\n")
    other.belong_to(SOME_USER + 1)
    job = start(holder, held)
    test.end()
    waiting = other.run(test)
    held.end()
    assert finish(job)[0] == 0
    code, text = finish(waiting)
    assert code == 0, text
    assert test.notes()[0][1] > held.notes()[-1][1]


IMPATIENT_REMINDER = """
import sys
import avocado
import avocado_vt_joblock.job as job
job.REMINDER_INTERVAL = 1
sys.path.insert(0, sys.argv.pop(1))
import job_api
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_says_now_and_then_that_it_still_waits(sandbox, holder):
    job_ahead, holding = holder
    set_timeout(sandbox, -1)
    impatient = [sys.executable, "-c", IMPATIENT_REMINDER, HERE, "{}"]
    job, _, printed = start_waiting(sandbox, command=impatient)
    still = r"^Still waiting for as long as it takes, after \d:\d\d:\d\d\.$"
    wait_for(lambda: len(re.findall(still, printed.read_text(), re.MULTILINE)) > 2, job)
    holding.end()
    assert finish(job_ahead)[0] == 0
    assert finish(job)[0] == 0
    # Whose lock it is has not changed, and is not told again.
    assert printed.read_text().count("another job holds the lock") == 1
