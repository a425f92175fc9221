"""Pushing to a stand-in of the hub by its own client, and using what lies there."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_stand_in import TOKEN, Hub, running_hub, use_hub
from huggingface_hub import HfApi
from safetensors.torch import save_file
from tiny_bundle import without_weights

import ttmray
from ttmray import hub as places
from ttmray.audio.io import write_audio
from ttmray.cli import main
from ttmray.config import load_config
from ttmray.console import console
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.job import score_corpus
from ttmray.corpus.look import sample
from ttmray.corpus.verify import problems
from ttmray.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from ttmray.models.backbone_weights import METADATA, debug_backbone
from ttmray.models.bundle import MICRO, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.published import published
from ttmray.models.tunejury import debug_tunejury
from ttmray.recipes import licences
from ttmray.recipes.push import push
from ttmray.storage import Folder
from ttmray.training.export import inspect

SETTINGS: dict[str, Any] = {"seed": 3, "sampler": {"steps": 1}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in list(os.environ):
        if name.startswith("TTMRAY_") and name not in ("TTMRAY_GOLDEN", "TTMRAY_DATA"):
            monkeypatch.delenv(name)
    with running_hub() as running:
        use_hub(monkeypatch, running, str(tmp_path / "cache"))
        yield running


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file of a debug backbone; do not change it."""
    model = debug_backbone(3, "v1")
    about = {"kind": "ttmray weights", "weights": "raw", "step": 7, "samples": 14, "backbone": model.config.to_dict()}
    file = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(model.state_dict(), file, {METADATA: json.dumps(about)})
    return file


@pytest.fixture(scope="module")
def clip(weights: Path) -> Any:
    """What these weights make on this machine; whatever is loaded once per process is loaded with it."""
    (clip,) = ttmray.load("debug", device="cpu").generate("a harp", checkpoint=str(weights), **SETTINGS)
    return clip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished corpus of the debug bundle: 2 songs in 2 units."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "songs").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).normal(scale=0.1, size=(1, 6 * 44100)).astype(np.float32)
        write_audio(str(folder / f"songs/{i}.flac"), noise, 44100)
    sets = ["bundle=debug", "runtime.runner=local", "runtime.workers=0", "segments.max_clips=1", "splits.validation=0"]
    sets += ["splits.test=0", "unit_clips=1", f"input={folder / 'songs'}", f"output={folder / 'corpus'}"]
    assert score_corpus(load_config(CorpusConfig, None, sets)) == EXIT_OK
    return folder / "corpus"


def front(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_weights_file_is_pushed_with_a_card_and_stands_for_its_repository(hub, weights):
    assert main(["push", str(weights), "org/mine", "--bundle", "debug"]) == EXIT_OK
    repo = hub.repos["models", "org/mine"]
    assert repo.private, "public only where it is asked for"
    assert repo.files.keys() == {"model.safetensors", "README.md", "ttmray.json"}
    assert repo.files["model.safetensors"] == weights.read_bytes()
    assert front(repo.files["README.md"])["license"] == "other"
    assert "14" in repo.files["README.md"].decode()
    assert json.loads(repo.files["ttmray.json"])["bundle"] == "debug"
    described = inspect("hf://org/mine")
    assert described["parameters"] == inspect(str(weights))["parameters"], "a repository stands for its weights"


def test_pushed_weights_make_the_same_clip_from_the_hub_as_from_here(hub, weights, clip):
    push(str(weights), "org/mine", bundle="debug")
    studio = ttmray.load("hf://org/mine", device="cpu")
    (remote,) = studio.generate("a harp", **SETTINGS)
    assert remote.row["sha256"] == clip.row["sha256"]
    assert remote.row["weights"] == clip.row["weights"], "where weights lie decides nothing"
    assert studio.checkpoint == "hf://org/mine"
    assert pickle.loads(pickle.dumps(studio)).checkpoint == studio.checkpoint  # noqa: S301


def test_generate_takes_a_checkpoint_of_the_hub_offline_once_it_is_here(hub, weights, tmp_path, monkeypatch):
    push(str(weights), "org/mine", bundle="debug")
    command = [
        "generate",
        "--bundle",
        "debug",
        "--prompt",
        "a harp",
        "--set",
        "checkpoint=hf://org/mine",
        "--set",
        "sampler.steps=1",
    ]
    assert main([*command, "--output", str(tmp_path / "one")]) == EXIT_OK
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*command, "--output", str(tmp_path / "two")]) == EXIT_OK
    elsewhere = [word.replace("org/mine", "org/never") for word in command]
    assert main([*elsewhere, "--output", str(tmp_path / "three")]) == EXIT_BAD_INPUT


