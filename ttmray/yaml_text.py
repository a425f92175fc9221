"""YAML as configs need it: no key twice, and every anchor, alias and merge gives a value of its own.

YAML lets an alias stand for the very object of its anchor, so that a change of one section would change all that were
copied from it; and a key that is there twice silently has its last value. Here the first cannot happen and the second
is refused. The key `null` is that word, as any other: configs have a field of that name.
"""

from typing import Any

import yaml

MAX_VALUES = 100_000
"""Values of a text with its aliases written out; a few lines can stand for billions."""
_CLOSED = ("[", "{", '"', "'")
"""What ends where it is closed."""
_MERGE, _NULL, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "null", "str"))


def read_yaml(text: str | bytes) -> Any:
    """The value of one YAML document of plain types; None for an empty one.

    Raises:
        yaml.YAMLError: with line and column: not valid, a key twice, an alias inside of its own anchor, more than
            `MAX_VALUES` values.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check(loader, root, {}, set())
            return _apart(loader.construct_document(root))
        finally:
            loader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError("values are nested too deeply") from error
    except ValueError as error:  # a number or date that there cannot be, such as 2026-99-99
        raise yaml.YAMLError(str(error)) from error


def read_override(text: str) -> Any:
    """The value of `--set a.b=text`: YAML of one line, in which `#` begins no comment.

    Numbers, `true`, `null`, quoted text, `[1, 2]` and `{a: 1}` are what YAML makes of them. All else is the text as it
    is: `/d/My Songs #1`, `#1`, `a: b`.

    Raises:
        yaml.YAMLError: as `read_yaml`, and where text follows on quotes or brackets.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("values are nested too deeply") from error
    except yaml.YAMLError:
        if text.lstrip()[:1] in _CLOSED:
            raise
        return text.strip()
    if node is None:
        return text.strip()
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    bracketed = isinstance(node, yaml.CollectionNode) and node.flow_style
    if node.end_mark.index == len(text.rstrip()) and (bracketed or isinstance(node, yaml.ScalarNode)):
        return read_yaml(text)
    if quoted or bracketed:
        raise yaml.YAMLError(f"{text[node.end_mark.index :].strip()!r} stands behind the value")
    return text.strip()


def _check(loader: yaml.SafeLoader, node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Number of values below a node, aliases written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in open_nodes:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside of its own anchor", node.start_mark)
    open_nodes.add(id(node))
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        node.value = [(_named(key), item) for key, item in node.value]
        _check_keys(loader, node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1 + sum(_check(loader, part, sizes, open_nodes) for part in parts)
    if size > MAX_VALUES:
        problem = f"with its aliases written out this has more than {MAX_VALUES:,} values"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    open_nodes.remove(id(node))
    sizes[id(node)] = size
    return size


def _named(key: yaml.Node) -> yaml.Node:
    """A key that is a name: `null` is a field of configs (`model: {null: learned}`), and nothing is no key."""
    if key.tag == _NULL and isinstance(key, yaml.ScalarNode) and key.value:
        return yaml.ScalarNode(_TEXT, key.value, key.start_mark, key.end_mark)
    return key


def _check_keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> None:
    """No key twice; one that a merge (`<<`) brings may be there again, and then counts."""
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):  # keys that cannot be are refused later on
            continue
        name, line = loader.construct_object(key), key.start_mark.line + 1
        if name in lines:
            problem = f"the key {key.value!r} is there twice, first in line {lines[name]}"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        lines[name] = line


def _apart(value: Any) -> Any:
    """A copy in which nothing is shared."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_apart(item) for item in value)
    return set(value) if isinstance(value, set) else value
