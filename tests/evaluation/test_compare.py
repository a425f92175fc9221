"""The paired table: equal to scipy's tests on published scores, corrected over all its cells, in every format."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from ttmray.errors import UserError
from ttmray.evaluation.compare import ClipScore, compare, comparisons, paired_table, plain, read_scores, render
from ttmray.generation import manifest
from ttmray.storage import Folder


@pytest.fixture
def finished_pair(tmp_path: Path) -> list[str]:
    """Two evaluations under one protocol whose CCS are of different judges."""
    for name in ("x", "y"):
        made = {"ccs": {"value": 0.5, "protocol": f"ccs-{name}"}}
        results = {"protocol": "p", "systems": [{"name": name, "metrics": made}]}
        rows = [
            {"system": name, "prompt_id": str(i), "status": "ok", "reward": i / 3, "clap_score": 0.1, "ccs": 0.5}
            for i in range(3)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "clips.parquet")
    return [str(tmp_path / name) for name in ("x", "y")]


def scores(**systems: list[float]) -> list[ClipScore]:
    return [ClipScore(name, str(i), "reward", v) for name, values in systems.items() for i, v in enumerate(values)]


def table(path: Path, rows: list[dict[str, object]]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_published_scores_of_24_prompts_give_the_numbers_of_scipy(data_dir):
    source = str(data_dir / "clips/clips.csv")
    cells, warnings = comparisons(read_scores(source)[0])
    assert warnings == []
    assert [(cell["metric"], cell["a"], cell["b"], cell["n"]) for cell in cells] == [
        ("clap_score", "baseline", "sub1", 24),
        ("reward", "baseline", "sub1", 24),
    ]
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    for cell, column in zip(cells, ("clap_score", "tunejury_reward"), strict=True):
        by_id = {(row["system"], row["prompt_id"]): float(row[column]) for row in rows}
        ids = sorted({one for _, one in by_id})
        a, b = (np.array([by_id[system, one] for one in ids]) for system in ("baseline", "sub1"))
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval()
        expected = {
            "mean_a": a.mean(),
            "mean_b": b.mean(),
            "difference": (a - b).mean(),
            "t": test.statistic,
            "p": test.pvalue,
            "low": interval.low,
            "high": interval.high,
            "p_wilcoxon": stats.wilcoxon(a, b).pvalue,
            "d_z": (a - b).mean() / (a - b).std(ddof=1),
            "wins": (a > b).sum(),
            "losses": (a < b).sum(),
            "p_mcnemar": stats.binomtest(int((a > b).sum()), len(a)).pvalue,
        }
        for name, value in expected.items():
            assert cell[name] == pytest.approx(value, rel=1e-9), name
        assert cell["boot_low"] < cell["difference"] < cell["boot_high"]
        assert cell["significant"]


def test_holm_covers_every_cell_of_the_table():
    rng = np.random.default_rng(0)
    made = {name: list(rng.normal(size=30) + shift) for name, shift in (("a", 0.0), ("b", 0.1), ("c", 0.9))}
    cells, _ = comparisons(scores(**made))
    assert [(cell["a"], cell["b"]) for cell in cells] == [("a", "b"), ("a", "c"), ("b", "c")]
    lowest = min(cells, key=lambda cell: cell["p"])
    assert lowest["p_holm"] == pytest.approx(3 * lowest["p"])
    (single,), _ = comparisons(scores(a=made["a"], c=made["c"]))
    assert single["p_holm"] == single["p"]
    alone, _ = comparisons(scores(**made), baseline="a")
    assert [(cell["a"], cell["b"]) for cell in alone] == [("b", "a"), ("c", "a")]


def test_samples_of_a_prompt_count_as_one_observation():
    once = scores(a=[0.0, 1.0, 2.0, 4.0], b=[0.5, 1.0, 3.0, 3.5])
    # the same means from two samples each; eight "observations" would halve p
    twice = [ClipScore(s.system, s.prompt_id, s.metric, s.value + d) for s in once for d in (-0.25, 0.25)]
    (one,), _ = comparisons(once)
    (two,), _ = comparisons(twice)
    assert two["n"] == 4
    for name in ("difference", "t", "p", "wins", "ties", "losses", "boot_low"):
        assert two[name] == pytest.approx(one[name], abs=1e-12)


def test_only_common_prompts_are_paired_and_the_others_are_said():
    a = [ClipScore("a", str(i), "reward", float(i)) for i in range(5)]
    b = [ClipScore("b", str(i), "reward", 1.5 * i) for i in range(2, 9)]
    (cell,), (warning,) = comparisons([*a, *b])
    assert cell["n"] == 3
    assert cell["mean_a"] == 3.0
    assert "6 prompts have a score on one side only" in warning
    cells, (warning,) = comparisons([a[0], b[0]])
    assert cells == []
    assert "0 common prompts" in warning


def test_a_system_against_its_copy_has_no_difference_and_plain_json():
    (cell,), _ = comparisons(scores(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0]))
    assert (cell["p"], cell["p_wilcoxon"], cell["p_mcnemar"], cell["ties"]) == (1.0, 1.0, 1.0, 3)
    assert cell["n_needed"] is None
    (constant,), _ = comparisons(scores(a=[1.0, 2.0, 3.0], b=[0.0, 1.0, 2.0]))
    assert constant["t"] is None  # infinite
    json.dumps([cell, constant], allow_nan=False)
    assert "+inf" in paired_table([constant])[1][0]
    (lower,), _ = comparisons(scores(a=[0.0, 1.0, 2.0], b=[1.0, 2.0, 3.0]))
    assert "-inf" in paired_table([lower])[1][0]


def test_a_baseline_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="no system 'z'"):
        comparisons(scores(a=[1.0, 2.0], b=[2.0, 3.0]), baseline="z")


def test_every_format_holds_the_same_cells(tmp_path, capsys):
    rows = [{"system": s, "prompt_id": i, "reward": v * (i + 1)} for s, v in (("a|b", 1), ("c_d", 2)) for i in range(4)]
    source = table(tmp_path / "scores.csv", rows)
    for format in ("markdown", "latex", "csv"):
        assert compare([source], format=format, out=str(tmp_path / format)) == 0
    assert r"| reward | a\|b | c_d | 4 |" in (tmp_path / "markdown").read_text()
    assert r"reward & a|b & c\_d & 4 &" in (tmp_path / "latex").read_text()
    header, line = csv.reader(io.StringIO((tmp_path / "csv").read_text()))
    assert line[: header.index("n") + 1] == ["reward", "a|b", "c_d", "4"]
    assert int(line[header.index("n needed")]) > 2
    capsys.readouterr()
    assert compare([source], format="csv") == 0
    assert capsys.readouterr().out == (tmp_path / "csv").read_text()  # nothing else: it can be piped
    assert compare([source]) == 0
    assert "Holm's correction" in capsys.readouterr().out


def test_the_terminal_gets_a_row_per_metric_in_100_columns_with_the_prompts_that_a_difference_needs(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [
        {"system": s, "prompt_id": i, **{m: -1 + d + 0.3 * rng.normal() for m in ("clap_score", "reward", "ccs")}}
        for s, d in (("untrained_baseline", 0.0), ("submission_1", 0.005), ("submission_2", 0.5))
        for i in range(100)
    ]
    source = table(tmp_path / "scores.csv", rows)
    cells, _ = comparisons(read_scores(source)[0])
    assert compare([source]) == 0
    printed, said = capsys.readouterr().out.split("scores by ")
    assert "n needed: prompts with which" in said
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line.startswith("A ")] == [
        "A untrained_baseline, B submission_1",
        "A untrained_baseline, B submission_2",
        "A submission_1, B submission_2",
    ]
    shown = [line.split() for line in lines if line.startswith(("clap_score", "reward", "ccs"))]
    assert len(shown) == len(cells) == 9
    expected = {(cell["metric"], f"{cell['difference']:+.4f}", str(cell["n_needed"])) for cell in cells}
    assert {(line[0], line[4], line[-1]) for line in shown} == expected
    assert sum("*" in line[7] for line in shown) == sum(cell["significant"] for cell in cells) == 6


def test_latex_takes_any_text():
    assert render(["a_b"], [["50 % & $x^2$ \\ {~}"]], "latex").splitlines()[4] == (
        r"50 \% \& \$x\textasciicircum{}2\$ \textbackslash{} \{\textasciitilde{}\} \\"
    )


def test_systems_of_two_tables_keep_their_names_apart(tmp_path):
    sources = []
    for name, factor in (("x", 1.0), ("y", 2.0)):
        rows = [{"system": "model", "id": i, "clap_score": factor * i, "reward": ""} for i in range(4)]
        sources.append(table(tmp_path / f"{name}.csv", rows))
    assert compare(sources, format="csv", out=str(tmp_path / "out.csv")) == 0
    assert "clap_score,model,y.csv/model,4" in (tmp_path / "out.csv").read_text()


def test_generation_runs_with_scores_can_be_compared_but_not_across_protocols(tmp_path):
    def run(name: str, protocol: str) -> str:
        folder = Folder.at(str(tmp_path / name))
        folder.write("run.json", b"{}")
        for i in range(3):
            row = dict.fromkeys(manifest.SCHEMA.names) | {"name": f"{i}", "prompt_id": f"{i}", "status": "ok"}
            manifest.commit(folder, row | {"reward_score": len(name) * i, "clap_score": 0.1, "protocol": protocol})
        return folder.uri

    assert compare([run("a", "p"), run("bb", "p")], format="csv", out=str(tmp_path / "t.csv")) == 0
    assert "reward,a,bb,3" in (tmp_path / "t.csv").read_text()
    with pytest.raises(UserError, match="several protocols"):
        compare([run("a", "p"), run("ccc", "q")])


def test_scores_of_two_judges_are_not_compared_and_a_table_without_status_is_named(finished_pair, tmp_path):
    with pytest.raises(UserError, match="the scores of ccs were made under several protocols"):
        compare(finished_pair)
    damaged = Path(finished_pair[0]) / "clips.parquet"
    pq.write_table(pq.read_table(damaged).drop_columns(["status"]), damaged)
    with pytest.raises(UserError, match="holds no evaluation"):
        compare(finished_pair)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "a", "reward": 1}, "row 1: no prompt_id"),
        ({"prompt_id": 1, "reward": "loud"}, "row 1: reward is 'loud', not a number"),
        ({"prompt_id": 1, "reward": "nan"}, "row 1: reward is 'nan'"),
        ({"prompt_id": 1, "loudness": 3}, "holds no scores of prompts"),
        ({"prompt_id": 1, "reward": 3}, "nothing to compare: systems t"),
    ],
)
def test_tables_without_usable_scores_are_refused_with_the_place(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        compare([table(tmp_path / "t.csv", [row])])


def test_what_json_cannot_say_is_none():
    assert plain({"a": (np.float64("nan"), np.int64(2), float("inf")), "b": None}) == {"a": [None, 2, None], "b": None}


def test_an_evaluation_is_named_by_its_folder_or_by_its_results(tmp_path):
    results = {"protocol": "p", "systems": [{"name": name, "metrics": {}} for name in "xy"]}
    rows = [
        {"system": name, "prompt_id": str(i), "status": "ok", "reward": i / 3 + (name == "x"), "clap_score": 0.1}
        for name in "xy"
        for i in range(3)
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    by_folder = read_scores(str(tmp_path))
    assert {score.system for score in by_folder[0]} == {"x", "y"}
    assert read_scores(str(tmp_path / "results.json")) == by_folder
    assert read_scores(str(tmp_path / "clips.parquet")) == by_folder
    assert compare([str(tmp_path / "results.json")]) == 0
