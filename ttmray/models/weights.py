"""Released weights on this machine: which there are, where they lie, and whether they are what they should be.

The registry (`weights.yaml`) names every file, its source and what it must hash to. Files live in
`<cache>/<entry>/<file>`; an entry can be replaced by a local copy. Hashes that nobody published are recorded at the
first pull in `<cache>/hashes.json` and checked ever after (trust on first use). Nothing is unpickled here, and nothing
but `Store.pull` uses the network.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from ttmray import hub
from ttmray.config import Config, load_config
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.local_files import fsync, fsync_folder
from ttmray.models.download import Remote, download, forget
from ttmray.storage import Folder, absolute, explained, local_file

Role = Literal[
    "clap", "clap_condition", "mert", "text", "separator", "tunejury", "latents", "vocoder", "tokenizer", "backbone"
]  # fmt: skip

# One path component each: they become folders and file names, and parts of an address.
_NAME = r"^[a-z0-9][a-z0-9._-]*$"
_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_REPO = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
_RESERVED = (".part", ".etag", ".rejected")


class HubSource(Config):
    """A repository of the Hugging Face hub."""

    repo: str = Field(pattern=_REPO)
    revision: str = Field(pattern=_FILE_NAME)
    """Commit or branch; only a commit says which bytes they are."""


class WeightFile(Config):
    """One file. What is None is not known from here."""

    name: str = Field(pattern=_FILE_NAME)
    url: str | None = Field(None, pattern=r"^https?://")
    """Address; None: the hub repository of the entry, under the same name."""
    size: int | None = Field(None, ge=0)
    """Bytes."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _no_reserved_ending(self) -> Self:
        if self.name.endswith(_RESERVED):
            raise ValueError(f"file names must not end in {', '.join(_RESERVED)}: {self.name!r}")
        return self


class Entry(Config):
    """The weights of one model."""

    name: str = Field(pattern=_NAME)
    role: Role
    """What it does in a bundle."""
    bundles: tuple[str, ...] = ()
    """Names of the bundles that use it."""
    hub: HubSource | None = None
    files: tuple[WeightFile, ...] = Field(min_length=1)
    approximate_size: int | None = Field(None, ge=0)
    """Bytes of all files, for people; only where the exact ones are not known."""
    licence: str
    """SPDX identifier of the weights' licence, or that it is not known."""
    non_commercial: bool = False
    credit: str

    @model_validator(mode="after")
    def _every_file_has_a_source(self) -> Self:
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: a file is listed twice")
        if self.hub is None and any(file.url is None for file in self.files):
            raise ValueError(f"{self.name}: a file without url needs the entry's hub repository")
        return self

    @property
    def variable(self) -> str:
        """Environment variable that points to a local copy."""
        return "TTMRAY_WEIGHTS_" + re.sub(r"[^A-Z0-9]", "_", self.name.upper())


