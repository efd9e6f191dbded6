"""Real jobs and the ways in which they end: who else may run as long as something of them does.

The tests leave a process behind in a session of its own, as avocado-vt leaves a guest.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

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
STILL_RUN = r"(?m)^\d+ process\(es\) of the job still run\.$"


def killed(pid):
    os.kill(pid, signal.SIGKILL)


def runner_and_test(job):
    """The process that Avocado has started for a test, and its child that runs it."""
    return sorted(running_tests(job))


def interrupted(job):
    job.send_signal(signal.SIGINT)


def terminated(job):
    job.terminate()


def hung_up(job):
    job.send_signal(signal.SIGHUP)


def killed_alone(job):
    job.kill()


def all_interrupted(job):
    os.killpg(job.pid, signal.SIGINT)


def all_terminated(job):
    os.killpg(job.pid, signal.SIGTERM)


def all_killed(job):
    os.killpg(job.pid, signal.SIGKILL)


def all_interrupted_three_times(job):
    for _ in range(3):
        os.killpg(job.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(0.5)


def runner_killed(job):
    killed(runner_and_test(job)[0])
    job.terminate()


def test_killed(job):
    killed(runner_and_test(job)[1])
    job.terminate()


test_killed.__test__ = False


def timed_out(job):
    pass


# Only ``avocado run`` turns SIGTERM into an exit; a caller of the Job API may do so.
ENDINGS = [
    interrupted,
    pytest.param(terminated, marks=needs_recipes),
    hung_up,
    killed_alone,
    all_interrupted,
    pytest.param(all_terminated, marks=needs_recipes),
    all_killed,
    all_interrupted_three_times,
    pytest.param(runner_killed, marks=needs_recipes),
    pytest.param(test_killed, marks=needs_recipes),
    pytest.param(timed_out, marks=needs_recipes),
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_nobody_else_runs_until_all_of_a_job_has_ended(sandbox, ending):
    test = sandbox.vt_test("test", guest=True)
    job = start(sandbox, test, options=["--job-timeout=15"] if ending is timed_out else [])
    (lock,) = sandbox.locks()
    ending(job)
    code, text = finish(job)
    assert code != 0, text
    assert test.guest in sandbox.living()
    assert sandbox.locks() == [lock]
    if code > 0:
        assert re.search(STILL_RUN, text), text
        assert f"{test.guest}  sleep 1000" in text
        assert str(lock) in text
    for stage in ("test and guest", "guest"):
        other = sandbox.vt_test(stage.replace(" ", "-"))
        living = set(sandbox.living())
        text = assert_refused(sandbox.run(other), other)
        assert "a job has ended, but processes of it still run." in text
        for pid in living & set(sandbox.living()):
            assert re.search(rf"^ +{pid}  \S", text, re.MULTILINE), text
        test.end()
        wait_for(lambda: list(sandbox.living()) == [test.guest])
    assert "\nNo test is among them" in text
    (advice,) = re.findall(r"^    (kill [\d ]+)$", text, re.MULTILINE)
    assert test.guest in map(int, advice.split()[1:])
    killed(test.guest)
    wait_for(lambda: not sandbox.living())
    text = assert_runs(sandbox, "next")
    assert "still run" not in text
    # What the test did after its Avocado had ended was done in peace.
    ends = [what for what, _ in test.notes()]
    assert ends in (["begin"], ["begin", "end"])


@pytest.mark.parametrize(
    "options", [{"outcome": "pass"}, {"outcome": "fail"}], ids=lambda options: options["outcome"]
)
def test_guest_that_is_left_on_purpose_does_not_keep_the_lock(sandbox, options):
    test = sandbox.vt_test("test", guest=True, **options)
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == (options["outcome"] == "fail"), text
    assert "still run" not in text
    assert test.guest in sandbox.living()
    assert_runs(sandbox, "next")
    assert test.guest in sandbox.living()


def test_guest_that_is_left_by_a_test_with_an_error_keeps_the_lock(sandbox):
    # It may be left because the clean-up failed.
    test = sandbox.vt_test("test", outcome="error", guest=True)
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == 1, text
    assert re.search(STILL_RUN, text)
    other = sandbox.vt_test("other")
    assert str(test.guest) in assert_refused(sandbox.run(other), other)
    killed(test.guest)
    wait_for(lambda: not sandbox.living())
    assert_runs(sandbox, "next")


@pytest.mark.parametrize("outcome", ["pass", "fail", "error"])
def test_released_when_all_has_ended(sandbox, outcome):
    test = sandbox.vt_test("test", outcome=outcome)
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == (outcome != "pass"), text
    assert test.has_begun
    assert "still run" not in text
    assert list(sandbox.lock_dir.iterdir()) == []


def test_released_when_a_test_ends_within_the_grace(sandbox):
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    job.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C ends the waiting" in full_log(sandbox), job)
    test.end()
    code, text = finish(job)
    assert code == 8, text
    assert not re.search(STILL_RUN, text)
    assert list(sandbox.lock_dir.iterdir()) == []


def full_log(sandbox):
    return (sandbox.home / "avocado/job-results/latest/full.log").read_text()


def test_ctrl_c_ends_the_waiting_for_the_rest(sandbox):
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    job.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C ends the waiting" in full_log(sandbox), job)
    job.send_signal(signal.SIGINT)
    code, text = finish(job)
    # As without it.
    assert code == 8, text
    assert re.search(STILL_RUN, text), text
    assert running_tests(job)
    assert len(sandbox.locks()) == 1
    test.end()
    wait_for(lambda: not sandbox.living())
    assert [what for what, _ in test.notes()] == ["begin", "end"]
    assert_runs(sandbox, "next")


def test_killed_job_of_which_nothing_is_left(sandbox):
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    (lock,) = sandbox.locks()
    job.kill()
    job.wait()
    assert sandbox.locks() == [lock]
    test.end()
    wait_for(lambda: not sandbox.living())
    text = assert_runs(sandbox, "next")
    for alarm in ("stale", "still", "warning", "killed"):
        assert alarm not in text.lower()
    log = (sandbox.home / "avocado/job-results/latest/job.log").read_text()
    assert f"Removed 1 stale lock(s) from {sandbox.lock_dir}." in log


@needs_other_users
def test_other_user_is_told_what_is_not_to_be_seen(sandboxes):
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    test, following = one.vt_test("test", guest=True), other.vt_test("following")
    other.configure(f"[plugins.vtjoblock]\ndir = {one.lock_dir}\n")
    one.belong_to(SOME_USER)
    other.belong_to(SOME_USER + 1)
    job = start(one, test)
    job.kill()
    job.wait()
    text = assert_refused(other.run(following), following)
    assert "\nA test is among them" in text
    assert f"\nThere may be guests, too, that only {SOME_USER} or root can see.\n" in text
    assert not re.search(rf"\b{test.guest}\b", text)
    test.end()
    wait_for(lambda: list(one.living()) == [test.guest])
    following.end()
    code, text = finish(other.run(following))
    assert code == 0, text
    # A limit that the manual tells.
    assert "unless guests still run that only the owner and root can see." in text


@needs_recipes
def test_standard_output_can_be_the_results(sandbox):
    test = sandbox.vt_test("test", guest=True)
    job = start(sandbox, test)
    all_killed(job)
    job.wait()
    killed(test.guest)
    wait_for(lambda: not sandbox.living())
    following = sandbox.vt_test("following", outcome="error")
    following.end()
    job = sandbox.run(following, options=["--json=-"], stderr=subprocess.DEVNULL)
    _, text = finish(job)
    assert json.loads(text)["errors"] == 1


def test_command_lines_are_tamed(sandbox):
    """They are anybody's words."""
    test = sandbox.vt_test("test", guest=True)
    job = start(sandbox, test)
    odd = "\x1b[31m\n    kill 1\r" + "\u202e" + "x" * 500
    script = "import os, sys; os.execv('/bin/sleep', [sys.argv[1], '1000'])"
    words = Path(f"/proc/{test.guest}/environ").read_text().split("\0")
    (mark,) = [word.split("=") for word in words if word.startswith("AVOCADO_VT_JOBLOCK_")]
    environment = {**sandbox.environment, mark[0]: mark[1]}
    others = [sandbox.popen(sys.executable, "-c", script, odd, env=environment) for _ in range(25)]
    wait_for(lambda: all(b"1000" in sandbox.living().get(popen.pid, b"") for popen in others))
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(other), other)
    assert r"\x1b[31m\n    kill 1\r\u202exxx" in text
    assert not set("\x1b\r\u202e") & set(text)
    assert re.findall(r"^    kill .*$", text, re.MULTILINE) != ["    kill 1"]
    assert max(len(line) for line in text.splitlines() if "kill" not in line) < 200
    assert re.search(r"^    and \d+ more$", text, re.MULTILINE)
    assert len(text.splitlines()) < 50


