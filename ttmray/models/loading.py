"""How models of a bundle are loaded, and what bundles of every kind build alike. Imports no framework by itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ttmray.errors import UserError

if TYPE_CHECKING:
    from ttmray.models.clap import Clap
    from ttmray.models.separator import Separator


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded.

    `clip_samples` is at 44.1 kHz, `threads` is how many clips a CPU embeds side by side, and the last three are the
    separator's.
    """

    device: str = "cpu"
    batch: int = 8
    threads: int = 1
    clip_samples: int = 441_000
    instrumental: Literal["sum", "residual"] = "sum"
    overlap: float = 0.25
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"batch must be at least 1, not {self.batch}.")


def separator_of(model: Any, device: str, options: LoadOptions) -> "Separator":
    from ttmray.models.separator import Separator

    return Separator(
        model,
        device,
        options.batch,
        overlap=options.overlap,
        precision=options.precision,
        instrumental=options.instrumental,
    )


def clap_of(path: Path, tokenizer: Path, device: str, options: LoadOptions) -> "Clap":
    """A `config.json` of transformers beside the weights overrides HTSAT-base."""
    from transformers import ClapConfig

    from ttmray.models.clap import load_laion_clap

    own = (path.parent / "config.json").is_file()
    config = ClapConfig.from_pretrained(path.parent, local_files_only=True) if own else None
    return load_laion_clap(path, tokenizer, config=config, device=device, batch=options.batch, threads=options.threads)
