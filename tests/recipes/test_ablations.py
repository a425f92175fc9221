"""The ablation job: marks and figures of its tables, what it plans, and real runs that stop and go on."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.torch import save_file
from scipy import stats

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import EXIT_BAD_INPUT, UserError
from ttmray.evaluation.reference import build_reference
from ttmray.models.backbone_weights import METADATA, debug_backbone
from ttmray.models.score_heads import Head
from ttmray.recipes.ablation_pages import page, render_table
from ttmray.recipes.ablation_tables import (
    DAGGER,
    TIE,
    Cell,
    chain_table,
    contrast_table,
    factorial_table,
    head_table,
    sweep_table,
)
from ttmray.recipes.ablations import AblateConfig, AblationPlan, ablate
from ttmray.recipes.published import CHAIN, FACTORIAL, SWEEP, Published
from ttmray.recipes.reproduce import ReproduceConfig, build_steps
from ttmray.recipes.sweep import readings, sweep_notes
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[2]
DEBUG = REPO / "configs/debug/ablate.yaml"
RNG = np.random.default_rng(3)
NOISE = RNG.normal(0, 0.1, 40)
NOISE -= NOISE.mean()
"""Of prompts, common to all systems."""


def cell(reward: float, clap: float = 0.2, fad: float | None = 0.5, spread: float = 0.02, seed: int = 0) -> Cell:
    """A system with a mean reward and CLAP score over 40 prompts."""
    own = np.random.default_rng(seed).normal(0, spread, (2, 40))
    own -= own.mean(axis=1, keepdims=True)
    rewards, claps = reward + NOISE + own[0], clap + NOISE / 10 + own[1] / 10
    scores = {
        "reward": {str(i): float(value) for i, value in enumerate(rewards)},
        "clap_score": {str(i): float(value) for i, value in enumerate(claps)},
    }
    ends = (None, None) if fad is None else (fad - 0.01, fad + 0.01)
    return Cell((fad, *ends), scores, {"reward": rewards, "clap_score": claps}, "test protocol")


def marks(table: Any, metric: str) -> list[str]:
    return [values[metric].mark for _, values in table.rows]


def test_a_dagger_is_a_one_sided_gain_over_the_row_before_that_is_no_baseline():
    rows = {
        "baseline": cell(-1.0, 0.0),
        "first": cell(0.0, seed=1),
        "better": cell(0.5, seed=2),
        "worse": cell(0.1, 0.3, seed=3),
        "Sub.1": cell(0.1, 0.3, seed=4),
    }
    table = chain_table(rows, ["baseline"], CHAIN)
    assert marks(table, "reward") == ["", "", DAGGER, "", ""]
    assert marks(table, "clap_score") == ["", "", "", DAGGER, ""]
    assert marks(chain_table(rows, [], CHAIN), "reward")[1] == DAGGER
    for pair in table.pairs:
        names = list(rows)
        assert names.index(pair["a"]) == names.index(pair["b"]) + 1
    assert len(table.pairs) == 6


def test_the_chain_shows_the_papers_figures_of_the_cells_that_it_shares_with_the_factorial():
    config = load_config(AblateConfig, str(REPO / "configs/paper/ablate.yaml"))
    assert [row.label for row in config.chain if not row.baseline] == list(CHAIN)
    table = chain_table({row.label: cell(0.0, seed=i) for i, row in enumerate(config.chain)}, ["baseline"], CHAIN)
    lines = [line for line in render_table(table, "markdown").splitlines() if line.startswith("|")]
    assert [[part.strip() for part in line.split("|")[-4:-1]] for line in lines[2:8]] == [
        ["", "", ""],
        ["", "", "≈0.028"],
        ["", "", "0.524"],
        ["≈0.427", "≈0.283", "0.535"],
        ["0.4238", "0.285", "0.533"],
        ["0.4370", "0.300", "0.550"],
    ]


def test_daggers_and_ties_are_those_of_scipy():
    for seed in range(12):
        a, b = cell(0.0, seed=seed), cell(0.006, seed=seed + 100)
        x, y = (np.array(list(one.scores["reward"].values())) for one in (a, b))
        gain = stats.ttest_rel(y, x, alternative="greater").pvalue < 0.05
        tied = stats.ttest_rel(y, x).pvalue >= 0.05
        assert marks(chain_table({"a": a, "b": b}, [], {}), "reward")[1] == (DAGGER if gain else "")
        keys = ("Hybrid", "", "Sub.1"), ("Chain-end", "v1", "v1")
        table = factorial_table({keys[1]: a, keys[0]: b}, keys[0], FACTORIAL)
        assert marks(table, "reward") == [TIE if tied else "", ""]


def test_cells_that_lost_prompts_are_compared_on_the_common_ones_and_the_table_says_so():
    whole, lost = cell(0.0), cell(1.0, seed=1)
    fewer = {metric: dict(list(scores.items())[5:]) for metric, scores in lost.scores.items()}
    table = contrast_table("rewards", {"a": whole, "b": Cell(lost.fad, fewer, lost.clips)}, {})
    assert [pair["n"] for pair in table.pairs] == [35, 35]
    assert any("5 prompts have a score on one side only" in note for note in table.notes)


def test_score_r_and_delta_out_follow_their_definitions():
    scores = (-0.5, 0.5, 1.5)
    steered = {s: cell(0.3 * s, fad=0.4, seed=i) for i, s in enumerate(scores)}
    table = head_table({"v2": steered}, {"none": cell(0.0, fad=0.44)}, 1.5, (-0.5, 1.5))
    (_, alone), (_, head) = table.rows
    inputs = np.repeat(scores, 40)
    outputs = np.concatenate([steered[s].clips["reward"] for s in scores])
    assert head["score_r"].value == pytest.approx(stats.pearsonr(inputs, outputs).statistic, abs=1e-12)
    assert head["delta_out"].value == pytest.approx(0.6, abs=1e-12)
    assert head["delta_out"].low < 0.6 < head["delta_out"].high
    assert (alone["score_r"].value, alone["delta_out"].value) == (None, None)
    assert (alone["fad"].value, head["fad"].value) == (0.44, 0.4)


def test_the_interval_of_score_r_is_over_prompts_not_over_clips():
    scores, rng = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0), np.random.default_rng(2)
    levels = rng.normal(0, 0.5, 40)
    steered = {}
    for s in scores:
        once = levels + 0.15 * s + rng.normal(0, 0.2, 40)
        steered[s] = Cell(
            (0.4, None, None), {"reward": dict(zip(map(str, range(40)), once, strict=True))}, {"reward": once}
        )
    ((_, row),) = head_table({"v2": steered}, {}, 1.5, (-0.5, 1.5)).rows
    twice = {
        s: Cell(
            c.fad,
            c.scores,
            {"reward": np.repeat(c.clips["reward"], 2)},
            "",
            0,
            {"reward": np.repeat(list(c.scores["reward"]), 2).tolist()},
        )
        for s, c in steered.items()
    }
    ((_, again),) = head_table({"v2": twice}, {}, 1.5, (-0.5, 1.5)).rows
    x = np.repeat(scores, 40)
    fisher = stats.pearsonr(x, np.concatenate([c.clips["reward"] for c in steered.values()])).confidence_interval()
    width = row["score_r"].high - row["score_r"].low
    assert fisher.high - fisher.low > 1.4 * width > 0
    # two samples of a prompt that say the same say it once
    assert (again["score_r"].low, again["score_r"].high) == pytest.approx((row["score_r"].low, row["score_r"].high))
    assert again["score_r"].value == pytest.approx(row["score_r"].value)


def test_the_best_of_every_column_is_bold_and_the_papers_figures_have_columns_of_their_own():
    rows = {"SFT": cell(0.1, 0.1, 0.3), "Sub.1": cell(0.5, 0.3, 0.4, seed=1)}
    table = chain_table(rows, [], CHAIN)
    lines = [line for line in render_table(table, "markdown").splitlines() if line.startswith("|")]
    header, sft, sub = ([part.strip() for part in lines[i].split("|")[1:-1]] for i in (0, 2, 3))
    assert header[-3:] == ["paper: FAD-CLAP", "paper: CLAP score", "paper: Reward"]
    assert sft[2].startswith("**0.3000** [0.2900, 0.3100]")
    assert "**" not in sft[3] + sft[4] + sub[2]
    assert sub[3].startswith(f"**0.3000**{DAGGER} [")
    assert (sft[-3:], sub[-3:]) == (["", "", ""], ["0.4238", "0.285", "0.533"])
    latex = render_table(table, "latex")
    assert r"\textbf{0.3000}$^{\dagger}$" in latex
    assert latex.count(r"\\") == 3
    assert "<b>0.3000</b>†" in render_table(table, "html")
    assert "arXiv" in render_table(table, "markdown")
    assert "arXiv" not in render_table(contrast_table("x", rows, {}), "markdown")


def test_tables_of_untrained_models_mark_nothing_and_say_so_in_every_format():
    rows = {"SFT": cell(0.1, 0.1, 0.3), "Sub.1": cell(0.5, 0.3, 0.4, seed=1)}
    table = chain_table(rows, [], CHAIN).unmarked("These numbers <mean> nothing.")
    assert not any(pair["significant"] for pair in table.pairs)
    for format in ("markdown", "latex", "csv", "html"):
        text = render_table(table, format)
        assert "nothing." in text
        assert "nothing is marked" in text or format in ("latex", "csv")
        rest = text.replace(f"{DAGGER}: better", "").replace(r"\end{tabular}", "")  # the note that says what one is
        assert not any(mark in rest for mark in (DAGGER, "**", "textbf", "dagger", "<b>", TIE)), (format, rest)
    for row in csv.DictReader(io.StringIO(render_table(table, "csv"))):
        assert row["note"] == "These numbers <mean> nothing."


def test_the_interval_of_a_mean_is_that_of_the_evaluation():
    plain = cell(0.1)
    values = np.array(list(plain.scores["reward"].values()))
    half = stats.t.ppf(0.975, 39) * values.std(ddof=1) / np.sqrt(40)
    (_, row), _ = contrast_table("x", {"a": plain, "b": cell(0.2)}, {}).rows
    assert (row["reward"].low, row["reward"].high) == pytest.approx((values.mean() - half, values.mean() + half))
    crossed = replace(plain, ends={"reward": (-0.4, 0.6)})
    (_, row), _ = contrast_table("x", {"a": crossed, "b": cell(0.2)}, {}).rows
    assert (row["reward"].low, row["reward"].high) == (-0.4, 0.6)


def test_csv_has_a_number_or_nothing_in_every_field():
    keys = ("Hybrid", "", "Sub.1"), ("Chain-end", "v1", "v2")
    table = factorial_table({keys[1]: cell(0.5, fad=None), keys[0]: cell(0.5, seed=1)}, keys[0], FACTORIAL)
    rows = list(csv.DictReader(io.StringIO(render_table(table, "csv"))))
    assert [row["stage"] for row in rows] == ["Chain-end", "Hybrid"]
    assert (rows[0]["fad"], rows[0]["fad_low"], rows[0]["fad_paper"]) == ("", "", "0.427")
    assert (rows[0]["reward_mark"], rows[1]["reward_mark"]) == (TIE, "")
    assert float(rows[0]["reward"]) == pytest.approx(0.5, abs=0.1)
    assert "≈0.427" in render_table(table, "markdown")


def test_names_cannot_break_a_table_or_a_page():
    rows = {"a|b & <script>_$": cell(0.1), "c": cell(0.2, seed=1)}
    table = contrast_table("odd", rows, {})
    assert r"a\|b & <script>_$" in render_table(table, "markdown")
    assert r"a|b \& <script>\_\$" in render_table(table, "latex")
    assert "<script>" not in page([table], [], ["p"], "")


def test_the_sweep_says_how_score_and_reward_go_together_in_and_beyond_the_training_range():
    curve = {s: cell(min(s, 2.0), seed=int(10 * s)) for s in (0.0, 1.0, 2.0, 4.0, 6.0)}
    inside, everywhere = sweep_notes({"SFT-only": curve}, (0.0, 2.0))
    assert "s in [0, 2]" in inside
    assert "Spearman ρ +1.00; 3 points" in inside
    assert "5 points" in everywhere
    table = sweep_table({"SFT-only": curve}, SWEEP)
    assert table.rows[0][1]["reward"].paper == Published("0.16")
    assert table.rows[1][1]["reward"].paper is None


def steered(by: float, seed: int, spread: float = 0.02) -> dict[float, Cell]:
    """A curve whose reward rises by that much over the range of the training."""
    return {s: cell(by * min(s, 2.0) / 2, spread=spread, seed=seed + int(s)) for s in (0.0, 1.0, 2.0, 6.0)}


@pytest.mark.parametrize(
    ("own", "crossed", "reading"),
    [
        (1.0, 0.0, "the cross-load loses the score, which training has not saturated"),
        (1.0, -1.0, "the cross-load loses the score"),
        (0.0, 0.0, "no steering is shown before the cross-load either"),
        (1.0, 0.5, "the cross-load keeps"),
    ],
)
def test_curves_of_the_same_weights_tell_saturation_from_a_lost_score(own, crossed, reading):
    curves = {"v1/v1": steered(own, 1), "v1/v2": steered(crossed, 50), "Submitted": steered(0.0, 90)}
    (note,) = readings(curves, {"v1/v2": "v1/v1"}, (0.0, 2.0))
    assert reading in note
    assert "s = 2 minus that at 0" in note
    wide = readings({**curves, "v1/v2": steered(0.0, 50, spread=9.0)}, {"v1/v2": "v1/v1"}, (0.0, 2.0))
    assert ("too few prompts to tell" in wide[0]) == bool(own)  # wide intervals are no evidence of a loss
    assert readings(curves, {"v1/v2": "absent"}, (0.0, 2.0)) == readings(curves, {"v1/v2": "v1/v1"}, (0.0, 3.0)) == ()


def backbone(path: Path, seed: int, head: Head = "v1", latent_dim: int = 40) -> Path:
    """A weights file with a seeded backbone whose score embedding says something."""
    import torch

    model = debug_backbone(seed, head, latent_dim=latent_dim)
    if model.score_embed is not None:
        with torch.no_grad():
            torch.nn.init.normal_(model.score_embed.mlp[2].weight, std=0.3)
    about = {METADATA: json.dumps({"backbone": model.config.to_dict()})}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, prompts, and real music to be held against."""
    folder = tmp_path_factory.mktemp("given")
    backbone(folder / "one.safetensors", 1)
    backbone(folder / "two.safetensors", 2, "v2")
    backbone(folder / "text.safetensors", 3, "none")
    (folder / "prompts.csv").write_text("id,prompt\na,calm piano\nb,loud drums\nc,a choir\n")
    (folder / "music").mkdir()
    for i in range(4):
        tone = 0.2 * np.sin(2 * np.pi * 220 * (i + 1) * np.arange(44_100 * 10) / 44_100)
        soundfile.write(folder / f"music/{i}.flac", tone, 44_100)
    return folder


