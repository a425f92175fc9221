"""A model of transformers as the judge: Qwen2-Audio's real classes, tiny, with weights that always say the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ttmray.errors import UserError
from ttmray.evaluation.judge import JudgeConfig, judge
from ttmray.evaluation.judge_local import LocalJudge
from ttmray.storage import Folder

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
ANSWER = ("1. yes", "2. no", "3. Yes")
"""Tokens; each is followed by the next, and the first by the end of the question."""


def write_model(folder: Path, answer: tuple[str, ...]) -> str:
    """Qwen2-Audio with one layer of each kind, in which a token decides the next one: attention and MLP add nothing."""
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.add_tokens([f"{line}\n" for line in answer])
    size = len(tokenizer)
    audio = {"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "num_mel_bins": 16}
    text = {"hidden_size": size + -size % 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text |= {"num_key_value_heads": 2, "vocab_size": size, "tie_word_embeddings": False}
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config=audio | {"model_type": "qwen2_audio_encoder"},
            text_config=text | {"model_type": "qwen2", "eos_token_id": ids[SPECIAL[0]], "bos_token_id": None},
            audio_token_index=ids["<|AUDIO|>"],
        )
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = ids[SPECIAL[0]]
    chain = [tokenizer.encode("\n")[-1], *tokenizer.convert_tokens_to_ids([f"{line}\n" for line in answer])]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(size, text["hidden_size"]))
        head = model.get_output_embeddings().weight
        head.zero_()
        for now, then in zip(chain, [*chain[1:], ids[SPECIAL[0]]], strict=True):
            head[then, now] = 1.0
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ears(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("ears"), ANSWER)


@pytest.fixture
def clips(tmp_path: Path) -> list[tuple[str, str, str]]:
    for i, name in enumerate(("x", "y")):
        soundfile.write(tmp_path / f"{name}.flac", np.random.default_rng(i).normal(0, 0.1, (22050, 2)), 22050)
    return [("p", "a calm piano", f"{tmp_path}/{name}.flac") for name in ("x", "y")]


@pytest.fixture
def concepts(tmp_path: Path) -> str:
    (tmp_path / "concepts.csv").write_text("id,concepts\np,piano; drums; calm mood\n")
    return str(tmp_path / "concepts.csv")


def test_a_local_model_hears_the_clip_and_its_verdicts_are_the_score(ears, clips, concepts, tmp_path):
    out = Folder.at(str(tmp_path / "out"))
    config = JudgeConfig(model=ears, concepts=concepts, device="cpu", max_new_tokens=16)
    assert judge(clips, config, out) == [(2 / 3, ""), (2 / 3, "")]
    kept = [json.loads(out.read(f"judge/{entry.name}")) for entry in out.files("judge")]
    assert {one["answer"] for one in kept} == {"1. yes\n2. no\n3. Yes\n"}
    assert {one["audio"] for one in kept} == {clip[2] for clip in clips}
    assert config.name.startswith("ccs-ears")


def test_what_was_answered_is_not_asked_again_and_then_no_model_is_loaded(ears, clips, concepts, tmp_path, monkeypatch):
    out = Folder.at(str(tmp_path / "out"))
    config = JudgeConfig(model=ears, concepts=concepts, device="cpu")
    first = judge(clips, config, out)
    monkeypatch.setattr(LocalJudge, "__init__", lambda *_: pytest.fail("the model is loaded"))
    assert judge(clips, config, out) == first


def test_every_token_of_the_sound_reaches_the_model_at_its_rate(ears, tmp_path, monkeypatch):
    one = LocalJudge(ears, "cpu", "float32", 8)
    seen = []
    generate = one.model.generate
    monkeypatch.setattr(one.model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 88_200), 44_100)
    one("Is it loud?", (tmp_path / "a.wav").read_bytes())
    one("What is a piano?", b"")
    heard, silent = seen
    assert int(heard["feature_attention_mask"].sum()) == 200  # 2 s of frames of 10 ms
    assert int((heard["input_ids"] == one.model.config.audio_token_id).sum()) == 50
    assert "input_features" not in silent


def test_an_answer_that_cannot_be_read_is_a_reason_after_one_try(clips, concepts, tmp_path):
    model = write_model(tmp_path / "babble", ("I like it", "very much"))
    scores = judge(clips, JudgeConfig(model=model, concepts=concepts, device="cpu"), Folder.at(str(tmp_path / "out")))
    assert [score for score, _ in scores] == [None, None]
    assert all("no usable answer in 1 tries" in reason for _, reason in scores)


def test_models_that_are_not_there_or_hear_nothing_are_one_message(clips, concepts, tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    for model in (str(tmp_path / "nothing"), "nobody/no-such-model", str(tmp_path / "bert")):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            judge(clips, JudgeConfig(model=model, concepts=concepts), Folder.at(str(tmp_path / "out")))
        assert model in caught.value.message
