import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ttmray import pages
from ttmray.audio.io import write_audio
from ttmray.config import load_config
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.errors import UserError
from ttmray.evaluation.results import RESULTS
from ttmray.models.cross_load import CROSS_LOAD
from ttmray.models.weights import licences
from ttmray.ranker.job import RankerConfig, train_ranker
from ttmray.recipes.cards import dataset_card, model_card, write_card
from ttmray.training.config import TrainConfig
from ttmray.training.sft import train_sft

UPDATES = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished corpus of the debug bundle: 2 songs, and one file that is no audio."""
    folder = tmp_path_factory.mktemp("cards")
    (folder / "songs").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).normal(scale=0.1, size=(1, 6 * 44100)).astype(np.float32)
        write_audio(str(folder / f"songs/{i}.flac"), noise, 44100)
    (folder / "songs/no|audio.mp3").write_text("nothing\n" * 99)
    sets = ["bundle=debug", "runtime.runner=local", "runtime.workers=0", "segments.max_clips=1", "splits.validation=0"]
    sets += ["splits.test=0", "max_failures=1", f"input={folder / 'songs'}", f"output={folder / 'corpus'}"]
    assert score_corpus(load_config(CorpusConfig, None, sets)) == 0
    return folder / "corpus"


@pytest.fixture(scope="module")
def run(corpus: Path) -> Path:
    """A finished Stage 1 run on it."""
    output = corpus.parent / "my-model"
    sets = [f"output={output}", f"data.sources=[{{corpus: {corpus}}}]", "model.size=debug", f"steps={UPDATES}"]
    sets += ["batch=2", "validation.clips=0", "precision=fp32", "runtime.tensorboard=false", "runtime.threads=1"]
    assert train_sft(load_config(TrainConfig, None, sets)) == 0
    return output


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ranker of the debug bundle: 40 votes between 6 clips of noise, of which the louder one won."""
    folder = tmp_path_factory.mktemp("ranker")
    draw = np.random.default_rng(0)
    for i in range(6):
        wave = (0.01 * 2**i * draw.normal(size=(1, 22050))).astype(np.float32)
        write_audio(str(folder / f"{i}.flac"), wave.clip(-1, 1), 44100)
    rows = []
    for i in range(40):
        a, b = (int(one) for one in draw.choice(6, 2, replace=False))
        row = {"id": f"v{i}", "a": f"{a}.flac", "b": f"{b}.flac", "label": "ab"[a < b], "prompt": f"prompt {i % 4}"}
        rows.append(row | {"source": "my|club", "split": ("train", "train", "valid", "test")[i % 4]})
    (folder / "votes.json").write_text(json.dumps(rows))
    fields = {"sources": [{"name": "votes", "path": str(folder / "votes.json")}], "output": str(folder / "my-ranker")}
    fields |= {"split": {"by": "released"}, "resample": "pair", "variants": ["A1"], "seeds": 2, "bundle": "debug"}
    fields |= {"head": {"widths": [12, 6], "batch": 8, "max_epochs": 3}, "encoding": {"device": "cpu"}}
    assert train_ranker(RankerConfig.model_validate(fields | {"training": {"device": "cpu", "threads": 1}})) == 0
    return folder / "my-ranker"


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str, first: str) -> list[str]:
    """Cells of the table row that starts with `first`."""
    return next(line for line in card.splitlines() if line.startswith(f"| {first} |")).strip("| ").split(" | ")


def test_a_dataset_card_counts_what_the_corpus_holds_and_what_it_left_out(corpus: Path) -> None:
    card = dataset_card(str(corpus), name="Songs *of* mine")
    summary = json.loads((corpus / "_SUCCESS.json").read_text())["summary"]
    described = json.loads((corpus / "run.json").read_text())
    assert front(card)["license"] == "other"
    assert front(card)["size_categories"] == ["n<1K"]
    assert "# Songs \\*of\\* mine" in card
    assert cells(card, "clips")[1] == "2 of up to 10 s, from 3 tracks"
    assert cells(card, "run fingerprint")[1] == described["fingerprint"]
    assert cells(card, "failed") == ["failed", "decode", "not\\_audio", "1"]
    mean = summary["rewards"]["train"]["reward_score"]["mean"]
    assert f"| train | reward\\_score | 2 | {mean:+.3f} |" in card
    assert "scores and latents mean nothing" in card
    assert "debug: weights are drawn from a seed" in card
    assert str(corpus.parent) not in card


