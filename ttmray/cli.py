"""`ttmray <command>`. Jobs in `jobs/` call the same parser, so both take the same arguments and exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ttmray import __version__
from ttmray.console import errors
from ttmray.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ttmray",
        description="From a folder or bucket of songs to a preference-tuned text-to-music model.",
        epilog="Exit codes: 0 done, 2 bad input or config, 3 done but too many failures, 130 interrupted (state kept).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    job = commands.add_parser("score-corpus", help="songs in, a scored WebDataset corpus out (jobs/score_corpus.py)")
    _add_config(job)
    job.add_argument("--plan-only", action="store_true", help="print and save the plan with every derived number")
    job.add_argument("--max-failures", metavar="N", help="exit 3 when more rows failed: a count or a share such as 1%%")
    job.add_argument("--retry-failed", action="store_true", help="make units with failed rows once more")
    job.set_defaults(run=_score_corpus)

    plan = commands.add_parser("plan", help="the same as score-corpus --plan-only")
    _add_config(plan)
    plan.set_defaults(run=_score_corpus, plan_only=True, max_failures=None, retry_failed=False)

    corpus = commands.add_parser("corpus", help="look into a corpus: stats, verify, ls, sample")
    looks = corpus.add_subparsers(dest="look", required=True, metavar="LOOK")
    stats = looks.add_parser("stats", help="counts, reasons, rewards and latent statistics")
    verify = looks.add_parser("verify", help="recompute hashes and counts, open every tar and latent")
    ls = looks.add_parser("ls", help="rows of the index")
    ls.add_argument("--status", choices=("ok", "rejected", "failed"), help="only rows of this status")
    ls.add_argument("--limit", type=_count, default=50, metavar="N", help="at most N rows (default 50; 0: all)")
    ls.add_argument("--json", action="store_true", help="one JSON object per line, all columns")
    sample = looks.add_parser("sample", help="a page with some random clips to listen to, beside captions and scores")
    sample.add_argument("-n", type=_count, default=8, metavar="N", help="number of clips (default 8)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", required=True, metavar="DIR", help="folder for the page and its audio")
    for look, run in ((stats, "stats"), (verify, "verify"), (ls, "ls"), (sample, "sample")):
        look.add_argument("folder", metavar="RUN", help="run folder or s3:// prefix")
        look.set_defaults(run=_look(run))

    status = commands.add_parser("status", help="how far a run is, without Ray")
    status.add_argument("folder", metavar="RUN", help="run folder or s3:// prefix")
    status.set_defaults(run=_look("status"))

    score = commands.add_parser("score", help="reward, CLAP score, loudness and true peak of audio files")
    score.add_argument("files", nargs="+", metavar="FILE", help="audio files: local paths or s3:// addresses")
    score.add_argument("--caption", default="", metavar="TEXT", help="text to compare with (CLAP score)")
    score.add_argument("--bundle", default="debug", help="set of models (default debug)")
    score.add_argument("--reward-text", default="empty", choices=("empty", "caption"), help="what the reward sees")
    score.add_argument("--device", default="auto", help="auto, cpu or cuda")
    score.add_argument("--batch", type=int, default=8, metavar="N", help="clips per model forward on a GPU")
    score.add_argument("--cache", metavar="DIR", help="folder that keeps embeddings, shared by jobs")
    score.add_argument("--json", action="store_true", dest="as_json", help="one JSON object per line")
    score.set_defaults(run=_score)

    weights = commands.add_parser("weights", help="released weights: list, pull, verify, where, convert")
    acts = weights.add_subparsers(dest="act", required=True, metavar="ACT")
    acts.add_parser("list", help="what there is, what is here, and under which licence")
    pull = acts.add_parser("pull", help="fetch, check and keep weights")
    pull.add_argument("names", nargs="*", metavar="NAME", help="entries of `ttmray weights list`")
    pull.add_argument("--bundle", help="all weights of a bundle")
    pull.add_argument("--all", action="store_true", help="every entry")
    pull.add_argument("--offline", action="store_true", help="only check what is here")
    acts.add_parser("verify", help="recompute the hashes of everything that is here")
    acts.add_parser("where", help="where the files of an entry lie").add_argument("name", metavar="NAME")
    convert = acts.add_parser("convert", help="a .pt, .pth or .ckpt of tensors as safetensors")
    convert.add_argument("path", metavar="FILE")
    convert.add_argument("--out", metavar="FILE", help="default: beside the file, with the ending .safetensors")
    weights.set_defaults(run=_weights)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML config (default: the defaults of every field)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="sets",
        help="override one field; repeatable",
    )


def _score_corpus(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.corpus.config import CorpusConfig
    from ttmray.corpus.job import score_corpus
    from ttmray.storage import absolute

    sets = list(arguments.sets)
    if arguments.max_failures is not None:
        sets.append(f"max_failures={arguments.max_failures}")
    config = load_config(CorpusConfig, arguments.config, sets)
    # Ray workers run elsewhere: from here on every path is absolute.
    config = config.model_copy(update={"input": absolute(config.input), "output": absolute(config.output)})
    return score_corpus(config, plan_only=arguments.plan_only, retry_failed=arguments.retry_failed)


def _score(arguments: argparse.Namespace) -> int:
    from ttmray.evaluation.score import score

    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "run", "files")}
    return score(arguments.files, **options)


def _weights(arguments: argparse.Namespace) -> int:
    from ttmray.models import weights_cli
    from ttmray.models.weights import open_store

    if arguments.act == "pull":
        store = open_store(offline=arguments.offline)
        return weights_cli.pull(arguments.names, bundle=arguments.bundle, everything=arguments.all, store=store)
    if arguments.act == "where":
        return weights_cli.where(arguments.name)
    if arguments.act == "convert":
        return weights_cli.convert(arguments.path, arguments.out)
    return weights_cli.list_weights() if arguments.act == "list" else weights_cli.verify()


def _look(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from ttmray.corpus import look

        options: dict[str, Any] = {
            key: value for key, value in vars(arguments).items() if key not in ("command", "look", "run", "folder")
        }
        return int(getattr(look, name)(arguments.folder, **options))

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into messages and exit codes."""
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop` and schedulers send it; same as Ctrl-C
    try:
        return int(parsed.run(parsed))
    except UserError as error:
        errors.print(f"[red]error:[/red] {_plain(error.message)}")
        if error.hint:
            errors.print(f"  {_plain(error.hint)}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        errors.print("interrupted; what was committed is kept, the same command goes on from there")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `ttmray corpus ls RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
