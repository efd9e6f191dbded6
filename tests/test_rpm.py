"""The RPM: what it installs, beside what avocado-vt's own installs, and what removing it leaves."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from environments import run
from needs import needs_root

NAME = "avocado-framework-plugin-vt-joblock"
SITE = f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
CONFIG = "/usr/etc/avocado/conf.d/vt_joblock.conf"
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
entry_points = importlib.metadata.distribution({NAME!r}).entry_points
loaded = {{point.group: point.load() for point in entry_points}}
paths = []
loaded["avocado.plugins.settings"]().adjust_settings_paths(paths)
print(*map(inspect.getfile, loaded.values()), *paths, sep="\\n")
"""
pytestmark = pytest.mark.skipif(
    not shutil.which("rpmbuild"), reason="on Debian: apt-get install rpm python3-packaging"
)


@pytest.fixture(scope="module")
def package(built, tmp_path_factory):
    """What ``make rpm`` builds of the source distribution, with nothing from elsewhere."""
    directory = tmp_path_factory.mktemp("rpm")
    run("tar", "-xf", built.sdist, "-C", directory, "--strip-components=1")
    # This environment serves as it is.
    run("make", "-C", directory, "-o", f"{sys.prefix}/made", f"VENV={sys.prefix}", "rpm")
    (path,) = directory.glob("rpmbuild/RPMS/noarch/*.rpm")
    return path


def test_what_it_installs_and_requires(package, wheel):
    form = "[%{FILENAMES} %{FILEFLAGS:fflags}\n]"
    lines = run("rpm", "-qp", "--queryformat", form, package).splitlines()
    flags = dict(line.split(" ", 1) for line in lines)
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"{SITE}/{name}" for name in names if name.startswith("avocado_vt_joblock/")}
    assert modules <= flags.keys()
    assert any(name.endswith(".dist-info/entry_points.txt") for name in flags)
    # Configuration that stays as the administrator has changed it, documentation, and the licence.
    assert flags.pop(CONFIG) == "cn"
    told = {Path(name).name: flag for name, flag in flags.items() if flag}
    assert told == {"README.rst": "d", "CHANGELOG.rst": "d", "LICENSE": "l"}
    assert not any(name.startswith("/etc") for name in flags)
    required = run("rpm", "-qp", "--requires", package).splitlines()
    assert "python3dist(avocado-framework) >= 103" in required


@needs_root
def test_installed_beside_avocado_vt_and_removed_again(package, tmp_path):
    spec = tmp_path / "stand-in.spec"
    spec.write_text(STAND_IN)
    run("rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/rpmbuild", spec)
    (stand_in,) = tmp_path.glob("rpmbuild/RPMS/noarch/*.rpm")
    root = tmp_path / "root"
    # These are there before on every system.
    for directory in (SITE, "/usr/share/doc", "/usr/share/licenses"):
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
    assert f"{root}{CONFIG}" in files[3:]
    rpm("--erase", NAME)
    assert contents() == before
