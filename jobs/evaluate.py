"""Evaluate folders of audio: python jobs/evaluate.py --config configs/debug/evaluate.yaml"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
