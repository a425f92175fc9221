"""Stage 3: the loss and its closed form, pairs that share their draws, a reference that stays, a toy that learns."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from synthetic_pool import Candidate, write_pool

from ttmray.cluster import ActorsConfig
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.steering import LOST, SteeringConfig
from ttmray.models.backbone import FluxAudio
from ttmray.models.score_heads import Head
from ttmray.storage import Folder
from ttmray.training import crpo
from ttmray.training import pairs as preference_pairs
from ttmray.training.config import (
    CheckpointConfig,
    EmaConfig,
    ModelConfig,
    TrainConfig,
    TrainRuntime,
    ValidationConfig,
)
from ttmray.training.crpo import (
    CrpoConfig,
    CrpoFlow,
    CrpoOptimizer,
    CrpoTask,
    crpo_losses,
    losers_rise,
    train_crpo,
)
from ttmray.training.data import DataConfig, SourceConfig, draws, loader
from ttmray.training.export import export
from ttmray.training.flow_matching import flow_losses
from ttmray.training.launch import launch
from ttmray.training.pair_mixture import open_pairs
from ttmray.training.pairs import PairsConfig, build_pairs
from ttmray.training.reference_losses import ReferenceLosses
from ttmray.training.sft import SMALL, SftTask
from ttmray.training.tensors import pack

REPO = Path(__file__).resolve().parents[2]
SHAPE = (4, 2)
CPU = torch.device("cpu")
Configure = Callable[..., CrpoConfig]


def initial(path: Path, head: Head) -> str:
    """A file of seeded weights."""
    shape = {"latent_dim": SHAPE[1], "latent_len": SHAPE[0], "text_len": 3, "text_dim": 8}
    torch.manual_seed(0)
    model = FluxAudio(replace(SMALL["debug"], **shape, head=head))
    with torch.no_grad():
        model.latent_mean.zero_()
        model.latent_std.fill_(1.0)
    path.write_bytes(pack(model.state_dict(), {"backbone": model.config.to_dict()}))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pool/` of 24 prompts, whose winners lie around 0.5 and losers around -0.5, `pairs/`, and `v1.safetensors`, a v1
    model after a short training on all clips."""
    folder, rng = tmp_path_factory.mktemp("crpo"), np.random.default_rng(0)
    clips = []
    for i in range(24):
        for candidate, mean in enumerate((0.5, -0.5)):
            latent = mean + 0.5 * rng.standard_normal(SHAPE)
            clips.append(Candidate(f"p{i}", candidate, latent, mean, float(latent.mean())))
    prompts = {f"p{i}": (f"prompt {i}", rng.standard_normal((3, 8))) for i in range(24)}
    pool = write_pool(str(folder / "pool"), clips, prompts)
    build_pairs(pool.uri, str(folder / "pairs"), PairsConfig())
    config = TrainConfig(
        output=str(folder / "stage1"),
        data=DataConfig(sources=(SourceConfig(corpus=pool.uri),), threads=0),
        model=ModelConfig(size="debug", head="v1", init=initial(folder / "initial.safetensors", "v1")),
        optimizer=CrpoOptimizer(lr=2e-3, warmup=0),
        ema=EmaConfig(sigma_rels=(0.05,)),
        batch=32,
        steps=60,
        precision="fp32",
        validation=ValidationConfig(clips=0),
        runtime=TrainRuntime(device="cpu", threads=1, device_batch=32, tensorboard=False),
    )
    assert launch("sft", config, SftTask) == 0
    export(config.output, str(folder / "v1.safetensors"))
    return folder


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Configure:
    def make(**fields: Any) -> CrpoConfig:
        batch = fields.get("batch", 4)
        usual: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "pairs": str(folder / "pairs" / "pairs.parquet"),
            "data": DataConfig(sources=(SourceConfig(corpus=str(folder / "pool"), split="all"),), threads=0),
            "model": ModelConfig(size="debug", head="v2", init=str(folder / "v1.safetensors")),
            "optimizer": CrpoOptimizer(lr=1e-4, warmup=0),
            "ema": EmaConfig(sigma_rels=(0.05,)),
            "batch": batch,
            "steps": 4,
            "precision": "fp32",
            "checkpoint": CheckpointConfig(every=1000),
            "runtime": TrainRuntime(device="cpu", threads=1, device_batch=batch, log_every=2, tensorboard=False),
        }
        return CrpoConfig(**(usual | fields))

    return make


