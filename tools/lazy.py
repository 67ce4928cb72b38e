"""Sub-commands that are imported when they are used, so that `--help` loads neither torch nor an engine."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

# The real command's parser reads everything after its name, `--help` included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def new_app(help_text: str, commands: Mapping[str, str] = {}) -> typer.Typer:
    """Return an application of kvferry's manner: no completion machinery, plain tracebacks.

    Args:
        commands: what each sub-command does, by its module below `kvferry.tools`. It is called as
            the module, or as the folder of one called `command` or `cli`. The module holds `app`,
            which takes the arguments, or a function of that name whose parameters typer reads.
    """
    app = typer.Typer(
        help=help_text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for module, what in commands.items():
        _add(app, module, what)
    return app


def _add(app: typer.Typer, module: str, help_text: str) -> None:
    name = module.removesuffix(".command").removesuffix(".cli").rpartition(".")[2]

    def run(ctx: typer.Context) -> None:
        target = importlib.import_module(f"kvferry.tools.{module}")
        sub: Any = getattr(target, "app", None)
        if sub is None:
            sub = new_app(help_text)
            function = getattr(target, name)
            sub.command(help=function.__doc__ or help_text)(function)
        sub(args=ctx.args, prog_name=ctx.command_path)

    # Typer finds the context by the annotation, which must be the class and not its name here.
    run.__annotations__["ctx"] = typer.Context
    app.command(name.replace("_", "-"), help=help_text, context_settings=_FORWARD)(run)


def fail(command: str, why: object, status: int = 1) -> NoReturn:
    """End a command with one line on standard error."""
    print(f"{command}: {why}", file=sys.stderr)
    raise typer.Exit(status)
