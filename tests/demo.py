"""The lock at work with real jobs and VT tests, in a home and a lock directory of their
own."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from sandbox import Sandbox, assert_runs, finish, start, start_waiting


def show_refusal_and_waiting(sandbox):
    say("A first job with a VT test starts, and holds the lock while its test runs:")
    first = sandbox.vt_test("first")
    holder = start(sandbox, first)
    (lock,) = sandbox.locks()
    text, code = vt_joblock(sandbox, "show")
    check(str(lock) in text, "the command shows the lock of the first job")
    check(code == 2, "its exit code is 2: a job that starts now would be refused")

    say("A second job starts meanwhile, and is refused:")
    refused(sandbox, "second", str(lock))

    say("A third job waits for its turn, since plugins.vtjoblock.timeout is 1m:")
    configuration = sandbox.config.read_text()
    sandbox.add_to_config("timeout = 1m")
    waiting, third, log = start_waiting(sandbox, "third")
    sandbox.configure(configuration)
    check(not third.has_begun, "its test does not run beside that of the first job")
    first.end()
    check(finish(holder)[0] == 0, "the first job has passed")
    code, _ = finish(waiting)
    quote(log.read_text(), "Waiting")
    has_passed = code == 0 and third.has_begun
    check(has_passed, "then the third one has taken the lock, and has passed")


def show_other_work(sandbox):
    say("The lock is held for other work; a job meanwhile would be refused:")
    inner = "avocado vt-joblock show 2> /dev/null"
    text, code = vt_joblock(sandbox, "run", "--", "sh", "-c", f"{inner}; exit 7")
    check("The lock is not free" in text, "the lock is held while the command runs")
    check(code == 7, "the exit code is that of the command")
    text, code = vt_joblock(sandbox, "show")
    check(code == 0, "then the lock is free again")


def show_what_is_left(sandbox):
    say("A job is killed with all its tests. What stands in for a guest runs on:")
    killed = sandbox.vt_test("killed", starts="sleep 1000")
    job = start(sandbox, killed)
    os.killpg(job.pid, signal.SIGKILL)
    finish(job)
    quote(f"$ pgrep -a sleep\n{killed.guest} sleep 1000")

    say("The next job is refused: that guest may still write to its image:")
    refused(sandbox, "next", f"{killed.guest}  sleep 1000")

    say("The guest is ended, and a last job runs:")
    os.kill(killed.guest, signal.SIGTERM)
    text = assert_runs(sandbox, "last")
    quote(text, "JOB ID")
    check("PASS 1" in text, "its test has run, and it has passed")
    check(
        not sandbox.locks(), "the lock directory is empty: the stale lock is gone, too"
    )


def refused(sandbox, name, reason):
    test = sandbox.vt_test(name)
    code, text = finish(sandbox.run(test))
    quote(text, "Avocado job failed")
    check(reason in text, "it says what is in the way")
    check(code == 2, f"its exit code is {code}, that of a failed job")
    check(not test.has_begun, "its test has not run")


def vt_joblock(sandbox, *words):
    """Run the command, and quote it with what it prints on standard output."""
    process = sandbox.avocado("vt-joblock", *words, stderr=subprocess.DEVNULL)
    code, text = finish(process)
    quote(f"$ avocado vt-joblock {shlex.join(words)}\n{text}")
    return text, code


def say(text):
    print(f"\n{text}", flush=True)


def quote(text, begin=""):
    for line in text[text.index(begin) :].strip().splitlines():
        print(f"    | {line}", flush=True)


def check(true, what):
    print(f"    {'yes' if true else 'NO'}: {what}", flush=True)
    if not true:
        sys.exit(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vt-joblock-demo-") as directory:
        sandbox = Sandbox(Path(directory) / "user")
        try:
            show_refusal_and_waiting(sandbox)
            show_other_work(sandbox)
            show_what_is_left(sandbox)
        finally:
            sandbox.close()
