"""The stages of the corpus pipeline. Each takes a unit and returns it; none knows who runs it.

decode -> measure -> separate -> score -> encode -> text -> write

A stage never raises for a bad clip: that clip becomes a quarantined row. It raises only for what no other
clip would survive either (missing weights, a full disk, no memory).
"""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttmray.audio import io as audio_io
from ttmray.audio import loudness, segment
from ttmray.audio.clip import levels
from ttmray.audio.level import require_audible
from ttmray.corpus import index, shards
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.unit import FAILED, OK, Unit
from ttmray.errors import ClipError, UserError
from ttmray.models.bundle import Models, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.storage import Folder, explained

MIN_PEAK = 1e-6
"""What is below is never scaled up: the public loader rejects files of such a peak."""


@dataclass(frozen=True)
class Context:
    """What stages are built from: the config, the folder of the songs, the protocol's name, loaded models."""

    config: CorpusConfig
    root: str
    protocol: str
    models: Models


class Stage(ABC):
    """What a runner needs to know of a stage. `model_roles` are the models that it uses."""

    name: str
    model_roles: tuple[str, ...]

    @abstractmethod
    def __init__(self, context: Context) -> None: ...

    @abstractmethod
    def __call__(self, unit: Unit) -> Unit: ...


class Decode(Stage):
    """Source files -> `mix` (n, 2, samples) float32 at 44.1 kHz, one row per clip.

    A track is decoded once, cut by the paper's rule in native-rate samples, and each clip is resampled
    once. With `separation.scope: track` the whole track is resampled instead and handed on for separation;
    clips then start at the nearest 44.1 kHz sample.
    """

    name = "decode"
    model_roles = ()

    def __init__(self, context: Context) -> None:
        config = context.config
        self.folder = Folder(context.root)
        self.protocol = context.protocol
        self.rule = segment.SegmentRule(config.segments.clip_s, config.segments.min_s, config.segments.max_clips)
        limits = config.limits
        self.limits = audio_io.AudioLimits(
            min_duration_s=config.segments.min_s,
            max_duration_s=limits.max_duration_s,
            max_channels=limits.max_channels,
            min_sample_rate=limits.min_sample_rate,
            max_sample_rate=limits.max_sample_rate,
            max_decoded_bytes=limits.max_decoded_bytes,
            max_peak=limits.max_peak,
        )
        self.max_file_bytes = limits.max_file_bytes
        self.whole_tracks = config.separation.scope == "track"
        self.samples = round(config.segments.clip_s * SAMPLE_RATE)

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
                data = self.folder.read(path)
                row["sha256"] = hashlib.sha256(data).hexdigest()
                _check_unchanged(track, len(data), "")
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
        if self.whole_tracks:
            whole = _stereo(audio_io.resample(audio, rate, SAMPLE_RATE))
            unit.track_audio[track["track_id"]] = whole
        for i, (start, end) in enumerate(segments):
            if self.whole_tracks:
                first = round(start * SAMPLE_RATE / rate)
                clip = whole[:, first : first + self.samples]
            elif rate == SAMPLE_RATE:
                clip = audio[:, start:end]
            else:
                clip = audio_io.resample(segment.cut(audio, rate, start, end), rate, SAMPLE_RATE)
            yield (
                clip,
                {
                    "key": f"{track['track_id']}_{i}",
                    "segment": i,
                    "start_s": start / rate,
                    "duration_s": (min(end, frames) - start) / rate,
                },
            )


