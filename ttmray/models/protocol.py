"""How a score was made, and the constants of the encoders, without importing a framework.

Released scorers of TuneJury disagree on crops, band limits and quantisation, so every score names its protocol.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from ttmray.errors import UserError

CLAP_SAMPLE_RATE = 48_000
MERT_SAMPLE_RATE = 24_000

SEPARATION = "offset-once"
"""Version of what `ttmray.models.separator` makes of a mix, part of the identity of everything separated."""

Crop = Literal["center", "random", "windows"]


@dataclass(frozen=True)
class Protocol:
    """What made a TuneJury number.

    Attributes:
        crop: which 10 s of longer audio CLAP sees ("center": the released score tables).
        bandlimit_hz: 8000 for CLAP audio that went through 16 kHz (the released training features), None for
            the full band (the released scorer).
        int16: clip and quantise before CLAP, as the released scorer does.
        text: "empty" scores the audio alone (a zero text vector), "caption" against its caption.
        dtype: of the encoders' weights.
        hashes: (name, sha256) of the weights involved.
    """

    crop: Crop = "center"
    bandlimit_hz: Literal[8000] | None = None
    int16: bool = True
    text: Literal["empty", "caption"] = "empty"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    hashes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "crop": get_args(Crop),
            "bandlimit_hz": (None, 8000),
            "text": ("empty", "caption"),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise UserError(f"protocol.{field} must be one of {allowed}, not {getattr(self, field)!r}")

    def id(self) -> str:
        """Short stable name, e.g. `tj-center-full-int16-empty-1a2b3c4d`; the digits cover every field."""
        canonical = json.dumps(asdict(self) | {"hashes": sorted(self.hashes)}, sort_keys=True)
        band = "full" if self.bandlimit_hz is None else f"{self.bandlimit_hz // 1000}k"
        quantised = "int16" if self.int16 else "float"
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return f"tj-{self.crop}-{band}-{quantised}-{self.text}-{digest}"
