"""Bundles that lie in a folder.

    bundle.json            what it is, and size and SHA-256 of every file
    clap/ clap_condition/  config.json, model.safetensors, vocab.json, merges.txt
    mert/ text/            hub folders of transformers
    separator/             a bag of Demucs models
    latents/               model.safetensors of the VAE
    vocoder/               config.json, model.safetensors; without it, spectrograms become audio by Griffin-Lim
    tunejury/              tunejury.safetensors and tunejury.json, as a ranker run leaves them
    backbone/              model.safetensors, as a training exports it

A role without a folder is not there, and who asks for it is told so.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models.loading import LoadOptions, clap_of, separator_of
from ttmray.models.reward_head import HEAD, open_head
from ttmray.models.weights import digest_file
from ttmray.storage import explained

DESCRIPTION = "bundle.json"
FORMAT = 1
WEIGHTS = "model.safetensors"
FOLDERS = ("separator", "clap", "mert", "tunejury", "latents", "text", "clap_condition", "backbone", "vocoder")


class FileFacts(BaseModel):
    """Of a file of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Description(BaseModel):
    """`bundle.json`. `files` are named below the folder, with `/`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    note: str
    clip_s: float = Field(gt=0)
    """Length of the clips that its backbone makes, in seconds."""
    sampler: dict[str, Any] = Field(default_factory=dict)
    """Settings of `generation.sampler.SamplerConfig` that its backbone needs, where nobody chooses others."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class FolderFiles:
    """A bundle's folder; every file is checked before it is used.

    Args:
        way_out: what to do about a damaged one.
    """

    path: Path
    way_out: str

    @cached_property
    def description(self) -> Description:
        """
        Raises:
            UserError: there is none, or it is damaged or of another format.
        """
        file = self.path / DESCRIPTION
        if not file.is_file():
            raise UserError(f"{self.path} is no bundle: {DESCRIPTION} is missing.", self.way_out)
        with explained(str(file)):
            text = file.read_text()
        try:
            plain = read_json(text)
            if isinstance(plain, Mapping) and plain.get("format") != FORMAT:
                raise UserError(
                    f"{file} is of format {plain.get('format')!r}; this ttmray reads format {FORMAT}.", self.way_out
                )
            return Description.model_validate(plain)
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}", self.way_out) from error

    def of_role(self, role: str) -> dict[str, FileFacts]:
        """Name below the folder -> facts."""
        return {name: facts for name, facts in self.description.files.items() if name.startswith(f"{role}/")}

    def folder(self, role: str) -> Path:
        """The folder of a role, all of whose files are there and whole.

        Raises:
            UserError: naming the role that the bundle lacks, or the file that is missing, cut or changed.
        """
        files = self.of_role(role)
        if not files:
            there = sorted({name.partition("/")[0] for name in self.description.files})
            raise UserError(
                f"bundle {self.description.name} in {self.path} has no {role}.",
                f"It has {', '.join(there)}. Name another bundle for this.",
            )
        for name, facts in files.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is missing.", self.way_out)
            size = file.stat().st_size
            if size != facts.size:
                raise UserError(f"{file} has {size:,} bytes, and should have {facts.size:,}.", self.way_out)
            if digest_file(file).sha256 != facts.sha256:
                raise UserError(f"{file} is damaged: its SHA-256 is not that of {DESCRIPTION}.", self.way_out)
        return self.path / role

    def hashes(self, roles: Collection[str] | None) -> dict[str, str]:
        """`role/file` -> SHA-256, of some roles or of all."""
        chosen = FOLDERS if roles is None else [role for role in FOLDERS if role in roles]
        return {name: facts.sha256 for role in chosen for name, facts in sorted(self.of_role(role).items())}


def describe_folder(
    path: Path, name: str, note: str, clip_s: float, sampler: Mapping[str, Any] | None = None, **more: Any
) -> Description:
    """Write `bundle.json` for the files that lie in the folders of the roles, last of all files."""
    files = {}
    for role in FOLDERS:
        for file in sorted((path / role).glob("*")):
            facts = digest_file(file)
            files[f"{role}/{file.name}"] = FileFacts(size=facts.size, sha256=facts.sha256)
    description = Description(
        format=FORMAT, name=name, note=note, clip_s=clip_s, sampler=dict(sampler or {}), files=files
    )
    (path / DESCRIPTION).write_text(json.dumps(description.model_dump() | more, indent=1) + "\n")
    return description


def makers(files: FolderFiles, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
    """Role -> what builds it (see `Bundle._makers`)."""
    from ttmray.models.backbone_weights import load_backbone
    from ttmray.models.bigvgan import load_bigvgan
    from ttmray.models.griffin_lim import GriffinLim
    from ttmray.models.latents import LatentEncoder
    from ttmray.models.mert import load_mert
    from ttmray.models.separator import load_separator
    from ttmray.models.t5 import load_text_encoder
    from ttmray.models.vae import load_vae

    def clap(role: str) -> Any:
        folder = files.folder(role)
        return clap_of(folder / WEIGHTS, folder, device, options)

    def latents() -> LatentEncoder:
        vae = load_vae(files.folder("latents") / WEIGHTS)
        generator: Any = None
        if vocoder:
            learned = bool(files.of_role("vocoder"))
            generator = load_bigvgan(files.folder("vocoder") / WEIGHTS) if learned else GriffinLim()
        return LatentEncoder(vae, options.clip_samples, device, generator)

    return {
        "separator": lambda: separator_of(load_separator(files.folder("separator")), device, options),
        "clap": lambda: clap("clap"),
        "mert": lambda: load_mert(files.folder("mert"), device=device, batch=options.batch, threads=options.threads),
        "tunejury": lambda: open_head(str(files.folder("tunejury") / f"{HEAD}.safetensors")).load(device=device),
        "latents": latents,
        "text": lambda: load_text_encoder(files.folder("text"), device=device, batch=options.batch),
        "clap_condition": lambda: clap("clap_condition"),
        "backbone": lambda: load_backbone(str(files.folder("backbone") / WEIGHTS), device=device),
    }
