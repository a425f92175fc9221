"""`ttmray <command>`. Jobs in `jobs/` call the same parser, so both take the same arguments and exit codes."""

import argparse
import json
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

    for add in (_corpus, _generation, _training, _evaluation, _models, _chains):
        add(commands)
    return parser


def _corpus(commands: Any) -> None:
    """Songs in, a scored corpus out, and looks into it."""
    job = commands.add_parser("score-corpus", help="songs in, a scored WebDataset corpus out (jobs/score_corpus.py)")
    _add_config(job)
    job.add_argument("--plan-only", action="store_true", help="print and save the plan with every derived number")
    job.add_argument("--max-failures", metavar="N", help="exit 3 when more rows failed: a count or a share such as 1%%")
    job.add_argument("--retry-failed", action="store_true", help="make units with failed rows once more")
    job.set_defaults(run=_score_corpus)

    plan = commands.add_parser("plan", help="the same as score-corpus --plan-only")
    _add_config(plan)
    plan.set_defaults(run=_score_corpus, plan_only=True, max_failures=None, retry_failed=False)

    corpus = commands.add_parser("corpus", help="look into a corpus: stats, verify, ls, sample; rescore or upgrade it")
    looks = corpus.add_subparsers(dest="look", required=True, metavar="LOOK")
    stats = looks.add_parser("stats", help="counts, reasons, rewards and latent statistics")
    verify = looks.add_parser("verify", help="recompute hashes and counts, open every tar and latent")
    upgrade = looks.add_parser("upgrade", help="add to the index of an older run what training reads by now")
    ls = looks.add_parser("ls", help="rows of the index")
    ls.add_argument("--status", choices=("ok", "rejected", "failed"), help="only rows of this status")
    ls.add_argument("--limit", type=_count, default=50, metavar="N", help="at most N rows (default 50; 0: all)")
    ls.add_argument("--columns", metavar="A,B", help="these columns, such as key,ranker/reward_score")
    ls.add_argument("--json", action="store_true", help="one JSON object per line, all columns")
    sample = looks.add_parser("sample", help="a page with some random clips to listen to, beside captions and scores")
    sample.add_argument("-n", type=_count, default=8, metavar="N", help="number of clips (default 8)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", required=True, metavar="DIR", help="folder for the page and its audio")
    rescore = looks.add_parser("rescore", help="rewards of all clips by another head, from the stored embeddings")
    rescore.add_argument("folder", metavar="RUN", help="run folder of a finished corpus or pool, local or s3://")
    rescore.add_argument("--head", required=True, metavar="HEAD", help="weights, or run folder of train-ranker")
    rescore.add_argument("--name", required=True, help="of the table: its columns are NAME/reward_score and so on")
    rescore.add_argument("--text", choices=("empty", "caption"), help="what the head sees (default: as the corpus)")
    _add_config(rescore)
    rescore.set_defaults(run=_rescore)
    acts = ((stats, "stats"), (verify, "verify"), (upgrade, "upgrade"), (ls, "ls"), (sample, "sample"))
    for look, run in acts:
        look.add_argument("folder", metavar="RUN", help="run folder or s3:// prefix")
        look.set_defaults(run=_look(run))

    status = commands.add_parser("status", help="how far a run is, without Ray")
    status.add_argument("folder", metavar="RUN", help="run folder or s3:// prefix")
    status.set_defaults(run=_look("status"))


