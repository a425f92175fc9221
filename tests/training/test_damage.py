"""Whatever happens to any file of a training run: it is seen, and made again by the command or by what it says."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from damages import DAMAGES, content, out_of_the_way

from ttmray.cli import main
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.models.state_dicts import read_state_dict
from ttmray.storage import Folder
from ttmray.training.ema import synthesise
from ttmray.training.export import export, inspect
from ttmray.training.tensors import pack, unpack

NEWEST, OLDER = "checkpoints/step-00000012", "checkpoints/step-00000010"
MADE_AGAIN = [
    *("run.json", "_SUCCESS.json", "empty_text.safetensors"),
    *(f"{NEWEST}/{name}" for name in ("state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors")),
    "ema/sigma-0.05-step-00000012.safetensors",
]
LOST = ["metrics.jsonl", "ema/sigma-0.05-step-00000004.safetensors"]


@pytest.fixture(scope="module")
def sets(make_sets) -> tuple[str, ...]:
    return ("ema.snapshot_every=4",)


@pytest.fixture(scope="module")
def undisturbed(make_sets, sets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["train-sft", *(f"--set={text}" for text in make_sets(output, *sets))]) == EXIT_OK
    return output


@pytest.fixture(scope="module")
def other(make_sets, sets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("other") / "run"
    assert main(["train-sft", *(f"--set={t}" for t in make_sets(output, *sets, "data.seed=5", "model.seed=3"))]) == 0
    return output


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


@pytest.fixture
def again(make_sets, sets, run):
    return lambda: main(["train-sft", *(f"--set={text}" for text in make_sets(run, *sets))])


def assert_equal(run: Path, undisturbed: Path, look) -> None:
    assert look.metrics(run) == look.metrics(undisturbed)
    assert look.difference(look.state(run), look.state(undisturbed)) == 0.0
    unlike = ("run.json", "_SUCCESS.json", "metrics.jsonl", "checkpoints/")  # name their folder, or have times
    assert content(run, unlike) == content(undisturbed, unlike)


def damage(run: Path, name: str, how: str, other: Path) -> Path:
    file = run / name
    before = file.read_bytes()
    DAMAGES[how](file, other)
    assert not file.is_file() or file.read_bytes() != before
    return file


def cases(names: list[str]) -> list[object]:
    kinds = list(DAMAGES)
    quick = {(name, kinds[(3 * i + 1) % len(kinds)]) for i, name in enumerate(names)}
    product = [(name, how) for name in names for how in kinds]
    product = [one for one in product if one != ("empty_text.safetensors", "of another run")]  # the same in all of them
    return [pytest.param(*one, marks=[] if one in quick else pytest.mark.slow) for one in product]


@pytest.mark.parametrize(("name", "how"), cases(MADE_AGAIN))
def test_the_same_command_makes_again_what_was_damaged(
    run, undisturbed, other, again, look, tmp_path, capsys, name, how
):
    file = damage(run, name, how, other)
    assert main(["verify", str(run)]) == EXIT_BAD_INPUT
    if how == "a folder":
        if again() == EXIT_BAD_INPUT:
            assert "move" in capsys.readouterr().err.lower()
        out_of_the_way(file, tmp_path / "mine")
    assert again() == EXIT_OK
    shown = capsys.readouterr().out
    if main(["verify", str(run)]) != EXIT_OK:  # a snapshot that no checkpoint goes back to
        assert name.startswith("ema/")
        follow_to_the_start(shown, run, again)
    assert main(["verify", str(run)]) == EXIT_OK
    assert_equal(run, undisturbed, look)


def follow_to_the_start(shown: str, run: Path, again) -> None:
    """What the message says."""
    (folder,) = set(re.findall(r"delete (\S+) and start the same command again", " ".join(shown.split())))
    assert Path(folder).is_relative_to(run)
    shutil.rmtree(folder)
    assert again() == EXIT_OK


@pytest.mark.parametrize(("name", "how"), cases(LOST))
def test_what_no_checkpoint_goes_back_to_is_said_each_time_with_a_way_out_that_works(
    run, undisturbed, other, again, look, tmp_path, capsys, name, how
):
    file = damage(run, name, how, other)
    if how == "a folder":
        out_of_the_way(file, tmp_path / "mine")
    for _ in range(2):
        assert main(["verify", str(run)]) == EXIT_BAD_INPUT
        capsys.readouterr()
        assert again() == EXIT_OK
        shown = capsys.readouterr().out
        assert f"{file} is missing or damaged" in " ".join(shown.split())
    follow_to_the_start(shown, run, again)
    assert main(["verify", str(run)]) == EXIT_OK
    assert_equal(run, undisturbed, look)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_older_checkpoint_is_found(run, other, again, how, capsys):
    damage(run, f"{OLDER}/model.safetensors", how, other)
    assert main(["verify", str(run)]) == EXIT_BAD_INPUT
    assert f"{OLDER}/model.safetensors" in " ".join(capsys.readouterr().out.split())


def test_a_run_without_a_valid_checkpoint_is_trained_again_as_its_message_says(
    run, undisturbed, other, again, look, capsys
):
    for name in (NEWEST, OLDER):
        damage(run, f"{name}/model.safetensors", "flipped", other)
    capsys.readouterr()
    assert again() == EXIT_BAD_INPUT
    follow_to_the_start(capsys.readouterr().err, run, again)
    assert main(["verify", str(run)]) == EXIT_OK
    assert_equal(run, undisturbed, look)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_no_average_is_made_of_a_damaged_snapshot(run, other, how, tmp_path):
    file = damage(run, "ema/sigma-0.05-step-00000008.safetensors", how, other)
    with pytest.raises(UserError, match=re.escape(f"{file} is damaged")) as caught:
        export(str(run), str(tmp_path / "out.safetensors"), "ema:0.07")
    assert not (tmp_path / "out.safetensors").exists()
    assert caught.value.hint.startswith("Delete it: averages are then made of the others")
    file.unlink()
    tensors, step = synthesise(Folder.at(str(run / "ema")), 0.07)
    assert step == 12
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("place", [20, 0.3, 0.7, -1])
def test_one_flipped_bit_of_exported_weights_is_found_by_all_who_read_them(run, tmp_path, place):
    out = tmp_path / "weights.safetensors"
    assert export(str(run), str(out)) == EXIT_OK
    assert inspect(str(out))["step"] == 12
    data = bytearray(out.read_bytes())
    data[place if isinstance(place, int) else int(len(data) * place)] ^= 1
    out.write_bytes(data)
    for read in (read_state_dict, inspect):
        with pytest.raises(UserError, match=re.escape(str(out))):
            read(str(out))


def test_a_packed_file_is_read_by_everyone_and_says_what_was_given():
    from safetensors.torch import load

    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.float16), "none": torch.empty(0)}
    data = pack(tensors, {"kind": "x", "of": ["é"]})
    assert data == pack(dict(reversed(tensors.items())), {"of": ["é"], "kind": "x"})
    read, about = unpack(data, "x")
    assert about == {"kind": "x", "of": ["é"]}
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert torch.equal(load(data)[name], tensor)
