"""The one policy of what an exception costs: a clip, or the job."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.errors import ClipError, UserError
from ttmray.quarantine import clip_error, together


class OutOfMemoryError(RuntimeError):
    """By name torch's."""


class AcceleratorError(RuntimeError):
    """By name torch's."""


@given(st.lists(st.booleans(), max_size=8))
def test_bad_items_are_found_alone_and_the_others_have_their_results_in_order(bad):
    calls = []

    def work(some):
        calls.append(len(some))
        if any(bad[i] for i in some):
            raise TypeError("no sound")
        return [10 * i for i in some]

    results = {}
    for some, outcome in together(range(len(bad)), work):
        values = [outcome] * len(some) if isinstance(outcome, ClipError) else outcome
        results |= dict(zip(some, values, strict=True))
    assert list(results) == list(range(len(bad)))
    for i, result in results.items():
        if bad[i]:
            assert (result.status, result.reason, result.message) == ("failed", "error", "TypeError: no sound")
        else:
            assert result == 10 * i
    if not any(bad):
        assert calls == ([len(bad)] if bad else [])


def test_a_clip_error_is_kept_as_it_is():
    error = ClipError("rejected", "silent", "nothing")
    assert clip_error(error) is error


@pytest.mark.parametrize(
    "error",
    [
        UserError("no weights"),
        MemoryError(),
        OSError(28, "No space left on device"),
        RuntimeError("CUDA error: device-side assert triggered"),
        AcceleratorError("broken"),
    ],
)
def test_what_would_hit_every_clip_ends_the_job_at_once(error):
    calls = []

    def work(some):
        calls.append(some)
        raise error

    with pytest.raises(type(error)) as caught:
        together([1, 2, 3], work)
    assert caught.value is error
    assert len(calls) == 1


def test_a_gpu_out_of_memory_says_what_to_lower():
    with pytest.raises(UserError, match="out of memory") as caught:
        clip_error(OutOfMemoryError("2 GiB"), "Lower runtime.batch.")
    assert caught.value.hint == "Lower runtime.batch."
