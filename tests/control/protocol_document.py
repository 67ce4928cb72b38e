"""docs/protocol.md as data: its tables, and what the code would write into them."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import inspect

from tests import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
FIELDS_HEAD = ["of", "field", "type", "default", ""]
NUMBERS_HEAD = ["what", "value", "in the code", ""]
INTEGERS = {
    (None, None): "integer",
    (0, 2**63 - 1): "natural",
    (0, 2**32 - 1): "uint32",
    (0, 2**24 - 1): "uint24",
    (0, 2**16 - 1): "uint16",
    (0, 255): "uint8",
    (1, 2**31 - 1): "1 to 2^31 - 1",
    (0, 1 << 20): "0 to 2^20",
}
TEXTS = {(1, 256): "name", (None, 256): "label", (None, 1024): "text", (None, None): "any text"}


class Field(NamedTuple):
    """A row of a table of fields."""

    name: str
    type: str
    default: str


def sections() -> dict[str, str]:
    """The document's text by its second-level headings."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str, head: list[str]) -> Iterator[list[str]]:
    """The rows of all tables with this head, as cells."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells == head:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            assert len(cells) == len(head), f"a row has {len(cells)} cells: {line}"
            yield cells


def documented_fields(text: str) -> dict[str, list[Field]]:
    """What the tables of fields in `text` say, by the name in the first column."""
    found: dict[str, list[Field]] = {}
    owner = ""
    for name, field, kind, default, meaning in tables(text, FIELDS_HEAD):
        owner = name.replace("`", "") or owner
        rows = found.setdefault(owner, [])
        if field != "none":
            assert meaning, f"{owner}.{field} is not explained"
            rows.append(Field(field.strip("`"), kind, default.strip("`")))
    return found


def fields_of(kind: type[msgspec.Struct]) -> list[Field]:
    """What the document has to say of a struct: the fields that it adds to its base."""
    inherited = (
        getattr(kind.__base__, "__struct_fields__", ())
        if kind.__base__ is not msgspec.Struct
        else ()
    )
    return [
        Field(field.encode_name, _type_of(inspect.type_info(field.type)), _default_of(field))
        for field in msgspec.structs.fields(kind)
        if field.name not in inherited
    ]


def parts_of(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """The structs that its fields hold."""
    found = []
    waiting = [inspect.type_info(field.type) for field in msgspec.structs.fields(kind)]
    while waiting:
        match waiting.pop():
            case inspect.StructType(cls=part):
                found.append(part)
            case inspect.VarTupleType(item_type=item):
                waiting.append(item)
            case inspect.DictType(value_type=value):
                waiting.append(value)
            case inspect.UnionType(types=kinds):
                waiting += kinds
    return found


def without_fields(text: str) -> str:
    """A section without its tables of fields."""
    head = re.escape("| " + " | ".join(FIELDS_HEAD[:-1]) + " |")
    return re.sub(rf"^{head} \|\n(\|.*\n)+", "", text, flags=re.M)


def tag_of(kind: type[msgspec.Struct]) -> str:
    """What a message is called on the wire; for a part of one, the name of its class."""
    return str(kind.__struct_config__.tag or kind.__name__)


def _default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return ""
    value = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "its defaults"
    if isinstance(value, dict):
        return "{}"
    written = {"": '""', b"": '""', (): "[]", None: "nil"}
    return written.get(value, str(value).lower())


def _type_of(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType(ge=least, le=most):
            return INTEGERS.get((least, most)) or f"{least} to {most}"
        case inspect.FloatType(gt=above, ge=least, le=most):
            if most is None:
                return "number"
            if (least, most) == (0, 1e18):
                return "amount"
            if least is None:
                return f"number, over {above:g} to {most:g}"
            return f"number, {least:g} to {most:g}"
        case inspect.StrType(min_length=least, max_length=most):
            return TEXTS.get((least, most)) or f"text, up to {most}"
        case inspect.BytesType(min_length=least, max_length=most):
            if most is None:
                return "bytes"
            size = str(most) if least == most else f"up to {most}"
            return f"bytes, {size}"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "nil"
        case inspect.LiteralType(values=values):
            return " ".join(f"`{value}`" if value else '`""`' for value in values)
        case inspect.VarTupleType(item_type=item, max_length=most):
            return f"list of {_type_of(item)}" + (f"; up to {most}" if most is not None else "")
        case inspect.TupleType(item_types=items):
            return "list of " + " and ".join(_type_of(item) for item in items)
        case inspect.DictType(key_type=key, value_type=value, max_length=most):
            bound = f"; up to {most}" if most is not None else ""
            return f"map from {_type_of(key)} to {_type_of(value)}{bound}"
        case inspect.StructType(cls=of):
            return f"`{of.__name__}`"
        case inspect.UnionType(types=kinds):
            return " or ".join(_type_of(one) for one in kinds)
    raise AssertionError(f"say how {kind} is written in the document")


def documented_numbers(text: str) -> dict[str, str]:
    """What the tables of numbers in `text` say, by the name in the code."""
    found = {}
    for _, value, names, _ in tables(text, NUMBERS_HEAD):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"{name} is there twice"
            found[name] = value
    return found


def element_types_of(path: Path, pattern: str) -> dict[str, str]:
    """The numbers in a file whose names match, as the document writes them.

    Constants are `folder.file.NAME`, a struct's field `folder.file.Struct.field`, and the default of
    a function's argument `folder.file.function(argument)`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = import_module(".".join(("kvferry", *path.relative_to(ROOT).with_suffix("").parts)))
    found: dict[str, str] = {}

    def take(name: str, what: str, value: Any) -> None:
        if re.fullmatch(pattern, name.upper()) and value:
            found[f"{path.parent.name}.{path.stem}.{what}"] = written(name.upper(), value)

    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            for one in target.elts if isinstance(target, ast.Tuple) else (target,):
                if isinstance(one, ast.Name):
                    take(one.id, one.id, getattr(module, one.id))
    for inner in ast.walk(tree):
        if isinstance(inner, ast.ClassDef):
            for line in inner.body:
                match line:
                    case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value)):
                        take(name, f"{inner.name}.{name}", value)
        elif isinstance(inner, ast.FunctionDef):
            arguments = inner.args
            last = arguments.args[len(arguments.args) - len(arguments.defaults) :]
            defaults = [*arguments.defaults, *arguments.kw_defaults]
            for argument, default in zip([*last, *arguments.kwonlyargs], defaults, strict=True):
                if isinstance(default, ast.Constant):
                    take(argument.arg, f"{inner.name}({argument.arg})", default.value)
    return found


def written(name: str, value: Any) -> str:
    """A number as the document writes it; the name has its unit."""
    if isinstance(value, tuple):
        return ", ".join(f"{one:g}" for one in value) + " s"
    if name.endswith("_MS"):
        return f"{value / 1000:g} s"
    if name.endswith("_S"):
        return f"{value:g} s"
    if name.endswith("_NBYTES"):
        return f"{value >> 20} MiB" if not value % (1 << 20) else f"{value >> 10} KiB"
    return f"{value:,}"
