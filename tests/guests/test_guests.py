"""Real guests under real avocado-vt: the lock lives as long as anything of its job.

Without ``-m ""`` only the endings that happen most are run; all of them take a quarter
of an hour.
"""

import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from endings import ENDINGS, Ending, nothing
from home import (
    GUEST,
    PACKAGES,
    PATH,
    SNIFFER,
    TEST,
    TOOLS,
    GuestHome,
    GuestJob,
    advice,
)
from sandbox import AVOCADO, AVOCADO_READS_RECIPES, finish, wait_for

OWN_END = Ending("own end", nothing)
BY_NAME = {ending.name: ending for ending in [OWN_END, *ENDINGS]}
MOST = {"own end", "SIGKILL to Avocado alone", "job timeout"}
KEEP_GUESTS = "[vt.setup]\nkeep_guest_running = True\n"


@pytest.fixture
def home():
    """A home for real guests; a new one is bootstrapped in two seconds."""
    if not AVOCADO_READS_RECIPES:
        pytest.skip(f"Avocado {AVOCADO} reads no recipes")
    if missing := [tool for tool in TOOLS.split() if not shutil.which(tool, path=PATH)]:
        pytest.skip(
            f"guests need {', '.join(missing)}; on Debian: apt-get install {PACKAGES}"
        )
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-") as directory:
        new = GuestHome(Path(directory) / "home")
        yield new
        new.close()


def check(home, ending, guest_stays=False, **parameters):
    """Have a job end, and assert that no other one runs as long as a test or guest of
    it lives."""
    job = GuestJob(
        home, ending.config.format(30), **parameters
    )  # A guest starts within 30 s.
    assert not job.another_runs()
    began = time.monotonic()
    end(job, ending)
    wait_for(lambda: job.another_runs() or job.avocado.poll() is not None)
    # Once more, beside a test that goes on by itself if there is one.
    job.another_runs()
    job.test.end()
    if guest_stays:
        end_guest(job)
    if ending.may_hang:
        job.signal(signal.SIGKILL, TEST, GUEST)
    wait_for(job.another_runs)
    restored = home.image.read_bytes() == home.image_before
    gone = max(0, job.last_seen - began)
    print(f"\n{ending.name}: gone after {gone:.1f} s, others: {job.others}")
    print(f"restored: {restored}")
    print(finish(job.avocado)[1])
    assert restored or not ending.cleans_up
    return job


def end(job, ending):
    ending.act(job.avocado)
    if ending is OWN_END:
        job.test.end()


def end_guest(job):
    """Assert that a guest alone keeps the lock, and that a refusal says to end it; do
    so."""
    wait_for(lambda: not job.running(TEST))
    guest = job.running(GUEST)
    assert guest
    wait_for(lambda: not job.another_runs() and guest <= advice(job.refusal))
    print(job.refusal)
    job.signal(signal.SIGTERM, GUEST)
    wait_for(lambda: not job.running(GUEST))


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(
            ending,
            id=ending.name,
            marks=() if ending.name in MOST else pytest.mark.slow,
        )
        for ending in BY_NAME.values()
    ],
)
def test_no_job_runs_beside_what_is_left_of_another(home, ending):
    check(home, ending, ending.guest_stays)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["own end", "Ctrl-C", "Ctrl-C three times", "job timeout"]
)
def test_no_job_runs_beside_a_slow_clean_up(home, name):
    check(home, BY_NAME[name], clean_up_takes="20")  # Nobody waits for so long.


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["fail", "error"])
def test_that_has_not_passed_cleans_up(home, outcome):
    check(home, OWN_END, outcome=outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guest_stays"),
    [("Ctrl-C", False), ("SIGTERM to all", True), ("SIGKILL to all", True)],
)
def test_sniffer_that_is_left_under_nohup_stops_nobody(home, name, guest_stays):
    home.prefix = ["nohup"]
    job = check(home, BY_NAME[name], guest_stays)
    assert job.running(SNIFFER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parameters",
    [
        *(
            {"kill_vm": "no", "outcome": outcome}
            for outcome in ("fail", "error", "cancel")
        ),
        # avocado-vt tells of a clean-up that failed only where the test itself has
        # passed.
        {"clean_up_fails": "yes", "outcome": "pass"},
        {"clean_up_fails": "yes", "outcome": "fail"},
    ],
    ids=lambda parameters: " ".join(parameters.values()),
)
def test_guest_that_is_left_by_a_test_that_has_not_passed_keeps_the_lock(
    home, parameters
):
    job = GuestJob(home, **parameters)
    job.test.end()
    _, text = finish(job.avocado)
    assert re.search(r"process(es)? of the job still runs?:", text)
    assert all(f" {pid}  /" in text for pid in job.running(GUEST)), text
    end_guest(job)
    wait_for(job.another_runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        ("own end", "", {"kill_vm": "no"}),
        ("own end", KEEP_GUESTS, {}),
        ("own end", KEEP_GUESTS, {"outcome": "fail"}),
        ("Ctrl-C", KEEP_GUESTS, {}),
    ],
)
def test_guest_that_is_left_on_purpose_stops_nobody(home, name, config, parameters):
    # Else it ends with its terminal, which Ctrl-C ends.
    home.prefix = ["nohup"]
    job = GuestJob(home, config, **parameters)
    assert not job.another_runs()
    job.guest_counts = False
    end(job, BY_NAME[name])
    _, text = finish(job.avocado)
    assert "of the job still run" not in text
    # The next job may end it.
    assert job.running(GUEST)
    wait_for(job.another_runs)
