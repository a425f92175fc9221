"""Saves checkpoints without end in a child, kills it at random moments, and looks at what is left each time.

python saver_program.py FOLDER KILLS SEED; prints one JSON object. Run by test_checkpoint.py.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from ttmray.storage import Folder
from ttmray.training.checkpoint import BackgroundSaver, committed, load, newest_valid, save, sweep
from ttmray.training.state import TrainingState

PARTS = ("model", "ema", "optimizer")


def state_of(step: int) -> TrainingState:
    """What a run is at `step`, about 2 MB."""
    generator = torch.Generator().manual_seed(step)
    parts = {part: {"w": torch.randn(150_000, generator=generator)} for part in PARTS}
    return TrainingState(step=step, samples=8 * step, config={}, identity={"seed": 1}, **parts)


def assert_whole(folder: Folder, name: str) -> int:
    found = load(folder, name)
    expected = state_of(found.step)
    assert found.samples == expected.samples
    for part in PARTS:
        assert torch.equal(getattr(found, part)["w"], getattr(expected, part)["w"]), f"{name}: {part}"
    return found.step


def save_without_end(folder: Folder, step: int, background: bool) -> None:
    if not background:
        while True:
            step += 1
            save(folder, state_of(step))
    with BackgroundSaver(folder) as saver:
        while True:
            step += 1
            saver.save(state_of(step))


def main(path: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    folder, chance, steps, swept = Folder.at(path), random.Random(seed), [0], 0
    started = time.monotonic()
    save(Folder.at(f"{path}-trial"), state_of(0))
    pause = 4 * (time.monotonic() - started)
    for kill in range(kills):
        swept += len(sweep(folder))
        child = os.fork()
        if child == 0:
            save_without_end(folder, steps[-1], background=kill % 2 == 0)
        time.sleep(chance.uniform(0, pause))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = newest_valid(folder)
        steps.append(assert_whole(folder, newest) if newest else 0)
    sweep(folder)
    for name in committed(folder):
        assert_whole(folder, name)
    left = sorted(os.listdir(path)) if os.path.isdir(path) else []
    print(json.dumps({"steps": steps, "swept": swept, "committed": sorted(committed(folder)), "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
