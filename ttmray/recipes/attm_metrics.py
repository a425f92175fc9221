"""The challenge's metrics: FAD and CLAP score as its public code computes them, and a concept coverage score (CCS).

The organisers say of CCS that an audio-language model gives it; which one, and what it is asked, is not public. So it
is what `ttmray.evaluation.judge` defines, by a judge of yours, and only systems under one judge can be compared.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from ttmray.audio.clip import read_whole
from ttmray.audio.io import resample, to_mono
from ttmray.cluster import ActorsConfig
from ttmray.config import Config, Device, Location, execution
from ttmray.console import console
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, ClipError
from ttmray.evaluation import fadtk
from ttmray.evaluation.fad import Gaussian
from ttmray.evaluation.judge import JudgeConfig, check_judge, judge
from ttmray.evaluation.systems import SystemFolder, audio_files, find_systems
from ttmray.generation.prompts import read_prompts
from ttmray.models.bundle import Bundle, BundleName, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.plans import embedding_flops, show_plan, weights_rows
from ttmray.recipes.attm import flat
from ttmray.storage import Folder

PUBLISHED: tuple[tuple[str, float, float, float | None], ...] = (
    ("FluxAudio-S, the organisers' baseline", 0.6073, 0.2015, None),
    ("ttm-humanpref, the paper's submission", 0.498, 0.270, 0.763),
)
"""Name, FAD, CLAP score and CCS against the organisers' hidden reference and prompts: on their page, which has no CCS
of the baseline, and in the paper."""
SHOWN = 5
"""Files of a folder that are left out and named on the console; `attm.json` names all."""
COLUMNS = ("system", "clips", "windows", "fad", "clap", "ccs", "judged", "failed", "missing")


class AttmConfig(Config):
    """`ttmray attm evaluate`."""

    folders: tuple[str, ...] = execution(min_length=1)
    """Flat folders of audio named by prompt id, or generation runs; `NAME=FOLDER` names one."""
    reference: Location = execution()
    """Flat folder of audio, or the `reference.safetensors` of an earlier evaluation."""
    prompts: Location = execution()
    """File of prompts with their ids."""
    output: Location = execution("runs/attm/evaluation")
    """Folder of `attm.csv`, `attm.json`, `reference.safetensors`, and of the judge's answers."""
    bundle: BundleName = "paper"
    """Set of models; CLAP-Music of `paper` is the official one."""
    judge: JudgeConfig | None = None
    """Who gives CCS: an audio-language model behind an endpoint, or in a local folder; null: nobody."""
    device: Device = execution("auto")
    """Of the models: `auto` is cuda where there is one."""
    batch: int = execution(16, ge=1)
    """Windows per forward on a GPU."""


def evaluate(config: AttmConfig, *, plan_only: bool = False) -> int:
    """Print and write the metrics of each system beside the published ones; returns the exit code, 3 where a file of a
    system or of the reference had to be left out.

    Args:
        plan_only: say what would be done, and stop.

    Raises:
        UserError: no audio, clips of other prompts, weights that are not there, or a judge that cannot be asked.
    """
    known = read_prompts(config.prompts)
    systems = find_systems(
        config.folders, known, "have no CLAP score; FAD hears the folder itself, with or without prompt"
    )
    if config.judge is not None:
        check_judge(config.judge, [prompt.id for prompt in known])
    opened = open_bundle(config.bundle)
    if plan_only:
        return _show_plan(config, opened, systems, len(known))
    options = LoadOptions(device=config.device, batch=config.batch, threads=os.cpu_count() or 1)
    clap = opened.load({"clap"}, options).clap
    target = Folder.at(config.output)
    if config.reference.endswith(".safetensors"):
        against, count = Gaussian.load(config.reference), 0
        unused: dict[str, dict[str, str]] = {}
    else:
        against, count, bad = fadtk.folder_statistics(clap, Folder.at(config.reference), "reference")
        against.save(target.path("reference.safetensors"))
        unused = {"the reference": bad}
    rows: list[dict[str, Any]] = []
    for system in systems:
        for warning in system.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)
        gaussian, files, unused[system.name] = fadtk.folder_statistics(
            clap, flat(Folder.at(system.folder)), system.name
        )
        there = [clip for clip in system.clips if clip.path is not None]
        tried = [_clap_score(clap, str(clip.path), clip.prompt) for clip in there]
        scores = [score for score in tried if score is not None]
        row: dict[str, Any] = {"system": system.name, "clips": files, "windows": gaussian.n}
        row |= {"fad": fadtk.distance(against, gaussian), "clap": float(np.mean(scores)) if scores else math.nan}
        row |= _coverage(system, config.judge, target)
        heard = {clip.prompt_id for clip, score in zip(there, tried, strict=True) if score is not None}
        rows.append(row | {"failed": len(unused[system.name]), "missing": len(known) - len(heard)})
    about = {"protocol": f"{fadtk.PROTOCOL} of {opened.name}", "reference": count, "note": opened.note}
    about |= {"judge": config.judge.name if config.judge else None, "unused": unused}
    _report(rows, target, about)
    return EXIT_TOO_MANY_FAILURES if any(unused.values()) else EXIT_OK


