"""The cache of composed clips, and the stream over it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.pretraining.clips import SHARD, ClipSet, place
from ttmray.storage import Folder
from ttmray.synth.faults import true_quality
from ttmray.synth.piece import STEMS
from ttmray.synth.world import clip


def test_what_is_read_is_what_the_world_composes_but_for_sixteen_bits(clips):
    truth = clip(clips.seed, 5, clips.seconds)
    np.testing.assert_allclose(clips.mix(5), truth.mix, atol=1e-4)
    np.testing.assert_allclose(clips.stem(5), np.stack([truth.stems[name] for name in STEMS]).clip(-1, 1), atol=1e-4)
    about = clips.truth(5)
    assert about.attributes == json.loads(json.dumps(truth.heard.row()))
    assert about.quality == truth.quality
    assert about.faults == pytest.approx(dict(truth.faults))


def test_training_and_held_out_wordings_differ_and_captions_vary(clips):
    about = clips.truth(0)
    assert len(set(about.captions)) > len(about.captions) // 2
    assert not set(about.captions) & set(about.unseen)


def test_a_larger_set_goes_on_with_what_is_there(tmp_path):
    folder = Folder.at(str(tmp_path))
    ClipSet(folder, 0, SHARD, 0.5).compose()
    before = {entry.name: entry.version for entry in folder.files()}
    ClipSet(folder, 0, SHARD + 1, 0.5).compose()
    after = {entry.name: entry.version for entry in folder.files()}
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)


def test_a_file_that_is_gone_is_composed_again_with_the_same_bits(clips):
    path = Path(clips.folder.path(clips._name("truth", 0)))
    before = path.read_bytes()
    path.unlink()
    clips.compose()
    assert path.read_bytes() == before


def test_a_cut_file_is_named_with_the_way_out(tmp_path):
    folder = Folder.at(str(tmp_path))
    one = ClipSet(folder, 0, 1, 0.5)
    folder.write(one._name("mix", 0), b"\x93NUMPY cut")
    with pytest.raises(UserError, match=r"mix-00000\.npy was not read.*\n.*Delete it"):
        one.mix(0)


def test_places_that_make_no_set_are_refused(tmp_path):
    for folder, count, seconds, stems in (
        ("s3://b/clips", 4, 1, 0),
        (str(tmp_path), 0, 1, 0),
        (str(tmp_path), 4, 99, 0),
    ):
        with pytest.raises(UserError):
            ClipSet(Folder.at(folder), 0, count, seconds, stems)
    with pytest.raises(UserError):
        ClipSet(Folder.at(str(tmp_path)), 0, 4, 1, stems=5)


@given(st.integers(0, 2**31), st.integers(1, 50), st.integers(0, 20))
def test_every_epoch_has_every_clip_once(seed, count, epoch):
    places = [place(seed, epoch * count + i, count) for i in range(count)]
    assert sorted(places) == list(range(count))


def test_epochs_have_orders_of_their_own():
    assert [place(0, i, 20) for i in range(20)] != [place(0, 20 + i, 20) for i in range(20)]


def test_the_quality_of_a_clip_follows_from_its_faults_whatever_an_older_file_says(tmp_path):
    clips = ClipSet(Folder.at(str(tmp_path)), seed=5, count=1, seconds=1.0)
    clips.compose()
    path = next(tmp_path.rglob("truth-*.json"))
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"quality": -1.9, "faults": {"noise": 0.5}} for row in rows]))
    assert clips.truth(0).quality == true_quality({"noise": 0.5})
