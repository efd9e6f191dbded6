"""Real jobs with real VT tests: which take the lock, in which directory, and when."""

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users, needs_recipes
from others import process
from sandbox import (
    FAILURE,
    assert_refused,
    assert_runs,
    ended,
    start,
    start_waiting,
    wait_for,
)

HELD = "another job holds the lock"

pytestmark = needs_avocado_vt


def exec_recipe(sandbox, until):
    """Make a test of another kind that ends when a file appears."""
    path = sandbox.root / "other.json"
    begin, wait = f"touch {sandbox.root}/other.begun", f"until test -e {until}"
    words = ["-c", f"{begin}; {wait}; do sleep 0.02; done"]
    recipe = {"kind": "exec-test", "uri": "/bin/sh", "args": words, "kwargs": {}}
    path.write_text(json.dumps(recipe))
    return path


def test_plugins_and_settings_beside_those_of_avocado_vt(sandbox):
    sandbox.add_to_config("[vt.qemu]\nsmp = 7")
    plugins, config, listed = map(sandbox.output, ("plugins", "config", "list"))
    for sign in ("Error running", "Failed to load", "Traceback", "already registered"):
        assert sign not in plugins + config + listed
    section = re.search(r"\(job\.prepost\):\n(.*?)\n\n", plugins, re.DOTALL)
    ours = r"^vt-joblock +Avocado-VT Job Lock/Unlock$"
    assert re.search(ours, section[1], re.MULTILINE)
    # avocado-vt's plugin of this name is switched off.
    assert plugins.count(" Avocado-VT Job Lock/Unlock\n") == 1
    assert re.search(r"vt\.qemu\.smp +7$", config, re.MULTILINE)
    where = rf"plugins\.vtjoblock\.dir +{sandbox.lock_dir}$"
    assert re.search(where, config, re.MULTILINE)
    # avocado-vt's file wins.
    pattern = r"^    \* .*/(.*)/conf\.d/vt_joblock\.conf$"
    assert re.findall(pattern, config, re.MULTILINE) == ["avocado", "avocado_vt"]


def test_lock_file_of_a_vt_test_in_the_second_suite(sandbox):
    """In the caller's directory, which wins over the user's; ~ is expanded."""
    sandbox.lock_dir = sandbox.home / "locks"
    sandbox.lock_dir.mkdir()
    until = sandbox.root / "other.until"
    test = sandbox.vt_test("second")
    config = {"plugins.vtjoblock.dir": "~/locks"}
    job = sandbox.job_api(exec_recipe(sandbox, until), test, config=config)
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


@pytest.mark.parametrize(
    "how", ["disabled", pytest.param("dry run", marks=needs_recipes)]
)
def test_jobs_that_run_no_vt_test_ignore_the_lock(sandbox, how):
    # A job that took the lock would fail: it cannot be created there, nor for so long.
    sandbox.configure("[plugins.vtjoblock]\ndir = /proc\ntimeout = soon\n")
    test, until = sandbox.vt_test("test"), sandbox.root / "until"
    until.touch()
    if how == "disabled":
        other = exec_recipe(sandbox, until)
        job = sandbox.job_api(other, test, how={"disabled": 1})
    else:
        job = sandbox.run(test, options=["--dry-run"])
    text = ended(job)
    assert FAILURE not in text
    assert (sandbox.root / "other.begun").exists() == (how == "disabled")
    assert not test.has_begun


@needs_recipes
def test_job_inside_of_a_job_is_refused_whatever_the_timeout(sandbox):
    """To wait would be of no use, for ever as for a moment; also where something has
    taken the mark away, as sudo does."""
    inner = sandbox.vt_test("inner")
    commands = []
    for timeout, prefix in (("-1", ""), ("0.001", "env -u AVOCADO_VT_JOBLOCK ")):
        config = sandbox.root / f"inner{timeout}.conf"
        config.write_text(f"[plugins.vtjoblock]\ntimeout = {timeout}\n")
        avocado = f"{sandbox.python} -m avocado --config {config}"
        commands.append(f"{prefix}{avocado} run -- {inner.recipe}")
    outer = sandbox.vt_test("outer", runs="; ".join(commands)).end()
    ended(sandbox.run(outer))
    told = outer.printed.read_text()
    assert told.count(f"{FAILURE}this is the job that you are in") == 2
    assert "out of time" not in told
    assert not inner.has_begun
    assert sandbox.locks() == []