def configure(given: Path | str, output: Path | str, *sets: str) -> AblateConfig:
    """Two checkpoints and a text-only one, as files."""
    files = {name: {"path": f"{given}/{name}.safetensors"} for name in ("one", "two", "text")}
    sets = (
        "bundle=debug",
        f"output={output}",
        f"prompts={given}/prompts.csv",
        f"references={{tones: {given}/music}}",
        "generate={sampler: {steps: 1, score: 2.0}, postprocess: null}",
        "evaluate={reference: tones, resamples: 10}",
        f"checkpoints={json.dumps(files)}",
        *sets,
    )
    return load_config(AblateConfig, None, sets)


SMALL = (
    "factorial={stages: {SFT-only: {v1: one, v2: two}}, submitted: [{label: Sub.1, checkpoint: one, head: v2}]}",
    "sweep={checkpoints: {SFT-only: {checkpoint: one}, Submitted: {checkpoint: one, head: v2}}, scores: [0, 2]}",
    "contrasts.conditioning=[{label: score, checkpoint: one}, {label: text, checkpoint: text}]",
)


def test_a_cell_that_stands_in_several_tables_is_made_once(given, tmp_path):
    plan = AblationPlan(configure(given, tmp_path / "run", *SMALL))
    names = [step.name for step in plan.steps()]
    assert len(names) == len(set(names))
    assert (names[0], names[-1]) == ("reference-tones", "tables")
    own, crossed = plan.factorial["SFT-only", "v1", "v1"], plan.factorial["SFT-only", "v1", "v2"]
    assert plan.sweep == {
        "SFT-only": {0.0: plan.sweep["SFT-only"][0.0], 2.0: own},
        "Submitted": {0.0: plan.sweep["Submitted"][0.0], 2.0: crossed},
    }
    assert plan.factorial["Hybrid", "", "Sub.1"] == crossed
    assert plan._crossed(plan.config.sweep) == {"Submitted": "SFT-only"}
    assert plan.contrasts["conditioning"]["score"] == own
    assert len(plan.cells) == 4 + 2 + 1
    text = plan.cells[plan.contrasts["conditioning"]["text"]].config
    assert text.sampler.score is None  # type: ignore[attr-defined]
    assert {plan.cells[own].config.head, plan.cells[crossed].config.head} == {None, "v2"}  # type: ignore[attr-defined]


