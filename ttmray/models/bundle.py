"""Bundles: a consistent set of models under one name, loaded by role.

`paper` is the released weights. `micro` ships with the package, trained on the built-in composer's songs. `debug` is
made of the same classes at tiny width with seeded, untrained weights, so every job and test runs anywhere; `debug-wide`
is the same at a width whose cost per clip is that of a real workload, for benchmarks. `public-16k` and `debug-16k` have
VAE and vocoder of 16 kHz latents, for the public baseline; these only decode. Three have a released backbone and what
it needs to make sound (`models/released.py`). A bundle of one's own is a folder, named by its path
(`models/folder_bundle.py`); `jobs/train_micro.py` makes one from nothing. Opening one imports no framework.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from ttmray import hub
from ttmray.config import IdentityPart
from ttmray.errors import UserError
from ttmray.models import folder_bundle, released
from ttmray.models.devices import resolve_device
from ttmray.models.folder_bundle import DESCRIPTION, WEIGHTS, FolderFiles
from ttmray.models.loading import LoadOptions, separator_of
from ttmray.models.protocol import Protocol
from ttmray.models.published import bundle_folder
from ttmray.models.released import RELEASED, Facts
from ttmray.models.reward_head import RewardHead, open_head, require_same_encoders, with_head
from ttmray.models.weights import Store, digest_file, licences, open_store
from ttmray.storage import absolute

if TYPE_CHECKING:
    from ttmray.models.backbone import FluxAudio
    from ttmray.models.clap import Clap
    from ttmray.models.latents import LatentEncoder
    from ttmray.models.mert import Mert
    from ttmray.models.separator import Separator
    from ttmray.models.t5 import TextEncoder
    from ttmray.models.tunejury import TuneJury


@dataclass(kw_only=True)
class Models:
    """The loaded models; a role that was not asked for is None and using it is a bug.

    `clap` is the checkpoint of rewards and CLAP scores, `clap_condition` the one whose text vectors condition
    the backbone: two different LAION files. `latents` decodes to audio only if `vocoder` was asked for too.
    """

    separator: "Separator" = None  # type: ignore[assignment]
    clap: "Clap" = None  # type: ignore[assignment]
    mert: "Mert" = None  # type: ignore[assignment]
    tunejury: "TuneJury" = None  # type: ignore[assignment]
    latents: "LatentEncoder" = None  # type: ignore[assignment]
    text: "TextEncoder" = None  # type: ignore[assignment]
    clap_condition: "Clap" = None  # type: ignore[assignment]
    backbone: "FluxAudio" = None  # type: ignore[assignment]


ROLES = (*Models.__dataclass_fields__, "vocoder")


class Bundle(ABC):
    """A named set of models. `note` is what people must know about its numbers."""

    name: str
    note: str
    licence_notes: tuple[str, ...] = ()
    """What must be said of the licences of its weights."""
    clip_s: float = 10.0
    """Length of the clips that its backbone makes, in seconds."""
    sampling: Mapping[str, Any] = {}
    """Settings of `generation.sampler.SamplerConfig` that its text encoder and its own backbone need, or were published
    with, where nobody chooses others."""

    @abstractmethod
    def roles(self) -> set[str]:
        """The roles that it has models for."""

    @abstractmethod
    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        """What decides its numbers, as plain JSON types: of some roles, whose weights must be here, or of all."""

    def weights(self, roles: Collection[str] | None = None) -> list[str]:
        """Names of the released weights (`ttmray weights`) of some roles, or of all."""
        return []

    def backbone_file(self) -> Path | None:
        """Its backbone's weights; None where it has none, or draws them from a seed. UserError: they are not here."""
        return None

    @abstractmethod
    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        """How this bundle's rewards are made."""

    @abstractmethod
    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        """Role -> what builds it."""

    def require(self, roles: Collection[str]) -> None:
        """
        Raises:
            UserError: it has no models for some of the roles, or their weights are not here: names all of them.
        """
        lacking = [role for role in ROLES if role in roles and role not in self.roles()]
        if lacking == ["backbone"]:
            raise UserError(
                f"bundle {self.name} has no backbone: the paper's weights are not in the registry.",
                "Name a file of your own or a released one (checkpoint), or a bundle that makes sound "
                "(ttmray weights list).",
            )
        if lacking:
            raise UserError(
                f"bundle {self.name} has no {', '.join(lacking)}.", "ttmray weights list has other bundles."
            )

    def load(self, roles: Collection[str], options: LoadOptions) -> Models:
        """The models of some roles (of `ROLES`) on one device.

        Raises:
            UserError: the device or the weights are not there, or the weights do not fit.
        """
        unknown = set(roles) - set(ROLES)
        if unknown:
            raise ValueError(f"unknown roles {sorted(unknown)}")
        self.require(roles)
        makers = self._makers(options, resolve_device(options.device), "vocoder" in roles)
        return Models(**{role: makers[role]() for role in ROLES if role in roles and role != "vocoder"})


