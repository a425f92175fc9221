"""The demo, on debug models: songs, corpus, clips, page, and what it prints."""

import json
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from ttmray.cli import main
from ttmray.recipes.demo import HEARD
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS
from ttmray.synth.measures import estimate, measure
from ttmray.synth.songs import ODD, SONGS
from ttmray.synth.world import clip

REPO = Path(__file__).resolve().parents[2]


def command(output: Path, **more: object) -> list[str]:
    sets = {"output": output, "bundle": "debug", "prompts": "[slow piano]", "scores": "[-1, 2]"}
    sets |= {"corpus": "{runtime: {runner: local, workers: 0}}", "generate": "{sampler: {steps: 2}}", **more}
    return ["demo", *(f"--set={name}={value}" for name, value in sets.items())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert main(command(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def facts(made: Path) -> dict:
    return json.loads((made / "demo.json").read_bytes())


def test_every_song_has_its_true_quality_beside_its_reward_and_every_odd_file_its_outcome(facts):
    songs = {song["title"]: song for song in facts["songs"]}
    assert songs.keys() == {song.title for song in SONGS}
    assert [song["reward"] for song in facts["songs"]] == sorted((s["reward"] for s in songs.values()), reverse=True)
    for song in SONGS:
        assert songs[song.title]["faults"] == dict(song.faults)
        assert songs[song.title]["clips"] == max(1, int(song.seconds // 10))
    assert "clipping" in songs["Été à la plage"]["measured_faults"]
    assert songs["Harvest Road"]["measured_faults"] == {}
    odd = {one["path"]: (one["status"], one["reason"], one["right"]) for one in facts["odd"]}
    assert odd == {path: (*outcome, True) for path, outcome in ODD.items()}


def test_rewards_and_clips_are_those_of_the_jobs(made, facts):
    from ttmray.corpus.index import read_index

    rows = read_index(Folder.at(str(made / "corpus"))).to_pylist()
    for song in facts["songs"]:
        rewards = [row["reward_score"] for row in rows if row["source"] == song["path"] and row["status"] == "ok"]
        assert song["reward"] == pytest.approx(np.mean(rewards))
        assert song["reward"] == pytest.approx(
            next(row["track_reward_score"] for row in rows if row["source"] == song["path"])
        )
    [prompt] = facts["prompts"]
    assert (prompt["prompt"], [one["score"] for one in prompt["clips"]]) == ("slow piano", [-1.0, 2.0])
    for one in prompt["clips"]:
        manifest = json.loads(next((made / one["file"]).parents[1].glob("manifest/*.json")).read_bytes())
        assert (one["reward"], one["clap_score"]) == (manifest["reward_score"], manifest["clap_score"])


def test_the_page_has_a_player_and_a_picture_of_all_that_sounds_and_names_the_bundle_at_every_number(made, facts):
    page = (made / "index.html").read_text()
    sounds = [unquote(unescape(name)) for name in re.findall(r"<audio[^>]* src='([^']+)'", page)]
    assert sounds == [song["file"] for song in facts["songs"]] + [one["file"] for one in facts["prompts"][0]["clips"]]
    pictures = [unquote(unescape(name)) for name in re.findall(r'<img[^>]* src="([^"]+)"', page)]
    assert len(pictures) == len(sounds)
    links = [unquote(name) for name in re.findall(r'href="([^"#]+)"', page)]
    assert links
    assert [name for name in (*sounds, *pictures, *links) if not (made / name).is_file()] == []
    text = unescape(re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))
    for song in facts["songs"]:
        assert song["caption"] in text
    for word in ("reward", "CLAP score"):
        numbers = re.findall(rf"(\S+) {word}(?= of [−+\d]|\s+[−+\d])", text)
        assert set(numbers) == {"debug"}
    assert "scores and latents mean nothing" in text


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_all_pictures_load_all_players_play_and_nothing_overflows(made, facts, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto((made / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    seconds = page.evaluate(
        """Promise.all([...document.querySelectorAll("audio")].map(audio => new Promise((resolve, reject) => {
            audio.onloadedmetadata = () => resolve(audio.duration)
            audio.onerror = () => reject(audio.src)
            audio.preload = "metadata"
            audio.load()
        })))"""
    )
    assert seconds == pytest.approx([song["seconds"] for song in facts["songs"]] + [10.0, 10.0], abs=0.1)
    reward, quality = (page.locator(f"tbody tr:first-child td:nth-of-type({i})").first.bounding_box() for i in (1, 2))
    assert quality["x"] + quality["width"] <= width  # side by side without scrolling
    assert reward["y"] == quality["y"]
    context.close()
    assert wrong == []


def test_what_is_printed_tells_the_best_and_the_worst_song_with_reasons_and_where_the_page_is(made, facts, capsys):
    assert main(command(made)) == 0
    printed = capsys.readouterr().out
    best, worst = facts["songs"][0], facts["songs"][-1]
    for word, song in (("best", best), ("worst", worst)):
        [line] = [line for line in printed.splitlines() if line.startswith(f"{word}: {song['title']}")]
        assert f"debug reward {song['reward']:+.2f}" in line
        assert f"true quality {song['quality']:+.2f}" in line
        assert all(f"{kind} {strength:.2f}" in line for kind, strength in song["faults"].items())
        assert all(kind in line for kind in song["measured_faults"])
    assert "8 of 8 odd files ended as they should" in printed
    assert f"open {made / 'index.html'}" in printed


def test_a_second_start_does_nothing_and_says_so(made, capsys):
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in made.rglob("*.*") if path.is_file()}

    before = times()
    assert main(command(made)) == 0
    printed = capsys.readouterr().out
    assert "nothing to do: all 2 units" in printed
    assert printed.count("nothing to do: all 1 clips") == 2
    assert "all of it was there: songs, corpus, clips and page are complete" in printed
    after = times()
    changed = {name for name in after if after[name] != before.get(name)}
    assert {Path(name).parent.relative_to(made).parts[0] for name in changed} <= {"clips"}  # merged manifests
    assert not any(name.endswith((".flac", "demo.json", "index.html")) for name in changed)


@pytest.mark.slow
def test_where_no_scores_are_given_those_of_the_worst_and_the_best_song_are_asked_for(made, facts, capsys):
    config = command(made)
    config.remove("--set=scores=[-1, 2]")
    assert main(config) == 0
    other = json.loads((made / "demo.json").read_bytes())
    rewards = [song["reward"] for song in facts["songs"]]
    assert other["scores"] == [round(rewards[-1], 1), round(rewards[0], 1)]
    assert [one["score"] for one in other["prompts"][0]["clips"]] == other["scores"]
    assert main(command(made)) == 0
    assert json.loads((made / "demo.json").read_bytes()) == facts


@pytest.mark.parametrize("damage", ["{}", "no json", None])
def test_a_page_whose_numbers_are_gone_or_strange_is_made_anew(made, facts, damage, capsys):
    file = made / "demo.json"
    if damage is None:
        (made / "index.html").unlink()
    else:
        file.write_text(damage)
    assert main(command(made)) == 0
    assert "all of it was there" not in capsys.readouterr().out
    assert json.loads(file.read_bytes()) == facts
    assert (made / "index.html").is_file()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"output": "s3://bucket/demo"}, "is a bucket"),
        ({"scores": "[1, 1.0]"}, "has one twice"),
        ({"scores": "[]"}, "scores"),
        ({"prompts": "[]"}, "prompts"),
        ({"corpus": "{bundl: x}"}, "section corpus"),
        ({"generate": "{output: elsewhere}"}, "generate.output"),
        ({"bundle": "none-such"}, "none-such"),
    ],
)
def test_wrong_settings_are_told_before_a_song_is_composed(tmp_path, sets, message, capsys):
    assert main(command(**{"output": tmp_path / "new", **sets})) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_faults_that_are_told_are_seldom_heard_in_clips_without():
    strengths = [estimate(measure(clip(71, i, faults={}).mix))[0] for i in range(24)]
    for kind in KINDS:
        assert np.mean([one[kind] >= HEARD for one in strengths]) <= 0.1, kind
