"""A page of examples of the small world that a person can open: players, spectrograms, captions, truth and measures.

    python -m ttmray.synth.page OUT --pieces 8 --seed 0

`OUT/index.html` works from the disk. The first part is pieces as they come, the second one piece with each fault at
three strengths. Spectrograms need matplotlib (the extra `report`); without it the page has none and says so.
"""

import argparse
import html
import sys
from collections.abc import Iterator, Sequence

from ttmray.errors import EXIT_BAD_INPUT, UserError
from ttmray.evaluation import plots
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS
from ttmray.synth.instruments import RATE
from ttmray.synth.measures import Measures, estimate, measure
from ttmray.synth.world import Clip, clip, encoded, song

STRENGTHS = (0.2, 0.6, 1.0)
SECONDS = 8.0
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid #8886; padding: 1rem 0; }
audio, img { width: 100%; }
img { height: 128px; image-rendering: auto; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; margin: 0; }
dt { color: #888; }
dd { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; }
"""


def write_page(folder: str, seed: int, pieces: int) -> str:
    """Write the page and its files; the address of the page is returned.

    Raises:
        UserError: fewer than one piece.
    """
    if pieces < 1:
        raise UserError(f"--pieces is {pieces}, but a page needs at least one.", "Give 1 or more.")
    target = Folder.at(folder)
    pictures = _pictures_can_be_made()
    parts = [f"<!doctype html><meta charset='utf-8'><title>Small world, seed {seed}</title><style>{STYLE}</style>"]
    parts.append(f"<h1>The small world: seed {seed}</h1>")
    if not pictures:
        parts.append("<p>No spectrograms: matplotlib is not installed (pip install 'ttmray[report]').</p>")
    parts.append("<h2>Pieces as they come</h2>")
    for index in range(pieces):
        parts.append(_article(target, song(seed, index), f"piece{index:03d}", pictures, full=True))
    parts.append("<h2>One piece with one fault at a time</h2>")
    for kind, fault in KINDS.items():
        parts.append(f"<h3>{kind}</h3><p>{_text(fault.meaning)}; costs {fault.cost} x strength.</p><div class='grid'>")
        for item in _series(seed, kind):
            name = f"{kind}{round(100 * item.faults[kind]):03d}"
            parts.append(_article(target, item, name, pictures, full=False))
        parts.append("</div>")
    target.write("index.html", "\n".join(parts).encode())
    return target.path("index.html")


def _series(seed: int, kind: str) -> Iterator[Clip]:
    for strength in STRENGTHS:
        yield clip(seed, 0, SECONDS, start=8.0, faults={kind: strength})


def _article(target: Folder, item: Clip, name: str, pictures: bool, full: bool) -> str:
    target.write(f"audio/{name}.ogg", encoded(item.mix, "ogg"))
    measured = measure(item.mix)
    guessed, quality = estimate(measured)
    lines = [f"<article><audio controls preload='none' src='audio/{name}.ogg'></audio>"]
    if pictures:
        target.write(f"spectra/{name}.png", plots.spectrogram(item.mix, RATE))
        lines.append(f"<img src='spectra/{name}.png' alt='Mel spectrogram' loading='lazy'>")
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
    lines.append(
        "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()) + "</dl></article>"
    )
    return "\n".join(lines)


def _strongest(strengths: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(strengths.items(), key=lambda p: -p[1])[:3])


def _measured(of: Measures) -> str:
    return (
        f"{of.tempo:.1f} bpm, pulse {of.pulse:.2f}, tuning {of.tuning:.0f} cents, floor {of.floor_high:.0f} dB, "
        f"crest {of.crest:.0f} dB, bass {of.bass:.0f} dB, treble {of.treble:.0f} dB"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _pictures_can_be_made() -> bool:
    try:
        plots.require_matplotlib()
    except UserError:
        return False
    return True


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    print(write_page(arguments.folder, arguments.seed, arguments.pieces))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
