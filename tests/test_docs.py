"""The documentation leads somewhere: decisions, links, files, classes and folders that it names exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DECISIONS = ROOT / "docs" / "decisions"
CODE = ("engine", "control", "kernels", "adapters", "tools")
FOLDERS = (*CODE, "tests", "docs", "deploy", "examples")
TEXT = {".py", ".md", ".toml", ".yaml", ".js", ".html", ".css", ".sh", ".service", ""}
STRUCTURE = ROOT / "docs" / "structure.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *DECISIONS.glob("*.md")]

# "decision 0008", "Decisions 0008 and 0046", also where a comment's line ends in between.
CITED = re.compile(r"\bdecisions?[\s#]+(\d{4}(?:(?:,|\s+and)[\s#]+\d{4})*)\b", re.I)
ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
# In backticks: a path from a root folder, and a class of the library, perhaps with a member.
FILE = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
CLASS = re.compile(r"`([A-Z][a-z]\w+)(?:\.(\w+))?`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def texts() -> dict[Path, str]:
    """Every source, test and page, by its path."""
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path: path.read_text(errors="replace") for path in paths if path.suffix in TEXT}


def anchors(page: Path) -> list[str]:
    """What a link may name in a page: its own anchors, and GitHub's of its headings."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return ANCHOR.findall(text) + slugs


def without_code(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def numbers() -> Counter[str]:
    """How often each decision's number is an anchor, on the pages by topic."""
    found = (ANCHOR.findall(page.read_text()) for page in DECISIONS.glob("*.md"))
    return Counter(anchor for page in found for anchor in page if anchor.isdigit())


def test_cited_decisions_exist() -> None:
    cited = {
        number: path.relative_to(ROOT).as_posix()
        for path, text in texts().items()
        for group in CITED.findall(text)
        for number in re.findall(r"\d{4}", group)
    }
    assert cited, "no file cites a decision: the pattern is out of date"
    there = numbers()
    missing = {number: path for number, path in cited.items() if number not in there}
    assert not missing


def test_the_index_names_every_decision_once() -> None:
    rows = re.findall(r"^\| \[(\d{4})\]\(", (DECISIONS / "README.md").read_text(), re.M)
    assert rows == sorted(numbers())
    assert set(numbers().values()) == {1}, "two decisions have one number"


def test_links_between_pages_resolve() -> None:
    broken = []
    for page in PAGES:
        for link in LINK.findall(without_code(page.read_text())):
            if re.match(r"[a-z]+:", link):  # to another site
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_files_and_folders_that_pages_name_exist() -> None:
    missing = []
    for page in PAGES:
        for name in FILE.findall(without_code(page.read_text())):
            path = ROOT / name
            if not (path.is_dir() if name.endswith("/") else path.exists()):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(missing)


@cache
def sources() -> dict[str, str]:
    """Map each class, or name that a module gives, to the text of the files that have it."""
    found: dict[str, str] = {}
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        for name in re.findall(r"^(?:class )?([A-Z]\w+)\b", text, re.M):
            found[name] = found.get(name, "") + text
    return found


@pytest.mark.parametrize("page", [STRUCTURE, CONTRIBUTING], ids=lambda page: page.name)
def test_classes_that_a_page_names_exist(page: Path) -> None:
    named = CLASS.findall(without_code(page.read_text()))
    assert named, "the page names no class: the pattern is out of date"
    wrong = [
        f"{name}.{member}" if member else name
        for name, member in named
        if name not in sources() or not re.search(rf"\b{member}\b", sources()[name])
    ]
    assert not wrong


def test_the_structure_has_a_sentence_for_each_folder() -> None:
    """A folder of tests that is named after a folder of the library needs none of its own."""
    rows = re.findall(r"^\| (`[^|]*`) \|", STRUCTURE.read_text(), re.M)
    named = {name for row in rows for name in FILE.findall(row)}
    code = [path.parent for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    tests = [path.parent for path in (ROOT / "tests").rglob("test_*.py")]
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in [*code, *tests]} - {"tests/"}
    parents = tuple(name for name in named if name.startswith("tests/"))
    missing = {
        name
        for name in folders - named
        if not (name.startswith(parents) and (ROOT / name.removeprefix("tests/")).is_dir())
    }
    assert not missing, "docs/structure.md says nothing of these"


def test_the_structure_draws_the_floors_that_are_held() -> None:
    tree = ast.parse((ROOT / "tests" / "test_floors.py").read_text())
    (floors,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    drawn = " ".join(STRUCTURE.read_text().split())
    for folder in ("engine", "engine.transports", "control", "adapters"):
        assert f"{folder} {floors[folder]}" in drawn
