"""One page of what a run or a chain has come to: a sentence, a table, curves, players, a card per system; steps folded.

Everything is read from files that the steps have written, so that the page of an unfinished chain has what is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from ttmray import inventory, pages
from ttmray.config import Config
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation import plots
from ttmray.evaluation.results import RESULTS, Results, System, read_results
from ttmray.models.bundle import BUNDLES, base_name, means_nothing
from ttmray.recipes import published
from ttmray.recipes.result_views import PAGE, View, players_of, view_of
from ttmray.runs import require_folder
from ttmray.storage import Folder
from ttmray.training.config import LoopConfig
from ttmray.training.logbook import METRICS as LOG
from ttmray.training.logbook import read_lines
from ttmray.training.rounds import ROUNDS

SHOWN = {"fad": ("FAD ↓", 3), "clap_score": ("CLAP score ↑", 3), "reward": ("Reward ↑", 3), "lufs": ("LUFS", 1)}
"""Metrics of the first table, with label and digits; the evaluation's own page has all."""
PAPER_ROWS = {"stage1": "SFT (v1)", "stage2": "+ expert iteration", "stage3": "Sub.1"}
"""System of a chain -> row of the paper's Table II."""
FIGURES = 8
"""Of many trainings the page shows the first."""
Points = list[tuple[float, float]]


class Curves(NamedTuple):
    """What a training has logged: name of the curve -> (step, value), in order; and what it warned of."""

    title: str
    lines: dict[str, dict[str, Points]]
    warnings: list[str]


def curves_of(run: Folder, title: str) -> Curves | None:
    """Losses, and for online tuning rewards by round; None where nothing was logged."""
    if not run.exists(LOG):
        return None
    rows = read_lines(run)
    losses = {"loss": points(rows, "loss"), "validation loss": points(rows, "validation_loss")}
    reports = [run.read_json(f"{ROUNDS}/{file.name}", "round") for file in run.files(ROUNDS, sizes=False)]
    reports.sort(key=lambda report: int(report["round"]))
    rewards: dict[str, Points] = {"reward of the rounds": points(reports, "reward", "round")}
    for report in reports:
        for name, score in ((report.get("held_out") or {}).get("scores") or {}).items():
            rewards.setdefault(f"held out: {name}", []).append((float(report["round"]), float(score["mean"])))
    lines = {"loss by update": losses, "reward by round": rewards}
    lines = {name: {label: line for label, line in some.items() if line} for name, some in lines.items()}
    warnings = [report["warning"] for report in reports if report.get("warning")]
    return Curves(title, {name: some for name, some in lines.items() if some}, warnings)


def points(rows: Sequence[Mapping[str, Any]], name: str, at: str = "step") -> Points:
    """(step, value) of the rows that have a number of that name."""
    return [(float(row[at]), float(row[name])) for row in rows if isinstance(row.get(name), int | float)]


def figures_of(curves: Sequence[Curves]) -> list[dict[str, Any]]:
    """Every set of curves as inline SVG for a light and a dark page; none where matplotlib is not installed."""
    try:
        plots.require_matplotlib()
    except UserError:
        return []
    shown = []
    for one in curves:
        for axis, lines in one.lines.items():
            drawn = {theme: plots.curves(lines, axis, theme).decode() for theme in ("light", "dark")}
            svgs = [(theme, Markup(svg[svg.index("<svg") :])) for theme, svg in drawn.items()]
            shown.append({"title": f"{one.title}: {axis}", "said": ", ".join(_ends(lines)), "svgs": svgs})
    return shown


def _ends(lines: Mapping[str, Points]) -> Iterator[str]:
    """Name, first and last value of each curve; the one value of a point."""
    for label, line in lines.items():
        last = f"{line[-1][1]:.4g}"
        yield f"{label} {last}" if len(line) == 1 else f"{label} {line[0][1]:.4g} to {last}"


