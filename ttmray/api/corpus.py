"""`ttmray.score_corpus` and `open_corpus`: a corpus from songs; its index as a table, its clips as arrays and as a
torch dataset."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ttmray.api.inputs import config_from, path_of, texts_of
from ttmray.config import merged
from ttmray.corpus import index, scores
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.runs import KINDS_OF_CORPUS, kind_of, read
from ttmray.storage import Folder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from ttmray.api.dataset import ClipDataset
    from ttmray.corpus.config import CorpusConfig
    from ttmray.training.clips import Clips

SplitName = Literal["train", "validation", "test", "all"]
SCORE = "instrumental_reward_score"
CACHE = "~/.cache/ttmray/corpora"


@dataclass(frozen=True, eq=False, repr=False)
class CorpusSample:
    """A clip of a corpus as training reads it.

    Attributes:
        row: of the index.
        mean, std: of the VAE's posterior, (frames, channels) float16, not normalised.
        text: T5 features of the caption, (tokens, width) float16.
        text_c: CLAP vector of the caption, (512,) float32.
        score: None without a score column.
    """

    key: str
    row: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    text: np.ndarray
    text_c: np.ndarray
    score: float | None

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score {self.score:.3g}"
        return f"CorpusSample({self.key}, {len(self.mean)} frames, {len(self.text)} tokens{score})"


def score_corpus(
    songs: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    config: "str | os.PathLike[str] | CorpusConfig | None" = None,
    **fields: Any,
) -> "Corpus":
    """Make, or go on making, a corpus of songs: the job of `ttmray score-corpus`.

    Unless a config or a field says otherwise it runs without Ray, and clips are as long as those of the bundle.

    Args:
        songs: folder or bucket of songs, or a table of tracks; default: the config's.
        output: run folder, local or s3://; default: the config's.
        config: a `CorpusConfig`, a file or a preset such as `attm/corpus`; default: the defaults.
        fields: of the config, such as `bundle="micro"`, `splits={"validation": 2, "test": 2}` (all: `ttmray config
            score-corpus`).

    Returns:
        The corpus. Songs that are none are rows of its index with a reason, however many they are.

    Raises:
        UserError: for everything that the user can mend.
        KeyboardInterrupt: what was committed is kept; the same call goes on.

    >>> import ttmray
    >>> corpus = ttmray.score_corpus(
    ...     "my-songs", output="runs/new-corpus", bundle="debug", segments={"min_s": 1.0},
    ...     splits={"validation": 0, "test": 0}, runtime={"workers": 0}
    ... )
    >>> corpus.index["status"].tolist()
    ['ok', 'ok']
    """
    from ttmray.cluster import alone
    from ttmray.corpus.config import CorpusConfig
    from ttmray.corpus.job import score_corpus

    if songs is not None and "input" in fields:
        raise UserError(f"songs and input={fields['input']!r} both say where the songs are.", "Leave one of them out.")
    ours: dict[str, Any] = {} if songs is None else {"input": path_of(songs, "songs")}
    ours |= {} if output is None else {"output": path_of(output, "output")}
    if config is None:
        ours |= {"runtime": {"runner": "local"}}
    settings: CorpusConfig = config_from(CorpusConfig, config, merged(ours, fields))
    with alone():
        score_corpus(settings)
    return open_corpus(settings.output)


def open_corpus(path: str | os.PathLike[str], *, scores: str | Sequence[str] = ()) -> "Corpus":
    """A corpus or a pool, local or s3://, finished or still growing.

    Args:
        path: its run folder.
        scores: tables of `ttmray corpus rescore` that the index shall have beside its own columns, or columns of them:
            `ranker`, or `ranker/reward_score`.

    Raises:
        UserError: there is no such run, or it has no such scores.

    >>> import ttmray
    >>> corpus = ttmray.open_corpus("runs/my-corpus")
    >>> good = corpus.index.query("status == 'ok' and instrumental_reward_score > 0")
    >>> sorted(good["split"].unique())
    ['train', 'validation']
    """
    return Corpus(Folder.at(path_of(path, "path")), texts_of(scores, "scores"))


class Corpus:
    """What `ttmray.open_corpus` gives. Iterating over it gives its clips that are ok.

    Attributes:
        folder: where it lies.
        note: what people must know about its numbers.
        protocol: how its scores were made.
    """

    def __init__(self, run: Folder, names: Sequence[str]) -> None:
        described = read(run, kind_of(run, KINDS_OF_CORPUS))
        self._run, self.folder = run, run.uri
        self.note, self.protocol = str(described.get("note", "")), str(described.get("protocol_id", ""))
        tables = scores.table_names(run) if names else []
        each = [[f"{name}/{column}" for column in scores.REWARDS] if name in tables else [name] for name in names]
        self._columns = [column for columns in each for column in columns]
        for column in self._columns:
            scores.require_column(run, column)

    def __repr__(self) -> str:
        return f"Corpus({self.folder!r})"

    @cached_property
    def _rows(self) -> "pa.Table":
        return scores.with_columns(self._run, index.read_index(self._run), self._columns)

    @cached_property
    def index(self) -> "pd.DataFrame":
        """A row per clip, and per track that gave none (docs/data-formats.md has the columns)."""
        table: pd.DataFrame = self._rows.to_pandas()
        table.attrs["note"] = self.note
        return table

    @property
    def score_columns(self) -> list[str]:
        """Columns that can condition a model: numbers of the index, and those of tables of scores."""
        return scores.columns(self._run)

    def __len__(self) -> int:
        """Clips that are ok."""
        return int(sum(status == OK for status in self._rows["status"].to_pylist()))

    def __iter__(self) -> Iterator[CorpusSample]:
        return self.samples()

    def samples(
        self, split: SplitName = "all", *, keys: str | os.PathLike[str] | None = None, score: str | None = SCORE
    ) -> Iterator[CorpusSample]:
        """The clips that are ok, in the order of the index.

        Args:
            split: of which split.
            keys: file of the keys to keep, such as `keys.txt` of `ttmray filter`; default: all.
            score: column of the scores, see `score_columns`; None: none.

        Raises:
            UserError: there are no such clips or scores, or files are damaged.

        >>> import ttmray
        >>> sample = next(ttmray.open_corpus("runs/my-corpus").samples("train"))
        >>> sample.key, sample.row["caption"], sample.mean.dtype
        ('t000000_0', 'a caption of number 0', dtype('float16'))
        """
        clips = open_clips(self._run, split, keys, score)
        places = {key: i for i, key in enumerate(self._rows["key"].to_pylist())}
        for i in range(len(clips)):
            arrays = clips.arrays(i)
            row = self._rows.slice(places[clips.key(i)], 1).to_pylist()[0]
            yield CorpusSample(clips.key(i), row, *arrays, None if score is None else float(clips.score[i]))

    def dataset(
        self, split: SplitName = "train", *, keys: str | os.PathLike[str] | None = None, score: str | None = SCORE
    ) -> "ClipDataset":
        """A `torch.utils.data.Dataset` for a training loop of one's own; its items go into the usual `DataLoader`.

        Args:
            split, keys, score: as in `samples`.

        Raises:
            UserError: as `samples`.

        >>> import ttmray
        >>> from torch.utils.data import DataLoader
        >>> data = ttmray.open_corpus("runs/my-corpus").dataset("train")
        >>> batch = next(iter(DataLoader(data, batch_size=4)))
        >>> batch["mean"].shape, batch["score"].shape
        (torch.Size([4, 16, 40]), torch.Size([4]))
        """
        from ttmray.api.dataset import ClipDataset

        return ClipDataset(open_clips(self._run, split, keys, score))


def open_clips(run: Folder, split: SplitName, keys: str | os.PathLike[str] | None, score: str | None) -> "Clips":
    """Random access to clips, as Stage 1 has it; files of remote runs are copied to its cache.

    Raises:
        UserError: as `Corpus.samples`.
    """
    from ttmray.training.data import DataConfig, SourceConfig, open_mixture

    if split not in ("train", "validation", "test", "all"):
        raise UserError(f"there is no split {split!r}.", "Splits: train, validation, test, all.")
    source = SourceConfig(
        corpus=run.uri, split=split, keys=None if keys is None else path_of(keys, "keys"), score_column=score
    )
    return open_mixture(DataConfig(sources=(source,), cache=CACHE)).sources[0]