class Registry(Config):
    """All known weights."""

    entries: tuple[Entry, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        variables = [entry.variable for entry in self.entries]
        twice = sorted({variable for variable in variables if variables.count(variable) > 1})
        if twice:
            raise ValueError(f"names that give the same variable: {', '.join(twice)}")
        return self


def load_registry(path: str | Path) -> Registry:
    """Registry from a YAML file of the form of `weights.yaml`.

    Raises:
        UserError: not such a file; names every field that is wrong.
    """
    return load_config(Registry, str(path))


@cache
def released() -> Registry:
    """The registry that comes with the package."""
    with resources.as_file(resources.files("ttmray.models") / "weights.yaml") as path:
        return load_registry(path)


@dataclass(frozen=True)
class Digest:
    """What a file's bytes are. `md5` is empty where nobody asked for it."""

    size: int
    sha256: str
    md5: str = ""


def digest_file(path: Path, md5: bool = False) -> Digest:
    """Hashes of a file, read once.

    Raises:
        UserError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    weak = hashlib.md5(usedforsecurity=False) if md5 else None  # integrity only: some authors publish nothing better
    size = 0
    with explained(str(path)), open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            sha256.update(block)
            if weak is not None:
                weak.update(block)
    return Digest(size, sha256.hexdigest(), weak.hexdigest() if weak is not None else "")


def mismatch(file: WeightFile, digest: Digest, recorded: str | None) -> str:
    """How a file differs from what is published and from what was recorded; empty when it does not."""
    expected = [
        ("size", file.size, digest.size, "published"),
        ("sha256", file.sha256, digest.sha256, "published"),
        ("md5", file.md5, digest.md5, "published"),
        ("sha256", recorded, digest.sha256, "recorded at the first pull"),
    ]
    for what, value, actual, origin in expected:
        if value is not None and value != actual:
            return f"{what} is {actual}, expected {value} ({origin})"
    return ""


@dataclass(frozen=True)
class Store:
    """The weights that one process can reach.

    Attributes:
        registry: what there is.
        folder: the cache.
        overrides: entry name -> local folder (or file, for an entry of one file) used in place of the cache.
        offline: never touch the network.
    """

    registry: Registry
    folder: Path
    overrides: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False

    def entry(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UserError: there is none.
        """
        for entry in self.registry.entries:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.registry.entries)
        raise UserError(f"There are no weights named {name!r}.", f"Known weights: {known}.")

    def of_bundle(self, bundle: str) -> list[Entry]:
        """The entries that a bundle uses.

        Raises:
            UserError: none does.
        """
        entries = [entry for entry in self.registry.entries if bundle in entry.bundles]
        if not entries:
            known = sorted({name for entry in self.registry.entries for name in entry.bundles})
            raise UserError(
                f"No weights belong to a bundle {bundle!r}.",
                f"Bundles with weights: {', '.join(known)}; debug bundles are made from a seed and need none.",
            )
        return entries

    def present(self, name: str) -> dict[str, Path]:
        """The files of an entry that are here: registry name -> path.

        In a local folder, `<stem>.safetensors` or `model.safetensors` may stand in for a torch checkpoint.
        """
        entry = self.entry(name)
        override = self.overrides.get(name)
        if override is None:
            paths = {file.name: self.folder / name / file.name for file in entry.files}
        elif len(entry.files) == 1 and not os.path.isdir(override):
            paths = {entry.files[0].name: Path(override)}
        else:
            paths = {file.name: _local(Path(override), file.name) for file in entry.files}
        return {file: path for file, path in paths.items() if path.is_file()}

    def find(self, name: str) -> dict[str, Path]:
        """All files of an entry: registry name -> path. Sizes are checked, hashes are not (`verify` does).

        Raises:
            UserError: a file is missing or has another size; says how to get it.
        """
        entry, paths = self.entry(name), self.present(name)
        missing = [file.name for file in entry.files if file.name not in paths]
        if name in self.overrides:
            if missing:
                raise UserError(
                    f"{self.overrides[name]} has no {', '.join(missing)}, the weights of {name}.",
                    f"It comes from the config or {entry.variable}: correct it, or leave it out to use the cache.",
                )
            return paths
        if missing:
            raise UserError(
                f"The weights of {name} are not here: no {', '.join(missing)} in {self.folder / name}.",
                f"Get them with: ttmray weights pull {name}",
            )
        records = self.records()
        for file in entry.files:
            size, path = records.get(f"{name}/{file.name}", {}).get("size", file.size), paths[file.name]
            if size is not None and path.stat().st_size != size:
                raise UserError(
                    f"{path} has {path.stat().st_size} bytes, expected {size}.",
                    f"Delete it, then get it again with: ttmray weights pull {name}",
                )
        return paths

    def require(self, names: Collection[str]) -> None:
        """See that all of some entries are here, before the first is loaded.

        Raises:
            UserError: some are not; names all of them, with their sizes and the one command.
        """
        missing = [name for name in names if name not in self.overrides and not self._whole(name)]
        if len(missing) < 2:
            for name in names:
                self.find(name)
            return
        sizes = {name: self._bytes(name) for name in missing}
        total = sum(size or 0 for size in sizes.values()) / 1e9
        listed = [f"{name} ({size / 1e6:,.0f} MB)" if size else name for name, size in sizes.items()]
        raise UserError(
            f"The weights of {', '.join(listed)} are not here: {len(missing)} of {len(names)}, about {total:,.1f} GB.",
            f"Get them with: ttmray weights pull {' '.join(missing)}",
        )

    def _whole(self, name: str) -> bool:
        return len(self.present(name)) == len(self.entry(name).files)

    def _bytes(self, name: str) -> int | None:
        """Of an entry, as far as it is known."""
        sizes = [file.size for file in self.entry(name).files]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else self.entry(name).approximate_size

    def hashes(self, name: str) -> dict[str, str]:
        """SHA-256 of every file of an entry, as recorded; what was never recorded (local copies) is computed.

        Raises:
            UserError: as `find`.
        """
        records = {} if name in self.overrides else self.records()
        return {
            file: records.get(f"{name}/{file}", {}).get("sha256") or digest_file(path).sha256
            for file, path in self.find(name).items()
        }

    def pull(self, name: str) -> None:
        """Brings all files of an entry here, and checks those that are here already. Says what it does.

        Raises:
            UserError: it cannot be reached, is refused by the server, does not fit on the disk, is not what it should
                be, or `offline` and not here.
        """
        entry = self.entry(name)
        if name in self.overrides:
            self.find(name)
            console.print(f"{name}: local copy {self.overrides[name]}, nothing to pull", markup=False)
            return
        with locked(self.folder):
            with explained(str(self.folder)):
                (self.folder / name).mkdir(exist_ok=True)
            for file in entry.files:
                self._pull_file(entry, file)

    def _pull_file(self, entry: Entry, file: WeightFile) -> None:
        label, path = f"{entry.name}/{file.name}", self.folder / entry.name / file.name
        recorded = self.records().get(label, {}).get("sha256")
        again = f"ttmray weights pull {entry.name}"
        if path.is_file():
            digest = digest_file(path, md5=file.md5 is not None)
            if problem := mismatch(file, digest, recorded):
                raise UserError(f"{path} is not the file it should be: {problem}.", f"Delete it, then: {again}")
            console.print(f"{label}: present")
        else:
            remote = _remote(entry, file)
            if self.offline:
                raise UserError(
                    f"{label} is not here and this is offline.",
                    f"Without --offline and TTMRAY_OFFLINE: {again}. Or set {entry.variable} to a local copy.",
                )
            part = path.with_name(path.name + ".part")
            download(remote, part, label, file.size, f"Or set {entry.variable} to a local copy.")
            digest = digest_file(part, md5=file.md5 is not None)
            if problem := mismatch(file, digest, recorded):
                rejected = path.with_name(path.name + ".rejected")
                os.replace(part, rejected)
                forget(part)
                way_out = f"It was kept as {rejected}. Try once more: {again}."
                if recorded is not None:
                    way_out += f" If you trust the new one, remove {label!r} from {self.folder / 'hashes.json'} first."
                raise UserError(f"{remote.url} gave something else: {problem}.", way_out)
            publish(part, path)
            forget(part)
        if recorded is None:
            self.record("files", label, {"sha256": digest.sha256, "size": digest.size})
            if file.sha256 is None and file.md5 is None:
                console.print(
                    f"{label}: nobody published its hash; sha256 {digest.sha256} is trusted now and checked ever after"
                )

    def records(self, section: str = "files") -> dict[str, dict[str, Any]]:
        """What hashes.json says: of "files" ("entry/file") or "converted" (absolute path).

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / "hashes.json"
        if not path.is_file():
            return {}
        with explained(str(path)):
            text = path.read_bytes()
        try:
            records = read_json(text).get(section, {})
            for record in records.values():
                record["sha256"], record["size"]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(
                f"{path} is damaged: {error!r}", "Delete it; the next pull trusts and records what is here."
            ) from error
        return records

    def record(self, section: str, name: str, value: Mapping[str, Any]) -> None:
        """Writes one record of hashes.json. The caller is inside `locked`."""
        records = {key: self.records(key) for key in ("files", "converted")}
        records[section][name] = dict(value)
        Folder.at(str(self.folder)).write("hashes.json", json.dumps(records, indent=1, sort_keys=True).encode())


def open_store(
    folder: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    offline: bool = False,
    registry: Registry | None = None,
) -> Store:
    """The weights of this machine.

    Args:
        folder: the cache; default TTMRAY_WEIGHTS, else ~/.cache/ttmray/weights.
        overrides: entry name -> local copy; TTMRAY_WEIGHTS_<NAME> of the environment counts where it says nothing.
        offline: also on when TTMRAY_OFFLINE is set (and not 0).
        registry: default `released()`.

    Raises:
        UserError: an override of an entry that does not exist.
    """
    registry = registry or released()
    root = folder or os.environ.get("TTMRAY_WEIGHTS") or "~/.cache/ttmray/weights"
    paths = {entry.name: os.environ.get(entry.variable, "") for entry in registry.entries} | dict(overrides or {})
    offline = offline or os.environ.get("TTMRAY_OFFLINE", "0") not in ("", "0")
    local = {name: absolute(path) for name, path in paths.items() if path}
    store = Store(registry, Path(absolute(str(root))), local, offline)
    for name in local:
        store.entry(name)
    return store


def licences(bundle: str, store: Store | None = None) -> list[str]:
    """One line per entry of a bundle, and what follows from the non-commercial ones.

    Raises:
        UserError: the bundle has no weights.
    """
    entries = (store or open_store()).of_bundle(bundle)
    lines = [f"{entry.name}: {licence_text(entry)} ({entry.credit})" for entry in entries]
    restricted = [entry.name for entry in entries if entry.non_commercial]
    if restricted:
        lines.append(f"{', '.join(restricted)}: not for commercial use.")
    if "tunejury" in restricted:
        lines.append("The CLAP-only head tunejury-a1 is Apache-2.0 and needs no MERT.")
    return lines


def licence_text(entry: Entry) -> str:
    """Licence, with the word that people must not miss."""
    return f"{entry.licence}, NON-COMMERCIAL" if entry.non_commercial else entry.licence


def publish(temporary: Path, final: Path) -> None:
    """Gives a complete file its name, durably, so that the name is never that of a half file."""
    with explained(str(final)):
        fsync(temporary)
        os.replace(temporary, final)
        fsync_folder(final.parent)


def _local(folder: Path, name: str) -> Path:
    candidates = [folder / name]
    if name.endswith((".pt", ".pth", ".bin")):
        candidates += [(folder / name).with_suffix(".safetensors"), folder / "model.safetensors"]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _remote(entry: Entry, file: WeightFile) -> Remote:
    if file.url is not None:
        return Remote(file.url)
    assert entry.hub is not None  # checked by the registry
    page = f"{hub.endpoint()}/{entry.hub.repo}"
    return Remote(f"{page}/resolve/{quote(entry.hub.revision)}/{quote(file.name)}", page)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside, per cache: two would append to the same partial file or lose a record."""
    with explained(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115 (closed below)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"another process uses {folder}, waiting for it", markup=False)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def weights_file(path: str, field: str) -> Path:
    """A weights file on this machine: itself, or a copy of a remote one.

    Args:
        field: of the config, for messages.

    Raises:
        UserError: there is no such file.
    """
    try:
        return local_file(path)
    except UserError as error:
        raise UserError(
            f"{field}: {error.message}", "Make one from a run: ttmray checkpoint export RUN --out FILE"
        ) from error
