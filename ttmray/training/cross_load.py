"""What a cross-load costs: steering before and after it, measured at the start of a run and said aloud.

Stage 3 of the paper puts v1 weights into the v2 forward, and finds the score inert at the end of the chain (IV-C).
Whether training has saturated the score or the cross-load has lost it shows here, before the first update.
"""

import json
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttmray.cluster import ActorsConfig, alone, each
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.generation.steering import SteeringConfig, compare, lines, lost
from ttmray.models.backbone_weights import file_head, read_config, tidy, with_head
from ttmray.models.cross_load import CROSS_LOAD, CrossLoad, cross_load
from ttmray.models.score_heads import Head
from ttmray.models.state_dicts import read_state_dict
from ttmray.models.weights import weights_file
from ttmray.storage import Folder
from ttmray.training.config import ModelConfig, TrainConfig
from ttmray.training.data import corpus_bundle
from ttmray.training.loop import preserved_mode
from ttmray.training.task import MakeTask


def report_cross_load(config: TrainConfig, make_task: MakeTask, device: torch.device) -> None:
    """Measure and say what a cross-load costs; nothing where the run is none. A later launch says it again unmeasured.

    Nothing that the training draws or computes depends on it: models and batches are its own, and the noise is drawn
    by name.

    Args:
        device: of this process, or of the workers.
    """
    crossed = _crossed(config)
    if crossed is None or crossed.new_head:
        return
    out = Folder.at(config.output)
    report = None
    with suppress(ValueError, UserError):  # none, or a damaged one: it is measured again
        report = out.read_json(CROSS_LOAD)
    if report is None and config.cross_load.prompts:
        runtime = config.runtime
        gpus = float(device.type == "cuda")
        pool = ActorsConfig(runner=runtime.runner, device=device.type, workers=1, cpus=runtime.cpus, gpus=gpus)
        make = partial(_Measure, type(config), config.model_dump_json(), make_task, str(device), crossed.weights)
        with alone():
            (measured,) = each(make, [config.cross_load], pool)
        about = {"weights": crossed.weights, "forward": crossed.forward, "forced": crossed.forced}
        report = {**about, **measured, "lost": lost(measured, crossed.forward)}
        out.write(CROSS_LOAD, json.dumps(report, indent=1).encode())
    if report is None:
        return
    for line in lines(report):
        console.print(line, markup=False)
    if report["lost"]:
        console.print(
            f"the cross-load has lost the score: {report['forwards'][crossed.forward]['kept']:.0%} of its steering is "
            "left. That the score changes nothing at the end of this run is then no saturation by training. To keep "
            f"it, stay in {crossed.weights}: model.head: {crossed.weights}.",
            style="yellow",
            markup=False,
        )


def _crossed(config: TrainConfig) -> CrossLoad | None:
    if config.model.init is None:
        return None
    path = weights_file(config.model.init, "model.init")
    named = read_config(path).get("head")
    if named == config.model.head:  # without reading gigabytes
        return None
    return init_cross_load(config.model, tidy(read_state_dict(path), str(path)), path)


def init_cross_load(model: ModelConfig, state: Mapping[str, Tensor], path: Path) -> CrossLoad | None:
    """The cross-load of a start from the weights of a file, if it is one.

    Args:
        model: of the run.
        state: tensors of the file, tidied, of any shape.
        path: of the file, with its config.

    Raises:
        UserError: the weights would collapse, the file does not say what they were trained as, or says something else
            than `model.init_head`.
    """
    named = file_head(state, read_config(path))
    if named is None and model.init_head is None and model.head != "none":
        raise UserError(
            f"model.init: {path} has a score embedding and does not say for which head it was trained.",
            "Set model.init_head: v1, v2 or v4, which share their tensors; the paper's submission is v2.",
        )
    if named is not None and model.init_head not in (None, named):
        raise UserError(
            f"model.init_head is {model.init_head}, but {path} was trained with head {named}.",
            "Leave model.init_head out.",
        )
    theirs = named or model.init_head or model.head
    return cross_load(theirs, model.head, f"model.init: {path}", force=model.force_head)


class _Measure:
    """The weights of a run in both forwards, in one process; a call measures them on the run's first texts."""

    def __init__(self, kind: type[TrainConfig], config: str, make_task: MakeTask, device: str, own: Head) -> None:
        self.config = kind.model_validate_json(config)
        before, console.quiet = console.quiet, True  # the launch has said what there is to say
        try:
            self.task = make_task(self.config, torch.device(device))
        finally:
            console.quiet = before
        self.own = own

    def __call__(self, settings: SteeringConfig) -> dict[str, Any]:
        with closing(self.task.batches(0, settings.prompts, 0, 1, False)) as batches:
            batch = next(batches).batch
        model = self.task.model
        with preserved_mode(model):
            models = {self.own: with_head(model, self.own, force=True)[0], model.config.head: model}
            count = settings.prompts  # of pairs, the winners' texts
            return compare(models, batch.text[:count], batch.text_c[:count], settings, corpus_bundle(self.config.data))
