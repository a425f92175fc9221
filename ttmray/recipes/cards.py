"""Model cards and dataset cards for the Hugging Face Hub, from what runs say about themselves.

A card holds facts only. What no run can know, such as the licence of the songs, stands under "To fill in". Paths and
bucket names are left out, because cards are made to be published.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ttmray import pages
from ttmray.console import console
from ttmray.corpus.scores import SCORES, protocols, table_names
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.results import Results, System, read_results
from ttmray.inventory import read_marker
from ttmray.models.backbone import BackboneConfig
from ttmray.models.backbone_weights import count_parameters
from ttmray.models.bundle import BUNDLES, FolderBundle, ReleasedBundle, base_name
from ttmray.models.cross_load import CROSS_LOAD, CrossLoad
from ttmray.models.weights import licences
from ttmray.ranker.job import HEAD, METRICS
from ttmray.recipes.published import SUB_1
from ttmray.runs import RUN
from ttmray.storage import Folder, split_path
from ttmray.training.checkpoint import newest_valid, read_state
from ttmray.training.export import inspect
from ttmray.training.launch import CHECKPOINTS

STAGES = {
    "sft": "supervised fine-tuning with flow matching",
    "crpo": "preference optimisation of flow matching on winner and loser clips (CRPO)",
}
RANKER = "ranker"
LABELS = {"fad": "FAD (CLAP)", "fad_inf": "FAD-inf", "kad": "KAD", "clap_score": "CLAP score", "ccs": "CCS"}
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))


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
    notes = [BUNDLES[bundle].note for bundle in bundles if _has_note(bundle)]
    if results and _has_note(results.bundle):
        notes.append(f"Evaluated with the {results.note}")
    steps, total = _progress(run), config["steps"]
    backbone = BackboneConfig(**identity["backbone"])
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
    return pages.render(
        "card_model.md.j2",
        front=front,
        name=name,
        notes=notes,
        inputs="a text" if backbone.head == "none" else "a text and a wished reward",
        facts=facts,
        corpora=[tuple(one[key] or "unknown" for key in ("name", "bundle", "clips", "protocol")) for one in corpora],
        config=identity["config"],
        results=results,
        measured=measured,
        metrics=_metrics(measured) if measured else [],
        published=[(LABELS.get(key, key), published.text) for key, published in SUB_1.items()],
        licences=_licences(bundles),
    )


def _ranker_card(run: Folder, described: Mapping[str, Any], name: str, license: str | None) -> str:
    if not run.exists(METRICS):
        raise UserError(f"{run} is not finished.", "A card says how good the ranker is: start its job again first.")
    metrics, head = run.read_json(METRICS), run.read_json(f"{HEAD}.json")
    config, bundle = described["identity"]["config"], base_name(described["config"]["bundle"])
    notes = [BUNDLES[bundle].note] if _has_note(bundle) else []
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
    return pages.render(
        "card_ranker.md.j2",
        front={"license": license or "other", "library_name": "ttmray", "tags": ["music", "preference-reward"]},
        name=name,
        notes=notes,
        facts=facts,
        config=config,
        resampled=metrics["run"]["intervals_resample"],
        tests=rows,
        licences=_licences([bundle]),
    )


def file_card(path: str | None, bundles: Sequence[str], *, name: str, license: str | None = None) -> str:
    """README.md of a weights file, or of a bundle's folder, of which nothing but its content is known.

    Args:
        path: the file; None for a folder.
        bundles: names of the bundles that it is used with.
        name, license: see `model_card`.

    Raises:
        UserError: no weights, or damaged ones.
    """
    facts: list[tuple[str, Any]] = []
    if path is not None:
        report = inspect(path)
        facts = [("kind", report["kind"]), ("model", report["model"]), ("parameters", f"{report['parameters']:,}")]
        facts += [(what, report[what]) for what in ("weights", "step", "samples") if report.get(what) is not None]
        facts += [("sha256", digest) for digest in report["sha256"].values()]
    front: dict[str, Any] = {"license": license or "other", "library_name": "ttmray", "tags": ["music"]}
    front |= {"pipeline_tag": "text-to-audio"}
    licences = _licences(bundles) if bundles else ["unknown: the file does not say what it was trained with"]
    return pages.render("card_file.md.j2", front=front, name=name, facts=facts, licences=licences)


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
    marker = read_marker(run)
    if marker is None:
        raise UserError(f"{run} is not finished.", "A card counts all clips: start its job again first.")
    summary = marker["summary"]
    config, bundle = described["identity"]["config"], base_name(described["config"]["bundle"])
    name = name or folder.rstrip("/").rpartition("/")[2]
    clips = summary["rows"]["ok"]
    notes = [described["note"]] if _has_note(bundle) else []
    heads = {name: protocol for name, protocol in protocols(run).items() if name}
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
    return pages.render(
        "card_dataset.md.j2",
        front=front,
        name=name,
        notes=notes,
        facts=facts,
        rewards=rewards,
        left_out=left_out,
        config=config,
        licences=_licences([bundle]),
    )


def _metrics(system: System) -> list[tuple[str, str, str, str]]:
    """Label, value, interval and N of every metric that has a value."""
    rows = []
    for key, metric in system.metrics.items():
        if metric.value is not None:
            interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4f} to {metric.high:.4f}"
            n = f"{metric.n_generated}" + (f" / {metric.n_reference}" if metric.n_reference else "")
            rows.append((LABELS.get(key, key.replace("_", " ")), f"{metric.value:.4f}", interval, n))
    return rows


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
    described = run.read_json(RUN)
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
    record = run.read_json(CROSS_LOAD)
    crossed = CrossLoad(record["weights"], record["forward"], record["forced"])
    share = record["forwards"][crossed.forward]["kept"]
    left = "" if share is None else f": {share:.0%} of the steering by the score was left before the first update"
    return [("cross-load", f"{crossed}{left}")]


def _progress(run: Folder) -> int:
    """Updates of the finished run, else of its newest checkpoint; 0 before the first."""
    if (marker := read_marker(run)) is not None:
        return int(marker["steps"])
    folder = run.sub(CHECKPOINTS)
    name = newest_valid(folder)
    return int(read_state(folder.sub(name))["step"]) if name else 0


def _reward_rows(run: Folder, summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(split, column, statistics) of the corpus's own rewards and of its tables of scores."""
    by_prefix = {"": summary["rewards"]}
    by_prefix |= {f"{name}/": run.read_json(f"{SCORES}/{name}/stats.json")["splits"] for name in table_names(run)}
    for prefix, splits in by_prefix.items():
        for split, values in splits.items():
            yield from ((split, f"{prefix}{column}", values) for column in values if column != "clips")


