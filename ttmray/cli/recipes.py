"""Many jobs from one config."""

from ttmray.cli.command import Command, argument, switch
from ttmray.cli.corpus import count

STEPS = (
    argument("--from", dest="first", metavar="STEP", help="start here; earlier steps are taken as they are"),
    argument("--until", dest="last", metavar="STEP", help="end with this step"),
    switch("--plan-only", "check all, print the steps and what is done"),
)
BUNDLE = argument("--bundle", required=True, help="set of models, or a bundle's folder")
OUT = argument("--out", metavar="DIR", help="also write the result to this folder")
GROUPS = {"synth": "the small world, whose true quality is known: check, floors"}
COMMANDS = (
    Command(
        "reproduce",
        "the whole chain of the paper, songs to an evaluated model, from one config (jobs/reproduce.py)",
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
    Command(
        "compare-methods",
        "tune by one method or by several at equal cost, and judge them (jobs/compare_methods.py)",
        "ttmray.recipes.compare_methods:compare_methods",
        STEPS,
        config="ttmray.recipes.compare_methods:CompareMethodsConfig",
    ),
    Command(
        "findings",
        "which findings of the paper hold, from runs of the chain with other seeds (docs/miniature.md)",
        "ttmray.recipes.findings:findings",
        (
            argument("runs", nargs="+", metavar="RUN", help="run folder of the chain with its tables, one per seed"),
            argument("--out", metavar="DIR", help="also write findings.md, findings.json and per_prompt.csv"),
        ),
    ),
    Command(
        "train-micro",
        "a small bundle from nothing, on synthetic songs (jobs/train_micro.py)",
        "ttmray.recipes.micro:train_micro",
        STEPS,
        config="ttmray.recipes.micro:MicroConfig",
    ),
    Command(
        "push",
        "a model, ranker, bundle or corpus to the Hugging Face Hub, with its card (docs/hub.md)",
        "ttmray.recipes.push:push",
        (
            argument("path", metavar="RUN_OR_FILE", help="finished run, bundle's folder, or weights; local or s3://"),
            argument("repo", metavar="ORG/NAME", help="repository, which is made where it is not there"),
            argument("--weights", metavar="KIND", help="of a training run: raw (default) or ema:SIGMA"),
            argument("--license", metavar="ID", help="identifier of the hub; free ones are refused for what is not"),
            argument("--bundle", help="set of models of a file that does not say it"),
            argument("--name", help="title of the card (default: that of the repository)"),
            argument("--evaluation", metavar="OUT", help="of a model: output of `ttmray evaluate` with its clips"),
            argument("--system", metavar="NAME", help="of a model: its name in that evaluation"),
            switch("--public", "everybody may see a repository that is made now (default: private)"),
            switch("--new-card", "replace a README.md that is there"),
        ),
        keeps=True,
    ),
    Command(
        "demo",
        "songs of known quality, scored; clips from prompts; a page (jobs/demo.py)",
        "ttmray.recipes.demo:demo",
        config="ttmray.recipes.demo:DemoConfig",
    ),
    Command(
        "synth check",
        "how well a bundle's reward ranks true quality, by kind of fault",
        "ttmray.recipes.ruler:check_bundle",
        (
            BUNDLE,
            argument("--pieces", type=count, metavar="N", help="songs per kind of fault (default 24)"),
            argument("--seed", type=count, help="of the songs (default 99)"),
            argument("--fault", action="append", dest="kinds", help="only this kind; repeatable"),
            argument("--device", help="auto (default), cpu or cuda"),
            OUT,
        ),
    ),
    Command(
        "synth floors",
        "how well each part of a bundle does on songs that nobody has trained on",
        "ttmray.recipes.floors:check_floors",
        (
            BUNDLE,
            argument("--seed", type=count, help="of the songs (default 4242)"),
            argument("--part", action="append", dest="parts", help="only this part; repeatable"),
            OUT,
        ),
    ),
)
