"""Ctrl-C at every line of what Avocado calls: ``interruptions.py DIRECTORY CASE``.

The job has what the plugin uses of one: with real ones this would take an hour. It
prints how many lines there were.
"""

import linecache
import sys
from pathlib import Path
from types import SimpleNamespace

from avocado.core.result import Result

from avocado_vt_joblock import lock, lockdir, marks, plugin

PACKAGE = plugin.__file__.rpartition("/")[0]
LIMIT = 10_000
SCRIPTS = "plugins.jobscripts.post"


class CtrlC:
    """Raises KeyboardInterrupt at a line of the package; with 0 never."""

    def __init__(self, line):
        self.left = line
        self.place = None

    def __call__(self, frame, event, arg):
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE):
            return None
        # Python does not look for signals at "try:", nor between the end of a "with"
        # and its exit.
        line = linecache.getline(path, frame.f_lineno).split()
        if event == "line" and line[0] not in ("try:", "with"):
            self.left -= 1
            if self.left == 0:
                self.place = f"{path}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def new_job(directory, status="PASS"):
    result = Result("0" * 40, "job.log")
    result.tests = [{"status": status}]
    tests = [SimpleNamespace(kind="avocado-vt")]
    job = SimpleNamespace(
        unique_id="0" * 40,
        config={
            "plugins.vtjoblock.dir": directory,
            "plugins.vtjoblock.timeout": "0",
            SCRIPTS: "x",
        },
        test_suites=[SimpleNamespace(enabled=True, tests=tests)],
        result=result,
        status="PASS",
        exitcode=0,
        logdir="",
        logfile="",
        undone=[],
    )
    job.post_tests = lambda: job.undone.append("post_tests")
    return job


def run(job, pre=0, post=0):
    """Run a job as Avocado does, with Ctrl-C at a line; return where that came."""

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
    return in_pre if pre else in_post


def main(directory, case):
    def published():
        return [path for path in Path(directory).iterdir() if path.name[0] != "."]

    holder = lock.JobLock(directory, "1" * 40)
    if case == "pre beside a holder":
        holder.acquire()
    own_marks = marks.own()
    # At worst one keeps the guard, and others wait for it in vain.
    lockdir.GUARD_TIMEOUT = 0.001
    before = published()
    phase, _, rest = case.partition(" ")
    status = "FAIL" if rest == "FAIL" else "PASS"
    lines = LIMIT - run(new_job(directory, status), **{phase: LIMIT}).left
    for line in range(1, lines + 1):
        job = new_job(directory, status)
        place = run(job, **{phase: line}).place
        if not place:
            continue  # Not every run is as long.
        if phase == "pre":
            assert job.undone == [], (place, job.undone)
            assert published() == before, (place, published())
        else:
            # The file may stay: nobody may have looked for what is left.
            assert job.undone == ["post_tests", "scripts"], (place, job.undone)
            assert {type(error) for error in job.errors} <= {KeyboardInterrupt}, place
        assert marks.own() == own_marks, place
        # The process goes on, and does not keep the lock; the same job may run again.
        job.undone.clear()
        run(job)
        assert bool(job.errors) == holder.is_held, (place, job.errors)
        expected = [] if holder.is_held else ["post_tests", "scripts"]
        assert job.undone == expected, (place, job.undone)
        assert published() == before, (place, published())
    print(f"{lines} lines")


main(*sys.argv[1:])
