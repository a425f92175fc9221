"""Clips and pools of them."""

from ttmray.cli.command import PLAN, Command, argument, setting, switch

BUNDLE = setting("--bundle", help="set of models (default micro)")
POOL = argument("pool", metavar="POOL", help="run folder of a pool, local or s3://")
OUT = argument("--out", required=True, metavar="DIR", dest="output", help="folder of the results")
GROUPS: dict[str, str] = {}
COMMANDS = (
    Command(
        "generate",
        "prompts in, audio files, a manifest and a page with players out (jobs/generate.py)",
        "ttmray.cli.acts:generate",
        (
            setting("--prompt", action="append", metavar="TEXT", dest="texts", help="a prompt; repeatable"),
            setting("--prompts", metavar="FILE", help="prompts as CSV, TSV, JSON, JSON lines, or one per line"),
            setting("--checkpoint", metavar="FILE", help="weights of the backbone (default: the bundle's)"),
            BUNDLE,
            setting("--output", metavar="RUN", help="run folder or s3:// prefix (default runs/generate)"),
            setting("--seed", type=int, help="of the noise, together with the id of each prompt (default 42)"),
            setting("--samples", type=int, metavar="N", help="clips per prompt (default 1)"),
            argument(
                "--score-from",
                metavar="RUN",
                stands_for="sampler.score",
                help="the score that ttmray choose-score found for the checkpoint",
            ),
            argument("--zip", metavar="FILE", dest="zip_to", help="archive of the clips, flat: the challenge's form"),
            PLAN,
            switch("--retry-failed", "make failed clips once more"),
            switch("--overwrite", "delete the clips of other settings that the run folder holds, and start anew"),
        ),
        config="ttmray.generation.config:GenerateConfig",
        exclusive=("texts", "prompts"),
    ),
    Command(
        "serve",
        "a page on this machine: prompts, a score, two clips to compare blind, votes",
        "ttmray.serve.server:serve",
        (
            BUNDLE,
            setting("--checkpoint", metavar="FILE", help="weights of the backbone (default: the bundle's)"),
            setting("--against", metavar="FILE", dest="second_checkpoint", help="other weights to compare them with"),
            setting("--output", metavar="DIR", help="folder of clips and votes.csv (default runs/serve)"),
            setting("--host", help="address (default 127.0.0.1); another one needs the token that is printed"),
            setting("--port", type=int, help="default 7860; 0: any free one"),
        ),
        config="ttmray.serve.tryout:ServeConfig",
    ),
    Command(
        "postprocess",
        "vocals removed, loudness and true peak to target, for any audio",
        "ttmray.generation.postprocess_folders:postprocess",
        (
            argument("sources", nargs="+", metavar="DIR", help="folders of audio, at any depth, or single files"),
            argument("--output", required=True, metavar="OUT", help="folder of the results and table.csv"),
            setting(
                "--no-separation", action="store_const", const=0, dest="passes", help="only loudness and true peak"
            ),
            setting("--variant", choices=("ours", "paper"), help="paper: the submission's procedure"),
            setting("--format", choices=("wav", "wav16", "flac"), help="wav is float32 (default)"),
            setting("--bundle", help="set of models of the separator (default paper)"),
            setting("--device", help="auto, cpu or cuda"),
            PLAN,
        ),
        config="ttmray.generation.postprocess:PostprocessConfig",
    ),
    Command(
        "choose-score",
        "the score at which a checkpoint is best, by the mean reward",
        "ttmray.generation.choose_score:choose_score",
        (
            setting("--checkpoint", metavar="FILE", help="weights of the backbone"),
            setting("--prompts", metavar="FILE", help="prompts, other ones than those of the evaluation"),
            BUNDLE,
            setting("--output", metavar="RUN", help="run folder or s3:// prefix (default runs/score)"),
            PLAN,
        ),
        config="ttmray.generation.choose_score:ScoreChoiceConfig",
    ),
    Command(
        "pool",
        "several clips per prompt from one checkpoint, scored, as a corpus, to filter or to pair",
        "ttmray.generation.pool:generate_pool",
        (PLAN,),
        config="ttmray.generation.pool_worker:CandidatesConfig",
    ),
    Command(
        "pairs",
        "winner and loser of every prompt of a pool",
        "ttmray.training.pairs:build_pairs",
        (POOL, OUT),
        config="ttmray.training.pairs:PairsConfig",
    ),
    Command(
        "filter",
        "the best clips of a pool, and a report",
        "ttmray.generation.filter:filter_pool",
        (POOL, OUT, argument("--corpus", metavar="RUN", help="compare rewards with this corpus's train split")),
        config="ttmray.generation.filter:FilterConfig",
    ),
)