def test_what_has_parts_that_are_not_free_is_not_called_free(hub, weights):
    for licence in ("mit", "Apache-2.0", "cc-by-4.0"):
        with pytest.raises(UserError, match="mert, tunejury, mmaudio-vae") as caught:
            push(str(weights), "org/mine", bundle="paper", license=licence)
        assert "cc-by-nc-4.0" in caught.value.hint
    assert hub.repos == {}, "it is refused before anything is made"
    push(str(weights), "org/mine", bundle="paper")
    assert front(hub.repos["models", "org/mine"].files["README.md"])["license"] == "cc-by-nc-4.0"
    push(str(weights), "org/free", bundle="debug", license="Apache-2.0")
    assert front(hub.repos["models", "org/free"].files["README.md"])["license"] == "apache-2.0"


def test_a_released_file_under_its_own_name_keeps_its_licence(hub, tmp_path):
    released = tmp_path / "fluxaudio_s_full.pth"
    torch.save(debug_backbone(0, "none").state_dict(), released)
    with pytest.raises(UserError, match="fluxaudio-s"):
        push(str(released), "org/copy", bundle="debug", license="mit")


@pytest.fixture
def pulled_head(tmp_path, monkeypatch) -> str:
    """SHA-256 of the released reward head, as the record of its first fetch says."""
    digest = "ab" * 32
    monkeypatch.setenv("TTMRAY_WEIGHTS", str(tmp_path / "store"))
    record = {"files": {"tunejury/tunejury.pt": {"sha256": digest, "size": 1}}}
    Folder.at(str(tmp_path / "store")).write("hashes.json", json.dumps(record).encode())
    return digest


def test_a_run_keeps_the_licence_of_its_own_bundle_whatever_bundle_is_named(hub, corpus, tmp_path):
    copy = Folder.at(str(shutil.copytree(corpus, tmp_path / "copy")))
    described = copy.read_json("run.json")
    copy.write("run.json", json.dumps(described | {"config": described["config"] | {"bundle": "paper"}}).encode())
    with pytest.raises(UserError, match="mert, tunejury"):
        push(copy.uri, "org/songs", bundle="debug", license="mit")
    assert hub.repos == {}


def test_a_table_by_a_head_that_is_not_free_makes_a_corpus_not_free(hub, corpus, tmp_path, pulled_head):
    copy = Folder.at(str(shutil.copytree(corpus, tmp_path / "copy")))
    assert licences.parts_of(copy.uri, ["debug"]) == licences.Parts({}, {})
    copy.write("scores/mine/run.json", json.dumps({"kind": "scores", "head": pulled_head}).encode())
    with pytest.raises(UserError, match="parts of tunejury, which"):
        push(copy.uri, "org/songs", license="mit")


def test_what_a_bundle_of_ones_own_is_made_of_counts(hub, tiny_bundle, pulled_head):
    assert licences.licence_for(str(tiny_bundle), None, licences.parts_of(str(tiny_bundle), [])) == "other"
    described = (tiny_bundle / "bundle.json").read_text()
    first = json.loads(described)["files"]["clap/config.json"]["sha256"]
    (tiny_bundle / "bundle.json").write_text(described.replace(first, pulled_head))
    parts = licences.parts_of(str(tiny_bundle), [])
    assert set(parts.restricted) == set(parts.contained) == {"tunejury"}
    assert licences.licence_for(str(tiny_bundle), None, parts) == "cc-by-nc-4.0"
    with pytest.raises(UserError, match="would call free what is not"):
        push(str(tiny_bundle), "org/tiny", license="mit")


def test_files_of_the_shipped_bundle_are_not_freer_than_they_are(hub, tmp_path):
    assert licences.licence_for(str(MICRO.path), None, licences.parts_of(str(MICRO.path), [])) == "apache-2.0"
    with pytest.raises(UserError, match=r"README\.md says the licence apache-2\.0, --license mit"):
        push(str(MICRO.path), "org/micro", license="mit")
    (tmp_path / "mine").mkdir()
    shutil.copy(MICRO.path / "bundle.json", tmp_path / "mine")
    for licence in ("cc0-1.0", "MIT"):
        with pytest.raises(UserError, match=r"freer than the licence of what is pushed: micro \(Apache-2.0\)"):
            push(str(tmp_path / "mine"), "org/micro", license=licence)


def test_a_licence_is_an_identifier(hub, weights):
    for licence in ("My own licence", "", "mit!"):
        with pytest.raises(UserError, match="is no identifier"):
            push(str(weights), "org/mine", bundle="debug", license=licence)


def test_a_card_that_is_there_is_kept_until_it_is_to_be_replaced(hub, weights, caplog):
    push(str(weights), "org/mine", bundle="debug")
    files = hub.repos["models", "org/mine"].files
    files["README.md"] = b"by hand"
    with caplog.at_level(logging.WARNING, "huggingface_hub"):
        push(str(weights), "org/mine", bundle="debug")
    assert not caplog.records, "that nothing has changed is no warning"
    assert files["README.md"] == b"by hand"
    push(str(weights), "org/mine", bundle="debug", new_card=True)
    assert files["README.md"] != b"by hand"


