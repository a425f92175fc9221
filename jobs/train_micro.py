"""Train the parts of a micro bundle: python jobs/train_micro.py --config configs/micro/train.yaml --set parts=[vae]"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-micro", *sys.argv[1:]]))
