"""A pool is a corpus of generated clips: what it holds, who may make it, and what it refuses."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from synthetic_corpus import write_random_corpus

from ttmray.config import load_config
from ttmray.corpus import index, pipeline
from ttmray.corpus.guard import MAX_ATTEMPTS
from ttmray.corpus.pipeline import StageWorker, run_alone
from ttmray.corpus.shards import read_samples
from ttmray.corpus.unit import Unit
from ttmray.corpus.upgrade import upgrade
from ttmray.corpus.verify import problems
from ttmray.errors import UserError
from ttmray.generation import similar
from ttmray.generation.filter import read_pool
from ttmray.generation.pool import choose_prompts, generate_pool, plan_pool
from ttmray.generation.pool_worker import CandidatesConfig, Vocode
from ttmray.generation.sampler import Draw, Sampler, noise
from ttmray.generation.similar import most_similar
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import METADATA, debug_backbone
from ttmray.models.bundle import open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.score_support import ScoreSupport
from ttmray.storage import Folder
from ttmray.training.data import DataConfig, SourceConfig, open_mixture

PROMPTS = {"a": "a calm piano", "b_1": "driving drums", "c": "A calm  piano"}
KINDS = ("clap_audio.npy", "json", "latent_mean.npy", "latent_std.npy", "mert.npy")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps([{"id": name, "prompt": text} for name, text in PROMPTS.items()]))
    return path


def make(source: Path | str, output: Path, *sets: str) -> CandidatesConfig:
    usual = ("bundle=debug", "sampler.steps=1", "candidates=2", "unit_clips=4", "runtime.device=cpu")
    usual += ("runtime.threads=1",)
    return load_config(CandidatesConfig, None, [f"prompts={source}", f"output={output}", *usual, *sets])


@pytest.fixture(scope="module")
def finished(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two candidates for each of three prompts in two units. Do not change it: see `run`."""
    output = tmp_path_factory.mktemp("finished") / "pool"
    assert generate_pool(make(prompts, output)) == 0
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "pool"))


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no models may be loaded."""

    def refuse(self: StageWorker, *_: object) -> None:
        raise AssertionError("models are loaded")

    monkeypatch.setattr(StageWorker, "__init__", refuse)


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(run / "index.parquet").to_pylist()}


def samples(run: Path) -> dict[str, dict[str, Any]]:
    found = [dict(read_samples(path.read_bytes(), path.name)) for path in sorted((run / "shards").iterdir())]
    return {key: sample for shard in found for key, sample in shard.items()}


def files(run: Path) -> dict[str, bytes]:
    """What depends on the clips alone; names carry hashes of contents."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for folder in ("index", "shards", "captions")
        for path in sorted((run / folder).iterdir())
    } | {"index.parquet": (run / "index.parquet").read_bytes()}


def test_every_candidate_has_a_row_that_says_how_it_was_drawn_and_what_it_scores(finished):
    found = rows(finished)
    assert list(found) == ["a_0", "a_1", "b_1_0", "b_1_1", "c_0", "c_1"]
    for key, row in found.items():
        assert key == f"{row['prompt_id']}_{row['candidate']}"
        assert (row["status"], row["split"], row["pool_seed"], row["input_score"]) == ("ok", "train", 42, 2.0)
        assert row["caption"] == " ".join(PROMPTS[row["prompt_id"]].split())  # without the sampler's prefix
        assert row["reward_score"] == row["instrumental_reward_score"]
        assert row["clap_score"] == row["instrumental_clap_score"]
        values = [row[name] for name in ("reward_score", "clap_score", "lufs", "true_peak_db", "silence", "similarity")]
        assert np.isfinite(values).all()
        assert row["clipping"] == 0
        assert row["similar_to"] in found.keys() - {key}
        assert row["duration_s"] == pytest.approx(440_320 / 44_100)
    assert len({row["sha256"] for row in found.values()}) == 6
    assert len({row["unit"] for row in found.values()}) == 2


def test_it_passes_the_checks_of_a_corpus_and_the_filter_reads_it(finished):
    assert list(problems(Folder(str(finished)))) == []
    table, fingerprint = read_pool(str(finished))
    assert table.num_rows == 6
    assert fingerprint == json.loads((finished / "run.json").read_text())["fingerprint"]


