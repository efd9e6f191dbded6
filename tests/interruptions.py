"""Ctrl-C at every line of what Avocado calls: ``interruptions.py DIRECTORY CASE``.

The job has what the plugin uses of one: with real ones this would take an hour. It prints how many
lines there were.
"""

import linecache
import sys
from pathlib import Path
from types import SimpleNamespace

from avocado.core.result import Result

from avocado_vt_joblock import lock, plugin

PACKAGE = plugin.__file__.rpartition("/")[0]
LIMIT = 10_000
SCRIPTS = "plugins.jobscripts.post"


class CtrlC:
    """Raises KeyboardInterrupt at a line of the package; with 0 never."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # Python does not look for signals at "try:", nor between the end of a "with" and its exit.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split()
        if event == "line" and line[0] not in ("try:", "with"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def new_job(directory, status="PASS"):
    result = Result("0" * 40, "job.log")
    result.tests = [{"status": status}]
    config = {"plugins.vtjoblock.dir": directory, "plugins.vtjoblock.timeout": "0", SCRIPTS: "x"}
    suites = [SimpleNamespace(enabled=True, tests=[SimpleNamespace(kind="avocado-vt")])]
    job = SimpleNamespace(unique_id="0" * 40, config=config, test_suites=suites, result=result)
    job.status, job.exitcode, job.logdir, job.logfile, job.undone = "PASS", 0, "", "", []
    job.post_tests = lambda: job.undone.append("post_tests")
    return job


def run(job, pre=0, post=0):
    """Run a job as Avocado does, with Ctrl-C at a line; return how many lines were left to that."""

    def attempt(call, ctrl_c):
        sys.settrace(ctrl_c)
        try:
            call(job)
        except BaseException as error:
            job.errors.append(error)
        finally:
            sys.settrace(None)

    job.errors = []
    in_pre, in_post = CtrlC(pre), CtrlC(post)
    attempt(plugin.VTJobLock().pre, in_pre)
    job.post_tests()
    if job.config[SCRIPTS] == "x":
        job.undone.append("scripts")
    attempt(plugin.VTJobUnlock().post, in_post)
    return in_pre.left if pre else in_post.left


def main(directory, case):
    def published():
        return [path for path in Path(directory).iterdir() if path.name[0] != "."]

    holder = lock.JobLock(directory, "1" * 40)
    if case == "pre beside a holder":
        holder.acquire()
    # At worst one keeps the guard, and others wait for it in vain.
    lock.GUARD_TIMEOUT = 0.001
    before = published()
    phase, _, rest = case.partition(" ")
    status = "FAIL" if rest == "FAIL" else "PASS"
    lines = LIMIT - run(new_job(directory, status), **{phase: LIMIT})
    for line in range(1, lines + 1):
        job = new_job(directory, status)
        if run(job, **{phase: line}):
            continue  # Not every run is as long.
        if phase == "pre":
            assert job.undone == [], (line, job.undone)
            assert published() == before, (line, published())
        else:
            # The file may stay: nobody may have looked for what is left.
            assert job.undone == ["post_tests", "scripts"], (line, job.undone)
        # The process goes on, and does not keep the lock; the same job may run again.
        job.undone.clear()
        run(job)
        assert bool(job.errors) == holder.held, line
        assert job.undone == ([] if holder.held else ["post_tests", "scripts"]), line
        assert published() == before, (line, published())
    print(f"{lines} lines")


main(*sys.argv[1:])
