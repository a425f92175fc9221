"""What can be read from outside, with valid inputs to damage: for `tests/fuzz.py`.

A kind's reader gets bytes and an empty folder, writes the file there and reads it as a user's command would.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from safetensors.torch import save_file
from synthetic_corpus import write_random_corpus

import ttmray
from ttmray.audio.io import decode, probe
from ttmray.audio.limits import AudioLimits
from ttmray.config import load_config
from ttmray.corpus.captions import load_captions
from ttmray.corpus.catalogue import build_catalogue
from ttmray.corpus.config import CatalogueConfig, CorpusConfig
from ttmray.corpus.npz import read_npz
from ttmray.corpus.shards import read_samples
from ttmray.errors import ClipError, UserError
from ttmray.evaluation.results import read_results
from ttmray.generation.config import GenerateConfig
from ttmray.generation.prompts import read_prompts
from ttmray.inventory import kind_of
from ttmray.models.reward_head import open_head
from ttmray.models.state_dicts import read_state_dict
from ttmray.models.tunejury import TuneJuryHead
from ttmray.presets import presets
from ttmray.ranker.job import RankerConfig
from ttmray.ranker.votes import PairSource, read_splits, read_votes
from ttmray.recipes.reproduce_config import ReproduceConfig
from ttmray.status import run_lines
from ttmray.storage import Folder
from ttmray.training import checkpoint
from ttmray.training.config import TrainConfig
from ttmray.training.state import TrainingState
from ttmray.training.tensors import pack, unpack
from ttmray.verify import problems

BYTES = ("bit", "byte", "integer", "integer", "cut", "delete", "repeat", "noise", "zeros", "splice")
TEXT = ("word", "word", "word", "byte", "cut", "delete", "repeat", "splice", "noise")
LIMITS = AudioLimits(min_duration_s=0.01, max_decoded_bytes=64 << 20)


@dataclass(frozen=True)
class Kind:
    """Valid inputs of one kind, what may happen to them, and who reads them."""

    valid: list[bytes]
    read: Callable[[bytes, Path], Any]
    damages: tuple[str, ...] = BYTES


def each(*readers: Callable[[], Any]) -> None:
    """Run all, refusing or not; any other error comes through."""
    refusal: UserError | ClipError | None = None
    for reader in readers:
        try:
            reader()
        except (UserError, ClipError) as error:
            refusal = error
    if refusal is not None:
        raise refusal


@cache
def audio() -> Kind:
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(np.arange(6000) / 5)[:, None] + 0.01 * rng.standard_normal((6000, 2))
    valid = []
    for format, subtypes in (
        ("WAV", ("PCM_16", "FLOAT")), ("WAVEX", ("PCM_24",)), ("FLAC", ("PCM_16",)), ("OGG", ("VORBIS", "OPUS")),
        ("MP3", ("MPEG_LAYER_III",)), ("AIFF", ("PCM_16",)), ("AU", ("PCM_16",)), ("W64", ("PCM_16",)),
        ("RF64", ("PCM_16",)), ("CAF", ("PCM_16",)),
    ):  # fmt: skip
        for subtype in subtypes:
            buffer = io.BytesIO()
            soundfile.write(buffer, tone, 48_000 if subtype == "OPUS" else 44_100, format=format, subtype=subtype)
            valid.append(buffer.getvalue())
    valid += [_foreign(tone, "mp4", "aac"), _foreign(tone, "webm", "libopus"), valid[6] + valid[6], b"ID3" + valid[6]]

    def read(data: bytes, folder: Path) -> None:
        file = folder / "song"
        file.write_bytes(data)
        each(lambda: probe(file), lambda: decode(file, LIMITS), lambda: decode(io.BytesIO(data), LIMITS))

    return Kind(valid, read)


def _foreign(tone: np.ndarray, container: str, codec: str) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=48_000)
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone.T, np.float32), format="fltp", layout="stereo")
        block.sample_rate = 48_000
        for packet in [*stream.encode(block), *stream.encode(None)]:
            out.mux(packet)
    return buffer.getvalue()


NAMES = ("id", "path", "caption", "a", "b", "prompt", "label", "name")
ROWS = [
    dict(
        zip(NAMES, (f"p{i}", f"a/{i}.wav", f"«{i}», calm", f"{i}.wav", "9.wav", "jazz", "ab"[i % 2], "n"), strict=True)
    )
    for i in range(6)
]


def _tables(suffix: str) -> Kind:
    """Captions, prompts, votes and a catalogue of one format, each table read as each."""
    columns = (("path", "caption"), ("name", "prompt"), ("id", "a", "b", "prompt", "label"), tuple(ROWS[0]))
    valid = [_table([{name: row[name] for name in names} for row in ROWS], suffix) for names in columns]

    def read(data: bytes, folder: Path) -> None:
        (file := folder / f"table.{suffix}").write_bytes(data)
        place = str(file)
        each(
            lambda: load_captions(place),
            lambda: read_prompts(place),
            lambda: read_votes([PairSource(name="votes", path=place)]),
            lambda: build_catalogue(place, CatalogueConfig()),
        )

    return Kind(valid, read, BYTES if suffix == "parquet" else TEXT)


def _table(rows: list[dict[str, str]], suffix: str) -> bytes:
    if suffix == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if suffix in ("json", "jsonl"):
        text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
        return text.encode()
    between = "\t" if suffix == "tsv" else ","
    quoted = lambda cell: f'"{cell}"' if between in cell or '"' in cell else cell  # noqa: E731
    return "\n".join(
        between.join(quoted(cell) for cell in cells) for cells in (rows[0], *(r.values() for r in rows))
    ).encode()


@cache
def splits() -> Kind:
    def read(data: bytes, folder: Path) -> None:
        (file := folder / "splits.json").write_bytes(data)
        each(lambda: read_splits(str(file)), lambda: read_splits({"train": str(file)}))

    return Kind([json.dumps({"train": ["p0", "p1"], "valid": ["p2"], "test": []}).encode()], read, TEXT)


@cache
def configs() -> Kind:
    def read(data: bytes, folder: Path) -> None:
        (file := folder / "config.yaml").write_bytes(data)
        every = (CorpusConfig, TrainConfig, GenerateConfig, RankerConfig, ReproduceConfig)
        each(*(partial(load_config, kind, str(file)) for kind in every))

    return Kind([path.read_bytes() for path in presets().values()], read, TEXT)


@cache
def overrides() -> Kind:
    def read(data: bytes, folder: Path) -> None:
        text = data.decode(errors="replace")
        each(*(partial(load_config, kind, None, [text]) for kind in (CorpusConfig, TrainConfig)))

    lines = [
        "input=/d/My Songs #1",
        "segments={clip_s: 5, min_s: 2}",
        "data.sources.0.split=all",
        "batch=16",
        "model.head=v1",
    ]
    return Kind([line.encode() for line in lines], read, TEXT)


@cache
def shards() -> Kind:
    run = _corpus()
    valid = [path.read_bytes() for path in sorted(run.rglob("*.tar"))]
    return Kind(valid, lambda data, folder: list(read_samples(data, "a shard")))


@cache
def _corpus() -> Path:
    folder = tempfile.mkdtemp()
    write_random_corpus(folder, tracks=3, clips_per_track=2, validation=1, latent=(4, 3), text=(3, 5), unit_clips=4)
    return Path(folder)


def _file_of_corpus(name: str) -> Kind:
    """One file of a finished corpus; everything that opens one is tried."""
    original = _corpus()

    def read(data: bytes, folder: Path) -> None:
        run = folder / "run"
        shutil.copytree(original, run)
        (run / name).write_bytes(data)
        place = Folder.at(str(run))
        each(
            lambda: list(run_lines(place)),
            lambda: list(problems_of(place)),
            lambda: ttmray.open_corpus(run).index,
            lambda: list(ttmray.open_corpus(run)),
        )

    return Kind([(original / name).read_bytes()], read, TEXT if name.endswith(("json", "jsonl")) else BYTES)


def problems_of(run: Folder) -> Any:
    from ttmray.corpus.verify import problems as of_corpus

    return of_corpus(run) if kind_of(run) == "corpus" else problems(run)


@cache
def weights() -> Kind:
    """safetensors and torch files, as a state dict, as a reward head, and as a file of the training."""
    head = TuneJuryHead((8, 4)).net.state_dict()
    valid = [pack({"w": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.float16)}, {"step": 3})]
    with tempfile.TemporaryDirectory() as folder:
        save_file(head, file := Path(folder) / "head.safetensors")
        valid.append(file.read_bytes())
    for old in (False, True):
        buffer = io.BytesIO()
        torch.save({"generator": head, "n": np.float64(2)}, buffer, _use_new_zipfile_serialization=not old)
        valid.append(buffer.getvalue())

    def read(data: bytes, folder: Path) -> None:
        files = [folder / name for name in ("w.safetensors", "w.pt")]
        for file in files:
            file.write_bytes(data)
        each(
            *(partial(read_state_dict, file) for file in files),
            *(lambda file=file: open_head(str(file)).load((8, 0, 0)) for file in files),
            lambda: unpack(data, "a file"),
        )

    return Kind(valid, read)


@cache
def checkpoints() -> Kind:
    """Any file of a training's checkpoint; the first byte says which."""
    original = Path(tempfile.mkdtemp())
    parts = {part: {"w": torch.arange(3.0)} for part in ("model", "ema", "optimizer")}
    state = TrainingState(step=4, samples=4, config={"lr": 0.1}, identity={}, **parts)
    name = checkpoint.save(Folder.at(str(original)), state)
    files = sorted((original / name).iterdir())

    def read(data: bytes, folder: Path) -> None:
        shutil.copytree(original, folder / "checkpoints")
        (folder / "checkpoints" / name / files[data[0] % len(files) if data else 0].name).write_bytes(data[1:])
        place = Folder.at(str(folder / "checkpoints"))
        each(
            lambda: checkpoint.newest_valid(place),
            lambda: checkpoint.load(place, name),
            lambda: checkpoint.verify(place.sub(name)),
        )

    return Kind([bytes([i]) + file.read_bytes() for i, file in enumerate(files)], read, (*BYTES, "word"))


