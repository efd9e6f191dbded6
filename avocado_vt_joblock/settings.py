"""The option and the config file: what Avocado loads at every start, so it imports next to nothing.

Avocado loads the settings plugin while its own ``settings`` object is still being made, so that
object is looked up when it is used and cannot be imported by name.
"""

import contextlib
import os

from avocado.core import settings as avocado_settings
from avocado.core.extension_manager import PluginPriority
from avocado.core.plugin_interfaces import Init, Settings

SECTION = "plugins.vtjoblock"
KEY = "dir"
OPTION = f"{SECTION}.{KEY}"
DEFAULT_DIRECTORY = "/tmp"

_CONFIG_FILE = os.path.join("etc", "avocado", "conf.d", "vt_joblock.conf")
_HELP = (
    "Directory in which a job with VT tests looks for the lock file of another job, and creates "
    "its own. It must exist, and Avocado needs permission to write in it. Jobs that share a lock "
    "directory never run VT tests at the same time; users with data directories of their own set "
    "a lock directory each."
)


class VTJobLockInit(Init):
    """Registers the option ``plugins.vtjoblock.dir``."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock initialization"
    # After avocado-vt's "vt-init": it registers the same option, and where that is already there
    # it breaks off before it has loaded avocado-vt's own settings from the config files.
    priority = PluginPriority.LAST_RESORT

    def initialize(self) -> None:
        """Register the option, unless avocado-vt has."""
        with contextlib.suppress(avocado_settings.DuplicatedNamespace):
            avocado_settings.settings.register_option(
                SECTION, KEY, help_msg=_HELP, default=DEFAULT_DIRECTORY
            )


class VTJobLockSettings(Settings):
    """Has Avocado read the config file that was installed with this package."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock config file"
    # After avocado-vt's, which puts files of its own first.
    priority = PluginPriority.LAST_RESORT

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Put the installed config file first, so that every other config file wins over it.

        Avocado finds it by itself in ``/etc`` and in an activated virtual environment only, and
        reads it there after, and so instead of, the main ``avocado.conf``.

        :param paths: the config files that Avocado is going to read, in this order; changed in
                      place
        """
        installed = _installed_config_file()
        if installed:
            paths[:] = [installed] + [path for path in paths if not _same_file(path, installed)]


def _installed_config_file() -> str:
    """Find the config file from where this module lies; return nothing where it is not installed.

    pip puts it in ``PREFIX/etc`` for a package in ``PREFIX/lib/pythonX.Y/site-packages``, and
    beside the package for ``pip install --target``.
    """
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for _ in range(4):
        candidate = os.path.join(parent, _CONFIG_FILE)
        if os.path.isfile(candidate):
            return candidate
        parent = os.path.dirname(parent)
    return ""


def _same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
