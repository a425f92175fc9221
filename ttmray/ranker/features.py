"""Features of all clips and prompts of a pair table: each distinct one is encoded once, then packed into arrays.

Clips are told apart by the SHA-256 of their bytes. A part of them is one Parquet file in `features/`, written when all
its clips are encoded: relaunching encodes only what no file holds, also after pairs were added.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from ttmray.audio import clip
from ttmray.audio import io as audio_io
from ttmray.cluster import ActorsConfig, each
from ttmray.config import Location, fingerprint
from ttmray.console import meter
from ttmray.corpus import index, shards
from ttmray.errors import ClipError, UserError
from ttmray.json_text import as_read
from ttmray.models import one_thread
from ttmray.models.bundle import open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.devices import on_gpu
from ttmray.models.loading import LoadOptions
from ttmray.models.reward_head import encoders_of
from ttmray.models.scoring import Scorer
from ttmray.parts import digests, read_parts, write_part
from ttmray.quarantine import together
from ttmray.storage import Folder

FEATURES = "features"
PART_CLIPS = 64


class EncodingConfig(ActorsConfig):
    """Where clips are encoded."""

    batch: int = Field(8, ge=1, le=256)
    """Clips per model forward on a GPU."""
    embedding_cache: Location | None = None
    """Local folder that keeps embeddings by content, shared with the corpus job."""
    embedding_cache_gib: float = Field(8.0, gt=0)
    """Bound of that folder."""


@dataclass(frozen=True)
class Features:
    """Packed features.

    Attributes:
        clips: address -> row of the clip blocks.
        prompts: text -> row of the text block; "" is a row of zeros.
        clap_audio: (n, 512) float32 unit vectors.
        mert: (n, H) float32 time means.
        text: (m, 512) float32 unit vectors.
        failed: address -> reason, for the clips that have no row.
    """

    clips: dict[str, int]
    prompts: dict[str, int]
    clap_audio: np.ndarray
    mert: np.ndarray
    text: np.ndarray
    failed: dict[str, str]

    def block_dims(self) -> tuple[int, int, int]:
        return self.clap_audio.shape[1], self.mert.shape[1], self.text.shape[1]


@dataclass(frozen=True)
class _Part:
    """Clips (SHA-256 -> address) or prompts (text -> "") that are encoded and stored together."""

    kind: str
    members: dict[str, str]


def extract(clips: Iterable[str], prompts: Iterable[str], bundle: str, run: Folder, config: EncodingConfig) -> Features:
    """Features of clips and prompts, from the run folder where they are there already.

    Args:
        clips: addresses (see `Pair`).
        bundle: models of the roles clap and mert.
        run: where parts are kept.

    Raises:
        UserError: weights or device are not there, or a corpus was made by other models.
    """
    addresses, texts = list(dict.fromkeys(clips)), [text for text in dict.fromkeys(prompts) if text]
    audio = [address for address in addresses if "#" not in address]
    from_corpus = _from_corpora([address for address in addresses if "#" in address], bundle)
    files, failed = digests(audio)
    made_by = _made_by(bundle, config)
    known = _known(run, made_by)
    todo = [
        _Part("text", dict.fromkeys(some, ""))
        for some in _chunks([text for text in texts if ("text", text) not in known], 8 * PART_CLIPS)
    ]
    missing = {digest: address for address, digest in files.items() if ("clip", digest) not in known}
    todo += [
        _Part("clip", {digest: missing[digest] for digest in some}) for some in _chunks(sorted(missing), PART_CLIPS)
    ]
    if todo:
        with meter("clips and prompts encoded", sum(len(part.members) for part in todo)) as progress:
            for done in each(partial(_Encoder, bundle, config.model_dump_json(), run.uri, made_by), todo, config):
                progress.advance(done)
        known = _known(run, made_by)
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = dict(from_corpus)
    for address, digest in files.items():
        known_clip = known["clip", digest]
        if isinstance(known_clip, str):
            failed[address] = known_clip
        else:
            rows[address] = known_clip
    failed |= {address: "not an ok clip of the corpus" for address in addresses if address not in rows | failed}
    usable = [address for address in addresses if address in rows]
    if not usable:
        example = next(iter(failed.items()), ("no clip", "the table is empty"))
        raise UserError(f"none of {len(addresses)} clips can be used; {example[0]}: {example[1]}")
    clap, mert = (np.stack([rows[address][i] for address in usable]) for i in (0, 1))
    text = [known["text", text] for text in texts]
    width = clap.shape[1]
    return Features(
        clips={address: i for i, address in enumerate(usable)},
        prompts={text: i for i, text in enumerate(["", *texts])},
        clap_audio=clap,
        mert=mert,
        text=np.stack([np.zeros(width, np.float32), *(row for row, _ in text)]),
        failed=failed,
    )


def read_clip(address: str, clip_s: float = clip.CLIP_S) -> np.ndarray:
    """An audio file as (samples,) mono float32 at 44.1 kHz, padded to a clip as in the corpus job.

    Args:
        clip_s: length of the bundle's clips, in seconds.

    Raises:
        ClipError: why it cannot be used.
    """
    return clip.read_clip(address, clip_s, measured=False).mono()


class _Encoder:
    """The models of one process; a call encodes one part, writes its file and returns how many members it has."""

    def __init__(self, bundle: str, config: str, run: str, made_by: str) -> None:
        settings = EncodingConfig.model_validate_json(config)
        chosen = open_bundle(bundle)
        models = chosen.load(("clap", "mert"), LoadOptions(device=settings.device, batch=settings.batch))
        one_thread()  # more would change last bits
        folder, bound = settings.embedding_cache, int(settings.embedding_cache_gib * 2**30)
        cache = EmbeddingCache(folder, bound) if folder else None
        self._scorer = Scorer(models, chosen.protocol("empty"), cache=cache)
        self._clip_s = chosen.clip_s
        self._run, self._made_by, self._batch = Folder.at(run), made_by, settings.batch

    def __call__(self, part: _Part) -> int:
        rows: dict[str, Any] = {}
        if part.kind == "text":
            vectors = self._scorer.texts(list(part.members))
            rows = {text: (vector, np.zeros(0, np.float32)) for text, vector in zip(part.members, vectors, strict=True)}
        else:
            for batch in _chunks(list(part.members), self._batch):
                waves = {}
                for digest in batch:
                    try:
                        waves[digest] = read_clip(part.members[digest], self._clip_s)
                    except ClipError as error:
                        rows[digest] = str(error)
                rows |= dict(zip(waves, self._embed(list(waves.values())), strict=True))
        _write_part(self._run, self._made_by, part.kind, {name: rows[name] for name in part.members})
        return len(rows)

    def _embed(self, waves: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray] | str]:
        rows: list[tuple[np.ndarray, np.ndarray] | str] = []
        for _, outcome in together(waves, self._scorer.embed, "Lower the batch of the encoders."):
            if isinstance(outcome, ClipError):
                rows.append(str(outcome))
            else:
                rows += zip(outcome.clap, outcome.mert, strict=True)
        return rows


def _made_by(bundle: str, config: EncodingConfig) -> str:
    """Everything that decides a feature: the head and the text input do not, the kind of device does."""
    chosen = open_bundle(bundle)
    device = "cuda" if on_gpu(config.device, config.runner, config.gpus) else "cpu"
    how = asdict(chosen.protocol("empty")) | {"text": "", "device": device, "reading": audio_io.READING}
    how |= {"clip_s": chosen.clip_s} if chosen.clip_s != clip.CLIP_S else {}
    how["hashes"] = [list(item) for item in how["hashes"] if not item[0].startswith("tunejury")]
    return fingerprint(how)


def _write_part(run: Folder, made_by: str, kind: str, rows: Mapping[str, Any]) -> None:
    """Columns name, reason, first, second: lists of float32 (CLAP and MERT, or a text vector), null with a reason."""
    arrays = {name: (None, None) if isinstance(row, str) else row for name, row in rows.items()}
    vector = pa.list_(pa.float32())
    table = pa.table(
        {
            "name": list(rows),
            "reason": [row if isinstance(row, str) else "" for row in rows.values()],
            "first": pa.array([first for first, _ in arrays.values()], vector),
            "second": pa.array([second for _, second in arrays.values()], vector),
        }
    )
    write_part(run, f"{FEATURES}/{kind}-", table, made_by, [kind, list(rows)], kind=kind)


def _known(run: Folder, made_by: str) -> dict[tuple[str, str], Any]:
    """(kind, name) -> both arrays, or the reason why there are none, of every part by the same models."""

    def parse(table: pa.Table) -> dict[tuple[str, str], Any]:
        kind = table.schema.metadata[b"ttmray.kind"].decode()
        columns = [table[column] for column in ("name", "reason", "first", "second")]
        return {
            (kind, name.as_py()): reason.as_py() or (first.values.to_numpy(), second.values.to_numpy())
            for name, reason, first, second in zip(*columns, strict=True)
        }

    return {name: row for part in read_parts(run, FEATURES, made_by, parse) for name, row in part.items()}


def _from_corpora(addresses: Sequence[str], bundle: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Embeddings of the mix that a corpus run stored, for those addresses that are ok clips of it."""
    keys_of: dict[str, set[str]] = {}
    for address in addresses:
        uri, _, key = address.rpartition("#")
        keys_of.setdefault(uri, set()).add(key)
    features = {}
    for uri, keys in keys_of.items():
        run = Folder.at(uri)
        bundle_of_run = run.read_json("run.json", "identity")["identity"]["bundle"]
        if encoders_of(bundle_of_run) != encoders_of(as_read(open_bundle(bundle).identity())):
            raise UserError(
                f"{uri} was made by {bundle_of_run}, not by the bundle {bundle}.", "Name the bundle of the corpus."
            )
        rows = index.read_index(run).select(["key", "status", "shard"]).to_pylist()
        for shard in sorted({row["shard"] for row in rows if row["status"] == "ok" and row["key"] in keys}):
            for key, sample in shards.read_samples(run.read(shard), run.path(shard)):
                if key in keys:
                    features[f"{uri}#{key}"] = (sample["clap_audio.npy"][0], sample["mert.npy"][0])
    return features


def _chunks(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