def test_latents_are_those_of_the_sampler_and_points(finished):
    models = open_bundle("debug").load(["text", "clap_condition", "backbone"], LoadOptions(device="cpu"))
    config = CandidatesConfig(prompts="x", bundle="debug").sampler.model_copy(update={"steps": 1})
    sampler = Sampler([models.backbone], models.text, models.clap_condition, config)
    expected = sampler.sample([Draw("b_1", "driving drums", seed=42, candidate=1)]).latents[0]
    found = samples(finished)["b_1_1"]
    assert sorted(found) == sorted(KINDS)
    np.testing.assert_array_equal(found["latent_mean.npy"], expected.astype(np.float16))
    assert not found["latent_std.npy"].any()
    assert found["clap_audio.npy"].shape == (2, 512)
    for kind in ("clap_audio.npy", "mert.npy"):
        np.testing.assert_array_equal(*found[kind])
    assert found["json"]["clipping"] == 0.0


def test_candidates_of_one_prompt_differ_and_prompts_of_one_text_do_not_share_noise(finished):
    found = samples(finished)
    latents = {key: sample["latent_mean.npy"].astype(np.float32) for key, sample in found.items()}
    assert not np.array_equal(latents["a_0"], latents["a_1"])
    shape = latents["a_0"].shape
    assert abs(np.corrcoef(noise(42, "a", shape, 0).ravel(), noise(42, "c", shape, 0).ravel())[0, 1]) < 0.05


def test_training_reads_it_as_a_source(finished):
    source = SourceConfig(corpus=str(finished), repeat=5)
    mixture = open_mixture(DataConfig(sources=(source,)))
    assert (len(mixture), mixture.shape) == (30, (430, 40))
    read = mixture.read(np.arange(6), range(6), [(1, i) for i in range(6)])
    found, stored = rows(finished), samples(finished)
    captions = open_bundle("debug").load(["text"], LoadOptions(device="cpu")).text
    for i, key in enumerate(read.keys):
        assert read.batch.score is not None
        assert read.batch.score[i].item() == pytest.approx(found[key]["instrumental_reward_score"])
        np.testing.assert_array_equal(read.batch.mean[i], stored[key]["latent_mean.npy"])
        expected = captions.encode([found[key]["caption"]])[0].astype(np.float16)
        np.testing.assert_array_equal(read.batch.text[i], expected)
    assert not read.batch.std.any()


def test_a_pool_of_an_older_version_learns_where_things_lie_and_has_its_other_columns_still(finished, tmp_path):
    old = Path(shutil.copytree(finished, tmp_path / "old"))
    for path in [old / "index.parquet", *(old / "index").iterdir()]:
        table = pq.read_table(path)
        named = (table.schema.metadata or {}).get(index.METADATA_KEY)
        older = table.drop_columns(index.PLACES)
        if named:
            metadata = json.loads(named)
            for facts in metadata["files"].values():
                facts.pop("places", None)
            older = older.replace_schema_metadata({index.METADATA_KEY: json.dumps(metadata)})
        pq.write_table(older, path)
    assert upgrade(Folder.at(str(old))) == 6
    assert (old / "index.parquet").read_bytes() == (finished / "index.parquet").read_bytes()


def test_units_change_no_clip(finished, prompts, tmp_path):
    assert generate_pool(make(prompts, tmp_path / "pool", "unit_clips=1", "runtime.threads=2")) == 0
    placed = {"unit", "shard", *index.PLACES}
    one, other = ({k: {n: v for n, v in row.items() if n not in placed} for k, row in rows(r).items()}
                  for r in (finished, tmp_path / "pool"))  # fmt: skip
    assert one == other


