"""Figures of the report: SVG for a light and for a dark page, and small mel spectrograms (extra `report`)."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ttmray.audio.io import resample
from ttmray.errors import UserError
from ttmray.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ttmray.audio.mel import LogMel

Theme = Literal["light", "dark"]
Grid = Literal["x", "y", "both"]
INK = {"light": ("#24221f", "#6b6760", "#dedad3"), "dark": ("#e9e6e1", "#a5a19a", "#3a3c3f")}
"""Text, quiet text and lines of each theme, as in templates/style.css."""
PALETTE = (
    ("#0b66a8", "#6db6ee"),
    ("#b4500b", "#f0a35c"),
    ("#0a7553", "#5ccb9d"),
    ("#86479a", "#d29be4"),
    ("#8a6a00", "#d9bb4a"),
    ("#b3304f", "#f2899f"),
    ("#4d5a66", "#aab6c1"),
    ("#2f6f7a", "#74c5d1"),
)
"""(light, dark) colour of each system in turn: 4.5:1 or more on the page, apart for the common kinds of colour
blindness in the first four."""
MEL_FLOOR_DB, MEL_TOP_DB = -80.0, 0.0
"""Range of the spectrograms, the same for all clips, so that louder clips look brighter."""
MEL_WIDTH, MEL_LEVELS = 420, 32
LEAST_LU, LEAST_DB = 6.0, 4.0
"""Least spans of the loudness plot: clips that are all at their target shall not look scattered."""


def _least_span(limits: Callable[[], tuple[float, float]], set_limits: Callable[..., Any], least: float) -> None:
    low, high = limits()
    if high - low < least:
        set_limits((low + high - least) / 2, (low + high + least) / 2)


def colour(index: int, theme: Theme) -> str:
    """Colour of the index-th system."""
    return PALETTE[index % len(PALETTE)][theme == "dark"]


def distributions(
    scores: Mapping[str, np.ndarray],
    means: Mapping[str, tuple[float, float | None, float | None]],
    label: str,
    theme: Theme,
) -> bytes:
    """One row per system: every clip as a dot, the quartiles as a box, the mean with its interval.

    Args:
        scores: (n,) per system.
        means: mean and ends of its interval of systems that have them, as in the table.
    """

    def draw(axes: "Axes") -> None:
        ink, quiet, _ = INK[theme]
        place: Any = {"textcoords": "offset points", "ha": "center", "color": quiet, "size": 8}
        for i, (name, values) in enumerate(scores.items()):
            own = colour(i, theme)
            jitter = np.random.default_rng(0).uniform(-0.17, 0.17, len(values))
            axes.scatter(values, i + 0.12 + jitter, s=16, color=own, alpha=0.65, linewidths=0)
            if len(values) < 2:
                continue
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            axes.plot([low, high], [i - 0.22] * 2, color=own, lw=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([middle] * 2, [i - 0.29, i - 0.15], color=own, lw=1.5)
            if name not in means:
                continue
            mean, *ends = means[name]
            bar: Any = None if None in ends else [[mean - ends[0]], [ends[1] - mean]]  # type: ignore[operator]
            axes.errorbar(mean, i - 0.36, xerr=bar, fmt="o", ms=4.5, color=ink, ecolor=ink, elinewidth=1.2, capsize=2)
            axes.annotate(f"{mean:.3f}".replace("-", "−"), (mean, i - 0.36), (0, 6), **place)
        axes.set_yticks(range(len(scores)))
        axes.set_yticklabels(list(scores))
        axes.set_ylim(len(scores) - 0.55, -0.75)
        axes.set_xlabel(label)

    return _svg(draw, theme, height=0.8 + 0.8 * len(scores))


def differences(values: np.ndarray, a: str, b: str, label: str, theme: Theme, colours: tuple[int, int]) -> bytes:
    """Per-prompt differences a - b, sorted, with their mean and its 95 % t interval.

    Args:
        values: (n,).
        colours: indices of the two systems; a dot has the colour of the better one.
    """

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        ink, quiet, line = INK[theme]
        order = np.sort(values)
        place = np.arange(1, len(order) + 1)
        mean = float(order.mean())
        axes.axhspan(*(mean_interval(order) or (mean, mean)), color=quiet, alpha=0.18, lw=0)
        axes.axhline(mean, color=ink, lw=1)
        axes.axhline(0, color=quiet, lw=0.8, dashes=(3, 3))
        dots = [colour(colours[int(value <= 0)], theme) for value in order]
        axes.vlines(place, 0, order, color=line, lw=1, zorder=1)
        axes.scatter(place, order, s=18, c=dots, linewidths=0, zorder=3)
        axes.set_xlim(0, len(order) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("prompts, by difference")
        axes.set_ylabel(f"{label}: {a} − {b}")

    return _svg(draw, theme, height=2.9, grid="y")


def loudness(levels: Mapping[str, tuple[np.ndarray, np.ndarray]], theme: Theme) -> bytes:
    """Integrated loudness (LUFS) against true peak (dBTP) of every clip, with a legend.

    Args:
        levels: system -> (n,) LUFS and (n,) dBTP of its clips.
    """

    def draw(axes: "Axes") -> None:
        for i, (name, (lufs, peak)) in enumerate(levels.items()):
            shape = "osD^vP*X"[i % 8]
            label = f" {name}"  # matplotlib hides labels that start with _
            axes.scatter(lufs, peak, s=20, marker=shape, color=colour(i, theme), alpha=0.65, linewidths=0, label=label)
        axes.axhline(0, color=INK[theme][1], lw=0.8, dashes=(3, 3))
        _least_span(axes.get_xlim, axes.set_xlim, LEAST_LU)
        _least_span(axes.get_ylim, axes.set_ylim, LEAST_DB)
        axes.set_xlabel("integrated loudness, LUFS")
        axes.set_ylabel("true peak, dBTP")
        axes.legend(frameon=False, loc="best", labelcolor=INK[theme][0])

    return _svg(draw, theme, height=3.1, grid="both")


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], label: str, theme: Theme) -> bytes:
    """Curves of a training, such as loss and validation loss by update.

    Args:
        lines: name -> (step, value) in order.
        label: what is shown, over what: `loss by update`.
    """
    from matplotlib.ticker import MaxNLocator

    what, _, over = label.partition(" by ")

    def draw(axes: "Axes") -> None:
        for i, (name, places) in enumerate(lines.items()):
            x, y = (np.array(column, float) for column in zip(*places, strict=True))
            dots: dict[str, Any] = {"marker": "os^D"[i % 4], "ms": 3.5} if len(x) < 30 else {}
            axes.plot(x, y, lw=1.5, color=colour(i, theme), label=f" {name}", **dots)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # there are no half updates
        axes.set_xlabel(over)
        axes.set_ylabel(what)
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK[theme][0], loc="best")

    return _svg(draw, theme, height=2.7, grid="both")


def score_sweep(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, tuple[float | None, float | None, float | None]]]]],
    panels: Mapping[str, str],
    deployed: float,
    theme: Theme,
    format: Literal["svg", "png"] = "svg",
) -> bytes:
    """Figure 2 of the paper: metrics against the input score, a panel each, with 95 % intervals where there are any.

    Args:
        curves: name -> (input score, metric -> (value, low, high)) in order.
        panels: metric -> label.
        deployed: input score of the dotted line.
    """

    def panel(metric: str, label: str, first: bool) -> Callable[["Axes"], None]:
        def draw(axes: "Axes") -> None:
            for i, (name, points) in enumerate(curves.items()):
                own = colour(i, theme)
                known = [(s, *values[metric]) for s, values in points if values[metric][0] is not None]
                if not known:
                    continue
                s, value, low, high = (np.array(column, float) for column in zip(*known, strict=True))
                axes.plot(s, value, marker="os^D"[i % 4], ms=4, lw=1.4, color=own, label=f" {name}")
                axes.fill_between(s, low, high, color=own, alpha=0.15 if len(curves) < 4 else 0.07, lw=0)
            axes.axvline(deployed, color=INK[theme][1], lw=0.9, ls=":")
            axes.set_xlabel("input score s")
            axes.set_ylabel(label)
            if first and axes.has_data():
                above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "columnspacing": 1.0}
                where: Any = {"loc": "best"} if len(curves) < 3 else above  # many names hide the curves
                axes.legend(frameon=False, labelcolor=INK[theme][0], **where)

        return draw

    draws = [panel(metric, label, i == 0) for i, (metric, label) in enumerate(panels.items())]
    rows = 0 if len(curves) < 3 else -(-len(curves) // 2)
    return _figure(draws, theme, (7.2, 2.9 + 0.2 * rows), "both", format)


def spectrogram(audio: np.ndarray, rate: int) -> bytes:
    """Mel spectrogram as a palette PNG of `MEL_WIDTH` x 128 pixels or narrower; a few kilobytes.

    Args:
        audio: (channels, frames) float32; resampled to 44.1 kHz, so that all files share one scale.
    """
    from matplotlib import colormaps
    from PIL import Image

    mel = _mel()
    wave = resample(audio.mean(axis=0), rate, mel.config.sample_rate)
    if len(wave) <= mel.config.padding:
        wave = np.pad(wave, (0, mel.config.padding + 1 - len(wave)))
    import torch

    with torch.inference_mode():
        bands = mel(torch.from_numpy(np.ascontiguousarray(wave, np.float32))[None])[0].numpy()
    width = min(MEL_WIDTH, bands.shape[1])
    edges = np.linspace(0, bands.shape[1], width + 1).astype(int)[:-1]
    pooled = np.maximum.reduceat(bands, edges, axis=1) * (20 / np.log(10))
    share = np.clip((pooled - MEL_FLOOR_DB) / (MEL_TOP_DB - MEL_FLOOR_DB), 0, 1)
    pixels = np.rint(share[::-1] * (MEL_LEVELS - 1)).astype(np.uint8)
    image = Image.fromarray(pixels, mode="L")
    image.putpalette((colormaps["magma"](np.linspace(0, 1, MEL_LEVELS), bytes=True)[:, :3]).tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def sheet(named: Sequence[tuple[str, bytes]], columns: int = 3) -> bytes:
    """PNG of many spectrograms side by side, each under its name, which is cut where the picture ends."""
    from PIL import Image, ImageDraw

    margin, line = 12, 16
    images = [Image.open(io.BytesIO(picture)).convert("RGB") for _, picture in named]
    width, height = (max(image.size[side] for image in images) + margin for side in (0, 1))
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * width + margin, rows * (height + line) + margin), "white")
    draw = ImageDraw.Draw(whole)
    for place, ((name, _), image) in enumerate(zip(named, images, strict=True)):
        left, top = margin + place % columns * width, margin + place // columns * (height + line)
        while draw.textlength(name) > width - margin:
            name = name[:-1]
        draw.text((left, top), name, fill="black")
        whole.paste(image, (left, top + line - 2))
    file = io.BytesIO()
    whole.quantize(64).save(file, "PNG", optimize=True)
    return file.getvalue()


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises:
    UserError: matplotlib is not installed.
    """
    if not available():
        raise UserError("Reports need matplotlib for their plots.", "pip install 'ttmray[report]'")


@cache
def _mel() -> "LogMel":
    from ttmray.audio.mel import LogMel

    return LogMel()


def _svg(draw: Callable[["Axes"], None], theme: Theme, height: float, grid: Grid = "x") -> bytes:
    return _figure([draw], theme, (5.4, height), grid)


def _figure(
    draws: Sequence[Callable[["Axes"], None]],
    theme: Theme,
    size: tuple[float, float],
    grid: Grid,
    format: Literal["svg", "png"] = "svg",
) -> bytes:
    """Panels side by side; a PNG has the page's ground, an SVG has none."""
    import matplotlib
    from matplotlib.figure import Figure

    ink, quiet, line = INK[theme]
    style: dict[Any, Any] = {
        "text.parse_math": False,  # names of systems may hold dollar signs
        "svg.hashsalt": "ttmray",  # the same figure gives the same bytes
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": quiet,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": quiet,
        "ytick.color": line,
        "ytick.labelcolor": ink,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        for i, draw in enumerate(draws, 1):
            axes = figure.add_subplot(1, len(draws), i)
            axes.grid(axis=grid)
            draw(axes)
        file = io.BytesIO()
        if format == "svg":
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()
