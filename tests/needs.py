"""What some tests need of the machine.

Without it they are skipped, and pytest says why.
"""

# A test that becomes another user could not load it any more from root's home.
import encodings.ascii  # noqa: F401
import os
import subprocess
import sys

import pytest
from sandbox import AVOCADO, AVOCADO_READS_RECIPES, can_act_as_others

SOME_USER = 54321  # belongs to nobody
LONELY_USER = 100_000 + os.getpid()  # has no process but those of one test
HAS_PIPES = sys.version_info < (3, 13)
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _works(*command):
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _needs(true, reason):
    return pytest.mark.skipif(not true, reason=reason)


needs_avocado_vt = _needs(
    HAS_PIPES or AVOCADO >= 105, f"avocado-vt {AVOCADO} imports pipes"
)
needs_recipes = _needs(
    AVOCADO_READS_RECIPES, f"avocado run of Avocado {AVOCADO} reads no recipes"
)
needs_root = _needs(os.getuid() == 0, "only root can do that")
needs_other_users = _needs(
    can_act_as_others(), "acting as other users is not permitted here"
)
needs_pid_namespaces = _needs(
    _works(*PID_NAMESPACE, "true"), "PID namespaces are not permitted"
)
needs_mount_namespaces = _needs(
    _works("unshare", "--mount", "true"), "no mount namespaces here"
)
needs_user_namespaces = _needs(
    _works("unshare", "--user", "true"), "no user namespaces here"
)
