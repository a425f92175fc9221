"""What the pages of compared methods and of tables begin with: sentences, tables, players; nothing that means nothing
is called better."""

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ttmray.config import Config
from ttmray.generation.manifest import SCHEMA
from ttmray.recipes import ablation_pages, method_page
from ttmray.recipes.ablation_tables import Cell, CellTable, chain_table, contrast_table, head_table
from ttmray.recipes.chain import write_page
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.result_views import view_of
from ttmray.storage import Folder

NOTE = "The debug bundle's models are tiny and untrained: these numbers mean nothing."


def change(value: float, p: float, n: int = 32) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "p": p, "p_holm": p, "n": n, "seeds": [value]}


def row(name: str, reward: float, p: float, quality: float = 0.02, verdict: str = "", quality_p: float = 0.4) -> dict:
    account = dict.fromkeys(("clips", "updates", "passes", "training_tflop", "sampling_tflop"), 1.0)
    account |= dict.fromkeys(("cpu_seconds", "gpu_seconds", "seconds", "weight_distance"), 2.0)
    return {
        "name": name,
        "failed": 0,
        "means": {"reward": reward, "quality": 0.5},
        "changes": {"reward": change(reward, p), "quality": change(quality, quality_p)},
        "verdict": verdict,
        "sets": {"vendi": {"mean": 4.0}},
        "distance": 0.1,
        "account": account,
    }


def compared(*rows: dict[str, Any], meaningless: bool = False) -> dict[str, Any]:
    parent = row("parent", 0.1, 1.0) | {"changes": {}, "account": None, "distance": None}
    return {
        "equal": "Held equal: all.",
        "measures": ["reward", "quality"],
        "rewards": {"reward_score": 1.0},
        "seeds": [7, 8],
        "prompts": 32,
        "note": "",
        "meaningless": meaningless,
        "rows": [parent, *rows],
        "contrasts": [],
    }


def test_the_headline_of_methods_has_interval_prompts_and_seeds_and_says_what_may_be_chance():
    text = method_page.headline(compared(row("crpo", 0.2, 0.001), row("grpo", 0.1, 0.4)))
    assert text.startswith("crpo has the highest trained reward: +0.200 against the parent (95 % interval +0.100 to ")
    assert "32 held-out prompts, 2 seeds), told from chance." in text
    assert "true quality changes by +0.020 (−0.080 to +0.120), which may be chance." in text
    assert text.endswith("No method of 2 is told to raise both.")
    near = method_page.headline(compared(row("crpo", 0.2, 0.03), row("grpo", 0.1, 0.4)))
    assert "+0.100 to +0.300, 32 held-out prompts, 2 seeds), which may be chance among 2 methods." in near
    both = method_page.headline(compared(row("crpo", 0.2, 0.001, 0.3, "both rise", 0.001)))
    assert both.endswith("Both rise by crpo.")
    hacked = row("grpo", 0.4, 0.001, -0.3, "hacked: reward rises, quality falls", 0.001)
    assert method_page.headline(compared(hacked)).endswith("Hacked, reward up and quality down: grpo.")


def test_what_is_told_of_a_method_is_corrected_for_how_many_there_are():
    one = compared(row("a", 0.2, 0.03))
    two = compared(row("a", 0.2, 0.03), row("b", -0.2, 0.001))
    assert method_page.side(one["rows"][1]["changes"]["reward"], one) == 1
    assert method_page.side(two["rows"][1]["changes"]["reward"], two) == 0
    assert method_page.side(two["rows"][2]["changes"]["reward"], two) == -1
    text = method_page.section(two, {})
    assert text.count("▼ lower") == 2, "the cell and the caption that says what it is"
    assert text.count("not told") == 3


def test_methods_of_untrained_models_are_not_ranked_by_a_word():
    result = compared(row("crpo", 0.2, 0.001, 0.3, "", 0.001), meaningless=True)
    text = method_page.headline(result)
    assert "mean nothing" in text
    assert "crpo" not in text
    assert not re.search("▲|▼|told from chance", method_page.section(result, {}))


def cell(reward: float, seed: int) -> Cell:
    own = reward + np.random.default_rng(seed).normal(0, 0.02, 40)
    scores = {str(i): float(value) for i, value in enumerate(own)}
    return Cell((0.5, 0.4, 0.6), {"reward": scores, "clap_score": scores}, {"reward": own, "clap_score": own}, "p")


@cache
def contrast() -> CellTable:
    return contrast_table("rewards", {"a": cell(0.0, 1), "b": cell(0.5, 2)}, {})


@cache
def chain() -> CellTable:
    rows = {"text": cell(0.0, 1), "SFT": cell(0.5, 2), "again": cell(0.5, 3), "worse <b>": cell(0.2, 4)}
    return chain_table(rows, ["text"], {})