class Measure(Stage):
    """Loudness, true peak and silence of the mix; silent clips are rejected here."""

    name = "measure"
    model_roles = ()

    def __init__(self, context: Context) -> None:
        self.silence_dbfs = context.config.silence_dbfs

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
    """`mix` -> `mix_mono` and `instrumental` (n, samples) float32, and each clip's vocal ratio."""

    name = "separate"
    model_roles = ("separator",)

    def __init__(self, context: Context) -> None:
        self.models = context.models
        self.whole_tracks = context.config.separation.scope == "track"
        self.nothing = context.config.separation.scope == "none"
        self.samples = round(context.config.segments.clip_s * SAMPLE_RATE)

    def __call__(self, unit: Unit) -> Unit:
        mix, rows = unit.clips["mix"], unit.ok_rows()
        if self.nothing:
            mono = np.stack([clip.mean(axis=0) for clip in mix]).astype(np.float32)
            for row in rows:
                row.update(stage=self.name)
            unit.clips = {"mix_mono": mono, "instrumental": mono}
            return unit
        if self.whole_tracks:
            instrumental, vocals = self._tracks(unit, rows)
        else:
            results = self.models.separator.separate(list(mix))
            instrumental = [result.instrumental for result in results]
            vocals = [result.vocals for result in results]
        samples = self.samples
        mono = np.zeros((len(rows), samples), np.float32)
        backing = np.zeros((len(rows), samples), np.float32)
        for i, row in enumerate(rows):
            mono[i] = mix[i].mean(axis=0)
            backing[i] = instrumental[i].mean(axis=0)
            row.update(stage=self.name, vocal_ratio=_energy(vocals[i]) / max(_energy(mix[i]), 1e-20))
        unit.clips = {"mix_mono": mono, "instrumental": backing}
        unit.track_audio = {}
        return unit

    def _tracks(self, unit: Unit, rows: list[dict[str, Any]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        needed = list(dict.fromkeys(row["track_id"] for row in rows))
        results = self.models.separator.separate([unit.track_audio[track] for track in needed])
        by_track = dict(zip(needed, results, strict=True))
        instrumental, vocals = [], []
        for row in rows:
            first = round(row["start_s"] * SAMPLE_RATE)
            result = by_track[row["track_id"]]
            instrumental.append(segment.cut(result.instrumental, SAMPLE_RATE, first, first + self.samples))
            vocals.append(segment.cut(result.vocals, SAMPLE_RATE, first, first + self.samples))
        return instrumental, vocals


class Score(Stage):
    """CLAP and MERT embeddings and the reward of mix and instrumental; CLAP scores against the caption."""

    name = "score"
    model_roles = Scorer.roles

    def __init__(self, context: Context) -> None:
        protocol = open_bundle(context.config.bundle).protocol(context.config.reward_text)
        runtime = context.config.runtime
        kept = runtime.embedding_cache
        cache = EmbeddingCache(kept, int(runtime.embedding_cache_gib * 2**30)) if kept else None
        self.scorer = Scorer(context.models, protocol, runtime.threads, cache)

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        texts = self.scorer.texts([row["caption"] for row in rows])
        mix = self.scorer.embed(unit.clips["mix_mono"])
        instrumental = self.scorer.embed(unit.clips["instrumental"])
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
        unit.clips = {
            "instrumental": unit.clips["instrumental"],
            "clap_audio": np.stack([mix.clap, instrumental.clap], axis=1),
            "mert": np.stack([mix.mert, instrumental.mert], axis=1),
        }
        return unit


class Encode(Stage):
    """`instrumental` -> posterior `latent_mean` and `latent_std` (n, 430, 40) float16, optionally FLAC."""

    name = "encode"
    model_roles = ("latents",)

    def __init__(self, context: Context) -> None:
        self.models = context.models
        self.batch = context.config.runtime.batch
        self.keep_audio = context.config.keep_audio
        self.config = context.config

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        note_gains(unit, self.config)
        audio = unit.clips["instrumental"]
        if "gain" in unit.clips:
            audio = audio * unit.clips["gain"][:, None]
        mean, std = self.models.latents.encode(audio, self.batch)
        for row in rows:
            row["stage"] = self.name
        clips = {name: array for name, array in unit.clips.items() if name not in ("instrumental", "gain")}
        if self.keep_audio:
            clips["instrumental"] = unit.clips["instrumental"]
        unit.clips = clips | {"latent_mean": mean.astype(np.float16), "latent_std": std.astype(np.float16)}
        return unit


class Text(Stage):
    """Text features of the captions that this unit is the first to hold: T5 rows and the two CLAP vectors."""

    name = "text"
    model_roles = ("text", "clap", "clap_condition")

    def __init__(self, context: Context) -> None:
        self.models = context.models

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
    """Commit the unit: shard, captions, and last its index file. Leaves only rows in the unit."""

    name = "write"
    model_roles = ()

    def __init__(self, context: Context) -> None:
        self.run = Folder.at(context.config.output)
        self.keep_audio = context.config.keep_audio

    def __call__(self, unit: Unit) -> Unit:
        rows = unit.ok_rows()
        by_track: dict[str, list[float]] = {}
        for row in rows:
            by_track.setdefault(row["track_id"], []).append(row["reward_score"])
        metadata: dict[str, Any] = {"unit": unit.name, "files": {}, "latents": {}}
        for row in rows:
            row.update(stage=self.name, track_reward_score=float(np.mean(by_track[row["track_id"]])))
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
        self.run.create(f"{index.INDEX}/{unit.name}.parquet", index.to_bytes(unit.rows, metadata))
        unit.clips, unit.texts, unit.caption_ids = {}, {}, []
        return unit

    def _members(self, unit: Unit, i: int, row: dict[str, Any]) -> dict[str, bytes]:
        left_out = {"shard", "status", "reason", "message", *index.PLACES}
        facts = {name: value for name, value in row.items() if name not in left_out}
        members = {"json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()}
        for name in ("clap_audio", "latent_mean", "latent_std", "mert"):
            members[f"{name}.npy"] = shards.npy_bytes(unit.clips[name][i])
        if self.keep_audio:
            members["flac"] = audio_io.encode_flac(unit.clips["instrumental"][i][None], SAMPLE_RATE)
        return members


STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (Decode, Measure, Separate, Score, Encode, Text, Write)
}


def note_gains(unit: Unit, config: CorpusConfig) -> None:
    """With `latent_peak`: `gain` (n,) float32 of the instrumentals, one factor per track, unless it is there.

    It follows from all ok clips of a track, so it is noted before `Encode` may see them one by one.
    """
    if config.latent_peak is None or "gain" in unit.clips:
        return
    tracks = np.array([row["track_id"] for row in unit.ok_rows()])
    peaks = np.array([np.abs(clip).max(initial=0.0) for clip in unit.clips["instrumental"]])
    gain = np.ones(len(tracks), np.float32)
    for track in set(tracks):
        own = float(peaks[tracks == track].max())
        if own >= max(10 ** (config.silence_dbfs / 20), MIN_PEAK):
            gain[tracks == track] = config.latent_peak / own
    unit.clips["gain"] = gain


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


def _stereo(audio: np.ndarray) -> np.ndarray:
    return np.repeat(audio, 2, axis=0) if audio.shape[0] == 1 else audio


def _energy(audio: np.ndarray) -> float:
    return float(np.square(audio, dtype=np.float64).sum())
