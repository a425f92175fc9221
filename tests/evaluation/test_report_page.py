"""The report's page in a real browser: headless Chromium, from the disk."""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttmray.cli import main
from ttmray.evaluation.report import encode_ogg, report
from ttmray.ranker.votes import PairSource, read_votes

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")
SYSTEMS = ("_base <b>$", "tuned")
VOTE_COLUMNS = ["a", "b", "prompt", "label", "prompt_id", "system_a", "system_b", "seconds", "loudness"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_tones: Callable[[Path], Path]) -> Path:
    out = write_tones(tmp_path_factory.mktemp("page"))
    assert report(str(out)) == 0
    return out / "report"


@pytest.fixture
def page(browser: Any, made: Path) -> Iterator[Any]:
    with opened_in(browser, made / "index.html") as opened:
        yield opened


@contextmanager
def opened_in(browser: Any, index: Path) -> Iterator[Any]:
    """The page in a fresh profile; any error in it, and any request to elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else wrong.append(r.url))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(index.as_uri())
    yield opened
    context.close()
    assert wrong == []


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page. Playwright's own waiting evaluates a string again in the page from its second
    look on, which the page's content security policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def shown(page: Any) -> list[str]:
    """Ids of the prompts that can be seen, in order."""
    return [text.removeprefix("Prompt ") for text in page.locator(".prompt:visible > .quiet").all_inner_texts()]


def test_light_and_dark_differ_and_the_choice_survives_a_reload(page: Any, tmp_path: Path) -> None:
    from PIL import Image

    def brightness(name: str) -> float:
        page.screenshot(path=tmp_path / name)
        return float(np.asarray(Image.open(tmp_path / name).convert("L")).mean())

    assert brightness("light.png") > 200
    assert page.locator("#plots img:visible").first.get_attribute("class") == "in-light"
    page.get_by_role("button", name="Dark theme").click()
    assert brightness("dark.png") < 60
    page.reload()
    assert brightness("dark-again.png") < 60
    assert page.locator("#plots img:visible").first.get_attribute("class") == "in-dark"
    page.emulate_media(media="print")
    assert not page.locator("#controls").is_visible()
    assert page.locator("#plots img:visible").first.get_attribute("class") == "in-light"


def test_a_browser_that_prefers_dark_gets_dark_and_small_screens_scroll_only_down(browser: Any, made: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    opened = context.new_page()
    opened.goto((made / "index.html").as_uri())
    assert opened.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    opened.locator("#blind-form button").click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_prompts_are_sorted_by_any_score_of_a_system_and_by_differences(page: Any) -> None:
    assert shown(page) == ["0", "1", "2", "3", "4"]
    page.select_option("#sort-score", "reward")
    page.select_option("#sort-system", label=SYSTEMS[0])
    assert shown(page) == ["0", "2", "3", "1", "4"]  # 0.1, 0.2, 0.3, 0.4; without a score last
    page.select_option("#order", "-1")
    assert shown(page) == ["1", "3", "2", "0", "4"]
    page.select_option("#sort-system", label=f"{SYSTEMS[0]} − {SYSTEMS[1]}")
    assert shown(page) == ["3", "2", "1", "0", "4"]  # 0.05, -0.3, -0.35, -0.9
    page.select_option("#sort-score", "text")
    page.select_option("#order", "1")
    assert shown(page)[-2:] == ["2", "4"]
    page.click("#controls button[type=reset]")
    # the form empties its fields after the event
    until(page, "document.querySelector('#prompts > :first-child > .quiet').textContent === 'Prompt 0'")
    assert shown(page) == ["0", "1", "2", "3", "4"]


def test_prompts_are_filtered_by_words_and_by_a_range_of_a_score(page: Any) -> None:
    page.fill("#text", "PIANO calm")
    assert shown(page) == ["0"]
    assert page.inner_text("#shown") == "1 of 5 prompts"
    page.fill("#text", "<script>")
    assert shown(page) == ["1"]
    page.fill("#text", "")
    page.fill("#low", "0.22")
    page.fill("#high", "0.45")
    assert shown(page) == ["1", "3"]  # the base system's 0.4 and 0.3
    page.select_option("#filter-system", label=SYSTEMS[1])
    assert shown(page) == ["3"]


def test_one_clip_plays_at_a_time_and_the_next_one_goes_on_at_its_position(
    browser: Any, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "report")
    long = encode_ogg(np.zeros((1, 100 * 8000), np.float32), 8000)  # longer than any wait here: no clip ends
    for clip in (tmp_path / "report/audio").iterdir():
        clip.write_bytes(long)
    with opened_in(browser, tmp_path / "report/index.html") as page:
        first, second = page.locator("audio").nth(0), page.locator("audio").nth(1)
        first.evaluate("async (player) => { await player.play(); player.currentTime = 20; }")
        second.evaluate("async (player) => { await player.play(); }")
        until(page, "document.querySelectorAll('.clip.playing').length === 1")
        assert first.evaluate("(player) => player.paused")
        assert not second.evaluate("(player) => player.paused")
        assert second.evaluate("(player) => player.currentTime") >= 20


def test_the_keyboard_reaches_everything(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'main'")
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        reached.add(name)
        if name == "BODY":
            break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or name == "AUDIO", name  # the browser marks the player's own buttons
    assert {"text", "sort-score", "order", "low", "keep", "AUDIO", "pair", "seed", "matched", "DIV", "BODY"} <= reached
    assert page.locator("input:visible, select:visible").count() == page.locator("label:visible").count()


def listen_to_both(page: Any) -> None:
    page.keyboard.press("Space")
    page.locator("#play", has_text="Pause").wait_for()
    page.keyboard.press("x")
    page.locator("[data-vote=tie]:enabled").wait_for()


def test_blind_votes_by_keyboard_survive_a_reload_and_export_what_the_ranker_reads(
    page: Any, made: Path, tmp_path: Path
) -> None:
    page.focus("#blind-form button")
    page.keyboard.press("Enter")
    seen = page.inner_text("body")
    assert not [name for name in (*SYSTEMS, "Reward", "LUFS") if name in seen]
    page.keyboard.press("a")
    assert page.inner_text("#hint") == "Listen to both clips first."
    assert page.locator("[data-vote=a]").is_disabled()
    choices, begun = {}, time.monotonic()
    for key, label in (("a", "a"), ("t", "tie"), ("b", "b")):
        choices[page.inner_text("#stage-prompt")] = label
        listen_to_both(page)
        assert page.get_attribute("#side-b", "aria-pressed") == "true"
        page.keyboard.press(key)
    spent = time.monotonic() - begun
    assert page.inner_text("#place") == "Pair 4 of 4"
    page.keyboard.press("s")
    assert page.inner_text("#place") == "All 4 pairs are done."
    page.keyboard.press("Escape")
    assert page.inner_text("#count") == "3 votes and 1 skipped pairs in this browser."
    assert page.evaluate("document.activeElement.id") == "blind-title"

    page.reload()
    assert page.inner_text("#count") == "3 votes and 1 skipped pairs in this browser."
    exported = {}
    for kind in ("csv", "json"):
        with page.expect_download() as waiting:
            page.click(f"#{kind}")
        exported[kind] = made / f"votes.{kind}"  # names are relative to the report
        waiting.value.save_as(exported[kind])
    rows = list(csv.DictReader(io.StringIO(exported["csv"].read_text("utf-8"))))
    assert list(rows[0]) == VOTE_COLUMNS
    assert {r["prompt"]: r["label"] for r in rows} == choices
    assert [{key: str(value) for key, value in r.items()} for r in json.loads(exported["json"].read_text())] == rows
    data = json.loads(page.inner_text("#data"))
    assert sum(float(r["seconds"]) for r in rows) <= spent + 0.05 * len(rows)  # each is rounded to 0.1 s
    for r in rows:
        clips = next(prompt["clips"] for prompt in data["prompts"] if prompt["id"] == r["prompt_id"])
        named = {data["systems"][clip["system"]]: clip["audio"] for clip in clips}
        assert (named[r["system_a"]], named[r["system_b"]]) == (r["a"], r["b"])

    for path in exported.values():
        pairs, dropped = read_votes([PairSource(name="votes", path=str(path))])
        assert dropped == []
        assert [pair.target for pair in pairs] == [1.0, 0.5, 0.0]
        assert all(Path(pair.a).is_file() and Path(pair.b).is_file() for pair in pairs)
    page.click("#tally summary")
    page.wait_for_selector("#tally div:has-text('no difference 1')")
    page.click("#clear")
    assert page.inner_text("#count") == "0 votes in this browser."


def test_the_seconds_of_a_vote_hold_what_was_heard_before_a_seek(page: Any) -> None:
    page.click("#blind-form button")
    page.keyboard.press("Space")
    page.locator("#play", has_text="Pause").wait_for()
    page.wait_for_timeout(1000)
    page.keyboard.press("ArrowLeft")  # and the clip plays on
    page.keyboard.press("x")
    page.locator("[data-vote=tie]:enabled").wait_for()
    page.keyboard.press("t")
    votes = json.loads(page.evaluate("Object.entries(localStorage).find(([key]) => key.includes('votes'))[1]"))
    assert votes[0][1]["seconds"] >= 1.0


def test_order_and_sides_come_from_the_seed_alone(page: Any) -> None:
    made = {}
    for seed in (0, 0, 1, 2, 3):
        page.fill("#seed", str(seed))
        page.click("#blind-form button")
        order = []
        while page.inner_text("#place").startswith("Pair"):
            order.append(page.inner_text("#stage-prompt"))
            page.keyboard.press("s")
        page.keyboard.press("Escape")
        votes = json.loads(page.evaluate("Object.entries(localStorage).find(([key]) => key.includes('votes'))[1]"))
        drawn = (tuple(order), tuple(vote["system_a"] for _, vote in votes))
        assert made.setdefault(seed, drawn) == drawn
        page.click("#clear")
    assert len({order for order, _ in made.values()}) > 1
    assert {system for _, sides in made.values() for system in sides} == set(SYSTEMS)


def test_the_last_vote_can_be_undone_and_clips_play_at_the_same_loudness(page: Any) -> None:
    page.evaluate(
        """() => { window.volumes = []; const play = HTMLMediaElement.prototype.play;
        HTMLMediaElement.prototype.play = function () { window.volumes.push(this.volume); return play.call(this); } }"""
    )
    page.click("#blind-form button")
    first = page.inner_text("#stage-prompt")
    listen_to_both(page)
    page.keyboard.press("b")
    assert page.inner_text("#stage-prompt") != first
    page.keyboard.press("u")
    assert page.inner_text("#stage-prompt") == first
    assert page.inner_text("#place") == "Pair 1 of 4"
    assert page.locator("#undo").is_disabled()
    low, high = sorted(page.evaluate("window.volumes"))
    assert high == 1
    assert low == pytest.approx(0.25, abs=0.01)  # tones of 0.1 and 0.4


def test_the_two_published_systems_are_evaluated_shown_in_both_themes_and_voted_on(
    browser: Any, data_dir: Path, tmp_path: Path
) -> None:
    from PIL import Image

    with open(data_dir / "clips/clips.csv", newline="") as file:
        published = [row for row in csv.DictReader(file) if row["system"] == "sub1"]
    with open(tmp_path / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *((row["prompt_id"], row["caption"]) for row in published)])
    store, out = str(tmp_path / "store"), tmp_path / "out"
    assert main(["reference", "build", "songs", str(data_dir / "tracks"), "--bundle", "debug", "--store", store]) == 0
    folders = [str(data_dir / "clips" / name) for name in ("baseline", "sub1")]
    usual = [
        "--bundle",
        "debug",
        "--prompts",
        str(tmp_path / "prompts.csv"),
        "--reference",
        "songs",
        "--output",
        str(out),
    ]
    assert main(["evaluate", *folders, *usual, "--set", f"references={store}", "--set", "resamples=100"]) == 0
    assert main(["report", str(out)]) == 0
    with opened_in(browser, out / "report/index.html") as page:
        assert len(shown(page)) == len(published) == 24
        assert page.locator(".prompt audio, .prompt button").count() >= 48
        images = {}
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            until(page, f"document.documentElement.dataset.theme === '{theme}'")
            page.screenshot(path=tmp_path / f"{theme}.png", full_page=True)
            images[theme] = np.asarray(Image.open(tmp_path / f"{theme}.png").convert("L"), float)
        assert images["light"].mean() > 180 > 90 > images["dark"].mean()
        assert min(image.std() for image in images.values()) > 10  # something is on it
        page.focus("#blind-form button")
        page.keyboard.press("Enter")
        assert "FluxAudio" not in page.inner_text("body")
        for key in ("a", "b"):
            listen_to_both(page)
            page.keyboard.press(key)
        page.keyboard.press("Escape")
        page.reload()
        assert page.inner_text("#count").startswith("2 votes")
        with page.expect_download() as waiting:
            page.click("#csv")
        waiting.value.save_as(out / "report/votes.csv")
    pairs, dropped = read_votes([PairSource(name="votes", path=str(out / "report/votes.csv"))])
    assert dropped == []
    assert sorted(pair.target for pair in pairs) == [0.0, 1.0]
    assert all(Path(pair.a).is_file() and Path(pair.b).is_file() for pair in pairs)
