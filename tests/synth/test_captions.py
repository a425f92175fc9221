"""Captions are true, varied, and their held-out wordings are new sentences of known words."""

import re

import numpy as np
import pytest

from ttmray.synth.captions import CLAUSES, KITS, OPENINGS, ROOM, SOUND, TEMPO, VOICE, caption, wordings
from ttmray.synth.composer import compose
from ttmray.synth.instruments import INSTRUMENTS
from ttmray.synth.styles import STYLES


def written(index: int, heldout: bool = False, count: int = 1, **attributes) -> list[str]:
    of = compose(41, index, seconds=5.0, **attributes).attributes
    rng = np.random.default_rng([index, heldout])
    return [caption(of, rng, heldout).lower() for _ in range(count)]


@pytest.mark.parametrize("heldout", [False, True])
def test_captions_tell_the_truth_about_voice_drums_and_tempo(heldout):
    for index in range(12):
        for text in written(index, heldout, 20, voice="", kit="", tempo=70.0):
            assert not re.search(r"\b(sings|singer|low voice|high voice|male|female)\b", text), text
            assert not re.search(r"\bdrums\b", re.sub(r"(no|without|are no) drums", "", text)), text
            assert any(word in text for word in TEMPO["slow"]), text
            assert not any(re.search(rf"(?<!-)\b{word}\b", text) for word in TEMPO["fast"]), text
        for text in written(index, heldout, 20, voice="low", kit="acoustic", tempo=150.0):
            assert not re.search(r"instrumental|no vocals|without vocals|no singing|no drums|drumless|female", text), (
                text
            )
            assert any(word in text for word in TEMPO["fast"]), text


def test_most_captions_tell_whether_there_are_drums_and_a_voice():
    texts = [text for index in range(60) for text in written(index, kit="acoustic", voice="high")]
    assert np.mean([bool(re.search("drum", text)) for text in texts]) > 0.7
    assert np.mean([bool(re.search("voice|vocals|sing", text)) for text in texts]) > 0.7


def test_captions_of_one_piece_differ_and_those_of_all_pieces_do():
    assert len(set(written(0, count=100))) > 90
    texts = [text for index in range(300) for text in written(index)]
    assert len(set(texts)) > 295
    assert max(len(text.split()) for text in texts) < 60


def test_heldout_sentences_are_new_but_their_words_are_known():
    assert wordings(1) <= wordings(0)
    for pairs in (OPENINGS, *CLAUSES.values(), *ROOM.values()):
        assert not set(pairs[0]) & set(pairs[1])
    seen = {text for index in range(200) for text in written(index, count=2)}
    unseen = {text for index in range(200) for text in written(index, True, count=2)}
    assert not seen & unseen


def test_other_names_are_of_sounds_that_exist():
    assert SOUND.keys() <= INSTRUMENTS.keys()
    assert KITS.keys() == {kit for style in STYLES.values() for kit in style.kits if kit}
    assert VOICE.keys() == {"low", "high"}
