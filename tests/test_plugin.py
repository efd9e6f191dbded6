"""Real jobs with real VT tests: which take the lock, and what a refused one does and shows."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from sandbox import FAILURE, assert_refused, assert_runs, ended, start, start_waiting, wait_for

HELD = "another job holds the lock"

pytestmark = needs_avocado_vt


def exec_recipe(sandbox, until):
    """Make a test of another kind that ends when a file appears."""
    path = sandbox.root / "other.json"
    script = f"touch {sandbox.root}/other.begun; until test -e {until}; do sleep 0.02; done"
    recipe = {"kind": "exec-test", "uri": "/bin/sh", "args": ["-c", script], "kwargs": {}}
    path.write_text(json.dumps(recipe))
    return path


def test_plugins_and_settings_beside_those_of_avocado_vt(sandbox):
    sandbox.add_to_config("[vt.qemu]\nsmp = 7")
    plugins, config, listed = map(sandbox.output, ("plugins", "config", "list"))
    for sign in ("Error running", "Failed to load", "Traceback", "already registered"):
        assert sign not in plugins + config + listed
    section = re.search(r"\(job\.prepost\):\n(.*?)\n\n", plugins, re.DOTALL)
    assert re.search(r"^vt-joblock +Avocado-VT Job Lock/Unlock$", section[1], re.MULTILINE)
    # avocado-vt's plugin of this name is switched off.
    assert plugins.count(" Avocado-VT Job Lock/Unlock\n") == 1
    assert re.search(r"vt\.qemu\.smp +7$", config, re.MULTILINE)
    assert re.search(rf"plugins\.vtjoblock\.dir +{sandbox.lock_dir}$", config, re.MULTILINE)
    # avocado-vt's file wins.
    pattern = r"^    \* .*/(.*)/conf\.d/vt_joblock\.conf$"
    assert re.findall(pattern, config, re.MULTILINE) == ["avocado", "avocado_vt"]


def test_lock_file_of_a_vt_test_in_the_second_suite(sandbox):
    """In the caller's directory, which wins over the user's; ~ is expanded."""
    sandbox.lock_dir = sandbox.home / "locks"
    sandbox.lock_dir.mkdir()
    until = sandbox.root / "other.until"
    test = sandbox.vt_test("second")
    job = sandbox.job_api({"plugins.vtjoblock.dir": "~/locks"}, exec_recipe(sandbox, until), test)
    wait_for((sandbox.root / "other.begun").exists, job)
    (lock,) = sandbox.locks()
    job_id = (sandbox.latest / "id").read_text().strip()
    assert lock.name.startswith(f"avocado-vt-joblock-{job_id}-{os.getuid()}-")
    assert int(lock.read_text()) == job.pid
    until.touch()
    test.end()
    ended(job)
    assert test.has_begun
    assert list(sandbox.lock_dir.iterdir()) == []


@pytest.mark.parametrize("how", ["disabled", pytest.param("dry run", marks=needs_recipes)])
def test_jobs_that_run_no_vt_test_ignore_the_lock(sandbox, how):
    # Where they took the lock they would fail, since it could not be created, nor for so long.
    sandbox.configure("[plugins.vtjoblock]\ndir = /proc\ntimeout = soon\n")
    test, until = sandbox.vt_test("test"), sandbox.root / "until"
    until.touch()
    if how == "disabled":
        job = sandbox.job_api({}, exec_recipe(sandbox, until), test, disabled=1)
    else:
        job = sandbox.run(test, options=["--dry-run"])
    text = ended(job)
    assert FAILURE not in text
    assert (sandbox.root / "other.begun").exists() == (how == "disabled")
    assert not test.has_begun


def test_refused_job(sandbox, holder):
    job, _ = holder
    (lock,) = sandbox.locks()
    job_id = (sandbox.latest / "id").read_text().strip()
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(*[other] * 100), other)
    assert len(text.splitlines()) < 50
    user = ended(sandbox.popen("id", "-un"))
    since = ended(sandbox.popen("date", "-r", lock, "+%Y-%m-%d %H:%M:%S"))
    facts = {"file": lock, "PID": job.pid, "job id": job_id, "user": user, "since": since}
    for fact, value in facts.items():
        assert re.search(rf"^    {fact}: +{str(value).strip()}$", text, re.MULTILINE), text
    assert sandbox.locks() == [lock]
    log = (sandbox.latest / "job.log").read_text()
    assert "Traceback" in log[log.index(FAILURE) :]
    suite = ElementTree.parse(sandbox.latest / "results.xml").getroot()
    (case,) = suite.iter("testcase")
    error = case.find("error")
    assert (suite.get("errors"), case.get("name")) == ("1", "vt-joblock")
    assert error.get("message") == f"{FAILURE}{HELD}."
    assert str(lock) in error.text
    report = json.loads((sandbox.latest / "results.json").read_text())
    (shown,) = report["tests"]
    assert (report["errors"], shown["name"], shown["status"]) == (1, "vt-joblock", "ERROR")
    assert shown["fail_reason"] == f"{FAILURE}{HELD}."
    assert re.search(r" (1|100) \(0/0/1/0\)$", sandbox.output("jobs", "list"), re.MULTILINE)
    assert re.search(r"vt-joblock .*ERROR", sandbox.output("jobs", "show"))


@needs_recipes  # An older Avocado has no other way than to exit.
def test_job_api_returns_when_refused(sandbox, held_lock):
    other = sandbox.vt_test("other")
    assert assert_refused(sandbox.job_api({}, other), other).endswith("returned 2\n")
    # The plugin for HTML is installed beside the newest.
    assert HELD in (sandbox.latest / "results.html").read_text()


RECORDER = """
from avocado.core.plugin_interfaces import JobPost, JobPostTests, JobPre, JobPreTests
from pathlib import Path

