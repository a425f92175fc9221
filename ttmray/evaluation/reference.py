"""Reference sets: embeddings of real music that FAD and KAD measure generated clips against.

Built once from a folder or bucket of audio, or from a corpus run (whose embeddings are there already), and kept under a
name such as `sdd-706`: `clap.safetensors` (n, 512), `gaussian.safetensors` (what FAD needs of it), `tracks.parquet` (id
and track of every row), and `reference.json`, which is written last and says under which protocol it was made. One
audio file is one row, the 10 s in its middle: as it is (`mix`), or without vocals (`instrumental`), made of it as the
corpus job makes that of a clip. A corpus gives a row per clip, of either stem. The paper's sets are instrumental;
`docs/references.md` has the commands.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ttmray import inventory
from ttmray.config import differences, fingerprint
from ttmray.console import console
from ttmray.corpus import index, shards
from ttmray.corpus.catalogue import track_ids
from ttmray.corpus.config import SeparationConfig
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.evaluation.fad import Gaussian
from ttmray.evaluation.measure import OK, MeasureConfig, embedding_protocol, measure, separation_identity
from ttmray.evaluation.metrics import KadReference
from ttmray.evaluation.systems import audio_files
from ttmray.json_text import read_json
from ttmray.models.bundle import DEFAULT, Bundle, base_name, open_bundle
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.models.protocol import Protocol
from ttmray.models.scoring import Scorer
from ttmray.models.weights import open_store
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import BAD_NAME, Folder, name_problem, parquet_table, shown_name
from ttmray.training.clips import read_keys

STORE = "~/.cache/ttmray/references"
ABOUT, CLAP, GAUSSIAN, TRACKS = "reference.json", "clap.safetensors", "gaussian.safetensors", "tracks.parquet"
Stem = Literal["mix", "instrumental"]
Split = Literal["train", "validation", "test", "all"]
IDENTITY = ("source", "made_from", "protocol", "stem", "split", "separation", "keys")
"""What one name stands for, of `reference.json`; absent where it does not apply."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_READERS = 8


class ReferenceConfig(MeasureConfig):
    """`ttmray reference build`: where and how fast, and how vocals are removed from a folder's audio."""

    separation: SeparationConfig = SeparationConfig()
    """As the section of a corpus job; clips are separated, whole tracks cannot be."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings and where they are from.

    Attributes:
        about: `reference.json`.
        tracks: (n,) track id of each row; several clips may share one.
        clap: (n, 512) float32 unit vectors, row i of tracks[i], in one array or several after each other.
    """

    about: dict[str, Any]
    tracks: list[str]
    clap: list[np.ndarray]
    gaussian: Gaussian | None = None

    def for_fad(self) -> np.ndarray | Gaussian:
        """Statistics where they say all, the rows where there are no more of them than dimensions."""
        if self.gaussian is None or self.gaussian.n <= len(self.gaussian.mean):
            return self.rows()
        return self.gaussian

    @cached_property
    def for_kad(self) -> KadReference:
        return KadReference(self.rows())

    def rows(self) -> np.ndarray:
        return self.clap[0] if len(self.clap) == 1 else np.concatenate(self.clap)

    def digest(self) -> str:
        """SHA-256 of what results depend on: embeddings, track ids and protocol."""
        sha = hashlib.sha256(json.dumps([self.about["protocol"], self.tracks]).encode())
        for part in self.clap:
            sha.update(np.ascontiguousarray(part).data)
        return sha.hexdigest()


