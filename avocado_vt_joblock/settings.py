"""The options and the config files; Avocado loads it at every start, so it imports very little.

Avocado loads the settings plugin while its own ``settings`` object is still being made, so that
object is looked up when it is used and cannot be imported by name.
"""

import contextlib
import os

from avocado.core import settings as avocado_settings
from avocado.core.plugin_interfaces import Init, Settings

from avocado_vt_joblock import SECTION

#: The administrator's config file.
ADMIN_FILE = "/etc/avocado/conf.d/vt_joblock.conf"

_DIR_HELP = """Directory in which a job with VT tests looks for the lock file of another job, and
creates its own. It must exist, and Avocado needs permission to write in it. Jobs that share guest
images must share it; users with data directories of their own set one each."""
_TIMEOUT_HELP = """For how many seconds a job with VT tests waits for the lock when another job
holds it. With 0 it fails at once, with -1 it waits for as long as it takes."""


class VTJobLockInit(Init):
    """Registers the options."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock initialization"
    # After avocado-vt's "vt-init": it registers one of them too, and where that is already there
    # it breaks off before it has loaded avocado-vt's own settings from the config files.
    priority = 0  # PluginPriority.LAST_RESORT

    def initialize(self) -> None:
        """Register the options, unless avocado-vt has."""
        # A string for the time, since Avocado would fail every command for one that is no number.
        for key, default, help_msg in (("dir", "/tmp", _DIR_HELP), ("timeout", "0", _TIMEOUT_HELP)):
            with contextlib.suppress(avocado_settings.DuplicatedNamespace):
                avocado_settings.settings.register_option(
                    SECTION, key, help_msg=help_msg, default=default
                )


class VTJobLockSettings(Settings):
    """Has Avocado read the config file that was installed with this package."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock config file"
    # After avocado-vt's, which puts files of its own first.
    priority = 0

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Put the installed config file first, so that every other one wins over it.

        Avocado finds it by itself in an activated virtual environment only, and reads it there
        after the main ``avocado.conf``. There it does not read the administrator's file: that
        comes second, so that jobs of one machine do not have different lock directories.

        :param paths: the config files that Avocado is going to read, in this order; changed here
        """
        files = [_installed_file()] if ADMIN_FILE in paths else [_installed_file(), ADMIN_FILE]
        files = [file for file in files if os.path.isfile(file)]
        named = filter(os.path.exists, (p for p in paths if p.endswith("/vt_joblock.conf")))
        same = [path for path in named if any(os.path.samefile(path, file) for file in files)]
        paths[:] = files + [path for path in paths if path not in same]


def _installed_file() -> str:
    """Where pip has put the config file: beside the package (``--target``) or in ``PREFIX/etc``."""
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    file = os.path.join(beside, ADMIN_FILE[1:])
    if beside.endswith(("/site-packages", "/dist-packages")) and not os.path.isfile(file):
        file = os.path.join(os.path.abspath(f"{beside}/../../.."), ADMIN_FILE[1:])
    return "" if file == ADMIN_FILE else file