@dataclass(frozen=True)
class DebugBundle(Bundle):
    """Seeded, untrained models; `width` is a factor on their sizes, `rate` that of the latents' audio in Hz."""

    name: str
    width: int
    seed: int = 0
    rate: int = 44_100

    @property
    def note(self) -> str:  # type: ignore[override]
        return f"{self.name} bundle: models are tiny, seeded and untrained: scores and latents mean nothing"

    def roles(self) -> set[str]:
        return set(ROLES)

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        # Seeded weights also depend on the versions of the libraries that draw them.
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "demucs")}
        rate = {} if self.rate == 44_100 else {"rate": self.rate}
        return {"name": self.name, "seed": self.seed, "width": self.width, "versions": versions} | rate

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        return Protocol(text=reward_text, hashes=(("debug", f"seed{self.seed}-width{self.width}"),))

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        from ttmray.models import bigvgan
        from ttmray.models.backbone_weights import debug_backbone
        from ttmray.models.bigvgan import debug_bigvgan
        from ttmray.models.clap import debug_clap
        from ttmray.models.latents import LatentEncoder
        from ttmray.models.mert import debug_mert
        from ttmray.models.separator import debug_separator
        from ttmray.models.t5 import debug_text_encoder
        from ttmray.models.tunejury import debug_tunejury
        from ttmray.models.vae import debug_vae

        seed, width, batch, threads = self.seed, self.width, options.batch, options.threads

        def latents() -> "LatentEncoder":
            if self.rate == 44_100:
                generator = debug_bigvgan(seed) if vocoder else None
                return LatentEncoder(debug_vae(seed, 16 * width), options.clip_samples, device, generator)
            generator = debug_bigvgan(seed, num_mels=80, like=bigvgan.PUBLIC_16K) if vocoder else None
            return released.decoder_16k(debug_vae(seed, 16 * width, 20, 80), device, options, generator)

        return {
            "separator": lambda: separator_of(debug_separator(seed, width=4 * width), device, options),
            "clap": lambda: debug_clap(seed, width, device, batch, threads),
            "mert": lambda: debug_mert(seed, width, device, batch, threads),
            "tunejury": lambda: debug_tunejury(seed, 64 * width, device),
            "latents": latents,
            "text": lambda: debug_text_encoder(seed, width=width, device=device, batch=batch),
            "clap_condition": lambda: debug_clap(seed + 1, width, device, batch, threads),
            "backbone": lambda: debug_backbone(
                seed, width=width, text_dim=64 * width, device=device, latent_dim=40 if self.rate == 44_100 else 20
            ),
        }


