"""What is released: the distributions and what an installation of them makes."""

import json
import re
import sys
import zipfile

import pytest
from environments import PROJECT, copy_sources, new_environment, run
from needs import SOME_USER
from sandbox import can_act_as_others, finish

DISTRIBUTION = "avocado-framework-plugin-vt-joblock"
#: The modules but settings, which only Avocado loads.
MODULES = {path.stem for path in (PROJECT / "avocado_vt_joblock").glob("*.py")} - {"settings"}
#: Prints what the environment knows of this package.
READ = f"""import importlib.metadata, json
distribution = importlib.metadata.distribution({DISTRIBUTION!r})
points = [(point.group, point.name, point.value) for point in distribution.entry_points]
print(json.dumps([distribution.read_text('METADATA'), points]))"""
#: Imports a module first, and then has Avocado load the plugins of jobs.
IMPORT_FIRST = """import avocado_vt_joblock.{}
from avocado.core.dispatcher import JobPrePostDispatcher
print(sorted({{extension.name for extension in JobPrePostDispatcher().extensions}}))
from avocado.core.settings import settings
print(settings.as_dict()["plugins.vtjoblock.timeout"])"""


@pytest.fixture(scope="module")
def known(installed):
    return json.loads(run(installed, "-I", "-c", READ))


def test_builds_without_warnings(built):
    _, text = built
    assert not re.search(r"warning\b|\bwarn:|deprecated\b", text, re.IGNORECASE), text


def test_twine_finds_nothing(built):
    distributions, _ = built
    text = run(sys.executable, "-m", "twine", "check", "--strict", *distributions)
    assert text.count("PASSED") == 2


def test_wheel_has_the_package_and_the_config_file_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {re.sub(r"^avocado_framework_plugin_vt_joblock-[^/]*/", "", n) for n in names} == {
        "avocado_vt_joblock/__init__.py",
        "avocado_vt_joblock/lock.py",
        "avocado_vt_joblock/lockfile.py",
        "avocado_vt_joblock/messages.py",
        "avocado_vt_joblock/plugin.py",
        "avocado_vt_joblock/processes.py",
        "avocado_vt_joblock/settings.py",
        "avocado_vt_joblock/py.typed",
        "data/etc/avocado/conf.d/vt_joblock.conf",
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


def test_source_distribution_builds_the_same_wheel(built, wheel, tmp_path):
    (sdist,) = (path for path in built[0] if path.suffix == ".gz")
    run("tar", "-xf", sdist, "-C", tmp_path)
    (source,) = tmp_path.iterdir()
    # Who packages it for a distribution can build the manual and run the tests.
    for name in ("CHANGELOG.rst", "Makefile", "docs/index.rst", "tests/sandbox.py", "tests/lock"):
        assert (source / name).exists()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tmp_path / wheel.name) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_metadata(known):
    head, _, description = known[0].partition("\n\n")
    fields = re.findall(r"^([A-Z]\S*): (.*)$", head, re.MULTILINE)
    assert {
        ("Name", DISTRIBUTION),
        ("License-Expression", "GPL-2.0-or-later"),
        ("License-File", "LICENSE"),
        ("Requires-Python", ">=3.9"),
        ("Description-Content-Type", "text/x-rst"),
        *(("Classifier", f"Programming Language :: Python :: 3.{n}") for n in range(9, 14)),
    } <= set(fields)
    required = [value for name, value in fields if name == "Requires-Dist"]
    assert required == ["avocado-framework>=103.0"]
    assert description.strip() == (PROJECT / "README.rst").read_text().strip()
    changes = (PROJECT / "CHANGELOG.rst").read_text()
    versions = re.findall(r"^(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert versions[0] == dict(fields)["Version"]


def test_entry_points(known):
    module = "avocado_vt_joblock"
    assert sorted(known[1]) == [
        ["avocado.plugins.init", "vt-joblock", f"{module}.settings:VTJobLockInit"],
        ["avocado.plugins.job.prepost", "vt-joblock", f"{module}.plugin:VTJobLock"],
        ["avocado.plugins.job.prepost", "vt-joblock-release", f"{module}.plugin:VTJobUnlock"],
        ["avocado.plugins.settings", "vt-joblock", f"{module}.settings:VTJobLockSettings"],
    ]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_module_can_be_imported_first(sandbox, module):
    script = IMPORT_FIRST.format(module)
    _, text = finish(sandbox.popen(sys.executable, "-c", script, stderr=None))
    plugins, timeout = text.splitlines()
    assert "'vt-joblock', 'vt-joblock-release'" in plugins
    assert timeout == "0"


@pytest.mark.parametrize("options", [["."], ["-e", "."]], ids=" ".join)
def test_user_installs_and_removes_it(sandbox, avocado_packages, options):
    """In a checkout of their own, as the README says; nothing is left but empty directories."""
    checkout, prefix = sandbox.root / "checkout", sandbox.root / "environment"
    copy_sources(checkout)
    python = sandbox.python = new_environment(prefix, avocado_packages)
    if can_act_as_others():
        sandbox.belong_to(SOME_USER)

    def pip(*words):
        command = [sys.executable, "-m", "pip", "--python", python, *words]
        code, text = finish(sandbox.popen(*command, cwd=checkout))
        assert code == 0, text

    def files():
        return {path for path in prefix.rglob("*") if path.suffix != ".pyc" and path.is_file()}

    before = files()
    # Without an environment of its own for the build: that is pip's, and takes time.
    pip("install", "--no-deps", "--no-build-isolation", *options)
    assert re.search("^ *vt-joblock .*Lock/Unlock$", sandbox.output("plugins"), re.MULTILINE)
    place = prefix if options == ["."] else checkout
    assert f"* {place}/etc/avocado/conf.d/vt_joblock.conf\n" in sandbox.output("config")
    pip("uninstall", "--yes", DISTRIBUTION)
    assert files() == before
    assert "vt-joblock " not in sandbox.output("plugins")


def test_nothing_is_killed():
    """What is not written cannot go wrong: the only signal is 0, which asks for a process."""
    kills = [
        line.strip()
        for path in (PROJECT / "avocado_vt_joblock").glob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bkillpg\b|os\.kill\(|pidfd_send_signal|send_signal|terminate\(", line)
    ]
    assert kills == ["os.kill(pid, 0)"]
