"""What some tests need of the machine; without it they are skipped, and pytest says why."""

import os
import subprocess

import pytest
from sandbox import can_act_as_others

# Belongs to nobody.
SOME_USER = 54321
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _works(*command):
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


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