def test_the_factorial_alone_forces_v2_weights_under_v1(given, tmp_path):
    plan = AblationPlan(configure(given, tmp_path / "run", *SMALL))
    forced = {name for name, step in plan.cells.items() if step.config.force_head}  # type: ignore[attr-defined]
    assert plan.factorial["SFT-only", "v2", "v1"] in forced
    assert plan.contrasts["conditioning"]["text"] not in forced
    row = "chain=[{label: a, checkpoint: two, head: v1, generate: {force_head: true}}]"
    assert AblationPlan(configure(given, tmp_path / "run", row)).chain["a"] == plan.factorial["SFT-only", "v2", "v1"]


def test_what_a_cell_is_made_of_decides_its_name_and_nothing_else(given, tmp_path):
    def names(*sets: str) -> set[str]:
        return set(AblationPlan(configure(given, tmp_path / "run", *SMALL, *sets)).cells)

    usual = names()
    assert names("generate.runtime.batch=3") == usual
    assert names(f"output={tmp_path / 'elsewhere'}") == usual
    for other in ("generate.seed=7", "generate.sampler.steps=2", "evaluate.reference=null"):
        assert not names(other) & usual
    same = tmp_path / "renamed.csv"
    same.write_bytes((given / "prompts.csv").read_bytes())
    assert names(f"prompts={same}") == usual


