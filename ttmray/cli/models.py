"""Weights and sizes, and what configs hold."""

from ttmray.cli.command import Command, argument, switch

WEIGHTS = "ttmray.models.weights_cli"
GROUPS = {"weights": "released weights: list, pull, verify, where, convert"}
COMMANDS = (
    Command(
        "config",
        "what can be set for a command: fields, types, defaults, descriptions",
        "ttmray.cli.acts:config",
        (
            argument("name", nargs="?", metavar="NAME", help="command, such as train-sft, or preset: debug/stage1"),
            switch("--docs", "of a preset: the fields of its command, not the file"),
            switch("--schema", "the JSON schema, for editors that complete and check YAML"),
        ),
    ),
    Command(
        "completion",
        "a script by which a shell completes commands, flags and presets",
        "ttmray.cli.completion:completion",
        (argument("shell", choices=("bash", "zsh", "fish"), help='bash and zsh: eval "$(ttmray completion bash)"'),),
    ),
    Command(
        "params",
        "parameters per part of a backbone, against the challenge's limit",
        "ttmray.models.backbone_weights:show_params",
        (
            argument(
                "--size", choices=("s_44k", "l_44k", "m_44k", "s_16k", "l_16k"), default="s_44k", help="default s_44k"
            ),
            argument(
                "--head",
                choices=("none", "v1", "v2", "v3", "v4", "v5"),
                default="v2",
                help="how the score enters it (default v2)",
            ),
            argument("--checkpoint", metavar="FILE", dest="path", help="count the weights of this file instead"),
        ),
    ),
    Command("weights list", "what there is, what is here, and under which licence", f"{WEIGHTS}:list_weights"),
    Command(
        "weights pull",
        "fetch, check and keep weights",
        "ttmray.cli.acts:pull",
        (
            argument("names", nargs="*", metavar="NAME", help="entries of `ttmray weights list`"),
            argument("--bundle", help="all weights of a bundle"),
            switch("--all", "every entry", dest="everything"),
            switch("--offline", "only check what is here"),
        ),
        keeps=True,
    ),
    Command("weights verify", "recompute the hashes of what is here; say what is gone", f"{WEIGHTS}:verify"),
    Command(
        "weights where",
        "where the files of an entry lie",
        f"{WEIGHTS}:where",
        (argument("name", metavar="NAME", help="entry of `ttmray weights list`, or bundle"),),
    ),
    Command(
        "weights convert",
        "a .pt, .pth or .ckpt of tensors as safetensors",
        f"{WEIGHTS}:convert",
        (
            argument("path", metavar="FILE", help="weights of anybody; no code in it is run"),
            argument("--out", metavar="FILE", help="default: beside the file, with the ending .safetensors"),
        ),
    ),
)
