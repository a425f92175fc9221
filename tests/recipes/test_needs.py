"""What a chain needs is looked at before its first step: all that is missing at once, and nothing more."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_backbone

from ttmray.cli import main
from ttmray.config import Config, load_config
from ttmray.errors import UserError
from ttmray.evaluation.fad import Gaussian
from ttmray.evaluation.measure import embedding_protocol
from ttmray.models.backbone_weights import METADATA, debug_backbone
from ttmray.models.bundle import open_bundle
from ttmray.models.weights import open_store
from ttmray.recipes.ablations import AblateConfig, AblationPlan, ablate
from ttmray.recipes.chain import run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.needs import Need, refuse_missing
from ttmray.recipes.reproduce import ReproduceConfig, reproduce
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[2]
CHAINS = ("reproduce", "ablate")
SOURCES = ("music_arena", "musicprefs", "aime", "songeval")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine: no weights, no reference sets, and /data of the configs is a folder that is not there."""
    for name in list(os.environ):
        if name.startswith("TTMRAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    for name in CHAINS:
        text = (REPO / f"configs/paper/{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text.replace("/data/", f"{tmp_path}/data/"))
    return tmp_path


def plan(machine: Path, name: str, *more: str) -> int:
    return main([name, "--config", str(machine / f"{name}.yaml"), "--plan-only", *more])


def put(path: Path, text: str = "stand-in") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def put_weights(machine: Path) -> None:
    """A few bytes for every file, recorded like pulled ones: sizes and hashes are what the records say."""
    store, records = open_store(), {}
    for name in {*open_bundle("paper").weights(), *open_bundle("public-16k").weights()}:
        for file in store.entry(name).files:
            put(machine / "weights" / name / file.name)
            records[f"{name}/{file.name}"] = {"sha256": "0" * 64, "size": len("stand-in")}
    put(machine / "weights/hashes.json", json.dumps({"files": records, "converted": {}}))


def put_votes(data: Path) -> None:
    for number, name in enumerate(SOURCES):
        votes = [
            {"pair_id": f"{name}{i}", "winner": "a", "prompt": "x", "a_audio": f"{name}_{i}a.wav", "b_audio": "b.wav"}
            for i in range(3)
        ]
        put(data / f"preferences/{name}.json", json.dumps(votes))
        for vote in votes:
            put(data / "preferences/audio" / vote["a_audio"])
        released = ("MusicArena-random_split_bench_clean", "MusicPrefs-random_split", "AIME-random_split")
        split = (*released, "SongEval-balanced_split")[number]
        parts = dict(zip(("train", "valid", "test"), ([vote["pair_id"]] for vote in votes), strict=True))
        put(data / f"preferences/splits/{split}.json", json.dumps(parts))
    put(data / "preferences/audio/b.wav")


def put_reference(machine: Path, name: str) -> None:
    """As `ttmray reference build` leaves one."""
    bundle = open_bundle("paper")
    protocol = embedding_protocol("paper", bundle.protocol("empty"))
    folder = machine / "home/.cache/ttmray/references" / name
    clap = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file({"clap": clap}, folder / "clap.safetensors")
    pq.write_table(pa.table({"track_id": [str(i) for i in range(8)]}), folder / "tracks.parquet")
    Gaussian.of(clap, protocol).save(str(folder / "gaussian.safetensors"))
    about = {"kind": "reference", "protocol": protocol, "source": "x", "name": name, "stem": "instrumental"}
    (folder / "reference.json").write_text(json.dumps(about))


def put_backbone(path: Path, head: Any) -> None:
    model = debug_backbone(1, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {METADATA: json.dumps({"backbone": model.config.to_dict()})}
    save_backbone({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)


def put_everything(machine: Path) -> None:
    data = machine / "data"
    put_weights(machine)
    put(machine / "prompts.csv", "id,prompt\na,calm piano\n")
    put(data / "jamendo-100/prompts.csv", "id,prompt\nb,loud drums\n")
    put(data / "mtg-jamendo/00/7400.mp3")
    put(data / "jamendo_qwen.json", json.dumps([{"path": "00/7400.mp3", "caption": "a song"}]))
    put_votes(data)
    put(data / "baseline/fluxaudio_s_full.pth")
    put(data / "chain/corpus/index.parquet")
    for name in ("sdd-706", "jamendo-100"):
        put_reference(machine, name)
    for chain, head in (("chain", "v1"), ("chain-v2", "v2")):
        for place in ("stage1/weights", "stage2/expert/round-1/polish", "stage2/control/round-1/polish"):
            put_backbone(data / f"{chain}/{place}.safetensors", head)
    put_backbone(data / "chain/stage3/weights.safetensors", "v2")
    put_backbone(data / "stage3-v1.safetensors", "v1")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "reproduce",
            [
                "data/mtg-jamendo: there is no such folder", "data/jamendo_qwen.json", "/prompts.csv: not found",
                *(f"data/preferences/{name}.json" for name in SOURCES), "preferences/audio", "SongEval-balanced_split",
                "fluxaudio_s_full.pth", "reference sdd-706", "ttmray reference build sdd-706",
            ],
        ),
        (
            "ablate",
            [
                "/prompts.csv: not found", "data/jamendo-100/prompts.csv: not found",
                "reference sdd-706", "reference jamendo-100",
                "fluxaudio_s_full.pth", "set checkpoints.baseline.path", "data/chain/corpus is no finished corpus",
                "chain/stage1/weights", "chain-v2/stage1/weights", "chain/stage2/expert/round-1/polish",
                "chain-v2/stage2/expert/round-1/polish", "chain/stage2/control/round-1/polish", "chain/stage3/weights",
                "data/stage3-v1.safetensors",
            ],
        ),
    ],
)  # fmt: skip
def test_on_an_empty_machine_a_paper_config_lists_everything_at_once(machine, capsys, name, named):
    assert plan(machine, name) == 2
    text = capsys.readouterr().err
    weights = {*open_bundle("paper").weights(), *open_bundle("public-16k").weights()}
    for one in (*named, *(f"The weights of {entry} are not here" for entry in weights)):
        assert text.count(f"{one}") >= 1, one
    lines = [line for line in text.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(set(lines))
    assert all(" For " in line for line in lines)
    assert "ttmray weights pull --bundle paper" in text
    assert "ttmray weights pull --bundle public-16k" in text
    assert not (machine / "data").exists()  # nothing is begun, nothing is written


@pytest.mark.parametrize("name", CHAINS)
def test_with_everything_in_its_place_a_paper_config_can_begin(machine, capsys, name):
    put_everything(machine)
    assert plan(machine, name) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "path", "named"),
    [
        ("reproduce", "data/mtg-jamendo/00/7400.mp3", "data/mtg-jamendo holds no audio"),
        ("reproduce", "data/preferences/audio/aime_1a.wav", "AIME: 1 of 3 pairs have a clip that is missing"),
        ("reproduce", "data/preferences/splits/AIME-random_split.json", "AIME-random_split.json: not found"),
        ("reproduce", "weights/mert/pytorch_model.bin", "The weights of mert are not here"),
        ("reproduce", "home/.cache/ttmray/references/sdd-706/reference.json", "reference sdd-706: there is none"),
        ("reproduce", "home/.cache/ttmray/references/sdd-706/clap.safetensors", "clap.safetensors: not found"),
        ("reproduce", "data/baseline/fluxaudio_s_full.pth", "fluxaudio_s_full.pth: not found"),
        ("ablate", "data/baseline/fluxaudio_s_full.pth", "fluxaudio_s_full.pth: not found"),
        ("ablate", "prompts.csv", "prompts.csv: not found"),
        ("ablate", "weights/clap-music/music_audioset_epoch_15_esc_90.14.pt", "The weights of clap-music"),
    ],
)
def test_one_thing_that_is_missing_is_the_only_one_that_is_named(machine, capsys, name, path, named):
    put_everything(machine)
    (machine / path).unlink()
    assert plan(machine, name) == 2
    text = capsys.readouterr().err
    assert "1 thing is missing" in text
    assert named in text


