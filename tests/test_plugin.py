"""Real jobs with real VT tests: what the plugin promises to the users of Avocado."""

import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sandbox import (
    AVOCADO,
    AVOCADO_READS_RECIPES,
    HERE,
    can_act_as_others,
    finish,
    running_tests,
    session,
    wait_for,
)

FAILURE = "Failure trying to set Avocado-VT job lock: "
NAME = re.compile(r"avocado-vt-joblock-([0-9a-f]{40})-(\d+)-[0-9a-z]{8}\.pid")

# Belongs to nobody.
SOME_USER = 54321

pytestmark = pytest.mark.skipif(
    AVOCADO < 105 and sys.version_info >= (3, 13),
    reason=f"avocado-vt {AVOCADO} imports pipes, which is gone from Python 3.13",
)

needs_root = pytest.mark.skipif(not can_act_as_others(), reason="acting as others is not permitted")
needs_recipes = pytest.mark.skipif(
    not AVOCADO_READS_RECIPES, reason=f"avocado run of Avocado {AVOCADO} reads no recipes"
)


def start(sandbox, name="holder"):
    """Start a job, and return it and its test as soon as that runs."""
    test = sandbox.vt_test(name)
    job = sandbox.run(test)
    wait_for(lambda: test.has_begun, job)
    return job, test


def assert_runs(sandbox, name):
    """Assert that a job gets the lock, runs its test and removes the lock."""
    test = sandbox.vt_test(name)
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == 0, text
    assert [what for what, _ in test.notes()] == ["begin", "end"]
    assert sandbox.locks() == []
    return text


def assert_turned_away(sandbox, job, test):
    """Assert that a job ended with the exit code of a failed job before its test ran."""
    code, text = finish(job)
    assert code == 2, text
    assert not test.has_begun
    assert text.count(FAILURE) == 1
    assert "Traceback" not in text
    return text


def exec_recipe(sandbox, until):
    """Make a test of another kind that ends when a file appears."""
    recipe = sandbox.root / "other.json"
    script = f"touch {sandbox.root}/other.begun; until test -e {until}; do sleep 0.02; done"
    recipe.write_text(
        json.dumps({"kind": "exec-test", "uri": "/bin/sh", "args": ["-c", script], "kwargs": {}})
    )
    return recipe


def test_listed_under_job_prepost(sandbox):
    section = re.search(r"\(job\.prepost\):\n(.*?)\n\n", sandbox.output("plugins"), re.DOTALL)
    assert re.search(r"^vt-joblock +Avocado-VT Job Lock/Unlock$", section[1], re.MULTILINE)


def test_lock_file_during_the_job(sandbox):
    job, test = start(sandbox)
    (lock,) = sandbox.locks()
    job_id, uid = NAME.fullmatch(lock.name).groups()
    (id_file,) = (sandbox.home / "avocado/job-results").glob("job-*/id")
    assert job_id == id_file.read_text().strip()
    assert int(uid) == os.getuid()
    assert int(lock.read_text()) == job.pid
    assert stat.S_IMODE(lock.stat().st_mode) == 0o644
    test.end()
    code, text = finish(job)
    assert code == 0, text
    assert list(sandbox.lock_dir.iterdir()) == []


def test_second_job_is_turned_away(sandbox):
    job, test = start(sandbox)
    (lock,) = sandbox.locks()
    other = sandbox.vt_test("other")
    text = assert_turned_away(sandbox, sandbox.run(other), other)
    job_id = NAME.fullmatch(lock.name)[1]
    for told in (str(lock), str(job.pid), job_id, "Wait", "plugins.vtjoblock.dir"):
        assert told in text
    user = subprocess.run(["id", "-un"], check=False, capture_output=True, text=True).stdout.strip()
    user = user or os.getuid()
    assert re.search(rf"user: +{user}$", text, re.MULTILINE)
    since = subprocess.check_output(
        ["date", "-r", lock, "+%Y-%m-%d %H:%M:%S"], text=True, env=sandbox.environment
    ).strip()
    assert re.search(rf"since: +{since}$", text, re.MULTILINE)
    assert sandbox.locks() == [lock]
    test.end()
    assert finish(job)[0] == 0
    assert_runs(sandbox, "next")


