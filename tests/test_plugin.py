"""Real jobs with real VT tests: what the plugin promises to the users of Avocado."""

import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from sandbox import (
    AVOCADO,
    FAILURE,
    HERE,
    assert_refused,
    assert_runs,
    exec_recipe,
    finish,
    start,
    wait_for,
)

from avocado_vt_joblock.lockfile import take_kernel_lock

NAME = re.compile(r"avocado-vt-joblock-([0-9a-f]{40})-(\d+)-[0-9a-z]{8}\.pid")

pytestmark = needs_avocado_vt


def test_listed_under_job_prepost(sandbox):
    section = re.search(r"\(job\.prepost\):\n(.*?)\n\n", sandbox.output("plugins"), re.DOTALL)
    assert re.search(r"^vt-joblock +Avocado-VT Job Lock/Unlock$", section[1], re.MULTILINE)


def test_listed_once(sandbox):
    # avocado-vt's plugin of this name is switched off.
    assert sandbox.output("plugins").count(" Avocado-VT Job Lock/Unlock\n") == 1


def test_lock_file_during_the_job(sandbox, holder):
    job, test = holder
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


def test_second_job_is_refused(sandbox, holder):
    job, test = holder
    (lock,) = sandbox.locks()
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(other), other)
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


@needs_recipes
def test_other_kinds_ignore_the_lock(sandbox):
    until = sandbox.root / "other.until"
    other = sandbox.run(exec_recipe(sandbox, until))
    wait_for((sandbox.root / "other.begun").exists, other)
    assert sandbox.locks() == []
    test = sandbox.vt_test("holder")
    job = start(sandbox, test)
    until.touch()
    assert finish(other)[0] == 0
    code, text = finish(sandbox.run(exec_recipe(sandbox, until)))
    assert code == 0, text
    test.end()
    assert finish(job)[0] == 0


@needs_recipes
def test_dry_run_ignores_the_lock(sandbox):
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


def test_disabled_suite_does_not_take_the_lock(sandbox):
    # Where it took the lock it would fail, since it could not be created.
    test = sandbox.vt_test("disabled")
    config = {"plugins.vtjoblock.dir": "/proc"}
    code, text = finish(sandbox.job_api(config, test, suites={"enabled": False}))
    assert FAILURE not in text
    assert not test.has_begun
    assert code == 0, text


def test_refused_job_runs_no_pre_job_script(sandbox):
    ran = job_scripts(sandbox, "pre", "echo ran")
    test, other = sandbox.vt_test("test"), sandbox.vt_test("other")
    job = start(sandbox, test)
    assert ran.read_text() == "ran\n"
    assert_refused(sandbox.run(other), other)
    assert ran.read_text() == "ran\n"
    test.end()
    assert finish(job)[0] == 0


def test_post_job_scripts(sandbox):
    ran = job_scripts(sandbox, "post", f"echo $AVOCADO_JOB_STATUS $(ls {sandbox.lock_dir} | wc -l)")
    test, other = sandbox.vt_test("test"), sandbox.vt_test("other")
    job = start(sandbox, test)
    assert_refused(sandbox.run(other), other)
    test.end()
    assert finish(job)[0] == 0
    # They can tell a job that was refused, and run when the lock is released.
    assert ran.read_text() == "ERROR 1\nPASS 0\n"


def job_scripts(sandbox, phase, command):
    """Have all jobs run a command before or after; return the file of what it prints."""
    scripts = sandbox.root / f"{phase}.d"
    scripts.mkdir()
    printed = sandbox.root / phase
    (scripts / "script").write_text(f"#!/bin/sh\n{command} >> {printed}\n")
    (scripts / "script").chmod(0o755)
    with sandbox.config.open("a") as config:
        config.write(f"[plugins.jobscripts]\n{phase} = {scripts}\n")
    return printed


@pytest.mark.skipif(AVOCADO < 105, reason=f"Avocado {AVOCADO} has no other way than to exit")
def test_job_api_returns_when_refused(sandbox, holder):
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.job_api({}, other), other)
    assert text.endswith("returned 2\n")


def test_details_are_in_the_job_log(sandbox, holder):
    other = sandbox.vt_test("other")
    assert_refused(sandbox.run(other), other)
    log = job_log(sandbox)
    assert FAILURE in log
    assert "Traceback" in log


def job_log(sandbox):
    return (sandbox.home / "avocado/job-results/latest/job.log").read_text()


