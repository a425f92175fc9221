"""Verdicts about the findings of the paper, on made-up results of several seeds whose truth is known."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray.errors import UserError
from ttmray.evaluation.results import COLUMNS, QUALITY
from ttmray.recipes.effects import Seed, effect, read_seed
from ttmray.recipes.findings import Finding, all_findings, findings
from ttmray.synth.faults import FLOOR

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
    ("expert-iteration", "unselected"): "unselected",
}
LEVELS = {
    "text": (0.0, 0.0), "v1-low": (-0.5, -0.5), "v1": (0.3, 0.3), "v2-low": (-0.4, -0.3), "v2": (0.4, 0.3),
    "control": (0.3, 0.3), "expert": (0.8, 0.7), "crossed": (0.8, 0.7), "crpo": (0.8, 0.7),
    "v1-in-v2": (0.3, 0.3), "v2-in-v1": (-1.0, -1.0), "full": (0.3, 0.3), "unselected": (0.7, 0.6),
}  # fmt: skip
"""Cell -> mean reward and mean estimated quality."""
MEASURED = ("reward", QUALITY, "vocal_ratio", "clap_score")
TEXTS = {str(i): ("slow jazz, no vocals", "a rock song with a female singer")[i % 2] for i in range(PROMPTS)}


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
            level = (*(*levels.get(cell.replace("-", "_"), usual), 0.1)[:3], 0.2)
            moved = rng.normal(0, of_seed)
            scores[cell] = {
                metric: dict(zip(map(str, range(PROMPTS)), values.tolist(), strict=True))
                for metric, values in zip(
                    MEASURED,
                    [one + moved + common + rng.normal(0, noise, PROMPTS) for one in level],
                    strict=True,
                )
            }
        deviations = {(cell, metric): 0.5 for cell in scores for metric in MEASURED}
        some.append(Seed(f"seed-{number}", scores, CELLS, deviations, TEXTS, learned=0.9))
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
    bare = [replace(seed, rows={}) for seed in runs()]
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
            | {"system": cell, "prompt_id": prompt, "sample": 0, "status": "ok", "prompt": seed.prompts[prompt]}
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
    with pytest.raises(UserError, match="hold the same results"):
        findings([folders[0], folders[0]])
    with pytest.raises(UserError, match=r"cells.json is missing"):
        findings([str(tmp_path / "out")])


def test_a_copy_under_another_name_is_no_other_seed(tmp_path):
    seed = runs(1)[0]
    write_run(tmp_path / "a/seed-0", seed)
    write_run(tmp_path / "b/seed-0", seed)
    with pytest.raises(UserError, match="a/seed-0 hold the same results"):
        findings([str(tmp_path / "a/seed-0"), str(tmp_path / "b/seed-0")])


def test_runs_with_other_prompts_are_not_paired(tmp_path):
    one, other = runs(2)
    write_run(tmp_path / "one", one)
    write_run(tmp_path / "other", replace(other, prompts={**other.prompts, "7": "another text"}))
    with pytest.raises(UserError, match="other prompts by the name 7"):
        findings([str(tmp_path / "one"), str(tmp_path / "other")])


def test_a_part_that_is_missing_anywhere_leaves_a_verdict_open():
    whole = runs(noise=0.05)
    for letter, cell, metric in (("b", "control", QUALITY), ("c", "crossed", "reward"), ("e", "crpo", "clap_score")):
        seeds = [replace(one, scores={**one.scores, cell: dict(one.scores[cell])}) for one in whole]
        del seeds[1].scores[cell][metric]  # type: ignore[attr-defined]
        assert of(letter, seeds).verdict == "cannot be told"


def test_preference_tuning_that_has_learned_nothing_shows_nothing():
    whole = runs(noise=0.05)
    assert of("e", whole).verdict == "holds"
    assert of("e", [whole[0], replace(whole[1], learned=0.5), whole[2]]).verdict == "cannot be told"


def test_preference_tuning_that_moves_the_score_of_its_pairs_adds_more_than_little():
    seeds = runs(noise=0.05)
    for seed in seeds:
        seed.scores["crpo"]["clap_score"] = {  # type: ignore[index]
            prompt: value + 0.4 for prompt, value in seed.scores["crossed"]["clap_score"].items()
        }
    assert of("e", seeds).verdict == "does not hold"


def test_vocals_are_told_on_prompts_that_ask_for_none():
    seeds = runs(noise=0.05)
    for seed in seeds:  # more voice, but only where it was asked for
        seed.scores["full"]["vocal_ratio"] = {  # type: ignore[index]
            prompt: value + (1.0 if "singer" in TEXTS[prompt] else 0.0)
            for prompt, value in seed.scores["v1"]["vocal_ratio"].items()
        }
    assert of("d", seeds).verdict == "does not hold"
    assert "20 prompts that ask for no voice" in of("d", seeds).why


def test_a_scale_of_its_own_moves_no_effect():
    seeds = runs(noise=0.1)
    scaled = {
        cell: metrics | {"reward": {prompt: 3 * value for prompt, value in metrics["reward"].items()}}
        for cell, metrics in seeds[1].scores.items()
    }
    wide = {at: size * (3 if at[1] == "reward" else 1) for at, size in seeds[1].deviations.items()}
    other = [seeds[0], replace(seeds[1], scores=scaled, deviations=wide), seeds[2]]
    before, after = of("b", seeds).effects[0], of("b", other).effects[0]
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high))
    assert after.raw > 1.5 * before.raw


def test_a_rise_of_quality_is_no_hacking_however_small_it_is():
    seeds = runs(noise=0.01, crpo=(1.5, 0.75))
    assert "CRPO: both rise" in of("f", seeds).why


def test_what_failed_is_the_worst_and_is_not_passed_over(tmp_path):
    seed = runs(1)[0]
    write_run(tmp_path / "run", seed)
    path = tmp_path / "run/tables/cells/crpo/evaluation/clips.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0] |= dict.fromkeys(MEASURED) | {"status": "rejected"}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    read = read_seed(str(tmp_path / "run"))
    assert read.failed["crpo"] == 1
    prompt = rows[0]["prompt_id"]
    lowest = min(value for cell in seed.scores.values() for value in cell["reward"].values())
    assert read.scores["crpo"]["reward"][prompt] == pytest.approx(lowest)
    assert read.scores["crpo"][QUALITY][prompt] == FLOOR
    change = effect([read], ("CRPO", ("chain", "Sub.1"), ("chain", "+ v1 to v2")), "reward")
    assert change is not None
    assert (change.prompts, change.failed) == (PROMPTS, 1)
    assert "1 clips failed" in str(change)


def test_one_seed_is_reported_as_one(tmp_path):
    write_run(tmp_path / "only", runs(1)[0])
    findings([str(tmp_path / "only")], out=str(tmp_path / "out"))
    assert "say nothing of other seeds" in (tmp_path / "out/findings.md").read_text()
