"""Fréchet Audio Distance between sets of embeddings, and its extrapolation to infinitely many clips.

|m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) (Dowson & Landau 1982; Kilgour et al. 2019), with covariances of ddof 1.
The last trace is the sum of the roots of the eigenvalues of R^T B R, where A = R R^T: symmetric, hence real. R is a
Cholesky factor where A has full rank. With no more clips than dimensions it is the centred clips themselves, and the
trace is a nuclear norm of n rows; the general matrix square root is at its least reliable there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import linalg

from ttmray.errors import UserError
from ttmray.evaluation.metrics import CHUNK, RESAMPLES, Metric, checked, half_interval, half_samples
from ttmray.storage import read_file, split_path

SIZES = 6
SUBSAMPLES = 20


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Sufficient statistics of FAD: what is left of a reference set once its clips are embedded.

    Attributes:
        n: clips.
        mean: (d,) float64.
        cov: (d, d) float64, ddof 1; zeros for one clip.
        protocol: what made the embeddings.
    """

    n: int
    mean: np.ndarray
    cov: np.ndarray
    protocol: str

    @classmethod
    def of(cls, embeddings: np.ndarray, protocol: str) -> "Gaussian":
        """Of (n, d) embeddings, which may be memory-mapped: `CHUNK` rows at a time are in float64.

        Raises:
            UserError: bad embeddings.
        """
        embeddings = np.asarray(embeddings)
        starts = range(0, max(len(embeddings), 1), CHUNK)
        return merge(_moments(embeddings[start : start + CHUNK], protocol) for start in starts)

    def save(self, path: str) -> None:
        """Write a safetensors file, local or in a bucket."""
        from safetensors.numpy import save

        folder, name = split_path(path)
        protocol = np.frombuffer(self.protocol.encode(), dtype=np.uint8)
        tensors = {"n": np.array([self.n]), "mean": self.mean, "cov": self.cov, "protocol": protocol}
        folder.write(name, save(tensors))

    @classmethod
    def load(cls, path: str) -> "Gaussian":
        """What `save` wrote.

        Raises:
            UserError: missing, damaged, or not such a file.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = load(read_file(path))
            n, mean, cov = int(data["n"].item()), data["mean"], data["cov"]
            protocol = data["protocol"].tobytes().decode()
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no reference statistics: {error}", "Build the reference again.") from error
        d = len(mean) if mean.ndim == 1 else 0
        fits = n >= 1 and d >= 1 and cov.shape == (d, d) and mean.dtype == cov.dtype == np.float64
        if not fits or not np.isfinite(mean).all() or not np.isfinite(cov).all() or not np.allclose(cov, cov.T):
            raise UserError(f"{path} holds no mean and covariance of {n} embeddings.", "Build the reference again.")
        spectrum = np.linalg.eigvalsh(cov)
        if spectrum[0] < -1e-9 * max(spectrum[-1], 0.0):
            raise UserError(f"{path}: its covariance has a negative eigenvalue.", "Build the reference again.")
        return cls(n, mean, cov, protocol)


def merge(parts: Iterable[Gaussian]) -> Gaussian:
    """Statistics of all clips of all parts, such as shards (Chan, Golub & LeVeque 1979).

    Raises:
        UserError: no parts, or parts of other dimensions or protocols.
    """
    parts = list(parts)
    if not parts:
        raise UserError("There are no statistics to merge.")
    return reduce(_merged, parts)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance between two Gaussians, never negative.

    Raises:
        UserError: one clip on a side, or other dimensions or protocols.
    """
    _comparable(a, b)
    if min(a.n, b.n) < 2:
        raise UserError("FAD needs at least two clips on each side.", "Add clips.")
    low, high = sorted((a, b), key=lambda side: side.n)
    try:
        if low.n <= len(low.mean):
            raise linalg.LinAlgError("no full rank")
        # eigenvalues of high.cov @ low.cov through a Cholesky factor of the second; symmetric, so .T is free
        products = linalg.eigh(high.cov.T, low.cov.T, type=2, eigvals_only=True, driver="gv", check_finite=False)
    except linalg.LinAlgError:
        root = _root(low)
        products = np.linalg.eigvalsh(root.T @ high.cov @ root)
    cross = np.sqrt(np.maximum(products, 0)).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * cross))