def _corpus(address: str, column: str | None) -> dict[str, str]:
    """What a card says about a corpus; empty where the corpus is gone or says nothing.

    Args:
        column: the score column that was read; its protocol may be that of a table.
    """
    run = Folder.at(address)
    facts = dict.fromkeys(("bundle", "clips", "protocol"), "") | {"name": run.name}
    if run.exists(RUN):
        described = run.read_json(RUN)
        facts["bundle"] = base_name(str(described.get("config", {}).get("bundle", "")))
        table = (column or "").rpartition("/")[0]
        of_table = f"{SCORES}/{table}/{RUN}"
        scored = run.read_json(of_table) if table and run.exists(of_table) else described
        facts["protocol"] = str(scored.get("protocol_id", "")) if column else "no score is read"
    if (marker := read_marker(run)) is not None:
        rows = marker.get("summary", {}).get("rows", {})
        facts["clips"] = str(rows.get("ok", ""))
    return facts


def _has_note(bundle: str) -> bool:
    return bundle in BUNDLES and not isinstance(BUNDLES[bundle], ReleasedBundle)


def _licences(bundles: Sequence[str]) -> list[str]:
    lines = []
    for bundle in bundles:
        if isinstance(BUNDLES.get(bundle), ReleasedBundle):
            lines += [f"{bundle}: {line}" for line in licences(bundle)]
        elif isinstance(BUNDLES.get(bundle), FolderBundle):
            lines.append(f"{bundle}: Apache-2.0, as ttmray")
        elif bundle in BUNDLES:
            lines.append(f"{bundle}: weights are drawn from a seed and have no licence")
        else:
            lines.append(f"{bundle}: unknown to this version of ttmray")
    return lines or ["unknown: the corpora are not there any more"]
