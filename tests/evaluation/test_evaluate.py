"""The evaluation job: what it writes, how it goes on, and what it says about bad input."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from damages import DAMAGES, out_of_the_way
from safetensors.numpy import load_file
from scipy import stats

from ttmray.cli import main
from ttmray.config import load_config
from ttmray.errors import UserError
from ttmray.evaluation import measure, metrics
from ttmray.evaluation.compare import compare, show, system_table
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.evaluate import evaluate
from ttmray.evaluation.fad import _Samples, fad
from ttmray.evaluation.measure import MeasureConfig
from ttmray.evaluation.metrics import kad
from ttmray.evaluation.reference import build_reference, load_reference
from ttmray.evaluation.results import read_clips, read_results
from ttmray.evaluation.score import read_mono
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import Scorer
from ttmray.statistics import crossed
from ttmray.storage import Folder
from ttmray.synth.measures import clip_quality
from ttmray.synth.regularity import rhythm, tuning

PROMPTS = {"a": "a calm piano", "b": "driving drums", "c": "a choir"}
RUNTIME = MeasureConfig(device="cpu", threads=1)


def music(path: Path, seed: int, seconds: float = 6.0, rate: int = 44100) -> None:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * t) * (np.sin(2 * np.pi * rng.uniform(1, 6) * t) > 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (tone + rng.normal(0, rng.uniform(0.005, 0.1), len(t))).astype(np.float32), rate)


def make(root: Path, *sets: str, output: str = "out") -> EvaluateConfig:
    usual = (f"folders=[{root}/one,{root}/two]", f"prompts={root}/prompts.csv", f"output={root}/{output}")
    fixed = ("bundle=debug", "runtime.device=cpu", "runtime.threads=1", "resamples=20", f"references={root}/store")
    return load_config(EvaluateConfig, None, [*usual, *fixed, *sets])


def rows_of(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "clips.parquet").to_pylist()


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems of three clips, a reference of three, and their evaluation in `out`. Do not change it: see `root`."""
    root = tmp_path_factory.mktemp("finished")
    for s, system in enumerate(("one", "two")):
        for i, name in enumerate(PROMPTS):
            music(root / system / f"{name}.wav", 10 * s + i)
    for i in range(3):
        music(root / "real" / f"r{i}.flac", 50 + i)
    with open(root / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *PROMPTS.items()])
    assert build_reference("real", f"{root}/real", store=f"{root}/store", runtime=RUNTIME, bundle="debug") == 0
    assert evaluate(make(root, "reference=real", "training=real")) == 0
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the inputs and the reference, without the evaluation."""
    return Path(shutil.copytree(finished, tmp_path / "root", ignore=shutil.ignore_patterns("out")))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from here on."""
    names: list[str] = []
    original = measure._decoded

    def note(path: str, clip_s: float, middle: bool) -> Any:
        names.append(path.rpartition("/")[2])
        return original(path, clip_s, middle)

    monkeypatch.setattr(measure, "_decoded", note)
    return names