def test_a_corpus_is_whole_on_the_hub_and_tells_nothing_of_this_machine(hub, corpus, tmp_path):
    assert push(str(corpus), "org/songs", name="Songs") == EXIT_OK
    repo = hub.repos["datasets", "org/songs"]
    assert list(problems(Folder.at("hf://datasets/org/songs"))) == []
    here = str(corpus.parent).encode()
    assert [name for name, data in repo.files.items() if here in data] == []
    assert [name for name in repo.commits[-1]["added"] if name == "_SUCCESS.json"], "last of all"
    assert len(ttmray.open_corpus("hf://datasets/org/songs")) == 2
    with pytest.raises(UserError, match="a corpus does not hold"):
        sample("hf://datasets/org/songs", 1, 0, str(tmp_path / "page"))
    sent = len(repo.commits)
    push(str(corpus), "org/songs", name="Songs")
    assert len(repo.commits) == sent, "what is there is not sent again"
    with pytest.raises(UserError, match="is a corpus"):
        published("hf://datasets/org/songs")


def test_what_says_nothing_about_a_corpus_is_refused_and_its_page_is_that_of_a_data_set(hub, corpus, tmp_path, capsys):
    for options, words in (({"weights": "ema:0.05"}, "--weights"), ({"evaluation": "runs/e"}, "--evaluation")):
        with pytest.raises(UserError, match=words):
            push(str(corpus), "org/songs", **options)
    (tmp_path / "song.flac").touch()
    for place, words in (("song.flac", "is a file"), ("gone", "is not there")):
        with pytest.raises(UserError, match=words):
            push(str(tmp_path / place), "org/songs")
    push(str(corpus), "org/songs")
    assert f"{hub.url}/datasets/org/songs" in capsys.readouterr().out


