"""Stage 3: python jobs/train_crpo.py --config configs/debug/stage3.yaml, also under `ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-crpo", *sys.argv[1:]]))