def headline(results: Results) -> str:
    """What an evaluation says, in a sentence: the best mean reward, and whether it is told from the first system's.
    Nothing is named best where the numbers mean nothing."""
    known = {system.name: system.metrics["reward"] for system in results.systems if "reward" in system.metrics}
    values = {name: metric.value for name, metric in known.items() if metric.value is not None}
    if not values:
        return "No system has a reward."
    if results.meaningless:
        return "By untrained models: these numbers mean nothing, and no system is named as better."
    best, first = max(values, key=lambda name: values[name]), next(iter(values))
    ends = known[best]
    interval = "" if ends.low is None or ends.high is None else f" (95 % interval {ends.low:+.3f} to {ends.high:+.3f})"
    text = f"{best} has the highest mean reward, {values[best]:+.3f}{interval}"
    pair = next(
        (one for one in results.comparisons if one.metric == "reward" and {one.a, one.b} == {best, first}), None
    )
    if best == first or pair is None or pair.difference is None:
        return f"{text}."
    gain = abs(pair.difference)
    told = "told from chance" if pair.significant else "which may be chance"
    return f"{text}, {gain:.3f} more than {first}, {told} (Holm's p {pages.p_value(pair.p_holm)}, {pair.n} prompts)."


def result_table(results: Results) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of systems: value and interval of `SHOWN`, and the paper's figures where it has the row."""
    names = [name for name in SHOWN if any(name in system.metrics for system in results.systems)]
    paper = {system.name: _paper(system) for system in results.systems}
    beside = [name for name in names if any(name in row for row in paper.values())]
    header = ["system", *(SHOWN[name][0] for name in names), *(f"paper: {SHOWN[name][0][:-2]}" for name in beside)]
    rows: list[list[Any]] = []
    for system in results.systems:
        row: list[Any] = [system.name]
        for name in names:
            metric, digits = system.metrics.get(name), SHOWN[name][1]
            ends = "" if metric is None or metric.low is None else pages.number(metric.low, digits)
            ends += (
                "" if metric is None or metric.high is None or not ends else f" to {pages.number(metric.high, digits)}"
            )
            row.append((pages.number(metric.value if metric else None, digits), ends))
        row += [
            ("≈" * figure.about + figure.text, "") if figure else ("", "")
            for figure in map(paper[system.name].get, beside)
        ]
        rows.append(row)
    return header, rows


def _paper(system: System) -> Mapping[str, published.Published]:
    return published.CHAIN.get(PAPER_ROWS.get(system.name, system.name), {})


def systems_of(results: Results, folders: Mapping[str, Folder]) -> Iterator[dict[str, Any]]:
    """A card per system: what made its clips."""
    for system in results.systems:
        facts = {"clips": f"{system.clips} of {system.prompts} prompts", "failed": system.failed or ""}
        run = folders.get(system.name)
        described = run.read_json("run.json") if run is not None and run.exists("run.json") else {}
        config = described.get("config", {})
        sampler = config.get("sampler", {})
        facts |= {"weights": config.get("checkpoint") or "", "bundle": config.get("bundle", "")}
        facts |= {name: sampler.get(name) for name in ("score", "guidance", "steps") if sampler.get(name) is not None}
        facts |= {"seed": config.get("seed", ""), "folder": system.folder}
        metric = system.metrics.get("reward")
        yield {
            "name": system.name,
            "reward": pages.number(metric.value if metric else None, 3, "+"),
            "facts": {name: value for name, value in facts.items() if value not in ("", None)},
        }


