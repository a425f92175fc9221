"""Repositories of the hub that `ttmray push` has made, as things to load."""

import json
from dataclasses import dataclass
from typing import Any

from ttmray import hub
from ttmray.errors import UserError
from ttmray.storage import Folder

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
    """What a repository of the hub is, by the file that `ttmray push` has left there.

    Args:
        uri: `hf://org/name`, with or without `@revision`.

    Raises:
        UserError: there is no such repository, it was made by others, or it holds a corpus.
    """
    uri = uri.rstrip("/")
    if hub.parsed(uri).path_in_repo:
        raise UserError(f"{uri} is a file.", "Name its repository, hf://org/name; a file may be a checkpoint.")
    folder = Folder.at(uri)
    if not folder.exists(hub.ABOUT):
        raise UserError(
            f"{uri} was not made by ttmray push: it has no {hub.ABOUT}.",
            f"Load a bundle, and give checkpoint={uri}/FILE to what it generates.",
        )
    try:
        about: dict[str, Any] = json.loads(hub.local_copy(folder.path(hub.ABOUT)).read_bytes())
        kind, bundle = str(about["kind"]), about.get("bundle")
        if about["format"] != FORMAT or kind not in KINDS:
            raise ValueError(f"format {about['format']}, kind {kind}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder.path(hub.ABOUT)} cannot be used: {error}", "Push it again, or update ttmray."
        ) from error
    if kind == "corpus":
        raise UserError(f"{uri} is a corpus.", f"ttmray.open_corpus({uri!r})")
    if kind == "bundle":
        return PushedRepo(kind, uri, None)
    if not bundle:
        raise UserError(f"{uri} does not say for which bundle it is.", f"Load one, and give checkpoint={uri}.")
    if kind == "ranker":
        return PushedRepo(kind, f"{bundle}+{uri}", None)
    return PushedRepo(kind, str(bundle), uri)
