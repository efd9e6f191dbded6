"""Measure the lock and the plugin beside others, and make a page of the manual of what comes out.

All contenders of a measurement take turns, in another order in each round, so that a machine that
is slow for a while is so for all of them.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import figures
from figures import AVOCADO, FLOOR, OURS, PLUGIN, SOFT, VT, Samples, Times

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

# How many rounds with so many other entries in the directory, and with so many stale locks.
ENTRIES = {0: 2000, 1_000: 1000, 100_000: 60}
STALE = {0: 400, 1: 400, 10: 200, 100: 60, 1_000: 20}
# How many rounds of "import avocado", "avocado plugins" and "avocado run".
IMPORTS, LISTS, JOBS = 150, 60, 30

JOB_ID = "0123456789abcdef0123456789abcdef01234567"
#: No process ever has this PID: the kernel gives none beyond 2**22.
DEAD_PID = 2**22 + 1

#: Prints three times in seconds, and whether the plugin is there.
IMPORT = """
import sys, time
started, used = time.perf_counter(), time.process_time()
import avocado
print(time.perf_counter() - started, time.process_time() - used)
there = "avocado_vt_joblock.settings" in sys.modules
import avocado.core.job
started = time.perf_counter()
if there:
    import avocado_vt_joblock.plugin
print(time.perf_counter() - started, there)
"""
#: Prints what of it is spent for this package by Avocado and pkg_resources, and by its own code.
IMPORT_PARTS = """
import configparser, time, warnings
warnings.simplefilter("ignore")
import pkg_resources
spent = {"theirs": 0.0, "own": 0.0}
inside = [0.0]
def split(owner, name, part, concerns):
    function = getattr(owner, name)
    def wrapper(*arguments, **options):
        if not concerns(*arguments):
            return function(*arguments, **options)
        inside.append(0.0)
        started = time.perf_counter()
        result = function(*arguments, **options)
        whole = time.perf_counter() - started
        spent[part] += whole - inside.pop()
        inside[-1] += whole
        if name == "resolve":
            for method in {"adjust_settings_paths", "initialize"} & set(vars(result)):
                split(result, method, "own", lambda *arguments: True)
        return result
    setattr(owner, name, wrapper)
