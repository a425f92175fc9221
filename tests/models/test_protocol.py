"""The reward protocol: every field is in the name, and nonsense is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttmray.errors import UserError
from ttmray.models.protocol import Protocol

protocols = st.builds(
    Protocol,
    crop=st.sampled_from(["center", "random", "windows"]),
    bandlimit_hz=st.sampled_from([None, 8000]),
    int16=st.booleans(),
    text=st.sampled_from(["empty", "caption"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    hashes=st.lists(st.tuples(st.sampled_from(["clap", "mert"]), st.text(max_size=4)), max_size=2).map(tuple),
)


@given(a=protocols, b=protocols)
def test_protocol_names_differ_whenever_a_field_does(a, b):
    same = a == b or (tuple(sorted(a.hashes)) == tuple(sorted(b.hashes)) and _without_hashes(a) == _without_hashes(b))
    assert (a.id() == b.id()) == same


def _without_hashes(protocol: Protocol) -> tuple:
    return protocol.crop, protocol.bandlimit_hz, protocol.int16, protocol.text, protocol.dtype


def test_protocol_names_are_stable_and_readable():
    assert Protocol().id() == "tj-center-full-int16-empty-a5d34f7d"
    assert (
        Protocol(crop="windows", bandlimit_hz=8000, int16=False, text="caption")
        .id()
        .startswith("tj-windows-8k-float-caption-")
    )
    with pytest.raises(UserError, match=r"protocol\.crop"):
        Protocol(crop="centre")
