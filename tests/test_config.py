"""Reading, overriding and identifying run configs."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ttmray import presets
from ttmray.cli import COMMANDS
from ttmray.config import (
    Config,
    IdentityPart,
    added,
    differences,
    fingerprint,
    fingerprint_of_rows,
    identity,
    load_config,
)
from ttmray.config_docs import field_lines
from ttmray.corpus.config import CorpusConfig
from ttmray.errors import UserError
from ttmray.evaluation.config import EvaluateConfig
from ttmray.generation.config import GenerateConfig
from ttmray.plugins import named
from ttmray.recipes.ablation_config import AblateConfig
from ttmray.recipes.reproduce_config import ReproduceConfig
from ttmray.training.config import ModelConfig, TrainConfig

PATHS = ("input=songs", "output=run", "bundle=debug")


def load(*sets: str, path: str | None = None) -> CorpusConfig:
    return load_config(CorpusConfig, path, [*PATHS, *sets])


def message(*sets: str, path: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(*sets, path=path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "suggestion"),
    [
        ("bundel=debug", "did you mean bundle?"),
        ("segments.clips_s=5", "did you mean segments.clip_s?"),
        ("runtime.decode.cpu=2", "did you mean runtime.decode.cpus?"),
        ("runtime.separate.gpu=1", "did you mean runtime.separate.gpus?"),
    ],
)
def test_an_unknown_field_suggests_the_near_one(assignment, suggestion):
    assert suggestion in message(assignment)


@pytest.mark.parametrize(("sets", "shown"), [("texts=slow", "[slow]"), ("texts=3", "[3]"), ("texts={a: 1}", "[a, b]")])
def test_a_value_in_place_of_a_list_is_told_how_to_become_one(sets, shown):
    with pytest.raises(UserError, match=re.escape(f"texts: needs a list, in brackets: {shown}")):
        load_config(GenerateConfig, None, [sets])


def test_an_unknown_field_without_a_near_one_lists_what_there_is():
    text = message("splits.zebra=1")
    assert "splits.zebra: unknown field" in text
    assert all(name in text for name in ("validation", "test", "seed", "group_by_artist"))


@pytest.mark.parametrize(
    ("assignment", "field"),
    [
        ("splits.validation=many", "splits.validation"),
        ("runtime.runner=slurm", "runtime.runner"),
        ("runtime.workers=several", "runtime.workers"),
        ("runtime.workers=-1", "runtime.workers"),
        ("runtime.batch=0", "runtime.batch"),
        ("runtime.device=tpu", "runtime.device"),
        ("runtime.decode.workers=[3, 2]", "runtime.decode.workers"),
        ("segments.clip_s=.nan", "segments.clip_s"),
        ("segments.clip_s=.inf", "segments.clip_s"),
        ("limits.max_channels=6", "limits.max_channels"),
        ("silence_dbfs=3", "silence_dbfs"),
        ("latent_peak=1.5", "latent_peak"),
        ("latent_peak=0", "latent_peak"),
        ("catalogue=songs", "catalogue"),
        ("max_failures=1 %", "max_failures"),
        ("max_failures=-1", "max_failures"),
        ("input=null", "input"),
    ],
)
def test_a_wrong_value_names_its_field(assignment, field):
    assert f"  {field}" in message(assignment)


def test_all_wrong_fields_are_named_at_once():
    text = message("bundel=x", "runtime.batch=0", "splits.seed=one")
    assert all(field in text for field in ("bundel", "runtime.batch", "splits.seed"))


@pytest.mark.parametrize(
    ("kind", "sets", "line"),
    [
        (CorpusConfig, ["input=x"], "output: is required: --set output=FOLDER, or `output: FOLDER` in the config"),
        (CorpusConfig, ["output=x"], "input: is required: --set input=PATH, or"),
        (TrainConfig, ["output=x"], "data: is required: --set data.sources=[...], or"),
        (
            TrainConfig,
            ["output=x", "data.sources=[{}]"],
            "data.sources.0.corpus: is required: --set data.sources.0.corpus=PATH, or",
        ),
    ],
)
def test_a_missing_required_field_is_named_with_how_to_give_it(kind, sets, line):
    with pytest.raises(UserError) as caught:
        load_config(kind, None, sets)
    assert line in caught.value.message


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.config], ids=lambda one: one.name)
def test_every_field_that_a_command_requires_is_told_with_a_place_that_exists(command):
    kind = named(command.config)
    known = {line.partition(": ")[0] for line, _ in field_lines(kind.model_json_schema())}
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    if not needed:
        return
    with pytest.raises(UserError) as caught:
        load_config(kind)
    told = dict(re.findall(r"^  (\S+): is required: --set ([^=\n]+)=", caught.value.message, re.MULTILINE))
    assert told.keys() == needed
    assert set(told.values()) <= known


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (("segments.min_s=11",), ("segments.min_s", "segments.clip_s")),
        (("segments.max_clips=10", "unit_clips=9"), ("unit_clips (9)", "segments.max_clips (10)")),
        (("limits.max_duration_s=4",), ("limits.max_duration_s", "segments.min_s")),
    ],
)
def test_contradictions_name_both_sides(sets, named):
    text = message(*sets)
    assert all(name in text for name in named)


def test_overrides_are_yaml_and_apply_in_order():
    config = load(
        "runtime.workers=3",
        "runtime.workers=4",
        "catalogue.captions=null",
        "runtime.decode.workers=[2, 5]",
        "splits.group_by_artist=true",
        "bundle='debug'",
        "runtime.separate={cpus: 2, gpus: 0.5}",
        "runtime.separate.cpus=3",
    )
    assert config.runtime.workers == 4
    assert config.catalogue.captions is None
    assert config.runtime.decode.workers == (2, 5)
    assert config.splits.group_by_artist is True
    assert config.bundle == "debug"
    assert config.runtime.separate is not None
    assert (config.runtime.separate.cpus, config.runtime.separate.gpus) == (3.0, 0.5)


def test_the_value_of_an_override_may_hold_equal_signs():
    assert load("input=s3://bucket/a=b").input == "s3://bucket/a=b"


def test_a_number_sign_in_an_override_begins_no_comment():
    assert load("input=/d/My Songs #1").input == "/d/My Songs #1"


@pytest.mark.parametrize("field", ["input", "output"])
@pytest.mark.parametrize("value", ["", "   ", "s3://", "s3:///", "s3:///prefix", "file://", "' '"])
def test_what_names_no_place_is_no_folder(field, value):
    text = message(f"{field}={value}")
    assert f"  {field}: " in text
    assert "names no" in text or "at least 1 character" in text


def test_a_location_is_absolute_whatever_it_comes_from(tmp_path, monkeypatch):
    """Workers run in other folders, so that nobody has to make paths absolute later on."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/corpus.yaml").write_text("input: songs\noutput: ~/run\ncatalogue: {exclude: left-out.txt}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(CorpusConfig, "runs/corpus.yaml", ["catalogue.audio_root=audio"], {"input": "mine"})
    assert (config.input, config.output) == (f"{tmp_path}/mine", "/home/someone/run"), "not relative to the file"
    assert (config.catalogue.exclude, config.catalogue.audio_root) == (f"{tmp_path}/left-out.txt", f"{tmp_path}/audio")
    assert config.catalogue.captions == "auto"
    assert load("catalogue.captions=s3://bucket/c.csv").catalogue.captions == "s3://bucket/c.csv"
    assert GenerateConfig(texts=("x",)).output == f"{tmp_path}/runs/generate", "defaults too"
    again = CorpusConfig.model_validate_json(config.model_dump_json())
    assert again == config, "a worker that reads it in another folder has the same"


def test_values_that_are_there_already_are_taken_as_they_are_and_count_last(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("texts: [from the file]\nseed: 1\nsamples: 2")
    texts = ["1", "null", "a: b # c", "\N{GRINNING FACE}", "[x]"]
    config = load_config(GenerateConfig, str(path), ["seed=2", "samples=3"], {"texts": texts, "seed": 4})
    assert (list(config.texts), config.seed, config.samples) == (texts, 4, 3)
    texts.append("later")
    assert "later" not in config.texts
    with pytest.raises(UserError, match=r"did you mean sampler\?"):
        load_config(GenerateConfig, fields={"sampelr": {}})


def test_actors_of_older_files_lie_in_a_mapping_of_their_own():
    new = load_config(GenerateConfig, None, ["texts=[x]", "runtime={runner: ray, workers: 4, gpus: 0.5, batch: 2}"])
    old = ["texts=[x]", "runtime.batch=2", "runtime.pool={runner: ray, workers: 4, gpus: 0.5}"]
    assert load_config(GenerateConfig, None, old) == new
    with pytest.raises(UserError, match=r"pool\.workers is the old name of workers"):
        load_config(GenerateConfig, None, [*old, "runtime.workers=2"])
    with pytest.raises(UserError, match=r"did you mean runtime\.workers\?"):
        load_config(GenerateConfig, None, ["texts=[x]", "runtime.pool.workrs=2"])


def test_a_mark_inside_of_a_union_decides_the_identity():
    Length = Annotated[int | Literal["auto"], IdentityPart(lambda value: 10 if value == "auto" else value)]

    class Clips(Config):
        length: Length = "auto"
        pad_to: Length | None = "auto"

    assert identity(Clips()) == {"length": 10, "pad_to": 10}
    assert identity(Clips(pad_to=None)) == {"length": 10, "pad_to": None}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"segments: {clip_s: 8}\nsegments: {min_s: 2}\n", "'segments' is there twice"),
        (b"splits:\n  seed: 1\n  seed: 2\n", "'seed' is there twice"),
        (b"splits: &x {seed: 1, x: *x}\n", "inside of its own anchor"),
    ],
)
def test_a_file_that_says_one_thing_twice_is_refused(tmp_path, content, named):
    (tmp_path / "c.yaml").write_bytes(content)
    text = message(path=str(tmp_path / "c.yaml"))
    assert str(tmp_path / "c.yaml") in text
    assert named in text


