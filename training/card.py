"""The model card that a trained folder carries: what it is, how to use it, and the facts of its run and its evaluation.

    python -m training.card runs/mine/model --license apache-2.0 --results results/mine
    python -m training.card . --hashes                  # of a card that people wrote: only its SHA-256 rows

`train.py` writes the card of each folder that it leaves; this command writes it again with what only people know (the
licence) or only an evaluation knows (scores). Invariant: every number in a card comes from a file that a run wrote.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from configuration_causal2vec import Causal2VecConfig
from saving_utils import (
    EVAL_RESULTS,
    LIBRARY,
    PIPELINE_TAG,
    TAGS,
    card_sections,
    is_hub_id,
    read_json,
    refresh_hashes,
    write_text,
)
from training.data import SUFFIXES


TEMPLATE = """
# {name}

{use}{adapter}
## Training

{steps} steps of {global_batch_size} rows, temperature {temperature}, peak learning rate {learning_rate}, seed {seed};
{trained}. Final loss {final_loss:.4f}. All
arguments and the log are in `training.json`.

| dataset | from | rows | per epoch | licence | instructions |
|---|---|---|---|---|---|
{datasets}

{results}## Limits

{limits} {truncation} {licence}

## Code and pinning

{code}
"""

ADAPTER = """
This folder holds an adapter alone and needs `peft`: `AutoModel` loads the model that `adapter_config.json` names and puts
the adapter on it; so does `PeftModel.from_pretrained(base, "path or id")` for a `base` that is loaded already.
"""


def write_card(
    folder: str | Path,
    facts: dict,
    model,
    name: str,
    licence: str | None = None,
    base_models: tuple[str, ...] = (),
    results: str | Path | None = None,
) -> None:
    """
    Renders the card of a run into `folder/README.md`.

    Args:
        facts (`dict`): The contents of the run's training.json.
        model: What has the `config` of the trained model.
        licence (`str`, *optional*): The Hub's identifier of the weights' licence.
        base_models (tuple of `str`): Hub ids of the backbones, where the run had them as folders.
        results (`str` or `Path`, *optional*): The output folder of eval_mteb.py.
    """
    from huggingface_hub import ModelCard, ModelCardData

    arguments, plan, config = facts["arguments"], facts["plan"], model.config
    towers = ("encoder", "decoder") if config.has_encoder else ("decoder",)
    scores = [] if results is None else eval_results(results)
    sources = [source(d.get("path")) for d in plan["datasets"]]
    data = ModelCardData(
        license=licence,
        language="en" if scores else None,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *(["mteb"] if any(score.dataset_type.startswith("mteb/") for score in scores) else [])],
        base_model=[*base_models] or [i for i in map(arguments.get, (*towers, "model")) if is_hub_id(i)] or None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        model_name=name,
        eval_results=scores or None,
    )
    names = {
        tower: f"`{shown(arguments[tower])}`" if arguments[tower] else f"the {tower} of `{shown(arguments['model'])}`"
        for tower in towers
    }
    trained = ", ".join(f"{tower}: {arguments[f'train_{tower}']}" for tower in reversed(towers))
    text = TEMPLATE.format(
        name=name,
        adapter=ADAPTER if Path(folder, "adapter_config.json").is_file() else "",
        steps=facts["steps"],
        global_batch_size=plan["global_batch_size"],
        final_loss=facts["final_loss"],
        datasets="\n".join(map(dataset_row, plan["datasets"], sources)),
        results=results_table(scores),
        truncation=truncation(arguments.get("matryoshka_dims")),
        licence="The weights carry the licences of their base models and of the training data; see there before use.",
        trained=trained,
        **card_sections(folder, config, names.get("encoder"), names["decoder"], plan["datasets"][0]["instructions"][0]),
        **{key: arguments[key] for key in ("temperature", "learning_rate", "seed")},
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(folder) / "README.md")


def eval_results(folder: str | Path) -> list:
    """Each finished task of an evaluation as the Hub's EvalResult: the task's main score, times 100."""
    from huggingface_hub import EvalResult

    from evaluation.report import read_run

    run = read_run(folder)
    return [
        EvalResult(
            task_type=run.types[task],
            dataset_type=f"mteb/{task}" if task in run.scores else task,
            dataset_name=f"MTEB {task}" if task in run.scores else task,
            dataset_split=", ".join(run.records[task]["splits"]),
            dataset_revision=run.records[task]["data"],
            metric_type=run.records[task]["main_score"],
            metric_value=round(score, 4),
        )
        for task, score in {**run.scores, **run.other}.items()
    ]


def write_eval_results(folder: str | Path, results: str | Path) -> tuple[list[str], list[str]]:
    """
    Writes `.eval_results/TASK.yaml` by mteb's own converter: a task's scores as entries of its data set on the Hub, for the
    leaderboard there. Those that were in the folder go.

    Returns:
        The tasks that were written, and those that were not: their data was a local copy, not the Hub's at the revision that
        mteb names, or they are not mteb's.

    Raises:
        ImportError: mteb is not installed.
    """
    try:
        import mteb
        from mteb.results import TaskResult
    except ImportError as error:
        raise ImportError("Scores for the Hub are written by mteb: pip install mteb") from error

    from evaluation.report import read_run

    run, target = read_run(results), Path(folder, EVAL_RESULTS)
    for file in target.glob("*.yaml"):
        file.unlink()
    written = []
    for task in run.scores:
        result = TaskResult.from_disk(Path(results, run.records[task]["result"]))
        if result.dataset_revision == mteb.get_task(task).metadata.dataset["revision"]:
            write_text(target / f"{task}.yaml", result._to_hf_benchmark_result().to_yaml())
            written.append(task)
    return written, [task for task in run.records if task not in written]


def results_table(scores: list) -> str:
    """A section with one row per result; nothing without any."""
    if not scores:
        return ""
    rows = [f"| {r.dataset_name} | {r.task_type} | {r.metric_type} | {r.metric_value:.2f} |" for r in scores]
    return "\n".join(["## Results", "", "| dataset | task | metric | score |", "|---|---|---|---|", *rows, "", ""])


def dataset_row(dataset: dict, origin: str) -> str:
    counts = [f"{dataset[key]:,}" if key in dataset else "streamed" for key in ("rows", "rows_per_epoch")]
    licence = dataset.get("license") or "licence not recorded"
    return f"| {' | '.join([dataset['name'], origin, *counts, licence, '; '.join(dataset['instructions'])])} |"


def truncation(dims: list[int] | None) -> str:
    """What may be expected of `truncate_dim`."""
    if dims:
        return f"`truncate_dim` was trained for {', '.join(map(str, sorted(dims)))} numbers."
    return "`truncate_dim` works, but shorter vectors were not trained for."


def source(path: str | None) -> str:
    """Where a dataset came from, as a card shows it: a Hub id, or a file's name."""
    if path is None:
        return "not recorded"
    return Path(path).name if path.endswith(SUFFIXES) else path


