"""Pieces are seeded, varied, in key, in tune and in time."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ttmray.synth.composer import compose
from ttmray.synth.instruments import INSTRUMENTS, RATE, tone
from ttmray.synth.measures import onsets, pitch
from ttmray.synth.mixing import render
from ttmray.synth.piece import STEMS, Clock, Note
from ttmray.synth.styles import GROOVES, STYLES
from ttmray.synth.theory import MODES, PROGRESSIONS, Chord, Key, hertz, nearest, tempo_word, voicing
from ttmray.synth.voice import sing

SEED = 20


@pytest.fixture(scope="module")
def pieces():
    return [compose(SEED, index) for index in range(150)]


def test_a_piece_is_the_same_however_many_are_composed(pieces):
    assert compose(SEED, 7) == pieces[7]
    assert compose(SEED + 1, 7) != pieces[7]


def test_attributes_are_varied_and_every_style_is_drawn(pieces):
    attributes = [piece.attributes for piece in pieces]
    assert {each.style for each in attributes} == STYLES.keys()
    words = Counter(each.tempo_word for each in attributes)
    assert min(words["slow"], words["medium"], words["fast"]) > 0.15 * len(pieces)
    assert 0.35 < np.mean([bool(each.voice) for each in attributes]) < 0.65
    assert 0.1 < np.mean([not each.kit for each in attributes]) < 0.5
    assert len({each.key for each in attributes}) > 30


def test_no_two_pieces_have_the_same_notes(pieces):
    def melody(piece):
        return tuple((round(n.start * 4), n.midi) for n in piece.notes if n.part in ("voice", "lead"))[:24]

    assert len({melody(piece) for piece in pieces}) == len(pieces)


def test_notes_are_in_key_but_for_leading_tones(pieces):
    for piece in pieces:
        key = piece.attributes.key
        allowed = key.scale() | ({(key.tonic + 11) % 12} if key.mode == "minor" else set())
        assert {int(n.midi) % 12 for n in piece.notes if n.part != "drums"} <= allowed


def test_notes_lie_on_a_grid_of_sixteenths_but_for_a_human_touch(pieces):
    for piece in pieces:
        of = piece.attributes
        clock = Clock(of.tempo, of.swing, of.swung)
        grid = np.array([clock.seconds(i / 4) for i in range(int(piece.seconds * of.tempo / 15) + 8)])
        starts = np.array([note.start for note in piece.notes])
        away = np.abs(starts[:, None] - grid[np.clip(np.searchsorted(grid, starts)[:, None] - [0, 1], 0, None)]).min(1)
        assert away.max() <= 2 * STYLES[of.style].loose / 1000 + 1e-6


def test_a_piece_has_a_form_whose_sections_come_back(pieces):
    for piece in pieces:
        names = [section.name for section in piece.sections]
        assert len(set(names)) > 1
        assert piece.sections[-1].end == pytest.approx(piece.seconds)
        for before, after in zip(piece.sections, piece.sections[1:], strict=False):
            assert before.end == pytest.approx(after.start)


def test_every_five_seconds_hold_notes_and_what_is_heard_there_is_told(pieces):
    for piece in pieces[:60]:
        for start in range(0, int(piece.seconds) - 5, 5):
            heard = piece.heard(start, 5)
            inside = [n for n in piece.notes if n.start < start + 5 and n.end > start]
            assert inside
            assert bool(heard.kit) == (sum(n.part == "drums" and n.start >= start for n in inside) >= 2)
            assert heard.voice in ("", piece.attributes.voice)


@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.5])
def test_less_than_a_bar_is_a_piece_too(seconds):
    piece = compose(SEED, 1, seconds=seconds)
    stems = render(piece)
    assert {audio.shape for audio in stems.values()} == {(2, round(seconds * RATE))}
    assert all(np.isfinite(audio).all() for audio in stems.values())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_length_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="cannot be composed"):
        compose(SEED, 0, seconds=seconds)


@pytest.mark.parametrize("name", [name for name in INSTRUMENTS])
def test_every_instrument_is_in_tune(name):
    spec = INSTRUMENTS[name]
    for midi in (spec.low + 12.0, spec.low + 16.37):
        wave = tone(name, midi, 1.2, 0.0, np.random.default_rng(0))
        size = 1 << 19
        part = wave[4000:30000]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(part.size), size))
        near = hertz(midi) * 2 ** (np.array([-1, 1]) / 12) / RATE * size
        first, last = int(near[0]), int(near[1])
        found = (first + np.argmax(spectrum[first:last])) * RATE / size
        cents = 1200 * np.log2(found / hertz(midi))
        assert abs(cents) < 10  # unison and vibrato widen the line, the middle stays
        assert np.isfinite(wave).all()
        assert 0.02 < np.sqrt(np.mean(wave[:20000] ** 2)) < 1.0


def test_the_voice_sings_the_notes_it_is_given():
    pitches = [57, 60, 64, 62, 57]
    notes = [
        Note("voice", float(p), 0.8 * i, 0.76, 0.8, say)
        for i, (p, say) in enumerate(zip(pitches, ["ma", "lo", "a", "ne", "u"], strict=True))
    ]
    wave = sing(notes, "low", 0.0, 0.0, 4 * RATE + 4000, np.random.default_rng(1))
    found, clear = pitch(wave)
    times = (np.arange(len(found)) * 2048 + 4096) / RATE
    for note in notes:
        inside = (times > note.start + 0.2) & (times < note.end - 0.2) & (clear > 0.8)
        assert inside.any()
        assert np.median(69 + 12 * np.log2(found[inside] / 440)) == pytest.approx(note.midi, abs=0.3)


def test_melodic_clips_have_the_pitch_of_their_notes():
    """On fresh seeds: a lone lead, measured from audio."""
    errors = []
    for index in range(12):
        piece = compose(SEED + 3, index, voice="", lead="clarinet", room="dry")
        lead = replace(piece, tracks=tuple(track for track in piece.tracks if track.part == "lead"))
        long = [n for n in piece.notes if n.part == "lead" and n.length > 0.4]
        start = max(0.0, long[0].start - 1)
        wave = render(lead, start, min(8.0, piece.seconds - start))["other"].mean(axis=0)
        found, clear = pitch(wave)
        times = start + (np.arange(len(found)) * 2048 + 4096) / RATE
        for note in long:
            inside = (times > note.start + 0.15) & (times < note.end - 0.12) & (clear > 0.8)
            if inside.any():
                errors.append(abs(69 + 12 * np.log2(np.median(found[inside]) / 440) - note.midi))
    assert len(errors) > 30
    assert np.mean(np.array(errors) < 0.5) > 0.95


def test_strokes_sound_when_they_are_written():
    piece = compose(SEED, 2, style="house", tempo=120.0, kit="electronic", swing=0.5)
    drums = render(piece)["drums"].mean(axis=0)
    envelope = onsets(drums / drums.std())
    kicks = sorted(n.start for n in piece.notes if n.say == "kick")[1:-1]
    late = []
    for start in kicks[:40]:
        frame = round(start * RATE / 256)
        late.append(int(np.argmax(envelope[frame - 8 : frame + 8])) - 8)
    # the rise is seen two frames early, by half a window
    assert np.ptp(np.percentile(late, [5, 95])) <= 3
    assert abs(np.median(late) + 2) * 256 / RATE < 0.015


def test_tempo_words_have_the_stated_bounds():
    assert [tempo_word(bpm) for bpm in (60, 83.9, 84, 132, 132.1, 190)] == [
        "slow",
        "slow",
        "medium",
        "medium",
        "fast",
        "fast",
    ]


def test_swing_moves_off_beats_alone():
    clock = Clock(120, 0.66, 2)
    assert clock.seconds(3) == pytest.approx(1.5)
    assert clock.seconds(3.5) == pytest.approx(1.5 + 0.66 * 0.5)
    assert Clock(120, 0.5, 2).seconds(3.25) == pytest.approx(1.625)


def test_theory_chords_and_voicings():
    key = Key(9, "minor")
    assert Chord(key, 0).classes() == (9, 0, 4)
    assert Chord(key, 4).classes() == (4, 7, 11)
    assert Chord(key, 4, 4, raised=True).classes() == (4, 8, 11, 2)
    assert nearest(60.4, (0, 7)) == 60
    notes = voicing(Chord(Key(0, "major"), 3), (60, 64, 67), 48, 72)
    assert sorted(n % 12 for n in notes) == [0, 5, 9]
    assert abs(np.mean(notes) - 63.7) < 3


def test_tables_are_complete():
    for style in STYLES.values():
        assert set(style.modes) <= MODES.keys()
        assert set(style.harmony) <= PROGRESSIONS.keys()
        assert set(style.grooves) <= GROOVES.keys()
        assert {*style.bass, *style.comp, *style.lead, *style.pads} - {""} <= INSTRUMENTS.keys()
        lengths = {len(pattern) for name in style.grooves for groove in GROOVES[name] for pattern in groove.values()}
        assert lengths == {4 * style.beats} or not any(style.kits)
    for degrees in (chain for family in PROGRESSIONS.values() for chain in family):
        assert all(0 <= degree < 7 for degree in degrees)


def test_stems_are_where_their_parts_are():
    assert STEMS == ("drums", "bass", "other", "vocals")
    piece = compose(SEED, 4, voice="", kit="")
    stems = render(piece, 10, 5)
    assert not stems["vocals"].any()
    assert not stems["drums"].any()
    assert stems["other"].any()
