"""What configs name in modules of others: each mistake is one message that names the module."""

import pytest

from ttmray.errors import UserError
from ttmray.models.score_heads import check_head
from ttmray.plugins import function_named

MODULES = {
    "broken": "def head(:",
    "raises": "1 / 0",
    "looks_up": "import os\nos.nothing_of_that_name",
    "empty": "",
    "no_function": "head = 3",
}


@pytest.mark.parametrize("module", [*MODULES, "not_there", ".relative", ".", "..a.b", "", "a b"])
def test_a_name_that_cannot_be_imported_is_one_message(module, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match="metrics: ") as caught:
        function_named(f"{module}:head", "metrics")
    assert module in caught.value.message
    with pytest.raises(ValueError, match=r"no head but|no function"):
        check_head(f"{module}:head")