def test_another_reference_set_under_a_known_name_is_noticed(given, tmp_path):
    sets = ("references={}", "evaluate.reference=tones", f"evaluate.references={tmp_path}/store", *SMALL)
    prints = []
    for count in (4, 3):
        music = tmp_path / f"music{count}"
        music.mkdir()
        for i in range(count):
            (music / f"{i}.flac").write_bytes((given / f"music/{i}.flac").read_bytes())
        assert build_reference("tones", str(music), store=f"{tmp_path}/store", bundle="debug") == 0
        plan = AblationPlan(configure(given, tmp_path / "run", *sets))
        prints.append(plan.fingerprints(plan.steps()))
        shutil.rmtree(tmp_path / "store")
    changed = {name for name in prints[0] if prints[0][name] != prints[1][name]}
    assert changed == {f"evaluate-{name}" for name in plan.cells} | {"tables"}


@pytest.mark.slow
def test_a_silent_clip_stops_nothing_within_the_share_and_stands_in_the_notes(given, tmp_path):
    output, contrast = tmp_path / "run", SMALL[-1]
    cell = AblationPlan(configure(given, output, contrast)).contrasts["conditioning"]["score"]
    assert ablate(configure(given, output, contrast), last=f"generate-{cell}") == 0
    clip = next(path for path in (output / f"cells/{cell}/clips").rglob("a.*") if path.suffix in (".wav", ".flac"))
    soundfile.write(clip, np.zeros(441_000, np.float32), 44_100)
    assert ablate(configure(given, output, contrast)) == 3
    assert ablate(configure(given, output, contrast, "failed_share=0.4")) == 0
    assert "score: 1 clips failed and are in no column." in (output / "tables/conditioning.md").read_text()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("contrasts.x=[{label: a, checkpoint: three}, {label: b, checkpoint: one}]",), "no checkpoint 'three'"),
        (("contrasts.x=[{label: a, checkpoint: one}]",), "two rows or more"),
        (("contrasts.x=[{label: a, checkpoint: one}, {label: a, checkpoint: two}]",), "two rows are called a"),
        (("contrasts.sweep=[{label: a, checkpoint: one}, {label: b, checkpoint: two}]",), "this name is taken"),
        (("chain=[{label: a, checkpoint: text, head: v2}]",), "text has the head none, which cannot run as v2"),
        (
            ("chain=[{label: a, checkpoint: two, head: v1}]",),
            "chain: checkpoint two was trained as v2 and collapses as",
        ),
        (
            ("checkpoints.three={train: {model: {head: v4}}, init: two}", "stage1={data: {sources: [{corpus: x}]}}"),
            "checkpoints.three: two was trained as v2 and collapses as v4",
        ),
        (("chain=[{label: a, checkpoint: one, generate: {sampler: {stepz: 1}}}]",), "did you mean sampler.steps"),
        (("chain=[{label: a, checkpoint: one, generate: {output: x}}]",), "every step has its own folder"),
        (("chain=[{label: a, checkpoint: one}]", "evaluate.resampels=3"), "did you mean resamples"),
        (("heads={heads: {v1: one}, scores: [0, 1], at: 1}",), "-0.5 is not"),
        (("heads={heads: {}}",), "name at least one row"),
        (("checkpoints.three={}", "chain=[{label: a, checkpoint: three}]"), "needs path"),
        (
            ("checkpoints.three={path: nothing.safetensors}", "chain=[{label: a, checkpoint: three}]"),
            "nothing.safetensors: not found. .*set checkpoints.three.path",
        ),
        (("chain=[{label: a, checkpoint: one, clips: /nowhere}]",), "needs checkpoint .* or clips .*, and not both"),
        (("chain=[{label: a, clips: /nowhere, head: v2}]",), "clips are there already"),
        (("chain=[{label: a, clips: /nowhere}]",), "/nowhere: there is no such folder"),
        (
            ("chain=[{label: a, checkpoint: one, generate: {bundle: nothing}}]",),
            "there is no bundle 'nothing'",
        ),
        (("sweep={checkpoints: {a: {clips: /x}}, scores: [0, 1]}",), "clips have no input score"),
        (("checkpoints.three={train: {}}",), "Add the section stage1"),
        (("checkpoints.three={train: {}, init: four}", "stage1={}"), "no checkpoint four stands before it"),
        (("checkpoints.three={path: a.pth, init: one}",), "init is for checkpoints that are trained"),
        (("checkpoints={../x: {path: y}}",), "cannot name a folder"),
        (("prompts=none.csv", "chain=[{label: a, checkpoint: one}]"), "none.csv"),
        (
            ("evaluate={reference: sdd, references: /none}", "chain=[{label: a, checkpoint: one}]"),
            "there is none at",
        ),
        (("evaluate.training=/nowhere/corpus", "chain=[{label: a, checkpoint: one}]"), "there is none|no corpus run"),
        ((), "no table is configured"),
    ],
)
def test_mistakes_are_found_before_the_first_step(given, tmp_path, sets, message):
    with pytest.raises(UserError) as caught:
        ablate(configure(given, tmp_path / "run", *sets))
    assert re.search(message, f"{caught.value.message} {caught.value.hint}"), caught.value
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_16_khz_checkpoint_and_clips_of_another_program_can_be_row_0(given, tmp_path, capsys):
    """The public baseline has latents, a VAE and a vocoder of its own, and no score; a user's may be mere files."""
    output, mine = tmp_path / "run", tmp_path / "mine"
    public = backbone(tmp_path / "public.safetensors", 4, "none", latent_dim=20)
    mine.mkdir()
    for i, name in enumerate(("a", "b_0", "c")):
        tone = 0.1 * np.sin(2 * np.pi * 300 * (i + 1) * np.arange(32_000 * 10) / 32_000)
        soundfile.write(mine / f"{name}.wav", tone, 32_000)
    rows = [
        {"label": "public", "checkpoint": "public", "generate": {"bundle": "debug-16k"}, "baseline": True},
        {"label": "mine", "clips": str(mine), "baseline": True},
        {"label": "SFT (v1)", "checkpoint": "one"},
    ]
    sets = (f"checkpoints.public={{path: {public}}}", f"chain={json.dumps(rows)}")
    config = configure(given, output, *sets)
    assert ablate(config, plan_only=True) == 0
    assert ablate(config) == 0
    table = list(csv.DictReader((output / "tables/chain.csv").open()))
    assert [row["step"] for row in table] == ["public", "mine", "SFT (v1)"]
    assert all(row["reward"] and row["fad"] and row["clap_score"] for row in table)
    cells = json.loads((output / "cells.json").read_text())["chain"]
    for name in "abc":
        info = soundfile.info(output / f"cells/{cells['public']}/clips/clips/{name}.wav")
        assert (info.samplerate, info.frames) == (16_000, 160_000)
    assert not (output / f"cells/{cells['mine']}/clips").exists()
    capsys.readouterr()
    assert ablate(config) == 0
    assert "nothing to do" in capsys.readouterr().out
    soundfile.write(mine / "c.wav", -tone, 32_000)  # another clip under a known name
    assert ablate(config, plan_only=True) == 0
    assert capsys.readouterr().out.count("begun") == 2  # its evaluation and the tables


