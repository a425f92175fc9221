import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ttmray.errors import EXIT_OK, UserError
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.storage import Folder
from ttmray.training.checkpoint import KIND, save
from ttmray.training.ema import PowerEMA
from ttmray.training.export import WEIGHTS, export, find_checkpoint, inspect, show
from ttmray.training.state import capture

TINY = BackboneConfig(
    latent_dim=4,
    latent_len=9,
    text_dim=6,
    text_len=3,
    text_c_dim=5,
    hidden=16,
    heads=2,
    depth=2,
    fused_depth=1,
    head="v1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with checkpoints of steps 4 and 8, EMA snapshots, and the live objects of step 8."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = FluxAudio(TINY)
    with torch.no_grad():
        model.latent_mean.fill_(0.5)
        model.latent_std.fill_(2.0)
    ema = PowerEMA(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(1, 9):
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        if step % 2 == 0:
            ema.write_snapshots(Folder.at(str(root / "ema")), model)
        if step % 4 == 0:
            state = capture(
                model,
                ema,
                optimizer,
                step=step,
                samples=step * 64,
                config={"model": TINY.to_dict(), "lr": 1e-4},
                identity={"lr": 1e-4},
                position={},
                rng=[],
            )
            save(Folder.at(str(root / "checkpoints")), state)
    return root, model, ema


def metadata(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ttmray"])


def test_raw_weights_carry_their_config_and_load_whole(run, tmp_path, capsys):
    root, model, _ = run
    out = str(tmp_path / "raw.safetensors")
    assert export(str(root), out) == EXIT_OK
    assert "sha256" in capsys.readouterr().out
    found = load_file(out)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    about = metadata(out)
    assert (about["kind"], about["weights"], about["step"], about["samples"]) == (WEIGHTS, "raw", 8, 512)
    rebuilt = FluxAudio(BackboneConfig(**about["config"]["model"]))
    rebuilt.load_state_dict(found)


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_averaged_weights_are_those_of_the_running_average(run, tmp_path, sigma):
    root, model, ema = run
    out = str(tmp_path / "ema.safetensors")
    shutil.copytree(root / "checkpoints", tmp_path / "checkpoints")  # without the snapshots
    export(str(tmp_path), out, f"ema:{sigma}")
    found = load_file(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in ema.weights(model, sigma).items())
    assert not torch.equal(found["audio_input_proj.0.weight"], model.audio_input_proj[0].weight)
    assert metadata(out)["weights"] == f"ema:{sigma}"


def test_other_averages_are_synthesised_at_the_step_of_the_checkpoint(run, tmp_path):
    root, model, ema = run
    name = "audio_input_proj.0.weight"
    out = str(tmp_path / "ema.safetensors")
    export(str(root / "checkpoints/step-00000008"), out, "ema:0.08")
    found = load_file(out)
    assert torch.equal(found["latent_std"], model.latent_std)
    near = [(found[name] - ema.weights(model, sigma)[name]).norm() for sigma in (0.05, 0.1)]
    assert max(near) < (found[name] - model.state_dict()[name]).norm()
    earlier = str(tmp_path / "earlier.safetensors")
    export(str(root / "checkpoints/step-00000004"), earlier, "ema:0.08")
    assert metadata(earlier)["step"] == 4
    assert not torch.allclose(load_file(earlier)[name], found[name])


@pytest.mark.parametrize(
    ("weights", "words"), [("best", "no weights called"), ("ema:wide", "no weights called"), ("ema:0.9", "sigma_rel")]
)
def test_weights_that_do_not_exist_are_one_message(run, tmp_path, weights, words):
    with pytest.raises(UserError, match=words):
        export(str(run[0]), str(tmp_path / "x.safetensors"), weights)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_the_ending_is_checked(run, tmp_path):
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        export(str(run[0]), str(out))
    assert out.read_bytes() == b"mine"
    with pytest.raises(UserError, match="must end"):
        export(str(run[0]), str(tmp_path / "x.pth"))


def test_a_checkpoint_says_what_it_is(run, capsys):
    root, model, _ = run
    report = inspect(str(root))
    assert report["kind"] == KIND
    assert (report["step"], report["samples"]) == (8, 512)
    assert report["tensors"] == len(model.state_dict())
    assert report["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert report["not_finite"] == []
    assert report["sha256"].keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert report["model"].endswith("4 latent channels, 16 wide, 1 joint and 1 fused blocks, score head of 5 tensors")
    assert show(str(root), as_json=True) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == report
    assert show(str(root / "checkpoints/step-00000004")) == EXIT_OK
    text = capsys.readouterr().out
    assert "step:        4\n" in text
    assert "  hidden: 16\n" in text


def test_exports_and_snapshots_say_what_they_are(run, tmp_path):
    root, _, _ = run
    out = str(tmp_path / "ema.safetensors")
    export(str(root), out, "ema:0.1")
    report = inspect(out)
    assert (report["kind"], report["weights"], report["step"]) == (WEIGHTS, "ema:0.1", 8)
    assert report["config"]["lr"] == 1e-4
    snapshot = inspect(str(root / "ema/sigma-0.05-step-00000006.safetensors"))
    assert (snapshot["kind"], snapshot["step"], snapshot["sigma_rel"]) == ("ema snapshot", 6, 0.05)
    assert snapshot["model"] == report["model"]


def released(golden_dir):
    """The released names and shapes; every tensor is one number that is seen many times."""
    manifest = json.loads((golden_dir / "manifests/fluxaudio_s_44k.json").read_text())
    tensors = manifest.get("tensors", manifest)
    return {
        name: torch.full((1,), 0.5).expand(tuple(shape["shape"] if isinstance(shape, dict) else shape))
        for name, shape in tensors.items()
    }


def test_released_backbones_are_recognised(golden_dir, tmp_path):
    plain = released(golden_dir)
    torch.save(plain, tmp_path / "plain.pth")
    report = inspect(str(tmp_path / "plain.pth"))
    assert (report["tensors"], report["parameters"], report["step"]) == (198, 120_311_288, None)
    backbone = "FluxAudio backbone: 40 latent channels, 448 wide, 4 joint and 8 fused blocks"
    assert report["model"] == f"{backbone}, no score head"
    head = {f"score_embed.{i}": torch.zeros(2) for i in range(5)}
    batched = {**plain, **head, "empty_string_feat": plain["empty_string_feat"][None], "latent_rot": torch.zeros(3)}
    torch.save({"it": 30_000, "weights": batched, "optimizer": {"state": {}}, "ema": None}, tmp_path / "last.pth")
    report = inspect(str(tmp_path / "last.pth"))
    assert (report["tensors"], report["step"]) == (204, 30_000)
    assert report["model"] == f"{backbone}, score head of 5 tensors"
    del batched["latent_mean"]
    batched["extra"] = torch.full((2,), float("inf"))
    snapshot = {f"ema_model.{name}": tensor for name, tensor in batched.items()}
    torch.save({**snapshot, "_extra_state": {"initted": True, "step": 10_000}}, tmp_path / "0.10000.pt")
    report = inspect(str(tmp_path / "0.10000.pt"))
    assert (report["kind"], report["step"]) == ("EMA snapshot of the public trainer", 10_000)
    assert report["not_finite"] == ["extra"]
    assert report["model"].endswith("1 tensors missing: latent_mean; 1 tensors unknown: extra")


def test_other_weights_are_described_without_guessing(tmp_path):
    save_file({"w": torch.zeros(2, 3, dtype=torch.float16)}, tmp_path / "other.safetensors")
    report = inspect(str(tmp_path / "other.safetensors"))
    assert report["kind"] == "safetensors file without a description"
    assert (report["model"], report["dtypes"]) == ("not a FluxAudio backbone", ["float16"])
    torch.save({"generator": {"w": torch.zeros(2)}}, tmp_path / "g.pt")
    assert inspect(str(tmp_path / "g.pt"))["kind"] == "torch checkpoint, weights under 'generator'"


def test_what_is_no_checkpoint_is_one_message(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    cases = {
        "": "holds no checkpoint",
        "absent": "holds no checkpoint",
        "absent.pth": "is not a file",
        "absent.safetensors": "not found",
        "list.pt": "holds a list",
        "empty.pt": "holds no tensors",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            inspect(str(tmp_path / name))
    with pytest.raises(UserError):
        find_checkpoint(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**5), flip=st.integers(1, 255), cut=st.booleans())
def test_damaged_files_are_reported_or_refused_but_never_crash(tmp_path, ending, at, flip, cut):
    path = tmp_path / f"damaged.{ending}"
    if ending == "pth":
        torch.save({"it": 3, "weights": {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}}, path)
    else:
        save_file({"a": torch.arange(4.0), "b": torch.zeros(2, 2)}, path, {"ttmray": '{"kind": "x"}'})
    data = bytearray(path.read_bytes())
    if cut:
        data = data[: at % len(data)]
    else:
        data[at % len(data)] ^= flip
    Path(path).write_bytes(data)
    message, report = None, {}
    try:
        report = inspect(str(path))
    except UserError as error:
        message = error.message
    if message is None:  # a flipped number is a number
        assert not cut
        assert report["tensors"] >= 1
    else:
        assert str(path) in message
