"""The lock at work: three real jobs with VT tests, in a home and a lock directory of their own."""

import sys
import tempfile
from pathlib import Path

from sandbox import Sandbox, finish, wait_for

FAILURE = "Avocado job failed: "


def main():
    with tempfile.TemporaryDirectory(prefix="vt-joblock-demo-") as directory:
        sandbox = Sandbox(Path(directory) / "user")
        try:
            show(sandbox)
        finally:
            sandbox.close()


def show(sandbox):
    say(f"The lock directory is {sandbox.lock_dir}.")

    say("A first job with a VT test starts, and holds the lock while its test runs:")
    first = sandbox.vt_test("first")
    job = sandbox.run(first)
    wait_for(lambda: first.has_begun, job)
    (lock,) = sandbox.locks()
    quote(f"$ ls {sandbox.lock_dir}\n{lock.name}\n$ cat {lock}\n{lock.read_text().strip()}")
    check(int(lock.read_text()) == job.pid, "the lock file holds the PID of the first job")

    say("A second job starts meanwhile, and is refused:")
    second = sandbox.vt_test("second")
    code, text = finish(sandbox.run(second))
    quote(text[text.find(FAILURE) :])
    check(FAILURE in text and str(lock) in text, "it says who holds the lock")
    check(code == 2, f"its exit code is {code}, that of a failed job")
    check(not second.has_begun, "its test has not run")

    say("The first job ends, and its lock file is gone:")
    first.end()
    code, _ = finish(job)
    check(code == 0, "the first job has passed")
    check(not sandbox.locks(), "the lock directory is empty")

    say("A third job runs:")
    third = sandbox.vt_test("third")
    third.end()
    code, text = finish(sandbox.run(third))
    quote(text[text.find("JOB ID") :])
    check(code == 0 and third.has_begun, "its test has run, and it has passed")
    check(not sandbox.locks(), "the lock directory is empty")


def say(text):
    print(f"\n{text}", flush=True)


def quote(text):
    print("\n".join(f"    | {line}" for line in text.strip().splitlines()), flush=True)


def check(true, what):
    print(f"    {'yes' if true else 'NO'}: {what}", flush=True)
    if not true:
        sys.exit(1)


if __name__ == "__main__":
    main()
