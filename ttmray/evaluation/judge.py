"""Concept coverage score (CCS): which of a prompt's concepts a large audio-language model hears in a clip.

The judge is any endpoint that speaks the OpenAI chat API with `input_audio` (a provider's, or a local server such as
vLLM with an open model), or an audio-language model of transformers in this process. The challenge's own judge and
questions are not published, so values compare systems under one judge, not with official ones. Two questions are asked:
once per prompt for its concepts (unless a table gives them), once per clip which of them can be heard. Every question
and answer is kept in `judge/`; what is there is not asked again. The key comes from an environment variable and is
never written.
"""

import base64
import hashlib
import http.client
import io
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import soundfile
from pydantic import Field, field_validator

from ttmray import cost
from ttmray.audio import io as audio_io
from ttmray.audio.clip import LIMITS
from ttmray.config import Config, Device, execution, fingerprint
from ttmray.console import meter
from ttmray.errors import ClipError, UserError
from ttmray.json_text import read_json
from ttmray.storage import Folder, read_file
from ttmray.tables import read_rows

ASK_CONCEPTS = (
    "List the musical concepts that this description asks for: genre, instruments, mood, tempo, rhythm, texture. "
    'Answer with a JSON list of at most {limit} short strings and nothing else.\n\nDescription: "{prompt}"'
)
ASK_COVERAGE = (
    "Listen to the music. For each numbered concept say whether it can clearly be heard. Answer with one line per "
    "concept, `<number>. yes` or `<number>. no`, and nothing else.\n\n{concepts}"
)
MAX_ANSWER_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
RETRIED = (408, 409, 425, 429)
"""HTTP statuses that may pass; those from 500 on are tried again as well."""
LOCAL = ("localhost", "127.0.0.1", "::1")
_VERDICT = re.compile(r"^\W*(\d+)\W+(yes|no)\b", re.IGNORECASE | re.MULTILINE)

Parsed = TypeVar("Parsed")
Ask = Callable[[str, bytes], str]
"""(question, WAV file or nothing) -> answer."""


class JudgeConfig(Config):
    """Who judges, and how it is asked."""

    endpoint: str | None = None
    """Base address of the API, e.g. `http://localhost:8000/v1`; `/chat/completions` is added. null: a local model."""
    model: str
    """Name of the model at that endpoint; without one, a folder or the Hub id of a model that is already fetched."""
    device: Device = execution("auto")
    """Of a local model; `auto` is cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of a local model's weights; `auto` is what its files have."""
    max_new_tokens: int = Field(256, ge=8, le=8192)
    """Longest answer of a local model."""
    concepts: str | None = None
    """Table with the columns prompt_id (or id) and concepts, separated by semicolons; default: the judge names them."""
    max_concepts: int = Field(8, ge=1, le=50)
    """Concepts that the judge may name per prompt."""
    key_variable: str = execution("TTMRAY_JUDGE_KEY")
    """Environment variable that holds the API key; none is sent where it is empty."""
    attempts: int = execution(5, ge=1, le=20)
    """Tries per question: failures of the network or server, and answers that cannot be read. A local model has one:
    it would say the same again."""
    timeout_s: float = execution(120.0, gt=0)
    """Per try."""
    backoff_s: float = execution(1.0, ge=0)
    """Wait after the first failure; it doubles, up to a minute."""
    parallel: int = execution(4, ge=1, le=64)
    """Questions at the same time; a local model answers one after the other."""

    @field_validator("endpoint")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError("needs an address such as https://host/v1, without a user")
        return value.rstrip("/")

    @property
    def name(self) -> str:
        """Protocol of the scores: the model and everything that decides the questions, so a table of concepts is in it
        by its content.

        Raises:
            UserError: a concept table that cannot be read.
        """
        concepts = sorted(_given_concepts(self).items()) if self.concepts else None
        asked = [self.model, self.endpoint, concepts, self.max_concepts, ASK_CONCEPTS, ASK_COVERAGE]
        asked += [] if self.endpoint else [self.dtype, self.max_new_tokens]
        return f"ccs-{self.model.rstrip('/').rpartition('/')[2]}-{fingerprint(asked)[:8]}"


