"""`ttmray.evaluate`: folders of audio in, tables out."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ttmray import pages
from ttmray.api.inputs import Prompts, config_from, items_of, path_of, prompts_from
from ttmray.errors import UserError
from ttmray.evaluation.results import COLUMNS, Comparison, Results, read_clips, read_results
from ttmray.evaluation.systems import SYSTEM_NAME
from ttmray.storage import Folder, is_remote

if TYPE_CHECKING:
    import pandas as pd

    from ttmray.evaluation.config import EvaluateConfig

Place = str | os.PathLike[str]
METRICS = ("system", "metric", "value", "low", "high", "n", "n_reference", "protocol")


def evaluate(
    folders: Place | Sequence[Place] | Mapping[str, Place],
    prompts: Prompts | None = None,
    *,
    config: "Place | EvaluateConfig | None" = None,
    **fields: Any,
) -> "Evaluation":
    """FAD, KAD, CLAP score, reward and loudness of folders of audio, as `ttmray evaluate` makes them.

    What is measured already is not measured again: the same call goes on where it stopped.

    Args:
        folders: systems, local or s3://, one or several; a mapping names them.
        prompts: a text, several, a mapping of ids to texts, or as a `Path` a file of them; default: the config's.
        config: an `EvaluateConfig`, a file or a preset such as `paper/evaluate`; default: the defaults.
        fields: of the config, such as `output="runs/my-evaluation"`, `bundle="paper"`, `reference="sdd-706"`,
            `baseline="old"` (all: `ttmray config evaluate`).

    Raises:
        UserError: folders, prompts or settings that cannot be, or weights that are not there.

    >>> import ttmray
    >>> studio, prompts = ttmray.load("debug", device="cpu"), ["a calm piano", "loud drums"]
    >>> clips = studio.generate(prompts, output="runs/clips", sampler={"steps": 1})
    >>> evaluation = ttmray.evaluate({"mine": "runs/clips"}, prompts, output="runs/evaluation")
    >>> evaluation.metrics.query("metric == 'reward'")[["system", "n"]].values.tolist()
    [['mine', 2]]
    """
    from ttmray.cluster import alone
    from ttmray.evaluation.config import EvaluateConfig
    from ttmray.evaluation.evaluate import evaluate_run

    if "texts" in fields:
        raise UserError("texts is no setting of evaluate.", "Prompts are its second argument.")
    if isinstance(folders, Mapping):
        for name in folders:
            if not isinstance(name, str) or not SYSTEM_NAME.fullmatch(name):
                raise UserError(f"{name!r} cannot name a system.", "Use letters, digits, '.', '_' and '-'.")
        places = [f"{name}={path_of(folder, f'folders, {name}')}" for name, folder in folders.items()]
    elif isinstance(folders, str | os.PathLike):
        places = [_place(folders)]
    else:
        several = items_of(folders, "folders", "Give a folder, several, or a mapping of names to folders.")
        places = [_place(path_of(folder, f"folders, number {i}")) for i, folder in enumerate(several)]
    ours: dict[str, Any] = {"folders": places}
    checked = None if prompts is None else prompts_from(prompts)
    if checked is not None:
        ours |= {"prompts": None, "texts": [prompt.text for prompt in checked]}
    settings: EvaluateConfig = config_from(EvaluateConfig, config, ours | fields)
    with alone():
        evaluate_run(settings, checked)
    return Evaluation(settings.output)


def _place(folder: Place) -> str:
    """A folder, such as `lr=0.1`, as one that the command takes for no name and folder."""
    path = os.fspath(folder)
    return path if is_remote(path) or os.path.isabs(os.path.expanduser(path)) else os.path.join(os.curdir, path)


class Evaluation:
    """The output folder of an evaluation.

    Attributes:
        folder: where it lies.
        results: all of `results.json`.
        warnings: what a reader of the numbers must know.

    Raises:
        UserError: the folder holds no evaluation.
    """

    def __init__(self, folder: Place) -> None:
        self._out = Folder.at(path_of(folder, "folder"))
        self.folder = self._out.uri
        self.results: Results = read_results(self._out)
        self.warnings = self.results.warnings

    def __repr__(self) -> str:
        return f"Evaluation({self.folder!r})"

    def _repr_html_(self) -> str:
        remarks = [text for text in (self.results.note, *self.warnings) if text]
        return pages.render("notebook.html.j2", remarks=remarks, table=self.metrics.to_html(index=False, escape=True))

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """A row per system and metric: value, interval (`low`, `high`), numbers of clips, and protocol."""
        import pandas as pd

        rows = [
            (system.name, name, of.value, of.low, of.high, of.n_generated, of.n_reference, of.protocol)
            for system in self.results.systems
            for name, of in system.metrics.items()
        ]
        table = pd.DataFrame(rows, columns=list(METRICS)).astype(dict.fromkeys(("value", "low", "high"), "float64"))
        table.attrs["note"] = self.results.note
        return table

    @cached_property
    def comparisons(self) -> "pd.DataFrame":
        """A row per paired test: systems `a` and `b`, metric, difference with its interval, p before and after Holm."""
        import pandas as pd

        rows = [comparison.model_dump() for comparison in self.results.comparisons]
        return pd.DataFrame(rows, columns=list(Comparison.model_fields))

    @cached_property
    def clips(self) -> "pd.DataFrame":
        """A row per clip that a system owes, with its scores."""
        import pandas as pd

        return pd.DataFrame(read_clips(self._out, self.results), columns=list(COLUMNS))

    def report(self, output: Place | None = None) -> str:
        """Write the page with players and the blind test; returns its path.

        Args:
            output: its folder; default: `report` inside of this one.

        Raises:
            UserError: matplotlib is missing, or the folder holds something else.
        """
        from ttmray.evaluation.report import report

        target = self._out.sub("report") if output is None else Folder.at(path_of(output, "output"))
        report(self.folder, target.uri)
        return target.path("index.html")
