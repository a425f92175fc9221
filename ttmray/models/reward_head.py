"""A reward head from outside of a bundle: a file, or what `train-ranker` left in its run folder. Imports no framework.

A head reads CLAP and MERT features of the encoders that it was trained on. Where its ranker run or its sidecar says
which these were, others are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models.protocol import Protocol
from ttmray.models.weights import digest_file
from ttmray.runs import RUN
from ttmray.storage import Folder, absolute, local_file, read_file, split_path

if TYPE_CHECKING:
    from ttmray.models.tunejury import TuneJury

HEAD = "tunejury"
"""Stem of the weights and of their sidecar in a ranker run."""
NO_FEATURES = ("separator", "latents", "text", "clap_condition", "backbone", "vocoder")
"""Roles of a bundle in a folder that no head reads anything of."""


@dataclass(frozen=True)
class RewardHead:
    """Where a head lies and what it is.

    Attributes:
        location: absolute path or address.
        path: its weights on this machine.
        sha256: of the weights.
        sidecar: what lies beside them: `exclude` and `block_dims` say what they take.
        encoders: identity of the bundle whose features it was trained on; None where nobody says.
    """

    location: str
    path: Path
    sha256: str
    sidecar: Mapping[str, Any]
    encoders: Mapping[str, Any] | None

    @property
    def id(self) -> str:
        """What it is for identities: the weights' hash and the inputs that a sidecar takes away."""
        left_out = " ".join(sorted(self.sidecar.get("exclude") or ()))
        return f"{self.sha256} without {left_out}" if left_out else self.sha256

    def load(self, block_dims: tuple[int, int, int] | None = None, device: str = "cpu") -> "TuneJury":
        """The head as everybody uses it.

        Args:
            block_dims: widths of CLAP audio, MERT and CLAP text; default: those of the sidecar, else the released.

        Raises:
            UserError: the weights are no head, or take features of other widths.
        """
        from ttmray.models.state_dicts import read_state_dict
        from ttmray.models.tunejury import BLOCK_DIMS, load_tunejury

        dims = block_dims or tuple(self.sidecar.get("block_dims", BLOCK_DIMS))
        try:
            state = read_state_dict(self.path)
            for name, value in state.items():
                if hasattr(value, "isfinite") and not bool(value.isfinite().all()):
                    raise UserError(f"weights {name} are not finite.", "Train the head again.")
            return load_tunejury(state, exclude=self.sidecar.get("exclude"), block_dims=dims, device=device)
        except UserError as error:
            raise UserError(f"{self.location}: {error.message}", error.hint) from error


def open_head(location: str) -> RewardHead:
    """The head of a weights file, or of a finished ranker run.

    Args:
        location: `.safetensors` or `.pt` file, or run folder of `train-ranker`; local or s3://.

    Raises:
        UserError: there is none.
    """
    folder, encoders = Folder.at(location), None
    if folder.exists(f"{HEAD}.safetensors"):
        weights = folder.path(f"{HEAD}.safetensors")
        if folder.exists(RUN):
            encoders = _trained_on(folder)
    elif folder.exists(RUN):
        raise UserError(f"{location} holds no {HEAD}.safetensors.", "Finish its training, or name another folder.")
    else:
        weights = absolute(location)
    try:
        path = local_file(weights)
    except UserError as error:
        raise UserError(
            f"{location} is no reward head: {error.message}",
            "Name a weights file, or the run folder of `ttmray train-ranker`.",
        ) from error
    return RewardHead(absolute(location), path, digest_file(path).sha256, _sidecar(weights), encoders)


def with_head(protocol: Protocol, head: RewardHead) -> Protocol:
    """The same way of making a reward with another head in the end."""
    others = tuple(item for item in protocol.hashes if not item[0].startswith(HEAD))
    return replace(protocol, hashes=tuple(sorted((*others, (HEAD, head.id)))))


def require_same_encoders(head: RewardHead, bundle: Mapping[str, Any], whose: str) -> None:
    """See that a head was trained on the features that it is to read.

    Args:
        bundle: identity of the bundle that makes them.
        whose: for the message.

    Raises:
        UserError: on others. Where nobody knows, nothing is checked but widths, later.
    """
    trained_on = encoders_of(head.encoders or {})
    if trained_on and trained_on != encoders_of(bundle):
        raise UserError(
            f"{head.location} was trained on features of {_named(trained_on)}, {whose} has those of "
            f"{_named(encoders_of(bundle))}.",
            "Train a ranker with that bundle.",
        )
    said = str(head.sidecar.get("protocol", "")).partition("/")[0]
    if not trained_on and said and said != bundle.get("name"):
        raise UserError(
            f"{head.location} was trained on features of the bundle {said}, {whose} has those of {bundle.get('name')}.",
            "Train a ranker with that bundle.",
        )


def encoders_of(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a bundle's identity that decides the features which its reward head reads."""
    parts = {name: value for name, value in bundle.items() if name != "head"}
    if "weights" in parts:
        others = (HEAD, *(f"{role}/" for role in NO_FEATURES))
        parts["weights"] = {name: sha for name, sha in parts["weights"].items() if not name.startswith(others)}
    return parts


def _named(bundle: Mapping[str, Any]) -> str:
    return f"the bundle {bundle.get('name')}" if "name" in bundle else "another bundle"


def _trained_on(folder: Folder) -> Mapping[str, Any] | None:
    """Identity of the bundle of a ranker run; None where its `run.json` names none."""
    try:
        encoders = read_json(folder.read(RUN))["identity"].get("bundle")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.path(RUN)} does not describe a run: {error!r}.",
            f"Restore it, or name the weights alone, copied elsewhere: {HEAD}.safetensors and {HEAD}.json.",
        ) from error
    if encoders is not None and not isinstance(encoders, dict):
        raise UserError(f"{folder.path(RUN)} does not describe a run: its bundle is {encoders!r}.", "Restore it.")
    return encoders


def _sidecar(weights: str) -> dict[str, Any]:
    folder, name = split_path(weights)
    beside = f"{name.rpartition('.')[0] or name}.json"
    if not folder.exists(beside):
        return {}
    try:
        sidecar = dict(read_json(read_file(folder.path(beside))))
        excluded = sidecar.get("exclude")
        if excluded is not None and not (isinstance(excluded, list) and all(isinstance(one, str) for one in excluded)):
            raise ValueError(f"exclude is {excluded!r}, no list of names")
        return sidecar
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder.path(beside)} is no sidecar of a reward head: {error}",
            'It must hold {"input_dim": ..., "exclude": [...]} of the weights beside it.',
        ) from error