package = "avocado-framework-plugin-vt-joblock"
split(pkg_resources.Distribution, "get_entry_map", "theirs", lambda d, *_: d.key == package)
split(pkg_resources.EntryPoint, "load", "theirs", lambda e: e.dist.key == package)
split(pkg_resources.EntryPoint, "resolve", "own", lambda e: e.dist.key == package)
split(configparser.ConfigParser, "read_file", "own", lambda c, f: "vt_joblock" in f.name)
import avocado
print(spent["theirs"] + spent["own"], *spent.values(), spent["own"] > 0)
"""

#: Takes a lock, and returns what releases it.
Acquire = Callable[[], Callable[[], object]]


def take_turns(title: str, contenders: dict[str, Callable[[], Times]], rounds: float) -> Samples:
    """Measure all contenders once a round, after a round that does not count."""
    rounds = max(3, round(rounds))
    samples: Samples = {name: [] for name in contenders}
    order = list(contenders)
    shown = 0.0
    gc.disable()
    for number in range(rounds + 1):
        if time.monotonic() > shown + 2 or number == rounds:
            shown = time.monotonic()
            print(f"{title}: round {number} of {rounds}", file=sys.stderr, flush=True)
        random.shuffle(order)
        for name in order:
            times = contenders[name]()
            if number:
                samples[name].append(times)
    gc.enable()
    return samples


def locks(directory: Path) -> dict[str, Acquire]:
    """The contenders, each for a lock in this directory."""
    import filelock
    from avocado.utils.filelock import FileLock
    from avocado_vt.plugins.vt_joblock import VTJobLock as VTPlugin
    from avocado_vt.test import VirtTest

    from avocado_vt_joblock.lock import JobLock
    from avocado_vt_joblock.plugin import OPTION, VT_KIND, VTJobLock

    job = SimpleNamespace(
        unique_id=JOB_ID,
        exitcode=0,
        config={OPTION: str(directory)},
        test_results_path="/results",
        test_suites=[SimpleNamespace(tests=[SimpleNamespace(kind=VT_KIND)])],
        # For avocado-vt's plugin, which knows VT tests by what Avocado made of them in the past.
        test_suite=SimpleNamespace(tests=[(VirtTest, {})]),
    )
    vt_plugin = VTPlugin()
    vt_plugin.lock_dir = str(directory)

    def ours() -> Callable[[], object]:
        lock = JobLock(str(directory), JOB_ID, lambda text: None)
        lock.acquire()
        return lock.release

    def plugin() -> Callable[[], object]:
        instance = VTJobLock()
        instance.pre(job)
        return lambda: instance.post(job)

    def vt() -> Callable[[], object]:
        vt_plugin.pre_tests(job)
        return lambda: vt_plugin.post_tests(job)

    def soft() -> Callable[[], object]:
        lock = filelock.SoftFileLock(f"{directory}/soft.lock")
        lock.acquire()
        return lock.release

    def avocado() -> Callable[[], object]:
        lock = FileLock(f"{directory}/avocado")
        lock.__enter__()
        return lock.__exit__

    def floor() -> Callable[[], object]:
        path = f"{directory}/avocado-vt-joblock-{JOB_ID}-0-abcdefgh.pid"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, b"%d" % os.getpid())
        os.close(fd)
        os.listdir(directory)  # noqa: PTH208 - nothing lists a directory faster
        return lambda: os.unlink(path)  # noqa: PTH108 - nor removes a file

    return {OURS: ours, PLUGIN: plugin, VT: vt, SOFT: soft, AVOCADO: avocado, FLOOR: floor}


def timed(acquire: Acquire) -> Times:
    started = time.perf_counter()
    release = acquire()
    release()
    return (time.perf_counter() - started,)


def measure_entries(directory: Path, scale: float) -> dict[int, Samples]:
    """Acquire plus release, beside more and more other entries."""
    contenders = locks(directory)
    for name, acquire in contenders.items():
        release = acquire()
        assert len(list(directory.iterdir())) == 1, f"{name} has made no lock file"
        release()
        assert not list(directory.iterdir()), f"{name} has left its lock file"
    results = {}
    there = 0
    for entries, rounds in ENTRIES.items():
        for number in range(there, entries):
            (directory / f"tmp{number:08}").touch()
        there = entries
        functions = {name: lambda a=acquire: timed(a) for name, acquire in contenders.items()}
        title = f"{directory.parent}, {entries:,} entries"
        results[entries] = take_turns(title, functions, rounds * scale)
    return results


def measure_stale(directory: Path, scale: float) -> dict[int, Samples]:
    """Acquire plus release, with stale locks to remove before."""
    contenders = locks(directory)

    def measure(name: str, stale: int) -> Times:
        for number in range(stale):
            file = directory / f"avocado-vt-joblock-{JOB_ID}-{os.getuid()}-{number:08}.pid"
            file.write_bytes(b"%d\n\n" % DEAD_PID)
        times = timed(contenders[name])
        assert not list(directory.iterdir()), f"{name} has left stale locks"
        return times

    results = {}
    for stale, rounds in STALE.items():
        functions = {name: lambda n=name, s=stale: measure(n, s) for name in (OURS, VT)}
        results[stale] = take_turns(f"{stale:,} stale locks", functions, rounds * scale)
    return results


def measure_avocado(directory: Path, scale: float) -> dict[str, Samples]:
    """What the plugin adds to Avocado, between environments that differ in nothing else."""
    from sandbox import Sandbox, finish

    make_environments(directory)
    users = {name: Sandbox(directory / f"user-{name}") for name in ("without", "with")}
    for name, user in users.items():
        user.python = str(directory / name / "bin/python")

    def imports(name: str, code: str = IMPORT) -> Times:
        *times, there = subprocess.run(
            [users[name].python, "-c", code],
            env=users[name].environment,
            cwd=users[name].root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
        assert there == str(name == "with"), f"not the environment {name}"
        return tuple(map(float, times))

    def command(start: Callable[[], subprocess.Popen[str]]) -> Times:
        used, started = cpu_time_of_children(), time.perf_counter()
        code, text = finish(start())
        assert code == 0, text
        return time.perf_counter() - started, cpu_time_of_children() - used

    def lists(name: str) -> Times:
        return command(lambda: users[name].avocado("plugins"))

    def job(name: str) -> Times:
        test = users[name].vt_test("test")
        test.end()
        return command(lambda: users[name].run(test))

    results = {}
    for title, measure, rounds in (
        ("import avocado", imports, IMPORTS),
        ("avocado plugins", lists, LISTS),
        ("avocado run", job, JOBS),
    ):
        functions = {name: lambda f=measure, n=name: f(n) for name in users}
        if measure is imports:
            functions["parts"] = lambda: imports("with", IMPORT_PARTS)
        results[title] = take_turns(title, functions, rounds * scale)
    for user in users.values():
        user.close()
    return results


def make_environments(directory: Path) -> None:
    """Make one without this package and one with it."""
    print("making environments", file=sys.stderr, flush=True)
    without, with_it = directory / "without", directory / "with"
    # A copy, since setuptools builds where the sources are.
    source = directory / "source"
    others = shutil.ignore_patterns(".*", "benchmarks", "build", "dist", "docs", "tests")
    shutil.copytree(ROOT, source, ignore=others)
    subprocess.run([sys.executable, "-m", "venv", without], check=True)
    pip = ["bin/python", "-m", "pip", "--quiet", "install", "--no-deps"]
    subprocess.run([without / pip[0], *pip[1:], "-r", ROOT / "tests/avocado-113.txt"], check=True)
    shutil.copytree(without, with_it, symlinks=True)
    subprocess.run([with_it / pip[0], *pip[1:], "--no-build-isolation", source], check=True)


def cpu_time_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--directory",
        type=Path,
        action="append",
        help="where to make lock directories, more than once for more of them "
        f"(default: {' and '.join(map(str, places))})",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs", help="where to put figures.{rst,svg}"
    )
    parser.add_argument("--scale", type=float, default=1, help="a factor for the rounds")
    arguments = parser.parse_args()
    places = [place.resolve() for place in arguments.directory or places if place.is_dir()]
    # Without it avocado-vt tells what programs are not installed.
    logging.getLogger().addHandler(logging.NullHandler())
    entries = {}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="vt-joblock-bench-") as temporary:
        # Avocado, avocado-vt and matplotlib keep files in the home.
        os.environ["HOME"] = temporary
        for place in places:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                entries[place] = measure_entries(Path(directory), arguments.scale)
        with tempfile.TemporaryDirectory(dir=places[0]) as directory:
            stale = measure_stale(Path(directory), arguments.scale)
        avocado = measure_avocado(Path(temporary), arguments.scale)
        load.append(os.getloadavg()[0])
        results = figures.Results(entries, stale, avocado, load)
        (arguments.output / "figures.rst").write_text(page := figures.page(results))
        figures.draw(results, arguments.output / "figures.svg")
    print(page, figures.goals(results), sep="\n")


if __name__ == "__main__":
    main()
