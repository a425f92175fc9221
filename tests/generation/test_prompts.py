"""Prompt files of every kind, and what is refused before any model runs."""

import csv
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.generation.prompts import Prompt, given_prompts, read_prompts
from ttmray.storage import safe_relative


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


PAIRS = [Prompt("007", "A calm, slow piano"), Prompt("x-1.b", "Drums 🥁")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'id,prompt\n007,"A calm, slow piano"\nx-1.b,Drums 🥁\n'),
        ("a.csv", '\ufeffPrompt_ID,extra,Caption\r\n007,1,"A calm, slow\n piano"\r\nx-1.b,2,Drums 🥁\r\n'),
        ("a.TSV", "text\tid\nA calm, slow piano\t007\nDrums 🥁\tx-1.b\n"),
        ("a.json", json.dumps([{"id": p.id, "prompt": p.text, "score": 1} for p in PAIRS])),
        ("a.jsonl", "\n".join(json.dumps({"prompt_id": p.id, "caption": p.text}) for p in PAIRS) + "\n\n"),
    ],
)
def test_ids_and_texts_are_read_from_every_kind_of_table(tmp_path, name, text):
    assert read_prompts(write(tmp_path, name, text)) == PAIRS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "A flute\n\n  two   drums \n"),
        ("a.csv", "prompt\nA flute\ntwo drums\n"),
        ("a.json", '["A flute", "two drums"]'),
        ("a.jsonl", '"A flute"\n{"prompt": "two drums", "id": null}\n'),
    ],
)
def test_prompts_without_ids_are_named_by_their_text(tmp_path, name, text):
    found = read_prompts(write(tmp_path, name, text))
    assert [prompt.text for prompt in found] == ["A flute", "two drums"]
    assert [prompt.id for prompt in found] == [
        hashlib.sha256(prompt.text.encode()).hexdigest()[:16] for prompt in found
    ]
    assert given_prompts(["A flute", "two drums"]) == found


def test_integer_ids_of_json_are_text(tmp_path, data_dir):
    found = read_prompts(str(data_dir / "prompts.json"))
    assert len(found) == 60
    assert found[0].id == "0"
    assert found[0].text.startswith("A melancholic rap piece")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "a.txt holds no prompts"),
        ("a.csv", "id,prompt\n", "a.csv holds no prompts"),
        ("a.csv", "id,prompt\n1,\n", "a.csv, line 2: the prompt is empty"),
        ("a.csv", "id,prompt\n1\n", "a.csv, line 2: the prompt is empty"),
        ("a.csv", "id,song\n1,x\n", "a.csv, line 2 has no prompt; it has id, song"),
        ("a.csv", "id,prompt\n1,slow, calm\n", "more cells than the header"),
        ("a.csv", 'id,prompt\n1,"x\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "id,prompt\n,x\n", "'' cannot be an id"),
        ("a.csv", "id,prompt\n../x,x\n", "'../x' cannot be an id"),
        ("a.csv", "id,prompt\n.tmp-x,x\n", "cannot be an id"),
        ("a.csv", "id,prompt\na/b,x\n", "cannot be an id"),
        ("a.csv", f"id,prompt\n{'a' * 101},x\n", "cannot be an id"),
        ("a.csv", "id,prompt\na,x\nb,y\nA,z\n", "line 4 has the id A of .*line 2"),
        ("a.txt", "x\ny\nx\n", "line 3 has the same prompt as .*line 1"),
        ("a.txt", "x" * 10_000, "has 10,000 characters, 2,000 are allowed"),
        ("a.json", '{"prompt": "x"}', "a.json holds a dict, not a list"),
        ("a.json", '["x"', "a.json is not valid JSON"),
        ("a.json", "[" * 100_000, "a.json is not valid JSON"),
        ("a.json", "[3]", "item 1: the prompt is a int, not text"),
        ("a.json", '[{"prompt": "x", "id": 1.5}]', "the id 1.5 is a float, not text"),
        ("a.json", '[{"prompt": "x", "id": true}]', "the id True is a bool, not text"),
        ("a.json", '["\\ud800"]', "not valid Unicode"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "a.jsonl is not valid JSON"),
    ],
)
def test_wrong_files_are_refused_with_the_place(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.txt: not found"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))


def test_the_same_text_under_two_ids_is_two_prompts(tmp_path):
    found = read_prompts(write(tmp_path, "a.csv", "id,prompt\na,x\nb,x\n"))
    assert found == [Prompt("a", "x"), Prompt("b", "x")]


@pytest.mark.parametrize("texts", [[""], [" \n"], ["x", "x"]])
def test_prompts_of_the_command_line_are_checked_too(texts):
    with pytest.raises(UserError, match=r"prompt [12]"):
        given_prompts(texts)


rows = st.lists(st.tuples(st.text(max_size=12), st.text(max_size=40)), min_size=1, max_size=5)


@given(rows, st.sampled_from(["csv", "tsv", "json", "jsonl", "txt"]))
def test_whatever_is_in_a_file_gives_safe_unique_prompts_or_an_error_for_people(tmp_path_factory, pairs, ending):
    path = tmp_path_factory.mktemp("prompts") / f"p.{ending}"
    dicts = [{"id": name, "prompt": text} for name, text in pairs]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        if ending == "json":
            json.dump(dicts, file)
        elif ending == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in dicts)
        elif ending == "txt":
            file.writelines(text + "\n" for _, text in pairs)
        else:
            writer = csv.DictWriter(file, ["id", "prompt"], delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(dicts)
    try:
        found = read_prompts(str(path))
    except UserError:
        return
    assert len({prompt.id.casefold() for prompt in found}) == len(found)
    for prompt in found:
        assert "/" not in safe_relative(prompt.id)
        assert prompt.text == " ".join(prompt.text.split()) != ""
