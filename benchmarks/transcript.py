"""What every job of `jobs/` prints on its debug config where nobody watches a terminal: docs/console.md, and a check.

    python benchmarks/transcript.py --output docs/console.md

Each job runs once, smaller than its config by the `--set` that are shown, in a folder of its own, with stdout and
stderr in one file. A line that is not of ttmray's own console is foreign: it is marked, and the exit code is 1.
Paths, times and rates are replaced, so that two runs give the same file on one machine.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ttmray.console import OURS, Marked, console, errors

REPO = Path(__file__).resolve().parents[1]
FOREIGN = "!! "

SHORT = "--set steps=6 --set checkpoint.every=6 --set runtime.log_every=2"
PREPARE = {
    "score_corpus": ["-m ttmray.synth.songs runs/debug/songs"],
    "train_sft": [],
    "expert_iteration": ["-m ttmray checkpoint export runs/debug/stage1 --out runs/debug/stage1.safetensors"],
    "train_crpo": ["-m ttmray pairs runs/debug/stage2/expert/round-1/pool --out runs/debug/pairs"],
    "train_ranker": ["-m ttmray.synth.votes runs/debug/corpus runs/debug/votes.csv"],
    "evaluate": ["-m ttmray reference build demo runs/debug/corpus --bundle debug --store runs/debug/references"],
}
"""Job -> what the comments of its config ask for first."""
TINY_WORLD = (
    "data={cache: runs/micro-clips, seed: 0, clips: 64, stems: 4, seconds: 1.0, fresh_seed: 1, fresh_clips: 10, "
    "fresh_stems: 2, workers: 1}"
)
JOBS = {
    "score_corpus": "--config configs/debug/corpus.yaml --set runtime.workers=1",
    "train_sft": f"--config configs/debug/stage1.yaml {SHORT} --set samples.every=6 --set runtime.runner=ray "
    "--set runtime.workers=2",
    "expert_iteration": f"--config configs/debug/stage2.yaml {SHORT} --set polish.steps=2 --set pool.candidates=4",
    "train_crpo": f"--config configs/debug/stage3.yaml {SHORT}",
    "train_grpo": "--config configs/debug/grpo.yaml --set steps=2 --set updates=1 --set watch.steps=2",
    "train_ranker": "--config configs/debug/ranker.yaml --set head.max_epochs=5",
    "generate": "--config configs/debug/generate.yaml --set runtime.runner=ray",
    "evaluate": "--config configs/debug/evaluate.yaml",
    "ablate": "--config configs/debug/ablate.yaml --set heads=null --set factorial=null --set sweep=null "
    "--set 'contrasts={conditioning: [{label: text only, checkpoint: text}, {label: score 5, checkpoint: v1}]}' "
    "--set chain=[] --set stage1.steps=2",
    "reproduce": "--config configs/debug/reproduce.yaml --set stage1.steps=4 --set stage2.steps=4 --set stage3.steps=4 "
    "--set stage2.polish.steps=2 --set ranker.head.max_epochs=5",
    "compare_methods": "--config configs/debug/methods.yaml --set seeds=[0] "
    "--set 'methods={crpo: {train: {batch: 2}}}'",
    "demo": "--set output=runs/demo --set 'generate={sampler: {steps: 2}}' --set 'prompts=[slow piano]'",
    "train_micro": f"--config configs/micro/train.yaml --set parts=[text] --set '{TINY_WORLD}' "
    "--set 'text={steps: 6, batch: 4, warmup: 1, dim: 32, layers: 1, vocabulary: 300}' --set log_every=2",
}


WITHOUT_RAY = {
    "score_corpus": " --set runtime.runner=local",
    "generate": " --set runtime.runner=local",
    "train_sft": " --set runtime.runner=local --set runtime.workers=1",
    "demo": " --set 'corpus={runtime: {runner: local, workers: 0}}'",
}
"""What makes jobs run in this process that use Ray otherwise."""


def run_marked(words: Sequence[str]) -> None:
    """Run `jobs/x.py ...` or `-m module ...` in this process, with marks."""
    console.file, errors.file = Marked(sys.stdout), Marked(sys.stderr)  # type: ignore[assignment]
    module = words[0] == "-m"
    sys.argv = list(words[module:])
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(REPO / words[0]), run_name="__main__")


def transcript(words: Sequence[str], folder: Path) -> list[str]:
    """Lines that a command prints in `folder`, neutral; a foreign one begins with `FOREIGN`, the last has the exit code
    where it is not 0.

    Args:
        words: `jobs/x.py ...` or `-m module ...`.
    """
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", *words]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        text = output.read().decode(errors="replace")
    lines = list(_judged(text.replace("\r\n", "\n").split("\n"), folder))
    return lines if done.returncode == 0 else [*lines, f"(exit code {done.returncode})"]


def _judged(lines: Iterable[str], folder: Path) -> Iterator[str]:
    for line in lines:
        if line.startswith(OURS) and "\x1b" not in line:
            yield neutral(line.replace(OURS, ""), folder).rstrip()
        elif line:
            yield FOREIGN + neutral(line.replace(OURS, ""), folder).replace("\x1b", "\\x1b")


def neutral(line: str, folder: Path) -> str:
    """A line without what differs from run to run."""
    line = line.replace(str(folder.resolve()), "...").replace(str(REPO), "REPO")
    line = re.sub(r"\d+:\d\d:\d\d", "T", line)
    line = re.sub(
        r"[\d.]+(?:e[+-]?\d+)?(?= (?:samples/s|s\b|min\b|TFLOP/s|ms per|ms CPU))|(?<=so far: )[\d.]+", "T", line
    )
    return re.sub(r"[\d.]+(?=/s\b| hours in all)|(?<=MFU )[\d.]+|(?<=data wait )[\d.]+", "T", line)


def main() -> int:
    """Make the transcript; returns 1 where a line is foreign or a job failed."""
    if sys.argv[1:2] == ["--inside"]:
        run_marked(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--folder", type=Path, help="where the jobs run (default: a new one)")
    parser.add_argument("--local", action="store_true", help="without Ray, where a machine is too busy to start it")
    typed = parser.parse_args()
    folder = typed.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "configs").exists():
        (folder / "configs").symlink_to(REPO / "configs")
    sections, foreign = _sections(typed.output), 0
    for job in typed.jobs:
        for command in PREPARE.get(job, []):
            subprocess.run([sys.executable, *shlex.split(command)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        command = f"jobs/{job}.py {JOBS[job]}" + (WITHOUT_RAY.get(job, "") if typed.local else "")
        lines = transcript(shlex.split(command), folder)
        foreign += sum(line.startswith((FOREIGN, "(exit code")) for line in lines)
        before = [f"$ python {one}".replace("python -m ttmray ", "ttmray ") for one in PREPARE.get(job, [])]
        block = ["```text", *before, f"$ python {command}", *lines, "```"]
        sections[job] = "\n".join(["", f"## {job}", "", *block, ""])
        print(sections[job], flush=True)
        if typed.output is not None:
            typed.output.write_text(HEADER + "".join(sections[one] for one in JOBS if one in sections), "utf-8")
    print(f"{foreign} lines are not ours")
    return int(foreign > 0)


def _sections(output: Path | None) -> dict[str, str]:
    """Job -> its part of the file as it is: those that are not run again stay."""
    if output is None or not output.exists():
        return {}
    heads = "|".join(JOBS)  # what a job prints may have headings, too
    parts = re.split(rf"(?m)^(?=\n## (?:{heads})\n)", output.read_text("utf-8"))
    return {part.split("\n")[1].removeprefix("## "): part for part in parts[1:]}


HEADER = """# What jobs print

Every job of `jobs/` once, on its debug config made smaller, with stdout and stderr in a file: no line is a library's,
and there are no colour codes. Made by `benchmarks/transcript.py`; times, rates and paths are replaced by `T` and `...`.
"""

if __name__ == "__main__":
    sys.exit(main())
