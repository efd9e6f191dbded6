"""A job made with the Job API: ``job_api.py CONFIG ENABLED RECIPE...``, a suite for each recipe.

CONFIG is the job's configuration in JSON, and ENABLED how many of the suites are not disabled. It
prints what ``Job.run()`` returns, and exits with that.
"""

import json
import sys
from pathlib import Path

from avocado.core.job import Job
from avocado.core.nrunner.runnable import Runnable
from avocado.core.suite import TestSuite

config, enabled, *recipes = sys.argv[1:]
suites = []
for number, recipe in enumerate(recipes):
    facts = json.loads(Path(recipe).read_text())
    test = Runnable(facts["kind"], facts["uri"], *facts.get("args", []), **facts["kwargs"])
    suites.append(TestSuite(name=f"{number}", tests=[test], enabled=number < int(enabled)))
# A suite that nobody has resolved has None for tests.
suites.append(TestSuite(name="unresolved", enabled=False))
# Avocado's collector of system information can hang when it is interrupted.
usual = {"core.show": ["app"], "sysinfo.collect.enabled": False}
with Job({**usual, **json.loads(config)}, suites) as job:
    code = job.run()
print(f"returned {code}", flush=True)
sys.exit(code)
