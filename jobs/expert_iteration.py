"""Stage 2: python jobs/expert_iteration.py --config configs/debug/stage2.yaml, also under `ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["expert-iteration", *sys.argv[1:]]))
