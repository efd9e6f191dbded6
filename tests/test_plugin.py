"""Real jobs with real VT tests: which take the lock, and what a refused one does and shows."""

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
from xml.etree import ElementTree

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

NAME = re.compile(r"avocado-vt-joblock-([0-9a-f]{40})-(\d+)-[0-9a-z]{8}\.pid")
HELD = "another job holds the lock"

pytestmark = needs_avocado_vt


def results(sandbox):
    """The results of the newest job."""
    return sandbox.home / "avocado/job-results/latest"


def test_listed_once_under_job_prepost(sandbox):
    text = sandbox.output("plugins")
    section = re.search(r"\(job\.prepost\):\n(.*?)\n\n", text, re.DOTALL)
    assert re.search(r"^vt-joblock +Avocado-VT Job Lock/Unlock$", section[1], re.MULTILINE)
    # avocado-vt's plugin of this name is switched off.
    assert text.count(" Avocado-VT Job Lock/Unlock\n") == 1


def test_lock_file_during_the_job(sandbox, holder):
    job, test = holder
    (lock,) = sandbox.locks()
    job_id, uid = NAME.fullmatch(lock.name).groups()
    assert job_id == (results(sandbox) / "id").read_text().strip()
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
    date = ["date", "-r", lock, "+%Y-%m-%d %H:%M:%S"]
    facts = {
        "file": lock,
        "PID": job.pid,
        "user": subprocess.check_output(["id", "-un"], text=True).strip(),
        "job id": NAME.fullmatch(lock.name)[1],
        "since": subprocess.check_output(date, text=True, env=sandbox.environment).strip(),
    }
    for fact, value in facts.items():
        assert re.search(rf"^    {fact}: +{value}$", text, re.MULTILINE), text
    for told in ("Wait until", "plugins.vtjoblock.timeout", "no solution", "plugins.vtjoblock.dir"):
        assert told in text
    assert sandbox.locks() == [lock]
    log = (results(sandbox) / "job.log").read_text()
    assert FAILURE in log
    assert "Traceback" in log
    test.end()
    assert finish(job)[0] == 0
    assert_runs(sandbox, "next")


@needs_recipes
def test_other_kinds_and_dry_runs_ignore_the_lock(sandbox):
    # Where they took the lock they would fail, since it could not be created, nor for so long.
    sandbox.configure("[plugins.vtjoblock]\ndir = /proc\ntimeout = soon\n")
    until = sandbox.root / "until"
    until.touch()
    dry = sandbox.vt_test("dry").recipe
    for recipe, options in ((exec_recipe(sandbox, until), []), (dry, ["--dry-run"])):
        code, text = finish(sandbox.run(recipe, options=options))
        assert code == 0, text
        assert FAILURE not in text


def test_vt_test_in_the_second_suite_takes_the_lock(sandbox):
    until = sandbox.root / "other.until"
    test = sandbox.vt_test("second")
    job = sandbox.job_api({}, exec_recipe(sandbox, until), test)
    wait_for((sandbox.root / "other.begun").exists, job)
    assert len(sandbox.locks()) == 1
    until.touch()
    test.end()
    code, text = finish(job)
    assert code == 0, text
    assert sandbox.locks() == []


def test_disabled_suite_does_not_take_the_lock(sandbox):
    test = sandbox.vt_test("disabled")
    config = {"plugins.vtjoblock.dir": "/proc"}
    code, text = finish(sandbox.job_api(config, test, suites={"enabled": False}))
    assert code == 0, text
    assert FAILURE not in text
    assert not test.has_begun


