"""Every way for a job to end: no other one runs as long as any of its tests or guests does.

A guest is a process that a test leaves in a session of its own, as avocado-vt leaves one.
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
from sandbox import assert_refused, assert_runs, finish, running_tests, start, wait_for

pytestmark = needs_avocado_vt
STILL_RUN = r"(?m)^\d+ process\(es\) of the job still run\.$"
SLEEP = "sleep 1000"


def killed(pid):
    os.kill(pid, signal.SIGKILL)


def kills(text):
    """The PIDs that a message says to kill."""
    (pids,) = re.findall(r"^ +kill ([\d ]+)$", text, re.MULTILINE) or [""]
    return set(map(int, pids.split()))


def to_avocado(signum):
    return lambda job: job.send_signal(signum)


def to_all(signum, times=1):
    def act(job):
        for _ in range(times):
            os.killpg(job.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(0.5)

    return act


def kill_of(which):
    """Kill the runner (0) or its child, which runs the test (1); end Avocado, which hangs then."""

    def act(job):
        killed(sorted(running_tests(job))[which])
        job.terminate()

    return act


# Only ``avocado run`` turns SIGTERM into an exit; a caller of the Job API may do so.
ENDINGS = {
    "SIGINT": to_avocado(signal.SIGINT),
    "SIGTERM": to_avocado(signal.SIGTERM),
    "SIGHUP": to_avocado(signal.SIGHUP),
    "SIGKILL": to_avocado(signal.SIGKILL),
    "Ctrl-C": to_all(signal.SIGINT),
    "Ctrl-C three times": to_all(signal.SIGINT, times=3),
    "SIGTERM to all": to_all(signal.SIGTERM),
    "SIGKILL to all": to_all(signal.SIGKILL),
    "runner killed": kill_of(0),
    "test killed": kill_of(1),
    "timeout": lambda job: None,
}
NEEDS_RECIPES = {"SIGTERM", "SIGTERM to all", "runner killed", "test killed", "timeout"}


@pytest.mark.parametrize(
    "ending",
    [pytest.param(e, marks=needs_recipes) if e in NEEDS_RECIPES else e for e in ENDINGS],
)
def test_nobody_else_runs_until_all_of_a_job_has_ended(sandbox, ending):
    test = sandbox.vt_test("test", starts=SLEEP)
    job = start(sandbox, test, options=["--job-timeout=10"] if ending == "timeout" else [])
    (lock,) = sandbox.locks()
    ENDINGS[ending](job)
    code, text = finish(job)
    assert code != 0, text
    assert sandbox.locks() == [lock]
    if code > 0:
        assert re.search(STILL_RUN, text), text
        assert f"{test.guest}  {SLEEP}" in text
        assert f"The lock file stays: {lock}." in text
    for stage in ("test and guest", "guest"):
        other = sandbox.vt_test(stage.replace(" ", "-"))
        living = set(sandbox.living())
        text = assert_refused(sandbox.run(other), other)
        assert "a job has ended, but processes of it still run." in text
        for pid in living & set(sandbox.living()):
            assert re.search(rf"^ +{pid}  \S", text, re.MULTILINE), text
        # Nobody is told to end a guest beside a test that may be restoring its image.
        assert kills(text) == (set() if "A test is among them." in text else {test.guest})
        test.end()
        wait_for(lambda: list(sandbox.living()) == [test.guest])
    assert "env -u AVOCADO_VT_JOBLOCK" in text
    killed(test.guest)
    wait_for(lambda: not sandbox.living())
    assert "still run" not in assert_runs(sandbox, "next")
    # What the test did after its Avocado had ended was done in peace.
    assert [what for what, _ in test.notes()] in (["begin"], ["begin", "end"])


@pytest.mark.parametrize("outcome", ["pass", "fail", "error", "cancel"])
def test_guest_that_is_left(sandbox, outcome):
    """On purpose if the test has passed; else avocado-vt says nothing of a failed clean-up."""
    test = sandbox.vt_test("test", outcome=outcome, starts=SLEEP)
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == (outcome in ("fail", "error")), text
    assert bool(re.search(STILL_RUN, text)) == (outcome != "pass")
    assert len(sandbox.locks()) == (outcome != "pass")
    if outcome != "pass":
        other = sandbox.vt_test("other")
        assert kills(assert_refused(sandbox.run(other), other)) == {test.guest}
        killed(test.guest)
        wait_for(lambda: not sandbox.living())
    assert_runs(sandbox, "next")


@pytest.mark.parametrize("outcome", ["fail", "error", "cancel"])
def test_released_when_all_has_ended(sandbox, outcome):
    test = sandbox.vt_test("test", outcome=outcome)
    test.end()
    text = finish(sandbox.run(test))[1]
    assert test.has_begun
    assert "still run" not in text
    assert list(sandbox.lock_dir.iterdir()) == []


@needs_recipes
def test_guests_are_kept_on_purpose(sandbox):
    """avocado-vt's keep_guest_running: the next job uses them, whatever the end of this one."""
    with sandbox.config.open("a") as config:
        config.write("[vt.setup]\nkeep_guest_running = True\n")
    failed = sandbox.vt_test("failed", outcome="fail", starts=SLEEP)
    failed.end()
    assert "still run" not in finish(sandbox.run(failed))[1]
    assert failed.guest in sandbox.living()
    # But a test that still runs counts.
    test = sandbox.vt_test("test", starts=SLEEP)
    job = start(sandbox, test)
    job.send_signal(signal.SIGINT)
    code, text = finish(job)
    assert code == 8, text
    assert re.search(STILL_RUN, text)
    assert f"{test.guest}  {SLEEP}" not in text
    assert len(sandbox.locks()) == 1


