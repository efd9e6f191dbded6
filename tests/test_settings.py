"""The options and the config file, in every place where pip puts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from environments import install, new_environment
from needs import needs_mount_namespaces
from sandbox import finish

CONFIG_FILE = "etc/avocado/conf.d/vt_joblock.conf"
no_settings_in_etc = pytest.mark.skipif(
    Path("/etc/avocado").exists(), reason="this machine has settings in /etc"
)


def config_files(text):
    """The config files that ``avocado config`` says it has read, in order."""
    return re.findall(r"^    \* (.*)$", text, re.MULTILINE)


def ours(text):
    return [path for path in config_files(text) if path.endswith(CONFIG_FILE)]


def setting(text):
    (value,) = re.findall(r"^    plugins\.vtjoblock\.dir +(.*)$", text, re.MULTILINE)
    return value


def write(directory, file):
    """Write a config file whose lock directory tells in which file it is set."""
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[plugins.vtjoblock]\ndir = /of/{file}\n")
    return path


def own_etc(sandbox):
    """Give a sandbox an /etc of its own, to be written in."""
    etc = sandbox.root / "etc"
    subprocess.run(["cp", "-a", "/etc", etc], check=True)
    script = f'mount --bind {etc} /etc && exec "$@"'
    sandbox.prefix = ["unshare", "--mount", "sh", "-c", script, "-"]
    return etc


def test_listed_and_documented_without_avocado_vt(sandbox, installed):
    sandbox.python = installed
    assert "vt-joblock " in sandbox.output("plugins")
    _, _, reference = sandbox.output("config", "reference").partition("plugins.vtjoblock.dir\n")
    of_dir, _, of_timeout = reference.partition("plugins.vtjoblock.timeout\n")
    assert "It must exist, and Avocado needs permission to write in it." in " ".join(of_dir.split())
    assert "* Default: /tmp\n" in of_dir
    head, default = of_timeout.split("\n\n")[:2]
    assert "For how many seconds" in " ".join(f"{head} {default}".split())
    assert "* Default: 0\n" in of_timeout


@no_settings_in_etc
def test_defaults(sandbox, installed):
    sandbox.python = installed
    sandbox.configure("")
    text = sandbox.output("config")
    # Where Avocado looks in vain is what a user wants to know who is about to write a file.
    assert re.findall(r"^      (/.*\.conf)$", text, re.MULTILINE) == ["/etc/avocado/avocado.conf"]
    options = re.findall(r"plugins\.vtjoblock\.(\w+) +(\S+)$", text, re.MULTILINE)
    assert options == [("dir", "/tmp"), ("timeout", "0")]
    # The config file documents all that can be set.
    file = (installed.parent.parent / CONFIG_FILE).read_text()
    for key, value in options:
        assert re.search(rf"^(# )?{key}={value}$", file, re.MULTILINE)
    assert re.search(r"^\[plugins\.vtjoblock\]$", file, re.MULTILINE)
    assert re.search(r"^# .*permission to write", file, re.MULTILINE)
    assert re.search(r"^disable = \['result_events.vt-joblock'\]$", file, re.MULTILINE)


def test_config_file_in_an_environment_called_by_its_path(sandbox, installed):
    sandbox.python = installed
    file = installed.parent.parent / CONFIG_FILE
    text = sandbox.output("config")
    assert ours(text) == [str(file)]
    assert setting(text) == str(sandbox.lock_dir)
    sandbox.configure("")
    content = file.read_text()
    try:
        file.write_text(content.replace("dir=/tmp", "dir=/somewhere/else"))
        assert setting(sandbox.output("config")) == "/somewhere/else"
    finally:
        file.write_text(content)


@needs_mount_namespaces
def test_order_in_an_activated_environment(sandbox, wheel, avocado_packages):
    """Of the system's files only ours counts there, above the one that pip has installed."""
    prefix = sandbox.root / "environment"
    sandbox.python = new_environment(prefix, avocado_packages)
    install(sandbox.python, "--no-deps", wheel)
    etc = own_etc(sandbox)
    for file in ("avocado.conf", "conf.d/a.conf", "conf.d/vt_joblock.conf", "conf.d/z.conf"):
        write(etc, f"avocado/{file}")
    write(prefix, CONFIG_FILE)
    write(prefix, "etc/avocado/avocado.conf")
    write(prefix, "etc/avocado/conf.d/a.conf")
    write(prefix, ".config/avocado/avocado.conf")
    command = ["sh", "-c", f". {prefix}/bin/activate && python -m avocado config"]
    code, text = finish(sandbox.popen(*command))
    assert code == 0, text
    files = config_files(text)
    # Avocado's own defaults, if it has any.
    files = [file for file in files if not file.startswith(str(avocado_packages))]
    assert files == [
        f"{prefix}/{CONFIG_FILE}",
        f"/{CONFIG_FILE}",
        f"{prefix}/etc/avocado/avocado.conf",
        f"{prefix}/etc/avocado/conf.d/a.conf",
        f"{prefix}/.config/avocado/avocado.conf",
    ]
    for file in reversed(files):
        path = Path(f"{etc.parent}{file}" if file.startswith("/etc") else file)
        assert setting(text) in path.read_text()
        path.unlink()
        _, text = finish(sandbox.popen(*command))
    assert setting(text) == "/tmp"


