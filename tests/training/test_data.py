"""The training data: an order and draws that depend on the sample's number alone, exact numbers, and damage noticed."""

import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from synthetic_corpus import write_random_corpus

from ttmray.config import identity
from ttmray.corpus import index, shards
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.data import (
    DataConfig,
    Mixture,
    Samples,
    SourceConfig,
    draws,
    evaluation_batches,
    loader,
    open_mixture,
)


def configure(*sources: SourceConfig | Path | str, **fields: object) -> DataConfig:
    made = [s if isinstance(s, SourceConfig) else SourceConfig(corpus=str(s)) for s in sources]
    return DataConfig(sources=tuple(made), **({"threads": 0} | fields))


@pytest.fixture(scope="session")
def config(corpus: Path, expert: Path) -> DataConfig:
    return configure(SourceConfig(corpus=str(corpus), repeat=1.5), SourceConfig(corpus=str(expert), repeat=2))


@pytest.fixture(scope="session")
def mixture(config: DataConfig) -> Mixture:
    """27 + 12 samples per epoch."""
    return open_mixture(config)


def equal(a: Samples, b: Samples) -> bool:
    pairs = [(a.numbers, b.numbers), (a.sources, b.sources), *zip(a.batch, b.batch, strict=True)]
    return a.keys == b.keys and all(x is y is None or torch.equal(x, y) for x, y in pairs)


def one_by_one(mixture: Mixture, config: DataConfig, start: int, count: int) -> list[Samples]:
    alone = config.model_copy(update={"threads": 0})
    return list(itertools.islice(loader(mixture, alone, start=start, batch=1), count))


def joined(parts: list[Samples]) -> Samples:
    batch = type(parts[0].batch)(
        *(None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*(p.batch for p in parts), strict=True))
    )
    ids = (torch.cat([p.numbers for p in parts]), torch.cat([p.sources for p in parts]))
    return Samples(*ids, [key for p in parts for key in p.keys], batch, torch.cat([p.weights for p in parts]))


def test_samples_are_what_the_corpus_holds(corpus, mixture, config):
    run = Folder.at(str(corpus))
    clips = {
        key: sample
        for entry in run.files("shards")
        for key, sample in shards.read_samples(run.read(f"shards/{entry.name}"), entry.name)
    }
    texts = {k: v for e in run.files("captions") for k, v in shards.read_captions(run, f"captions/{e.name}").items()}
    rows = {row["key"]: row for row in index.read_index(run).to_pylist()}
    samples = next(loader(mixture, config, start=0, batch=len(mixture)))
    found = 0
    for i, (source, key) in enumerate(zip(samples.sources.tolist(), samples.keys, strict=True)):
        if source:
            continue
        batch, text, found = samples.batch, texts[rows[key]["caption_id"]], found + 1
        for array, expected in (
            (batch.mean, clips[key]["latent_mean.npy"]),
            (batch.std, clips[key]["latent_std.npy"]),
            (batch.text, text["t5"]),
            (batch.text_c, text["clap"]),
            (batch.score, np.float32(rows[key]["instrumental_reward_score"])),
        ):
            assert array.numpy().dtype == expected.dtype
            np.testing.assert_array_equal(array[i].numpy(), expected)
        of_number = draws(config.seed, int(samples.numbers[i]), mixture.shape)
        for name, expected in of_number._asdict().items():
            np.testing.assert_array_equal(getattr(batch, name)[i].numpy(), expected.squeeze())
    assert found == 27


@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 3, allow_nan=False)), min_size=1, max_size=3),
    st.integers(0, 2**40),
    st.integers(0, 1000),
)
def test_every_epoch_is_a_permutation_with_exact_repeats(mixture, sources, seed, epoch):
    clips = [replace(mixture.sources[1], keys=mixture.sources[1].keys.slice(0, count)) for count, _ in sources]
    expected = [int(repeat) * n + int(repeat % 1 * n + 0.5) for n, repeat in sources]
    if not sum(expected):
        with pytest.raises(UserError, match="no sample"):
            Mixture(clips, [repeat for _, repeat in sources], seed)
        return
    mixed = Mixture(clips, [repeat for _, repeat in sources], seed)
    start = epoch * len(mixed)
    drawn = mixed.clips(range(start, start + len(mixed)))
    assert len(mixed) == sum(expected)
    assert np.bincount(mixed.sources_of(drawn), minlength=len(clips)).tolist() == expected
    times = Counter(drawn.tolist())
    for clip in range(sum(count for count, _ in sources)):
        repeat = sources[int(mixed.sources_of(np.array([clip]))[0])][1]
        assert int(repeat) <= times[clip] <= int(repeat) + (repeat % 1 > 0)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_counts_are_those_of_the_samples_drawn(mixture, start, more, still_more):
    middle, stop = start + more, start + more + still_more
    drawn = mixture.sources_of(mixture.clips(range(start, middle)))
    assert mixture.counts(start, middle) == np.bincount(drawn, minlength=2).tolist()
    parts = zip(mixture.counts(start, middle), mixture.counts(middle, stop), strict=True)
    assert mixture.counts(start, stop) == [a + b for a, b in parts]