def test_an_override_changes_only_what_it_names(tmp_path):
    (tmp_path / "c.yaml").write_text("runtime:\n  decode: &x {cpus: 2}\n  models: *x\n  write: {<<: *x, gpus: 1}\n")
    runtime = load("runtime.models.cpus=7", path=str(tmp_path / "c.yaml")).runtime
    assert (runtime.decode.cpus, runtime.models.cpus, runtime.write.cpus) == (2, 7, 2)


@pytest.mark.parametrize("assignment", ["workers", "=3", "runtime.=3", ".workers=3", "runtime..workers=3"])
def test_a_malformed_override_is_refused(assignment):
    assert "a.b=value" in message(assignment)


def test_an_override_with_broken_yaml_is_shown():
    assert "runtime.decode.workers=[1" in message("runtime.decode.workers=[1")


def test_overrides_go_on_top_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("segments: {clip_s: 8, min_s: 2}\nsplits:\n  seed: 7\n")
    config = load("segments.min_s=3", path=str(tmp_path / "c.yaml"))
    assert (config.segments.clip_s, config.segments.min_s, config.splits.seed) == (8.0, 3.0, 7)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"input: [unclosed", "not valid YAML"),
        (b"\xff\xfe\x00bad\xff", "not valid YAML"),
        (b"- a\n- b\n", "holds a list"),
        (b"just text\n", "holds a str"),
        (b"!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"1: 2\n", "not a valid CorpusConfig"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, content, named):
    (tmp_path / "c.yaml").write_bytes(content)
    text = message(path=str(tmp_path / "c.yaml"))
    assert str(tmp_path / "c.yaml") in text
    assert named in text


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert load(path=str(tmp_path / "c.yaml")) == load()


@pytest.mark.parametrize("name", ["absent.yaml", ""])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    assert str(tmp_path / name).rstrip("/") in message(path=str(tmp_path / name))


def test_configs_are_frozen():
    with pytest.raises(ValueError):
        load().bundle = "other"


paths = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1).filter(str.strip)
resources = st.fixed_dictionaries(
    {
        "cpus": st.integers(0, 640_000).map(lambda parts: parts / 10_000),
        "gpus": st.integers(0, 8) | st.integers(0, 10_000).map(lambda parts: parts / 10_000),
        "workers": st.none() | st.tuples(st.integers(1, 4), st.integers(4, 9)),
    }
)
runtimes = st.fixed_dictionaries(
    {},
    optional={
        "runner": st.sampled_from(["local", "ray"]),
        "workers": st.just("auto") | st.integers(0, 64),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
        "batch": st.integers(1, 256),
        "threads": st.integers(1, 64),
        "fuse": st.sampled_from(["all", "models", "none"]),
        "decode": resources,
        "models": resources,
        "separate": st.none() | resources,
        "write": resources,
        "object_store_gib": st.none() | st.floats(0.1, 100),
        "clip_timeout_s": st.floats(1, 1e4),
    },
)
executions = st.fixed_dictionaries(
    {"input": paths, "output": paths, "runtime": runtimes, "bundle": st.just("debug")},
    optional={
        "max_failures": st.integers(0, 99) | st.integers(0, 100).map("{}%".format),
        "catalogue": st.fixed_dictionaries(
            {}, optional={"captions": st.none() | paths, "audio_root": paths, "exclude": paths}
        ),
    },
)


