"""The random corpus is a sound corpus, the same every time."""

from synthetic_corpus import write_random_corpus

from ttmray.corpus.index import read_index
from ttmray.corpus.verify import problems
from ttmray.storage import Folder

SMALL = {"tracks": 5, "clips_per_track": 2, "captions": 2, "validation": 1, "test": 1, "unit_clips": 4}
SHAPES = {"latent": (5, 4), "text": (3, 8)}


def test_verify_finds_nothing_wrong_with_it(tmp_path):
    run = write_random_corpus(str(tmp_path / "run"), **SMALL, **SHAPES)
    assert list(problems(run)) == []
    index = read_index(run)
    assert index["split"].to_pylist() == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert len(set(index["caption_id"].to_pylist())) == 2


def test_the_seed_alone_decides_the_numbers(tmp_path):
    names = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_corpus(str(tmp_path / folder), **SMALL, **SHAPES, seed=seed)
        names.append([entry.name for entry in Folder.at(str(tmp_path / folder)).files("shards")])
    assert names[0] == names[1]  # they carry hashes
    assert names[0] != names[2]


def test_a_run_may_be_left_unfinished(tmp_path):
    run = write_random_corpus(str(tmp_path / "run"), **SMALL, **SHAPES, committed=2)
    assert not run.exists("_SUCCESS.json")
    assert set(read_index(run)["unit"].to_pylist()) == {"u000000", "u000001"}
