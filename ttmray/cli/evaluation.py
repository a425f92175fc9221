"""Numbers, tables, pages and cards."""

from ttmray.cli.command import PLAN, Command, argument, setting, switch
from ttmray.cli.corpus import count

BUNDLE_HELP = "set of models (default micro)"
BASELINE_HELP = "compare every other system with this one"
SPLIT = argument("--split", choices=("train", "validation", "test", "all"), help="of a corpus run (default all)")
GROUPS = {"reference": "reference sets of FAD and KAD: build"}
COMMANDS = (
    Command(
        "score",
        "reward, CLAP score, loudness and true peak of audio files",
        "ttmray.evaluation.score:score",
        (
            argument(
                "files",
                nargs="+",
                metavar="FILE",
                help="audio (.wav, .flac, .mp3, .ogg, .opus; with ttmray[av] .m4a, .aac, .wma), folders, or tables "
                "with a column path",
            ),
            argument("--caption", metavar="TEXT", help="text to compare with (CLAP score; default: that of the row)"),
            argument("--bundle", help=BUNDLE_HELP),
            argument("--reward-text", choices=("empty", "caption"), help="what the reward sees (default empty)"),
            argument("--device", help="auto (default), cpu or cuda"),
            argument("--batch", type=count, metavar="N", help="clips per model forward on a GPU (default 8)"),
            argument("--cache", metavar="DIR", help="folder that keeps embeddings, shared by jobs"),
            switch("--json", "one JSON object per line", dest="as_json"),
            switch(
                "--pieces",
                "score longer files in pieces as long as the bundle's clips (micro 5 s, others 10 s), a row each",
            ),
            argument("--csv", metavar="FILE", dest="csv_to", help="write the rows to this .csv"),
        ),
    ),
    Command(
        "evaluate",
        "folders of audio in, metrics and paired tests out",
        "ttmray.evaluation.evaluate:evaluate",
        (
            setting("folders", nargs="*", metavar="DIR", help="systems, local or s3://; NAME=DIR names one"),
            setting("--prompts", metavar="FILE", help="prompts with their ids"),
            setting("--reference", metavar="REF", help="reference set for FAD and KAD: its name or folder"),
            setting("--training", metavar="CORPUS", help="corpus run or reference set that they were trained on"),
            setting("--baseline", metavar="NAME", help=BASELINE_HELP),
            setting("--output", metavar="OUT", help="folder of the results"),
            setting("--bundle", help=BUNDLE_HELP),
            PLAN,
        ),
        config="ttmray.evaluation.config:EvaluateConfig",
        exclusive=("prompts", "texts"),
    ),
    Command(
        "compare",
        "the paired table of evaluations, scored runs or tables of scores",
        "ttmray.evaluation.compare:compare",
        (
            argument("sources", nargs="+", metavar="OUT", help="evaluation or its results, generation run, or table"),
            argument("--format", choices=("table", "markdown", "latex", "csv"), help="default table"),
            argument("--out", metavar="FILE", help="write the table there"),
            argument("--baseline", metavar="NAME", help=BASELINE_HELP),
            argument("--alpha", type=float, help="level of the stars after Holm's correction (default 0.05)"),
        ),
    ),
    Command(
        "reference build",
        "embed a folder of audio or take a corpus run's embeddings, under a name",
        "ttmray.evaluation.reference:build_reference",
        (
            argument("name", metavar="NAME", help="such as sdd-706"),
            argument("source", metavar="SOURCE", help="folder or bucket of audio, or a corpus run"),
            argument("--store", metavar="DIR", help="folder of reference sets (~/.cache/ttmray/references)"),
            argument("--bundle", help=BUNDLE_HELP),
            argument(
                "--stem",
                choices=("mix", "instrumental"),
                help="instrumental: without vocals (default of a corpus run); mix: as it is (default of a folder)",
            ),
            argument("--keys", metavar="FILE", help="only these clips of a corpus run, as `ttmray subset` writes them"),
            SPLIT,
            argument("--max-failures", type=count, metavar="N", help="tracks that may fail (default 0)"),
            PLAN,
        ),
        config="ttmray.evaluation.reference:ReferenceConfig",
        config_as="runtime",
    ),
    Command(
        "subset",
        "some clips or captions, seeded: keys.txt and prompts.csv",
        "ttmray.evaluation.subset:write_subset",
        (
            argument("source", metavar="SOURCE", help="corpus run, or table of tracks with captions"),
            argument("-n", type=count, required=True, metavar="N", help="number of clips (of a table: tracks)"),
            SPLIT,
            argument("--per-track", type=count, metavar="N", help="most clips of a track (default 1)"),
            argument("--seed", type=count, help="default 0"),
            argument("--out", required=True, metavar="DIR", help="folder of the results"),
        ),
    ),
    Command(
        "report",
        "a page: of an evaluation tables, plots, players, blind A/B test; of a training run its curves",
        "ttmray.cli.acts:report",
        (
            argument("folder", metavar="OUT", help="output of `ttmray evaluate` or of a training, local or s3://"),
            argument("--output", metavar="DIR", help="folder of the report (default OUT/report)"),
            argument("--audio", choices=("ogg", "flac"), help="ogg is small (default), flac lossless"),
        ),
    ),
    Command(
        "card",
        "model card or dataset card from what a run says about itself",
        "ttmray.recipes.cards:write_card",
        (
            argument("kind", choices=("model", "dataset"), help="model: of weights or a ranker; dataset: of a corpus"),
            argument("folder", metavar="RUN", help="run of Stage 1 or 3, finished ranker run, or finished corpus run"),
            argument("--evaluation", metavar="OUT", help="model: output of `ttmray evaluate` with its clips"),
            argument("--system", metavar="NAME", help="model: its name in that evaluation"),
            argument("--name", help="title (default: the folder's name)"),
            argument("--license", metavar="ID", help="identifier for the front matter (default other)"),
            argument("--out", metavar="FILE", help="new file (default: print it)"),
        ),
    ),
)
