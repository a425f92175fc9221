"""The corpus job with models that only calculate: real files, stages in between and commits, in a second. A program
too, with the arguments of `jobs/score_corpus.py`."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ttmray.corpus import assembly
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.running import Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.stages import Decode, Measure, Write
from ttmray.corpus.unit import Unit
from ttmray.models.bundle import Models

PACE_S = float(os.environ.get("FAULT_PACE_S", "0.02"))
"""For a unit: kills need something to interrupt."""


class Calculated(Stage):
    """All that models make of a clip, as small numbers that follow from its sound."""

    name, resources = "score", "score"
    model_roles = ("clap",)
    reads = ("mix",)
    writes = ("clap_audio", "mert", "latent_mean", "latent_std")

    def __init__(self, models: Models) -> None:
        pass

    def __call__(self, unit: Unit) -> Unit:
        time.sleep(PACE_S)
        mix, rows = unit.clips["mix"], unit.ok_rows()
        chunks = np.square(mix[..., : mix.shape[-1] // 16 * 16].reshape(len(rows), 2, 16, -1)).mean(-1)
        for row, clip in zip(rows, chunks, strict=True):
            row.update(reward_score=float(clip.mean()), instrumental_reward_score=float(clip.max()))
        latents = chunks.reshape(len(rows), 4, 8).astype(np.float16)
        unit.clips |= {"clap_audio": chunks, "mert": chunks + 1, "latent_mean": latents, "latent_std": latents + 1}
        return unit


class Letters(Stage):
    """Text features of captions: the numbers of their letters."""

    name, scope, resources = "text", "unit", "encode"
    writes = ("texts",)

    def __init__(self, models: Models) -> None:
        pass

    def __call__(self, unit: Unit) -> Unit:
        owned = {track["caption_id"]: track["caption"] for track in unit.tracks if track["caption_owner"]}
        unit.caption_ids = sorted(owned)
        if owned:
            codes = np.array(
                [np.resize([ord(c) for c in owned[one] or " "], 8) for one in unit.caption_ids], np.float32
            )
            unit.texts = {"t5": codes.reshape(-1, 2, 4).astype(np.float16), "clap": codes, "clap_score": codes / 2}
        return unit


@dataclass(frozen=True)
class FaultJob(CorpusJob):
    """The real job but for its models."""

    def makers(self) -> Makers:
        real = super().makers()
        first = {stage: real[stage] for stage in (Decode, Measure)}
        return {**first, Calculated: Calculated, Letters: Letters, Write: real[Write]}

    def load(self, roles: object) -> Models:
        return Models()

    def stages(self, names: Sequence[str] | None = None) -> list[type[Stage]]:
        """Of those names that it has: groups are laid out by the real stages."""
        return [stage for stage in self.makers() if names is None or stage.name in names]


def install() -> None:
    """From here on `score_corpus` of this process runs this job."""
    assembly.CorpusJob = sys.modules["fault_job"].FaultJob  # type: ignore[misc]


if __name__ == "__main__":
    import fault_job

    from ttmray import cli

    fault_job.install()
    sys.exit(cli.main(["score-corpus", *sys.argv[1:]]))
