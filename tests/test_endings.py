"""Every way for a job to end: no other one runs as long as any of its tests or guests
does.

A guest is a process that a test leaves in a session of its own, as avocado-vt leaves
one.
"""

import json
import os
import re
import signal

import pytest
from endings import ENDINGS
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from others import attempt
from sandbox import (
    AVOCADO,
    GUEST,
    assert_refused,
    assert_runs,
    ended,
    finish,
    start,
    wait_for,
)

from avocado_vt_joblock import ending

pytestmark = needs_avocado_vt
STILL_RUN = r"(?m)\b\d+ process(es)? of the job still runs?:$"
SLEEP = "sleep 1000"
KEEP = "[vt.setup]\nkeep_guest_running = True"


def make_impatient(sandbox):
    """Have no job wait long for what is left of it; to look at that it has its time."""
    sandbox.change("ending", LAST_LOOK_TIME=ending.END_TIMEOUT - 0.1)


@pytest.fixture
def impatient(sandbox):
    make_impatient(sandbox)
    return sandbox


def left(sandbox):
    """Return what keeps the lock of an ended job, as the next job sees that."""
    told = attempt(sandbox.lock_dir)
    return set() if told.state == "WON" else told.pids


# Real guests show the others, which take their time.
QUICK = [this for this in ENDINGS if not this.config or this.name == "job timeout"]


@pytest.mark.parametrize("how", QUICK, ids=lambda how: how.name)
def test_nobody_else_runs_until_all_of_a_job_has_ended(impatient, how):
    if AVOCADO < 105 and re.search("SIGTERM|timeout", how.name):
        pytest.skip("a program that uses the Job API turns SIGTERM into no exit")
    test = impatient.vt_test("test", starts=SLEEP)
    impatient.add_to_config(how.config.format(8))
    job = start(impatient, test)
    (lock,) = impatient.locks()
    how.act(job)
    code, text = finish(job)
    assert code != 0, text
    if code > 0:
        assert re.search(STILL_RUN, text), text
        assert f"{test.guest}  {SLEEP}" in text
        assert re.search(rf"(?m)The lock file stays\b.*\n +{lock}$", text)
    living = set(impatient.living())
    seen = left(impatient)
    # Some may end at this moment.
    assert living & set(impatient.living()) <= seen <= living
    test.end()
    wait_for(lambda: list(impatient.living()) == [test.guest])
    assert left(impatient) == {test.guest}
    assert impatient.locks() == [lock]
    os.kill(test.guest, signal.SIGKILL)
    wait_for(lambda: not impatient.living())
    assert left(impatient) == set()
    assert impatient.locks() == []
    # What the test did after its Avocado had ended was done in peace.
    assert [what for what, _ in test.notes()] in (["begin"], ["begin", "end"])


def test_next_jobs_after_one_that_was_killed(sandbox):
    test = sandbox.vt_test("test", starts=GUEST)
    job = start(sandbox, test)
    (lock,) = sandbox.locks()
    job.kill()
    job.wait()
    # Nobody is told to end a guest beside a test that may be restoring its image.
    for stage, kill in (("test and guest", None), ("guest", test.guest)):
        other = sandbox.vt_test(stage.replace(" ", "-"))
        living = sandbox.living()
        text = assert_refused(sandbox.run(other), other)
        assert "a job has ended, but processes of it still run." in text
        for pid in living:
            assert re.search(rf"^ +{pid}  \S", text, re.MULTILINE), text
        assert ("A test is among them." in text) == (kill is None)
        kills = re.findall(r"^ +kill (.*)$", text, re.MULTILINE)
        assert kills == ([str(kill)] if kill else [])
        test.end()
        wait_for(lambda: list(sandbox.living()) == [test.guest])
    os.kill(test.guest, signal.SIGKILL)
    wait_for(lambda: not sandbox.living())
    text = assert_runs(sandbox, "next")
    for alarm in ("stale", "still", "warning", "killed"):
        assert alarm not in text.lower()
    log = (sandbox.latest / "job.log").read_text()
    assert f"Removed the stale lock file {lock}." in log


@pytest.mark.parametrize(
    ("outcome", "starts", "config", "counts"),
    [
        # On purpose if the test has passed; else avocado-vt says nothing of a failed
        # clean-up.
        ("pass", SLEEP, "", False),
        ("fail", SLEEP, "", True),
        ("error", SLEEP, "", True),
        ("cancel", SLEEP, "", True),
        ("fail", "", "", False),
        # An agent, for example: it is started without the mark.
        ("fail", f"env -u AVOCADO_VT_JOBLOCK {SLEEP}", "", False),
        # The next job uses them, whatever the end of this one.
        pytest.param("fail", SLEEP, KEEP, False, marks=needs_recipes),
    ],
)
def test_guest_that_is_left(sandbox, outcome, starts, config, counts):
    if counts:
        make_impatient(sandbox)
    sandbox.add_to_config(config)
    test = sandbox.vt_test("test", outcome=outcome, starts=starts).end()
    text = ended(sandbox.run(test), outcome in ("fail", "error"))
    assert test.has_begun
    assert bool(re.search(STILL_RUN, text)) == counts
    assert len(sandbox.locks()) == counts
    assert list(sandbox.living()) == ([test.guest] if starts else [])
    assert left(sandbox) == ({test.guest} if counts else set())


