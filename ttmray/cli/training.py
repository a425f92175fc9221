"""Stages 1 to 3, the ranker, the parts of a bundle, and what training leaves behind."""

from ttmray.cli.command import PLAN, Command, argument, switch

RUN_OPTIONS = (
    switch("--plan-only", "print every derived number and stop"),
    switch("--force", "go on although the config differs from the run's"),
)
GROUPS = {"checkpoint": "training checkpoints and weights: inspect, export"}
COMMANDS = (
    Command(
        "train-sft",
        "Stage 1: train the score-conditioned backbone (jobs/train_sft.py)",
        "ttmray.training.sft:train_sft",
        RUN_OPTIONS,
        config="ttmray.training.config:TrainConfig",
    ),
    Command(
        "train-ranker",
        "votes in, a preference ranker out (jobs/train_ranker.py)",
        "ttmray.ranker.job:train_ranker",
        (PLAN,),
        config="ttmray.ranker.job:RankerConfig",
    ),
    Command(
        "expert-iteration",
        "Stage 2: sample, filter, tune (jobs/expert_iteration.py)",
        "ttmray.training.expert_iteration:expert_iteration",
        RUN_OPTIONS,
        config="ttmray.training.expert_iteration:ExpertIterationConfig",
    ),
    Command(
        "train-crpo",
        "Stage 3: preference tuning on pairs (jobs/train_crpo.py)",
        "ttmray.training.crpo:train_crpo",
        RUN_OPTIONS,
        config="ttmray.training.crpo:CrpoConfig",
    ),
    Command(
        "train-grpo",
        "online preference tuning: sample, score, policy gradient (jobs/train_grpo.py)",
        "ttmray.training.grpo:train_grpo",
        RUN_OPTIONS,
        config="ttmray.training.grpo:GrpoConfig",
    ),
    Command(
        "checkpoint inspect",
        "what a checkpoint or weights file is, and whether it is whole",
        "ttmray.training.export:show",
        (
            argument(
                "path", metavar="PATH", help="run or checkpoint folder, .safetensors, .pt or .pth; local or s3://"
            ),
            switch("--json", "one JSON object", dest="as_json"),
        ),
    ),
    Command(
        "checkpoint export",
        "inference weights as one safetensors file with its config",
        "ttmray.training.export:export",
        (
            argument("path", metavar="PATH", help="run, checkpoints or step folder; local or s3://"),
            argument("--out", required=True, metavar="FILE", help="new .safetensors file"),
            argument("--weights", metavar="KIND", help="raw (default) or ema:SIGMA, such as ema:0.05"),
        ),
    ),
    Command(
        "checkpoint steer",
        "how far a score moves what weights make, in their own and other forwards",
        "ttmray.generation.steering:show_steering",
        (
            argument("path", metavar="FILE", help="weights with a score head"),
            argument("--heads", nargs="+", choices=("v1", "v2", "v4"), default=["v2"], help="forwards (default v2)"),
            argument(
                "--own",
                choices=("v1", "v2", "v4"),
                default=None,
                help="head of the training, if the file does not name it",
            ),
            argument(
                "--texts",
                nargs="+",
                metavar="TEXT",
                default=["a calm piano piece", "a fast drum loop"],
                help="prompts of the clips that are compared (default: two)",
            ),
            argument("--bundle", default="micro", help="set of models (default micro)"),
            argument(
                "--no-reward",
                action="store_false",
                default=True,
                dest="reward",
                help="latents alone: no decoders, no reward model",
            ),
        ),
    ),
)
