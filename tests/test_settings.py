"""The option and the config file, in every place where pip puts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from environments import AVOCADO_PACKAGES, install, new_environment
from needs import needs_mount_namespaces
from sandbox import finish

CONFIG_FILE = "etc/avocado/conf.d/vt_joblock.conf"


def config_files(text):
    """The config files that ``avocado config`` says it has read, in order."""
    return re.findall(r"^    \* (.*)$", text, re.MULTILINE)


def missing_config_files(text):
    """Those that it has looked for in vain."""
    return re.findall(r"^      (/.*\.conf)$", text, re.MULTILINE)


def ours(text):
    return [path for path in config_files(text) if path.endswith(CONFIG_FILE)]


def setting(text):
    (value,) = re.findall(r"^    plugins\.vtjoblock\.dir +(.*)$", text, re.MULTILINE)
    return value


def test_listed_and_documented_without_avocado_vt(sandbox, installed):
    sandbox.python = installed
    assert "vt-joblock " in sandbox.output("plugins")
    reference = sandbox.output("config", "reference")
    entry = reference.split("plugins.vtjoblock.dir\n", 1)[1]
    assert "its own. It must exist, and Avocado needs permission to write in it." in " ".join(
        entry.split("\n\n")[0].split()
    )
    assert "* Default: /tmp\n" in entry
    entry = reference.split("plugins.vtjoblock.timeout\n", 1)[1]
    assert "for how many seconds" in " ".join(entry.split("\n\n")[0].split()).lower()
    assert "* Default: 0\n" in entry


@pytest.mark.skipif(Path("/etc/avocado").exists(), reason="this machine has settings in /etc")
def test_default_is_tmp(sandbox, installed):
    sandbox.python = installed
    sandbox.configure("")
    assert setting(sandbox.output("config")) == "/tmp"


def test_config_file_in_an_environment_called_by_its_path(sandbox, installed):
    sandbox.python = installed
    text = sandbox.output("config")
    assert ours(text) == [str(installed.parent.parent / CONFIG_FILE)]
    assert setting(text) == str(sandbox.lock_dir)


def test_config_file_in_an_activated_environment(sandbox, installed):
    sandbox.python = installed
    prefix = installed.parent.parent
    local = prefix / ".config/avocado/avocado.conf"
    local.parent.mkdir(parents=True)
    local.write_text("[plugins.vtjoblock]\ndir = /of/the/environment\n")
    main = prefix / "etc/avocado/avocado.conf"
    main.write_text("[plugins.vtjoblock]\ndir = /of/the/system\n")
    command = f". {prefix}/bin/activate && avocado config"
    try:
        text = subprocess.check_output(command, shell=True, text=True, env=sandbox.environment)
        assert ours(text) == [str(prefix / CONFIG_FILE)]
        assert setting(text) == "/of/the/environment"
        local.unlink()
        text = subprocess.check_output(command, shell=True, text=True, env=sandbox.environment)
        assert setting(text) == "/of/the/system"
    finally:
        local.unlink(missing_ok=True)
        main.unlink()


def test_config_file_of_a_user_installation(sandbox, wheel, tmp_path):
    # pip installs for the user only where the user's packages are visible.
    sandbox.python = new_environment(tmp_path, system_site_packages=True)
    install(sandbox.python, *AVOCADO_PACKAGES)
    install(sandbox.python, "--user", "--no-deps", wheel, HOME=str(sandbox.home))
    text = sandbox.output("config")
    assert ours(text) == [str(sandbox.home / ".local" / CONFIG_FILE)]
    assert setting(text) == str(sandbox.lock_dir)


def test_config_file_has_the_setting_and_a_comment(sandbox, installed):
    sandbox.python = installed
    sandbox.configure("")
    file = installed.parent.parent / CONFIG_FILE
    text = file.read_text()
    assert re.search(r"^\[plugins\.vtjoblock\]$", text, re.MULTILINE)
    assert re.search(r"^# .*permission to write", text, re.MULTILINE)
    try:
        file.write_text(text.replace("dir=/tmp", "dir=/somewhere/else"))
        assert setting(sandbox.output("config")) == "/somewhere/else"
    finally:
        file.write_text(text)


def test_config_file_documents_all_that_can_be_set(sandbox, installed):
    sandbox.python = installed
    sandbox.configure("")
    text = (installed.parent.parent / CONFIG_FILE).read_text()
    settings = re.findall(
        r"plugins\.vtjoblock\.(\w+) +(\S+)$", sandbox.output("config"), re.MULTILINE
    )
    assert settings == [("dir", "/tmp"), ("timeout", "0")]
    for key, value in settings:
        assert re.search(rf"^(# )?{key}={value}$", text, re.MULTILINE)
    assert re.search(r"^disable = \['result_events.vt-joblock'\]$", text, re.MULTILINE)


@pytest.mark.skipif(Path("/etc/avocado").exists(), reason="this machine has settings in /etc")
def test_files_that_do_not_exist_stay_in_the_list(sandbox, installed):
    """Where Avocado looks in vain is what a user wants to know who is about to write one."""
    sandbox.python = installed
    assert missing_config_files(sandbox.output("config")) == ["/etc/avocado/avocado.conf"]


def test_config_file_beside_the_package(sandbox, wheel, tmp_path):
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    sandbox.python = new_environment(tmp_path / "environment")
    install(sandbox.python, *AVOCADO_PACKAGES)
    install(sandbox.python, "--target", target, "--no-deps", wheel)
    beside = target / CONFIG_FILE
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text("[plugins.vtjoblock]\ndir = /beside\n")
    sandbox.configure("")
    environment = {**sandbox.environment, "PYTHONPATH": str(target)}
    _, text = finish(sandbox.avocado("config", env=environment))
    assert ours(text)[0] == str(beside)
    assert setting(text) == "/beside"


@needs_mount_namespaces
def test_file_of_the_administrator_is_not_moved(sandbox, wheel, tmp_path):
    """A package without a config file of its own, of which the administrator has written one."""
    # As deep as /usr/lib/python3 is, of which / would be the prefix.
    target = sandbox.root.parent / "target"
    install(sys.executable, "--target", target, "--no-deps", wheel)
    (target / CONFIG_FILE).unlink(missing_ok=True)
    etc = own_etc(sandbox)
    (etc / "avocado/avocado.conf").write_text("[plugins.vtjoblock]\ndir = /of/the/main/file\n")
    (etc / "avocado/conf.d/vt_joblock.conf").write_text(
        "[plugins.vtjoblock]\ndir = /of/the/admin\n"
    )
    sandbox.configure("")
    environment = {**sandbox.environment, "PYTHONPATH": str(target)}
    code, text = finish(sandbox.avocado("config", env=environment))
    assert code == 0, text
    files = config_files(text)
    assert files.index("/etc/avocado/avocado.conf") < files.index(f"/{CONFIG_FILE}")
    assert setting(text) == "/of/the/admin"


def own_etc(sandbox):
    """Give a sandbox an /etc of its own, to be written in."""
    etc = sandbox.root / "etc"
    subprocess.run(["cp", "-a", "/etc", etc], check=True)
    (etc / "avocado/conf.d").mkdir(parents=True, exist_ok=True)
    script = f'mount --bind {etc} /etc && exec "$@"'
    sandbox.prefix = ["unshare", "--mount", "sh", "-c", script, "-"]
    return etc


def test_command_line_file_wins(sandbox, installed):
    sandbox.python = installed
    file = sandbox.root / "extra.conf"
    file.write_text("[plugins.vtjoblock]\ndir = /of/the/command/line\n")
    assert setting(sandbox.output("--config", file, "config")) == "/of/the/command/line"


@needs_mount_namespaces
def test_system_file_wins(sandbox, installed):
    sandbox.python = installed
    sandbox.configure("")
    etc = own_etc(sandbox)
    (etc / "avocado/conf.d/site.conf").write_text("[plugins.vtjoblock]\ndir = /of/the/system\n")
    assert setting(sandbox.output("config")) == "/of/the/system"


def test_start_up_loads_nothing_but_the_settings(sandbox):
    script = "import sys, avocado; print([n for n in sys.modules if n.startswith('avocado_vt_jo')])"
    text = subprocess.check_output(
        [sys.executable, "-c", script], text=True, env=sandbox.environment
    )
    assert text.splitlines()[-1] == "['avocado_vt_joblock', 'avocado_vt_joblock.settings']"
