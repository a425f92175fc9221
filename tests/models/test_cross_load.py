"""One rule for weights of one head in the forward of another: what collapses is refused, the rest is said aloud."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ttmray.errors import UserError
from ttmray.models.backbone_weights import METADATA, debug_backbone, load_backbone, with_head
from ttmray.models.cross_load import SHARED, CrossLoad, cross_load
from ttmray.models.score_heads import HEADS, Head

COLLAPSE = [("v2", "v1"), ("v2", "v4")]
BENIGN = [("v1", "v2"), ("v4", "v2"), ("v1", "v4"), ("v4", "v1")]


def save(path: Path, head: Head) -> Path:
    model = debug_backbone(0, head)
    save_file(model.state_dict(), path, {METADATA: json.dumps({"backbone": model.config.to_dict()})})
    return path


def test_only_v2_weights_that_would_modulate_blocks_are_refused():
    refused = []
    for weights, forward in itertools.product(HEADS, HEADS):
        try:
            cross_load(weights, forward, "w")
        except UserError:
            refused.append((weights, forward))
    assert refused == COLLAPSE
    assert set(BENIGN) | set(COLLAPSE) == set(itertools.permutations(SHARED, 2))


def test_nothing_is_said_about_the_own_head_or_a_new_one_on_a_plain_backbone():
    for head in HEADS:
        assert cross_load(head, head, "w") is cross_load("none", head, "w") is cross_load(head, "none", "w") is None


@pytest.mark.parametrize(("weights", "forward"), COLLAPSE)
def test_loading_refuses_what_collapses_and_force_is_said_aloud(weights, forward, tmp_path, capsys):
    path = save(tmp_path / "a.safetensors", weights)
    with pytest.raises(UserError, match=f"was trained as v2 and collapses as {forward}") as caught:
        load_backbone(path, head=forward)
    assert "force_head: true" in (caught.value.hint or "")
    assert load_backbone(path, head=forward, force=True).config.head == forward
    said = capsys.readouterr().out
    assert f"v2 weights in the {forward} forward, by force" in said
    assert "collapse" in said
    with pytest.raises(UserError, match="collapses"):
        with_head(debug_backbone(0, weights), forward)


@pytest.mark.parametrize(("weights", "forward"), BENIGN)
def test_loading_says_what_becomes_of_the_score(weights, forward, tmp_path, capsys):
    load_backbone(save(tmp_path / "a.safetensors", weights), head=forward)
    said = capsys.readouterr().out
    assert f"{weights} weights in the {forward} forward" in said
    assert ("the score steers nothing" in said) == (forward == "v2")


def test_a_head_of_other_tensors_cannot_be_loaded_and_starts_anew_where_it_is_trained(tmp_path):
    path = save(tmp_path / "a.safetensors", "v3")
    with pytest.raises(UserError, match="has the score head v3, whose tensors are not those of v1"):
        load_backbone(path, head="v1")
    before = torch.get_rng_state()
    moved, _ = with_head(debug_backbone(0, "v3"), "v1")
    assert torch.equal(torch.get_rng_state(), before)
    assert not moved.score_embed.mlp[2].weight.any()
    assert str(CrossLoad("v3", "v1")) == "a new head v1 on v3 weights"
