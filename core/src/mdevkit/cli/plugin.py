"""``mdevkit plugin``: commands about one plugin distribution."""

from __future__ import annotations

import typer

from mdevkit.cli.plugin_check import check

command = typer.Typer(help="Work with one plugin distribution.", no_args_is_help=True)
command.command("check")(check)


@command.callback()
def _plugin() -> None:
    """Work with one plugin distribution."""
