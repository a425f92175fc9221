"""Train a preference ranker: python jobs/train_ranker.py --config configs/debug/ranker.yaml --set output=RUN"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-ranker", *sys.argv[1:]]))
