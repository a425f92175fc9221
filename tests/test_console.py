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


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """What a notebook shows, in this process: one entry per output, as it is in the end."""
    pytest.importorskip("IPython")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    outputs: dict[str, str] = {}

    class Publisher(DisplayPublisher):
        def publish(self, data, metadata=None, *, transient=None, update=False, **_):
            name = (transient or {}).get("display_id") or str(len(outputs))
            assert update == (name in outputs)
            outputs[name] = data["text/plain"]

    shell = InteractiveShell.instance()
    monkeypatch.setattr(shell, "display_pub", Publisher(shell=shell))
    monkeypatch.setattr(console, "is_jupyter", True)
    yield outputs
    InteractiveShell.clear_instance()


def test_progress_in_a_notebook_is_one_line_that_ends_with_all(notebook, capsys):
    with meter("clips [/x]", 20) as progress:
        for _ in range(20):
            progress.advance(1, "1 failed")
    (line,) = notebook.values()
    assert line.startswith("clips [/x]: 20/20, ")
    assert line.endswith(", 1 failed")
    assert capsys.readouterr().out == ""