@dataclass(frozen=True)
class ReleasedBundle(Bundle):
    """Released weights, from the cache of this machine or local copies (`ttmray weights`)."""

    name: str
    facts: Facts = field(default_factory=Facts)

    @property
    def sampling(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.facts.sampling

    def roles(self) -> set[str]:
        pooled = {"clap_condition"} if self.facts.pooled == "tokens" else set()
        return (set(self._entries(open_store())) - {"tokenizer"}) | pooled

    @property
    def licence_notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(licences(self.name))

    @property
    def note(self) -> str:  # type: ignore[override]
        return "; ".join(self.licence_notes)

    def _entries(self, store: Store) -> dict[str, str]:
        """Role -> name of the registry entry."""
        return {entry.role: entry.name for entry in store.of_bundle(self.name)}

    def weights(self, roles: Collection[str] | None = None) -> list[str]:
        entries = self._entries(open_store())
        if roles is not None and not {"clap", "clap_condition"}.isdisjoint(roles):
            roles = {*roles, "tokenizer"}
        if roles is not None and self.facts.pooled == "tokens" and "clap_condition" in roles:
            roles = {*roles, "text"}
        return [name for role, name in entries.items() if roles is None or role in roles]

    def _hashes(self, roles: Collection[str] | None = None) -> dict[str, str]:
        """`entry/file` -> SHA-256 of every file that decides a number, of some roles only or of all."""
        store = open_store()
        hashes: dict[str, str] = {}
        entries = self._entries(store)
        store.require([name for role, name in entries.items() if roles is None or role in roles])
        for role, name in entries.items():
            if roles is None or role in roles:
                entry_hashes = store.hashes(name)
                beside = _read_beside(role, next(iter(store.find(name).values())))
                if beside is not None and beside.is_file() and beside.name not in entry_hashes:
                    entry_hashes[beside.name] = digest_file(beside).sha256
                hashes |= {f"{name}/{file}": sha256 for file, sha256 in entry_hashes.items()}
        return hashes

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        if roles is not None and not {"clap", "clap_condition"}.isdisjoint(roles):
            roles = {*roles, "tokenizer"}
        own = {"pooled": self.facts.pooled} if self.facts.pooled != "clap" else {}
        return {"name": self.name, "weights": self._hashes(roles)} | own

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        hashes = self._hashes(("clap", "tokenizer", "mert", "tunejury"))
        return Protocol(text=reward_text, hashes=tuple(sorted(hashes.items())))

    def backbone_file(self) -> Path | None:
        return released.backbone_file(open_store(), self._entries(open_store()))

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        store = open_store()
        return released.makers(store, self._entries(store), self.facts, options, device, vocoder)

    def require(self, roles: Collection[str]) -> None:
        super().require(roles)
        open_store().require(self.weights(roles))


@dataclass(frozen=True)
class FolderBundle(Bundle):
    """Weights in a local folder (see `ttmray.models.folder_bundle`)."""

    files: FolderFiles

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.files.description.name

    @property
    def note(self) -> str:  # type: ignore[override]
        return self.files.description.note

    @property
    def clip_s(self) -> float:  # type: ignore[override]
        return self.files.description.clip_s

    @property
    def sampling(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.files.description.sampler

    def roles(self) -> set[str]:
        there = {role for role in ROLES if self.files.of_role(role)}
        return there | ({"vocoder"} if "latents" in there else set())  # Griffin-Lim needs no file

    def require(self, roles: Collection[str]) -> None:
        for role in (role for role in ROLES if role in roles and role not in self.roles()):
            self.files.folder(role)  # says where the bundle lies, and what to do

    def backbone_file(self) -> Path | None:
        return self.files.folder("backbone") / WEIGHTS if self.files.of_role("backbone") else None

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        return {"name": self.name, "weights": self.files.hashes(roles)}

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        hashes = self.files.hashes(("clap", "mert", "tunejury"))
        return Protocol(text=reward_text, hashes=tuple(sorted(hashes.items())))

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        return folder_bundle.makers(self.files, options, device, vocoder)


@dataclass(frozen=True)
class BundleOver(Bundle):
    """Another bundle in all but what a subclass says."""

    base: Bundle

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.base.name

    @property
    def note(self) -> str:  # type: ignore[override]
        return self.base.note

    @property
    def licence_notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.licence_notes

    @property
    def clip_s(self) -> float:  # type: ignore[override]
        return self.base.clip_s

    @property
    def sampling(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.base.sampling

    def roles(self) -> set[str]:
        return self.base.roles()

    def require(self, roles: Collection[str]) -> None:
        self.base.require(roles)

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        return self.base.identity(roles)

    def backbone_file(self) -> Path | None:
        return self.base.backbone_file()

    def weights(self, roles: Collection[str] | None = None) -> list[str]:
        return self.base.weights(roles)

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        return self.base.protocol(reward_text)

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        return self.base._makers(options, device, vocoder)


@dataclass(frozen=True)
class BundleWithHead(BundleOver):
    """A bundle whose rewards come from another head: that of a ranker run, or of a file."""

    head: RewardHead

    @property
    def note(self) -> str:  # type: ignore[override]
        own = f"rewards by the head {self.head.location} ({self.head.sha256[:12]})"
        return f"{self.base.note}; {own}" if self.base.note else own

    def roles(self) -> set[str]:
        return self.base.roles() | {"tunejury"}

    def require(self, roles: Collection[str]) -> None:
        self.base.require(set(roles) - {"tunejury"})

    def weights(self, roles: Collection[str] | None = None) -> list[str]:
        return self.base.weights(set(self.base.roles() if roles is None else roles) - {"tunejury"})

    def identity(self, roles: Collection[str] | None = None) -> dict[str, Any]:
        identity = self.base.identity(roles)
        return identity | {"head": self.head.id} if roles is None or "tunejury" in roles else identity

    def protocol(self, reward_text: Literal["empty", "caption"]) -> Protocol:
        return with_head(self.base.protocol(reward_text), self.head)

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        makers = self.base._makers(options, device, vocoder)
        return makers | {"tunejury": lambda: self.head.load(device=device)}


MICRO = FolderFiles(Path(__file__).with_name("micro"), "Install ttmray again: its own bundle is not whole.")
DEFAULT = "micro"
"""The bundle of whoever names none and wants to hear or score something."""
BUNDLES: dict[str, Bundle] = {
    **{name: ReleasedBundle(name, facts) for name, facts in RELEASED.items()},
    "micro": FolderBundle(MICRO),
    "debug": DebugBundle("debug", width=1),
    "debug-16k": DebugBundle("debug-16k", width=1, rate=16_000),
    "debug-wide": DebugBundle("debug-wide", width=4),
}


def base_name(bundle: str) -> str:
    """`paper` of `paper+runs/my-ranker`; of a folder, its path."""
    return bundle.partition("+")[0]


def means_nothing(bundle: str) -> bool:
    """Whether numbers are of untrained models, by the name of a bundle or by a protocol, which begins with it."""
    return isinstance(BUNDLES.get(base_name(bundle).partition("/")[0]), DebugBundle)


def identity_name(bundle: str) -> str:
    """`paper` of `paper+runs/my-ranker`; of a folder, its last part: where it lies decides nothing."""
    return base_name(bundle).rstrip("/").rpartition("/")[2]


def _with_absolute_paths(bundle: str) -> str:
    name, plus, head = bundle.partition("+")
    name = absolute(name) if _is_path(name) else name
    return f"{name}+{absolute(head)}" if plus else name


def _is_path(name: str) -> bool:
    return name not in BUNDLES and ("/" in name or os.path.isfile(f"{name}/{DESCRIPTION}"))  # also of names too long


BundleName = Annotated[str, AfterValidator(_with_absolute_paths), IdentityPart(identity_name)]
"""Field of configs. Where a head lies is no part of an identity: the bundle's own has its hash."""


def bundle_of(settings: Mapping[str, Any]) -> Bundle:
    """The bundle that the settings of a job name, before they are checked, without its head; else the default.

    Raises:
        UserError: there is no such bundle.
    """
    return open_bundle(base_name(str(settings.get("bundle", DEFAULT))))


def open_bundle(name: str) -> Bundle:
    """The bundle of that name or folder, or the same with another reward head: `paper+runs/my-ranker`.

    Raises:
        UserError: there is no such bundle or head, or the head was trained on features of other encoders.
    """
    name, plus, head = name.partition("+")
    base = _open_folder(name) if _is_path(name) else BUNDLES.get(name)
    if base is None:
        raise UserError(
            f"bundle: there is no bundle {name!r}.",
            f"Known bundles: {', '.join(BUNDLES)}; or name a folder with a {DESCRIPTION}.",
        )
    if not plus:
        return base
    bundle = BundleWithHead(base, open_head(head))
    require_same_encoders(bundle.head, bundle.base.identity(), f"bundle {name}")
    return bundle


def _open_folder(path: str) -> Bundle:
    if hub.is_hub(path):
        path = str(bundle_folder(path))
    if "://" in path:
        raise UserError(f"bundle {path}: a bundle's folder must be local.", "Copy it to every machine first.")
    bundle = FolderBundle(FolderFiles(Path(path), "Copy the whole folder again, or make the bundle again."))
    _ = bundle.name  # says now if it is none
    return bundle


def _read_beside(role: str, weights: Path) -> Path | None:
    """A file outside of the registry that the loader of a role reads where it lies beside its weights."""
    if role in ("clap", "clap_condition"):
        return weights.parent / "config.json"
    return weights.with_suffix(".json") if role == "tunejury" else None
