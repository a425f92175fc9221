"""What a shell completes, by argcomplete: commands, acts, flags and their values from the parser, presets after
`--config`, and after `--set` the fields of that command's config.

The shell runs ttmray at each key. That takes 0.2 s, since commands are tables and import nothing; fields of a config
take half a second more.
"""

import argparse
from collections.abc import Iterator
from typing import Any, Literal

from ttmray.errors import EXIT_OK
from ttmray.presets import presets_of


def completion(shell: Literal["bash", "zsh", "fish"]) -> int:
    """Print the lines by which a shell asks ttmray; returns the exit code."""
    import argcomplete

    print(argcomplete.shellcode(["ttmray"], shell=shell))
    return EXIT_OK


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Answer, and end the process, where it is a shell that asks what could follow."""
    import argcomplete

    argcomplete.autocomplete(parser)


def config_names(command: str, prefix: str) -> Iterator[str]:
    """What `--config` takes: presets of the command, and files."""
    from argcomplete.completers import FilesCompleter

    yield from presets_of(command)
    yield from FilesCompleter(("yaml", "yml"))(prefix)


def field_names(config: str, prefix: str) -> Iterator[str]:
    """`a.b=` of every field with a value, of the config `module:class`; of lists, fields of the first."""
    from ttmray.config_docs import field_lines
    from ttmray.plugins import named

    if "=" not in prefix:
        for line, _ in field_lines(named(config).model_json_schema()):
            name, _, kind = line.partition(": ")
            if kind:  # a section has none
                yield f"{name.replace('.N.', '.0.')}="


def completer(of: Any, subject: str) -> Any:
    """A function of this module as argcomplete calls it: by keywords, of which the prefix alone counts."""

    def complete(*, prefix: str = "", **_: Any) -> list[str]:
        return [one for one in of(subject, prefix) if one.startswith(prefix)]

    return complete
