"""Jobs that wait for the lock: what they tell, in which order they get it, and what
ends the waiting. Most are real jobs."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users
from others import cards, job_id, leave_lock
from sandbox import (
    AVOCADO,
    FAILURE,
    GUEST,
    HANG,
    assert_refused,
    heed_signals,
    running_tests,
    start,
    start_waiting,
    wait_for,
)

from avocado_vt_joblock.lockfile import LockFile

pytestmark = needs_avocado_vt

UNTIL = r"until [\d-]+ [\d:]+"
DURATION = r"\d+:\d\d:\d\d"
#: What a job says when it is stopped from outside while it waits.
STOPPED = rf"^Stopped waiting for the lock after {DURATION}\. No test has run\.$"
#: Attempts are seldom a second apart, as for users: tests have no time for that.
QUICK = {"ATTEMPT_INTERVAL": 0.2}


def crash_logs(sandbox):
    return list(sandbox.home.rglob("avocado-traceback-*"))


def attempts_are_noted(sandbox):
    """Have jobs note their attempts; return a function that counts them."""
    notes = sandbox.root / "attempts"
    notes.touch()
    sandbox.first(f"""
from avocado_vt_joblock import lock
acquire = lock.JobLock.acquire
def noted(self, **options):
    with open({str(notes)!r}, "a") as file:
        file.write("attempt\\n")
    return acquire(self, **options)
