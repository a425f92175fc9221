"""The demo: songs of known quality through the corpus job, clips from prompts, and one page about both.

`<output>/songs` are composed (`ttmray.synth.songs`), `corpus` is what the corpus job makes of them, `clips/<score>` are
made from the prompts, asked for each score in turn. `index.html` shows all of it with players, and `demo.json` has the
same as numbers. Every part goes on where it was, so that a second start has nothing to do.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.box import SIMPLE
from rich.table import Column, Table

from ttmray import pages
from ttmray.audio.io import decode, resample
from ttmray.audio.limits import AudioLimits
from ttmray.config import Config, Location, execution, fingerprint
from ttmray.console import console
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.unit import OK
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation import plots
from ttmray.generation import manifest
from ttmray.generation.config import GenerateConfig
from ttmray.generation.generate import generate
from ttmray.json_text import read_json
from ttmray.models.bundle import DEFAULT, BundleName, open_bundle
from ttmray.recipes.chain import fill
from ttmray.runs import read
from ttmray.statistics import spearman
from ttmray.storage import Folder, absolute, is_remote
from ttmray.synth.faults import KINDS
from ttmray.synth.instruments import RATE
from ttmray.synth.measures import estimate, measure
from ttmray.synth.songs import TRUTH, write_demo_songs

PAGE, FACTS = "index.html", "demo.json"
VERSION = 1
"""Of the page: raise it whenever the same runs give another one."""
HEARD = 0.25
"""Estimated strengths of faults from here on are told: 9 of 10 clips without faults stay below, for every kind."""

Facts = dict[str, Any]


class DemoConfig(Config):
    """`jobs/demo.py` and `ttmray demo`."""

    output: Location = execution("runs/demo")
    """Folder of the demo on this machine. The same command goes on with what is not done."""
    seed: int = Field(0, ge=0)
    """Of the songs: another one gives other pieces under the same names."""
    bundle: BundleName = DEFAULT
    """Set of models."""
    prompts: tuple[str, ...] = Field(
        (
            "A slow, sad ambient piece led by flute, no drums, instrumental",
            "Fast, cheerful chiptune with an 8-bit lead and chip drums",
            "A medium funk track with electric bass, live drums and a female singer",
        ),
        min_length=1,
    )
    """What clips are made from."""
    scores: tuple[float, ...] | None = Field(None, min_length=1)
    """Scores to ask for, in rewards of the bundle; default: those of the worst and the best song, to one decimal."""
    corpus: dict[str, Any] = Field(default_factory=dict)
    """`score-corpus`, without what is filled in: input, output, bundle, and clips as long as the bundle's."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """`generate`, without what is filled in: texts, output, bundle and the score."""


def demo(config: DemoConfig) -> int:
    """Make, or go on making, everything; prints what is worth knowing and returns the exit code.

    Raises:
        UserError: everything that the user can mend.
    """
    started = time.monotonic()
    if is_remote(config.output):
        raise UserError(f"output: {config.output} is a bucket, but the page is opened from a disk.", "Name a folder.")
    asked = config.scores or ()
    if len(set(asked)) < len(asked):
        raise UserError(f"scores: {list(asked)} has one twice.", "Every score has a folder of clips.")
    root = Folder.at(absolute(config.output))
    corpus = corpus_config(config, root)
    for score in asked or (0.0,):  # wrong settings are told before anything is made
        clips_config(config, root, score)
    _chapter("songs of known quality, and broken files")
    paths = write_demo_songs(Path(root.path("songs")), config.seed)
    console.print(f"{len(paths)} audio files in {root.path('songs')}", markup=False)
    _chapter("the corpus job: songs in, scored clips out (jobs/score_corpus.py)")
    if (code := score_corpus(corpus)) != EXIT_OK:
        return code
    scores = asked or _worst_and_best(root)
    for score in scores:
        _chapter(f"clips from {len(config.prompts)} prompts, asked for the score {score:g} (jobs/generate.py)")
        if (code := generate(clips_config(config, root, score))) != EXIT_OK:
            return code
    _chapter("what came of it")
    identity = _identity(config, root, scores)
    facts = _known(root, identity)
    if facts is None:
        facts = {"made_by": identity, **gather(config, root, scores)}
        _write_page(root, facts)
        root.write(FACTS, json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False).encode())
    else:
        console.print("all of it was there: songs, corpus, clips and page are complete")
    show(facts)
    console.print(f"{time.monotonic() - started:.0f} s; open {root.path(PAGE)}", markup=False)
    return EXIT_OK


