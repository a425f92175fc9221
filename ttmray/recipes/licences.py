"""Under which licence something may be pushed: that of its parts, or a stricter one.

What was made with models that are not for commercial use is not for commercial use either: the strict reading. A file
that is itself a part, alone or in a bundle's folder, keeps what its own licence asks for.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ttmray.errors import UserError
from ttmray.models.bundle import MICRO, base_name
from ttmray.models.folder_bundle import DESCRIPTION
from ttmray.models.weights import Entry, digest_file, open_store
from ttmray.runs import RUN
from ttmray.storage import Folder, local_file, split_path

CARD = "README.md"
WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
OWN = "Apache-2.0"
"""Of the bundle that ships with the package."""
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
_FREEST, _FREE, _NAMED, _STRICT, _CLOSED = range(5)
_RANKS = {
    **dict.fromkeys(("cc0-1.0", "unlicense", "0bsd", "wtfpl", "pddl"), _FREEST),
    **dict.fromkeys(("mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "zlib"), _FREE),
    **dict.fromkeys(("other", "unknown"), _CLOSED),
}


@dataclass(frozen=True)
class Parts:
    """What something was made with or of.

    Attributes:
        restricted: registry entry -> licence, of all parts that are not for commercial use.
        contained: part -> licence, of those whose very files are pushed.
    """

    restricted: Mapping[str, str]
    contained: Mapping[str, str]


def bundles_of(path: str, bundle: str | None) -> list[str]:
    """Names of the bundles whose models made what is pushed; the first is needed to use it.

    Args:
        bundle: what the user says of it. A run says it, too: both count.
    """
    told = [] if bundle is None else [base_name(bundle)]
    if path.endswith(WEIGHT_ENDINGS) or not (folder := Folder.at(path)).exists(RUN):
        return told
    config = folder.read_json(RUN).get("config", {})
    if "bundle" in config:
        return list(dict.fromkeys([base_name(str(config["bundle"])), *told]))
    configs = [place.read_json(RUN, "config")["config"] for place in _corpora(config)]
    return list(dict.fromkeys([*(base_name(str(one["bundle"])) for one in configs if "bundle" in one), *told]))


def parts_of(path: str, bundles: Sequence[str]) -> Parts:
    """Parts by the bundles, and by the SHA-256 of every file that took part: heads, weights that a training started
    from, heads of tables of scores, the files of a bundle's folder."""
    store = open_store()
    records = store.records()
    took_part, inside = _hashes(path)
    alone = split_path(path)[1] if path.endswith(WEIGHT_ENDINGS) else ""
    restricted, contained = {}, {}
    for entry in store.registry.entries:
        known = {file.sha256 or records.get(f"{entry.name}/{file.name}", {}).get("sha256") for file in entry.files}
        same = bool(known & inside) or _is_called(entry, alone)
        if same:
            contained[entry.name] = entry.licence
        if entry.non_commercial and (same or known & took_part or set(entry.bundles) & set(bundles)):
            restricted[entry.name] = entry.licence
    if {facts.sha256 for facts in MICRO.description.files.values()} & inside:
        contained["micro"] = OWN
    return Parts(restricted, contained)


def _is_called(entry: Entry, name: str) -> bool:
    """Whether a file has the name of a released backbone, whose hash may not be known here."""
    return name in [file.name for file in entry.files if file.name.endswith(".pth")]


def _corpora(config: Mapping[str, Any]) -> list[Folder]:
    """The corpora of a training that are there."""
    places = [Folder.at(source["corpus"]) for source in config.get("data", {}).get("sources", [])]
    return [place for place in places if place.exists(RUN)]


def _hashes(path: str) -> tuple[set[str], set[str]]:
    """SHA-256 of what took part in making it, and of the files that it holds itself."""
    if path.endswith(WEIGHT_ENDINGS):
        digest = {digest_file(local_file(path)).sha256}
        return digest, digest
    folder = Folder.at(path)
    inside = _named_in(folder, [DESCRIPTION])
    runs = [folder, *(_corpora(folder.read_json(RUN).get("config", {})) if folder.exists(RUN) else [])]
    took_part = set(inside)
    for run in runs:
        tables = [f"scores/{file.name}" for file in run.files("scores", sizes=False) if file.name.endswith(f"/{RUN}")]
        took_part |= _named_in(run, [RUN, *tables])
    return took_part, inside


def _named_in(folder: Folder, names: Collection[str]) -> set[str]:
    return {digest for name in names if folder.exists(name) for digest in _SHA256.findall(folder.read(name).decode())}


def licence_for(path: str, asked: str | None, parts: Parts) -> str:
    """The licence of the repository.

    Args:
        asked: what the user says; None: that of the card that lies in a bundle's folder, else the strictest that the
            parts ask for, else `other`.

    Raises:
        UserError: it is no identifier, is freer than a part, or not that of the card that is pushed.
    """
    if asked is not None and not IDENTIFIER.fullmatch(asked.lower()):
        raise UserError(f"--license {asked!r} is no identifier.", "Such as mit, apache-2.0, cc-by-nc-4.0 or other.")
    own = _of_card(path)
    if own and asked is not None and asked.lower() != own:
        raise UserError(f"{path}/{CARD} says the licence {own}, --license {asked}.", f"Edit {CARD}, which is pushed.")
    chosen = own or (asked.lower() if asked is not None else _strictest(parts))
    if parts.restricted and _rank(chosen) < _STRICT:
        raise UserError(
            f"{chosen} would call free what is not: it has parts of {', '.join(parts.restricted)}, which are not for "
            "commercial use.",
            "Say --license cc-by-nc-4.0, or other with its text in the card.",
        )
    if freer := [f"{name} ({licence})" for name, licence in parts.contained.items() if _rank(chosen) < _rank(licence)]:
        raise UserError(
            f"{chosen} is freer than the licence of what is pushed: {', '.join(freer)}.",
            "Give it the licence of that part, or other with its text in the card.",
        )
    return chosen


def _strictest(parts: Parts) -> str:
    if parts.restricted:
        return "cc-by-nc-4.0"
    return max(parts.contained.values(), key=_rank).lower() if parts.contained else "other"


def _rank(licence: str) -> int:
    """How much a licence asks for, of groups: nothing, its text, its text and more, no commerce, all else."""
    low = licence.lower()
    if low in _RANKS:
        return _RANKS[low]
    return _STRICT if "nc" in low.split("-") else _NAMED


def _of_card(path: str) -> str:
    """The licence in the card of a bundle's folder; empty: there is none."""
    if path.endswith(WEIGHT_ENDINGS) or not (folder := Folder.at(path)).exists(DESCRIPTION) or not folder.exists(CARD):
        return ""
    head = re.match(r"---\n(.*?)\n---\n", folder.read(CARD).decode(errors="replace"), re.DOTALL)
    try:
        fields = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        raise UserError(f"{folder.path(CARD)}: its head is no YAML: {error}", "Mend it.") from error
    return str(fields.get("license", "")).lower() if isinstance(fields, dict) else ""