def judge(clips: Sequence[tuple[str, str, str]], config: JudgeConfig, output: Folder) -> list[tuple[float | None, str]]:
    """CCS of each clip, the share of its prompt's concepts that the judge hears, or None and the reason.

    Args:
        clips: (prompt id, prompt, address of the audio file).
        output: its `judge/` keeps questions and answers.

    Raises:
        UserError: the endpoint refuses (key, address, model), a local model that is not there or hears nothing, or a
            concept table that does not fit.
    """
    table = check_judge(config, [one for one, _, _ in clips])
    prompts = dict.fromkeys((one, text) for one, text, _ in clips)
    ask = _local(config) if config.endpoint is None else partial(_ask_endpoint, config)

    def concepts_of(item: tuple[str, str]) -> list[str] | ClipError:
        if config.concepts is not None:
            return table[item[0]]
        question = ASK_CONCEPTS.format(limit=config.max_concepts, prompt=item[1])
        try:
            return _asked(config, ask, output, question, None, lambda answer: _concepts(answer, config.max_concepts))
        except ClipError as error:
            return error

    def coverage(clip: tuple[str, str, str]) -> tuple[float | None, str]:
        named = concepts[clip[0], clip[1]]
        try:
            if isinstance(named, ClipError):
                raise named
            question = ASK_COVERAGE.format(concepts="\n".join(f"{i}. {one}" for i, one in enumerate(named, 1)))
            verdicts = _asked(config, ask, output, question, clip[2], lambda answer: parse_verdicts(answer, len(named)))
            return sum(verdicts) / len(verdicts), ""
        except ClipError as error:
            return None, str(error)

    gpus = cost.on_cuda(config.device) if config.endpoint is None else 0.0
    with cost.holding(gpus), ThreadPoolExecutor(config.parallel) as pool, meter("judged", len(clips)) as progress:
        concepts = dict(zip(prompts, pool.map(concepts_of, prompts), strict=True))
        scores = []
        for score in pool.map(coverage, clips):
            scores.append(score)
            progress.advance(1)
            cost.note()
    return scores


def check_judge(config: JudgeConfig, prompt_ids: Sequence[str]) -> dict[str, list[str]]:
    """What can be wrong before anything is asked; returns the concepts of the table, by prompt id.

    Raises:
        UserError: a key that would go out unencrypted, or a concept table that does not fit.
    """
    address = urlsplit(config.endpoint or "")
    if _key(config) and address.scheme == "http" and address.hostname not in LOCAL:
        raise UserError(
            f"judge.endpoint {config.endpoint} would get the key of {config.key_variable} unencrypted.", "Use https."
        )
    concepts = _given_concepts(config)
    unknown = [one for one in prompt_ids if config.concepts is not None and one not in concepts]
    if unknown:
        raise UserError(f"{config.concepts}: no concepts of prompt {unknown[0]}.", "Every prompt needs some.")
    return concepts


def parse_verdicts(answer: str, count: int) -> list[bool]:
    """Verdicts 1 to `count` from lines such as `2. yes`.

    Raises:
        ValueError: one is missing, given twice with different words, or of an unknown number.
    """
    verdicts: dict[int, bool] = {}
    for number, word in _VERDICT.findall(answer):
        heard = word.lower() == "yes"
        if verdicts.setdefault(int(number), heard) != heard:
            raise ValueError(f"concept {number} has two verdicts")
    if sorted(verdicts) != list(range(1, count + 1)):
        raise ValueError(f"verdicts of {sorted(verdicts)}, not of 1 to {count}")
    return [verdicts[i] for i in range(1, count + 1)]


def _concepts(answer: str, limit: int) -> list[str]:
    start, end = answer.find("["), answer.rfind("]")  # models like to wrap JSON in prose or fences
    named = read_json(answer[start : end + 1] if start >= 0 else answer)
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise ValueError("no JSON list of strings")
    clean = list(dict.fromkeys(" ".join(one.split())[:100] for one in named if one.strip()))
    if not clean:
        raise ValueError("no concepts")
    return clean[:limit]