@given(executions)
def test_where_and_how_fast_never_changes_the_identity(fields: dict[str, Any]):
    config = CorpusConfig.model_validate(fields)
    assert fingerprint(identity(config)) == fingerprint(identity(load()))


@pytest.mark.parametrize(
    "assignment",
    [
        "bundle=paper",
        "reward_text=caption",
        "silence_dbfs=-60",
        "keep_audio=true",
        "unit_clips=16",
        "catalogue.duplicates=keep",
        "catalogue.limit=3",
        "splits.seed=1",
        "segments.clip_s=9",
        "segments.max_clips=9",
        "limits.max_duration_s=60",
        "separation.scope=track",
        "separation.overlap=0.1",
        "separation.precision=bf16",
        "latent_peak=0.95",
    ],
)
def test_what_changes_results_changes_the_identity_and_is_shown_as_a_difference(assignment):
    before, after = identity(load()), identity(load(assignment))
    assert fingerprint(before) != fingerprint(after)
    (line,) = differences(before, after)
    assert line.startswith(assignment.split("=")[0] + ": ")


def test_every_field_is_either_identity_or_execution():
    flat = identity(load("latent_peak=0.95", "extra_stages=[{stage: 'module:Stage'}]"))
    assert set(flat) | {"input", "output", "max_failures", "runtime"} == set(CorpusConfig.model_fields)
    assert set(flat) & {"input", "output", "max_failures", "runtime"} == set()