def test_a_finished_pool_does_nothing_and_loads_nothing(prompts, run, idle, capsys):
    before = files(run)
    assert generate_pool(make(prompts, run)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert files(run) == before


def test_only_what_is_not_committed_is_made_and_bytes_are_the_same(prompts, run, finished, monkeypatch):
    for name in ("index/u000001.parquet", "index.parquet", "_SUCCESS.json"):
        (run / name).unlink()
    stray = run / "shards" / "u000001-000000000000.tar"  # of a writer that was killed before its commit
    stray.write_bytes(b"half")
    made = []
    call = StageWorker.on_unit
    monkeypatch.setattr(StageWorker, "on_unit", lambda self, unit: made.append(unit.name) or call(self, unit))
    assert generate_pool(make(prompts, run)) == 0
    assert made == ["u000001"]
    assert files(run) == files(finished)


def test_a_pool_that_was_killed_before_its_end_is_finished_without_models(prompts, run, finished, idle):
    (run / "_SUCCESS.json").unlink()
    (run / "index.parquet").unlink()
    assert generate_pool(make(prompts, run)) == 0
    assert files(run) == files(finished)
    assert (run / "_SUCCESS.json").exists()


@pytest.mark.slow
def test_a_unit_that_killed_each_process_runs_alone_and_has_the_same_bytes(prompts, run, finished, monkeypatch):
    for name in ("index/u000001.parquet", "index.parquet", "_SUCCESS.json"):
        (run / name).unlink()
    (run / "attempts").mkdir(exist_ok=True)
    for n in range(MAX_ATTEMPTS):
        (run / f"attempts/u000001.all.{n}").write_bytes(b"")
    alone = []
    monkeypatch.setattr(pipeline, "run_alone", lambda *given: alone.append(given[2].name) or run_alone(*given))
    assert generate_pool(make(prompts, run)) == 0
    assert alone == ["u000001"]
    assert files(run) == files(finished)
    assert not list((run / "attempts").iterdir())


def test_captions_can_have_the_prefix_and_scores_stay_those_of_the_prompt(finished, prompts, tmp_path):
    config = make(prompts, tmp_path / "pool", "caption=prefixed", "prompt_count=1")
    assert generate_pool(config) == 0
    expected, found = rows(finished)["a_1"], rows(tmp_path / "pool")["a_1"]
    assert found["caption"] == config.sampler.prefix + "a calm piano"
    for name in ("sha256", "clap_score", "reward_score"):
        assert found[name] == expected[name]


def test_audio_can_be_kept(prompts, tmp_path):
    assert generate_pool(make(prompts, tmp_path / "pool", "keep_audio=true", "prompt_count=1", "candidates=1")) == 0
    (sample,) = samples(tmp_path / "pool").values()
    assert sample["flac"].startswith(b"fLaC")


class Decoder:
    """Gives the waves that a test wants."""

    device = torch.device("cpu")

    def __init__(self, *waves: np.ndarray) -> None:
        self.waves = list(waves)

    def to_audio(self, latents: np.ndarray) -> np.ndarray:
        return self.waves.pop(0)[None]


def test_clipped_clips_are_rejected_and_short_ones_padded():
    loud = (0.9 * np.sin(np.arange(1000))).astype(np.float32)
    clipped = np.clip(3 * loud, -1, 1)
    unit = Unit("u", [], [{"key": k, "status": "ok"} for k in ("loud", "clipped")])
    unit.clips = {"latent_mean": np.zeros((2, 3, 4), np.float16)}
    config = CandidatesConfig(prompts="x", bundle="debug", pad_to=1500)
    done = Vocode(config, Decoder(loud, clipped), threads=1)(unit)
    statuses = [(row["status"], row.get("reason", "")) for row in done.rows]
    assert statuses == [("ok", ""), ("rejected", "clipped")]
    assert done.rows[1]["clipping"] == pytest.approx(np.mean(np.abs(clipped) >= 0.999))
    assert done.clips["mix"].shape == (1, 1, 1500)
    np.testing.assert_array_equal(done.clips["mix"][0, 0, :1000], loud)
    assert not done.clips["mix"][0, 0, 1000:].any()


def test_a_pool_of_silence_is_refused_and_not_finished(prompts, tmp_path):
    config = make(prompts, tmp_path / "pool", "silence_dbfs=0", "prompt_count=1")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 clips is usable \(silent 2\)"):
            generate_pool(config)
        assert not (tmp_path / "pool" / "_SUCCESS.json").exists()


def backbone_file(path: Path, scale: float, **config: Any) -> Path:
    model = debug_backbone(0)
    if config:
        model = FluxAudio(BackboneConfig(hidden=64, heads=2, depth=3, fused_depth=1, **config))
        model.latent_mean.zero_()
    model.latent_std.fill_(scale)
    about = {METADATA: json.dumps({"backbone": model.config.to_dict()})}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, about)
    return path


