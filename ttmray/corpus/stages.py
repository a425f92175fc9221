"""The stages of the corpus pipeline. Each takes a unit and returns it; none knows who runs it.

decode -> measure -> separate -> score -> (level ->) encode -> text -> write

They take plain arguments: `corpus/assembly.py` makes those of a corpus run, `generation/pool_worker.py` those of a
pool.

A stage never raises for a bad clip: that clip becomes a quarantined row. It raises only for what no other
clip would survive either (missing weights, a full disk, no memory).
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from ttmray.audio import io as audio_io
from ttmray.audio import loudness, segment
from ttmray.audio.clip import levels
from ttmray.audio.level import require_audible
from ttmray.audio.limits import AudioLimits
from ttmray.corpus import index, shards
from ttmray.corpus.stage import Stage
from ttmray.corpus.unit import FAILED, OK, Unit
from ttmray.errors import ClipError, UserError
from ttmray.models.bundle import Models
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.storage import Folder, explained

if TYPE_CHECKING:
    from ttmray.models.latents import LatentEncoder
    from ttmray.models.separator import Separator

Segments = Sequence[tuple[int, int]]
"""First sample, and the one behind the last."""
MIN_PEAK = 1e-6
"""What is below is never scaled up: the public loader rejects files of such a peak."""


class Decode(Stage):
    """Source files -> `mix` (n, 2, samples) float32 at 44.1 kHz, one row per clip.

    A track is decoded once, cut by the paper's rule in native-rate samples, and each clip is resampled once.

    Args:
        folder: of the songs.
        protocol: name of the scores' protocol, for the rows.
    """

    name, scope, resources = "decode", "track", "decode"
    writes: ClassVar[tuple[str, ...]] = ("mix",)

    def __init__(
        self,
        folder: Folder,
        protocol: str,
        rule: segment.SegmentRule,
        limits: AudioLimits,
        max_file_bytes: int,
    ) -> None:
        self.folder, self.protocol = folder, protocol
        self.rule, self.limits, self.max_file_bytes = rule, limits, max_file_bytes
        self.samples = round(rule.clip_s * SAMPLE_RATE)

    def __call__(self, unit: Unit) -> Unit:
        # Clips are written where they stay: a further copy costs a fifth of the decoding. Pages that no clip
        # touches cost nothing.
        usable = [track for track in unit.tracks if track["status"] == OK]
        mix = np.empty(
            (sum(track.get("clips", self.rule.max_clips) + 1 for track in usable), 2, self.samples), np.float32
        )
        count = 0
        for track in unit.tracks:
            row = index.new_row(track, unit.name, self.protocol)
            if track["status"] != OK:
                row.update(status=track["status"], reason=track["reason"], message=track["message"])
                unit.rows.append(row)
                continue
            row["stage"] = self.name
            try:
                for clip, facts in self._clips(track, row, unit):
                    if count == len(mix):  # a header promised less than there is
                        mix = np.concatenate([mix, np.empty((self.rule.max_clips, *mix.shape[1:]), np.float32)])
                    held = min(clip.shape[1], self.samples)
                    mix[count, :, :held] = clip[:, :held]  # one channel fills both
                    mix[count, :, held:] = 0
                    count += 1
                    unit.rows.append(row | facts)
            except ClipError as error:
                row.update(status=error.status, reason=error.reason, message=error.message)
                unit.rows.append(row)
        unit.clips = {"mix": mix[:count]}
        return unit

    def _clips(
        self, track: dict[str, Any], row: dict[str, Any], unit: Unit
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """(channels, samples) at 44.1 kHz and the row's facts of each clip; errors come before the first."""
        path = track["path"]
        if track["size"] > self.max_file_bytes:
            raise ClipError("rejected", "file_size", f"{track['size']} bytes, over limits.max_file_bytes")
        try:
            if self.folder.remote:
                data, version = self.folder.read_as(path)
                row["sha256"] = hashlib.sha256(data).hexdigest()
                _check_unchanged(track, len(data), version)
                audio, rate = audio_io.decode(io.BytesIO(data), self.limits)
            else:
                # one descriptor for all: what was hashed is what is decoded
                with explained(self.folder.path(path)), open(self.folder.path(path), "rb", buffering=0) as file:
                    row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
                    status = os.fstat(file.fileno())
                    _check_unchanged(track, status.st_size, str(status.st_mtime_ns))
                    audio, rate = audio_io.decode(file, self.limits)
        except UserError as error:  # the file went away or became unreadable after planning
            raise ClipError(FAILED, "unreadable", error.message) from error
        except OSError as error:  # a bad sector, a lost mount
            raise ClipError(FAILED, "unreadable", f"{self.folder.path(path)}: {error}") from error
        channels, frames = audio.shape
        row.update(sample_rate=rate, channels=channels)
        segments = segment.partition(frames, rate, self.rule)
        if not segments:
            raise ClipError("rejected", "too_short", f"{frames / rate:.2f} s, shorter than {self.rule.min_s:g} s")
        clips = self._cut(unit, track["track_id"], audio, rate, segments)
        for i, ((start, end), clip) in enumerate(zip(segments, clips, strict=True)):
            yield (
                clip,
                {
                    "key": f"{track['track_id']}_{i}",
                    "segment": i,
                    "start_s": start / rate,
                    "duration_s": (min(end, frames) - start) / rate,
                },
            )

    def _cut(self, unit: Unit, track: str, audio: np.ndarray, rate: int, segments: Segments) -> Iterator[np.ndarray]:
        """(channels, samples) at 44.1 kHz of each segment of a decoded track."""
        for start, end in segments:
            same = rate == SAMPLE_RATE
            cut = audio[:, start:end] if same else segment.cut(audio, rate, start, end)
            yield cut if same else audio_io.resample(cut, rate, SAMPLE_RATE)


