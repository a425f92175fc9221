"""Complete training state in memory: captured from live objects, put back into them, bit for bit.

No pickle: optimiser state becomes named tensors and a layout of plain JSON types, generators become base64.
"""

import base64
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttmray.config import fingerprint
from ttmray.errors import UserError
from ttmray.json_text import as_read
from ttmray.training.ema import PowerEMA


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a run is at one step. Tensors are those of the live objects until somebody copies them."""

    step: int
    """Optimiser updates made."""
    samples: int
    """Training samples seen."""
    config: dict[str, Any]
    """The whole config, plain JSON types."""
    identity: dict[str, Any]
    """What must stay the same for a run to go on: the config's identity, the data's fingerprint and the like."""
    position: dict[str, Any] = field(default_factory=dict)
    """Place in the data."""
    rng: list[dict[str, Any]] = field(default_factory=list)
    """`rng_state` of every rank, in order."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What exported weights say besides."""
    ema_step: int = 0
    optimizer_layout: dict[str, Any] = field(default_factory=dict)
    """Parameter names per group and hyper-parameters."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def fingerprint(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)


def capture(
    model: nn.Module,
    ema: PowerEMA,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    samples: int,
    config: dict[str, Any],
    identity: dict[str, Any],
    position: dict[str, Any],
    rng: Sequence[dict[str, Any]],
    facts: dict[str, Any] | None = None,
) -> TrainingState:
    """State of live objects (no copies); `model` is the bare module."""
    tensors, layout = optimizer_tensors(optimizer, model)
    return TrainingState(
        step=step,
        samples=samples,
        config=config,
        identity=identity,
        position=position,
        rng=list(rng),
        facts=facts or {},
        ema_step=ema.step,
        optimizer_layout=layout,
        model=model.state_dict(),
        ema=ema.tensors(),
        optimizer=tensors,
    )


def restore(state: TrainingState, model: nn.Module, ema: PowerEMA, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, averages and optimiser state back, in place. RNG, step and position are the caller's.

    Raises:
        UserError: the state is of another model.
    """
    try:
        model.load_state_dict(state.model)
    except RuntimeError as error:
        raise UserError(f"The checkpoint is of another model: {error}", "Check the config of the model.") from error
    ema.load(state.ema, state.ema_step)
    load_optimizer(optimizer, model, state.optimizer, state.optimizer_layout)


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State tensors (any shapes, no copies) by `<parameter>/<slot>`, and the layout of the groups as plain JSON types.

    Raises:
        ValueError: an optimiser with state that is no tensor (AdamW, fused or not, has none).
    """
    tensors: dict[str, Tensor] = {}
    names = _parameter_names(optimizer, model)
    for group, members in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], members, strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"{type(optimizer).__name__} keeps a {type(value).__name__} in {slot!r}")
                tensors[f"{name}/{slot}"] = value
    options = [
        {key: value for key, value in group.items() if key != "params"} | {"params": members}
        for group, members in zip(optimizer.param_groups, names, strict=True)
    ]
    return tensors, {"kind": type(optimizer).__name__, "groups": as_read(options)}


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], layout: Mapping[str, Any]
) -> None:
    """Give the optimiser its state back, tensors of any shape. Options such as weight decay stay those of `optimizer`:
    the config rules.

    Raises:
        UserError: another optimiser, or other parameters in its groups.
    """
    names = _parameter_names(optimizer, model)
    saved = [group["params"] for group in layout["groups"]]
    if layout["kind"] != type(optimizer).__name__ or saved != names:
        raise UserError(
            f"The checkpoint's optimiser is a {layout['kind']} over {sum(map(len, saved))} tensors, this run's a "
            f"{type(optimizer).__name__} over {sum(map(len, names))}, or their order differs.",
            "It belongs to another model.",
        )
    number = {name: i for i, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("/")
        state.setdefault(number[name], {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state() -> dict[str, Any]:
    """State of this process's global generators (torch CPU and current GPU, numpy, random) as plain JSON types."""
    version, words, gauss = random.getstate()
    twister: Any = np.random.get_state(legacy=False)
    return {
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": _text(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_available() else None,
        "numpy": {
            "key": _text(twister["state"]["key"]),
            "pos": int(twister["state"]["pos"]),
            "has_gauss": int(twister["has_gauss"]),
            "gauss": float(twister["gauss"]),
        },
        "python": {"version": version, "words": _text(np.array(words, np.uint32)), "gauss": gauss},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Make this process's generators go on from `state`. A GPU's part is skipped where there is no GPU."""
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], "u1")))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], "u1")))
    twister, python = state["numpy"], state["python"]
    np.random.set_state(("MT19937", _array(twister["key"]), twister["pos"], twister["has_gauss"], twister["gauss"]))
    random.setstate((python["version"], tuple(_array(python["words"]).tolist()), python["gauss"]))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _array(text: str, kind: str = "<u4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).copy()
