"""What callers get wrong by hand is one message each, and objects say what they are."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ttmray
from ttmray.cli import main
from ttmray.corpus.look import sample
from ttmray.errors import EXIT_BAD_INPUT, UserError
from ttmray.evaluation.score import sounds_of
from ttmray.verify import repair

TONE = 0.1 * np.sin(np.arange(2 * 44100) * 0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda studio: ttmray.load(5),
        lambda studio: ttmray.load("debug", threads="all"),
        lambda studio: ttmray.load("debug", batch=0),
        lambda studio: ttmray.compose("songs", "3"),
        lambda studio: ttmray.compose("songs", 2.5),
        lambda studio: ttmray.compose("songs", 2, seconds=float("nan")),
        lambda studio: ttmray.compose("songs", 2, seconds=1e9),
        lambda studio: ttmray.compose("songs", 2, seed="x"),
        lambda studio: ttmray.score_corpus(3, output="runs/new"),
        lambda studio: ttmray.score_corpus("songs", input="others", output="runs/new"),
        lambda studio: ttmray.open_corpus(None),
        lambda studio: ttmray.open_corpus("runs/my-corpus", scores=[3]),
        lambda studio: ttmray.evaluate(None),
        lambda studio: ttmray.evaluate({"mine": 3}),
        lambda studio: ttmray.evaluate({"my clips": "my-songs"}),
        lambda studio: ttmray.evaluate({3: "my-songs"}),
        lambda studio: ttmray.TrainingRun(None),
        lambda studio: ttmray.AudioClip("x", 44100),
        lambda studio: ttmray.AudioClip(TONE, -1),
        lambda studio: ttmray.AudioClip(TONE, 44100).save(3),
        lambda studio: studio.score(None),
        lambda studio: studio.score((TONE, "44100")),
        lambda studio: studio.score((TONE, 44100.5)),
        lambda studio: studio.score((TONE, True)),
        lambda studio: studio.score((TONE, 0)),
        lambda studio: studio.score((TONE, 44100), captions=3),
        lambda studio: studio.score((TONE, 44100), captions=[3]),
        lambda studio: studio.embed_texts([1, 2]),
        lambda studio: studio.generate(3),
        lambda studio: studio.generate(None),
    ],
)
def test_an_argument_of_the_wrong_kind_is_one_message_with_a_way_out(workplace, studio, call: Callable[[Any], Any]):
    with pytest.raises(UserError) as caught:
        call(studio)
    assert caught.value.hint
    assert not (workplace / "songs").exists()


def test_only_whole_numbers_are_told_to_be_scaled(studio):
    for samples in (np.array(["a", "b"]), TONE > 0, TONE.astype(complex)):
        with pytest.raises(UserError) as caught:
            studio.score((samples, 44100))
        assert "int16" not in caught.value.hint
    with pytest.raises(UserError, match="int16 / 32768"):
        studio.score(((TONE * 1000).astype(np.int16), 44100))


def test_a_folder_stands_for_the_audio_in_it(workplace, studio):
    folder = workplace / "of-sounds"
    for name in ("b.wav", "below/a.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ttmray.AudioClip(TONE, 44100).save(folder / name)
    table = studio.score(folder)
    assert table["file"].tolist() == [f"{folder}/b.wav", f"{folder}/below/a.wav"]
    assert table["status"].tolist() == ["ok", "ok"]
    (workplace / "of-nothing").mkdir()
    with pytest.raises(UserError, match="no audio files"):
        studio.score(workplace / "of-nothing")


def test_a_folder_with_a_sign_of_equality_is_a_folder(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    ttmray.AudioClip(TONE, 44100).save("lr=0.1/a.wav")
    evaluation = ttmray.evaluate(["lr=0.1"], {"a": "a calm piano"}, output="runs/equality", bundle="debug")
    assert evaluation.metrics.query("metric == 'reward'")["n"].tolist() == [1]


def test_rates_are_whole_numbers_of_any_type(studio):
    rows = [studio.score((TONE, rate)) for rate in (44100, 44100.0, np.int64(44100), np.float32(44100))]
    rows += [studio.score(ttmray.AudioClip(TONE, 44100.0))]
    assert {row["reward"][0] for row in rows} == {rows[0]["reward"][0]}
    assert len(studio.score((TONE, TONE / 2), rate=44100)) == 2, "a tuple of two sounds is no pair"


def test_objects_say_what_they_are(workplace, studio):
    corpus = ttmray.open_corpus("runs/my-corpus")
    sample = next(corpus.samples("train"))
    assert repr(sample).startswith(f"CorpusSample({sample.key}, 16 frames, ")
    assert repr(corpus.dataset("train")) == f"ClipDataset({len(corpus.dataset('train'))} clips)"
    assert repr(ttmray.AudioClip(TONE, 44100)) == "AudioClip(unnamed, 2.00 s, 1 channel, 44100 Hz)"
    assert {"import_module", "Any"}.isdisjoint(dir(ttmray))
    assert {"load", "train"} <= set(dir(ttmray))


def test_a_loaded_bundle_is_loaded_again_in_the_process_that_it_is_sent_to(studio):
    reward = studio.score((TONE, 44100))["reward"][0]
    there = pickle.loads(pickle.dumps(studio))  # noqa: S301
    assert repr(there) == repr(studio)
    assert there.score((TONE, 44100))["reward"][0] == reward


def test_a_repair_of_what_is_no_corpus_says_what_it_is(tmp_path, studio):
    studio.generate({"calm": "a calm piano"}, output=tmp_path / "clips", sampler={"steps": 1})
    with pytest.raises(UserError, match="is a run of kind generate, no corpus") as caught:
        repair(str(tmp_path / "clips"))
    assert "ttmray verify" in str(caught.value.hint)


def test_a_page_of_samples_takes_no_folder_that_holds_something_else(workplace):
    (workplace / "clips").mkdir()
    (workplace / "clips/run.json").write_text("{}")
    (workplace / "clips/index.html").write_text("players")
    with pytest.raises(UserError, match="holds something else"):
        sample("runs/my-corpus", 1, 0, "clips")
    assert (workplace / "clips/index.html").read_text() == "players"
    with pytest.raises(UserError, match="at least one clip"):
        sample("runs/my-corpus", 0, 0, "new")


@pytest.mark.parametrize(
    "line", ["corpus sample RUN --out new", "subset RUN -n 2 --out new", "synth check --bundle debug"]
)
def test_a_seed_below_zero_is_refused_by_every_command_that_has_one(line, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*line.split(), "--seed", "-1"])
    assert caught.value.code == EXIT_BAD_INPUT
    assert "-1 is negative" in capsys.readouterr().err


def test_one_file_name_with_a_line_break_does_not_keep_a_folder_from_being_scored(tmp_path):
    for name in ("a.wav", "b\nc.wav"):
        (tmp_path / name).write_bytes(b"")
    assert [sound.path for sound in sounds_of([str(tmp_path)], "")] == [
        f"{tmp_path}/{name}" for name in ("a.wav", "b\nc.wav")
    ]
