"""What is set, made sense of."""

import configparser
import math

import pytest

from avocado_vt_joblock import options


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        (" 2.5 ", 2.5),
        (7200, 7200),
        ("90s", 90),
        ("5m", 300),
        ("1.5h", 5400),
        ("2d", 172_800),
        ("-1", math.inf),
        (-1.0, math.inf),
    ],
)
def test_timeout(value, seconds):
    assert options.timeout(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("soon", "", "-2", "nan", "inf", "1 h", "1w", "h", "1e3", "-1h", "٣"),
        *(True, None, [1], {}, 10**400, "1" * 100_000),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_no_timeout(value):
    with pytest.raises(options.OptionError) as caught:
        options.timeout(value)
    assert (caught.value.option, caught.value.value) == (
        "plugins.vtjoblock.timeout",
        value,
    )


def test_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.directory("~/locks") == f"{tmp_path}/locks"
    assert options.directory(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "locks",
        "~nobody-of-this-name/x",
        "$HOME/x",
        None,
        7,
        "/\0",
        ["/tmp"],
        b"/tmp",
    ],
)
def test_no_directory(value):
    with pytest.raises(options.OptionError) as caught:
        options.directory(value)
    assert (caught.value.option, caught.value.value) == ("plugins.vtjoblock.dir", value)


@pytest.mark.parametrize(
    "order", [None, [], ["vt-joblock"], ["vt-joblock", "jobscripts", "teststmpdir"]]
)
def test_order_in_which_all_run_under_the_lock(order):
    options.check_order(order)


@pytest.mark.parametrize(
    ("order", "right"),
    [
        (["jobscripts"], ["vt-joblock", "jobscripts"]),
        (["jobscripts", "vt-joblock"], ["vt-joblock", "jobscripts"]),
        (["vt-joblock", "vt-joblock-release", "a"], ["vt-joblock", "a"]),
    ],
)
def test_order_in_which_some_run_without_the_lock(order, right):
    with pytest.raises(options.OrderError) as caught:
        options.check_order(order)
    assert caught.value.right_order == right


FILES = """
[DEFAULT]
x = 1
[plugins.vtjoblock]
Dir = /tmp
timout = 30
[plugins.vtjoblock.more]
y = 1
[plugins.other]
whatever = 1
"""


def as_older_avocado(text):
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return parser


def as_newer_avocado(text):
    parser = as_older_avocado(text)
    return {f"{section}.{key}": "" for section in parser for key in parser[section]}


@pytest.mark.parametrize("read", [as_older_avocado, as_newer_avocado])
def test_unknown_keys(read):
    assert options.unknown_keys(read(FILES)) == ["timout"]
    assert options.unknown_keys(read("[plugins.other]\nwhatever = 1\n")) == []