def note(job, what):
    locks = len(list(Path(job.config["plugins.vtjoblock.dir"]).iterdir()))
    with Path("{record}").open("a") as file:
        file.write(f"{{job.unique_id}} {{what}} {{locks}}\\n")

class Events(JobPreTests, JobPostTests):
    name = description = "recorder"
    def __init__(self, config=None): pass
    def pre_tests(self, job): note(job, "pre_tests")
    def post_tests(self, job): note(job, "post_tests")

class Job(JobPre, JobPost):
    name = description = "zz-recorder"
    priority = 0
    def pre(self, job): note(job, "pre")
    def post(self, job): note(job, "post")
"""
ALL = ["script", "pre", "pre_tests", "post_tests", "script", "post"]


@pytest.fixture
def recorded(sandbox):
    """What other plugins do, as a function: lines of job, what, locks."""
    record = sandbox.root / "recorded"
    source = RECORDER.format(record=record)
    sandbox.plugin("recorder", source, result_events="Events", job__prepost="Job")
    scripts = sandbox.root / "scripts"
    scripts.mkdir()
    line = f"echo $AVOCADO_JOB_UNIQUE_ID script $(ls {sandbox.lock_dir} | wc -l) >> {record}"
    (scripts / "script").write_text(f"#!/bin/sh\n{line}\n")
    (scripts / "script").chmod(0o755)
    config = f"[plugins.jobscripts]\npre = {scripts}\npost = {scripts}\n"
    sandbox.configure(f"{config}{sandbox.config.read_text()}")
    return lambda: [line.split() for line in record.read_text().splitlines()]


def test_job_without_the_lock_undoes_nothing(sandbox, recorded):
    """Of what the holder has set up, with other plugins, while it has the lock."""
    holding = sandbox.vt_test("holder")
    job = start(sandbox, holding)
    (lock,) = sandbox.locks()
    holder_id = recorded()[0][0]
    refused = sandbox.vt_test("refused")
    assert_refused(sandbox.run(refused), refused)
    sandbox.add_to_config("timeout = -1")
    for signum in (signal.SIGINT, signal.SIGTERM):
        waiting, test, printed = start_waiting(sandbox, signum.name)
        waiting.send_signal(signum)
        assert waiting.wait(60) != 0, printed.read_text()
        assert not test.has_begun
    holding.end()
    ended(job)
    assert lock not in sandbox.locks()
    assert [what for job_id, what, _ in recorded() if job_id == holder_id] == ALL
    # Others run the post() of other plugins, but neither their post_tests() nor a script.
    assert {what for job_id, what, _ in recorded() if job_id != holder_id} <= {"post"}
    assert "0" not in [locks for _, _, locks in recorded()]


AGAIN = """
from avocado.core import job
from pathlib import Path
class Again(job.Job):
    def run(self):
        first = super().run()
        Path({until!r}).touch()
        while list(Path(self.config["plugins.vtjoblock.dir"]).iterdir()):
            pass
        print("codes:", first, super().run())
        return 0
