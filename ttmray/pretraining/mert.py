"""Training of the MERT-like music encoder: masked prediction on HuBERT's architecture.

Full size: MERT (Li et al. 2024), 330 M parameters, 160,000 hours: of masked frames the codes of an acoustic teacher
(k-means of log-mel and chroma, or EnCodec's) by cross-entropy, and the constant-Q spectrum as musical teacher by
squared error; Adam, 5e-4 and less, spans of 10 frames. Here the codes are k-means clusters of log-mel frames, as in
HuBERT's first iteration (Hsu et al. 2021), and the musical teacher is a log-frequency spectrum of 84 semitones. A third
teacher, which MERT does not have, tells the strengths of the clip's faults, because some hundred thousand parameters do
not come to hear quality by themselves (`fault_weight`, 0 for the plain recipe). For the full size set the widths of
`ttmray.models.mert.mert_330m_config`.
"""

import json

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from ttmray.models import seeded
from ttmray.models.mert import Mert
from ttmray.models.protocol import MERT_SAMPLE_RATE
from ttmray.pretraining.clips import ClipSet, place
from ttmray.pretraining.labels import fault_row, probe, quality_r
from ttmray.pretraining.loop import Part, PartConfig, to_half, weights_of
from ttmray.storage import Folder
from ttmray.synth.faults import KINDS
from ttmray.synth.instruments import RATE
from ttmray.training.tensors import pack

STRIDE = 320  # samples at 24 kHz per frame of HuBERT
WINDOW = 2048  # of the teachers' spectra


class MERTConfig(PartConfig):
    """The micro encoder: 0.6 M parameters, about 0.1 CPU seconds per 5 s."""

    steps: int = Field(3000, ge=1)
    batch: int = Field(8, ge=1)
    hidden: int = Field(128, ge=16)
    layers: int = Field(3, ge=1)
    channels: int = Field(64, ge=16)
    """Of the convolutions over the wave."""
    clusters: int = Field(100, ge=2)
    span: int = Field(10, ge=1)
    """Frames of a masked span."""
    masked: float = Field(0.065, gt=0, lt=1)
    """Share of the frames at which one begins."""
    cqt_weight: float = Field(1.0, ge=0)
    """Of the musical teacher, against the codes' cross-entropy."""
    fault_weight: float = Field(0.0, ge=0)
    """Of the squared error of the faults' strengths, in units of their deviation, read from the mean over time."""
    item_s: float = Field(5.0, gt=0.5)


class _WithTeachers(nn.Module):
    """HuBERT, the layers that answer the teachers, and the acoustic teacher's clusters."""

    centres: Tensor

    def __init__(self, hubert: HubertModel, clusters: int) -> None:
        super().__init__()
        self.hubert = hubert
        self.codes = nn.Linear(hubert.config.hidden_size, clusters)
        self.pitches = nn.Linear(hubert.config.hidden_size, 84)
        self.faults = nn.Linear(hubert.config.hidden_size, len(KINDS))
        self.register_buffer("centres", torch.zeros(clusters, 40))


