"""Bundles of released weights: what they are beside their entries in `weights.yaml`, and how their models are built.

Three of them have a backbone, and of the other models only those that it needs to make sound:

    fluxaudio-s-16k, fluxaudio-l-16k   MeanAudio's flow-matching models, text by T5 and CLAP
    resonate-44k                       Resonate's FluxAudio-M after GRPO, text by T5 alone
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ttmray.models.loading import LoadOptions, clap_of, separator_of

if TYPE_CHECKING:
    from ttmray.models.latents import LatentEncoder
    from ttmray.models.t5 import TextEncoder
    from ttmray.models.weights import Store

AS_PUBLISHED = {"score": None, "prefix": "", "negative_prompt": "", "weight": 4.5}
"""What the authors' own scripts sample with, where it is not what we do: 25 Euler steps are the same."""


@dataclass(frozen=True)
class Facts:
    """Of a bundle.

    Attributes:
        rate: of the latents' audio, in Hz.
        sampling: settings of the sampler with which its backbone was published.
        pooled: what gives the pooled text vector: CLAP, or the mean of T5's rows.
    """

    rate: int = 44_100
    sampling: Mapping[str, Any] = field(default_factory=dict)
    pooled: Literal["clap", "tokens"] = "clap"


RELEASED = {
    "paper": Facts(),
    "public-16k": Facts(rate=16_000),
    "fluxaudio-s-16k": Facts(rate=16_000, sampling=AS_PUBLISHED),
    "fluxaudio-l-16k": Facts(rate=16_000, sampling=AS_PUBLISHED),
    "resonate-44k": Facts(sampling=AS_PUBLISHED | {"precision": "bf16"}, pooled="tokens"),
}


def backbone_file(store: "Store", entries: Mapping[str, str]) -> Path | None:
    """The weights of a bundle's backbone; None where it has none.

    Args:
        entries: role -> name of the registry entry.

    Raises:
        UserError: they are not here, or damaged.
    """
    if "backbone" not in entries:
        return None
    store.require([entries["backbone"]])
    return next(path for path in store.find(entries["backbone"]).values() if path.suffix not in (".json", ".txt"))


def makers(
    store: "Store", entries: Mapping[str, str], facts: Facts, options: LoadOptions, device: str, vocoder: bool
) -> dict[str, Callable[[], Any]]:
    """Role -> what builds it (see `Bundle._makers`).

    Args:
        entries: role -> name of the registry entry.
    """
    from ttmray.models.backbone_weights import load_backbone
    from ttmray.models.bigvgan import PUBLIC_16K, load_bigvgan
    from ttmray.models.latents import LatentEncoder
    from ttmray.models.mert import load_mert
    from ttmray.models.separator import load_separator
    from ttmray.models.t5 import MeanTokens, load_text_encoder
    from ttmray.models.tunejury import load_tunejury
    from ttmray.models.vae import load_vae

    def paths(role: str) -> list[Path]:
        return list(store.find(entries[role]).values())

    def weights(role: str) -> Path:
        return next(path for path in paths(role) if path.suffix not in (".json", ".txt"))

    def folder(role: str) -> Path:
        return paths(role)[0].parent

    def clap(role: str) -> Any:
        return clap_of(weights(role), folder("tokenizer"), device, options)

    def latents() -> "LatentEncoder":
        if facts.rate != 44_100:
            generator = load_bigvgan(weights("vocoder"), PUBLIC_16K) if vocoder else None
            return decoder_16k(load_vae(weights("latents")), device, options, generator)
        generator = load_bigvgan(weights("vocoder")) if vocoder else None
        return LatentEncoder(load_vae(weights("latents")), options.clip_samples, device, generator)

    @cache  # one T5 for both of its roles
    def text() -> "TextEncoder":
        return load_text_encoder(folder("text"), device=device, batch=options.batch)

    return {
        "backbone": lambda: load_backbone(str(weights("backbone")), device=device),
        "separator": lambda: separator_of(load_separator(folder("separator")), device, options),
        "clap": lambda: clap("clap"),
        "mert": lambda: load_mert(weights("mert"), device=device, batch=options.batch, threads=options.threads),
        "tunejury": lambda: load_tunejury(weights("tunejury"), device=device),
        "latents": latents,
        "text": text,
        "clap_condition": lambda: MeanTokens(text()) if facts.pooled == "tokens" else clap("clap_condition"),
    }


def decoder_16k(vae: Any, device: str, options: LoadOptions, vocoder: Any) -> "LatentEncoder":
    """Latents of 16 kHz audio to audio; nothing makes such latents here."""
    from ttmray.audio.mel import PUBLIC_16K
    from ttmray.models.latents import LatentEncoder

    samples = round(options.clip_samples * PUBLIC_16K.sample_rate / 44_100)
    return LatentEncoder(vae, samples, device, vocoder, PUBLIC_16K, decodes_only=True)