def corpus_config(config: DemoConfig, root: Folder) -> CorpusConfig:
    """
    Raises:
        UserError: a section that is wrong.
    """
    bundle = open_bundle(config.bundle)
    small: dict[str, Any] = {
        "unit_clips": 10,  # small units, so that a small folder shows several
        "splits": {"validation": 2, "test": 2},
        "max_failures": 5,
    }
    if "separator" not in bundle.roles():
        small["separation"] = {"scope": "none"}
    links = {"input": root.path("songs"), "output": root.path("corpus"), "bundle": config.bundle, **small}
    return fill(CorpusConfig, "corpus", config.corpus, links)


def clips_config(config: DemoConfig, root: Folder, score: float) -> GenerateConfig:
    """
    Raises:
        UserError: a section that is wrong.
    """
    links = {
        "texts": list(config.prompts),
        "output": root.path(f"clips/score{score:+g}"),
        "bundle": config.bundle,
        "sampler": {"score": score},
        "postprocess": {"passes": 0},
        "format": "flac",
        "scores": True,
    }
    return fill(GenerateConfig, "generate", config.generate, links)


def _chapter(text: str) -> None:
    console.print()
    console.rule(text, align="left")


def _worst_and_best(root: Folder) -> tuple[float, ...]:
    """Rewards of the songs that the corpus job liked least and most, to one decimal."""
    rewards = index.read_index(root.sub("corpus"), ("track_reward_score",))["track_reward_score"].drop_null().to_numpy()
    return tuple(sorted({round(float(rewards.min()), 1), round(float(rewards.max()), 1)}))


def _identity(config: DemoConfig, root: Folder, scores: Sequence[float]) -> str:
    """Fingerprint of all that the page follows from."""
    runs = [("corpus", "corpus"), *((f"clips/score{score:+g}", "generate") for score in scores)]
    prints = [read(root.sub(folder), kind)["fingerprint"] for folder, kind in runs]
    truth = read_json(root.read(f"songs/{TRUTH}"))
    return fingerprint([VERSION, truth, prints, list(config.prompts), list(scores), plots.available()])


def _known(root: Folder, identity: str) -> Facts | None:
    """What a former start found, if it is about the same runs and its page is there."""
    if not (root.exists(FACTS) and root.exists(PAGE)):
        return None
    try:
        facts: Facts = read_json(root.read(FACTS))
        return facts if facts["made_by"] == identity else None
    except (ValueError, KeyError, TypeError):  # a file that somebody edited
        return None


def gather(config: DemoConfig, root: Folder, scores: Sequence[float]) -> Facts:
    """All that the page and the summary show, as plain JSON types; writes the spectrograms."""
    described = read(root.sub("corpus"), "corpus")
    truth = read_json(root.read(f"songs/{TRUTH}"))
    rows: dict[str, list[Facts]] = {}
    for row in index.read_index(root.sub("corpus")).sort_by("key").to_pylist():
        rows.setdefault(row["source"], []).append(row)
    picture = _pictures(root)
    songs = [_song(root, of, rows.get(of["path"], []), picture) for of in truth if of["status"] == OK]
    songs.sort(key=lambda song: -song["reward"])
    odd = [_odd(of, rows.get(of["path"], [])) for of in truth if of["status"] != OK]
    rewards, qualities = (np.array([song[name] for song in songs]) for name in ("reward", "quality"))
    clips = {score: _clips(root, f"clips/score{score:+g}", picture) for score in scores}
    return {
        "bundle": open_bundle(config.bundle).name,
        "note": described["note"],
        "protocol": described["protocol_id"],
        "clip_s": described["config"]["segments"]["clip_s"],
        "pictures": picture is not None,
        "songs": songs,
        "spearman": spearman(rewards, qualities).rho,
        "odd": odd,
        "scores": list(scores),
        "prompts": [
            {"prompt": prompt, "clips": [clips[score][prompt] for score in scores if prompt in clips[score]]}
            for prompt in config.prompts
        ],
    }


