"""Stage 2 on a toy whose reward is known: a linear functional of the latent."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damages import DAMAGES
from pydantic import ValidationError
from synthetic_pool import Candidate, write_pool

from ttmray import cost
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.filter import FilterConfig
from ttmray.generation.sampler import integrate, noise, time_grid
from ttmray.models import one_thread
from ttmray.models.backbone import FluxAudio
from ttmray.models.backbone_weights import load_backbone
from ttmray.statistics import paired
from ttmray.storage import Folder
from ttmray.training import expert_iteration as expert_iteration_module
from ttmray.training.clips import read_keys
from ttmray.training.config import CheckpointConfig, EmaConfig, ModelConfig, TrainRuntime, ValidationConfig
from ttmray.training.data import DataConfig, SourceConfig, open_mixture
from ttmray.training.expert_iteration import (
    ExpertIterationConfig,
    FineTuneOptimizer,
    PolishConfig,
    expert_iteration,
    finetuning,
    polishing,
)
from ttmray.training.launch import launch
from ttmray.training.sft import SMALL
from ttmray.training.tensors import pack, unpack
from ttmray.verify import verify

REPO = Path(__file__).resolve().parents[2]
FRAMES, CHANNELS, WIDTH = 4, 2, 8
PROMPTS = {f"p{i}": (f"prompt {i}", np.random.default_rng(i).standard_normal((3, WIDTH))) for i in range(6)}


def reward(latents: np.ndarray) -> np.ndarray:
    """(n,) the true reward of latents (n, N, C): the mean of channel 0."""
    return latents[..., 0].mean(-1)


def initial(path: Path) -> str:
    """A file of seeded weights without a score head."""
    shape = {"latent_dim": CHANNELS, "latent_len": FRAMES, "text_len": 3, "text_dim": WIDTH}
    torch.manual_seed(0)
    model = FluxAudio(replace(SMALL["debug"], **shape))
    with torch.no_grad():
        model.latent_mean.zero_()
        model.latent_std.fill_(1.0)
    path.write_bytes(pack(model.state_dict(), {"backbone": model.config.to_dict()}))
    return str(path)


def sample(weights: str, candidates: int, seed: int) -> list[Candidate]:
    """Clips of every prompt in 8 Euler steps, with their true reward and a CLAP score that says nothing."""
    model = load_backbone(weights)
    clips = []
    for name, (_, text) in PROMPTS.items():
        x = torch.stack([noise(seed, name, (FRAMES, CHANNELS), i) for i in range(candidates)])
        features = torch.from_numpy(text).float().expand(candidates, -1, -1), torch.zeros(candidates, 512)
        with torch.inference_mode():
            conditions = model.conditions(*features)
            made = integrate(lambda x, t, _, c=conditions: model.velocity(x, t.expand(len(x)), c), x, time_grid(8))
        chance = np.random.default_rng(seed).standard_normal(candidates)
        latents = model.unnormalise(made).detach().numpy()
        scores = zip(latents, reward(latents), chance, strict=True)
        clips += [Candidate(name, i, z, float(r), float(c)) for i, (z, r, c) in enumerate(scores)]
    return clips


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 clips of normal latents with mean 0.3 and standard deviation 0.7."""
    folder, rng = tmp_path_factory.mktemp("corpus") / "corpus", np.random.default_rng(7)
    latents = 0.3 + 0.7 * rng.standard_normal((6, 32, FRAMES, CHANNELS))
    clips = [
        Candidate(name, i, latent, float(reward(latent)))
        for name, some in zip(PROMPTS, latents, strict=True)
        for i, latent in enumerate(some)
    ]
    write_pool(str(folder), clips, PROMPTS)
    return folder


def configure(corpus: Path, output: Path, init: str, **fields: object) -> ExpertIterationConfig:
    batch = fields.get("batch", 4)
    return ExpertIterationConfig(
        **{
            "output": str(output),
            "data": DataConfig(sources=(SourceConfig(corpus=str(corpus), score_column=None),), threads=0),
            "model": ModelConfig(size="debug", head="none", init=init),
            "ema": EmaConfig(sigma_rels=(0.05,)),
            "batch": batch,
            "steps": 4,
            "polish": PolishConfig(steps=3, lr=1e-4),
            "filter": FilterConfig(max_similarity=None),
            "precision": "fp32",
            "checkpoint": CheckpointConfig(every=1000),
            "validation": ValidationConfig(clips=0),
            "runtime": TrainRuntime(device="cpu", threads=1, device_batch=batch, log_every=20, tensorboard=False),
            **fields,
        }
    )


