"""Score columns of a run: those of its index, and those of tables that another reward head made later.

`ttmray corpus rescore` writes a table into `scores/<name>/`. Its columns are called `<name>/<column>` wherever a column
of the index may stand: `ranker/instrumental_reward_score`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ttmray.corpus import index
from ttmray.corpus.unit import OK
from ttmray.errors import UserError
from ttmray.inventory import finished
from ttmray.runs import KINDS_OF_CORPUS, RUN, kind_of, read
from ttmray.storage import Folder, parquet_table

SCORES, TABLE = "scores", "scores.parquet"
REWARDS = ("reward_score", "instrumental_reward_score", "track_reward_score")
OWN = [field.name for field in index.SCHEMA if pa.types.is_floating(field.type)]
"""Numbers of the index."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # whose embeddings were scored; shard names carry a hash
        *((name, pa.float64()) for name in REWARDS),
    ]
)
"""Of a table: a row per ok clip, in the order of the index."""
COLUMN = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63}/)?[a-z][a-z0-9_]*$"
"""Of a score column in configs."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """`name` if it can name a table.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a table of scores.", "Use letters, digits, '.', '_' and '-'.")
    return name


def table_names(run: Folder) -> list[str]:
    """The finished tables of a run, sorted."""
    return [name for name in begun_tables(run) if finished(run.sub(f"{SCORES}/{name}"))]


def begun_tables(run: Folder) -> list[str]:
    """The tables of a run, finished or not, sorted."""
    return sorted({entry.name.partition("/")[0] for entry in run.files(SCORES, sizes=False)})


def numbers(rows: pa.Table) -> list[str]:
    """Names of the columns that may be scores."""
    return [field.name for field in rows.schema if pa.types.is_floating(field.type)]


def columns(run: Folder) -> list[str]:
    """Every score column of a run: numbers of the index, then those of its tables."""
    return numbers(index.read_index(run)) + [f"{name}/{column}" for name in table_names(run) for column in REWARDS]


def with_columns(run: Folder, rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of the index with some score columns beside their own; null where a row is not ok.

    Args:
        rows: with the columns key, status and shard.
        names: score columns; those that `rows` has are left as they are.

    Raises:
        UserError: a column that the run does not have, or a table that was made of other embeddings.
    """
    tables: dict[str, pa.Table] = {}
    for name in dict.fromkeys(names):
        if name in rows.column_names:
            if name not in numbers(rows):
                require_column(run, name)
        else:
            require_column(run, name)
            table, _, column = name.rpartition("/")
            if table not in tables:
                tables[table] = _looked_up(run, rows, table) if table else _of_index(run, rows)
            rows = rows.append_column(name, tables[table][column])
    return rows


def require_column(run: Folder, name: str) -> None:
    """See that a run has a score column.

    Raises:
        UserError: it has none of that name; lists those that it has.
    """
    table, _, column = name.rpartition("/")
    if (not table and name in OWN) or (table and column in REWARDS and finished(run.sub(f"{SCORES}/{table}"))):
        return
    known = columns(run)  # reads the index: stages from outside and pools add columns to it
    if name in known:
        return
    raise UserError(
        f"{run} has no score column {name!r}. It has: {', '.join(known)}.",
        "Take one of them, or make a table: ttmray corpus rescore RUN --head HEAD --name NAME",
    )


def protocols(run: Folder) -> dict[str, str]:
    """Who made the rewards of a run: "" -> the protocol of its own, name of a finished table -> that of the table, with
    the hash of its head."""
    ids = {"": _protocol_id(run, read(run, kind_of(run, KINDS_OF_CORPUS)))}
    for name in table_names(run):
        table = run.sub(f"{SCORES}/{name}")
        described = read(table, "scores")
        ids[name] = f"{_protocol_id(table, described)}, head SHA-256 {described.get('head')}"
    return ids


def _protocol_id(run: Folder, described: Mapping[str, Any]) -> str:
    name = described.get("protocol_id")
    if not isinstance(name, str):
        raise UserError(f"{run.path(RUN)} does not say how its scores were made.", "Restore it.")
    return name


def protocol_of(run: Folder, name: str) -> str:
    """Id of the protocol that made a score column: that of the run, or of its table; empty for numbers that no reward
    head made."""
    table, _, column = name.rpartition("/")
    if column not in REWARDS:
        return ""
    where = run.sub(f"{SCORES}/{table}") if table else run
    return _protocol_id(where, read(where, "scores" if table else kind_of(run, KINDS_OF_CORPUS)))


def read_table(run: Folder, name: str) -> pa.Table:
    """A finished table of scores.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = f"{SCORES}/{name}/{TABLE}"
    try:
        return parquet_table(run.read(file)).select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{run.path(file)} is damaged: {error}", again(run, name)) from error


def again(run: Folder, name: str) -> str:
    """How to make a table again."""
    own = f"ttmray corpus rescore --name {name}"
    return f"`ttmray corpus repair {run.typed}` makes it again, as does its own command: {own}"


def reward_statistics(rows: pa.Table, names: Sequence[str] = REWARDS) -> dict[str, Any]:
    """Per split: mean, sample std, p5, p95 and max of score columns over the ok clips; columns that no clip has, as in
    a corpus of latents of others, are left out."""
    statistics: dict[str, Any] = {}
    ok = rows.filter(pc.equal(rows["status"], OK))
    for split in sorted(set(ok["split"].to_pylist())):
        part = ok.filter(pc.equal(ok["split"], split))
        statistics[split] = {"clips": part.num_rows} | {
            name: {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                "p5": float(np.percentile(values, 5)),
                "p95": float(np.percentile(values, 95)),
                "max": float(values.max()),
            }
            for name in names
            if part[name].null_count < part.num_rows
            for values in [part[name].to_numpy()]
        }
    return statistics


def _of_index(run: Folder, rows: pa.Table) -> pa.Table:
    """All columns of the index for some of its rows, in their order."""
    table = index.read_index(run)
    return table.take(pc.index_in(rows["key"].combine_chunks(), table["key"].combine_chunks()))


def _looked_up(run: Folder, rows: pa.Table, name: str) -> pa.Table:
    """The rewards of a table for rows of the index, in their order; null where they are not ok."""
    table = read_table(run, name)
    place = pc.index_in(rows["key"].combine_chunks(), table["key"].combine_chunks())
    ok = pc.equal(rows["status"], OK).combine_chunks()
    missing = rows.filter(pc.and_(ok, pc.is_null(place)))
    if missing.num_rows:
        raise UserError(
            f"{run}: {missing.num_rows} clips have no score in the table {name}, e.g. {missing['key'][0]}.",
            again(run, name),
        )
    of = table.take(place)
    same = pc.equal(of["shard"], rows["shard"])
    other = rows.filter(pc.and_(ok, pc.invert(pc.fill_null(same, True))))
    if other.num_rows:
        raise UserError(
            f"{run}: {other.num_rows} clips were made again after the table {name}, e.g. {other['key'][0]}.",
            again(run, name),
        )
    null = pa.scalar(None, pa.float64())
    return pa.table({column: pc.if_else(ok, of[column].combine_chunks(), null) for column in REWARDS})
