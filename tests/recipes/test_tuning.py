"""The interface of tuning methods: what each builds of one budget, and the statistics of the comparison."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ttmray.errors import UserError
from ttmray.generation.filter import FilterConfig
from ttmray.generation.pool_worker import CandidatesConfig, PoolSampler
from ttmray.generation.prompts import Prompt, read_prompts
from ttmray.recipes.hearing import HeardClips, schema
from ttmray.recipes.method_tables import (
    Change,
    MethodComparison,
    Point,
    change,
    compare,
    contrasts,
    count_failures,
    points,
    verdict,
    weight_distance,
)
from ttmray.recipes.tuning import METHODS, BudgetConfig, MethodConfig, Parent, Tuned, Tuning, run_phases, write_prompts
from ttmray.storage import Folder
from ttmray.synth.faults import FLOOR
from ttmray.training.config import TrainConfig
from ttmray.training.crpo import CrpoConfig
from ttmray.training.grpo import GrpoConfig
from ttmray.training.memory import step_flops
from ttmray.training.pairs import PairsConfig
from ttmray.training.sft import SMALL
from ttmray.training.tensors import pack

BATCH = {"crpo": 3, "domination": 3, "grpo": 4}


def tuning(tmp_path: Path, row: str, *, rounds: int | None = None, score: float | None = 0.5, **changes: Any) -> Tuning:
    settings = MethodConfig(rounds=rounds, train={"batch": BATCH.get(row, 4)}, **changes)
    return Tuning(
        name=row,
        settings=settings,
        parent=Parent(str(tmp_path / "parent.safetensors"), "debug", "v1", "zero_embedding"),
        prompts=str(tmp_path / "prompts.csv"),
        held_out=4,
        rewards={"reward_score": 1.0, "clap_score": 2.0},
        budget=BudgetConfig(clips=32, candidates=4, passes=96, snapshots=2),
        pool=str(tmp_path / "pool"),
        folder=Folder(str(tmp_path / row)),
        candidates={"bundle": "debug", "sampler": {"steps": 7, "weight": 3.0}, "max_clipping": 1.0},
        train={"precision": "fp32", "optimizer": {"lr": 0.5}, "flow": {"text_dropout": 0.2}},
        score=score,
        seed=9,
    )


def built(tmp_path: Path, row: str, **changes: Any) -> Tuned:
    return METHODS[row](tuning(tmp_path, row, **changes))


def configs(tuned: Tuned, kind: type) -> list[Any]:
    """Configs of a kind, each once."""
    return list({id(phase.config): phase.config for phase in tuned.phases if type(phase.config) is kind}.values())


@pytest.mark.parametrize("row", sorted(METHODS))
def test_every_method_keeps_to_the_budget_and_says_what_it_is(tmp_path, row):
    tuned = built(tmp_path, row)
    assert METHODS[row].__doc__
    assert tuned.clips == 32
    if row == "best-of-n":
        assert (tuned.best_of, tuned.phases, tuned.snapshots, tuned.passes) == (8, (), (), 0)
        assert tuned.forwards == 32 * 7 * 2
        return
    assert 88 <= tuned.passes <= 96
    assert [share for share, _ in tuned.snapshots] == [0.5, 1.0]
    training = tuned.phases[-1].config
    assert training.steps == tuned.updates
    assert training.optimizer.lr == 0.5
    assert training.precision == "fp32"
    assert training.checkpoint.keep_every == training.checkpoint.every
    assert all(int(share * tuned.updates) % training.checkpoint.every == 0 for share, _ in tuned.snapshots)


def test_passes_are_the_flops_that_the_trainings_themselves_count():
    """A sample of Stage 1 is a pass; the others say what theirs cost in the tasks of the loop."""
    from ttmray.generation.sampler import branch_count
    from ttmray.recipes import tuning as module

    one = step_flops(SMALL["debug"])
    assert module.PAIR * one == pytest.approx(one * (2 + 2 / 3 * 1))  # CrpoTask, whose reference runs beside
    assert branch_count((4.5,)) == module.BRANCHES  # GrpoTask


def test_all_methods_are_given_the_same_reward(tmp_path):
    rewards = {"reward_score": 1.0, "clap_score": 2.0}
    weighted, experts = (
        configs(built(tmp_path, row), FilterConfig)[0] for row in ("reward-weighted", "expert-iteration")
    )
    assert weighted.rewards == experts.rewards == rewards
    assert (weighted.temperature, experts.temperature) == (1.0, None)
    assert (experts.max_silence, experts.max_clipping, experts.max_similarity) == (None, None, None)
    assert configs(built(tmp_path, "unselected"), FilterConfig) == []
    pairs, dominating = (configs(built(tmp_path, row), PairsConfig)[0] for row in ("crpo", "domination"))
    assert (pairs.by, pairs.rewards, pairs.dominate) == ("rewards", rewards, {})
    assert dominating.dominate == {"reward_score": 0.0, "clap_score": 0.0}
    assert configs(built(tmp_path, "grpo"), GrpoConfig)[0].rewards == rewards


def test_methods_are_trained_for_the_score_that_is_sampled(tmp_path):
    sft, pair, online = (
        configs(built(tmp_path, row), kind)[0]
        for row, kind in (("unselected", TrainConfig), ("crpo", CrpoConfig), ("grpo", GrpoConfig))
    )
    assert sft.data.sources[0].score_column == pair.data.sources[0].score_column == "input_score"
    assert online.rollouts.sampler.score == 0.5
    assert (online.rollouts.sampler.steps, online.rollouts.sampler.weight) == (10, 3.0)  # steps are its own
    assert sft.flow.text_dropout == 0.2  # shared by those that know it
    assert sft.data.seed == pair.data.seed == online.rollouts.seed == 9


def test_rounds_of_expert_iteration_have_pools_of_their_own_from_the_weights_before(tmp_path):
    tuned = built(tmp_path, "expert-iteration", rounds=4)
    pools, trainings = configs(tuned, CandidatesConfig), configs(tuned, TrainConfig)
    assert not tuned.shares_pool
    assert [pool.prompt_count for pool in pools] == [2] * 4
    assert [pool.checkpoint for pool in pools] == [training.model.init for training in trainings]
    weights = [path for _, path in tuned.snapshots]
    assert [training.model.init for training in trainings] == [str(tmp_path / "parent.safetensors"), *weights[:3]]
    assert (tuned.updates, tuned.passes, [training.steps for training in trainings]) == (24, 96.0, [6] * 4)
    write_prompts(Folder(str(tmp_path)), "prompts.csv", [Prompt(str(i), f"text {i}") for i in range(8)])
    shares = [phase for phase in tuned.phases if phase.run.func.__name__ == "_share_of_prompts"]  # type: ignore[attr-defined]
    assert run_phases(tuple(shares)) == 0
    ids = [[prompt.id for prompt in read_prompts(pool.prompts)] for pool in pools]
    assert ids == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]


def test_grpo_draws_every_prompt_once_in_its_rounds(tmp_path):
    (config,) = configs(built(tmp_path, "grpo", rounds=4), GrpoConfig)
    assert (config.rounds, config.prompts_per_round, config.rollouts.candidates) == (4, 2, 4)
    assert config.updates * config.rounds == config.steps == 12
    tuned = built(tmp_path, "grpo", rounds=4)
    assert tuned.forwards == 2 * 32 * 10 * 2  # the parent's means, too


def test_grpo_samples_with_the_guidance_of_the_clips_that_others_learn_from(tmp_path):
    usual = tuning(tmp_path, "grpo")
    usual.candidates["sampler"] = {"steps": 7}
    for one, weight in ((tuning(tmp_path, "grpo"), 3.0), (usual, PoolSampler().weight)):
        run = next(phase.config for phase in METHODS["grpo"](one).phases if isinstance(phase.config, GrpoConfig))
        assert (run.rollouts.sampler.weight, run.rollouts.sampler.steps) == (weight, 10)


def test_clips_that_failed_count_as_the_worst_that_was_heard():
    nothing = np.full((2, 1), np.nan)
    one = Point(1.0, {"reward": np.array([[0.5], [np.nan]]), "quality": np.array([[0.3], [np.nan]]), "none": nothing})
    other = Point(1.0, {"reward": np.array([[-2.0], [1.0]]), "quality": np.array([[0.1], [0.2]]), "none": nothing})
    count_failures([one, other])
    assert one.values["reward"][1, 0] == -2.0
    assert one.values["quality"][1, 0] == FLOOR
    assert np.isnan(one.values["none"]).all()


def test_what_a_row_says_counts_before_what_is_filled_in(tmp_path):
    changes: dict[str, Any] = {"filter": {"share": 0.5}}
    (chosen,) = configs(built(tmp_path, "expert-iteration", **changes), FilterConfig)
    assert (chosen.share, chosen.rewards["clap_score"]) == (0.5, 2.0)
    with pytest.raises(UserError, match=r"(?s)methods\.crpo\.pairs.*perprompt"):
        built(tmp_path, "crpo", pairs={"perprompt": 3})


@pytest.mark.parametrize("row", ["expert-iteration", "grpo"])
def test_a_budget_that_is_too_small_for_the_rounds_is_refused(tmp_path, row):
    with pytest.raises(UserError, match="8 prompts for 9 rounds"):
        built(tmp_path, row, rounds=9)


def test_a_budget_without_a_single_update_is_refused(tmp_path):
    some = tuning(tmp_path, "crpo")
    with pytest.raises(UserError, match=r"fewer than 2 updates of 3 samples with 2\.67 passes"):
        METHODS["crpo"](Tuning(**{**vars(some), "budget": BudgetConfig(clips=32, candidates=4, passes=9)}))


def test_a_job_that_ends_badly_ends_the_method(tmp_path):
    from ttmray.recipes.tuning import Phase

    ran: list[int] = []
    phases = tuple(Phase(BudgetConfig(), lambda code=code: ran.append(code) or code) for code in (0, 3, 0))
    assert run_phases(phases) == 3
    assert ran == [0, 3]


# The comparison


def test_a_change_is_a_mean_over_prompts_and_seeds_and_covers_both():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 1))
    values = base + 0.5 + rng.normal(scale=0.3, size=(60, 3)) + np.array([-0.4, 0.0, 0.4])
    one = change(values, base, 0.95)
    assert one is not None
    assert one.value == pytest.approx((values - base).mean())
    assert one.high - one.low > 0.4  # seeds differ by more than prompts' means are uncertain
    alone = change(values[:, :1], base, 0.95)
    assert alone is not None
    assert alone.high - alone.low < 0.3  # one seed knows nothing of others
    assert (one.n, alone.n) == (60, 60)
    values[:4, 1] = np.nan  # clips that failed
    assert change(values, base, 0.95).n == 56  # type: ignore[union-attr]
    assert change(values[:1], base[:1], 0.95) is None


def test_a_verdict_follows_both_intervals():
    def one(low: float, high: float) -> Change:
        return Change((low + high) / 2, low, high, 0.01, 30)

    up, down, unsure = one(0.1, 0.3), one(-0.3, -0.1), one(-0.1, 0.2)
    assert verdict(up, up) == "both rise"
    assert verdict(up, down).startswith("hacked")
    assert verdict(up, unsure) == "reward rises, quality cannot be told"
    assert verdict(down, up) == "reward falls"
    assert verdict(unsure, down) == "quality falls"
    assert verdict(None, up) == "cannot be told"


def row(prompt: str, sample: int, reward: float | None, quality: float = 0.0, share: float = 1.0) -> dict[str, Any]:
    status = "ok" if reward is not None else "rejected"
    scores = {"reward_score": reward, "clap_score": 0.5, "quality": quality if reward is not None else None}
    return {"share": share, "prompt_id": prompt, "sample": sample, "status": status, **scores}


def compared(**changes: Any) -> MethodComparison:
    usual: dict[str, Any] = {"root": Folder("/nowhere"), "bundle": "debug", "shape": SMALL["debug"], "parent": ""}
    usual |= {"rewards": {"reward_score": 2.0}, "others": (), "seeds": (0,), "rows": {}, "tuned": {}}
    return MethodComparison(**{**usual, "reference": None, "confidence": 0.95, "equal": "", **changes})


def vectors(*angles: float) -> np.ndarray:
    return np.array([[np.cos(a), np.sin(a)] for a in angles], np.float32)


def test_the_best_of_k_is_chosen_by_the_reward_among_the_first_k_candidates():
    rows = [row("a", k, reward, quality=-k) for k, reward in enumerate([1.0, 3.0, 2.0, 9.0])]
    rows += [row("b", k, reward) for k, reward in enumerate([None, 0.0, 1.0, -1.0])]
    sound = HeardClips(rows, vectors(0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2))
    two, four = points(compared(), [sound], sound, ["a", "b"])
    assert (two.share, four.share) == (0.5, 1.0)
    np.testing.assert_allclose(two.values["reward"], [[6.0], [0.0]])  # the weighted sum: twice the score
    np.testing.assert_allclose(four.values["reward"], [[18.0], [2.0]])
    np.testing.assert_allclose(four.values["quality"][0], [-3.0])
    assert four.distance == [pytest.approx(1 - np.cos(0.3), abs=1e-6)]  # of b nothing is known without a choice
    assert (two.failed, four.failed) == (0, 0)


def test_points_along_a_training_are_held_against_the_parents_clips_of_the_same_noise():
    parent = HeardClips([row("a", 0, 1.0, share=0.0), row("b", 0, 2.0, share=0.0)], vectors(0.0, 1.0))
    tuned = HeardClips(
        [row("a", 0, 1.5, share=0.5), row("b", 0, None, share=0.5), row("a", 0, 2.0), row("b", 0, 2.5)],
        vectors(0.2, 0.5, 1.0),
    )
    half, end = points(compared(), [tuned], parent, ["a", "b"])
    assert (half.share, half.failed, end.failed) == (0.5, 1, 0)
    assert np.isnan(half.values["reward"][1, 0])
    np.testing.assert_allclose(end.values["reward"], [[4.0], [5.0]])
    assert half.distance == [pytest.approx(1 - np.cos(0.2), abs=1e-6)]
    assert end.distance == [pytest.approx((1 - np.cos(0.5)) / 2, abs=1e-6)]
    assert compared().measures == ["reward", "quality", "clap_score"]


def test_every_pair_of_methods_is_tested_and_corrected_once_per_measure():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(30, 3))

    def point(shift: float) -> Any:
        sound = type("P", (), {})()
        sound.values = {"reward": base + shift + rng.normal(scale=0.1, size=base.shape), "quality": base}
        return sound

    table = contrasts({"a": point(0.0), "b": point(0.5), "c": point(0.51)}, ("reward", "quality"), 0.95)
    assert [(one["measure"], one["a"], one["b"]) for one in table[:3]] == [
        ("reward", "a", "b"), ("reward", "a", "c"), ("reward", "b", "c"),
    ]  # fmt: skip
    assert table[0]["p_holm"] < 0.05  # three seeds have two degrees of freedom
    assert table[2]["p_holm"] >= table[2]["p"]
    assert all(one["p"] == 1 for one in table[3:])  # the same clips


def test_the_distance_of_weights_is_relative_and_0_for_the_parent(tmp_path):
    weights = {"a": torch.tensor([3.0, 4.0]), "steps": torch.tensor([7])}
    for name, moved in (("parent", 0.0), ("tuned", 0.5)):
        data = pack(weights | {"a": weights["a"] + torch.tensor([moved, 0.0])}, {})
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    parent, tuned = (str(tmp_path / f"{name}.safetensors") for name in ("parent", "tuned"))
    assert weight_distance(parent, parent) == 0
    assert weight_distance(tuned, parent) == pytest.approx(0.1)
    assert json.dumps(weight_distance(tuned, parent))


def write_heard(folder: Path, rows: list[dict[str, Any]], clap: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = iter(clap.tolist())
    full = [
        {"prompt": "", "reason": "", **one, "clap": next(vectors) if one["status"] == "ok" else None} for one in rows
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(full, schema({})), folder / "heard.parquet")


def test_the_comparison_is_written_from_what_was_heard(tmp_path):
    rng = np.random.default_rng(4)
    prompts, base = [f"p{i}" for i in range(8)], rng.normal(size=8)
    unit = rng.normal(size=(8, 6))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    parent = [row(prompt, 0, one, quality=one, share=0.0) for prompt, one in zip(prompts, base, strict=True)]
    write_heard(tmp_path / "heard/parent", parent, unit)
    for seed in (0, 1):
        for name, gain, quality in (("good", 1.0, 0.5), ("hacked", 2.0, -0.5)):
            rows = [
                row(prompt, 0, one + gain * share + 0.01 * seed, quality=one + quality * share, share=share)
                for share in (0.5, 1.0)
                for prompt, one in zip(prompts, base, strict=True)
            ]
            if name == "good":
                rows[3] |= {"status": "rejected", "reward_score": None, "clap_score": None, "quality": None}
            clap = np.concatenate([unit, unit])[: sum(one["status"] == "ok" for one in rows)]
            write_heard(tmp_path / f"heard/{name}-{seed}", rows, clap)
    tuned = {
        (name, seed): Tuned(clips=5, forwards=7, passes=3.0, shares_pool=True)
        for name in ("good", "hacked")
        for seed in (0, 1)
    }
    for step, spent in (("pool-0", 4.0), ("pool-1", 2.0), ("hear-good-0", 1.0)):
        record = {"fingerprint": "", "done": True, "seconds": 0, "cpu_seconds": spent, "gpu_seconds": 0, "launches": 1}
        (tmp_path / "steps").mkdir(exist_ok=True)
        (tmp_path / f"steps/{step}.json").write_text(json.dumps(record))
    how: dict[str, Any] = {
        "root": Folder(str(tmp_path)),
        "seeds": (0, 1),
        "tuned": tuned,
        "equal": "Held equal: clips.",
    }
    assert compare(compared(bundle="micro", **how, rows={"good": "crpo", "hacked": "grpo"})) == 0
    result = json.loads((tmp_path / "comparison/methods.json").read_text())
    first, good, hacked = result["rows"]
    assert (first["name"], first["account"], first["verdict"]) == ("parent", None, "")
    assert good["changes"]["reward"]["value"] == pytest.approx(2 * 1.005)  # the sum is twice the score; mean of seeds
    assert good["verdict"] == "both rise"
    assert hacked["verdict"] == "hacked: reward rises, quality falls"
    assert hacked["changes"]["quality"]["p_holm"] < 1e-6
    assert (good["failed"], hacked["failed"]) == (0, 0)  # of the end; the clip that failed is half way
    assert good["account"]["cpu_seconds"] == pytest.approx((5 + 2) / 2)
    assert good["account"]["training_tflop"] == pytest.approx(3 * step_flops(SMALL["debug"]) / 1e12)
    assert [(one["row"], one["share"]) for one in result["curves"]] == [
        (name, share) for name in ("good", "hacked") for share in (0.0, 0.5, 1.0)
    ]
    assert len((tmp_path / "comparison/clips.csv").read_text().splitlines()) == 1 + 8 + 4 * 16
    page = (tmp_path / "comparison/methods.md").read_text()
    assert "hacked: reward rises, quality falls" in page
    assert "Held equal: clips." in page
    figure = (tmp_path / "comparison/hacking-dark.svg").read_text()
    assert "true quality" in figure
    assert "trained reward" in figure
