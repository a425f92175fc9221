"""`ttmray report OUT`: an evaluation as a static folder to read and to listen to.

The page works from the disk without any server or network: one HTML file (styles and script inside, so that a content
security policy by hash can forbid everything else), and beside it audio, spectrograms and plots. Clips are named by
the hash of their source file, so that a blind test shows no system in an address, and a second run makes nothing twice.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from itertools import combinations
from typing import Any, Literal

import numpy as np
import soundfile

from ttmray import __version__
from ttmray.audio import io as audio_io
from ttmray.console import console, errors, meter
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.evaluation import plots
from ttmray.evaluation.compare import COMPARED, Score, prompt_means
from ttmray.evaluation.results import (
    CLIPS,
    RESULTS,
    Comparison,
    Measured,
    Results,
    clip_address,
    read_clips,
    read_results,
)
from ttmray.storage import Folder

AudioFormat = Literal["flac", "ogg"]
LIMITS = audio_io.AudioLimits(min_duration_s=0.05, max_duration_s=1800.0, min_sample_rate=8000)
OGG_LEVEL = 0.4
"""libsndfile's compression level (0 is best, 1 is smallest): about 90 kbit/s for mono music at 44.1 kHz."""
OGG_BLOCK = 1 << 16  # frames; libsndfile's Vorbis encoder overflows its stack with minutes at once
THEMES: tuple[plots.Theme, ...] = ("light", "dark")
METRICS = {
    "fad": ("FAD ↓", 3),
    "fad_inf": ("FAD∞ ↓", 3),
    "kad": ("KAD ↓", 3),
    "clap_score": ("CLAP score ↑", 3),
    "reward": ("Reward ↑", 3),
    "ccs": ("CCS ↑", 3),
    "lufs": ("Loudness, LUFS", 1),
    "true_peak": ("True peak, dBTP", 1),
    "silence": ("Silence", 3),
    "diversity": ("Diversity ↑", 3),
    "near_duplicates": ("Near-duplicates ↓", 3),
}
"""Label and digits of a metric of a system; others go by their own name. Arrows say which way is better."""
SCORES = {
    "reward": ("Reward", 3),
    "clap_score": ("CLAP score", 3),
    "ccs": ("CCS", 2),
    "lufs": ("LUFS", 1),
    "true_peak_db": ("dBTP", 1),
    "silence": ("Silence", 2),
    "duration_s": ("Seconds", 1),
}
"""Label and digits of a score of a clip."""
NOTES_OPEN = 6
"""Longer lists of warnings are folded."""

escape = partial(html.escape, quote=True)


def report(folder: str, output: str | None = None, audio: AudioFormat = "ogg") -> int:
    """Write the report of an evaluation; exit code 3 when a scored clip could not be shown.

    Args:
        folder: output of `ttmray evaluate`, local or s3://.
        output: folder of the report; default `report` inside of `folder`.
        audio: `ogg` is Vorbis and small; `flac` is 16 bit and without loss.

    Raises:
        UserError: no evaluation, unreadable tables, an output folder of something else, or matplotlib is missing.
    """
    plots.require_matplotlib()
    if audio not in ("flac", "ogg"):
        raise UserError(f"--audio must be flac or ogg, not {audio!r}.")
    source = Folder.at(folder)
    results = read_results(source)
    rows = read_clips(source, results)
    target = Folder.at(output) if output else source.sub("report")
    if not target.exists(RESULTS) and target.files(sizes=False):
        raise UserError(f"{target} holds something else than a report.", "Choose an empty or new --output.")
    for name in (RESULTS, CLIPS):
        target.write(name, source.read(name))
    problems = add_media(results, rows, target, audio)
    figures = add_plots(results, rows, target)
    target.write("index.html", page(results, rows, figures).encode())
    for problem in problems:
        errors.print(f"not shown: {problem}", markup=False)
    size = sum(entry.size for entry in target.files())
    console.print(f"{len(rows)} clips, {size / 1e6:.1f} MB: open {target.path('index.html')}", markup=False)
    return EXIT_TOO_MANY_FAILURES if problems else EXIT_OK


