"""Figures of the paper, arXiv 2606.21670, that our tables show beside our own.

The cells of its tables are not public: these are from its text. Metrics are named as in `results.json`.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A figure of the paper as it is printed there; `about`: derived from rounded differences."""

    text: str
    about: bool = False

    @property
    def value(self) -> float:
        return float(self.text)


SUB_1 = {"fad": Published("0.4238"), "clap_score": Published("0.285"), "reward": Published("0.533")}
"""Submission 1 on 100 prompts of the Song Describer Dataset against SDD-706 (Tables II and III)."""
SUB_2 = {"fad": Published("0.4370"), "clap_score": Published("0.300"), "reward": Published("0.550")}

FACTORIAL = {
    ("SFT-only", "v1", "v1"): {"reward": Published("0.028", about=True)},
    ("SFT-only", "v2", "v1"): {"fad": Published("0.69", about=True), "reward": Published("-0.50", about=True)},
    ("SFT-only", "v2", "v2"): {"fad": Published("0.4442"), "reward": Published("0.282")},
    ("Chain-end", "v1", "v1"): {"reward": Published("0.524")},
    ("Chain-end", "v1", "v2"): {
        "fad": Published("0.427", about=True),
        "clap_score": Published("0.283", about=True),
        "reward": Published("0.535"),
    },
    ("Chain-end", "v2", "v1"): {"fad": Published("0.69", about=True), "reward": Published("-0.50", about=True)},
    ("Chain-end", "v2", "v2"): {"fad": Published("0.4695"), "reward": Published("0.244")},
    ("Hybrid", "", "Sub.1"): SUB_1,
    ("Hybrid", "", "Sub.2"): SUB_2,
}
"""Table III, (stage, weights, forward) -> metric. The text gives one pair of figures for both crosses v2 -> v1."""

CHAIN = {
    "SFT (v1)": FACTORIAL["SFT-only", "v1", "v1"],
    "+ expert iteration": FACTORIAL["Chain-end", "v1", "v1"],
    "+ v1 to v2": FACTORIAL["Chain-end", "v1", "v2"],
    "Sub.1": SUB_1,
    "Sub.2": SUB_2,
}
"""Table II, row -> metric. Its rows after the baseline are cells of Table III: the text has the same FAD difference,
-0.0362, for Row 1 to Row 2 here and for SFT-only to Chain-end there, and both tables end in the submissions."""

SWEEP = {
    ("SFT-only", 0.0): {"reward": Published("0.16")},
    ("SFT-only", 2.0): {"reward": Published("0.47")},
    ("Submitted", 0.0): {"fad": Published("0.4269"), "reward": Published("0.54")},
    ("Submitted", 5.0): {"fad": Published("0.4219")},
}
"""Figure 2, (checkpoint, score) -> metric."""

CONTRASTS = {
    ("rewards", "full mix"): {"fad": Published("0.515")},
    ("rewards", "instrumental"): {"fad": Published("0.337")},
}
"""Other comparisons of the text, (contrast, row) -> metric."""