def metrics(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def double(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_golden_values_of_the_loss():
    found = crpo_losses(*double(0.50, 0.60, 0.51, 0.59))
    assert found.inside.item() == pytest.approx(20)
    assert found.total.item() - 0.5 == pytest.approx(2.06e-9, rel=1e-2)
    found = crpo_losses(*double(0.5001, 0.6000, 0.5000, 0.6000))
    assert found.inside.item() == pytest.approx(-0.1)
    assert found.total.item() == pytest.approx(1.244497, abs=1e-6)
    assert found.dpo.item() == pytest.approx(0.744397, abs=1e-6)
    literal = crpo_losses(*double(0.5001, 0.6000, 0.5000, 0.6000), factor=1.0)
    assert literal.inside.item() == pytest.approx(-0.2)


@settings(deadline=None)
@given(st.lists(st.floats(0, 2), min_size=4, max_size=4), st.floats(0.1, 5000), st.floats(0, 3))
def test_gradients_are_those_of_the_closed_form(values, beta, weight):
    tensors = [tensor.requires_grad_() for tensor in double(*values)]
    found = crpo_losses(*tensors, beta=beta, fm_weight=weight)
    found.total.sum().backward()
    winner, loser, reference_winner, reference_loser = values
    inside = -beta / 2 * ((winner - loser) - (reference_winner - reference_loser))
    pull = beta / 2 / (1 + math.exp(min(inside, 700)))  # beta / 2 sigmoid(-inside)
    for tensor, expected in zip(tensors, (pull + weight, -pull, -pull, pull), strict=True):
        assert tensor.grad.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert torch.autograd.gradcheck(lambda *x: crpo_losses(*x, beta=5.0).total, tensors)


def test_winner_and_loser_share_the_draws_of_their_pair(configure):
    config = configure()
    pairs = open_pairs(config.pairs, config.data)
    table = preference_pairs.read_pairs(config.pairs)
    partner = dict(zip(table["winner"].to_pylist(), table["loser"].to_pylist(), strict=True))
    assert len(pairs) == 24
    for samples in (next(loader(pairs, config.data, start=start, batch=3)) for start in (0, 22, 100)):
        assert samples.numbers.tolist()[:3] == samples.numbers.tolist()[3:]
        assert [partner[key] for key in samples.keys[:3]] == samples.keys[3:]
        assert samples.batch.score.tolist() == [0.5] * 3 + [-0.5] * 3
        assert (samples.batch.mean[:3].mean((1, 2)) > samples.batch.mean[3:].mean((1, 2))).all()
        assert torch.equal(samples.batch.text[:3], samples.batch.text[3:])
        for i, number in enumerate(samples.numbers.tolist()[:3]):
            for name, expected in draws(config.data.seed, number, SHAPE)._asdict().items():
                drawn = getattr(samples.batch, name)
                np.testing.assert_array_equal(drawn[i], expected.squeeze())
                np.testing.assert_array_equal(drawn[i + 3], expected.squeeze())


def test_every_epoch_draws_every_pair_once_in_another_order(configure):
    config = configure()
    pairs = open_pairs(config.pairs, config.data)
    epochs = pairs.clips(range(48)).reshape(2, 24)
    assert all(sorted(epoch.tolist()) == list(range(24)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_at_the_start_policy_and_reference_agree_to_the_bit(configure):
    config = configure(gradients_every=1)
    task = CrpoTask(config, CPU)
    samples = next(task.batches(0, 4, 0, 1, False))
    found = task.losses(samples, task.model.train())
    assert found.losses.shape == found.t.shape == (4,)
    assert found.extra["margin"].tolist() == [0.0] * 4
    assert found.extra["implicit_accuracy"].tolist() == [0.0] * 4
    losses, t = flow_losses(task.model, task.scored(samples).batch, config.flow)
    assert torch.equal(t[:4], t[4:])
    torch.testing.assert_close(found.losses, math.log(2) + losses[:4])
    # so the gradients are 500 (g_w - g_l) and g_w
    trained = [p for p in task.model.parameters() if p.requires_grad]
    expected = []
    for term in (500 * (losses[:4] - losses[4:]).mean(), losses[:4].mean()):
        parts = torch.autograd.grad(term, trained, retain_graph=True)
        expected.append(torch.cat([part.flatten() for part in parts]).norm())
    torch.testing.assert_close(found.extra["dpo_grad_norm"], expected[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.extra["fm_grad_norm"], expected[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.extra["dpo_fm_grad_ratio"], expected[0] / expected[1], rtol=1e-4, atol=0)
    assert all(p.grad is None for p in trained)


@pytest.mark.slow
def test_a_compiled_policy_in_bf16_agrees_with_its_reference_to_the_bit(configure):
    runtime = TrainRuntime(device="cpu", threads=1, device_batch=4, tensorboard=False, compile=True)
    task = CrpoTask(configure(precision="bf16", gradients_every=1, runtime=runtime), CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what starts at zero hides roundings
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        task.reference.load_state_dict(task.model.state_dict())
    forward = torch.compile(task.model.train())
    with torch.autocast("cpu", torch.bfloat16):
        found = task.losses(next(task.batches(0, 4, 0, 1, False)), forward)
    assert found.extra["margin"].tolist() == [0.0] * 4
    found.losses.mean().backward()
    assert found.extra["dpo_grad_norm"] > found.extra["fm_grad_norm"] > 0


def test_the_reference_is_the_whole_starting_model_and_stays(configure, folder):
    task = CrpoTask(configure(), CPU)
    start = load_file(folder / "v1.safetensors")
    before = {name: tensor.clone() for name, tensor in task.reference.state_dict().items()}
    assert before.keys() == start.keys()
    assert all(torch.equal(before[name], start[name]) for name in start)
    assert not task.reference.training
    assert not any(p.requires_grad for p in task.reference.parameters())
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], 1e-3)
    task.losses(next(task.batches(0, 4, 0, 1, False)), task.model.train()).losses.mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in task.reference.state_dict().items())
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in ("score_embed", "text_input_proj", "text_cond_proj", "t_embed"):  # conditioning layers learn, too
        assert any(name.startswith(part) for name in changed)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [2.0, 2.0]),
        ({"score": "target"}, [2.0, 2.0]),
        ({"score": "pair"}, [0.0, 0.0]),
        ({"score": "own"}, [0.5, -0.5]),
        ({"score": 1.5}, [1.5, 1.5]),
        ({"score": None}, None),
    ],
)
def test_winner_and_loser_have_one_score_unless_their_own_are_asked_for(configure, fields, expected):
    task = CrpoTask(configure(**fields, flow=CrpoFlow(score_dropout_rate=0), gradients_every=0), CPU)
    seen = []

    def forward(*inputs: Any) -> torch.Tensor:
        seen.append(inputs[4:])
        return task.model(*inputs)

    task.losses(next(task.batches(0, 1, 0, 1, False)), forward)
    ((scores, null),) = seen
    assert (scores is None) if expected is None else scores.tolist() == expected
    assert null is None or not null.any()


def test_a_score_of_the_pair_is_of_each_pair(configure):
    task = CrpoTask(configure(score="pair"), CPU)
    samples = next(task.batches(0, 3, 0, 1, False))
    rewards = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 2.0])  # winners, then losers
    scored = task.scored(samples._replace(batch=samples.batch._replace(score=rewards)))
    assert scored.batch.score.tolist() == [0.0, 1.0, 2.5] * 2


