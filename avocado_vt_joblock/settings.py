"""The options: registered, and found in config files.

Avocado loads this module at every start, so it imports very little. At that moment
Avocado's object ``settings`` does not exist yet. So this module imports the module that
will have it, and takes the object from there when it is needed.
"""

from __future__ import annotations

import contextlib
import os

from avocado.core import settings as avocado_settings
from avocado.core.plugin_interfaces import Init, Settings

from avocado_vt_joblock import SECTION, installed_file

#: The administrator's config file. avocado-vt's RPM puts one there, too.
ADMIN_FILE = "/etc/avocado/conf.d/vt_joblock.conf"
#: Where this package's RPM puts its own config file.
PACKAGED_FILE = "/etc/avocado/conf.d/vt_joblock_defaults.conf"
#: Where the wheel puts the same, below the prefix of Python.
INSTALLED_FILE = "etc/avocado/conf.d/vt_joblock.conf"

_DIR_HELP = """Directory in which a job with VT tests looks for the lock file of another
job, and creates its own. It must exist, and Avocado needs permission to write in it.
Jobs that share guest images must share it; users with data directories of their own set
one each."""
_TIMEOUT_HELP = """How long a job with VT tests waits for the lock when another job
holds it: seconds, or a number with s, m, h or d. With 0 it fails at once, with -1 it
waits for as long as it takes."""


class VTJobLockInit(Init):
    """Registers the options."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock initialization"
    # After avocado-vt's plugin "vt-init", which registers one of these options, too. If
    # vt-init came second it would fail, and not load avocado-vt's own config files.
    priority = 0  # PluginPriority.LAST_RESORT

    def initialize(self) -> None:
        """Register the options, unless avocado-vt has."""
        _register("dir", "/tmp", _DIR_HELP)
        # A string: with a number as default, each command of Avocado would fail where a
        # config file has something else.
        _register("timeout", "0", _TIMEOUT_HELP)


class VTJobLockSettings(Settings):
    """Makes Avocado read the config file of this package, wherever that is."""

    name = "vt-joblock"
    description = "Avocado-VT Job Lock/Unlock config file"
    # After avocado-vt's, which puts files of its own first.
    priority = 0

    def adjust_settings_paths(self, paths: list[str]) -> None:
        """Put the files of this package first, so that every other file wins over them.

        Avocado itself finds the installed file only in an activated virtual
        environment, and puts the files of conf.d in no certain order. But in an
        activated environment it does not read the administrator's file. This method
        then adds that file, so that all jobs of a machine use one lock directory. The
        order becomes:

        1. PREFIX/etc/avocado/conf.d/vt_joblock.conf, of pip;
        2. /etc/avocado/conf.d/vt_joblock_defaults.conf, of the RPM;
        3. /etc/avocado/conf.d/vt_joblock.conf, in an activated environment;
        4. all others as Avocado has them. If no environment is activated the
           administrator's file is among them.

        :param paths: the config files that Avocado will read, in order; changed here
        """
        first = []
        installed = installed_file(INSTALLED_FILE)
        # If the prefix is / this is the administrator's file.
        if installed and installed != ADMIN_FILE:
            first.append(installed)
        if os.path.isfile(PACKAGED_FILE):
            first.append(PACKAGED_FILE)
        if ADMIN_FILE not in paths and os.path.isfile(ADMIN_FILE):
            first.append(ADMIN_FILE)
        others = [path for path in paths if not _is_one_of(path, first)]
        paths[:] = first + others


def _register(key: str, default: str, help_msg: str) -> None:
    with contextlib.suppress(avocado_settings.DuplicatedNamespace):
        avocado_settings.settings.register_option(
            SECTION, key, help_msg=help_msg, default=default
        )


def _is_one_of(path: str, files: list[str]) -> bool:
    """Tell whether a config file is one of some files, maybe by another path.

    An environment may be activated by a symbolic link to it.
    """
    # One with a name of its own stays in its place, even if it links to one of these.
    if os.path.basename(path) not in ("vt_joblock.conf", "vt_joblock_defaults.conf"):
        return False
    if not os.path.exists(path):
        return False
    return any(os.path.samefile(path, file) for file in files)
