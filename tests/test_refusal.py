"""Real jobs that are stopped: what they undo, which is nothing, and what their results
show."""

import json
import os
import re
import signal
import subprocess
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest
from needs import needs_avocado_vt, needs_recipes
from others import leave_lock
from sandbox import (
    AVOCADO_READS_RECIPES,
    FAILURE,
    assert_refused,
    ended,
    finish,
    start,
    start_waiting,
)

from avocado_vt_joblock.lockfile import LockFile

HELD = "another job holds the lock"
#: What a report for machines has of a job that was refused: one test, and no other.
TAP = ["1..1", "not ok 1 vt-joblock"]

pytestmark = needs_avocado_vt


def read_xml(sandbox):
    return ElementTree.parse(sandbox.latest / "results.xml").getroot()


def read_json(sandbox):
    return json.loads((sandbox.latest / "results.json").read_text())


def read_tap(sandbox):
    return (sandbox.latest / "results.tap").read_text().splitlines()


def assert_results_show(sandbox, headline, path):
    """They show one test, which is red, with numbers that add up, and no traceback,
    since nothing has crashed."""
    log = (sandbox.latest / "job.log").read_text()
    assert path in log
    assert "Traceback" not in log[log.index(FAILURE) :]

    suite = read_xml(sandbox)
    numbers = {"tests": "1", "errors": "1", "failures": "0", "skipped": "0"}
    assert {key: suite.get(key) for key in numbers} == numbers
    (case,) = suite.iter("testcase")
    error = case.find("error")
    assert (case.get("name"), error.get("message")) == ("vt-joblock", headline)
    assert path in error.text
    assert "Traceback" not in error.text

    report = read_json(sandbox)
    numbers = {"total": 1, "errors": 1, "pass": 0, "failures": 0, "skip": 0}
    assert {key: report[key] for key in numbers} == numbers
    (shown,) = report["tests"]
    assert (shown["name"], shown["status"]) == ("vt-joblock", "ERROR")
    assert shown["fail_reason"] == headline


def test_what_a_refused_job_shows(sandbox, held_lock):
    """Whose lock it is, in a text that is short however many tests the job has.

    Every report has one red test: some people and programs read nothing else.
    """
    # What the job of yesterday wrote there does not stay.
    tap = sandbox.root / "all.tap"
    tap.write_text("1..1\nok 1 boot\n")
    sandbox.add_to_config(f"[job.run.result.tap]\noutput = {tap}")
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(*[other] * 100), other)
    assert len(text.splitlines()) < 50
    assert list(map(str, sandbox.locks())) == [held_lock.path]

    user = ended(sandbox.popen("id", "-un")).strip()
    date = sandbox.popen("date", "-r", held_lock.path, "+%Y-%m-%d %H:%M:%S")
    since = ended(date).strip()
    facts = {
        "file": re.escape(held_lock.path),
        "PID": rf"{held_lock.pid}  \S*python\S* \S*/others\.py {sandbox.lock_dir}",
        "user": user,
        "job id": LockFile(held_lock.path).job_id,
        "since": rf"{since} \(0:\d\d:\d\d ago\)",
    }
    for fact, value in facts.items():
        assert re.search(rf"^    {fact}: +{value}$", text, re.MULTILINE), (fact, text)
    # Nobody takes it for one of their own tests.
    summary = r"^vt-joblock .*\bnone of your tests\b.*: ERROR$"
    assert re.search(summary, text, re.MULTILINE)

    headline = f"{FAILURE}{HELD}. User {user}, PID {held_lock.pid}, since {since}."
    assert_results_show(sandbox, headline, held_lock.path)
    assert tap.read_text().splitlines() == read_tap(sandbox) == TAP
    jobs = sandbox.output("jobs", "list")
    assert re.search(r" 1 \(0/0/1/0\)$", jobs, re.MULTILINE)
    assert re.search(r"vt-joblock .*ERROR", sandbox.output("jobs", "show"))


@pytest.mark.skipif(
    not find_spec("avocado_result_html"), reason="there is no plugin for HTML here"
)
def test_html_report_of_a_refused_job(sandbox, held_lock):
    """Its numbers add up, and its links lead to what there is to read."""
    other = sandbox.vt_test("other")
    assert_refused(sandbox.run(other, other), other)
    report = (sandbox.latest / "results.html").read_text()
    words = " ".join(re.sub("<.*?>", "", report).split())
    assert "From 1 tests executed, 0 passed, 1 did not pass" in words
    assert HELD in report
    links = set(re.findall(r'href="([^"#:]*vt-joblock[^"#:]*)"', report))
    (log,) = [link for link in links if link.endswith("debug.log")]
    assert held_lock.path in (sandbox.latest / log).read_text()
    for link in links:
        assert (sandbox.latest / link).exists(), link


@needs_recipes
def test_tap_of_a_refused_job_on_standard_output(sandbox, held_lock):
    other = sandbox.vt_test("other")
    errors = sandbox.root / "errors"
    with errors.open("w") as file:
        code, text = finish(sandbox.run(other, options=["--tap", "-"], stderr=file))
    assert (code, text.splitlines()) == (2, TAP)
    assert held_lock.path in errors.read_text()
    assert not other.has_begun


