"""Votes of people who listen, as they are cast: one file each, and all of them in a table that `train-ranker` reads."""

import csv
import io
import json
import threading
from collections.abc import Mapping
from typing import Any

from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder

TABLE, VOTES = "votes.csv", "votes"
COLUMNS = ("id", "a", "b", "label", "prompt", "system_a", "system_b", "score_a", "score_b", "guidance", "seed", "cast")


class VotesTable:
    """Votes in a folder. A vote is its own file, which is complete or absent and never replaced; `votes.csv` follows
    from all of them, so whatever is killed, and wherever the folder lies, no vote is lost or half-written.

    Args:
        folder: local or s3://. Clips are named relative to it.

    Raises:
        UserError: a vote that cannot be read.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._rows = {entry.name: self._read(entry.name) for entry in folder.files(VOTES, sizes=False)}
        if self._rows:
            self._merge()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Mapping[str, Any]) -> int:
        """Keep a vote; returns how many there are.

        Args:
            row: a value for each of `COLUMNS`; `label` is a, b or tie.

        Raises:
            UserError: there is one of that id already, or it cannot be written.
        """
        name = f"{row['id']}.json"
        with self._lock:
            if not self.folder.create(f"{VOTES}/{name}", json.dumps(dict(row), ensure_ascii=False, indent=1).encode()):
                raise UserError("This pair has a vote already.", "Make another one.")
            self._rows[name] = dict(row)
            self._merge()
            return len(self._rows)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            row = read_json(self.folder.read(f"{VOTES}/{name}"))
            if row.keys() == set(COLUMNS):
                return dict(row)
        except (ValueError, AttributeError):  # no JSON, or no object
            pass
        raise UserError(f"{self.folder.path(f'{VOTES}/{name}')} is no vote.", "Delete it, or restore it.")

    def _merge(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(self._rows.values(), key=lambda row: (row["cast"], row["id"])))
        self.folder.write(TABLE, text.getvalue().encode())
