"""The stages of a corpus run, made from its config, with those from outside in their places."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttmray.audio.limits import AudioLimits
from ttmray.audio.segment import SegmentRule
from ttmray.corpus import index
from ttmray.corpus.config import CorpusConfig, ExtraStage
from ttmray.corpus.running import Job, Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.stages import (
    Decode,
    DecodeTracks,
    Encode,
    Gain,
    Measure,
    Score,
    Separate,
    Text,
    Unseparated,
    Write,
    WriteAudio,
)
from ttmray.errors import UserError
from ttmray.models.bundle import Models, open_bundle
from ttmray.models.cache import EmbeddingCache
from ttmray.models.loading import LoadOptions
from ttmray.models.scoring import SAMPLE_RATE, Scorer
from ttmray.plugins import named
from ttmray.storage import Folder


@dataclass(frozen=True)
class CorpusJob(Job):
    """The stages of the corpus run of a `CorpusConfig`."""

    @property
    def corpus(self) -> CorpusConfig:
        return CorpusConfig.model_validate_json(self.config)

    @property
    def output(self) -> str:
        return self.corpus.output

    @property
    def clip_timeout_s(self) -> float:
        return self.corpus.runtime.clip_timeout_s

    def makers(self) -> Makers:
        config = self.corpus
        decode = DecodeTracks if config.separation.scope == "track" else Decode
        write = WriteAudio if config.keep_audio else Write
        extra = [(_extra_class(entry), entry.options) for entry in config.extra_stages]
        columns = {name: kind for stage, _ in extra for name, kind in stage.columns.items()}
        separate: dict[type[Stage], Callable[[Models], Stage]] = {Separate: lambda models: Separate(models.separator)}
        if config.separation.scope == "none":
            separate = {Unseparated: lambda _: Unseparated()}
        makers: dict[type[Stage], Callable[[Models], Stage]] = {
            decode: lambda _: decode(
                Folder(self.root),
                self.protocol,
                SegmentRule(**config.segments.model_dump()),
                AudioLimits(
                    min_duration_s=config.segments.min_s, **config.limits.model_dump(exclude={"max_file_bytes"})
                ),
                config.limits.max_file_bytes,
            ),
            Measure: lambda _: Measure(config.silence_dbfs),
            **separate,
            Score: lambda models: Score(_scorer(config, models)),
            **({} if (peak := config.latent_peak) is None else {Gain: lambda _: Gain(peak, config.silence_dbfs)}),
            Encode: lambda models: Encode(models.latents, config.runtime.batch),
            Text: Text,
            write: lambda _: write(Folder.at(config.output), columns, self.run),
        }
        order = list(makers)
        for stage, options in extra:
            makers[stage] = _maker(stage, _load_options(config), options)
            order = _placed(order, stage)
        return {stage: makers[stage] for stage in order}

    def load(self, roles: Collection[str]) -> Models:
        return open_bundle(self.corpus.bundle).load(roles, _load_options(self.corpus))


def stage_classes(config: CorpusConfig) -> list[type[Stage]]:
    """Classes of the stages of a corpus run, in order.

    Raises:
        UserError: a stage of `extra_stages` cannot be imported, or does not fit among the others.
    """
    return CorpusJob(config.model_dump_json(), "", "").stages()


def _load_options(config: CorpusConfig) -> LoadOptions:
    return LoadOptions(
        device=config.runtime.device,
        batch=config.runtime.batch,
        threads=config.runtime.threads,
        clip_samples=round(config.segments.clip_s * SAMPLE_RATE),
        instrumental=config.separation.instrumental,
        overlap=config.separation.overlap,
        precision=config.separation.precision,
    )


def _scorer(config: CorpusConfig, models: Models) -> Scorer:
    runtime = config.runtime
    folder = runtime.embedding_cache
    cache = EmbeddingCache(folder, int(runtime.embedding_cache_gib * 2**30)) if folder else None
    return Scorer(models, open_bundle(config.bundle).protocol(config.reward_text), runtime.threads, cache)


def _maker(stage: Any, load: LoadOptions, options: Mapping[str, Any]) -> Callable[[Models], Stage]:
    return lambda models: stage(models, load, **options)


def _extra_class(entry: ExtraStage) -> type[Stage]:
    """The class that a stage from outside names.

    Raises:
        UserError: it cannot be imported, is no stage, or does not take the options.
    """
    field = f"extra_stages: {entry.stage}"
    try:
        stage = named(entry.stage)
    except (ImportError, AttributeError) as error:
        way_out = "Its module must be on the PYTHONPATH of every node."
        raise UserError(f"{field} cannot be imported: {error}", way_out) from error
    if not (inspect.isclass(stage) and issubclass(stage, Stage)) or inspect.isabstract(stage):
        raise UserError(f"{field} is no stage.", "It must be a class derived from ttmray.corpus.stage.Stage.")
    if stage.scope == "track" or any(role not in Models.__dataclass_fields__ for role in stage.model_roles):
        raise UserError(f"{field} is for whole tracks, or asks for models that no bundle has.")
    try:
        inspect.signature(stage).bind(None, None, **entry.options)
    except TypeError as error:
        way_out = "It is made as Class(models, load, **options)."
        raise UserError(f"{field} does not take its options: {error}", way_out) from error
    return stage


def _placed(order: Sequence[type[Stage]], stage: type[Stage]) -> list[type[Stage]]:
    """The stages with one from outside: late, but before the last reader of what it reads: no array lives longer.

    Raises:
        UserError: it reads what nobody writes, or its name, arrays or columns are those of another stage.
    """
    field = f"extra_stages: {stage.__module__}:{stage.__qualname__}"
    written = {name: i for i, other in enumerate(order) for name in other.writes}
    columns = {*index.SCHEMA.names, *(name for other in order for name in other.columns)}
    for kind, own, taken in (
        ("stage", [stage.name], {other.name for other in order}),
        ("array", stage.writes, written.keys()),
        ("column", stage.columns, columns),
    ):
        if wrong := [name for name in own if name in taken or not re.fullmatch("[a-z][a-z0-9_]*", name)]:
            way_out = "Choose another, of lower-case letters, digits and '_'."
            raise UserError(f"{field}: no {kind} from outside can be called {wrong[0]!r}.", way_out)
    if unknown := [name for name in stage.reads if name not in written]:
        raise UserError(f"{field} reads {unknown[0]!r}.", f"Arrays of this run: {', '.join(sorted(written))}.")
    write = len(order) - 1
    read = {name: i for i, other in enumerate(order) for name in other.reads}
    latest = min([write, *(read.get(name, write) for name in stage.reads)])
    place = max([1, latest, *(written[name] + 1 for name in stage.reads)])
    if stage.resources not in (order[place - 1].resources, order[place].resources, ""):
        raise UserError(f"{field} has the resources {stage.resources!r}.", "Leave them empty: its neighbour's.")
    return [*order[:place], stage, *order[place:]]