def test_released_after_a_failed_test(sandbox):
    test = sandbox.vt_test("failing", outcome="fail")
    test.end()
    code, text = finish(sandbox.run(test))
    assert code == 1, text
    assert test.has_begun
    assert sandbox.locks() == []


# Only ``avocado run`` turns SIGTERM into an exit; a caller of the Job API may do so.
@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=needs_recipes)]
)
def test_released_after_a_signal(sandbox, signum):
    job, _ = start(sandbox)
    assert sandbox.locks()
    job.send_signal(signum)
    code, text = finish(job)
    assert code != 0, text
    assert sandbox.locks() == []
    assert running_tests(job) == {}


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=needs_recipes)]
)
def test_released_after_a_signal_to_all(sandbox, signum):
    # As by Ctrl-C in a terminal, and once more by the impatient.
    job, _ = start(sandbox)
    os.killpg(job.pid, signum)
    wait_for(lambda: job.poll() is not None or not session(job.pid))
    job.send_signal(signum)
    code, text = finish(job)
    assert code != 0, text
    assert sandbox.locks() == []
    assert running_tests(job) == {}


@needs_recipes
def test_test_that_outlives_its_job_is_ended(sandbox):
    test = sandbox.vt_test("endless")
    job = sandbox.run(test, options=["--job-timeout=10"])
    wait_for(lambda: test.has_begun, job)
    code, text = finish(job)
    assert code == 8, text
    assert re.search(r"Killed tests of the job that still ran \(PIDs \d+", text)
    assert running_tests(job) == {}
    assert sandbox.locks() == []
    assert_runs(sandbox, "next")
    assert [what for what, _ in test.notes()] == ["begin"]


def test_leftover_of_a_killed_job_is_removed(sandbox):
    job, test = start(sandbox)
    (lock,) = sandbox.locks()
    job.kill()
    job.wait()
    assert sandbox.locks() == [lock]
    test.end()
    text = assert_runs(sandbox, "next")
    assert "stale" in text
    assert FAILURE not in text


@needs_recipes
def test_other_kinds_neither_take_nor_heed_the_lock(sandbox):
    until = sandbox.root / "other.until"
    other = sandbox.run(exec_recipe(sandbox, until))
    wait_for((sandbox.root / "other.begun").exists, other)
    assert sandbox.locks() == []
    job, test = start(sandbox)
    until.touch()
    assert finish(other)[0] == 0
    code, text = finish(sandbox.run(exec_recipe(sandbox, until)))
    assert code == 0, text
    test.end()
    assert finish(job)[0] == 0


@needs_recipes
def test_dry_run_neither_takes_nor_heeds_the_lock(sandbox):
    # Where it took the lock it would fail, since it could not be created.
    sandbox.configure("[plugins.vtjoblock]\ndir = /proc\n")
    test = sandbox.vt_test("dry")
    code, text = finish(sandbox.run(test, options=["--dry-run"]))
    assert code == 0, text
    assert FAILURE not in text


@needs_recipes
def test_vt_test_among_other_kinds_takes_the_lock(sandbox):
    until = sandbox.root / "other.until"
    until.touch()
    test = sandbox.vt_test("mixed")
    options = ["--max-parallel-tasks=1"]
    job = sandbox.run(exec_recipe(sandbox, until), test, options=options)
    wait_for(lambda: test.has_begun, job)
    assert sandbox.locks()
    test.end()
    assert finish(job)[0] == 0


def test_vt_test_in_the_second_suite_takes_the_lock(sandbox):
    until = sandbox.root / "other.until"
    other = exec_recipe(sandbox, until)
    test = sandbox.vt_test("second")
    job = sandbox.job_api({}, other, test)
    wait_for((sandbox.root / "other.begun").exists, job)
    assert len(sandbox.locks()) == 1
    until.touch()
    test.end()
    code, text = finish(job)
    assert code == 0, text
    assert sandbox.locks() == []