def test_warnings_are_on_standard_error_and_in_the_job_log(sandbox):
    sandbox.lock_dir.chmod(0o777)
    test = sandbox.vt_test("test")
    test.end()
    errors = sandbox.root / "errors"
    with errors.open("w") as file:
        code, text = finish(sandbox.run(test, stderr=file))
    assert code == 0, text
    warning = f"chmod +t {sandbox.lock_dir}"
    assert warning not in text
    assert errors.read_text().count(warning) == 1
    assert job_log(sandbox).count(warning) == 1


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
    test = sandbox.vt_test("test")
    job = start(sandbox, test)
    assert len(sandbox.locks()) == 1
    test.end()
    assert finish(job)[0] == 0


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("/nonexistent/locks", "does not exist"),
        ("/etc/passwd", "is not a directory"),
        ("/proc", "cannot be written"),
        ("locks", "is not an absolute path"),
        ("~nobody-of-this-name/locks", "is not an absolute path"),
        ("", "no lock directory is set"),
        ("/" + "x" * 300, "cannot be opened"),
        ("{root}/loop", "cannot be opened"),
    ],
)
def test_bad_setting_stops_the_job(sandbox, value, complaint):
    (sandbox.root / "loop").symlink_to("loop")
    value = value.format(root=sandbox.root)
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {value}\n")
    test = sandbox.vt_test("test")
    test.end()
    text = assert_refused(sandbox.run(test), test)
    assert complaint in text
    assert f"plugins.vtjoblock.dir = {value!r}" in text
    assert "Set dir in section [plugins.vtjoblock] of ~/.config/avocado/avocado.conf." in text
    assert not os.path.lexists("/nonexistent")


def test_advice_in_an_activated_environment(sandbox):
    """Avocado reads another file there: the one that the message names."""
    environment = {**sandbox.environment, "VIRTUAL_ENV": str(sandbox.root / "activated")}
    config = sandbox.root / "activated/.config/avocado/avocado.conf"
    config.parent.mkdir(parents=True)
    config.write_text("[plugins.vtjoblock]\ndir = /nonexistent\n")
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test, env=environment), test)
    assert f"Set dir in section [plugins.vtjoblock] of {config}." in text
    config.write_text(f"[plugins.vtjoblock]\ndir = {sandbox.lock_dir}\n")
    test.end()
    code, text = finish(sandbox.run(test, env=environment))
    assert code == 0, text


@pytest.mark.parametrize("value", ["soon", "", "-2", "nan", "inf", "1 h", "1e999"])
def test_bad_timeout_stops_the_job(sandbox, value):
    with sandbox.config.open("a") as config:
        config.write(f"timeout = {value}\n")
    test = sandbox.vt_test("test")
    test.end()
    text = assert_refused(sandbox.run(test), test)
    assert f"plugins.vtjoblock.timeout = {value!r} is not a time to wait" in text
    assert "-1 to wait for as long as it takes" in text
    assert "Set timeout in section [plugins.vtjoblock]" in text
    assert list(sandbox.lock_dir.iterdir()) == []


@needs_recipes
def test_bad_timeout_is_nothing_to_jobs_without_vt_tests(sandbox):
    with sandbox.config.open("a") as config:
        config.write("timeout = soon\n")
    until = sandbox.root / "until"
    until.touch()
    code, text = finish(sandbox.run(exec_recipe(sandbox, until)))
    assert code == 0, text


@pytest.mark.parametrize("value", [True, None, [1], {}, 10**400])
def test_bad_timeout_of_a_caller_stops_the_job(sandbox, value):
    test = sandbox.vt_test("test")
    test.end()
    text = assert_refused(sandbox.job_api({"plugins.vtjoblock.timeout": value}, test), test)
    assert f"plugins.vtjoblock.timeout = {value!r} is not a time to wait" in text


@needs_other_users
def test_directory_of_another_user(sandbox):
    test = sandbox.vt_test("test")
    test.end()
    sandbox.belong_to(SOME_USER)
    os.chown(sandbox.lock_dir, 0, 0)
    text = assert_refused(sandbox.run(test), test)
    assert "cannot be written: Permission denied" in text


@needs_other_users
def test_lock_of_another_user_that_nobody_can_judge(sandboxes):
    """Its owner is named, and no other lock directory advised: that would not keep jobs apart."""
    owner, other = sandboxes(), sandboxes()
    owner.lock_dir.chmod(0o1777)
    lock = owner.lock_dir / f"avocado-vt-joblock-{1:040x}-{SOME_USER}-00000001.pid"
    lock.touch()
    os.chown(lock, SOME_USER, SOME_USER)
    other.configure(f"[plugins.vtjoblock]\ndir={owner.lock_dir}\n")
    test = other.vt_test("test")
    other.belong_to(SOME_USER + 1)
    text = assert_refused(other.run(test), test)
    assert f"cannot tell whether a job still holds {lock}: there is no PID in it." in text
    assert f"Its owner is {SOME_USER}. If no job, test or guest of {SOME_USER} runs" in text
    assert "lock directory" not in text
    assert "plugins.vtjoblock.dir" not in text


