"""What is released: the distributions, the RPM, and what installing and removing them
leaves."""

import re
import shutil
import subprocess
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
#: Where the manual is, below the prefix of Python.
MANUAL = f"share/doc/{DISTRIBUTION}"
PAGES = {f"{page.stem}.rst" for page in (PROJECT / "docs").glob("*.rst")}
PAGES |= {"README.rst", "CHANGELOG.rst", "lock-life.svg"}
#: Imports a module first, and then has Avocado load the plugins of jobs.
IMPORT_FIRST = """import avocado_vt_joblock.{}
from avocado.core.dispatcher import JobPrePostDispatcher
print(sorted({{extension.name for extension in JobPrePostDispatcher().extensions}}))
from avocado.core.settings import settings
print(settings.as_dict()["plugins.vtjoblock.timeout"])"""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"/usr/lib/python{VERSION}/site-packages"
#: The config file of avocado-vt's package, which is the administrator's, and that of
#: ours.
OF_AVOCADO_VT = "/etc/avocado/conf.d/vt_joblock.conf"
OF_OURS = "/etc/avocado/conf.d/vt_joblock_defaults.conf"
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
#: Loads what Avocado loads of a package that is not installed here. It prints where
#: that comes from, which config files it adds, and the path of a page of the manual.
LOAD = f"""import importlib.metadata, inspect, sys
root = sys.argv[1]
sys.path.insert(0, sys.argv[2])
entry_points = importlib.metadata.distribution({DISTRIBUTION!r}).entry_points
loaded = {{point.group: point.load() for point in entry_points}}
from avocado_vt_joblock import installed_file, settings
for name in ("ADMIN_FILE", "PACKAGED_FILE"):
    setattr(settings, name, root + getattr(settings, name))
# In the order in which os.listdir() may have them.
paths = [settings.ADMIN_FILE, settings.PACKAGED_FILE]
loaded["avocado.plugins.settings"]().adjust_settings_paths(paths)
for line in [*map(inspect.getfile, loaded.values()), *paths]:
    print(line)
print(installed_file("{MANUAL}/messages.rst"))"""


def test_neither_the_build_nor_twine_warns(built):
    assert not re.search(
        r"warning\b|\bwarn:|deprecated\b", built.printed, re.IGNORECASE
    )
    run(sys.executable, "-m", "twine", "check", "--strict", built.wheel, built.sdist)


def test_wheel_has_the_package_the_config_file_the_manual_and_no_more(built):
    of_metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    of_metadata.add("licenses/LICENSE")
    modules = {f"avocado_vt_joblock/{path.name}" for path in MODULES}
    modules.add("avocado_vt_joblock/py.typed")
    data = {f"data/{MANUAL}/{page}" for page in PAGES}
    data.add("data/etc/avocado/conf.d/vt_joblock.conf")
    names = zipfile.ZipFile(built.wheel).namelist()
    names = [re.sub("^avocado_framework_plugin_[^/]*/", "", name) for name in names]
    assert set(names) == of_metadata | modules | data


def test_source_distribution_builds_the_same_wheel(built, tmp_path):
    run("tar", "-xf", built.sdist, "-C", tmp_path)
    (source,) = tmp_path.iterdir()
    # Who packages it for a distribution can build the manual and run the tests.
    for name in ("CHANGELOG.rst", "Makefile", "tests/sandbox.py", "tests/lock"):
        assert (source / name).exists()
    for page in PAGES - {"README.rst", "CHANGELOG.rst"}:
        assert (source / "docs" / page).exists()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    run(*build, "--outdir", tmp_path, source)
    ours = zipfile.ZipFile(built.wheel)
    theirs = zipfile.ZipFile(tmp_path / built.wheel.name)
    assert sorted(ours.namelist()) == sorted(theirs.namelist())