def test_the_target_is_what_the_pool_says(configure, folder, tmp_path):
    pool = Path(shutil.copytree(folder / "pool", tmp_path / "pool"))
    data = DataConfig(sources=(SourceConfig(corpus=str(pool), split="all"),), threads=0)
    whole = pq.read_table(pool / "index.parquet")

    def wrote(scores: list[float | None] | None) -> CrpoConfig:
        table = whole.drop_columns("input_score")
        if scores is not None:
            table = table.append_column("input_score", pa.array(scores, pa.float64()))
        pq.write_table(table, pool / "index.parquet")
        return configure(data=data)

    rows = whole.num_rows
    assert CrpoTask(wrote([-1.5] * rows), CPU).score == -1.5
    assert CrpoTask(wrote([None] * rows), CPU).score is None  # sampled without a score
    config = wrote([1.0] + [2.0] * (rows - 1))
    with pytest.raises(UserError, match="was sampled at 2 scores") as caught:
        CrpoTask(config, CPU)
    assert caught.value.hint == "Set score to a number, pair, own or null."
    assert CrpoTask(config.model_copy(update={"score": "own"}), CPU).score == "own"
    with pytest.raises(UserError, match="has no column input_score"):
        CrpoTask(wrote(None), CPU)


OWN, PAIR, TWO, NONE = (-0.5, 0.5, 2), (-0.5, 0.5, 2), (-0.5, 2.0, 2), (-0.5, 0.5, 1)


