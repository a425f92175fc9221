"""The ranker: training parity and exact resume, metrics, the whole job, and what it learns from real audio."""

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from damages import DAMAGES
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ttmray import statistics
from ttmray.audio.mel import LogMel
from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.models.tunejury import VARIANTS, TuneJuryHead, load_tunejury
from ttmray.ranker import heads as ranker
from ttmray.ranker import job as ranker_job
from ttmray.ranker import report
from ttmray.ranker.features import read_clip
from ttmray.ranker.heads import HeadConfig, PackedPairs, margins, new_head, pack, train_head, validation_loss
from ttmray.ranker.job import RankerConfig, train_ranker
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[2]
SMALL = HeadConfig(widths=(12, 6), lr=3e-3, batch=16, max_epochs=12, patience=12)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(count: int, seed: int = 0, noise: float = 0.1, clips: int = 60, variant: str = "A7") -> PackedPairs:
    """Pairs whose winner follows a fixed linear function of the CLAP block; every tenth is a tie."""
    weights = np.random.default_rng(99).normal(size=8)
    draw = np.random.default_rng(seed)
    blocks = {"clap_audio": draw.normal(size=(clips, 8)), "mert": draw.normal(size=(clips, 5))}
    blocks = {name: x.astype(np.float32) for name, x in blocks.items()}
    blocks["text"] = np.random.default_rng(7).normal(size=(3, 4)).astype(np.float32)
    a = draw.integers(0, clips, count)
    b = (a + draw.integers(1, clips, count)) % clips
    value = blocks["clap_audio"] @ weights
    target = (value[a] - value[b] + noise * draw.normal(size=count) > 0).astype(np.float32)
    target[::10] = 0.5
    return pack(blocks, {"a": a, "b": b, "prompt": draw.integers(0, 3, count), "target": target}, variant)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["single", "per_side"])
