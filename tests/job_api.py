"""A program that runs a job by the Job API: ``job_api.py CONFIG HOW RECIPE...``.

The job has a suite for each recipe. CONFIG is its configuration in JSON, and HOW what
is done otherwise: ``disabled`` is how many of the last suites are, ``runs`` how often
the job is run, from the second time on after a line on standard input, and
``in_except`` whether that is done inside of an ``except`` block. It prints after each
run what ``Job.run()`` returns, or with what it exits, and exits with the last one.
"""

import json
import sys
from pathlib import Path

from avocado.core.job import Job
from avocado.core.nrunner.runnable import Runnable
from avocado.core.suite import TestSuite


def run(job, how):
    try:
        if not how.get("in_except"):
            code = job.run()
        else:
            try:
                raise KeyError("handled")
            except KeyError:
                code = job.run()
    except SystemExit as error:
        print(f"exited {error.code}", flush=True)
        return error.code
    print(f"returned {code}", flush=True)
    return code


config, how, *recipes = sys.argv[1:]
how = json.loads(how)
enabled = len(recipes) - how.get("disabled", 0)
suites = []
for number, recipe in enumerate(recipes):
    facts = json.loads(Path(recipe).read_text())
    words = facts.get("args", [])
    test = Runnable(facts["kind"], facts["uri"], *words, **facts["kwargs"])
    suites.append(TestSuite(name=f"{number}", tests=[test], enabled=number < enabled))
# A suite that nobody has resolved has None for tests.
suites.append(TestSuite(name="unresolved", enabled=False))
# Avocado's collector of system information can hang when it is interrupted.
usual = {"core.show": ["app"], "sysinfo.collect.enabled": False}
with Job({**usual, **json.loads(config)}, suites) as job:
    code = run(job, how)
    for _ in range(1, how.get("runs", 1)):
        sys.stdin.readline()
        code = run(job, how)
sys.exit(code)
