"""Many jobs from one config."""

from ttmray.cli.command import Command, argument, switch

STEPS = (
    argument("--from", dest="first", metavar="STEP", help="start here; earlier steps are taken as they are"),
    argument("--until", dest="last", metavar="STEP", help="end with this step"),
    switch("--plan-only", "check all, print the steps and what is done"),
)
GROUPS: dict[str, str] = {}
COMMANDS = (
    Command(
        "reproduce",
        "the whole chain from one config (jobs/reproduce.py)",
        "ttmray.recipes.reproduce:reproduce",
        STEPS,
        config="ttmray.recipes.reproduce:ReproduceConfig",
    ),
    Command(
        "ablate",
        "tables and figures of the paper from one config (jobs/ablate.py)",
        "ttmray.recipes.ablations:ablate",
        STEPS,
        config="ttmray.recipes.ablations:AblateConfig",
    ),
)
