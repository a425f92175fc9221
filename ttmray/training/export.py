"""What is this file, and inference weights out of a checkpoint: `ttmray checkpoint inspect | export`."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from ttmray import hub
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.score_support import ScoreSupport
from ttmray.models.state_dicts import read_state_dict
from ttmray.storage import Folder, local_file, read_file, split_path
from ttmray.training.checkpoint import KIND, STATE, committed, load, newest_valid, verify
from ttmray.training.ema import synthesise
from ttmray.training.tensors import pack, unpack

WEIGHTS = "ttmray weights"
EXPORTED = "weights.safetensors"
_TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
# Tables that old public checkpoints hold; they are recomputed.
_TABLES = {"latent_rot", "text_rot", "t_embed.freqs"}


def export(path: str, out: str, weights: str = "raw") -> int:
    """Write the inference weights of a checkpoint as one safetensors file that carries its config. Never overwrites.

    The state dict is complete (frozen tensors included) in the training precision. The file's metadata, key "ttmray",
    is JSON: `kind`, `weights`, `step`, `samples`, `backbone` (its shape), `config`, `fingerprint`, and `score_support`
    (range of the scores it was trained on, models/score_support.py).

    Args:
        path: a checkpoint folder, or a run or checkpoints folder, whose newest valid one is taken; local or s3.
        out: local path or URI that ends in .safetensors.
        weights: `raw`, or `ema:<sigma_rel>`. A sigma_rel without a running average is synthesised from the snapshots
            in the run's `ema` folder.

    Raises:
        UserError: no such or a damaged checkpoint, unknown weights, `out` exists.
    """
    where = find_checkpoint(path)
    parent, name = split_path(where.uri)
    if not out.endswith(".safetensors"):
        raise UserError(f"{out} must end in .safetensors.", "Loaders go by it.")
    target, file = split_path(out)
    if target.exists(file):
        raise UserError(f"{out} exists.", "Delete it to export once more.")
    sigma = _sigma(weights)
    state = load(parent, name)
    tensors = dict(state.model)
    if sigma is not None:
        averaged = {key.partition("/")[2]: value for key, value in state.ema.items() if key.startswith(f"{sigma:g}/")}
        tensors |= averaged or synthesise(split_path(parent.uri)[0].sub("ema"), sigma, state.ema_step)[0]
    about = {
        "kind": WEIGHTS,
        "weights": weights,
        "step": state.step,
        "samples": state.samples,
        "backbone": state.identity.get("backbone"),
        "config": state.identity.get("config", state.config),  # no paths: equal weights of two folders are equal files
        "fingerprint": state.fingerprint(),
        **state.facts,
    }
    data = pack(tensors, about)
    if not target.create(file, data):
        raise UserError(f"{out} exists.", "Delete it to export once more.")
    console.print(f"{out}: {weights} weights of {where}, sha256 {hashlib.sha256(data).hexdigest()}", markup=False)
    return EXIT_OK


def export_again(run: str, weights: str) -> int:
    """`weights.safetensors` in a training run, for the next step of a chain; one of an earlier end is replaced."""
    folder = Folder.at(run)
    folder.delete(EXPORTED)
    return export(run, folder.path(EXPORTED), weights)


def _sigma(weights: str) -> float | None:
    kind, _, value = weights.partition(":")
    try:
        if kind == "ema":
            return float(value)
    except ValueError:
        pass  # said below
    if weights != "raw":
        raise UserError(f"There are no weights called {weights!r}.", "Use raw, or ema:0.05 (any sigma_rel).")
    return None


def find_checkpoint(path: str) -> Folder:
    """The checkpoint folder at `path`: itself, or the newest valid one of a run.

    Raises:
        UserError: there is none.
    """
    folder = Folder.at(path)
    if folder.exists(STATE):
        return folder
    for place in (folder, folder.sub("checkpoints")):
        if committed(place):
            name = newest_valid(place)
            assert name is not None
            return place.sub(name)
    raise UserError(
        f"{path} holds no checkpoint.",
        "Name a run folder, its checkpoints folder, one step-... folder in it, or a .safetensors, .pt or .pth file.",
    )


def inspect(path: str) -> dict[str, Any]:
    """What a file or folder of weights is, after reading all of it.

    Args:
        path: our checkpoint (folder), an exported or any other safetensors file, or a .pt, .pth, .ckpt or .bin of plain
            tensors, such as a released backbone or a file of the public trainer; local or s3://.

    Returns:
        `kind`, `path`, `step` (None where the file does not say), `tensors`, `parameters`, `not_finite` (names),
        `model` (what the names say), `sha256` per file, and `config` where there is one.

    Raises:
        UserError: not there, damaged, or no weights.
    """
    path = hub.file_of(path)
    if path.endswith(".safetensors"):
        data = read_file(path)
        tensors, about = unpack(data, path)
        said = ("step", "weights", "samples", "sigma_rel", "score_support", "config")
        known: dict[str, Any] = {key: about[key] for key in said if key in about}
        kind = about.get("kind", "safetensors file without a description")
        return _report(path, kind, tensors, {path: hashlib.sha256(data).hexdigest()}, **known)
    if path.endswith(_TORCH_ENDINGS):
        return _inspect_torch(path)
    where = find_checkpoint(path)
    state = verify(where)
    model, _ = unpack(where.read("model.safetensors"), where.path("model.safetensors"))
    hashes = {name: info["sha256"] for name, info in state["files"].items()}
    known = {key: state[key] for key in ("step", "samples", "versions", "fingerprint", "config")}
    known |= state.get("facts", {})
    return _report(where.uri, KIND, model, hashes, **known)


def _inspect_torch(path: str) -> dict[str, Any]:
    from ttmray.models.weights import digest_file

    full = local_file(path)
    content: Mapping[str, Any] = read_state_dict(full)
    kind, step = "torch state dict", None
    for container in ("weights", "state_dict", "generator"):  # of the public trainer, of LAION-CLAP, of BigVGAN
        if isinstance(content.get(container), dict):
            kind, step = f"torch checkpoint, weights under {container!r}", content.get("it", content.get("epoch"))
            content = content[container]
            break
    extra = content.get("_extra_state")
    if isinstance(extra, dict) and any(key.startswith("ema_model.") for key in content):
        kind, step = "EMA snapshot of the public trainer", extra.get("step")
    tensors = {
        str(key).removeprefix("ema_model.").removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(f"{path} holds no tensors by name.", "It is a checkpoint of something else.")
    return _report(path, kind, tensors, {path: digest_file(full).sha256}, step=int(step) if step is not None else None)


def _report(
    path: str, kind: str, tensors: Mapping[str, Tensor], sha256: dict[str, str], **known: Any
) -> dict[str, Any]:
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {
        "path": path,
        "kind": kind,
        "step": None,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "not_finite": sorted(name for name, tensor in floats.items() if not tensor.isfinite().all()),
        "model": _describe(tensors),
        "sha256": sha256,
        **known,
    }


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """The backbone that the names and shapes belong to, and what is missing or too much."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in _TABLES}
    try:
        hidden, latent_dim, _ = shapes["audio_input_proj.0.weight"]
        text_len, text_dim = shapes["empty_string_feat"][-2:]
        joint, fused = (len({n.split(".")[1] for n in shapes if n.startswith(p)}) for p in ("joint_", "fused_"))
        config = BackboneConfig(
            latent_dim=latent_dim,
            text_dim=text_dim,
            text_len=text_len,
            text_c_dim=shapes["text_cond_proj.0.weight"][1],
            hidden=hidden,
            heads=hidden // shapes["fused_blocks.0.attn.q_norm.weight"][0],
            depth=joint + fused,
            fused_depth=fused,
        )
    except (KeyError, ValueError, IndexError):
        return "not a FluxAudio backbone"
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in FluxAudio(config).state_dict().items()}
    score = [name for name in shapes if name.startswith("score_embed.")]
    head = f"score head of {len(score)} tensors" if score else "no score head"
    problems = [
        f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}"
        for what, names in (
            ("missing", expected.keys() - shapes.keys()),
            ("unknown", shapes.keys() - expected.keys() - set(score)),
            ("of another shape", {n for n in expected.keys() & shapes.keys() if not _fits(shapes[n], expected[n])}),
        )
        if names
    ]
    size = f"{latent_dim} latent channels, {hidden} wide, {joint} joint and {fused} fused blocks, {head}"
    return "; ".join([f"FluxAudio backbone: {size}", *problems])


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal but for leading ones: some public files hold the empty text with a batch axis."""
    return shape == expected or shape == (1, *expected)


def show(path: str, as_json: bool = False) -> int:
    """Print `inspect`.

    Raises:
        UserError: as `inspect`.
    """
    report = inspect(path)
    if as_json:
        console.print(json.dumps(report), markup=False)
        return EXIT_OK
    config = report.pop("config", None)
    if report.get("score_support"):
        report["score_support"] = ScoreSupport.from_dict(report["score_support"]).text()
    for key, value in report.items():
        if value not in (None, []):
            console.print(f"{key + ':':<12} {_readable(value)}", markup=False)
    if config is not None:
        console.print("config:", markup=False)
        console.print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, indent=2), markup=False)
    return EXIT_OK


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
