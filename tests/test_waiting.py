"""Real jobs that wait for their turn."""

import os
import re
import signal

from needs import needs_avocado_vt, needs_recipes
from sandbox import assert_refused, finish, running_tests, start, start_waiting, wait_for

pytestmark = needs_avocado_vt


def test_waits_until_the_holder_has_ended(sandbox, holder):
    job_ahead, holding = holder
    (lock,) = sandbox.locks()
    sandbox.add_to_config("timeout = 60.5")
    # Patience is told of every five minutes: here sooner.
    sandbox.first("from avocado_vt_joblock import plugin\nplugin.REMINDER_INTERVAL = 0.1\n")
    job, test, printed = start_waiting(sandbox, "waiting")
    until = r"until [\d-]+ [\d:]+"
    still = rf"^Still waiting {until}, after 0:00:\d\d\.$"
    wait_for(lambda: len(re.findall(still, printed.read_text(), re.MULTILINE)) > 1, job)
    told = printed.read_text()
    assert re.search(rf"^Waiting {until}: another job holds the lock\.$", told, re.MULTILINE)
    for fact in (f"file:   {lock}", f"PID:    {job_ahead.pid}", "user:   ", "job id: ", "since:  "):
        assert told.count(fact) == 1
    assert not test.has_begun
    next_job, next_test, _ = start_waiting(sandbox, "next")
    holding.end()
    for each in (job_ahead, job, next_job):
        assert finish(each)[0] == 0
    assert re.search(r"^Obtained the lock after 0:\d\d:\d\d\.$", printed.read_text(), re.MULTILINE)
    spans = sorted([when for _, when in each.notes()] for each in (holding, test, next_test))
    (_, end), (next_begin, next_end), (last_begin, _) = spans
    assert end < next_begin < next_end < last_begin
    assert re.search("Waiting.*Obtained", (sandbox.latest / "job.log").read_text(), re.DOTALL)


def test_waits_for_what_is_left_of_a_killed_job(sandbox):
    holding = sandbox.vt_test("holder", starts="sleep 1000")
    holder = start(sandbox, holding)
    left = {*running_tests(holder), holding.guest}
    sandbox.add_to_config("timeout = -1")
    job, test, printed = start_waiting(sandbox, "waiting")
    holder.kill()
    wait_for(lambda: "processes of it still run" in printed.read_text(), job)
    told = printed.read_text()
    assert left == set(map(int, re.findall(r"^ +(\d+)  \S", told, re.MULTILINE)))
    assert "\nA test is among them." in told
    holding.end()
    # Told again when that changes.
    wait_for(lambda: "\nNo test is among them" in printed.read_text(), job)
    assert re.search(rf"^    kill {holding.guest}$", printed.read_text(), re.MULTILINE)
    assert not test.has_begun
    os.kill(holding.guest, signal.SIGKILL)
    assert finish(job)[0] == 0
    assert test.has_begun


def test_out_of_time(sandbox, held_lock):
    sandbox.add_to_config("timeout = 0.5")
    test = sandbox.vt_test("waiting")
    text = assert_refused(sandbox.run(test), test)
    assert re.search(r"out of time after 0:\d\d:\d\d: another job holds the lock\.", text)
    assert f"PID:    {os.getpid()}" in text
    assert "set a longer plugins.vtjoblock.timeout." in text
    assert list(map(str, sandbox.lock_dir.iterdir())) == [held_lock.path]


def test_nobody_can_judge_stops_the_waiting(sandbox, held_lock):
    sandbox.add_to_config("timeout = -1")
    job, test, printed = start_waiting(sandbox, "waiting")
    odd = sandbox.lock_dir / f"avocado-vt-joblock-{1:040x}-0-00000001.pid"
    odd.touch()
    assert finish(job)[0] == 2
    assert f"cannot tell whether a job still holds {odd}" in printed.read_text()
    assert not test.has_begun


@needs_recipes
def test_has_its_turn_among_jobs_that_do_not_wait(sandbox, held_lock):
    """Two users try again and again, without waiting."""
    stop = sandbox.root / "stop"
    loops = []
    for number in range(2):
        impatient = sandbox.vt_test(f"impatient{number}").end()
        job = f"{sandbox.python} -m avocado run --disable-sysinfo -- {impatient.recipe}"
        script = f"while ! test -e {stop}; do {job}; done"
        loops.append(sandbox.popen("sh", "-c", script, stdout=None))
    config = sandbox.root / "patient.conf"
    config.write_text("[plugins.vtjoblock]\ntimeout = -1\n")
    patient = sandbox.vt_test("patient").end()
    job = sandbox.avocado("--config", config, "run", "--disable-sysinfo", "--", patient.recipe)
    held_lock.release()
    assert finish(job)[0] == 0
    assert patient.has_begun
    stop.touch()
    for process in loops:
        finish(process)
