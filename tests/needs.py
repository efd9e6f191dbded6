"""What some tests need of the machine; without it they are skipped, and pytest says why."""

import os
import subprocess
import sys

import pytest
from sandbox import AVOCADO, AVOCADO_READS_RECIPES, can_act_as_others

# Belongs to nobody.
SOME_USER = 54321
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _works(*command):
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


needs_avocado_vt = pytest.mark.skipif(
    AVOCADO < 105 and sys.version_info >= (3, 13),
    reason=f"avocado-vt {AVOCADO} imports pipes, which is gone from Python 3.13",
)
needs_recipes = pytest.mark.skipif(
    not AVOCADO_READS_RECIPES, reason=f"avocado run of Avocado {AVOCADO} reads no recipes"
)
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can do that")
needs_other_users = pytest.mark.skipif(
    not can_act_as_others(), reason="acting as other users is not permitted here"
)
needs_pid_namespaces = pytest.mark.skipif(
    not _works(*PID_NAMESPACE, "true"), reason="a PID namespace of one's own is not permitted here"
)
needs_mount_namespaces = pytest.mark.skipif(
    not _works("unshare", "--mount", "true"),
    reason="a mount namespace of one's own is not permitted here",
)