class MERTPart(Part):
    """Parts of the clips' mono mixes at 24 kHz."""

    name = "mert"

    def __init__(self, config: MERTConfig, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        self.bands = torch.from_numpy(_triangles(np.geomspace(60, 11_500, 42))).to(device)
        self.semitones = torch.from_numpy(_triangles(32.703 * 2 ** (np.arange(-1, 85) / 12))).to(device)
        self.window = torch.hann_window(WINDOW, device=device)
        with seeded(config.seed):
            self.model: _WithTeachers = _WithTeachers(HubertModel(hubert_config(config)), config.clusters).to(device)
        frames = [self._spectra(self._wave(i, 0, 0.0)[None])[0][0] for i in range(min(64, clips.count))]
        sample = torch.cat(frames)[:: max(1, len(frames) // 16)].cpu().numpy().astype(np.float64)
        centres, _ = kmeans2(sample, config.clusters, minit="++", seed=config.seed)
        self.model.centres.copy_(torch.from_numpy(centres))

    def _wave(self, index: int, start: int, gain_db: float) -> Tensor:
        samples = min(int(self.config.item_s * RATE), self.clips.samples)
        wave = self.clips.mono(index)[start : start + samples] * np.float32(10 ** (gain_db / 20))
        return torch.from_numpy(soxr.resample(wave, RATE, MERT_SAMPLE_RATE, quality="HQ")).to(self.device)

    def batch(self, position: int, count: int) -> dict[str, Tensor]:
        """Waves (count, samples), masks (count, frames), codes (count, frames), semitones (count, frames, 84),
        faults (count, kinds)."""
        waves, masks, faults = [], [], []
        for i in range(position, position + count):
            rng = np.random.default_rng([self.config.seed, i])
            slack = self.clips.samples - min(int(self.config.item_s * RATE), self.clips.samples)
            index = place(self.config.seed, i, self.clips.count)
            waves.append(self._wave(index, int(rng.integers(slack + 1)), rng.uniform(-6, 3)))
            faults.append(fault_row(self.clips.truth(index).faults))
            frames = (len(waves[-1]) - 400) // STRIDE + 1
            starts = rng.random(frames) < self.config.masked
            starts[int(rng.integers(frames))] = True
            masks.append(np.convolve(starts, np.ones(self.config.span))[:frames] > 0)
        stacked = torch.stack(waves)
        bands, semitones = self._spectra(stacked)
        codes = torch.cdist(bands, self.model.centres[None]).argmin(dim=2)
        mask, strengths = (torch.from_numpy(np.stack(part)).to(self.device) for part in (masks, faults))
        return {"waves": stacked, "mask": mask, "codes": codes, "semitones": semitones, "faults": strengths}

    @torch.no_grad()
    def _spectra(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """Log energies in 40 bands and 84 semitones of the frames of HuBERT, whose centres are at 200 + 320 i."""
        around = WINDOW // 2
        frames = (waves.shape[1] - 400) // STRIDE + 1
        padded = F.pad(waves, (around - 200, around))
        spectrum = torch.stft(padded, WINDOW, STRIDE, window=self.window, center=False, return_complex=True)
        power = torch.view_as_real(spectrum[..., :frames]).square().sum(-1).transpose(1, 2)
        return (power @ self.bands.T + 1e-3).log() / 2, (power @ self.semitones.T + 1e-2).log() / 2

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"]
        states = self.model.hubert(batch["waves"], mask_time_indices=mask).last_hidden_state
        hidden = states[mask]
        logits, codes = self.model.codes(hidden), batch["codes"][mask]
        code = F.cross_entropy(logits, codes)
        pitch = F.mse_loss(self.model.pitches(hidden), batch["semitones"][mask])
        right = (logits.argmax(dim=1) == codes).float().mean()
        losses, loss = {"code": code, "cqt": pitch, "right": right}, code + self.config.cqt_weight * pitch
        if self.config.fault_weight:
            losses["faults"] = F.mse_loss(self.model.faults(states.mean(dim=1)), batch["faults"])
            loss = loss + self.config.fault_weight * losses["faults"]
        return {"loss": loss, **losses}

    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Linear probes of the mean vector: attributes by accuracy, true quality by correlation."""
        model = HubertModel(self.model.hubert.config)
        model.load_state_dict(weights_of(self.model.hubert, half=False))
        encoder = Mert(model)
        waves = [soxr.resample(fresh.mono(i), RATE, MERT_SAMPLE_RATE, quality="HQ") for i in range(fresh.count)]
        features = encoder.embed(waves).astype(np.float64)
        truths = fresh.truths()
        heard = probe(features, [truth.attributes for truth in truths])
        return heard | {"quality_r": quality_r(features, [truth.quality for truth in truths])}

    def export(self, out: Folder, half: bool) -> None:
        """A hub folder, as `load_mert` reads it."""
        state = weights_of(self.model.hubert, half=False)
        out.write("config.json", json.dumps(self.model.hubert.config.to_dict(), indent=1, sort_keys=True).encode())
        front = {"sampling_rate": MERT_SAMPLE_RATE, "do_normalize": False}
        out.write("preprocessor_config.json", json.dumps(front, indent=1).encode())
        out.write("model.safetensors", pack(to_half(state) if half else state))


def hubert_config(config: MERTConfig) -> HubertConfig:
    """Of transformers, for a trainer's config."""
    return HubertConfig(
        conv_dim=[config.channels] * 7,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=max(1, config.hidden // 32),
        intermediate_size=2 * config.hidden,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        do_stable_layer_norm=True,
        mask_time_prob=0.075,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
    )


def _triangles(edges: np.ndarray) -> np.ndarray:
    """(len(edges) - 2, bins) float32 triangular filters over the bins, none narrower than a bin, of unit sum."""
    bins = np.arange(WINDOW // 2 + 1) * MERT_SAMPLE_RATE / WINDOW
    width = MERT_SAMPLE_RATE / WINDOW
    left = np.minimum(edges[:-2], edges[1:-1] - width)[:, None]
    right = np.maximum(edges[2:], edges[1:-1] + width)[:, None]
    centre = edges[1:-1, None]
    filters = np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)