def test_the_sentence_of_a_table_names_the_best_row_and_only_differences_that_are_told_from_chance():
    text = ablation_pages.sentence(chain())
    assert re.match(
        r"(SFT|again) has the highest mean reward, \+0\.50\d \(95 % interval \+0\.4\d+ to .*, 40 prompts\)\.", text
    )
    assert re.search(r"Told from chance: worse <b> 0\.3\d\d below again \(Holm's p < 0\.0001\)\.", text)
    assert text.endswith("The other 1 of 2 pairs cannot be told apart.")
    heads = head_table({"v1": {0.0: cell(0.0, 5), 1.0: cell(0.5, 6)}}, {"none": cell(0.0, 7)}, 0.0, (0.0, 1.0))
    assert ablation_pages.sentence(heads).startswith("v1 has the highest Score-r, +0.99")
    assert ablation_pages.sentence(heads).endswith("no row is tested against another.")
    assert ablation_pages.sentence(chain().unmarked(NOTE)) == f"{NOTE} No row is named as better."


def test_the_change_of_a_row_is_told_by_a_word_and_a_sign_and_by_none_where_numbers_mean_nothing():
    text = ablation_pages.section(chain())
    assert "▼ below again" in text
    assert "not told from SFT" in text
    assert "worse &lt;b&gt;" in text
    assert not re.search("▲|▼|not told from", ablation_pages.section(chain().unmarked(NOTE)))


def test_stored_tables_are_read_as_they_were_and_the_chain_comes_first():
    tables = ablation_pages.read_stored(ablation_pages.stored([contrast(), chain().unmarked(NOTE)]))
    assert tables == (chain().unmarked(NOTE), contrast())
    for damaged in (b"", b"{}", b'[{"name": 1}]'):
        with pytest.raises(ValueError, match="validation error"):
            ablation_pages.read_stored(damaged)


def clips(folder: Path, *samples: int) -> None:
    (folder / "manifest").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for sample in samples:
        name = f"a_{sample}"
        one = dict.fromkeys(SCHEMA.names) | {"name": name, "prompt_id": "a", "candidate": sample, "prompt": "slow <i>"}
        (folder / f"manifest/{name}.json").write_text(json.dumps(one | {"file": f"clips/{name}.wav"}))


class Frames(HTMLParser):
    """Tables that stand in no frame of their own that scrolls, and the order of what the page shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loose, self.order = 0, []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.loose += self.open[-1] != "scroll"
        if tag in ("table", "audio", "details"):
            self.order.append(tag)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(dict(attrs).get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()


class Nothing(Config):
    bundle: str = "micro"


def written(root: Path) -> str:
    steps = [Step("compare", Nothing(), lambda: 0, ())]
    write_page(Folder(str(root)), steps, {"compare": "1"})
    return (root / "index.html").read_text()


def test_the_page_of_methods_begins_with_its_result_and_plays_the_candidate_that_was_chosen(tmp_path):
    (tmp_path / "comparison").mkdir()
    result = compared(row("best", 0.2, 0.001))
    (tmp_path / "comparison/methods.json").write_text(json.dumps(result))
    lines = ["row,seed,prompt_id,sample,reward", "parent,,a,0,0.1", "best,7,a,0,0.1", "best,7,a,1,0.9", "best,8,a,0,5"]
    (tmp_path / "comparison/clips.csv").write_text("\n".join(lines))
    clips(tmp_path / "heard/parent/clips-0", 0)
    clips(tmp_path / "heard/best-7/clips-0", 0, 1)
    text = written(tmp_path)
    assert "best has the highest trained reward" in text[: text.index("<main")]
    assert "src='heard/parent/clips-0/clips/a_0.wav'" in text
    assert "src='heard/best-7/clips-0/clips/a_1.wav'" in text
    assert text.count("<audio") == 2
    assert "<details><summary><h2>Steps" in text, "folded"
    frames = Frames(text)
    assert frames.loose == 0
    assert frames.order[0] == "table"
    assert "best has the highest" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("nested", [False, True])
def test_the_page_of_tables_begins_with_the_chain_and_that_of_a_chain_with_tables_links_to_the_others(tmp_path, nested):
    base = tmp_path / "tables" if nested else tmp_path
    (base / "tables").mkdir(parents=True)
    (base / "tables/results.json").write_bytes(ablation_pages.stored([contrast(), chain()]))
    (base / "cells.json").write_text(json.dumps({"chain": {"text": "c1", "SFT": "c2", "again": "of another program"}}))
    clips(base / "cells/c1/clips", 0)
    clips(base / "cells/c2/clips", 0)
    text = written(tmp_path)
    assert "has the highest mean reward" in text[: text.index("<main")]
    assert text.index("Table II") < text.index("<audio")
    assert text.count("<audio") == 2
    assert ("Rewards, each against a" in text) != nested
    assert ("href='tables/index.html'" in text) == nested
    assert Frames(text).loose == 0
    assert "<details><summary><h2>Steps" in text


def test_a_folder_without_results_has_none_to_show(tmp_path):
    assert view_of(Folder(str(tmp_path))) is None
    assert "<details open><summary><h2>Steps" in written(tmp_path)
