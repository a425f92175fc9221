"""Score a corpus: python jobs/score_corpus.py --config configs/debug/corpus.yaml --set input=SONGS --set output=RUN"""

import sys

from ttmray.cli import main

if __name__ == "__main__":
    sys.exit(main(["score-corpus", *sys.argv[1:]]))