def _given_concepts(config: JudgeConfig) -> dict[str, list[str]]:
    concepts: dict[str, list[str]] = {}
    if config.concepts is None:
        return concepts
    for place, row in read_rows(config.concepts, ("prompt_id", "id", "concepts")):
        one = str(row.get("prompt_id", row.get("id", ""))).strip()
        named = [part.strip() for part in str(row.get("concepts") or "").split(";") if part.strip()]
        if not one or not named:
            raise UserError(f"{place}: needs prompt_id and concepts.", "Separate concepts by semicolons.")
        concepts[one] = named
    return concepts


def _local(config: JudgeConfig) -> Ask:
    """A local model, which is loaded when the first question is not answered yet."""
    lock = threading.Lock()
    loaded: list[Ask] = []

    def ask(question: str, sound: bytes) -> str:
        from ttmray.evaluation.judge_local import LocalJudge

        with lock:
            if not loaded:
                loaded.append(LocalJudge(config.model, config.device, config.dtype, config.max_new_tokens))
            return loaded[0](question, sound)

    return ask


def _asked(
    config: JudgeConfig,
    ask: Ask,
    output: Folder,
    question: str,
    audio: str | None,
    parse: Callable[[str], Parsed],
) -> Parsed:
    """The parsed answer, from the output folder where it was asked before.

    Raises:
        ClipError: the audio cannot be read, or no try gave an answer that can be.
    """
    sound, digest = _wav(audio) if audio is not None else (b"", "")
    name = f"judge/{fingerprint([config.endpoint, config.model, question, digest])[:32]}.json"
    if output.exists(name):
        try:
            return parse(read_json(output.read(name))["answer"])
        except (ValueError, KeyError, TypeError):
            pass  # damaged by hand: asked again
    problem, attempts = "", config.attempts if config.endpoint else 1
    for attempt in range(attempts):
        if attempt:
            wait = min(LONGEST_WAIT_S, config.backoff_s * 2 ** (attempt - 1))
            time.sleep(wait * random.uniform(0.5, 1.0))
        try:
            answer = ask(question, sound)
            parsed = parse(answer)
        except (ValueError, OSError, http.client.HTTPException, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"[:300]
            continue
        record = {"question": question, "audio": audio, "audio_sha256": digest, "model": config.model}
        record |= {"endpoint": config.endpoint, "answer": answer}
        output.write(name, json.dumps(record, ensure_ascii=False, indent=1).encode())
        return parsed
    raise ClipError("failed", "judge", f"no usable answer in {attempts} tries; the last: {problem}")


def _ask_endpoint(config: JudgeConfig, question: str, sound: bytes) -> str:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if sound:
        encoded = base64.b64encode(sound).decode()
        content.append({"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}})
    return _post(config, {"model": config.model, "temperature": 0, "messages": [{"role": "user", "content": content}]})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(config: JudgeConfig, body: dict[str, Any]) -> str:
    """Text of the answer.

    Raises:
        OSError, HTTPException, ValueError, ...: what another try may mend.
        UserError: what it will not.
    """
    headers = {"Content-Type": "application/json"}
    if key := _key(config):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{config.endpoint}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=config.timeout_s) as response:
            data = response.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        if error.code in RETRIED or error.code >= 500:
            raise
        said = error.read(500).decode(errors="replace")
        raise UserError(
            f"judge.endpoint {config.endpoint} answered {error.code}: {said}",
            f"Check the address, judge.model, and the key in {config.key_variable}.",
        ) from error
    answer = read_json(data)["choices"][0]["message"]["content"]
    if not isinstance(answer, str):
        raise ValueError(f"the answer is a {type(answer).__name__}")
    return answer


def _key(config: JudgeConfig) -> str:
    return os.environ.get(config.key_variable, "").strip()


def _wav(path: str) -> tuple[bytes, str]:
    """A file as mono 16-bit WAV at its own rate, which every endpoint takes, and the SHA-256 of the file."""
    try:
        data = read_file(path)
    except UserError as error:
        raise ClipError("failed", "unreadable", error.message) from error
    audio, rate = audio_io.decode(io.BytesIO(data), LIMITS)
    file = io.BytesIO()
    soundfile.write(file, audio_io.to_mono(audio), rate, format="WAV", subtype="PCM_16")
    return file.getvalue(), hashlib.sha256(data).hexdigest()
