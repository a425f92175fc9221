"""What a training run writes about itself: one line per logged step, for people, for pandas and for live curves."""

import json
import os
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from ttmray.config import fingerprint
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.local_files import sync
from ttmray.runs import RUN
from ttmray.storage import Folder, explained

METRICS = "metrics.jsonl"


class Logbook:
    """`metrics.jsonl` of a run: one JSON object per logged step, none twice, whatever was interrupted.

    A line survives the end of its process from `write` on, a power cut from the next `flush` on; in a bucket, which
    cannot append, it is there from the next `flush` on.

    Args:
        out: run folder.
        step: where the run goes on; lines of later steps belong to work that was lost and are taken out.
        tensorboard: also write events, if tensorboard is installed and the folder is local.
        wandb: project of Weights & Biases that gets the numbers as well. What is made again after an interruption has
            the same numbers, and W&B keeps the first of them.

    Raises:
        UserError: W&B was asked for and is not installed, or does not start.
    """

    def __init__(self, out: Folder, step: int, tensorboard: bool, wandb: str | None = None) -> None:
        self.out = out
        self._wandb = _wandb(out, wandb) if wandb else None
        data = out.read(METRICS) if out.exists(METRICS) else b""
        self._lines = [line for line in data.decode(errors="replace").splitlines() if _step(line) <= step]
        if not self._cut(data):
            self._write_all()
        self._file = None if out.remote else open(out.path(METRICS), "a", encoding="utf-8")  # noqa: SIM115
        self._events = _tensorboard(out, step) if tensorboard and not out.remote else None

    def write(self, values: dict[str, Any]) -> None:
        """Add a line; `values` has a `step`. Numbers also go to TensorBoard and W&B."""
        line = json.dumps(values)
        if self._file is not None:
            with explained(self.out.path(METRICS)):
                self._file.write(line + "\n")
                self._file.flush()
        else:
            self._lines.append(line)
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float) and name != "step"}
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])

    def flush(self) -> None:
        """Make all lines so far durable. In a bucket the file is replaced by a longer one."""
        if self._file is None:
            self._write_all()
        else:
            sync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def _cut(self, data: bytes) -> bool:
        """Take what is not to stay off the end of a local file. It is not replaced: on a mounted drive it would not be
        there for a while, and whoever is killed then has lost all of it.

        Args:
            data: that it holds.

        Returns:
            False where that cannot be done: in a bucket, without a file, or where lines within are not to stay.
        """
        rest = self._text()
        if self.out.remote or not data or not data.startswith(rest):
            return False
        with explained(self.out.path(METRICS)):
            os.truncate(self.out.path(METRICS), len(rest))
        return True

    def _text(self) -> bytes:
        return "".join(line + "\n" for line in self._lines).encode()

    def _write_all(self) -> None:
        self.out.write(METRICS, self._text())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))


def show(values: dict[str, Any], total: int, extra: Iterable[str] = ()) -> None:
    """One line for people: the usual numbers, and those called `extra`."""
    parts = [f"step {values['step']}/{total}", f"loss {values['loss']:.4f}"]
    parts += [f"{name} {values[name]:.4g}" for name in ("lr", "grad_norm") if name in values]
    parts.append(f"{values['samples_per_s']:.3g} samples/s")
    parts += [_mfu(values["mfu"]), f"data wait {values['data_wait']:.1%}"]
    parts.append(f"ETA {timedelta(seconds=round(values['eta_s']))}")
    parts += [f"{name} {values[name]:.4g}" for name in extra]
    console.print(" | ".join(parts))


def _mfu(share: float) -> str:
    """More than there is means that the peak was measured while others used the device, and says no more than that."""
    return f"MFU {share:.1%}" if share <= 1 else "MFU not known (peak measured too low)"


def read_lines(out: Folder) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, in their order, without what a killed process left half-written."""
    lines = out.read(METRICS).decode(errors="replace").splitlines()
    return [read_json(line) for line in lines if _step(line) < 1 << 62]


def _step(line: str) -> int:
    try:
        return int(read_json(line)["step"])
    except (ValueError, KeyError, TypeError):  # what a killed process or a full disk left half-written
        return 1 << 62


def _tensorboard(out: Folder, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("no TensorBoard events: pip install 'ttmray[track]'", markup=False)
        return None
    return SummaryWriter(out.path("tensorboard"), purge_step=step + 1)


def _wandb(out: Folder, project: str) -> Any:
    """The W&B run of a run folder: the same one at every launch."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "runtime.wandb needs the package wandb.", "pip install 'ttmray[wandb]', or set it to null."
        ) from error
    described = out.read_json(RUN) if out.exists(RUN) else {}
    try:
        return wandb.init(
            project=project,
            id=fingerprint([out.uri, described.get("created")])[:16],
            name=out.name,
            config=described.get("config"),
            resume="allow",
            dir=tempfile.gettempdir() if out.remote else out.uri,
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"Weights & Biases did not start: {error}", "`wandb login`, or WANDB_MODE=offline to upload later."
        ) from error
