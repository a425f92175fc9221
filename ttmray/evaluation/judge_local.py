"""An audio-language model of transformers in this process as a judge, such as Qwen2-Audio or Voxtral."""

import io

import soundfile
import torch

from ttmray.audio.io import resample
from ttmray.errors import UserError
from ttmray.models.devices import resolve_device

FETCH = "Fetch it first (hf download MODEL), or name the folder that holds it."


class LocalJudge:
    """Answers questions about sounds; greedy, so the same question has the same answer.

    Args:
        model: folder, or Hub id of a model in the local cache. Nothing is downloaded, code of the model's repository is
            never run, and weights are safetensors.
        device: `auto`, `cpu` or `cuda`.
        dtype: of the weights; `auto` is that of the files.
        max_new_tokens: longest answer.

    Raises:
        UserError: it is not there, or it is no model that hears.
    """

    def __init__(self, model: str, device: str, dtype: str, max_new_tokens: int) -> None:
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        from ttmray.models.t5 import without_bars

        try:
            with without_bars():
                self.processor = AutoProcessor.from_pretrained(model, local_files_only=True, trust_remote_code=False)
                self.model = AutoModelForMultimodalLM.from_pretrained(
                    model, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
                )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(f"judge.model {model} cannot be loaded: {reason}", FETCH) from error
        extractor = getattr(self.processor, "feature_extractor", None)
        rate = getattr(extractor, "sampling_rate", None)
        if rate is None:
            raise UserError(
                f"judge.model {model} hears nothing: its processor takes no audio.", "Choose an audio model."
            )
        self.rate, self.max_new_tokens = int(rate), max_new_tokens
        self.model.eval().to(resolve_device(device))

    def __call__(self, question: str, sound: bytes) -> str:
        """The answer to a question about a WAV file, or about nothing but its words where `sound` is empty."""
        content = [{"type": "audio"}] if sound else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        audio = {}
        if sound:
            wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
            audio = {"audio": [resample(wave, rate, self.rate)], "sampling_rate": self.rate}
        inputs = self.processor(text=text, return_tensors="pt", **audio).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0])
