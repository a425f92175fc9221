"""Templates of pages and summaries: what every page has, and that no value can become markup."""

import fnmatch
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from ttmray import pages
from ttmray.generation import play
from ttmray.ranker.report import summary
from ttmray.recipes.ablation_pages import page as ablations_page
from ttmray.storage import Folder

FOLDER = Path(pages.__file__).parent / "templates"
PARTS = {"base.html.j2", "macros.html.j2", "ablation_table.html.j2", "methods_table.html.j2", "notebook.html.j2"}
PAGES = sorted({path.name for path in FOLDER.glob("*.html.j2")} - PARTS)
HOSTILE = st.text(st.sampled_from("<>\"'&`|*_[](){}%#\\\n -ab"), max_size=30)


class Tags(HTMLParser):
    """Opening tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def played(folder: Path, prompt: str, name: str, message: str, note: str) -> Tags:
    row = {"name": name, "prompt_id": "0", "prompt": prompt, "file": None, "status": "failed", "message": message}
    described = {"fingerprint": "0" * 16, "note": note}
    return Tags(Path(play.write_page(Folder.at(str(folder)), [row], described)).read_text("utf-8"))


def test_there_are_pages_and_each_builds_on_the_base() -> None:
    assert len(PAGES) >= 6
    for name in PAGES:
        assert pages.source(name).startswith('{% extends "base.html.j2" %}'), name


def test_every_page_has_a_language_a_charset_a_viewport_and_both_themes(tmp_path: Path) -> None:
    played(tmp_path, "a", "b", "c", "d")
    for text in ((tmp_path / "index.html").read_text(), ablations_page([], [], ["p"], "")):
        assert text.startswith('<!doctype html>\n<html lang="en">')
        assert '<meta charset="utf-8">' in text
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
        assert '<meta name="color-scheme" content="light dark">' in text
        assert pages.source("style.css") in text


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_value_adds_a_tag_or_an_attribute_to_a_page(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, name: str, message: str, note: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    plain = played(folder, "a", "b", "c", "d")
    page = played(folder, prompt, name, message, note)
    assert page.tags == plain.tags
    assert all(value in page.text for value in (prompt, name, message, note))


@given(HOSTILE)
def test_a_text_in_markdown_is_one_line_whose_special_characters_are_all_escaped(value: str) -> None:
    line = pages.text(value)
    assert "\n" not in line
    plain, rest = "", line
    while rest:  # read it as Markdown does
        if rest[0] == "\\":
            plain, rest = plain + rest[1], rest[2:]
        else:
            assert rest[0] not in "`*_{}[]<>|#"
            plain, rest = plain + rest[0], rest[1:]
    assert plain == " ".join(value.split())


def test_a_bar_in_the_name_of_a_source_does_not_split_its_cell() -> None:
    part = {"accuracy": 0.5, "interval": (0.4, 0.6), "decided": 3}
    head = {"inputs": "audio", "best_epoch": 1, "note": "", "test": part | {"sources": {"my|club": part}}}
    text = summary({"run": {"split": "by vote"}, "heads": {"A1": head}, "leave_one_out": {}, "mcnemar": {}})
    assert r"| A1 | my\|club | 3 | 0.5000 | 0.400 to 0.600 |" in text.splitlines()


def test_a_value_that_a_template_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        pages.render("chain.md.j2", header=(), rows=(), totals="", note="")


@pytest.mark.parametrize(
    ("value", "shown"), [(-1.25, "−1.2"), (float("inf"), "∞"), (None, "–"), (float("nan"), "–"), (2.0, "2.0")]
)
def test_numbers_have_real_minus_signs_and_unknown_ones_a_dash(value: float | None, shown: str) -> None:
    assert pages.number(value, 1) == shown


def test_every_template_is_packaged() -> None:
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["ttmray"]
    for path in FOLDER.iterdir():
        assert any(fnmatch.fnmatch(f"templates/{path.name}", pattern) for pattern in patterns), path.name