@given(executions)
def test_yaml_gives_the_same_config_back(fields):
    config = CorpusConfig.model_validate(fields)
    again = CorpusConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), plain, max_size=5), st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert fingerprint({key: value[key] for key in keys}) == fingerprint(value)


@given(st.lists(st.lists(st.text(), max_size=3), max_size=4))
def test_the_fingerprint_of_rows_is_that_of_their_list(rows):
    assert fingerprint_of_rows(iter(rows)) == fingerprint(rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1, 2}, object()])
def test_what_has_no_stable_encoding_has_no_fingerprint(value):
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"a": value})


def test_differences_name_added_removed_and_changed_leaves():
    old = {"a": {"b": 1, "c": 2}, "gone": 0, "list": [1]}
    new = {"a": {"b": 1, "c": 3}, "here": {"x": 1}, "list": [1, 2]}
    assert differences(old, new) == [
        "a.c: 2 -> 3",
        "gone: 0 -> (absent)",
        "here: (absent) -> {'x': 1}",
        "list: [1] -> [1, 2]",
    ]


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_equal_values_have_no_differences(value):
    assert differences(value, value) == []


def test_an_override_reaches_into_lists(tmp_path):
    class Part(Config):
        name: str
        size: int = 1

    class Whole(Config):
        parts: tuple[Part, ...]

    path = tmp_path / "a.yaml"
    path.write_text("parts: [{name: a}, {name: b}]")
    config = load_config(Whole, str(path), ["parts.1.size=7", "parts.0.name=c"])
    assert [(part.name, part.size) for part in config.parts] == [("c", 1), ("b", 7)]
    for wrong in ("parts.2.size=1", "parts.x.size=1", "parts.-1.size=1"):
        with pytest.raises(UserError, match="not one of the 2 positions"):
            load_config(Whole, str(path), [wrong])


def test_a_field_that_was_added_counts_where_it_is_not_at_its_default():
    class Nested(Config):
        old: int = 1
        new: int | None = added(None)

    class Outer(Config):
        nested: Nested = Nested()
        several: tuple[Nested, ...] = (Nested(),)

    before = {"nested": {"old": 1}, "several": [{"old": 1}]}
    assert identity(Outer()) == before
    assert identity(Outer(nested=Nested(new=2))) == before | {"nested": {"old": 1, "new": 2}}
    assert identity(Outer(several=(Nested(new=0),))) == before | {"several": [{"old": 1, "new": 0}]}


def test_runs_from_before_a_peak_of_the_latents_or_a_null_text_could_be_set_keep_their_fingerprint():
    assert "latent_peak" not in identity(load())
    assert identity(load("latent_peak=0.95")) == identity(load()) | {"latent_peak": 0.95}
    assert "null_text" not in identity(ModelConfig())
    assert identity(ModelConfig(null_text="clap")) == identity(ModelConfig()) | {"null_text": "clap"}


def test_a_file_may_choose_the_null_score_by_the_name_of_its_field(tmp_path):
    from ttmray.training.config import TrainConfig

    (tmp_path / "run.yaml").write_text(
        "output: /x\ndata: {sources: [{corpus: /x}]}\nmodel:\n  size: debug\n  null: learned\n"
    )
    config = load_config(TrainConfig, str(tmp_path / "run.yaml"))
    assert config.model.null == "learned"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(TrainConfig, str(tmp_path / "again.yaml")) == config


def test_a_bundle_whose_name_no_file_can_have_is_no_bundle():
    with pytest.raises(UserError, match="there is no bundle"):
        load("bundle=" + "x" * 300)


def test_what_a_preset_names_below_configs_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/debug/prompts.csv"
    places = [load_config(ReproduceConfig, "debug/reproduce").prompts]
    named = load_config(AblateConfig, "debug/ablate").prompts  # which its steps take as it is
    places.append(load_config(EvaluateConfig, None, ("folders=[x]", f"prompts={named}")).prompts)
    for place in places:
        assert Path(str(place)).samefile(presets.FOLDER / "debug/prompts.csv")
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("a slow waltz\n")
    assert presets.shipped(name) == name, "the working folder's comes first"
    for other in (
        "configs/debug/nothing.csv",
        "configs",
        "configs/../config.py",
        "debug/prompts.csv",
        "s3://configs/x",
    ):
        assert presets.shipped(other) == other
