"""The first minutes of a new user, from an empty folder: docs/first-minutes.md.

    python benchmarks/first_minutes.py --output docs/first-minutes.md

Builds the wheel, installs it with its dependencies into an environment of its own, and runs what a newcomer would:
each command as it is typed, with its seconds and the end of what it prints. Needs a package index, and 7 GB of disk.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine
from transcript import neutral

REPO = Path(__file__).resolve().parents[1]
SHOWN = 4
"""Last lines of a command's output that are shown."""
SLOW = "A slow, sad ambient piece led by flute, no drums, instrumental"
SCORE = "ttmray score my-songs --csv my-scores.csv"
MISTAKE = "ttmray score-corpus --set input=my-song"
CODES = {SCORE: 3, MISTAKE: 2}
"""Command -> its exit code where that is not 0: some of the songs are broken."""
COMMANDS = (
    "ttmray --version",
    "ttmray config",
    "python -m ttmray.synth.songs my-songs",
    SCORE,
    f"ttmray generate --prompt '{SLOW}' --samples 4 --output runs/low --set sampler.score=-1.2",
    f"ttmray generate --prompt '{SLOW}' --samples 4 --output runs/high --set sampler.score=0.1",
    "ttmray score runs/low runs/high --csv runs/clips.csv",
    "ttmray score-corpus --config micro/corpus --plan-only",
    "ttmray score-corpus --config micro/corpus",
    "ttmray corpus ls runs/micro/corpus --status failed",
    "ttmray verify runs/micro/corpus",
    "ttmray score-corpus --config micro/corpus",
    "ttmray train-sft --config micro/stage1 --set model.init=$(ttmray weights where micro | grep backbone)",
    "ttmray status runs/micro/stage1",
    "ttmray checkpoint export runs/micro/stage1 --out my-model.safetensors",
    f"ttmray generate --prompt '{SLOW}' --checkpoint my-model.safetensors --output runs/mine --set sampler.score=0.1",
    MISTAKE,
    "ttmray demo",
)


def install(folder: Path, python: str) -> dict[str, float]:
    """Wheel, environment and packages in `folder`; command -> seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    seconds = {}

    def run(name: str, *command: str) -> None:
        seconds[name], code, said = _timed(list(command), folder, environment)
        if code:
            raise RuntimeError(f"{name} ends with {code}: {said[-3:]}")

    run("pip wheel", sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(REPO))
    run("python -m venv .venv", python, "-m", "venv", str(folder / ".venv"))
    (wheel,) = folder.glob("*.whl")
    pip = (str(folder / ".venv/bin/pip"), "install", "-q", "-c", str(REPO / "constraints.txt"), str(wheel))
    run(f"pip install -c constraints.txt {wheel.name}", *pip)
    return seconds


def _timed(command: list[str], folder: Path, environment: Any) -> tuple[float, int, list[str]]:
    """Seconds, exit code and lines of a command."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return time.perf_counter() - start, done.returncode, done.stdout.splitlines()


def main() -> int:
    """Make the page; returns 1 where a command did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of the new environment")
    typed = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    facts = machine()
    lines = [HEADER.format(**facts), "| installing | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {seconds:.0f} |" for name, seconds in install(folder, typed.python).items()]
    environment = {"PATH": f"{folder}/.venv/bin:/usr/bin:/bin", "HOME": str(folder / "home"), "LANG": "C.UTF-8"}
    (folder / "home").mkdir()
    lines += ["", "```text"]
    wrong, total = 0, 0.0
    for command in COMMANDS:
        seconds, code, said = _timed(["bash", "-c", command], folder, environment)
        wrong += code != CODES.get(command, 0)
        total += seconds
        shown = [neutral(line, folder).rstrip() for line in said[-SHOWN:]]
        more = ["..."] if len(said) > SHOWN else []
        lines += [f"$ {command}", *more, *shown, f"# {seconds:.1f} s{f', exit code {code}' if code else ''}", ""]
        print(*lines[-len(shown) - 3 :], sep="\n", flush=True)
    lines += ["```", "", f"All commands: {total / 60:.1f} minutes."]
    if typed.output is not None:
        typed.output.write_text("\n".join(lines) + "\n", "utf-8")
    return int(wrong > 0)


HEADER = """# The first minutes

From an empty folder with the wheel, each command as it is typed, the end of what it prints, and its seconds by the
clock, on {cpus} CPUs ({cpu}, {memory_gib:.0f} GiB) without a GPU. Made by `benchmarks/first_minutes.py`; rates and
times inside of the output are replaced by `T`, the folder by `...`. The last but one is a mistake, and what is
said of it.
"""

if __name__ == "__main__":
    sys.exit(main())