def test_metadata():
    found = metadata.distribution(DISTRIBUTION)
    fields = found.metadata
    assert fields["License-Expression"] == "GPL-2.0-or-later"
    assert fields["Requires-Python"] == ">=3.9"
    assert found.requires == ["avocado-framework>=103.0"]
    pythons = {
        f"Programming Language :: Python :: 3.{number}" for number in range(9, 14)
    }
    assert pythons <= set(fields.get_all("Classifier"))
    assert fields.get_payload().strip() == (PROJECT / "README.rst").read_text().strip()


def test_version_is_the_same_everywhere():
    version = metadata.version(DISTRIBUTION)
    changes = (PROJECT / "CHANGELOG.rst").read_text()
    dated = re.findall(r"^(\S+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert dated[0] == version
    (spec,) = (PROJECT / "packaging").glob("*.spec")
    assert re.search(r"^Version: +(\S+)$", spec.read_text(), re.MULTILINE)[1] == version


def test_entry_points():
    points = metadata.distribution(DISTRIBUTION).entry_points
    assert {f"{each.group} {each.name} {each.value}" for each in points} == {
        f"avocado.plugins.{point}"
        for point in (
            "settings vt-joblock avocado_vt_joblock.settings:VTJobLockSettings",
            "init vt-joblock avocado_vt_joblock.settings:VTJobLockInit",
            "cli vt-joblock avocado_vt_joblock.command:VTJobLockOptions",
            "cli.cmd vt-joblock avocado_vt_joblock.command:VTJobLockCommand",
            "job.prepost vt-joblock avocado_vt_joblock.plugin:VTJobLock",
            "job.prepost vt-joblock-release avocado_vt_joblock.plugin:VTJobUnlock",
        )
    }


# But settings, which only Avocado loads.
@pytest.mark.parametrize(
    "module", sorted({path.stem for path in MODULES} - {"settings"})
)
def test_each_module_can_be_imported_first(sandbox, module):
    script = IMPORT_FIRST.format(module)
    _, text = finish(sandbox.popen(sys.executable, "-c", script, stderr=None))
    plugins, timeout = text.splitlines()
    assert "'vt-joblock', 'vt-joblock-release'" in plugins
    assert timeout == "0"


@pytest.mark.parametrize("options", [["."], ["-e", "."]], ids=" ".join)
def test_user_installs_and_removes_it(sandbox, avocado_packages, options):
    """In a checkout of their own, as the README says; nothing is left but empty
    directories."""
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
        found = {path for path in prefix.rglob("*") if path.is_file()}
        return {path for path in found if path.suffix != ".pyc"}

    before = files()
    # Without an environment of its own for the build: that is pip's, and takes time.
    pip("install", "--no-deps", "--no-build-isolation", *options)
    plugins = sandbox.output("plugins")
    assert re.search("^ *vt-joblock .*Lock/Unlock$", plugins, re.MULTILINE)
    place = prefix if options == ["."] else checkout
    assert f"* {place}/etc/avocado/conf.d/vt_joblock.conf\n" in sandbox.output("config")
    pip("uninstall", "--yes", DISTRIBUTION)
    assert files() == before
    assert "vt-joblock " not in sandbox.output("plugins")


def test_nothing_is_killed():
    """What is not written cannot go wrong.

    Signal 0 asks for a process, and ``avocado vt-joblock run`` passes on to its command
    what was sent to itself.
    """
    text = "\n".join(path.read_text() for path in MODULES)
    pattern = r".*(?:\bkillpg\b|os\.kill\(|send_signal|terminate\().*"
    kills = [line.strip() for line in re.findall(pattern, text)]
    assert sorted(kills) == ["os.kill(pid, 0)", "os.kill(pid, info.si_signo)"]


def test_make_rpm_says_at_once_what_is_missing(tmp_path):
    copy_sources(tmp_path / "source")
    (tmp_path / "bin").mkdir()
    for program in ("sh", "sed"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    done = subprocess.run(
        [shutil.which("make"), "-C", tmp_path / "source", "rpm"],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path / "bin")},
    )
    assert done.returncode != 0
    assert "There is no rpmbuild here." in done.stdout
    assert "rpm-build (Fedora), or in rpm and python3-packaging (Debian)" in done.stdout
    assert not list((tmp_path / "source").glob(".venv*"))