def half_distances(
    generated: np.ndarray,
    reference: np.ndarray | Gaussian,
    *,
    protocol: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """(resamples,) FAD of random halves of the clips, nearly all of the work of `fad` and of `fad_inf`.

    Raises:
        UserError: as `fad`.
    """
    samples = _Samples(generated, reference, protocol)
    return half_samples(samples.distance, samples.n, resamples, seed)


def fad(
    generated: np.ndarray,
    reference: np.ndarray | Gaussian,
    *,
    protocol: str,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    halves: np.ndarray | None = None,
) -> Metric:
    """FAD at this N. It is too high by about c/N, so it compares systems only at equal N and with one reference.

    The interval is about the mean FAD of N clips, bias included; details["bias"] is what half-samples say about it.

    Args:
        generated: (n, d).
        reference: (m, d), or its statistics.
        halves: `half_distances` of the same arguments, where they are there already.

    Raises:
        UserError: bad embeddings, one clip, or a reference of another protocol.
    """
    samples = _Samples(generated, reference, protocol)
    value = samples.distance(np.arange(samples.n))
    if halves is None:
        halves = half_samples(samples.distance, samples.n, resamples, seed)
    interval = half_interval(value, halves, samples.n, confidence)
    details = {"bias": float(halves.mean()) - value} if len(halves) else {}
    expected = f", here by {details['bias']:.3g} or more" if details else ""
    warning = f"FAD is expected to be too high{expected}. Compare it only at equal N with the same reference."
    return samples.metric("fad", value, interval, confidence, warning, details)


def fad_inf(
    generated: np.ndarray,
    reference: np.ndarray | Gaussian,
    *,
    protocol: str,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
    halves: np.ndarray | None = None,
) -> Metric:
    """FAD extrapolated to N = infinity (Chong & Forsyth 2020, CVPR; Gui et al. 2024, ICASSP).

    A line in 1/n is fitted to the mean FAD of subsamples of n = N/2 .. N clips, drawn without replacement. What
    remains is the curvature (much, where N < d) and the bias of the reference, whose size stays as it is. The result
    may be below zero. details: slope (FAD is about value + slope / n), r2 of the fit, and fad at N.

    The interval is that of FAD at N, moved: the extrapolation takes off a bias and leaves the random part.

    Args:
        generated, reference, halves: (n, d), (m, d) or its statistics, (resamples,): as in `fad`.

    Raises:
        UserError: as `fad`, or fewer than 8 clips.
    """
    samples = _Samples(generated, reference, protocol, at_least=8)
    n = samples.n
    rng = np.random.default_rng([seed, 1])
    sizes = np.unique(np.round(1 / np.linspace(1 / n, 2 / n, SIZES)).astype(int))
    distances = []
    for size in sizes:
        repeats = 1 if size == n else SUBSAMPLES
        distances.append(np.mean([samples.distance(rng.permutation(n)[:size]) for _ in range(repeats)]))
    slope, value = (float(part) for part in np.polyfit(1 / sizes, distances, 1))
    residual = np.array(distances) - (value + slope / sizes)
    spread = float(np.var(distances))
    details = {
        "slope": slope,
        "r2": 1 - float(np.mean(residual**2)) / spread if spread else 1.0,
        "fad": float(distances[-1]),
    }
    if halves is None:
        halves = half_samples(samples.distance, n, resamples, seed)
    interval = half_interval(value, halves, n, confidence)
    warning = "the line in 1/N removes only a part of the bias, so FAD-inf is expected to be too high still."
    return samples.metric("fad_inf", value, interval, confidence, warning, details)


class _Samples:
    """Generated clips before a fixed reference, for the FAD of many subsets of them.

    Projected onto the reference's root once, a subset costs one Gram matrix of its smaller side.
    """

    def __init__(
        self, generated: np.ndarray, reference: np.ndarray | Gaussian, protocol: str, at_least: int = 2
    ) -> None:
        self.x = checked(generated, "generated clips", at_least)
        self.n, self.d = self.x.shape
        self.protocol = protocol
        if not isinstance(reference, Gaussian):
            y = checked(reference, "reference clips", 2, self.d)
            if len(y) > self.d:
                reference = Gaussian.of(y, protocol)
        if isinstance(reference, Gaussian):
            if reference.n < 2:
                raise UserError("reference clips: FAD needs at least two.", "Add clips.")
            if reference.protocol != protocol or len(reference.mean) != self.d:
                raise UserError(
                    f"The reference was made under {reference.protocol!r} with {len(reference.mean)} dimensions, "
                    f"the generated clips under {protocol!r} with {self.d}.",
                    "Embed both sides in the same way.",
                )
            self.m, self.mean, root = reference.n, reference.mean, _root(reference)
        else:
            self.m, self.mean = len(y), y.mean(axis=0)
            root = (y - self.mean).T / np.sqrt(len(y) - 1)
        self.trace = float((root**2).sum())
        self.projected = self.x @ root

    def distance(self, rows: np.ndarray) -> float:
        """Squared Fréchet distance of some of the clips to the reference."""
        x, z = self.x[rows], self.projected[rows]
        mean = x.mean(axis=0)
        z = (z - z.mean(axis=0)) / np.sqrt(len(rows) - 1)
        gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum()
        trace = ((x - mean) ** 2).sum() / (len(rows) - 1)
        shift = mean - self.mean
        return max(0.0, float(shift @ shift + trace + self.trace - 2 * cross))

    def metric(
        self,
        name: str,
        value: float,
        interval: tuple[float | None, float | None],
        confidence: float,
        warning: str,
        details: dict[str, float],
    ) -> Metric:
        warnings = []
        if self.n < self.d:
            warnings.append(f"{self.n} generated clips are fewer than {self.d} dimensions: {warning}")
        if self.m < self.d:
            warnings.append(
                f"{self.m} reference clips are fewer than {self.d} dimensions: compare values only with this reference."
            )
        sizes = (self.n, self.m, self.d)
        return Metric(name, value, *sizes, self.protocol, *interval, confidence, tuple(warnings), details)


def _moments(rows: np.ndarray, protocol: str) -> Gaussian:
    x = checked(rows, "embeddings")
    mean = x.mean(axis=0)
    centred = x - mean
    return Gaussian(len(x), mean, centred.T @ centred / max(len(x) - 1, 1), protocol)


def _merged(a: Gaussian, b: Gaussian) -> Gaussian:
    _comparable(a, b)
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = (a.n - 1) * a.cov + (b.n - 1) * b.cov + np.outer(shift, shift) * (a.n * b.n / n)
    return Gaussian(n, a.mean + shift * (b.n / n), scatter / (n - 1), a.protocol)


def _comparable(a: Gaussian, b: Gaussian) -> None:
    if len(a.mean) != len(b.mean) or a.protocol != b.protocol:
        raise UserError(
            f"Statistics under {a.protocol!r} with {len(a.mean)} dimensions and under {b.protocol!r} with "
            f"{len(b.mean)} cannot be put together.",
            "Embed both sides in the same way.",
        )


def _root(side: Gaussian) -> np.ndarray:
    """(d, r) R with R R^T = cov, where r is the rank."""
    try:
        if side.n <= len(side.mean):
            raise np.linalg.LinAlgError("no full rank")
        return np.linalg.cholesky(side.cov)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(side.cov)
        positive = values > max(values[-1], 0.0) * len(values) * np.finfo(float).eps
        return vectors[:, positive] * np.sqrt(values[positive])
