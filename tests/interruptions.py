"""Ctrl-C at every line of what Avocado calls: ``interruptions.py DIRECTORY CASE``.

The job has what the plugin uses of one: with real ones this would take an hour. It prints how many
lines there were.
"""

import linecache
import sys
from pathlib import Path
from types import SimpleNamespace

from avocado.core.result import Result

from avocado_vt_joblock import plugin
from avocado_vt_joblock.lock import JobLock

PACKAGE = plugin.__file__.rpartition("/")[0]
SCRIPTS = "plugins.jobscripts.post"


class CtrlC:
    """Raises KeyboardInterrupt at a line of the package; with 0 never."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # At "try:" nothing happens, and Python does not look whether a signal has come.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and line.strip() != "try:":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *error):
        sys.settrace(None)


def new_job(directory, status="PASS"):
    result = Result("0" * 40, "job.log")
    result.tests = [{"status": status}]
    job = SimpleNamespace(
        unique_id="0" * 40,
        config={"plugins.vtjoblock.dir": directory, "plugins.vtjoblock.timeout": "0", SCRIPTS: "x"},
        test_suites=[SimpleNamespace(enabled=True, tests=[SimpleNamespace(kind="avocado-vt")])],
        result=result,
        status="PASS",
        exitcode=0,
        logdir="",
        logfile="",
        undone=[],
    )
    job.post_tests = lambda: job.undone.append("post_tests")
    return job


def run(job, in_pre=0, in_post=0):
    """Run a job as Avocado does, with Ctrl-C at a line; return whether it came to that."""
    job.errors = []
    in_pre, in_post = CtrlC(in_pre), CtrlC(in_post)
    try:
        with in_pre:
            plugin.VTJobLock().pre(job)
    except BaseException as error:
        job.errors.append(error)
    job.post_tests()
    if job.config[SCRIPTS] == "x":
        job.undone.append("scripts")
    try:
        with in_post:
            plugin.VTJobUnlock().post(job)
    except BaseException as error:
        job.errors.append(error)
    return in_pre.left == 0 or in_post.left == 0


def main(directory, case):
    def published():
        return [path for path in Path(directory).iterdir() if path.name[0] != "."]

    holder = JobLock(directory, "1" * 40)
    if case == "pre beside a holder":
        holder.acquire()
    before = published()
    line = 0
    while True:
        line += 1
        if case.startswith("pre"):
            job = new_job(directory)
            is_interrupted = run(job, in_pre=line)
            expected, left = [], before
        else:
            job = new_job(directory, case.split()[1])
            is_interrupted = run(job, in_post=line)
            # The file may stay: nobody may have looked for what is left.
            expected, left = ["post_tests", "scripts"], published()
        if not is_interrupted:
            break
        assert job.undone == expected, (line, job.undone)
        assert published() == left, (line, published())
        # The process goes on, and does not keep the lock; the same job may run again.
        job.undone.clear()
        run(job)
        assert bool(job.errors) == holder.held, line
        assert job.undone == ([] if holder.held else ["post_tests", "scripts"]), line
        assert published() == before, (line, published())
    print(f"{line} lines")


main(*sys.argv[1:])
