"""Verdicts about the findings of the paper, on made-up results of several seeds whose truth is known."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray.errors import UserError
from ttmray.evaluation.results import COLUMNS, QUALITY
from ttmray.recipes.findings import Finding, Seed, all_findings, findings, read_seed

PROMPTS = 40
CELLS: dict[tuple[str, ...], str] = {
    ("heads", "v1", "-1"): "v1-low",
    ("heads", "v1", "1"): "v1",
    ("heads", "v2", "-1"): "v2-low",
    ("heads", "v2", "1"): "v2",
    ("chain", "text only"): "text",
    ("chain", "SFT (v1)"): "v1",
    ("chain", "control"): "control",
    ("chain", "+ expert iteration"): "expert",
    ("chain", "+ v1 to v2"): "crossed",
    ("chain", "Sub.1"): "crpo",
    ("factorial", "SFT-only v1 v1"): "v1",
    ("factorial", "SFT-only v1 v2"): "v1-in-v2",
    ("factorial", "SFT-only v2 v2"): "v2",
    ("factorial", "SFT-only v2 v1"): "v2-in-v1",
    ("factorial", "Chain-end v1 v1"): "expert",
    ("factorial", "Chain-end v1 v2"): "crossed",
    ("rewards", "instrumental"): "v1",
    ("rewards", "full mix"): "full",
}
LEVELS = {
    "text": (0.0, 0.0), "v1-low": (-0.5, -0.5), "v1": (0.3, 0.3), "v2-low": (-0.4, -0.3), "v2": (0.4, 0.3),
    "control": (0.3, 0.3), "expert": (0.8, 0.7), "crossed": (0.8, 0.7), "crpo": (0.8, 0.7),
    "v1-in-v2": (0.3, 0.3), "v2-in-v1": (-1.0, -1.0), "full": (0.3, 0.3),
}  # fmt: skip
"""Cell -> mean reward and mean estimated quality."""


def runs(
    count: int = 3, noise: float = 0.3, of_seed: float = 0.0, **levels: tuple[float, float] | tuple[float, float, float]
) -> list[Seed]:
    """Runs of the chain; the third level of a cell is its vocals."""
    some = []
    common = np.random.default_rng(0).normal(0, 0.3, PROMPTS)
    for number in range(count):
        rng = np.random.default_rng(100 + number)
        scores: dict[str, Any] = {}
        for cell, usual in LEVELS.items():
            level = (*levels.get(cell.replace("-", "_"), usual), 0.1)[:3]
            moved = rng.normal(0, of_seed)
            scores[cell] = {
                metric: dict(zip(map(str, range(PROMPTS)), values.tolist(), strict=True))
                for metric, values in zip(
                    ("reward", QUALITY, "vocal_ratio"),
                    [one + moved + common + rng.normal(0, noise, PROMPTS) for one in level],
                    strict=True,
                )
            }
        deviations = {(cell, metric): 0.5 for cell in scores for metric in ("reward", QUALITY, "vocal_ratio")}
        some.append(Seed(f"seed-{number}", scores, CELLS, deviations))
    return some


def verdicts(seeds: list[Seed]) -> dict[str, str]:
    return {one.letter: one.verdict for one in all_findings(seeds)}


def of(letter: str, seeds: list[Seed]) -> Finding:
    return next(one for one in all_findings(seeds) if one.letter == letter)


def test_what_is_so_in_every_seed_holds_and_what_is_not_does_not():
    expected = {"a": "holds", "b": "holds", "c": "holds", "d": "does not hold", "e": "holds", "f": "does not hold"}
    assert verdicts(runs(noise=0.05)) == expected


@pytest.mark.parametrize(
    ("letter", "changed", "verdict"),
    [
        ("a", {"v1": (-0.9, 0.3)}, "does not hold"),
        ("a", {"v1": (-0.5, 0.3)}, "cannot be told"),
        ("b", {"expert": (0.8, 0.3)}, "does not hold"),
        ("b", {"expert": (0.8, 0.0)}, "does not hold"),
        ("c", {"v1_in_v2": (-0.5, -0.5)}, "does not hold"),
        ("c", {"v2_in_v1": (0.4, 0.3)}, "does not hold"),
        ("d", {"full": (0.3, 0.3, 0.5)}, "holds"),
        ("e", {"crpo": (1.2, 0.7)}, "does not hold"),
        ("f", {"expert": (0.8, 0.1), "crossed": (0.8, 0.1), "crpo": (0.8, 0.1)}, "holds"),
    ],
)
def test_one_cell_that_is_otherwise_turns_the_verdict(letter, changed, verdict):
    seeds = runs(noise=0.05, **changed)
    if letter == "a" and verdict == "cannot be told":
        for seed in seeds:  # the same clips at both scores: no difference at all
            seed.scores["v1"]["reward"] = seed.scores["v1-low"]["reward"]  # type: ignore[index]
    assert verdicts(seeds)[letter] == verdict


def test_seeds_that_disagree_leave_it_open_whatever_the_number_of_prompts():
    steady, unsteady = of("b", runs(noise=0.1)), of("b", runs(noise=0.1, of_seed=0.5))
    assert (steady.verdict, unsteady.verdict) == ("holds", "cannot be told")
    widths = [effect.high - effect.low for effect in (steady.effects[0], unsteady.effects[0])]
    assert widths[1] > 5 * widths[0]


def test_rewards_that_rise_where_quality_falls_are_named():
    why = of("f", runs(noise=0.05, crpo=(1.5, 0.2))).why
    assert "CRPO: reward alone" in why
    assert "expert iteration against its control: both rise" in why


def test_missing_cells_are_said_and_nothing_is_concluded_from_them():
    bare = [Seed(seed.name, seed.scores, {}, seed.deviations) for seed in runs()]
    for one in all_findings(bare):
        assert one.verdict == "cannot be told"
        assert "have no" in one.why or "has no" in one.why


def write_run(root: Path, seed: Seed) -> None:
    """A run folder as the chain writes it, as far as it is read here."""
    tables: dict[str, dict[str, Any]] = {}
    for row, cell in seed.rows.items():
        if len(row) == 3:
            tables.setdefault(row[0], {}).setdefault(row[1], {})[row[2]] = cell
        else:
            tables.setdefault(row[0], {})[row[1]] = cell
    (root / "tables").mkdir(parents=True)
    (root / "tables/cells.json").write_text(json.dumps(tables))
    for cell, metrics in seed.scores.items():
        folder = root / f"tables/cells/{cell}/evaluation"
        folder.mkdir(parents=True)
        system = {"name": cell, "folder": "clips", "clips": PROMPTS, "prompts": PROMPTS, "metrics": {}}
        results = {"kind": "evaluation", "protocol": "micro/test", "bundle": "micro", "systems": [system]}
        (folder / "results.json").write_text(json.dumps(results))
        rows = [
            dict.fromkeys(COLUMNS)
            | {"system": cell, "prompt_id": prompt, "sample": 0, "status": "ok", "clap_score": 0.2}
            | {metric: values[prompt] for metric, values in metrics.items()}
            for prompt in metrics["reward"]
        ]
        schema = pa.schema([*COLUMNS.items(), (QUALITY, pa.float64()), ("vocal_ratio", pa.float64())])
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "clips.parquet")


def test_runs_are_read_and_everything_is_written(tmp_path, capsys):
    seeds = runs(2, noise=0.05)
    for seed in seeds:
        write_run(tmp_path / seed.name, seed)
    folders = [str(tmp_path / seed.name) for seed in seeds]
    read = read_seed(folders[0])
    assert read.rows == CELLS
    assert read.scores["expert"]["reward"] == seeds[0].scores["expert"]["reward"]
    assert findings(folders, out=str(tmp_path / "out")) == 0
    text = (tmp_path / "out/findings.md").read_text()
    assert "| (b) | Expert iteration beats its control" in text
    assert "2 seeds, 40 prompts" in text
    facts = json.loads((tmp_path / "out/findings.json").read_text())
    assert [one["letter"] for one in facts["findings"]] == list("abcdef")
    with open(tmp_path / "out/per_prompt.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    one = next(row for row in rows if (row["run"], row["row"], row["metric"]) == ("seed-1", "control", "reward"))
    assert float(one["value"]) == seeds[1].scores["control"]["reward"][one["prompt_id"]]
    with pytest.raises(UserError, match="is there twice"):
        findings([folders[0], folders[0]])
    with pytest.raises(UserError, match=r"cells.json is missing"):
        findings([str(tmp_path / "out")])


def test_one_seed_is_reported_as_one(tmp_path):
    write_run(tmp_path / "only", runs(1)[0])
    findings([str(tmp_path / "only")], out=str(tmp_path / "out"))
    assert "say nothing of other seeds" in (tmp_path / "out/findings.md").read_text()
