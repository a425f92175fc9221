"""Short music in memory, for tests that need some sound."""

import numpy as np

RATE = 44_100
"""Hz."""


def music(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """(channels, samples) float32: a tone with a beat over noise, other in each channel."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(channels).normal(scale=0.02, size=(channels, len(t)))
    tone = 0.3 * np.sin(2 * np.pi * 330 * t) * (np.sin(4 * np.pi * t) > 0)
    return (np.linspace(1.0, 0.7, channels)[:, None] * tone + noise).astype(np.float32)
