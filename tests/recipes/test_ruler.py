"""The quality ruler against rewards whose answer is known."""

import json

import numpy as np
import pytest

from ttmray.cli import main
from ttmray.models.scoring import Embeddings, Scorer
from ttmray.recipes import ruler
from ttmray.synth.faults import KINDS


@pytest.fixture
def reward_of_loud_treble(monkeypatch):
    """A reward that hears nothing but the share of high frequencies: dull music is bad, all else is alike."""

    def embed(self, waves):
        spectra = [np.abs(np.fft.rfft(wave)) ** 2 for wave in waves]
        share = [[s[len(s) // 8 :].sum() / s.sum()] for s in spectra]
        return Embeddings(np.array(share, np.float32), np.zeros((len(waves), 1), np.float32))

    monkeypatch.setattr(Scorer, "embed", embed)
    monkeypatch.setattr(Scorer, "rewards", lambda self, embeddings, texts: embeddings.clap[:, 0])


@pytest.mark.slow
def test_a_reward_that_hears_treble_alone_is_told_to_hear_dullness_and_no_detuning(reward_of_loud_treble, tmp_path):
    words = ["synth", "check", "--bundle", "debug", "--pieces", "4", "--seed", "5", "--out", str(tmp_path)]
    assert main([*words, "--fault", "dull", "--fault", "detune"]) == 0
    result = json.loads((tmp_path / ruler.RESULT).read_text())
    faults = {row["kind"]: row for row in result["faults"]}
    assert faults["dull"]["heard"] == 1.0
    assert faults["dull"]["told"] == 1.0
    assert faults["dull"]["fall"] > 0
    assert abs(faults["detune"]["heard"]) < 0.9
    assert faults["dull"]["cost"] == KINDS["dull"].cost
    page = (tmp_path / "ruler.md").read_text()
    assert "debug bundle" in page
    assert page.index("dull") < page.index("detune")


def test_too_few_pieces_are_refused(capsys):
    assert main(["synth", "check", "--bundle", "debug", "--pieces", "2"]) == 2
    assert "--pieces is 2" in capsys.readouterr().err


def test_a_fault_that_is_none_is_refused(capsys):
    assert main(["synth", "check", "--bundle", "debug", "--fault", "boredom"]) == 2
    assert "boredom" in capsys.readouterr().err
