"""Put on PYTHONPATH by a test: a decoder that opens a file named `killer*` dies at once by SIGKILL.

An audit hook sees every `open` in every process of the job, so the production code needs no seam for it.
Only the decode stage is hit; the catalogue may list and hash the file.
"""

import os
import signal
import sys


def _die_in_decode(event: str, arguments: tuple) -> None:
    if event != "open" or not os.path.basename(str(arguments[0])).startswith("killer"):
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("corpus/stages.py"):
            if os.environ.get("KILLER_HANGS"):
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)
        frame = frame.f_back


sys.addaudithook(_die_in_decode)
