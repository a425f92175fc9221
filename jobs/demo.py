"""The demo: python jobs/demo.py, or with other settings: python jobs/demo.py --set output=RUN --set 'prompts=[TEXT]'"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
