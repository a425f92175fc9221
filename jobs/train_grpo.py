"""Online GRPO as a script: `python jobs/train_grpo.py --config ...`, also under `ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-grpo", *sys.argv[1:]]))
