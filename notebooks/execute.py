"""Run a notebook from start to end, and write down what it printed.

    python notebooks/execute.py notebooks/songs_to_music.ipynb --set UPDATES=4 --set COMPOSED=4
    python notebooks/execute.py notebooks/songs_to_music.ipynb --folder /tmp/here --transcript docs/notebook-run.md

Notebooks lie in the repository without outputs. What `--set` says stands in a cell of its own after the one that is
tagged `parameters`. The transcript is text: code, and beside it what came out, players and pictures in words.
"""

import argparse
import ast
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

PARAMETERS = "parameters"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def with_parameters(notebook: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values of some parameters.

    Raises:
        ValueError: it has no cell with the tag, or the cell sets no such name.
    """
    notebook = nbformat.from_dict(notebook)
    places = [i for i, cell in enumerate(notebook.cells) if PARAMETERS in cell.metadata.get("tags", ())]
    if not places:
        raise ValueError(f"no cell is tagged {PARAMETERS}")
    known = {
        name.id
        for node in ast.walk(ast.parse(notebook.cells[places[0]].source))
        if isinstance(node, ast.Assign)
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{unknown[0]} is no parameter; those are {', '.join(sorted(known))}")
    if values:
        source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(source))
    return notebook


def execute(path: Path, folder: Path, values: Mapping[str, Any], timeout_s: int = 3600) -> Any:
    """The notebook with its outputs, run in a folder.

    Raises:
        CellExecutionError: a cell failed; with its traceback.
    """
    notebook = with_parameters(nbformat.read(path, as_version=4), values)
    folder.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def printed(outputs: Sequence[Mapping[str, Any]]) -> str:
    """What a cell has shown, as text."""
    texts: list[str] = []
    for output in outputs:
        if output["output_type"] == "stream":
            text = str(output["text"])
            if texts and output.get("name") == "stdout" and not texts[-1].endswith("\n"):
                text = texts.pop() + text
            texts.append(text)
        elif output["output_type"] in ("display_data", "execute_result"):
            data = output["data"]
            text = str(data.get("text/plain", ""))
            if "<audio" in str(data.get("text/html", "")):
                text = "(a player)"
            texts.append(text if text.endswith("\n") else text + "\n")
    lines = [line.rstrip() for line in _ANSI.sub("", "".join(texts)).split("\n")]
    return "\n".join(line.rpartition("\r")[2] for line in lines).strip("\n")


def transcript(notebook: Any, folder: Path, title: str, about: str) -> str:
    """Markdown with the code of all cells and what they printed; the folder is written as `...`."""
    parts = [f"# {title}", about]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"^#", "##", cell.source, flags=re.MULTILINE))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if text := printed(cell.outputs):
            places = sorted({str(folder), str(folder.resolve())}, key=len, reverse=True)
            for place in places:
                text = text.replace(place, "...")
            parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the notebook runs (default: here)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="sets")
    parser.add_argument("--transcript", type=Path, metavar="FILE", help="write a page of text")
    arguments = parser.parse_args(argv)
    values = {name: ast.literal_eval(value) for name, _, value in (text.partition("=") for text in arguments.sets)}
    started = time.monotonic()
    try:
        done = execute(arguments.notebook, arguments.folder, values)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the kernel, which has ended
    seconds, cpu = time.monotonic() - started, used.ru_utime + used.ru_stime
    print(f"{arguments.notebook}: {seconds:.0f} s, {cpu:.0f} s of CPU time")
    if arguments.transcript:
        about = (
            f"`notebooks/{arguments.notebook.name}` as it ran in {seconds:.0f} s ({cpu:.0f} s of CPU time), written by "
            "`notebooks/execute.py`. Numbers change with the songs and the bundle."
        )
        page = transcript(done, arguments.folder, "The notebook, executed", about)
        arguments.transcript.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
