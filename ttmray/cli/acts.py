"""Commands that are a little more than one call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding

if TYPE_CHECKING:
    from ttmray.generation.config import GenerateConfig


def generate(
    config: "GenerateConfig",
    *,
    score_from: str | None = None,
    retry_failed: bool = False,
    zip_to: str | None = None,
    overwrite: bool = False,
    plan_only: bool = False,
) -> int:
    """`ttmray generate`, at the score that was chosen for the checkpoint where `score_from` names that run.

    Raises:
        UserError: as `generation.generate.generate`, or nothing was chosen there for this checkpoint.
    """
    from ttmray.generation.generate import generate

    if score_from is not None:
        from ttmray.generation.choose_score import chosen_score

        sampler = config.sampler.model_copy(update={"score": chosen_score(score_from, config.checkpoint)})
        config = config.model_copy(update={"sampler": sampler})
    return generate(config, retry_failed=retry_failed, zip_to=zip_to, overwrite=overwrite, plan_only=plan_only)


def config(name: str | None = None, *, docs: bool = False, schema: bool = False) -> int:
    """`ttmray config`: what can be set for a command, or its JSON schema for editors; of a preset the file itself.

    Without a name: the commands that have a config, each with its presets.

    Raises:
        UserError: there is no such command or preset, or it has no config.
    """
    import json

    from ttmray.cli import COMMANDS
    from ttmray.cli.command import PATH_RULE
    from ttmray.config_docs import field_lines
    from ttmray.console import console
    from ttmray.errors import EXIT_OK, UserError
    from ttmray.plugins import named
    from ttmray.presets import command_of, presets, presets_of

    kinds = {command.name: command.config for command in COMMANDS if command.config}
    if name is None:
        for command in kinds:
            console.print(f"{command:<18} {', '.join(presets_of(command))}".rstrip())
        console.print("ttmray config NAME: the fields of a command, or the file of a preset.")
        return EXIT_OK
    files = presets()
    if name in files and not docs and not schema:
        console.print(files[name].read_text("utf-8"), end="")
        return EXIT_OK
    command = command_of(name) if name in files else name
    if command not in kinds:
        raise UserError(
            f"{name!r} is no command with a config, and no preset.",
            f"Commands are: {', '.join(kinds)}. Presets are: {', '.join(files)}.",
        )
    kind = named(kinds[command])
    full = kind.model_json_schema()
    if schema:
        print(json.dumps(full, indent=1))
        return EXIT_OK
    console.print(f"ttmray {command}: {kind.__name__} of {kind.__module__.replace('.', '/')}.py. {PATH_RULE}")
    for line, description in field_lines(full):
        console.print(line, style="bold")
        if description:
            console.print(Padding(description, (0, 0, 0, 4), expand=False), soft_wrap=False)
    console.print(f"Presets: {', '.join(presets_of(command)) or 'none'}.")
    return EXIT_OK


def report(folder: str, output: str | None = None, audio: str = "ogg") -> int:
    """`ttmray report`: the page of an evaluation, or of a training run.

    Raises:
        UserError: as `evaluation.report.report` and `recipes.result_page.run_page`.
    """
    from ttmray.evaluation.results import RESULTS
    from ttmray.storage import Folder

    if Folder.at(folder).exists(RESULTS):
        from ttmray.evaluation.report import report

        return report(folder, output, audio)  # type: ignore[arg-type]
    from ttmray.recipes.result_page import run_page

    return run_page(folder)


def pull(
    names: Sequence[str] = (), *, bundle: str | None = None, everything: bool = False, offline: bool = False
) -> int:
    """`ttmray weights pull`, which fetches nothing where it is `offline`.

    Raises:
        UserError: unknown names, or weights that are not there or damaged.
    """
    from ttmray.models import weights_cli
    from ttmray.models.weights import open_store

    return weights_cli.pull(names, bundle=bundle, everything=everything, store=open_store(offline=offline))
