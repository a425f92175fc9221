"""Reference sets: what they hold, what they refuse, and what they share with a training split."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from safetensors.numpy import load, save

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.corpus import index, shards
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.errors import UserError
from ttmray.evaluation import measure
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.evaluate import evaluate
from ttmray.evaluation.fad import Gaussian
from ttmray.evaluation.measure import MeasureConfig, embedding_protocol
from ttmray.evaluation.metrics import find_leaks
from ttmray.evaluation.reference import ReferenceConfig, build_reference, load_reference, load_training
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.storage import Folder

PROTOCOL = embedding_protocol("debug", open_bundle("debug").protocol("empty"))
RUNTIME = MeasureConfig(device="cpu", threads=1)


def song(path: Path, seconds: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 44100)) / 44100
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * t) * (np.sin(2 * np.pi * rng.uniform(1, 6) * t) > 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (tone + rng.normal(0, 0.02, len(t))).astype(np.float32), 44100)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    for i, seconds in enumerate((6, 10, 13.5)):
        song(folder / f"{i:02d}/track{i}.flac", seconds, i)
    return folder


@pytest.fixture(scope="module")
def store(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store with the set `three`. Do not change it."""
    folder = tmp_path_factory.mktemp("store")
    assert build_reference("three", str(songs), store=str(folder), runtime=RUNTIME, bundle="debug") == 0
    return folder


