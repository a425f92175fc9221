"""Configs of training runs. Defaults are the paper's Stage 1 (III-D) unless a field says otherwise."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ttmray.cluster import Cpus, RuntimeConfig
from ttmray.config import Config, Device, Location, added, execution
from ttmray.generation.steering import SteeringConfig
from ttmray.models.score_heads import Head, Null
from ttmray.training.data import DataConfig
from ttmray.training.flow_matching import FlowMatchingConfig
from ttmray.training.schedule import Schedule


class ModelConfig(Config):
    """Which backbone, and where its weights come from."""

    size: Literal["s_44k", "l_44k", "s_16k", "l_16k", "micro", "debug"] = "s_44k"
    """FluxAudio-S or L for 44.1 or 16 kHz latents; `micro` (128 wide, 4 blocks) and `debug` (tiny) take any corpus."""
    head: Head = "v1"
    """How the score enters (models/score_heads.py). The paper trains v1."""
    null: Null = "zero_embedding"
    """What a dropped score is; the paper's null = 0 can be read as `zero_embedding` or as `scalar_zero`."""
    null_text: Literal["zeros", "clap"] = added("zeros")
    """Pooled features of a dropped text, of training from scratch; weights from a file bring their own. `zeros`: what
    clips without a caption have, too. `clap`: CLAP's vector of the empty text, as in the public trainer. Token features
    are T5's of the empty text in both. The paper does not say."""
    pooled_gain: float = added(1.0, gt=0)
    """Of training from scratch: factor on the first weights that project the pooled text. Its vectors have norm 1, and
    a gated layer multiplies two projections of them, so that with the reference's start (1.0) the pooled text enters
    at about a thousandth of the time's embedding. Some 100,000 updates mend that, a few thousand do not."""
    init: Location | None = execution(None)
    """Weights to start from: an exported or a released file, local or s3:// (copied to each machine). Default: from
    scratch. Their hash is part of the identity."""
    init_head: Head | None = execution(None)
    """Head that `init` was trained with, for files that do not name it (`.pth`)."""
    force_head: bool = execution(False)
    """Also start v1 or v4 from v2 weights, which collapse there (models/cross_load.py)."""
    seed: int = 0
    """Of the initial weights."""


class OptimizerConfig(Config):
    """AdamW over all trainable weights, without exclusions from decay, as in the public trainer."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate after the warm-up."""
    warmup: int = Field(1000, ge=0)
    """Updates of linear warm-up."""
    schedule: Schedule = "constant"
    """After the warm-up. The paper's text says constant; the public config says step (x0.1 at 80 % and 90 %)."""
    weight_decay: float = Field(1e-6, ge=0)
    """Public trainer."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Public trainer."""
    eps: float = Field(1e-6, gt=0)
    """Public trainer under mixed precision (1e-8 without)."""
    clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""


