"""What is released: the distributions, the RPM, and what installing and removing them leaves."""

import re
import shutil
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from environments import PROJECT, copy_sources, new_environment, run
from needs import SOME_USER, needs_root
from sandbox import can_act_as_others, finish

DISTRIBUTION = "avocado-framework-plugin-vt-joblock"
MODULES = sorted((PROJECT / "avocado_vt_joblock").glob("*.py"))
#: Imports a module first, and then has Avocado load the plugins of jobs.
IMPORT_FIRST = """import avocado_vt_joblock.{}
from avocado.core.dispatcher import JobPrePostDispatcher
print(sorted({{extension.name for extension in JobPrePostDispatcher().extensions}}))
from avocado.core.settings import settings
print(settings.as_dict()["plugins.vtjoblock.timeout"])"""
SITE = f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
#: The file of avocado-vt's package; that of ours lies in /usr.
OF_AVOCADO_VT = "/etc/avocado/conf.d/vt_joblock.conf"
STAND_IN = f"""Name: python3-avocado-plugins-vt
Version: 113.0
Release: 1
Summary: .
License: .
BuildArch: noarch
%description
%install
mkdir -p %{{buildroot}}/etc/avocado/conf.d
echo '[plugins.vtjoblock]' > %{{buildroot}}{OF_AVOCADO_VT}
%files
%config(noreplace) {OF_AVOCADO_VT}
"""
#: Loads all that Avocado loads, and prints where it comes from and which config files it adds.
LOAD = f"""import importlib.metadata, inspect, sys
sys.path.insert(0, sys.argv[1])
entry_points = importlib.metadata.distribution({DISTRIBUTION!r}).entry_points
loaded = {{point.group: point.load() for point in entry_points}}
paths = []
loaded["avocado.plugins.settings"]().adjust_settings_paths(paths)
print(*map(inspect.getfile, loaded.values()), *paths, sep="\\n")"""


def test_neither_the_build_nor_twine_warns(built):
    assert not re.search(r"warning\b|\bwarn:|deprecated\b", built.printed, re.IGNORECASE)
    run(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist)


def test_wheel_has_the_package_and_the_config_file_and_no_more(built):
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    more = {"avocado_vt_joblock/py.typed", "data/etc/avocado/conf.d/vt_joblock.conf"}
    modules = {f"avocado_vt_joblock/{path.name}" for path in MODULES}
    names = "\n".join(zipfile.ZipFile(built.wheel).namelist())
    names = re.sub(r"^avocado_framework_plugin_vt_joblock-[^/]*/", "", names, flags=re.MULTILINE)
    assert set(names.splitlines()) == about | more | modules


