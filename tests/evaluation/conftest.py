"""Folders as `ttmray evaluate` writes them, for the tests of what reads them: two systems on four prompts."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttmray import statistics
from ttmray.audio import io as audio_io
from ttmray.audio import loudness
from ttmray.audio.limits import AudioLimits
from ttmray.evaluation.metrics import Metric
from ttmray.evaluation.results import CLIPS, COLUMNS, RESULTS

PROTOCOL = "mine/test protocol"
HOSTILE = "</script><script>alert(1)</script> & \"quotes\" 'too' {{data}} $x^2$"
PROMPTS = ("calm piano", HOSTILE, "loud guitars", "a choir")
SYSTEMS = ("_base <b>$", "tuned")


class Server:
    """Answers by `reply(question, has_audio)`; keeps requests and their authorization headers."""

    CUT = 0
    """Code of a chunked answer that ends in the middle of a chunk."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Callable[[str, bool], tuple[int, str]] = self.hears_the_piano
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                content = body["messages"][0]["content"]
                code, text = outer.reply(content[0]["text"], len(content) > 1)
                if code == outer.CUT:
                    self.wfile.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"choices"')
                    return
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", text)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def hears_the_piano(question: str, has_audio: bool) -> tuple[int, str]:
        if not has_audio:
            return 200, 'Here they are:\n```json\n["piano", "drums", "calm mood"]\n```'
        lines = [line for line in question.splitlines() if line[:1].isdigit()]
        return 200, "\n".join(f"{i}. {'Yes' if 'piano' in line else 'No'}" for i, line in enumerate(lines, 1))


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.server.serve_forever, daemon=True)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def write_tones() -> Callable[[Path], Path]:
    """Makes an evaluation of tones below a folder, with one clip that failed; returns its folder."""
    return _write_tones


def _write_tones(folder: Path) -> Path:
    rows = []
    for s, system in enumerate(SYSTEMS):
        for i, prompt in enumerate(PROMPTS):
            scores = {"reward": [0.1, 0.4, 0.2, 0.3][i] if s == 0 else 1.0 - 0.25 * i, "clap_score": 0.05 * i + 0.2 * s}
            path = tone(folder / f"clips/{s}/{i}{'.flac' if s else '.wav'}", 300 * (i + 1), 0.1 + 0.3 * s)
            rows.append(row(system, str(i), prompt, path, **scores))
    rows.append(row(SYSTEMS[1], "4", "nothing came", None, status="failed", reason="too_short", message="0.1 s <i>"))
    return write_evaluation(folder / "out", rows)


def row(system: str, prompt_id: str, prompt: str, path: Path | None, **scores: Any) -> dict[str, Any]:
    """A row of clips.parquet; the file's facts are measured."""
    made: dict[str, Any] = dict.fromkeys(COLUMNS) | {"system": system, "prompt_id": prompt_id, "prompt": prompt}
    made |= {"sample": 0, "status": "ok", "reason": ""}
    if path is not None:
        wave, rate = audio_io.decode(path, AudioLimits(min_duration_s=0.05))
        made |= {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "silence": 0.0}
        made |= {"duration_s": wave.shape[1] / rate, "true_peak_db": loudness.true_peak(wave, rate)}
        made["lufs"] = loudness.integrated_loudness(wave, rate)
    return made | scores


def write_evaluation(folder: Path, rows: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    """results.json and clips.parquet of these rows, with means and paired tests of reward and CLAP score."""
    names = list(dict.fromkeys(r["system"] for r in rows))
    systems, comparisons = [], []
    for name in names:
        own = [r for r in rows if r["system"] == name]
        metrics = {}
        for key, column in (("clap_score", "clap_score"), ("reward", "reward"), ("lufs", "lufs")):
            values = np.array([r[column] for r in own if r[column] is not None])
            half = float(1.96 * values.std(ddof=1) / len(values) ** 0.5)
            mean = float(values.mean())
            metrics[key] = asdict(
                Metric(key, mean, len(values), 0, 512, PROTOCOL, mean - half, mean + half, 0.95, ("few clips",))
            )
        prompts = len({r["prompt_id"] for r in own})
        systems.append(
            {"name": name, "folder": f"/songs/{name}", "clips": len(own), "prompts": prompts, "metrics": metrics}
        )
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for column in ("reward", "clap_score"):
                scores = [
                    np.array([r[column] for r in rows if r["system"] == s and r[column] is not None]) for s in (a, b)
                ]
                n = min(map(len, scores))
                test = asdict(statistics.paired(scores[0][:n], scores[1][:n]))
                names_of_test = ("n", "difference", "low", "high", "t", "p", "d_z", "wins", "ties", "losses")
                kept = {key: test[key] for key in names_of_test}
                means = {"mean_a": float(scores[0].mean()), "mean_b": float(scores[1].mean())}
                adjusted = min(1.0, 2 * test["p"])
                comparisons.append(
                    {"a": a, "b": b, "metric": column, **means, **kept, "p_holm": adjusted}
                    | {"p_wilcoxon": test["wilcoxon_p"], "significant": adjusted < 0.05}
                )
    content = {
        "kind": "evaluation",
        "created": "2026-01-01T00:00:00+00:00",
        "protocol": PROTOCOL,
        "bundle": "mine",
        "note": "my bundle: of synthetic songs",
        "systems": systems,
        "comparisons": comparisons,
        "reference": {"name": "reference", "clips": 10, "by": {"seed": 1}},
        "leaks": {"by_id": [], "by_embedding": [["a", "b", 0.99]]},
        "warnings": ["N is smaller than the dimension", "<few> prompts"],
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(content))
    table = pa.Table.from_pylist([dict(r) for r in rows], pa.schema(COLUMNS.items()))
    pq.write_table(table, folder / CLIPS)
    return folder


def tone(path: Path, frequency: float, level: float, seconds: float = 2.0, rate: int = 22050) -> Path:
    """A stereo tone with a slow swell."""
    t = np.arange(int(seconds * rate)) / rate
    wave = level * np.sin(2 * np.pi * frequency * t) * (0.6 + 0.4 * np.sin(2 * np.pi * t))
    path.parent.mkdir(parents=True, exist_ok=True)
    audio_io.write_audio(str(path), np.stack([wave, wave]).astype(np.float32), rate, path.suffix[1:])
    return path
