"""ttmray: from a folder or bucket of songs to a preference-tuned text-to-music model, on Ray.

The Python API is `load`, `compose`, `score_corpus`, `open_corpus`, `evaluate` and `train` (docs/python.md). It is
imported when it is first used: `import ttmray` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttmray.api import AudioClip as AudioClip
    from ttmray.api import Corpus as Corpus
    from ttmray.api import Evaluation as Evaluation
    from ttmray.api import LoadedBundle as LoadedBundle
    from ttmray.api import TrainingRun as TrainingRun
    from ttmray.api import compose as compose
    from ttmray.api import evaluate as evaluate
    from ttmray.api import load as load
    from ttmray.api import open_corpus as open_corpus
    from ttmray.api import score_corpus as score_corpus
    from ttmray.api import train as train

__version__ = "0.1.0"
__all__ = [
    "AudioClip",
    "Corpus",
    "Evaluation",
    "LoadedBundle",
    "TrainingRun",
    "__version__",
    "compose",
    "evaluate",
    "load",
    "open_corpus",
    "score_corpus",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ttmray' has no attribute {name!r}")
    return getattr(import_module("ttmray.api"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
