"""The config of the corpus job: a folder or bucket of songs in, a scored WebDataset corpus out."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ttmray.cluster import Cpus, Gpus, RuntimeConfig
from ttmray.config import Config, Location, added, execution
from ttmray.models.bundle import DEFAULT, BundleName, bundle_of

MAX_UNIT_CLIPS = 32
"""32 stereo float32 clips of 10 s are 113 MB: below Ray Data's 128 MiB block (design, corpus pipeline)."""


class CatalogueConfig(Config):
    """Which songs, which captions, what is left out."""

    captions: Literal["auto"] | Location | None = execution("auto", union_mode="left_to_right")
    """Caption table (JSON list of {path, caption}, CSV, TSV, Parquet), joined by track id. `auto` takes the
    caption column of the input table, or a file `captions.*` or `tracks.*` at the root of the input folder."""
    audio_root: Location | None = execution(None)
    """Folder or bucket that the paths of an input table are relative to; default: the table's own folder."""
    exclude: Location | None = execution(None)
    """Text file with one track id per line that must never enter the corpus (evaluation references)."""
    duplicates: Literal["reject", "keep"] = "reject"
    """What to do with a file whose bytes equal those of an earlier track."""
    probe: bool = True
    """Read file headers for durations that the input table does not give. Off: every track counts as
    `segments.max_clips` clips in the plan."""
    limit: int | None = Field(None, ge=1)
    """Take only the first N tracks in catalogue order."""
    stem: str = added("", pattern=r"^[A-Za-z0-9_-]{0,32}$")
    """Of a folder, take only the files whose names end in this before their ending, such as `_instrumental` of
    separated songs that lie beside their mixes: `85/1085785_instrumental.mp3` is track 1085785. Empty: all audio."""


class SplitConfig(Config):
    """Splits by track, from a seeded hash of the track id, so that adding songs moves no other song."""

    validation: int = Field(200, ge=0)
    """Tracks held out for validation (paper III-D: 200)."""
    test: int = Field(200, ge=0)
    """Tracks held out for test (paper III-D: 200)."""
    seed: int = 0
    """Seed of the hash order."""
    table: Location | None = execution(None)
    """Table with the columns `id` (or `track_id`) and `split` (train, validation or test), instead of the rule:
    `ttmray attm split` writes that of the challenge. Tracks that it does not name are for training. The splits
    themselves are part of the plan's identity."""
    group_by_artist: bool = False
    """Keep all tracks of an artist in one split; counts are then reached with whole artists."""


class SegmentConfig(Config):
    """The paper's segment rule (III-D and the challenge baseline's preparation script)."""

    clip_s: float = Field(10.0, gt=0)
    """Length of a clip in seconds; where it is not named, that of the clips that the bundle knows."""
    min_s: float = Field(5.0, gt=0)
    """Tracks shorter than this are rejected; where neither is named, no more than a clip of the bundle."""
    max_clips: int = Field(10, ge=1, le=MAX_UNIT_CLIPS)
    """At most this many clips per track, evenly spread."""


class LimitConfig(Config):
    """What a sound file may be. Everything beyond is rejected with its reason."""

    max_duration_s: float = Field(7200.0, gt=0)
    """Longest track in seconds."""
    max_channels: int = Field(2, ge=1, le=2)
    """Surround files are rejected, because a silent downmix would change their balance."""
    min_sample_rate: int = Field(16000, ge=1000)
    """Hz. Lower rates carry no music band worth training on."""
    max_sample_rate: int = Field(192000, le=768000)
    """Hz."""
    max_file_bytes: int = Field(2 * 2**30, gt=0)
    """Largest file that is read."""
    max_decoded_bytes: int = Field(2 * 2**30, gt=0)
    """Largest decoded size (float32) of one track; bounds the memory of a decoder."""
    max_peak: float = added(10.0, ge=1.0)
    """Largest sample, full scale 1.0 (10 is +20 dBFS). Float files in the range of integers are far beyond."""


