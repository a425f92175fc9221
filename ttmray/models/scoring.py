"""Rewards and CLAP scores of clips: the one path from audio to numbers, for the corpus job and every tool.

Audio comes in mono at 44.1 kHz, the rate of the pipeline, and is resampled once for each encoder. So a clip has
the same scores wherever it is scored.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        waves = list(waves)
        clap = self._kept("clap", waves, CLAP_SAMPLE_RATE, self.models.clap.dim, self._clap)
        mert = self._kept("mert", waves, MERT_SAMPLE_RATE, self.models.mert.dim, self.models.mert.embed)
        return Embeddings(clap, mert)

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

    def _kept(
        self,
        name: str,
        waves: Sequence[np.ndarray],
        rate: int,
        width: int,
        make: Callable[[list[np.ndarray]], np.ndarray],
    ) -> np.ndarray:
        if not len(waves):
            return np.zeros((0, width), np.float32)
        if self._cache is None:
            return make(self._resampled(waves, rate))
        keys = [audio_key(wave, SAMPLE_RATE, self._cache_name, name) for wave in waves]
        embeddings = self._cache.get_or_make(
            keys, lambda missing: list(make(self._resampled([waves[i] for i in missing], rate)))
        )
        return np.stack(embeddings)

    def _resampled(self, waves: Sequence[np.ndarray], rate: int) -> list[np.ndarray]:
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda wave: resample(wave, SAMPLE_RATE, rate), waves))