def _song(root: Folder, truth: Facts, rows: Sequence[Facts], picture: Callable[..., str] | None) -> Facts:
    """What is true of a song, beside what was found in it: means over its clips.

    Raises:
        UserError: the corpus job made no clip of it.
    """
    clips = [row for row in rows if row["status"] == OK]
    if not clips:
        raise UserError(f"{truth['path']} gave no clip, although nothing is wrong with it.", "See the job's messages.")
    audio, rate = decode(Path(root.path(f"songs/{truth['path']}")), AudioLimits())
    audio = resample(audio, rate, RATE)
    parts = [(round(row["start_s"] * RATE), round((row["start_s"] + row["duration_s"]) * RATE)) for row in clips]
    return {
        **{name: truth[name] for name in ("path", "title", "artist", "seconds", "quality")},
        "file": f"songs/{truth['path']}",
        "about": f"{truth['word']}, {truth['tempo']:g} bpm, {truth['tonic']} {truth['mode']}",
        "caption": clips[0]["caption"],
        "faults": {kind: truth[f"fault_{kind}"] for kind in KINDS if truth[f"fault_{kind}"]},
        "picture": picture(Path(truth["path"]).stem, audio) if picture else "",
        "clips": len(clips),
        **measured([audio[:, first:last] for first, last in parts]),
        "reward": _mean(row["reward_score"] for row in clips),
        "instrumental_reward": _mean(row["instrumental_reward_score"] for row in clips),
        "clap_score": _mean(row["clap_score"] for row in clips) if clips[0]["clap_score"] is not None else None,
    }


def _odd(truth: Facts, rows: Sequence[Facts]) -> Facts:
    """What became of an odd file, and whether it is what should become of it."""
    outcomes = sorted({(row["status"], row["reason"], row["message"]) for row in rows})
    status, reason, message = outcomes[0] if outcomes else ("lost", "no_row", "")
    right = {outcome[:2] for outcome in outcomes} == {(truth["status"], truth["reason"])}
    return {"path": truth["path"], "status": status, "reason": reason, "message": message, "right": right}


def _clips(root: Folder, folder: str, picture: Callable[..., str] | None) -> dict[str, Facts]:
    """Prompt -> its clip of a generation run, with its scores and what is measured in it."""
    run = root.sub(folder)
    clips = {}
    for row in manifest.read_rows(run).values():
        if row["status"] != manifest.OK:
            continue
        audio, rate = decode(Path(run.path(row["file"])), AudioLimits(min_duration_s=0.1))
        audio = resample(audio, rate, RATE)
        clips[row["prompt"]] = {
            "file": f"{folder}/{row['file']}",
            "score": row["score"],
            "picture": picture(f"{folder}-{row['name']}".replace("/", "-"), audio) if picture else "",
            **measured([audio]),
            "reward": row["reward_score"],
            "clap_score": row["clap_score"],
        }
    return clips