def test_lock_that_nobody_can_judge_is_removed_as_advised(sandbox):
    sandbox.lock_dir = sandbox.root / "two words"
    sandbox.lock_dir.mkdir()
    sandbox.configure(f"[plugins.vtjoblock]\ndir={sandbox.lock_dir}\n")
    lock = sandbox.lock_dir / f"avocado-vt-joblock-{1:040x}-0-00000001.pid"
    lock.touch()
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test), test)
    (advice,) = re.findall(r"^    (rm .*)$", text, re.MULTILINE)
    finish(sandbox.popen("sh", "-c", advice))
    assert_runs(sandbox, "next")


@pytest.mark.parametrize("value", [None, 7, "\0", ["/tmp"]])
def test_bad_value_of_a_caller_stops_the_job(sandbox, value):
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.job_api({"plugins.vtjoblock.dir": value}, test)
    text = assert_refused(job, test)
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


CHANGED_AVOCADO = """
import sys
import avocado
from avocado.core.job import Job
from avocado.core.suite import TestSuite
what = sys.argv.pop(1)
suite = TestSuite(name="test", tests=[])
if what == "no kind":
    suite.tests = [object()]
else:
    suite = None
    sys.path.insert(0, sys.argv.pop(1))
    import job_api

def refuse(job, value):
    if value == "ERROR":
        raise AttributeError("read-only")

if what == "status":
    Job.status = property(lambda job: "RUNNING", refuse)
if suite:
    with Job({"core.show": ["app"]}, [suite]) as job:
        sys.exit(job.run())
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_tests_without_a_kind_stop_the_job(sandbox):
    # Nobody can tell whether they are VT tests.
    code, text = finish(sandbox.popen(sys.executable, "-c", CHANGED_AVOCADO, "no kind"))
    assert code == 2, text
    assert f"{FAILURE}AttributeError: 'object' object has no attribute 'kind'" in text


def test_job_whose_status_cannot_be_set_is_refused_all_the_same(sandbox, holder):
    other = sandbox.vt_test("other")
    words = [sys.executable, "-c", CHANGED_AVOCADO, "status", HERE, "{}", other.recipe]
    assert "another job holds the lock" in assert_refused(sandbox.popen(*words), other)


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
lock._take_guard = slow_guard
sys.path.insert(0, sys.argv.pop(1))
import job_api
sys.exit(job_api.main(*sys.argv[1:]))
"""


def test_odd_interruption_stops_the_job(sandbox):
    # Avocado goes on after an exception that it does not know, even one that is no Exception.
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.popen(sys.executable, "-c", ODD_INTERRUPTION, HERE, "{}", test.recipe)
    text = assert_refused(job, test)
    assert "Interruption: from a signal" in text
    assert list(sandbox.lock_dir.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="there is no tmpfs in /dev/shm")
@pytest.mark.parametrize("when", [0, 2**40, 2**62])
def test_lock_from_any_time_refuses(sandbox, when):
    # Other file systems do not keep such times.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        sandbox.configure(f"[plugins.vtjoblock]\ndir = {directory}\n")
        lock = Path(directory) / f"avocado-vt-joblock-{7:040x}-0-00000007.pid"
        lock.write_text("7")
        with lock.open("r+") as file:
            take_kernel_lock(file.fileno())
            os.utime(lock, (when, when))
            test = sandbox.vt_test("test")
            test.end()
            text = assert_refused(sandbox.run(test), test)
            assert f"file:   {lock}\n" in text


GONE = [
    ("avocado.core", "exit_codes"),
    ("avocado.core", "extension_manager"),
    ("avocado.core", "settings"),
    ("avocado.core.exceptions", "JobError"),
    ("avocado.core.extension_manager", "PluginPriority"),
    ("avocado.core.job", "Job"),
    ("avocado.core.output", "LOG_JOB"),
    ("avocado.core.output", "LOG_UI"),
    ("avocado_vt_joblock.job", "LockedJob"),
    ("avocado_vt_joblock.job", "explain"),
    ("avocado_vt_joblock.processes", "left_of"),
    ("avocado_vt_joblock.settings", "DIR"),
]
WITHOUT = """
import builtins, sys
module, gone, *sys.argv[1:] = sys.argv[1:]
real_import = builtins.__import__

def without(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {}).get("__name__", "").startswith("avocado_vt_joblock")
    if ours and name == module and gone in (fromlist or ()):
        raise ImportError(f"cannot import name {gone!r} from {module!r}")
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = without
from avocado.core.main import main
sys.exit(main())
"""


