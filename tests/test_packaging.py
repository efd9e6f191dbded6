"""What is released: the distributions and what an installation of them makes."""

import re
import sys
import zipfile

from environments import PROJECT, install, new_environment, run

DISTRIBUTION = "avocado-framework-plugin-vt-joblock"


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
        "avocado_vt_joblock/job.py",
        "avocado_vt_joblock/lock.py",
        "avocado_vt_joblock/lockfile.py",
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


def test_metadata(installed):
    script = (
        "import importlib.metadata as m\n"
        f"print(m.distribution({DISTRIBUTION!r}).read_text('METADATA'))\n"
    )
    head, _, description = run(installed, "-I", "-c", script).partition("\n\n")
    fields = [line.split(": ", 1) for line in head.splitlines() if re.match(r"[A-Z]\S*: ", line)]
    told = dict(fields)
    assert told["Name"] == DISTRIBUTION
    assert re.fullmatch(r"\d+\.\d+\.\d+", told["Version"])
    assert told["License-Expression"] == "GPL-2.0-or-later"
    assert told["License-File"] == "LICENSE"
    assert told["Requires-Python"] == ">=3.9"
    required = [value for name, value in fields if name == "Requires-Dist"]
    assert required == ["avocado-framework>=103.0"]
    assert told["Description-Content-Type"] == "text/x-rst"
    assert description.strip() == (PROJECT / "README.rst").read_text().strip()
    classifiers = [value for name, value in fields if name == "Classifier"]
    for version in ("3.9", "3.10", "3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in classifiers


def test_version_is_in_the_changelog(installed):
    script = f"import importlib.metadata as m; print(m.version({DISTRIBUTION!r}))"
    changes = (PROJECT / "CHANGELOG.rst").read_text()
    versions = re.findall(r"^(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", changes, re.MULTILINE)
    assert versions[0] == run(installed, "-I", "-c", script).strip()


def test_entry_points(installed):
    script = (
        "import importlib.metadata as m\n"
        f"for e in m.distribution({DISTRIBUTION!r}).entry_points:\n"
        "    print(e.group, e.name, e.value)\n"
    )
    assert sorted(run(installed, "-I", "-c", script).splitlines()) == [
        "avocado.plugins.init vt-joblock avocado_vt_joblock.settings:VTJobLockInit",
        "avocado.plugins.job.prepost vt-joblock avocado_vt_joblock.plugin:VTJobLock",
        "avocado.plugins.settings vt-joblock avocado_vt_joblock.settings:VTJobLockSettings",
    ]


def test_uninstalling_leaves_nothing(wheel, tmp_path):
    python = new_environment(tmp_path / "environment")

    def files():
        return {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}

    before = files()
    install(python, "--no-deps", wheel)
    added = {path.name for path in files() - before}
    assert {"avocado_vt_joblock", "py.typed", "vt_joblock.conf"} <= added
    run(python, "-c", "import avocado_vt_joblock.lock")
    run(python, "-m", "pip", "--quiet", "uninstall", "--yes", DISTRIBUTION)
    left = files() - before
    assert {path for path in left if not path.is_dir()} == set()
    assert {path.name for path in left} <= {"etc", "avocado", "conf.d"}


def test_nothing_is_killed():
    """What is not written cannot go wrong: the only signal is 0, which asks for a process."""
    kills = [
        line.strip()
        for path in (PROJECT / "avocado_vt_joblock").glob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bkillpg\b|os\.kill\(|pidfd_send_signal|send_signal|terminate\(", line)
    ]
    assert kills == ["os.kill(pid, 0)"]
