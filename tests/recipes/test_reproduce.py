"""The chain of the paper from one config: sections, links between steps, and a whole run that is killed on its way."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from synthetic_corpus import write_random_corpus

from ttmray.config import load_config
from ttmray.corpus.index import read_index
from ttmray.corpus.scores import with_columns
from ttmray.errors import UserError
from ttmray.generation.filter import BY_CHANCE
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.models.bundle import open_bundle
from ttmray.recipes.reproduce import ReproduceConfig, _fingerprints, build_steps, reproduce
from ttmray.storage import Folder
from ttmray.training.data import open_mixture

REPO = Path(__file__).resolve().parents[2]
DEBUG = REPO / "configs/debug/reproduce.yaml"
PROMPTS = REPO / "configs/debug/prompts.csv"
PROGRAM = """
import sys
from ttmray.config import load_config
from ttmray.recipes.reproduce import ReproduceConfig, reproduce
sys.exit(reproduce(load_config(ReproduceConfig, sys.argv[1], sys.argv[2:])))
"""


def debug(output: Path | str, *sets: str) -> ReproduceConfig:
    return load_config(ReproduceConfig, str(DEBUG), [f"output={output}", f"prompts={PROMPTS}", *sets])


def steps(output: Path, *sets: str) -> dict[str, Any]:
    return {step.name: step for step in build_steps(debug(output, *sets))}


def test_steps_come_in_order_and_only_with_their_sections(tmp_path):
    names = list(steps(tmp_path))
    expected = ["corpus", "votes", "ranker", "rescore", "stage1"]
    expected += ["pool", "stage2", "control", "pairs_pool", "pairs", "stage3"]
    assert names[:11] == expected
    made = [f"generate-{name}" for name in ("stage1-best", "stage1", "control", "stage2", "stage3")]
    assert names[11:] == ["choose-stage1-best", *made, "evaluate"]
    without = (
        "ranker=null",
        "votes=null",
        "control=false",
        "systems={}",
        "stage3=null",
        "pairs=null",
        "pairs_pool=null",
    )
    assert list(steps(tmp_path, *without)) == [
        "corpus", "stage1", "pool", "stage2", "generate-stage1", "generate-stage2", "evaluate",
    ]  # fmt: skip


def test_a_third_arm_of_stage_2_has_as_many_clips_by_chance(tmp_path):
    both = steps(tmp_path, "unselected=true", "stage2.filter.count=3")
    chosen, drawn = both["stage2"].config, both["unselected"].config
    assert drawn.filter.rule == BY_CHANCE
    assert drawn.pools == chosen.pools
    assert not drawn.control
    left_out = {"output", "filter"}
    assert drawn.model_dump(exclude=left_out) == chosen.model_dump(exclude=left_out)
    assert drawn.filter.model_dump(exclude={"rule", "rewards"}) == chosen.filter.model_dump(exclude={"rule", "rewards"})
    assert all(name.startswith("unselected/expert/") for name in both["unselected"].makes)


def test_weights_of_stage_3_can_be_others(tmp_path):
    settings = ["weights=ema:0.05", "stage3_weights=raw"]
    told = _fingerprints(debug(tmp_path, *settings), build_steps(debug(tmp_path, *settings)))
    usual = _fingerprints(debug(tmp_path, settings[0]), build_steps(debug(tmp_path, settings[0])))
    assert [name for name in told if told[name] != usual[name] and name.startswith(("stage", "trunk"))] == ["stage3"]


def test_a_system_can_be_taken_out_again(tmp_path):
    assert "generate-control" not in steps(tmp_path, "systems.control=null")


def test_what_one_step_makes_is_filled_into_the_next(tmp_path):
    made = steps(tmp_path)
    root = str(tmp_path)
    stage1, stage2 = f"{root}/stage1/weights.safetensors", f"{root}/stage2/expert/round-1/polish.safetensors"
    held_out = str(PROMPTS)
    assert made["stage1"].config.data.sources[0].corpus == f"{root}/corpus"
    pool, pairs_pool = made["pool"].config, made["pairs_pool"].config
    assert (pool.corpus, pool.checkpoint, pool.held_out) == (f"{root}/corpus", stage1, held_out)
    assert (pairs_pool.checkpoint, pairs_pool.seed, pairs_pool.candidates) == (stage2, 43, pool.candidates)
    assert (made["stage2"].config.pools, made["control"].config.pools) == ((f"{root}/pool",), ())
    assert (made["stage2"].config.control, made["control"].config.control) == (False, True)
    assert made["pairs"].config.held_out == held_out
    stage3 = made["stage3"].config
    assert (stage3.model.init, stage3.model.head, stage3.pairs) == (stage2, "v2", f"{root}/pairs/pairs.parquet")
    assert (stage3.data.sources[0].corpus, stage3.data.sources[0].split) == (f"{root}/pairs_pool", "all")
    choice = made["choose-stage1-best"].config
    assert (choice.scores, choice.candidates, choice.checkpoint, choice.held_out) == ((), 1, stage1, held_out)
    assert choice.corpus == f"{root}/corpus"
    assert made["generate-stage1-best"].after == ("rescore", "stage1", "choose-stage1-best")
    assert made["generate-stage1"].config.sampler.score == 2.0
    assert made["generate-stage1"].config.checkpoint == stage1
    assert made["generate-control"].config.checkpoint == f"{root}/stage2/control/round-1/polish.safetensors"
    assert made["evaluate"].config.folders[0] == f"stage1-best={root}/generated/stage1-best"


def test_prompts_that_a_pool_will_lack_are_noticed_before_stage_1_is_trained(tmp_path):
    sizes = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 1}
    write_random_corpus(str(tmp_path / "run/corpus"), tracks=6, captions=6, validation=0, test=0, **sizes)
    (tmp_path / "held.txt").write_text("".join(f"a caption of number {i}\n" for i in range(4)))
    for prompts, count, message in (
        (PROMPTS, 9, "has 6 prompts, prompt_count is 9"),
        (tmp_path / "held.txt", 2, "4 of 6 captions are held out"),
    ):
        sets = (f"prompts={prompts}", f"pool.prompt_count={count}")
        made = {step.name: step for step in build_steps(debug(tmp_path / "run", *sets))}
        with pytest.raises(UserError, match=message):
            made["stage1"].run()
    assert not (tmp_path / "run/stage1").exists()


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), ("v1", "v1", "v1", "v2")),
        (("stage1.model.head=v2",), ("v2", "v2", "v2", "v2")),
        (("stage2.model.head=v2",), ("v1", "v2", "v2", "v2")),
        (("stage3.model.head=v4",), ("v1", "v1", "v1", "v4")),
        (("stage1.model.head=v4", "stage3.model.head=v1"), ("v4", "v4", "v4", "v1")),
    ],
)
@pytest.mark.parametrize("name", ["paper", "debug"])
def test_a_stage_inherits_the_backbone_that_it_starts_from_and_changes_no_other(name, sets, expected):
    config = load_config(ReproduceConfig, str(REPO / f"configs/{name}/reproduce.yaml"), sets)
    made = {step.name: step.config for step in build_steps(config)}
    models = [made[stage].model for stage in ("stage1", "stage2", "control", "stage3")]  # type: ignore[attr-defined]
    assert tuple(model.head for model in models) == expected
    assert len({(model.size, model.null) for model in models}) == 1
    less = load_config(ReproduceConfig, str(REPO / f"configs/{name}/reproduce.yaml"), ["stage3.model={}"])
    assert {step.name: step.config for step in build_steps(less)}["stage3"].model.head == "v1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["paper", "debug"])
def test_an_override_of_one_stage_changes_only_that_stage(name):
    path = str(REPO / f"configs/{name}/reproduce.yaml")
    usual = {step.name: step.config for step in build_steps(load_config(ReproduceConfig, path))}
    for stage in ("stage1", "stage2", "stage3"):
        for field, value in (("runtime.log_every", 77), ("precision", "bf16" if name == "debug" else "fp32")):
            changed = {
                step.name: step.config
                for step in build_steps(load_config(ReproduceConfig, path, [f"{stage}.{field}={value}"]))
            }
            different = {one for one in usual if usual[one] != changed[one]}
            assert different == {stage} | ({"control"} if stage == "stage2" else set())


def test_systems_may_be_other_weights_finished_clips_and_other_seeds(tmp_path):
    systems = {
        "mine": {"clips": str(tmp_path / "clips")},
        "public": {"checkpoint": "public.pth", "generate": {"bundle": "debug-16k", "sampler": {"score": None}}},
        "best": {"checkpoint": "public.pth", "scores": [1, 2], "generate": {"head": "v2"}},
        "sub1": {"stage": "stage3"},
        "sub2": {"stage": "stage3", "seed": 55},
    }
    made = steps(tmp_path, f"systems={json.dumps(systems)}")
    assert "generate-mine" not in made
    public, sub1, sub2 = (made[f"generate-{name}"].config for name in ("public", "sub1", "sub2"))
    facts = (public.checkpoint, public.bundle, public.sampler.score)
    assert facts == (str(Path("public.pth").absolute()), "debug-16k", None)
    assert (sub1.seed, sub2.seed, sub1.checkpoint) == (42, 55, sub2.checkpoint)
    assert (made["choose-best"].config.head, made["choose-best"].after) == ("v2", ("corpus", "rescore"))
    assert made["generate-public"].after == ("rescore",)
    after = ("rescore", *(f"generate-{name}" for name in ("public", "best", "sub1", "sub2")))
    assert made["evaluate"].after == after
    assert made["evaluate"].config.folders[:2] == (f"mine={tmp_path / 'clips'}", f"public={tmp_path}/generated/public")
    with pytest.raises(UserError) as caught:
        reproduce(debug(tmp_path / "run", f"systems={json.dumps(systems)}"), plan_only=True)
    for what in ("clips: there is no such folder", "set systems.public.checkpoint"):
        assert what in caught.value.message


def test_sections_win_over_what_is_filled_in_and_keep_the_rest(tmp_path):
    made = steps(tmp_path, "stage1.data={seed: 3, sources: [{repeat: 2}]}", "bundle=debug-wide", "pool.bundle=debug")
    data = made["stage1"].config.data
    assert (data.seed, data.sources[0].repeat, data.sources[0].corpus) == (3, 2.0, f"{tmp_path}/corpus")
    assert (made["corpus"].config.bundle, made["pool"].config.bundle) == ("debug-wide", "debug")
    rounds = steps(tmp_path, "stage2.rounds=2")["stage2"].config
    assert (rounds.pools, rounds.pool.candidates) == ((f"{tmp_path}/pool",), 4)
    assert steps(tmp_path, "stage2.polish.steps=0")["pairs_pool"].config.checkpoint.endswith(
        "round-1/finetune.safetensors"
    )
    own = steps(tmp_path, "pool={prompts: mine.csv}")["pool"].config
    assert (own.prompts, own.corpus) == (str(Path("mine.csv").absolute()), None)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("stage2.stepz=1",), r"section stage2: .*\n.*did you mean steps"),
        (("stage1.steps=many",), "section stage1"),
        (("pool.output=x",), "pool.output: every step has its own folder"),
        (("pool=null",), "section stage2 needs section pool"),
        (("pairs_pool=null",), "section pairs needs section pairs_pool"),
        (("pairs=null",), "section stage3 needs section pairs"),
        (("generate=null",), "section evaluate needs section generate"),
        (("control=false",), "systems.control: there is no control"),
        (
            ("stage1.model={size: debug, head: v2}", "stage2.model={size: debug, head: v1}"),
            "stage2.model: stage1 was trained as v2 and collapses as v1",
        ),
        (
            ("stage2.model={size: debug, head: v2}", "stage3.model={size: debug, head: v1}"),
            "stage3.model: stage2 was trained as v2 and collapses as v1",
        ),
        (("systems.stage3.generate={head: v1}",), "systems.stage3: stage3 was trained as v2 and collapses as v1"),
        (("stage2.model.head=v2", "pairs_pool.head=v4"), "pairs_pool: stage2 was trained as v2 and collapses as v4"),
        (("pool={head: v3, prompt_count: 5}",), "pool: stage1 has the score head v1, whose tensors are not those of"),
        (("stage1.model.null=learned", "pool.null=scalar_zero"), "pool: stage1 has a learned null score"),
        (("systems.stage1-best.generate={null: learned}",), "systems.stage1-best: stage1 has no learned null score"),
        (
            ("reward=bundle", "stage1.model.head=none", "stage1.data={sources: [{score_column: null}]}"),
            "pool: stage1 has no score head, and sampler.score is 2",
        ),
        (("prompts=null",), "section generate"),
        (("systems={my model: {stage: stage1}}",), "'my model' cannot name a system"),
        (("stage4={}",), "unknown field"),
        (("systems.stage1.scores=[2.0]",), "scores are two or more"),
        (("systems.stage1={}",), "needs one of stage, checkpoint .* and clips"),
        (("systems.stage1.clips=/x",), "needs one of stage, checkpoint .* and clips"),
        (("systems.stage1={clips: /x, seed: 3}",), "clips are there already"),
    ],
)
def test_wrong_sections_are_found_before_the_first_step(tmp_path, sets, message):
    with pytest.raises(UserError, match=message):
        reproduce(debug(tmp_path / "run", *sets))
    assert not (tmp_path / "run").exists()


def states(output: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> dict[str, str]:
    """What `--plan-only` says of every step."""
    assert reproduce(debug(output, *sets), plan_only=True) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 10
    rows = [line.split("|") for line in (output / "plan.md").read_text().splitlines() if line.startswith("| ")]
    return {row[1].strip(): row[2].strip() for row in rows if row[1].strip() != "step"}


def test_a_changed_section_concerns_its_step_and_those_that_take_from_it(tmp_path, capsys):
    from ttmray.recipes.reproduce import _fingerprints

    output = tmp_path / "run"
    config = debug(output)
    made = build_steps(config)
    root = Folder(str(output))
    for step in made:
        for name in step.makes:
            root.write(name, b'{"created": "2026-01-01", "rows": 1}')  # of a success marker: one that lists no files
        prints = _fingerprints(config, made)
        record = {"fingerprint": prints[step.name], "done": True, "seconds": 1, "gpu_seconds": 0, "launches": 1}
        root.write(f"steps/{step.name}.json", json.dumps(record).encode())
    everything = {step.name for step in made}
    assert states(output, capsys) == dict.fromkeys(everything, "done")

    def changed(*sets: str) -> set[str]:
        return {name for name, state in states(output, capsys, *sets).items() if state != "done"}

    assert changed("stage1.runtime.log_every=1", "corpus.runtime.workers=1") == set()
    assert changed("ranker.seed=1") == everything - {"corpus", "votes"}
    assert changed("reward=bundle") == everything - {"corpus", "votes", "ranker", "rescore"}
    assert changed("evaluate.seed=1") == {"evaluate"}
    assert changed("pairs.margin=0.1") == {"pairs", "stage3", "generate-stage3", "evaluate"}
    before = {"corpus", "votes", "ranker", "rescore"}
    assert changed("stage1.steps=41") == everything - before
    assert changed("weights=ema:0.05") == everything - before
    other = tmp_path / "other.csv"
    other.write_text("id,prompt\nx,another\n")
    assert changed(f"prompts={other}") == everything - (before | {"stage1", "control"})


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    subprocess.run([sys.executable, "-m", "ttmray.synth.songs", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def small(songs: Path, output: Path | str) -> list[str]:
    """Arguments of the debug chain with fewer updates and clips."""
    return [
        str(DEBUG), f"output={output}", f"corpus.input={songs}", f"prompts={PROMPTS}",
        "stage1.steps=12", "stage1.checkpoint.every=4", "stage2.steps=6", "stage2.polish.steps=3", "stage3.steps=6",
        "stage2.checkpoint.every=3", "stage3.checkpoint.every=3", "pool.prompt_count=3", "pool.unit_clips=4",
        "systems={stage1: {stage: stage1}, stage3: {stage: stage3}}",
    ]  # fmt: skip


def start(songs: Path, output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, *small(songs, output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def begun(output: Path) -> int:
    return len(list((output / "steps").glob("*.json")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_chain_that_is_killed_on_its_way_ends_like_an_undisturbed_one(songs, tmp_path, capsys):
    # names of one length: weights files name their run, and where tensors lie in a file decides last bits on a CPU
    undisturbed, killed = tmp_path / "calm", tmp_path / "shot"
    assert start(songs, undisturbed).wait(timeout=560) == 0
    rng = random.Random(5)
    for steps_begun in (
        1,
        4,
        5,
        6,
        7,
        9,
        11,
        14,
    ):  # corpus, rescore, stage1, pool, ... evaluate
        driver = start(songs, killed)
        while driver.poll() is None and begun(killed) < steps_begun:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 4.0))
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert start(songs, killed).wait(timeout=560) == 0
    for name in ("pool/index.parquet", "pairs_pool/index.parquet", "stage2/expert/round-1/selection/kept.txt"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    clips = [
        {p.name: p.read_bytes() for p in (run / "generated/stage3/clips").iterdir()} for run in (killed, undisturbed)
    ]
    assert clips[0] == clips[1]
    records = {path.stem: json.loads(path.read_text()) for path in (killed / "steps").iterdir()}
    assert all(record["done"] for record in records.values())
    assert sum(record["launches"] for record in records.values()) > len(records)
    assert "| evaluate | done |" in (killed / "summary.md").read_text()
    config = load_config(ReproduceConfig, str(DEBUG), small(songs, killed)[1:])
    assert reproduce(config) == 0
    assert "nothing to do: all 14 steps are done" in capsys.readouterr().out


@pytest.mark.slow
def test_the_chain_runs_its_first_steps_and_goes_on_from_there(songs, tmp_path, capsys):
    output = tmp_path / "run"
    config = load_config(ReproduceConfig, str(DEBUG), small(songs, output)[1:])
    assert reproduce(config, last="ranker") == 0
    assert (output / "ranker/tunejury.safetensors").exists()
    assert begun(output) == 3
    assert reproduce(config, last="votes") == 0
    assert "nothing to do: all 2 steps are done" in capsys.readouterr().out
    with pytest.raises(UserError, match="step rescore is not done"):
        reproduce(config, first="pool")


def rows_of(run: Path, columns: list[str]) -> list[dict[str, Any]]:
    folder = Folder(str(run))
    table = with_columns(folder, read_index(folder), columns)
    return [row for row in table.to_pylist() if row["status"] == "ok"]


def test_what_the_votes_prefer_is_what_stage_1_is_conditioned_on(songs, tmp_path):
    """Votes for loud clips: the ranker learns them, the corpus is rescored, the scores of Stage 1 follow loudness.

    Loudness and votes are of the mixes, and the instrumentals of an untrained separator are something else.
    """
    output = tmp_path / "run"
    sets = ["votes.prefer=lufs", "votes.count=600", "ranker.head.lr=0.003", "ranker.head.max_epochs=100"]
    sets.append("stage1.data={sources: [{score_column: ranker/reward_score}]}")
    config = load_config(ReproduceConfig, str(DEBUG), [*small(songs, output)[1:], *sets])
    assert reproduce(config, last="rescore") == 0
    stage1 = next(step.config for step in build_steps(config) if step.name == "stage1")
    clips = open_mixture(stage1.data).sources[0]
    rows = {row["key"]: row for row in rows_of(output / "corpus", [])}
    of = {name: [rows[str(key)][name] for key in clips.keys] for name in ("lufs", "reward_score")}
    assert spearmanr(clips.score, of["lufs"]).statistic > 0.7
    assert spearmanr(of["reward_score"], of["lufs"]).statistic < 0  # the bundle's own scores do not


def test_the_whole_chain_goes_by_its_own_ranker_and_says_so_by_hash(songs, tmp_path):
    output = tmp_path / "run"
    config = load_config(ReproduceConfig, str(DEBUG), [*small(songs, output)[1:], "generate.scores=true"])
    assert reproduce(config) == 0
    head = hashlib.sha256((output / "ranker/tunejury.safetensors").read_bytes()).hexdigest()
    bundle = open_bundle(f"debug+{output}/ranker")
    protocol = f"debug/{bundle.protocol('empty').id()}"
    assert bundle.head.sha256 == head
    assert protocol != f"debug/{open_bundle('debug').protocol('empty').id()}"

    def described(run: str) -> dict[str, Any]:
        return json.loads((output / run / "run.json").read_text())

    column = "ranker/instrumental_reward_score"
    assert described("stage1")["config"]["data"]["sources"][0]["score_column"] == column
    assert described("corpus/scores/ranker")["head"] == head
    for run in ("corpus/scores/ranker", "pool", "pairs_pool"):
        assert described(run)["protocol_id"] == protocol, run
    for run in ("pool", "pairs_pool", "generated/stage3"):
        assert described(run)["identity"]["bundle"]["head"].startswith(head), run
    for run in ("pool", "pairs_pool"):
        assert {row["protocol"] for row in rows_of(output / run, [])} == {protocol}
    manifest = pq.read_table(output / "generated/stage3/manifest.parquet").to_pylist()
    assert {row["protocol"] for row in manifest} == {protocol}
    results = json.loads((output / "evaluation/results.json").read_text())
    assert results["protocol"] == protocol
    assert head[:12] in results["note"]
    selection = json.loads((output / "stage2/expert/round-1/selection/selection.json").read_text())
    scores = [row[column] for row in rows_of(output / "corpus", [column]) if row["split"] == "train"]
    assert selection["train"]["mean"] == pytest.approx(np.mean(scores))


def test_the_reward_of_the_bundle_is_a_switch(tmp_path):
    made = steps(tmp_path, "reward=bundle")
    assert "rescore" not in made
    assert made["stage1"].config.data.sources[0].score_column == "instrumental_reward_score"
    assert made["pool"].config.bundle == "debug"


@pytest.mark.slow
def test_a_chain_whose_run_folder_is_in_a_bucket_ends_there(songs, bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTMRAY_COPIES", str(tmp_path / "copies"))
    monkeypatch.chdir(tmp_path)
    less = ["votes=null", "ranker=null", "control=false", "systems={stage3: {stage: stage3}}"]
    config = load_config(ReproduceConfig, str(DEBUG), small(songs, f"{bucket}/run")[1:] + less)
    assert reproduce(config) == 0
    run = Folder(f"{bucket}/run")
    assert "| evaluate | done |" in run.read("summary.md").decode()
    assert run.exists("generated/stage3/index.html")
    assert run.exists("evaluation/report/index.html")
    capsys.readouterr()
    assert reproduce(config) == 0
    assert "nothing to do: all 9 steps are done" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"copies"}  # nothing is left on this machine but copies


def test_shipped_configs_are_valid(tmp_path):
    config = load_config(ReproduceConfig, str(REPO / "configs/paper/reproduce.yaml"), [f"output={tmp_path}"])
    assert len(build_steps(config)) > 10
    for name in ("debug", "paper"):
        load_config(CandidatesConfig, str(REPO / f"configs/{name}/pool.yaml"))
