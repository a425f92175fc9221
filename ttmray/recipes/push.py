"""`ttmray push`: a finished model, ranker, bundle or corpus as a repository of the Hugging Face Hub, with its card.

What is uploaded is complete or absent: the files that say what it is (`ttmray.json`, and of a corpus `_SUCCESS.json`)
come with the last commit. The same command goes on after an interruption: what is there already, by its SHA-256, is
not sent again. Paths of this machine stay here.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ttmray import __version__, hub, inventory
from ttmray.console import console, meter
from ttmray.corpus.finalise import OF_UNITS
from ttmray.corpus.plan import PLAN_FILE, Plan
from ttmray.errors import EXIT_OK, UserError
from ttmray.json_text import read_json
from ttmray.models import published
from ttmray.models.folder_bundle import DESCRIPTION, FolderFiles
from ttmray.ranker.job import HEAD, METRICS
from ttmray.recipes.cards import dataset_card, file_card, model_card
from ttmray.recipes.licences import CARD, WEIGHT_ENDINGS, bundles_of, licence_for, parts_of
from ttmray.runs import RUN, SUCCESS, require_folder
from ttmray.storage import Folder, local_file, split_path
from ttmray.training.export import export

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

MODELS = ("sft", "crpo")
BATCH_FILES, BATCH_BYTES = 50, 2 << 30
"""Of a commit. Files of buckets are held in memory until it is made."""
MINE = ("shards/", "captions/", "index/", "scores/", "stats/")
"""Folders of a corpus: files there that the new one does not have are deleted from the repository."""


@dataclass(frozen=True)
class Upload:
    """What goes into a repository.

    Attributes:
        kind: `model`, `ranker`, `bundle` or `corpus`.
        card: README.md.
        about: facts for `ttmray.json`.
        files: name in the repository -> bytes, a local file, or a file of a folder.
        hashes: SHA-256 of files, where they are known.
        sizes: bytes of files that must be read into memory.
        last: files that say that all is there.
    """

    kind: str
    card: str
    about: Mapping[str, Any]
    files: Mapping[str, "bytes | Path | tuple[Folder, str]"]
    hashes: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    last: Collection[str] = ()


def push(
    path: str,
    repo: str,
    *,
    weights: str = "raw",
    license: str | None = None,
    name: str | None = None,
    evaluation: str | None = None,
    system: str | None = None,
    bundle: str | None = None,
    public: bool = False,
    new_card: bool = False,
) -> int:
    """Upload a finished run, a bundle's folder or a weights file; returns the exit code.

    Args:
        path: run of Stage 1 or 3, ranker run, corpus run, bundle's folder, or weights file; local or s3://.
        repo: `org/name`; made where it is not there.
        weights: of a training run: `raw`, or `ema:SIGMA`.
        license: identifier of the hub; default: that of the card in a bundle's folder, else the strictest that its
            parts ask for, else `other`.
        name, evaluation, system: for the card, see `model_card`.
        bundle: of a file that does not say what it was trained with; a run's own counts as well.
        public: everybody may see a repository that is made now.
        new_card: replace a card that is there.

    Raises:
        UserError: nothing that can be pushed, a licence that its parts do not allow, or what the hub refuses.
    """
    from huggingface_hub import HfFileSystem

    asked = hub.parsed(repo if hub.is_hub(repo) else f"{hub.PREFIX}{repo}")
    if asked.path_in_repo or asked.revision:
        raise UserError(f"{repo} is no name of a repository.", "ORG/NAME")
    if not path.endswith(WEIGHT_ENDINGS):
        require_folder(Folder.at(path))
    api = hub.client()
    bundles = bundles_of(path, bundle)
    parts = parts_of(path, bundles)
    license = licence_for(path, license, parts)
    with TemporaryDirectory(prefix="ttmray-push-") as scratch:
        card = {"name": name or asked.id.partition("/")[2], "license": license}
        upload = _collect(path, Path(scratch), weights, bundles, card, {"evaluation": evaluation, "system": system})
        exported = {"--weights": weights != "raw", "--evaluation": evaluation, "--system": system}
        if (idle := [flag for flag, value in exported.items() if value]) and "weights" not in upload.about:
            raise UserError(f"{', '.join(idle)}: {path} is no run of Stage 1 or 3.", "Leave it out.")
        kind = "dataset" if upload.kind == "corpus" else "model"
        if asked.type not in ("model", kind):
            raise UserError(f"{path} is no {asked.type}.", f"Push it to {kind}s: {asked.id}.")
        with hub.explained(f"{hub.PREFIX}{asked.id}"):
            api.create_repo(asked.id, repo_type=kind, private=not public, exist_ok=True)
            sent = _send(api, asked.id, kind, upload, new_card)
    HfFileSystem.clear_instance_cache()  # what this process has listed there is old now
    place = f"{'datasets/' if kind == 'dataset' else ''}{asked.id}"
    where, page = f"{hub.PREFIX}{place}", f"{hub.endpoint()}/{place}"
    console.print(
        f"{where}: {sent} of {len(upload.files) + 2} files sent, licence of a new card: {license}", markup=False
    )
    for entry, licence in parts.restricted.items():
        console.print(f"  it has parts of {entry}, {licence}: not for commercial use", markup=False)
    console.print(f"  the end of its card says what is left to fill in: {page}", markup=False)
    return EXIT_OK


def _collect(
    path: str,
    scratch: Path,
    weights: str,
    bundles: Sequence[str],
    card: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> Upload:
    """All files of a repository.

    Args:
        scratch: local folder for weights that are exported.

    Raises:
        UserError: nothing that can be pushed.
    """
    if path.endswith(WEIGHT_ENDINGS):
        return _file(path, bundles, card)
    folder = Folder.at(path)
    if folder.exists(DESCRIPTION) and not folder.remote:
        return _bundle(folder, card)
    kind = inventory.kind_of(folder)
    if kind in MODELS:
        file = scratch / hub.WEIGHTS
        text = model_card(path, **card, **evaluation)
        export(path, str(file), weights)
        about = {"bundle": next(iter(bundles), None), "weights": weights}
        about["fingerprint"] = folder.read_json(RUN, "fingerprint")["fingerprint"]
        return Upload("model", text, about, {hub.WEIGHTS: file})
    if kind == "ranker":
        text = model_card(path, **card)
        names = [name for name in (f"{HEAD}.safetensors", f"{HEAD}.json", METRICS) if folder.exists(name)]
        described = folder.read_json(RUN, "identity")
        public = ("kind", "fingerprint", "versions", "created")
        slim: dict[str, Any] = {key: described[key] for key in public if key in described}
        slim["identity"] = {"bundle": described["identity"]["bundle"]}
        files: dict[str, Any] = {name: (folder, name) for name in names}
        files |= {RUN: json.dumps(slim, indent=1).encode()}
        return Upload("ranker", text, {"bundle": next(iter(bundles), None)}, files, last=(RUN,))
    if kind == "corpus":
        return _corpus(folder, scratch, card)
    raise UserError(
        f"{path} is a run of kind {kind!r}, which is not pushed.",
        "Push a training run, a ranker run, a finished corpus, a bundle's folder, or a weights file.",
    )


def _file(path: str, bundles: Sequence[str], card: Mapping[str, Any]) -> Upload:
    local = local_file(path)
    name = hub.WEIGHTS if local.suffix == ".safetensors" else split_path(path)[1]
    about = {"bundle": next(iter(bundles), None), "file": name}
    return Upload("model", file_card(str(local), bundles, **card), about, {name: local})


def _bundle(folder: Folder, card: Mapping[str, Any]) -> Upload:
    own = FolderFiles(Path(folder.uri), "Make the bundle again.")
    for role in {name.partition("/")[0] for name in own.description.files}:
        own.folder(role)  # every file is what its description says
    files: dict[str, Any] = {name: Path(folder.path(name)) for name in (*own.description.files, DESCRIPTION)}
    hashes = {name: facts.sha256 for name, facts in own.description.files.items()}
    text = folder.read(CARD).decode() if folder.exists(CARD) else file_card(None, [], **card)
    return Upload("bundle", text, {"bundle": own.description.name}, files, hashes, last=(DESCRIPTION,))


def _corpus(run: Folder, scratch: Path, card: Mapping[str, Any]) -> Upload:
    text = dataset_card(run.uri, **card)
    marker = inventory.read_marker(run)
    assert marker is not None  # `dataset_card` looked
    listed = inventory.promised(run, marker)
    if RUN not in listed:
        raise UserError(f"{run} was finished by an older version.", "Start its command again: it seals its files.")
    own = _for_others(run, listed, Folder.at(str(scratch)))
    described = read_json(own[RUN])
    body = {key: value for key, value in marker.items() if key not in ("sha256", "fingerprint", "run", "files")}
    sealed = Folder.at(str(scratch))
    known = listed | {name: inventory.entry(data) for name, data in own.items()}
    inventory.seal(sealed, described, body, known, aside=OF_UNITS)
    files: dict[str, Any] = {name: (run, name) for name in listed} | own
    files |= {name: sealed.read(name) for name in (SUCCESS, inventory.FILES) if sealed.exists(name)}
    hashes = {name: known.sha256 for name, known in listed.items() if name not in own}
    sizes = {name: known.bytes for name, known in listed.items()} if run.remote else {}
    about = {"fingerprint": described["fingerprint"]}
    return Upload("corpus", text, about, files, hashes, sizes, (RUN, SUCCESS, inventory.FILES, "index.parquet"))


def _for_others(run: Folder, names: Collection[str], scratch: Folder) -> dict[str, bytes]:
    """Files of a corpus that name places of this machine, without them."""
    described = run.read_json(RUN, "fingerprint")
    own = {RUN: json.dumps(_without_paths(described), indent=1).encode()}
    plan = Plan.load(run)
    plan.at(plan.root.rstrip("/").rpartition("/")[2]).save(scratch)
    own[PLAN_FILE] = scratch.read(PLAN_FILE)
    places = sorted({run.uri, plan.root, *_paths(described)}, key=len, reverse=True)
    for name in names:
        if name.endswith((".md", ".json")) and name not in own and "/" not in name:
            text = data = run.read(name)
            for place in places:
                text = text.replace(place.encode(), place.rstrip("/").rpartition("/")[2].encode())
            own |= {name: text} if text != data else {}
    return own


def _paths(value: Any) -> Iterator[str]:
    """All paths and addresses in nested plain values."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(item)
    elif isinstance(value, str) and (value.startswith("/") or "://" in value):
        yield value


