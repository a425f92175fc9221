"""`ttmray weights ...`: what each command does and prints. All return exit codes."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ttmray.console import console
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.local_files import TEMPORARY_PREFIX
from ttmray.models.bundle import BUNDLES, FolderBundle
from ttmray.models.weights import (
    Entry,
    Store,
    WeightFile,
    digest_file,
    licence_text,
    licences,
    locked,
    mismatch,
    open_store,
    publish,
)
from ttmray.storage import explained

if TYPE_CHECKING:
    import torch

_CONTAINERS = ("state_dict", "generator")  # of LAION-CLAP and TuneJury; of BigVGAN


def list_weights(store: Store | None = None) -> int:
    """Tables of all weights and of all bundles. Reads no file but the registry and the records."""
    store = store or open_store()
    records = store.records()
    table = Table("name", "role", "bundles", "size", "licence", "here", "hashes", title=str(store.folder))
    for entry in store.registry.entries:
        here = f"{len(store.present(entry.name))} of {len(entry.files)}"
        if entry.name in store.overrides:
            here = f"local copy: {store.overrides[entry.name]}"
        size, bundles = _size(entry, records), ", ".join(entry.bundles)
        cells = (entry.name, entry.role, bundles, size, licence_text(entry), here)
        table.add_row(*cells, _hash_state(entry, records))
    console.print(table)
    console.print(_bundles(store, records))
    console.print("A bundle's weights come here by: ttmray weights pull --bundle NAME")
    return EXIT_OK


def _bundles(store: Store, records: Mapping[str, Any]) -> Table:
    """What each bundle can do, how much there is of it, and what must be known of its licences."""
    from ttmray.models.bundle import BUNDLES, DebugBundle

    table = Table("bundle", "makes sound", "size", "here", "licences", title="bundles")
    for name, bundle in BUNDLES.items():
        entries = [entry for entry in store.registry.entries if name in entry.bundles]
        roles = {entry.role for entry in entries} if entries else bundle.roles()
        sound = "with a checkpoint of yours" if "vocoder" in roles else "no"
        if "backbone" in roles:
            sound = "noise: untrained" if isinstance(bundle, DebugBundle) else "yes"
        if not entries:
            table.add_row(name, sound, "comes with ttmray", "yes", "")
            continue
        there = sum(len(store.present(entry.name)) == len(entry.files) for entry in entries)
        restricted = [entry.name for entry in entries if entry.non_commercial]
        licence = f"NON-COMMERCIAL: {', '.join(restricted)}" if restricted else "free"
        table.add_row(name, sound, _total(entries, records), f"{there} of {len(entries)}", licence)
    return table


def pull(
    names: Sequence[str] = (), *, bundle: str | None = None, everything: bool = False, store: Store | None = None
) -> int:
    """Brings weights here: named ones, those of a bundle, or all. Says under which licences first.

    Raises:
        UserError: nothing was asked for, an unknown name or bundle, or what `Store.pull` raises.
    """
    store = store or open_store()
    entries = [store.entry(name) for name in names]
    if bundle is not None:
        entries += store.of_bundle(bundle)
        for line in licences(bundle, store):
            console.print(line, markup=False)
    if everything:
        entries = list(store.registry.entries)
    if not entries:
        raise UserError("Which weights?", "Name some of `ttmray weights list`, or use --bundle paper, or --all.")
    # backbones first: whether they are where the registry says is the least sure, and hours of others would be in vain
    for entry in sorted(dict.fromkeys(entries), key=lambda entry: entry.role != "backbone"):
        if bundle is None:
            console.print(f"{entry.name}: {licence_text(entry)} ({entry.credit})", markup=False)
        store.pull(entry.name)
    return EXIT_OK


def verify(store: Store | None = None) -> int:
    """Hashes every file that is here and compares with the registry and the records; 2 if any differs, if an entry that
    was here has lost files, or if nothing is here at all.

    A local copy may differ from what is published (converted or fine-tuned): that is said and is no failure. Entries
    that were never fetched are listed and are no failure either where there are others.
    """
    store = store or open_store()
    records, bad, checked = store.records(), 0, 0
    absent: list[str] = []
    lost: list[str] = []
    for entry in store.registry.entries:
        paths = store.present(entry.name)
        checked += len(paths)
        if len(paths) < len(entry.files):
            ours = paths or any(f"{entry.name}/{file.name}" in records for file in entry.files)
            (lost if ours else absent).append(entry.name)
        for file in entry.files:
            label = f"{entry.name}/{file.name}"
            if file.name not in paths:
                console.print(f"missing  {label}", markup=False)
                continue
            local = entry.name in store.overrides
            recorded = None if local else records.get(label, {}).get("sha256")
            state, problem = _check(file, paths[file.name], recorded)
            if local:
                console.print(f"local    {label}: {paths[file.name]} {problem or state}", markup=False)
            elif problem:
                bad += 1
                console.print(f"WRONG    {paths[file.name]}: {problem}", markup=False)
            else:
                console.print(f"{state}  {label}")
    for name, record in store.records("converted").items():
        if os.path.isfile(name):
            checked += 1
            digest = digest_file(Path(name))
            differs = digest.sha256 != record["sha256"]
            bad += differs
            console.print(f"{'WRONG  ' if differs else 'ok     '}  {name} (converted)", markup=False)
    if bad:
        console.print(f"{bad} of the files are not what they should be; delete them and pull again")
    if lost:
        console.print(f"not whole; get what is missing with: ttmray weights pull {' '.join(lost)}", markup=False)
    if absent:
        console.print(
            f"not here: {', '.join(absent)}. Get those of a bundle with: ttmray weights pull --bundle NAME, or "
            "one with: ttmray weights pull NAME",
            markup=False,
        )
    if not checked:
        console.print(f"nothing was verified: no weights are in {store.folder}", style="red", markup=False)
    return EXIT_BAD_INPUT if bad or lost or not checked else EXIT_OK


def where(name: str, store: Store | None = None) -> int:
    """Paths of the files of an entry, or of a bundle that ships with the package, one per line.

    Raises:
        UserError: as `Store.find`.
    """
    bundle = BUNDLES.get(name)
    if isinstance(bundle, FolderBundle):
        files = [bundle.files.path / file for file in bundle.files.description.files]
    else:
        files = list((store or open_store()).find(name).values())
    for path in files:
        console.print(str(path), markup=False)
    return EXIT_OK


def convert(path: str | Path, out: str | Path | None = None, store: Store | None = None) -> int:
    """Writes the tensors of a torch checkpoint as safetensors, once; the result loads without any unpickling.

    Weights are the checkpoint itself or its "state_dict" or "generator"; names and bits stay as they are. Plain values
    among them and everything beside them (epoch, optimiser) are left out and named.

    Args:
        path: .pt, .pth, .th, .bin or .ckpt.
        out: default: beside it, with the ending .safetensors. Never overwritten.
        store: records the hashes; default `open_store()`.

    Raises:
        UserError: an unsafe or unreadable checkpoint, values that are neither tensors nor plain, an existing `out`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ttmray.models.state_dicts import read_state_dict

    store = store or open_store()
    source = Path(path)
    target = Path(os.path.abspath(out or source.with_suffix(".safetensors")))
    if source.suffix == ".safetensors":
        raise UserError(f"{source} is a safetensors file already.", "Use it as it is.")
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors.", "Loaders go by it.")
    if target.exists():
        raise UserError(f"{target} exists.", "Delete it to convert once more.")
    tensors, left_out = _tensors(read_state_dict(source), str(source))
    digest = digest_file(source)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    with explained(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {"format": "pt", "source": source.name, "source_sha256": digest.sha256})
            publish(temporary, target)
        except SafetensorError as error:  # also what a full disk looks like here
            raise UserError(f"{target} was not written: {error}", "Check the space on that disk.") from error
        finally:
            temporary.unlink(missing_ok=True)
    written = digest_file(target)
    with locked(store.folder):
        record = {"sha256": written.sha256, "size": written.size, "source": source.name, "source_sha256": digest.sha256}
        store.record("converted", str(target), record)
    console.print(f"{target}: {len(tensors)} tensors, sha256 {written.sha256}", markup=False)
    if left_out:
        console.print(f"left out: {', '.join(left_out)}", markup=False)
    return EXIT_OK


