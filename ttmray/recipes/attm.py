"""The challenge kit: splits and submission of the ICME 2026 Academic Text-to-Music Grand Challenge.

`docs/attm.md` says where its data are and how the presets of `configs/attm/` go together; `attm_metrics` evaluates.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ttmray.audio.clip import read_whole
from ttmray.audio.io import AUDIO_EXTENSIONS
from ttmray.audio.level import silence
from ttmray.console import console
from ttmray.corpus.captions import load_captions
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, ClipError, UserError
from ttmray.generation.manifest import CLIPS, check_zip, zip_files
from ttmray.generation.prompts import read_prompts
from ttmray.models.backbone_weights import CHALLENGE_LIMIT, count_parameters, file_config
from ttmray.storage import BAD_NAME, Folder, name_problem, shown_name

SEED = 42
STEM = "_instrumental"
SECONDS = 10.0
SPLITS = ("train", "val", "test", "all")


def split(
    captions: str, audio: str, out: str, *, stem: str = STEM, validation: int = 100, test: int = 100, seed: int = SEED
) -> int:
    """`ttmray attm split`: the split of the baseline, as its TSV files and as a table for `splits.table`.

    Ids with a caption and audio, in the order of the captions, shuffled by Python's generator: the first are for test,
    the next for validation, the rest for training.

    Args:
        captions: `jamendo_qwen.json`, or any table of captions.
        audio: folder or bucket with `<last two digits>/<id><stem>.mp3`.
        out: folder of `jamendo_train.tsv`, `_val`, `_test`, `_all` and `splits.csv`.
        stem: end of the names before `.mp3`; empty: mixes.

    Raises:
        UserError: no audio of any caption, or fewer songs than are held out.
    """
    texts = {key.rpartition("/")[2]: text for key, text in load_captions(captions).items()}
    there = {entry.name for entry in Folder.at(audio).files(sizes=False)}
    ids = [name for name in texts if name.isdigit() and f"{name[-2:]}/{name}{stem}.mp3" in there]
    if len(ids) <= validation + test:
        raise UserError(
            f"{len(ids)} of {len(texts)} songs with a caption have audio such as "
            f"{audio}/85/1085785{stem}.mp3; {validation + test} are held out.",
            "Check --audio and --stem.",
        )
    random.Random(seed).shuffle(ids)
    parts = {"test": ids[:test], "val": ids[test : test + validation], "train": ids[test + validation :], "all": ids}
    folder = Folder.at(out)
    for name in SPLITS:
        rows = [f"{one}\t{' '.join(texts[one].split())}\n" for one in parts[name]]
        folder.write(f"jamendo_{name}.tsv", ("id\tcaption\n" + "".join(rows)).encode())
    of = {one: {"val": "validation"}.get(name, name) for name in SPLITS[:3] for one in parts[name]}
    folder.write("splits.csv", ("id,split\n" + "".join(f"{one},{of[one]}\n" for one in ids)).encode())
    counts = ", ".join(f"{name} {len(parts[name]):,}" for name in SPLITS)
    console.print(f"{folder}: {counts}; {len(texts) - len(ids)} captions without audio", markup=False)
    return EXIT_OK


def flat(folder: Folder) -> Folder:
    """The folder of the clips, which of a generation run is one below it."""
    return folder.sub(CLIPS) if folder.exists("run.json") else folder


@dataclass(frozen=True)
class Rules:
    """What a submission must be.

    Attributes:
        seconds: length of a clip; a sample more or less counts as equal.
        rate: Hz; None: any, but one for all.
        parameters: most that the model may have; None: any (performance track).
    """

    seconds: float = SECONDS
    rate: int | None = None
    parameters: int | None = CHALLENGE_LIMIT


def submit(
    folder: str,
    *,
    prompts: str,
    out: str,
    checkpoint: str | None = None,
    seconds: float = SECONDS,
    rate: int | None = None,
    track: str = "efficiency",
) -> int:
    """`ttmray attm submit`: a zip of the clips, flat and named by prompt id, if every check passes; else exit code 2.

    Args:
        folder: flat folder of audio, or a generation run.
        prompts: file of prompts with their ids; each needs one clip.
        out: the zip, a new local file.
        checkpoint: weights of the model, whose parameters are counted; None: they are not, and that is said.
        seconds, rate: see `Rules`.
        track: `efficiency` (500 M parameters) or `performance`.

    Raises:
        UserError: no such folder or prompts, or an unknown track.
    """
    if track not in ("efficiency", "performance"):
        raise UserError(f"track: {track!r}.", "efficiency or performance.")
    target = check_zip(out)
    rules = Rules(seconds, rate, CHALLENGE_LIMIT if track == "efficiency" else None)
    clips = flat(Folder.at(folder))
    if not any(entry.name.lower().endswith(tuple(AUDIO_EXTENSIONS)) for entry in clips.files(sizes=False)):
        raise UserError(f"{clips}: no audio files.", "Name the folder of the clips, or the run that made them.")
    ids = [prompt.id for prompt in read_prompts(prompts)]
    named, problems = _named(clips, ids)
    rates: dict[int, int] = {}
    for name in named.values():
        problems += _sound_problems(clips, name, rules, rates)
    if len(rates) > 1:
        problems.append(f"{len(rates)} sample rates: {', '.join(f'{hz} Hz ({n})' for hz, n in sorted(rates.items()))}")
    problems += _size_problems(checkpoint, rules)
    if problems:
        console.print(f"no {out}: {len(problems)} problems", style="red", markup=False)
        for problem in problems[:50]:
            console.print(f"  {problem}", markup=False)
        return EXIT_BAD_INPUT
    zip_files(clips, {name: name for _, name in sorted(named.items())}, target)
    console.print(f"{out}: {len(named)} clips of {seconds:g} s, {next(iter(rates), 0)} Hz", markup=False)
    return EXIT_OK


def _named(clips: Folder, ids: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Prompt id -> file, and what is wrong with the names."""
    files: dict[str, list[str]] = {}
    problems = []
    for entry in clips.files(sizes=False):
        stem, ending = os.path.splitext(entry.name)
        if ending.lower() in AUDIO_EXTENSIONS:
            if problem := name_problem(entry.name):
                problems.append(f"{shown_name(entry.name)}: {BAD_NAME}: {problem}")
            else:
                files.setdefault(stem, []).append(entry.name)
    problems += [f"no clip of prompt {one}" for one in ids if one not in files]
    problems += [f"{names[0]} is of no prompt" for stem, names in sorted(files.items()) if stem not in set(ids)]
    problems += [f"{' and '.join(names)}: two clips of one prompt" for names in files.values() if len(names) > 1]
    return {one: files[one][0] for one in ids if one in files}, problems