@pytest.mark.parametrize(
    ("then", "starts"),
    [
        ("test ends", ""),
        ("Ctrl-C", ""),
        # The test counts even where guests are kept.
        pytest.param("Ctrl-C", SLEEP, marks=needs_recipes),
    ],
)
def test_grace_at_the_end(sandbox, then, starts):
    sandbox.add_to_config(KEEP if starts else "")
    test = sandbox.vt_test("test", starts=starts)
    job = start(sandbox, test)
    job.send_signal(signal.SIGINT)
    log = sandbox.latest / "full.log"
    wait_for(lambda: "Ctrl-C ends the waiting" in log.read_text(), job)
    if then == "test ends":
        test.end()
    else:
        job.send_signal(signal.SIGINT)
    text = ended(job, 8)
    assert bool(re.search(STILL_RUN, text)) == (then == "Ctrl-C")
    assert f"  {SLEEP}" not in text
    assert len(sandbox.locks()) == (then == "Ctrl-C")
    test.end()
    wait_for(lambda: list(sandbox.living()) == ([test.guest] if starts else []))
    assert [what for what, _ in test.notes()] == ["begin", "end"]


def test_guest_of_a_passed_test_in_a_program_that_handles_an_error(sandbox):
    """A job that is run inside of an except block has passed as well."""
    test = sandbox.vt_test("test", starts=SLEEP).end()
    text = ended(sandbox.job_api(test, how={"in_except": True}))
    for alarm in ("still run", "kill ", "waiting"):
        assert alarm not in text.lower()
    assert sandbox.locks() == []
    assert list(sandbox.living()) == [test.guest]


def test_lock_file_is_removed_while_the_job_runs(impatient):
    """Both are said: that, and what is left; and not that the file stays."""
    test = impatient.vt_test("test", outcome="fail", starts=SLEEP)
    job = start(impatient, test)
    (lock,) = impatient.locks()
    lock.unlink()
    test.end()
    text = ended(job, 1)
    assert re.search(STILL_RUN, text)
    assert "The lock file was removed or replaced while the job ran" in text
    assert str(lock) in text
    assert "stays" not in text


def test_ctrl_c_while_it_looks_for_the_rest(sandbox):
    interrupt = "def interrupted(self, **options): raise KeyboardInterrupt\n"
    rooms = "from avocado_vt_joblock import lock\n"
    sandbox.first(f"{interrupt}{rooms}lock.JobLock.find_leftovers = interrupted\n")
    test = sandbox.vt_test("test", outcome="error", starts=SLEEP).end()
    text = ended(sandbox.run(test), 1)
    assert re.search(r"still runs:\s+Ctrl-C ended the look\.", text)
    assert left(sandbox) == {test.guest}


@needs_recipes
def test_standard_output_can_be_the_results(impatient):
    """What there is to tell goes to standard error and into the job's log."""
    test = impatient.vt_test("test", outcome="error", starts=SLEEP).end()
    errors = impatient.root / "errors"
    with errors.open("w") as file:
        _, text = finish(impatient.run(test, options=["--json=-"], stderr=file))
    assert json.loads(text)["errors"] == 1
    log = (impatient.latest / "job.log").read_text()
    for told in (errors.read_text(), log):
        assert len(re.findall(STILL_RUN, told)) == 1


@needs_other_users
def test_other_user_is_told_what_is_not_to_be_seen(sandboxes):
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    test, following = one.vt_test("test", starts=SLEEP), other.vt_test("following")
    other.configure(f"[plugins.vtjoblock]\ndir = {one.lock_dir}\n")
    one.belong_to(SOME_USER)
    other.belong_to(SOME_USER + 1)
    job = start(one, test)
    job.kill()
    job.wait()
    text = assert_refused(other.run(following), following)
    assert "\nA test is among them." in text
    assert "only root can see the guests of other users" in text
    assert not re.search(rf"\b{test.guest}\b", text)
    test.end()
    wait_for(lambda: list(one.living()) == [test.guest])
    following.end()
    text = ended(other.run(following))
    # A limit that the manual tells.
    told = f"A guest of {SOME_USER} may still run"
    step = f"avocado vt-joblock run --vt-joblock-dir {one.lock_dir} true"
    assert re.search(rf"{told}.*{re.escape(step)}", text, re.DOTALL)