def add_media(results: Results, rows: Sequence[dict[str, Any]], target: Folder, audio: AudioFormat) -> list[str]:
    """Write audio and spectrogram of every ok clip; rows get `audio` and `mel` (names below `target`, or None).

    Returns:
        what could not be shown, for people; such rows get the status `failed` and their reason.
    """
    problems = []
    present = {entry.name for entry in target.files(sizes=False)}
    with meter("report", len(rows)) as progress:
        for row in rows:
            row |= {"audio": None, "mel": None}
            if row["status"] == "ok":
                try:
                    row["audio"], row["mel"] = _media(results, row, target, audio, present)
                except (ClipError, UserError) as error:
                    row |= {
                        "status": "failed",
                        "reason": getattr(error, "reason", "unreadable"),
                        "message": error.message,
                    }
                    problems.append(f"{row['system']}, prompt {row['prompt_id']}: {error}")
            progress.advance(1)
    return problems


def _media(
    results: Results, row: Mapping[str, Any], target: Folder, audio: AudioFormat, present: set[str]
) -> tuple[str, str]:
    folder, name = clip_address(results, row)
    data = folder.read(name)
    digest = hashlib.sha256(data).hexdigest()
    if row["sha256"] and row["sha256"] != digest:
        raise ClipError("failed", "changed", f"{folder.path(name)} is not the file that was scored; evaluate again")
    sound, picture = f"audio/{digest[:20]}.{audio}", f"mel/{digest[:20]}.png"
    if not {sound, picture} <= present:
        samples, rate = audio_io.decode(io.BytesIO(data), LIMITS, folder.path(name))
        as_it_is = audio == name.lower().rpartition(".")[2]
        encode = audio_io.encode_flac if audio == "flac" else encode_ogg
        target.write(sound, data if as_it_is else encode(samples, rate))
        target.write(picture, plots.spectrogram(samples, rate))
        present |= {sound, picture}
    return sound, picture


def encode_ogg(x: np.ndarray, rate: int) -> bytes:
    """Ogg Vorbis file of float32 samples (channels, frames); clipped to full scale."""
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", rate, x.shape[0], format="OGG", subtype="VORBIS", compression_level=OGG_LEVEL
    ) as sound:
        for start in range(0, x.shape[1], OGG_BLOCK):
            sound.write(np.clip(x[:, start : start + OGG_BLOCK].T, -1, 1))
    return file.getvalue()


def add_plots(results: Results, rows: Sequence[Mapping[str, Any]], target: Folder) -> list[tuple[str, str]]:
    """Write every figure in both themes; returns (name without theme and ending, description) in order."""
    figures: list[tuple[str, str]] = []
    names = [system.name for system in results.systems]

    def add(name: str, description: str, draw: Any) -> None:
        for theme in THEMES:
            target.write(f"plots/{name}-{theme}.svg", draw(theme))
        figures.append((name, description))

    for column in COMPARED:
        label = SCORES[column][0]
        # systems without any score keep their row, so that colours stay the same
        scores = {n: np.array([r[column] for r in rows if r["system"] == n and r[column] is not None]) for n in names}
        if any(len(values) for values in scores.values()):
            text = "every clip, quartiles, and the mean with its 95 % interval"
            add(f"distribution-{column}", f"{label}: {text}", partial(plots.distributions, scores, label))
    means = prompt_means(
        Score(r["system"], r["prompt_id"], column, r[column])
        for r in rows
        for column in COMPARED
        if r[column] is not None
    )
    for i, j in dict.fromkeys((names.index(c.a), names.index(c.b)) for c in _known(results.comparisons, names)):
        for column in COMPARED:
            first, second = means.get((column, names[i]), {}), means.get((column, names[j]), {})
            values = np.array([first[prompt] - second[prompt] for prompt in first if prompt in second])
            if len(values):
                label, better = SCORES[column][0], int((values > 0).sum())
                text = (
                    f"{label}, {names[i]} − {names[j]} per prompt: {better} of {len(values)} above zero, "
                    f"mean {_number(float(values.mean()), 3, '+')}, with its 95 % interval"
                )
                draw = partial(plots.differences, values, names[i], names[j], label, colours=(i, j))
                add(f"difference-{column}-{i}-{j}", text, draw)
    level = ("lufs", "true_peak_db")
    levels = {}
    for name in names:
        found = [[r[c] for c in level] for r in rows if r["system"] == name and None not in [r[c] for c in level]]
        if found:
            levels[name] = (np.array(found)[:, 0], np.array(found)[:, 1])
    if levels:
        add("loudness", "Loudness and true peak of every clip; 0 dBTP is full scale", partial(plots.loudness, levels))
    return figures


