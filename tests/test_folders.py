"""Folders that are no runs but say what they hold: whatever happens to a file of theirs is found and made again."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from damages import DAMAGES, damage_every_file
from synthetic_pool import Candidate, write_pool

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.evaluation.measure import MeasureConfig
from ttmray.evaluation.reference import build_reference, load_reference
from ttmray.evaluation.subset import write_subset
from ttmray.generation.filter import FilterConfig, filter_pool
from ttmray.generation.postprocess import PostprocessConfig
from ttmray.generation.postprocess_folders import postprocess
from ttmray.training.clips import read_keys
from ttmray.training.pairs import PairsConfig, build_pairs, read_pairs

WAYS = tuple(DAMAGES)
FEW = ("deleted", "flipped")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompts = {f"p{i}": (f"prompt {i}", np.zeros((3, 8))) for i in range(4)}
    rng = np.random.default_rng(1)
    clips = [
        Candidate(name, i, rng.standard_normal((4, 2)), float(rng.normal()), float(rng.normal()))
        for name in prompts
        for i in range(4)
    ]
    folder = str(tmp_path_factory.mktemp("pool") / "pool")
    write_pool(folder, clips, prompts)
    return folder


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("songs"), np.random.default_rng(0)
    t = np.arange(6 * 44100) / 44100
    for i in range(3):
        soundfile.write(folder / f"song{i}.flac", 0.3 * np.sin(2000 * (i + 1) * t) + rng.normal(0, 0.02, len(t)), 44100)
    return folder


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_a_selection(pool: str, tmp_path: Path, temperature: float | None) -> None:
    def again(folder: Path) -> int:
        return filter_pool(pool, str(folder), FilterConfig(share=0.5, temperature=temperature))

    assert again(tmp_path / "it") == EXIT_OK
    assert filter_pool(pool, str(tmp_path / "other"), FilterConfig(share=0.25, temperature=temperature)) == EXIT_OK
    files = 4 if temperature is None else 5
    ways = WAYS if temperature is None else FEW
    done = damage_every_file(tmp_path / "it", tmp_path / "other", tmp_path / "work", again, ways)
    assert done == files * len(ways)


def test_training_refuses_a_list_of_clips_that_is_not_what_the_filter_wrote(pool: str, tmp_path: Path) -> None:
    """A list that lost its end would be trained on without a word."""
    filter_pool(pool, str(tmp_path), FilterConfig(share=0.5))
    kept = tmp_path / "kept.txt"
    whole = read_keys(str(kept))
    kept.write_text("".join(f"{key}\n" for key in list(whole)[:3]))
    with pytest.raises(UserError, match="is not what was written") as refused:
        read_keys(str(kept))
    assert "command that made it once more" in refused.value.hint
    filter_pool(pool, str(tmp_path), FilterConfig(share=0.5))  # the way out
    assert read_keys(str(kept)) == whole
    own = tmp_path / "mine/kept.txt"
    own.parent.mkdir()
    own.write_text("p0_0\n")
    assert read_keys(str(own)) == {"p0_0": 1.0}


def test_pairs(pool: str, tmp_path: Path) -> None:
    def again(folder: Path) -> int:
        return build_pairs(pool, str(folder), PairsConfig())

    assert again(tmp_path / "it") == EXIT_OK
    assert build_pairs(pool, str(tmp_path / "other"), PairsConfig(by="reward")) == EXIT_OK
    assert damage_every_file(tmp_path / "it", tmp_path / "other", tmp_path / "work", again, WAYS) == 4 * len(WAYS)
    (tmp_path / "it/pairs.parquet").write_bytes((tmp_path / "other/pairs.parquet").read_bytes())
    with pytest.raises(UserError, match="is not what was written"):
        read_pairs(str(tmp_path / "it/pairs.parquet"))


def test_a_subset(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("track_id,caption\n" + "".join(f"t{i},caption {i}\n" for i in range(20)))

    def again(folder: Path) -> int:
        return write_subset(str(table), str(folder), 5)

    assert again(tmp_path / "it") == EXIT_OK
    assert write_subset(str(table), str(tmp_path / "other"), 5, seed=1) == EXIT_OK
    assert damage_every_file(tmp_path / "it", tmp_path / "other", tmp_path / "work", again, WAYS) == 3 * len(WAYS)


def test_post_processed_files(songs: Path, tmp_path: Path) -> None:
    def again(folder: Path) -> int:
        return postprocess([str(songs)], str(folder), PostprocessConfig(passes=0))

    assert again(tmp_path / "it") == EXIT_OK
    assert postprocess([str(songs)], str(tmp_path / "other"), PostprocessConfig(passes=0, lufs=-20)) == EXIT_OK
    assert damage_every_file(tmp_path / "it", tmp_path / "other", tmp_path / "work", again, FEW) == 5 * len(FEW)


def test_a_reference_set(songs: Path, tmp_path: Path) -> None:
    runtime = MeasureConfig(device="cpu", threads=1)

    def again(folder: Path) -> int:
        return build_reference(folder.name, str(songs), store=str(folder.parent), runtime=runtime, bundle="debug")

    assert again(tmp_path / "store/copy") == EXIT_OK
    done = damage_every_file(tmp_path / "store/copy", tmp_path / "store/copy", tmp_path / "work", again, FEW)
    assert done == 5 * len(FEW)
    protocol = json.loads((tmp_path / "store/copy/reference.json").read_text())["protocol"]
    for name in ("clap.safetensors", "gaussian.safetensors", "tracks.parquet"):
        file = tmp_path / "store/copy" / name
        whole = file.read_bytes()
        DAMAGES["flipped"](file, file)
        with pytest.raises(UserError):
            load_reference("copy", str(tmp_path / "store"), protocol)
        file.write_bytes(whole)
    load_reference("copy", str(tmp_path / "store"), protocol)


def test_verify_looks_at_all_that_lies_below_a_folder(pool: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    filter_pool(pool, str(tmp_path / "chain/selection"), FilterConfig(share=0.5))
    build_pairs(pool, str(tmp_path / "chain/pairs"), PairsConfig())
    assert main(["verify", str(tmp_path / "chain")]) == EXIT_OK
    assert "no problems in 2 runs and folders" in capsys.readouterr().out
    (tmp_path / "chain/pairs/pairs.md").unlink()
    assert main(["verify", str(tmp_path / "chain")]) == EXIT_BAD_INPUT
    assert "pairs: pairs.md: is missing" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == EXIT_BAD_INPUT
    (tmp_path / "nothing").mkdir()
    assert main(["verify", str(tmp_path / "nothing")]) == EXIT_BAD_INPUT
    assert "is no run" in capsys.readouterr().err