def test_a_model_card_says_what_was_trained_on_what_and_that_debug_models_mean_nothing(run: Path) -> None:
    card = model_card(str(run))
    described = json.loads((run / "run.json").read_text())
    assert "# my-model" in card
    assert front(card)["pipeline_tag"] == "text-to-audio"
    assert "model-index" not in front(card)
    assert cells(card, "updates")[1] == f"{UPDATES} of {UPDATES}"
    assert cells(card, "samples")[1] == f"{2 * UPDATES} (2 per update)"
    assert cells(card, "data fingerprint")[1] == described["identity"]["data"]
    assert cells(card, "corpus") == ["corpus", "bundle", "clips ok", "scores by"]
    assert cells(card, "corpus")[0] == "corpus"
    assert "| corpus | debug | 2 | debug/" in card
    assert card.count("mean nothing") == 2
    assert "It has not been evaluated" in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config == described["identity"]["config"]
    assert str(run.parent) not in card


def test_a_cross_load_and_what_it_left_of_the_score_stand_in_the_card(run: Path, tmp_path: Path) -> None:
    assert "cross-load" not in model_card(str(run))
    shutil.copytree(run, tmp_path / "run")
    forwards = {"v1": {"moved": 0.5, "kept": 1.0}, "v2": {"moved": 0.3, "kept": 0.031}}
    report = {"weights": "v1", "forward": "v2", "forced": False, "forwards": forwards}
    (tmp_path / "run" / CROSS_LOAD).write_text(json.dumps(report))
    said = cells(model_card(str(tmp_path / "run")), "cross-load")[1]
    assert said == "v1 weights in the v2 forward: 3% of the steering by the score was left before the first update"


