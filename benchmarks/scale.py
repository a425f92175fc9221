"""What a run of many units costs beside its audio: making and committing rows, and every look at them.

    python benchmarks/scale.py [--tracks N] [--output FILE.json] [--keep FOLDER]

The catalogue is MTG-Jamendo's table in $TTMRAY_DATA (default ../shared/data; without it a synthetic one of the same
size): 55,525 tracks, 537,626 clips, 18,374 units. Stages calculate nothing and write small arrays, so bytes of shards
are a thousandth of the real ones and everything per clip, unit and file is what it is. Each line is a command of its
own, as users type it; memory is the peak of its process tree.

make       the corpus job with the local runner, from the table to `_SUCCESS.json`
finalise   the same command where only the end of the run is to be made again
relaunch   the same command on the finished run
verify     `ttmray corpus verify`
stats      `ttmray corpus stats`
status     `ttmray status`
"""

import argparse
import csv
import gzip
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from common import Line, machine, report, run_measured, spread
from corpus import synthetic_table

from ttmray import cli
from ttmray.corpus import assembly, index
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.finalise import LATENTS
from ttmray.corpus.running import Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.stages import Write
from ttmray.corpus.unit import Unit
from ttmray.models.bundle import Models
from ttmray.runs import SUCCESS
from ttmray.storage import Folder

REPO = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TTMRAY_DATA", REPO.parent / "shared" / "data"))
TRACKS = DATA / "jamendo" / "tracks.tsv.gz"
CLIP_S = 10.0


class PlannedRows(Stage):
    """The clips that the plan expects, with numbers that follow from nothing."""

    name, scope, resources = "decode", "unit", "decode"
    writes = ("clap_audio", "mert", "latent_mean", "latent_std", "texts")

    def __init__(self, models: Models) -> None:
        pass

    def __call__(self, unit: Unit) -> Unit:
        for track in unit.tracks:
            for segment in range(track["clips"]):
                row = index.new_row(track, unit.name, "scale")
                row |= {"key": f"{track['track_id']}_{segment}", "segment": segment, "start_s": segment * CLIP_S}
                unit.rows.append(row | {"reward_score": segment / 9, "instrumental_reward_score": segment / 7})
        count = len(unit.rows)
        pairs, latents = np.ones((count, 2, 16), np.float32), np.ones((count, 4, 40), np.float16)
        unit.clips = {"clap_audio": pairs, "mert": pairs, "latent_mean": latents, "latent_std": latents}
        unit.caption_ids = sorted({track["caption_id"] for track in unit.tracks if track["caption_owner"]})
        if owned := len(unit.caption_ids):
            words = np.ones((owned, 16), np.float32)
            unit.texts = {"t5": words.reshape(owned, 2, 8).astype(np.float16), "clap": words, "clap_score": words}
        return unit


@dataclass(frozen=True)
class ScaleJob(CorpusJob):
    """The real job without audio and models."""

    def makers(self) -> Makers:
        return {PlannedRows: PlannedRows, Write: lambda _: Write(Folder(self.output))}

    def stages(self, names: Sequence[str] | None = None) -> list[type[Stage]]:
        return [stage for stage in self.makers() if names is None or stage.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracks", type=int, default=0, help="only so many of the catalogue")
    parser.add_argument("--output", type=Path, help="also write results as JSON")
    parser.add_argument("--run", type=Path, help="make the run here and leave it; it is not made again")
    parser.add_argument("--job", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job is not None:
        import scale  # by its name, which the workers of the job know it by

        assembly.CorpusJob = scale.ScaleJob  # type: ignore[misc]
        return cli.main(["score-corpus", *chosen.job])
    with tempfile.TemporaryDirectory(prefix="scale-") as work:
        lines = measure(Path(work), chosen.run or Path(work) / "run", chosen.tracks)
    return report("scale", lines, machine(), chosen.output, judged=False)


def measure(work: Path, run: Path, tracks: int) -> list[Line]:
    table = TRACKS if TRACKS.exists() else synthetic_table(work / "tracks.csv")
    with gzip.open(table, "rt") if table.suffix == ".gz" else open(table) as rows:
        paths = [row["path"] for row in csv.DictReader(rows, delimiter="\t" if ".tsv" in table.name else ",")]
    for folder in {str(Path(path).parent) for path in paths}:
        (work / "audio" / folder).mkdir(parents=True)
    for path in paths:
        (work / "audio" / path).write_bytes(b"no audio")
    sets = [f"input={table}", f"output={run}", f"catalogue.audio_root={work / 'audio'}", "catalogue.captions=null"]
    sets += ["catalogue.duplicates=keep"]
    sets += ["bundle=debug", "runtime.runner=local", "runtime.workers=0", "runtime.device=cpu"]
    if tracks:
        sets += [f"catalogue.limit={tracks}", f"splits.validation={tracks // 100}", f"splits.test={tracks // 100}"]
    job = [sys.executable, __file__, "--job", *(word for item in sets for word in ("--set", item))]
    ours = [sys.executable, "-m", "ttmray"]
    lines = [] if (run / SUCCESS).exists() else timed("make", job)
    for name in (SUCCESS, index.MERGED, LATENTS):
        (run / name).unlink()
    lines += timed("finalise", job)
    lines += timed("relaunch", job)
    for name in ("verify", "stats"):
        lines += timed(name, [*ours, "corpus", name, str(run)])
    lines += timed("status", [*ours, "status", str(run)])
    clips, units = pq.read_metadata(run / index.MERGED).num_rows, len(list((run / index.INDEX).iterdir()))
    return [replace(line, note=f"{clips:,} clips, {units:,} units") for line in lines]


def timed(what: str, command: Sequence[str]) -> list[Line]:
    """Seconds and memory of a command."""
    began = time.perf_counter()
    measured = run_measured(command, REPO, lambda: 0)
    seconds = time.perf_counter() - began
    print(f"{what}: {seconds:.1f} s", flush=True)
    return [
        Line(what, spread([seconds], 1), "s"),
        Line(f"{what}: CPU", spread([measured.cpu_s], 1), "CPU-s"),
        Line(f"{what}: peak memory", spread([measured.peak_pss / 2**20], 0), "MiB"),
    ]


if __name__ == "__main__":
    sys.exit(main())
