"""`ttmray <command>`. Jobs in `jobs/` call the same parser, so both take the same arguments and exit codes.

The commands are tables, by family; a value goes from the command line into a config in one place, `command.execute`.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.text import Text

from ttmray import __version__
from ttmray.cli import challenge, corpus, evaluation, generation, models, recipes, training
from ttmray.cli.command import Command, add_parsers, execute
from ttmray.cli.completion import answer_shell
from ttmray.console import errors
from ttmray.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from ttmray.signals import MESSAGE, PLAIN, Interruption

FAMILIES = (corpus, generation, training, evaluation, models, recipes, challenge)
COMMANDS: tuple[Command, ...] = tuple(command for family in FAMILIES for command in family.COMMANDS)


class _Parser(argparse.ArgumentParser):
    """One that knows what a mistyped command or value may have been meant as."""

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
            message = f"{message}; did you mean {' or '.join(near)}?" if near else message
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ttmray",
        description="From a folder or bucket of songs to a preference-tuned text-to-music model.",
        epilog="to begin:\n"
        "  ttmray demo --set output=runs/demo\n"
        '  ttmray generate --prompt "a calm piano piece" --output runs/my-clips\n\n'
        "ttmray COMMAND --help has an example of each, ttmray config COMMAND what can be set for it.\n"
        "Exit codes: 0 done, 2 bad input or config, 3 done but too many failures, 130 interrupted (state kept).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_parsers(commands, COMMANDS, {name: help for family in FAMILIES for name, help in family.GROUPS.items()})
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into messages and exit codes."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        answer_shell(parser)
    typed = vars(parser.parse_args(arguments))
    interruption = Interruption(MESSAGE if typed["table_row"].goes_on else PLAIN)
    try:
        interruption.install()  # SIGTERM, too: `ray job stop` and schedulers send it
        return execute(typed["table_row"], typed)
    except UserError as error:
        errors.print(Text.assemble(("error:", "red"), " ", error.message))
        if error.hint:
            errors.print(f"  {error.hint}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        if interruption.say():
            errors.print(interruption.message)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `ttmray corpus ls RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        interruption.remove()
