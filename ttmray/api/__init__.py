"""The Python API: objects for what commands print. Each part imports what it needs when it is used."""

import warnings

from ttmray.api.corpus import Corpus, CorpusSample, open_corpus, score_corpus
from ttmray.api.evaluation import Evaluation, evaluate
from ttmray.api.loaded import LoadedBundle, Separation, load
from ttmray.api.songs import compose
from ttmray.api.sounds import AudioClip
from ttmray.api.training import TrainingRun, train

# of tqdm, in notebooks without widgets: libraries that load our models draw no bars there, and ours need none
warnings.filterwarnings("ignore", message="IProgress not found")

__all__ = [
    "AudioClip",
    "Corpus",
    "CorpusSample",
    "Evaluation",
    "LoadedBundle",
    "Separation",
    "TrainingRun",
    "compose",
    "evaluate",
    "load",
    "open_corpus",
    "score_corpus",
    "train",
]