@pytest.mark.parametrize(
    ("option", "value", "complaint", "where"),
    [
        ("dir", "/proc", "cannot be written: No such file or directory", "~"),
        ("timeout", "soon", "not a time to wait", "~"),
        # Avocado reads another file in an activated environment: the one that the
        # message names.
        ("dir", "/nonexistent", "does not exist", "activated"),
    ],
)
def test_bad_setting_stops_the_job(sandbox, option, value, complaint, where):
    """At once, also one that would wait."""
    environment, place = sandbox.environment, "~"
    other = "timeout = -1" if option == "dir" else f"dir = {sandbox.lock_dir}"
    if where == "activated":
        environment["VIRTUAL_ENV"] = place = str(sandbox.root / "activated")
        sandbox.config = sandbox.root / "activated/.config/avocado/avocado.conf"
        sandbox.config.parent.mkdir(parents=True)
    sandbox.configure(f"[plugins.vtjoblock]\n{other}\n{option} = {value}\n")
    test = sandbox.vt_test("test").end()
    text = assert_refused(sandbox.run(test, env=environment), test)
    assert complaint in text
    assert f"plugins.vtjoblock.{option} = {value!r}" in text
    file = re.escape(f"{place}/.config/avocado/avocado.conf")
    advice = rf"[Ss]et {option} in section \[plugins.vtjoblock\] of\s+{file}"
    assert re.search(advice, text)


@pytest.mark.parametrize(
    ("order", "right_order"),
    [
        # Pre-job scripts would run before the lock is there, ...
        (["jobscripts"], ["vt-joblock", "jobscripts"]),
        (["jobscripts", "vt-joblock"], ["vt-joblock", "jobscripts"]),
        # ... and post-job scripts when it is given back.
        (["vt-joblock", "vt-joblock-release"], ["vt-joblock"]),
    ],
)
def test_order_of_plugins_that_undermines_the_lock_stops_the_job(
    sandbox, order, right_order
):
    sandbox.add_to_config(f"[plugins.job.prepost]\norder = {order}")
    test = sandbox.vt_test("test").end()
    text = assert_refused(sandbox.run(test), test)
    assert f"order = {order}" in text
    assert re.search(rf"^ +order = {re.escape(str(right_order))}$", text, re.MULTILINE)
    assert sandbox.locks() == []


def test_what_is_only_warned_of(sandbox):
    """An option that there is not, and a directory without a sticky bit; nothing is
    said of an order of plugins that is right."""
    sandbox.add_to_config("timout = 30")
    sandbox.add_to_config("[plugins.job.prepost]\norder = ['vt-joblock', 'jobscripts']")
    sandbox.lock_dir.chmod(0o777)
    text = assert_runs(sandbox, "test")
    assert re.search(r"no option 'timout'.*\n.*\bdir and timeout\b", text)
    assert f"chmod +t {sandbox.lock_dir}" in text
    assert "prepost" not in text


@needs_recipes
def test_replayed_job_heeds_what_is_set_today(sandbox):
    """The directory and the timeout, from whatever config file; not those that were
    recorded with the job."""
    test = sandbox.vt_test("test").end()
    ended(sandbox.run(test))
    job_id = (sandbox.latest / "id").read_text().strip()
    today, special = sandbox.root / "today", sandbox.root / "special"
    other_config = sandbox.root / "special.conf"
    sandbox.configure(f"[plugins.vtjoblock]\ndir = {today}\ntimeout = 0.001\n")
    other_config.write_text(f"[plugins.vtjoblock]\ndir = {special}\ntimeout = 0\n")
    cases = [(today, [], True), (special, ["--config", other_config], False)]
    for directory, options, waits in cases:
        directory.mkdir()
        with process(str(directory)) as holder:
            text = ended(sandbox.avocado(*options, "replay", job_id), 2)
            assert f"file:   {holder.told.path}\n" in text
            assert ("out of time" in text) == waits
    assert [what for what, _ in test.notes()] == ["begin", "end"]


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
def acquire(self, **options): raise Interruption("from a signal")
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
    if ours and set(fromlist or ()) & set({!r}.split()):
        raise ImportError(f"missing: {{fromlist}}")
    return real_import(name, globals, locals, fromlist, level)
