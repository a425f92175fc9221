import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from damages import DAMAGES

from ttmray import pages
from ttmray.audio import io as audio_io
from ttmray.audio.limits import AudioLimits
from ttmray.errors import EXIT_OK, EXIT_TOO_MANY_FAILURES, UserError
from ttmray.evaluation import plots
from ttmray.evaluation.report import add_media, encode_ogg, page, report
from ttmray.evaluation.results import CLIPS, RESULTS, read_clips, read_results
from ttmray.storage import Folder
from ttmray.verify import problems, verify

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra report)")

WriteTones = Callable[[Path], Path]
ANY = AudioLimits(min_duration_s=0.05)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, write_tones: WriteTones) -> Path:
    return write_tones(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def made(evaluation: Path) -> Path:
    assert report(str(evaluation)) == EXIT_OK
    return evaluation / "report"


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in self.raw and self.cdata_elem:
            self.raw[self.tags[-1][0]].append(data)
        else:
            self.text += data


def test_the_page_refers_to_files_of_its_own_folder_only(made: Path) -> None:
    page = Page(made / "index.html")
    links = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert len(links) > 30
    for link in links:
        assert link.startswith("#") or (made / link).is_file(), link
    used = {link for link in links if not link.startswith("#")}
    assert {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()} - used == {
        "index.html",
        "_SUCCESS.json",
    }


def test_the_content_security_policy_allows_exactly_the_script_and_style_of_the_page(made: Path) -> None:
    page = Page(made / "index.html")
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    _, script = page.raw["script"]
    for kind, text in (("script", script), ("style", page.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not [a for _, a in page.tags if "style" in a or any(name.startswith("on") for name in a)]


def test_texts_from_outside_stay_texts(made: Path) -> None:
    page = Page(made / "index.html")
    assert [a.get("type", "") for tag, a in page.tags if tag == "script"] == ["application/json", ""]
    assert not [tag for tag, _ in page.tags if tag == "b"]
    data = json.loads(page.raw["script"][0])
    hostile, name = data["prompts"][1]["text"], data["systems"][0]
    assert hostile.startswith("</script><script>alert(1)</script> & ")
    assert name == "_base <b>$"
    assert hostile in page.text
    assert name in page.text
    assert "No audio (failed: too_short: 0.1 s <i>)." in page.text


def test_tables_show_values_with_interval_n_and_significance(made: Path, evaluation: Path) -> None:
    text = (made / "index.html").read_text("utf-8")
    metric = json.loads((evaluation / RESULTS).read_text())["systems"][1]["metrics"]["reward"]
    shown = "<td>{value:.3f}<small>{low:.3f} to {high:.3f}</small><small>N = {n_generated}</small></td>"
    assert shown.format(**metric) in text
    content = json.loads((evaluation / RESULTS).read_text())
    assert text.count('aria-label="significant"') == sum(one["significant"] for one in content["comparisons"]) > 0
    assert "<summary>2 warnings</summary><ul><li>N is smaller" in text
    assert "my bundle: of synthetic songs" in text
    assert "95 % interval (" in text


def test_a_page_of_untrained_models_marks_nothing_and_grave_warnings_stand_open_at_the_top(
    evaluation: Path, tmp_path: Path
) -> None:
    content = json.loads((evaluation / RESULTS).read_text())
    grave = "one: 3 prompts are too few <b>"
    more = {"bundle": "debug", "grave": [grave], "warnings": [grave, *(f"other {i}" for i in range(9))]}
    (tmp_path / RESULTS).write_text(json.dumps(content | more))
    text = page(read_results(Folder.at(str(tmp_path))), [], [])
    assert 'aria-label="significant"' not in text
    assert "<strong>" not in text
    assert "class=yes" not in text
    assert text.count("too few &lt;b&gt;") == 1
    assert text.index("too few &lt;b&gt;</p>") < text.index('id="results"')
    assert "<summary>9 warnings</summary>" in text


def test_ties_of_a_comparison_and_the_licences_of_the_models_are_shown(evaluation: Path, tmp_path: Path) -> None:
    content = json.loads((evaluation / RESULTS).read_text())
    assert "Licences of the models" not in page(read_results(Folder.at(str(evaluation))), [], [])  # debug weights
    content["comparisons"][0] |= {"wins": 1, "ties": 2, "losses": 1}
    (tmp_path / RESULTS).write_text(json.dumps(content | {"license_notes": [f"model-{i}: <free>" for i in range(14)]}))
    text = page(read_results(Folder.at(str(tmp_path))), [], [])
    assert "Wins : ties : losses</th>" in text
    assert "<td>1 : 2 : 1</td>" in text
    assert text.count(": &lt;free&gt;</li>") == 14


def test_audio_is_transcoded_and_equal_clips_and_second_runs_cost_nothing(made: Path, evaluation: Path) -> None:
    sounds = sorted((made / "audio").iterdir())
    assert {path.suffix for path in sounds} == {".ogg"}
    assert len(sounds) == 8
    for path in sounds:
        wave, rate = audio_io.decode(path, ANY)
        assert wave.shape == (2, 44100)
        assert rate == 22050
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*/*")}
    html = (made / "index.html").read_bytes()
    assert report(str(evaluation)) == EXIT_OK
    changed = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == set(), "plots are drawn again, and are the same"
    assert (made / "index.html").read_bytes() == html


def test_flac_reports_keep_every_sample(evaluation: Path, tmp_path: Path) -> None:
    results = read_results(Folder.at(str(evaluation)))
    rows = read_clips(Folder.at(str(evaluation)), results)
    assert add_media(results, rows, Folder.at(str(tmp_path / "r")), "flac") == []
    for clip in pq.read_table(evaluation / CLIPS).to_pylist()[:8]:
        source = Path(clip["path"])
        copy = tmp_path / "r" / "audio" / f"{clip['sha256'][:20]}.flac"
        wave, rate = audio_io.decode(source, ANY)
        exact = source.read_bytes() if source.suffix == ".flac" else audio_io.encode_flac(wave, rate)
        assert copy.read_bytes() == exact


def test_vorbis_of_several_minutes_decodes_close_to_what_went_in() -> None:
    rate, t = 16000, np.arange(16000 * 150) / 16000
    wave = np.stack([0.5 * np.sin(2 * np.pi * 440 * t)]).astype(np.float32)
    data = encode_ogg(wave, rate)
    again, found = audio_io.decode(io.BytesIO(data), ANY)
    assert found == rate
    assert abs(again.shape[1] - wave.shape[1]) <= 1
    assert np.sqrt(np.mean((again[:, : wave.shape[1]] - wave[:, : again.shape[1]]) ** 2)) < 0.02
    assert len(data) < wave.nbytes / 20


def test_spectrograms_are_small_and_show_the_frequency() -> None:
    from PIL import Image

    from ttmray.audio.mel import MelConfig, slaney_filter_bank

    rate, t = 22050, np.arange(22050 * 10) / 22050
    data = plots.spectrogram(0.3 * np.sin(2 * np.pi * 1000 * t).astype(np.float32)[None], rate)
    image = np.asarray(Image.open(io.BytesIO(data)))
    bank = slaney_filter_bank(MelConfig())
    band = int(bank[:, round(1000 / 44100 * 2048)].argmax())
    assert image.shape == (128, plots.MEL_WIDTH)
    assert abs(int(image[:, 200].argmax()) - (127 - band)) <= 1
    assert len(data) < 8000
    assert plots.spectrogram(np.zeros((2, 60), np.float32), 44100)  # too short for one frame: padded


def test_plots_are_the_same_bytes_for_the_same_scores() -> None:
    values = np.random.default_rng(0).normal(size=20)
    first = plots.differences(values, "a$b$", "_b", "Reward", "light", (0, 1))
    assert first == plots.differences(values, "a$b$", "_b", "Reward", "light", (0, 1))
    clips = {"x": values, "one": values[:1], "none": values[:0]}
    means = {"x": (0.0, -0.1, 0.1), "one": (1.0, None, None)}
    assert plots.distributions(clips, means, "Reward", "dark") != first


def test_every_colour_of_text_and_systems_is_readable_on_page_and_card() -> None:
    css = pages.source("style.css")
    variables = {name: (light, dark) for name, light, dark in re.findall(r"--(\S+): light-dark\((\S+), (\S+)\)", css)}

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (0, 1):
        texts = [variables[name][theme] for name in ("ink", "quiet", "accent")] + [c[theme] for c in plots.PALETTE]
        for text in texts:
            for ground in (variables[name][theme] for name in ("page", "card")):
                high, low = sorted((luminance(text), luminance(ground)), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
        assert plots.INK[("light", "dark")[theme]] == tuple(variables[n][theme] for n in ("ink", "quiet", "line"))


def test_files_that_are_gone_or_changed_are_named_and_give_exit_code_3(
    tmp_path: Path, write_tones: WriteTones, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_tones(tmp_path)
    (tmp_path / "clips/0/0.wav").unlink()
    (tmp_path / "clips/1/2.flac").write_bytes((tmp_path / "clips/1/1.flac").read_bytes())
    assert report(str(out)) == EXIT_TOO_MANY_FAILURES
    said = capsys.readouterr().err
    assert "not shown: _base <b>$, prompt 0: " in said
    assert "is not the file that was scored" in said
    assert (out / "report/index.html").read_text().count("<audio") == 6


def _without_column(out: Path) -> None:
    pq.write_table(pq.read_table(out / CLIPS).drop_columns(["lufs"]), out / CLIPS)


def _edited(**changes: Any) -> Any:
    def edit(out: Path) -> None:
        (out / RESULTS).write_text(json.dumps(json.loads((out / RESULTS).read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / RESULTS).unlink(), "no evaluation"),
        (lambda out: (out / RESULTS).write_text("{"), "results.json"),
        (_edited(kind="corpus"), "kind"),
        (_edited(systems=[{"clips": 3}]), r"systems\.0\.name"),
        (_edited(systems=[]), "does not know"),
        (lambda out: (out / CLIPS).unlink(), "not found"),
        (lambda out: (out / CLIPS).write_bytes(b"PAR1 no"), "cannot be read"),
        (_without_column, "lacks the columns lufs"),
    ],
)
def test_damaged_evaluations_are_refused_with_the_place(
    tmp_path: Path, evaluation: Path, damage: Any, message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (RESULTS, CLIPS):
        (out / name).write_bytes((evaluation / name).read_bytes())
    damage(out)
    with pytest.raises(UserError, match=message):
        report(str(out))


def test_unknown_audio_formats_are_refused(evaluation: Path) -> None:
    with pytest.raises(UserError, match="flac or ogg"):
        report(str(evaluation), None, "mp3")  # type: ignore[arg-type]


def test_folders_of_something_else_are_left_alone(evaluation: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my homepage")
    with pytest.raises(UserError, match="something else"):
        report(str(evaluation), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_every_damaged_file_of_a_report_is_found_and_made_again(evaluation: Path, tmp_path: Path) -> None:
    """Sounds and pictures that are there are not made again: also where they are not what was written."""

    def again(folder: Path) -> int:
        return report(str(evaluation), str(folder))

    assert again(tmp_path / "it") == EXIT_OK
    files = json.loads((tmp_path / "it/_SUCCESS.json").read_text())["files"]
    kinds = {Path(name).suffix for name in files}
    assert {".ogg", ".png", ".svg", ".html", ".json", ".parquet"} <= kinds
    ways = {".ogg": "flipped", ".png": "cut", ".svg": "deleted", ".html": "empty", ".json": "deleted"}
    for suffix, way in ways.items():  # all at once: a report takes a while
        name = next(name for name in files if name.endswith(suffix))
        DAMAGES[way](tmp_path / "it" / name, tmp_path)
        assert any(line.startswith(f"{name}: ") for line in problems(Folder.at(str(tmp_path / "it")))), name
    assert again(tmp_path / "it") == EXIT_OK
    assert verify(str(tmp_path / "it")) == EXIT_OK
    assert json.loads((tmp_path / "it/_SUCCESS.json").read_text())["files"].keys() == files.keys()