@pytest.mark.parametrize(("score", "expected"), [("own", OWN), ("pair", PAIR), (2.0, TWO), (None, NONE)])
def test_the_scores_of_pairs_widen_the_range_of_the_weights_they_start_from(configure, score, expected):
    task = CrpoTask(configure(score=score), CPU)
    support = task.facts["score_support"]
    assert (support["min"], support["max"], len(support["trainings"])) == expected
    if score == "own":
        assert support["trainings"][1]["clips"] == 2 * len(task.pairs)
        assert support["trainings"][1]["mean"] == pytest.approx(0)
    if score == "pair":
        assert support["trainings"][1]["max"] == 0.0


def test_a_toy_learns_its_preferences_without_unlearning_the_winners(configure, capsys):
    config = configure(batch=16, steps=50, optimizer=CrpoOptimizer(lr=1e-4, warmup=5), gradients_every=10)
    assert train_crpo(config) == 0
    printed = capsys.readouterr().out
    tensors = len(CrpoTask(config, CPU).model.state_dict())
    assert f"init: {tensors} tensors loaded" in printed  # v1 -> v2, all of them
    lines = metrics(config.output)
    last = lines[-5:]
    assert np.mean([line["implicit_accuracy"] for line in last]) > 0.9
    assert np.mean([line["margin"] for line in last]) > 1
    gains = [line["winner_loss"] - line["reference_winner_loss"] for line in last]
    assert np.mean(gains) < 0
    assert lines[0]["dpo_fm_grad_ratio"] > 10  # the FM term hardly counts at first
    assert lines[0]["dpo_fm_grad_ratio"] > 3 * min(line.get("dpo_fm_grad_ratio", math.inf) for line in lines)