def page(results: Results, rows: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str]]) -> str:
    """The HTML file; `rows` have `audio` and `mel`, see `add_media`."""
    names = [system.name for system in results.systems]
    prompts = _by_prompt(rows, names)
    parts = {name: (resources.files(__package__) / "page" / name).read_text("utf-8") for name in _PARTS}
    style = parts["style.css"] + "".join(
        f".system-{i} {{ background: light-dark({light}, {dark}) }}\n" for i, (light, dark) in enumerate(plots.PALETTE)
    )
    script = parts["script.js"]
    identity = hashlib.sha256(
        json.dumps([[r[c] for c in ("system", "prompt_id", "sample", "sha256")] for r in rows]).encode()
    ).hexdigest()
    pairs = [
        (f"{i}-{j}", names[i], names[j])
        for i, j in combinations(range(len(names)), 2)
        if all(any(c["audio"] and c["system"] == k for p in prompts for c in p["clips"]) for k in (i, j))
    ]
    systems = [(str(i), name) for i, name in enumerate(names)]
    mean = [("", "all systems (mean)")] if len(names) > 1 else []
    fill = {
        "policy": escape(
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src 'self' file:; "
            "media-src 'self' file:; base-uri 'none'; form-action 'none'"
        ),
        "title": escape(f"Evaluation of {_listed(names)}"),
        "about": escape(f"{len(prompts)} prompts, {len(rows)} clips; {results.created[:10]}"),
        "style": style,
        "script": script,
        "notes": _notes([results.note] if results.note else []),
        "metrics": _metrics_table(results) + _notes(results.warnings),
        "comparisons": _comparisons_table(results.comparisons),
        "plots": _figures(figures),
        "scores": _options((name, label) for name, (label, _) in SCORES.items()),
        "systems": _options(systems),
        "sort_systems": _options([*mean, *systems, *((key, f"{a} − {b}") for key, a, b in pairs)]),
        "pairs": _options([("", "all pairs"), *((key, f"{a} and {b}") for key, a, b in pairs)]),
        "prompts": "\n".join(_prompt(number, prompt, names) for number, prompt in enumerate(prompts)),
        "method": _method(results),
        "footer": escape(f"ttmray {__version__}. ") + f'Data: <a href="{RESULTS}">{RESULTS}</a>, '
        f'<a href="{CLIPS}">{CLIPS}</a>.',
        "data": _json({"id": identity[:16], "systems": names, "prompts": prompts}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], parts["index.html"])  # one pass: values stay as given


_PARTS = ("index.html", "style.css", "script.js")