@pytest.mark.parametrize("then", ["test ends", "Ctrl-C"])
def test_grace_at_the_end(sandbox, then):
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    job.send_signal(signal.SIGINT)
    log = sandbox.home / "avocado/job-results/latest/full.log"
    wait_for(lambda: "Ctrl-C ends the waiting" in " ".join(log.read_text().split()), job)
    if then == "test ends":
        test.end()
    else:
        job.send_signal(signal.SIGINT)
    code, text = finish(job)
    assert code == 8, text
    assert bool(re.search(STILL_RUN, text)) == (then == "Ctrl-C")
    assert len(sandbox.locks()) == (then == "Ctrl-C")
    test.end()
    wait_for(lambda: not sandbox.living())
    assert [what for what, _ in test.notes()] == ["begin", "end"]
    assert_runs(sandbox, "next")


def test_lock_file_is_removed_while_the_job_runs(sandbox):
    """Both are said: that, and what is left; and not that the file stays."""
    test = sandbox.vt_test("test", outcome="fail", starts=SLEEP)
    job = start(sandbox, test)
    (lock,) = sandbox.locks()
    lock.unlink()
    test.end()
    code, text = finish(job)
    assert code == 1, text
    assert re.search(STILL_RUN, text)
    assert f"The lock file {lock} was removed or replaced while the job ran." in text
    assert "stays" not in text


def test_what_shall_not_count(sandbox):
    """An agent, for example: it is started without the mark."""
    test = sandbox.vt_test("test", outcome="error", starts=f"env -u AVOCADO_VT_JOBLOCK {SLEEP}")
    test.end()
    text = finish(sandbox.run(test))[1]
    assert "still run" not in text
    assert test.guest in sandbox.living()
    assert_runs(sandbox, "next")


def test_shell_that_a_killed_job_has_left(sandbox):
    """In which somebody works: it is not told to end itself, nor does it wait for itself."""
    with sandbox.config.open("a") as config:
        config.write("timeout = -1\n")
    other = sandbox.vt_test("other")
    other.end()
    script = f"until test -e {sandbox.root}/go; do sleep 0.1; done\n"
    again = f"{sys.executable} -m avocado run --disable-sysinfo -- {other.recipe}"
    if not sandbox.reads_recipes:
        again = f"{sys.executable} {Path(__file__).parent}/job_api.py '{{}}' {other.recipe}"
    (sandbox.root / "shell").write_text(f"{script}{again} > {sandbox.root}/printed 2>&1\n")
    test = sandbox.vt_test("test", starts=f"sh {sandbox.root}/shell")
    job = start(sandbox, test)
    job.kill()
    job.wait()
    test.end()
    (sandbox.root / "go").touch()
    wait_for(lambda: not sandbox.living())
    text = (sandbox.root / "printed").read_text()
    assert f"This job was started by {test.guest}" in text
    assert "exec env -u AVOCADO_VT_JOBLOCK bash" in text
    assert kills(text) == set()
    assert not other.has_begun


def test_killed_job_of_which_nothing_is_left(sandbox):
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    (lock,) = sandbox.locks()
    job.kill()
    job.wait()
    test.end()
    wait_for(lambda: not sandbox.living())
    text = assert_runs(sandbox, "next")
    for alarm in ("stale", "still", "warning", "killed"):
        assert alarm not in text.lower()
    log = (sandbox.home / "avocado/job-results/latest/job.log").read_text()
    assert f"Removed the stale lock file {lock}." in log


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
    code, text = finish(other.run(following))
    assert code == 0, text
    # A limit that the manual tells.
    assert "unless guests still run that only the owner and root can see." in text


@needs_recipes
def test_standard_output_can_be_the_results(sandbox):
    test = sandbox.vt_test("test", outcome="error", starts=SLEEP)
    test.end()
    job = sandbox.run(test, options=["--json=-"], stderr=subprocess.DEVNULL)
    assert json.loads(finish(job)[1])["errors"] == 1


def test_command_lines_are_tamed(sandbox):
    """They are anybody's words."""
    odd = "\\033[31m\\n    kill 1\\r" + "x" * 500
    script = f'for i in $(seq 25); do perl -e \'exec {{"sleep"}} "{odd}", 1000\' & done; wait'
    (sandbox.root / "odd").write_text(script)
    test = sandbox.vt_test("test", starts=f"sh {sandbox.root}/odd")
    job = start(sandbox, test)
    wait_for(lambda: sum(b"xxx" in command for command in sandbox.living().values()) == 25)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(other), other)
    assert r"\x1b[31m\n    kill 1\rxxx" in text
    assert not set("\x1b\r") & set(text)
    assert "\n    kill 1\n" not in text
    listed = [line for line in text.splitlines() if "xxx" in line]
    assert max(map(len, listed)) < 200
    assert len(listed) < 25
    assert re.search(r"^    and \d+ more$", text, re.MULTILINE)


INTERRUPTED = """
from avocado_vt_joblock.lock import JobLock
def interrupted(self, tests_only):
    raise KeyboardInterrupt
JobLock.left = interrupted
"""


def test_ctrl_c_while_it_looks_for_the_rest(sandbox):
    test = sandbox.vt_test("test", outcome="error", starts=SLEEP)
    test.end()
    code, text = finish(sandbox.changed(INTERRUPTED, test))
    assert code == 1, text
    assert "still runs: Ctrl-C ended the look." in text
    assert len(sandbox.locks()) == 1
    other = sandbox.vt_test("other")
    assert kills(assert_refused(sandbox.run(other), other)) == {test.guest}
