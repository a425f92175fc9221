"""`--plan-only` of jobs: what would be done, how long it takes here, and where it is written. Nothing is written."""

from collections.abc import Collection, Mapping, Sequence

from ttmray.cluster import ActorsConfig
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.models.bundle import Bundle
from ttmray.models.speed import time_here
from ttmray.storage import Folder

Row = tuple[str, str, str]
"""A name, a value, its reason."""
TFLOP_PER_CLIP: Mapping[str, float] = {"separator": 0.761, "clap": 0.031, "mert": 0.59, "vae_encoder": 0.116}
"""Of 10 s, of mdx_extra (htdemucs: 0.449), LAION-CLAP HTSAT-base, MERT-v1-330M and the VAE encoder."""


def show_rows(rows: Sequence[Row]) -> None:
    """Print rows, each with its reason."""
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, value, reason in rows:
        console.print(f"{name:<{width}}  {value}{f'  ({reason})' if reason else ''}", markup=False)


def show_plan(rows: Sequence[Row], out: Folder, todo: int, flops: float | None, runtime: ActorsConfig, of: str) -> int:
    """Print what a job would do; returns the exit code.

    Args:
        rows: what there is to do.
        out: where it would write.
        todo: items that are not done yet.
        flops: of what is to do; None: not known.
        of: which work the FLOPs are those of, or why they are not known.
    """
    where = ("time here", *(_time(flops, runtime, of) if todo else ("nothing", "all of it is done")))
    show_rows([*rows, where, ("writes to", str(out), "nothing is written by --plan-only")])
    return EXIT_OK


def _time(flops: float | None, runtime: ActorsConfig, of: str) -> tuple[str, str]:
    if flops is None:
        return "unknown", of
    gpus = runtime.gpus > 0 or (runtime.runner == "local" and runtime.device != "cpu")
    device = runtime.device if gpus else "cpu"
    value, reason = time_here(flops, device, devices=runtime.workers if runtime.runner == "ray" else 1)
    return value, f"{of}; {reason}"


def embedding_flops(bundle: Bundle, clips: int, models: Collection[str]) -> tuple[float | None, str]:
    """FLOPs of some models over clips as long as those of a bundle, and of what they are; None where they are not
    known, and why.

    Args:
        models: of `TFLOP_PER_CLIP`.
    """
    if not bundle.weights():
        return None, f"FLOPs of the models of bundle {bundle.name} are not known"
    total = sum(TFLOP_PER_CLIP[name] for name in models) * 1e12 * clips * bundle.clip_s / 10
    return total, f"of {' and '.join(sorted(models))} alone"


def weights_rows(bundle: Bundle, roles: Collection[str]) -> list[Row]:
    """A row about weights that a job needs and that are not here; none where all are."""
    try:
        bundle.require(roles)
    except UserError as error:
        return [("weights", error.message, error.hint or "")]
    return []