def _without_paths(value: Any) -> Any:
    """The same without folders of this machine and names of buckets: of each path its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (value.startswith("/") or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _send(api: "HfApi", repo: str, kind: str, upload: Upload, new_card: bool) -> int:
    """Commit what is not there yet, in groups, and last what says that all is there; returns how many files."""
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

    there = {
        file.path: (file.lfs.sha256 if file.lfs else "")
        for file in api.list_repo_tree(repo, recursive=True, repo_type=kind)
        if isinstance(file, RepoFile)
    }
    about = {"format": published.FORMAT, "kind": upload.kind, "ttmray": __version__, **upload.about}
    last: dict[str, Any] = {name: upload.files[name] for name in upload.last if name in upload.files}
    last[hub.ABOUT] = json.dumps(about, indent=1).encode()
    if CARD in there and not new_card:
        console.print(f"{repo} keeps its {CARD}, which may be edited by hand; --new-card replaces it", markup=False)
    else:
        last[CARD] = upload.card.encode()
    todo = {name: source for name, source in upload.files.items() if name not in last}
    done = [name for name in todo if name in there and there[name] and there[name] == upload.hashes.get(name)]
    groups = list(_groups({name: source for name, source in todo.items() if name not in done}, upload.sizes))
    with meter("files", len(todo) - len(done)) as progress:
        for number, group in enumerate(groups):
            additions = [_addition(name, source) for name, source in group.items()]
            api.create_commit(
                repo, additions, repo_type=kind, commit_message=f"ttmray push, part {number + 1} of {len(groups) + 1}"
            )
            progress.advance(len(group))
    operations: list[Any] = [_addition(name, source) for name, source in last.items()]
    if upload.kind == "corpus":
        stale = [name for name in there if name.startswith(MINE) and name not in upload.files]
        operations += [CommitOperationDelete(name) for name in stale]
    api.create_commit(repo, operations, repo_type=kind, commit_message=f"ttmray push: {upload.kind} complete")
    return len(todo) - len(done) + len(last)


def _groups(files: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Files of one commit each.

    Args:
        sizes: bytes of those that are in memory until their commit is made.
    """
    group: dict[str, Any] = {}
    size = 0
    for name, source in files.items():
        group[name] = source
        size += sizes.get(name, 0)
        if len(group) >= BATCH_FILES or size >= BATCH_BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group


def _addition(name: str, source: "bytes | Path | tuple[Folder, str]") -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    if isinstance(source, tuple):
        source = source[0].read(source[1]) if source[0].remote else Path(source[0].path(source[1]))
    return CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