@needs_mount_namespaces
@pytest.mark.parametrize("has_a_file", [True, False], ids=["own file", "no own file"])
def test_order_outside_of_an_activated_environment(sandbox, installed, wheel, has_a_file):
    """The administrator's file is where Avocado puts it, among the others of /etc."""
    sandbox.python, environment = installed, sandbox.environment
    sandbox.configure("")
    if not has_a_file:
        # As deep as /usr/lib/python3 is, of which / would be the prefix.
        packages = sandbox.root.parent / "dist-packages"
        install(sys.executable, "--target", packages, "--no-deps", wheel)
        (packages / CONFIG_FILE).unlink(missing_ok=True)
        environment["PYTHONPATH"] = str(packages)
    etc = own_etc(sandbox)
    write(etc, "avocado/avocado.conf")
    write(etc, "avocado/conf.d/vt_joblock.conf")
    code, text = finish(sandbox.avocado("config", env=environment))
    assert code == 0, text
    of_system = [file for file in config_files(text) if file.startswith("/etc/")]
    assert of_system == ["/etc/avocado/avocado.conf", f"/{CONFIG_FILE}"]
    assert setting(text) == "/of/avocado/conf.d/vt_joblock.conf"
    write(etc, "avocado/conf.d/site.conf")
    (etc / "avocado/conf.d/vt_joblock.conf").unlink()
    assert setting(sandbox.output("config")) == "/of/avocado/conf.d/site.conf"


def test_config_file_of_a_user_installation(sandbox, wheel, avocado_packages, tmp_path):
    # pip installs for the user only where the user's packages are visible.
    sandbox.python = new_environment(tmp_path, avocado_packages, system_site_packages=True)
    install(sandbox.python, "--user", "--no-deps", wheel, HOME=str(sandbox.home))
    text = sandbox.output("config")
    assert ours(text) == [str(sandbox.home / ".local" / CONFIG_FILE)]
    assert setting(text) == str(sandbox.lock_dir)


def test_config_file_beside_the_package(sandbox, wheel, avocado_packages, tmp_path):
    sandbox.python = new_environment(tmp_path / "environment", avocado_packages)
    target = tmp_path / "target"
    install(sandbox.python, "--target", target, "--no-deps", wheel)
    beside = write(target, CONFIG_FILE)
    sandbox.configure("")
    environment = {**sandbox.environment, "PYTHONPATH": str(target)}
    _, text = finish(sandbox.avocado("config", env=environment))
    assert ours(text)[0] == str(beside)
    assert setting(text) == f"/of/{CONFIG_FILE}"


def test_command_line_file_wins(sandbox, installed):
    sandbox.python = installed
    file = write(sandbox.root, "extra.conf")
    assert setting(sandbox.output("--config", file, "config")) == "/of/extra.conf"


def test_start_up_loads_nothing_but_the_settings(sandbox):
    script = "import sys, avocado; print([n for n in sys.modules if n.startswith('avocado_vt_jo')])"
    _, text = finish(sandbox.popen(sys.executable, "-c", script))
    assert text.splitlines()[-1] == "['avocado_vt_joblock', 'avocado_vt_joblock.settings']"
