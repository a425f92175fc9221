"""Damaged input by the ten thousand: whatever a file holds, a reader takes it or refuses it with one message.

    python tests/fuzz.py --count 100000 --seed 7 [--kinds audio,csv] [--only 4711] [--guided]

Valid inputs (`fuzz_kinds.py`) are damaged at random (bits, integers, chunks, cuts, splices, words that parsers trip
over) and given to the readers of their kind, in a process of its own. A fault is any error but those that are written
for people, a process that dies, an input that takes more than 20 s or 1 GiB, and a file outside of the input's folder.
Prints a table by kind; seed and number of an input make it again (`--only`). With `--guided`, atheris (`pip install
atheris`) chooses the damage to inputs of one kind by the Python code that it reaches.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from fuzz_kinds import KINDS, Kind

from ttmray.errors import ClipError, UserError

SECONDS, MEMORY = 20.0, 1 << 30
STUCK = 3 * SECONDS
"""Until a process that no signal wakes is killed."""
EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 64) - 1,
)
WORDS = (
    b'"', b"'", b"\\", b"\0", b"\r", b"\n\n", b"\t", b";", b",,", b"|", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
    b"\xe2\x80\xae", b"[", b"]", b"[/x]", b"{", b"}", b"&a [*a]", b"<<: *a", b"!!python/object:os.system", b"%", b": ",
    b"- ", b"#", b"null", b"nan", b"-inf", b"1e999", b"-1", b"99999999999999999999", b"0x10", b"1_0", b"true",
    b"../../up", b"/etc/passwd", b"C:\\x\\y.wav", b"s3://", b"a" * 300, b"[" * 1500, b"{\"a\":" * 700,
    b"\xf0\x9f\x8e\xb5",
)  # fmt: skip


class TooSlow(BaseException):
    """What the alarm raises; no reader may take it for a damaged file."""


@dataclass
class Tally:
    """Of one kind: inputs, how many were taken and refused, and the faults."""

    inputs: int = 0
    taken: int = 0
    faults: list[str] = field(default_factory=list)


def damaged(rng: random.Random, kind: Kind) -> bytes:
    """One of the kind's valid inputs after one to five damages."""
    data = bytearray(rng.choice(kind.valid))
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        _damage(rng, data, kind)
    return bytes(data)


def _damage(rng: random.Random, data: bytearray, kind: Kind) -> None:
    # most of what a reader decides on stands in the first bytes
    end = len(data) if rng.random() < 0.4 else min(len(data), rng.choice((16, 64, 256, 1024)))
    at = rng.randrange(end) if end else 0
    size = rng.choice((1, 2, 4, 8, 16, 100, 1000))
    match rng.choice(kind.damages):
        case "bit" if data:
            data[at] ^= 1 << rng.randrange(8)
        case "byte" if data:
            data[at] = rng.randrange(256)
        case "integer":
            width, order = rng.choice((1, 2, 3, 4, 8)), rng.choice(("little", "big"))
            data[at : at + width] = (rng.choice(EXTREMES) & ((1 << 8 * width) - 1)).to_bytes(width, order)
        case "cut":
            del data[at:]
        case "delete":
            del data[at : at + size]
        case "repeat":
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 30))
        case "noise":
            data[at:at] = rng.randbytes(size)
        case "zeros":
            data[at : at + size] = bytes(len(data[at : at + size]))
        case "splice":
            other = rng.choice(kind.valid)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        case "word":
            data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(WORDS)