def sampler(candidates: int, calls: list[str] | None = None) -> Callable[[str, str], None]:
    """What makes pools in these tests; notes the weights that it was called with."""

    def sample_pool(weights: str, folder: str) -> None:
        if calls is not None:
            calls.append(weights)
        write_pool(folder, sample(weights, candidates, seed=1), PROMPTS)

    return sample_pool


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return initial(tmp_path_factory.mktemp("start") / "initial.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_expert_iteration_raises_the_true_reward_and_the_control_does_not(corpus, start, tmp_path):
    def weights(folder: str, name: str) -> str:
        return str(tmp_path / folder / "round-1" / f"{name}.safetensors")

    learn = {"batch": 32, "steps": 80, "optimizer": FineTuneOptimizer(lr=2e-3), "polish": PolishConfig(steps=0)}
    assert expert_iteration(configure(corpus, tmp_path / "stage1", start, control=True, **learn)) == 0
    stage1 = weights("stage1/control", "finetune")
    tune = {
        "batch": 32,
        "steps": 40,
        "optimizer": FineTuneOptimizer(lr=5e-4),
        "polish": PolishConfig(steps=10, lr=2e-4),
    }
    for control in (False, True):
        config = configure(corpus, tmp_path, stage1, control=control, **tune)
        assert expert_iteration(config, sampler(20)) == 0
    before, expert, control = (
        np.array([clip.reward for clip in sample(file, 20, seed=2)])
        for file in (stage1, weights("expert", "polish"), weights("control", "polish"))
    )
    gained, drifted = paired(expert, before), paired(control, before)
    # Intervals, not p: with the same noises, any two trainings differ "significantly"; they are one draw each.
    assert gained.low > 0.3
    assert -0.1 < drifted.low < drifted.high < 0.1
    assert paired(expert, control, alternative="greater").p < 1e-6


@pytest.mark.slow
def test_reward_weighted_fine_tuning_raises_the_true_reward_and_equal_weights_do_not(corpus, start, tmp_path):
    learn = {"batch": 32, "steps": 80, "optimizer": FineTuneOptimizer(lr=2e-3), "polish": PolishConfig(steps=0)}
    assert expert_iteration(configure(corpus, tmp_path / "stage1", start, control=True, **learn)) == 0
    stage1 = str(tmp_path / "stage1/control/round-1/finetune.safetensors")
    reached = {}
    for name, temperature in (("weighted", 0.3), ("alike", 1e9)):
        tune = {"batch": 32, "steps": 40, "optimizer": FineTuneOptimizer(lr=5e-4)}
        only_reward = FilterConfig(max_similarity=None, clap_weight=0, temperature=temperature)
        config = configure(
            corpus, tmp_path / name, stage1, filter=only_reward, oversample=10, polish=PolishConfig(steps=0), **tune
        )
        assert expert_iteration(config, sampler(20)) == 0
        file = str(tmp_path / name / "expert/round-1/finetune.safetensors")
        reached[name] = np.array([clip.reward for clip in sample(file, 20, seed=2)])
    before = np.array([clip.reward for clip in sample(stage1, 20, seed=2)])
    gained, drifted = paired(reached["weighted"], before), paired(reached["alike"], before)
    print(gained, drifted)
    assert gained.low > 0.2
    assert -0.1 < drifted.low < drifted.high < 0.1
    selection = tmp_path / "weighted/expert/round-1/selection"
    weights = read_keys(str(selection / "weights.csv"))
    assert len(weights) == 20 * len(PROMPTS)
    assert np.mean(list(weights.values())) == pytest.approx(1, abs=1e-6)


def test_kept_clips_are_drawn_five_times_as_often_and_polishing_draws_nothing_else(corpus, start, tmp_path):
    config = configure(corpus, tmp_path, start, batch=51, steps=8)
    assert expert_iteration(config, sampler(20)) == 0
    place = tmp_path / "expert" / "round-1"
    kept = (place / "selection" / "kept.txt").read_text().split()
    assert len(kept) == 12
    experts = SourceConfig(
        corpus=str(place / "pool"), split="all", keys=str(place / "selection" / "kept.txt"), score_column=None
    )
    mixture = open_mixture(finetuning(config, Folder.at(str(place)), start, experts).data)
    assert mixture.per_epoch == [192, 60]
    epoch = mixture.clips(range(252, 504))
    assert np.bincount(epoch, minlength=204).tolist() == [1] * 192 + [5] * 12
    drawn = [line["drawn"] for line in metrics(place / "finetune")]
    assert np.sum(drawn, axis=0).tolist() == mixture.counts(0, 408)
    assert mixture.counts(0, 252 * 1000) == [192_000, 60_000]
    assert [line["drawn"] for line in metrics(place / "polish")] == [[0, 153]]
    alone = polishing(config, Folder.at(str(place)), start, experts)
    assert (alone.steps, alone.optimizer.lr, alone.optimizer.warmup) == (3, 1e-4, 0)


def test_a_control_takes_the_same_steps_without_a_pool(corpus, start, tmp_path):
    calls: list[str] = []
    assert expert_iteration(configure(corpus, tmp_path, start, control=True), sampler(20, calls)) == 0
    assert not calls
    for name, steps in (("finetune", 4), ("polish", 3)):
        run = json.loads((tmp_path / "control" / "round-1" / name / "run.json").read_text())
        assert [source["corpus"] for source in run["config"]["data"]["sources"]] == [str(corpus)]
        assert run["config"]["steps"] == metrics(tmp_path / "control" / "round-1" / name)[-1]["step"] == steps


def test_a_second_round_starts_from_the_first_and_a_relaunch_does_only_what_is_missing(corpus, start, tmp_path):
    calls: list[str] = []
    config = configure(corpus, tmp_path, start, rounds=2)
    assert expert_iteration(config, sampler(20, calls)) == 0
    first, second = (tmp_path / "expert" / f"round-{i}" / "polish.safetensors" for i in (1, 2))
    assert calls == [start, str(first)]
    bytes_of = second.read_bytes()
    assert bytes_of != first.read_bytes()
    assert expert_iteration(config, sampler(20, calls)) == 0
    second.unlink()  # as if the job had been killed before its last export
    assert expert_iteration(config, sampler(20, calls)) == 0
    assert len(calls) == 2
    assert second.read_bytes() == bytes_of
    stage2 = Folder.at(str(tmp_path / "expert"))
    trainings = [
        cost.read(stage2.sub(f"round-{i}/{name}"))["seconds"] for i in (1, 2) for name in ("finetune", "polish")
    ]
    assert min(trainings) > 0
    assert cost.read(stage2)["seconds"] > sum(trainings)  # it samples and exports, too
    assert json.loads((tmp_path / "expert" / "_SUCCESS.json").read_text())["weights"] == str(second)


def test_a_bucket_gives_the_weights_of_a_folder(corpus, start, tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("TTMRAY_COPIES", str(tmp_path / "copies"))
    init = f"{bucket}/initial.safetensors"
    Folder.at(bucket).write("initial.safetensors", Path(start).read_bytes())
    data = DataConfig(
        sources=(SourceConfig(corpus=str(corpus), score_column=None),), threads=0, cache=str(tmp_path / "cache")
    )
    assert expert_iteration(configure(corpus, tmp_path, start), sampler(20)) == 0
    config = configure(corpus, tmp_path, init, data=data).model_copy(update={"output": f"{bucket}/run"})
    assert expert_iteration(config, sampler(20)) == 0
    for name in ("finetune", "polish"):
        ours = Folder.at(bucket).read(f"run/expert/round-1/{name}.safetensors")
        theirs = (tmp_path / "expert" / "round-1" / f"{name}.safetensors").read_bytes()
        ours, theirs = (unpack(data, name)[0] for data in (ours, theirs))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    copies = sorted((tmp_path / "copies").rglob("*.safetensors"))
    assert sorted(copy.name for copy in copies) == ["finetune.safetensors", "initial.safetensors"]


def test_without_a_sampler_the_pools_are_named_one_by_one(corpus, start, tmp_path):
    pool = str(tmp_path / "pool")
    sampler(20)(start, pool)
    config = configure(corpus, tmp_path, start, rounds=2, pools=(pool,))
    with pytest.raises(UserError, match="no pool for round 2") as caught:
        expert_iteration(config)
    assert str(tmp_path / "expert" / "round-1" / "polish.safetensors") in caught.value.hint
    with pytest.raises(UserError, match="no pool for round 2") as again:
        expert_iteration(config)
    assert again.value.hint == caught.value.hint


def test_the_fine_tuning_does_not_feel_how_its_pool_was_sampled(corpus, start, tmp_path, monkeypatch):
    def in_one_thread(weights: str, folder: str) -> None:
        one_thread()  # as the pool's own worker does
        sampler(20)(weights, folder)

    seen = []

    def noted(*inputs: object, **options: object) -> int:
        seen.append(torch.get_num_threads())
        return launch(*inputs, **options)

    monkeypatch.setattr(expert_iteration_module, "launch", noted)
    before = torch.get_num_threads()
    free = TrainRuntime(device="cpu", threads=None, device_batch=4, tensorboard=False)
    try:
        torch.set_num_threads(2)
        config = configure(corpus, tmp_path, start, runtime=free, polish=PolishConfig(steps=0))
        assert expert_iteration(config, in_one_thread) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def test_a_finished_stage_refuses_another_corpus_another_pool_and_another_filter(corpus, start, tmp_path):
    pool, other = str(tmp_path / "pool"), str(tmp_path / "other")
    sampler(20)(start, pool)
    write_pool(other, sample(start, 20, seed=3), PROMPTS)
    config = configure(corpus, tmp_path, start, pools=(pool,), polish=PolishConfig(steps=0))
    assert expert_iteration(config) == 0
    assert expert_iteration(config) == 0
    with pytest.raises(UserError, match="another selection:\n    pool"):
        expert_iteration(config.model_copy(update={"pools": (other,)}))
    with pytest.raises(UserError, match=r"filter\.share: 0\.1 -> 0\.2"):
        expert_iteration(config.model_copy(update={"filter": FilterConfig(max_similarity=None, share=0.2)}))
    data = DataConfig(sources=(SourceConfig(corpus=other, score_column=None),), threads=0)
    with pytest.raises(UserError, match="    data: "):
        expert_iteration(config.model_copy(update={"data": data}))


def test_settings_that_are_refused_do_not_bind_the_folder(corpus, start, tmp_path):
    config = configure(corpus, tmp_path, start, polish=PolishConfig(steps=0), oversample=6.0)
    with pytest.raises(UserError, match="no pool for round 1"):
        expert_iteration(config)
    assert not (tmp_path / "expert").exists()
    config = configure(corpus, tmp_path, start, polish=PolishConfig(steps=0))
    none = FilterConfig(reward_weight=0, clap_weight=0, max_similarity=None)
    with pytest.raises(UserError, match="both 0"):
        expert_iteration(config.model_copy(update={"filter": none}), sampler(20))
    assert expert_iteration(config, sampler(20)) == 0


def test_other_settings_need_another_folder(corpus, start, tmp_path):
    config = configure(corpus, tmp_path, start, polish=PolishConfig(steps=0))
    assert expert_iteration(config, sampler(20)) == 0
    with pytest.raises(UserError, match="oversample"):
        expert_iteration(config.model_copy(update={"oversample": 6.0}), sampler(20))


def test_a_pool_that_cannot_be_filtered_stops_before_any_training(corpus, start, tmp_path):
    def equal(weights: str, folder: str) -> None:
        write_pool(folder, [replace(clip, reward=1.0) for clip in sample(weights, 20, seed=1)], PROMPTS)

    with pytest.raises(UserError, match="the reward is the same"):
        expert_iteration(configure(corpus, tmp_path, start), equal)
    assert not (tmp_path / "expert" / "round-1" / "finetune").exists()
    with pytest.raises(UserError, match="can be chosen from"):
        expert_iteration(configure(corpus, tmp_path / "other", start), sampler(1))


def test_wrong_configs_are_refused(corpus, start, tmp_path):
    with pytest.raises(ValidationError, match="is needed: the weights"):
        configure(corpus, tmp_path, start, model=ModelConfig(size="debug", head="none"))
    with pytest.raises(ValidationError, match="2 for 1 rounds"):
        configure(corpus, tmp_path, start, pools=("a", "b"))


@pytest.mark.parametrize(("name", "updates"), [("debug", (30, 10)), ("paper", (30_000, 5000))])
def test_shipped_configs_are_valid(name, updates):
    config = load_config(ExpertIterationConfig, f"{REPO}/configs/{name}/stage2.yaml")
    score = {"paper": 2.0, "debug": -0.4}[name]  # of the demo corpus that lies in its range
    assert (config.steps, config.polish.steps, config.oversample, config.pool.sampler.score) == (*updates, 5, score)


def test_whatever_happens_to_a_file_of_stage_2_is_found_and_made_again(corpus, start, tmp_path):
    sampler(10)(start, str(tmp_path / "pool"))
    config = configure(corpus, tmp_path / "run", start, pools=(str(tmp_path / "pool"),))

    def again() -> int:
        return expert_iteration(config)

    assert again() == 0
    root = tmp_path / "run/expert"
    listed = set(json.loads((root / "_SUCCESS.json").read_text())["files"])
    selected = {f"round-1/selection/{name}" for name in ("kept.txt", "selection.json", "selection.md", "_SUCCESS.json")}
    assert listed == {"round-1/finetune.safetensors", "round-1/polish.safetensors", "run.json"} | selected
    assert verify(str(root)) == 0
    before = {name: (root / name).read_bytes() for name in listed}
    written = (root / "_SUCCESS.json").stat().st_mtime_ns
    assert again() == 0
    assert (root / "_SUCCESS.json").stat().st_mtime_ns == written, "a relaunch of what is whole writes nothing"
    for name in sorted(listed | {"_SUCCESS.json", "run.json"}):
        for way in ("deleted", "flipped"):
            DAMAGES[way](root / name, root)
            assert verify(str(root)) == 2, (name, way)
            assert again() == 0, (name, way)
            assert verify(str(root)) == 0, (name, way)
            assert {name: (root / name).read_bytes() for name in listed} == before, (name, way)
    moved = config.model_copy(update={"runtime": config.runtime.model_copy(update={"log_every": 7})})
    assert expert_iteration(moved) == 0  # how it runs is noted anew, and is no damage
    assert verify(str(root)) == 0
