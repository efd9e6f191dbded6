"""Ctrl-C at any moment keeps no lock, and undoes nothing of another job."""

import re
import sys
from pathlib import Path

import pytest
from needs import needs_avocado_vt
from sandbox import ended

pytestmark = needs_avocado_vt


@pytest.mark.parametrize(
    "case", ["pre alone", "pre beside a holder", "post PASS", "post FAIL"]
)
def test_ctrl_c_at_every_line(sandbox, case):
    script = Path(__file__).with_name("interruptions.py")
    text = ended(sandbox.popen(sys.executable, script, sandbox.lock_dir, case))
    (lines,) = re.findall(r"^(\d+) lines$", text, re.MULTILINE)
    assert int(lines) > 40
