"""Print the CPU time, in ms, that an import of Avocado spends on this package.

In the time of the whole import, hundreds of ms and never twice the same, it cannot be seen.
"""

import configparser
import time

import pkg_resources

times = []
load = pkg_resources.EntryPoint.load


def timed(call, *arguments):
    started = time.process_time()
    result = call(*arguments)
    times.append((time.process_time() - started) * 1e3)
    return result


pkg_resources.EntryPoint.load = lambda point: (
    timed(load, point) if point.module_name.startswith("avocado_vt_joblock") else load(point)
)
from avocado.core.settings import settings  # noqa: E402

from avocado_vt_joblock.settings import VTJobLockInit, VTJobLockSettings  # noqa: E402

# The two entry points are loaded; once more what they, and Avocado with their file, do.
timed(VTJobLockSettings().adjust_settings_paths, [])
timed(VTJobLockInit().initialize)
files = [path for path in settings.config_paths if path.endswith("/vt_joblock.conf")]
timed(configparser.ConfigParser().read, files)
print(sum(times))
