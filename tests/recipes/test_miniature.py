"""The paper in miniature: what its config plans, and a reduced run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ttmray.config import load_config
from ttmray.models.bundle import open_bundle
from ttmray.recipes.effects import read_seed
from ttmray.recipes.findings import findings
from ttmray.recipes.reproduce import ReproduceConfig, build_steps, reproduce

REPO = Path(__file__).resolve().parents[2]
CONFIG = REPO / "configs/micro/reproduce.yaml"
REDUCED = (
    "world.pieces=56", "world.prompts=4", "corpus.splits={validation: 10, test: 10}", "corpus.runtime.workers=1",
    "votes.count=300", "ranker.head={widths: [8], max_epochs: 2}", "ranker.split={by: pair}",
    "trunk.steps=2", "trunk.validation.clips=0",
    "stage1.steps=4", "stage1.validation.clips=0", "stage1.checkpoint.every=2", "weights=raw",
    "pool.prompt_count=4", "pool.candidates=2", "pool.sampler.steps=2",
    "pool.max_clipping=1.0", "pool.silence_dbfs=-200",
    "stage2.steps=2", "stage2.polish.steps=1", "stage2.validation.clips=0",
    "stage2.filter={share: 0.5, max_silence: null, max_clipping: null, max_similarity: null}",
    "pairs_pool.prompt_count=4", "pairs.count=4", "stage3.steps=2", "stage3.gradients_every=0",
    "tables.generate.sampler.steps=2", "tables.evaluate.resamples=10", "tables.heads.scores=[-1.5, 0.5]",
    "tables.sweep.checkpoints={SFT-only: {checkpoint: stage1}}",
)  # fmt: skip
"""Real models and real jobs, few songs and updates: nothing that they make means anything."""
PROGRAM = """
import sys
from ttmray.config import load_config
from ttmray.recipes.reproduce import ReproduceConfig, reproduce
sys.exit(reproduce(load_config(ReproduceConfig, sys.argv[1], sys.argv[2:])))
"""


def miniature(output: Path | str, *sets: str) -> ReproduceConfig:
    return load_config(ReproduceConfig, str(CONFIG), [f"output={output}", *sets])


def test_one_seed_moves_everything_but_the_prompts(tmp_path):
    one, two = ({step.name: step.config for step in build_steps(miniature(tmp_path, f"seed={s}"))} for s in (1, 2))
    world: Any = one["world"]
    assert (world.seed, two["world"].seed, world.prompt_seed) == (1001, 1002, two["world"].prompt_seed)
    assert one["votes"].seed == 1
    assert one["ranker"].seed == 1
    for name in ("trunk", "stage1", "stage2", "control", "unselected", "stage3"):
        assert (one[name].data.seed, one[name].model.seed) == (1, 1), name
    assert (one["pool"].seed, one["pairs_pool"].seed, two["pool"].seed) == (1, 2, 2)
    assert one["tables"].generate["seed"] == 1
    assert one["tables"].stage1["data"]["seed"] == 1
    own = {step.name: step.config for step in build_steps(miniature(tmp_path, "seed=1", "ranker.seed=9"))}
    assert (own["ranker"].seed, own["pool"].seed) == (9, 1)


def test_all_heads_start_from_the_same_trunk_without_a_score(tmp_path):
    steps = {step.name: step for step in build_steps(miniature(tmp_path))}
    trunk, stage1, tables = (steps[name].config for name in ("trunk", "stage1", "tables"))
    assert (trunk.model.head, trunk.data.sources[0].score_column) == ("none", None)
    assert trunk.model.init == str(open_bundle("micro").backbone_file())
    weights = f"{tmp_path}/trunk/weights.safetensors"
    assert (stage1.model.head, stage1.model.init) == ("v1", weights)
    assert tables.stage1["model"]["init"] == weights
    assert tables.checkpoints["v2"].train == {"model": {"head": "v2"}}
    assert stage1.data.sources[0].score_column == "ranker/instrumental_reward_score"
    assert tables.checkpoints["full-mix"].train == {"data": {"sources": [{"score_column": "ranker/reward_score"}]}}
    assert tables.checkpoints["stage2"].path.startswith(f"{tmp_path}/stage2/expert/")
    assert steps["corpus"].config.input == f"{tmp_path}/world/songs"
    assert steps["pool"].config.held_out == tables.prompts == f"{tmp_path}/world/prompts.csv"
    assert steps["tables"].after[-5:] == ("stage1", "stage2", "control", "unselected", "stage3")


def start(output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, str(CONFIG), f"output={output}", *REDUCED]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_reduced_miniature_that_is_killed_goes_on_to_its_findings(tmp_path, capsys):
    output = tmp_path / "seed-0"
    for sign in ("world/rows/00000.json", "stage1/checkpoints", "tables/cells"):
        driver = start(output)
        while driver.poll() is None and not (output / sign).exists():
            time.sleep(0.05)
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        assert (output / sign).exists()
    config = miniature(output, *REDUCED)
    assert reproduce(config) == 0
    records = {path.stem: json.loads(path.read_text()) for path in (output / "steps").iterdir()}
    assert all(record["done"] for record in records.values())
    assert sum(record["launches"] for record in records.values()) > len(records)
    truth = {row["key"]: row["quality"] for row in pq.read_table(output / "world/world.parquet").to_pylist()}
    assert len(truth) == 56
    seed = read_seed(str(output))
    assert all("estimated_quality" in metrics for metrics in seed.scores.values())
    for name in ("heads", "chain", "factorial", "sweep"):
        assert "Est. quality" in (output / f"tables/tables/{name}.md").read_text()
    assert findings([str(output)], out=str(tmp_path / "findings")) == 0
    text = (tmp_path / "findings/findings.md").read_text()
    assert all(f"| ({letter}) |" in text for letter in "abcdef")
    capsys.readouterr()
    assert reproduce(config) == 0
    assert "nothing to do: all 15 steps are done" in capsys.readouterr().out