def _total(entries: Sequence[Entry], records: Mapping[str, Any]) -> str:
    """Of a bundle, for people."""
    sizes = [_bytes(entry, records) for entry in entries]
    known = sum(size for size, _ in sizes if size is not None) / 1e9
    return f"{'' if all(exact for _, exact in sizes) else 'about '}{known:,.1f} GB"


def _size(entry: Entry, records: Mapping[str, Any]) -> str:
    size, exact = _bytes(entry, records)
    return "unknown" if size is None else f"{'' if exact else 'about '}{size / 1e6:,.0f} MB"


def _bytes(entry: Entry, records: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Of an entry, and whether that is exact."""
    sizes = [file.size or records.get(f"{entry.name}/{file.name}", {}).get("size") for file in entry.files]
    known = [size for size in sizes if size is not None]
    return (sum(known), True) if len(known) == len(sizes) else (entry.approximate_size, False)


def _hash_state(entry: Entry, records: Mapping[str, Any]) -> str:
    published = [file.sha256 is not None or file.md5 is not None for file in entry.files]
    recorded = [f"{entry.name}/{file.name}" in records for file in entry.files]
    if all(published):
        return "published"
    if all(known or mine for known, mine in zip(published, recorded, strict=True)):
        return "recorded at first pull"
    return "none yet: first pull is trusted"


def _check(file: WeightFile, path: Path, recorded: str | None) -> tuple[str, str]:
    """State for a line of `verify`, and the problem if there is one."""
    problem = mismatch(file, digest_file(path, md5=file.md5 is not None), recorded)
    checked = recorded is not None or file.sha256 is not None or file.md5 is not None
    return "ok     " if checked else "unknown", problem


def _tensors(checkpoint: Mapping[str, Any], what: str) -> tuple[dict[str, "torch.Tensor"], list[str]]:
    """The weights, each with memory of its own, and the names of what was left out."""
    import torch

    container = next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
    weights = checkpoint if container is None else checkpoint[container]
    left_out = [] if container is None else sorted(str(key) for key in checkpoint if key != container)
    tensors: dict[str, torch.Tensor] = {}
    refused = []
    seen: set[int] = set()
    for key, value in weights.items():
        if isinstance(value, torch.Tensor) and isinstance(key, str):
            tensors[key] = _own(value.detach(), seen)
        elif value is None or isinstance(value, bool | int | float | str):  # numpy's float64 is a float
            left_out.append(f"{key} ({value!r})")
        else:
            refused.append(f"{key} ({type(value).__name__})")
    if refused or not tensors:
        problem = f"{', '.join(refused[:6])} are no tensors" if refused else "there are no tensors in it"
        raise UserError(
            f"{what} cannot become safetensors: {problem}.",
            "It must be a dictionary of weights, alone or under 'state_dict' or 'generator'.",
        )
    return tensors, left_out


def _own(tensor: "torch.Tensor", seen: set[int]) -> "torch.Tensor":
    """The tensor, copied where safetensors could not write it: memory shared with another one, or with gaps."""
    storage = tensor.untyped_storage()
    shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
    seen.add(storage.data_ptr())
    return tensor.clone().contiguous() if shared or not tensor.is_contiguous() else tensor
