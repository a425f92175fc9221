"""What a command is: a line of a table. Functions and configs are named, and imported when the command runs."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttmray.cli.completion import completer, config_names, field_names
from ttmray.cli.examples import EXAMPLES
from ttmray.errors import UserError
from ttmray.plugins import named
from ttmray.presets import presets_of


@dataclass(frozen=True)
class Flag:
    """One argument of a command, in argparse's words.

    Attributes:
        names: as typed, `("-n",)`, `("--out",)`, or the name of a positional one.
        options: of `ArgumentParser.add_argument`. Without a default, a flag that is not typed is not passed on.
        in_config: it sets a field of the config; else it is an argument of the function.
        stands_for: the field of the config that an argument of the function takes the place of.
    """

    names: tuple[str, ...]
    options: Mapping[str, Any]
    in_config: bool = False
    stands_for: str = ""

    @property
    def dest(self) -> str:
        """The field or parameter that it sets."""
        return str(self.options.get("dest", self.names[-1].lstrip("-").replace("-", "_")))


def argument(*names: str, stands_for: str = "", **options: Any) -> Flag:
    """A flag for a parameter of the command's function."""
    return Flag(names, options, stands_for=stands_for)


def setting(*names: str, **options: Any) -> Flag:
    """A flag for a field of the command's config."""
    return Flag(names, options, in_config=True)


def switch(name: str, help: str, **options: Any) -> Flag:
    """A parameter that is true where the flag is typed."""
    return argument(name, action="store_true", help=help, **options)


PLAN = switch("--plan-only", "say what would be done, how long it takes here and where it is written, and stop")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as typed, `train-sft` or `corpus stats`.
        help: one line.
        run: `module:function`, which takes the arguments by name and returns the exit code.
        flags: its arguments, beside `--config` and `--set` where there is a config.
        config: `module:class`; empty: none.
        config_as: the parameter of the function that takes the config.
        exclusive: fields of which one is to be set: a flag for one takes what a file says of the others out.
        fixed: further arguments of the function.
        keeps: it commits parts on the way, though it has no config.
    """

    name: str
    help: str
    run: str
    flags: tuple[Flag, ...] = ()
    config: str = ""
    config_as: str = "config"
    exclusive: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keeps: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether the same command goes on where it was interrupted."""
        return self.keeps or bool(self.config)


PATH_RULE = "Relative paths, also those in files, are relative to the folder in which the command runs."


def explained(command: Command) -> tuple[str, str]:
    """A sentence about a command, and what stands at the end of its help: an example, and where its fields are."""
    lines = ["example:", f"  ttmray {command.name} {EXAMPLES[command.name]}".rstrip()]
    if command.config:
        presets = ", ".join(presets_of(command.name))
        lines += ["", f"fields of --config and --set: ttmray config {shlex.quote(command.name)}"]
        lines += [f"presets: {presets}"] if presets else []
        lines += [PATH_RULE]
    return f"{command.help[0].upper()}{command.help[1:]}.".replace("%", "%%"), "\n".join(lines).replace("%", "%%")


def add_parsers(commands: Any, table: Sequence[Command], groups: Mapping[str, str]) -> None:
    """A parser for each command; those of two words go below one for the first, whose help `groups` has."""
    acts: dict[str, Any] = {}
    for command in table:
        group, _, act = command.name.rpartition(" ")
        if group and group not in acts:
            acts[group] = commands.add_parser(
                group,
                help=groups[group],
                description=f"{groups[group][0].upper()}{groups[group][1:]}.",
                epilog=f"example:\n  ttmray {command.name} {EXAMPLES[command.name]}\n\n"
                f"ttmray {group} ACT --help has an example of each.",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            ).add_subparsers(dest="act", required=True, metavar="ACT")
        description, end = explained(command)
        parser = (acts[group] if group else commands).add_parser(
            act,
            help=command.help,
            description=description,
            epilog=end,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flag in command.flags:
            also = ("--output",) if flag.names == ("--out",) else ()  # the other way round argparse does it
            parser.add_argument(*flag.names, *also, **{"default": argparse.SUPPRESS, **flag.options})
        if command.config:
            presets = sorted(presets_of(command.name), key=lambda name: not name.startswith("debug/"))
            config = parser.add_argument(
                "--config",
                metavar="FILE",
                help="YAML file" + (f", or a preset such as {presets[0]}" if presets else "") + "; what it leaves out "
                "has its default, see below",
            )
            sets = parser.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="A.B=VALUE",
                dest="sets",
                help="override one field; repeatable; not beside a flag of that field",
            )
            config.completer = completer(config_names, command.name)
            sets.completer = completer(field_names, command.config)
        parser.set_defaults(table_row=command)


def _refuse_twice(command: Command, values: Sequence[tuple[Flag, Any]], sets: Sequence[str]) -> None:
    """See that no field comes by a flag and by `--set`, nor one field of `exclusive` by each.

    Raises:
        UserError: one does, with other values: which was meant, nobody knows.
    """
    for flag, value in values:
        field = flag.dest if flag.in_config else flag.stands_for
        others = set(command.exclusive) - {field} if field in command.exclusive else set()
        for assignment in sets if field else ():
            path, _, text = assignment.partition("=")
            path = path.strip()
            again = (path == field or path.startswith(f"{field}.")) and text != str(value)
            if again or (path in others and text not in ("null", "[]")):
                flags = [name for name in flag.names if name.startswith("--")]
                raise UserError(
                    f"{(flags or [flag.dest])[0]} and --set {assignment} give the same thing twice.",
                    "Leave one of them out.",
                )


def execute(command: Command, typed: Mapping[str, Any]) -> int:
    """Run a command with what was typed; returns the exit code.

    Raises:
        UserError: for everything that the user can mend.
    """
    values = [(flag, typed[flag.dest]) for flag in command.flags if flag.dest in typed]
    arguments = {flag.dest: value for flag, value in values if not flag.in_config}
    if command.config:
        from ttmray.config import load_config

        _refuse_twice(command, values, typed["sets"])
        kind, fields = named(command.config), {flag.dest: value for flag, value in values if flag.in_config}
        if fields.keys() & set(command.exclusive):
            fields = {name: kind.model_fields[name].default for name in command.exclusive} | fields
        arguments[command.config_as] = load_config(kind, typed["config"], typed["sets"], fields)
    return int(named(command.run)(**arguments, **command.fixed))
