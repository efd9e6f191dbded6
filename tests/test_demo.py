import sys

import pytest
from sandbox import AVOCADO, HERE, finish


@pytest.mark.skipif(AVOCADO < 105, reason="the demo is for the newest Avocado")
def test_demo(sandbox):
    code, text = finish(sandbox.popen(sys.executable, HERE / "demo.py"))
    assert code == 0, text
    assert "NO:" not in text