def test_a_score_beyond_those_of_the_training_is_named_with_their_range(prompts, tmp_path, capsys):
    weights, about = tmp_path / "w.safetensors", {"backbone": debug_backbone(0).config.to_dict()}
    about["score_support"] = ScoreSupport(min=-1.2, p5=-0.45, p95=1.46, max=2.76).to_dict()
    save_file(debug_backbone(0).state_dict(), weights, {METADATA: json.dumps(about)})
    for score, count in ((5, 1), (1, 0)):
        sets = (f"checkpoint={weights}", f"sampler.score={score}", "prompt_count=1", "candidates=1", "max_clipping=1")
        assert generate_pool(make(prompts, tmp_path / f"{score}", *sets)) == 0
        assert capsys.readouterr().out.count("(p5 -0.45, p95 +1.46, max +2.76)") == count
        assert len(json.loads((tmp_path / f"{score}" / "run.json").read_text())["warnings"]) == count


def test_latents_beyond_float16_fail_with_a_reason(prompts, tmp_path):
    weights = backbone_file(tmp_path / "w.safetensors", 1e7)
    config = make(prompts, tmp_path / "pool", f"checkpoint={weights}", "prompt_count=1", "candidates=1")
    with pytest.raises(UserError, match=r"none of the 1 clips is usable \(error 1\)"):
        generate_pool(config)
    row = pq.read_table(tmp_path / "pool" / "index" / "u000000.parquet").to_pylist()[0]
    assert (row["status"], row["stage"]) == ("failed", "sample")
    assert "latents as float16: not finite" in row["message"]


def test_a_pool_of_v2_weights_as_v1_is_refused_before_anything_is_written(prompts, tmp_path, idle):
    model = debug_backbone(0, "v2")
    about = {METADATA: json.dumps({"backbone": model.config.to_dict()})}
    save_file(model.state_dict(), tmp_path / "v2.safetensors", about)
    with pytest.raises(UserError, match="was trained as v2 and collapses as v1"):
        generate_pool(make(prompts, tmp_path / "pool", f"checkpoint={tmp_path}/v2.safetensors", "head=v1"))
    assert not (tmp_path / "pool").exists()


def test_a_checkpoint_that_does_not_fit_leaves_no_run_behind(prompts, tmp_path):
    weights = backbone_file(tmp_path / "w.safetensors", 1.0, latent_dim=20, text_dim=64)
    with pytest.raises(UserError, match="20 latent channels"):
        generate_pool(make(prompts, tmp_path / "pool", f"checkpoint={weights}"))
    assert [path for path in (tmp_path / "pool").rglob("*") if path.is_file()] == []


def test_another_run_is_refused_with_what_differs(prompts, run, tmp_path, idle):
    weights = backbone_file(tmp_path / "w.safetensors", 1.0)
    for sets, line in (
        (("seed=1",), "config.seed: 42 -> 1"),
        (("sampler.score=3",), "config.sampler.score: 2.0 -> 3.0"),
        ((f"checkpoint={weights}",), "weights.checkpoint"),
        (("prompt_count=2",), "1 prompt removed: c"),
    ):
        with pytest.raises(UserError) as error:
            generate_pool(make(prompts, run, *sets))
        assert line in str(error.value)


def test_a_folder_of_something_else_is_refused(prompts, tmp_path, idle):
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.doc"):
        generate_pool(make(prompts, tmp_path))
    (tmp_path / "run.json").write_text('{"kind": "corpus"}')
    with pytest.raises(UserError, match="describes no pool run"):
        generate_pool(make(prompts, tmp_path))