class TestResultsOfARefusedJob:
    @pytest.fixture(autouse=True)
    def refused(self, sandbox, holder):
        other = sandbox.vt_test("other")
        self.text = assert_refused(sandbox.run(other), other)

    def test_xml_and_json_show_an_error(self, sandbox):
        suite = ElementTree.parse(results(sandbox) / "results.xml").getroot()
        assert suite.get("errors") == "1"
        ((case, error),) = [(case, case.find("error")) for case in suite.iter("testcase")]
        assert case.get("name") == "vt-joblock"
        assert error.get("message") == f"{FAILURE}{HELD}."
        assert str(sandbox.locks()[0]) in error.text
        report = json.loads((results(sandbox) / "results.json").read_text())
        (shown,) = report["tests"]
        assert report["errors"] == 1
        assert (shown["name"], shown["status"]) == ("vt-joblock", "ERROR")
        assert shown["fail_reason"] == f"{FAILURE}{HELD}."

    @pytest.mark.skipif(AVOCADO < 105, reason="the plugin for HTML is installed beside the newest")
    def test_html_shows_it(self, sandbox):
        assert HELD in (results(sandbox) / "results.html").read_text()

    def test_jobs_list_and_show_work(self, sandbox):
        assert re.search(r" 1 \(0/0/1/0\)$", sandbox.output("jobs", "list"), re.MULTILINE)
        assert re.search(r"vt-joblock .*ERROR", sandbox.output("jobs", "show"))

    def test_5000_tests_print_no_more_than_one(self, sandbox):
        change = "one = job_api.TestSuite\njob_api.TestSuite = lambda tests=(), **options: one("
        change += "tests=list(tests) * 5000, **options)"
        other = sandbox.vt_test("other5000")
        printed = [
            assert_refused(sandbox.changed(how, other), other).splitlines() for how in ("", change)
        ]
        assert len(printed[0]) == len(printed[1])


RECORDER = """
from avocado.core.plugin_interfaces import JobPost, JobPostTests, JobPre, JobPreTests
from pathlib import Path

def note(job, what):
    locks = len(list(Path(job.config["plugins.vtjoblock.dir"]).iterdir()))
    with Path("{record}").open("a") as file:
        file.write(f"{{job.unique_id[:4]}} {{what}} {{locks}}\\n")

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


class TestOtherPlugins:
    """What the holder has set up is undone by nobody else."""

    @pytest.fixture(autouse=True)
    def recorded(self, sandbox):
        self.sandbox = sandbox
        self.record = sandbox.root / "recorded"
        source = RECORDER.format(record=self.record)
        sandbox.plugin("recorder", source, result_events="Events", job__prepost="Job")
        scripts = sandbox.root / "post.d"
        scripts.mkdir()
        job = "$(echo $AVOCADO_JOB_UNIQUE_ID | cut -c-4)"
        lines = f"echo {job} script $(ls {sandbox.lock_dir} | wc -l)"
        (scripts / "script").write_text(f"#!/bin/sh\n{lines} >> {self.record}\n")
        (scripts / "script").chmod(0o755)
        with sandbox.config.open("a") as config:
            config.write(f"[plugins.jobscripts]\npre = {scripts}\npost = {scripts}\n")

    def of(self, *jobs):
        """What was recorded of jobs: what, and how many locks there were."""
        lines = [line.split() for line in self.record.read_text().splitlines()]
        return [(what, int(locks)) for job, what, locks in lines if job in jobs]

    def test_holder_has_the_lock_first_and_last(self):
        test = self.sandbox.vt_test("test")
        test.end()
        assert finish(self.sandbox.run(test))[0] == 0
        (job,) = {line[:4] for line in self.record.read_text().splitlines()}
        assert self.of(job) == [
            ("script", 1), ("pre", 1), ("pre_tests", 1),
            ("post_tests", 1), ("script", 1), ("post", 1),
        ]  # fmt: skip
        assert self.sandbox.locks() == []

    @pytest.mark.parametrize("how", ["refused", "interrupted", "terminated"])
    def test_job_without_the_lock_undoes_nothing(self, holder, how):
        before = self.record.read_text()
        timeout = "0" if how == "refused" else "-1"
        text = self.sandbox.config.read_text()
        self.sandbox.configure(text.replace("dir =", f"timeout = {timeout}\ndir =", 1))
        job = self.sandbox.run(self.sandbox.vt_test("other"))
        if how != "refused":
            wait_for(lambda: "Waiting" in (results(self.sandbox) / "job.log").read_text(), job)
            job.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGTERM)
        code, text = finish(job)
        assert code != 0, text
        # It runs the post() of others, but neither their post_tests() nor a script.
        lines = self.record.read_text().removeprefix(before).splitlines()
        assert [line.split()[1:] for line in lines] in ([], [["post", "1"]])


AGAIN = """
from pathlib import Path
class Again(job_api.Job):
    def run(self):
        first = super().run()
        Path({until!r}).touch()
        while list(Path(self.config["plugins.vtjoblock.dir"]).iterdir()):
            pass
        print("codes:", first, super().run())
        return 0