def test_an_unfinished_run_is_called_unfinished(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    described = json.loads((run / "run.json").read_text())
    described["config"]["steps"] = 1000
    (tmp_path / "run.json").write_text(json.dumps(described))
    assert cells(model_card(str(tmp_path)), "updates")[1] == "2 of 1,000, NOT FINISHED"
    shutil.rmtree(tmp_path / "checkpoints")
    assert cells(model_card(str(tmp_path)), "updates")[1] == "0 of 1,000, NOT FINISHED"


def test_metrics_of_the_model_stand_with_interval_and_n_apart_from_the_papers(
    run: Path, tmp_path: Path, write_tones: Callable[[Path], Path]
) -> None:
    out = write_tones(tmp_path)
    with pytest.raises(UserError, match="2 systems"):
        model_card(str(run), evaluation=str(out))
    with pytest.raises(UserError, match="no system 'other'"):
        model_card(str(run), evaluation=str(out), system="other")
    card = model_card(str(run), evaluation=str(out), system="tuned")
    metric = json.loads((out / RESULTS).read_text())["systems"][1]["metrics"]["reward"]
    shown = f"| reward | {metric['value']:.4f} | {metric['low']:.4f} to {metric['high']:.4f} | 4 |"
    ours, papers = card.split("Published by others")
    assert shown in ours
    assert "| reward | 0.533 |" in papers
    assert "0.533" not in ours
    assert "- \\<few\\> prompts" in ours
    (index,) = front(card)["model-index"]
    values = {one["type"]: one["value"] for one in index["results"][0]["metrics"]}
    assert values["reward"] == pytest.approx(metric["value"], abs=1e-6)
    assert "It has not been evaluated" not in card


def test_a_rankers_card_says_how_often_each_head_ranks_as_voted(ranker: Path, tmp_path: Path) -> None:
    card = model_card(str(ranker))
    head, metrics = (json.loads((ranker / name).read_text()) for name in ("tunejury.json", "metrics.json"))
    assert "# my-ranker" in card
    assert cells(card, "published head")[1] == f"A1-seed{head['seed']}"
    assert cells(card, "sources of votes")[1] == "votes"
    assert cells(card, "pairs")[1] == "by released: 20 train, 10 validation, 10 test; 0 left out"
    assert list(metrics["heads"]) == ["A1-seed42", "A1-seed43", "A1-ensemble"]
    for name, one in metrics["heads"].items():
        for source, part in (("all", one["test"]), ("my\\|club", one["test"]["sources"]["my|club"])):
            low, high = part["interval"]
            inputs = one["inputs"].replace("_", "\\_")
            row = f"| {name} | {inputs} | {source} | 10 | {part['accuracy']:.4f} | {low:.4f} to {high:.4f} |"
            assert row in card
    assert card.count("mean nothing") == 2
    assert "debug: weights are drawn from a seed" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["variants"] == ["A1"]
    assert str(ranker.parent) not in card

    with pytest.raises(UserError, match="a ranker, which makes no clips"):
        model_card(str(ranker), evaluation=str(tmp_path))
    (tmp_path / "run.json").write_bytes((ranker / "run.json").read_bytes())
    with pytest.raises(UserError, match="not finished"):
        model_card(str(tmp_path))


def test_licences_of_the_models_that_measured_stand_apart_from_those_that_trained(
    run: Path, tmp_path: Path, write_tones: Callable[[Path], Path]
) -> None:
    out = write_tones(tmp_path)
    assert "numbers of the evaluation" not in model_card(str(run), evaluation=str(out), system="tuned")
    results = json.loads((out / RESULTS).read_text())
    (out / RESULTS).write_text(json.dumps(results | {"license_notes": licences("paper")}))
    card = model_card(str(run), evaluation=str(out), system="tuned").replace("\\_", "_")
    trained, measured = card.split("## Licences")[1].split("Models that made the numbers of the evaluation:")
    assert "debug: weights are drawn from a seed" in trained
    assert all(f"- {line}\n" in measured for line in licences("paper"))


def test_licences_of_released_bundles_are_listed_and_unknown_ones_said(corpus: Path, tmp_path: Path) -> None:
    for name in ("run.json", "_SUCCESS.json"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    described = json.loads((corpus / "run.json").read_text())
    for bundle, expected in (
        ("paper", [f"- paper: {line}" for line in licences("paper")]),
        ("mine", ["- mine: unkno"]),
    ):
        described["config"]["bundle"] = bundle
        (tmp_path / "run.json").write_text(json.dumps(described))
        card = dataset_card(str(tmp_path), license="cc-by-nc-4.0").replace("\\_", "_")
        assert front(card)["license"] == "cc-by-nc-4.0"
        assert all(line in card for line in expected)
        assert "mean nothing" not in card


def test_other_folders_and_unfinished_corpora_have_no_card(corpus: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        model_card(str(tmp_path))
    with pytest.raises(UserError, match="kind 'corpus', no training run"):
        model_card(str(corpus))
    with pytest.raises(UserError, match="kind 'sft', no corpus run"):
        dataset_card(str(run))
    (tmp_path / "run.json").write_bytes((corpus / "run.json").read_bytes())
    with pytest.raises(UserError, match="not finished"):
        dataset_card(str(tmp_path))
    (tmp_path / "run.json").write_text("[1")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        dataset_card(str(tmp_path))


def test_a_card_that_was_edited_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    assert write_card("dataset", str(corpus), out=str(out)) == 0
    assert out.read_text() == dataset_card(str(corpus))
    out.write_text("edited")
    with pytest.raises(UserError, match="exists"):
        write_card("dataset", str(corpus), out=str(out))
    assert out.read_text() == "edited"


def test_configs_cannot_end_their_code_block_and_texts_stay_texts() -> None:
    assert pages.fenced({"prompt": "``` <script>"}).startswith("````yaml\n")
    assert pages.text("a|b\n<i> [x](y)") == "a\\|b \\<i\\> \\[x\\](y)"