@pytest.mark.parametrize(
    ("table", "sets", "message"),
    [
        ("id,prompt\na.b,x\n", (), "the id a.b cannot be part of a key"),
        (f"id,prompt\n{'a' * 65},x\n", (), "cannot be part of a key"),
        ("id,prompt\na,x\n", ("prompt_count=2",), "has 1 prompts, prompt_count is 2"),
        ("id,prompt\na,x\n", ("checkpoint=gone.safetensors",), "is not a file"),
        ("id,prompt\n", (), "holds no prompts"),
    ],
)
def test_wrong_input_is_found_before_anything_is_written(tmp_path, idle, table, sets, message):
    (tmp_path / "prompts.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        generate_pool(make(tmp_path / "prompts.csv", tmp_path / "pool", *sets))
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("corpus=x",), "prompts .* or corpus"),
        (("prompts=null",), "prompts .* or corpus"),
        (("head=v2",), "there is none"),
        (("sampler.mode=average",), "one checkpoint"),
    ],
)
def test_contradicting_settings_are_refused(tmp_path, sets, message):
    with pytest.raises(UserError, match=message):
        make("x.csv", tmp_path, *sets)


@pytest.mark.parametrize("held", ["id,prompt\nz,A CALM piano\n", "id,prompt\nb_1,something else\n"])
def test_held_out_prompts_are_refused_by_text_and_by_id(prompts, tmp_path, idle, held):
    (tmp_path / "held.csv").write_text(held)
    with pytest.raises(UserError, match="held out by"):
        generate_pool(make(prompts, tmp_path / "pool", f"held_out={tmp_path / 'held.csv'}"))


def test_prompts_of_a_corpus_are_captions_of_training_clips_alone(tmp_path):
    sizes = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 1}
    corpus = write_random_corpus(str(tmp_path / "corpus"), tracks=9, captions=6, validation=1, test=1, **sizes).uri
    # tracks 7 and 8 are held out and share the captions of tracks 1 and 2
    usual = ("prompts=null", f"corpus={corpus}")
    chosen = choose_prompts(make("x", tmp_path / "pool", *usual)).chosen
    assert {prompt.text for prompt in chosen} == {f"a caption of number {i}" for i in (0, 3, 4, 5)}
    some = choose_prompts(make("x", tmp_path / "pool", *usual, "prompt_count=2")).chosen
    assert some == chosen[:2]
    orders = {tuple(p.id for p in choose_prompts(make("x", tmp_path, *usual, f"seed={s}")).chosen) for s in range(9)}
    assert len(orders) > 1


@pytest.fixture
def captions(tmp_path: Path) -> str:
    """A corpus with ten captions, `a caption of number 0` to `9`."""
    sizes = {"latent": (5, 4), "text": (3, 8), "clips_per_track": 1}
    return write_random_corpus(str(tmp_path / "corpus"), tracks=10, captions=10, validation=0, test=0, **sizes).uri


@pytest.mark.parametrize(
    "held",
    [
        "id,prompt\ne1,a caption of number 3\n",
        "id,prompt\ne1,A  Caption of\u00a0number 3\n",
        "id,prompt\ne1,A slow song: a caption of number 3\n",  # with the prefix that generation adds
        f"id,prompt\n{hashlib.sha256(b'a caption of number 3').hexdigest()[:16]},another text\n",
    ],
)
def test_a_held_out_caption_is_left_out_and_counted_and_moves_no_other(captions, tmp_path, held):
    usual = ("prompts=null", f"corpus={captions}", "sampler.prefix='A slow song: '")
    everything = choose_prompts(make("x", tmp_path / "pool", *usual))
    (tmp_path / "held.csv").write_text(held)
    found = choose_prompts(make("x", tmp_path / "pool", *usual, f"held_out={tmp_path / 'held.csv'}"))
    assert (everything.held_out, found.held_out) == (0, 1)
    assert found.chosen == [prompt for prompt in everything.chosen if prompt.text != "a caption of number 3"]


def test_the_order_of_the_held_out_prompts_changes_nothing(captions, tmp_path):
    rows = [f"e{i},a caption of number {i}\n" for i in (2, 5, 7)]
    found = []
    for name, some in (("one", rows), ("two", rows[::-1])):
        (tmp_path / f"{name}.csv").write_text("id,prompt\n" + "".join(some))
        sets = ("prompts=null", f"corpus={captions}", f"held_out={tmp_path / name}.csv", "prompt_count=4")
        config = make("x", tmp_path / "pool", *sets)
        found.append(plan_pool(choose_prompts(config).chosen, config).identity())
    assert found[0] == found[1]


