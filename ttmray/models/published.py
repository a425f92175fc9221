"""Repositories of the hub that `ttmray push` has made, as things to load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttmray import hub
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.models.folder_bundle import DESCRIPTION

FORMAT = 1
KINDS = ("model", "ranker", "bundle", "corpus")


@dataclass(frozen=True)
class PushedRepo:
    """What a repository holds.

    Attributes:
        kind: of `KINDS`.
        bundle: set of models that its use needs; the repository's own address where it is a bundle.
        checkpoint: address of the weights of a backbone; None where there are none.
    """

    kind: str
    bundle: str
    checkpoint: str | None


def published(uri: str) -> PushedRepo:
    """What a repository of the hub is, by the file that `ttmray push` has left there, or as a bundle by its own.

    What was fetched before is known offline, too.

    Args:
        uri: `hf://org/name`, with or without `@revision`.

    Raises:
        UserError: there is no such repository, it was made by others, or it holds a corpus.
    """
    uri = uri.rstrip("/")
    if hub.parsed(uri).path_in_repo:
        raise UserError(f"{uri} is a file.", "Name its repository, hf://org/name; a file may be a checkpoint.")
    try:
        text = hub.local_copy(f"{uri}/{hub.ABOUT}").read_bytes()
    except hub.NotOnHub as missing:
        if _has(uri, DESCRIPTION):
            return PushedRepo("bundle", uri, None)
        raise UserError(
            f"{uri} was not made by ttmray push: it is not there, or has no {hub.ABOUT}.",
            f"Check its name; of others' weights, load a bundle and give it checkpoint={uri}/FILE.",
        ) from missing
    try:
        about: dict[str, Any] = read_json(text)
        kind, bundle = str(about["kind"]), about.get("bundle")
        if about["format"] != FORMAT or kind not in KINDS:
            raise ValueError(f"format {about['format']}, kind {kind}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{uri}/{hub.ABOUT} cannot be used: {error}", "Push it again, or update ttmray.") from error
    if kind == "corpus":
        raise UserError(f"{uri} is a corpus.", f"ttmray.open_corpus({uri!r})")
    if kind == "bundle":
        return PushedRepo(kind, uri, None)
    if not bundle:
        raise UserError(f"{uri} does not say for which bundle it is.", f"Load one, and give checkpoint={uri}.")
    if kind == "ranker":
        return PushedRepo(kind, f"{bundle}+{uri}", None)
    return PushedRepo(kind, str(bundle), uri)


def _has(uri: str, name: str) -> bool:
    try:
        hub.local_copy(f"{uri}/{name}")
    except hub.NotOnHub:
        return False
    return True


def bundle_folder(uri: str) -> Path:
    """A bundle of the hub, all of its roles, on this machine.

    Raises:
        UserError: there is no such repository, it cannot be reached and was never fetched, or it holds something else,
            with the way to use that.
    """
    if hub.parsed(uri).path_in_repo:
        raise UserError(f"{uri} is a file of a repository, no bundle.", "Name the repository: hf://org/name.")
    try:
        hub.local_copy(f"{uri.rstrip('/')}/{DESCRIPTION}")  # before the rest, which may be gigabytes of something else
    except hub.NotOnHub as missing:
        there = published(uri)
        way = there.bundle if there.checkpoint is None else f"{there.bundle} --set checkpoint={there.checkpoint}"
        raise UserError(f"{uri} is a {there.kind}, no bundle.", f"--bundle {way}") from missing
    return hub.snapshot(uri)