def test_a_resumed_run_ends_in_the_same_bits_and_measuring_changes_none(configure, tmp_path):
    weights = {}
    for name, stops, every in (("whole", [6], 0), ("resumed", [2, 6], 0), ("measured", [6], 1)):
        for steps in stops:
            config = configure(
                output=str(tmp_path / name), steps=steps, gradients_every=every, checkpoint=CheckpointConfig(every=2)
            )
            assert train_crpo(config) == 0
        weights[name] = load_file(tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors")
    for other in ("resumed", "measured"):
        assert all(torch.equal(weights["whole"][key], weights[other][key]) for key in weights["whole"])
    assert not any("dpo_grad_norm" in line for line in metrics(str(tmp_path / "whole")))
    assert len(metrics(str(tmp_path / "resumed"))) == len(metrics(str(tmp_path / "whole"))) == 3


def test_reference_losses_made_ahead_give_the_same_bits_and_are_shared_by_a_sweep(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceLosses, "PART", 10)  # numbers of a batch lie across two parts
    made: list[int] = []
    write = ReferenceLosses.write
    monkeypatch.setattr(
        ReferenceLosses, "write", lambda self, part, losses: (made.append(part), write(self, part, losses))
    )
    weights = {}
    for name, beta, steps, ahead in (
        ("beside", 2000, 6, None),
        ("ahead", 2000, 4, "shared"),
        ("ahead", 2000, 6, "shared"),  # more updates need another part
        ("sweep", 500, 6, "shared"),
        ("beside, 500", 500, 6, None),
    ):
        folder = None if ahead is None else str(tmp_path / ahead)
        config = configure(
            output=str(tmp_path / name), beta=beta, steps=steps, reference_losses=folder, gradients_every=2
        )
        assert train_crpo(config) == 0
        weights[name] = (
            load_file(tmp_path / name / "checkpoints" / "step-00000006" / "model.safetensors") if steps == 6 else {}
        )
    assert made == [0, 1, 2]
    for one, other in (("beside", "ahead"), ("beside, 500", "sweep")):
        assert all(torch.equal(weights[one][key], weights[other][key]) for key in weights[one])
    shared = {"reference_losses": str(tmp_path / "shared")}
    task = CrpoTask(config.model_copy(update=shared), CPU)
    assert (task.reference, task.frozen_models) == (None, 0)
    assert task.open_table(4, CPU).missing(30) == task.open_table(2, CPU).missing(30) == []
    assert task.open_table(4, torch.device("cuda")).missing(30) == [0, 1, 2]
    assert CrpoTask(configure(score=2.0, **shared), CPU).open_table(4, CPU).missing(30) == []  # the target is 2
    others: list[dict[str, Any]] = [{"score": score} for score in (1.0, "pair", "own", None)]
    for fields in (*others, {"runtime": config.runtime.model_copy(update={"compile": True})}):
        assert CrpoTask(configure(**fields, **shared), CPU).open_table(4, CPU).missing(30) == [0, 1, 2]
    tables = [CrpoTask(configure(precision="bf16", **shared), CPU).open_table(batch, CPU) for batch in (2, 4)]
    assert tables[0].folder.uri != tables[1].folder.uri


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1.0), ("cpu", 0.0)])
def test_the_reference_runs_where_the_workers_train(configure, tmp_path, monkeypatch, device, gpus):
    runtime = TrainRuntime(runner="ray", workers=2, cpus=2, device="auto", device_batch=2)
    config = configure(runtime=runtime, reference_losses=str(tmp_path / "shared"))
    asked = []
    monkeypatch.setattr(crpo, "each", lambda make, todo, pool: asked.append((make.args[1:], todo, pool)) or [])
    crpo._precompute(config, CrpoTask(config, CPU), 2, torch.device(device))  # the driver of workers has it on its CPU
    assert asked == [((device, 2), [0], ActorsConfig(runner="ray", device=device, workers=2, cpus=2, gpus=gpus))]


def test_damaged_reference_losses_are_named(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceLosses, "PART", 16)
    config = configure(reference_losses=str(tmp_path / "shared"))
    assert train_crpo(config) == 0
    (part,) = (tmp_path / "shared").rglob("*.safetensors")
    part.write_bytes(pack({"losses": torch.full((16, 2), float("nan"))}))
    with pytest.raises(UserError, match=r"losses-00000000\.safetensors does not hold 16 pairs"):
        train_crpo(configure(output=str(tmp_path / "again"), reference_losses=str(tmp_path / "shared")))


def line_of(winner: float, loser: float) -> dict[str, float]:
    """A log line with these differences of losses to the reference's."""
    ours = {"winner_loss": 1 + winner, "loser_loss": 1 + loser}
    return ours | {"reference_winner_loss": 1.0, "reference_loser_loss": 1.0}