# Sees each look at all processes.
LOOKS = """
import sys
looks = []
sys.addaudithook(lambda event, args: looks.append(args) if event == "os.listdir" else None)
sys.path.insert(0, sys.argv.pop(1))
import job_api, os
code = job_api.main(*sys.argv[1:])
print("looks:", looks.count(("/proc",)))
print("marks:", [name for name in os.environ if name.startswith("AVOCADO_VT_JOBLOCK")])
sys.exit(code)
"""


def test_job_that_ends_well_looks_at_no_other_process(sandbox):
    for outcome in ("pass", "error"):
        test = sandbox.vt_test(outcome, outcome=outcome)
        test.end()
        job = sandbox.popen(sys.executable, "-c", LOOKS, HERE, "{}", test.recipe)
        _, text = finish(job)
        assert test.has_begun, text
        # A test with an error shows that looks would be seen.
        assert ("looks: 0\n" in text) == (outcome == "pass"), text
        assert "marks: []\n" in text


JOB_WITHOUT_POST = """
import sys
from avocado.core.job import Job
sys.path.insert(0, sys.argv.pop(1))
import job_api

def interrupted(job):
    raise KeyboardInterrupt

Job.render_results = interrupted
try:
    job_api.main(*sys.argv[1:])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


THREAD_AT_EXIT = """
import atexit, threading
atexit.register(lambda: threading.Thread(target=print, args=["started"], daemon=True).start())
"""


@pytest.mark.parametrize("guest", [False, True], ids=["nothing left", "guest left"])
def test_job_that_ends_without_post(sandbox, guest):
    _, told = finish(sandbox.popen(sys.executable, "-c", THREAD_AT_EXIT))
    if "can't" in told:
        pytest.skip("this Python starts no thread at its end, and nobody can look then")
    test = sandbox.vt_test("test", guest=guest)
    test.end()
    job = sandbox.popen(sys.executable, "-c", JOB_WITHOUT_POST, HERE, "{}", test.recipe)
    code, text = finish(job)
    assert code == 0, text
    assert text.count("interrupted\n") == 1
    assert len(sandbox.locks()) == guest
    assert bool(re.search(STILL_RUN, text)) == guest


INTERRUPTED_LOOK = """
import sys
import avocado
from avocado_vt_joblock import lock
sys.path.insert(0, sys.argv.pop(1))
import job_api