def test_an_epoch_is_the_plain_loop_of_the_release(batch_norm):
    """Against separate forwards (or one over both sides), torch's own AdamW and no dropout, to rounding."""
    config = HeadConfig(widths=(12, 6), dropout=0, batch=16, max_epochs=3, batch_norm=batch_norm, random_sides=False)
    train, validation = made_up(67), made_up(40, seed=1)
    trained = train_head(train, validation, config, seed=5)

    head = new_head(17, config, seed=5).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, weight_decay=1e-3, foreach=False)
    for epoch in range(3):
        head.train()
        losses = []
        order = np.random.default_rng((5, epoch)).permutation(67)
        for rows in np.split(order, [16, 32, 48, 64]):
            sides = [
                torch.cat([train.clips[clip[rows]], train.texts[train.text[rows]]], 1) for clip in (train.a, train.b)
            ]
            if batch_norm == "per_side":
                margin = head(sides[0]) - head(sides[1])
            else:
                both = head(torch.cat(sides))
                margin = both[: len(rows)] - both[len(rows) :]
            loss = nn.functional.binary_cross_entropy_with_logits(margin, train.target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
        assert trained.history[epoch]["train_loss"] == pytest.approx(sum(losses) / 67, rel=1e-5)
        # Biases before a batch norm have gradients of rounding only, which Adam turns into steps of full size. Training
        # does not see them; running means follow them late.
        assert trained.history[epoch]["validation_loss"] == pytest.approx(validation_loss(head, validation), rel=1e-3)


@pytest.mark.parametrize("batch_norm", ["single", "per_side"])
def test_a_run_cut_into_pieces_equals_one_in_one_piece(batch_norm):
    config = SMALL.model_copy(update={"batch_norm": batch_norm})
    train, validation = made_up(133), made_up(50, seed=1)
    states: list[bytes] = []
    whole = train_head(train, validation, config, 3, save=states.append, save_every=1)
    assert len(states) == len(whole.history) == 12
    for state in states[::3]:
        torch.rand(7)  # whatever the process drew meanwhile
        rest = train_head(train, validation, config, 3, resume=state)
        assert rest.history == whole.history
        assert rest.best_epoch == whole.best_epoch
        assert same_state(rest.head, whole.head)


def test_a_damaged_state_is_one_message_without_torchs_advice():
    """Whatever a damaged pickle raises, and not how to switch torch's protection off."""
    train, validation = made_up(40), made_up(30, seed=1)
    one, states = SMALL.model_copy(update={"max_epochs": 1}), list[bytes]()
    train_head(train, validation, one, 3, save=states.append, save_every=1)
    (sound,) = states
    module, other = io.BytesIO(), io.BytesIO()
    torch.save({"head": nn.Linear(1, 1)}, module)
    torch.save([torch.zeros(1)], other)
    chance = np.random.default_rng(5)
    damaged = [b"", b"no state", sound[:-30], sound[: len(sound) // 2], module.getvalue(), other.getvalue()]
    for place in chance.integers(0, len(sound), 60):
        damaged.append(sound[:place] + bytes([sound[place] ^ int(chance.integers(1, 256))]) + sound[place + 1 :])
    again, refused = train_head(train, validation, one, 3, resume=sound), list[UserError]()
    for state in damaged:
        try:
            trained = train_head(train, validation, one, 3, resume=state)
        except UserError as error:
            refused.append(error)
        else:
            assert same_state(trained.head, again.head)
            assert trained.history == again.history
    assert len(refused) >= 30
    assert not [error for error in refused if "weights_only" in str(error) or "heads/*.checkpoint" not in error.hint]


def test_training_neither_reads_nor_moves_the_global_random_state():
    train, validation = made_up(40), made_up(30, seed=1)
    first = train_head(train, validation, SMALL, 3)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert same_state(first.head, train_head(train, validation, SMALL, 3).head)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_state(first.head, train_head(train, validation, SMALL, 4).head)


def test_the_best_epoch_counts_and_patience_ends_the_run():
    config = SMALL.model_copy(update={"max_epochs": 500, "patience": 5, "lr": 0.03})
    train, validation = made_up(60, noise=3.0), made_up(60, seed=1, noise=3.0)
    trained = train_head(train, validation, config, 0)
    losses = [row["validation_loss"] for row in trained.history]
    assert len(losses) == trained.best_epoch + 6 < 500
    assert validation_loss(trained.head, validation) == losses[trained.best_epoch]
    assert losses[trained.best_epoch] <= min(losses) + config.min_improvement


def test_a_planted_relation_is_learnt_and_other_blocks_know_nothing_of_it():
    config = SMALL.model_copy(update={"max_epochs": 25, "patience": 25, "lr": 0.01, "batch": 64})
    accuracy = {}
    for variant in ("A1", "A2", "A7"):
        train, validation, test = (
            made_up(count, seed, clips=300, variant=variant) for seed, count in enumerate((1500, 200, 500))
        )
        trained = train_head(train, validation, config, 0)
        margin, target = margins(trained.head, test).numpy(), test.target.numpy()
        keep = report.decided(target)
        accuracy[variant] = report.correct(margin[keep], target[keep]).mean()
    assert accuracy["A1"] > 0.9
    assert accuracy["A7"] > 0.85
    assert 0.4 < accuracy["A2"] < 0.6


def test_variants_leave_blocks_out():
    expected = {"A1": 8, "A2": 5, "A3": 4, "A4": 13, "A5": 12, "A6": 9, "A7": 17}
    for variant, width in expected.items():
        pairs = made_up(10, variant=variant)
        assert pairs.inputs(pairs.a, pairs.text).shape == (10, width)


def test_the_text_alone_is_exactly_chance():
    train, validation = made_up(64, variant="A3"), made_up(40, seed=1, variant="A3")
    trained = train_head(train, validation, SMALL, 0)
    assert not margins(trained.head, validation).any()


def test_per_side_statistics_hide_what_all_winners_of_one_side_share():
    """The winners lie on side A and are shifted by a constant: only statistics over both sides see that in training."""
    draw = np.random.default_rng(0)
    blocks = {"clap_audio": draw.normal(size=(400, 8)).astype(np.float32), "mert": np.zeros((400, 0), np.float32)}
    blocks["clap_audio"][:200] += 1.0
    blocks["text"] = np.zeros((1, 0), np.float32)
    rows = {"a": np.arange(200), "b": np.arange(200, 400), "prompt": np.zeros(200), "target": np.ones(200)}
    pairs = pack(blocks, rows, "A1")
    train, validation = pairs.rows(np.arange(150)), pairs.rows(np.arange(150, 200))
    loss = {}
    for batch_norm, random_sides in (("single", True), ("per_side", False), ("per_side", True)):
        config = SMALL.model_copy(update={"dropout": 0.0, "batch_norm": batch_norm, "random_sides": random_sides})
        loss[batch_norm, random_sides] = train_head(train, validation, config, 0).history[-1]["train_loss"]
    assert loss["single", True] < 0.2
    assert loss["per_side", True] < loss["per_side", False]


@given(st.integers(2, 300), st.integers(2, 40))
def test_batches_hold_every_pair_once_and_never_one_alone(count, size):
    batches = ranker._batches(count, size)
    assert [i for start, end in batches for i in range(start, end)] == list(range(count))
    assert all(2 <= end - start <= size + 1 for start, end in batches)


@pytest.mark.parametrize("widths", [(1024, 512, 256, 128), (64,)])
def test_the_stated_flops_are_those_that_torch_counts(widths):
    head = TuneJuryHead((512, *widths))
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(8, 512)).sum().backward()  # 4 pairs
    assert counter.get_total_flops() == 4 * ranker.flops_per_pair(512, widths)


def test_too_few_pairs_and_broken_features_are_user_errors():
    pairs = made_up(10)
    with pytest.raises(UserError, match="the fewest"):
        train_head(pairs.rows([0]), pairs, SMALL, 0)
    pairs.clips[int(pairs.a[0])] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        train_head(pairs, pairs, SMALL, 0)


# ---- metrics ----------------------------------------------------------------------------------------------


def test_golden_calibration_error():
    draw = np.random.default_rng(0)
    margin = 1.5 * draw.normal(size=1003)
    right = draw.random(1003) < expit(np.abs(margin))
    found = report.calibration(margin, right)
    assert found.ece == pytest.approx(0.0299208832642, abs=1e-12)
    assert right.mean() == pytest.approx(0.744765702891, abs=1e-12)
    assert found.counts.tolist() == [100] * 9 + [103]
    with pytest.raises(ValueError, match="bins"):
        report.calibration(margin[:9], right[:9])


def test_ties_do_not_count_and_a_margin_of_zero_predicts_b():
    margin, target = np.array([1.0, -1.0, 0.0, 0.0, 5.0]), np.array([1.0, 1.0, 0.0, 1.0, 0.5])
    found = report.metrics(margin, target, ["x", "x", "x", "y", "y"])
    assert (found["pairs"], found["decided"], found["accuracy"]) == (5, 4, 0.5)
    assert found["sources"]["x"]["accuracy"] == pytest.approx(2 / 3)
    assert found["sources"]["y"]["accuracy"] == 0.0
    only_ties = report.metrics(margin[:1], np.array([0.5]), ["x"])
    assert (only_ties["decided"], only_ties["accuracy"], only_ties["interval"]) == (0, None, None)


def ranker_result(
    split: str = "item: 9 train", note: str = "", **heads: tuple[int, float, int, float]
) -> dict[str, Any]:
    """`metrics.json` of heads: (decided pairs, lower end of the interval, best epoch, temperature) each."""
    rows = {
        name: {
            "inputs": "clap", "temperature": temperature, "best_epoch": best, "note": "",
            "test": {"decided": decided, "accuracy": 0.6, "interval": [low, 0.9], "sources": {}},
        }
        for name, (decided, low, best, temperature) in heads.items()
    }  # fmt: skip
    run = {"split": split, "intervals_resample": "prompt"}
    return {"note": note, "run": run, "heads": rows, "leave_one_out": {}, "mcnemar": {}}


def test_what_makes_a_ranker_doubtful_stands_first_in_its_report_and_once_for_all_its_heads():
    assert report.grave_warnings(ranker_result(good=(1000, 0.6, 5, 1.3))) == []
    bad = ranker_result("pair: 9 train", "debug bundle", a=(20, 0.45, 0, 100.0), b=(20, 0.45, 3, 1.0))
    lines = report.grave_warnings(bad)
    assert lines[0].startswith("the split is by pair: clips of test pairs are in training pairs")
    assert [line.partition(":")[0] for line in lines[1:]] == ["a, b", "a, b", "a", "a"]
    assert all(
        words in " ".join(lines) for words in ("20 decided test pairs", "chance", "no epoch", "temperature of 100")
    )
    text = report.summary(bad)
    assert text.startswith("# Preference ranker\n\n> debug bundle\n>\n> WARNING: the split is by pair")
    assert text.index("WARNING") < text.index("## Heads")
    assert "| 95 % interval, bootstrap over prompt |" in text
    assert "**" not in text


def test_the_interval_is_the_binomial_one_for_pairs_and_wider_for_groups_that_agree():
    right = np.arange(2000) % 10 < 7
    low, high = statistics.grouped_interval(right)
    se = math.sqrt(0.7 * 0.3 / 2000)
    assert (low, high) == pytest.approx((0.7 - 1.96 * se, 0.7 + 1.96 * se), abs=0.002)
    groups = [str(i) for i in range(200)]
    together = np.repeat(right[:200], 10)
    low, high = statistics.grouped_interval(together, np.repeat(groups, 10).tolist())
    se = math.sqrt(0.7 * 0.3 / 200)
    assert (low, high) == pytest.approx((0.7 - 1.96 * se, 0.7 + 1.96 * se), abs=0.01)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_is_the_one_that_made_the_votes(temperature):
    draw = np.random.default_rng(1)
    logit = 2 * draw.normal(size=40_000)
    target = (draw.random(40_000) < expit(logit)).astype(float)
    assert report.fit_temperature(logit * temperature, target) == pytest.approx(temperature, rel=0.05)
    assert report.fit_temperature(np.zeros(4), target[:4]) == 1.0


def test_mcnemar_without_continuity_correction():
    first = np.array([1] * 30 + [0] * 15 + [1] * 55, bool)
    second = np.array([0] * 30 + [1] * 15 + [1] * 55, bool)
    chi2, p = report.mcnemar(first, second)
    assert chi2 == pytest.approx(15**2 / 45)
    assert p == pytest.approx(0.025347, abs=1e-6)  # chi-squared with one degree of freedom
    assert report.mcnemar(first, first) == (0.0, 1.0)


# ---- the job ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> Path:
    """60 votes of two sources about 12 short clips; louder is better. One clip is no audio."""
    folder = tmp_path_factory.mktemp("votes")
    draw = np.random.default_rng(0)
    for i in range(12):
        wave = 0.002 * 1.5**i * draw.normal(size=22050)
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), 44100)
    (folder / "bad.wav").write_text("no music")
    rows = []
    for i in range(60):
        a, b = draw.choice(12, 2, replace=False)
        split = ("train", "train", "train", "valid", "test")[i % 5]
        row = {"a": f"{a}.wav", "b": f"{b}.wav", "label": "ab"[int(a < b)], "prompt": f"prompt {i % 4}", "split": split}
        rows.append(row | {"id": f"v{i}", "source": "XY"[i % 2]})
    (folder / "votes.json").write_text(json.dumps(rows))
    (folder / "only_x.json").write_text(json.dumps([row for row in rows if row["source"] == "X"]))
    (folder / "bad.json").write_text(json.dumps([*rows, rows[0] | {"id": "bad", "a": "bad.wav"}]))
    return folder


