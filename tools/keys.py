"""`kvferry keys`: key pairs for CURVE, and the lists of who may connect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.control.curve import new_pair
from kvferry.control.errors import ConfigError
from kvferry.control.keys import ROLES, check_key_name, write_keys
from kvferry.tools.lazy import fail, new_app

app = new_app("Key pairs for every ZeroMQ socket, and the lists of who may connect.")


@app.callback()
def keys() -> None:
    """Key pairs for every ZeroMQ socket, and the lists of who may connect."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; also the file's name.")],
    folder: Annotated[Path, typer.Option(help="Where NAME.key and allowed_keys go.")] = Path(
        "keys"
    ),
    role: Annotated[
        str, typer.Option(help=f"What it may do: {', '.join(ROLES)}; all if not given.")
    ] = "",
    names: Annotated[
        str, typer.Option(help="Agents it may be or command, as decode-*; any if not given.")
    ] = "",
) -> None:
    """Make a key pair, write it to FOLDER/NAME.key, and add it to FOLDER/allowed_keys."""
    public, secret = new_pair()
    path = folder / f"{name}.key"
    try:
        check_key_name(name)
        write_keys(path, public, secret, role=role, names=names)
    except ConfigError as error:
        fail("kvferry keys", error, 2)
    print(
        f"wrote {path} (keep it secret) and allowed {name} in {folder / 'allowed_keys'}\n"
        f"public key: {public.hex()}\n"
        f"an address that it answers at ends in #{public.hex()}"
    )