def _generation(commands: Any) -> None:
    """Clips and pools of them."""
    made = commands.add_parser("generate", help="prompts in, audio files and a manifest out (jobs/generate.py)")
    _add_config(made)
    made.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", dest="texts", help="a prompt; repeatable"
    )
    made.add_argument("--prompts", metavar="FILE", help="prompts as CSV, TSV, JSON, JSON lines, or one per line")
    made.add_argument("--checkpoint", metavar="FILE", help="weights of the backbone (default: the bundle's)")
    made.add_argument("--bundle", help="set of models (default debug)")
    made.add_argument("--output", metavar="RUN", help="run folder or s3:// prefix (default runs/generate)")
    made.add_argument("--seed", type=int, help="of the noise, together with the id of each prompt (default 42)")
    made.add_argument("--samples", type=int, metavar="N", help="clips per prompt (default 1)")
    made.add_argument("--score-from", metavar="RUN", help="the score that ttmray choose-score found for the checkpoint")
    made.add_argument("--zip", metavar="FILE", dest="zip_to", help="archive of the clips, flat: the challenge's form")
    made.add_argument("--play-page", action="store_true", help="write index.html with players into the run folder")
    made.add_argument("--retry-failed", action="store_true", help="make failed clips once more")
    made.set_defaults(run=_generate)

    finish = commands.add_parser("postprocess", help="vocals removed, loudness and true peak to target, for any audio")
    finish.add_argument("sources", nargs="+", metavar="DIR", help="folders of audio, at any depth, or single files")
    finish.add_argument("--output", required=True, metavar="OUT", help="folder of the results and table.csv")
    finish.add_argument("--no-separation", action="store_true", help="only loudness and true peak")
    finish.add_argument("--variant", choices=("ours", "paper"), help="paper: the submission's procedure")
    finish.add_argument("--format", choices=("wav", "wav16", "flac"), help="wav is float32 (default)")
    finish.add_argument("--bundle", help="set of models of the separator (default paper)")
    finish.add_argument("--device", help="auto, cpu or cuda")
    _add_config(finish)
    finish.set_defaults(run=_postprocess)

    choose = commands.add_parser("choose-score", help="the score at which a checkpoint is best, by the mean reward")
    choose.add_argument("--checkpoint", metavar="FILE", help="weights of the backbone")
    choose.add_argument("--prompts", metavar="FILE", help="prompts, other ones than those of the evaluation")
    choose.add_argument("--bundle", help="set of models (default debug)")
    choose.add_argument("--output", metavar="RUN", help="run folder or s3:// prefix (default runs/score)")
    _add_config(choose)
    choose.set_defaults(run=_choose_score)

    pool = commands.add_parser("pool", help="candidates per prompt from one checkpoint, scored, as a corpus")
    _add_config(pool)
    pool.set_defaults(run=_pool)

    pairs = commands.add_parser("pairs", help="winner and loser of every prompt of a pool")
    keep = commands.add_parser("filter", help="the best clips of a pool, and a report")
    for command in (pairs, keep):
        command.add_argument("pool", metavar="POOL", help="run folder of a pool, local or s3://")
        command.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
        _add_config(command)
    keep.add_argument("--corpus", metavar="RUN", help="compare rewards with this corpus's train split")
    pairs.set_defaults(run=_pairs)
    keep.set_defaults(run=_filter)


