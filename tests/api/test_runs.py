"""`open_corpus`, `evaluate` and `train`: what lies in run folders, as tables, arrays and objects."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ttmray
from ttmray.config import load_config
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.errors import UserError
from ttmray.evaluation.config import EvaluateConfig
from ttmray.evaluation.evaluate import evaluate
from ttmray.storage import Folder
from ttmray.training.config import TrainConfig
from ttmray.training.data import DataConfig, SourceConfig, evaluation_batches, open_mixture
from ttmray.training.sft import train_sft


def test_the_index_is_that_of_the_run(corpus):
    table = ttmray.open_corpus(corpus).index
    rows = index.read_index(Folder.at(str(corpus)))
    assert list(table.columns) == rows.column_names
    assert table["key"].tolist() == rows["key"].to_pylist()
    assert table["reward_score"].tolist() == rows["reward_score"].to_pylist()
    assert "mean nothing" in table.attrs["note"]


def test_samples_and_items_are_what_training_reads(corpus):
    opened = ttmray.open_corpus(corpus)
    source = SourceConfig(corpus=str(corpus), split="train")
    (batch,) = evaluation_batches(open_mixture(DataConfig(sources=(source,))), batch=99)
    samples, data = list(opened.samples("train")), opened.dataset("train")
    assert [sample.key for sample in samples] == batch.keys == [data[i]["key"] for i in range(len(data))]
    (of_loader,) = DataLoader(data, batch_size=99)
    for name in ("mean", "std", "text", "text_c"):
        expected = getattr(batch.batch, name)
        assert torch.equal(of_loader[name], expected)
        np.testing.assert_array_equal(np.stack([getattr(sample, name) for sample in samples]), expected.numpy())
    assert torch.equal(of_loader["score"], batch.batch.score)
    assert [sample.row["instrumental_reward_score"] for sample in samples] == pytest.approx(of_loader["score"].tolist())
    assert all(sample.row["key"] == sample.key for sample in samples)


def test_iterating_gives_every_clip_that_is_ok(corpus):
    opened = ttmray.open_corpus(corpus)
    table = opened.index
    assert [sample.key for sample in opened] == table[table["status"] == "ok"]["key"].tolist()
    assert len(opened) == 24
    unscored = next(opened.samples(score=None))
    assert unscored.score is None


def test_a_dataset_goes_to_workers_and_refuses_positions_beyond_its_end(corpus, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("t000001_1\nt000002_0\n")
    data = pickle.loads(pickle.dumps(ttmray.open_corpus(corpus).dataset("train", keys=keys)))  # noqa: S301
    assert [data[0]["key"], data[-1]["key"]] == ["t000001_1", "t000002_0"]
    with pytest.raises(IndexError):
        data[2]


def test_tables_of_scores_stand_beside_the_index(corpus, tmp_path):
    from ttmray.corpus.scores import REWARDS, SCHEMA, TABLE

    run = Folder.at(str(tmp_path / "run"))
    for file in Folder.at(str(corpus)).files():
        run.write(file.name, Folder.at(str(corpus)).read(file.name))
    rows = index.read_index(run).select(["key", "shard"])
    for number, name in enumerate(REWARDS):
        rows = rows.append_column(name, [[float(number)] * rows.num_rows])
    run.write(f"scores/mine/{TABLE}", index.parquet_bytes(rows.cast(SCHEMA)))
    run.write("scores/mine/_SUCCESS.json", b'{"created": "2026-01-01T00:00:00+00:00", "rows": 1}')
    whole = ttmray.open_corpus(run.uri, scores="mine")
    assert whole.index[f"mine/{REWARDS[1]}"].unique().tolist() == [1.0]
    assert f"mine/{REWARDS[2]}" in whole.score_columns
    one = ttmray.open_corpus(run.uri, scores=["mine/reward_score"])
    assert list(one.index.columns)[-1] == "mine/reward_score"
    with pytest.raises(UserError, match="has no score column 'yours'"):
        ttmray.open_corpus(run.uri, scores="yours")


def test_songs_are_composed_once_and_become_the_corpus_of_the_command(tmp_path):
    songs = ttmray.compose(tmp_path / "songs", 2, seconds=5.2)
    first = sorted(Path(songs).glob("*.flac"))[0]
    before = first.stat().st_mtime_ns
    assert ttmray.compose(tmp_path / "songs", 2, seconds=5.2) == songs
    assert first.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds 2 other songs"):
        ttmray.compose(tmp_path / "songs", 3, seconds=5.2)
    fields = {"bundle": "debug", "splits": {"validation": 0, "test": 0}, "separation": {"scope": "none"}}
    made = ttmray.score_corpus(songs, output=tmp_path / "api", runtime={"workers": 0}, **fields)
    sets = [f"input={songs}", f"output={tmp_path}/cli", "splits.validation=0", "splits.test=0", "separation.scope=none"]
    runtime = ["runtime.runner=local", "runtime.workers=0", "bundle=debug"]
    assert score_corpus(load_config(CorpusConfig, None, [*sets, *runtime])) == 0
    assert made.index.equals(ttmray.open_corpus(tmp_path / "cli").index)
    assert made.index["caption"].str.len().min() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda corpus: ttmray.open_corpus("absent"), "absent is no corpus run"),
        (lambda corpus: ttmray.open_corpus(corpus).dataset("trian"), "there is no split 'trian'"),
        (lambda corpus: next(ttmray.open_corpus(corpus).samples(score="beauty")), "has no score column 'beauty'"),
        (lambda corpus: next(ttmray.open_corpus(corpus).samples("test")), "no ok clips of split test"),
    ],
)
def test_what_a_corpus_does_not_have_is_one_message(corpus, call, message):
    with pytest.raises(UserError, match=message):
        call(corpus)


def test_damaged_latents_are_one_message(corpus, tmp_path):
    run = Folder.at(str(tmp_path / "run"))
    for file in Folder.at(str(corpus)).files():
        run.write(file.name, Folder.at(str(corpus)).read(file.name))
    shard = sorted((tmp_path / "run/shards").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match="is damaged: clip t000000_0"):
        list(ttmray.open_corpus(run.uri))


def test_an_evaluation_is_that_of_the_command(studio, tmp_path):
    prompts = {"a": "a calm piano", "b": "driving drums"}
    for name, seed in (("x", 1), ("y", 2)):
        studio.generate(prompts, seed=seed, output=tmp_path / name, sampler={"steps": 1})
    (tmp_path / "prompts.csv").write_text("id,prompt\na,a calm piano\nb,driving drums\n")
    sets = [f"folders=[one={tmp_path}/x,{tmp_path}/y]", f"prompts={tmp_path}/prompts.csv", f"output={tmp_path}/out"]
    assert evaluate(load_config(EvaluateConfig, None, [*sets, "bundle=debug", "runtime.device=cpu"])) == 0
    folders = {"one": tmp_path / "x", "y": tmp_path / "y"}
    mine = ttmray.evaluate(folders, prompts, output=tmp_path / "mine", bundle="debug", runtime={"device": "cpu"})
    results = json.loads((tmp_path / "out/results.json").read_text())
    for row in mine.metrics.to_dict("records"):
        (system,) = [one for one in results["systems"] if one["name"] == row["system"]]
        assert row["value"] == system["metrics"][row["metric"]]["value"], row
    assert len(mine.metrics) == sum(len(system["metrics"]) for system in results["systems"])
    assert mine.clips["prompt_id"].tolist() == ["a", "b", "a", "b"]
    assert len(mine.comparisons) == len(results["comparisons"]) > 0
    assert "mean nothing" in mine._repr_html_()
    same = {"output": tmp_path / "mine", "bundle": "debug", "runtime": {"device": "cpu"}}
    again = ttmray.evaluate(folders, tmp_path / "prompts.csv", **same)
    assert again.metrics.equals(mine.metrics)


def test_an_evaluation_without_prompts_or_folders_is_one_message(tmp_path):
    with pytest.raises(UserError, match="needs prompts"):
        ttmray.evaluate(tmp_path)
    with pytest.raises(UserError, match="absent"):
        ttmray.evaluate([tmp_path / "absent"], "a harp", output=tmp_path / "out")
    with pytest.raises(UserError, match="texts is no setting"):
        ttmray.evaluate(tmp_path, "a harp", texts=["x"])


def test_a_training_is_that_of_the_command(corpus, tmp_path):
    fields = {"steps": 4, "batch": 2, "samples": {"every": 0}, "data": {"sources": [{"corpus": corpus}]}}
    fields |= {"runtime": {"log_every": 2, "device": "cpu", "tensorboard": False}, "validation": {"clips": 0}}
    before = torch.get_num_threads()
    run = ttmray.train("debug/stage1", output=tmp_path / "api", **fields)
    assert torch.get_num_threads() == before
    sets = [f"output={tmp_path}/cli", "steps=4", "batch=2", "samples.every=0", f"data.sources.0.corpus={corpus}"]
    sets += ["runtime.log_every=2", "runtime.device=cpu", "runtime.tensorboard=false", "validation.clips=0"]
    config = load_config(TrainConfig, "debug/stage1", sets)
    assert train_sft(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "cli/metrics.jsonl").read_text().splitlines()]
    assert run.metrics["loss"].tolist() == [line["loss"] for line in lines]
    files = [ttmray.TrainingRun(tmp_path / name).export(tmp_path / f"{name}.safetensors") for name in ("api", "cli")]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    longer = ttmray.train(config, output=tmp_path / "api", steps=6)
    assert longer.metrics["step"].tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (("debug/stage9",), {}, "no preset of that name"),
        (("debug/stage1", "stage9"), {}, "there is no stage 'stage9'"),
        (("debug/stage1",), {"stepps": 3}, "stepps: unknown field"),
        ((EvaluateConfig(folders=("x",), texts=("y",)),), {}, "EvaluateConfig is no config of a training"),
    ],
)
def test_a_training_that_cannot_be_is_one_message(arguments, fields, message):
    with pytest.raises(UserError, match=message):
        ttmray.train(*arguments, **fields)
