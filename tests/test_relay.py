"""What workers of Ray print: their consoles' lines come through as ours, the rest is there when one is lost."""

import io
import os

from ttmray.cluster import RAY_LEVEL, Relay, _Filter, _own_level, relay
from ttmray.console import OURS, Marked, console


def test_lines_of_a_workers_console_are_printed_and_others_kept_for_its_end(monkeypatch, capsys):
    worker = io.StringIO()
    monkeypatch.setattr(console, "_file", Marked(worker))
    console.print("step 1 [/x]", style="yellow")
    console.print("two\nlines")
    monkeypatch.setattr(console, "_file", None)
    printed = worker.getvalue().splitlines()
    assert printed == [f"{OURS}step 1 [/x]", f"{OURS}two", f"{OURS}lines"]
    relay = Relay()
    noise = [f"old {i}" for i in range(40)]
    relay({"pid": 7, "lines": [*noise, *printed, "", f"logging.cc: {RAY_LEVEL}", "Fatal: out of memory"]})
    relay({"pid": "autoscaler", "lines": ["Resized to 4 CPUs", "Error: no node type has 9 GPUs"]})
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["step 1 [/x]", "two", "lines"]
    assert shown.err.splitlines() == ["Error: no node type has 9 GPUs"]
    words = relay.last_words().splitlines()
    assert words[-2:] == ["Fatal: out of memory", "Resized to 4 CPUs"]
    assert len(words) == Relay.LINES


def test_what_ray_tries_again_is_kept_and_what_it_says_of_memory_is_printed():
    printed = []
    said = _Filter(lambda data, ignore_prefix: printed.extend(data["lines"]))
    again = "Task x failed. There are infinite retries remaining, so the task will be retried. Error: gone"
    level = f"logging.cc:303: Set ray log level from environment variable {RAY_LEVEL} to 3"
    for pid, *lines in (
        ("raylet", again),
        ("raylet", level),
        ("raylet", level, "2 workers killed due to memory pressure (OOM)"),
        (7, again),
    ):
        said({"pid": pid, "lines": lines, "is_err": False}, ignore_prefix=False)
    assert printed == ["2 workers killed due to memory pressure (OOM)", again]
    assert relay.last_words().splitlines()[-1] == again


def test_while_ray_starts_its_word_about_the_level_stays_off_the_console_and_no_other(capfd, monkeypatch):
    monkeypatch.delenv(RAY_LEVEL, raising=False)
    with _own_level():
        assert os.environ[RAY_LEVEL] == "fatal"
        os.write(2, f"logging.cc: {RAY_LEVEL} to 3\nreal trouble\n".encode())
    assert RAY_LEVEL not in os.environ
    assert capfd.readouterr().err == "real trouble\n"
    monkeypatch.setenv(RAY_LEVEL, "info")
    with _own_level():
        os.write(2, f"{RAY_LEVEL} is mine\n".encode())
    assert os.environ[RAY_LEVEL] == "info"
    assert capfd.readouterr().err == f"{RAY_LEVEL} is mine\n"
