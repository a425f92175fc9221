"""Model cards and dataset cards for the Hugging Face Hub, from what runs say about themselves.

A card holds facts only. What no run can know, such as the licence of the songs, stands under "To fill in". Paths and
bucket names are left out, because cards are made to be published.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from ttmray.console import console
from ttmray.corpus.scores import SCORES, table_names
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.results import Results, System, read_results
from ttmray.models.backbone import BackboneConfig
from ttmray.models.backbone_weights import count_parameters
from ttmray.models.bundle import BUNDLES, ReleasedBundle, base_name
from ttmray.models.cross_load import CROSS_LOAD, CrossLoad
from ttmray.models.weights import licences
from ttmray.ranker.job import HEAD, METRICS
from ttmray.recipes.published import SUB_1
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder, split_path
from ttmray.training.checkpoint import newest_valid, read_state
from ttmray.training.launch import CHECKPOINTS

STAGES = {
    "sft": "supervised fine-tuning with flow matching",
    "crpo": "preference optimisation of flow matching on winner and loser clips (CRPO)",
}
RANKER = "ranker"
PAPER = "*Improving Text-to-Music Generation with Human Preference Rewards*, arXiv 2606.21670"
LABELS = {"fad": "FAD (CLAP)", "fad_inf": "FAD-inf", "kad": "KAD", "clap_score": "CLAP score", "ccs": "CCS"}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def write_card(
    kind: str,
    folder: str,
    *,
    out: str | None = None,
    name: str | None = None,
    evaluation: str | None = None,
    system: str | None = None,
    license: str | None = None,
) -> int:
    """`ttmray card model|dataset RUN`: write the card, or print it where `out` is None.

    Raises:
        UserError: see `model_card` and `dataset_card`; `out` exists.
    """
    if kind == "model":
        text = model_card(folder, name=name, evaluation=evaluation, system=system, license=license)
    else:
        text = dataset_card(folder, name=name, license=license)
    if out is None:
        console.print(text, markup=False)
        return EXIT_OK
    target, file = split_path(out)
    if not target.create(file, text.encode()):
        raise UserError(f"{out} exists.", "Cards are edited by hand: delete it to have it written once more.")
    console.print(f"{out}: see the end of it for what is left to fill in", markup=False)
    return EXIT_OK


def model_card(
    folder: str,
    *,
    name: str | None = None,
    evaluation: str | None = None,
    system: str | None = None,
    license: str | None = None,
) -> str:
    """README.md of a trained model: a music model of Stage 1 or 3, or a ranker.

    Args:
        folder: run folder of a training job.
        name: title; default the folder's name.
        evaluation: output of `ttmray evaluate` with clips of this model.
        system: which of its systems they are; needed where there are several.
        license: SPDX identifier for the front matter; default `other`.

    Raises:
        UserError: no training run, no evaluation, or no such system; a ranker that is not finished, or one with an
            evaluation.
    """
    run = Folder.at(folder)
    described = _described(run, (*STAGES, RANKER), "training run")
    name = name or folder.rstrip("/").rpartition("/")[2]
    if described["kind"] == RANKER:
        if evaluation is not None:
            raise UserError(f"{run} is a ranker, which makes no clips.", "Leave --evaluation out.")
        return _ranker_card(run, described, name, license)
    identity, config = described["identity"], described["config"]
    corpora = [_corpus(source["corpus"], source["score_column"]) for source in config["data"]["sources"]]
    bundles = [bundle for bundle in dict.fromkeys(corpus["bundle"] for corpus in corpora) if bundle]
    results = measured = None
    if evaluation is not None:
        results = read_results(Folder.at(evaluation))
        measured = _system(results, system)
    notes = [BUNDLES[bundle].note for bundle in bundles if _is_debug(bundle)]
    if results and _is_debug(results.bundle):
        notes.append(f"Evaluated with the {results.note}")
    measured_by = results.license_notes if results else ()
    steps, total = _progress(run), config["steps"]
    backbone = BackboneConfig(**identity["backbone"])
    inputs = "a text" if backbone.head == "none" else "a text and a wished reward"
    parameters = sum(trainable for _, trainable, _ in count_parameters(backbone))
    facts = [
        ("stage", STAGES[described["kind"]]),
        ("backbone", f"FluxAudio, {backbone.hidden} wide, {backbone.depth} blocks, score head {backbone.head}"),
        ("trainable weights", f"{parameters:,}"),
        ("started from", identity["init"]),
        *_cross_load(run),
        ("updates", f"{steps:,} of {total:,}" + ("" if steps == total else ", NOT FINISHED")),
        ("samples", f"{steps * config['batch']:,} ({config['batch']} per update)"),
        ("data fingerprint", identity["data"]),
        *_origin(described),
    ]
    front: dict[str, Any] = {
        "license": license or "other",
        "library_name": "ttmray",
        "pipeline_tag": "text-to-audio",
        "tags": ["music", "text-to-music", "flow-matching"],
    }
    if results and measured:
        front["model-index"] = [_index(name, results, measured)]
    parts = [
        _front(front),
        f"# {_text(name)}",
        _warning(notes),
        f"A text-to-music model that was trained with ttmray. It makes short clips of music from {inputs}.",
        "## Intended use",
        "Research on text-to-music generation and on learning from human preference. It is not meant to imitate "
        "living artists, to be used without a check for copies of training songs, or for anything that the licences "
        "below exclude.",
        "## Training",
        _table(("what", "value"), facts),
        "### Data",
        _table(
            ("corpus", "bundle", "clips ok", "scores by"),
            [
                (c["name"], c["bundle"] or "unknown", c["clips"] or "unknown", c["protocol"] or "unknown")
                for c in corpora
            ],
        ),
        "### Config",
        _yaml(identity["config"]),
        "## Evaluation",
        *_evaluation(results, measured),
        "## Limits",
        _bullets(
            [
                *notes,
                "Rewards come from a ranker trained on differences: compare them under one protocol, not with zero.",
                "A model that optimises a reward can exploit it; the reward is no independent measure of its quality.",
                "Captions, songs and rewards carry the biases of their sources; vocals are not modelled.",
                *(() if results else ("It has not been evaluated: nothing is known about its quality.",)),
            ]
        ),
        "## Licences",
        "Models that made the training data, and that are needed to hear the result:",
        _licences(bundles),
        *(("Models that made the numbers of the evaluation:", _bullets(measured_by)) if measured_by else ()),
        "## To fill in",
        _bullets(
            [
                "the licence of these weights, which must respect those above and that of the songs",
                "the licence and origin of the songs, and of their captions",
                "who trained it, and how to reach them",
            ]
        ),
    ]
    return _joined(parts)


def _ranker_card(run: Folder, described: Mapping[str, Any], name: str, license: str | None) -> str:
    if not run.exists(METRICS):
        raise UserError(f"{run} is not finished.", "A card says how good the ranker is: start its job again first.")
    metrics, head = _json(run, METRICS), _json(run, f"{HEAD}.json")
    config, bundle = described["identity"]["config"], base_name(described["config"]["bundle"])
    notes = [BUNDLES[bundle].note] if _is_debug(bundle) else []
    published = f"{head['variant']}-seed{head['seed']}"
    facts = [
        ("published head", published),
        ("inputs", metrics["heads"][published]["inputs"]),
        ("best epoch", head["best_epoch"]),
        ("temperature", f"{head['temperature']:.4f}"),
        ("scores of its training clips", f"mean {head['score_mean']:+.4f}, sd {head['score_sd']:.4f}"),
        ("scores by", head["protocol"]),
        ("sources of votes", ", ".join(source["name"] for source in config["sources"])),
        ("pairs", f"by {metrics['run']['split']}; {metrics['run']['pairs_left_out']} left out"),
        ("pairs fingerprint", described["identity"]["pairs"]),
        *_origin(described),
    ]
    tests = [(key, one["inputs"], "all", one["test"]) for key, one in metrics["heads"].items()]
    tests += [
        (key, one["inputs"], source, part)
        for key, one in metrics["heads"].items()
        for source, part in one["test"]["sources"].items()
    ]
    rows = [
        (key, inputs, source, part["decided"], f"{part['accuracy']:.4f}", "{:.4f} to {:.4f}".format(*part["interval"]))
        for key, inputs, source, part in tests
        if part["decided"]
    ]
    parts = [
        _front({"license": license or "other", "library_name": "ttmray", "tags": ["music", "preference-reward"]}),
        f"# {_text(name)}",
        _warning(notes),
        "A ranker of music clips that was trained with ttmray on votes between pairs of clips: of two clips it gives "
        "the one that is likelier to be preferred the higher score.",
        "## Intended use",
        "Ranking clips of one prompt, and as the reward of text-to-music models. It is no judge of artists or of whole "
        "songs.",
        "## Training",
        _table(("what", "value"), facts),
        "### Config",
        _yaml(config),
        "## Evaluation",
        f"Share of the decided pairs of the test split that are ranked as voted; intervals at 95 % resample by "
        f"{_text(metrics['run']['intervals_resample'])}.",
        _table(("head", "inputs", "source", "decided pairs", "accuracy", "95 % interval"), rows)
        if rows
        else "No pair of the test split is decided: nothing is known about its quality.",
        "## Limits",
        _bullets(
            [
                *notes,
                "It is trained on differences: compare scores under one protocol, not with zero.",
                "A model that is optimised for its score can exploit it; the score is then no measure of quality.",
                "It carries the tastes of those who voted, and the biases of the clips that they heard.",
            ]
        ),
        "## Licences",
        "Models that it reads clips and texts with:",
        _licences([bundle]),
        "## To fill in",
        _bullets(
            [
                "the licence of these weights, which must respect those above and that of the votes",
                "the origin and licence of votes and clips, who voted, and what they were asked",
                "who trained it, and how to reach them",
            ]
        ),
    ]
    return _joined(parts)


def dataset_card(folder: str, *, name: str | None = None, license: str | None = None) -> str:
    """README.md of a finished corpus.

    Args:
        folder: run folder of the corpus job.
        name, license: see `model_card`.

    Raises:
        UserError: no corpus run, or one that is not finished.
    """
    run = Folder.at(folder)
    described = _described(run, ("corpus",), "corpus run")
    if not run.exists(SUCCESS):
        raise UserError(f"{run} is not finished.", "A card counts all clips: start its job again first.")
    summary = _json(run, SUCCESS)["summary"]
    config, bundle = described["identity"]["config"], base_name(described["config"]["bundle"])
    name = name or folder.rstrip("/").rpartition("/")[2]
    clips = summary["rows"]["ok"]
    notes = [described["note"]] if _is_debug(bundle) else []
    heads = {table: _json(run, f"{SCORES}/{table}/{RUN}")["protocol_id"] for table in table_names(run)}
    audio = config["keep_audio"]
    front = {
        "license": license or "other",
        "pretty_name": name,
        "task_categories": ["text-to-audio"],
        "tags": ["music", "webdataset", "latents", "preference-reward"],
        "size_categories": [next((label for limit, label in SIZES if clips < limit), "10M<n<100M")],
        "configs": [{"config_name": "default", "data_files": "shards/*.tar"}],
    }
    facts = [
        ("clips", f"{clips:,} of up to {config['segments']['clip_s']:g} s, from {summary['tracks']:,} tracks"),
        ("splits", ", ".join(f"{split} {count:,}" for split, count in summary["splits"].items())),
        ("captions", f"{summary['captions']:,} distinct"),
        ("size", f"{summary['bytes'] / 1e6:,.1f} MB"),
        ("audio", "instrumentals, mono 16-bit FLAC" if audio else "none; latents from which a VAE makes audio"),
        ("scores by", described["protocol_id"]),
        *((f"scores `{table}` by", protocol) for table, protocol in heads.items()),
        ("catalogue fingerprint", described["identity"]["catalogue"]),
        *_origin(described),
    ]
    left_out = [(r["status"], r["stage"], r["reason"], r["count"]) for r in summary["reasons"]]
    rewards = [
        (
            split,
            column,
            values["clips"],
            *(f"{values[column.rpartition('/')[2]][key]:+.3f}" for key in ("mean", "std", "p5", "p95", "max")),
        )
        for split, column, values in _reward_rows(run, summary)
    ]
    parts = [
        _front(front),
        f"# {_text(name)}",
        _warning(notes),
        "Clips of songs, with vocals removed, as VAE latents with captions, text features, embeddings and rewards: "
        "training data of a reward-conditioned text-to-music model, made with ttmray.",
        _table(("what", "value"), facts),
        "## Intended use",
        "Training and studying text-to-music models and preference rewards. Latents can be turned back into audible "
        "music: treat them like the songs themselves.",
        "## Format",
        "WebDataset shards with one sample per clip, an index in Parquet (`index.parquet`, a row per clip with scores, "
        "loudness and source), and text features per caption. Every field is described in ttmray's "
        "`docs/data-formats.md`.",
        "## Rewards",
        _table(("split", "column", "clips", "mean", "std", "p5", "p95", "max"), rewards),
        "## What was left out",
        _table(("status", "stage", "reason", "count"), left_out) if left_out else "Nothing.",
        "## Config",
        _yaml(config),
        "## Limits",
        _bullets(
            [
                *notes,
                "Vocals are removed by a separator, which leaves traces and takes some of the music.",
                "Scores are a model's, of 10 s clips under one protocol; they are no human votes on these songs.",
                "Splits are drawn by "
                + ("artist." if config["splits"]["group_by_artist"] else "track: an artist may be in several."),
            ]
        ),
        "## Licences",
        "Models that made latents, features and scores:",
        _licences([bundle]),
        "## To fill in",
        _bullets(
            [
                "the licence and origin of the songs, which decide whether this may be shared",
                "who made the captions, and how",
            ]
        ),
    ]
    return _joined(parts)


def _evaluation(results: Results | None, system: System | None) -> Iterable[str]:
    if results is None or system is None:
        yield "None yet. `ttmray evaluate` measures clips of this model; give its output to `ttmray card`."
        return
    rows = []
    for key, metric in system.metrics.items():
        if metric.value is not None:
            interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4f} to {metric.high:.4f}"
            n = f"{metric.n_generated}" + (f" / {metric.n_reference}" if metric.n_reference else "")
            rows.append((LABELS.get(key, key.replace("_", " ")), f"{metric.value:.4f}", interval, n))
    yield (
        f"Measured by us: {system.clips} clips of {system.prompts} prompts, {results.created[:10]}, system "
        f"{_text(system.name)}. Protocol: {_text(results.protocol)}."
    )
    yield _table(("metric", "value", "95 % interval", "N generated / reference"), rows)
    if results.warnings:
        yield _bullets(results.warnings)
    yield (
        f"Published by others, not measured by us: the paper behind this pipeline ({PAPER}) reports for its submission "
        "Sub.1, on 100 prompts of the Song Describer Dataset against the reference SDD-706:"
    )
    yield _table(("metric", "paper"), [(LABELS.get(key, key), published.text) for key, published in SUB_1.items()])
    yield "The two tables can be compared only where prompts, reference, weights of the encoders and N are the same."


def _index(name: str, results: Results, system: System) -> dict[str, Any]:
    reference = (results.reference or {}).get("name")
    metrics = [
        {"type": key, "name": LABELS.get(key, key), "value": round(metric.value, 6)}
        for key, metric in system.metrics.items()
        if metric.value is not None
    ]
    dataset = {"name": str(reference or f"{system.prompts} prompts"), "type": "custom"}
    return {"name": name, "results": [{"task": {"type": "text-to-audio"}, "dataset": dataset, "metrics": metrics}]}


def _system(results: Results, name: str | None) -> System:
    names = [system.name for system in results.systems]
    if name is None and len(names) != 1:
        raise UserError(f"the evaluation has {len(names)} systems.", f"Name the model's: --system {'|'.join(names)}")
    for system in results.systems:
        if name in (None, system.name):
            return system
    raise UserError(f"the evaluation has no system {name!r}.", f"Systems: {', '.join(names)}.")


def _described(run: Folder, kinds: tuple[str, ...], what: str) -> dict[str, Any]:
    if not run.exists(RUN):
        raise UserError(f"{run} is no {what}: it has no {RUN}.", f"Give the output folder of a {what}.")
    described = _json(run, RUN)
    if described.get("kind") not in kinds:
        raise UserError(f"{run} is a run of kind {described.get('kind')!r}, no {what}.", f"Kinds: {', '.join(kinds)}.")
    return described


def _origin(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of facts that every run has."""
    return [
        ("run fingerprint", described["fingerprint"]),
        ("created", described["created"]),
        ("versions", ", ".join(f"{key} {value}" for key, value in described["versions"].items())),
    ]


