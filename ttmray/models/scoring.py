"""Rewards and CLAP scores of clips: the one path from audio to numbers, for the corpus job and every tool.

Audio comes in mono at 44.1 kHz, the rate of the pipeline, and is resampled once for each encoder. So a clip has
the same scores wherever it is scored.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from ttmray.audio import clip as audio_clip
from ttmray.audio.io import resample
from ttmray.models.bundle import Models
from ttmray.models.cache import EmbeddingCache, audio_key
from ttmray.models.protocol import CLAP_SAMPLE_RATE, MERT_SAMPLE_RATE, Protocol

SAMPLE_RATE = audio_clip.SAMPLE_RATE
"""Hz; rate of the separator, the VAE and every clip in the pipeline."""
TEXTS_KEPT = 4096
"""Caption vectors kept in memory; bounds an actor that lives for days."""


@dataclass(frozen=True)
class Embeddings:
    """`clap` (n, 512) unit vectors and `mert` (n, H) time means, float32."""

    clap: np.ndarray
    mert: np.ndarray


class Scorer:
    """Embeds and scores clips under one protocol.

    Args:
        models: with the roles clap, mert and tunejury.
        protocol: how; its id belongs beside every number.
        threads: for resampling.
        cache: where embeddings are looked up and kept, by content and protocol; None computes all.
    """

    roles = ("clap", "mert", "tunejury")

    def __init__(
        self, models: Models, protocol: Protocol, threads: int = 1, cache: EmbeddingCache | None = None
    ) -> None:
        self.models = models
        self.protocol = protocol
        self._threads = threads
        self._cache = cache
        self._texts: dict[str, np.ndarray] = {}
        # Embeddings depend neither on the text nor on the head, but on a GPU their last bits differ.
        weights = [item for item in protocol.hashes if not item[0].startswith("tunejury")]
        device = models.clap.device.type
        described = json.dumps(asdict(protocol) | {"text": "", "hashes": weights, "device": device}, sort_keys=True)
        self._cache_name = hashlib.sha256(described.encode()).hexdigest()

    def embed(self, waves: Sequence[np.ndarray] | np.ndarray) -> Embeddings:
        """CLAP and MERT embeddings of mono clips at 44.1 kHz: (n, T) float32, or (T_i,) each.

        Raises:
            ValueError: a clip that is empty, not mono, not finite or too short for one frame of MERT.
            RuntimeError: a model's output is not finite.
        """
        return self.embed_each([waves])[0]

    def embed_each(self, sets: Sequence[Sequence[np.ndarray] | np.ndarray]) -> list[Embeddings]:
        """As `embed` of each of several sets of clips, (n, T) or (T_i,) each.

        Where there is no cache, the clips that a model gets next are resampled while the one before works: resampling
        is most of what a scoring process does on a CPU, and a GPU shall not wait for it.

        Raises:
            ValueError, RuntimeError: as `embed`.
        """
        clap = _Kind("clap", CLAP_SAMPLE_RATE, self.models.clap.dim, self._clap)
        mert = _Kind("mert", MERT_SAMPLE_RATE, self.models.mert.dim, self.models.mert.embed)
        steps = [(kind, list(waves)) for waves in sets for kind in (clap, mert)]
        results = []
        with ThreadPoolExecutor(self._threads) as pool:
            # one step ahead and no more: all at once would be 3 MB for each clip
            ahead = self._resampling(pool, *steps[0]) if steps else []
            for step, following in zip(steps, [*steps[1:], None], strict=True):
                now, ahead = ahead, self._resampling(pool, *following) if following else []
                results.append(self._embedded(pool, *step, now))
        return [Embeddings(*of_set) for of_set in zip(results[::2], results[1::2], strict=True)]

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """(n, 512) CLAP text vectors; the empty caption gives zeros. Repeated captions are encoded once."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if len(self._texts) + len(new) > TEXTS_KEPT:
            self._texts.clear()
            new = list(dict.fromkeys(captions))
        if new:
            self._texts.update(zip(new, self.models.clap.embed_text(new), strict=True))
        rows = [self._texts[caption] for caption in captions]
        return np.stack(rows) if rows else np.zeros((0, self.models.clap.dim), np.float32)

    def rewards(self, embeddings: Embeddings, texts: np.ndarray) -> np.ndarray:
        """(n,) TuneJury scores; `texts` count only where the protocol says so."""
        captions = texts if self.protocol.text == "caption" else None
        return self.models.tunejury.score(embeddings.clap, embeddings.mert, captions)

    def _clap(self, waves: list[np.ndarray]) -> np.ndarray:
        how = self.protocol
        seed = 0 if how.crop == "random" else None
        return self.models.clap.embed_audio(waves, how.crop, seed, int16=how.int16, bandlimit_hz=how.bandlimit_hz)

    def _resampling(self, pool: Executor, kind: "_Kind", waves: list[np.ndarray]) -> "list[Future[np.ndarray]]":
        """The clips at the rate of a model, begun; none where the cache may have what is to be made of them."""
        return (
            [] if self._cache is not None else [pool.submit(resample, wave, SAMPLE_RATE, kind.rate) for wave in waves]
        )

    def _embedded(
        self, pool: Executor, kind: "_Kind", waves: list[np.ndarray], begun: "Sequence[Future[np.ndarray]]"
    ) -> np.ndarray:
        """(n, width) float32 of a model.

        Args:
            begun: the clips at its rate, where there is no cache.
        """
        if not waves:
            return np.zeros((0, kind.width), np.float32)
        if self._cache is None:
            return kind.make([future.result() for future in begun])

        def make(missing: list[int]) -> list[np.ndarray]:
            return list(kind.make(list(pool.map(lambda i: resample(waves[i], SAMPLE_RATE, kind.rate), missing))))

        keys = [audio_key(wave, SAMPLE_RATE, self._cache_name, kind.name) for wave in waves]
        return np.stack(self._cache.get_or_make(keys, make))


@dataclass(frozen=True)
class _Kind:
    """A model that embeds audio: its name, the rate in Hz of what it takes, the width of an embedding, and how."""

    name: str
    rate: int
    width: int
    make: Callable[[list[np.ndarray]], np.ndarray]
