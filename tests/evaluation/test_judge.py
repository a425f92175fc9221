"""The judge of concept coverage: against a server in this process that speaks the chat API."""

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ttmray.errors import UserError
from ttmray.evaluation.judge import JudgeConfig, judge, parse_verdicts
from ttmray.storage import Folder

KEY = "sk-very-secret"


@pytest.fixture
def clips(tmp_path: Path) -> list[tuple[str, str, str]]:
    for i, name in enumerate(("x", "y")):
        soundfile.write(tmp_path / f"{name}.flac", np.random.default_rng(i).normal(0, 0.1, (22050, 2)), 22050)
    return [("p", "a calm piano", f"{tmp_path}/{name}.flac") for name in ("x", "y")]


def config(server: Any, **options: Any) -> JudgeConfig:
    return JudgeConfig(**{"endpoint": server.url, "model": "ears", "backoff_s": 0.0, "attempts": 3} | options)


def test_the_score_is_the_share_of_concepts_that_the_judge_hears(server, clips, tmp_path):
    assert judge(clips, config(server), Folder.at(str(tmp_path / "out"))) == [(1 / 3, ""), (1 / 3, "")]
    assert len(server.requests) == 3  # one for the concepts of the prompt, one per clip
    question, audio = server.requests[1]["messages"][0]["content"]
    assert "1. piano\n2. drums\n3. calm mood" in question["text"]
    assert audio["input_audio"]["format"] == "wav"
    sent, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["input_audio"]["data"])))
    assert (rate, sent.shape) == (22050, (22050,))
    assert server.requests[1]["temperature"] == 0
    assert server.keys == [None] * 3


def test_questions_and_answers_are_kept_and_not_asked_again(server, clips, tmp_path):
    out = Folder.at(str(tmp_path / "out"))
    first = judge(clips, config(server), out)
    kept = [json.loads(out.read(f"judge/{entry.name}")) for entry in out.files("judge")]
    assert sorted(one["answer"].splitlines()[0] for one in kept) == ["1. Yes", "1. Yes", "Here they are:"]
    assert judge(clips, config(server), out) == first
    assert len(server.requests) == 3
    judge(clips, config(server, model="other"), out)
    assert len(server.requests) == 6


def test_concepts_may_come_from_a_table(server, clips, tmp_path):
    (tmp_path / "concepts.csv").write_text("id,concepts\np,piano; grand piano\n")
    table = str(tmp_path / "concepts.csv")
    out = Folder.at(str(tmp_path / "out"))
    assert judge(clips[:1], config(server, concepts=table), out) == [(1.0, "")]
    with pytest.raises(UserError, match="no concepts of prompt q"):
        judge([("q", "drums", clips[0][2])], config(server, concepts=table), out)


def test_failures_of_the_server_and_odd_answers_are_tried_again(server, clips, tmp_path):
    bad = iter([(503, "busy"), (429, "slow down"), (200, "I hear music."), (200, "[]")])
    server.reply = lambda question, audio: next(bad, None) or server.hears_the_piano(question, audio)
    options = config(server, attempts=6, parallel=1)
    assert judge(clips, options, Folder.at(str(tmp_path / "out"))) == [(1 / 3, ""), (1 / 3, "")]
    assert len(server.requests) == 7


def test_an_answer_that_is_cut_off_is_tried_again(server, clips, tmp_path):
    cut = iter([server.CUT])
    server.reply = lambda question, audio: (next(cut, 200), server.hears_the_piano(question, audio)[1])
    assert judge(clips, config(server, parallel=1), Folder.at(str(tmp_path / "out"))) == [(1 / 3, ""), (1 / 3, "")]
    assert len(server.requests) == 4


def test_the_name_of_the_scores_follows_the_content_of_the_concept_table(server, tmp_path):
    names = []
    for file, concepts in (("a.csv", "piano"), ("b.csv", "piano"), ("a.csv", "drums")):
        (tmp_path / file).write_text(f"id,concepts\np,{concepts}\n")
        names.append(config(server, concepts=str(tmp_path / file)).name)
    assert names[0] == names[1] != names[2]


def test_a_clip_that_gets_no_answer_has_a_reason_and_the_others_their_score(server, clips, tmp_path):
    (tmp_path / "x.flac").write_bytes(b"no music")
    out = Folder.at(str(tmp_path / "out"))
    (score, reason), other = judge(clips, config(server), out)
    assert score is None
    assert reason.startswith("not_audio")
    assert other == (1 / 3, "")
    server.reply = lambda question, audio: (200, "1. yes") if audio else server.hears_the_piano(question, audio)
    ((score, reason),) = judge(clips[1:], config(server, model="lazy"), out)
    assert score is None
    assert "verdicts of [1], not of 1 to 3" in reason


def test_a_refusal_stops_with_what_the_server_said(server, clips, tmp_path):
    server.reply = lambda question, audio: (401, "bad key")
    with pytest.raises(UserError, match=r"answered 401: .*bad key") as error:
        judge(clips, config(server), Folder.at(str(tmp_path / "out")))
    assert "TTMRAY_JUDGE_KEY" in error.value.hint
    assert len(server.requests) <= 3  # not tried again


def test_the_key_is_sent_but_never_written_and_follows_no_redirect(server, clips, tmp_path, monkeypatch):
    monkeypatch.setenv("TTMRAY_JUDGE_KEY", KEY)
    out = Folder.at(str(tmp_path / "out"))
    judge(clips, config(server), out)
    assert server.keys == [f"Bearer {KEY}"] * 3
    assert all(KEY.encode() not in out.read(entry.name) for entry in out.files())
    thief = type(server)()
    threading.Thread(target=thief.server.serve_forever, daemon=True).start()
    server.reply = lambda question, audio: (302, thief.url)
    with pytest.raises(UserError, match="answered 302"):
        judge(clips, config(server, model="moved"), out)
    thief.server.shutdown()
    thief.server.server_close()
    assert thief.requests == []
    with pytest.raises(UserError, match="unencrypted"):
        judge(clips, JudgeConfig(endpoint="http://judge.example/v1", model="m"), out)


@pytest.mark.parametrize("address", ["ftp://host/v1", "host/v1", "https://me:pass@host/v1", ""])
def test_addresses_that_are_no_endpoint_are_refused(address):
    with pytest.raises(ValidationError, match="needs an address"):
        JudgeConfig(endpoint=address, model="m")


@given(
    st.lists(st.booleans(), min_size=1, max_size=12), st.sampled_from(["{}. {}", "**{}**: {}", "{}) {}!", " - {} {}"])
)
def test_verdicts_are_read_from_what_models_write(verdicts, style):
    lines = [style.format(i, "YES" if heard else "no") for i, heard in enumerate(verdicts, 1)]
    assert parse_verdicts("Sure:\n" + "\n".join(reversed(lines)), len(verdicts)) == verdicts


@pytest.mark.parametrize(
    "answer", ["", "yes", "1. yes\n1. no\n2. no", "1. yes", "1. yes\n2. no\n3. no", "1. maybe\n2. no"]
)
def test_answers_without_exactly_one_verdict_per_concept_are_not_taken(answer):
    with pytest.raises(ValueError, match="verdict"):
        parse_verdicts(answer, 2)
