"""YAML of configs: no key twice, nothing shared, values of overrides as they were written."""

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ttmray.yaml_text import MAX_VALUES, read_override, read_yaml


def containers(value: Any) -> list[int]:
    """Identities of all mappings and lists of a value."""
    if isinstance(value, dict):
        return [id(value), *(one for item in value.values() for one in containers(item))]
    if isinstance(value, list):
        return [id(value), *(one for item in value for one in containers(item))]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: {c: 1}}\nd: {<<: *x}\ne: {<<: *x, f: 2}\n",  # merges
        "a: &x {b: [1]}\nd: *x\ne: [*x, *x]\n",  # aliases, also in lists
        "a: &x {b: {c: 1}}\nd: &y {<<: *x}\ne: {<<: *y}\n",  # a merge of a merge
        "a: &x {b: {c: 1}}\nd: &y {g: {c: 2}}\ne: {<<: [*x, *y]}\nf:\n  <<: *x\n  <<: *y\n",  # several
        "a: &x [[1], [2]]\nb: *x\n",
    ],
)
def test_anchors_aliases_and_merges_share_nothing_and_mean_the_same(text):
    value = read_yaml(text)
    assert value == yaml.safe_load(text)
    assert len(containers(value)) == len(set(containers(value)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", 3),
        ("a:\n  b: 1\n  b: 2\n", 3),
        ("- {a: 1}\n- {a: 1, a: 2}\n", 2),
        ("1: x\n0x1: y\n", 2),  # the same number
        ("a: x\n'a': y\n", 2),
        ("x: &x {b: 1}\na:\n  <<: *x\n  b: 2\n  b: 3\n", 5),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_line(text, line):
    with pytest.raises(yaml.YAMLError, match=rf"is there twice, first in line \d+\n.*line {line}, column"):
        read_yaml(text)


@pytest.mark.parametrize("text", ["a:\n  null: learned\n", "a: {null: learned}", "x: &x {null: learned}\na: {<<: *x}"])
def test_the_key_null_is_a_name_and_the_value_null_is_none(text):
    assert read_yaml(text)["a"] == {"null": "learned"}
    assert read_yaml("a: {b: null, c: ~}") == {"a": {"b": None, "c": None}}
    with pytest.raises(yaml.YAMLError, match="the key 'null' is there twice"):
        read_yaml("a: {null: learned, 'null': learned}")


def test_a_key_may_override_one_of_a_merge():
    assert read_yaml("x: &x {b: 1, c: 1}\na: {b: 2, <<: *x}\n")["a"] == {"b": 2, "c": 1}


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: &x {b: *x}\n", "a: &x {b: {c: [1, *x]}}\n", "&x {<<: *x}\n"])
def test_an_alias_inside_of_its_own_anchor_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="inside of its own anchor"):
        read_yaml(text)


@pytest.mark.parametrize("pattern", ["[{}]", "{{<<: [{}]}}"])
def test_a_few_lines_that_stand_for_billions_of_values_are_refused_at_once(pattern):
    first = "a0: &a0 {x: 1, y: 2}\n"
    lines = [f"a{i}: &a{i} {pattern.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 30)]
    started = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=f"more than {MAX_VALUES:,} values"):
        read_yaml(first + "".join(lines))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("text", ["a: 2026-99-99", "[" * 5000, "a: 1\n---\nb: 2\n", "!!python/name:os.system"])
def test_what_cannot_be_is_an_error_of_yaml(text):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, plain, max_size=4))
def test_what_yaml_writes_is_read_back(value):
    assert read_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/d/My Songs #1", "/d/My Songs #1"),
        ("#1", "#1"),
        ("a #b #c", "a #b #c"),
        ("s3://bucket/a #b", "s3://bucket/a #b"),
        ("3 # three", "3 # three"),
        ("/d/My: Songs", "/d/My: Songs"),
        ("/d/a: b: c #d", "/d/a: b: c #d"),
        ("- x", "- x"),
        ("@home", "@home"),
        ("", ""),
        ("  ", ""),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("1.0e-4", 1e-4),
        ("'a #b'", "a #b"),
        ('"3"', "3"),
        ("[1, 'a #b']", [1, "a #b"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_the_value_of_an_override_is_kept_whole(text, value):
    assert read_override(text) == value


@pytest.mark.parametrize("text", ["[1", "[1, 2] # two", "'a' b", '"a" # b', "{a: 1, a: 2}", "{a: 1 #}"])
def test_an_override_that_ends_before_its_end_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        read_override(text)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1))
def test_text_in_the_quotes_of_json_is_kept_as_it_is(text):
    assert read_override(json.dumps(text, ensure_ascii=False)) == text


def test_an_override_that_nests_too_deeply_is_no_traceback() -> None:
    for text in ("[" * 5000, "a: " + "{b: " * 3000):
        with pytest.raises(yaml.YAMLError):
            read_override(text)
