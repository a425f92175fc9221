"""The challenge kit (docs/attm.md)."""

from ttmray.cli.command import PLAN, Command, argument, setting
from ttmray.cli.corpus import count

KIT = "ttmray.recipes.attm"
PROMPTS = argument("--prompts", required=True, metavar="FILE", help="prompts with their ids")
GROUPS = {"attm": "the ICME 2026 text-to-music challenge: split, import, evaluate, submit"}
COMMANDS = (
    Command(
        "attm split",
        "the baseline's split of the challenge data: TSV files and a table of splits",
        f"{KIT}:split",
        (
            argument("captions", metavar="CAPTIONS", help="jamendo_qwen.json, or another table of captions"),
            argument("--audio", required=True, metavar="DIR", help="folder with 85/1085785_instrumental.mp3"),
            argument("--out", required=True, metavar="DIR", help="folder of the tables"),
            argument("--stem", metavar="END", help="end of the names (default _instrumental)"),
            argument("--validation", type=count, metavar="N", help="songs for validation (default 100)"),
            argument("--test", type=count, metavar="N", help="songs for test (default 100)"),
        ),
    ),
    Command(
        "attm import",
        "latents of the public trainer (.npz files and their TSV) as a corpus",
        "ttmray.corpus.npz:import_npz",
        (
            argument("train", metavar="NPZ_DIR", help="folder of 0.npz, 1.npz, ...; its table lies beside it"),
            argument("--validation", metavar="NPZ_DIR", help="the same of the validation split"),
            argument("--test", metavar="NPZ_DIR", help="the same of the test split"),
            argument("--out", required=True, metavar="RUN", help="run folder or s3:// prefix"),
            argument("--bundle", default="public-16k", help="whose VAE and encoders made them (default public-16k)"),
        ),
    ),
    Command(
        "attm evaluate",
        "FAD and CLAP score as the organisers compute them, CCS by a judge, published ones beside them",
        "ttmray.recipes.attm_metrics:evaluate",
        (
            setting("folders", nargs="*", metavar="DIR", help="flat folders of clips, or generation runs; NAME=DIR"),
            setting("--reference", metavar="DIR", help="flat folder of audio, or reference.safetensors"),
            setting("--prompts", metavar="FILE", help="prompts with their ids"),
            setting("--out", metavar="DIR", dest="output", help="folder of attm.csv, attm.json and the reference"),
            setting("--bundle", help="set of models (default paper, whose CLAP is the official one)"),
            setting("--device", help="auto (default), cpu or cuda"),
            setting("--batch", type=int, metavar="N", help="windows per forward on a GPU (default 16)"),
            PLAN,
        ),
        config="ttmray.recipes.attm_metrics:AttmConfig",
    ),
    Command(
        "attm submit",
        "a zip of the clips, after checks of names, length, rate, silence and size",
        f"{KIT}:submit",
        (
            argument("folder", metavar="DIR", help="flat folder of clips, or a generation run"),
            PROMPTS,
            argument("--out", required=True, metavar="ZIP", help="new archive"),
            argument("--checkpoint", metavar="FILE", help="weights whose parameters are counted"),
            argument("--rate", type=count, metavar="HZ", help="required sample rate (default: one for all)"),
            argument("--seconds", type=float, metavar="S", help="required length (default 10)"),
            argument("--track", choices=("efficiency", "performance"), help="efficiency: 500 M parameters (default)"),
        ),
    ),
)