def test_rejected_job_runs_no_pre_job_script(sandbox):
    scripts = sandbox.root / "pre.d"
    scripts.mkdir()
    (scripts / "script").write_text(f"#!/bin/sh\necho ran >> {sandbox.root}/pre\n")
    (scripts / "script").chmod(0o755)
    with sandbox.config.open("a") as config:
        config.write(f"[plugins.jobscripts]\npre = {scripts}\n")
    job, test = start(sandbox)
    ran = sandbox.root / "pre"
    assert ran.read_text() == "ran\n"
    other = sandbox.vt_test("other")
    assert_turned_away(sandbox, sandbox.run(other), other)
    assert ran.read_text() == "ran\n"
    test.end()
    assert finish(job)[0] == 0


def test_post_job_scripts(sandbox):
    scripts = sandbox.root / "post.d"
    scripts.mkdir()
    (scripts / "script").write_text(
        "#!/bin/sh\n"
        f"echo $AVOCADO_JOB_STATUS $(ls {sandbox.lock_dir} | wc -l) >> {sandbox.root}/post\n"
    )
    (scripts / "script").chmod(0o755)
    with sandbox.config.open("a") as config:
        config.write(f"[plugins.jobscripts]\npost = {scripts}\n")
    job, test = start(sandbox)
    other = sandbox.vt_test("other")
    assert_turned_away(sandbox, sandbox.run(other), other)
    test.end()
    assert finish(job)[0] == 0
    # They can tell a job that was turned away, and run when the lock is released.
    assert (sandbox.root / "post").read_text() == "ERROR 1\nPASS 0\n"


@pytest.mark.skipif(AVOCADO < 105, reason=f"Avocado {AVOCADO} has no other way than to exit")
def test_job_api_returns_when_turned_away(sandbox):
    job, test = start(sandbox)
    other = sandbox.vt_test("other")
    text = assert_turned_away(sandbox, sandbox.job_api({}, other), other)
    assert text.endswith("returned 2\n")
    test.end()
    assert finish(job)[0] == 0


def test_details_are_in_the_job_log(sandbox):
    job, test = start(sandbox)
    other = sandbox.vt_test("other")
    assert_turned_away(sandbox, sandbox.run(other), other)
    log = (sandbox.home / "avocado/job-results/latest/job.log").read_text()
    assert FAILURE in log
    assert "Traceback" in log
    test.end()
    assert finish(job)[0] == 0


def test_callers_directory_wins(sandbox):
    directory = sandbox.root / "callers"
    directory.mkdir()
    test = sandbox.vt_test("test")
    job = sandbox.job_api({"plugins.vtjoblock.dir": str(directory)}, test)
    wait_for(lambda: test.has_begun, job)
    assert [NAME.fullmatch(path.name) is None for path in directory.iterdir()] == [False]
    assert sandbox.locks() == []
    test.end()
    assert finish(job)[0] == 0


def test_home_is_expanded(sandbox):
    sandbox.lock_dir = sandbox.home / "locks"
    sandbox.lock_dir.mkdir()
    sandbox.configure("[plugins.vtjoblock]\ndir = ~/locks\n")
    job, test = start(sandbox)
    assert len(sandbox.locks()) == 1
    test.end()
    assert finish(job)[0] == 0


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("/nonexistent/locks", "does not exist"),
        ("/etc/passwd", "is not a directory"),
        ("/proc", "cannot be written"),
        ("locks", "is no absolute path"),
        ("~nobody-of-this-name/locks", "is no absolute path"),
        ("", "no lock directory is set"),
    ],
)
def test_bad_setting_stops_the_job(sandbox, value, complaint):
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {value}\n")
    test = sandbox.vt_test("test")
    test.end()
    text = assert_turned_away(sandbox, sandbox.run(test), test)
    assert complaint in text
    assert f"plugins.vtjoblock.dir = {value!r}" in text
    assert not os.path.lexists("/nonexistent")


@needs_root
def test_directory_of_another_user(sandbox):
    test = sandbox.vt_test("test")
    test.end()
    sandbox.belong_to(SOME_USER)
    os.chown(sandbox.lock_dir, 0, 0)
    text = assert_turned_away(sandbox, sandbox.run(test), test)
    assert "cannot be written: Permission denied" in text


