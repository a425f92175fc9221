"""Online GRPO as a job: equal bits after interruptions, ratios that start at 1, what is watched, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.generation.prompts import Prompt
from ttmray.generation.sampler import Draw, Sampler, noise, time_grid
from ttmray.generation.stochastic import make_steps
from ttmray.models.backbone import SIZES
from ttmray.models.backbone_weights import debug_backbone, load_backbone
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.storage import Folder
from ttmray.training import grpo, rounds
from ttmray.training.grpo import GrpoConfig, GrpoTask, sampling_bytes, stored_bytes, train_grpo
from ttmray.training.memory import split_batch
from ttmray.training.rollouts import ClipGroup
from ttmray.training.rounds import Round, hacked, prompts_of_round
from ttmray.training.tensors import pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`parent.safetensors`, `prompts.txt` of four prompts, `held_out.txt` of another."""
    folder = tmp_path_factory.mktemp("grpo")
    model = debug_backbone(0, text_dim=64)
    (folder / "parent.safetensors").write_bytes(pack(model.state_dict(), {"backbone": model.config.to_dict()}))
    (folder / "prompts.txt").write_text("a calm piano\ndriving drums\na flute over strings\nslow techno\n")
    (folder / "held_out.txt").write_text("a loud organ\n")
    return folder


def configured(files: Path, output: Path, *sets: str) -> GrpoConfig:
    usual = [f"output={output}", "rollouts.bundle=debug", f"rollouts.prompts={files / 'prompts.txt'}"]
    usual += [f"rollouts.checkpoint={files / 'parent.safetensors'}", f"rollouts.held_out={files / 'held_out.txt'}"]
    usual += ["rollouts.candidates=2", "rollouts.sampler.steps=3", "rollouts.max_clipping=1.0"]
    usual += ["prompts_per_round=2", "updates=2", "batch=4", "steps=4", "trained_share=0.67", "watch.steps=2"]
    usual += ["rollouts.runtime.threads=1", "optimizer.lr=1e-3", "precision=fp32", "ema.sigma_rels=[0.05]"]
    usual += ["runtime.device=cpu", "runtime.threads=1", "runtime.device_batch=2", "runtime.log_every=1"]
    usual += ["runtime.tensorboard=false", "checkpoint.every=100", "ratio_tolerance=1e-5", "beta=0.04"]
    return load_config(GrpoConfig, None, [*usual, *sets])


@pytest.fixture
def configure(files: Path, tmp_path: Path) -> Callable[..., GrpoConfig]:
    return lambda *sets, output=None: configured(files, output or tmp_path / "run", *sets)


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds of two updates that nobody disturbed; do not change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train_grpo(configured(files, output)) == 0
    return output


def report(run: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "rounds" / f"round-{number:05d}.json").read_text())
    return found


def test_a_run_learns_from_what_it_drew_and_says_what_became_of_it(finished, look):
    lines = look.metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["stale_updates"] for line in lines] == [0, 1, 0, 1]
    for line in lines:
        if line["stale_updates"] == 0:
            assert line["ratio"] == pytest.approx(1, abs=1e-6)  # nothing has changed since they were drawn
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)  # the policy is the parent, but for float16 of its means
    assert lines[3]["kl"] > 10 * lines[0]["kl"]
    first, second, end = (report(finished, number) for number in range(3))
    assert [one["update"] for one in (first, second, end)] == [0, 2, 4]
    assert (first["clips"], first["failed"], len(first["rows"])) == (4, 0, 4)
    assert first["reward"] == pytest.approx(np.mean([row["reward_score"] for row in first["rows"]]))
    for prompt in {row["key"].rpartition("_")[0] for row in first["rows"]}:
        own = [row["advantage"] for row in first["rows"] if row["key"].startswith(prompt)]
        assert sum(own) == pytest.approx(0, abs=1e-9)
        assert len(own) == 2
    assert first["held_out"]["distance"] == pytest.approx(0, abs=1e-6)  # from itself
    assert all(score["change"] == 0 for score in first["held_out"]["scores"].values())
    assert end["held_out"]["distance"] > 1e-6
    assert end["held_out"]["diversity"] == pytest.approx(1)  # one clip
    assert "reward" not in end  # nothing was drawn to learn from
    keys = [{row["key"] for row in one["rows"]} for one in (first, second)]
    assert not keys[0] & keys[1]  # four prompts in two rounds