def _training(commands: Any) -> None:
    """Stages 1 to 3, the ranker, and what they leave behind."""
    sft = commands.add_parser("train-sft", help="Stage 1: train the score-conditioned backbone (jobs/train_sft.py)")
    _add_config(sft)
    _add_training(sft)
    sft.set_defaults(run=_train_sft)

    ranker = commands.add_parser("train-ranker", help="votes in, a preference ranker out (jobs/train_ranker.py)")
    _add_config(ranker)
    ranker.set_defaults(run=_train_ranker)

    expert = commands.add_parser("expert-iteration", help="Stage 2: sample, filter, tune (jobs/expert_iteration.py)")
    _add_config(expert)
    _add_training(expert)
    expert.set_defaults(run=_expert_iteration)

    crpo = commands.add_parser("train-crpo", help="Stage 3: preference tuning on pairs (jobs/train_crpo.py)")
    _add_config(crpo)
    _add_training(crpo)
    crpo.set_defaults(run=_train_crpo)

    checkpoint = commands.add_parser("checkpoint", help="training checkpoints and weights: inspect, export")
    acts = checkpoint.add_subparsers(dest="act", required=True, metavar="ACT")
    what = acts.add_parser("inspect", help="what a checkpoint or weights file is, and whether it is whole")
    what.add_argument(
        "path", metavar="PATH", help="run or checkpoint folder, .safetensors, .pt or .pth; local or s3://"
    )
    what.add_argument("--json", action="store_true", dest="as_json", help="one JSON object")
    out = acts.add_parser("export", help="inference weights as one safetensors file with its config")
    out.add_argument("path", metavar="PATH", help="run, checkpoints or step folder; local or s3://")
    out.add_argument("--out", required=True, metavar="FILE", help="new .safetensors file")
    out.add_argument("--weights", default="raw", metavar="KIND", help="raw (default) or ema:SIGMA, such as ema:0.05")
    steer = acts.add_parser("steer", help="how far a score moves what weights make, in their own and other forwards")
    steer.add_argument("path", metavar="FILE", help="weights with a score head")
    steer.add_argument("--heads", nargs="+", choices=("v1", "v2", "v4"), default=["v2"], help="forwards (default v2)")
    steer.add_argument("--own", choices=("v1", "v2", "v4"), help="head of the training, if the file does not name it")
    steer.add_argument("--texts", nargs="+", metavar="TEXT", default=["a calm piano piece", "a fast drum loop"])
    steer.add_argument("--bundle", default="debug", help="set of models (default debug)")
    steer.add_argument("--no-reward", action="store_true", help="latents alone: no decoders, no reward model")
    checkpoint.set_defaults(run=_checkpoint)


def _evaluation(commands: Any) -> None:
    """Numbers, tables and pages."""
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

    evaluate = commands.add_parser("evaluate", help="folders of audio in, metrics and paired tests out")
    evaluate.add_argument("folders", nargs="*", metavar="DIR", help="systems, local or s3://; NAME=DIR names one")
    evaluate.add_argument("--prompts", metavar="FILE", help="prompts with their ids")
    evaluate.add_argument("--reference", metavar="REF", help="reference set for FAD and KAD: its name or folder")
    evaluate.add_argument("--training", metavar="CORPUS", help="corpus run or reference set that they were trained on")
    evaluate.add_argument("--baseline", metavar="NAME", help="compare every other system with this one")
    evaluate.add_argument("--output", metavar="OUT", help="folder of the results")
    evaluate.add_argument("--bundle", help="set of models (default debug)")
    _add_config(evaluate)
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="the paired table of evaluations, scored runs or tables of scores")
    compare.add_argument("sources", nargs="+", metavar="OUT", help="evaluation, generation run with scores, or table")
    compare.add_argument("--format", default="table", choices=("table", "markdown", "latex", "csv"))
    compare.add_argument("--out", metavar="FILE", help="write the table there")
    compare.add_argument("--baseline", metavar="NAME", help="compare every other system with this one")
    compare.add_argument("--alpha", type=float, default=0.05, help="level of the stars after Holm's correction")
    compare.set_defaults(run=_compare)

    reference = commands.add_parser("reference", help="reference sets of FAD and KAD: build")
    acts = reference.add_subparsers(dest="act", required=True, metavar="ACT")
    build = acts.add_parser("build", help="embed a folder of audio or take a corpus run's embeddings, under a name")
    build.add_argument("name", metavar="NAME", help="such as sdd-706")
    build.add_argument("source", metavar="SOURCE", help="folder or bucket of audio, or a corpus run")
    build.add_argument("--store", metavar="DIR", help="folder of reference sets (~/.cache/ttmray/references)")
    build.add_argument("--bundle", default="debug", help="set of models (default debug)")
    build.add_argument(
        "--stem",
        choices=("mix", "instrumental"),
        help="instrumental: without vocals (default of a corpus run); mix: as it is (default of a folder)",
    )
    build.add_argument(
        "--keys", metavar="FILE", help="only these clips of a corpus run, as `ttmray subset` writes them"
    )
    build.add_argument("--split", default="all", choices=("train", "validation", "test", "all"), help="of a corpus run")
    build.add_argument("--max-failures", type=_count, default=0, metavar="N", help="tracks that may fail")
    _add_config(build)
    reference.set_defaults(run=_reference)

    subset = commands.add_parser("subset", help="some clips or captions, seeded: keys.txt and prompts.csv")
    subset.add_argument("source", metavar="SOURCE", help="corpus run, or table of tracks with captions")
    subset.add_argument("-n", type=_count, required=True, metavar="N", help="number of clips (of a table: tracks)")
    subset.add_argument(
        "--split", default="all", choices=("train", "validation", "test", "all"), help="of a corpus run"
    )
    subset.add_argument("--per-track", type=_count, default=1, metavar="N", help="most clips of a track (default 1)")
    subset.add_argument("--seed", type=int, default=0)
    subset.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    subset.set_defaults(run=_subset)

    page = commands.add_parser("report", help="an evaluation as a static page: tables, plots, players, blind A/B test")
    page.add_argument("folder", metavar="OUT", help="output of `ttmray evaluate`, local or s3://")
    page.add_argument("--output", metavar="DIR", help="folder of the report (default OUT/report)")
    page.add_argument("--audio", default="ogg", choices=("ogg", "flac"), help="ogg is small (default), flac lossless")
    page.set_defaults(run=_report)

    card = commands.add_parser("card", help="model card or dataset card from what a run says about itself")
    card.add_argument("kind", choices=("model", "dataset"))
    card.add_argument("folder", metavar="RUN", help="run of Stage 1 or 3, finished ranker run, or finished corpus run")
    card.add_argument("--evaluation", metavar="OUT", help="model: output of `ttmray evaluate` with its clips")
    card.add_argument("--system", metavar="NAME", help="model: its name in that evaluation")
    card.add_argument("--name", help="title (default: the folder's name)")
    card.add_argument("--license", metavar="ID", help="identifier for the front matter (default other)")
    card.add_argument("--out", metavar="FILE", help="new file (default: print it)")
    card.set_defaults(run=_card)


