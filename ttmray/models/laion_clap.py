"""The original `laion_clap` package behind the interface of `Clap`: a reference oracle, never used by jobs.

Needs an environment of its own (`pip install 'ttmray[laion-clap]'`: numpy below 2, torchvision), and the package
itself fetches RoBERTa from the hub when it is imported. Our `Clap` must agree with it; where they differ, this
one is what the released scores were made with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttmray.errors import UserError
from ttmray.models import as_waves
from ttmray.models.clap import ten_second_windows
from ttmray.models.clap_weights import unwrap_state_dict
from ttmray.models.protocol import Crop
from ttmray.models.state_dicts import read_state_dict


class LaionClap:
    """`embed_audio` and `embed_text` as in `Clap`, computed by LAION's own code, one clip at a time.

    Args:
        checkpoint: a LAION `.pt` file of HTSAT-base without fusion.
        device: torch device.

    Raises:
        UserError: the package is not installed, or the file is no such checkpoint.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu") -> None:
        try:
            import laion_clap
        except ImportError as error:
            raise UserError(
                f"laion_clap cannot be imported: {error}",
                "In an environment of its own: pip install 'ttmray[laion-clap]'",
            ) from error
        self._module: Any = laion_clap.CLAP_Module(enable_fusion=False, amodel="HTSAT-base", device=device)
        # Its own loader unpickles freely, so the tensors come through ours.
        state = unwrap_state_dict(read_state_dict(checkpoint))
        state.pop("text_branch.embeddings.position_ids", None)  # a buffer that newer transformers do not keep
        missing, unexpected = self._module.model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        if missing or unexpected:
            raise UserError(f"{checkpoint} does not fit laion_clap: missing {missing[:3]}, unexpected {unexpected[:3]}")
        self._module.eval()

    @torch.inference_mode()
    def embed_audio(
        self, waves: np.ndarray | list[np.ndarray], crop: Crop = "center", seed: int | None = None
    ) -> np.ndarray:
        """(B, 512) unit vectors of mono waves at 48 kHz, cropped by us, because LAION's own crop is random."""
        if crop == "windows":
            raise ValueError("the oracle embeds one excerpt per wave; use crop='center' or 'random'")
        excerpts = [ten_second_windows(wave, crop, seed)[0] for wave in as_waves(waves)]
        embed = self._module.get_audio_embedding_from_data
        return np.concatenate([embed(x=excerpt[None], use_tensor=False) for excerpt in excerpts]).astype(np.float32)

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """(B, 512) unit vectors; the empty string gives zeros, as in TuneJury's scorer."""
        out = np.zeros((len(texts), 512), np.float32)
        for i, text in enumerate(texts):
            if text:
                # LAION squeezes a batch of one away, so every text goes with a companion that is dropped
                out[i] = self._module.get_text_embedding([text, text], use_tensor=False)[0]
        return out
