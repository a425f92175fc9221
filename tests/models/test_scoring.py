"""Scores of a clip: the same bits whatever is scored with it, with and without the cache, under one protocol."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ttmray.audio.io import resample
from ttmray.models import scoring
from ttmray.models.bundle import Models, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.loading import LoadOptions
from ttmray.models.protocol import Protocol
from ttmray.models.scoring import TEXTS_KEPT, Embeddings, Scorer

RATE = 44100
PROTOCOL = open_bundle("debug").protocol("empty")
CAPTIONS = ("slow piano", "", "death metal", "slow piano", "a choir")


@pytest.fixture(scope="module")
def models() -> Models:
    return open_bundle("debug").load((*Scorer.roles, "text"), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Five mono clips of 10 s: noise, tones, a beat."""
    t = np.arange(10 * RATE) / RATE
    noise = np.random.default_rng(0).normal(size=len(t))
    sounds = [0.1 * noise, np.sin(2764 * t), 0.3 * noise * (t % 0.5 < 0.05), np.sin(6911 * t) * t / 10, 1e-3 * noise]
    return [sound.astype(np.float32) for sound in sounds]


class Calls:
    """Counts the forward passes of the models that embed audio."""

    def __init__(self, models: Models) -> None:
        self.count = 0
        hooked = (models.clap.model.audio_model, models.mert.model)
        self._hooks = [model.register_forward_hook(self._counted) for model in hooked]

    def _counted(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def numbers(scorer: Scorer, clips: list[np.ndarray], captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    embeddings, texts = scorer.embed(clips), scorer.texts(captions)
    return {
        "clap": embeddings.clap,
        "mert": embeddings.mert,
        "reward": scorer.rewards(embeddings, texts),
        "clap_score": np.array([a @ b for a, b in zip(embeddings.clap, texts, strict=True)]),
    }


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_clips_scores_are_the_same_bits_alone_in_a_batch_and_in_another_order(
    models, clips, threads, cached, tmp_path
):
    def scorer(name: str) -> Scorer:
        cache = EmbeddingCache(tmp_path / name, 2**30) if cached else None
        return Scorer(models, replace(PROTOCOL, text="caption"), threads, cache)

    together = numbers(scorer("together"), clips, CAPTIONS)
    assert len(set(together["reward"].tolist())) == 5
    alone = [numbers(scorer(f"alone{i}"), clips[i : i + 1], CAPTIONS[i : i + 1]) for i in range(5)]
    assert_same_bits({name: np.concatenate([one[name] for one in alone]) for name in together}, together)
    order = [3, 0, 4, 2, 1]
    shuffled = numbers(scorer("shuffled"), [clips[i] for i in order], tuple(CAPTIONS[i] for i in order))
    assert_same_bits(shuffled, {name: values[order] for name, values in together.items()})


def test_the_cache_gives_the_same_bits_and_a_second_job_runs_no_model(models, clips, tmp_path):
    plain = numbers(Scorer(models, PROTOCOL), clips, CAPTIONS)
    with Calls(models) as first:
        assert_same_bits(
            numbers(Scorer(models, PROTOCOL, cache=EmbeddingCache(tmp_path, 2**30)), clips, CAPTIONS), plain
        )
    assert first.count == 10
    with Calls(models) as second:
        scorer = Scorer(models, PROTOCOL, cache=EmbeddingCache(tmp_path, 2**30))
        assert_same_bits(numbers(scorer, clips, CAPTIONS), plain)
    assert second.count == 0


def test_only_clips_that_the_cache_lacks_are_encoded(models, clips, tmp_path):
    scorer = Scorer(models, PROTOCOL, cache=EmbeddingCache(tmp_path, 2**30))
    scorer.embed(clips[:2])
    with Calls(models) as calls:
        found = scorer.embed([clips[2], clips[0], clips[2], clips[1]])
    assert calls.count == 2  # clip 2 is asked for twice and encoded once, by CLAP and by MERT
    expected = Scorer(models, PROTOCOL).embed([clips[2], clips[0], clips[2], clips[1]])
    assert np.array_equal(found.clap, expected.clap)
    assert np.array_equal(found.mert, expected.mert)


@pytest.mark.parametrize(
    "other",
    [
        replace(PROTOCOL, int16=False),
        replace(PROTOCOL, bandlimit_hz=8000),
        replace(PROTOCOL, crop="windows"),
        replace(PROTOCOL, hashes=(("debug", "other"),)),
    ],
    ids=lambda protocol: protocol.id(),
)
def test_another_protocol_never_gets_the_cached_embeddings_of_this_one(models, clips, tmp_path, other: Protocol):
    cache = EmbeddingCache(tmp_path, 2**30)
    Scorer(models, PROTOCOL, cache=cache).embed(clips[:1])
    with Calls(models) as calls:
        Scorer(models, other, cache=cache).embed(clips[:1])
    assert calls.count == 2


def test_the_text_mode_does_not_make_audio_embeddings_again(models, clips, tmp_path):
    cache = EmbeddingCache(tmp_path, 2**30)
    Scorer(models, PROTOCOL, cache=cache).embed(clips[:1])
    with Calls(models) as calls:
        Scorer(models, replace(PROTOCOL, text="caption"), cache=cache).embed(clips[:1])
    assert calls.count == 0


def test_captions_count_in_the_reward_only_where_the_protocol_says_so(models, clips):
    empty, caption = Scorer(models, PROTOCOL), Scorer(models, replace(PROTOCOL, text="caption"))
    embeddings = empty.embed(clips[:2])
    piano, metal = empty.texts(["slow piano"] * 2), empty.texts(["death metal"] * 2)
    assert np.array_equal(empty.rewards(embeddings, piano), empty.rewards(embeddings, metal))
    assert (caption.rewards(embeddings, piano) != caption.rewards(embeddings, metal)).all()
    # A zero vector is the empty text, so under both protocols a clip without caption has one reward.
    nothing = caption.texts(["", ""])
    assert not nothing.any()
    assert np.array_equal(caption.rewards(embeddings, nothing), empty.rewards(embeddings, piano))


def test_captions_are_encoded_once_and_memory_for_them_is_bounded(models):
    scorer = Scorer(models, PROTOCOL)
    encoded: list[int] = []
    hook = models.clap.model.text_model.register_forward_hook(lambda *_: encoded.append(1))
    try:
        first = scorer.texts(CAPTIONS)
        assert len(encoded) == 3  # "" needs no model, "slow piano" is there twice
        assert np.array_equal(scorer.texts(CAPTIONS[::-1]), first[::-1])
        assert len(encoded) == 3
    finally:
        hook.remove()
    assert np.array_equal(first, models.clap.embed_text(CAPTIONS))
    assert scorer.texts([]).shape == (0, 512)
    assert scorer.texts([""] * (TEXTS_KEPT + 1)).shape == (TEXTS_KEPT + 1, 512)


def test_no_clips_give_empty_arrays(models, tmp_path):
    for cache in (None, EmbeddingCache(tmp_path, 2**30)):
        scorer = Scorer(models, PROTOCOL, cache=cache)
        embeddings = scorer.embed([])
        assert embeddings.clap.shape == (0, 512)
        assert embeddings.mert.shape == (0, models.mert.dim)
        assert scorer.rewards(embeddings, scorer.texts([])).shape == (0,)


def test_clips_are_resampled_for_the_next_model_while_the_one_before_works(models, clips, monkeypatch):
    """A GPU waits for a CPU once for each call: for the clips of the first model."""
    alone = [Scorer(models, PROTOCOL).embed(clips[i : i + 1]) for i in range(2)]
    begun, ahead = threading.Semaphore(0), []

    def noted(wave, rate, to):
        begun.release()
        return resample(wave, rate, to)

    def at_work(*_):
        count = (2, 1, 1, 0)[len(ahead)]  # at first its own clip and the next one
        ahead.append(all(begun.acquire(timeout=10) for _ in range(count)))

    monkeypatch.setattr(scoring, "resample", noted)
    hooked = (models.clap.model.audio_model, models.mert.model)
    hooks = [model.register_forward_pre_hook(at_work) for model in hooked]
    both = Scorer(models, PROTOCOL).embed_each([clips[:1], clips[1:2]])
    for hook in hooks:
        hook.remove()
    assert ahead == [True] * 4
    for together, one in zip(both, alone, strict=True):
        assert_same_bits(vars(together), vars(one))


def test_rewards_of_stored_embeddings_are_those_of_the_audio(models, clips):
    """What the corpus stores is enough to score again under another text protocol."""
    scorer = Scorer(models, PROTOCOL)
    fresh = scorer.embed(clips)
    stored = Embeddings(np.copy(fresh.clap), np.copy(fresh.mert))
    texts = scorer.texts(CAPTIONS)
    assert np.array_equal(scorer.rewards(stored, texts), scorer.rewards(fresh, texts))


def test_clips_that_cannot_be_scored_are_refused_before_anything_is_cached(models, clips, tmp_path: Path):
    scorer = Scorer(models, PROTOCOL, cache=EmbeddingCache(tmp_path, 2**30))
    broken = clips[1].copy()
    broken[7] = np.nan
    for bad in (broken, np.zeros(0, np.float32), np.zeros((2, RATE), np.float32)):
        with pytest.raises(ValueError, match="wave"):
            scorer.embed([clips[0], bad])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