def test_losers_that_rise_without_better_winners_are_noticed_and_noise_is_not():
    def noticed(*sides: tuple[float, float]) -> list[bool]:
        lines = [line_of(*side) for side in sides]
        return [losers_rise(lines[: i + 1]) for i in range(len(lines))]

    healthy = [(-0.01 * i, 0.01 * i) for i in range(30)]  # winners get better, losers worse
    assert not any(noticed(*healthy))
    bad = noticed(*healthy, *((-0.3 + 0.001 * i, 0.3 + 0.01 * i) for i in range(30)))
    assert bad[-1]
    assert sum(now and not before for before, now in itertools.pairwise(bad)) == 1
    again = noticed(*((-0.3 - 0.01 * i, 0.6) for i in range(30)), *((-0.6, 0.6 + 0.01 * i) for i in range(30)))
    assert not any(again[:30])
    assert again[-1]
    rng = np.random.default_rng(0)
    quiet = noticed(*(tuple(0.001 * rng.standard_normal(2)) for _ in range(2000)))  # noise alone
    assert sum(now and not before for before, now in itertools.pairwise(quiet)) < 100


def test_a_run_that_unlearns_is_told_so_once(configure, capsys):
    task = CrpoTask(configure(), CPU)
    lines = [line_of(0.01 * i, 0.1 * i) for i in range(12)]
    noted = [task.note(4 * i, 4 * i + 4, lines[: i + 1])["loser_rises"] for i in range(12)]
    assert noted == [False] * 9 + [True] * 3
    told = capsys.readouterr().out
    assert told.count("unlearns losers") == 1
    assert "update 10" in told


def test_a_resumed_run_notices_what_an_undisturbed_one_does(configure, tmp_path):
    rises = {}
    for name, stops in (("whole", [30]), ("resumed", [7, 16, 23, 30])):
        for steps in stops:
            runtime = TrainRuntime(device="cpu", threads=1, device_batch=4, log_every=1, tensorboard=False)
            wild: dict[str, Any] = {"optimizer": CrpoOptimizer(lr=3e-3, warmup=0), "score": "own"}  # so it unlearns
            config = configure(output=str(tmp_path / name), steps=steps, runtime=runtime, gradients_every=0, **wild)
            assert train_crpo(config) == 0
        rises[name] = [line["loser_rises"] for line in metrics(config.output)]
    assert rises["whole"] == rises["resumed"]
    assert any(rises["whole"])


def test_a_reference_of_another_head_is_refused(configure, folder, tmp_path):
    def model(file: str, head: Head) -> ModelConfig:
        return ModelConfig(size="debug", head=head, init=file)

    for theirs, ours, message in (
        ("none", "v2", "has no score head"),
        ("v3", "v2", "has the score head v3, model.head is v2"),
        ("v2", "v1", "was trained as v2 and collapses as v1"),
    ):
        file = initial(tmp_path / f"{theirs}.safetensors", theirs)
        with pytest.raises(UserError, match=message):
            CrpoTask(configure(model=model(file, ours)), CPU)
    CrpoTask(configure(model=model(str(folder / "v1.safetensors"), "v4")), CPU)


