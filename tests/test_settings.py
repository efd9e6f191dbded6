"""The options and the config file, in every place where pip and the RPM put it."""

import re
import sys
from pathlib import Path

import pytest
from environments import install, new_environment, run
from needs import needs_mount_namespaces
from sandbox import finish

CONFIG_FILE = "etc/avocado/conf.d/vt_joblock.conf"
#: That of the RPM.
DEFAULTS = "etc/avocado/conf.d/vt_joblock_defaults.conf"


def config_files(text):
    return re.findall(r"^    \* (.*)$", text, re.MULTILINE)


def setting(text):
    (value,) = re.findall(r"^    plugins\.vtjoblock\.dir +(.*)$", text, re.MULTILINE)
    return value


def write(*paths):
    """Write config files whose lock directory tells in which file it is set."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[plugins.vtjoblock]\ndir = /of{path}\n")


def own_etc(sandbox):
    etc = sandbox.root / "etc"
    run("cp", "-a", "/etc", etc)
    script = f'mount --bind {etc} /etc && exec "$@"'
    sandbox.prefix = ["unshare", "--mount", "sh", "-c", script, "-"]
    return etc


@pytest.mark.skipif(
    Path("/etc/avocado").exists(), reason="this machine has settings in /etc"
)
def test_defaults_are_documented(sandbox, installed):
    """Without avocado-vt, by Avocado's reference and by the config file."""
    sandbox.python = installed
    sandbox.configure("")
    text = sandbox.output("config")
    # Where Avocado looks in vain is what a user wants to know who is about to write a
    # file.
    looked_for = re.findall(r"^      (/.*\.conf)$", text, re.MULTILINE)
    assert looked_for == ["/etc/avocado/avocado.conf"]
    options = re.findall(r"plugins\.vtjoblock\.(\w+) +(\S+)$", text, re.MULTILINE)
    assert options == [("dir", "/tmp"), ("timeout", "0")]
    reference = " ".join(sandbox.output("config", "reference").split())
    file = (installed.parent.parent / CONFIG_FILE).read_text()
    comments = " ".join(file.replace("\n#", "\n").split())
    helps = [
        "It must exist, and Avocado needs permission to write in it.",
        "seconds, or a number with s, m, h or d. With 0 it fails at once",
    ]
    for (key, value), help_text in zip(options, helps):
        _, _, of_option = reference.partition(f"plugins.vtjoblock.{key} ")
        of_option, _, _ = of_option.partition("plugins.")
        assert help_text in of_option
        assert f"* Default: {value} " in of_option
        assert help_text in comments
        assert re.search(rf"^(# )?{key}={value}$", file, re.MULTILINE)


@pytest.mark.parametrize("place", ["environment", "home/.local", "target"])
def test_config_file_is_found_where_pip_puts_it(
    sandbox, built, avocado_packages, place
):
    sandbox.plugins = sandbox.root / "target"
    of_pip = {"home/.local": ["--user"], "target": ["--target", sandbox.plugins]}
    options = of_pip.get(place, [])
    # pip installs for the user only where the system's packages are visible.
    prefix = sandbox.root / "environment"
    is_for_user = "--user" in options
    sandbox.python = new_environment(prefix, avocado_packages, system=is_for_user)
    install(sandbox.python, *options, built.wheel, HOME=sandbox.home)
    installed, extra = sandbox.root / place / CONFIG_FILE, sandbox.root / "extra.conf"
    write(installed, extra)
    text = sandbox.output("config")
    first = next(file for file in config_files(text) if CONFIG_FILE in file)
    assert first == str(installed)
    # Every other file wins over it: the user's, and one for a single run.
    assert setting(text) == str(sandbox.lock_dir)
    assert setting(sandbox.output("--config", extra, "config")) == f"/of{extra}"
    sandbox.configure("")
    assert setting(sandbox.output("config")) == f"/of{installed}"


