"""Folders of audio as systems that answer prompts: which file belongs to which prompt.

In a generation run the manifest says it. In any other folder the name does, at any depth, without its ending:

- `<id>` is the prompt's clip (sample 0),
- `<id>_<k>` and `<id>_s<k>`, where k is a whole number, are sample k of several.

A name that is an id of the prompts is that prompt's, whatever it ends in. Ids that are whole numbers match with leading
zeros, so `07.flac` is prompt 7. A name that no table can hold (`storage.name_problem`) is a clip without a
file, with its reason.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ttmray.audio.io import AUDIO_EXTENSIONS
from ttmray.errors import UserError
from ttmray.generation import manifest
from ttmray.generation.prompts import Prompt
from ttmray.storage import BAD_NAME, Folder, name_problem, shown_name

SYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAMED = re.compile(rf"({SYSTEM_NAME.pattern})=(.+)")
_SAMPLE = re.compile(r"(.+)_s?([0-9]{1,18})")
_SHOWN = 5


@dataclass(frozen=True)
class SystemClip:
    """One clip that a system owes: sample `sample` of a prompt.

    `path` is the address of its file; None where there is none, and then `reason` and `message` say why.
    """

    system: str
    prompt_id: str
    sample: int
    prompt: str
    path: str | None
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class SystemFolder:
    """Clips of a folder in the order of the prompts, then of the samples; `warnings` are sentences for people."""

    name: str
    folder: str
    clips: tuple[SystemClip, ...]
    warnings: tuple[str, ...]


def find_systems(folders: Sequence[str], prompts: Sequence[Prompt], others: str = "are left out") -> list[SystemFolder]:
    """The systems of some folders, local or s3://; `NAME=FOLDER` gives one a name, else the end of its path does.

    Prompts without a file become clips without a path, because a system that fails on some prompts must not look better
    for it. Files of no prompt are named in a warning.

    Args:
        others: what becomes of these, for the warning.

    Raises:
        UserError: a folder without audio, without any file of the prompts, with two files for one clip, or twice;
            a manifest of other prompts.
    """
    pairs = [match.groups() if (match := _NAMED.fullmatch(folder)) else ("", folder) for folder in folders]
    uris = [Folder.at(path).uri for _, path in pairs]
    own_names = [name for name, _ in pairs]
    names = [name or end for name, end in zip(own_names, _ends(uris), strict=True)]
    for items, what in ((uris, "folder"), (names, "name")):
        twice = sorted({item for item in items if items.count(item) > 1})
        if twice:
            raise UserError(f"two systems have the {what} {twice[0]}.", "Name them: NAME=FOLDER.")
    return [_system(name, Folder(uri), prompts, others) for name, uri in zip(names, uris, strict=True)]


def audio_files(folder: Folder) -> list[str]:
    """Names of all audio files at any depth, sorted.

    Raises:
        UserError: there are none.
    """
    names = [entry.name for entry in folder.files(sizes=False)]
    audio = [name for name in names if os.path.splitext(name)[1].lower() in AUDIO_EXTENSIONS]
    if not audio:
        known = ", ".join(sorted(AUDIO_EXTENSIONS))
        raise UserError(f"{folder}: no audio files.", f"Check the path; these endings count: {known}.")
    return audio


def match_names(stems: Sequence[str], ids: Sequence[str]) -> list[tuple[str, int] | None]:
    """(prompt id, sample) of every file name without ending, by the rule above; None for names of no prompt.

    Raises:
        UserError: two ids that only leading zeros tell apart.
    """
    by_key: dict[str, str] = {}
    for one in ids:
        other = by_key.setdefault(_key(one), one)
        if other != one:
            raise UserError(f"the prompt ids {other} and {one} are the same number.", "Give prompts distinct ids.")
    matches: list[tuple[str, int] | None] = []
    for stem in stems:
        match = _SAMPLE.fullmatch(stem)
        if _key(stem) in by_key:
            matches.append((by_key[_key(stem)], 0))
        elif match and _key(match[1]) in by_key:
            matches.append((by_key[_key(match[1])], int(match[2])))
        else:
            matches.append(None)
    return matches


def _key(name: str) -> str:
    return str(int(name)) if name.isascii() and name.isdecimal() else name


def _ends(uris: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [uri.split("/") for uri in uris]
    longest = max(map(len, parts), default=1)
    depth = next((n for n in range(1, longest) if len({tuple(p[-n:]) for p in parts}) == len(set(uris))), longest)
    return ["/".join(part for part in p[-depth:] if part) for p in parts]


def _system(name: str, folder: Folder, prompts: Sequence[Prompt], others: str) -> SystemFolder:
    texts = {prompt.id: prompt.text for prompt in prompts}
    made_by_us = folder.exists("run.json") and folder.files(manifest.ROWS, sizes=False)
    by_sample, extra = _by_manifest(name, folder, texts) if made_by_us else _by_name(name, folder, texts)
    if not by_sample:
        raise UserError(
            f"{folder}: no file belongs to a prompt; files are named {_some(extra)}, prompts {_some(list(texts))}.",
            "Name files `<prompt id>.wav`, or `<prompt id>_<k>.wav` for several samples.",
        )
    have = {clip.prompt_id for clip in by_sample.values()}
    missing = [one for one in texts if one not in have]
    for one in missing:
        by_sample[one, 0] = SystemClip(
            name, one, 0, texts[one], None, "missing", "the folder has no file for this prompt"
        )
    warnings = []
    if missing:
        warnings.append(f"{name}: {len(missing)} of {len(texts)} prompts have no clip: {_some(missing)}.")
    if extra:
        warnings.append(f"{name}: {len(extra)} files belong to no prompt and {others}: {_some(extra)}.")
    place = {one: i for i, one in enumerate(texts)}
    clips = sorted(by_sample.values(), key=lambda clip: (place[clip.prompt_id], clip.sample))
    return SystemFolder(name, folder.uri, tuple(clips), tuple(warnings))


def _by_name(
    system: str, folder: Folder, texts: Mapping[str, str]
) -> tuple[dict[tuple[str, int], SystemClip], list[str]]:
    names = audio_files(folder)
    stems = [os.path.splitext(name.rpartition("/")[2])[0] for name in names]
    clips: dict[tuple[str, int], SystemClip] = {}
    extra = []
    matched = zip(names, match_names(stems, list(texts)), strict=True)
    for problem, file, match in sorted(
        ((name_problem(file), file, match) for file, match in matched), key=lambda one: one[:2]
    ):
        if match is None or (problem and match in clips):
            extra.append(file)
            continue
        path, why = (None, (BAD_NAME, problem)) if problem else (folder.path(file), ("", ""))
        clip = SystemClip(system, *match, texts[match[0]], path, *why)
        other = clips.setdefault(match, clip)
        if other is not clip and not problem:
            raise UserError(
                f"{other.path} and {clip.path} are both sample {clip.sample} of prompt {clip.prompt_id}.",
                "Keep one of them, or number them `<id>_0`, `<id>_1`, ...",
            )
    return clips, extra


def _by_manifest(
    system: str, folder: Folder, texts: Mapping[str, str]
) -> tuple[dict[tuple[str, int], SystemClip], list[str]]:
    clips: dict[tuple[str, int], SystemClip] = {}
    extra = []
    for row in manifest.read_rows(folder).values():
        one, sample = row["prompt_id"], row["candidate"]
        if one not in texts:
            extra.append(row["name"])
            continue
        if row["prompt"] != texts[one]:
            raise UserError(
                f"{folder}: the clip {row['name']} was made for {row['prompt']!r}, prompt {one} is {texts[one]!r}.",
                "Give the prompts that it was generated with.",
            )
        generated = row["status"] == manifest.OK
        why = ("", "") if generated else ("not_generated", f"{row['reason']}: {row['message']}")
        clips[one, sample] = SystemClip(
            system, one, sample, texts[one], folder.path(row["file"]) if generated else None, *why
        )
    return clips, extra


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shown_name, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