def chain_values(root: Folder, configs: Mapping[str, Config]) -> dict[str, Any]:
    """What the page of a chain shows beside its steps.

    Args:
        configs: step -> its config; those with an output below `root` are looked into.
    """
    places = {name: Folder.at(str(config.output)) for name, config in configs.items() if hasattr(config, "output")}
    below = {name: place for name, place in places.items() if place.uri.startswith(f"{root.uri}/")}
    trainings = {name: place for name, place in below.items() if isinstance(configs[name], LoopConfig)}
    curves = [one for name, place in _trainings(trainings) if (one := curves_of(place, name)) is not None]
    bundles = {str(config.bundle) for config in configs.values() if hasattr(config, "bundle")}
    notes = sorted({BUNDLES[base_name(one)].note for one in bundles if means_nothing(one)})
    evaluated = [place for place in below.values() if place.exists(RESULTS)]
    view = view_of(root)
    results = read_results(evaluated[0]) if len(evaluated) == 1 and (view is None or view.link) else None
    values: dict[str, Any] = {"notes": notes, "figures": figures_of(curves[:FIGURES]), "results": results}
    values["tables"] = view.link if view else ""
    values["unshown"] = len(curves) if len(curves) > FIGURES else 0
    values["hacking"] = [f"{one.title}: {line}" for one in curves for line in one.warnings]
    if results is None:
        shown = view or View("", [], [])
        values |= {"headline": shown.headline, "sections": shown.sections, "prompts": shown.prompts}
        return values | {"table": None, "systems": []}
    folders = {system.name: Folder.at(system.folder) for system in results.systems if system.folder}
    inside = {name: folder for name, folder in folders.items() if folder.uri.startswith(f"{root.uri}/")}
    return values | {
        "headline": headline(results),
        "table": result_table(results),
        "sections": [],
        "prompts": players_of(root, inside),
        "systems": list(systems_of(results, inside)),
    }


def _trainings(places: Mapping[str, Folder]) -> Iterator[tuple[str, Folder]]:
    """Runs with a log: outputs of steps, and the phases of rounds in them."""
    first: dict[str, tuple[str, Folder]] = {}
    for name, place in places.items():  # Stage 2 and its control have one folder, by the name of the former
        first.setdefault(place.uri, (name, place))
    for name, place in first.values():
        yield name, place
        phases = {file.name.rpartition("/")[0] for file in place.files(sizes=False) if file.name.endswith(f"/{LOG}")}
        for phase in sorted(phases):
            yield f"{name}, {phase}", place.sub(phase)


def run_page(folder: str) -> int:
    """`ttmray report RUN` of a training run: writes its `index.html`. Of a run whose command has written a page, where
    that is. Returns the exit code.

    Raises:
        UserError: it is neither, or nothing was logged yet.
    """
    run = Folder.at(folder)
    require_folder(run)
    curves = curves_of(run, run.name)
    if curves is None or not run.exists("run.json"):
        if run.exists(PAGE):  # of a chain or of generated clips
            console.print(f"open {run.path(PAGE)}")
            return EXIT_OK
        raise UserError(
            f"{run} has nothing to show: no {RESULTS} of an evaluation, no {LOG} of a training, no page of its own.",
            "Give the output of `ttmray evaluate`, of a training, a chain or `ttmray generate`.",
        )
    described = run.read_json("run.json", "config")
    config = described["config"]
    rows = read_lines(run)
    last = rows[-1] if rows else {}
    bundle = str(config.get("bundle", ""))
    notes = {str(described.get("note", "")), BUNDLES[base_name(bundle)].note if means_nothing(bundle) else ""}
    sounds = [file.name for file in run.files("samples", sizes=False) if file.name.endswith((".wav", ".flac"))]
    facts = {
        "kind": described["kind"],
        "updates": f"{last.get('step', 0)} of {config.get('steps', '?')}",
        "state": "finished" if inventory.finished(run) else "not finished",
        "samples per update": config.get("batch"),
        "learning rate": (config.get("optimizer") or {}).get("lr"),
        "began": described["created"],
    }
    text = pages.render(
        "run.html.j2",
        title=f"{described['kind']}: {run.uri.rpartition('/')[2]}",
        headline=_said(curves),
        notes=sorted(notes - {""}),
        hacking=curves.warnings,
        figures=figures_of([curves]),
        facts={name: value for name, value in facts.items() if value is not None},
        sounds=[(name, f"samples/{name}") for name in sorted(sounds)],
    )
    run.write(PAGE, text.encode())
    console.print(f"open {run.path(PAGE)}")
    return EXIT_OK


def _said(curves: Curves) -> str:
    """The first and last value of each curve, in a sentence."""
    parts = [text for some in curves.lines.values() for text in _ends(some)]
    return f"{'; '.join(parts) or 'Nothing is logged yet'}."
