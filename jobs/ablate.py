"""Tables I to III, Figure 2 and other contrasts: python jobs/ablate.py --config configs/debug/ablate.yaml, also under
`ray job submit`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