def _models(commands: Any) -> None:
    """Weights and sizes."""
    params = commands.add_parser("params", help="parameters per part of a backbone, against the challenge's limit")
    params.add_argument("--size", choices=("s_44k", "l_44k", "s_16k", "l_16k"), default="s_44k")
    params.add_argument("--head", choices=("none", "v1", "v2", "v3", "v4", "v5"), default="v2")
    params.add_argument("--checkpoint", metavar="FILE", help="count the weights of this file instead")
    params.set_defaults(run=_params)

    synth = commands.add_parser("synth", help="the small world, whose true quality is known")
    acts = synth.add_subparsers(dest="act", required=True, metavar="ACT")
    check = acts.add_parser("check", help="how well a bundle's reward ranks true quality, by kind of fault")
    check.add_argument("--bundle", default="micro", help="set of models, or a bundle's folder (default micro)")
    check.add_argument("--pieces", type=int, default=24, help="songs per kind of fault (default 24)")
    check.add_argument("--seed", type=int, default=99, help="of the songs (default 99)")
    check.add_argument("--fault", action="append", dest="faults", help="only this kind; may be given several times")
    check.add_argument("--device", default="auto")
    check.add_argument("--out", help="also write ruler.json and ruler.md to this folder")
    check.set_defaults(run=_synth_check)

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