def test_too_many_held_out_captions_are_hardly_an_evaluation(captions, tmp_path, idle):
    (tmp_path / "held.txt").write_text("".join(f"a caption of number {i}\n" for i in range(6)))
    sets = ("prompts=null", f"corpus={captions}", f"held_out={tmp_path / 'held.txt'}")
    with pytest.raises(UserError, match=r"6 of 10 captions are held out .* 50% may be") as caught:
        generate_pool(make("x", tmp_path / "pool", *sets))
    assert "max_held_out" in caught.value.hint
    assert choose_prompts(make("x", tmp_path / "pool", *sets, "max_held_out=0.6")).held_out == 6
    with pytest.raises(UserError, match=r"has 4 prompts \(6 more are held out\), prompt_count is 5"):
        choose_prompts(make("x", tmp_path / "pool", *sets, "max_held_out=0.6", "prompt_count=5"))


def test_a_pool_says_how_many_captions_are_held_out(captions, tmp_path, capsys):
    (tmp_path / "held.txt").write_text("a caption of number 3\na caption of number 4\n")
    sets = ("prompts=null", f"corpus={captions}", f"held_out={tmp_path / 'held.txt'}", "prompt_count=2", "candidates=1")
    config = make("x", tmp_path / "pool", *sets, "silence_dbfs=-200", "max_clipping=1")
    for _ in range(2):  # a relaunch says it, too
        assert generate_pool(config) == 0
        assert "2 captions are held out and left out" in capsys.readouterr().out
    for name in ("run.json", "summary.json"):
        assert json.loads((tmp_path / "pool" / name).read_text())["held_out"] == 2
    assert "2 captions are held out" in (tmp_path / "pool/summary.md").read_text()


def test_a_caption_of_several_prompts_is_stored_once(prompts, tmp_path):
    plan = plan_pool(choose_prompts(make(prompts, tmp_path)).chosen, make(prompts, tmp_path))
    assert plan.table["caption_owner"].to_pylist() == [True, True, True]  # texts differ by case
    (tmp_path / "p.csv").write_text("id,prompt\na,same\nb,same\n")
    config = make(tmp_path / "p.csv", tmp_path)
    assert plan_pool(choose_prompts(config).chosen, config).table["caption_owner"].to_pylist() == [True, False]


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_the_most_similar_clip_is_that_of_the_highest_cosine(count, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    found = most_similar({f"k{i:02}": vector for i, vector in enumerate(vectors)})
    for i, vector in enumerate(vectors):
        others = {
            f"k{j:02}": float(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other))
            for j, other in enumerate(vectors)
            if j != i
        }
        cosine, key = found[f"k{i:02}"]
        assert cosine == pytest.approx(max(others.values()), abs=2e-6)
        assert others[key] == pytest.approx(cosine, abs=2e-6)


def test_of_many_clips_those_of_near_groups_are_compared_and_copies_are_found(monkeypatch):
    random = np.random.default_rng(3)
    vectors = random.normal(size=(900, 24)) + 2 * random.normal(size=(30, 24))[random.integers(0, 30, 900)]
    vectors[17], vectors[801] = vectors[400], vectors[3]  # copies
    named = {f"k{i:03}": vector.astype(np.float32) for i, vector in enumerate(vectors)}
    exact = most_similar(named)
    monkeypatch.setattr(similar, "COMPARED", 100)
    near = most_similar(named)
    assert near.keys() == exact.keys()
    assert all(near[key][0] <= exact[key][0] + 1e-6 for key in named)
    assert sum(near[key] == exact[key] for key in named) > 0.9 * len(named)
    for one, other in (("k017", "k400"), ("k003", "k801")):
        assert (near[one], near[other]) == ((1.0, other), (1.0, one))


def test_clips_whose_groups_hold_nobody_else_are_compared_with_all(monkeypatch):
    monkeypatch.setattr(similar, "COMPARED", 1)
    monkeypatch.setattr(similar, "NEAR", 1)
    near = most_similar({name: np.eye(3, dtype=np.float32)[i] for i, name in enumerate("abc")})
    assert near == {"a": (0.0, "b"), "b": (0.0, "a"), "c": (0.0, "a")}


def test_one_clip_is_similar_to_none():
    assert most_similar({"a": np.ones(3, np.float32)}) == {}