lock.JobLock.acquire = noted
""")
    return lambda: len(notes.read_text().splitlines())


def test_jobs_that_wait_get_the_lock_in_the_order_in_which_they_came(
    sandbox, held_lock
):
    """They tell whose lock it is once, and at times that they still wait."""
    stale = leave_lock(sandbox.lock_dir)
    sandbox.add_to_config("timeout = 2m")
    # Patience is told of every five minutes: here sooner.
    sandbox.change("waiting", REMINDER_INTERVAL=0.1, **QUICK)
    in_line = [start_waiting(sandbox, name) for name in ("one", "two", "three")]
    job, _, printed = in_line[0]
    still = rf"^Still waiting {UNTIL}, after {DURATION}\.$"
    wait_for(lambda: len(re.findall(still, printed.read_text(), re.MULTILINE)) > 1, job)
    told = printed.read_text()
    first_words = rf"^Waiting {UNTIL}:\s+another job holds the lock\.$"
    assert len(re.findall(first_words, told, re.MULTILINE)) == 1
    facts = {
        "file": held_lock.path,
        "PID": f"{held_lock.pid}  ",
        "user": "",
        "job id": LockFile(held_lock.path).job_id,
        "since": "",
    }
    for fact, value in facts.items():
        assert len(re.findall(rf"^    {fact}: +{value}", told, re.MULTILINE)) == 1
    # Who waits changes nothing, also where it is plain what is stale.
    assert stale.exists()
    assert not any(test.has_begun for _, test, _ in in_line)
    held_lock.release()
    codes = [job.wait(60) for job, _, _ in in_line]
    texts = [printed.read_text() for _, _, printed in in_line]
    assert codes == [0, 0, 0], texts
    for text in texts:
        assert re.search(rf"^Obtained the lock after {DURATION}\.$", text, re.MULTILINE)
        # A pipe or a file gets no line that is rewritten.
        assert "\x1b" not in text
    times = [when for _, test, _ in in_line for _, when in test.notes()]
    assert times == sorted(times)
    jobs = sandbox.home.glob("avocado/job-results/job-*/job.log")
    logs = [log.read_text() for log in jobs]
    for log in logs:
        assert re.search("Waiting.*Obtained", log, re.DOTALL)
    # One of them has removed it, and says so.
    assert "".join(logs).count(f"Removed the stale lock file {stale}.") == 1
    assert os.listdir(sandbox.lock_dir) == []


def stop(process, directory, ticket):
    """Stop a process that waits while it makes no attempt.

    In the middle of one others would have to wait for it.
    """

    def is_at_rest():
        names = os.listdir(directory)
        lock_name = ticket[1:].removesuffix(".host")
        return ticket in names and not {lock_name, f".{lock_name}"} & set(names)

    def guard_is_free():
        guard = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(guard)

    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        if is_at_rest() and guard_is_free():
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)


CONTENDER = """
import math, sys
from avocado_vt_joblock import lock, lockdir, waiting
lockdir.TICKET_TIMEOUT = 5
waiting.ATTEMPT_INTERVAL = 0.2
contender = lock.JobLock(*sys.argv[1:])
waiting.acquire(contender, math.inf)
print("has it", flush=True)
sys.stdin.read()
contender.release()
"""


class Contender:
    """A process that waits for the lock as a job does."""

    def __init__(self, sandbox, number):
        before = cards(sandbox.lock_dir)
        words = [sandbox.python, "-c", CONTENDER, sandbox.lock_dir, job_id(number)]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = sandbox.popen(*words, **pipes)
        wait_for(lambda: cards(sandbox.lock_dir) != before, self.process)
        (self.ticket,) = set(cards(sandbox.lock_dir)) - set(before)

    @property
    def has_the_lock(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def release(self):
        self.process.stdin.close()
        self.process.wait()


def test_six_wait_of_which_one_is_stopped_and_one_killed(sandbox, held_lock):
    """Neither blocks the others; the one that goes on later has kept its turn."""
    one, two, three, four, five, six = (
        Contender(sandbox, number) for number in range(6)
    )
    for contender in (two, four):
        stop(contender.process, sandbox.lock_dir, contender.ticket)
    four.process.kill()
    held_lock.release()
    in_line = [one, two, three, five, six]
    for turn in (one, three, five, two, six):
        wait_for(lambda: turn.has_the_lock, turn.process)  # noqa: B023
        assert [each for each in in_line if each.has_the_lock] == [turn]
        if turn is five:
            ticket = sandbox.lock_dir / two.ticket
            renewed = os.lstat(ticket).st_ctime
            two.process.send_signal(signal.SIGCONT)
            wait_for(lambda: os.lstat(ticket).st_ctime > renewed)  # noqa: B023
        turn.release()
        in_line.remove(turn)
    # A later job removes it, when it is a minute old.
    assert os.listdir(sandbox.lock_dir) == [four.ticket]


def test_job_that_does_not_wait_is_refused_while_others_wait(sandbox, held_lock):
    """It comes after them, though the lock is free at that moment."""
    sandbox.change("lockdir", TICKET_TIMEOUT=1000)
    sandbox.change("waiting", **QUICK)
    config = sandbox.config.read_text()
    sandbox.add_to_config("timeout = -1")
    before = cards(sandbox.lock_dir)
    patient, test, printed = start_waiting(sandbox, "patient")
    (ticket,) = set(cards(sandbox.lock_dir)) - set(before)
    stop(patient, sandbox.lock_dir, ticket)
    held_lock.release()
    sandbox.configure(config)
    impatient = sandbox.vt_test("impatient")
    text = assert_refused(sandbox.run(impatient), impatient)
    assert re.search(rf"{FAILURE}1 job\b.*\bbefore this one\b", text)
    assert os.listdir(sandbox.lock_dir) == [ticket]
    patient.send_signal(signal.SIGCONT)
    assert patient.wait(60) == 0, printed.read_text()
    assert test.has_begun


def test_waits_for_what_is_left_of_a_killed_job(sandbox):
    holding = sandbox.vt_test("holder", starts=GUEST)
    holder = start(sandbox, holding)
    left = {*running_tests(holder), holding.guest}
    sandbox.change("waiting", **QUICK)
    sandbox.add_to_config("timeout = -1")
    job, test, printed = start_waiting(sandbox, "waiting")
    holder.kill()
    wait_for(lambda: "processes of it still run" in printed.read_text(), job)
    told = printed.read_text()
    assert left == set(map(int, re.findall(r"^ +(\d+)  \S", told, re.MULTILINE)))
    assert "\nA test is among them." in told
    holding.end()
    # Told again when that changes.
    wait_for(lambda: "\nNo test is among them" in printed.read_text(), job)
    assert re.search(rf"^ +kill {holding.guest}$", printed.read_text(), re.MULTILINE)
    assert not test.has_begun
    os.kill(holding.guest, signal.SIGKILL)
    assert job.wait(60) == 0, printed.read_text()
    assert test.has_begun


def test_out_of_time(sandbox, held_lock):
    sandbox.add_to_config("timeout = 0.5")
    test = sandbox.vt_test("waiting")
    text = assert_refused(sandbox.run(test), test)
    words = rf"out of time after {DURATION}: another job holds the lock\."
    assert re.search(words, text)
    assert f"PID:    {held_lock.pid} " in text
    assert "wait longer" in text
    assert list(map(str, sandbox.locks())) == [held_lock.path]
    assert len(os.listdir(sandbox.lock_dir)) == 2  # the card of that lock, too


def test_trouble_of_a_moment_does_not_end_the_waiting(sandbox, held_lock):
    """A lock file that is empty for now, a directory that is away: each is told
    once."""
    sandbox.change("waiting", **QUICK)
    sandbox.add_to_config("timeout = -1")
    attempts = attempts_are_noted(sandbox)
    job, test, printed = start_waiting(sandbox, "waiting")

    def wait_for_attempts(number):
        enough = attempts() + number
        wait_for(lambda: attempts() >= enough, job)

    # Somebody is about to write it.
    odd = leave_lock(sandbox.lock_dir, content=b"")
    wait_for(lambda: str(odd) in printed.read_text(), job)
    wait_for_attempts(3)
    odd.write_text(f"{held_lock.pid}")
    wait_for_attempts(2)
    odd.unlink()
    # A mount that is renewed, for example.
    away = sandbox.lock_dir.rename(sandbox.root / "away")
    wait_for(lambda: "does not exist" in printed.read_text(), job)
    wait_for_attempts(3)
    away.rename(sandbox.lock_dir)
    wait_for_attempts(2)
    assert not test.has_begun
    held_lock.release()
    assert job.wait(60) == 0, printed.read_text()
    assert test.has_begun
    text = printed.read_text()
    assert text.count("there is no PID in it") == 1
    assert text.count("does not exist") == 1


WAIT_AS = """
import math, os, sys
from avocado_vt_joblock import lock, waiting
os.setuid(int(sys.argv[3]))
waiting.ATTEMPT_INTERVAL = 0.2
contender = lock.JobLock(*sys.argv[1:3])
waiting.acquire(contender, math.inf)
contender.release()
"""


@needs_other_users
def test_file_that_nobody_may_read_for_a_moment_does_not_end_the_waiting(
    sandbox, held_lock
):
    sandbox.lock_dir.chmod(0o1777)
    printed = sandbox.root / "printed"
    # The interpreter may lie where that user cannot read it.
    words = [sandbox.python, "-c", WAIT_AS, sandbox.lock_dir, job_id(1), str(SOME_USER)]
    with printed.open("w") as file:
        contender = sandbox.popen(*words, stdout=file)
    wait_for(lambda: "Waiting" in printed.read_text(), contender)
    os.chmod(held_lock.path, 0)
    wait_for(lambda: "Permission denied" in printed.read_text(), contender)
    os.chmod(held_lock.path, 0o644)
    held_lock.release()
    assert contender.wait(HANG) == 0, printed.read_text()


def test_trouble_that_lasts_ends_the_waiting(sandbox, held_lock):
    sandbox.change("waiting", TROUBLE_TIMEOUT=0.5, **QUICK)
    sandbox.add_to_config("timeout = -1")
    job, test, printed = start_waiting(sandbox, "waiting")
    odd = leave_lock(sandbox.lock_dir, content=b"")
    assert job.wait(60) == 2
    _, _, text = printed.read_text().partition(FAILURE)
    assert "there is no PID in it" in text
    assert re.search(rf"^ +rm {odd}$", text, re.MULTILINE)
    assert not test.has_begun


@pytest.mark.skipif(AVOCADO < 105, reason="only avocado run turns SIGTERM into an exit")
def test_sigterm_ends_the_waiting(sandbox, held_lock):
    sandbox.add_to_config("timeout = -1")
    job, test, printed = start_waiting(sandbox, "waiting")
    job.terminate()
    assert job.wait(60) == 1
    assert re.search(STOPPED, printed.read_text(), re.MULTILINE)
    assert not test.has_begun
    assert len(os.listdir(sandbox.lock_dir)) == 2  # the held one, with its card


def test_ctrl_c_on_a_terminal_ends_the_waiting(sandbox, held_lock):
    """The terminal has one line that shows how long the job has waited so far."""
    sandbox.change("waiting", **QUICK)
    sandbox.add_to_config("timeout = 1h")
    test = sandbox.vt_test("waiting")
    master, slave = pty.openpty()

    def take_terminal():
        heed_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ends = {"stdin": slave, "stdout": slave, "stderr": slave}
    job = sandbox.run(test, preexec_fn=take_terminal, **ends)
    os.close(slave)
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # There is nobody at the other end any more.
            while select.select([master], [], [], 0)[0]:
                shown.extend(os.read(master, 4096))
        return shown.decode(errors="replace")

    line = rf"\r\x1b\[KWaiting for the lock: ({DURATION}) of 1:00:00\. Ctrl-C ends"
    wait_for(lambda: len(set(re.findall(line, read()))) > 1, job)
    # Nothing but the next one ends such a line.
    for rest in re.findall(rf"{line} the waiting\.(.{{0,3}})", read(), re.DOTALL):
        assert "\r\x1b[K".startswith(rest[1])
    os.write(master, b"\x03")
    wait_for(lambda: read() and job.poll() is not None)
    text = read().replace("\r\n", "\n")
    os.close(master)
    assert job.returncode == 8
    assert re.search("\r\x1b\\[K" + STOPPED[1:], text, re.MULTILINE), text
    assert "Traceback" not in text
    assert "Program interrupted by user" not in text
    assert crash_logs(sandbox) == []
    assert not test.has_begun
    assert len(os.listdir(sandbox.lock_dir)) == 2  # the held one, with its card


def test_error_of_the_program_itself_is_none_of_the_directory(sandbox, held_lock):
    """A TimeoutError from a signal handler, for example, which is an OSError, too."""
    sandbox.add_to_config("timeout = -1")
    sandbox.first("""
import signal
def give_up(*_):
    raise TimeoutError("the patience of this program is over")
signal.signal(signal.SIGUSR1, give_up)
""")
    job, test, printed = start_waiting(sandbox, "waiting")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 2
    _, _, text = printed.read_text().partition(FAILURE)
    assert text.startswith("TimeoutError: the patience of this program is over.")
    assert "lock directory" not in text
    assert not test.has_begun
    assert len(os.listdir(sandbox.lock_dir)) == 2  # the held one, with its card
