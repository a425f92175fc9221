"""Generate clips: python jobs/generate.py --config configs/debug/generate.yaml --prompt "a calm piano" --samples 2"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
