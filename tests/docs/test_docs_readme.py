"""The README's example is the one in examples/, its commands exist, and links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import typer
from kvstore.cli.app import app
from kvstore_engine.server.protocol import ChatBody, parse_body
from kvstore_engine.tokenizer import load_tokenizer

from tests.docs.pages import ROOT, code, fenced, page, section

README = page("README.md")
CHAT = page("examples/chat.json")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_example_is_that_of_examples() -> None:
    (snippet,) = fenced(README, "python")
    example = page("examples/put_get.py")
    assert snippet[snippet.index("arrays = ") :] == example[example.index("arrays = ") :]
    assert len([line for line in snippet.splitlines() if line]) < 15


def test_admin_commands() -> None:
    commands = set(typer.main.get_group(app).commands)
    (sentence,) = re.findall(
        r"lists the admin commands: (.*?)\.$", README, re.DOTALL | re.MULTILINE
    )
    assert set(code(sentence)) - {"--json"} == commands - {"up", "version"}


def test_the_chat_fills_blocks_and_ends_soon() -> None:
    body = parse_body(CHAT.encode(), ChatBody)
    assert body.max_tokens is not None
    assert body.max_tokens <= 32


@pytest.mark.weights
def test_the_chat_has_the_tokens_that_the_readme_says() -> None:
    tokenizer = load_tokenizer(json.loads(CHAT)["model"])
    text = tokenizer.apply_chat_template(json.loads(CHAT)["messages"], add_generation_prompt=True)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert f"[a chat of {count} tokens](examples/chat.json)" in README
    assert f'"dram":{count // 64 * 64},' in README


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        found = path.parent / target if target else path
        assert found.exists(), link
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link


def test_the_new_pages_are_linked() -> None:
    for name in ("configuration", "http-api", "metrics"):
        assert f"(docs/{name}.md)" in section(README, "More")
