"""`ttmray completion SHELL`: commands, their acts and flags, values of flags and presets, from the parser itself.

The script is plain text without calls of ttmray, which would take a second per key.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ttmray.errors import EXIT_OK
from ttmray.presets import presets

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: Shell) -> int:
    """Print the script for a shell; returns the exit code."""
    from ttmray.cli import _parser

    words = dict(_words(_parser(), ()))
    print(_fish(words) if shell == "fish" else _bash(words, zsh=shell == "zsh"), end="")
    return EXIT_OK


def _words(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(`corpus ls`, what may follow) of a parser and of all below it; (`corpus ls --status`, its values) of flags."""
    own: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            own += list(action.choices)
            for name, inner in action.choices.items():
                yield from _words(inner, (*path, name))
        elif action.option_strings:
            own += action.option_strings
            values = list(presets()) if "--config" in action.option_strings else list(action.choices or ())
            if values:
                yield " ".join((*path, action.option_strings[-1])), [str(value) for value in values]
        else:
            own += [str(value) for value in action.choices or ()]
    yield " ".join(path), own


def _bash(words: Mapping[str, Any], zsh: bool) -> str:
    """One `case` over the command, its act and the word before; files complete where there is nothing else."""
    cases = "\n".join(f'    "{key}") words="{" ".join(values)}" ;;' for key, values in sorted(words.items()))
    start = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{start}_ttmray_words() {{
  words=""
  case "$1" in
{cases}
  esac
}}
_ttmray() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words path="" try
  [ "$COMP_CWORD" -gt 1 ] && path="${{COMP_WORDS[1]}}"
  if [ "$COMP_CWORD" -gt 2 ]; then
    _ttmray_words "$path ${{COMP_WORDS[2]}}"
    [ -n "$words" ] && path="$path ${{COMP_WORDS[2]}}"
  fi
  _ttmray_words "$path $before"
  [ -n "$words" ] || _ttmray_words "$path"
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ttmray ttmray
"""


def _fish(words: Mapping[str, Any]) -> str:
    lines = ["complete -c ttmray -f -n __fish_use_subcommand -a '" + " ".join(words[""]) + "'"]
    for key, values in sorted(words.items()):
        seen = " ".join(f"; and __fish_seen_subcommand_from {part}" for part in key.split() if not part.startswith("-"))
        if not seen:
            continue
        condition = seen.removeprefix("; and ")
        last = key.split()[-1]
        if last.startswith("--"):
            lines.append(f"complete -c ttmray -n '{condition}' -l {last[2:]} -x -a '{' '.join(values)}'")
        else:
            lines.append(f"complete -c ttmray -n '{condition}' -a '{' '.join(values)}'")
    return "\n".join(lines) + "\n"