job_api.Job = Again
"""


@needs_recipes
def test_refused_job_may_run_again(sandbox, holder):
    """Then it is a job like any other, to other plugins too."""
    _, holding = holder
    record = sandbox.root / "recorded"
    sandbox.plugin("recorder", RECORDER.format(record=record), result_events="Events")
    test = sandbox.vt_test("test")
    test.end()
    code, text = finish(sandbox.changed(AGAIN.format(until=str(holding.until)), test))
    assert code == 0, text
    assert "codes: 2 2\n" in text  # Avocado never takes a code back.
    assert test.has_begun
    assert [line.split()[1] for line in record.read_text().splitlines()] == [
        "pre_tests",
        "post_tests",
    ]


@needs_recipes
@pytest.mark.parametrize("timeout", [0, -1])
def test_job_inside_of_a_job_is_refused_at_once(sandbox, timeout):
    inner = sandbox.vt_test("inner")
    run = f"{sys.executable} -m avocado --config {sandbox.root}/inner.conf run -- {inner.recipe}"
    (sandbox.root / "inner.conf").write_text(f"[plugins.vtjoblock]\ntimeout = {timeout}\n")
    outer = sandbox.vt_test("outer", runs=run)
    outer.end()
    code, text = finish(sandbox.run(outer))
    assert code == 0, text
    printed = (sandbox.root / "outer.record.printed").read_text()
    assert "this is the job that you are in" in printed
    assert not inner.has_begun
    assert sandbox.locks() == []


STRICT_HANDLER = """
import logging
class Odd({base}): pass
class Strict(logging.Handler):
    def emit(self, record):
        raise Odd("a handler that raises")