def test_the_terminal_shows_a_row_per_metric_and_system_with_n_in_100_columns(finished, capsys):
    results = results_of(finished / "out")
    show(*system_table(results["systems"]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    fad_of_two = results["systems"][1]["metrics"]["fad"]["value"]
    assert ["fad", "two", f"{fad_of_two:.4f}"] in [row[:3] for row in rows]
    assert next(row[-1] for row in rows if row[:2] == ["fad", "two"]) == "3 / 3"
    assert next(row[-1] for row in rows if row[:2] == ["reward", "one"]) == "3"
    assert len(rows) == sum(len(system["metrics"]) for system in results["systems"])


def test_a_clip_has_the_numbers_that_the_score_command_gives_its_file(finished):
    bundle = open_bundle("debug")
    scorer = Scorer(bundle.load(Scorer.roles, LoadOptions(device="cpu")), bundle.protocol("empty"))
    claps = load_file(finished / "out/embeddings.safetensors")["clap"]
    rows = rows_of(finished / "out")
    assert [(row["system"], row["prompt_id"], row["sample"]) for row in rows] == [
        (system, name, 0) for system in ("one", "two") for name in PROMPTS
    ]
    for row, clap in zip(rows, claps, strict=True):
        wave, facts = read_mono(row["path"])
        made = scorer.embed([wave])
        text = scorer.texts([PROMPTS[row["prompt_id"]]])
        np.testing.assert_array_equal(clap, made.clap[0])
        assert row["reward"] == float(scorer.rewards(made, text)[0])
        assert row["clap_score"] == float(made.clap[0] @ text[0])
        assert {name: row[name] for name in facts} == facts
        assert 0 <= row["silence"] <= 1
        assert (row["status"], row["reason"], row["prompt"]) == ("ok", "", PROMPTS[row["prompt_id"]])


def test_metrics_are_those_of_the_stored_embeddings_with_n_protocol_and_interval(finished):
    results = results_of(finished / "out")
    claps = load_file(finished / "out/embeddings.safetensors")["clap"]
    protocol = results["embedding_protocol"]
    reference = load_reference("real", f"{finished}/store", protocol)
    for i, system in enumerate(results["systems"]):
        metrics, mine = system["metrics"], claps[3 * i : 3 * i + 3]
        assert (system["clips"], system["failed"], system["prompts"]) == (3, 0, 3)
        assert metrics["fad"]["value"] == fad(mine, reference.rows(), protocol=protocol, resamples=0).value
        assert metrics["kad"]["value"] == kad(mine, reference.rows(), protocol=protocol, resamples=0).value
        assert (metrics["fad"]["n_generated"], metrics["fad"]["n_reference"]) == (3, 3)
        assert metrics["fad"]["protocol"] == protocol
        clips = [row for row in rows_of(finished / "out") if row["system"] == system["name"]]
        for name, column in (("reward", "reward"), ("lufs", "lufs"), ("true_peak", "true_peak_db")):
            assert metrics[name]["value"] == pytest.approx(np.mean([row[column] for row in clips]))
            assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
        assert 0 <= metrics["near_duplicates"]["value"] <= 1
    warnings = " ".join(results["warnings"])
    assert "one, two: fad: 3 generated clips are fewer than 512 dimensions: FAD is expected to be too high" in warnings
    assert "one, two: 3 clips are too few for fad_inf, which needs 8" in warnings


def test_comparisons_are_the_paired_tests_of_the_clips(finished):
    rows = rows_of(finished / "out")
    cells = results_of(finished / "out")["comparisons"]
    assert [(cell["metric"], cell["a"], cell["b"]) for cell in cells] == [
        ("clap_score", "one", "two"),
        ("reward", "one", "two"),
    ]
    for cell in cells:
        a, b = ([row[cell["metric"]] for row in rows if row["system"] == name] for name in ("one", "two"))
        assert cell["t"] == pytest.approx(stats.ttest_rel(a, b).statistic, rel=1e-9)
        assert cell["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_a_reference_that_the_model_was_trained_on_is_a_leak(finished):
    leaks = results_of(finished / "out")["leaks"]
    assert leaks["by_id"] == ["r0", "r1", "r2"]
    assert {(a, b) for a, b, cosine in leaks["by_embedding"] if cosine > 0.999999} >= {("r0", "r0")}
    assert any("shares 3 tracks with the training split" in text for text in results_of(finished / "out")["warnings"])


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "of another run"])
@pytest.mark.parametrize("name", ["run.json", "_SUCCESS.json", "results.json", "clips.parquet", "parts/*"])
def test_whatever_happens_to_a_file_the_same_command_makes_it_again(root, finished, name, damage, tmp_path):
    assert evaluate(make(root)) == 0
    assert main(["verify", str(root / "out")]) == 0
    rows, file = rows_of(root / "out"), sorted((root / "out").glob(name))[0]
    DAMAGES[damage](file, finished)
    assert main(["verify", str(root / "out")]) == 2
    try:
        code = evaluate(make(root))
    except UserError as error:
        if damage == "a folder" and ("move" in error.hint.lower() or "Delete it" in error.hint):
            out_of_the_way(file, tmp_path / "mine")
        elif "Delete it" in error.hint:
            file.unlink()
        code = evaluate(make(root))  # raises again where there was no other way out
    assert code == 0
    assert main(["verify", str(root / "out")]) == 0
    assert rows_of(root / "out") == rows


def test_readers_of_the_results_understand_them(finished):
    folder = Folder.at(str(finished / "out"))
    results = read_results(folder)
    assert len(read_clips(folder, results)) == 6
    assert (finished / "out/_SUCCESS.json").exists()
    assert compare([str(finished / "out")], format="csv", out=str(finished / "table.csv")) == 0
    assert "reward,one,two,3" in (finished / "table.csv").read_text()


def test_the_same_command_again_decodes_nothing_and_says_the_same(finished, tmp_path, decoded):
    out = Path(shutil.copytree(finished / "out", tmp_path / "out"))
    assert evaluate(make(finished, "reference=real", "training=real", f"output={out}")) == 0
    assert decoded == []
    changing = ("created", "timing")
    old, new = (
        {k: v for k, v in results_of(folder).items() if k not in changing} for folder in (finished / "out", out)
    )
    assert old == new
    assert rows_of(out) == rows_of(finished / "out")


def test_a_killed_evaluation_goes_on_and_only_what_changed_is_measured(root, decoded, monkeypatch):
    monkeypatch.setattr(measure, "CPU_PART", 2)
    original, calls = measure._write_part, iter(range(9))

    def die(*arguments: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(measure, "_write_part", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(make(root))
    assert not (root / "out/results.json").exists()
    monkeypatch.setattr(measure, "_write_part", original)
    decoded.clear()
    assert evaluate(make(root)) == 0
    assert sorted(decoded) == ["b.wav", "c.wav"]  # of the part that was lost
    decoded.clear()
    music(root / "two/a.wav", 99)
    assert evaluate(make(root)) == 0
    assert decoded == ["a.wav"]
    decoded.clear()
    shutil.move(root / "one", root / "uno")
    assert evaluate(make(root, f"folders=[{root}/uno,{root}/two]")) == 0
    assert decoded == []  # by content, not by name
    assert evaluate(make(root, f"folders=[{root}/uno,{root}/two]", "reward_text=caption")) == 0
    assert len(decoded) == 6  # another protocol


def test_a_damaged_part_is_named(root):
    assert evaluate(make(root)) == 0
    part = next((root / "out/parts").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=part.name):
        evaluate(make(root))


def test_a_clip_that_breaks_a_model_in_an_unforeseen_way_is_one_failed_row(root, finished, monkeypatch):
    target, _ = read_mono(str(root / "one" / f"{next(iter(PROMPTS))}.wav"))
    plain = Scorer.embed

    def embed(self: Scorer, waves: Any) -> Any:
        if any(len(wave) == len(target) and np.allclose(wave, target, atol=1e-4) for wave in waves):
            raise TypeError("unexpected")
        return plain(self, waves)

    monkeypatch.setattr(Scorer, "embed", embed)
    assert evaluate(make(root, "reference=real", "training=real", "max_failures=1")) == 0
    first, *others = rows_of(root / "out")
    assert (first["status"], first["reason"], first["message"]) == ("failed", "error", "TypeError: unexpected")
    assert [row["reward"] for row in others] == [row["reward"] for row in rows_of(finished / "out")[1:]]


def test_bad_clips_are_rows_with_a_reason_and_count_as_failures(root):
    (root / "one/a.wav").write_bytes(b"no music")
    (root / "one/b.wav").unlink()
    sine = 0.3 * np.sin(np.arange(44100 * 6) / 30)
    soundfile.write(root / "two/c.wav", np.stack([sine, -sine], axis=1), 44100)  # the mean of the channels is silent
    assert evaluate(make(root, "max_failures=2")) == 3
    assert evaluate(make(root, "max_failures=3")) == 0
    rows = {(row["system"], row["prompt_id"]): row for row in rows_of(root / "out")}
    assert [rows[key]["reason"] for key in (("one", "a"), ("one", "b"), ("two", "c"))] == [
        "not_audio",
        "missing",
        "silent",
    ]
    assert rows["one", "b"]["path"] is None
    claps = load_file(root / "out/embeddings.safetensors")["clap"]
    bad = [row["status"] != "ok" for row in rows_of(root / "out")]
    assert np.isnan(claps).all(axis=1).tolist() == bad
    results = results_of(root / "out")
    assert [(s["clips"], s["failed"], s["prompts"]) for s in results["systems"]] == [(1, 2, 1), (2, 1, 2)]
    warnings = " ".join(results["warnings"])
    assert "one: 2 clips are in no metric (1 not_audio, 1 missing)" in warnings
    assert "0 common prompts say nothing" in warnings
    assert "diversity" not in results["systems"][0]["metrics"]  # of one clip
    assert "one: 1 clips are too few for diversity" in warnings


def test_copies_low_rates_and_odd_lengths_are_said(root):
    shutil.copy(root / "one/a.wav", root / "one/b.wav")
    for name in PROMPTS:
        (root / f"two/{name}.wav").unlink()
        music(root / f"two/{name}.mp3", 5, seconds=12.0, rate=8000)
    assert evaluate(make(root)) == 0
    warnings = " ".join(results_of(root / "out")["warnings"])
    assert "one: a.wav = one: b.wav" in warnings
    assert "two: a.mp3 = two: b.mp3 = two: c.mp3" in warnings
    assert "two: 3 files have a sample rate of 8000 Hz and hold nothing above 4 kHz" in warnings
    assert "two: 3 clips are longer than 10 s" in warnings


def test_samples_of_a_prompt_are_averaged_before_prompts_are(root):
    for name in PROMPTS:
        shutil.move(root / f"one/{name}.wav", root / f"one/{name}_s42.wav")
    music(root / "one/a_s55.wav", 77)
    assert evaluate(make(root)) == 0
    rows = [row for row in rows_of(root / "out") if row["system"] == "one"]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [("a", 42), ("a", 55), ("b", 42), ("c", 42)]
    reward = [row["reward"] for row in rows]
    metric = results_of(root / "out")["systems"][0]["metrics"]["reward"]
    assert metric["value"] == pytest.approx(((reward[0] + reward[1]) / 2 + reward[2] + reward[3]) / 3)
    assert (metric["n_generated"], metric["details"]["prompts"]) == (4, 3)
    (cell,) = [cell for cell in results_of(root / "out")["comparisons"] if cell["metric"] == "reward"]
    assert (cell["n"], cell["mean_a"]) == (3, metric["value"])


def test_grave_warnings_come_first_and_what_is_said_of_several_systems_is_said_once(finished, root, capsys):
    results = read_results(Folder.at(str(finished / "out")))
    assert results.grave[0].startswith("the reference shares 3 tracks with the training split by id")
    assert results.grave[1].startswith("one, two: 3 prompts are too few to tell systems apart")
    assert results.warnings[:2] == results.grave
    assert len(results.warnings) == len(set(results.warnings))
    assert sum("one, two: fad: 3 generated clips are fewer" in text for text in results.warnings) == 1
    assert not any(text.startswith("two: fad: ") for text in results.warnings)
    assert evaluate(make(root)) == 0
    shown = capsys.readouterr().out
    assert shown.index("WARNING: one, two: 3 prompts are too few") < shown.index("reward")
    assert "FAD and KAD are left out" in shown
    assert "ttmray reference build" in shown
    assert "95 % CI: " in shown
    assert "clap_score, reward, lufs, true_peak" in shown.partition("95 % CI: ")[2].partition(": t over prompts")[0]


def test_the_run_folder_says_what_the_bundle_of_its_last_evaluation_is(finished, root):
    described = json.loads((finished / "out/run.json").read_text())
    assert "mean nothing" in described["note"]
    shutil.copytree(finished / "out", root / "out")
    (root / "out/run.json").write_text(json.dumps(described | {"note": "of another bundle"}))
    assert evaluate(make(root, "reference=real", "training=real")) == 0
    assert json.loads((root / "out/run.json").read_text()) == described


def test_nothing_is_marked_where_the_models_are_untrained(finished, tmp_path, capsys):
    results = read_results(Folder.at(str(finished / "out")))
    assert results.meaningless
    assert not any(cell.significant for cell in results.comparisons)
    for format, name in (("markdown", "pairs.md"), ("latex", "pairs.tex"), ("csv", "pairs.csv")):
        assert main(["compare", str(finished / "out"), "--format", format, "--out", str(tmp_path / name)]) == 0
        text = (tmp_path / name).read_text()
        assert text.count("these scores are of untrained models and mean nothing") == len(results.comparisons)
        assert " * " not in text
    assert main(["compare", str(finished / "out"), "--alpha", "1"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is marked" in shown
    assert "*" not in shown


def test_crossed_seeds_widen_intervals_by_what_the_samples_of_all_prompts_share(root):
    for i, name in enumerate(PROMPTS):
        (root / f"one/{name}.wav").unlink()
        music(root / f"one/{name}_s1.wav", i)
        music(root / f"one/{name}_s2.wav", 3 + i, seconds=5)
        audio, rate = soundfile.read(root / f"one/{name}_s2.wav")
        soundfile.write(root / f"one/{name}_s2.wav", 0.1 * audio, rate)  # the second seed is quiet, on all prompts
    alone = f"folders=[{root}/one]"
    found = {}
    for seeds in ("nested", "crossed"):
        assert evaluate(make(root, alone, f"seeds={seeds}")) == 0
        found[seeds] = results_of(root / "out")["systems"][0]["metrics"]
    rows = rows_of(root / "out")
    for metric, column in (("reward", "reward"), ("lufs", "lufs")):
        table = np.array([row[column] for row in rows]).reshape(3, 2)
        both = crossed(table)
        means = table.mean(axis=1)
        half = stats.t.ppf(0.975, 2) * means.std(ddof=1) / np.sqrt(3)
        ends = {"nested": (table.mean() - half, table.mean() + half), "crossed": (both.low, both.high)}
        for seeds, how in (("nested", "t over prompts"), ("crossed", "t over prompts and seeds")):
            got = found[seeds][metric]
            assert (got["value"], got["low"], got["high"]) == pytest.approx((table.mean(), *ends[seeds]), rel=1e-12)
            assert got["interval"] == how
    width = {seeds: metrics["lufs"]["high"] - metrics["lufs"]["low"] for seeds, metrics in found.items()}
    assert width["crossed"] > width["nested"] + 10
    (root / "one/b_s2.wav").unlink()
    assert evaluate(make(root, alone, "seeds=crossed")) == 0
    results = results_of(root / "out")
    assert results["systems"][0]["metrics"]["lufs"]["low"] is None
    assert any("one: lufs: no interval: some samples of some prompts" in text for text in results["warnings"])


def test_what_metrics_and_systems_have_in_common_is_computed_once(root, monkeypatch):
    for i in range(8):
        music(root / f"many/p{i}.wav", i)
    for i in range(2):
        shutil.copy(root / f"many/p{i}.wav", root / f"one/p{i}.wav")
    with open(root / "many.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *((f"p{i}", "a tone") for i in range(8))])
    distances: list[int] = []
    kernels: list[tuple[int, int]] = []
    of_rows, of_pairs = _Samples.distance, metrics._squared_distances

    def note_rows(self: Any, rows: np.ndarray) -> float:
        distances.append(len(rows))
        return of_rows(self, rows)

    def note_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        kernels.append((len(a), len(b)))
        return of_pairs(a, b)

    monkeypatch.setattr(_Samples, "distance", note_rows)
    monkeypatch.setattr(metrics, "_squared_distances", note_pairs)
    sets = (f"folders=[{root}/many,{root}/one]", f"prompts={root}/many.csv", "reference=real", "max_failures=6")
    assert evaluate(make(root, *sets)) == 0
    assert distances.count(4) == 20 + 20  # half-samples, and subsamples of FAD-inf
    assert sorted(kernels) == [(2, 2), (2, 3), (3, 3), (3, 3), (8, 3), (8, 8)]  # (3, 3): bandwidth, and kernel


def test_ccs_is_one_more_metric_of_the_table(root, monkeypatch):
    asked = []

    def heard(clips: Any, config: Any, output: Folder) -> list[tuple[float | None, str]]:
        asked.extend(clips)
        return [(i / 10, "") if i else (None, "judge: no answer") for i in range(len(clips))]

    monkeypatch.setattr("ttmray.evaluation.evaluate.judge", heard)  # the network edge; see test_judge
    assert evaluate(make(root, "judge={endpoint: http://localhost:1/v1, model: ears}", "max_failures=1")) == 0
    assert asked[0] == ("a", PROMPTS["a"], f"{root}/one/a.wav")
    rows = rows_of(root / "out")
    assert [row["ccs"] for row in rows] == [None, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert rows[0]["message"] == "judge: no answer"
    results = results_of(root / "out")
    assert results["systems"][1]["metrics"]["ccs"]["value"] == pytest.approx(0.4)
    assert results["systems"][1]["metrics"]["ccs"]["protocol"].startswith("ccs-ears-")
    assert [(c["metric"], c["n"]) for c in results["comparisons"]] == [("clap_score", 3), ("reward", 3), ("ccs", 2)]


def test_a_judge_that_answers_nothing_is_a_failure_of_every_clip(root, server, capsys):
    server.reply = lambda question, audio: (200, "no idea") if audio else server.hears_the_piano(question, audio)
    asked = f"judge={{endpoint: {server.url}, model: ears, attempts: 1}}"
    assert evaluate(make(root, asked)) == 3
    warnings = " ".join(results_of(root / "out")["warnings"])
    assert "one, two: 3 of 3 clips have no CCS (judge: no usable answer" in warnings
    assert "6 clips failed, 0 are allowed" in capsys.readouterr().out
    server.reply = server.hears_the_piano
    assert evaluate(make(root, asked)) == 0
    assert "no CCS" not in " ".join(results_of(root / "out")["warnings"])


def test_a_reference_of_song_describer_files_leaks_by_id_into_a_corpus_of_jamendo(root):
    names = {"sdd": [f"{i}.2min.mp3" for i in (1004034, 1004035, 1004036)], "jamendo": ["1004034.mp3", "9.mp3"]}
    names["others"] = ["song-a.mp3", "song-b.mp3"]
    for i, (folder, files) in enumerate(names.items()):
        for k, file in enumerate(files):
            music(root / folder / file, 100 + 10 * i + k)
        assert build_reference(folder, f"{root}/{folder}", store=f"{root}/store", runtime=RUNTIME, bundle="debug") == 0
    assert evaluate(make(root, "reference=sdd", "training=jamendo")) == 0
    results = results_of(root / "out")
    assert (results["leaks"]["by_id"], results["leaks"]["ids_alike"]) == (["1004034"], True)
    assert any("shares 1 tracks with the training split by id" in text for text in results["warnings"])
    assert evaluate(make(root, "reference=sdd", "training=others")) == 0
    results = results_of(root / "out")
    assert (results["leaks"]["by_id"], results["leaks"]["ids_alike"]) == ([], False)
    assert any("the check by id says nothing" in text for text in results["warnings"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("bundle=debug-wide", "reference=real"), "the reference real was made under debug/"),
        (("reference=sdd",), "reference sdd: there is none"),
        (("baseline=three",), "no system 'three'"),
        (("bundle=loud",), "no bundle 'loud'"),
        (("seeds=crossed",), "seeds: one has one sample per prompt"),
        (("folders=[nowhere]",), "no audio files"),
        (("prompts=nowhere.csv",), "not found"),
        (("judge={endpoint: http://localhost:1/v1, model: m, concepts: nowhere.csv}",), "nowhere.csv"),
    ],
)
def test_wrong_input_is_refused_before_any_model_is_loaded(root, monkeypatch, sets, message):
    monkeypatch.setattr(measure._Measurer, "__init__", None)
    with pytest.raises(UserError, match=message):
        evaluate(make(root, *sets))
    assert not (root / "out").exists()


def test_configs_need_prompts_once(root):
    with pytest.raises(UserError, match="needs prompts"):
        load_config(EvaluateConfig, None, [f"folders=[{root}/one]"])
    with pytest.raises(UserError, match="needs prompts"):
        make(root, "texts=[a piano]")


def test_a_folder_that_holds_something_else_is_not_written_to(root):
    with pytest.raises(UserError, match="is no evaluation run"):
        evaluate(make(root, output="real"))
    (root / "out").mkdir()
    (root / "out/run.json").write_text('{"kind": "generate"}')
    with pytest.raises(UserError, match="describes no evaluation run"):
        evaluate(make(root))


def test_the_two_published_systems_get_a_full_evaluation(data_dir, tmp_path):
    with open(data_dir / "clips/clips.csv", newline="") as file:
        published = list(csv.DictReader(file))
    with open(tmp_path / "prompts.csv", "w", newline="") as file:
        rows = [(row["prompt_id"], row["caption"]) for row in published if row["system"] == "sub1"]
        csv.writer(file).writerows([("id", "prompt"), *rows])
    store = str(tmp_path / "store")
    assert build_reference("tracks", str(data_dir / "tracks"), store=store, runtime=RUNTIME, bundle="debug") == 0
    folders = f"folders=[{data_dir}/clips/baseline,{data_dir}/clips/sub1]"
    assert evaluate(make(tmp_path, folders, "reference=tracks", "baseline=baseline")) == 0
    results = results_of(tmp_path / "out")
    assert [(system["name"], system["clips"], system["prompts"]) for system in results["systems"]] == [
        ("baseline", 24, 24),
        ("sub1", 24, 24),
    ]
    metrics = ["fad", "fad_inf", "kad", "diversity", "vendi", "clap_score", "reward", "lufs", "true_peak", "silence"]
    for system in results["systems"]:
        assert list(system["metrics"]) == metrics
        assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in system["metrics"].values())
    assert [(c["a"], c["b"], c["n"]) for c in results["comparisons"]] == [("sub1", "baseline", 24)] * 2
    for row in rows_of(tmp_path / "out"):
        assert f"{row['system']}/{int(row['prompt_id']):02d}.flac" in row["path"]


def test_everything_may_lie_in_a_bucket(finished, bucket, decoded):
    folder = Folder.at(f"{bucket}/in")
    for name in ("one", "two", "real"):
        for path in (finished / name).iterdir():
            folder.write(f"{name}/{path.name}", path.read_bytes())
    folder.write("prompts.csv", (finished / "prompts.csv").read_bytes())
    assert build_reference("real", f"{folder}/real", store=f"{folder}/store", runtime=RUNTIME, bundle="debug") == 0
    sets = (f"folders=[{folder}/one,{folder}/two]", f"prompts={folder}/prompts.csv", f"references={folder}/store")
    config = make(finished, *sets, f"output={bucket}/out", "reference=real")
    assert evaluate(config) == 0
    assert len(decoded) == 9
    here, there = (
        json.loads(one.read("results.json")) for one in (Folder.at(f"{finished}/out"), Folder(f"{bucket}/out"))
    )
    for ours, theirs in zip(here["systems"], there["systems"], strict=True):
        assert ours["metrics"]["fad"] == theirs["metrics"]["fad"]
        assert ours["metrics"]["reward"] == theirs["metrics"]["reward"]
    assert evaluate(config) == 0
    assert len(decoded) == 9


@pytest.mark.slow
def test_ray_actors_give_the_same_numbers_as_this_process(root, finished):
    runtime = ("runtime.runner=ray", "runtime.workers=2")
    assert evaluate(make(root, "reference=real", "training=real", *runtime)) == 0
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "path"} for row in rows_of(folder / "out")]
        for folder in (root, finished)
    )
    assert ours == theirs


def test_what_is_asked_of_the_audio_of_clips_stands_in_every_result(root, capsys):
    asked = "clip_metrics=[small_world,rhythm,tuning,vocals]"
    assert evaluate(make(root, asked, "parent=one", "reference=real")) == 0
    rows, results = rows_of(root / "out"), results_of(root / "out")
    wave, _ = soundfile.read(root / "one/a.wav", dtype="float32", always_2d=True)
    padded = np.zeros((1, 441_000), np.float32)
    padded[:, : len(wave)] = wave.T
    for name, value in (clip_quality(padded) | rhythm(padded) | tuning(padded)).items():
        assert rows[0][name] == pytest.approx(value, rel=1e-5, abs=1e-5)
    assert rows[0]["vocal_ratio"] >= 0
    one, two = (system["metrics"] for system in results["systems"])
    assert one["estimated_quality"]["value"] == pytest.approx(np.mean([row["estimated_quality"] for row in rows[:3]]))
    assert one["estimated_quality"]["protocol"].startswith("small_world@")
    assert "reward" not in one["tuning_deviation"]["protocol"]
    assert {cell["metric"] for cell in results["comparisons"]} >= {"reward", "estimated_quality"}
    assert "parent_distance" not in one
    claps = load_file(root / "out/embeddings.safetensors")["clap"].astype(float)
    assert two["parent_distance"]["value"] == pytest.approx(1 - (claps[:3] * claps[3:]).sum(axis=1).mean(), abs=1e-5)
    assert two["parent_fad"]["n_reference"] == 3
    read = read_clips(Folder(str(root / "out")), read_results(Folder(str(root / "out"))))
    assert read[0]["estimated_quality"] == rows[0]["estimated_quality"]
    capsys.readouterr()
    evaluate(make(root, asked, "parent=one", "reference=real"))
    assert "nothing to measure: all 6 clips are done" in capsys.readouterr().out
    compare([str(root / "out")], format="csv")
    assert "estimated_quality" in capsys.readouterr().out
    evaluate(make(root, "reference=real"))
    assert "estimated_quality" not in rows_of(root / "out")[0]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("clip_metrics=[quality]",), "there is no 'quality'"),
        (("clip_metrics=['math:nothing']",), "cannot be imported"),
        (("parent=three",), "there is no system 'three'"),
    ],
)
def test_clip_metrics_and_parents_that_are_not_there_are_refused(finished, sets, message):
    with pytest.raises(UserError, match=message):
        evaluate(make(finished, *sets, output="refused"))
    assert not (finished / "refused").exists()
