"""Weights files of strangers: read without running code, or refused with a reason."""

import os
import pickle
import re
import resource
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ttmray.errors import UserError
from ttmray.models.state_dicts import read_state_dict

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


class Payload:
    """Pickles into a call that creates a folder: harmless, but it proves that code ran."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_protocol_4_checkpoint_with_numpy_scalars_is_read(tmp_path):
    path = tmp_path / "laion.pt"
    torch.save({"epoch": np.int64(15), "loss": np.float64(0.5), "state_dict": TENSORS}, path, pickle_protocol=4)
    with pytest.raises(pickle.UnpicklingError):  # torch's own reader cannot, or this test tests nothing
        torch.load(path, weights_only=True)
    loaded = read_state_dict(path)
    assert loaded["epoch"] == 15
    assert loaded["loss"] == 0.5
    assert all(torch.equal(loaded["state_dict"][key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, protocol, legacy):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    checkpoint = {"state_dict": {"w": torch.zeros(1)}, "epoch": np.int64(1), "evil": Payload(marker)}
    torch.save(checkpoint, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    # Old files are left to torch's own reader; for zip files our allow-list has the last word.
    with pytest.raises(UserError, match="was not read" if legacy else r"refused to load \w+\.mkdir") as refused:
        read_state_dict(path)
    assert "weights_only" not in str(refused.value), "torch's advice to switch its protection off"
    assert not marker.exists()
    # The payload is real: an ordinary load runs it.
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_other_objects_and_other_files_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save({"layer": torch.nn.Linear(1, 1)}, tmp_path / "module.pt")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name in ("program.pt", "text.pt", "text.safetensors", "list.pt", "absent.pt", "empty.pt", "module.pt"):
        with pytest.raises(UserError, match=re.escape(name)) as refused:
            read_state_dict(tmp_path / name)
        assert "weights_only" not in str(refused.value)


def torch_file(path, legacy=False):
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)


@contextmanager
def no_advice():
    """Torch's advice to switch its protection off must not reach people."""
    try:
        yield
    except UserError as error:
        if "weights_only" in str(error):
            raise AssertionError("it tells how to switch the protection off") from error
        raise


WRITERS = {
    "weights.safetensors": lambda path: save_file(TENSORS, path),
    "zip.pt": torch_file,
    "legacy.pt": lambda path: torch_file(path, legacy=True),
}


@pytest.fixture(scope="module", params=WRITERS)
def sound_file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / request.param
    WRITERS[request.param](path)
    return path


def test_both_formats_give_the_tensors(sound_file):
    loaded = read_state_dict(sound_file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[key], value) for key, value in TENSORS.items())


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(sound_file, tmp_path_factory, data):
    content = bytearray(sound_file.read_bytes())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8), label="changes"
    ):
        content[place] = byte
    kept = data.draw(st.integers(0, len(content)), label="kept")
    path = tmp_path_factory.mktemp("damaged") / sound_file.name
    path.write_bytes(content[:kept] if data.draw(st.booleans(), label="cut") else content)
    with suppress(UserError), no_advice():
        assert isinstance(read_state_dict(path), dict)


def test_a_few_bytes_of_a_checkpoint_do_not_take_gigabytes(tmp_path):
    # the number under which an object is remembered; a reader in C makes a list that long
    far = b"r" + (1 << 26).to_bytes(4, "little")
    content = b"\x80\x04}" + far + b"\x8c\x03one\x95" + bytes(8) + b"K\x01s."
    with zipfile.ZipFile(tmp_path / "far.pt", "w") as archive:
        for name, data in (("data.pkl", content), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_state_dict(tmp_path / "far.pt") == {"one": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"
