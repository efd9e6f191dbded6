"""The options: parsed and checked."""

from __future__ import annotations

import configparser
import math
import os
import re
from collections.abc import Iterable
from typing import Any

from avocado_vt_joblock import DIR, SECTION, TIMEOUT

#: The plugin that takes the lock: it runs before all others.
FIRST_PLUGIN = "vt-joblock"
#: The plugin that gives the lock back: it runs after all others.
LAST_PLUGIN = "vt-joblock-release"
#: The options of our section.
KEYS = frozenset(["dir", "timeout"])

#: "90", "2.5h".
_TIME = re.compile(r"(?P<number>[0-9]{1,8}(?:\.[0-9]{1,8})?)(?P<unit>[smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class OptionError(ValueError):
    """An option that makes no sense.

    :param option: its name as Avocado knows it
    :param value: what is set
    """

    def __init__(self, option: str, value: object) -> None:
        super().__init__(f"{option} = {value!r}")
        self.option = option
        self.value = value


class OrderError(ValueError):
    """The plugins of a job are in an order in which some run without the lock.

    :param order: their names, as they are set
    """

    def __init__(self, order: list[str]) -> None:
        super().__init__(str(order))
        self.order = order
        others = [name for name in order if name not in (FIRST_PLUGIN, LAST_PLUGIN)]
        self.right_order = [FIRST_PLUGIN, *others]


def check_order(order: list[str] | None) -> None:
    """Check the order of plugins before and after a job, if one is set.

    :param order: the names that are set: Avocado runs these first, both before and
        after the job, and then all others by their priorities
    :raises OrderError: when some would run without the lock
    """
    if order and (order[0] != FIRST_PLUGIN or LAST_PLUGIN in order):
        raise OrderError(order)


def timeout(value: object) -> float:
    """Return how long to wait for the lock, in seconds; infinity for -1.

    :param value: what is set, for example "90", "2.5h" or "-1"
    :raises OptionError: when that is no time
    """
    text = str(value).strip()
    if text in ("-1", "-1.0"):
        return math.inf
    match = _TIME.fullmatch(text)
    if not match:
        raise OptionError(TIMEOUT, value)
    return float(match["number"]) * _SECONDS[match["unit"]]


def directory(value: object) -> str:
    """Return the path of the lock directory; it need not exist.

    :param value: what is set, for example "~/locks"
    :raises OptionError: when that is no absolute path
    """
    path = str(value)
    if "\0" not in path:
        path = os.path.expanduser(path)
        if os.path.isabs(path):
            return path
    raise OptionError(DIR, value)


def unknown_keys(config: Any) -> list[str]:
    """Return the keys that config files have in our section, and that are no options.

    :param config: what Avocado has read from files: a ``ConfigParser`` in older
        versions, in newer ones a mapping from "SECTION.KEY"
    """
    # What is in [DEFAULT] is found in every section.
    if isinstance(config, configparser.ConfigParser):
        keys = set(config[SECTION]) if SECTION in config else set()
        return sorted(keys - KEYS - set(config.defaults()))
    unknown = _keys_in(SECTION, config) - KEYS
    return sorted(unknown - _keys_in("DEFAULT", config)) if unknown else []


def _keys_in(section: str, names: Iterable[str]) -> set[str]:
    start = f"{section}."
    keys = {name[len(start) :] for name in names if name.startswith(start)}
    # Those with a dot are of sections whose name is longer.
    return {key for key in keys if "." not in key}
