"""Screenshots of every HTML page that ttmray makes, at 1280 and 390 px, light and dark: the sheets of docs/pages.md.

    python benchmarks/transcript.py --folder runs/pages --local
    python benchmarks/pages.py --folder runs/pages --output docs/images

The first line makes the runs of all jobs on the debug bundle, the second the pages that are made on request, serves the
try-out page, and photographs all of them with Chromium. It prints which pages are wider than a phone, and its exit
code is then 1. Chromium does not make windows of 390 px, so pages stand in a frame of that width.
"""

import argparse
import html
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from PIL import Image, ImageDraw

WIDTHS = {1280: 1500, 390: 1500}
"""Width in pixels -> height of what is photographed."""
THEMES = {"light": 1, "dark": 0}
"""Name -> how Chromium calls it."""
SHOWN = {1280: (420, 588), 390: (200, 420)}
"""Width in pixels -> width and height on the sheet."""
COLOURS = 64
CHROMIUM = (
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
)
PROBE = """<script>addEventListener("load", () => parent.postMessage(
document.documentElement.scrollWidth, "*"))</script>"""
LISTEN = """<script>addEventListener("message", e => document.body.setAttribute("data-width", e.data))</script>"""


@dataclass(frozen=True)
class Page:
    """A page of a run of the folder, and the command that makes it where the job does not."""

    name: str
    path: str
    command: str = ""


PAGES = (
    Page("demo", "runs/demo/index.html"),
    Page("clips", "runs/debug/generated/index.html"),
    Page("corpus sample", "runs/listen/index.html", "corpus sample runs/debug/corpus -n 3 --out runs/listen"),
    Page("training", "runs/debug/stage1/index.html", "report runs/debug/stage1"),
    Page("evaluation", "runs/debug/evaluation/report/index.html", "report runs/debug/evaluation"),
    Page("chain", "runs/debug/chain/index.html"),
    Page("ablations", "runs/debug/ablations/index.html"),
    Page("tables", "runs/debug/ablations/tables/index.html"),
    Page("methods", "runs/debug-methods/index.html"),
    Page("small world", "runs/world/index.html", "synth.page runs/world --pieces 2"),
)
SERVE = "serve --bundle debug --port 0 --output runs/serve"


def file_of(page: Page, folder: Path) -> Path:
    """The file of a page, which is made where it is missing."""
    if page.command and not (folder / page.path).exists():
        words = shlex.split(page.command)
        module = f"ttmray.{words.pop(0)}" if words[0] == "synth.page" else "ttmray"
        subprocess.run([sys.executable, "-m", module, *words], cwd=folder, check=True)
    return (folder / page.path).resolve(strict=True)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of the try-out page while it runs."""
    command = [sys.executable, "-m", "ttmray", *shlex.split(SERVE)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"http://\S+", line):
                    yield match[0]
                    return
            raise RuntimeError("ttmray serve ended without an address")
        finally:
            process.terminate()


def framed(address: str, width: int, height: int, work: Path) -> Path:
    """A page with nothing but a frame of that size."""
    path = work / f"frame-{width}.html"
    frame = f'<iframe src="{html.escape(address)}" width={width} height={height} style="border:0"></iframe>'
    path.write_text(f'<!doctype html><body style="margin:0">{frame}{LISTEN}', "utf-8")
    return path


def photograph(address: str, width: int, theme: str, work: Path) -> Image.Image:
    """The top of a page."""
    height = WIDTHS[width]
    if width < 500:
        address = framed(address, width, height, work).as_uri()
    picture = work / "page.png"
    picture.unlink(missing_ok=True)
    size = (f"--window-size={max(width, 500)},{height}", f"--screenshot={picture}")
    colours = f"--blink-settings=preferredColorScheme={THEMES[theme]}"
    subprocess.run(
        [*CHROMIUM, colours, *size, address], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with Image.open(picture) as image:
        return image.convert("RGB").crop((0, 0, width, min(height, image.height)))


def width_of(path: Path, width: int, work: Path) -> int:
    """Pixels that a page takes in a frame of `width`; more than `width`: it has to be scrolled sideways."""
    probe = path.with_name(".probe.html")  # beside the page, whose pictures have relative addresses
    try:
        text = re.sub(r"<meta http-equiv=\W?Content-Security-Policy[^>]*>", "", path.read_text("utf-8"))
        probe.write_text(text + PROBE, "utf-8")  # some pages forbid scripts that are not theirs
        frame = framed(probe.resolve().as_uri(), width, WIDTHS[width], work).as_uri()
        command = [*CHROMIUM, "--window-size=600,1500", "--dump-dom", frame]
        dom = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    finally:
        probe.unlink(missing_ok=True)
    match = re.search(r'data-width="(\d+)"', dom)
    if match is None:
        raise RuntimeError(f"{path} said nothing of its width")
    return int(match[1])


def sheet(pictures: dict[str, Image.Image], shown: int, tall: int) -> Image.Image:
    """Named pictures side by side, each `shown` pixels wide and at most `tall` high, six in a row or four."""
    columns, gap, title = (4 if shown > 300 else 6), 10, 16
    sizes = {name: (shown, one.height * shown // one.width) for name, one in pictures.items()}
    small = {name: one.resize(sizes[name], Image.Resampling.LANCZOS) for name, one in pictures.items()}
    small = {name: one.crop((0, 0, shown, min(one.height, tall))) for name, one in small.items()}
    height = max(one.height for one in small.values())
    rows = -(-len(small) // columns)
    whole = Image.new("RGB", (columns * (shown + gap) + gap, rows * (height + title + gap) + gap), (128, 128, 128))
    draw = ImageDraw.Draw(whole)
    for i, (name, one) in enumerate(small.items()):
        x, y = gap + i % columns * (shown + gap), gap + i // columns * (height + title + gap)
        draw.text((x, y), name, fill=(255, 255, 255))
        whole.paste(one, (x, y + title))
    return whole


def main() -> int:
    """Make the sheets; returns 1 where a page is wider than a phone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where transcript.py has run the jobs")
    parser.add_argument("--output", type=Path, help="folder of the sheets (default: none are written)")
    parser.add_argument("--pages", type=Path, help="folder for every picture by itself, at full size")
    typed = parser.parse_args()
    wide = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        files = {page.name: file_of(page, typed.folder) for page in PAGES}
        files["try-out"] = work / "try-out.html"
        with serving(typed.folder) as tryout, urlopen(tryout) as answer:  # it forbids to be shown in a frame
            files["try-out"].write_bytes(answer.read())
        for name, path in files.items():
            width = width_of(path, 390, work)
            print(f"{name}: {width} of 390 px{', WIDER THAN A PHONE' if width > 390 else ''}", flush=True)
            wide += width > 390
        addresses = {name: path.resolve().as_uri() for name, path in files.items()}
        for width, theme in ((width, theme) for width in WIDTHS for theme in THEMES):
            pictures = {name: photograph(where, width, theme, work) for name, where in addresses.items()}
            for name, picture in pictures.items():
                if typed.pages is not None:
                    typed.pages.mkdir(parents=True, exist_ok=True)
                    picture.save(typed.pages / f"{name.replace(' ', '-')}-{width}-{theme}.png")
            if typed.output is not None:
                target = typed.output / f"pages-{width}-{theme}.png"
                sheet(pictures, *SHOWN[width]).quantize(COLOURS).save(target, optimize=True)
                print(f"{target}: {target.stat().st_size} bytes", flush=True)
    return int(wide > 0)


if __name__ == "__main__":
    sys.exit(main())