def interrupted(jobs):
    lock.left_of = there
    raise KeyboardInterrupt

there = lock.left_of
lock.left_of = interrupted
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_ctrl_c_while_it_looks_for_the_rest(sandbox):
    test = sandbox.vt_test("test", outcome="error", guest=True)
    test.end()
    job = sandbox.popen(sys.executable, "-c", INTERRUPTED_LOOK, HERE, "{}", test.recipe)
    code, text = finish(job)
    assert code == 1, text
    assert re.search(STILL_RUN, text), text
    assert f"{test.guest}  sleep 1000" in text
    assert len(sandbox.locks()) == 1


NO_REST = """
import sys
import avocado
from avocado_vt_joblock import processes
processes.SETTLE_TIMEOUT = 0
sys.path.insert(0, sys.argv.pop(1))
import job_api

def restless(pid):
    # As where other processes begin and end all the time.
    if pid == "1":
        raise ProcessLookupError
    return look_at(pid)

look_at = processes._look_at
processes._look_at = restless
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_what_is_seen_in_part_may_be_cleaning_up(sandbox):
    """Nobody is told to end a guest because its test was not seen."""
    test = sandbox.vt_test("test", guest=True)
    job = start(sandbox, test)
    job.kill()
    job.wait()
    test.end()
    wait_for(lambda: list(sandbox.living()) == [test.guest])
    other = sandbox.vt_test("other")
    job = sandbox.popen(sys.executable, "-c", NO_REST, HERE, "{}", other.recipe)
    text = assert_refused(job, other)
    assert "There may be more, tests too: /proc does not show all (processes come and go" in text
    assert "No test is among them" not in text
    assert re.search(rf"^    kill {test.guest}$", text, re.MULTILINE)


INTERRUPTED_RELEASE = """
import gc, sys
import avocado
from avocado_vt_joblock import lock
sys.path.insert(0, sys.argv.pop(1))
import job_api

def interrupted(self):
    lock.JobLock._is_in_place = there
    raise KeyboardInterrupt

there = lock.JobLock._is_in_place
lock.JobLock._is_in_place = interrupted
try:
    job_api.main(*sys.argv[1:])
except KeyboardInterrupt:
    print("interrupted")
gc.collect()
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_interrupted_release(sandbox):
    """The process goes on, and so would the kernel lock."""
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.popen(sys.executable, "-c", INTERRUPTED_RELEASE, HERE, "{}", test.recipe)
    code, text = finish(job)
    assert "interrupted\n" in text
    assert code == 0, text
    assert list(sandbox.lock_dir.iterdir()) == []


TWO_JOBS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import job_api
first, second, elsewhere = sys.argv[1:]
import json
print("first", job_api.main("{}", first))
print("second", job_api.main(json.dumps({"job": {"plugins.vtjoblock.dir": elsewhere}}), second))
"""


def test_jobs_of_one_process_are_told_apart(sandbox):
    """What the first leaves on purpose is nothing of the second, though that ends with an error."""
    elsewhere = sandbox.root / "elsewhere"
    elsewhere.mkdir()
    first = sandbox.vt_test("first", guest=True)
    second = sandbox.vt_test("second", outcome="error")
    first.end()
    second.end()
    words = [HERE, first.recipe, second.recipe, elsewhere]
    code, text = finish(sandbox.popen(sys.executable, "-c", TWO_JOBS, *words))
    assert code == 0, text
    assert first.guest in sandbox.living()
    assert "still run" not in text
    assert sandbox.locks() == list(elsewhere.iterdir()) == []
