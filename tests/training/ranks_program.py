"""One of several ranks without Ray: a process group over gloo, and `train` as a Ray Train worker calls it.

python ranks_program.py RANK WORLD RENDEZVOUS CONFIG.json...; run by test_loop.py. Exit code as of `ttmray`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ttmray.training.config import TrainConfig
from ttmray.training.loop import train
from ttmray.training.sft import SftTask
from ttmray.training.task import Ranks


def main(rank: int, world: int, rendezvous: str, paths: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    cpu = torch.device("cpu")
    for path in paths:
        config = TrainConfig.model_validate_json(Path(path).read_text())
        train(SftTask(config, cpu), config, Ranks(rank, world), cpu, config.batch // world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
