import numpy as np
import pytest

from ttmray.audio.level import require_audible, silence
from ttmray.errors import ClipError

NOISE = np.random.default_rng(0).normal(0, 0.1, 44100).astype(np.float32)


@pytest.mark.parametrize(
    ("clip", "why"),
    [
        ([NOISE, NOISE], ""),
        ([NOISE, 0 * NOISE], ""),
        ([NOISE], ""),
        ([NOISE, -0.9 * NOISE], ""),  # the mix is 26 dB down: thin, and music
        ([NOISE, NOISE[::-1]], ""),
        ([1e-3 * NOISE, 1e-3 * NOISE], ""),
        ([0 * NOISE, 0 * NOISE], "sample peak -inf dBFS"),
        ([1e-4 * NOISE, 1e-4 * NOISE], "sample peak"),
        ([NOISE, -NOISE], "the channels cancel"),
        ([NOISE, -NOISE + 1e-3 * NOISE[::-1]], "the channels cancel"),  # as lossy coding leaves it
        ([], "sample peak"),
    ],
)
def test_a_clip_is_silent_where_nothing_is_heard_of_its_mono_mix(clip: list[np.ndarray], why: str) -> None:
    x = np.array(clip, np.float32).reshape(len(clip), -1) if clip else np.zeros((1, 0), np.float32)
    assert silence(x).startswith(why)
    assert bool(silence(x)) == bool(why)
    if why:
        with pytest.raises(ClipError) as raised:
            require_audible(x)
        assert (raised.value.status, raised.value.reason) == ("rejected", "silent")
    else:
        require_audible(x)


def test_the_limit_is_a_setting() -> None:
    assert silence(np.stack([NOISE, NOISE]), dbfs=0.0)
    assert not silence(1e-5 * np.stack([NOISE, NOISE]), dbfs=-200.0)
