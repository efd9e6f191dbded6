"""The command ``avocado vt-joblock``, and the options of ``avocado run``.

Avocado loads this module at every start, after it has made its object ``settings``. The
modules that do the work are imported only when they are needed.
"""

from __future__ import annotations

import argparse
from typing import Any

from avocado.core.parser import FileOrStdoutAction
from avocado.core.plugin_interfaces import CLI, CLICmd
from avocado.core.settings import settings

from avocado_vt_joblock import DIR, TIMEOUT

_RUN_HELP = """Takes the lock as a job with VT tests does, runs the command, and gives
the lock back. If the command leaves processes running, it waits for these for a few
seconds; after that they keep the lock until they end. The exit code is that of the
command; 125 if the lock could not be had, 126 if the command cannot be run, 127 if
there is no such command. Write -- before the command if it has options: Avocado reads
--config, --show, --verbose, -V, --enable-paginator, --version and -v itself, wherever
they stand before a --."""


class VTJobLockOptions(CLI):
    """Adds the options of the lock to ``avocado run``."""

    name = "vt-joblock"
    description = "Avocado-VT job lock: options of 'avocado run'"

    def configure(self, parser: Any) -> None:
        """Add the options.

        :param parser: Avocado's parser of its command line
        """
        run_parser = parser.subcommands.choices.get("run")
        if run_parser:
            group = run_parser.add_argument_group("job lock of VT tests")
            _add_option(group, DIR, "DIR")
            _add_option(group, TIMEOUT, "TIME")

    def run(self, config: dict[str, Any]) -> None:
        """Do nothing: the plugin for jobs reads the settings."""


class VTJobLockCommand(CLICmd):
    """Shows the lock, or holds it for a command."""

    # In Avocado's own class they are None.
    name = "vt-joblock"  # type: ignore[assignment]
    description = "Show who holds the job lock, or hold it"  # type: ignore[assignment]

    def configure(self, parser: Any) -> None:
        """Add the subcommands.

        :param parser: Avocado's parser of its command line
        """
        parser = super().configure(parser)
        subcommands = parser.add_subparsers(dest="vt_joblock", metavar="sub-command")
        subcommands.required = True
        show = subcommands.add_parser(
            "show", help="Show who holds the lock, and who waits"
        )
        show.add_argument(
            "--json",
            metavar="FILE",
            dest="vt_joblock_json",
            action=FileOrStdoutAction,
            help="Write the same as JSON to a file; - for standard output",
        )
        _add_option(show, DIR, "DIR")
        run = subcommands.add_parser(
            "run",
            help="Hold the lock while a command runs",
            description=_RUN_HELP,
            usage="avocado vt-joblock run [OPTION...] [--] COMMAND [ARGUMENT...]",
        )
        _add_option(run, DIR, "DIR")
        _add_option(run, TIMEOUT, "TIME")
        run.add_argument(
            "vt_joblock_command",
            metavar="COMMAND",
            nargs=argparse.REMAINDER,
            help="the command, with its arguments",
        )

    def run(self, config: dict[str, Any]) -> int:
        """Run the subcommand.

        :param config: the settings, and what the command line has
        :return: the exit code
        """
        if config["vt_joblock"] == "show":
            from avocado_vt_joblock import showing

            return showing.show(config, config.get("vt_joblock_json"))
        from avocado_vt_joblock import holding

        command = config["vt_joblock_command"]
        return holding.run(config[DIR], config[TIMEOUT], command)


def _add_option(parser: Any, namespace: str, metavar: str) -> None:
    key = namespace.rpartition(".")[2]
    settings.add_argparser_to_option(
        namespace=namespace,
        parser=parser,
        long_arg=f"--vt-joblock-{key}",
        metavar=metavar,
        allow_multiple=True,
    )
