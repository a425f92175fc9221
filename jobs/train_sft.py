"""Stage 1 as a script: `python jobs/train_sft.py --config ...`, also under `ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-sft", *sys.argv[1:]]))