@pytest.mark.parametrize("value", [None, 7, "\0", ["/tmp"]])
def test_bad_value_of_a_caller_stops_the_job(sandbox, value):
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.job_api({"plugins.vtjoblock.dir": value}, test)
    text = assert_turned_away(sandbox, job, test)
    assert f"plugins.vtjoblock.dir = {value!r}" in text


def test_unexpected_error_stops_the_job(sandbox):
    # A suite that is no suite: the plugin cannot even tell whether there are VT tests.
    script = sandbox.root / "broken.py"
    script.write_text(
        "from avocado.core.job import Job\n"
        "from avocado.core.suite import TestSuite\n"
        "suite = TestSuite(name='broken', tests=[])\n"
        "class Broken(list):\n"
        "    def __iter__(self):\n"
        "        raise RuntimeError('unreadable')\n"
        "    def __bool__(self):\n"
        "        return True\n"
        "suite.tests = Broken()\n"
        "with Job({'core.show': ['app']}, [suite]) as job:\n"
        "    raise SystemExit(job.run())\n"
    )
    code, text = finish(sandbox.popen(sys.executable, script))
    assert code == 2, text
    assert f"{FAILURE}RuntimeError: unreadable" in text
    assert "job.log" in text


ODD_INTERRUPTION = """
import signal, sys, time
from avocado_vt_joblock import lock

class Interruption(BaseException):
    pass

def interrupt(signum, frame):
    raise Interruption("from a signal")

def slow_guard(dir_fd):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(60)

signal.signal(signal.SIGALRM, interrupt)
lock._guard = slow_guard
sys.path.insert(0, sys.argv.pop(1))
import job_api
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_odd_interruption_stops_the_job(sandbox):
    # Avocado goes on after an exception that it does not know, even one that is no Exception.
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.popen(sys.executable, "-c", ODD_INTERRUPTION, HERE, "{}", test.recipe)
    text = assert_turned_away(sandbox, job, test)
    assert "Interruption: from a signal" in text
    assert list(sandbox.lock_dir.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="there is no tmpfs in /dev/shm")
@pytest.mark.parametrize("when", [0, 2**40, 2**62])
def test_lock_from_any_time_turns_away(sandbox, when):
    # Other file systems do not keep such times.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        sandbox.configure(f"[plugins.vtjoblock]\ndir = {directory}\n")
        lock = Path(directory) / f"avocado-vt-joblock-{7:040x}-0-00000007.pid"
        lock.write_text("7")
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.utime(lock, (when, when))
            test = sandbox.vt_test("test")
            test.end()
            text = assert_turned_away(sandbox, sandbox.run(test), test)
            assert f"file:   {lock}\n" in text


@needs_recipes
def test_job_of_the_same_id_is_left_alone(sandbox):
    tests = [sandbox.vt_test(name) for name in ("first", "second", "third")]
    options = [f"--force-job-id={'1' * 40}"]
    first = sandbox.run(tests[0], options=options)
    wait_for(lambda: tests[0].has_begun, first)
    # One that is turned away, and one that runs with a lock directory of its own.
    assert_turned_away(sandbox, sandbox.run(tests[1], options=options), tests[1])
    elsewhere = sandbox.root / "elsewhere"
    elsewhere.mkdir()
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {elsewhere}\n")
    tests[2].end()
    assert finish(sandbox.run(tests[2], options=options))[0] == 0
    tests[0].end()
    code, text = finish(first)
    assert code == 0, text


def test_second_interruption_frees_the_lock_only_when_no_test_runs(sandbox):
    job, test = start(sandbox)
    job.send_signal(signal.SIGINT)
    log = sandbox.home / "avocado/job-results/latest/full.log"
    # Then it waits for its test to end, which goes on.
    wait_for(lambda: "RESULTS" in log.read_text(), job)
    job.send_signal(signal.SIGINT)
    finish(job)
    assert running_tests(job) == {}
    assert sandbox.locks() == []
    assert [what for what, _ in test.notes()] == ["begin"]


JOB_WITHOUT_POST = """
import sys
from avocado.core.job import Job
sys.path.insert(0, sys.argv.pop(1))
import job_api

def interrupted(job):
    raise KeyboardInterrupt

