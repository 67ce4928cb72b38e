"""Sub-commands that are imported when they are used, so that `--help` loads neither torch nor an engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

# The real command's parser reads everything after its name, `--help` included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def new_app(help_text: str) -> typer.Typer:
    """An application of kvferry's manner: no completion machinery, plain tracebacks."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )


def add(app: typer.Typer, name: str, module: str, help_text: str) -> None:
    """Adds the sub-command `name`; `module` is imported when it runs.

    The module holds either `app`, a `typer.Typer`, or a function called `name` whose parameters
    typer reads.
    """

    def run(ctx: typer.Context) -> None:
        target = importlib.import_module(module)
        sub: Any = getattr(target, "app", None)
        if sub is None:
            sub = new_app(help_text)
            function: Callable[..., Any] = getattr(target, name)
            sub.command(help=function.__doc__ or help_text)(function)
        sub(args=ctx.args, prog_name=ctx.command_path)

    # Typer finds the context by the annotation, which must be the class and not its name here.
    run.__annotations__["ctx"] = typer.Context
    app.command(name, help=help_text, context_settings=_FORWARD)(run)