def test_the_weights_move_and_are_exported_as_those_of_any_training(finished, files, tmp_path, look):
    from ttmray.training.export import export

    export(str(finished), str(tmp_path / "out.safetensors"))
    policy, parent = (load_backbone(path) for path in (tmp_path / "out.safetensors", files / "parent.safetensors"))
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), parent.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert torch.equal(policy.latent_mean, parent.latent_mean)


def test_the_end_can_be_verified_and_a_relaunch_has_nothing_to_do(finished, configure, monkeypatch):
    from ttmray.verify import problems

    assert list(problems(Folder(str(finished)))) == []
    marker = json.loads((finished / "_SUCCESS.json").read_text())
    assert {"run.json", "metrics.jsonl", "rounds/round-00000.json"} <= marker["files"].keys()
    assert not any(name.startswith("transitions/") for name in marker["files"])
    monkeypatch.setattr(grpo, "roll_out", None)  # nothing may be sampled
    assert train_grpo(configure(output=finished)) == 0


def test_an_interrupted_run_ends_with_equal_bits(configure, finished, look, monkeypatch):
    """After the first update, within a round; then after the second, between rounds."""
    from ttmray.training import loop

    config, save = configure(), loop.Training.save
    for update in (1, 2):

        def stop(self: loop.Training, saver: Any, update: int = update) -> None:
            save(self, saver)
            if self.step == update:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(loop.Training, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                train_grpo(configure("checkpoint.every=1"))
        drawn = {path: path.stat().st_mtime_ns for path in Path(config.output).glob("transitions/*/group-*")}
        assert len(drawn) == 2
    assert train_grpo(config) == 0
    assert look.difference(look.state(config.output), look.state(finished)) == 0
    assert look.metrics(config.output) == look.metrics(finished)
    assert [report(Path(config.output), n) for n in range(3)] == [report(finished, n) for n in range(3)]
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())  # not drawn again


@pytest.mark.slow
def test_ray_actors_draw_the_same_bits(configure, finished):
    config = configure("runtime.samplers=1")
    task = GrpoTask(config, CPU)
    drawn = task.draw(0, grpo.Share(actors=1), begins=True)
    (own,), (theirs,) = (list(run.glob("transitions/round-00000-*")) for run in (Path(config.output), finished))
    assert own.name == theirs.name
    assert len(drawn.places) == 4
    for file in (path for path in theirs.iterdir() if path.is_file()):
        assert (own / file.name).read_bytes() == file.read_bytes()


def test_groups_that_were_lost_are_drawn_again_by_the_weights_that_drew_them(configure, finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder,) = run.glob("transitions/round-00001-*")
    damaged, lost = sorted(folder.glob("group-*"))
    before = {path.name: path.read_bytes() for path in (damaged, lost)}
    damaged.write_bytes(before[damaged.name][:-1] + b"?")
    lost.unlink()
    config = configure(output=run)
    task = GrpoTask(config, CPU)
    again = task.draw(1, grpo.Share(), begins=False)
    assert len(again.places) == 4
    assert {path.name: path.read_bytes() for path in (damaged, lost)} == before
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="lies within round 1"):
        task.draw(1, grpo.Share(), begins=False)


def test_ratios_that_are_not_1_stop_the_run_and_say_why(configure, monkeypatch):
    config = configure()
    draw = GrpoTask.draw

    def other_policy(self, *arguments, **named):
        drawn = draw(self, *arguments, **named)
        with torch.no_grad():  # as if the samples came from elsewhere
            for parameter in self.model.parameters():
                parameter.mul_(1 + 0.01 * parameter.requires_grad)
        return drawn

    monkeypatch.setattr(GrpoTask, "draw", other_policy)
    with pytest.raises(UserError, match="ratios differ from 1") as caught:
        train_grpo(config)
    assert "precision=fp32" in caught.value.hint