def shown(name: str | None) -> str | None:
    """A name as a card shows it: of a folder, only the last part, because the rest belongs to one machine."""
    return name if name is None or is_hub_id(name) else Path(name).resolve().name


def without_machine_paths(value):
    """A copy of JSON facts in which each absolute path is cut to its last part."""
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.card", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a model folder, such as train.py leaves")
    parser.add_argument("--name", help="title of the card (default: the folder's name)")
    parser.add_argument("--license", help="the Hub's identifier of the weights' licence, such as apache-2.0")
    parser.add_argument(
        "--base_model", nargs="+", default=[], help="Hub ids of the backbones, where the run had folders"
    )
    parser.add_argument("--results", type=Path, help="output folder of eval_mteb.py")
    parser.add_argument("--hashes", action="store_true", help="only bring the card's SHA-256 rows up to date")
    args = parser.parse_args(argv)
    if args.hashes:
        return refresh_hashes(args.folder)
    facts = args.folder / "training.json"
    if not facts.is_file():
        parser.error(f"{args.folder} has no training.json; is it a folder that train.py left?")

    facts = read_json(facts)
    trained = SimpleNamespace(config=Causal2VecConfig.from_pretrained(args.folder))
    name = args.name or args.folder.resolve().name
    write_card(args.folder, facts, trained, name, args.license, tuple(args.base_model), args.results)
    if args.results is not None:
        written, local = write_eval_results(args.folder, args.results)
        print(
            f"Scores of {len(written)} tasks are in {EVAL_RESULTS}, {len(local)} on data that is not the Hub's are not."
        )


if __name__ == "__main__":
    main()