def test_five_times_oversampling_is_five_draws_of_every_kept_clip(corpus, expert):
    config = configure(corpus, SourceConfig(corpus=str(expert), repeat=5))
    mixture = open_mixture(config)
    assert mixture.counts(0, len(mixture)) == mixture.per_epoch == [18, 30]
    keys = Counter(key for s in itertools.islice(loader(mixture, config, start=0, batch=8), 6) for key in s.keys)
    assert sorted(keys.values()) == [1] * 12 + [6] * 6  # both corpora call their first tracks the same


def test_the_part_of_a_fractional_repeat_is_another_one_in_every_epoch(corpus):
    mixture = open_mixture(configure(SourceConfig(corpus=str(corpus), repeat=0.5)))
    epochs = [frozenset(mixture.clips(range(9 * e, 9 * e + 9)).tolist()) for e in range(200)]
    assert all(len(clips) == 9 for clips in epochs)
    assert len(set(epochs)) > 190
    often = Counter(itertools.chain(*epochs))
    assert all(abs(often[clip] - 100) < 40 for clip in range(18))  # binomial(200, 1/2), over 5 sigma


def test_order_and_draws_come_from_the_seed(corpus, mixture):
    same, other = (open_mixture(configure(corpus, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(same.clips(range(18)), other.clips(range(18)))
    assert not np.array_equal(same.clips(range(18)), same.clips(range(18, 36)))
    assert np.array_equal(same.clips(range(18)), open_mixture(configure(corpus)).clips(range(18)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 150), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_ranks_and_micro_batches_are_parts_of_one_sequence(mixture, config, start, batch, world, accumulation):
    ranks = [loader(mixture, config, start=start, batch=batch, rank=r, world=world) for r in range(world)]
    total = batch * world * accumulation
    for update in range(2):
        parts = [[next(rank) for rank in ranks] for _ in range(accumulation)]
        whole = joined([samples for micro_batch in parts for samples in micro_batch])
        first = start + update * total
        assert whole.numbers.tolist() == list(range(first, first + total))
        assert equal(whole, joined(one_by_one(mixture, config, first, total)))


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_do_not_change_the_sequence(config, threads):
    mixture = open_mixture(config)  # a fresh one: threads look up offsets at the same time
    several = config.model_copy(update={"threads": threads, "prefetch": 5})
    state = torch.random.get_rng_state()
    samples = list(itertools.islice(loader(mixture, several, start=35, batch=3, rank=1, world=2), 20))
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = list(itertools.islice(loader(mixture, config, start=35, batch=3, rank=1, world=2), 20))
    assert all(map(equal, samples, expected))


def test_reading_ahead_is_bounded_and_ends_with_the_iterator(mixture, config, monkeypatch):
    made: list[int] = []
    read = Mixture.read

    def counted(self: Mixture, clips: np.ndarray, numbers: range, *rest: object) -> Samples:
        made.append(numbers[0])
        return read(self, clips, numbers, *rest)

    monkeypatch.setattr(Mixture, "read", counted)
    batches = loader(mixture, config.model_copy(update={"threads": 2, "prefetch": 3}), start=0, batch=2)
    assert isinstance(batches, Generator)
    next(batches)
    next(batches)
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("data") for name in names) == 2
    batches.close()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("data") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
    assert sorted(made)[:2] == [0, 2]
    assert len(made) <= 4


@given(st.integers(0, 100), st.integers(0, 20))
def test_starting_at_a_number_goes_on_where_a_run_left_off(mixture, config, start, later):
    uninterrupted = one_by_one(mixture, config, start, later + 1)
    again = Mixture(mixture.sources, mixture.repeats, mixture.seed)
    assert equal(one_by_one(again, config, start + later, 1)[0], uninterrupted[-1])


def test_draws_stay_what_they_are():
    # A changed value means that interrupted runs no longer go on exactly.
    made = draws(0, 0, (2, 2))
    assert [float(made.z[0]), float(made.u_text[0]), float(made.u_score[0])] == pytest.approx(DRAWN[:3], abs=1e-7)
    assert made.posterior_noise.ravel().tolist() == pytest.approx(DRAWN[3:7], abs=1e-7)
    assert made.noise.ravel().tolist() == pytest.approx(DRAWN[7:], abs=1e-7)


DRAWN = [
    *(-1.0189059972763062, 0.8753078579902649, 0.8193315863609314),
    *(2.5314741134643555, 0.2548074424266815, -0.476863831281662, -1.9284130334854126),
    *(-0.32555878162384033, 1.0596920251846313, 0.10485641658306122, -0.12041398137807846),
]


def test_draws_have_the_right_distributions_and_are_independent():
    made = [draws(3, number, (10, 4)) for number in range(4000)]
    z, u, v = (np.array([getattr(d, name)[0] for d in made]) for name in ("z", "u_text", "u_score"))
    posterior, noise = (np.stack([getattr(d, name) for d in made]).reshape(4000, -1) for name in made[0]._fields[3:])
    for normal in (z[:, None], posterior, noise):
        assert abs(normal.mean()) < 5 / normal.size**0.5
        assert abs(normal.std() - 1) < 5 / normal.size**0.5
    for uniform in (u, v):
        assert uniform.min() >= 0
        assert uniform.max() < 1
        assert abs((uniform < 0.1).mean() - 0.1) < 5 * (0.09 / 4000) ** 0.5
    columns = np.column_stack([z, u, v, posterior[:, 0], noise[:, 0], np.roll(z, 1), np.roll(noise[:, 0], 1)])
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / 4000**0.5


def test_evaluation_sees_every_clip_once_with_draws_of_its_own(corpus):
    source = SourceConfig(corpus=str(corpus), split="validation", repeat=3.7)
    mixture = open_mixture(configure(source))
    whole = joined(list(evaluation_batches(mixture, 2)))
    assert whole.keys == ["t000006_0", "t000006_1", "t000006_2"]
    by_rank = [list(evaluation_batches(mixture, 1, rank=rank, world=2)) for rank in range(2)]
    assert [samples.keys[0] for samples in by_rank[0]] == ["t000006_0", "t000006_2"]
    everything = joined(
        list(evaluation_batches(open_mixture(configure(source.model_copy(update={"split": "all"}))), 4))
    )
    assert len(everything.keys) == len(set(everything.keys)) == 21
    for i, key in enumerate(whole.keys):
        j = everything.keys.index(key)
        pairs = zip(whole.batch, everything.batch, strict=True)
        assert all(torch.equal(a[i], b[j]) for a, b in pairs if a is not None or b is not None)
    assert not np.array_equal(whole.batch.z[0].numpy(), draws(0, 0, mixture.shape).z)


def test_fewer_evaluation_clips_are_spread_over_all(corpus, expert):
    config = configure(SourceConfig(corpus=str(expert), repeat=0), corpus)
    mixture = open_mixture(config)
    assert [key for s in evaluation_batches(mixture, 2, limit=3) for key in s.keys] == [
        "t000000_0",
        "t000002_0",
        "t000004_0",
    ]
    assert sum(len(s.keys) for s in evaluation_batches(mixture, 4, limit=99)) == 18
    assert {int(s.sources[0]) for s in evaluation_batches(mixture, 4)} == {1}


def test_the_fingerprint_tells_what_is_drawn(corpus, expert, tmp_path):
    (tmp_path / "keys.txt").write_text("t000000_1\n")
    chosen = SourceConfig(corpus=str(corpus))
    changes: list[dict[str, object]] = [{"repeat": 2}, {"split": "all"}, {"score_column": None}]
    changes += [{"score_column": "track_reward_score"}, {"keys": str(tmp_path / "keys.txt")}]
    sources = [[corpus], [expert], [corpus, expert], [expert, corpus]]
    sources += [[chosen.model_copy(update=change)] for change in changes]
    fingerprints = {open_mixture(configure(*some)).fingerprint() for some in sources}
    assert len(fingerprints) == 9
    moved = shutil.copytree(corpus, tmp_path / "moved")
    assert open_mixture(configure(moved)).fingerprint() in fingerprints
    assert identity(configure(moved, threads=3)) == identity(configure(corpus))


def test_scores_for_some_sources_only_are_refused(corpus, expert):
    with pytest.raises(ValidationError, match="either all need a score_column, or none"):
        configure(SourceConfig(corpus=str(corpus), score_column=None), expert)


def test_corpora_of_different_shapes_are_not_mixed(corpus, tmp_path):
    other = write_random_corpus(str(tmp_path / "other"), tracks=1, latent=(6, 4), text=(3, 8))
    with pytest.raises(UserError, match=r"other holds latents \(6, 4\)"):
        open_mixture(configure(corpus, other.uri))
