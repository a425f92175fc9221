"""`ttmray serve`: a real server on a free port, asked over HTTP."""

import csv
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests
import soundfile

import ttmray
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.models.backbone_weights import read_support
from ttmray.models.bundle import open_bundle
from ttmray.ranker.job import RankerConfig
from ttmray.ranker.votes import PairSource, read_votes
from ttmray.serve.server import TryOutServer, is_loopback, open_server
from ttmray.serve.tryout import ServeConfig, _scores
from ttmray.serve.votes import COLUMNS, TABLE, VOTES, VotesTable
from ttmray.storage import Folder

PROMPT = {"prompt": " a calm  piano ", "seed": 7, "guidance": 3.0}
Served = tuple[TryOutServer, str]
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(**fields: Any) -> Iterator[Served]:
    """A server that answers, and its address without the token."""
    common = {"bundle": "debug", "device": "cpu", "steps": 1, "port": 0}
    with open_server(load_config(ServeConfig, fields=common | fields)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def served(output: Path) -> Iterator[Served]:
    """The debug bundle, on the loopback address."""
    with serving(output=str(output)) as both:
        yield both


Post = Callable[..., requests.Response]


@pytest.fixture
def post(served: Served) -> Post:
    """Asks as the page does."""

    def ask(path: str, body: Any, **headers: str) -> requests.Response:
        return requests.post(served[1] + path, data=json.dumps(body), headers=JSON | headers, timeout=120)

    return ask


def test_the_page_has_what_the_weights_can_do_and_loads_nothing_from_elsewhere(
    served: Served,
) -> None:
    answer = requests.get(served[1] + "/", timeout=60)
    assert answer.status_code == 200
    assert 'id="score"' in answer.text
    assert "mean nothing" in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    script = requests.get(served[1] + "/serve.js", timeout=60)
    assert script.headers["Content-Type"].startswith("text/javascript")
    assert not re.findall(r"(?:src|href|url)[=(]\s*[\"']?(?:https?:)?//", answer.text + script.text)
    assert requests.get(served[1] + "/etc/passwd", timeout=60).status_code == 404


def test_a_clip_is_that_of_the_api_and_is_made_once(served: Served, post: Post, output: Path) -> None:
    first = post("/clips", PROMPT | {"scores": [0.5]}).json()["clips"][0]
    data = requests.get(served[1] + first["audio"], timeout=60)
    assert data.headers["Content-Type"] == "audio/flac"
    samples, rate = soundfile.read(io.BytesIO(data.content))
    studio = ttmray.load("debug", device="cpu", threads=1)
    fields = {"score": 0.5, "seed": 7, "sampler": {"steps": 1, "weight": 3.0}}
    (clip,) = studio.generate({"clip": "a calm piano"}, **fields)
    clip.save(output / "same.flac")
    assert (output / "same.flac").read_bytes() == data.content
    assert (len(samples), rate) == (441_000, 44_100)
    assert first["reward"] == pytest.approx(studio.score([clip])["reward"][0])
    file = output / first["audio"][1:]
    before = file.stat().st_mtime_ns
    assert post("/clips", PROMPT | {"scores": [0.5]}).json()["clips"] == [first]
    assert file.stat().st_mtime_ns == before


def test_a_vote_about_a_blind_pair_is_a_row_that_the_ranker_reads(post: Post, output: Path) -> None:
    made = post("/clips", PROMPT | {"scores": [0.5, -1.0]}).json()
    assert [sorted(clip) for clip in made["clips"]] == [["audio"], ["audio"]]
    voted = post("/votes", {"pair": made["pair"], "choice": "second"}).json()
    assert sorted(clip["score"] for clip in voted["clips"]) == [-1.0, 0.5]
    assert [clip["audio"] for clip in voted["clips"]] == [clip["audio"] for clip in made["clips"]]
    again = post("/votes", {"pair": made["pair"], "choice": "first"})
    assert (again.status_code, "has a vote already" in again.json()["error"]) == (400, True)
    pairs, dropped = read_votes([PairSource(name="serve", path=str(output / TABLE))])
    (pair,) = [pair for pair in pairs if pair.id == made["pair"]]
    assert dropped == []
    assert (pair.target, pair.text) == (0.0, "a calm piano")
    assert [pair.a, pair.b] == [str(output) + clip["audio"] for clip in made["clips"]]
    assert all(soundfile.info(path).frames == 441_000 for path in (pair.a, pair.b))
    assert {pair.system_a, pair.system_b} == {"debug +0.5", "debug -1"}


def test_the_command_of_the_page_about_it_takes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs/serve.md").read_text("utf-8")
    (line,) = re.findall(r"^ttmray train-ranker .*$", text, re.MULTILINE)
    sets = [word for before, word in pairwise(shlex.split(line)) if before == "--set"]
    config = load_config(RankerConfig, None, sets)
    assert [source.path for source in config.sources] == [f"{tmp_path}/runs/serve/{TABLE}"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/clips", PROMPT | {"scores": [50]}, "A score is a number from -3 to 5"),
        ("/clips", PROMPT | {"scores": [None]}, "A score is a number"),
        ("/clips", PROMPT | {"scores": [1, 1]}, "Both clips would be the same"),
        ("/clips", PROMPT | {"scores": [1], "prompt": " "}, "1 to 1000 characters"),
        ("/clips", PROMPT | {"scores": [1], "seed": -1}, "A seed is a whole number"),
        ("/clips", PROMPT | {"scores": [1], "guidance": 1e9}, "Guidance is a number"),
        ("/clips", PROMPT | {"scores": [1], "seed": float("inf")}, "A seed is a whole number"),
        ("/clips", PROMPT | {"scores": [float("nan")]}, "A score is a number"),
        ("/clips", {"prompt": "x"}, "none of this page"),
        ("/clips", [], "none of this page"),
        ("/clips", PROMPT | {"scores": [0.5], "prompt": None}, "A prompt is a text"),
        ("/clips", PROMPT | {"scores": [0.5], "seed": 1.5}, "A seed is a whole number"),
        ("/clips", PROMPT | {"scores": [0.5], "seed": "7"}, "A seed is a whole number"),
        ("/votes", {"pair": "0" * 32, "choice": "first"}, "no such pair"),
    ],
)
def test_what_cannot_be_asked_for_is_one_message(post: Post, path: str, body: Any, words: str) -> None:
    answer = post(path, body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_other_pages_and_other_names_of_this_machine_get_nothing(served: Served, post: Post) -> None:
    ask = PROMPT | {"scores": [0.5]}
    assert post("/clips", ask, Origin="http://elsewhere.example").status_code == 403
    assert post("/clips", ask, **{"Content-Type": "text/plain"}).status_code == 403
    assert post("/clips", ask, Host="elsewhere.example").status_code == 403
    assert requests.get(served[1], headers={"Host": "elsewhere.example:80"}, timeout=60).status_code == 403
    assert post("/clips", {"prompt": "x" * 20_000}).status_code == 413
    assert post("/clips", ask, Origin=served[1]).status_code == 200


def test_another_address_needs_the_token(tmp_path: Path) -> None:
    with serving(output=str(tmp_path), host="0.0.0.0") as (server, address):
        assert server.address().endswith(f"/?token={server.token}")
        assert len(server.token) >= 24
        for path in ("/", "/serve.js", "/?token=wrong"):
            assert requests.get(address + path, timeout=60).status_code == 401
        refused = requests.post(address + "/clips", data=json.dumps(PROMPT | {"scores": [1]}), headers=JSON, timeout=60)
        assert refused.status_code == 401
        assert not list(tmp_path.rglob("*.flac"))
        with requests.Session() as browser:
            assert 'id="form"' in browser.get(f"{address}/?token={server.token}", timeout=60).text
            assert "token" not in browser.get(address, timeout=60).url
        bearer = {"Authorization": f"Bearer {server.token}"}
        assert requests.get(address, headers=bearer, timeout=60).status_code == 200


def test_an_address_that_is_taken_is_one_message(served: Served, tmp_path: Path) -> None:
    config = ServeConfig(bundle="debug", output=str(tmp_path), port=served[0].server_port, device="cpu")
    with pytest.raises(UserError, match="in use"):
        open_server(config)


@pytest.mark.parametrize(
    ("host", "only_here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)]
)
def test_addresses_that_only_this_machine_reaches_are_told(host: str, only_here: bool) -> None:
    assert is_loopback(host) is only_here


def test_the_slider_has_the_scores_that_the_weights_were_trained_on() -> None:
    bundle = open_bundle("micro")
    path = bundle.backbone_file()
    assert path is not None
    support, scores = read_support(path), _scores(str(path), bundle.sampling)
    assert support is not None
    assert scores is not None
    assert (scores.low, scores.high) == (round(support.min, 2), round(support.max, 2))
    assert scores.trained == (support.p5, support.p95)
    assert scores.low <= scores.usual <= scores.high


def row(name: str, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS, "x") | {"id": name, "cast": f"2026-01-0{len(name)}", "label": "a"} | more


def test_votes_outlive_whoever_is_killed_before_the_table_is_written(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    table = VotesTable(folder)
    assert [table.add(row("a")), table.add(row("bb", prompt='a "loud", long\nline'))] == [1, 2]
    folder.create(f"{VOTES}/ccc.json", json.dumps(row("ccc")).encode())  # the next write was to be the table
    folder.write(TABLE, b"id,a\nhalf")
    (tmp_path / VOTES / ".tmp-killed").write_bytes(b'{"id"')
    assert len(VotesTable(folder)) == 3
    rows = list(csv.DictReader(io.StringIO(folder.read(TABLE).decode(), newline="")))
    assert [one["id"] for one in rows] == ["a", "bb", "ccc"]
    assert rows[1]["prompt"] == 'a "loud", long\nline'
    with pytest.raises(UserError, match="has a vote already"):
        table.add(row("a"))
    folder.write(f"{VOTES}/d.json", b"[]")
    with pytest.raises(UserError, match=r"d\.json is no vote"):
        VotesTable(folder)


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    words = ["serve", "--bundle", "debug", "--port", "0", "--output", str(tmp_path), "--set", "device=cpu"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "ttmray", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    address = next(match[1] for line in lines if (match := re.match(r"open (http://127\.0\.0\.1:\d+/)", line)))
    assert requests.get(address, timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert "0 votes" in process.stdout.read()


def wait_until(page, expression: str) -> None:
    """Until it is true in the page, whose security policy forbids the evaluations of `Page.wait_for_function`."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_clips_are_made_heard_and_voted_on(browser: Any, served: Served, output: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(120_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(served[1])
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector("#clips audio")
    wait_until(page, "document.querySelector('#clips audio').duration > 9.9")
    assert "reward" in page.locator(".facts-line").first.inner_text()
    page.get_by_label("Two, to compare blind").check()
    page.get_by_label("Score of the other").fill("-2")
    page.get_by_role("button", name="Make").click()
    page.wait_for_selector(".choices:not([hidden])")
    pair = page.locator("article").first
    assert pair.locator(".facts-line").all_inner_texts() == ["", ""]
    pair.get_by_role("button", name="2 is better").click()
    wait_until(page, "document.querySelector('.said').textContent === 'Kept.'")
    assert all("asked for" in text for text in pair.locator(".facts-line").all_inner_texts())
    assert pair.get_by_role("button", name="1 is better").is_disabled()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert problems == []
    page.close()