def test_a_cross_load_is_measured_once_said_aloud_and_changes_no_bit(configure, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ttmray.training.cross_load._Measure", lambda *a: pytest.fail("measured though it is off"))
        off = configure(output=str(tmp_path / "off"), steps=2, cross_load=SteeringConfig(prompts=0))
        assert train_crpo(off) == 0
    capsys.readouterr()
    config = configure(output=str(tmp_path / "on"), steps=2)
    assert train_crpo(config) == 0
    said = capsys.readouterr().out
    assert said.count("v1 weights in the v2 forward") == 1
    report = json.loads((tmp_path / "on" / "cross_load.json").read_text())
    assert (report["weights"], report["forward"], report["prompts"]) == ("v1", "v2", 4)
    before, after = report["forwards"]["v1"], report["forwards"]["v2"]
    assert before["kept"] == pytest.approx(1.0)
    assert before["moved"] > 0.1  # these weights follow their score
    assert report["lost"] == (after["kept"] < LOST)
    assert ("the cross-load has lost the score" in said) == report["lost"]
    assert f"v1 forward: latents move by {before['moved']:.3f} sd" in said
    assert "delta_out is not measured" in said  # the pool names no bundle that is there
    assert not (tmp_path / "off" / "cross_load.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("ttmray.training.cross_load._Measure", lambda *a: pytest.fail("measured again"))
        for one in (config, off):
            assert train_crpo(one.model_copy(update={"steps": 4})) == 0
    assert "v1 forward: latents move by" in capsys.readouterr().out
    on, without = (load_file(tmp_path / run / "checkpoints/step-00000004/model.safetensors") for run in ("on", "off"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in on.items())


def test_stage_3_stays_in_v1_without_a_cross_load(configure, folder, tmp_path, capsys):
    model = ModelConfig(size="debug", head="v1", init=str(folder / "v1.safetensors"))
    assert train_crpo(configure(model=model, steps=2)) == 0
    assert not (tmp_path / "run" / "cross_load.json").exists()
    assert "weights in the" not in capsys.readouterr().out


def test_a_reference_with_another_null_is_refused(configure, folder):
    model = ModelConfig(size="debug", head="v2", null="scalar_zero", init=str(folder / "v1.safetensors"))
    with pytest.raises(UserError, match=r"trained with null zero_embedding, model\.null is scalar_zero") as caught:
        CrpoTask(configure(model=model), CPU)
    assert caught.value.hint == "Set model.null: zero_embedding."


def test_pairs_must_be_those_of_the_pool(configure, folder, tmp_path):
    clips = [Candidate("p0", i, np.zeros(SHAPE), float(i), float(i), split="test") for i in range(2)]
    other = write_pool(str(tmp_path / "other"), clips, {"p0": ("prompt 0", np.zeros((3, 8)))})
    source = DataConfig(sources=(SourceConfig(corpus=other.uri, split="all"),), threads=0)
    with pytest.raises(UserError, match="another pool"):
        CrpoTask(configure(data=source), CPU)
    (tmp_path / "keys.txt").write_text("p0_0\n")
    some = SourceConfig(corpus=str(folder / "pool"), split="all", keys=str(tmp_path / "keys.txt"))
    with pytest.raises(UserError, match="47 clips are not among those of"):
        CrpoTask(configure(data=DataConfig(sources=(some,), threads=0)), CPU)


def test_wrong_configs_are_refused_and_defaults_are_the_papers(configure, folder):
    pool = SourceConfig(corpus=str(folder / "pool"), split="all")
    for fields, message in (
        ({"model": ModelConfig(size="debug", head="v2")}, "init is needed"),
        ({"data": DataConfig(sources=(pool, pool))}, "must be the one pool"),
        ({"validation": ValidationConfig()}, "clips must be 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            configure(**fields)
    sets = [
        "output=run",
        "pairs=pairs.parquet",
        "model.init=a.safetensors",
        "model.head=v2",
        "flow.score_dropout_rate=0",
    ]
    config = load_config(CrpoConfig, None, [*sets, "data={sources: [{corpus: pool}]}", "optimizer.eps=1e-8"])
    assert (config.beta, config.fm_weight, config.log_ratio, config.steps, config.batch) == (
        2000,
        1,
        "tangoflux",
        5000,
        8,
    )
    assert (config.optimizer.lr, config.optimizer.warmup, config.optimizer.schedule) == (1e-6, 100, "constant")
    assert (config.flow.text_dropout, config.flow.score_dropout_rate) == (0, 0)
    assert config.score == "target"
    assert Folder.at(config.output).uri.endswith("/run")


@pytest.mark.parametrize(("name", "beta", "updates"), [("debug", 2000, 30), ("paper", 2000, 5000)])
def test_shipped_configs_are_valid(name, beta, updates):
    config = load_config(CrpoConfig, f"{REPO}/configs/{name}/stage3.yaml")
    assert (config.model.head, config.beta, config.steps, config.flow.text_dropout) == ("v2", beta, updates, 0)


def test_the_config_that_stays_in_v1_differs_in_nothing_else():
    hybrid, stays = (load_config(CrpoConfig, f"{REPO}/configs/paper/{name}.yaml") for name in ("stage3", "stage3-v1"))
    assert stays.model.head == "v1"
    same = {"output": hybrid.output, "model": hybrid.model}
    assert stays.model_copy(update=same) == hybrid
