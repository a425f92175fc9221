"""Faults have known strengths and costs; quality knows nothing of style; stems always sum to the mix."""

import numpy as np
import pytest

from ttmray.audio.loudness import true_peak
from ttmray.synth.composer import compose
from ttmray.synth.faults import (
    BASE,
    FLOOR,
    KINDS,
    ON_NOTES,
    SHORT,
    add_faults,
    draw_more,
    faults_of,
    on_notes,
    perform,
    sum_error,
    true_quality,
)
from ttmray.synth.instruments import RATE
from ttmray.synth.mixing import LUFS, measured_loudness, mix, render
from ttmray.synth.world import clip, song

SEED = 31


def test_quality_has_the_spread_of_the_papers_rewards():
    quality = np.array([true_quality(faults_of(SEED, index)) for index in range(5000)])
    assert np.std(quality) == pytest.approx(0.6, abs=0.05)
    assert np.mean(quality) == pytest.approx(0.6, abs=0.06)
    assert quality.max() == BASE
    assert quality.min() >= FLOOR


def test_quality_is_independent_of_every_attribute():
    rows = [compose(SEED, index, seconds=4.0).attributes.row() for index in range(1200)]
    quality = np.array([true_quality(faults_of(SEED, index)) for index in range(1200)])
    for name in ("tempo", "bright", "swing", "beats", "drums", "vocals"):
        values = np.array([float(row[name]) for row in rows])
        assert abs(np.corrcoef(values, quality)[0, 1]) < 0.1, name
    for name in ("style", "mode", "tonic", "lead", "comp", "bass", "kit", "voice", "room"):
        values = np.array([row[name] for row in rows])
        groups = [quality[values == value] for value in np.unique(values)]
        between = sum(len(group) * (group.mean() - quality.mean()) ** 2 for group in groups)
        share = between / np.sum((quality - quality.mean()) ** 2)
        # the share that groups explain by chance alone, with room for its own spread
        assert share < (len(groups) - 1) / len(rows) + 4 * np.sqrt(2 * max(1, len(groups) - 1)) / len(rows), name


def test_costs_add_up_and_strengths_outside_are_refused():
    assert true_quality({}) == BASE
    assert true_quality({"noise": 0.5, "wow": 0.2}) == pytest.approx(
        BASE - 0.5 * KINDS["noise"].cost - 0.2 * KINDS["wow"].cost
    )
    short = compose(SEED, 0, seconds=0.3)
    assert true_quality({}, short) == pytest.approx(BASE - SHORT)
    assert true_quality(dict.fromkeys(KINDS, 1.0)) == FLOOR
    for bad in ({"noise": 1.2}, {"noise": -0.1}, {"nosie": 0.5}, {"noise": float("nan")}):
        with pytest.raises(ValueError, match="is no fault"):
            true_quality(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mix_is_the_sum_of_its_stems_at_the_usual_loudness(kind):
    piece = compose(SEED, 3, seconds=20.0)
    stems = perform(piece, {kind: 0.7}, 8, 5)
    total = mix(stems)
    assert sum_error(stems, total) < 1e-6
    assert np.isfinite(total).all()
    assert total.shape == (2, 5 * RATE)
    assert LUFS - 4 < measured_loudness(total) < LUFS + 0.1
    assert true_peak(total, RATE) < 0
    assert {audio.dtype for audio in stems.values()} == {np.dtype(np.float32)}
    assert not np.array_equal(total, mix(render(piece, 8, 5)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_the_same_every_time(kind):
    first, second = (clip(SEED, 5, 2.0, start=9.0, faults={kind: 0.5}).mix for _ in range(2))
    assert np.array_equal(first, second)


def test_faults_of_notes_do_what_they_say():
    piece = compose(SEED, 8, seconds=50.0)
    late = [after.start - before.start for before, after in _paired(piece, on_notes(piece, {"timing": 0.5}))]
    assert 0.02 < np.std(late) < 0.035
    cents = [100 * (a.midi - b.midi) for b, a in _paired(piece, on_notes(piece, {"detune": 1.0})) if b.part != "drums"]
    assert 25 < np.std(cents) < 60
    wrong = [abs(a.midi - b.midi) for b, a in _paired(piece, on_notes(piece, {"clash": 1.0})) if b.part != "drums"]
    assert set(wrong) == {0.0, 1.0}
    assert np.mean(wrong) == pytest.approx(0.5, abs=0.06)
    shares = [len(on_notes(piece, {"dropped": strength}).notes) / len(piece.notes) for strength in (0.3, 1.0)]
    assert 0.8 < shares[0] < 0.96
    assert 0.5 < shares[1] < 0.7


def _paired(before, after):
    """Notes by part in the order of their own starts: jitter may swap neighbours, which changes no spread."""

    def key(note):
        return note.part, note.say, note.velocity, note.length

    return list(zip(sorted(before.notes, key=key), sorted(after.notes, key=key), strict=True))


def test_a_window_of_a_piece_has_the_wrong_notes_of_the_whole():
    piece = compose(SEED, 2, seconds=30.0)
    assert on_notes(piece, {"clash": 0.5}) == on_notes(piece, {"clash": 0.5})
    assert set(ON_NOTES) < KINDS.keys()


def test_twenty_decibels_of_clipping_silence_and_half_a_bar_are_clips_of_low_quality():
    loud = song(SEED, 1, seconds=6.0, faults={"clipping": 1.0})
    peak = np.abs(loud.mix).max()
    assert np.mean(np.abs(loud.mix) > 0.99 * peak) > 0.1
    assert loud.quality == pytest.approx(BASE - KINDS["clipping"].cost)
    assert sum_error(loud.stems, loud.mix) < 1e-6
    short = song(SEED, 1, seconds=0.4)
    assert short.mix.shape == (2, round(0.4 * RATE))
    assert short.quality <= BASE - SHORT
    mute = song(SEED, 1, seconds=4.0, kit="", bass="", comp="", lead="", pad="", voice="")
    assert not mute.mix.any()
    assert mute.quality == FLOOR
    for item in (loud, short, mute):
        assert item.caption
        assert np.isfinite(item.mix).all()


def test_a_mix_takes_further_audio_faults_and_none_of_its_own_kind():
    clean = song(SEED, 3, seconds=5.0)
    before = clean.mix.copy()
    rng = np.random.default_rng(0)
    for _ in range(200):
        more = draw_more({"dull": 0.5, "noise": 0.2}, rng)
        assert 1 <= len(more) <= 2
        assert set(more) <= {"clipping", "wow"}
    assert all(len({"dull", "thin"} & draw_more({}, rng).keys()) < 2 for _ in range(200))
    dull = add_faults(clean.mix, {"dull": 1.0}, rng)
    np.testing.assert_array_equal(clean.mix, before)
    high = [np.abs(np.fft.rfft(audio[0]))[3000 * 5 :].sum() for audio in (clean.mix, dull)]
    assert high[1] < 0.2 * high[0]
    assert LUFS - 1 < measured_loudness(dull) < LUFS + 0.1  # the clean one is lower: its peaks come first
    with pytest.raises(ValueError, match="detune acts on notes"):
        add_faults(clean.mix, {"detune": 0.5}, rng)