builtins.__import__ = without
"""
OF_AVOCADO = "extension_manager JobError TestID TAPResult Job"


@pytest.mark.parametrize(
    ("change", "complaint", "is_unforeseen"),
    [
        (TESTS.format("Broken()"), "RuntimeError: unreadable", True),
        (TESTS.format("[object()]"), "AttributeError: 'object' object has no", True),
        (READ_ONLY_STATUS, HELD, False),
        (INTERRUPTION, "Interruption: from a signal", True),
        (STRICT_HANDLER, "", False),
        (MISSING.format(OF_AVOCADO), HELD, False),
        # Without a room there are no messages, and so no log of them.
        (MISSING.format("messages"), "missing: (", False),
        (MISSING.format("JobLock"), "missing: (", False),
    ],
    ids=[
        *("tests", "kind", "status", "interruption", "handler"),
        *("avocado", "messages", "JobLock"),
    ],
)
def test_whatever_goes_wrong_stops_the_job(
    sandbox, held_lock, change, complaint, is_unforeseen
):
    """Only what nobody has thought of writes a traceback into the job's log."""
    sandbox.first(change)
    test = sandbox.vt_test("test")
    text = ended(sandbox.job_api(test), 1 if change is STRICT_HANDLER else 2)
    assert complaint in text
    assert not test.has_begun
    assert list(map(str, sandbox.locks())) == [held_lock.path]
    if complaint:
        log = (sandbox.latest / "job.log").read_text()
        assert ("\nTraceback" in log) == is_unforeseen


def test_log_handler_that_raises_keeps_no_lock(sandbox):
    sandbox.first(STRICT_HANDLER)
    ended(sandbox.job_api(sandbox.vt_test("failed", outcome="fail").end()), 1)
    assert sandbox.locks() == []


@needs_other_users
def test_two_users(sandboxes):
    """With a directory each neither minds the other; with one directory they take
    turns."""
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    test = one.vt_test("test")
    one.belong_to(SOME_USER)
    other.belong_to(SOME_USER + 1)
    job = start(one, test)
    assert_runs(other, "own-directory")
    other.configure(f"[plugins.vtjoblock]\ndir={one.lock_dir}\ntimeout=-1\n")
    waiting, following, printed = start_waiting(other, "following")
    facts = rf"PID:    {job.pid}  \S*python.*\n    user:   {SOME_USER}\n"
    assert re.search(facts, printed.read_text())
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
    theirs = [sys.executable, "-c", AVOCADO_VT_LOCK]
    text = ended(sandbox.popen(*theirs), 1)
    assert f"acquired by PID {job.pid}" in text
    job.kill()
    job.wait()
    # The stale one it removes.
    holder = sandbox.popen(*theirs, stdin=subprocess.PIPE)
    wait_for(lambda: "0123456789" in str(sandbox.locks()), holder)
    assert holder.stdout.readlines(1) is not None
    test = sandbox.vt_test("other")
    assert f"PID:    {holder.pid} " in assert_refused(sandbox.run(test), test)


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
    """It would meet this one's lock file. So it is off, unless a user's list replaces
    that."""
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
        still_run = [job.poll() is None for job in jobs]
        assert sum(still_run) == 1, [job.poll() for job in jobs]
        wait_for(lambda: any(test.has_begun for test in tests))  # noqa: B023
        assert [test.has_begun for test in tests] == still_run
        for test in tests:
            test.end()
        assert sorted(job.wait(60) for job in jobs) == [0] + [2] * 3
        assert sandbox.locks() == []


def orphans(directory):
    """Return the names of cards and unpublished files whose lock file is not there."""
    names = os.listdir(directory)
    hidden = [name for name in names if name.startswith(".")]
    return [name for name in hidden if name[1:].removesuffix(".host") not in names]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_next_job_runs_after_an_end_at_any_moment(sandbox, rounds, signum):
    for number in rounds(1):
        test = sandbox.vt_test(f"ended{number}")
        if random.random() < 0.5:
            test.end()
        job = sandbox.run(test)
        moment = random.uniform(0, 2.5)
        print(f"{signal.Signals(signum).name} after {moment:.3f} s")
        # More than one, since the first may be lost: before Avocado heeds it, for
        # example. One that interrupts Avocado while it logs may have it wait for itself
        # for ever.
        kill = (20, signal.SIGKILL)
        for wait, sent in ((moment, signum), (2, signum), (2, signum), kill):
            try:
                job.wait(wait)
                break
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, sent)
        job.wait()
        test.end()
        wait_for(lambda: not sandbox.living())
        # What a crash has left, and is of no lock, a job removes after a minute.
        for name in orphans(sandbox.lock_dir):
            (sandbox.lock_dir / name).unlink()
        assert_runs(sandbox, f"following{number}")
