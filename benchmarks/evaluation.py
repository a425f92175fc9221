"""The share of `ttmray evaluate` that passes in forwards of the models: two systems, 150 prompts, 300 clips of 10 s.

    python benchmarks/evaluation.py [--device cpu|cuda] [--clips 300] [--output FILE.json]

CLAP, MERT and the reward are seeded models of the released sizes, so the numbers of the clips mean nothing. The whole
command is timed, from the files to the tables, less the making of models; FAD has a reference set that lies ready. On
CPUs the share is of CPU seconds of the process (threads work side by side), on GPUs of wall seconds. On 2 cores it
takes half an hour. Exit code 1 if the target is missed.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from common import Line, machine, report, spread
from encoders import music
from torch import nn
from transformers import ClapModel, HubertModel

from ttmray.errors import EXIT_OK
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.evaluate import evaluate
from ttmray.evaluation.measure import MeasureConfig
from ttmray.evaluation.reference import build_reference
from ttmray.models import init_for_debug, seeded
from ttmray.models.bundle import BUNDLES, DebugBundle
from ttmray.models.clap import Clap, byte_roberta_tokenizer, htsat_base_config
from ttmray.models.devices import resolve_device
from ttmray.models.loading import LoadOptions
from ttmray.models.mert import Mert, mert_330m_config
from ttmray.models.tunejury import debug_tunejury

TARGET_SHARE = 90.0
BUNDLE = "seeded-full-size"


class Clock:
    """Seconds of the whole command, of the making of models, and of their forwards."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"
        self.making = self.forward = 0.0
        self._lock = threading.Lock()
        self._entered: dict[int, float] = {}

    def process(self) -> float:
        """Seconds of this process so far, in all threads."""
        return time.perf_counter() if self.gpu else time.process_time()

    def _thread(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()

    def timed(self, make: Callable[[], Any]) -> Any:
        started = self.process()
        try:
            return make()
        finally:
            self.making += self.process() - started

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._entered[threading.get_ident()] = self._thread()

    def _leave(self, *_: object) -> None:
        with self._lock:
            self.forward += self._thread() - self._entered[threading.get_ident()]


@dataclass(frozen=True)
class FullSize(DebugBundle):
    """Seeded models of the released sizes."""

    clock: Clock = field(kw_only=True)

    def _makers(self, options: LoadOptions, device: str, vocoder: bool) -> dict[str, Callable[[], Any]]:
        def clap() -> Clap:
            with seeded(0):
                model = ClapModel(htsat_base_config())
                init_for_debug(model)
            for module in (model.audio_model, model.audio_projection, model.text_model, model.text_projection):
                self.clock.watch(module)
            return Clap(model, byte_roberta_tokenizer(), device, options.batch, options.threads)

        def mert() -> Mert:
            with seeded(0):
                model = HubertModel(mert_330m_config())
                init_for_debug(model)
            self.clock.watch(model)
            return Mert(model, normalize=False, device=device, batch=options.batch, threads=options.threads)

        makers = {"clap": clap, "mert": mert, "tunejury": lambda: debug_tunejury(0, 1024, device)}
        return {role: partial(self.clock.timed, make) for role, make in makers.items()}


def write_clips(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i, clip in enumerate(music(first + count, 44100, 2)[first:]):
        soundfile.write(folder / f"p{i}.wav", clip.T, 44100, "PCM_16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=300, help="even")
    parser.add_argument("--output", type=Path, help="write the result here, as JSON")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    clock = Clock(device)
    BUNDLES[BUNDLE] = FullSize(BUNDLE, width=16, clock=clock)
    runtime = MeasureConfig(device=device, batch=32)
    prompts = arguments.clips // 2
    with tempfile.TemporaryDirectory() as work:
        songs = Path(work)
        for name, first in (("ours", 0), ("theirs", prompts)):
            write_clips(songs / name, prompts, first)
        write_clips(songs / "reference", 20, 2 * prompts)
        table = [{"id": f"p{i}", "prompt": f"a beat of chords, number {i}"} for i in range(prompts)]
        (songs / "prompts.json").write_text(json.dumps(table))
        build_reference("reference", f"{work}/reference", store=f"{work}/store", bundle=BUNDLE, runtime=runtime)
        clock.making = clock.forward = 0.0
        started, wall = clock.process(), time.perf_counter()
        code = evaluate(
            EvaluateConfig(
                folders=(f"{work}/ours", f"{work}/theirs"), prompts=f"{work}/prompts.json", reference="reference",
                references=f"{work}/store", output=f"{work}/evaluation", bundle=BUNDLE, runtime=runtime,
            )
        )  # fmt: skip
        seconds, wall = clock.process() - started - clock.making, time.perf_counter() - wall
        if code != EXIT_OK:
            raise RuntimeError(f"evaluation ended with exit code {code}")
    unit = "wall s" if clock.gpu else "CPU s"
    lines = [
        Line("share in forwards of the models", spread([100 * clock.forward / seconds], 1), "%", TARGET_SHARE),
        Line("whole command without making models", spread([seconds], 1), unit),
        Line("forwards", spread([clock.forward], 1), unit),
        Line("per clip", spread([wall / (2 * prompts)], 3), "wall s", note="with the making of models"),
    ]
    return report("evaluation", lines, machine() | {"device": device, "clips": 2 * prompts}, arguments.output, True)


if __name__ == "__main__":
    sys.exit(main())
