"""Tuning methods side by side as a script: `python jobs/compare_methods.py --config ...`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare-methods", *sys.argv[1:]]))