logging.getLogger("avocado.job").addHandler(Strict())
logging.getLogger("avocado.app").addHandler(Strict())
"""


@pytest.mark.parametrize("base", ["Exception", "BaseException"])
def test_log_handler_that_raises_changes_nothing(sandbox, holder, base):
    """Whatever it raises, the job stops, and a lock is given back."""
    holding_job, holding = holder
    change = STRICT_HANDLER.format(base=base)
    other = sandbox.vt_test("other")
    code, text = finish(sandbox.changed(change, other))
    assert code != 0, text
    assert not other.has_begun
    holding.end()
    assert finish(holding_job)[0] == 0
    failed = sandbox.vt_test("failed", outcome="fail")
    failed.end()
    finish(sandbox.changed(change, failed))
    assert sandbox.locks() == []


def test_callers_directory_wins_and_home_is_expanded(sandbox):
    sandbox.lock_dir = sandbox.home / "locks"
    sandbox.lock_dir.mkdir()
    test = sandbox.vt_test("test")
    job = sandbox.job_api({"plugins.vtjoblock.dir": "~/locks"}, test)
    wait_for(lambda: test.has_begun, job)
    assert len(sandbox.locks()) == 1
    test.end()
    assert finish(job)[0] == 0


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("dir", "/nonexistent/locks", "does not exist"),
        ("dir", "/etc/passwd", "is not a directory"),
        ("dir", "/proc", "cannot be written: No such file or directory"),
        ("dir", "locks", "is not an absolute path"),
        ("dir", "/" + "x" * 300, "cannot be opened: File name too long"),
        ("dir", "{root}/loop", "cannot be opened: "),
        ("timeout", "soon", "is not a time to wait"),
        ("timeout", "", "is not a time to wait"),
    ],
)
def test_bad_setting_stops_the_job(sandbox, option, value, complaint):
    (sandbox.root / "loop").symlink_to("loop")
    value = value.format(root=sandbox.root)
    kept = f"dir = {sandbox.lock_dir}\n" if option != "dir" else ""
    sandbox.configure(f"[plugins.vtjoblock]\n{kept}{option} = {value}\n")
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test), test)
    assert complaint in text
    assert f"plugins.vtjoblock.{option} = {value!r}" in text
    assert (
        f"set {option} in section [plugins.vtjoblock] of ~/.config/avocado/avocado.conf"
        in text.lower()
    )
    assert list(sandbox.lock_dir.iterdir()) == []


def test_advice_in_an_activated_environment(sandbox):
    """Avocado reads another file there: the one that the message names."""
    environment = {**sandbox.environment, "VIRTUAL_ENV": str(sandbox.root / "activated")}
    config = sandbox.root / "activated/.config/avocado/avocado.conf"
    config.parent.mkdir(parents=True)
    config.write_text("[plugins.vtjoblock]\ndir = /nonexistent\n")
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test, env=environment), test)
    assert f"set dir in section [plugins.vtjoblock] of {config}." in text
    config.write_text(f"[plugins.vtjoblock]\ndir = {sandbox.lock_dir}\n")
    test.end()
    code, text = finish(sandbox.run(test, env=environment))
    assert code == 0, text


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
    assert (results(sandbox) / "job.log").read_text().count(warning) == 1


def test_lock_that_nobody_can_judge_is_removed_as_advised(sandbox):
    sandbox.lock_dir = sandbox.root / "two words"
    sandbox.lock_dir.mkdir()
    sandbox.configure(f"[plugins.vtjoblock]\ndir={sandbox.lock_dir}\n")
    lock = sandbox.lock_dir / f"avocado-vt-joblock-{1:040x}-0-00000001.pid"
    lock.touch()
    test = sandbox.vt_test("test")
    text = assert_refused(sandbox.run(test), test)
    assert f"cannot tell whether a job still holds {lock}: there is no PID in it." in text
    (advice,) = re.findall(r"^    (rm .*)$", text, re.MULTILINE)
    finish(sandbox.popen("sh", "-c", advice))
    assert_runs(sandbox, "next")


CHANGES = {
    "suite that is none": (
        "class Broken(list):\n"
        "    def __iter__(self): raise RuntimeError('unreadable')\n"
        "    def __bool__(self): return True\n"
        "class Suite(job_api.TestSuite):\n"
        "    enabled = True\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        self.tests = Broken()\n"
        "job_api.TestSuite = Suite",
        "RuntimeError: unreadable",
    ),
    "tests without a kind": (
        "job_api.Runnable = lambda *args, **kwargs: object()",
        "AttributeError: 'object' object has no attribute 'kind'",
    ),
    "status that cannot be set": (
        "def refuse(job, value):\n"
        "    if value != 'RUNNING': raise AttributeError('read-only')\n"
        "job_api.Job.status = property(lambda job: 'RUNNING', refuse)",
        HELD,
    ),
    "interruption that is no Exception": (
        "import signal, time\n"
        "from avocado_vt_joblock import lock\n"
        "class Interruption(BaseException): pass\n"
        "def interrupt(signum, frame): raise Interruption('from a signal')\n"
        "def slow(guard):\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGALRM, interrupt)\n"
        "lock._wait_for_guard = slow",
        "Interruption: from a signal",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_goes_wrong_stops_the_job(sandbox, holder, name):
    change, complaint = CHANGES[name]
    test = sandbox.vt_test("test")
    assert complaint in assert_refused(sandbox.changed(change, test), test)
    assert len(sandbox.locks()) == 1


MISSING = [
    ("avocado.core", "extension_manager"),
    ("avocado.core.exceptions", "JobError"),
    ("avocado.core.test_id", "TestID"),
    ("avocado.core.job", "Job"),
    ("avocado_vt_joblock", "messages"),
    ("avocado_vt_joblock.lock", "JobLock"),
    ("avocado_vt_joblock.processes", "Look"),
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
@pytest.mark.parametrize(("module", "gone"), MISSING, ids=".".join)
def test_whatever_is_missing_no_job_runs_unlocked(sandbox, holder, module, gone):
    """In a later Avocado, or in the middle of an upgrade of this package."""
    test = sandbox.vt_test("test")
    command = [sys.executable, "-c", WITHOUT, module, gone, "run", "--disable-sysinfo"]
    code, text = finish(sandbox.popen(*command, "--", test.recipe))
    assert code == 2, text
    assert HELD in text or f"cannot import name '{gone}'" in text
    assert not test.has_begun


@pytest.mark.skipif(AVOCADO < 105, reason=f"Avocado {AVOCADO} has no other way than to exit")
def test_job_api_returns_when_refused(sandbox, holder):
    other = sandbox.vt_test("other")
    assert assert_refused(sandbox.job_api({}, other), other).endswith("returned 2\n")


@needs_recipes
def test_job_of_the_same_id_is_left_alone(sandbox):
    tests = [sandbox.vt_test(name) for name in ("first", "second")]
    options = [f"--force-job-id={'1' * 40}"]
    first = start(sandbox, tests[0], options=options)
    assert_refused(sandbox.run(tests[1], options=options), tests[1])
    tests[0].end()
    code, text = finish(first)
    assert code == 0, text


@needs_other_users
@pytest.mark.parametrize("how", ["a directory each", "one directory"])
def test_two_users(sandboxes, how):
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o1777)
    if how == "one directory":
        other.configure(f"[plugins.vtjoblock]\ndir={one.lock_dir}\n")
    tests = [one.vt_test("one"), other.vt_test("other")]
    one.belong_to(SOME_USER)
    other.belong_to(SOME_USER + 1)
    job = start(one, tests[0])
    if how == "one directory":
        text = assert_refused(other.run(tests[1]), tests[1])
        assert f"PID:    {job.pid}\n    user:   {SOME_USER}\n" in text
    else:
        second = start(other, tests[1])
        (lock,) = other.locks()
        assert NAME.fullmatch(lock.name)[2] == str(SOME_USER + 1)
        tests[1].end()
        assert finish(second)[0] == 0
    tests[0].end()
    assert finish(job)[0] == 0


def test_settings_of_avocado_vt_keep_working(sandbox):
    with sandbox.config.open("a") as config:
        config.write("[vt.qemu]\nsmp = 7\n")
    text = sandbox.output("config")
    assert re.search(r"vt\.qemu\.smp +7$", text, re.MULTILINE)
    assert re.search(rf"plugins\.vtjoblock\.dir +{sandbox.lock_dir}$", text, re.MULTILINE)
    pattern = r"^    \* .*/(.*)/conf\.d/vt_joblock\.conf$"
    # avocado-vt's file wins.
    assert re.findall(pattern, text, re.MULTILINE) == ["avocado", "avocado_vt"]
    for command in ("plugins", "config", "list"):
        for sign in ("Error running", "Failed to load", "Traceback", "already registered"):
            assert sign not in sandbox.output(command)


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
    wait_for(lambda: sandbox.locks() and sandbox.locks()[0].read_text(), theirs)
    test = sandbox.vt_test("test")
    assert f"PID:    {theirs.pid}\n" in assert_refused(sandbox.run(test), test)
    theirs.kill()
    theirs.wait()
    assert len(sandbox.locks()) == 1
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
from avocado_vt.plugins.vt_joblock import VTJobLock
def pre_tests(self, job):
    try:
        self._lock(job)
    except Exception as error:
        print("avocado-vt:", error)
        sys.exit(2)
VTJobLock.pre_tests = pre_tests
"""


