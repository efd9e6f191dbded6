"""Print the CPU time, in ms, that a start of Avocado spends on this package.

``start_up.py "import avocado"`` is what each import does, ``start_up.py command`` what
each command of Avocado does besides. In the time of the whole start, hundreds of ms and
never twice the same, it cannot be seen.
"""

import configparser
import sys
import time
from types import SimpleNamespace

import pkg_resources

times = []
load = pkg_resources.EntryPoint.load


def timed(call, *arguments):
    started = time.process_time()
    result = call(*arguments)
    times.append((time.process_time() - started) * 1e3)
    return result


def timed_load(point):
    is_ours = point.module_name.startswith("avocado_vt_joblock")
    return timed(load, point) if is_ours else load(point)


pkg_resources.EntryPoint.load = timed_load
from avocado.core.settings import settings  # noqa: E402

if sys.argv[1] == "command":
    from avocado.core.dispatcher import CLICmdDispatcher, CLIDispatcher
    from avocado.core.parser import Parser

    times.clear()
    parser = Parser()
    parser.args = SimpleNamespace(config=None)
    parser.application.parse_known_args = lambda: (parser.args, [])
    parser.start()
    for extension in [*CLICmdDispatcher(), *CLIDispatcher()]:
        if extension.name == "vt-joblock":
            timed(extension.obj.configure, parser)
else:
    from avocado_vt_joblock.settings import VTJobLockInit, VTJobLockSettings

    # The two entry points are loaded; once more what they, and Avocado with their file,
    # do.
    timed(VTJobLockSettings().adjust_settings_paths, [])
    timed(VTJobLockInit().initialize)
    ours = "/vt_joblock.conf"
    files = [path for path in settings.config_paths if path.endswith(ours)]
    timed(configparser.ConfigParser().read, files)
print(sum(times))