job.Job = Again
"""


@needs_recipes
def test_refused_job_may_run_again(sandbox, holder, recorded):
    _, holding = holder
    sandbox.first(AGAIN.format(until=str(holding.until)))
    test = sandbox.vt_test("test").end()
    text = ended(sandbox.run(test))
    assert "codes: 2 2\n" in text  # Avocado never takes a code back.
    assert test.has_begun
    assert [what for _, what, _ in recorded()] == ["post", *ALL]


@needs_recipes
def test_job_inside_of_a_job_is_refused_whatever_the_timeout(sandbox):
    inner = sandbox.vt_test("inner")
    run = f"{sys.executable} -m avocado --config {sandbox.root}/inner.conf run -- {inner.recipe}"
    (sandbox.root / "inner.conf").write_text("[plugins.vtjoblock]\ntimeout = -1\n")
    outer = sandbox.vt_test("outer", runs=run).end()
    ended(sandbox.run(outer))
    assert "this is the job that you are in" in outer.printed.read_text()
    assert not inner.has_begun
    assert sandbox.locks() == []


@pytest.mark.parametrize(
    ("option", "value", "complaint", "where"),
    [
        ("dir", "/proc", "cannot be written: No such file or directory", "~"),
        ("timeout", "soon", "is not a time to wait", "~"),
        # Avocado reads another file in an activated environment: the one that the message names.
        ("dir", "/nonexistent", "does not exist", "activated"),
    ],
)
def test_bad_setting_stops_the_job(sandbox, option, value, complaint, where):
    environment, place = sandbox.environment, "~"
    kept = f"dir = {sandbox.lock_dir}\n" if option != "dir" else ""
    if where == "activated":
        environment["VIRTUAL_ENV"] = place = str(sandbox.root / "activated")
        sandbox.config = sandbox.root / "activated/.config/avocado/avocado.conf"
        sandbox.config.parent.mkdir(parents=True)
    sandbox.configure(f"[plugins.vtjoblock]\n{kept}{option} = {value}\n")
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test, env=environment), test)
    assert complaint in text
    assert f"plugins.vtjoblock.{option} = {value!r}" in text
    file = f"{place}/.config/avocado/avocado.conf"
    assert re.search(f"[Ss]et {option} in section \\[plugins.vtjoblock\\] of {file}", text)


TESTS = """
from avocado.core import suite
class Broken(list):
    def __iter__(self): raise RuntimeError("unreadable")
    def __bool__(self): return True
suite.TestSuite.tests = property(lambda self: {}, lambda self, value: None)
"""
READ_ONLY_STATUS = """
from avocado.core import job
def refuse(self, value):
    if value != "RUNNING": raise AttributeError("read-only")
job.Job.status = property(lambda self: "RUNNING", refuse)
"""
INTERRUPTION = """
from avocado_vt_joblock import lock
class Interruption(BaseException): pass
def acquire(self): raise Interruption("from a signal")
lock.JobLock.acquire = acquire
"""
STRICT_HANDLER = """
import logging
class Odd(BaseException): pass
class Strict(logging.Handler):
    def emit(self, record): raise Odd("a handler that raises")
logging.getLogger("avocado.job").addHandler(Strict())
logging.getLogger("avocado.app").addHandler(Strict())
"""
# In a later Avocado, or in the middle of an upgrade of this package.
MISSING = """
import builtins
real_import = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {{}}).get("__name__", "").startswith("avocado_vt_joblock.")
    if ours and set(fromlist or ()) & set({!r}.split()): raise ImportError(f"missing: {{fromlist}}")
    return real_import(name, globals, locals, fromlist, level)
