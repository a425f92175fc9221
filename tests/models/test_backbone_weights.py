"""Files of backbones: every tensor is accounted for, and what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ttmray.errors import UserError
from ttmray.models.backbone import SIZES, BackboneConfig, FluxAudio
from ttmray.models.backbone_weights import (
    METADATA,
    config_of,
    count_parameters,
    debug_backbone,
    file_config,
    load_backbone,
    show_params,
    tidy,
    transfer,
    with_head,
)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def model() -> FluxAudio:
    return debug_backbone(0, "v1")


def test_a_file_with_its_config_comes_back_as_it_was(model, tmp_path):
    config = {**model.config.to_dict(), "head": "v2", "rope": False}
    save_file(model.state_dict(), tmp_path / "a.safetensors", {METADATA: json.dumps({"backbone": config})})
    loaded = load_backbone(tmp_path / "a.safetensors")
    assert same(loaded, model)
    assert loaded.config == BackboneConfig(**config)
    assert not loaded.training
    assert torch.equal(loaded.text_rot, model.text_rot)
    assert load_backbone(tmp_path / "a.safetensors", head="v2", null="scalar_zero").config.null == "scalar_zero"


@pytest.mark.parametrize("nesting", ["plain", "weights", "state_dict", "module", "tables", "batched", "no_pooled"])
def test_files_as_others_write_them(model, tmp_path, nesting):
    state = dict(model.state_dict())
    if nesting == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    elif nesting == "tables":
        state |= {"latent_rot": torch.zeros(1, 430, 16, 2, 2), "t_embed.freqs": torch.zeros(128)}
    elif nesting == "batched":
        state |= {key: state[key][None] for key in ("empty_string_feat", "empty_string_feat_c")}
    elif nesting == "no_pooled":
        # older files have no pooled feature; its width is then that of the tokens
        del state["empty_string_feat_c"]
        tidied = tidy(state, "x")
        torch.testing.assert_close(tidied["empty_string_feat_c"], state["empty_string_feat"].mean(0))
        return
    torch.save({nesting: state} if nesting in ("weights", "state_dict") else state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not say for which head"):
        load_backbone(tmp_path / "a.pth")
    loaded = load_backbone(tmp_path / "a.pth", head="v2")
    assert same(loaded, model)
    assert loaded.config.head == file_config(tmp_path / "a.pth", head="v2")[0].head == "v2"


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "[1]",
        '{"backbone": 5}',
        '{"backbone": {"latent_len": "abc"}}',
        '{"backbone": {"latent_len": -3}}',
        '{"backbone": {"rope": 2}}',
        '{"backbone": {"head": 7}}',
        '{"backbone": {"mlp_ratio": null}}',
    ],
)
def test_damaged_metadata_are_one_message(model, tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path, {METADATA: metadata})
    with pytest.raises(UserError, match=r"describe no backbone|its config cannot be|unknown head"):
        load_backbone(path, head="v1")


def test_v1_into_v2_and_back_transfers_all_203_tensors():
    config = SIZES["s_44k"]
    source, target = (FluxAudio(config.with_head(head)) for head in ("v1", "v2"))
    torch.nn.init.normal_(source.score_embed.mlp[2].weight)
    report = transfer(target, source.state_dict())
    assert len(report.loaded) == 203
    assert report.missing == report.unexpected == report.reshaped == []
    assert same(source, target) or torch.isnan(source.latent_mean).all()
    assert torch.equal(source.score_embed.mlp[2].weight, target.score_embed.mlp[2].weight)
    assert len(transfer(source, target.state_dict()).loaded) == 203
    assert report.lines() == ["203 tensors loaded"]


@pytest.mark.parametrize("head", ["v1", "v2", "v4"])
def test_a_learned_null_is_one_more_tensor_that_goes_from_head_to_head_and_through_files(tmp_path, head):
    config = SIZES["s_44k"].with_head(head, "learned")
    with torch.device("meta"):
        assert len(FluxAudio(config).state_dict()) == 204
        assert len(FluxAudio(SIZES["s_44k"].with_head(head)).state_dict()) == 203
    small, _ = with_head(debug_backbone(0, "v1"), head, "learned")
    torch.nn.init.normal_(small.score_embed.null_embedding)
    about = json.dumps({"backbone": small.config.to_dict()})
    save_file(small.state_dict(), tmp_path / "a.safetensors", {METADATA: about})
    torch.save(small.state_dict(), tmp_path / "a.pth")
    for loaded in (
        load_backbone(tmp_path / "a.safetensors"),
        load_backbone(tmp_path / "a.safetensors", head="v2", null="learned"),
        load_backbone(tmp_path / "a.pth", head="v2"),
    ):
        assert same(loaded, small)
        assert loaded.config.null == "learned"
    other, report = with_head(small, "v2")
    assert report.missing == report.unexpected == []
    assert same(other, small)


def test_a_learned_null_is_neither_invented_nor_lost(model, tmp_path):
    learned, _ = with_head(model, "v1", "learned")
    for name, backbone, null, has in (
        ("plain", model, "learned", "no learned null score"),
        ("learned", learned, "zero_embedding", "a learned null score"),
        ("learned", learned, "scalar_zero", "a learned null score"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(backbone.state_dict(), path, {METADATA: json.dumps({"backbone": backbone.config.to_dict()})})
        with pytest.raises(UserError, match=f"{has}, which does not fit null {null}"):
            load_backbone(path, null=null)
    for backbone, null, words in ((model, "learned", "lack"), (learned, "scalar_zero", "are of a learned null")):
        config = {**backbone.config.to_dict(), "null": null}
        save_file(backbone.state_dict(), tmp_path / "odd.safetensors", {METADATA: json.dumps({"backbone": config})})
        with pytest.raises(UserError, match=f"config says null {null}, and its tensors {words}"):
            load_backbone(tmp_path / "odd.safetensors")


def test_a_partial_transfer_names_every_tensor_that_stayed_behind(model):
    wide = debug_backbone(1, "none", width=2)
    report = transfer(wide, model.state_dict())
    assert "score_embed.mlp.0.weight" in report.unexpected
    assert "final_layer.conv.weight" in report.reshaped
    assert len(report.loaded) + len(report.reshaped) == len(wide.state_dict())
    assert "of another shape" in "\n".join(report.lines())
    moved, report = with_head(model, "v3")
    assert sorted(report.missing) == sorted(name for name in moved.state_dict() if name.startswith("score_embed."))
    assert not moved.score_embed.mlp[2].weight.any()  # an embedding of v1 is no token


def test_what_is_no_backbone_is_refused_with_what_it_is(model, tmp_path):
    torch.save({"net.0.weight": torch.zeros(3, 3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not hold a FluxAudio backbone"):
        load_backbone(tmp_path / "a.pth")
    torch.save({"it": 7, "optimizer": 3}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="it is a int"):
        load_backbone(tmp_path / "b.pth")
    with pytest.raises(UserError, match="is not a file"):
        load_backbone(tmp_path / "absent.pth")
    state = dict(model.state_dict())
    del state["fused_blocks.0.linear1.weight"]
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"1 weights missing: fused_blocks\.0\.linear1\.weight"):
        load_backbone(tmp_path / "c.pth", head="v1")


def test_a_head_that_the_file_has_not_is_refused(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "scored.pth")
    torch.save(debug_backbone(0, "none").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="does not fit head none"):
        load_backbone(tmp_path / "scored.pth", head="none")
    with pytest.raises(UserError, match="no score embedding, which does not fit head v2"):
        load_backbone(tmp_path / "plain.pth", head="v2")
    with pytest.raises(UserError, match=r"weights missing: score_embed\.gate"):
        load_backbone(tmp_path / "scored.pth", head="v5")


def test_untrained_latent_statistics_are_refused(tmp_path):
    fresh = FluxAudio(debug_backbone(0, "none").config)
    torch.save(fresh.state_dict(), tmp_path / "fresh.pth")
    with pytest.raises(UserError, match="latent_mean is not finite"):
        load_backbone(tmp_path / "fresh.pth")


def test_a_config_that_contradicts_its_tensors_is_refused(model):
    with pytest.raises(UserError, match="disagree"):
        config_of(model.state_dict(), {"hidden": 448}, "a file")
    with pytest.raises(UserError, match="unknown head 'v9'"):
        config_of(model.state_dict(), {"head": "v9"}, "a file")


def test_full_size_counts_are_the_published_ones():
    counts = count_parameters(SIZES["s_44k"])
    assert sum(trainable for _, trainable, _ in counts) == 120_231_848
    assert sum(frozen for _, _, frozen in counts) == 79_440


def test_the_table_counts_a_size_or_a_file(model, tmp_path, capsys):
    show_params("s_44k", "v2")
    shown = capsys.readouterr().out
    assert "120,570,232 parameters, 24.1% of the challenge's 500,000,000: within" in shown
    assert "v2 InputAdd" in shown
    torch.save(model.state_dict(), tmp_path / "a.pth")
    show_params("s_44k", "v2", str(tmp_path / "a.pth"))
    assert "64 wide, 3 blocks" in capsys.readouterr().out


def test_debug_backbones_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = debug_backbone(3), debug_backbone(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(a, b)
    assert not same(a, debug_backbone(4))
