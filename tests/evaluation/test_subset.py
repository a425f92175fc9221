"""Subsets of clips and captions: seeded, independent of any order, and usable by what reads them."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.cli import main
from ttmray.config import Config
from ttmray.corpus import index
from ttmray.errors import EXIT_BAD_INPUT, UserError
from ttmray.evaluation.subset import choose, write_subset
from ttmray.generation.prompts import read_prompts
from ttmray.runs import describe, write
from ttmray.storage import Folder
from ttmray.training.clips import read_keys

TRACKS = st.dictionaries(st.text("abcdef0123456789", min_size=1, max_size=4), st.integers(1, 10), min_size=1).map(
    lambda tracks: {track: [f"{track}_{i}" for i in range(count)] for track, count in tracks.items()}
)


@given(TRACKS, st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.randoms())
def test_a_choice_depends_on_the_seed_alone_and_a_larger_one_holds_it(tracks, n, per_track, seed, rng):
    chosen = choose(tracks, n, per_track, seed)
    available = sum(min(per_track, len(clips)) for clips in tracks.values())
    assert len(chosen) == len(set(chosen)) == min(n, available)
    assert all(clip in tracks[track] for track, clip in chosen)
    assert max(Counter(track for track, _ in chosen).values()) <= per_track
    shuffled = list(tracks.items())
    rng.shuffle(shuffled)
    assert choose({t: rng.sample(clips, len(clips)) for t, clips in shuffled}, n, per_track, seed) == chosen
    assert choose(tracks, n + 5, per_track, seed)[: len(chosen)] == chosen


def test_tracks_are_equally_likely_however_many_clips_they_have_and_seeds_differ():
    tracks = {f"t{i}": [f"t{i}_{k}" for k in range(10 if i < 10 else 1)] for i in range(20)}
    drawn = Counter(track for seed in range(400) for track, _ in choose(tracks, 5, 1, seed))
    long, short = (sum(drawn[f"t{i}"] for i in part) for part in (range(10), range(10, 20)))
    assert long + short == 2000
    assert abs(long - short) < 200  # four standard deviations
    clips = Counter(clip for seed in range(400) for _, clip in choose({"t0": tracks["t0"]}, 1, 1, seed))
    assert min(clips[f"t0_{k}"] for k in range(10)) > 15


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A corpus run's index: 6 tracks of 3 clips, half of them held out, one without caption, one clip rejected."""
    folder, rows = Folder.at(str(tmp_path / "run")), []
    for t in range(6):
        caption, split = "" if t == 5 else f"Take {t}", "validation" if t % 2 else "train"
        track = {"track_id": f"t{t}", "split": split, "caption": caption, "caption_id": "", "path": ""}
        for k in range(3):
            bad = {"status": "rejected", "reason": "silent"} if (t, k) == (1, 0) else {}
            rows.append(index.new_row(track, "u", "p") | {"key": f"t{t}_{k}", "segment": k} | bad)
    write(folder, describe("corpus", {"seed": 0}, Config(), ()))
    folder.write(index.MERGED, index.to_bytes(rows, {}))
    return tmp_path / "run"


def test_a_subset_of_a_run_is_of_its_split_and_is_read_by_generation_and_training(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["subset", str(run), "--out", str(out), "-n"]
    assert main([*words, "2", "--split", "validation"]) == 0
    assert "2 of 5 captions, of 2 tracks" in capsys.readouterr().out
    prompts = {prompt.id: prompt.text for prompt in read_prompts(str(out / "prompts.csv"))}
    assert set(read_keys(str(out / "keys.txt"))) == prompts.keys()
    assert {key[:2] for key in prompts} == {"t1", "t3"}  # t5 has no caption
    assert "t1_0" not in prompts
    assert all(text == f"Take {key[1]}" for key, text in prompts.items())
    about = json.loads((out / "subset.json").read_text())
    assert (about["n"], about["split"], about["seed"]) == (2, "validation", 0)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*words, "2", "--split", "validation"]) == 0
    assert main([*words, "2", "--split", "train"]) == EXIT_BAD_INPUT
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(["subset", str(run), "-n", "5", "--split", "validation", "--per-track", "3", "--out", f"{out}5"]) == 0


def test_too_few_clips_are_counted(run, tmp_path):
    with pytest.raises(UserError, match="has 2 clips with a caption to choose from, 3 are asked for"):
        write_subset(str(run), str(tmp_path / "out"), 3, "validation")
    assert not (tmp_path / "out").exists()


def test_a_table_gives_one_caption_per_track_whatever_the_order_of_its_rows(tmp_path):
    """As Song Describer's: several captions of one track, an id of their own beside the track's."""
    rows = [f'{10 * t + k},{t + 200},"Take {t}, {k}"' for t in range(8) for k in range(1 + t % 3)]
    chosen = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        (tmp_path / "songs.csv").write_text("\n".join(["caption_id,track_id,caption", *rows]) + "\n")
        assert write_subset(str(tmp_path / "songs.csv"), str(tmp_path / f"out{seed}"), 5) == 0
        chosen.append(read_prompts(str(tmp_path / f"out{seed}/prompts.csv")))
    assert chosen[0] == chosen[1]
    assert len({prompt.id for prompt in chosen[0]}) == 5
    assert all(prompt.text.startswith(f"Take {int(prompt.id) - 200}, ") for prompt in chosen[0])
    assert not (tmp_path / "out0/keys.txt").exists()
    write_subset(str(tmp_path / "songs.csv"), str(tmp_path / "all"), 15, per_track=3)
    assert len(read_prompts(str(tmp_path / "all/prompts.csv"))) == 15


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,text\na.mp3,x\n", {}, "has the columns path, text"),
        ("track_id,caption\n7,x\n", {"split": "validation"}, "the table .* has none"),
        ("track_id,caption\n,x\n", {}, "line 2 has no track"),
        ("track_id,caption\na/b,x\n", {}, "'a/b' cannot be an id"),
        ("track_id,caption\n7,\n", {}, "has 0 clips with a caption"),
        ("track_id,caption\n7,x\n", {"per_track": 0}, "must be 1 or more"),
    ],
)
def test_tables_that_give_no_subset_are_refused(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as error:
        write_subset(str(tmp_path / "t.csv"), str(tmp_path / "out"), 1, **options)
    assert re.search(message, f"{error.value.message} {error.value.hint}")


def test_songs_without_ids_are_named_by_their_files(tmp_path):
    (tmp_path / "t.csv").write_text("path,caption\na/one.mp3,x\na/one.mp3,y\nb/two.mp3,z\n")
    write_subset(str(tmp_path / "t.csv"), str(tmp_path / "out"), 2)
    assert {prompt.id for prompt in read_prompts(str(tmp_path / "out/prompts.csv"))} == {"one", "two"}