class SeparationConfig(Config):
    """How vocals are removed."""

    scope: Literal["clip", "track", "none"] = "clip"
    """The paper separates clips; `track` separates the whole track and cuts afterwards, which gives the
    separator context at clip edges and costs more decoding memory. `none` takes the audio as it is, as for songs
    without vocals, or where the model is to learn singing: "instrumental" then means the mix, and `vocal_ratio` is
    empty."""
    instrumental: Literal["sum", "residual"] = "sum"
    """`sum` adds drums, bass and other (Demucs' default and the paper's); `residual` is mix minus vocals."""
    overlap: float = Field(0.25, ge=0, lt=1)
    """Share of a separator window that overlaps the next one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the separator; encoders always run in fp32."""


class StageResources(Config):
    """What one worker of a stage gets from Ray, and how many workers there are."""

    cpus: Cpus = Field(1.0, ge=0)
    """CPUs per worker. One that has models and a GPU reserves none where other processes decode: models never wait for
    a CPU."""
    gpus: Gpus | None = Field(None, ge=0)
    """GPUs per worker; a fraction is a scheduling share, not a memory limit. Default: where there are GPUs, one
    for each process that holds models (shared equally where `fuse` is `none`)."""
    workers: tuple[int, int] | None = None
    """Fewest and most workers; of stages without models, which are tasks, only the most counts. Default: from one to
    what the cluster has room for, at any time; where `fuse` is `none` a fixed share of what it has at the start (see
    corpus/placement.py)."""

    @field_validator("workers")
    @classmethod
    def _ordered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("needs 1 <= fewest <= most")
        return value


class CorpusRuntime(RuntimeConfig):
    """Where and how fast; none of it changes a result."""

    runner: Literal["local", "ray"] = "ray"
    """`local` is a plain loop or process pool without Ray; results are identical."""
    workers: int | Literal["auto"] = Field("auto")
    """Processes of the local runner (0: in this process); `auto` is one per CPU. For Ray, the CPUs of a
    cluster that this job starts itself; ignored when it joins one."""
    batch: int = Field(8, ge=1, le=256)
    """Clips per model forward. On a CPU models always see one clip at a time: larger batches are not faster
    there and change last bits."""
    threads: int = Field(1, ge=1)
    """Clips that one worker resamples and embeds side by side on CPUs. Each is computed in one thread, because more
    would change last bits; more workers are the better use of many cores."""
    fuse: Literal["auto", "all", "models", "none"] = "auto"
    """Which stages share a Ray process: `all` of them (nothing travels), the `models` stages and writing (one process
    holds all models; `all` where no worker gets a GPU), or `none` (stages spread over many cards, in fixed shares).
    `auto`: `models` where there are GPUs at the start or `models.gpus` asks for them, else `all`. The local runner
    always shares all."""
    decode: StageResources = StageResources()
    """Workers that decode, cut and resample."""
    models: StageResources = StageResources()
    """Workers of the fused model stages; also the default for separate, score and encode."""
    separate: StageResources | None = None
    """Workers of the separation stage where `fuse` is `none`."""
    score: StageResources | None = None
    """Workers of the scoring stage where `fuse` is `none`."""
    encode: StageResources | None = None
    """Workers of the encoding stage where `fuse` is `none`."""
    write: StageResources = StageResources(cpus=0.5)
    """Workers that write shards where `fuse` is `none`; else the processes with models do."""
    embedding_cache: Location | None = None
    """Local folder that keeps CLAP and MERT embeddings by content, shared by jobs on one machine."""
    embedding_cache_gib: float = Field(8.0, gt=0)
    """Bound of that folder; the least recently used go first."""
    object_store_gib: float | None = Field(None, gt=0)
    """Object store of a Ray instance that this job starts; default: Ray's own choice (30 % of RAM)."""
    clip_timeout_s: float = Field(600.0, gt=0)
    """A clip (or track) that runs alone longer than this is quarantined. A unit that takes `unit_clips` times as long
    ends its worker, and runs alone after three such deaths."""
    no_progress_timeout_s: float = Field(1800.0, gt=0)
    """Without any finished unit for this long, or without a node for some stage, the job stops instead of hanging."""

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("needs 0 or more processes, or auto")
        return value