def _by_prompt(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Prompts in the order of the table, each with its clips by system and sample: what the script sees."""
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        prompt = prompts.setdefault(row["prompt_id"], {"id": row["prompt_id"], "text": row["prompt"], "clips": []})
        kept = {name: row[name] for name in ("sample", "audio", "mel", "status", "reason", "message", *SCORES)}
        prompt["clips"].append({"system": names.index(row["system"]), **kept})
    for prompt in prompts.values():
        prompt["clips"].sort(key=lambda clip: (clip["sample"] or 0, clip["system"]))
    return list(prompts.values())


def _prompt(number: int, prompt: Mapping[str, Any], names: Sequence[str]) -> str:
    several = len({clip["sample"] for clip in prompt["clips"]}) > 1
    clips = "".join(_clip(clip, prompt, names[clip["system"]], several) for clip in prompt["clips"])
    return (
        f'<article class="prompt" aria-labelledby="prompt-{number}"><h3 id="prompt-{number}">{escape(prompt["text"])}'
        f'</h3><p class="quiet">Prompt {escape(prompt["id"])}</p><div class="clips">{clips}</div></article>'
    )


def _clip(clip: Mapping[str, Any], prompt: Mapping[str, Any], name: str, several: bool) -> str:
    label = f"{name}, sample {clip['sample']}" if several else name
    dot = f'<i class="dot system-{clip["system"] % len(plots.PALETTE)}"></i>'
    caption = f"<figcaption>{dot}{escape(label)}</figcaption>"
    scores = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{_number(clip[column], digits)}</dd></div>"
        for column, (title, digits) in SCORES.items()
        if clip[column] is not None
    )
    if clip["audio"] is None:
        why = escape(": ".join(clip[name] for name in ("status", "reason", "message") if clip[name]))
        return f'<figure class="clip failed">{caption}<p>No audio ({why}).</p><dl class="scores">{scores}</dl></figure>'
    what = escape(f"{label}, prompt {prompt['id']}")
    return (
        f'<figure class="clip">{caption}<div class="mel"><img src="{escape(clip["mel"])}" loading="lazy" '
        f'alt="Mel spectrogram: {what}" width="{plots.MEL_WIDTH}" height="128"><span></span></div>'
        f'<audio controls preload="none" src="{escape(clip["audio"])}" aria-label="{what}"></audio>'
        f'<dl class="scores">{scores}</dl></figure>'
    )


def _metrics_table(results: Results) -> str:
    known = list(METRICS)
    found = {name for system in results.systems for name in system.metrics}
    columns = sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))
    head = "".join(f'<th scope="col">{escape(METRICS.get(name, (name, 3))[0])}</th>' for name in columns)
    body = []
    for i, system in enumerate(results.systems):
        cells = "".join(_metric(system.metrics.get(name), METRICS.get(name, (name, 3))[1]) for name in columns)
        dot = f'<i class="dot system-{i % len(plots.PALETTE)}"></i>'
        counts = f"<small>{system.clips} clips, {system.prompts} prompts</small>"
        body.append(f'<tr><th scope="row">{dot}{escape(system.name)}{counts}</th>{cells}</tr>')
    caption = "Below each value its interval and N (generated, and reference where there is one). Arrows: better."
    return _table("Metrics of each system", f'<th scope="col">System</th>{head}', body, caption)


def _metric(metric: Measured | None, digits: int) -> str:
    if metric is None or metric.value is None:
        return "<td>–</td>"
    interval = "" if metric.low is None else f"{_number(metric.low, digits)} to {_number(metric.high, digits)}"
    n = f"N = {metric.n_generated}" + (f" / {metric.n_reference}" if metric.n_reference else "")
    return f"<td>{_number(metric.value, digits)}<small>{interval}</small><small>{n}</small></td>"


def _comparisons_table(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "<p>Nothing was compared: that needs two systems on the same prompts.</p>"
    titles = ("Metric", "Systems", "Mean A", "Mean B", "A − B", "t", "p", "p, Holm", "p, Wilcoxon", "d<sub>z</sub>")
    head = "".join(f'<th scope="col">{title}</th>' for title in (*titles, "Wins : ties : losses", "N", "N needed"))
    head = head.replace('"col">Systems', '"col" class="word">Systems')
    body = []
    for one in comparisons:
        digits = METRICS.get(one.metric, (one.metric, 3))[1]
        interval = f"<small>{_number(one.low, digits, '+')} to {_number(one.high, digits, '+')}</small>"
        mark = '<span class="mark" role="img" aria-label="significant"> ✓</span>' if one.significant else ""
        cells = [
            _number(one.mean_a, digits),
            _number(one.mean_b, digits),
            f"<strong>{_number(one.difference, digits, '+')}</strong>{interval}",
            _number(one.t, 2),
            _p(one.p),
            f"{_p(one.p_holm)}{mark}",
            _p(one.p_wilcoxon),
            _number(one.d_z, 2),
            " : ".join("–" if count is None else str(count) for count in (one.wins, one.ties, one.losses)),
            str(one.n),
            "–" if one.n_needed is None else f"{one.n_needed:,}",
        ]
        body.append(
            f'<tr{" class=yes" if one.significant else ""}><th scope="row">{escape(_metric_name(one.metric))}</th>'
            f'<td class="word">A {escape(one.a)}<small>B {escape(one.b)}</small></td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    caption = (
        "Paired tests on the means of each prompt, intervals at 95 %. Wins: prompts on which A is above B. ✓: "
        "significant after Holm's correction over this table; a difference without it may be chance. N needed: prompts "
        "with which four of five tests would find this difference."
    )
    return _table("Paired comparisons", head, body, caption)


def _metric_name(name: str) -> str:
    return METRICS.get(name, (name, 3))[0].rstrip(" ↑↓")


def _table(label: str, head: str, body: Sequence[str], caption: str) -> str:
    """A table that scrolls inside of itself; focusable, so that the keyboard can scroll it."""
    rows = "".join(body)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table><thead><tr>{head}</tr>'
        f'</thead><tbody>{rows}</tbody></table></div><p class="caption">{escape(caption)}</p>'
    )


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    if not figures:
        return "<p>No clip has a score to plot.</p>"
    parts = []
    for name, description in figures:
        images = "".join(
            f'<img class="in-{theme}" src="plots/{name}-{theme}.svg" alt="{escape(description)}" loading="lazy">'
            for theme in THEMES
        )
        parts.append(f"<figure><figcaption>{escape(description)}</figcaption>{images}</figure>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _method(results: Results) -> str:
    facts: dict[str, Any] = {"Protocol": results.protocol, "Bundle": results.bundle}
    used = {metric.protocol for system in results.systems for metric in system.metrics.values()} - {results.protocol}
    facts |= {"Protocols of metrics": sorted(used - {""})} if used - {""} else {}
    facts |= {"Folders": {system.name: system.folder for system in results.systems}}
    facts |= {"Reference set": results.reference} if results.reference else {}
    facts |= {"Leaks": results.leaks} if results.leaks else {}
    licences = "".join(f"<li>{escape(line)}</li>" for line in results.license_notes)
    listed = f"<h3>Licences of the models that made the numbers</h3><ul>{licences}</ul>" if licences else ""
    return _facts({name: value for name, value in facts.items() if value}) + listed


def _facts(value: Any) -> str:
    """Nested plain values as definition lists; long lists are cut, the data file has all."""
    if isinstance(value, Mapping):
        rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{_facts(item)}</dd>" for key, item in value.items())
        return f'<dl class="facts">{rows}</dl>' if rows else "none"
    if isinstance(value, list | tuple):
        more = f"; and {len(value) - 12} more" if len(value) > 12 else ""
        return "; ".join(_facts(item) for item in value[:12]) + more if value else "none"
    return _number(value, 4) if isinstance(value, float) else escape(str(value))


def _notes(lines: Sequence[str]) -> str:
    if len(lines) <= 1:
        return "".join(f'<p class="note" role="note">{escape(line)}</p>' for line in lines)
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    shown = " open" if len(lines) <= NOTES_OPEN else ""
    return f'<details class="note"{shown}><summary>{len(lines)} warnings</summary><ul>{items}</ul></details>'


def _options(options: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<option value="{escape(value)}">{escape(label)}</option>' for value, label in options)


def _number(value: float | None, digits: int, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−").replace("inf", "∞")


def _p(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "&lt; 0.0001" if value < 1e-4 else f"{value:.4f}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} systems"
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _known(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[Comparison]:
    return [one for one in comparisons if one.a in names and one.b in names]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that cannot end or change the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
