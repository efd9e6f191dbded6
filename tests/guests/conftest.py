import shutil
import tempfile
from pathlib import Path

import pytest
from home import PACKAGES, PATH, TOOLS, GuestHome
from sandbox import AVOCADO, AVOCADO_READS_RECIPES


@pytest.fixture
def home():
    """A home for real guests; a new one is bootstrapped in two seconds."""
    if not AVOCADO_READS_RECIPES:
        pytest.skip(f"Avocado {AVOCADO} reads no recipes")
    if missing := [tool for tool in TOOLS.split() if not shutil.which(tool, path=PATH)]:
        pytest.skip(f"guests need {', '.join(missing)}; on Debian: apt-get install {PACKAGES}")
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-") as directory:
        new = GuestHome(Path(directory) / "home")
        yield new
        new.close()