def _show_plan(config: AttmConfig, bundle: Bundle, systems: Sequence[SystemFolder], prompts: int) -> int:
    clips = sum(clip.path is not None for system in systems for clip in system.clips)
    songs = 0 if config.reference.endswith(".safetensors") else len(audio_files(Folder.at(config.reference)))
    flops, of = embedding_flops(bundle, 2 * clips + songs, ("clap",))
    rows = [
        ("systems", f"{len(systems)}", ", ".join(system.name for system in systems)),
        ("clips", f"{clips:,} of {prompts * len(systems):,}", f"{prompts:,} prompts of {config.prompts}"),
        ("reference", f"{songs:,} files to embed" if songs else "embedded already", config.reference),
        ("CCS", config.judge.name if config.judge else "none", "the judge" if config.judge else "no judge is named"),
        ("bundle", bundle.name, bundle.note),
        *weights_rows(bundle, ("clap",)),
    ]
    runtime = ActorsConfig(device=config.device)
    return show_plan(rows, Folder.at(config.output), clips + songs, flops, runtime, f"{of}, as if all were 10 s")


def _clap_score(clap: Any, path: str, prompt: str) -> float | None:
    """Cosine of the whole clip and the raw prompt; None where it cannot be decoded."""
    try:
        audio, rate = read_whole(path)
    except ClipError:
        return None  # among those that are left out, with the reason
    wave = fadtk.sixteen_bits(resample(to_mono(audio), rate, fadtk.RATE))
    return float(clap.embed_audio([wave])[0] @ clap.embed_text([prompt])[0])


def _coverage(system: SystemFolder, config: JudgeConfig | None, target: Folder) -> dict[str, Any]:
    """Mean CCS of the clips that the judge has answered for, and how many these are."""
    if config is None:
        return {"ccs": None, "judged": 0}
    clips = [(clip.prompt_id, clip.prompt, clip.path) for clip in system.clips if clip.path is not None]
    answers = judge(clips, config, target)
    scores = [score for score, _ in answers if score is not None]
    if problems := [problem for score, problem in answers if score is None]:
        console.print(f"{system.name}: {len(problems)} clips without CCS: {problems[0]}", style="yellow", markup=False)
    return {"ccs": float(np.mean(scores)) if scores else None, "judged": len(scores)}


def _report(rows: Sequence[dict[str, Any]], out: Folder, about: Mapping[str, Any]) -> None:
    table = Table("system", "clips", "windows", "FAD", "CLAP", "CCS", "failed", "prompts without clip")
    for row in rows:
        numbers = (f"{row['fad']:.4f}", f"{row['clap']:.4f}", "" if row["ccs"] is None else f"{row['ccs']:.3f}")
        table.add_row(
            row["system"], str(row["clips"]), str(row["windows"]), *numbers, str(row["failed"]), str(row["missing"])
        )
    for name, fad, clap, ccs in PUBLISHED:
        table.add_row(
            f"{name} (published)", "", "", f"{fad:.4f}", f"{clap:.4f}", "" if ccs is None else f"{ccs:.3f}", "", ""
        )
    if about["note"]:
        console.print(str(about["note"]), style="yellow", markup=False)
    console.print(table)
    for what, bad in about["unused"].items():
        for name, why in list(bad.items())[:SHOWN]:
            console.print(f"{what}: {name} is left out: {why}", style="yellow", markup=False)
    sink = io.StringIO(newline="")
    note = {"note": about["note"]} if about["note"] else {}
    writer = csv.DictWriter(sink, [*COLUMNS, *note], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | note for row in rows)
    published = [{"system": name, "fad": fad, "clap": clap, "ccs": ccs} for name, fad, clap, ccs in PUBLISHED]
    writer.writerows([one | {"system": f"{one['system']} (published)"} for one in published])
    out.write("attm.csv", sink.getvalue().encode())
    out.write("attm.json", json.dumps({**about, "systems": list(rows), "published": published}, indent=1).encode())
    console.print(f"{about['protocol']}: {out.path('attm.csv')}", markup=False)
    judged = f"by {about['judge']}, which is not the organisers' judge: theirs is not public"
    left_out = "left out: name an audio-language model, --set judge.model=... (docs/attm.md)"
    console.print(f"CCS: {judged if about['judge'] else left_out}", markup=False)
    console.print(
        "The published numbers are against the organisers' hidden reference and prompts: they can be compared with "
        "ours only in their order of magnitude.",
        style="yellow",
    )