class DecodeTracks(Decode):
    """Also `track_audio`: whole tracks (2, samples) at 44.1 kHz, from which clips start at the nearest sample."""

    writes = ("mix", "track_audio")

    def _cut(self, unit: Unit, track: str, audio: np.ndarray, rate: int, segments: Segments) -> Iterator[np.ndarray]:
        whole = audio_io.resample(audio, rate, SAMPLE_RATE)
        whole = np.repeat(whole, 2 // len(whole), axis=0)
        unit.track_audio[track] = whole
        for start, _ in segments:
            first = round(start * SAMPLE_RATE / rate)
            yield whole[:, first : first + self.samples]


class Measure(Stage):
    """Loudness, true peak and silence of `mix` (n, channels, samples); silent clips are rejected here."""

    name, resources = "measure", "decode"
    reads = ("mix",)

    def __init__(self, silence_dbfs: float) -> None:
        self.silence_dbfs = silence_dbfs

    def __call__(self, unit: Unit) -> Unit:
        mix, rows = unit.clips["mix"], unit.ok_rows()

        def measure(i: int) -> None:
            # a mono source is one channel to BS.1770; its copy would count twice (+3 LU)
            heard = mix[i][: rows[i]["channels"]]
            require_audible(heard, self.silence_dbfs)
            silence = loudness.silence_ratio(mix[i], SAMPLE_RATE)
            rows[i].update(stage=self.name, silence=silence, **levels(heard))

        unit.one_by_one(self.name, measure)
        return unit


class Separate(Stage):
    """`mix` -> `mix_mono` and `instrumental` (n, samples) float32, and each clip's vocal ratio.

    Where there is `track_audio`, whole tracks are separated and cut afterwards.
    """

    name, resources = "separate", "separate"
    model_roles = ("separator",)
    reads = ("mix", "track_audio")
    writes = ("mix_mono", "instrumental")

    def __init__(self, separator: "Separator") -> None:
        self.separator = separator

    def __call__(self, unit: Unit) -> Unit:
        mix, rows = unit.clips["mix"], unit.ok_rows()
        samples = mix.shape[-1]
        if unit.track_audio:
            instrumental, vocals = self._tracks(unit, rows, samples)
        else:
            results = self.separator.separate(list(mix))
            instrumental = [result.instrumental for result in results]
            vocals = [result.vocals for result in results]
        mono = np.zeros((len(rows), samples), np.float32)
        backing = np.zeros((len(rows), samples), np.float32)
        for i, row in enumerate(rows):
            mono[i] = mix[i].mean(axis=0)
            backing[i] = instrumental[i].mean(axis=0)
            row.update(stage=self.name, vocal_ratio=_energy(vocals[i]) / max(_energy(mix[i]), 1e-20))
        unit.clips |= {"mix_mono": mono, "instrumental": backing}
        return unit

    def _tracks(
        self, unit: Unit, rows: list[dict[str, Any]], samples: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        needed = list(dict.fromkeys(row["track_id"] for row in rows))
        results = self.separator.separate([unit.track_audio[track] for track in needed])
        by_track = dict(zip(needed, results, strict=True))
        instrumental, vocals = [], []
        for row in rows:
            first = round(row["start_s"] * SAMPLE_RATE)
            result = by_track[row["track_id"]]
            instrumental.append(segment.cut(result.instrumental, SAMPLE_RATE, first, first + samples))
            vocals.append(segment.cut(result.vocals, SAMPLE_RATE, first, first + samples))
        return instrumental, vocals


class Unseparated(Stage):
    """`mix` -> `mix_mono` and `instrumental`, which are the same: nothing is taken away."""

    name, resources = "separate", "separate"
    reads = ("mix",)
    writes = ("mix_mono", "instrumental")

    def __call__(self, unit: Unit) -> Unit:
        mix, rows = unit.clips["mix"], unit.ok_rows()
        mono = np.zeros((len(rows), mix.shape[-1]), np.float32)
        for i, row in enumerate(rows):
            mono[i] = mix[i].mean(axis=0)
            row["stage"] = self.name
        unit.clips |= {"mix_mono": mono, "instrumental": mono}
        return unit


class Score(Stage):
    """CLAP and MERT embeddings and the reward of mix and instrumental; CLAP scores against the caption."""

    name, resources = "score", "score"
    model_roles = Scorer.roles
    reads = ("mix_mono", "instrumental")
    writes = ("clap_audio", "mert")

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        texts = self.scorer.texts([row["caption"] for row in rows])
        mix, instrumental = self.scorer.embed_each([unit.clips["mix_mono"], unit.clips["instrumental"]])
        rewards = self.scorer.rewards(mix, texts)
        instrumental_rewards = self.scorer.rewards(instrumental, texts)
        for i, row in enumerate(rows):
            row.update(
                stage=self.name,
                reward_score=float(rewards[i]),
                instrumental_reward_score=float(instrumental_rewards[i]),
            )
            if row["caption"]:
                row["clap_score"] = float(mix.clap[i] @ texts[i])
                row["instrumental_clap_score"] = float(instrumental.clap[i] @ texts[i])
        unit.clips |= {
            "clap_audio": np.stack([mix.clap, instrumental.clap], axis=1),
            "mert": np.stack([mix.mert, instrumental.mert], axis=1),
        }
        return unit


class Gain(Stage):
    """`gain` (n,) float32 of the instrumentals, by which they have the sample peak `peak`: one factor per track.

    A stage of its own, because it follows from all ok clips of a track and `Encode` may see them one by one.
    """

    name, scope, resources = "level", "unit", "encode"
    reads = ("instrumental",)
    writes = ("gain",)

    def __init__(self, peak: float, silence_dbfs: float) -> None:
        self.peak, self.silence_dbfs = peak, silence_dbfs

    def __call__(self, unit: Unit) -> Unit:
        if not unit.ok_rows():
            return unit
        tracks = np.array([row["track_id"] for row in unit.ok_rows()])
        peaks = np.array([np.abs(clip).max(initial=0.0) for clip in unit.clips["instrumental"]])
        gain = np.ones(len(tracks), np.float32)
        for track in set(tracks):
            own = float(peaks[tracks == track].max())
            if own >= max(10 ** (self.silence_dbfs / 20), MIN_PEAK):
                gain[tracks == track] = self.peak / own
        unit.clips["gain"] = gain
        return unit


class Encode(Stage):
    """`instrumental`, times `gain` where there is one -> `latent_mean` and `latent_std` (n, 430, 40) float16."""

    name, resources = "encode", "encode"
    model_roles = ("latents",)
    reads = ("instrumental", "gain")
    writes = ("latent_mean", "latent_std")

    def __init__(self, latents: "LatentEncoder", batch: int) -> None:
        self.latents, self.batch = latents, batch

    def __call__(self, unit: Unit) -> Unit:
        audio = unit.clips["instrumental"]
        if "gain" in unit.clips:
            audio = audio * unit.clips["gain"][:, None]
        mean, std = self.latents.encode(audio, self.batch)
        for row in unit.ok_rows():
            row["stage"] = self.name
        unit.clips |= {"latent_mean": mean.astype(np.float16), "latent_std": std.astype(np.float16)}
        return unit


class Text(Stage):
    """Text features of the captions that this unit is the first to hold: T5 rows and the two CLAP vectors."""

    name, scope, resources = "text", "unit", "encode"
    model_roles = ("text", "clap", "clap_condition")
    writes = ("texts",)

    def __init__(self, models: Models) -> None:
        self.models = models

    def __call__(self, unit: Unit) -> Unit:
        owned = {track["caption_id"]: track["caption"] for track in unit.tracks if track["caption_owner"]}
        unit.caption_ids = sorted(owned)
        captions = [owned[caption_id] for caption_id in unit.caption_ids]
        if captions:
            unit.texts = {
                "t5": self.models.text.encode(captions).astype(np.float16),
                "clap": self.models.clap_condition.embed_text(captions),
                "clap_score": self.models.clap.embed_text(captions),
            }
        return unit


class Write(Stage):
    """Commit the unit: shard, captions, and last its index file.

    Args:
        run: the run folder.
        columns: of the index beside its own.
        fingerprint: of the run, which every unit names.
    """

    name, scope, resources = "write", "unit", "write"
    arrays: ClassVar[tuple[str, ...]] = ("clap_audio", "latent_mean", "latent_std", "mert")
    reads: ClassVar[tuple[str, ...]] = (*arrays, "texts")

    def __init__(self, run: Folder, columns: Mapping[str, pa.DataType] | None = None, fingerprint: str = "") -> None:
        self.run, self.further, self.fingerprint = run, columns, fingerprint

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        by_track: dict[str, list[float]] = {}
        for row in rows:
            if row["reward_score"] is not None:  # latents of others have no rewards
                by_track.setdefault(row["track_id"], []).append(row["reward_score"])
        metadata: dict[str, Any] = {"unit": unit.name, "files": {}, "latents": {}}
        if self.fingerprint:
            metadata["run"] = self.fingerprint
        for row in rows:
            rewards = by_track.get(row["track_id"])
            row.update(stage=self.name, track_reward_score=float(np.mean(rewards)) if rewards else None)
        if rows:
            samples = {row["key"]: self._members(unit, i, row) for i, row in enumerate(rows)}
            data, members = shards.pack(samples)
            places = shards.latent_places(samples, members, unit.clips["latent_mean"].shape[1:])
            shard, digest = shards.named_by_content(shards.SHARDS, unit.name, data, "tar")
            self.run.write(shard, data)
            metadata["files"][shard] = {"sha256": digest, "bytes": len(data), "clips": len(rows)}
            for row in rows:
                row.update(shard=shard, **places[row["key"]])
            for split in sorted({row["split"] for row in rows}):
                of_split = [i for i, row in enumerate(rows) if row["split"] == split]
                metadata["latents"][split] = index.latent_sums(
                    unit.clips["latent_mean"][of_split], unit.clips["latent_std"][of_split]
                )
        if unit.caption_ids:
            data = shards.captions_bytes(unit.caption_ids, unit.texts)
            name, digest = shards.named_by_content(shards.CAPTIONS, unit.name, data, "safetensors")
            self.run.write(name, data)
            metadata["files"][name] = {
                "sha256": digest,
                "bytes": len(data),
                "captions": len(unit.caption_ids),
                **shards.text_places(io.BytesIO(data)),
            }
        # The commit. If another worker was faster, its files stand and ours are swept when the run ends.
        self.run.create(f"{index.INDEX}/{unit.name}.parquet", index.to_bytes(unit.rows, metadata, self.further))
        return unit

    def _members(self, unit: Unit, i: int, row: dict[str, Any]) -> dict[str, bytes]:
        left_out = {"shard", "status", "reason", "message", *index.PLACES}
        facts = {name: value for name, value in row.items() if name not in left_out}
        members = {"json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()}
        for name in self.arrays:
            members[f"{name}.npy"] = shards.npy_bytes(unit.clips[name][i])
        return members


class WriteAudio(Write):
    """Also every clip's `instrumental` as mono 16-bit FLAC."""

    reads = (*Write.reads, "instrumental")

    def _members(self, unit: Unit, i: int, row: dict[str, Any]) -> dict[str, bytes]:
        flac = audio_io.encode_flac(unit.clips["instrumental"][i][None], SAMPLE_RATE)
        return super()._members(unit, i, row) | {"flac": flac}


def _check_unchanged(track: dict[str, Any], size: int, version: str) -> None:
    """Refuse a file that another one replaced after planning.

    Raises:
        ClipError: failed/`changed`.
    """
    planned = track["size"]
    if planned >= 0 and size != planned:
        raise ClipError(FAILED, "changed", f"{size} bytes, {planned} when the run was planned: it was replaced")
    if version and track.get("version") and version != track["version"]:
        raise ClipError(FAILED, "changed", "written to after the run was planned; start again with --retry-failed")


def _energy(audio: np.ndarray) -> float:
    return float(np.square(audio, dtype=np.float64).sum())