def test_weights_of_16_khz_latents_need_their_bundle(given, tmp_path):
    public = backbone(tmp_path / "public.safetensors", 4, "none", latent_dim=20)
    sets = (f"checkpoints.public={{path: {public}}}", "chain=[{label: public, checkpoint: public}]")
    with pytest.raises(UserError, match="makes 20 latent channels, the VAE of the bundle has 40") as caught:
        ablate(configure(given, tmp_path / "run", *sets))
    assert "bundle that it was trained with" in caught.value.hint


def test_the_paper_s_recipes_say_what_they_mean():
    ablations = load_config(AblateConfig, str(REPO / "configs/paper/ablate.yaml"))
    text = (REPO / "configs/paper/ablate.yaml").read_text() + (REPO / "configs/paper/reproduce.yaml").read_text()
    assert text.count("--set stage1.model.head=v2") == 2
    assert ablations.stage1 is not None
    scored_by = ablations.stage1["data"]["sources"][0]["score_column"]
    heads = {"/data/chain": ("v1", "v1", "v2"), "/data/chain-v2": ("v2", "v2", "v2")}
    for output, expected in heads.items():
        sets = [f"output={output}", *(["stage1.model.head=v2"] if output.endswith("v2") else [])]
        config = load_config(ReproduceConfig, str(REPO / "configs/paper/reproduce.yaml"), sets)
        steps = {step.name: step for step in build_steps(config)}
        models = [steps[name].config.model for name in ("stage1", "stage2", "stage3")]  # type: ignore[attr-defined]
        assert tuple(model.head for model in models) == expected
        assert {(model.size, model.null) for model in models} == {("s_44k", "zero_embedding")}
        assert steps["stage1"].config.data.sources[0].score_column == scored_by  # type: ignore[attr-defined]
        assert steps["pool"].config.bundle == ablations.bundle == "paper"  # type: ignore[attr-defined]
        made = {f"{output}/{name}" for step in steps.values() for name in step.makes}
        own = [one.path for one in ablations.checkpoints.values() if one.path and one.path.startswith(f"{output}/")]
        assert own
        assert set(own) <= made
    assert ablations.stage1["data"]["sources"][0]["corpus"] == "/data/chain/corpus"