def test_command_lines_of_others_do_not_break_the_results(sandbox):
    """Any user can start something that is named like the end of a section in XML."""
    lock = leave_lock(sandbox.lock_dir)
    environment = {**sandbox.environment, "AVOCADO_VT_JOBLOCK": lock.name}
    words = ["sh", "-c", "read line", "]]>\x1b[31m"]
    guest = sandbox.popen(*words, env=environment, stdin=subprocess.PIPE)
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(other), other)
    assert re.search(rf"^ +{guest.pid}  sh -c read line \S", text, re.MULTILINE)
    assert "\x1b" not in text
    (case,) = read_xml(sandbox).iter("testcase")
    assert f"{guest.pid}  sh -c read line" in case.find("error").text


RECORDER = """
from avocado.core.plugin_interfaces import JobPost, JobPostTests, JobPre, JobPreTests
from pathlib import Path

def note(job, what):
    directory = Path(job.config["plugins.vtjoblock.dir"])
    locks = len(list(directory.glob("*.pid")))
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
    """What other plugins do, as a function: lines of job, what, number of locks."""
    record = sandbox.root / "recorded"
    source = RECORDER.format(record=record)
    sandbox.plugin("recorder", source, result_events="Events", job__prepost="Job")
    scripts = sandbox.root / "scripts"
    scripts.mkdir()
    count = f"$(ls {sandbox.lock_dir} | wc -l)"
    line = f"echo $AVOCADO_JOB_UNIQUE_ID script {count} >> {record}"
    (scripts / "script").write_text(f"#!/bin/sh\n{line}\n")
    (scripts / "script").chmod(0o755)
    # Avocado is to complain of a directory that is not there.
    config = f"""[plugins.jobscripts]
pre = {scripts}
post = {scripts}
warn_non_existing_dir = True
"""
    sandbox.configure(f"{config}{sandbox.config.read_text()}")
    return lambda: [line.split() for line in record.read_text().splitlines()]


def test_job_without_the_lock_undoes_nothing(sandbox, recorded):
    """Of what the holder has set up, with other plugins, while it has the lock."""
    holding = sandbox.vt_test("holder")
    job = start(sandbox, holding)
    (lock,) = sandbox.locks()
    holder_id = recorded()[0][0]
    refused = sandbox.vt_test("refused")
    text = assert_refused(sandbox.run(refused), refused)
    # The directory in which its post-job scripts are not looked for.
    assert os.devnull not in text
    sandbox.add_to_config("timeout = -1")
    for signum in (signal.SIGINT, signal.SIGTERM):
        waiting, test, printed = start_waiting(sandbox, signum.name)
        waiting.send_signal(signum)
        assert waiting.wait(60) != 0, printed.read_text()
        assert not test.has_begun
        assert os.devnull not in printed.read_text()
    holding.end()
    ended(job)
    assert lock not in sandbox.locks()
    assert [what for job_id, what, _ in recorded() if job_id == holder_id] == ALL
    # Others run the post() of other plugins, but neither their post_tests() nor a
    # script.
    others = {what for job_id, what, _ in recorded() if job_id != holder_id}
    assert others <= {"post"}
    assert "0" not in [locks for _, _, locks in recorded()]


def numbers_of(sandbox):
    report = read_json(sandbox)
    return report["total"], report["pass"], report["errors"], len(report["tests"])


def next_end(program):
    """Wait until a program has run its job once more; return how that has ended."""
    for line in program.stdout:
        if line.startswith(("returned ", "exited ")):
            return line.strip()
    raise AssertionError(finish(program))


def test_job_that_its_program_runs_again(sandbox, held_lock, recorded):
    """Each time it is as new: refused twice, then it runs; nothing that it was kept
    from stays away, and no result shows what was before."""
    tap = sandbox.root / "all.tap"
    test = sandbox.vt_test("test").end()
    config = {"job.run.result.tap.output": str(tap)}
    pipe = subprocess.PIPE
    program = sandbox.job_api(test, config=config, how={"runs": 3}, stdin=pipe)
    # An older Avocado has no other way than to exit; the newer one never takes a code
    # back.
    refused, at_last = "returned 2", 2
    if not AVOCADO_READS_RECIPES:
        refused, at_last = "exited 2", 0
    for is_last in (False, True):
        assert next_end(program) == refused
        assert numbers_of(sandbox) == (1, 0, 1, 1)
        assert tap.read_text().splitlines() == read_tap(sandbox) == TAP
        assert not test.has_begun
        before = recorded()
        assert {what for _, what, _ in before} <= {"post"}
        if is_last:
            held_lock.release()
        print("once more", file=program.stdin, flush=True)
    assert next_end(program) == f"returned {at_last}"
    assert finish(program)[0] == at_last
    assert test.has_begun
    assert [what for _, what, _ in recorded()[len(before) :]] == ALL
    assert numbers_of(sandbox) == (1, 1, 0, 1)
    suite = read_xml(sandbox)
    assert (suite.get("tests"), suite.get("errors")) == ("1", "0")
    assert [case.find("error") for case in suite.iter("testcase")] == [None]
    assert tap.read_text().splitlines() == read_tap(sandbox) == ["1..1", "ok 1 test"]
    assert list(sandbox.lock_dir.iterdir()) == []