@pytest.mark.parametrize("disable", [None, "[]", "['result_events.vt-joblock']"])
def test_mended_plugin_of_avocado_vt(sandbox, disable):
    """It would meet this one's lock file. So it is off, unless a user's list replaces that."""
    if disable:
        with sandbox.config.open("a") as config:
            config.write(f"[plugins]\ndisable = {disable}\n")
    test = sandbox.vt_test("test")
    test.end()
    job = sandbox.changed(MENDED_AVOCADO_VT, test)
    code, text = finish(job)
    assert code == (2 if disable == "[]" else 0), text
    assert (f"acquired by PID {job.pid}" in text) == (disable == "[]")
    assert sandbox.locks() == []


def test_one_of_six_runs(sandbox, rounds):
    spans = []
    for number in rounds(3):
        tests = [sandbox.vt_test(f"round{number}-{job}") for job in range(6)]
        jobs = [sandbox.run(test) for test in tests]
        # The one that has the lock keeps it until the others have ended.
        wait_for(lambda: sum(job.poll() is not None for job in jobs) >= 5)  # noqa: B023
        assert sum(job.poll() is None for job in jobs) == 1, [job.poll() for job in jobs]
        wait_for(lambda: any(test.has_begun for test in tests))  # noqa: B023
        assert [test.has_begun for test in tests] == [job.poll() is None for job in jobs]
        for test in tests:
            test.end()
        assert sorted(finish(job)[0] for job in jobs) == [0] + [2] * 5
        assert sandbox.locks() == []
        spans += [[when for _, when in test.notes()] for test in tests if test.has_begun]
    spans.sort()
    assert len(spans) == number + 1
    for (_, end), (begin, _) in zip(spans, spans[1:]):
        assert end < begin


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_next_job_runs_after_an_end_at_any_moment(sandbox, rounds, signum):
    for number in rounds(3):
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
        following = sandbox.vt_test(f"following{number}")
        following.end()
        code, text = finish(sandbox.run(following))
        assert code == 0, text
        assert list(sandbox.lock_dir.iterdir()) == []


@pytest.mark.parametrize("case", ["pre alone", "pre beside a holder", "post PASS", "post FAIL"])
def test_ctrl_c_at_every_line(sandbox, case):
    """No lock is kept, and nobody's set-up is undone."""
    job = sandbox.popen(sys.executable, HERE / "interruptions.py", sandbox.lock_dir, case)
    code, text = finish(job)
    assert code == 0, text
    (lines,) = re.findall(r"^(\d+) lines$", text, re.MULTILINE)
    assert int(lines) > 40