Job.render_results = interrupted
for _ in range(2):
    try:
        job_api.main(*sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_job_that_ends_without_post_lets_go(sandbox):
    test = sandbox.vt_test("test")
    job = sandbox.popen(sys.executable, "-c", JOB_WITHOUT_POST, HERE, "{}", test.recipe)
    for begun in (1, 2):
        wait_for(lambda: len(test.notes()) == begun, job)  # noqa: B023
        assert len(sandbox.locks()) == 1
        job.send_signal(signal.SIGINT)
    code, text = finish(job)
    assert code == 0, text
    assert text.count("interrupted\n") == 2
    assert running_tests(job) == {}
    assert [what for what, _ in test.notes()] == ["begin", "begin"]
    assert sandbox.locks() == []


@needs_root
def test_two_users_with_a_directory_each_run_at_once(sandboxes):
    jobs = []
    for uid in (SOME_USER, SOME_USER + 1):
        sandbox = sandboxes()
        sandbox.lock_dir = sandbox.home / "avocado/data/avocado-vt/lockdir"
        sandbox.lock_dir.mkdir()
        sandbox.configure(f"[plugins.vtjoblock]\ndir={sandbox.lock_dir}\n")
        sandbox.belong_to(uid)
        jobs.append(start(sandbox))
        (lock,) = sandbox.locks()
        assert NAME.fullmatch(lock.name)[2] == str(uid)
    for job, test in jobs:
        test.end()
        assert finish(job)[0] == 0


@needs_root
def test_two_users_with_one_directory_run_one_after_the_other(sandboxes):
    holder, other = sandboxes(), sandboxes()
    holder.lock_dir.chmod(0o1777)
    holder.belong_to(SOME_USER)
    other.configure(f"[plugins.vtjoblock]\ndir={holder.lock_dir}\n")
    test = other.vt_test("other")
    other.belong_to(SOME_USER + 1)
    job, held = start(holder)
    text = assert_turned_away(other, other.run(test), test)
    assert f"PID:    {job.pid}\n    user:   {SOME_USER}\n" in text
    held.end()
    assert finish(job)[0] == 0
    test.end()
    assert finish(other.run(test))[0] == 0


def test_config_file_of_avocado_vt_wins(sandbox):
    pattern = r"^    \* .*/(.*)/conf\.d/vt_joblock\.conf$"
    files = re.findall(pattern, sandbox.output("config"), re.MULTILINE)
    assert files == ["avocado", "avocado_vt"]


def test_settings_of_avocado_vt_keep_working(sandbox):
    with sandbox.config.open("a") as config:
        config.write("[vt.qemu]\nsmp = 7\n")
    text = sandbox.output("config")
    assert re.search(r"vt\.qemu\.smp +7$", text, re.MULTILINE)
    assert re.search(rf"plugins\.vtjoblock\.dir +{sandbox.lock_dir}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", [["plugins"], ["config"], ["list"]])
def test_no_message_about_each_other(sandbox, command):
    text = sandbox.output(*command)
    for sign in ("Error running", "Failed to load", "Traceback", "already registered"):
        assert sign not in text


AVOCADO_VT_LOCK = """
import sys, types
import avocado
from avocado_vt.plugins.vt_joblock import VTJobLock
plugin = VTJobLock()
plugin._lock(types.SimpleNamespace(unique_id="0123456789" * 4))
print("locked", flush=True)
sys.stdin.read()
"""


def test_lock_of_avocado_vt_is_honoured(sandbox):
    theirs = sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK, stdin=subprocess.PIPE)
    wait_for(sandbox.locks, theirs)
    (lock,) = sandbox.locks()
    wait_for(lock.read_text, theirs)
    test = sandbox.vt_test("test")
    text = assert_turned_away(sandbox, sandbox.run(test), test)
    assert f"PID:    {theirs.pid}\n" in text
    theirs.kill()
    theirs.wait()
    assert sandbox.locks() == [lock]
    assert_runs(sandbox, "next")


def test_avocado_vt_honours_the_lock(sandbox):
    job, _ = start(sandbox)
    code, text = finish(sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK))
    assert code == 1
    assert f"acquired by PID {job.pid}" in text
    job.kill()
    job.wait()
    # The stale one it removes.
    code, text = finish(sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK))
    assert (code, text.splitlines()[-1]) == (0, "locked")
