"""The generation job: what it writes, how it goes on, and that nobody can tell who made a clip."""

import csv
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from safetensors.torch import save_file

from ttmray.audio.loudness import integrated_loudness, true_peak
from ttmray.config import load_config
from ttmray.errors import ClipError, UserError
from ttmray.generation import generate as job
from ttmray.generation.config import GenerateConfig
from ttmray.generation.generate import _score_warnings, best_of_curve, generate, plan_clips
from ttmray.generation.prompts import Prompt
from ttmray.generation.worker import ClipMaker
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import METADATA, debug_backbone
from ttmray.models.bundle import open_bundle
from ttmray.models.score_support import ScoreSupport

MakeConfig = Callable[..., GenerateConfig]
PROMPTS = {"a": "a calm piano", "b": "driving drums", "c": "a quiet café 🎹"}
FINISH = "postprocess={passes: 0}"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps([{"id": name, "prompt": text} for name, text in PROMPTS.items()]))
    return path


def make(prompts: Path, output: Path, *sets: str) -> GenerateConfig:
    usual = ("bundle=debug", "sampler.steps=1", "runtime.device=cpu", "runtime.threads=1")
    return load_config(GenerateConfig, None, [f"prompts={prompts}", f"output={output}", *usual, *sets])


def files(run: Path, below: str = "clips") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / below).iterdir())}


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in pq.read_table(run / "manifest.parquet").to_pylist()}


