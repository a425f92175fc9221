"""Five ways for a score to enter: nothing at the start, each its own way afterwards, null never a score."""

from typing import get_args

import pytest
import torch

from ttmray.models.backbone import FluxAudio
from ttmray.models.backbone_weights import debug_backbone, transfer, with_head
from ttmray.models.score_heads import HEADS, Null, ScoreEmbedding

HEADS_WITH_SCORE = HEADS[1:]
NULLS = get_args(Null)
INPUTS = tuple(
    torch.randn(*shape, generator=torch.Generator().manual_seed(7)) for shape in ((2, 430, 40), (2, 77, 64), (2, 512))
)
TIMES = torch.tensor([0.2, 0.9])


def velocity(model: FluxAudio, score: torch.Tensor | None = None, null: torch.Tensor | None = None) -> torch.Tensor:
    x, text, pooled = INPUTS
    with torch.inference_mode():
        return model(x, TIMES, text, pooled, score, null)


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("head", HEADS_WITH_SCORE)
def test_a_new_head_leaves_the_output_of_a_trained_backbone_to_the_bit(head, null):
    trained = debug_backbone(3, "none")
    scored, report = with_head(trained, head, null)
    assert all(name.startswith("score_embed.") for name in report.missing)
    plain = velocity(trained)
    assert plain.std() > 0.1
    for score in (None, torch.tensor([-3.0, 5.0])):
        assert torch.equal(velocity(scored, score), plain)
    assert torch.equal(velocity(scored, torch.ones(2), torch.tensor([True, False])), plain)


@pytest.mark.parametrize("head", HEADS_WITH_SCORE)
def test_a_new_head_learns_from_its_first_steps(head):
    scored, _ = with_head(debug_backbone(3, "none"), head)
    scored.requires_grad_(True)
    optimiser = torch.optim.SGD([p for p in scored.score_embed.parameters()], lr=0.1)
    x, text, pooled = INPUTS
    target = torch.randn(2, 430, 40)
    for _ in range(3):
        optimiser.zero_grad()
        (scored(x, TIMES, text, pooled, torch.tensor([1.0, 2.0])) - target).square().mean().backward()
        optimiser.step()
    plain = velocity(scored)
    assert not torch.equal(velocity(scored, torch.tensor([1.0, 2.0])), plain)
    assert all(p.grad.abs().max() > 0 for p in scored.score_embed.parameters())


def test_heads_enter_in_different_places():
    outputs = {}
    model = debug_backbone(4, "v3")
    for head in HEADS_WITH_SCORE:
        scored = FluxAudio(model.config.with_head(head))
        report = transfer(scored, model.state_dict())
        assert report.missing == [] or head == "v5"
        if head == "v5":
            torch.nn.init.ones_(scored.score_embed.gate)
        outputs[head] = velocity(scored, torch.tensor([1.0, 2.0]))
    for a in outputs:
        assert sum(torch.equal(outputs[a], other) for other in outputs.values()) == 1, "only equal to itself"


def test_v4_leaves_the_modulation_of_text_alone():
    embedding = ScoreEmbedding(8, "v4")
    torch.nn.init.normal_(embedding.mlp[2].weight)
    injection = embedding.inject(torch.ones(1), torch.zeros(1, dtype=torch.bool))
    assert injection.audio_condition is not None
    assert injection.text_condition is None
    both = ScoreEmbedding(8, "v1").inject(torch.ones(1), torch.zeros(1, dtype=torch.bool))
    assert both.audio_condition is both.text_condition


@pytest.mark.parametrize("head", HEADS_WITH_SCORE)
def test_no_score_is_not_the_score_zero(head):
    model = debug_backbone(5, head)
    none = velocity(model)
    assert torch.equal(velocity(model, torch.tensor([7.0, float("nan")]), torch.ones(2, dtype=torch.bool)), none)
    assert not torch.equal(velocity(model, torch.zeros(2)), none)
    mixed = velocity(model, torch.zeros(2), torch.tensor([True, False]))
    torch.testing.assert_close(mixed[0], none[0])
    torch.testing.assert_close(mixed[1], velocity(model, torch.zeros(2))[1])


def test_the_other_reading_of_null_is_the_score_zero():
    model, _ = with_head(debug_backbone(5, "v1"), "v1", "scalar_zero")
    assert torch.equal(velocity(model), velocity(model, torch.zeros(2)))


@pytest.mark.parametrize("head", HEADS_WITH_SCORE)
def test_a_learned_null_is_learned_where_the_score_is_dropped_and_nowhere_else(head):
    model, report = with_head(debug_backbone(5, head), head, "learned")
    assert report.missing == ["score_embed.null_embedding"]
    zero = debug_backbone(5, head)
    assert torch.equal(velocity(model), velocity(zero)), "it starts as the zero embedding"
    null = model.requires_grad_(True).score_embed.null_embedding
    x, text, pooled = INPUTS
    for dropped, expected in (([False, False], 0), ([True, False], 1), ([True, True], 1)):
        model.zero_grad()
        model(x, TIMES, text, pooled, torch.tensor([1.0, 2.0]), torch.tensor(dropped)).square().mean().backward()
        assert null.grad is not None, "DDP waits for the gradient of every weight"
        assert (null.grad.abs().max() > 0) == expected
        assert (model.score_embed.mlp[2].bias.grad.abs().max() > 0) == (not all(dropped))
    before = velocity(model), velocity(model, torch.ones(2))
    torch.nn.init.normal_(null)
    assert not torch.equal(velocity(model), before[0])
    assert torch.equal(velocity(model, torch.ones(2)), before[1])


def test_embeddings_tell_close_scores_apart_and_stay_finite_far_out():
    embedding = ScoreEmbedding(32, "v1")
    torch.nn.init.normal_(embedding.mlp[2].weight)
    known = torch.zeros(4, dtype=torch.bool)
    e = embedding(torch.tensor([0.5, 0.55, 5.0, 1e6]), known)[:, 0]
    assert (e[0] - e[1]).norm() > 1e-2 * e[0].norm()
    assert torch.isfinite(e).all()
