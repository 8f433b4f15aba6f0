"""A group of commands that are imported when they are called. For `launch.cli` and `launch.ckpt`."""

from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are needed.

    Args:
        table: name of each subcommand: where it is, and its line in the help.

    """

    def __init__(self, *arguments: Any, table: dict[str, tuple[str, str]], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._table = table

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(self._table)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand."""
        if cmd_name not in self._table:
            return None
        module, _, name = self._table[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._table.items()])