@needs_mount_namespaces
def test_order_in_an_activated_environment(sandbox, built, avocado_packages):
    """Of the system's files only ours count there, above the one that pip has
    installed."""
    prefix = sandbox.root / "environment"
    sandbox.python = new_environment(prefix, avocado_packages)
    install(sandbox.python, built.wheel)
    etc = own_etc(sandbox)
    # These do not count.
    others = ("avocado.conf", "conf.d/a.conf", "conf.d/z.conf")
    write(*(etc / "avocado" / name for name in others))
    expected = [
        f"{prefix}/{CONFIG_FILE}",
        f"/{DEFAULTS}",
        f"/{CONFIG_FILE}",
        f"{prefix}/etc/avocado/avocado.conf",
        f"{prefix}/etc/avocado/conf.d/a.conf",
        f"{prefix}/.config/avocado/avocado.conf",
    ]
    paths = [
        Path(f"{etc.parent}{file}" if file.startswith("/etc") else file)
        for file in expected
    ]
    write(*paths)
    command = f". {prefix}/bin/activate && python -m avocado config"
    while paths:
        code, text = finish(sandbox.popen("sh", "-c", command))
        assert code == 0, text
        # Avocado has defaults of its own, too.
        of_avocado = str(avocado_packages)
        files = [file for file in config_files(text) if not file.startswith(of_avocado)]
        assert files == expected[: len(paths)]
        path = paths.pop()
        assert setting(text) == f"/of{path}"
        path.unlink()


@needs_mount_namespaces
@pytest.mark.parametrize("has_a_file", [True, False], ids=["own file", "no own file"])
def test_order_outside_of_an_activated_environment(
    sandbox, installed, built, has_a_file
):
    """The administrator's file is where Avocado puts it, among the others of /etc, and
    wins over that of the RPM."""
    sandbox.python = installed
    sandbox.configure("")
    if not has_a_file:
        # As deep as /usr/lib/python3 is, of which / would be the prefix.
        sandbox.plugins = sandbox.root.parent / "dist-packages"
        install(sandbox.python, "--target", sandbox.plugins, built.wheel)
        (sandbox.plugins / CONFIG_FILE).unlink(missing_ok=True)
    etc = own_etc(sandbox)
    ours, site = etc.parent / CONFIG_FILE, etc / "avocado/conf.d/site.conf"
    write(etc / "avocado/avocado.conf", ours, etc.parent / DEFAULTS)
    text = sandbox.output("config")
    of_system = [file for file in config_files(text) if file.startswith("/etc/")]
    expected = [f"/{DEFAULTS}", "/etc/avocado/avocado.conf", f"/{CONFIG_FILE}"]
    assert of_system == expected
    assert setting(text) == f"/of{ours}"
    write(site)
    ours.unlink()
    assert setting(sandbox.output("config")) == f"/of{site}"


@needs_mount_namespaces
def test_recipe_for_a_machine_with_several_users(sandbox, built, avocado_packages):
    """Root's file counts for each of them, in an activated environment, too."""
    prefix = sandbox.root / "environment"
    sandbox.python = new_environment(prefix, avocado_packages)
    install(sandbox.python, built.wheel)
    sandbox.configure("")
    own = "avocado/data/avocado-vt/lockdir"
    etc = own_etc(sandbox)
    (etc / "avocado/conf.d").mkdir(parents=True, exist_ok=True)
    (etc.parent / CONFIG_FILE).write_text(f"[plugins.vtjoblock]\ndir=~/{own}\n")
    show = "python -m avocado vt-joblock show"
    for start in ("", f". {prefix}/bin/activate && "):
        code, text = finish(sandbox.popen("sh", "-c", f"{start}{show}"))
        assert code == 2
        assert f"dir = '~/{own}' ({sandbox.home}/{own})" in " ".join(text.split())
        (sandbox.home / own).mkdir(parents=True)
        code, text = finish(sandbox.popen("sh", "-c", f"{start}{show}"))
        assert code == 0, text
        assert f"Lock directory: {sandbox.home}/{own}\n" in text
        (sandbox.home / own).rmdir()


def test_start_up_loads_nothing_but_the_settings(sandbox):
    script = """import sys, avocado
print([name for name in sys.modules if name.startswith("avocado_vt_joblock")])"""
    _, text = finish(sandbox.popen(sys.executable, "-c", script))
    loaded = ["avocado_vt_joblock", "avocado_vt_joblock.settings"]
    assert text.splitlines()[-1] == str(loaded)