def measured(clips: Sequence[np.ndarray]) -> Facts:
    """Tempo, quality and the faults that can be heard, estimated from the audio alone (`ttmray.synth.measures`).

    Args:
        clips: (channels, samples) float32 at 44.1 kHz; means over them are taken, of the tempo the median.
    """
    measures = [measure(clip) for clip in clips]
    estimates = [estimate(one) for one in measures]
    strengths = {kind: _mean(faults[kind] for faults, _ in estimates) for kind in KINDS}
    heard = sorted((kind for kind in KINDS if strengths[kind] >= HEARD), key=lambda kind: -strengths[kind])
    return {
        "measured_tempo": float(np.median([one.tempo for one in measures])),
        "measured_quality": _mean(quality for _, quality in estimates),
        "measured_faults": {kind: strengths[kind] for kind in heard},
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _pictures(root: Folder) -> Callable[[str, np.ndarray], str] | None:
    """Writes a spectrogram of audio at 44.1 kHz and returns its name; None without matplotlib."""
    if not plots.available():
        return None

    def draw(name: str, audio: np.ndarray) -> str:
        file = f"spectra/{name}.png"
        root.write(file, plots.spectrogram(audio, RATE))
        return file

    return draw


def words(faults: Mapping[str, float], none: str) -> str:
    """Faults and their strengths in a line."""
    return ", ".join(f"{kind} {strength:.2f}" for kind, strength in faults.items()) or none


def show(facts: Facts) -> None:
    """Print the songs in order of their rewards, the best and the worst with reasons, and the clips."""
    name = facts["bundle"]
    columns = ("song", f"{name} reward", "true quality", "true faults", "measured in its audio")
    songs = Table(*columns, box=SIMPLE)
    for song in facts["songs"]:
        songs.add_row(
            song["title"],
            f"{song['reward']:+.2f}",
            f"{song['quality']:+.2f}",
            words(song["faults"], "none"),
            words(song["measured_faults"], "nothing of note"),
        )
    console.print(songs)
    for word, song in (("best", facts["songs"][0]), ("worst", facts["songs"][-1])):
        console.print(f"{word}: {_reasons(song, name)}", markup=False)
    if facts["spearman"] is not None:
        count = len(facts["songs"])
        console.print(f"rank correlation of {name} reward and true quality over {count} songs: {facts['spearman']:.2f}")
    right = sum(one["right"] for one in facts["odd"])
    console.print(f"{right} of {len(facts['odd'])} odd files ended as they should, each with its reason")
    scores = ("asked for", f"{name} reward", f"{name} CLAP score", "measured quality")
    clips = Table(Column("prompt", max_width=40), *scores, box=SIMPLE)
    for prompt in facts["prompts"]:
        for i, clip in enumerate(prompt["clips"]):
            values = [_signed(clip[column]) for column in ("reward", "clap_score", "measured_quality")]
            clips.add_row(prompt["prompt"] if i == 0 else "", f"{clip['score']:+g}", *values)
    console.print(clips)
    all_clips = [clip for prompt in facts["prompts"] for clip in prompt["clips"] if clip["reward"] is not None]
    for score in facts["scores"]:
        asked = [clip for clip in all_clips if clip["score"] == score]
        if asked:
            means = [f"{_mean(clip[column] for clip in asked):+.2f}" for column in ("reward", "measured_quality")]
            console.print(f"asked for {score:+g}: mean {name} reward {means[0]}, mean measured quality {means[1]}")
    console.print(facts["note"], style="yellow", markup=False)


def _reasons(song: Facts, name: str) -> str:
    true = f"made with {words(song['faults'], '')}" if song["faults"] else "made without faults"
    heard = f"measured {words(song['measured_faults'], '')}" if song["measured_faults"] else "nothing of note measured"
    return f"{song['title']}, {name} reward {song['reward']:+.2f}: {true}, true quality {song['quality']:+.2f}; {heard}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _write_page(root: Folder, facts: Facts) -> None:
    def place(name: str) -> Callable[[float], str]:
        """Where on its scale a value of a column lies, as a share in per cent."""
        values = [song[name] for song in facts["songs"]]
        low, high = min(values), max(values)
        return lambda value: f"{100 * (value - low) / ((high - low) or 1):.1f}%"

    at = {name: place(name) for name in ("reward", "quality")}
    text = pages.render(
        "demo.html.j2", title="Songs of known quality, and clips from prompts", at=at, words=words, **facts
    )
    root.write(PAGE, text.encode())
