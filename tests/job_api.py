"""A job made with the Job API: ``job_api.py OPTIONS RECIPE...``, a suite for each recipe.

OPTIONS is JSON: under ``job`` what the caller passes as the job's configuration, under ``suites``
what it passes to each suite. It prints what ``Job.run()`` returns, and exits with that.
"""

import json
import sys
from pathlib import Path

from avocado.core.job import Job
from avocado.core.nrunner.runnable import Runnable
from avocado.core.suite import TestSuite


def main(options, *recipes):
    options = {"job": {}, "suites": {}, **json.loads(options)}
    suites = []
    for recipe in recipes:
        runnable = json.loads(Path(recipe).read_text())
        arguments = runnable.get("args", [])
        test = Runnable(runnable["kind"], runnable["uri"], *arguments, **runnable["kwargs"])
        suites.append(TestSuite(name=Path(recipe).stem, tests=[test], **options["suites"]))
    # A suite that nobody has resolved has None for tests.
    suites.append(TestSuite(name="unresolved", enabled=False))
    # Avocado's collector of system information can hang when it is interrupted.
    usual = {"core.show": ["app"], "sysinfo.collect.enabled": False}
    with Job({**usual, **options["job"]}, suites) as job:
        code = job.run()
    print(f"returned {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
