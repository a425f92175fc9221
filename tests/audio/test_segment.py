import csv
import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.audio.segment import SegmentRule, count_clips, cut, partition
from ttmray.errors import ClipError

RATES = st.sampled_from([16000, 22050, 44100, 48000])


def test_golden_partitions_are_reproduced(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "rules.json").read_text())["partition"]["cases"]
    assert cases
    for case in cases:
        expected = [(start, end) for _, start, end in case["segments"]]
        assert partition(case["num_samples"], case["sample_rate"]) == expected


def test_the_jamendo_catalogue_gives_the_known_number_of_clips(data_dir: Path) -> None:
    with gzip.open(data_dir / "jamendo" / "tracks.tsv.gz", "rt", newline="") as file:
        durations = np.array([float(row["duration_s"]) for row in csv.DictReader(file, delimiter="\t")])
    counts = count_clips(durations)
    assert counts.shape == durations.shape
    assert int(counts.sum()) == 537_626


@given(num_samples=st.integers(0, 60_000_000), rate=RATES)
def test_segments_are_equal_long_evenly_spaced_and_at_most_ten(num_samples: int, rate: int) -> None:
    segments = partition(num_samples, rate)
    assert len(segments) <= 10
    assert {end - start for start, end in segments} <= {10 * rate}
    assert len({b[0] - a[0] for a, b in pairwise(segments)}) <= 1
    assert bool(segments) == (num_samples >= 5 * rate)


@given(num_samples=st.integers(0, 60_000_000), rate=RATES)
def test_segments_of_a_long_enough_track_do_not_overlap_and_span_it(num_samples: int, rate: int) -> None:
    segments = partition(num_samples, rate)
    if num_samples < 10 * rate:
        assert segments in ([], [(0, 10 * rate)])
        return
    assert segments[0][0] == 0
    assert segments[-1][1] <= num_samples
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(segments))
    if len(segments) > 1:  # what is left over by the floor division of the hop
        assert num_samples - segments[-1][1] < len(segments) - 1


@given(
    num_samples=st.integers(0, 400_000),
    clip_s=st.floats(0.5, 20),
    min_s=st.floats(0.1, 20),
    max_clips=st.integers(1, 12),
)
def test_counting_agrees_with_partitioning_for_any_rule(
    num_samples: int, clip_s: float, min_s: float, max_clips: int
) -> None:
    rule = SegmentRule(clip_s, min_s, max_clips)
    expected = len(partition(num_samples, 4000, rule))
    assert count_clips(num_samples / 4000, 4000, rule) == expected
    assert count_clips(np.array([num_samples / 4000]), 4000, rule).tolist() == [expected]


def test_the_shortest_usable_track_gives_one_segment_that_ends_past_it() -> None:
    assert partition(5 * 44100, 44100) == [(0, 441_000)]
    assert partition(5 * 44100 - 1, 44100) == []


@pytest.mark.parametrize("values", [(0, 5, 10), (10, 0, 10), (10, 5, 0)])
def test_a_rule_without_length_or_clips_is_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        SegmentRule(*values)


def test_a_cut_inside_the_track_is_an_independent_copy() -> None:
    audio = np.arange(20, dtype=np.float32).reshape(2, 10)
    segment = cut(audio, 10, 2, 5)
    np.testing.assert_array_equal(segment, [[2, 3, 4], [12, 13, 14]])
    segment[:] = 0
    assert audio[0, 2] == 2


def test_a_cut_past_the_end_is_padded_with_zeros_on_the_right() -> None:
    segment = cut(np.ones((1, 4), dtype=np.float32), 10, 1, 7)
    assert segment.dtype == np.float32
    np.testing.assert_array_equal(segment, [[1, 1, 1, 0, 0, 0]])


def test_a_cut_that_starts_after_the_end_is_a_failed_clip() -> None:
    with pytest.raises(ClipError, match=r"starts at 0\.40 s, the track ends at 0\.40 s") as raised:
        cut(np.ones((1, 4), dtype=np.float32), 10, 4, 8)
    assert (raised.value.status, raised.value.reason) == ("failed", "past_end")


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 3), (4, 2)])
def test_a_cut_of_no_samples_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a segment"):
        cut(np.ones((1, 9), dtype=np.float32), 10, start, end)
