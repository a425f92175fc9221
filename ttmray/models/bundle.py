"""Bundles: a consistent set of models under one name, loaded by role.

`debug` is made of the real classes at tiny width with seeded, untrained weights, so every job and test runs
anywhere; `debug-wide` is the same at a width whose cost per clip is that of a real workload, for benchmarks.
Opening a bundle imports no framework: identity and protocol are known before anything is loaded.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from ttmray.errors import UserError
from ttmray.models.protocol import Protocol

if TYPE_CHECKING:
    from ttmray.models.clap import Clap
    from ttmray.models.mert import Mert
    from ttmray.models.separator import Separator
    from ttmray.models.t5 import TextEncoder
    from ttmray.models.tunejury import TuneJury
    from ttmray.models.vae import LatentEncoder

ROLES = ("separator", "clap", "mert", "tunejury", "latents", "text", "clap_condition")


@dataclass(kw_only=True)
class Models:
    """The loaded models; a role that was not asked for is None and using it is a bug.

    `clap` is the checkpoint of rewards and CLAP scores, `clap_condition` the one whose text vectors condition
    the backbone (facts: two different LAION files).
    """

    separator: "Separator" = None  # type: ignore[assignment]
    clap: "Clap" = None  # type: ignore[assignment]
    mert: "Mert" = None  # type: ignore[assignment]
    tunejury: "TuneJury" = None  # type: ignore[assignment]
    latents: "LatentEncoder" = None  # type: ignore[assignment]
    text: "TextEncoder" = None  # type: ignore[assignment]
    clap_condition: "Clap" = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded. `clip_samples` at 44.1 kHz; the separator's fields are those of its adapter."""

    device: str = "cpu"
    batch: int = 8
    clip_samples: int = 441_000
    instrumental: Literal["sum", "residual"] = "sum"
    overlap: float = 0.25
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True)
class Bundle:
    """A named set of models.

    Attributes:
        name: as in configs.
        note: what people must know about its numbers; empty for real weights.
        width: size factor of the debug models.
        seed: of the debug models.
    """

    name: str
    note: str
    width: int
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as plain JSON types. Seeded weights also depend on the versions of the
        libraries that draw them."""
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "demucs")}
        return {"name": self.name, "seed": self.seed, "width": self.width, "versions": versions}

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        """How this bundle's rewards are made."""
        return Protocol(text=reward_text, hashes=(("debug", f"seed{self.seed}-width{self.width}"),))

    def load(self, roles: Collection[str], options: LoadOptions) -> Models:
        """The models of some roles on one device.

        Raises:
            UserError: the device is not there.
        """
        from ttmray.models.clap import debug_clap
        from ttmray.models.mert import debug_mert
        from ttmray.models.separator import Separator, debug_separator
        from ttmray.models.t5 import debug_text_encoder
        from ttmray.models.tunejury import debug_tunejury
        from ttmray.models.vae import debug_latent_encoder

        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown roles {sorted(unknown)}")
        device, batch, seed, width = resolve_device(options.device), options.batch, self.seed, self.width
        makers: dict[str, Any] = {
            "separator": lambda: Separator(
                debug_separator(seed, width=4 * width),
                device,
                batch,
                overlap=options.overlap,
                precision=options.precision,
                instrumental=options.instrumental,
            ),
            "clap": lambda: debug_clap(seed, width, device, batch),
            "mert": lambda: debug_mert(seed, width, device, batch),
            "tunejury": lambda: debug_tunejury(seed, 64 * width, device),
            "latents": lambda: debug_latent_encoder(seed, 16 * width, options.clip_samples, device),
            "text": lambda: debug_text_encoder(seed, width=width, device=device, batch=batch),
            "clap_condition": lambda: debug_clap(seed + 1, width, device, batch),
        }
        return Models(**{role: makers[role]() for role in ROLES if role in roles})


_UNTRAINED = "models are tiny, seeded and untrained: scores and latents mean nothing"
BUNDLES = {
    "debug": Bundle("debug", f"debug bundle: {_UNTRAINED}", width=1),
    "debug-wide": Bundle("debug-wide", f"debug-wide bundle: {_UNTRAINED}", width=4),
}


def open_bundle(name: str) -> Bundle:
    """The bundle of that name.

    Raises:
        UserError: there is none.
    """
    if name not in BUNDLES:
        raise UserError(f"bundle: there is no bundle {name!r}.", f"Known bundles: {', '.join(BUNDLES)}.")
    return BUNDLES[name]


def resolve_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu.

    Raises:
        UserError: cuda was asked for and is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"runtime.device is {device}, but torch sees no GPU.", "Use runtime.device=auto or cpu.")
    return device
