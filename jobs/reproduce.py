"""The whole chain: python jobs/reproduce.py --config configs/debug/reproduce.yaml, also under `ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