class EmaConfig(Config):
    """Averages of the weights (training/ema.py)."""

    sigma_rels: tuple[Annotated[float, Field(gt=0, le=0.28)], ...] = Field((0.05, 0.1), min_length=1)
    """Relative widths; the first one is used for validation and samples."""
    snapshot_every: int = execution(10_000, ge=1)
    """Updates between the snapshots from which other averages are made after training; there is one at the end."""

    @field_validator("sigma_rels")
    @classmethod
    def _distinct(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a width twice")
        return value


class CheckpointConfig(Config):
    """How often the whole state is saved, and what is kept."""

    every: int = Field(2000, ge=1)
    """Updates. There is also one at the end, and one when the run is interrupted."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints that stay."""
    keep_every: int | None = Field(None, ge=1)
    """Steps whose multiples stay for good."""


class ValidationConfig(Config):
    """Loss on held-out clips, with averaged weights, no dropout and the same draws every time."""

    every: int = Field(5000, ge=1)
    """Updates."""
    clips: int = Field(512, ge=0)
    """At most this many clips of the split `validation` of the same corpora; 0: no validation."""


class SampleConfig(Config):
    """Audio to listen to while a run goes on."""

    every: int = Field(0, ge=0)
    """Updates; 0: no audio. There is some before the first update, too: a missing decoder is noticed at once."""
    prompts: tuple[str, ...] = ("a calm piano piece", "an energetic rock song with distorted guitars")
    """Texts, without the prefix that generation adds."""
    score: float | None = 1.0
    """Score for models with a score head."""
    steps: int = Field(25, ge=1)
    """Euler steps."""


class TrainRuntime(RuntimeConfig):
    """Where and how fast. None of it changes the trajectory beyond the order of sums."""

    workers: int = Field(1, ge=1)
    """Ray Train workers, one device each."""
    device: Device = "auto"
    """Of a worker; `auto` is cuda where there is one: in this machine, or under Ray in the cluster."""
    cpus: Cpus = Field(1.0, gt=0)
    """CPUs that Ray reserves per worker."""
    threads: int | None = Field(None, ge=1)
    """torch threads per worker on a CPU; default: torch's own choice locally, 1 under Ray."""
    device_batch: int | Literal["auto"] = "auto"
    """Samples per forward and device; must divide `batch / workers`. `auto`: what should fit in memory."""
    compile: bool = False
    """torch.compile the backbone."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory of a device, in 10^9 bytes, that a run must fit in: micro-batches are chosen for it, and a run that is
    estimated to need more is refused. null: what is free on a GPU, and no refusal."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more time."""
    log_every: int = Field(50, ge=1)
    """Updates per log line."""
    tensorboard: bool = True
    """Write TensorBoard events where the extra `track` is installed."""
    wandb: str | None = Field(None, min_length=1)
    """Project of Weights & Biases that metrics go to as well; needs the extra `wandb`. A relaunch goes on with the same
    run there. WANDB_ENTITY, WANDB_MODE=offline and so on work as usual."""
    watchdog_s: float = Field(1800.0, gt=0)
    """A run without any finished update for so long dumps the stacks of all threads and ends."""
    max_restarts: int = Field(3, ge=0)
    """How often in a row Ray's workers are started again when one is lost; a new checkpoint starts the count anew."""


class LoopConfig(Config):
    """What every training run has that goes through the loop (training/loop.py), whatever it learns from."""

    output: Location = execution()
    """Run folder: a local path or s3:// prefix."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    batch: int = Field(64, ge=1)
    """Samples per update, over all workers and accumulated micro-batches."""
    steps: int = Field(200_000, ge=1)
    """Updates. With a constant learning rate a finished run may be continued to more."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast type of the forward pass; weights and optimiser state are float32."""
    checkpoint: CheckpointConfig = execution(CheckpointConfig())
    validation: ValidationConfig = execution(ValidationConfig())
    samples: SampleConfig = execution(SampleConfig())
    runtime: TrainRuntime = execution(TrainRuntime())

    @property
    def draw_seed(self) -> int:
        """Of the generators of a process, from which nothing of ours draws."""
        return 0

    @property
    def beside(self) -> tuple[int, float]:
        """Ray actors that work beside the training's workers, and the CPUs of each. They have a GPU each where the
        workers have one."""
        return 0, 0.0

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.batch % self.runtime.workers:
            raise ValueError(f"batch ({self.batch}) must be a multiple of runtime.workers ({self.runtime.workers})")
        share = self.batch // self.runtime.workers
        wish = self.runtime.device_batch
        if isinstance(wish, int) and (wish < 1 or share % wish):
            raise ValueError(f"runtime.device_batch ({wish}) must divide batch / workers ({share})")
        if self.runtime.runner == "local" and self.runtime.workers > 1:
            raise ValueError("runtime.workers above 1 need runtime.runner: ray")
        if self.runtime.runner == "ray" and ":" in self.runtime.device:
            raise ValueError("runtime.device: Ray chooses the GPUs, so it is cuda, cpu or auto")
        return self


class TrainConfig(LoopConfig):
    """`jobs/train_sft.py` and `ttmray train-sft`: Stage 1, from scratch or from weights."""

    data: DataConfig
    """Corpora and their mixture."""
    model: ModelConfig = ModelConfig()
    flow: FlowMatchingConfig = FlowMatchingConfig()
    latent_std: Literal["samples", "means"] = "samples"
    """Latents are normalised by the deviation of posterior samples, or of posterior means. The paper's statistics
    are not public; samples are what the model sees."""
    cross_load: SteeringConfig = execution(SteeringConfig())
    """What is measured at the start where `model.init` was trained with another head (training/cross_load.py)."""

    @property
    def draw_seed(self) -> int:
        return self.data.seed

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        scored = self.data.sources[0].score_column is not None
        if scored and self.model.head == "none":
            raise ValueError("model.head is none, so data.sources need score_column: null")
        if not scored and self.model.head != "none":
            raise ValueError(f"model.head {self.model.head} needs a score_column in data.sources")
        return self