def test_a_push_that_was_interrupted_leaves_an_unfinished_corpus_and_goes_on(hub, corpus, monkeypatch):
    monkeypatch.setattr("ttmray.recipes.push.BATCH_FILES", 2)
    hub.dataset("org/songs").files = {"shards/stale.tar": b"old"}
    done = hub.dataset("org/songs").commits
    commit = HfApi.create_commit

    def twice(self: HfApi, *arguments: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", twice)
    with pytest.raises(KeyboardInterrupt):
        push(str(corpus), "org/songs")
    files = hub.dataset("org/songs").files
    assert "_SUCCESS.json" not in files
    first = {name for change in done for name in change["added"]}
    assert len(first) == 4
    monkeypatch.setattr(HfApi, "create_commit", commit)
    push(str(corpus), "org/songs")
    again = {name for change in done[2:] for name in change["added"]}
    assert not {name for name in again & first if name.endswith((".tar", ".parquet", ".safetensors"))}
    assert "shards/stale.tar" not in files
    assert list(problems(Folder.at("hf://datasets/org/songs"))) == []


def test_bars_of_the_hubs_client_are_not_in_files(hub, corpus, capfd):
    push(str(corpus), "org/quiet")
    shown = capfd.readouterr()
    assert "org/quiet" in shown.out
    assert "%|" not in shown.out + shown.err


def test_a_pushed_corpus_opens_with_datasets_as_its_page_says(hub, corpus, tmp_path):
    push(str(corpus), "my-org/my-songs")
    page = (Path(__file__).resolve().parents[2] / "docs/hub.md").read_text()
    code = page.partition("opens without ttmray, too:")[2].partition("```python\n")[2].partition("```")[0]
    code += "import json\nclips = list(clips)\n"
    code += "print(json.dumps([len(clips), sorted(clips[0]), len(index), index.column_names]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TTMRAY_"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr[-3000:]
    rows, columns, indexed, names = json.loads(shown.stdout.splitlines()[-1])
    assert (rows, indexed) == (2, 2)
    assert {"__key__", "json", "latent_mean.npy", "latent_std.npy"} <= set(columns)
    assert {"key", "reward_score"} <= set(names)


def test_a_reward_head_of_the_hub_scores_as_that_on_this_machine(hub, tmp_path):
    head = debug_tunejury(5, 64, "cpu").head
    run = tmp_path / "ranker"
    run.mkdir()
    save_file({f"net.{key}": value for key, value in head.net.state_dict().items()}, run / "tunejury.safetensors")
    (run / "tunejury.json").write_text(json.dumps({"block_dims": [512, 64, 512]}))
    hub.model("org/judge").files = {file.name: file.read_bytes() for file in run.iterdir()}
    hub.model("org/judge").files["ttmray.json"] = b'{"format": 1, "kind": "ranker", "bundle": "debug"}'
    assert published("hf://org/judge").bundle == "debug+hf://org/judge"
    local, remote = (open_bundle(f"debug+{place}") for place in (run, "hf://org/judge"))
    assert local.identity() == remote.identity()
    assert remote.load({"tunejury"}, LoadOptions()).tunejury is not None


def test_what_cannot_be_pushed_or_loaded_says_why(hub, weights, tmp_path, monkeypatch):
    for name in ("mine", "org/mine/file.pt", "org/mine@v1"):
        with pytest.raises(UserError):
            push(str(weights), name, bundle="debug")
    with pytest.raises(UserError, match="no run"):
        push(str(tmp_path), "org/mine")
    hub.model("org/others").files = {"weights.pth": b"x"}
    with pytest.raises(UserError, match="not made by ttmray push") as caught:
        ttmray.load("hf://org/others")
    assert "checkpoint=" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    with pytest.raises(UserError, match="403") as caught:
        push(str(weights), "org/mine", bundle="debug")
    assert "\n" not in caught.value.message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push(str(weights), "org/mine", bundle="debug")
    with console.capture(), pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        ttmray.load("hf://org/mine")
    assert places.offline() == "HF_HUB_OFFLINE"


@pytest.fixture
def tiny_bundle(tmp_path: Path) -> Path:
    """A bundle's folder of two roles, whose files are no weights."""
    return without_weights(tmp_path / "tiny")


def test_a_bundle_of_the_hub_is_the_one_that_was_pushed_whoever_uploaded_it_and_offline(hub, tiny_bundle, monkeypatch):
    push(str(tiny_bundle), "org/tiny")
    local = open_bundle(str(tiny_bundle)).identity()
    assert open_bundle("hf://org/tiny").identity() == local
    hub.model("org/by-hand").files = {
        name: data for name, data in hub.repos["models", "org/tiny"].files.items() if name != "ttmray.json"
    }
    assert published("hf://org/by-hand").bundle == "hf://org/by-hand"
    with console.capture():
        assert ttmray.load("hf://org/by-hand", device="cpu").clip_s == 5.0
        ttmray.load("hf://org/tiny", device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_bundle("hf://org/tiny").identity() == local
    assert published("hf://org/tiny").bundle == "hf://org/tiny"
    assert main(["score", "song.wav", "--bundle", "hf://org/never"]) == EXIT_BAD_INPUT
    with pytest.raises(UserError, match="not in the cache") as caught:
        ttmray.load("hf://org/never")
    assert "\n" not in caught.value.message


def test_weights_and_heads_and_corpora_are_no_bundles_and_the_way_to_use_them_is_said(hub, weights, corpus, capsys):
    push(str(weights), "org/mine", bundle="debug")
    hub.model("org/judge").files["ttmray.json"] = b'{"format": 1, "kind": "ranker", "bundle": "micro"}'
    push(str(corpus), "org/songs")
    capsys.readouterr()
    for place, hint in (
        ("hf://org/mine", "--bundle debug --set checkpoint=hf://org/mine"),
        ("hf://org/judge", "--bundle micro+hf://org/judge"),
        ("hf://datasets/org/songs", "ttmray.open_corpus('hf://datasets/org/songs')"),
        ("hf://org/gone", "Check its name"),
    ):
        assert main(["generate", "--prompt", "a harp", "--bundle", place]) == EXIT_BAD_INPUT
        said = " ".join(capsys.readouterr().err.split())
        assert place in said
        assert hint in said


@pytest.mark.slow  # 27 MB go over HTTP to the hub and back
def test_the_micro_bundle_scores_and_generates_from_the_hub_as_from_here(hub, tmp_path, capsys):
    assert main(["push", str(MICRO.path), "org/micro"]) == EXIT_OK
    noise = np.random.default_rng(0).normal(scale=0.1, size=(1, 5 * 44100)).astype(np.float32)
    write_audio(str(tmp_path / "a.wav"), noise, 44100)
    rows, clips = [], []
    for bundle in ("micro", "hf://org/micro"):
        capsys.readouterr()
        command = ["score", str(tmp_path / "a.wav"), "--caption", "a harp", "--json", "--bundle", bundle]
        assert main(command) == EXIT_OK
        rows.append(json.loads(capsys.readouterr().out))
        run = tmp_path / f"run-{len(rows)}"
        command = ["generate", "--prompt", "a harp", "--set", "sampler.steps=1", "--output", str(run)]
        assert main([*command, "--bundle", bundle]) == EXIT_OK
        clips.append(next((run / "clips").iterdir()).read_bytes())
    assert rows[0] == rows[1]
    assert clips[0] == clips[1]
    with console.capture():
        (score,) = ttmray.load("hf://org/micro", device="cpu").score(str(tmp_path / "a.wav"), "a harp")["reward"]
    assert score == rows[0]["reward"]