def test_source_distribution_builds_the_same_wheel(built, tmp_path):
    run("tar", "-xf", built.sdist, "-C", tmp_path)
    (source,) = tmp_path.iterdir()
    # Who packages it for a distribution can build the manual and run the tests.
    for name in ("CHANGELOG.rst", "Makefile", "docs/index.rst", "tests/sandbox.py", "tests/lock"):
        assert (source / name).exists()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source)
    ours, theirs = zipfile.ZipFile(built.wheel), zipfile.ZipFile(tmp_path / built.wheel.name)
    assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_metadata():
    found = metadata.distribution(DISTRIBUTION)
    fields = found.metadata
    assert fields["License-Expression"] == "GPL-2.0-or-later"
    assert (fields["Requires-Python"], found.requires) == (">=3.9", ["avocado-framework>=103.0"])
    pythons = {f"Programming Language :: Python :: 3.{number}" for number in range(9, 14)}
    assert pythons <= set(fields.get_all("Classifier"))
    assert fields.get_payload().strip() == (PROJECT / "README.rst").read_text().strip()
    changes = (PROJECT / "CHANGELOG.rst").read_text()
    versions = re.findall(r"^(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert versions[0] == found.version


def test_entry_points():
    points = metadata.distribution(DISTRIBUTION).entry_points
    assert {f"{each.group} {each.name} {each.value}" for each in points} == {
        "avocado.plugins.settings vt-joblock avocado_vt_joblock.settings:VTJobLockSettings",
        "avocado.plugins.init vt-joblock avocado_vt_joblock.settings:VTJobLockInit",
        "avocado.plugins.job.prepost vt-joblock avocado_vt_joblock.plugin:VTJobLock",
        "avocado.plugins.job.prepost vt-joblock-release avocado_vt_joblock.plugin:VTJobUnlock",
    }


# But settings, which only Avocado loads.
@pytest.mark.parametrize("module", sorted({path.stem for path in MODULES} - {"settings"}))
def test_each_module_can_be_imported_first(sandbox, module):
    _, text = finish(sandbox.popen(sys.executable, "-c", IMPORT_FIRST.format(module), stderr=None))
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


@pytest.fixture(scope="module")
def package(built, tmp_path_factory):
    """What ``make rpm`` builds of the source distribution, with nothing from elsewhere."""
    if not shutil.which("rpmbuild"):
        pytest.skip("no rpmbuild here; on Debian: apt-get install rpm python3-packaging")
    directory = tmp_path_factory.mktemp("rpm")
    run("tar", "-xf", built.sdist, "-C", directory, "--strip-components=1")
    # This environment serves as it is.
    run("make", "-C", directory, "-o", f"{sys.prefix}/made", f"VENV={sys.prefix}", "rpm")
    (path,) = directory.glob("rpmbuild/RPMS/noarch/*.rpm")
    return path


def test_rpm_installs_and_requires(package, built):
    lines = run("rpm", "-qp", "--queryformat", "[%{FILENAMES} %{FILEFLAGS:fflags}\n]", package)
    flags = dict(line.split(" ", 1) for line in lines.splitlines())
    names = zipfile.ZipFile(built.wheel).namelist()
    modules = {f"{SITE}/{name}" for name in names if name.startswith("avocado_vt_joblock/")}
    assert modules <= flags.keys()
    assert any(name.endswith(".dist-info/entry_points.txt") for name in flags)
    # Configuration that stays as the administrator has changed it, documentation, and the licence.
    assert flags.pop(f"/usr{OF_AVOCADO_VT}") == "cn"
    told = {Path(name).name: flag for name, flag in flags.items() if flag}
    assert told == {"README.rst": "d", "CHANGELOG.rst": "d", "LICENSE": "l"}
    assert not any(name.startswith("/etc") for name in flags)
    assert "python3dist(avocado-framework) >= 103\n" in run("rpm", "-qp", "--requires", package)


@needs_root
def test_rpm_installed_beside_avocado_vt_and_removed_again(package, tmp_path):
    spec = tmp_path / "stand-in.spec"
    spec.write_text(STAND_IN)
    run("rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/rpmbuild", spec)
    (stand_in,) = tmp_path.glob("rpmbuild/RPMS/noarch/*.rpm")
    root = tmp_path / "root"
    for directory in (SITE, "/usr/share/doc", "/usr/share/licenses"):  # as on every system
        (root / directory[1:]).mkdir(parents=True)

    def rpm(*words):
        run("rpm", "--root", root, "--dbpath", "/database", "--nodeps", *words)

    def contents():
        return {path for path in root.rglob("*") if root / "database" not in path.parents}

    rpm("--install", stand_in)
    before = contents()
    rpm("--install", package)
    assert (root / OF_AVOCADO_VT[1:]).read_text() == "[plugins.vtjoblock]\n"
    files = run(sys.executable, "-I", "-c", LOAD, f"{root}{SITE}").splitlines()
    assert all(file.startswith(f"{root}{SITE}/avocado_vt_joblock/") for file in files[:3])
    assert f"{root}/usr{OF_AVOCADO_VT}" in files[3:]
    rpm("--erase", DISTRIBUTION)
    assert contents() == before