builtins.__import__ = without
"""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (TESTS.format("Broken()"), "RuntimeError: unreadable"),
        (TESTS.format("[object()]"), "AttributeError: 'object' object has no attribute 'kind'"),
        (READ_ONLY_STATUS, HELD),
        (INTERRUPTION, "Interruption: from a signal"),
        (STRICT_HANDLER, ""),
        (MISSING.format("extension_manager JobError TestID Job"), HELD),
        (MISSING.format("messages"), "missing: ('messages',)"),
        (MISSING.format("Look"), "missing: "),
    ],
    ids=["tests", "kind", "status", "interruption", "handler", "avocado", "messages", "Look"],
)
def test_whatever_goes_wrong_stops_the_job(sandbox, held_lock, change, complaint):
    sandbox.first(change)
    test = sandbox.vt_test("test")
    text = ended(sandbox.job_api({}, test), 1 if change is STRICT_HANDLER else 2)
    assert complaint in text
    assert not test.has_begun
    assert list(map(str, sandbox.locks())) == [held_lock.path]


def test_log_handler_that_raises_keeps_no_lock(sandbox):
    sandbox.first(STRICT_HANDLER)
    ended(sandbox.job_api({}, sandbox.vt_test("failed", outcome="fail").end()), 1)
    assert sandbox.locks() == []


@needs_other_users
def test_two_users(sandboxes):
    """With a directory each neither minds the other; with one directory they take turns."""
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    test = one.vt_test("test")
    one.belong_to(SOME_USER)
    other.belong_to(SOME_USER + 1)
    job = start(one, test)
    assert_runs(other, "own-directory")
    other.configure(f"[plugins.vtjoblock]\ndir={one.lock_dir}\ntimeout=-1\n")
    waiting, following, printed = start_waiting(other, "following")
    assert f"PID:    {job.pid}\n    user:   {SOME_USER}\n" in printed.read_text()
    test.end()
    ended(job)
    assert waiting.wait(60) == 0, printed.read_text()
    assert test.notes()[1][1] < following.notes()[0][1]


AVOCADO_VT_LOCK = """
import sys, types
import avocado
from avocado_vt.plugins.vt_joblock import VTJobLock
plugin = VTJobLock()
plugin._lock(types.SimpleNamespace(unique_id="0123456789" * 4))
print("locked", flush=True)
sys.stdin.read()
"""


def test_lock_of_avocado_vt_and_this_one_honour_each_other(sandbox):
    job = start(sandbox, sandbox.vt_test("test"))
    text = ended(sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK), 1)
    assert f"acquired by PID {job.pid}" in text
    job.kill()
    job.wait()
    # The stale one it removes.
    theirs = sandbox.popen(sys.executable, "-c", AVOCADO_VT_LOCK, stdin=subprocess.PIPE)
    wait_for(lambda: "0123456789" in str(sandbox.locks()), theirs)
    assert theirs.stdout.readlines(1) is not None
    test = sandbox.vt_test("other")
    assert f"PID:    {theirs.pid}\n" in assert_refused(sandbox.run(test), test)


MENDED_AVOCADO_VT = """
import sys
from avocado.core.plugin_interfaces import JobPreTests
from avocado_vt.plugins.vt_joblock import VTJobLock
class Mending(JobPreTests):
    name = description = "mending"
    def __init__(self, config=None): pass
    def pre_tests(self, job): pass
def pre_tests(self, job):
    try:
        self._lock(job)
    except Exception as error:
        print("avocado-vt:", error)
        sys.exit(2)
VTJobLock.pre_tests = pre_tests
"""


@pytest.mark.parametrize("disable", ["", "[plugins]\ndisable = []"], ids=["off", "on"])
def test_mended_plugin_of_avocado_vt(sandbox, disable):
    """It would meet this one's lock file. So it is off, unless a user's list replaces that."""
    sandbox.add_to_config(disable)
    sandbox.plugin("mending", MENDED_AVOCADO_VT, result_events="Mending")
    job = sandbox.run(sandbox.vt_test("test").end())
    text = ended(job, 2 if disable else 0)
    assert (f"acquired by PID {job.pid}" in text) == bool(disable)
    assert sandbox.locks() == []


def test_one_of_four_runs(sandbox, rounds):
    for number in rounds(1):
        tests = [sandbox.vt_test(f"round{number}-{job}") for job in range(4)]
        jobs = [sandbox.run(test) for test in tests]
        # The one that has the lock keeps it until the others have ended.
        wait_for(lambda: sum(job.poll() is not None for job in jobs) >= 3)  # noqa: B023
        assert sum(job.poll() is None for job in jobs) == 1, [job.poll() for job in jobs]
        wait_for(lambda: any(test.has_begun for test in tests))  # noqa: B023
        assert [test.has_begun for test in tests] == [job.poll() is None for job in jobs]
        for test in tests:
            test.end()
        assert sorted(job.wait(60) for job in jobs) == [0] + [2] * 3
        assert sandbox.locks() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_next_job_runs_after_an_end_at_any_moment(sandbox, rounds, signum):
    for number in rounds(1):
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
        assert_runs(sandbox, f"following{number}")


@pytest.mark.parametrize("case", ["pre alone", "pre beside a holder", "post PASS", "post FAIL"])
def test_ctrl_c_at_every_line_keeps_no_lock_and_undoes_nothing(sandbox, case):
    script = Path(__file__).with_name("interruptions.py")
    text = ended(sandbox.popen(sys.executable, script, sandbox.lock_dir, case))
    (lines,) = re.findall(r"^(\d+) lines$", text, re.MULTILINE)
    assert int(lines) > 40
