"""`python -m ttmray` is `ttmray`."""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main())