def build_reference(
    name: str,
    source: str,
    *,
    store: str = STORE,
    bundle: str = DEFAULT,
    stem: str | None = None,
    split: str = "all",
    keys: str | None = None,
    max_failures: int = 0,
    runtime: MeasureConfig | None = None,
    plan_only: bool = False,
) -> int:
    """Build, or go on building, a reference set; returns the exit code.

    Args:
        name: letters, digits, `.`, `_` and `-`.
        source: folder or bucket of audio, or a corpus run.
        store: folder of all reference sets, local or s3://.
        stem: `mix` or `instrumental`; default: the instrumentals of a corpus run, a folder of audio as it is.
        split: of a corpus run.
        keys: file of the clip keys of a corpus run to take, see `training.clips.read_keys`; default: all.
        max_failures: with more tracks that cannot be measured than this, nothing is kept but what is measured.
        plan_only: say what would be done, and stop.

    Raises:
        UserError: for everything that the user can mend, also a name that belongs to another set.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a reference set.", "Use letters, digits, '.', '_' and '-'.")
    if stem not in (None, *get_args(Stem)) or split not in get_args(Split):
        raise UserError(f"stem {stem!r}, split {split!r}: unknown.", f"{get_args(Stem)}, {get_args(Split)}.")
    folder, origin = Folder.at(store).sub(name), Folder.at(source)
    chosen = open_bundle(bundle)
    protocol = embedding_protocol(chosen.name, chosen.protocol("empty"))
    from_corpus = _corpus_run(origin) is not None
    what: dict[str, Any] = {"source": origin.uri, "made_from": "corpus" if from_corpus else "folder"}
    what |= {"protocol": protocol, "stem": stem or ("instrumental" if from_corpus else "mix")}
    selected = separation = None
    if from_corpus:
        what["split"] = split
        if keys is not None:
            selected = frozenset(read_keys(keys))
            what["keys"] = fingerprint(sorted(selected))
    elif keys is not None:
        raise UserError(f"keys: {origin} is a folder of audio.", "Keys choose clips of a corpus run.")
    elif split != "all":
        raise UserError(f"split: {origin} is a folder of audio.", "Splits are those of a corpus run.")
    elif (kind := _other_run(origin)) is not None:
        raise UserError(
            f"{origin} is a run of kind {kind}: what a model has made, or no songs at all, is no reference.",
            "Name a folder of recordings, or a corpus run.",
        )
    elif stem == "instrumental":
        separation = _separation(runtime)
        what["separation"] = separation_identity(bundle, separation)
    _refuse_another(folder, name, what)
    if plan_only:
        return _show_plan(origin, folder, chosen, what, runtime or MeasureConfig())
    inventory.reopen(folder, "reference")
    if chosen.note:
        console.print(chosen.note, style="yellow")
    if from_corpus:
        stems = (("mix", "instrumental").index(what["stem"]),)
        parts = list(_corpus_parts(origin, protocol, stems, split, selected))
        ids, tracks = ([one for part in parts for one in part[i]] for i in (0, 1))
        rows = _Rows(ids, tracks, np.concatenate([part[2] for part in parts]), {}, 0)
    else:
        rows = _folder_rows(origin, folder, bundle, runtime, separation)
        if rows.failed > max_failures:
            console.print(f"{rows.failed} tracks failed, {max_failures} are allowed; not built", style="red")
            return EXIT_TOO_MANY_FAILURES
    if len(rows.clap) < 2:
        count = len(rows.clap)
        raise UserError(f"{source}: {count} clips make no reference set.", "Two are the least, hundreds are usual.")
    about: dict[str, Any] = {"kind": "reference", "name": name, **what, "bundle": bundle, "note": chosen.note}
    _write(folder, about, rows)
    return EXIT_OK


def _show_plan(origin: Folder, folder: Folder, bundle: Bundle, what: dict[str, Any], runtime: MeasureConfig) -> int:
    done = inventory.finished(folder)
    if what["made_from"] == "corpus":
        rows = [("clips", f"those of {origin}", "their embeddings are taken from the shards: seconds")]
        return show_plan(rows, folder, not done, None, runtime, "no model runs")
    todo = 0 if done else len(audio_files(origin))
    models = ("clap", "separator") if what["stem"] == "instrumental" else ("clap",)
    flops, of = embedding_flops(bundle, todo, models)
    rows = [
        ("tracks", f"{todo:,} to embed", f"{what['stem']} of {origin}; what is measured already is taken"),
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, models),
    ]
    return show_plan(rows, folder, todo, flops, runtime, f"{of}, a clip of each track")


def _other_run(origin: Folder) -> str | None:
    """Kind of a run that is no corpus, or of a result that is no folder of songs; None for a plain folder."""
    if not origin.exists(RUN) and not origin.exists(SUCCESS):
        return None
    kind = inventory.kind_of(origin)
    return None if kind == "postprocess" else kind  # songs at another level are songs


def _refuse_another(folder: Folder, name: str, what: dict[str, Any]) -> None:
    if not folder.exists(ABOUT):
        return
    try:
        inventory.checked(folder.path(ABOUT))
        old = _about(folder)
    except UserError:
        return  # damaged: the same command writes it again
    changed = differences({key: old[key] for key in IDENTITY if key in old}, what)
    if changed:
        raise UserError(
            f"the reference {name} is another one:\n    " + "\n    ".join(changed),
            f"Choose another name, or delete {folder}.",
        )


@dataclass(frozen=True, eq=False)
class _Rows:
    """What a set holds, see `Embedded`; `facts` are further columns of its table, `failed` counts what is missing."""

    ids: list[str]
    tracks: list[str]
    clap: np.ndarray
    facts: dict[str, list[Any]]
    failed: int


def _folder_rows(
    origin: Folder, folder: Folder, bundle: str, runtime: MeasureConfig | None, separation: SeparationConfig | None
) -> _Rows:
    """Every audio file of a folder, measured or taken from the parts of an earlier launch; failures are printed."""
    every = audio_files(origin)
    odd = {file: problem for file in every if (problem := name_problem(file))}
    names = [file for file in every if file not in odd]
    sources = [(origin.path(file), "") for file in names]
    config = runtime or MeasureConfig()
    plain = MeasureConfig(**{name: getattr(config, name) for name in MeasureConfig.model_fields})
    rows, _ = measure(sources, bundle, "empty", folder, plain, "tracks", True, separation)
    bad = [(file, row) for file, row in zip(names, rows, strict=True) if row["status"] != OK]
    told = [f"{file}: {row['reason']}: {row['message']}" for file, row in bad]
    told += [f"{shown_name(file)}: {BAD_NAME}: {problem}" for file, problem in odd.items()]
    for line in told[:5]:
        console.print(f"  {line}", markup=False)
    good = [i for i, row in enumerate(rows) if row["status"] == OK]
    tracks = track_ids(names)
    facts = {key: [rows[i][key] for i in good] for key in ("sha256", "duration_s", "reward", "lufs")}
    clap = np.stack([rows[i]["clap"] for i in good]) if good else np.zeros((0, 512), np.float32)
    return _Rows([names[i] for i in good], [tracks[i] for i in good], clap, facts, len(told))


def _write(folder: Folder, about: dict[str, Any], rows: _Rows) -> None:
    clap, protocol = rows.clap, about["protocol"]
    gaussian = Gaussian.of(clap, protocol)
    if len(clap) <= clap.shape[1]:
        console.print(
            f"{len(clap)} reference clips are no more than {clap.shape[1]} dimensions: FAD against them is too "
            "high and only good for comparing systems with each other",
            style="yellow",
        )
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": rows.ids, "track_id": rows.tracks, **rows.facts}), sink)
    folder.write(TRACKS, sink.getvalue())
    folder.write(CLAP, save_tensors({"clap": clap}))
    gaussian.save(folder.path(GAUSSIAN))
    about |= {"n": len(clap), "tracks": len(set(rows.tracks)), "dimension": clap.shape[1], "failed": rows.failed}
    about["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    folder.write(ABOUT, json.dumps(about, indent=1).encode())
    inventory.note(folder, "reference", (TRACKS, CLAP, GAUSSIAN, ABOUT))
    console.print(
        f"{folder}: {len(clap)} clips ({about['stem']}) of {about['tracks']} tracks, {protocol}", markup=False
    )


def load_reference(address: str, store: str, protocol: str, stem: str | None = None) -> Embedded:
    """A reference set by its name in the store, or by its folder (an address with a slash).

    Args:
        stem: what it must hold; None: anything.

    Raises:
        UserError: there is none, it is damaged, or it was made under another protocol or of another stem.
    """
    bundle = protocol.partition("/")[0]
    folder = _place(address, store, bundle, stem)
    parent, options = folder.uri.rpartition("/")[0], _options(folder, bundle, stem)
    about = _about(folder)
    if stem is not None and about["stem"] != stem:
        raise UserError(
            f"the reference {address} is of stem {about['stem']}, reference_stem is {stem}: FAD against it would be of "
            "another kind.",
            f"Build one under another name: ttmray reference build NAME {about.get('source', 'SOURCE')} {options}",
        )
    if about["protocol"] != protocol:
        raise UserError(
            f"the reference {address} was made under {about['protocol']}, these clips are under {protocol}.",
            f"Build one with the same bundle, under another name: ttmray reference build NAME {about['source']} "
            f"--stem {about['stem']} --bundle {protocol.partition('/')[0]} --store {parent}",
        )
    try:
        inventory.checked(folder.path(GAUSSIAN))
        clap = load_tensors(inventory.checked(folder.path(CLAP)))["clap"]
        tracks = parquet_table(inventory.checked(folder.path(TRACKS)))["track_id"].to_pylist()
    except (SafetensorError, KeyError, ValueError, OSError, pa.ArrowException) as error:
        raise UserError(f"{folder} is damaged: {error}", "Delete it and build it again.") from error
    gaussian = Gaussian.load(folder.path(GAUSSIAN))
    if not len(clap) == len(tracks) == gaussian.n or clap.ndim != 2 or gaussian.protocol != protocol:
        raise UserError(f"{folder} is damaged: its files do not belong together.", "Delete it and build it again.")
    return Embedded(about, tracks, [clap], gaussian)


def _place(address: str, store: str, bundle: str, stem: str | None) -> Folder:
    folder = Folder.at(address) if "/" in address else Folder.at(store).sub(address)
    name = folder.name
    if not folder.exists(ABOUT):
        raise UserError(
            f"reference {address}: there is none at {folder}.",
            f"Build it: ttmray reference build {name} SOURCE {_options(folder, bundle, stem)}",
        )
    return folder


def _options(folder: Folder, bundle: str, stem: str | None) -> str:
    """Of the command that builds a set in the place of this one."""
    options = f"--bundle {bundle} --store {folder.uri.rpartition('/')[0]}"
    return f"--stem {stem} {options}" if stem else options


def reference_there(
    address: str, store: str, bundle: str, reward_text: Literal["empty", "caption"], stem: str | None = None
) -> None:
    """Whether a reference set is there, of its stem, and, where the weights of the bundle are, made with them.

    A reward head of the bundle's is no part of a reference, and may not be trained yet.

    Raises:
        UserError: as `load_reference`.
    """
    about = _about(_place(address, store, base_name(bundle), stem))
    protocol = known_protocol(bundle, reward_text)
    if protocol is not None or (stem is not None and about["stem"] != stem):
        load_reference(address, store, protocol or about["protocol"], stem)


def training_there(address: str, store: str, bundle: str, reward_text: Literal["empty", "caption"]) -> None:
    """The same of a training set, see `load_training`.

    Raises:
        UserError: as `training_digest`.
    """
    if _corpus_run(Folder.at(address)) is None:
        reference_there(address, store, bundle, reward_text)


def known_protocol(bundle: str, reward_text: Literal["empty", "caption"]) -> str | None:
    """Of embeddings; None where weights that it depends on are not on this machine."""
    chosen, roles = open_bundle(base_name(bundle)), (*Scorer.roles, "tokenizer")  # whatever the reward head
    here = open_store()
    if any(len(here.present(name)) < len(here.entry(name).files) for name in chosen.weights(roles)):
        return None
    return embedding_protocol(chosen.name, chosen.protocol(reward_text))


def load_training(address: str, store: str, protocol: str) -> Embedded:
    """What a model was trained on: the training split of a corpus run, mix and instrumental, or a reference set.

    Shards of a corpus are read up to their embeddings only; of a corpus in a bucket that is nearly all of it, so build
    a reference set of it once.

    Raises:
        UserError: as `load_reference`, or a corpus that is damaged or of other models.
    """
    folder = Folder.at(address)
    if not ("/" in address or folder.exists(index.MERGED)) or folder.exists(ABOUT):
        return load_reference(address, store, protocol)
    if _corpus_run(folder) is None:
        raise UserError(f"training: {address} is no corpus run and no reference set.", "Give the folder of one.")
    parts = list(_corpus_parts(folder, protocol, (0, 1), "train"))
    tracks = [track for part in parts for track in part[1]]
    clips = len({key for part in parts for key in part[0]})  # each has a row as mix and one as instrumental
    about = {"made_from": "corpus", "source": folder.uri, "split": "train", "n": clips, "protocol": protocol}
    return Embedded(about, tracks, [part[2] for part in parts])


def training_digest(address: str, store: str, protocol: str) -> str:
    """What tells one training set from another without reading the embeddings of a corpus.

    Raises:
        UserError: as `load_training`, but for damage inside of a corpus.
    """
    folder = Folder.at(address)
    if _corpus_run(folder) is None:
        return load_training(address, store, protocol).digest()
    state = [folder.read("run.json"), str(folder.exists(index.MERGED)).encode()]
    return hashlib.sha256(b"".join(state)).hexdigest()


def _corpus_run(folder: Folder) -> dict[str, Any] | None:
    """`run.json` of a corpus run; None for other folders."""
    if not folder.exists("run.json"):
        return None
    try:
        run = read_json(folder.read("run.json"))
        return run if run["kind"] == "corpus" else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.path('run.json')} is damaged: {error!r}") from error


def _separation(runtime: MeasureConfig | None) -> SeparationConfig:
    separation = runtime.separation if isinstance(runtime, ReferenceConfig) else SeparationConfig()
    if separation.scope != "clip":
        raise UserError("separation.scope: of a folder's audio only clips are separated.", "Set it to clip.")
    return separation


def _corpus_parts(
    run: Folder, protocol: str, stems: Sequence[int], split: str, chosen: Collection[str] | None = None
) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
    """Keys, track ids and (n, 512) embeddings of every shard; stems 0 (mix) and 1 (instrumental) after each other.
    With `chosen` only of these keys.

    Raises:
        UserError: the corpus was made under another protocol, has no such clips, or is damaged.
    """
    about = _corpus_run(run) or {}
    try:
        recorded = about["identity"]["protocol"]
        hashes = tuple((str(name), str(value)) for name, value in recorded["hashes"])
        theirs = embedding_protocol(about["config"]["bundle"], Protocol(**(recorded | {"hashes": hashes})))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.path('run.json')} names no protocol: {error!r}", "Is it a corpus run?") from error
    if theirs != protocol:
        raise UserError(f"the corpus {run} was made under {theirs}, not under {protocol}.", "Name its bundle.")
    rows = index.read_index(run).select(["key", "track_id", "status", "split", "shard"]).to_pylist()
    of_shard: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["status"] == "ok" and split in ("all", row["split"]) and (chosen is None or row["key"] in chosen):
            of_shard.setdefault(row["shard"], {})[row["key"]] = row["track_id"]
    absent_keys = sorted(set(chosen or ()).difference(*of_shard.values()))
    if absent_keys:
        raise UserError(
            f"keys: {len(absent_keys)} of {len(chosen or ())} are not among the ok clips of {run}, split {split}, e.g. "
            f"{absent_keys[0]}.",
            "Remove them, or choose the corpus and split that they come from.",
        )
    if not of_shard:
        raise UserError(f"{run} has no ok clips in the split {split}.", "Choose another split, or finish the run.")
    with ThreadPoolExecutor(_READERS) as pool:
        for (shard, clips), embeddings in zip(
            of_shard.items(), pool.map(partial(_embeddings, run), of_shard), strict=True
        ):
            absent = clips.keys() - embeddings.keys()
            if absent:
                raise UserError(f"{run.path(shard)} lacks the embedding of {min(absent)}.", shards.mend(run))
            keys = list(clips) * len(stems)
            arrays = [embeddings[key][stem] for stem in stems for key in clips]
            yield keys, [clips[key] for key in keys], np.stack(arrays)


def _embeddings(run: Folder, shard: str) -> dict[str, np.ndarray]:
    """Clip key -> (2, 512) of a shard, without reading its latents."""
    suffix = ".clap_audio.npy"
    try:
        with run.open(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            arrays = {}
            for member in tar:
                if member.name.endswith(suffix) and (data := tar.extractfile(member)) is not None:
                    array = shards.read_npy(data.read())
                    if array.ndim != 2 or len(array) != 2 or array.dtype != np.float32:
                        raise ValueError(f"{member.name} is {array.dtype} {array.shape}")
                    arrays[member.name.removesuffix(suffix)] = array
            return arrays
    except (tarfile.TarError, ValueError, EOFError, KeyError, OverflowError) as error:
        raise UserError(f"{run.path(shard)} is damaged: {error}", shards.mend(run)) from error


def _about(folder: Folder) -> dict[str, Any]:
    try:
        about = read_json(folder.read(ABOUT))
        if about["kind"] == "reference" and isinstance(about["protocol"], str):
            return {"stem": "mix", **about}  # folders were taken as they are before there was a choice
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{folder.path(ABOUT)} describes no reference set.", "Delete it and build it again.")
