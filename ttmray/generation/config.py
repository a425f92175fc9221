"""The config of `jobs/generate.py` and `ttmray generate`: prompts in, audio files and a manifest out."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ttmray.cluster import ActorsConfig
from ttmray.config import Config, IdentityPart, Location, execution
from ttmray.generation.postprocess import PostprocessConfig
from ttmray.generation.sampler import SamplerConfig
from ttmray.models.bundle import DEFAULT, BundleName, bundle_of
from ttmray.models.score_heads import Head, Null

ClipLength = Annotated[
    Annotated[int, Field(ge=1)] | Literal["auto"], IdentityPart(lambda value: 441_000 if value == "auto" else value)
]
"""Samples at 44.1 kHz. `auto` is that of the bundle, which is part of the identity itself."""
OURS = ("bundle", "format")
"""Fields of post-processing that are those of the whole run."""


class GenerateRuntime(ActorsConfig):
    """Where and how fast. On CPUs none of it changes a byte; a GPU, its batch and `compile` change last bits."""

    batch: int = Field(16, ge=1, le=1024)
    """Clips per forward on a GPU. On a CPU models always see one clip at a time."""
    decode_batch: int = Field(4, ge=1, le=1024)
    """Clips per forward of VAE and vocoder on a GPU. BigVGAN keeps 0.42 GB of float32 activations per 10 s clip."""
    threads: int | Literal["auto"] = Field("auto")
    """Clips that a process makes side by side on a CPU, and finishes (loudness, files) side by side everywhere, each
    in one thread; `auto` is one per CPU, for Ray actors as many as `cpus`."""
    compile: bool = False
    """Compile the backbone: minutes at the first batch, faster from then on."""

    @model_validator(mode="before")
    @classmethod
    def _without_pool(cls, value: Any) -> Any:
        """Older files have runner, workers, cpus and gpus in a mapping `pool`."""
        if not isinstance(value, dict) or not isinstance(value.get("pool"), dict):
            return value
        old, own = value["pool"], {name: item for name, item in value.items() if name != "pool"}
        if twice := sorted(old.keys() & own.keys()):
            raise ValueError(f"pool.{twice[0]} is the old name of {twice[0]}, and both are there; leave out one")
        return old | own

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.threads, int) and self.threads < 1:
            raise ValueError("threads needs 1 or more, or auto")
        return self

    @property
    def thread_count(self) -> int:
        return self.threads if isinstance(self.threads, int) else self.process_cpus


TEXT_SETTINGS = ("prefix", "negative_prompt")


def with_bundle_sampler(values: Any) -> Any:
    """Settings of a job, with what its bundle says of sampling where they say nothing: a small text encoder has never
    read the paper's prefix, a released backbone is sampled as its authors do it. With a checkpoint of one's own only
    what concerns texts is the bundle's.

    Args:
        values: what a config is validated from; anything but a mapping comes back as it is.

    Raises:
        UserError: there is no such bundle.
    """
    if not isinstance(values, dict) or not isinstance(values.get("sampler", {}), dict):
        return values
    own = bundle_of(values).sampling
    if values.get("checkpoint") is not None:
        own = {name: value for name, value in own.items() if name in TEXT_SETTINGS}
    return values | {"sampler": {**own, **values.get("sampler", {})}} if own else values


class GenerateConfig(Config):
    """What to generate, and how."""

    prompts: Location | None = execution(None)
    """File of prompts (CSV, TSV, JSON, JSON lines, or text with one per line)."""
    texts: tuple[str, ...] = execution(())
    """Prompts, instead of a file."""
    output: Location = execution("runs/generate")
    """Run folder: a local path or s3:// prefix. The same command goes on with what is not done; other prompts may be
    added to a folder, other settings need another one."""
    bundle: BundleName = DEFAULT
    """Set of models. `micro` knows the music of the built-in composer alone; `debug` is untrained: it makes noise.
    `ttmray weights list` says which bundles have a released backbone."""
    checkpoint: Location | None = execution(None)
    """Weights of the backbone (.safetensors or .pth; its hash is part of the run's identity); default: the bundle's.
    On a cluster every node must see the file under this path; an s3:// address is copied to each."""
    second_checkpoint: Location | None = execution(None)
    """For `sampler.mode` crossover, crossover_reverse and average."""
    head: Head | None = None
    """Forward that uses the checkpoint's score embedding; default: the one that the file names."""
    force_head: bool = execution(False)
    """Also run v2 weights as v1 or v4, where they collapse (models/cross_load.py)."""
    null: Null | None = None
    """What a dropped score is; default: what the file names."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the noise, together with the prompt's id (the paper's submissions: 42 and 55)."""
    samples: int = Field(1, ge=1, le=10_000)
    """Clips per prompt; more than one are named `<id>_0`, `<id>_1`, ..."""
    best_of: int = Field(1, ge=1, le=1024)
    """Candidates per clip, of which the best is kept (TuneJury's Mode 1): more compute in place of training. They are
    judged as decoded, before post-processing, and sample k has the noise of candidates k N to k N + N - 1."""
    best_by: Literal["reward_score", "clap_score"] = "reward_score"
    """What is best. The reward sees no text, as everywhere here; the reference's Mode 1 shows it prefix and prompt."""
    sampler: SamplerConfig = SamplerConfig()
    """How latents are drawn. What nobody sets is as the bundle needs it (`micro`: no prefix, no negative prompt, a
    score of its own scale), or the paper's."""
    pad_to: ClipLength | None = "auto"
    """Samples at 44.1 kHz that a clip is padded to with zeros, or cut to, before post-processing: 430 latents are
    440,320 samples and the challenge wants 10 s. `auto`: the length of the bundle's clips, 441,000 but for `micro`.
    null: as decoded."""
    postprocess: PostprocessConfig | None = None
    """Separation and loudness; null: none. Its bundle and format are those of the run."""
    format: Literal["wav", "wav16", "flac"] = "wav"
    """`wav` is float32, `wav16` and `flac` have 16 bits with dither."""
    scores: bool = False
    """Also write reward and CLAP score (with the prompt, without prefix) of every clip into the manifest."""
    max_failures: Annotated[int, Field(ge=0)] = execution(0)
    """Exit code 3 when more clips than this failed."""
    runtime: GenerateRuntime = execution(GenerateRuntime())

    @model_validator(mode="before")
    @classmethod
    def _fill_sampler(cls, values: Any) -> Any:
        return with_bundle_sampler(values)

    @model_validator(mode="before")
    @classmethod
    def _fill_postprocess(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("postprocess"), dict):
            ours = {name: values.get(name, cls.model_fields[name].default) for name in OURS}
            return values | {"postprocess": ours | values["postprocess"]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.prompts is None) == (not self.texts):
            ways = "texts (--prompt 'a calm piano', or texts=[a calm piano]) or prompts (a file: prompts=FILE)"
            raise ValueError(f"needs {ways}, and not both")
        if (self.sampler.mode == "single") != (self.second_checkpoint is None):
            raise ValueError(f"sampler.mode {self.sampler.mode} does not go with second_checkpoint")
        if self.second_checkpoint is not None and self.checkpoint is None:
            raise ValueError("second_checkpoint needs a checkpoint")
        if self.checkpoint is None and (self.head or self.null):
            raise ValueError("head and null say how a checkpoint is used; there is none")
        for name in OURS:
            if self.postprocess is not None and getattr(self.postprocess, name) != getattr(self, name):
                raise ValueError(f"postprocess.{name} differs from {name}; leave it out")
        return self