@needs_recipes
@pytest.mark.parametrize(("module", "gone"), GONE, ids=".".join)
def test_later_avocado_without_something_does_not_run_unlocked(sandbox, holder, module, gone):
    """As when a name that this package imports is gone; never are VT tests run unlocked."""
    test = sandbox.vt_test("test")
    command = [sys.executable, "-c", WITHOUT, module, gone, "run", "--disable-sysinfo"]
    text = assert_refused(sandbox.popen(*command, "--", test.recipe), test)
    assert "Failed to load plugin" not in text or module == "avocado.core"
    assert len(sandbox.locks()) == 1


@needs_recipes
def test_job_of_the_same_id_is_left_alone(sandbox):
    tests = [sandbox.vt_test(name) for name in ("first", "second", "third")]
    options = [f"--force-job-id={'1' * 40}"]
    first = sandbox.run(tests[0], options=options)
    wait_for(lambda: tests[0].has_begun, first)
    # One that is refused, and one that runs with a lock directory of its own.
    assert_refused(sandbox.run(tests[1], options=options), tests[1])
    elsewhere = sandbox.root / "elsewhere"
    elsewhere.mkdir()
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {elsewhere}\n")
    tests[2].end()
    assert finish(sandbox.run(tests[2], options=options))[0] == 0
    tests[0].end()
    code, text = finish(first)
    assert code == 0, text


@needs_other_users
def test_two_users_with_a_directory_each_run_at_once(sandboxes):
    jobs = []
    for uid in (SOME_USER, SOME_USER + 1):
        sandbox = sandboxes()
        sandbox.lock_dir = sandbox.home / "avocado/data/avocado-vt/lockdir"
        sandbox.lock_dir.mkdir()
        sandbox.configure(f"[plugins.vtjoblock]\ndir={sandbox.lock_dir}\n")
        test = sandbox.vt_test("test")
        sandbox.belong_to(uid)
        jobs.append((start(sandbox, test), test))
        (lock,) = sandbox.locks()
        assert NAME.fullmatch(lock.name)[2] == str(uid)
    for job, test in jobs:
        test.end()
        assert finish(job)[0] == 0


@needs_other_users
def test_two_users_with_one_directory_run_one_after_the_other(sandboxes):
    holder, other = sandboxes(), sandboxes()
    holder.lock_dir.chmod(0o1777)
    held, test = holder.vt_test("held"), other.vt_test("other")
    holder.belong_to(SOME_USER)
    other.configure(f"[plugins.vtjoblock]\ndir={holder.lock_dir}\n")
    other.belong_to(SOME_USER + 1)
    job = start(holder, held)
    text = assert_refused(other.run(test), test)
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
    text = assert_refused(sandbox.run(test), test)
    assert f"PID:    {theirs.pid}\n" in text
    theirs.kill()
    theirs.wait()
    assert sandbox.locks() == [lock]
    assert_runs(sandbox, "next")


def test_avocado_vt_honours_the_lock(sandbox):
    job = start(sandbox, sandbox.vt_test("test"))
    code, text = finish(sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK))
    assert code == 1
    assert f"acquired by PID {job.pid}" in text
    job.kill()
    job.wait()
    # The stale one it removes.
    code, text = finish(sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK))
    assert (code, text.splitlines()[-1]) == (0, "locked")


MENDED_AVOCADO_VT = """
import sys
import avocado
from avocado_vt.plugins.vt_joblock import VTJobLock

def pre_tests(self, job):
    if any(test.kind == "avocado-vt" for suite in job.test_suites for test in suite.tests or ()):
        try:
            self._lock(job)
        except Exception as error:
            print("avocado-vt:", error)
            sys.exit(2)

VTJobLock.pre_tests = pre_tests
sys.path.insert(0, sys.argv.pop(1))
import job_api
sys.exit(job_api.main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("disable", [None, "[]", "['result_events.vt-joblock']"])
def test_mended_plugin_of_avocado_vt(sandbox, disable):
    """It would meet this one's lock file. So it is off, unless a user's list replaces that."""
    if disable:
        with sandbox.config.open("a") as config:
            config.write(f"[plugins]\ndisable = {disable}\n")
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.popen(sys.executable, "-c", MENDED_AVOCADO_VT, HERE, "{}", test.recipe)
    code, text = finish(job)
    if disable == "[]":
        assert code == 2, text
        assert f"acquired by PID {job.pid}" in text
    else:
        assert code == 0, text
        assert test.has_begun
    assert sandbox.locks() == []
