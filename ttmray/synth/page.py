"""A page of examples of the small world that a person can open: players, spectrograms, captions, truth and measures.

    python -m ttmray.synth.page OUT --pieces 8 --seed 0 [--generated RUN ...]

`OUT/index.html` works from the disk. The first part is pieces as they come, the second one piece with each fault at
three strengths, and clips of runs of `ttmray generate` follow. Spectrograms need matplotlib (the extra `report`);
without it the page has none and says so. `pieces.png` and `generated.png` have all of them at a glance.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from typing import Any

from ttmray import pages
from ttmray.audio.io import decode, resample
from ttmray.audio.limits import AudioLimits
from ttmray.errors import UserError, run_program
from ttmray.evaluation import plots
from ttmray.generation.manifest import read_rows
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS
from ttmray.synth.instruments import RATE
from ttmray.synth.measures import Measures, estimate, measure
from ttmray.synth.world import Clip, clip, encoded, song

STRENGTHS = (0.2, 0.6, 1.0)
SECONDS = 8.0


def write_page(folder: str, seed: int, pieces: int, runs: Sequence[str] = ()) -> str:
    """Write the page and its files; the address of the page is returned.

    Args:
        runs: of `ttmray generate`, whose clips are shown, too.

    Raises:
        UserError: fewer than one piece, or a run without clips.
    """
    if pieces < 1:
        raise UserError(f"--pieces is {pieces}, but a page needs at least one.", "Give 1 or more.")
    target = Folder.at(folder)
    pictures = plots.available()
    generated = [shown for run in runs for shown in _generated(target, Folder.at(run), pictures)]
    songs = [_shown(target, song(seed, i), f"piece{i:03d}", pictures, full=True) for i in range(pieces)]
    if pictures:
        for name, clips in (("pieces", songs), ("generated", generated)):
            if clips:
                named = [(clip["facts"]["caption"], target.read(clip["picture"])) for clip in clips]
                target.write(f"{name}.png", plots.sheet(named))
    text = pages.render(
        "small_world.html.j2",
        title=f"The small world: seed {seed}",
        pictures=pictures,
        pieces=songs,
        generated=generated,
        series=[
            (
                kind,
                fault,
                [
                    _shown(target, item, f"{kind}{round(100 * item.faults[kind]):03d}", pictures, full=False)
                    for item in _series(seed, kind)
                ],
            )
            for kind, fault in KINDS.items()
        ],
    )
    target.write("index.html", text.encode())
    return target.path("index.html")


def _series(seed: int, kind: str) -> Iterator[Clip]:
    for strength in STRENGTHS:
        yield clip(seed, 0, SECONDS, start=8.0, faults={kind: strength})


def _shown(target: Folder, item: Clip, name: str, pictures: bool, full: bool) -> dict[str, Any]:
    """Write a clip's audio and spectrogram; returns what the page shows of it."""
    target.write(f"audio/{name}.ogg", encoded(item.mix, "ogg"))
    if pictures:
        target.write(f"spectra/{name}.png", plots.spectrogram(item.mix, RATE))
    measured = measure(item.mix)
    guessed, quality = estimate(measured)
    facts = {"quality": f"{item.quality:.2f} (from audio alone: {quality:.2f})"}
    facts["faults"] = ", ".join(f"{kind} {strength:.2f}" for kind, strength in item.faults.items()) or "none"
    if full:
        of = item.heard
        players = [of.voice and f"{of.voice} voice", of.lead, of.comp, of.pad, of.bass, of.kit and f"{of.kit} drums"]
        facts["caption"] = item.caption
        facts["unseen wording"] = item.unseen
        facts["style"] = f"{of.word}, {of.tempo:g} bpm, {of.key.name}, {of.beats}/4, {of.room} sound"
        facts["players"] = ", ".join(player for player in players if player)
        facts["form"] = ", ".join(f"{s.name} {s.start:.0f} s" for s in item.piece.sections)
        facts["estimated faults"] = _strongest(guessed)
    facts["measures"] = _measured(measured)
    return {"audio": f"audio/{name}.ogg", "picture": f"spectra/{name}.png" if pictures else "", "facts": facts}


def _generated(target: Folder, run: Folder, pictures: bool) -> Iterator[dict[str, Any]]:
    rows = sorted((row for row in read_rows(run).values() if row["file"] is not None), key=lambda row: row["name"])
    if not rows:
        raise UserError(f"{run} has no generated clips.", "Name a run folder of `ttmray generate`.")
    for row in rows:
        sound, kind = run.read(row["file"]), row["file"].rsplit(".", 1)[-1]
        name = f"{run.name}-{row['name']}"
        audio, picture = f"audio/{name}.{kind}", f"spectra/{name}.png" if pictures else ""
        wave, rate = decode(io.BytesIO(sound), AudioLimits(min_duration_s=0.1), row["file"])
        target.write(audio, sound)
        if picture:
            target.write(picture, plots.spectrogram(wave, rate))
        measured = measure(resample(wave, rate, RATE))
        strengths, quality = estimate(measured)
        score = "" if row["score"] is None else f"asked for {row['score']:+.2f}: "
        facts = {"caption": f"{score}{row['prompt']}", "quality (from audio alone)": f"{quality:.2f}"}
        if row["reward_score"] is not None:
            facts["reward"] = f"{row['reward_score']:.2f}"
        facts |= {"estimated faults": _strongest(strengths), "measures": _measured(measured)}
        yield {"audio": audio, "picture": picture, "facts": facts}


def _strongest(strengths: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(strengths.items(), key=lambda p: -p[1])[:3])


def _measured(of: Measures) -> str:
    return (
        f"{of.tempo:.1f} bpm, pulse {of.pulse:.2f}, tuning {of.tuning:.0f} cents, floor {of.floor_high:.0f} dB, "
        f"crest {of.crest:.0f} dB, bass {of.bass:.0f} dB, treble {of.treble:.0f} dB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--generated", metavar="RUN", nargs="+", default=[], help="runs of `ttmray generate` to show, too"
    )
    arguments = parser.parse_args(argv)
    print(write_page(arguments.folder, arguments.seed, arguments.pieces, arguments.generated))
    return 0


if __name__ == "__main__":
    run_program(main)
