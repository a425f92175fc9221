"""TuneJury: layouts of released heads, variants, feature order, protocol names."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ttmray.errors import UserError
from ttmray.models.tunejury import (
    RELEASED_WIDTHS,
    VARIANTS,
    TuneJury,
    TuneJuryHead,
    debug_tunejury,
    load_tunejury,
)

DIMS = (12, 20, 8)  # all sums of blocks differ, so every variant can be told from its width
VARIANT_DIMS = {"A1": 12, "A2": 20, "A3": 8, "A4": 32, "A5": 20, "A6": 28, "A7": 40}
UNIQUE_DIMS = (12, 21, 8)


def head(width: int, hidden=(6, 4), seed=0) -> TuneJuryHead:
    """A head whose batch statistics and biases are not their defaults."""
    generator = torch.Generator().manual_seed(seed)
    made = TuneJuryHead((width, *hidden))
    for value in made.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    return made.eval()


def features(dims=DIMS, count=3, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(count, dim)).astype(np.float32) for dim in dims]


# ---- golden: figures of the released heads ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "parameters"),
    [
        ((2048, *RELEASED_WIDTHS), 2_791_169),
        ((1536, *RELEASED_WIDTHS), 2_266_881),
        ((1024, *RELEASED_WIDTHS), 1_742_593),
        ((512, *RELEASED_WIDTHS), 1_218_305),
        ((1024, 512, 256, 128, 64), 699_265),  # the released MuQ head: half of each hidden width
    ],
)
def test_golden_parameter_counts_of_the_released_heads(widths, parameters):
    with torch.device("meta"):
        made = TuneJuryHead(widths)
    assert sum(p.numel() for p in made.parameters()) == parameters
    keys = made.state_dict().keys()
    assert len(keys) == 30
    assert {int(key.split(".")[1]) for key in keys} == {0, 1, 4, 5, 8, 9, 12, 13, 16}


# ---- loading ---------------------------------------------------------------------------------------------


@given(
    prefixes=st.lists(st.sampled_from(["net.", "score.", "module.", "model."]), max_size=3),
    wrapped=st.booleans(),
    hidden=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_every_wrapper_and_width_is_recognised_and_recorded(prefixes, wrapped, hidden):
    made = head(sum(UNIQUE_DIMS), hidden)
    prefix = "".join(prefixes)
    state = {prefix + key: value for key, value in made.net.state_dict().items()}
    loaded = load_tunejury({"state_dict": state, "epoch": 3} if wrapped else state, block_dims=UNIQUE_DIMS)
    assert loaded.layout.prefix == prefix
    assert loaded.layout.widths == (sum(UNIQUE_DIMS), *hidden)
    assert loaded.layout.variant == "A7"
    blocks = features(UNIQUE_DIMS)
    expected = made(torch.from_numpy(np.concatenate(blocks, axis=1))).detach().numpy()
    np.testing.assert_allclose(loaded.score(*blocks), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_reads_its_blocks_in_order_and_no_other(variant):
    blocks = dict(zip(("clap_audio", "mert", "text"), features(DIMS), strict=True))
    made = head(VARIANT_DIMS[variant])
    exclude = set(blocks) - set(VARIANTS[variant])
    loaded = load_tunejury(made.state_dict(), exclude=exclude, block_dims=DIMS)
    assert loaded.variant == variant
    joined = np.concatenate([blocks[name] for name in VARIANTS[variant]], axis=1)
    expected = made(torch.from_numpy(joined)).detach().numpy()
    scores = loaded.score(blocks["clap_audio"], blocks["mert"], blocks["text"])
    assert scores.dtype == np.float32
    assert scores.shape == (3,)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    if "mert" in exclude:
        assert np.array_equal(loaded.score(blocks["clap_audio"], None, blocks["text"]), scores)


def test_ambiguous_widths_are_refused_until_the_blocks_are_named():
    for width, options in ((512, "A1, A3"), (1024, "A2, A5"), (1536, "A4, A6")):
        with pytest.raises(UserError, match=f"could be any of {options}"):
            load_tunejury(head(width).state_dict())
    assert load_tunejury(head(512).state_dict(), exclude=["mert", "text"]).variant == "A1"
    with pytest.raises(UserError, match="no blocks"):
        load_tunejury(head(700).state_dict())
    with pytest.raises(UserError, match="give 1536"):
        load_tunejury(head(512).state_dict(), exclude=["text"])
    for bad in (["muq"], ["clap_audio", "mert", "text"]):
        with pytest.raises(UserError, match="exclude must be"):
            load_tunejury(head(512).state_dict(), exclude=bad)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_sidecar_names_the_blocks_and_must_match_the_weights(tmp_path, suffix):
    path, state = tmp_path / f"A1{suffix}", head(512).state_dict()
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps({"input_dim": 512, "exclude": ["mert", "text"]}))
    assert load_tunejury(path).layout.variant == "A1"
    assert load_tunejury(path, exclude=["mert", "clap_audio"]).variant == "A3"  # the argument wins
    for wrong in ({"input_dim": 1024, "exclude": ["mert", "text"]}, {"input_dim": 512}):
        path.with_suffix(".json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="the weights beside it take 512"):
            load_tunejury(path)


def test_leftovers_gaps_and_other_networks_are_refused_by_name():
    state = dict(head(40).net.state_dict())
    cases = {
        "flag.weight": state | {"flag.weight": torch.zeros(1)},
        "epoch": state | {"epoch": 3},
        r"5\.running_var": {key: value for key, value in state.items() if key != "5.running_var"},
        r"8\.weight": state | {"8.weight": torch.zeros(2, 4)},
        r"0\.weight": {"0.weight": torch.zeros(4, 40), "0.bias": torch.zeros(4)},
        "it is empty": {},
    }
    for name, bad in cases.items():
        with pytest.raises(UserError, match=name):
            load_tunejury(bad, block_dims=UNIQUE_DIMS)


def test_a_head_of_another_width_than_its_variant_is_refused():
    with pytest.raises(UserError, match="takes 30 inputs"):
        TuneJury(head(30), "A7", DIMS)


# ---- scores ----------------------------------------------------------------------------------------------


def test_no_text_is_the_zero_vector_and_text_matters():
    jury = debug_tunejury(0, 64)
    audio, mert, text = features((512, 64, 512))
    silent = jury.score(audio, mert)
    assert np.array_equal(silent, jury.score(audio, mert, np.zeros_like(text)))
    assert not np.array_equal(silent, jury.score(audio, mert, text))
    assert np.array_equal(jury.score(audio[1:2], mert[1:2], text[1:2]), jury.score(audio, mert, text)[1:2])
    assert jury.score(audio[:0], mert[:0]).shape == (0,)
    assert np.std(silent) > 1e-3


def test_wrong_missing_and_infinite_features_raise():
    jury = debug_tunejury(0, 64)
    audio, mert, _ = features((512, 64, 512))
    for bad_mert in (mert[:2], mert[:, :63], None):
        with pytest.raises(ValueError, match="mert must have shape"):
            jury.score(audio, bad_mert)
    with pytest.raises(ValueError, match="not finite"):
        jury.score(np.full_like(audio, np.inf), mert)
    with torch.no_grad():
        jury.head.net[-1].bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        jury.score(audio, mert)


def test_debug_heads_follow_their_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    audio, mert, _ = features((512, 64, 512))
    first, again, other = (debug_tunejury(seed).score(audio, mert) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
