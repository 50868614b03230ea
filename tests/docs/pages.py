"""The pages of docs/, as tables to compare with the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = re.compile(r"`([^`]*)`")
_HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)


def page(name: str) -> str:
    """Text of a page, by its path from the repository's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """What stands under a heading, down to the next one."""
    ends = [*_HEADING.finditer(text)]
    for heading, after in zip(ends, [*ends[1:], None], strict=True):
        if heading[2] == title:
            return text[heading.end() : after.start() if after else None]
    raise AssertionError(f"there is no heading {title!r}")


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of all tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    ruled = [i for i, cells in enumerate(found) if set("".join(cells)) == {"-"}]
    heads = {i - 1 for i in ruled} | set(ruled)
    return [cells for i, cells in enumerate(found) if i not in heads]


def code(cell: str) -> list[str]:
    """What is marked as code in a cell or a paragraph."""
    return _CODE.findall(cell)


def table(text: str) -> dict[str, list[str]]:
    """Rows by the name in their first cell; no name twice."""
    found = [(code(cells[0])[0], cells[1:]) for cells in rows(text)]
    by_name = dict(found)
    assert len(by_name) == len(found), "a name stands in two rows"
    return by_name


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