def test_stored_paths_are_those_of_the_policy_and_start_from_the_noise_of_the_sampler():
    models = open_bundle("debug").load(["backbone", "text", "clap_condition"], LoadOptions())
    from ttmray.training.rollouts import RolloutSampler

    sampler = Sampler([models.backbone], models.text, models.clap_condition, RolloutSampler(steps=3))
    draws, steps = [Draw("a", "a piano", 3, k) for k in range(2)], make_steps(time_grid(3), "sde", 0.7)
    states, log_probs = sampler.paths(draws, steps)
    assert states.dtype == np.float16
    assert np.array_equal(states[1, 0], noise(3, "a", sampler.shape, 1).half().numpy())
    means = torch.from_numpy(sampler.step_means(draws, states, steps)).float()
    for i in range(3):
        again = steps.log_prob(torch.from_numpy(states[:, i + 1]), means[:, i], torch.tensor([i, i]))
        np.testing.assert_allclose(again, log_probs[:, i], atol=2e-3)  # means are float16
    alone, _ = sampler.paths(draws[1:], steps)
    assert np.array_equal(alone[0], states[1])
    still = make_steps(time_grid(3), "cps", 1e-6)
    end = sampler.paths(draws, still)[0][:, -1].astype(np.float32)
    expected = sampler.sample(draws).normalised
    assert np.abs(end - expected).max() < 0.02 * np.abs(expected).max()  # states are float16


def group(prompt: str, rewards: list[float], failed: int = 0) -> ClipGroup:
    rows = [
        {"key": f"{prompt}_{i}", "prompt_id": prompt, "status": "ok", "reward_score": r, "clap_score": -r, "reason": ""}
        for i, r in enumerate(rewards)
    ]
    rows += [
        {"key": f"{prompt}_x{i}", "prompt_id": prompt, "status": "rejected", "reason": "silent"} for i in range(failed)
    ]
    n, generator = len(rewards), torch.Generator().manual_seed(len(rewards))
    clap = torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1)
    tensors = {"states": torch.randn(n, 4, 2, 2), "means": torch.randn(n, 3, 2, 2), "log_probs": torch.randn(n, 3)}
    return ClipGroup(rows, tensors | {"clap_audio": clap, "tokens": torch.zeros(2, 3, 4), "pooled": torch.zeros(2, 5)})


def make_round(groups: list[ClipGroup], **rewards: float) -> Round:
    return Round(groups, rewards or {"reward_score": 1.0}, [0, 1], global_std=True, limit=5.0, seed=1)


def test_every_transition_of_a_useful_clip_is_seen_once_per_pass():
    groups = [group("a", [1.0, 2.0, 4.0]), group("b", [3.0, 3.0]), group("c", [0.0, 1.0], failed=2)]
    drawn = make_round(groups)
    assert (len(drawn), drawn.left_out) == (10, 2)  # b has no differences
    batch = drawn.read(range(100, 110), first=100)
    seen = list(zip(batch.keys, batch.step.tolist(), strict=True))
    assert len(set(seen)) == 10
    assert not any(key.startswith("b") for key, _ in seen)
    assert drawn.read(range(110, 113), first=100).keys == batch.keys[:3]
    for key, step, x, after in zip(batch.keys, batch.step.tolist(), batch.x, batch.after, strict=True):
        owner = next(one for one in groups if any(row["key"] == key for row in one.rows))
        place = int(key.rpartition("_")[2])
        assert torch.equal(x, owner.tensors["states"][place, step])
        assert torch.equal(after, owner.tensors["states"][place, step + 1])


def test_rewards_are_weighted_sums_of_columns():
    drawn = make_round([group("a", [1.0, 2.0])], reward_score=2.0, clap_score=0.5)
    np.testing.assert_allclose(drawn.rewards, [1.5, 3.0])


def test_a_round_without_a_scored_clip_stops_the_run():
    with pytest.raises(UserError, match="silent"):
        make_round([group("a", [], failed=3)])


def test_a_round_without_differences_trains_the_kl_alone():
    drawn = make_round([group("a", [1.0, 1.0])])
    assert drawn.left_out == 2
    assert drawn.read(range(4), first=0).advantage.tolist() == [0] * 4


