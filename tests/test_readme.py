"""The README's example runs as it is printed."""

from __future__ import annotations

import re

from tests import ROOT

README = ROOT / "README.md"


def test_the_example_of_the_readme_runs() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert examples, "the README shows no Python"
    for example in examples:
        exec(compile(example, str(README), "exec"), {"__name__": "readme"})