def attempt(kind: Kind, data: bytes, box: Path) -> str:
    """`taken`, `refused`, or what went wrong."""
    inner = box / "in" / "side"
    inner.mkdir(parents=True, exist_ok=True)
    peak = _peak()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(data, inner)
        result = "taken"
    except (UserError, ClipError):
        result = "refused"
    except TooSlow:
        result = f"takes longer than {SECONDS:g} s"
    except Exception:
        result = traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    beside = sorted({path.name for path in box.iterdir()} | {f"in/{path.name}" for path in (box / "in").iterdir()})
    if beside != ["in", "in/side"]:
        result = f"writes beside its folder: {beside}"
    if _peak() - peak > MEMORY:
        result = f"holds {(_peak() - peak) / 1e9:.1f} GB"
    for path in box.iterdir():  # also what strayed, so that the next inputs are not told to have written it
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return result


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def made(seed: int, number: int, kinds: list[str]) -> tuple[str, bytes]:
    """The kind and bytes of an input: the same for the same numbers."""
    rng = random.Random(f"{seed}/{number}")
    name = kinds[number % len(kinds)]
    return name, damaged(rng, KINDS[name]())


def _work(seed: int, numbers: range, kinds: list[str], results: Any) -> None:
    """In a process of its own: what it prints goes nowhere."""

    def alarm(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, alarm)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            name, data = made(seed, number, kinds)
            results.put((number, name, attempt(KINDS[name](), data, Path(folder))))


def run(count: int, seed: int, kinds: list[str], say: Callable[[str], None]) -> dict[str, Tally]:
    """All inputs, one process after the other wherever one dies."""
    tallies = {name: Tally() for name in kinds}
    for name in kinds:
        KINDS[name]()  # valid inputs are made once, before the processes part
    context = multiprocessing.get_context("fork")
    start = 0
    while start < count:
        results = context.Queue()
        process = context.Process(target=_work, args=(seed, range(start, count), kinds, results))
        process.start()
        last, waited = start - 1, 0.0
        while True:
            try:
                number, name, result = results.get(timeout=1.0)
            except Empty:
                waited += 1.0
                if not process.is_alive() and results.empty():
                    break
                if waited > STUCK:
                    process.kill()
                continue
            last, waited = number, 0.0
            _count(tallies[name], result, seed, number, say)
            if (number + 1) % 2000 == 0:
                say(f"{number + 1} of {count}, {sum(len(tally.faults) for tally in tallies.values())} faults")
        process.join()
        start = last + 1
        if start < count:
            name = kinds[start % len(kinds)]
            _count(tallies[name], f"its process ends with {process.exitcode}", seed, start, say)
            start += 1
    return tallies


def _count(tally: Tally, result: str, seed: int, number: int, say: Callable[[str], None]) -> None:
    tally.inputs += 1
    tally.taken += result == "taken"
    if result not in ("taken", "refused"):
        tally.faults.append(result)
        say(f"seed {seed}, input {number}: {result}")


def guided(name: str, count: int) -> None:
    """Damage chosen by coverage; ends the process, as libFuzzer does."""
    import atheris

    kind = KINDS[name]()
    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(kind.valid):
        (corpus / str(number)).write_bytes(data)
    box = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        result = attempt(kind, data, box)
        if result not in ("taken", "refused"):
            raise AssertionError(result)

    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TooSlow()))
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-runs={count}", "-rss_limit_mb=8000", "-max_len=20000", str(corpus)], one)
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", type=int, help="number of the one input to make again, with its traceback")
    parser.add_argument("--guided", action="store_true")
    chosen = parser.parse_args(arguments)
    kinds = chosen.kinds.split(",")
    if chosen.guided:
        guided(kinds[0], chosen.count)
    if chosen.only is not None:
        name, data = made(chosen.seed, chosen.only, kinds)
        print(f"{name}: {data!r}")
        KINDS[name]().read(data, Path(tempfile.mkdtemp()))
        return 0
    tallies = run(chosen.count, chosen.seed, kinds, lambda line: print(line, flush=True))
    total = Counter[str]()
    for name, tally in tallies.items():
        print(f"{name:20} {tally.inputs:8} inputs, {tally.taken:8} taken, {len(tally.faults):4} faults")
        total.update(inputs=tally.inputs, faults=len(tally.faults))
    print(f"seed {chosen.seed}: {total['inputs']} inputs, {total['faults']} faults")
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
