"""Levels of published clips before and after post-processing, by our meter and by an independent one.

    python benchmarks/levels.py [--output FILE.json]

Every clip below $TTMRAY_DATA/clips (default ../shared/data/clips) goes through `ttmray postprocess --no-separation`.
The other meter is pyloudnorm on float64 samples and the peak of an 8x polyphase oversampling, both on the files as
written. Exit code 1 if a clip that is not silent misses -16.5 +/- 0.1 LUFS or exceeds -1 dBTP
(the other peak meter may read 0.1 dB more).
"""

import argparse
import csv
import json
import math
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyloudnorm
import soundfile
from scipy.signal import resample_poly

from ttmray.generation.postprocess import PostprocessConfig
from ttmray.generation.postprocess_folders import TABLE, postprocess

LUFS, CEILING, ALLOWANCE = -16.5, -1.0, 0.1


def independent(path: str) -> tuple[float, float]:
    """LUFS and dBTP of a file."""
    wave, rate = soundfile.read(path, always_2d=True)
    peak = np.abs(resample_poly(wave, 8, 1, axis=0)).max()
    return float(pyloudnorm.Meter(rate, filter_class="DeMan").integrated_loudness(wave)), 20 * math.log10(peak)


def measured(folder: Path) -> list[dict[str, Any]]:
    """A row per clip below `folder`, levels rounded to 0.001."""
    rows = []
    with tempfile.TemporaryDirectory() as out:
        postprocess([str(path) for path in sorted(folder.iterdir()) if path.is_dir()], out, PostprocessConfig(passes=0))
        with open(f"{out}/{TABLE}", newline="") as file:
            table = list(csv.DictReader(file))
        for row in table:
            before, after = independent(row["source"]), independent(f"{out}/{row['file']}")
            levels = {
                "ours_before": (row["lufs_before"], row["true_peak_before"]),
                "independent_before": before,
                "ours_after": (row["lufs_after"], row["true_peak_after"]),
                "independent_after": after,
            }
            rounded = {name: [round(float(value), 3) for value in pair] for name, pair in levels.items()}
            rows.append({"clip": row["file"], "outcome": row["reason"] or "reached", **rounded})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()
    rows = measured(Path(os.environ.get("TTMRAY_DATA", "../shared/data")) / "clips")

    def off(name: str) -> int:
        return sum(abs(row[name][0] - LUFS) > ALLOWANCE for row in rows if row["outcome"] != "silent")

    def loud(name: str, allowance: float) -> int:
        return sum(row[name][1] > CEILING + allowance for row in rows)

    allowances = {"ours": 0.0, "independent": ALLOWANCE}
    counts = {
        f"{meter}_{when}": {"off_target": off(f"{meter}_{when}"), "above_ceiling": loud(f"{meter}_{when}", allowance)}
        for meter, allowance in allowances.items()
        for when in ("before", "after")
    }
    result = {
        "what": "[LUFS, dBTP] of every clip; counts of those off -16.5 +/- 0.1 LUFS and above -1 dBTP",
        "versions": {name: version(name) for name in ("numpy", "scipy", "pyloudnorm")},
        "clips": len(rows),
        "counts": counts,
        "rows": rows,
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(counts, indent=1))
    return int(any(counts[f"{meter}_after"] != {"off_target": 0, "above_ceiling": 0} for meter in allowances))


if __name__ == "__main__":
    sys.exit(main())