def test_tables_figure_and_page_come_from_real_cells_and_a_relaunch_does_nothing(given, tmp_path, capsys):
    output = tmp_path / "run"
    config = configure(given, output, *SMALL)
    assert ablate(config, last="reference-tones") == 0
    assert not (output / "tables").exists()
    assert ablate(config) == 0
    where = json.loads((output / "cells.json").read_text())
    assert where.keys() == {"factorial", "sweep", "conditioning"}
    for name in where:
        for ending in ("md", "tex", "csv"):
            assert (output / f"tables/{name}.{ending}").stat().st_size > 100
    sweep = list(csv.DictReader((output / "tables/sweep.csv").open()))
    assert [(row["checkpoint"], row["s"]) for row in sweep] == [
        ("SFT-only", "0"), ("SFT-only", "2"), ("Submitted", "0"), ("Submitted", "2"),
    ]  # fmt: skip
    for row in sweep:  # the table says what the evaluation of its cell says
        results = json.loads(
            (output / f"cells/{where['sweep'][row['checkpoint']][row['s']]}/evaluation/results.json").read_text()
        )
        metrics = results["systems"][0]["metrics"]
        for metric in ("fad", "clap_score", "reward"):
            assert float(row[metric]) == pytest.approx(metrics[metric]["value"], abs=1e-9)
    assert len({row["reward"] for row in sweep}) == 4  # the score is heard, by both forwards
    assert (output / "figures/sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "tables/index.html").read_text()
    assert text.count("<svg") == 2
    assert "these numbers mean nothing" in text
    first = (output / "index.html").read_text()
    assert "mean nothing. No row is named as better." in first[: first.index("<main")]
    assert first.index("<table") < first.index("<audio") < first.index("<h2>Steps")
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    assert ablate(config) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == before


@pytest.mark.slow
def test_cells_from_and_in_a_bucket_are_those_of_folders(given, bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTMRAY_COPIES", str(tmp_path / "copies"))
    for path in sorted(path for path in given.rglob("*") if path.is_file()):
        Folder(f"{bucket}/given").write(str(path.relative_to(given)), path.read_bytes())
    contrast = SMALL[-1]
    assert ablate(configure(given, tmp_path / "run", contrast)) == 0
    remote = configure(f"{bucket}/given", f"{bucket}/run", contrast)
    assert ablate(remote) == 0
    run, local = Folder(f"{bucket}/run"), Folder(str(tmp_path / "run"))
    for name in ("cells.json", "tables/conditioning.csv"):
        assert run.read(name) == local.read(name)
    capsys.readouterr()
    assert ablate(remote) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_other_weights_under_a_known_name_are_noticed(given, tmp_path, capsys):
    output = tmp_path / "run"
    plan = AblationPlan(configure(given, output, *SMALL))
    own = tmp_path / "own.safetensors"
    own.write_bytes((given / "two.safetensors").read_bytes())
    other = AblationPlan(configure(given, output, *SMALL, f"checkpoints.one.path={own}"))
    prints = [one.fingerprints(one.steps()) for one in (plan, other)]
    changed = {name for name in prints[0] if prints[0][name] != prints[1].get(name)}
    assert {name for name in changed if name.startswith("generate-")} == {
        f"generate-{name}" for name in plan.cells if name.startswith("one")
    }
    assert "tables" in changed
    assert "reference-tones" not in changed


def test_the_command_takes_the_shipped_configs(tmp_path, capsys):
    load_config(AblateConfig, str(REPO / "configs/paper/ablate.yaml"))
    assert main(["ablate", "--config", str(REPO / "configs/paper/ablate.yaml"), "--plan-only"]) == EXIT_BAD_INPUT
    assert "checkpoints.baseline" in capsys.readouterr().err


PROGRAM = "import sys; from ttmray.cli import main; sys.exit(main(sys.argv[1:]))"


def command(corpus: Path, output: Path) -> list[str]:
    sets = {
        "output": output, "references.demo": corpus, "stage1.data.sources.0.corpus": corpus,
        "prompts": REPO / "configs/debug/prompts.csv",
    }  # fmt: skip
    return ["ablate", "--config", str(DEBUG), *(f"--set={name}={value}" for name, value in sets.items())]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_debug_ablations_make_all_tables_and_survive_kills(tmp_path):
    songs, corpus = tmp_path / "songs", tmp_path / "corpus"
    subprocess.run([sys.executable, "-m", "ttmray.synth.songs", str(songs)], check=True, stdout=subprocess.DEVNULL)
    sets = [f"--set=input={songs}", f"--set=output={corpus}", "--set=runtime.runner=local", "--set=max_failures=5"]
    assert main(["score-corpus", "--config", str(REPO / "configs/debug/corpus.yaml"), *sets]) == 0

    def start(output: Path) -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-c", PROGRAM, *command(corpus, output)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})

    # names of one length: weights files name their run, and where tensors lie in a file decides last bits on a CPU
    calm, shot = tmp_path / "calm", tmp_path / "shot"
    assert start(calm).wait(timeout=900) == 0
    rng = random.Random(2)
    for steps_begun in (1, 3, 9, 14, 30, 50):
        driver = start(shot)
        while driver.poll() is None and len(list((shot / "steps").glob("*.json"))) < steps_begun:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 3.0))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert start(shot).wait(timeout=900) == 0
    tables = {path.name for path in (calm / "tables").iterdir()}
    expected = ("heads", "chain", "factorial", "sweep", "cross-load", "conditioning", "post-processing", "rewards")
    assert tables == {f"{name}.{ending}" for name in expected for ending in ("md", "tex", "csv")} | {
        "index.html",
        "results.json",
    }
    for name in tables | {"../figures/sweep.svg", "../cells.json"}:
        assert (shot / "tables" / name).read_bytes() == (calm / "tables" / name).read_bytes(), name
    assert start(shot).wait(timeout=100) == 0