class ExtraStage(Config):
    """A stage from outside of the package, which adds columns to the index (see corpus/stage.py)."""

    stage: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:Class`; the module must be importable on every node."""
    options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """What it is made with."""


class CorpusConfig(Config):
    """`jobs/score_corpus.py` and `ttmray score-corpus`."""

    input: Location = execution()
    """Folder or bucket of songs, or a table of tracks (CSV, TSV, Parquet, JSON; MTG-Jamendo's TSV as it is)."""
    output: Location = execution()
    """Run folder: a local path or s3:// prefix."""
    catalogue: CatalogueConfig = CatalogueConfig()
    splits: SplitConfig = SplitConfig()
    segments: SegmentConfig = SegmentConfig()
    limits: LimitConfig = LimitConfig()
    separation: SeparationConfig = SeparationConfig()
    bundle: BundleName = DEFAULT
    """Set of models. `micro` knows the music of the built-in composer alone; `debug` is untrained: its scores mean
    nothing. `ttmray weights list` says which bundles have released weights."""
    reward_text: Literal["empty", "caption"] = "empty"
    """Text input of the reward. The released TuneJury scores use none; the paper does not say."""
    silence_dbfs: float = Field(-80.0, le=0)
    """A clip whose sample peak is below this is rejected as silent, and so is one whose channels cancel: what counts is
    the mono mix, which is all that the models hear (the reference rejects whole files with a peak below 1e-6, that is
    -120 dBFS)."""
    latent_peak: float | None = added(None, gt=0, le=1)
    """Sample peak that instrumentals are scaled to before the VAE, by one factor per track; null: not at all. The
    public loader scales each file, there a track without vocals, to 0.95 as mono and before it is cut. Here the peak is
    that of the track's ok clips, which lack what a long track has between them. Tracks whose clips stay below
    `silence_dbfs` are left as they are. Rewards, CLAP scores and kept audio have the level of the source. The paper
    does not say."""
    keep_audio: bool = False
    """Also store the instrumental of every clip as mono 16-bit FLAC."""
    extra_stages: tuple[ExtraStage, ...] = added(())
    """Stages of your own, each of which adds columns to the index. They run where what they read is there."""
    unit_clips: int = Field(MAX_UNIT_CLIPS, ge=1, le=MAX_UNIT_CLIPS)
    """Most clips per unit; a unit holds whole tracks and is what travels, is committed and is repeated."""
    max_failures: Annotated[int | str, Field(union_mode="left_to_right")] = execution("1%")
    """Exit code 3 when more clips and tracks than this failed: a count, or a share such as `1%`."""
    runtime: CorpusRuntime = execution(CorpusRuntime())

    @model_validator(mode="before")
    @classmethod
    def _fill_segments(cls, values: Any) -> Any:
        segments = values.get("segments", {}) if isinstance(values, dict) else None
        if not isinstance(segments, dict) or "clip_s" in segments:
            return values
        own = bundle_of(values).clip_s
        usual = SegmentConfig()
        if own == usual.clip_s:
            return values
        filled = {"clip_s": own, "min_s": min(own, usual.min_s)}
        return values | {"segments": filled | segments}

    @field_validator("max_failures")
    @classmethod
    def _count_or_share(cls, value: int | str) -> int | str:
        if isinstance(value, int):
            if value < 0:
                raise ValueError("needs a count of 0 or more, or a share such as '1%'")
        elif not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise ValueError("needs a count such as 10 or a share such as '1%'")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.segments.min_s > self.segments.clip_s:
            raise ValueError("segments.min_s must not exceed segments.clip_s")
        if self.segments.max_clips > self.unit_clips:
            raise ValueError(
                f"unit_clips ({self.unit_clips}) must hold a whole track of segments.max_clips "
                f"({self.segments.max_clips}) clips"
            )
        if self.limits.max_duration_s < self.segments.min_s:
            raise ValueError("limits.max_duration_s must not be shorter than segments.min_s")
        return self
