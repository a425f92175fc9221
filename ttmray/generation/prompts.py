"""Prompts: from files that users have, or from the command line. Everything wrong is found before any model runs.

Files by their ending: tables (`ttmray.tables`; JSON may hold texts in place of objects), and everything else one prompt
per line. The text is the column `prompt`, `caption` or `text`, the id `id` or `prompt_id`.
Ids name files and key the noise. A prompt without one has the first 16 hex digits of its SHA-256, as captions of the
corpus have.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ttmray.errors import UserError
from ttmray.storage import read_file
from ttmray.tables import is_delimited, is_table, parse_table

MAX_CHARACTERS = 2000
"""Encoders read the first 77 tokens, about 350 characters; a text that is far longer is no prompt."""
TEXT_COLUMNS = ("prompt", "caption", "text")
ID_COLUMNS = ("id", "prompt_id")
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Prompt:
    """`id` is a safe file name, `text` has single spaces."""

    id: str
    text: str


class Row(NamedTuple):
    """A prompt as it was found, unchecked; `id` is None where there is none."""

    where: str
    id: Any
    text: Any


def read_prompts(source: str) -> list[Prompt]:
    """Prompts of a file, in order.

    Raises:
        UserError: the file cannot be read or holds no prompts; an empty or too long prompt; an id that is no safe file
            name or is used twice (which for prompts without ids means the same text twice).
    """
    data = read_file(source)
    if is_table(source):
        table = parse_table(source, data, (*TEXT_COLUMNS, *ID_COLUMNS), short=True, bare=TEXT_COLUMNS[0])
        word = "line" if is_delimited(source) else "item"
        places = table.places if is_delimited(source) else range(1, len(table) + 1)
        rows = (_row(f"{source}, {word} {place}", row) for place, row in zip(places, table.rows(), strict=True))
        return _checked(rows, source)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8 ({error.reason} at byte {error.start}).", "Save it as UTF-8."
        ) from error
    rows = (Row(f"{source}, line {i}", None, line) for i, line in enumerate(text.splitlines(), 1) if line.strip())
    return _checked(rows, source)


def given_prompts(texts: Sequence[str], source: str = "the command line") -> list[Prompt]:
    """Prompts of the command line, or of another source, which messages name.

    Raises:
        UserError: as `read_prompts`.
    """
    return _checked((Row(f"prompt {i}", None, text) for i, text in enumerate(texts, 1)), source)


def checked_prompts(pairs: Sequence[tuple[str, str]], source: str) -> list[Prompt]:
    """Prompts of (id, text) pairs of a source, which messages name.

    Raises:
        UserError: as `read_prompts`.
    """
    return _checked((Row(f"{source}, {one}", one, text) for one, text in pairs), source)


def plain(text: str, prefix: str = "") -> str:
    """What two texts have in common that are the same prompt: without a prefix that one has and the other has not,
    whatever their case, their spaces and the form of their accents."""
    words = [" ".join(unicodedata.normalize("NFKC", part).split()).casefold() for part in (text, prefix)]
    return words[0].removeprefix(words[1]).strip()


def held_out(prompts: Sequence[Prompt], kept_away: Sequence[Prompt], prefix: str = "") -> list[Prompt]:
    """Those of some prompts that must not be used, because their id or their text is among others'.

    Args:
        kept_away: prompts of an evaluation.
        prefix: what either may have before the prompt itself.
    """
    ids, texts = {prompt.id for prompt in kept_away}, {plain(prompt.text, prefix) for prompt in kept_away}
    return [prompt for prompt in prompts if prompt.id in ids or plain(prompt.text, prefix) in texts]


def _row(where: str, cells: Mapping[str, Any]) -> Row:
    text_column = next((name for name in TEXT_COLUMNS if name in cells), None)
    id_column = next((name for name in ID_COLUMNS if name in cells), None)
    if text_column is None:
        raise UserError(
            f"{where} has no prompt; it has {', '.join(cells) or 'nothing'}.", f"Name it {' or '.join(TEXT_COLUMNS)}."
        )
    return Row(where, None if id_column is None else cells[id_column], cells[text_column])


def _checked(rows: Iterable[Row], source: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for where, identifier, text in rows:
        prompt = _prompt(where, identifier, text)
        other = places.setdefault(prompt.id.casefold(), where)  # some file systems take a and A for one name
        if other is not where:
            same = f"the id {prompt.id} of" if identifier is not None else "the same prompt as"
            raise UserError(f"{where} has {same} {other}.", "Give every prompt an id of its own.")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source} holds no prompts.", "Write one per line, or rows with id and prompt.")
    return prompts


def _prompt(where: str, identifier: Any, text: Any) -> Prompt:
    if not isinstance(text, str):
        raise UserError(f"{where}: the prompt is a {type(text).__name__}, not text.", "Write text there.")
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: the prompt has {len(text):,} characters, {MAX_CHARACTERS:,} are allowed.",
            "Shorten it: the text encoders read the first 77 tokens, about 350 characters.",
        )
    text = " ".join(text.split())
    if not text:
        raise UserError(f"{where}: the prompt is empty.", "Describe the music, or remove the row.")
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the prompt is not valid Unicode.", "Write the file as UTF-8.") from error
    if identifier is None:
        return Prompt(digest, text)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(f"{where}: the id {identifier!r} is a {type(identifier).__name__}, not text.")
    name = str(identifier).strip()
    if not _ID.fullmatch(name):
        raise UserError(
            f"{where}: {name!r} cannot be an id, because files are named after it.",
            "Use 1 to 100 letters, digits, '_', '-' and '.', not starting with '.'.",
        )
    return Prompt(name, text)