@pytest.fixture(scope="module")
def finished(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three clips, with loudness and scores. Do not change it: see `run`."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert generate(make(prompts, output, FINISH, "scores=true")) == 0
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def same(prompts: Path, run: Path) -> Callable[..., int]:
    """The same command once more, on the copy."""
    return lambda **options: generate(make(prompts, run, FINISH, "scores=true"), **options)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no models may be loaded."""

    def refuse(self: ClipMaker, job: object) -> None:
        raise AssertionError("models are loaded")

    monkeypatch.setattr(ClipMaker, "__init__", refuse)


def test_every_clip_has_a_file_and_a_row_that_says_what_it_is(finished):
    found = rows(finished)
    assert list(found) == ["a", "b", "c"]
    assert list(files(finished)) == ["a.wav", "b.wav", "c.wav"]
    for name, row in found.items():
        data = (finished / row["file"]).read_bytes()
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        assert (rate, wave.shape) == (44100, (441_000, 1))
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["lufs"] == pytest.approx(integrated_loudness(wave.T, rate), abs=1e-4)
        assert row["lufs"] == pytest.approx(-16.5, abs=0.1)
        assert row["true_peak_db"] == pytest.approx(true_peak(wave.T, rate), abs=1e-4)
        assert row["true_peak_db"] <= -1.0
        assert np.isfinite([row["reward_score"], row["clap_score"]]).all()
        assert row["protocol"].startswith("debug/")
        assert (row["status"], row["prompt"], row["seed"], row["score"]) == ("ok", PROMPTS[name], 42, 5.0)
        assert row["text"] == "high quality instrumental music, " + PROMPTS[name]
        assert row["settings"] == json.loads((finished / "run.json").read_text())["fingerprint"]
    assert len({row["sha256"] for row in found.values()}) == 3
    with open(finished / "manifest.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["prompt"] for row in table] == list(PROMPTS.values())
    assert all("mean nothing" in row["note"] for row in table), "whoever opens the table alone is told"
    assert "mean nothing" in json.loads((finished / "summary.json").read_text())["note"]


def test_a_finished_run_does_nothing_and_loads_nothing(same, run, idle):
    before = files(run)
    assert same() == 0
    assert files(run) == before


@pytest.mark.parametrize("damage", ["row", "audio", "bytes"])
def test_only_what_is_missing_or_changed_is_made_again_with_the_same_bytes(same, run, finished, monkeypatch, damage):
    if damage == "row":
        (run / "manifest/b.json").unlink()
    elif damage == "audio":
        (run / "clips/b.wav").unlink()
    else:
        (run / "clips/b.wav").write_bytes(b"RIFF")
    made: list[str] = []
    original = ClipMaker._write_one
    monkeypatch.setattr(ClipMaker, "_write_one", lambda self, work: made.append(work.clip.name) or original(self, work))
    assert same() == 0
    assert made == ["b"]
    assert files(run) == files(finished)
    assert files(run, "manifest") == files(finished, "manifest")


def test_other_settings_are_refused_with_their_differences(prompts, run, idle):
    with pytest.raises(UserError, match=r"another run:\n    config.sampler.steps: 1 -> 3"):
        generate(make(prompts, run, FINISH, "scores=true", "sampler.steps=3"))
    with pytest.raises(UserError, match=r"config.seed: 42 -> 55"):
        generate(make(prompts, run, FINISH, "scores=true", "seed=55"))


def test_other_settings_may_replace_the_clips_of_a_run_and_nothing_else_of_the_folder(
    prompts, run, finished, tmp_path, capsys
):
    (run / "notes.txt").write_text("mine")
    changed = make(prompts, run, "seed=7")
    with pytest.raises(UserError, match="--overwrite deletes its clips and starts anew"):
        generate(changed)
    before = {path.name: path.read_bytes() for path in (run / "clips").iterdir()}
    assert generate(changed, overwrite=True) == 0
    assert f"{len(before)} clips of other settings are deleted" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (run / "clips").iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != data for name, data in before.items())
    assert (run / "notes.txt").read_text() == "mine"
    assert generate(changed, overwrite=True) == 0
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "songs").mkdir()
    (tmp_path / "songs/a.flac").write_bytes(b"music")
    with pytest.raises(UserError, match=r"holds a\.flac"):
        generate(make(prompts, tmp_path / "songs"), overwrite=True)
    assert (tmp_path / "songs/a.flac").exists()


def test_prompts_can_be_added_but_an_id_keeps_its_prompt(run, finished, tmp_path):
    longer = tmp_path / "more.csv"
    longer.write_text("id,prompt\nd,a harp\na,a calm piano\n")
    assert generate(make(longer, run, FINISH, "scores=true")) == 0
    assert {name: data for name, data in files(run).items() if name != "d.wav"} == files(finished)
    assert list(rows(run)) == ["d", "a", "b", "c"]
    longer.write_text("id,prompt\na,a loud piano\n")
    with pytest.raises(UserError, match="has a clip a of another prompt: 'a calm piano', not 'a loud piano'"):
        generate(make(longer, run, FINISH, "scores=true"))


def test_order_threads_and_company_do_not_change_a_clip(finished, tmp_path):
    shuffled = tmp_path / "prompts.csv"
    shuffled.write_text("id,prompt\nc,a quiet café 🎹\nb,driving drums\n")
    config = make(shuffled, tmp_path / "run", FINISH, "scores=true", "runtime.threads=2")
    assert generate(config) == 0
    assert files(tmp_path / "run") == {k: v for k, v in files(finished).items() if k != "a.wav"}
    assert rows(tmp_path / "run") == {k: rows(finished)[k] for k in ("c", "b")}


def test_two_ray_actors_give_the_same_bytes(prompts, finished, tmp_path):
    import ray

    sets = ("runtime.runner=ray", "runtime.workers=2")
    try:
        assert generate(make(prompts, tmp_path / "run", FINISH, "scores=true", *sets)) == 0
    finally:
        ray.shutdown()
    assert files(tmp_path / "run") == files(finished)
    assert files(tmp_path / "run", "manifest") == files(finished, "manifest")


def test_a_failed_clip_is_a_row_and_the_others_are_made(prompts, tmp_path, monkeypatch, capsys):
    original = ClipMaker._finish_one

    def fail(self: ClipMaker, work: Any) -> None:
        if work.clip.name == "b":
            raise RuntimeError("no sound")
        original(self, work)

    monkeypatch.setattr(ClipMaker, "_finish_one", fail)
    config = make(prompts, tmp_path / "run", "runtime.threads=2")
    archive = tmp_path / "clips.zip"
    assert generate(config, zip_to=str(archive)) == 3
    assert not archive.exists()
    assert list(files(tmp_path / "run")) == ["a.wav", "c.wav"]
    row = rows(tmp_path / "run")["b"]
    assert (row["status"], row["reason"], row["message"]) == ("failed", "error", "RuntimeError: no sound")
    assert row["file"] is None
    assert "b: error: RuntimeError: no sound" in capsys.readouterr().out
    assert generate(config.model_copy(update={"max_failures": 1})) == 0
    monkeypatch.setattr(ClipMaker, "_finish_one", original)
    assert generate(config) == 3  # a failed clip is not made again unasked
    assert generate(config, retry_failed=True, zip_to=str(archive)) == 0
    assert rows(tmp_path / "run")["b"]["status"] == "ok"


def test_the_archive_is_flat_and_reproducible(same, run, tmp_path, idle):
    assert same(zip_to=str(tmp_path / "one.zip")) == 0
    assert same(zip_to=str(tmp_path / "new/two.zip")) == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "new/two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files(run)
    with pytest.raises(UserError, match="not a local file"):
        same(zip_to=str(tmp_path))


def test_the_page_has_a_player_for_every_clip_and_needs_nothing_else(same, run, idle):
    assert same() == 0
    page = (run / "index.html").read_text(encoding="utf-8")
    assert [run / source for source in re.findall(r"<audio[^>]* src='([^']+)'", page)] == [
        run / f"clips/{name}.wav" for name in PROMPTS
    ]
    assert "a quiet café 🎹" in page
    assert "http" not in page
    assert "<script" not in page


def test_a_prompt_cannot_put_markup_into_the_page(tmp_path, idle):
    from ttmray.generation.play import write_page
    from ttmray.storage import Folder

    row = dict.fromkeys(("lufs", "true_peak_db", "reward_score", "clap_score", "file"))
    row |= {"name": "x", "prompt_id": "x", "prompt": "<script>alert(1)</script>", "status": "failed", "message": "<b>"}
    write_page(Folder.at(str(tmp_path)), [row], {"fingerprint": "0", "note": ""})
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page


def save(backbone: FluxAudio, path: Path, **about: Any) -> str:
    save_file(backbone.state_dict(), path, {METADATA: json.dumps({"backbone": backbone.config.to_dict(), **about})})
    return str(path)


def test_a_bundles_own_backbone_warns_of_scores_beyond_its_training(capsys):
    config = GenerateConfig.model_validate({"bundle": "micro", "texts": ["a piano"], "sampler": {"score": 5.0}})
    (warning,) = _score_warnings(config, open_bundle("micro"))
    assert warning.startswith("sampler.score 5 is above all scores that the model was trained on")
    assert warning in capsys.readouterr().out
    usual = config.model_copy(update={"sampler": config.sampler.model_copy(update={"score": 0.4})})
    assert _score_warnings(usual, open_bundle("micro")) == []
    assert _score_warnings(config, open_bundle("debug")) == []


def test_a_score_beyond_those_of_the_training_is_named_with_their_range(prompts, tmp_path, capsys):
    support = ScoreSupport(min=-1.2, p5=-0.45, p95=1.46, max=2.76).to_dict()
    known = save(debug_backbone(1), tmp_path / "known.safetensors", score_support=support)
    second = save(debug_backbone(1), tmp_path / "second.safetensors", score_support=support | {"max": 9.0})
    unknown = save(debug_backbone(1), tmp_path / "unknown.safetensors")
    mix = ("sampler.mode=average", f"second_checkpoint={second}", "sampler.score=1", "sampler.second_score=5")
    for name, sets, words in (
        ("five", (f"checkpoint={known}", "sampler.score=5"), ["sampler.score 5 is above all scores"]),
        ("two", (f"checkpoint={known}", "sampler.score=2"), ["sampler.score 2 is among the outermost 5 % of scores"]),
        ("low", (f"checkpoint={known}", "sampler.score=-3"), ["sampler.score -3 is below all scores"]),
        ("inside", (f"checkpoint={known}", "sampler.score=1"), []),
        ("null", (f"checkpoint={known}", "sampler.score=null"), []),
        ("unknown", (f"checkpoint={unknown}", "sampler.score=5"), []),
        ("mix", (f"checkpoint={known}", *mix), ["sampler.second_score 5 is among the outermost 5 % of scores"]),
    ):
        capsys.readouterr()
        assert generate(make(prompts, tmp_path / name, *sets)) == 0
        printed = capsys.readouterr().out
        warnings = json.loads((tmp_path / name / "run.json").read_text())["warnings"]
        assert len(warnings) == len(words) == printed.count("that the model was trained on")
        for warning, start in zip(warnings, words, strict=True):
            assert warning.startswith(start)
            assert warning in printed
            assert "p5 -0.45, p95 +1.46, max +" in warning
            assert ("choose-score" in warning) == (" all scores" in warning)


def test_checkpoints_heads_and_two_checkpoints_reach_the_sampler(prompts, tmp_path):
    first = save(debug_backbone(1), tmp_path / "first.safetensors")
    second = save(debug_backbone(2), tmp_path / "second.safetensors")
    one = tmp_path / "one.txt"
    one.write_text("a calm piano\n")
    settings = {
        "v1": (f"checkpoint={first}",),
        "v2": (f"checkpoint={first}", "head=v2"),
        "second": (f"checkpoint={second}",),
        "mix": (f"checkpoint={first}", f"second_checkpoint={second}", "sampler.mode=average"),
    }
    for name, sets in settings.items():
        assert generate(make(one, tmp_path / name, "pad_to=null", *sets)) == 0
    found = {name: next(iter(rows(tmp_path / name).values())) for name in settings}
    assert len({row["sha256"] for row in found.values()}) == 4
    assert found["mix"]["duration_s"] == 440_320 / 44_100
    weights = json.loads(found["mix"]["weights"])
    assert weights["second_checkpoint"] == hashlib.sha256(Path(second).read_bytes()).hexdigest()
    save(debug_backbone(3), tmp_path / "first.safetensors")
    with pytest.raises(UserError, match=r"belongs to another run:\n    weights.checkpoint"):
        generate(make(one, tmp_path / "v1", "pad_to=null", *settings["v1"]))


def test_v2_weights_are_refused_as_v1_and_a_cross_load_stands_in_every_row(prompts, tmp_path, capsys):
    path = save(debug_backbone(1, "v2"), tmp_path / "v2.safetensors")
    one = tmp_path / "one.txt"
    one.write_text("a calm piano\n")
    sets = (f"checkpoint={path}", "head=v1")
    with pytest.raises(UserError, match="was trained as v2 and collapses as v1"):
        generate(make(one, tmp_path / "run", *sets))
    assert not (tmp_path / "run").exists()
    assert generate(make(one, tmp_path / "run", *sets, "force_head=true")) == 0
    assert "v2 weights in the v1 forward, by force" in capsys.readouterr().out
    (row,) = rows(tmp_path / "run").values()
    assert json.loads(row["weights"])["checkpoint_cross_load"] == "v2 weights in the v1 forward, by force"


def test_weights_that_give_no_numbers_fail_every_clip(prompts, tmp_path):
    broken = debug_backbone(0)
    broken.final_layer.conv.bias.fill_(float("nan"))
    path = save(broken, tmp_path / "broken.safetensors")
    assert generate(make(prompts, tmp_path / "run", f"checkpoint={path}")) == 3
    assert {row["status"] for row in rows(tmp_path / "run").values()} == {"failed"}
    assert "not finite" in rows(tmp_path / "run")["a"]["message"]


def test_a_job_whose_clips_all_fail_stops(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ABORT_AFTER", 2)
    broken = debug_backbone(0)
    broken.final_layer.conv.bias.fill_(float("nan"))
    path = save(broken, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="2 of 2 clips failed, so the job stopped"):
        generate(make(prompts, tmp_path / "run", f"checkpoint={path}"))
    assert list(files(tmp_path / "run", "manifest")) == ["a.json", "b.json"]


def test_a_checkpoint_that_does_not_fit_leaves_an_empty_folder(prompts, tmp_path):
    other = BackboneConfig(text_dim=64, hidden=64, heads=2, depth=3, fused_depth=1, latent_dim=20, latent_len=312)
    model = FluxAudio(other)
    model.latent_mean.data.zero_()
    model.latent_std.data.fill_(1.0)
    path = save(model, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"checkpoint: the backbone makes 20 latent channels, the VAE .* has 40"):
        generate(make(prompts, tmp_path / "run", f"checkpoint={path}"))
    with pytest.raises(UserError, match="no score embedding, which does not fit head v1"):
        generate(make(prompts, tmp_path / "run", f"checkpoint={path}", "head=v1"))
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("checkpoint=/none.safetensors",), r"checkpoint: /none.safetensors is not a file"),
        (("head=v9", "checkpoint=x"), "head: no head but none, v1"),
        (("head=v2",), "head and null say how a checkpoint is used"),
        (("second_checkpoint=x", "checkpoint=x"), "sampler.mode single does not go with second_checkpoint"),
        (("seed=-1",), "seed: Input should be greater than or equal to 0"),
        (("samples=0",), "samples: Input should be greater than or equal to 1"),
        (("sampler.score=.nan",), "sampler.score: Input should be a finite number"),
        (("sampler.steps=0",), "sampler.steps: Input should be greater than or equal to 1"),
        (("texts=[x]",), "needs texts .* or prompts .*, and not both"),
        (("prompts=/none.csv",), r"/none.csv: not found"),
        (("bundle=x",), "bundle: there is no bundle 'x'"),
        (("runtime.device=tpu",), "runtime.device"),
        (("postprocess={format: flac}",), "postprocess.format differs from format"),
    ],
)
def test_bad_input_is_found_before_anything_is_loaded_or_written(prompts, tmp_path, idle, sets, message):
    with pytest.raises(UserError, match=message):
        generate(make(prompts, tmp_path / "run", *sets))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["s3://bucket/x.zip", ".", "prompts.csv"])
def test_an_archive_that_cannot_be_written_is_found_before_any_clip_is_made(prompts, tmp_path, idle, path):
    config = load_config(GenerateConfig, None, [f"prompts={prompts}", f"output={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"is not a local file|does not end in \.zip"):
        generate(config, zip_to=path)
    assert not (tmp_path / "run").exists()


def test_folders_of_others_are_left_alone(prompts, tmp_path, idle):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no generate run: it holds notes.txt"):
        generate(make(prompts, tmp_path))
    (tmp_path / "run.json").write_text('{"kind": "corpus"}')
    with pytest.raises(UserError, match="describes no generate run"):
        generate(make(prompts, tmp_path))


def test_several_samples_are_numbered_and_planned_in_order(prompts):
    config = make(prompts, Path("x"), "samples=2", "seed=7")
    clips = plan_clips([Prompt("p", "x"), Prompt("q_1", "y")], config)
    assert [clip.name for clip in clips] == ["p_0", "p_1", "q_1_0", "q_1_1"]
    assert [(c.draw.prompt_id, c.draw.candidate, c.draw.seed) for c in clips[1:3]] == [("p", 1, 7), ("q_1", 0, 7)]


def test_the_config_survives_the_way_to_a_worker(prompts):
    for sets in ((), (FINISH, "format=flac"), ("postprocess={passes: 2, lufs: -14}", "bundle=debug-wide")):
        config = make(prompts, Path("x"), *sets)
        assert GenerateConfig.model_validate_json(config.model_dump_json()) == config
    assert config.postprocess is not None
    assert config.postprocess.bundle == "debug-wide"


@pytest.mark.parametrize(("format", "subtype"), [("wav16", "PCM_16"), ("flac", "PCM_16"), ("wav", "FLOAT")])
def test_files_have_the_format_that_was_asked_for(tmp_path, format, subtype):
    sets = ["bundle=debug", "texts=[x]", f"output={tmp_path}", "sampler.steps=1", f"format={format}"]
    config = load_config(GenerateConfig, None, sets)
    assert generate(config) == 0
    (row,) = rows(tmp_path).values()
    assert row["file"].endswith(format.removesuffix("16"))
    assert soundfile.info(str(tmp_path / row["file"])).subtype == subtype


BARE = ("postprocess=null", "scores=true")


def test_the_best_of_several_candidates_is_the_clip_that_making_all_of_them_would_find(prompts, tmp_path, capsys):
    every, best = tmp_path / "every", tmp_path / "best"
    assert generate(make(prompts, every, *BARE, "samples=6")) == 0
    assert generate(make(prompts, best, *BARE, "samples=2", "best_of=3", "runtime.threads=2")) == 0
    made = rows(every)
    for row in rows(best).values():
        k = 3 * row["candidate"]
        candidates = [made[f"{row['prompt_id']}_{k + c}"] for c in range(3)]
        scores = [one["reward_score"] for one in candidates]
        assert json.loads(row["tried"]) == pytest.approx(scores, abs=0)
        assert row["chosen"] == k + int(np.argmax(scores))
        assert row["sha256"] == made[f"{row['prompt_id']}_{row['chosen']}"]["sha256"]
        assert row["reward_score"] == max(scores)
    assert all(row["tried"] is None and row["chosen"] is None for row in made.values())
    assert "mean reward_score of the best candidate before post-processing" in capsys.readouterr().out
    curve = json.loads((best / "summary.json").read_text())["best_of"]
    assert list(curve) == ["1", "2", "3"]
    assert curve["1"] <= curve["2"] <= curve["3"] > curve["1"]
    assert curve["3"] == pytest.approx(np.mean([row["reward_score"] for row in rows(best).values()]))


def test_candidates_can_be_judged_by_clap_without_scores_in_the_manifest(prompts, tmp_path):
    output = tmp_path / "run"
    assert generate(make(prompts, output, FINISH, "best_of=2", "best_by=clap_score")) == 0
    for row in rows(output).values():
        tried = json.loads(row["tried"])
        assert row["chosen"] == int(np.argmax(tried))
        assert -1 <= min(tried) < max(tried) <= 1
        assert row["lufs"] == pytest.approx(-16.5, abs=0.1)


def test_a_clip_fails_only_when_all_of_its_candidates_do(prompts, tmp_path, monkeypatch):
    decode = ClipMaker._decode

    def poor(self: ClipMaker, works: list[Any]) -> None:
        if any(work.clip.name == "a" or work.clip.draw.candidate == 0 for work in works):
            raise ClipError("failed", "broken", "no sound")
        decode(self, works)

    monkeypatch.setattr(ClipMaker, "_decode", poor)
    output = tmp_path / "run"
    assert generate(make(prompts, output, *BARE, "best_of=2")) == 3
    found = rows(output)
    assert (found["a"]["status"], found["a"]["reason"]) == ("failed", "broken")
    for name in ("b", "c"):
        assert (found[name]["status"], found[name]["chosen"]) == ("ok", 1)
        assert json.loads(found[name]["tried"])[0] is None


def test_the_curve_of_best_of_n_leaves_out_clips_whose_first_candidate_has_no_score():
    tried = ("[1.0, 3.0, 2.0, 4.0, 0.0]", "[2.0, null, 1.0, null, 5.0]", "[null, 9.0, 9.0, 9.0, 9.0]", None)
    assert best_of_curve([{"tried": one} for one in tried]) == {1: 1.5, 2: 2.5, 4: 3.0, 5: 4.5}
    assert best_of_curve([{"tried": None}]) == {}