def _chains(commands: Any) -> None:
    """Many jobs from one config."""
    for name, handler, help in (
        ("reproduce", _reproduce, "the whole chain from one config (jobs/reproduce.py)"),
        ("ablate", _ablate, "tables and figures of the paper from one config (jobs/ablate.py)"),
        ("train-micro", _train_micro, "a small bundle from nothing, on synthetic songs (jobs/train_micro.py)"),
    ):
        chain = commands.add_parser(name, help=help)
        _add_config(chain)
        chain.add_argument(
            "--from", dest="first", metavar="STEP", help="start here; earlier steps are taken as they are"
        )
        chain.add_argument("--until", dest="last", metavar="STEP", help="end with this step")
        chain.add_argument("--plan-only", action="store_true", help="check all, print the steps and what is done")
        chain.set_defaults(run=handler)
    demo = commands.add_parser("demo", help="songs of known quality, scored; clips from prompts; a page (jobs/demo.py)")
    _add_config(demo)
    demo.set_defaults(run=_demo)


def _evaluate(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.evaluation.evaluate import EvaluateConfig, evaluate

    sets = []
    for name in ("prompts", "reference", "training", "baseline", "output", "bundle"):
        if (value := getattr(arguments, name)) is not None:
            sets.append(f"{name}={json.dumps(value)}")
    if arguments.folders:
        sets.append(f"folders={json.dumps(arguments.folders)}")
    return evaluate(load_config(EvaluateConfig, arguments.config, [*sets, *arguments.sets]))


def _compare(arguments: argparse.Namespace) -> int:
    from ttmray.evaluation.compare import compare

    options = {name: getattr(arguments, name) for name in ("format", "out", "baseline", "alpha")}
    return compare(arguments.sources, **options)


def _reference(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.evaluation.reference import STORE, ReferenceConfig, build_reference

    options = {name: getattr(arguments, name) for name in ("bundle", "stem", "split", "keys", "max_failures")}
    runtime = load_config(ReferenceConfig, arguments.config, arguments.sets)
    return build_reference(arguments.name, arguments.source, store=arguments.store or STORE, runtime=runtime, **options)


def _subset(arguments: argparse.Namespace) -> int:
    from ttmray.evaluation.subset import write_subset

    options = {name: getattr(arguments, name) for name in ("n", "split", "per_track", "seed", "out")}
    return write_subset(arguments.source, **options)


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


def _generate(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.generation.config import GenerateConfig
    from ttmray.generation.generate import generate

    names = ("checkpoint", "bundle", "output", "seed", "samples")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.texts or arguments.prompts:
        given |= {"texts": arguments.texts, "prompts": arguments.prompts}
    # ensure_ascii=False: YAML would read escaped emoji as two halves
    sets = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    config = load_config(GenerateConfig, arguments.config, [*arguments.sets, *sets])
    if arguments.score_from is not None:
        from ttmray.generation.choose_score import chosen_score

        sampler = config.sampler.model_copy(update={"score": chosen_score(arguments.score_from, config.checkpoint)})
        config = config.model_copy(update={"sampler": sampler})
    return generate(config, retry_failed=arguments.retry_failed, zip_to=arguments.zip_to, play_page=arguments.play_page)


def _choose_score(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.generation.choose_score import ScoreChoiceConfig, choose_score

    names = ("checkpoint", "prompts", "bundle", "output")
    sets = [f"{name}={json.dumps(value)}" for name in names if (value := getattr(arguments, name)) is not None]
    return choose_score(load_config(ScoreChoiceConfig, arguments.config, [*arguments.sets, *sets]))


def _postprocess(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.generation.postprocess import PostprocessConfig, postprocess

    sets = list(arguments.sets)
    for name in ("bundle", "variant", "format", "device"):
        if (value := getattr(arguments, name)) is not None:
            sets.append(f"{name}={value}")
    if arguments.no_separation:
        sets.append("passes=0")
    return postprocess(arguments.sources, arguments.output, load_config(PostprocessConfig, arguments.config, sets))


def _report(arguments: argparse.Namespace) -> int:
    from ttmray.evaluation.report import report

    return report(arguments.folder, arguments.output, arguments.audio)


def _card(arguments: argparse.Namespace) -> int:
    from ttmray.recipes.cards import write_card

    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "run", "kind", "folder")}
    return write_card(arguments.kind, arguments.folder, **options)


def _params(arguments: argparse.Namespace) -> int:
    from ttmray.models.backbone_weights import show_params

    return show_params(arguments.size, arguments.head, arguments.checkpoint)


def _pool(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.generation.pool import generate_pool
    from ttmray.generation.pool_worker import CandidatesConfig

    return generate_pool(load_config(CandidatesConfig, arguments.config, arguments.sets))


def _reproduce(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.recipes.reproduce import ReproduceConfig, reproduce

    config = load_config(ReproduceConfig, arguments.config, arguments.sets)
    return reproduce(config, first=arguments.first, last=arguments.last, plan_only=arguments.plan_only)


def _ablate(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.recipes.ablations import AblateConfig, ablate

    config = load_config(AblateConfig, arguments.config, arguments.sets)
    return ablate(config, first=arguments.first, last=arguments.last, plan_only=arguments.plan_only)


def _expert_iteration(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.training.expert_iteration import ExpertIterationConfig, expert_iteration

    config = load_config(ExpertIterationConfig, arguments.config, arguments.sets)
    return expert_iteration(config, plan_only=arguments.plan_only, force=arguments.force)


def _train_crpo(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.training.crpo import CrpoConfig, train_crpo

    config = load_config(CrpoConfig, arguments.config, arguments.sets)
    return train_crpo(config, plan_only=arguments.plan_only, force=arguments.force)


def _pairs(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.training.pairs import PairsConfig, build_pairs

    return build_pairs(arguments.pool, arguments.out, load_config(PairsConfig, arguments.config, arguments.sets))


def _filter(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.generation.filter import FilterConfig, filter_pool

    config = load_config(FilterConfig, arguments.config, arguments.sets)
    return filter_pool(arguments.pool, arguments.out, config, arguments.corpus)


def _train_micro(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.recipes.micro import MicroConfig, train_micro

    config = load_config(MicroConfig, arguments.config, arguments.sets)
    return train_micro(config, first=arguments.first, last=arguments.last, plan_only=arguments.plan_only)


def _demo(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.recipes.demo import DemoConfig, demo

    return demo(load_config(DemoConfig, arguments.config, arguments.sets))


def _train_ranker(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.ranker.job import RankerConfig, train_ranker

    return train_ranker(load_config(RankerConfig, arguments.config, arguments.sets))


def _checkpoint(arguments: argparse.Namespace) -> int:
    from ttmray.training.export import export, show

    if arguments.act == "steer":
        from ttmray.generation.steering import show_steering

        how = {name: getattr(arguments, name) for name in ("own", "texts", "bundle")}
        return show_steering(arguments.path, arguments.heads, **how, reward=not arguments.no_reward)
    if arguments.act == "inspect":
        return show(arguments.path, arguments.as_json)
    return export(arguments.path, arguments.out, arguments.weights)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan-only", action="store_true", help="print every derived number and stop")
    parser.add_argument("--force", action="store_true", help="go on although the config differs from the run's")


def _train_sft(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.training.config import TrainConfig, with_absolute_paths
    from ttmray.training.sft import train_sft

    config = with_absolute_paths(load_config(TrainConfig, arguments.config, arguments.sets))
    return train_sft(config, plan_only=arguments.plan_only, force=arguments.force)


def _rescore(arguments: argparse.Namespace) -> int:
    from ttmray.config import load_config
    from ttmray.corpus.rescore import RescoreConfig, rescore

    given = {"corpus": arguments.folder, "head": arguments.head, "name": arguments.name, "text": arguments.text}
    sets = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    return rescore(load_config(RescoreConfig, arguments.config, [*arguments.sets, *sets]))


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


def _synth_check(arguments: argparse.Namespace) -> int:
    from ttmray.evaluation.ruler import check_bundle

    return check_bundle(
        arguments.bundle,
        pieces=arguments.pieces,
        seed=arguments.seed,
        kinds=arguments.faults,
        device=arguments.device,
        out=arguments.out,
    )


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