def job(folder: Path, output: Path, table: str = "votes.json", **fields) -> RankerConfig:
    source = {"name": "votes", "path": str(folder / table), "audio": str(folder)}
    small = {"widths": [12, 6], "batch": 8, "lr": 3e-3, "max_epochs": 15}
    plain = {"sources": [source], "output": str(output), "split": {"by": "released"}, "head": small, "resample": "pair"}
    plain |= {
        "bundle": "debug",
        "encoding": {"device": "cpu"},
        "training": {"device": "cpu", "threads": 1, "checkpoint_every": 2},
    }
    return RankerConfig.model_validate(plain | fields)


@pytest.fixture(scope="module")
def finished(votes, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert train_ranker(job(votes, output, variants=["A7", "A1", "A3"], seeds=2, leave_out=["Y"])) == 0
    return output


def test_the_published_head_loads_and_gives_the_reported_accuracy(finished, votes):
    metrics = json.loads((finished / "metrics.json").read_text())
    sidecar = json.loads((finished / "tunejury.json").read_text())
    model = load_tunejury(finished / "tunejury.safetensors", block_dims=tuple(sidecar["block_dims"]))
    assert model.variant == "A7"
    assert sidecar["score_sd"] > 0
    assert sidecar["protocol"].startswith("debug/tj-center-full-int16-caption-")
    assert "mean nothing" in sidecar["note"], "it travels without its run"
    from safetensors.numpy import load_file

    packed = load_file(finished / "packed.safetensors")
    test = packed["split"] == 2
    text = packed["text"][packed["prompt"][test]]
    sides = [model.score(packed["clap_audio"][packed[s][test]], packed["mert"][packed[s][test]], text) for s in "ab"]
    accuracy = ((sides[0] > sides[1]) == (packed["target"][test] > 0.5)).mean()
    assert metrics["heads"][f"A7-seed{sidecar['seed']}"]["test"]["accuracy"] == pytest.approx(accuracy)


def test_the_report_holds_every_head_the_ensembles_and_the_left_out_source(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    names = [f"{variant}-{which}" for variant in ("A7", "A1", "A3") for which in ("seed42", "seed43", "ensemble")]
    assert list(metrics["heads"]) == names
    assert set(metrics["leave_one_out"]) == {"Y"}
    assert set(metrics["mcnemar"]) == {"A7-seed42 and A1-seed42", "A7-seed42 and A3-seed42"}
    assert "chance" in metrics["heads"]["A3-seed42"]["note"]
    text = (finished / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert (finished / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert not list((finished / "heads").glob("*.checkpoint"))


def test_a_left_out_source_takes_no_part_in_training_nor_in_the_choice_of_the_epoch(finished, votes, tmp_path):
    """The head without Y has the bits of one that was trained on a table that never held Y."""
    train_ranker(job(votes, tmp_path / "run", "only_x.json"))
    alone = (tmp_path / "run/heads/A7-seed42.safetensors").read_bytes()
    assert (finished / "heads/A7-seed42-without-Y.safetensors").read_bytes() == alone
    assert (finished / "heads/A7-seed42.safetensors").read_bytes() != alone


def test_relaunching_trains_nothing_and_other_settings_are_refused(finished, votes, monkeypatch):
    same = job(votes, finished, variants=["A7", "A1", "A3"], seeds=2, leave_out=["Y"])
    before = (finished / "metrics.json").read_bytes()
    monkeypatch.setattr(ranker_job, "train_head", None)
    assert train_ranker(same) == 0
    assert (finished / "metrics.json").read_bytes() == before
    with pytest.raises(UserError, match=r"config\.seed: 42 -> 7"):
        train_ranker(same.model_copy(update={"seed": 7}))


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped", "empty"])
@pytest.mark.parametrize("pattern", ["tunejury.safetensors", "heads/*.safetensors", "heads/*.json", "run.json", "*.md"])
def test_a_damaged_ranker_is_made_again_with_the_same_bits(finished, votes, tmp_path, pattern, damage):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = sorted(run.glob(pattern))[0]
    DAMAGES[damage](file, finished)
    assert main(["verify", str(run)]) == 2
    assert train_ranker(job(votes, run, variants=["A7", "A1", "A3"], seeds=2, leave_out=["Y"])) == 0
    assert main(["verify", str(run)]) == 0
    name = file.relative_to(run)
    if file.name != "run.json":  # names the folder that it was copied from
        assert file.read_bytes() == (finished / name).read_bytes()


def test_an_interrupted_job_goes_on_to_the_same_head(votes, finished, tmp_path, monkeypatch):
    config = job(votes, tmp_path / "run")
    plain, count = Folder.write, iter(range(100))

    def write(folder: Folder, name: str, data: bytes) -> None:
        plain(folder, name, data)
        if name.endswith(".checkpoint") and next(count) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", write)
        with pytest.raises(KeyboardInterrupt):
            train_ranker(config)
    assert (tmp_path / "run/heads/A7-seed42.checkpoint").exists()
    assert train_ranker(config) == 0
    name = "heads/A7-seed42.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_pairs_without_audio_are_listed_and_refused_over_the_limit(votes, tmp_path):
    with pytest.raises(UserError, match="1 of 61 pairs"):
        train_ranker(job(votes, tmp_path / "strict", "bad.json"))
    assert train_ranker(job(votes, tmp_path / "run", "bad.json", max_missing=0.02)) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run/dropped.jsonl").read_text().splitlines()]
    assert (row["id"], row["reason"]) == ("bad", "clip")
    assert "not_audio" in row["message"]


@pytest.mark.slow  # starts Ray
def test_heads_trained_by_ray_actors_have_the_same_bits(votes, finished, tmp_path):
    import ray

    training = {"device": "cpu", "runner": "ray", "workers": 2, "cpus": 1}
    try:
        train_ranker(job(votes, tmp_path / "run", variants=["A7", "A1"], training=training))
    finally:
        ray.shutdown()
    for name in ("heads/A7-seed42.safetensors", "heads/A1-seed42.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_changed_audio_is_not_mixed_into_a_run(votes, finished, tmp_path):
    import shutil

    shutil.copytree(votes, tmp_path / "votes")
    shutil.copytree(finished, tmp_path / "run")
    soundfile.write(tmp_path / "votes/3.wav", 0.1 * np.sin(np.arange(22050) / 9), 44100)
    config = job(tmp_path / "votes", tmp_path / "run", variants=["A7", "A1", "A3"], seeds=2, leave_out=["Y"])
    with pytest.raises(UserError, match="clips have changed"):
        train_ranker(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"leave_out": ["Z"]}, "no pair of Z"),
        ({"bundle": "papre"}, "papre"),
    ],
)
def test_bad_settings_are_user_errors(votes, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train_ranker(job(votes, tmp_path / "run", **fields))


@pytest.mark.parametrize("name", ["debug", "paper"])
def test_the_configs_in_the_repository_are_valid(name):
    config = load_config(RankerConfig, str(REPO / f"configs/{name}/ranker.yaml"))
    assert set(config.variants) <= set(VARIANTS)
    assert config.head.batch_norm == {"debug": "single", "paper": "per_side"}[name]


def test_defaults_of_the_head_are_the_releases_but_for_those_that_its_docstring_names():
    release = {
        "widths": (1024, 512, 256, 128),
        "batch": 32,
        "lr": 1e-4,
        "weight_decay": 1e-3,
        "dropout": 0.5,
        "max_epochs": 1000,
        "patience": 30,
        "min_improvement": 1e-4,
        "batch_norm": "per_side",
        "random_sides": False,
    }
    ours = HeadConfig().model_dump()
    assert ours.keys() == release.keys()
    differing = {name for name in ours if ours[name] != release[name]}
    assert {name for name in ours if f"`{name}`" in (HeadConfig.__doc__ or "")} == differing


# ---- what it learns from real audio -----------------------------------------------------------------------


def test_real_clips_of_held_out_prompts_are_ranked_better_than_chance(data_dir):
    """48 clips of 24 prompts, ranked by statistics of their log-mel spectrogram in place of an encoder.

    Six-fold cross-validation by prompt, in four partitions: a head sees the pairs among the clips of 16 prompts, stops
    by those of 4 others, and ranks the 8 clips of the last 4. The interval resamples prompts; pairs of one prompt and
    of two weigh accordingly. Much of it is telling the two systems apart, so pairs within a system are looked at, too.
    """
    rows = list(csv.DictReader((data_dir / "clips/clips.csv").open()))
    reward = np.array([float(row["tunejury_reward"]) for row in rows])
    _, prompt = np.unique([row["prompt_id"] for row in rows], return_inverse=True)
    mel = LogMel()
    with torch.inference_mode():
        mels = [mel(torch.from_numpy(read_clip(str(data_dir / row["path"])))[None])[0].numpy() for row in rows]
    clips = np.stack([np.concatenate([m.mean(1), m.std(1), np.abs(np.diff(m, axis=1)).mean(1)]) for m in mels])
    blocks = {"clap_audio": clips, "mert": clips[:, :0], "text": np.zeros((1, 0), np.float32)}
    config = HeadConfig(widths=(64, 32), lr=1e-3, batch=64, patience=10)

    def pairs(which: np.ndarray) -> dict[str, np.ndarray]:
        a, b = (np.flatnonzero(which)[side] for side in np.triu_indices(which.sum(), 1))
        return {"a": a, "b": b, "prompt": np.zeros_like(a), "target": reward[a] > reward[b]}

    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for seed in range(4):
        fold = (np.random.default_rng(seed).permutation(24) % 6)[prompt]
        for held_out in range(6):
            stop = (held_out + 1) % 6
            parts = (~np.isin(fold, (held_out, stop)), fold == stop, fold == held_out)
            train, validation, test = (pack(blocks, pairs(part), "A1") for part in parts)
            margin = margins(train_head(train, validation, config, seed).head, test).numpy()
            found.append((test.a.numpy(), test.b.numpy(), report.correct(margin, test.target.numpy())))
    a, b, right = (np.concatenate(column) for column in zip(*found, strict=True))
    times = np.random.default_rng(0).multinomial(24, np.full(24, 1 / 24), size=4000)
    weight = np.where(prompt[a] == prompt[b], times[:, prompt[a]], times[:, prompt[a]] * times[:, prompt[b]])
    low, high = np.quantile(weight @ right / weight.sum(1), (0.025, 0.975))
    system = np.array([row["system"] for row in rows])
    within = right[system[a] == system[b]].mean()
    print(f"accuracy {right.mean():.3f}, 95 % {low:.3f} to {high:.3f}; within a system {within:.3f}")
    assert low > 0.5