@pytest.fixture(scope="module")
def corpus(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus run of the songs; track2 is held out. Do not change it."""
    output = tmp_path_factory.mktemp("corpus") / "run"
    sets = (f"input={songs}", f"output={output}", "runtime.runner=local", "runtime.workers=0", "runtime.device=cpu")
    splits = ("splits.validation=1", "splits.test=0")
    assert score_corpus(load_config(CorpusConfig, None, [*sets, *splits, "bundle=debug"])) == 0
    return output


def test_a_folder_gives_one_row_per_track_of_its_middle_ten_seconds(store, songs):
    found = load_reference("three", str(store), PROTOCOL)
    assert found.tracks == ["track0", "track1", "track2"]
    wave, _ = soundfile.read(songs / "02/track2.flac", dtype="float32")
    middle = wave[round(1.75 * 44100) :][:441_000]
    bundle = open_bundle("debug")
    scorer = Scorer(bundle.load(Scorer.roles, LoadOptions(device="cpu")), bundle.protocol("empty"))
    np.testing.assert_array_equal(found.rows()[2], scorer.embed([middle]).clap[0])
    rows = pq.read_table(store / "three/tracks.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["00/track0.flac", "01/track1.flac", "02/track2.flac"]
    expected = Gaussian.of(found.rows(), PROTOCOL)
    assert found.gaussian is not None
    np.testing.assert_array_equal(found.gaussian.cov, expected.cov)
    assert isinstance(found.for_fad(), np.ndarray)  # three clips: the rows say more than their covariance
    about = json.loads((store / "three/reference.json").read_text())
    assert (about["n"], about["tracks"], about["protocol"], about["made_from"]) == (3, 3, PROTOCOL, "folder")


@pytest.fixture(scope="module")
def separated(songs: Path, store: Path) -> Path:
    """The store, with `backing`: the songs of `three` without vocals."""
    options = ("--store", str(store), "--stem", "instrumental", "--set", "device=cpu", "--set", "threads=1")
    assert main(["reference", "build", "backing", str(songs), "--bundle", "debug", *options]) == 0
    return store


def test_an_instrumental_set_of_a_folder_holds_what_the_corpus_job_makes_of_its_clips(separated, corpus, tmp_path):
    mixes, found = (load_reference(name, str(separated), PROTOCOL) for name in ("three", "backing"))
    assert (mixes.about["stem"], found.about["stem"]) == ("mix", "instrumental")
    assert found.tracks == mixes.tracks
    assert (np.einsum("ij,ij->i", found.rows(), mixes.rows()) < 1 - 1e-6).all()
    assert (
        build_reference("c", str(corpus), store=str(tmp_path), bundle="debug") == 0
    )  # of a corpus run that is the default
    stored = load_reference("c", str(tmp_path), PROTOCOL)
    for track in ("track0", "track1"):  # of up to 10 s: their middle is their only clip
        row = stored.rows()[stored.tracks.index(track)]
        np.testing.assert_array_equal(found.rows()[found.tracks.index(track)], row)


def test_mixes_and_instrumentals_are_never_taken_for_each_other(separated, songs, tmp_path):
    mine = Path(shutil.copytree(separated, tmp_path / "store"))
    with pytest.raises(UserError, match="stem: 'mix' -> 'instrumental'"):
        build_reference("three", str(songs), store=str(mine), stem="instrumental", runtime=RUNTIME, bundle="debug")
    with pytest.raises(UserError, match="stem: 'instrumental' -> 'mix'"):
        build_reference("backing", str(songs), store=str(mine), runtime=RUNTIME, bundle="debug")
    # nor their parts: those of the mixes are measured anew
    shutil.copytree(mine / "three/parts", mine / "other/parts")
    assert (
        build_reference("other", str(songs), store=str(mine), stem="instrumental", runtime=RUNTIME, bundle="debug") == 0
    )
    same = [load_reference(name, str(mine), PROTOCOL).rows() for name in ("other", "backing")]
    np.testing.assert_array_equal(*same)
    with pytest.raises(UserError, match="is of stem mix, reference_stem is instrumental") as error:
        load_reference("three", str(mine), PROTOCOL, "instrumental")
    assert f"ttmray reference build NAME {songs} --stem instrumental" in error.value.hint
    assert load_reference("backing", str(mine), PROTOCOL, "instrumental").about["name"] == "backing"
    # a set of before there was a choice
    about = json.loads((mine / "three/reference.json").read_text())
    del about["stem"]
    (mine / "three/reference.json").write_text(json.dumps(about))
    assert load_reference("three", str(mine), PROTOCOL).about["stem"] == "mix"
    assert build_reference("three", str(songs), store=str(mine), runtime=RUNTIME, bundle="debug") == 0


def test_how_vocals_are_removed_is_part_of_a_set(separated, songs, tmp_path):
    mine = Path(shutil.copytree(separated, tmp_path / "store"))
    sets = ["device=cpu", "threads=1", "separation.instrumental=residual"]
    options = {
        "bundle": "debug",
        "store": str(mine),
        "stem": "instrumental",
        "runtime": load_config(ReferenceConfig, None, sets),
    }
    with pytest.raises(UserError, match=r"separation\.instrumental: 'sum' -> 'residual'"):
        build_reference("backing", str(songs), **options)
    shutil.copytree(mine / "backing/parts", mine / "residual/parts")
    assert build_reference("residual", str(songs), **options) == 0
    ours, other = (load_reference(name, str(mine), PROTOCOL).rows() for name in ("residual", "backing"))
    assert not np.array_equal(ours, other)
    options["runtime"] = load_config(ReferenceConfig, None, ["separation.scope=track"])
    with pytest.raises(UserError, match=r"separation\.scope"):
        build_reference("x", str(songs), **options)


def test_building_again_measures_nothing_and_a_new_track_alone(store, songs, tmp_path, monkeypatch):
    mine = Path(shutil.copytree(store, tmp_path / "store"))
    read: list[str] = []
    original = measure._decoded
    monkeypatch.setattr(
        measure, "_decoded", lambda path, clip_s, middle: read.append(path) or original(path, clip_s, middle)
    )
    assert build_reference("three", str(songs), store=str(mine), runtime=RUNTIME, bundle="debug") == 0
    assert read == []
    more = Path(shutil.copytree(songs, tmp_path / "songs"))
    song(more / "new.flac", 6, 9)
    shutil.copytree(mine / "three/parts", mine / "four/parts")
    assert build_reference("four", str(more), store=str(mine), runtime=RUNTIME, bundle="debug") == 0
    assert read == [f"{more}/new.flac"]
    assert len(load_reference("four", str(mine), PROTOCOL).rows()) == 4


def test_a_name_belongs_to_one_source_and_protocol(store, songs, tmp_path):
    song(tmp_path / "a.flac", 6, 1)
    with pytest.raises(UserError, match="the reference three is another one"):
        build_reference("three", str(tmp_path), store=str(store), runtime=RUNTIME, bundle="debug")
    with pytest.raises(UserError, match="cannot name"):
        build_reference("../three", str(songs), store=str(store), runtime=RUNTIME, bundle="debug")


def test_a_set_of_another_bundle_is_refused_and_one_of_another_reward_is_not(store):
    other = open_bundle("debug-wide")
    with pytest.raises(UserError, match="was made under debug/"):
        load_reference("three", str(store), embedding_protocol(other.name, other.protocol("empty")))
    same = embedding_protocol("debug", open_bundle("debug").protocol("caption"))
    assert load_reference(str(store / "three"), "nowhere", same).about["name"] == "three"


def test_a_reference_that_does_not_exist_says_how_to_build_it(tmp_path):
    with pytest.raises(UserError, match="there is none") as error:
        load_reference("sdd-706", str(tmp_path), PROTOCOL)
    assert "ttmray reference build sdd-706" in error.value.hint


@pytest.mark.parametrize("file", ["clap.safetensors", "gaussian.safetensors", "tracks.parquet", "reference.json"])
def test_damaged_sets_are_refused(store, tmp_path, file):
    mine = Path(shutil.copytree(store, tmp_path / "store"))
    (mine / "three" / file).write_bytes(b"{}")
    with pytest.raises(UserError):
        load_reference("three", str(mine), PROTOCOL)


def test_files_of_two_sets_do_not_go_together(store, tmp_path):
    mine = Path(shutil.copytree(store, tmp_path / "store"))
    clap = load((mine / "three/clap.safetensors").read_bytes())["clap"]
    (mine / "three/clap.safetensors").write_bytes(save({"clap": clap[:2]}))
    with pytest.raises(UserError, match=r"clap\.safetensors is not what was written"):
        load_reference("three", str(mine), PROTOCOL)
    (mine / "three/_SUCCESS.json").unlink()  # as of a version that wrote none
    with pytest.raises(UserError, match="do not belong together"):
        load_reference("three", str(mine), PROTOCOL)


def test_a_track_that_cannot_be_read_stops_the_set_unless_it_is_allowed(songs, tmp_path, capsys):
    mine = Path(shutil.copytree(songs, tmp_path / "songs"))
    (mine / "broken.mp3").write_bytes(b"no music")
    assert build_reference("r", str(mine), store=str(tmp_path), runtime=RUNTIME, bundle="debug") == 3
    assert "broken.mp3: not_audio" in capsys.readouterr().out
    assert not (tmp_path / "r/reference.json").exists()
    assert build_reference("r", str(mine), store=str(tmp_path), runtime=RUNTIME, max_failures=1, bundle="debug") == 0
    assert load_reference("r", str(tmp_path), PROTOCOL).about["failed"] == 1


def test_one_clip_makes_no_reference(tmp_path):
    song(tmp_path / "in/a.flac", 6, 1)
    with pytest.raises(UserError, match="1 clips make no reference set"):
        build_reference("r", str(tmp_path / "in"), store=str(tmp_path), runtime=RUNTIME, bundle="debug")


@pytest.mark.parametrize(("stem", "row"), [("mix", 0), ("instrumental", 1)])
def test_a_corpus_gives_its_stored_embeddings(corpus, tmp_path, stem, row, monkeypatch):
    monkeypatch.setattr(measure, "_decoded", None)  # nothing is decoded
    assert build_reference("c", str(corpus), store=str(tmp_path), stem=stem, split="train", bundle="debug") == 0
    found = load_reference("c", str(tmp_path), PROTOCOL)
    run = Folder.at(str(corpus))
    rows = {r["key"]: r for r in index.read_index(run).to_pylist() if r["split"] == "train" and r["status"] == "ok"}
    stored = {
        key: sample["clap_audio.npy"][row]
        for shard in {r["shard"] for r in rows.values()}
        for key, sample in shards.read_samples(run.read(shard), shard)
    }
    keys = pq.read_table(io.BytesIO((tmp_path / "c/tracks.parquet").read_bytes()))["id"].to_pylist()
    assert sorted(keys) == sorted(rows)
    np.testing.assert_array_equal(found.rows(), np.stack([stored[key] for key in keys]))
    assert found.tracks == [rows[key]["track_id"] for key in keys]


def test_keys_choose_the_clips_of_a_corpus_and_are_part_of_the_set(corpus, songs, tmp_path):
    rows = [r["key"] for r in index.read_index(Folder.at(str(corpus))).to_pylist() if r["status"] == "ok"]
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(rows[:0:-1]))
    assert build_reference("some", str(corpus), store=str(tmp_path), keys=str(keys), bundle="debug") == 0
    found = pq.read_table(tmp_path / "some/tracks.parquet")["id"].to_pylist()
    assert sorted(found) == sorted(rows[1:])
    for options in ({"bundle": "debug"}, {"bundle": "debug", "keys": str(keys)}):
        keys.write_text("\n".join(rows[:2]))
        with pytest.raises(UserError, match="is another one"):
            build_reference("some", str(corpus), store=str(tmp_path), **options)
    keys.write_text(f"{rows[0]}\nnobody_3")
    with pytest.raises(UserError, match=r"1 of 2 are not among the ok clips .* split all, e\.g\. nobody_3"):
        build_reference("x", str(corpus), store=str(tmp_path), keys=str(keys), bundle="debug")
    with pytest.raises(UserError, match="is a folder of audio"):
        build_reference("x", str(songs), store=str(tmp_path), keys=str(keys), bundle="debug")


def test_an_evaluation_refuses_a_set_of_the_other_stem(separated, songs, tmp_path):
    (tmp_path / "prompts.csv").write_text("id,prompt\ntrack0,a tone\n")
    sets = (
        f"folders=[{songs}]",
        f"prompts={tmp_path}/prompts.csv",
        f"references={separated}",
        "reference=three",
        "bundle=debug",
    )
    with pytest.raises(UserError, match="three is of stem mix"):
        evaluate(load_config(EvaluateConfig, None, [*sets, "reference_stem=instrumental", f"output={tmp_path}/out"]))


def test_a_corpus_of_another_bundle_or_without_such_clips_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="was made under debug/"):
        build_reference("c", str(corpus), store=str(tmp_path), bundle="debug-wide")
    with pytest.raises(UserError, match="no ok clips in the split test"):
        build_reference("c", str(corpus), store=str(tmp_path), split="test", bundle="debug")
    with pytest.raises(UserError, match="unknown"):
        build_reference("c", str(corpus), store=str(tmp_path), stem="vocals", bundle="debug")


def test_a_damaged_shard_is_named(corpus, tmp_path):
    mine = Path(shutil.copytree(corpus, tmp_path / "run"))
    shard = next((mine / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(UserError, match=shard.name):
        build_reference("c", str(mine), store=str(tmp_path), bundle="debug")


def test_leaks_are_found_by_id_and_by_sound_in_the_training_split_alone(store, corpus):
    reference = load_reference("three", str(store), PROTOCOL)
    training = load_training(str(corpus), "nowhere", PROTOCOL)
    split = {r["track_id"]: r["split"] for r in index.read_index(Folder.at(str(corpus))).to_pylist()}
    trained = sorted(track for track in split if split[track] == "train")
    assert len(trained) == 2
    assert training.about["n"] == len(training.tracks) / 2  # clips, not their mixes and instrumentals
    leaks = find_leaks(reference.tracks, training.tracks, reference.rows(), iter(training.clap), 0.99999)
    assert list(leaks.by_id) == trained
    # tracks of up to 10 s are their own middle, so their mix is found with a cosine of 1
    short = {track for track in trained if track != "track2"}
    assert {a for a, b, _ in leaks.by_embedding if a == b} >= short


def test_near_duplicates_are_looked_for_in_clips_of_the_corpus_not_in_their_stems(corpus, songs, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(songs / "00/track0.flac", tmp_path / "one/a.flac")
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a tone\n")
    sets = (
        f"folders=[{tmp_path}/one]",
        f"prompts={tmp_path}/prompts.csv",
        f"training={corpus}",
        "bundle=debug",
        f"output={tmp_path}/out",
    )
    assert evaluate(load_config(EvaluateConfig, None, [*sets, "runtime.device=cpu", "runtime.threads=1"])) == 0
    (system,) = json.loads((tmp_path / "out/results.json").read_text())["systems"]
    training = load_training(str(corpus), "nowhere", PROTOCOL)
    assert system["metrics"]["near_duplicates"]["n_reference"] == training.about["n"] == len(training.tracks) / 2


def test_training_that_is_no_corpus_is_refused(songs):
    with pytest.raises(UserError, match="no corpus run and no reference set"):
        load_training(str(songs), "nowhere", PROTOCOL)


def test_what_is_no_set_of_recordings_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "run/clips").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text('{"kind": "generate"}')
    store = str(tmp_path / "store")
    with pytest.raises(UserError, match="run of kind generate") as caught:
        build_reference("mine", str(tmp_path / "run"), store=store)
    assert "recordings" in caught.value.hint
    (tmp_path / "songs").mkdir()
    with pytest.raises(UserError, match="split"):
        build_reference("mine", str(tmp_path / "songs"), store=store, split="train")
    assert not (tmp_path / "store").exists()