def test_what_is_there_but_no_use_is_named_too(machine, capsys):
    put_everything(machine)
    put(machine / "prompts.csv", "id,prompt\na,x\na,y\n")
    put(machine / "data/preferences/aime.json", '[{"winner": "c", "a_audio": "x", "b_audio": "y"}]')
    put(machine / "data/jamendo_qwen.json", "[")
    put(machine / "weights/mmaudio-vae/v1-44.pth", "cut")
    about = json.loads((machine / "home/.cache/ttmray/references/sdd-706/reference.json").read_text())
    about["protocol"] = "debug/other"
    put(machine / "home/.cache/ttmray/references/sdd-706/reference.json", json.dumps(about))
    assert plan(machine, "reproduce") == 2
    text = capsys.readouterr().err
    assert "5 things are missing" in text
    for one in ("the id a of", "'c' is no label", "jamendo_qwen.json", "expected 8", "was made under debug/other"):
        assert one in text, one


@pytest.mark.parametrize("name", CHAINS)
def test_a_reward_head_that_is_not_there_is_named_with_the_rest(machine, capsys, name):
    put_everything(machine)
    assert plan(machine, name, "--set", f"bundle=paper+{machine}/ranker") == 2
    text = capsys.readouterr().err
    assert "1 thing is missing" in text
    assert f"leave out +{machine}/ranker" in text


