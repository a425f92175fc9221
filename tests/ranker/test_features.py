"""Features: each distinct clip is encoded once, relaunching goes on, corpora are read, bad clips have reasons."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ttmray.config import load_config
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.errors import UserError
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.ranker import features as module
from ttmray.ranker.features import EncodingConfig, extract, read_clip
from ttmray.storage import Folder

RATE = 44100
CPU = EncodingConfig(device="cpu")


NAMES = ("0.wav", "1.wav", "copy.wav", "2.wav", "text.wav", "absent.wav", "opposed.wav", "int16.wav", "0.wav")


def tone(hertz: float, seconds: float = 2.0) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(round(hertz)).normal(scale=0.05, size=len(t))
    return (0.3 * np.sin(2 * np.pi * hertz * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Three clips, a copy of the first one, a file that is none, and two that nobody can hear as music."""
    folder = tmp_path_factory.mktemp("audio")
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", tone(200 + 100 * i), RATE)
    shutil.copy(folder / "0.wav", folder / "copy.wav")
    (folder / "text.wav").write_text("no music")
    soundfile.write(folder / "opposed.wav", np.stack([tone(200), -tone(200)], axis=1), RATE)
    soundfile.write(folder / "int16.wav", 32768 * tone(200), RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def made(audio, tmp_path_factory):
    """Features of all of them and of two prompts, and the run folder."""
    run = Folder.at(str(tmp_path_factory.mktemp("run")))
    clips = [str(audio / name) for name in NAMES]
    return extract(clips, ["", "slow", "fast", "slow"], "debug", run, CPU), run


def test_features_are_those_of_the_scorer_and_equal_clips_share_them(made, audio):
    found, _ = made
    bundle = open_bundle("debug")
    scorer = Scorer(bundle.load(("clap", "mert"), LoadOptions(device="cpu")), bundle.protocol("empty"))
    for i in range(3):
        row, alone = found.clips[str(audio / f"{i}.wav")], scorer.embed([read_clip(str(audio / f"{i}.wav"))])
        np.testing.assert_array_equal(found.clap_audio[row], alone.clap[0])
        np.testing.assert_array_equal(found.mert[row], alone.mert[0])
    first, copy = (found.clips[str(audio / name)] for name in ("0.wav", "copy.wav"))
    np.testing.assert_array_equal(found.clap_audio[first], found.clap_audio[copy])
    np.testing.assert_array_equal(found.text[found.prompts["slow"]], scorer.texts(["slow"])[0])
    assert not found.text[found.prompts[""]].any()


def test_each_distinct_clip_is_stored_once_and_bad_ones_have_their_reason(made, audio):
    found, run = made
    assert set(found.failed) == {str(audio / name) for name in ("text.wav", "absent.wav", "opposed.wav", "int16.wav")}
    assert "silent" in found.failed[str(audio / "opposed.wav")]
    assert "too_loud" in found.failed[str(audio / "int16.wav")]
    assert "not_audio" in found.failed[str(audio / "text.wav")]
    assert "not found" in found.failed[str(audio / "absent.wav")]
    (part,) = [entry.name for entry in run.files("features") if entry.name.startswith("clip")]
    assert pq.read_table(run.path(f"features/{part}")).num_rows == 6  # three clips and what is no music


def test_relaunching_encodes_only_what_is_new(made, audio, tmp_path, monkeypatch):
    found, run = made
    copied = Folder.at(str(tmp_path / "run"))
    shutil.copytree(run.uri, copied.uri)
    encoded = []
    plain = module.read_clip
    monkeypatch.setattr(module, "read_clip", lambda address, clip_s: encoded.append(address) or plain(address, clip_s))
    soundfile.write(tmp_path / "new.wav", tone(900), RATE)
    more = extract([*found.clips, str(tmp_path / "new.wav")], ["slow"], "debug", copied, CPU)
    assert encoded == [str(tmp_path / "new.wav")]
    rows = [more.clips[clip] for clip in found.clips]
    np.testing.assert_array_equal(more.clap_audio[rows], found.clap_audio)
    encoded.clear()
    extract(more.clips, ["slow", "fast"], "debug", copied, CPU)
    assert encoded == []


def test_a_damaged_part_is_refused_with_the_way_out(made, audio, tmp_path):
    _, run = made
    copied = Folder.at(str(tmp_path / "run"))
    shutil.copytree(run.uri, copied.uri)
    name = f"features/{copied.files('features')[0].name}"
    copied.write(name, copied.read(name)[:-20])
    with pytest.raises(UserError, match="damaged") as error:
        extract([str(audio / "0.wav")], [], "debug", copied, CPU)
    assert "Delete" in error.value.hint


def test_a_clip_that_breaks_a_model_in_an_unforeseen_way_fails_alone(made, audio, tmp_path, monkeypatch):
    found, _ = made
    names = [str(audio / f"{i}.wav") for i in range(3)]
    bad, plain = read_clip(names[1]), Scorer.embed

    def embed(self, waves):
        if any(np.array_equal(wave, bad) for wave in waves):
            raise TypeError("unexpected")
        return plain(self, waves)

    monkeypatch.setattr(Scorer, "embed", embed)
    rest = extract(names, [], "debug", Folder.at(str(tmp_path / "run")), CPU)
    assert rest.failed == {names[1]: "error: TypeError: unexpected"}
    rows, before = ([features.clips[name] for name in (names[0], names[2])] for features in (rest, found))
    np.testing.assert_array_equal(rest.mert[rows], found.mert[before])


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none of 1 clips"):
        extract([str(tmp_path / "absent.wav")], [], "debug", Folder.at(str(tmp_path / "run")), CPU)


@pytest.mark.slow
def test_two_ray_actors_give_the_same_bits_as_this_process(made, audio, tmp_path, monkeypatch):
    import ray

    found, _ = made
    monkeypatch.setattr(module, "PART_CLIPS", 2)
    config = EncodingConfig(device="cpu", runner="ray", workers=2)
    try:
        more = extract([*found.clips], ["slow", "fast"], "debug", Folder.at(str(tmp_path / "run")), config)
    finally:
        ray.shutdown()
    assert more.clips == found.clips
    np.testing.assert_array_equal(more.clap_audio, found.clap_audio)
    np.testing.assert_array_equal(more.mert, found.mert)
    np.testing.assert_array_equal(more.text, found.text)


def test_clips_of_a_corpus_come_from_its_shards(tmp_path):
    songs, output = tmp_path / "songs", tmp_path / "corpus"
    songs.mkdir()
    soundfile.write(songs / "song.wav", tone(300, 10), RATE)
    sets = ("runtime.runner=local", "runtime.workers=0", "runtime.device=cpu", "splits.validation=0", "splits.test=0")
    where = (f"input={songs}", f"output={output}", "bundle=debug")
    assert score_corpus(load_config(CorpusConfig, None, [*where, *sets])) == 0
    (row,) = index.read_index(Folder.at(str(output))).to_pylist()
    good, absent = f"{output}#{row['key']}", f"{output}#nobody_0"
    run = Folder.at(str(tmp_path / "run"))
    found = extract([good, absent], [], "debug", run, CPU)
    assert list(found.clips) == [good]
    assert list(found.failed) == [absent]
    assert run.files("features") == []  # nothing was encoded
    encoded = extract([str(songs / "song.wav")], [], "debug", run, CPU)
    np.testing.assert_array_equal(found.clap_audio, encoded.clap_audio)
    np.testing.assert_array_equal(found.mert, encoded.mert)

    about = json.loads((output / "run.json").read_text())
    about["identity"]["bundle"]["seed"] = 9
    (output / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="not by the bundle debug"):
        extract([good], [], "debug", run, CPU)
