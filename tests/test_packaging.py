"""What is released: the distributions and what an installation of them makes."""

import re
import sys
import zipfile
from importlib import metadata

import pytest
from environments import PROJECT, copy_sources, new_environment, run
from needs import SOME_USER
from sandbox import can_act_as_others, finish

DISTRIBUTION = "avocado-framework-plugin-vt-joblock"
MODULES = sorted((PROJECT / "avocado_vt_joblock").glob("*.py"))
#: Imports a module first, and then has Avocado load the plugins of jobs.
IMPORT_FIRST = """import avocado_vt_joblock.{}
from avocado.core.dispatcher import JobPrePostDispatcher
print(sorted({{extension.name for extension in JobPrePostDispatcher().extensions}}))
from avocado.core.settings import settings
print(settings.as_dict()["plugins.vtjoblock.timeout"])"""
LOAD_ALL = f"""from importlib.metadata import distribution
for point in distribution({DISTRIBUTION!r}).entry_points:
    print(point.group, point.name, point.load().__name__)"""


def test_neither_the_build_nor_twine_warns(built):
    assert not re.search(r"warning\b|\bwarn:|deprecated\b", built.printed, re.IGNORECASE)
    text = run(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist)
    assert text.count("PASSED") == 2


def test_wheel_has_the_package_and_the_config_file_and_no_more(wheel):
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    more = {"avocado_vt_joblock/py.typed", "data/etc/avocado/conf.d/vt_joblock.conf"}
    modules = {f"avocado_vt_joblock/{path.name}" for path in MODULES}
    names = "\n".join(zipfile.ZipFile(wheel).namelist())
    names = re.sub(r"^avocado_framework_plugin_vt_joblock-[^/]*/", "", names, flags=re.MULTILINE)
    assert set(names.splitlines()) == about | more | modules


def test_source_distribution_builds_the_same_wheel(built, wheel, tmp_path):
    run("tar", "-xf", built.sdist, "-C", tmp_path)
    (source,) = tmp_path.iterdir()
    # Who packages it for a distribution can build the manual and run the tests.
    for name in ("CHANGELOG.rst", "Makefile", "docs/index.rst", "tests/sandbox.py", "tests/lock"):
        assert (source / name).exists()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source)
    ours, theirs = zipfile.ZipFile(wheel), zipfile.ZipFile(tmp_path / wheel.name)
    assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_metadata(installed):
    (site,) = installed.parent.parent.glob("lib/python*/site-packages")
    (found,) = metadata.distributions(name=DISTRIBUTION, path=[str(site)])
    fields = found.metadata
    assert fields["License-Expression"] == "GPL-2.0-or-later"
    assert fields["Requires-Python"] == ">=3.9"
    assert found.requires == ["avocado-framework>=103.0"]
    pythons = {f"Programming Language :: Python :: 3.{number}" for number in range(9, 14)}
    assert pythons <= set(fields.get_all("Classifier"))
    assert fields.get_payload().strip() == (PROJECT / "README.rst").read_text().strip()
    changes = (PROJECT / "CHANGELOG.rst").read_text()
    versions = re.findall(r"^(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert versions[0] == found.version


def test_entry_points(installed):
    printed = run(installed, "-c", LOAD_ALL)
    assert sorted(printed.splitlines()) == [
        "avocado.plugins.init vt-joblock VTJobLockInit",
        "avocado.plugins.job.prepost vt-joblock VTJobLock",
        "avocado.plugins.job.prepost vt-joblock-release VTJobUnlock",
        "avocado.plugins.settings vt-joblock VTJobLockSettings",
    ]


# But settings, which only Avocado loads.
@pytest.mark.parametrize("module", sorted({path.stem for path in MODULES} - {"settings"}))
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
    text = "\n".join(path.read_text() for path in MODULES)
    kills = re.findall(r".*(?:\bkillpg\b|os\.kill\(|send_signal|terminate\().*", text)
    assert [line.strip() for line in kills] == ["os.kill(pid, 0)"]