@pytest.fixture(scope="module")
def package(built, tmp_path_factory):
    """What ``make rpm`` builds of the source distribution, with nothing else."""
    if not shutil.which("rpmbuild"):
        pytest.skip("no rpmbuild here; Debian: apt-get install rpm python3-packaging")
    directory = tmp_path_factory.mktemp("rpm")
    run("tar", "-xf", built.sdist, "-C", directory, "--strip-components=1")
    # This environment serves as it is.
    run(
        "make", "-C", directory, "-o", f"{sys.prefix}/made", f"VENV={sys.prefix}", "rpm"
    )
    (path,) = directory.glob("rpmbuild/RPMS/noarch/*.rpm")
    return path


def test_rpm_installs_and_requires(package, built):
    query = "[%{FILENAMES} %{FILEFLAGS:fflags}\n]"
    lines = run("rpm", "-qp", "--queryformat", query, package)
    flags = dict(line.split(" ", 1) for line in lines.splitlines())
    names = zipfile.ZipFile(built.wheel).namelist()
    package_files = [name for name in names if name.startswith("avocado_vt_joblock/")]
    assert {f"{SITE}/{name}" for name in package_files} <= flags.keys()
    assert any(name.endswith(".dist-info/entry_points.txt") for name in flags)
    # A config file that stays as the administrator has changed it ("cn"); the manual;
    # the licence.
    assert flags.pop(OF_OURS) == "cn"
    of_manual = {name for name, flag in flags.items() if flag == "d"}
    directory = f"/usr/{MANUAL}"
    assert of_manual == {f"{directory}/{page}" for page in PAGES}
    assert directory in flags
    licences = [Path(name).name for name, flag in flags.items() if flag == "l"]
    assert licences == ["LICENSE"]
    assert set(flags.values()) == {"", "d", "l"}
    # Image builders refuse files in /usr/etc. vt_joblock.conf is avocado-vt's.
    assert not any(name.startswith("/usr/etc") for name in flags)
    in_etc = {name for name in flags if name.startswith("/etc")}
    assert in_etc == {"/etc/avocado", "/etc/avocado/conf.d"}
    requires = run("rpm", "-qp", "--requires", package)
    assert "python3dist(avocado-framework) >= 103\n" in requires


@needs_root
def test_rpm_installed_beside_avocado_vt_and_removed_again(package, tmp_path):
    spec = tmp_path / "stand-in.spec"
    spec.write_text(STAND_IN)
    run("rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/rpmbuild", spec)
    (stand_in,) = tmp_path.glob("rpmbuild/RPMS/noarch/*.rpm")
    root = tmp_path / "root"
    for directory in (SITE, "/usr/share/doc", "/usr/share/licenses"):  # as everywhere
        (root / directory[1:]).mkdir(parents=True)

    def rpm(*words):
        run("rpm", "--root", root, "--dbpath", "/database", "--nodeps", *words)

    def contents():
        found = {path for path in root.rglob("*") if path.name != "database"}
        return {path for path in found if root / "database" not in path.parents}

    rpm("--install", stand_in)
    before = contents()
    rpm("--install", package)
    assert (root / OF_AVOCADO_VT[1:]).read_text() == "[plugins.vtjoblock]\n"
    site = f"{root}{SITE}"
    lines = run(sys.executable, "-I", "-c", LOAD, root, site).splitlines()
    *files, first, last, page = lines
    assert all(file.startswith(f"{site}/avocado_vt_joblock/") for file in files)
    # The administrator's file wins over that of this package.
    assert (first, last) == (f"{root}{OF_OURS}", f"{root}{OF_AVOCADO_VT}")
    assert page == f"{root}/usr/{MANUAL}/messages.rst"
    rpm("--erase", DISTRIBUTION)
    assert contents() == before
