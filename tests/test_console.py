"""Texts of users are shown as they are, whatever brackets they hold."""

import sys

import pytest
from rich.table import Table

from ttmray.cli import main
from ttmray.console import console, errors, meter

NAMES = ["[x]", "[/x]", "[/]", "[red]", "[link=file:///etc]a", "song [/bold] [live", "\\[a]", ":smile:"]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_in_names_are_no_markup_anywhere(name, capsys):
    table = Table(name)
    table.add_row(name)
    console.print(f"of {name}", style="yellow")
    console.print(table)
    console.rule(f"step {name}")
    errors.print(f"of {name}")
    shown = capsys.readouterr()
    assert shown.out.count(name) == 4
    assert name in shown.err


@pytest.mark.parametrize("name", NAMES)
def test_an_error_shows_the_name_as_typed(name, capsys):
    assert main(["corpus", "verify", f"/nowhere/{name}"]) == 2
    assert f"/nowhere/{name}" in capsys.readouterr().err


def test_a_progress_bar_shows_notes_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr(type(console), "is_terminal", property(lambda self: True))
    monkeypatch.setattr(console, "_force_terminal", True, raising=False)
    with meter("clips [/x]", 2) as progress:
        progress.advance(1, "song [/bold]")
    assert sys.exc_info() == (None, None, None)