@cache
def arrays() -> Kind:
    valid = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        one = np.ones((4, 3), np.float32)
        save(buffer, mean=one, std=one, text_features=one, text_features_c=one[0])
        valid.append(buffer.getvalue())

    def read(data: bytes, folder: Path) -> None:
        (file := folder / "x.npz").write_bytes(data)
        read_npz(file)

    return Kind(valid, read)


@cache
def evaluations() -> Kind:
    def read(data: bytes, folder: Path) -> None:
        (folder / "results.json").write_bytes(data)
        read_results(Folder.at(str(folder)))

    return Kind([_RESULTS.encode()], read, TEXT)


_RESULTS = json.dumps(
    {
        "kind": "evaluation",
        "bundle": "micro",
        "systems": [
            {"name": n, "clips": 2, "metrics": {"clap": {"value": 0.1, "low": 0.0, "high": 0.2}}} for n in "ab"
        ],
        "comparisons": [{"a": "a", "b": "b", "metric": "clap", "n": 2, "difference": 0.1, "p": 0.5}],
    }
)

KINDS: dict[str, Callable[[], Kind]] = {
    "audio": audio,
    **{suffix: cache(partial(_tables, suffix)) for suffix in ("csv", "tsv", "json", "jsonl", "parquet")},
    "splits": splits,
    "configs": configs,
    "overrides": overrides,
    "shards": shards,
    "weights": weights,
    "checkpoints": checkpoints,
    "arrays": arrays,
    "evaluations": evaluations,
    **{
        name.replace("/", "-"): cache(partial(_file_of_corpus, name))
        for name in sorted(file.relative_to(_corpus()).as_posix() for file in _corpus().rglob("*") if file.is_file())
        if not name.endswith((".tar", ".md")) and name != "units.jsonl"
    },
}
"""Name -> the kind, made when it is asked for first."""
