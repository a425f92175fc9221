"""The official FAD: file selection, windows and formula of fadtk, which is written here anew by its description."""

import io

import numpy as np
import pytest
import soundfile
from scipy import linalg

from ttmray.errors import UserError
from ttmray.evaluation import fadtk
from ttmray.evaluation.fad import frechet
from ttmray.models.clap import debug_clap
from ttmray.storage import Folder

RATE = 48_000


def pooled(files: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, updated file by file as fadtk's are: sums of squares about running means."""
    mean, squares, count = np.zeros(files[0].shape[1]), np.zeros((files[0].shape[1],) * 2), 0
    for rows in files:
        n = len(rows)
        shift = rows.mean(axis=0) - mean
        own = np.cov(rows, rowvar=False) * (n - 1) if n > 1 else np.zeros_like(squares)
        squares = squares + own + np.outer(shift, shift) * count * n / (count + n)
        mean = mean + n / (count + n) * shift
        count += n
    return mean, squares / (count - 1)


def published_formula(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """|m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2), the root by the eigenvectors of the product, which is no
    symmetric matrix."""
    values, vectors = linalg.eig(a[1] @ b[1])
    root = (vectors * np.sqrt(values.astype(complex))) @ linalg.inv(vectors)
    shift = a[0] - b[0]
    return float(shift @ shift + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root).real)


def embeddings(seed: int, files: int, windows: int, dim: int = 24, shift: float = 0.0) -> list[np.ndarray]:
    """Unit vectors (windows, dim) of files, in float16 as they are kept."""
    draw = np.random.default_rng(seed)
    spread = np.linspace(1.0, 0.1, dim)
    rows = [draw.normal(size=(windows, dim)) * spread + draw.normal(size=dim) * spread + shift for _ in range(files)]
    return [(one / np.linalg.norm(one, axis=1, keepdims=True)).astype(np.float16) for one in rows]


@pytest.mark.parametrize("windows", [1, 10])
def test_the_distance_is_that_of_fadtk_on_the_same_embeddings(windows):
    a, b = embeddings(0, 60, max(windows, 2)), embeddings(1, 50, max(windows, 2), shift=0.1)
    expected = published_formula(
        pooled([rows.astype(np.float64) for rows in a]), pooled([rows.astype(np.float64) for rows in b])
    )
    ours = fadtk.distance(fadtk.statistics(a), fadtk.statistics(b))
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours > 0.005
    assert ours == frechet(fadtk.statistics(a), fadtk.statistics(b))


def test_windows_of_all_files_are_one_gaussian_and_not_one_vector_per_file():
    files = embeddings(0, 40, 10)
    gaussian = fadtk.statistics(files)
    assert gaussian.n == 400
    means = fadtk.statistics([rows.mean(axis=0, keepdims=True) for rows in files for _ in "12"])
    assert abs(np.trace(gaussian.cov) - np.trace(means.cov)) > 0.05


@pytest.mark.parametrize(("seconds", "count"), [(10.0, 10), (9.5, 10), (12.0, 12), (0.4, 1)])
def test_a_window_starts_at_every_second_of_a_file_and_is_filled_up_with_zeros(seconds, count):
    wave = np.arange(1, round(seconds * RATE) + 1, dtype=np.float32)
    rows = fadtk.windows(wave)
    assert rows.shape == (count, 10 * RATE)
    for number, row in enumerate(rows):
        rest = wave[number * RATE :][: 10 * RATE]
        np.testing.assert_array_equal(row[: len(rest)], rest)
        assert not row[len(rest) :].any()


def test_samples_are_those_of_a_16_bit_file_quantised_once_more():
    sink = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-1.1, 1.1, 1000).astype(np.float32)
    numbers = np.clip(np.rint(wave.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(sink, numbers, RATE, format="WAV", subtype="PCM_16")
    sink.seek(0)
    read, _ = soundfile.read(sink, dtype="int16")
    again = (np.clip(read / 32768.0, -1, 1) * 32767.0).astype(np.int16) / 32767.0
    ours = fadtk.sixteen_bits(wave)
    assert np.abs(ours - again).max() <= 1.01 / 32767, "at most one step, where float32 meets a whole number"
    assert np.mean(np.abs(ours - again) < 1e-6) > 0.98


def test_only_audio_in_the_folder_itself_counts_each_name_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.wav", "a.flac", "deep/c.wav", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert fadtk.files_of(Folder.at(str(tmp_path))) == ["a.flac", "b.wav"]
    (tmp_path / "a.wav").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.flac and a\.wav"):
        fadtk.files_of(Folder.at(str(tmp_path)))
    with pytest.raises(UserError, match="no audio files in the folder itself"):
        fadtk.files_of(Folder.at(str(tmp_path / "nowhere")))


def test_a_file_gives_one_float16_row_per_window_of_the_real_encoder(tmp_path):
    tone = (0.3 * np.sin(np.arange(2 * 44_100) * 0.05)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", tone, 44_100, subtype="FLOAT")
    clap = debug_clap(1)
    rows = fadtk.embed_file(clap, str(tmp_path / "a.wav"))
    assert (rows.shape, rows.dtype) == ((2, 512), np.float16)
    assert not np.array_equal(rows[0], rows[1])
    (tmp_path / "b.wav").write_bytes(b"nothing" * 50)
    gaussian, count, failed = fadtk.folder_statistics(clap, Folder.at(str(tmp_path)), "clips")
    assert (gaussian.n, count, list(failed)) == (2, 1, ["b.wav"])
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"none of 1 files can be used; b\.wav"):
        fadtk.folder_statistics(clap, Folder.at(str(tmp_path)), "clips")
