"""The documentation leads somewhere: cited decisions exist, the index has them, links resolve."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from tests import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DECISIONS = ROOT / "docs" / "decisions"
CODE = ("engine", "control", "kernels", "adapters", "tools")
FOLDERS = (*CODE, "tests", "docs", "deploy", "examples")
TEXT = {".py", ".md", ".toml", ".yaml", ".js", ".html", ".css", ".sh", ".service", ""}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *DECISIONS.glob("*.md")]

# "decision 0008", "Decisions 0008 and 0046", also where a comment's line ends in between.
CITED = re.compile(r"\bdecisions?[\s#]+(\d{4}(?:(?:,|\s+and)[\s#]+\d{4})*)\b", re.I)
ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
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