def held_out(**changes: float) -> dict[str, Any]:
    return {"scores": {name: {"change": change, "error": 0.1} for name, change in changes.items()}}


def test_reward_hacking_is_a_reward_that_rises_while_a_held_out_score_falls():
    start = {"round": 0, "reward": 0.0, "reward_error": 0.1}
    now = {"round": 3, "reward": 1.0, "reward_error": 0.1}
    warning = hacked({**now, "held_out": held_out(reward=0.5, clap_score=-0.3)}, start)
    assert warning is not None
    assert "clap_score -0.3" in warning
    assert hacked({**now, "held_out": held_out(reward=0.5, clap_score=-0.1)}, start) is None  # within its error
    assert hacked({**now, "reward": 0.2, "held_out": held_out(clap_score=-0.3)}, start) is None  # has not risen
    assert hacked({**now, "held_out": None}, start) is None


def test_all_prompts_get_their_turn_and_none_twice_in_a_round():
    prompts = [Prompt(str(i), str(i)) for i in range(7)]
    chosen = [prompts_of_round(prompts, number, 2, seed=0) for number in range(6)]
    for epoch in (chosen[:3], chosen[3:]):
        assert len({prompt.id for one in epoch for prompt in one}) == 6
    assert chosen[:3] != chosen[3:]


def test_old_transitions_go_when_no_checkpoint_needs_them(tmp_path):
    out = Folder(str(tmp_path))
    for number in range(5):
        out.write(f"transitions/round-{number:05d}-abc/group-00000.safetensors", b"")
    for step in (5, 7):
        out.write(f"checkpoints/step-{step:08d}/state.json", b"{}")
    rounds.sweep_rounds(out, updates=2, keep=3, current=4)  # there may be one more to come
    assert len(list(tmp_path.glob("transitions/*/*"))) == 5
    rounds.sweep_rounds(out, updates=2, keep=2, current=4)
    left = sorted(path.parent.name for path in tmp_path.glob("transitions/*/*"))
    assert left == ["round-00002-abc", "round-00003-abc", "round-00004-abc"]


def test_full_size_fits_a_card_of_24_gb(configure):
    """K = 24 and 10 steps, counted on the meta device; the public trainer needs about 90 GB by its README."""
    backbone = SIZES["s_44k"]
    split = split_batch(
        backbone,
        share=864,
        device_batch=None,
        averages=2,
        bf16=True,
        checkpointing=True,
        free_bytes=24 * 10**9,
        clips=2,
    )
    assert split.device_batch >= 8
    assert split.bytes < 24e9
    phase = sampling_bytes(configure("rollouts.bundle=paper"), backbone, split)
    assert 5e9 < sum(phase.values()) < 24e9
    assert 24 * 8 * stored_bytes(backbone, 10) < 0.2e9  # of a round, in host memory


def test_what_does_not_fit_is_refused(configure):
    with pytest.raises(UserError, match="estimated to need"):
        train_grpo(configure("runtime.memory_gb=0.0001"), plan_only=True)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rollouts.checkpoint=null"], "checkpoint is needed"),
        (["validation.clips=3"], "see watch"),
        (["rollouts.kind=cps", "trained_share=1.0"], "last step of cps"),
        (["rewards={reward_score: 0}"], "all weights are 0"),
        (["rollouts.sampler.solver=heun"], "solver: euler"),
        (["rewards={happiness: 1}"], "rewards"),
    ],
)
def test_configs_that_mean_nothing_are_refused(configure, sets, message):
    with pytest.raises((UserError, ValidationError), match=message):
        configure(*sets)


def test_a_score_for_weights_without_a_head_and_too_few_prompts_are_refused(configure, tmp_path):
    with pytest.raises(UserError, match="prompts_per_round is 9"):
        GrpoTask(configure("prompts_per_round=9"), CPU)
    model = debug_backbone(0, "none")
    (tmp_path / "plain.safetensors").write_bytes(pack(model.state_dict(), {"backbone": model.config.to_dict()}))
    with pytest.raises(UserError, match="no score head"):
        GrpoTask(configure(f"rollouts.checkpoint={tmp_path / 'plain.safetensors'}", "rollouts.sampler.score=1.0"), CPU)
