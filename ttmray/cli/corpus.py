"""Songs in, a scored corpus out, and looks into it."""

import argparse

from ttmray.cli.command import PLAN, Command, argument, setting, switch


def count(text: str) -> int:
    """A number of 0 or more.

    Raises:
        argparse.ArgumentTypeError, ValueError: it is none.
    """
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


RUN = argument("folder", metavar="RUN", help="run folder or s3:// prefix")
JOB, CONFIG = "ttmray.corpus.job:score_corpus", "ttmray.corpus.config:CorpusConfig"
LOOK = "ttmray.corpus.look"
GROUPS = {"corpus": "look into a corpus: stats, verify, ls, sample; repair, rescore or upgrade it"}
COMMANDS = (
    Command(
        "score-corpus",
        "songs in, a scored WebDataset corpus out (jobs/score_corpus.py)",
        JOB,
        (
            switch("--plan-only", "print and save the plan with every derived number"),
            setting("--max-failures", metavar="N", help="exit 3 when more rows failed: a count or a share such as 1%%"),
            switch("--retry-failed", "make units with failed rows once more"),
        ),
        CONFIG,
    ),
    Command(
        "plan",
        "what score-corpus would do, with every derived number; nothing is made (score-corpus --plan-only)",
        JOB,
        config=CONFIG,
        fixed={"plan_only": True},
    ),
    Command("corpus stats", "counts, reasons, rewards and latent statistics", f"{LOOK}:stats", (RUN,)),
    Command("corpus verify", "recompute hashes and counts, open every tar and latent", f"{LOOK}:verify", (RUN,)),
    Command(
        "corpus repair",
        "verify, and make again what is damaged or missing (corpora and pools)",
        "ttmray.verify:repair",
        (RUN,),
        keeps=True,
    ),
    Command("corpus upgrade", "add to the index of an older run what training reads by now", f"{LOOK}:upgrade", (RUN,)),
    Command(
        "corpus ls",
        "rows of the index",
        f"{LOOK}:ls",
        (
            RUN,
            argument("--status", choices=("ok", "rejected", "failed"), default=None, help="only rows of this status"),
            argument("--limit", type=count, default=50, metavar="N", help="at most N rows (default 50; 0: all)"),
            argument("--columns", metavar="A,B", help="these columns, such as key,ranker/reward_score"),
            switch("--json", "one JSON object per line, all columns", default=False),
        ),
    ),
    Command(
        "corpus sample",
        "a page with some random clips to listen to, beside captions and scores",
        f"{LOOK}:sample",
        (
            RUN,
            argument("-n", type=count, default=8, metavar="N", help="number of clips (default 8)"),
            argument("--seed", type=count, default=0, help="another one draws other clips (default 0)"),
            argument("--out", required=True, metavar="DIR", help="folder for the page and its audio"),
        ),
    ),
    Command(
        "corpus rescore",
        "rewards of all clips by another head, from the stored embeddings",
        "ttmray.corpus.rescore:rescore",
        (
            setting("corpus", metavar="RUN", help="run folder of a finished corpus or pool, local or s3://"),
            setting("--head", required=True, metavar="HEAD", help="weights, or run folder of train-ranker"),
            setting("--name", required=True, help="of the table: its columns are NAME/reward_score and so on"),
            setting("--text", choices=("empty", "caption"), help="what the head sees (default: as the corpus)"),
            PLAN,
        ),
        config="ttmray.corpus.rescore:RescoreConfig",
    ),
    Command("status", "how far a run of any kind or a chain is, and why it stopped", "ttmray.status:status", (RUN,)),
    Command("verify", "is a run of any kind what was written: hashes of all its files", "ttmray.verify:verify", (RUN,)),
)
