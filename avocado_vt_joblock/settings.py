"""The options and the config file; Avocado loads it at every start, so it imports very little.

Avocado loads the settings plugin while its own ``settings`` object is still being made, so that
object is looked up when it is used and cannot be imported by name.
"""

import contextlib
import os

from avocado.core import settings as avocado_settings
from avocado.core.plugin_interfaces import Init, Settings

from avocado_vt_joblock import SECTION

_DIR_HELP = (
    "Directory in which a job with VT tests looks for the lock file of another job, and creates "
    "its own. It must exist, and Avocado needs permission to write in it. Jobs that share a lock "
    "directory never run VT tests at the same time; users with data directories of their own set "
    "a lock directory each."
)
_TIMEOUT_HELP = (
    "For how many seconds a job with VT tests waits for the lock when another job holds it. With 0 "
    "it fails at once, with -1 it waits for as long as it takes."
)
_CONFIG_FILE = os.path.join("etc", "avocado", "conf.d", "vt_joblock.conf")
# PluginPriority.LAST_RESORT.
_LAST = 0


class VTJobLockInit(Init):
    """Registers the options."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock initialization"
    # After avocado-vt's "vt-init": it registers one of them too, and where that is already there
    # it breaks off before it has loaded avocado-vt's own settings from the config files.
    priority = _LAST

    def initialize(self) -> None:
        """Register the options, unless avocado-vt has."""
        _register("dir", _DIR_HELP, "/tmp")
        # A string, since Avocado would fail every command because of a value that is no number.
        _register("timeout", _TIMEOUT_HELP, "0")


class VTJobLockSettings(Settings):
    """Has Avocado read the config file that was installed with this package."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock config file"
    # After avocado-vt's, which puts files of its own first.
    priority = _LAST

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Put the installed config file first, so that every other config file wins over it.

        Avocado finds it by itself in an activated virtual environment only, and reads it there
        after, and so instead of, the main ``avocado.conf``.

        :param paths: the config files that Avocado is going to read, in this order; changed in
                      place
        """
        installed = _installed_config_file()
        if installed:
            paths[:] = [installed] + [path for path in paths if not _same_file(path, installed)]


def _register(key: str, help_msg: str, default: str) -> None:
    with contextlib.suppress(avocado_settings.DuplicatedNamespace):
        avocado_settings.settings.register_option(SECTION, key, help_msg=help_msg, default=default)


def _installed_config_file() -> str:
    """Find the config file that was installed with this package; return nothing where none was.

    pip puts it beside the package for ``pip install --target``, and else in ``PREFIX/etc`` for a
    package in ``PREFIX/lib/pythonX.Y/site-packages``. One in ``/etc`` is the administrator's.
    """
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    prefixes = [beside]
    above, packages = os.path.split(beside)
    if packages in ("site-packages", "dist-packages"):
        prefixes.append(os.path.dirname(os.path.dirname(above)))
    for prefix in prefixes:
        candidate = os.path.join(prefix, _CONFIG_FILE)
        if prefix != os.sep and os.path.isfile(candidate):
            return candidate
    return ""


def _same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