def _cross_load(run: Folder) -> list[tuple[str, Any]]:
    """What became of the score where a run started in another forward than that of its weights."""
    if not run.exists(CROSS_LOAD):
        return []
    found = _json(run, CROSS_LOAD)
    crossed = CrossLoad(found["weights"], found["forward"], found["forced"])
    kept = found["forwards"][crossed.forward]["kept"]
    left = "" if kept is None else f": {kept:.0%} of the steering by the score was left before the first update"
    return [("cross-load", f"{crossed}{left}")]


def _json(run: Folder, name: str) -> dict[str, Any]:
    try:
        found = json.loads(run.read(name))
    except ValueError as error:
        raise UserError(f"{run.path(name)} cannot be read: {error}", "Restore it, or make the run again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{run.path(name)} is no JSON object.", "Restore it, or make the run again.")
    return found


def _progress(run: Folder) -> int:
    """Updates of the finished run, else of its newest checkpoint; 0 before the first."""
    if run.exists(SUCCESS):
        return int(_json(run, SUCCESS)["steps"])
    folder = run.sub(CHECKPOINTS)
    name = newest_valid(folder)
    return int(read_state(folder.sub(name))["step"]) if name else 0


def _reward_rows(run: Folder, summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(split, column, statistics) of the corpus's own rewards and of its tables of scores."""
    found = {"": summary["rewards"]}
    found |= {f"{name}/": _json(run, f"{SCORES}/{name}/stats.json")["splits"] for name in table_names(run)}
    for prefix, splits in found.items():
        for split, values in splits.items():
            yield from ((split, f"{prefix}{column}", values) for column in values if column != "clips")


def _corpus(address: str, column: str | None) -> dict[str, str]:
    """What a card says about a corpus; empty where the corpus is gone or says nothing.

    Args:
        column: the score column that was read; its protocol may be that of a table.
    """
    run = Folder.at(address)
    facts = dict.fromkeys(("bundle", "clips", "protocol"), "") | {"name": run.uri.rpartition("/")[2]}
    if run.exists(RUN):
        described = _json(run, RUN)
        facts["bundle"] = base_name(str(described.get("config", {}).get("bundle", "")))
        table = (column or "").rpartition("/")[0]
        scored = _json(run, f"{SCORES}/{table}/{RUN}") if table and run.exists(f"{SCORES}/{table}/{RUN}") else described
        facts["protocol"] = str(scored.get("protocol_id", "")) if column else "no score is read"
    if run.exists(SUCCESS):
        rows = _json(run, SUCCESS).get("summary", {}).get("rows", {})
        facts["clips"] = str(rows.get("ok", ""))
    return facts


def _is_debug(bundle: str) -> bool:
    return bundle in BUNDLES and not isinstance(BUNDLES[bundle], ReleasedBundle)


def _licences(bundles: Sequence[str]) -> str:
    lines = []
    for bundle in bundles:
        if isinstance(BUNDLES.get(bundle), ReleasedBundle):
            lines += [f"{bundle}: {line}" for line in licences(bundle)]
        elif bundle in BUNDLES:
            lines.append(f"{bundle}: weights are drawn from a seed and have no licence")
        else:
            lines.append(f"{bundle}: unknown to this version of ttmray")
    return _bullets(lines or ["unknown: the corpora are not there any more"])


def _warning(notes: Sequence[str]) -> str:
    return "\n>\n".join(f"> **{_text(note)}**" for note in dict.fromkeys(notes))


def _front(values: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---"


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text}{fence}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in dict.fromkeys(lines))


def _text(value: Any) -> str:
    """Any value as one line of Markdown that shows it as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
