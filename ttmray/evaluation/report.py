"""`ttmray report OUT`: an evaluation as a static folder to read and to listen to.

The page works from the disk without any server or network: one HTML file (styles and script inside, so that a content
security policy by hash can forbid everything else), and beside it audio, spectrograms and plots. Clips are named by
the hash of their source file, so that a blind test shows no system in an address, and a second run makes nothing twice.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np
import soundfile
from markupsafe import Markup

from ttmray import __version__, inventory, pages
from ttmray.audio import io as audio_io
from ttmray.audio.limits import AudioLimits
from ttmray.console import console, errors, meter
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError, UserError
from ttmray.evaluation import plots
from ttmray.evaluation.compare import COMPARED, ClipScore, prompt_means
from ttmray.evaluation.results import (
    CLIPS,
    QUALITY,
    RESULTS,
    Comparison,
    Results,
    clip_address,
    read_clips,
    read_results,
)
from ttmray.statistics import MEAN_INTERVAL
from ttmray.storage import Folder

AudioFormat = Literal["flac", "ogg"]
LIMITS = AudioLimits(min_duration_s=0.05, max_duration_s=1800.0, min_sample_rate=8000)
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
    QUALITY: ("Estimated quality (synthetic music) ↑", 3),
    "lufs": ("Loudness, LUFS", 1),
    "true_peak": ("True peak, dBTP", 1),
    "silence": ("Silence", 3),
    "diversity": ("Diversity ↑", 3),
    "vendi": ("Vendi score ↑", 1),
    "parent_distance": ("Distance to the parent", 3),
    "parent_fad": ("FAD to the parent", 3),
    "vocal_ratio": ("Vocals", 3),
    "rhythm_regularity": ("Rhythm regularity", 2),
    "rhythm_jitter_ms": ("Rhythm jitter, ms", 1),
    "tuning_deviation": ("Tuning deviation, cents", 1),
    "near_duplicates": ("Near-duplicates ↓", 3),
}
"""Label and digits of a metric of a system; others go by their own name. Arrows say which way is better."""
SCORES = {
    "reward": ("Reward", 3),
    "clap_score": ("CLAP score", 3),
    "ccs": ("CCS", 2),
    QUALITY: ("Estimated quality (synthetic music)", 2),
    "lufs": ("LUFS", 1),
    "true_peak_db": ("dBTP", 1),
    "silence": ("Silence", 2),
    "duration_s": ("Seconds", 1),
}
"""Label and digits of a score of a clip."""
NOTES_OPEN = 6
"""Longer lists of warnings are folded."""


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
    complete, _ = inventory.reopen(target, "report")
    if not complete and not target.exists(RESULTS) and target.files(sizes=False):
        raise UserError(f"{target} holds something else than a report.", "Choose an empty or new --output.")
    for name in (RESULTS, CLIPS):
        target.write(name, source.read(name))
    problems = add_media(results, rows, target, audio)
    figures = add_plots(results, rows, target)
    target.write("index.html", page(results, rows, figures).encode())
    inventory.note(target, "report", (file.name for file in target.files(sizes=False)))
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
        scores = {
            n: np.array([r[column] for r in rows if r["system"] == n and r.get(column) is not None]) for n in names
        }
        if any(len(values) for values in scores.values()):
            known = {s.name: s.metrics[column] for s in results.systems if column in s.metrics}
            ends = {name: (m.value, m.low, m.high) for name, m in known.items() if m.value is not None}
            how = next((m.interval for m in known.values() if m.interval), "as in the table")
            text = f"every clip, quartiles, and the mean with its 95 % interval ({how})"
            add(f"distribution-{column}", f"{label}: {text}", partial(plots.distributions, scores, ends, label))
    means = prompt_means(
        ClipScore(r["system"], r["prompt_id"], column, r[column])
        for r in rows
        for column in COMPARED
        if r.get(column) is not None
    )
    for i, j in dict.fromkeys((names.index(c.a), names.index(c.b)) for c in _known(results.comparisons, names)):
        for column in COMPARED:
            first, second = means.get((column, names[i]), {}), means.get((column, names[j]), {})
            values = np.array([first[prompt] - second[prompt] for prompt in first if prompt in second])
            if len(values):
                label, better = SCORES[column][0], int((values > 0).sum())
                text = (
                    f"{label}, {names[i]} − {names[j]} per prompt: {better} of {len(values)} above zero, "
                    f"mean {pages.number(float(values.mean()), 3, '+')}, with its 95 % interval ({MEAN_INTERVAL})"
                )
                draw = partial(plots.differences, values, names[i], names[j], label, colours=(i, j))
                add(f"difference-{column}-{i}-{j}", text, draw)
    level = ("lufs", "true_peak_db")
    levels = {}
    for name in names:
        measured = [[r[c] for c in level] for r in rows if r["system"] == name and None not in [r[c] for c in level]]
        if measured:
            levels[name] = (np.array(measured)[:, 0], np.array(measured)[:, 1])
    if levels:
        add("loudness", "Loudness and true peak of every clip; 0 dBTP is full scale", partial(plots.loudness, levels))
    return figures


def page(results: Results, rows: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str]]) -> str:
    """The HTML file; `rows` have `audio` and `mel`, see `add_media`."""
    names = [system.name for system in results.systems]
    scores = {
        name: one
        for name, one in SCORES.items()
        if name != QUALITY or any(row.get(QUALITY) is not None for row in rows)
    }
    prompts = _by_prompt(rows, names, scores)
    style = pages.source("style.css") + pages.source("report.css")
    style += "".join(
        f".system-{i} {{ background: light-dark({light}, {dark}) }}\n" for i, (light, dark) in enumerate(plots.PALETTE)
    )
    script = pages.source("report.js")
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
    return pages.render(
        "report.html.j2",
        title=f"Evaluation of {_listed(names)}",
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src 'self' file:; "
        "media-src 'self' file:; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        results=results,
        columns=_columns(results),
        describe=_described,
        notes_open=NOTES_OPEN,
        figures=figures,
        themes=THEMES,
        colours=len(plots.PALETTE),
        mel_width=plots.MEL_WIDTH,
        names=names,
        scores=scores,
        score_options=[(name, label) for name, (label, _) in scores.items()],
        system_options=systems,
        sort_options=[*mean, *systems, *((key, f"{a} − {b}") for key, a, b in pairs)],
        pair_options=[("", "all pairs"), *((key, f"{a} and {b}") for key, a, b in pairs)],
        prompts=prompts,
        clips=len(rows),
        method=_method(results),
        version=__version__,
        files=(RESULTS, CLIPS),
        data={"id": identity[:16], "systems": names, "prompts": prompts},
    )


def _by_prompt(rows: Sequence[Mapping[str, Any]], names: Sequence[str], scores: Iterable[str]) -> list[dict[str, Any]]:
    """Prompts in the order of the table, each with its clips by system and sample: what the script sees."""
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        prompt = prompts.setdefault(row["prompt_id"], {"id": row["prompt_id"], "text": row["prompt"], "clips": []})
        shown = {name: row[name] for name in ("sample", "audio", "mel", "status", "reason", "message", *scores)}
        prompt["clips"].append({"system": names.index(row["system"]), **shown})
    for prompt in prompts.values():
        prompt["clips"].sort(key=lambda clip: (clip["sample"] or 0, clip["system"]))
    return list(prompts.values())


def _columns(results: Results) -> list[tuple[str, str, int]]:
    """Metrics of any system with label and digits, known ones first."""
    known = list(METRICS)
    names = {name for system in results.systems for name in system.metrics}
    return [
        _described(name)
        for name in sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
    ]


def _described(metric: str) -> tuple[str, str, int]:
    return metric, *METRICS.get(metric, (metric, 3))


def _method(results: Results) -> dict[str, Any]:
    used = {metric.protocol for system in results.systems for metric in system.metrics.values()} - {results.protocol}
    facts = {
        "Protocol": results.protocol,
        "Bundle": results.bundle,
        "Protocols of metrics": sorted(used - {""}),
        "Folders": {system.name: system.folder for system in results.systems},
        "Reference set": results.reference,
        "Leaks": results.leaks,
    }
    return {name: value for name, value in facts.items() if value}


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{len(names)} systems"
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _known(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[Comparison]:
    return [one for one in comparisons if one.a in names and one.b in names]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
