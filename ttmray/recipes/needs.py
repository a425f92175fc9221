"""What steps need from outside of their run folder: looked at before the first one starts, and listed all at once.

A chain takes days. What its last step needs (a reference set, votes, weights) is asked for at the start, with the way
to get it. Nothing is loaded here but tables of text, and no Ray is started.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttmray.config import Config
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.storage import Folder, absolute, read_file, split_path

SHOWN = 2
"""Steps that are named with what they need."""


class Need(NamedTuple):
    """A check that raises a `UserError` where something is missing, and its arguments; equal needs are looked at once.

    `way_out` replaces the hint of the error.
    """

    check: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    way_out: str = ""


def problem(need: Need) -> UserError | None:
    """What is missing, or None."""
    try:
        need.check(*need.arguments)
    except UserError as error:
        return UserError(error.message, need.way_out or error.hint)
    return None


def refuse_missing(needs: Mapping[str, Sequence[Need]]) -> None:
    """Look at what all steps need.

    Args:
        needs: step -> what it needs.

    Raises:
        UserError: something is missing; names everything, a line each, with the steps and the way out.
    """
    users: list[tuple[Need, list[str]]] = []
    for step, some in needs.items():
        for need in some:
            steps = next((steps for other, steps in users if other == need), None)
            if steps is None:
                users.append((need, [step]))
            else:
                steps.append(step)
    lines: dict[str, tuple[str, list[str]]] = {}
    for need, steps in users:
        if (error := problem(need)) is not None:
            known = lines.setdefault(error.message, (error.hint, []))[1]
            known += [step for step in steps if step not in known]
    if not lines:
        return
    shown = [f"{message} For {_some(steps)}. {hint}".rstrip() for message, (hint, steps) in lines.items()]
    count = "1 thing is" if len(shown) == 1 else f"{len(shown)} things are"
    raise UserError(
        f"{count} missing for the steps to do; none was started:\n  - " + "\n  - ".join(shown),
        "--from and --until leave out steps, and a section that is null its step.",
    )


def without_devices(needs: Mapping[str, Sequence[Need]]) -> dict[str, list[Need]]:
    """The same for a plan, which can be made on another machine: of devices that are not here it is only said."""
    from ttmray.models.devices import resolve_device

    devices = [need for some in needs.values() for need in some if need.check is resolve_device]
    for message in dict.fromkeys(error.message for need in devices if (error := problem(need)) is not None):
        console.print(f"{message} It is planned all the same.", style="yellow", markup=False)
    return {step: [need for need in some if need.check is not resolve_device] for step, some in needs.items()}


def _some(steps: Sequence[str]) -> str:
    more = len(steps) - SHOWN
    return ", ".join(steps[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def needs_of(section: str, config: Config, root: Folder, weights_field: str = "") -> tuple[Need, ...]:
    """What the job of a config needs, without what lies in the run folder `root`: other steps make that.

    Args:
        section: of the config of the chain, for the ways out.
        weights_field: the field of the weights, where it is not in that section.
    """
    from ttmray.corpus.catalogue import check_songs
    from ttmray.corpus.config import CorpusConfig
    from ttmray.evaluation.config import EvaluateConfig
    from ttmray.generation.config import GenerateConfig
    from ttmray.generation.pool_worker import CandidatesConfig
    from ttmray.generation.prompts import read_prompts
    from ttmray.models.reward_head import open_head
    from ttmray.ranker.job import RankerConfig
    from ttmray.training.config import TrainConfig
    from ttmray.training.pairs import PairsConfig

    needs: Iterable[Need] = ()
    if isinstance(config, CorpusConfig):
        needs = _of_corpus(section, config)
    elif isinstance(config, RankerConfig):
        needs = _of_ranker(section, config, root)
    elif isinstance(config, TrainConfig):
        needs = _of_training(section, config, root)
    elif isinstance(config, CandidatesConfig):
        needs = _of_pool(section, config, root)
    elif isinstance(config, GenerateConfig):
        needs = _of_generation(section, config, root, weights_field)
    elif isinstance(config, EvaluateConfig):
        needs = _of_evaluation(section, config, root)
    elif isinstance(config, PairsConfig):
        needs = prompts(config.held_out)
    # heads, songs and prompts that another step makes are not there yet
    made_here = (open_head, check_songs, read_prompts)
    return tuple(need for need in needs if not (need.check in made_here and inside(need.arguments[0], root)))


def prompts(path: str | None) -> Iterable[Need]:
    """A readable file of prompts."""
    from ttmray.generation.prompts import read_prompts

    if path is not None:
        yield Need(read_prompts, (absolute(path),), "Put a table with the columns id and prompt there, or name yours.")


def text_if_there(path: str) -> str | None:
    """A file of text; None where it is missing, which is a need of the steps that use it."""
    folder, name = split_path(path)
    return folder.read(name).decode("utf-8", "replace") if folder.exists(name) else None


def file_there(path: str) -> None:
    """A file, local or remote, that is not read.

    Raises:
        UserError: it is missing.
    """
    folder, name = split_path(path)
    if not folder.exists(name):
        raise UserError(f"{absolute(path)}: not found.", "Check the path.")


def weights_file_there(path: str) -> None:
    """Weights of a backbone; of safetensors the header is read, where it is on this machine.

    Raises:
        UserError: missing or damaged.
    """
    from safetensors import SafetensorError

    from ttmray.models.backbone_weights import read_config

    file_there(path)
    place = absolute(path)
    if Folder(place).remote:
        return
    if not Path(place).is_file():
        raise UserError(f"{place} is a folder, not a file of weights.", "Name the file.")
    try:
        read_config(Path(place))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{place} is no file of weights: {error}", "Export it again.") from error


def checkpoint(path: str | None, field: str, root: Folder) -> Iterable[Need]:
    """Weights from outside of the run folder."""
    if path is not None and not inside(path, root):
        yield Need(weights_file_there, (absolute(path),), f"Put the weights there, or set {field}.")


def weights(bundle: str, roles: Iterable[str] | None = None) -> Iterable[Need]:
    """Released weights of a bundle, of some roles or of all, and the reward head that replaces its own."""
    from ttmray.models.bundle import base_name, open_bundle
    from ttmray.models.reward_head import open_head

    base, _, head = bundle.partition("+")
    some = None if roles is None else set(roles)
    for name in open_bundle(base_name(bundle)).weights(some):
        yield Need(_weights_there, (base, name))
    if head and (some is None or "tunejury" in some):
        yield Need(open_head, (head,), f"Train it (ttmray train-ranker), or leave out +{head}.")


def _weights_there(bundle: str, name: str) -> None:
    from ttmray.models.weights import open_store

    store = open_store()
    if name not in store.overrides and len(store.present(name)) < len(store.entry(name).files):
        try:
            store.find(name)
        except UserError as error:
            raise UserError(error.message, f"Get them with: ttmray weights pull --bundle {bundle}") from error
    store.find(name)


def inside(path: str, root: Folder) -> bool:
    """Whether a path lies in the run folder."""
    return absolute(path).startswith(f"{root.uri}/")


def _of_corpus(section: str, config: Any) -> Iterable[Need]:
    from ttmray.corpus.captions import load_captions
    from ttmray.corpus.catalogue import check_songs

    way_out = f"Put the songs there, or set {section}.input to their folder, bucket or table."
    yield Need(check_songs, (absolute(config.input), config.catalogue), way_out)
    if config.catalogue.captions not in (None, "auto"):
        way_out = f"Put the table of captions there, or set {section}.catalogue.captions (null: no captions)."
        yield Need(load_captions, (absolute(config.catalogue.captions),), way_out)
    if config.catalogue.exclude is not None:
        yield Need(read_file, (absolute(config.catalogue.exclude),), f"Set {section}.catalogue.exclude.")
    yield from weights(config.bundle)
    yield from _device(section, config.runtime, "runtime")


def _of_ranker(section: str, config: Any, root: Folder) -> Iterable[Need]:
    from ttmray.ranker.votes import KNOWN, read_splits, read_votes
    from ttmray.tables import read_rows

    for number, source in enumerate(config.sources):
        if inside(source.path, root):  # a step before makes them
            continue
        field = f"{section}.sources.{number}"
        yield Need(read_rows, (absolute(source.path), KNOWN), f"Put the votes there, or set {field}.path.")
        files = [source.splits] if isinstance(source.splits, str) else list((source.splits or {}).values())
        for file in files:
            way_out = f"Put the split there, or set {field}.splits."
            yield Need(read_splits if isinstance(source.splits, str) else read_file, (file,), way_out)
        if source.corpus is not None:
            yield from _corpus(source.corpus, f"{field}.corpus", root)
        else:
            audio = absolute(source.audio) if source.audio else split_path(source.path)[0].uri
            yield Need(_audio_there, (audio,), f"Put the clips of the votes there, or set {field}.audio.")
        has_audio = source.corpus is None
        yield Need(_clips_there, (source, config.max_missing)) if has_audio else Need(read_votes, ((source,),))
    yield from weights(config.bundle)
    yield from _device(section, config.encoding, "encoding")
    yield from _device(section, config.training, "training")


def _audio_there(path: str) -> None:
    from ttmray.evaluation.systems import audio_files

    folder = Folder(path)
    if not folder.remote and not os.path.isdir(path):
        raise UserError(f"{path}: there is no such folder.", "Check the path.")
    audio_files(folder)


def _clips_there(source: Any, share: float) -> None:
    """The clips of the pairs of one table, by their names.

    Raises:
        UserError: of more than `share` of the pairs one is missing; also for a table that cannot be used.
    """
    from ttmray.ranker.votes import read_votes

    pairs, _ = read_votes((source,))
    folder = Folder.at(source.audio) if source.audio else split_path(source.path)[0]
    names = {folder.path(entry.name) for entry in folder.files(sizes=False)}
    lost = [clip for pair in pairs for clip in (pair.a, pair.b) if clip not in names]
    pairs_lost = sum(pair.a not in names or pair.b not in names for pair in pairs)
    if pairs_lost > share * len(pairs):
        raise UserError(
            f"{source.name}: {pairs_lost} of {len(pairs)} pairs have a clip that is missing, e.g. {lost[0]}.",
            f"Put the clips there, or raise max_missing ({share:g}).",
        )


def sources_of_reference(field: str, source: str, bundle: str, stem: str | None = None) -> tuple[Need, ...]:
    """What building a reference set needs: of the instrumentals of a folder also a separator."""
    from ttmray.models.scoring import Scorer

    there = Need(_reference_source_there, (source,), f"Put the audio or the corpus there, or set {field}.")
    separated = stem == "instrumental" and not Folder(source).exists("run.json")
    return (there, *weights(bundle, (*Scorer.roles, "tokenizer", *(["separator"] if separated else []))))


def _reference_source_there(path: str) -> None:
    if Folder(path).exists("run.json"):
        _corpus_there(path)
    else:
        _audio_there(path)


def _corpus(path: str, field: str, root: Folder) -> Iterable[Need]:
    if not inside(path, root):
        way_out = f"Make it (ttmray score-corpus), or set {field}."
        yield Need(_corpus_there, (absolute(path),), way_out)


def _corpus_there(path: str) -> None:
    from ttmray.corpus import index

    if not Folder(path).exists(index.MERGED):
        raise UserError(f"{path} is no finished corpus: it has no {index.MERGED}.", "ttmray score-corpus")


def _scores_there(corpus: str, column: str) -> None:
    """The table of a score column of another reward head; one of the index is there with it.

    Raises:
        UserError: it was not made, or not to its end.
    """
    from ttmray.corpus.scores import SCORES
    from ttmray.inventory import finished

    name, slash, _ = column.rpartition("/")
    if slash and not finished(Folder(corpus).sub(f"{SCORES}/{name}")):
        raise UserError(
            f"{corpus} has no scores {name}.", f"Make them: ttmray corpus rescore {corpus} --head HEAD --name {name}"
        )


def _of_training(section: str, config: Any, root: Folder) -> Iterable[Need]:
    from ttmray.training.crpo import CrpoConfig
    from ttmray.training.expert_iteration import ExpertIterationConfig

    for number, source in enumerate(config.data.sources):
        field = f"{section}.data.sources.{number}"
        yield from _corpus(source.corpus, f"{field}.corpus", root)
        if source.score_column is not None and not inside(source.corpus, root):
            yield Need(_scores_there, (absolute(source.corpus), source.score_column))
        if source.keys is not None and not inside(source.keys, root):
            yield Need(file_there, (absolute(source.keys),), f"Set {field}.keys.")
    yield from checkpoint(config.model.init, f"{section}.model.init", root)
    if config.runtime.wandb is not None:
        yield _package("wandb", "track")
    yield from _device(section, config.runtime, "runtime")
    if isinstance(config, CrpoConfig) and not inside(config.pairs, root):
        yield Need(file_there, (absolute(config.pairs),), f"Make it (ttmray pairs), or set {section}.pairs.")
    if isinstance(config, ExpertIterationConfig):
        for pool in config.pools:
            yield from _corpus(pool, f"{section}.pools", root)
        if config.pool is not None:
            yield from _of_pool(f"{section}.pool", config.pool, root)


def _of_pool(section: str, config: Any, root: Folder) -> Iterable[Need]:
    yield from prompts(config.prompts)
    yield from prompts(config.held_out)
    if config.corpus is not None:
        yield from _corpus(config.corpus, f"{section}.corpus", root)
    yield from checkpoint(config.checkpoint, f"{section}.checkpoint", root)
    yield from _forwards(config, config.sampler.scores, root)
    yield from _backbone(section, config)
    yield from weights(config.bundle)
    yield from _device(section, config.runtime, "runtime")


def _of_generation(section: str, config: Any, root: Folder, weights_field: str) -> Iterable[Need]:
    from ttmray.generation.generate import roles_with_separator

    yield from prompts(config.prompts)
    for field in ("checkpoint", "second_checkpoint"):
        yield from checkpoint(getattr(config, field), weights_field or f"{section}.{field}", root)
    yield from _forwards(config, config.sampler.scores, root)
    yield from _backbone(section, config)
    yield from weights(config.bundle, roles_with_separator(config))
    yield from _device(section, config.runtime, "runtime")


def _backbone(section: str, config: Any) -> Iterable[Need]:
    if config.checkpoint is None:
        yield Need(_bundle_has_backbone, (config.bundle,), f"Set {section}.checkpoint.")


def _forward_fits(path: str, head: str | None, null: str | None, force: bool, score: float | None) -> None:
    """Whether a file of this machine that names its head can make clips as it is asked to; a file that is missing, or
    says nothing, is left to its own need.

    Raises:
        UserError: as `check_forward`.
    """
    from ttmray.models.backbone_weights import check_forward, read_config

    if Folder(path).remote or problem(Need(weights_file_there, (path,))) is not None:
        return
    known = read_config(Path(path))
    if "head" in known:
        own_null = known.get("null", "zero_embedding")
        check_forward(path, known["head"], own_null, head, null, force=force, score=score)  # type: ignore[arg-type]


def _forwards(config: Any, scores: Sequence[Any], root: Folder) -> Iterable[Need]:
    """Weights from outside of the run folder fit the forward, null and score that they are used with."""
    paths = (config.checkpoint, getattr(config, "second_checkpoint", None))
    for path, score in zip(paths, scores, strict=False):
        if path is not None and not inside(path, root):
            yield Need(_forward_fits, (absolute(path), config.head, config.null, config.force_head, score))


def _bundle_has_backbone(bundle: str) -> None:
    from ttmray.models.bundle import base_name, open_bundle

    opened = open_bundle(base_name(bundle))
    if "backbone" not in opened.roles():
        opened.require({"backbone"})


def _of_evaluation(section: str, config: Any, root: Folder) -> Iterable[Need]:
    from ttmray.evaluation.reference import reference_there, training_there
    from ttmray.models.bundle import base_name
    from ttmray.models.scoring import Scorer

    yield from prompts(config.prompts)
    for folder in config.folders:
        path = folder.partition("=")[2] or folder
        if not inside(path, root):
            yield Need(clips_there, (absolute(path), config.prompts), "Name files `<prompt id>.wav`, or set its clips.")
    yield from weights(config.bundle, (*Scorer.roles, "tokenizer"))
    bundle = base_name(config.bundle)  # embeddings have nothing to do with the reward head
    if config.reference is not None and not inside(config.references, root):
        asked = (config.reference, config.references, bundle, config.reward_text)
        yield Need(reference_there, (*asked, config.reference_stem))
    if config.training is not None and not inside(config.training, root):
        asked = (config.training, config.references, bundle, config.reward_text)
        yield Need(training_there, asked)
    if config.judge is not None:
        yield Need(_judge_there, (config.judge, config.prompts))
    yield from _device(section, config.runtime, "runtime")


def clips_there(path: str, prompts: str | None) -> None:
    """Clips of another program, by the ids of the prompts.

    Raises:
        UserError: no such folder, or no clip of the prompts; a file of prompts that is not there is left to its own
            need.
    """
    from ttmray.evaluation.systems import find_systems
    from ttmray.generation.prompts import read_prompts

    _audio_there(path)
    if prompts is not None and problem(Need(read_prompts, (prompts,))) is None:
        find_systems([path], read_prompts(prompts))


def _judge_there(config: Any, prompts: str | None) -> None:
    from ttmray.evaluation.judge import check_judge
    from ttmray.generation.prompts import read_prompts

    ids = [] if prompts is None or problem(Need(read_prompts, (prompts,))) else [p.id for p in read_prompts(prompts)]
    check_judge(config, ids)


def plots() -> Need:
    """The library of the figures."""
    from ttmray.evaluation.plots import require_matplotlib

    return Need(require_matplotlib)


def _package(name: str, extra: str) -> Need:
    return Need(_package_there, (name, extra))


def _package_there(name: str, extra: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"the package {name} is not installed.", f"pip install 'ttmray[{extra}]'")


def _device(section: str, runtime: Any, field: str) -> Iterable[Need]:
    """A device of this machine that the config names; those of a cluster are Ray's to find."""
    from ttmray.models.devices import resolve_device

    if runtime.runner == "local":
        yield Need(resolve_device, (runtime.device,), f"Set {section}.{field}.device to auto or cpu.")
