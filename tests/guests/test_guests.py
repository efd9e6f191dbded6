"""Real guests under real avocado-vt: the lock lives as long as anything of its job.

The endings that happen most; ``test_guest_endings.py`` has the others.
"""

import pytest
from endings import FEW, check


@pytest.mark.parametrize("ending", FEW, ids=lambda ending: ending.name)
def test_no_job_runs_beside_what_is_left_of_another(home, ending):
    check(home, ending)