def test_the_way_to_a_reference_needs_no_ranker_that_the_chain_will_train(machine, capsys):
    put_everything(machine)
    shutil.rmtree(machine / "home")
    assert plan(machine, "reproduce") == 2
    text = capsys.readouterr().err
    assert "Build it: ttmray reference build sdd-706 SOURCE --stem instrumental --bundle paper --store" in text
    assert "ranker" not in text


def test_a_table_of_scores_of_another_head_is_looked_for_in_the_corpus(machine, capsys):
    put_everything(machine)
    column = f"[{{corpus: {machine}/data/chain/corpus, score_column: ranker/reward_score}}]"
    assert plan(machine, "ablate", "--set", f"stage1.data.sources={column}") == 2
    text = capsys.readouterr().err
    assert "1 thing is missing" in text
    assert "data/chain/corpus has no scores ranker. For train-v3, train-v4" in text
    assert "ttmray corpus rescore" in text
    put(machine / "data/chain/corpus/scores/ranker/_SUCCESS.json", '{"created": "2026-01-01", "rows": 1}')
    assert plan(machine, "ablate", "--set", f"stage1.data.sources={column}") == 0


def test_what_all_trainings_lack_is_set_in_the_section_that_they_share(machine, capsys):
    put_everything(machine)
    gone = f"[{{corpus: {machine}/gone}}]"
    assert plan(machine, "ablate", "--set", f"stage1.data.sources={gone}") == 2
    text = capsys.readouterr().err
    assert "set stage1.data.sources.0.corpus" in text
    assert plan(machine, "ablate", "--set", f"checkpoints.v3.train.data.sources={gone}") == 2
    assert "set checkpoints.v3.train.data.sources.0.corpus" in capsys.readouterr().err


def test_weights_from_outside_that_do_not_fit_their_forward_are_named(machine, capsys):
    put_everything(machine)
    system = f"{{checkpoint: {machine}/data/chain-v2/stage1/weights.safetensors, generate: {{head: v1}}}}"
    assert plan(machine, "reproduce", "--set", f"systems.other={system}") == 2
    assert "was trained as v2 and collapses as v1" in capsys.readouterr().err
    put_backbone(machine / "data/text.safetensors", "none")
    assert plan(machine, "reproduce", "--set", f"systems.other.checkpoint={machine}/data/text.safetensors") == 2
    text = capsys.readouterr().err
    assert "1 thing is missing" in text
    assert "text.safetensors has no score head, and sampler.score is 5" in text


