"""docs/extending.md works as it stands: its modules and commands are run in order, and what each recipe adds is there.

The corpus job runs in this process, without workers.
"""

import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from safetensors import safe_open

from ttmray import tables
from ttmray.cli import main
from ttmray.errors import UserError
from ttmray.generation.filter import FilterConfig, read_pool, select
from ttmray.models import score_heads
from ttmray.models.backbone_weights import load_backbone

REPO = Path(__file__).resolve().parents[1]
SECTIONS = re.split(r"^## ", (REPO / "docs/extending.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
FENCED = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(line: str) -> None:
    """A command of the document, in this process."""
    words, before = shlex.split(line), signal.getsignal(signal.SIGTERM)
    if words[1] == "score-corpus":  # cheaper here; that runners agree is tested elsewhere
        words += ["--set", "runtime.runner=local", "--set", "runtime.workers=0"]
    try:
        if words[0] == "ttmray":
            code = main(words[1:])
        else:
            assert words[0] == "python", f"nobody knows how to run: {line}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words[1:])
                try:
                    runpy.run_path(words[1], run_name="__main__")
                    code = 0
                except SystemExit as end:
                    code = int(end.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 0, line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which all recipes were run, with what they printed."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "configs").symlink_to(REPO / "configs")
    (folder / "my-songs").mkdir()
    time = np.arange(int(10.2 * 44100)) / 44100
    for i in range(8):
        tone = 0.3 * np.sin(2 * np.pi * (110 + 30 * i) * time) * (1 + np.sin(2 * np.pi * 3 * time)) / 2
        soundfile.write(folder / f"my-songs/song{i}.flac", np.stack([tone, tone[::-1]], axis=1), 44100)
    captions = "".join(f"song{i}.flac,a slow tone of number {i}\n" for i in range(8))
    (folder / "my-songs/captions.csv").write_text("path,caption\n" + captions)
    (folder / "my-prompts.yaml").write_text("- {id: a, prompt: a calm piano piece}\n- {id: b, prompt: loud drums}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", f"{folder}:{REPO}")  # of workers
        patch.setitem(tables.READERS, ".none", lambda text: [])  # so that the table is as before afterwards
        readers = dict(tables.READERS)
        try:
            for section in SECTIONS:
                for kind, block in FENCED.findall(section):
                    if kind == "python":
                        name = block.split("\n", 1)[0].removeprefix("# ")
                        (folder / name).write_text(block)
                        continue
                    for line in block.splitlines():
                        run(line)
            yield folder
        finally:
            for suffix in tables.READERS.keys() - readers.keys():
                del tables.READERS[suffix]
            for head in [name for name in score_heads.OWN if name.startswith("residual_head:")]:
                del score_heads.OWN[head]


def an_encoder(folder: Path) -> None:
    rows = pq.read_table(folder / "runs/corpus/index.parquet").to_pylist()
    clips = [row for row in rows if row["status"] == "ok"]
    assert len(clips) == 8
    for row in clips:  # tones of 110 to 320 Hz, with sidebands of 3 Hz
        high = 110 + 30 * int(row["track_id"][-1]) > 200
        assert (row["brightness"] > 0.5) == high


def a_score_head(folder: Path) -> None:
    file = folder / "runs/stage1.safetensors"
    model = load_backbone(str(file))
    assert model.config.head == "residual_head:both_ways"
    own = score_heads.OWN.pop("residual_head:both_ways")  # as in a process whose config does not name it
    try:
        with pytest.raises(UserError, match="unknown head 'residual_head:both_ways'"):
            load_backbone(str(file))
    finally:
        score_heads.OWN["residual_head:both_ways"] = own
    with safe_open(file, "pt") as weights:
        assert sum(name.startswith("score_embed.") for name in weights.keys()) == 5  # noqa: SIM118
        assert weights.get_tensor("score_embed.mlp.2.weight").abs().max() > 0  # it has learned


def a_selection_rule(folder: Path) -> None:
    table, _ = read_pool("runs/pool")
    rows = [row for row in table.to_pylist() if row["status"] == "ok" and row["silence"] <= 0.5]
    expected = [row["key"] for row in sorted(rows, key=lambda row: (row["lufs"], row["key"]))[:2]]
    assert (folder / "runs/quiet/kept.txt").read_text().split() == expected
    with pytest.raises(UserError, match="rule: quiet_rule:lost cannot be imported"):
        select(table, FilterConfig(rule="quiet_rule:lost", count=1, max_clipping=None), {})


def an_input_format(folder: Path) -> None:
    assert {path.stem for path in (folder / "runs/clips").rglob("*.wav")} == {"a", "b"}
    (folder / "bad.yaml").write_text("- {id: a\n")
    with pytest.raises(UserError, match=r"bad\.yaml cannot be read"):
        tables.read_table("bad.yaml", ())


def a_metric(folder: Path) -> None:
    results = json.loads((folder / "runs/evaluation/results.json").read_text())
    loudness = pq.read_table(folder / "runs/evaluation/clips.parquet")["lufs"].to_numpy()
    (system,) = results["systems"]
    assert system["metrics"]["loudness_range"]["value"] == pytest.approx(np.ptp(loudness))


def a_job(folder: Path) -> None:
    rows = pq.read_table(folder / "runs/corpus/index.parquet").to_pylist()
    best = sorted((row for row in rows if row["brightness"] is not None), key=lambda row: -row["brightness"])[:2]
    assert (folder / "runs/brightest/keys.txt").read_text().split() == [row["key"] for row in best]
    command = [sys.executable, "brightest.py", "corpus=runs/corpus", "count=3", "output=runs/brightest"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "belongs to another run" in done.stderr


CHECKS: dict[str, Callable[[Path], None]] = {
    "An encoder with a score column": an_encoder,
    "A score head": a_score_head,
    "A selection rule": a_selection_rule,
    "An input format": an_input_format,
    "A metric": a_metric,
    "A job": a_job,
}


def test_every_recipe_is_checked() -> None:
    assert [section.split("\n", 1)[0] for section in SECTIONS] == list(CHECKS)
    for section in SECTIONS:
        assert {kind for kind, _ in FENCED.findall(section)} == {"python", "sh"}


@pytest.mark.parametrize("recipe", CHECKS)
def test_the_recipe_adds_what_it_says(recipe: str, place: Path) -> None:
    CHECKS[recipe](place)