def _sound_problems(clips: Folder, name: str, rules: Rules, rates: dict[int, int]) -> list[str]:
    """What is wrong with a clip; counts its rate."""
    try:
        audio, rate = read_whole(clips.path(name))
    except ClipError as error:
        return [f"{name}: {error.reason}: {error.message}"]
    rates[rate] = rates.get(rate, 0) + 1
    problems = []
    if abs(audio.shape[1] - rules.seconds * rate) > 1:
        problems.append(f"{name}: {audio.shape[1] / rate:.4f} s, not {rules.seconds:g} s")
    if rules.rate is not None and rate != rules.rate:
        problems.append(f"{name}: {rate} Hz, not {rules.rate} Hz")
    if silence(audio):
        problems.append(f"{name}: silent")
    return problems


def _size_problems(checkpoint: str | None, rules: Rules) -> list[str]:
    if rules.parameters is None:
        return []
    if checkpoint is None:
        console.print("without --checkpoint the parameters are not counted", style="yellow")
        return []
    counts = count_parameters(file_config(checkpoint)[0])
    total = sum(trainable + frozen for _, trainable, frozen in counts)
    console.print(f"{checkpoint}: {total:,} parameters of {rules.parameters:,}", markup=False)
    return [f"{total:,} parameters, more than {rules.parameters:,}"] if total > rules.parameters else []