def test_a_reference_that_is_built_here_is_of_the_stem_that_evaluations_ask_for(machine, capsys):
    put_everything(machine)
    for name in ("sdd-706", "jamendo-100"):
        shutil.rmtree(machine / f"home/.cache/ttmray/references/{name}")
    put(machine / "data/sdd/1.mp3")
    built = f"{{sdd-706: {machine}/data/sdd, jamendo-100: {machine}/data/sdd}}"
    sets = [f"output={machine}/run", f"prompts={machine}/prompts.csv", f"references={built}"]
    config = load_config(AblateConfig, str(machine / "ablate.yaml"), sets)
    steps = {step.name: step for step in AblationPlan(config).steps()}
    assert steps["reference-sdd-706"].config.stem == "instrumental"  # type: ignore[attr-defined]
    assert steps["reference-sdd-706"].run.keywords["stem"] == "instrumental"  # type: ignore[attr-defined]
    shutil.rmtree(machine / "weights/mdx_extra")
    with pytest.raises(UserError, match=r"mdx_extra are not here.*reference-sdd-706, reference-jamendo-100"):
        ablate(config, plan_only=True, last="reference-jamendo-100")


def test_only_steps_that_are_to_run_need_something(machine, capsys):
    put_everything(machine)
    shutil.rmtree(machine / "home")
    (machine / "prompts.csv").unlink()
    assert plan(machine, "reproduce", "--until", "stage1") == 0
    assert plan(machine, "reproduce", "--until", "pool") == 2
    text = capsys.readouterr().err
    assert "prompts.csv" in text
    assert "sdd-706" not in text
    assert (
        plan(machine, "reproduce", "--set", "evaluate=null", "--set", f"prompts={machine}/data/jamendo-100/prompts.csv")
        == 0
    )


def test_a_run_lists_what_is_missing_before_its_first_step(tmp_path):
    ran: list[str] = []

    def missing(what: str) -> None:
        raise UserError(f"no {what}.", "Buy one.")

    def step(name: str, *needs: Need) -> Step:
        def run() -> int:
            ran.append(name)
            Folder(str(tmp_path)).write(f"{name}.txt", b"")
            return 0

        return Step(name, Config(), run, (f"{name}.txt",), needs=needs)

    steps = [
        step("a"),
        step("b", Need(missing, ("piano",))),
        step("c", Need(missing, ("piano",)), Need(missing, ("x",))),
    ]
    prints = {"a": "1", "b": "2", "c": "3"}
    with pytest.raises(UserError) as caught:
        run_chain(Folder(str(tmp_path)), steps, prints)
    assert ran == []
    assert "no piano. For b, c. Buy one.\n" in caught.value.message
    assert "no x. For c. Buy one." in caught.value.message
    assert run_chain(Folder(str(tmp_path)), steps, prints, last="a") == 0
    record = (tmp_path / "steps/a.json").read_text()
    for name in ("b", "c"):  # as if they had ended well when all was there
        (tmp_path / f"{name}.txt").touch()
        (tmp_path / f"steps/{name}.json").write_text(record.replace('"1"', f'"{prints[name]}"'))
    assert run_chain(Folder(str(tmp_path)), steps, prints) == 0
    assert ran == ["a"]


def test_equal_needs_are_looked_at_once():
    looked: list[int] = []
    need = Need(looked.append, (1,))
    refuse_missing({"a": [need], "b": [Need(looked.append, (1,))], "c": [need, Need(looked.append, (2,))]})
    assert looked == [1, 2]


def test_songs_and_files_in_a_bucket_are_looked_for_there(bucket, tmp_path):
    def missing(*sets: str) -> str:
        usual = [f"output={bucket}/run", f"prompts={bucket}/prompts.csv", f"corpus.input={bucket}/songs"]
        config = load_config(ReproduceConfig, str(REPO / "configs/debug/reproduce.yaml"), [*usual, *sets])
        try:
            return str(reproduce(config, plan_only=True))
        except UserError as error:
            return error.message

    captions = f"corpus.catalogue.captions={bucket}/captions.csv"
    text = missing(captions)
    assert "3 things are missing" in text
    assert f"{bucket}/songs holds no audio" in text
    assert f"{bucket}/captions.csv: not found" in text
    assert f"{bucket}/prompts.csv: not found" in text
    store = Folder(bucket)
    store.write("songs/a.mp3", b"x")
    store.write("captions.csv", b"path,caption\na.mp3,a song\n")
    store.write("prompts.csv", b"id,prompt\na,calm piano\n")
    assert missing(captions) == "0"
    assert not store.exists("run/steps/corpus.json")
