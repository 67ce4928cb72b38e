"""What a run of the tests ends with: what was skipped, how often, and what would change that."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pytest

    from tests import needs
else:
    import needs  # beside this file: `pythonpath` in pyproject.toml

MOST_REASONS = 8
WIDTH = 110


def summary(reasons: Iterable[str], packages: Sequence[str]) -> Iterator[str]:
    """Yield a line for each reason, the most frequent first, and the command that installs.

    Reasons are alike up to their first colon or semicolon: behind it is what differs from machine to
    machine, and the fix. `packages` are those missing here, of which a reason may be one.
    """
    counts: Counter[str] = Counter()
    texts: dict[str, str] = {}
    fixable = 0
    for reason in reasons:
        alike = re.split("[:;]", reason)[0]
        counts[alike] += 1
        texts.setdefault(alike, " ".join(reason.split()))
        fixable += "apt-get install" in reason
    shown = counts.most_common(MOST_REASONS)
    for alike, count in shown:
        text = texts[alike]
        yield f"{count:5} {text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}"
    if len(counts) > len(shown):
        rest = sum(counts.values()) - sum(count for _, count in shown)
        yield f"{rest:5} for {len(counts) - len(shown)} other reasons; all of them: -rs"
    if fixable and packages:
        yield f"`make tools` installs what {fixable} of them need: {' '.join(packages)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it; where tests run side by side, in the process that has all their reports."""
    reports: list[Any] = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    reasons = [
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in reports
        if isinstance(report.longrepr, tuple | list)
    ]
    terminalreporter.section("skipped", sep="-")
    for line in summary(reasons, needs.missing_packages()):
        terminalreporter.write_line(line)
