"""The lock at work with real jobs and VT tests, in a home and a lock directory of their own."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from sandbox import Sandbox, assert_runs, finish, start, start_waiting


def show_refusal_and_waiting(sandbox):
    say("A first job with a VT test starts, and holds the lock while its test runs:")
    first = sandbox.vt_test("first")
    holder = start(sandbox, first)
    (lock,) = sandbox.locks()
    quote(f"$ cat {lock}\n{lock.read_text()}")
    check(int(lock.read_text()) == holder.pid, "the lock file holds the PID of the first job")

    say("A second job starts meanwhile, and is refused:")
    refused(sandbox, "second", str(lock))

    say("A third job may wait for its turn, since plugins.vtjoblock.timeout is set to 60:")
    configuration = sandbox.config.read_text()
    sandbox.add_to_config("timeout = 60")
    waiting, third, log = start_waiting(sandbox, "third")
    sandbox.configure(configuration)
    check(not third.has_begun, "its test does not run beside that of the first job")
    first.end()
    check(finish(holder)[0] == 0, "the first job has passed")
    code, _ = finish(waiting)
    quote(log.read_text(), "Waiting")
    check(code == 0 and third.has_begun, "then the third one has taken the lock, and has passed")


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
    check(not sandbox.locks(), "the lock directory is empty: the stale lock is gone, too")


def refused(sandbox, name, reason):
    test = sandbox.vt_test(name)
    code, text = finish(sandbox.run(test))
    quote(text, "Avocado job failed")
    check(reason in text, "it says what is in the way")
    check(code == 2, f"its exit code is {code}, that of a failed job")
    check(not test.has_begun, "its test has not run")


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
            show_what_is_left(sandbox)
        finally:
            sandbox.close()
