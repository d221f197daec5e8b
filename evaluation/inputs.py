"""Inspects a model's inputs: prompts, token counts and norms for a few texts of each task."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.encoder import MTEBEncoder, log
from evaluation.plots import plot_lengths, plot_norms
from evaluation.run import check_settings
from saving_utils import write_json


class _Enough(Exception):
    """Stops a task once its texts have been collected."""


class TextCollector:
    """An mteb encoder that collects texts, and stops the task once it has seen every side."""

    def __init__(self, sides: set, mteb_model_meta):
        self.sides, self.mteb_model_meta = sides, mteb_model_meta
        self.texts: dict[str | None, list[str]] = {}

    def encode(self, inputs, *, task_metadata, hf_split=None, hf_subset=None, prompt_type=None, **kwargs):
        import numpy as np

        side = None if prompt_type is None else prompt_type.value
        self.texts[side] = [text for batch in inputs for text in batch["text"]]
        if self.sides <= set(self.texts):
            raise _Enough
        return np.ones((len(self.texts[side]), 2), dtype=np.float32)

    def similarity(self, embeddings1, embeddings2):
        raise NotImplementedError("Only collects texts.")

    similarity_pairwise = similarity


def collect_texts(task, sides: Sequence[str | None], encoder: MTEBEncoder) -> dict[str | None, list[str]]:
    """The texts that mteb passes to a model, per side; for an aggregate, those of its first part."""
    leaf = task.leaves()[0]
    collector = TextCollector(set(sides), encoder.mteb_model_meta)
    try:
        leaf.evaluate(
            collector, leaf.eval_splits[0], subsets_to_run=list(leaf.hf_subsets)[:1], encode_kwargs={"batch_size": 256}
        )
    except _Enough:
        return collector.texts
    finally:
        leaf.unload_data()
    raise ValueError(f"{task.name} gave texts of {set(collector.texts)}, expected {set(sides)}.")


def prompts_of(encoder: MTEBEncoder, tasks: Sequence) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields task, side, and what the model reads for that side's first text."""
    for task in tasks:
        sides = ("query", "document") if task.type in ("Retrieval", "Reranking") else (None,)
        texts = collect_texts(task, sides, encoder)
        for side in sides:
            instruction, examples = encoder.prompt(task.leaves()[0].metadata, side)
            yield task.name, side or "text", encoder.backend.describe(texts[side][0], instruction, examples)


def print_prompts(encoder: MTEBEncoder, tasks: Sequence) -> None:
    for name, side, described in prompts_of(encoder, tasks):
        for reader, text in described.items():
            print(f"{name}, {side}, {reader} reads:\n{text}\n")


def analyze(encoder: MTEBEncoder, tasks: Sequence, output: str | Path, count: int) -> dict[str, dict]:
    """
    Figures 5 and 6 of the paper, over `count` texts of each task: queries, or any texts of a symmetric task.

    Returns:
        `lengths` and `norms`, each task -> numbers; also written as JSON, with a PNG of each.

    Raises:
        ValueError: `output` holds results of another model or setting.
    """
    import numpy as np

    output, lengths, norms = Path(output), {}, {}
    check_settings(output, encoder.settings)
    for task in tasks:
        side = "query" if task.type in ("Retrieval", "Reranking") else None
        metadata = task.leaves()[0].metadata
        texts = sorted(set(collect_texts(task, [side], encoder)[side]))
        texts = random.Random(task.name).sample(texts, min(count, len(texts)))
        instruction, examples = encoder.prompt(metadata, side)

        def mean_length(examples, texts=texts, instruction=instruction) -> float:
            rows = [encoder.backend.rows([text], instruction, examples)["attention_mask"] for text in texts]
            return float(np.mean([row.sum() for row in rows]))

        lengths[task.name] = {"texts": len(texts), "without_examples": mean_length(None)}
        if encoder.examples_for.table:
            lengths[task.name] |= {"with_examples": mean_length(examples), "examples": len(examples or ())}
        config = encoder.backend.model.config
        if encoder.settings["pooling"] == "contextual_eos" and config.pooling == "concat" and config.baseline is None:
            vectors = encoder.backend.model.encode(
                texts, instruction=instruction, batch_size=encoder.batch_size, normalize_embeddings=False
            )
            states = zip(("contextual", "eos"), encoder.backend.model.split_states(vectors))
            norms[task.name] = {name: float(np.linalg.norm(state, axis=-1).mean()) for name, state in states}
        log(f"{task.name}: {lengths[task.name]} {norms.get(task.name, '')}")

    write_json(output / "lengths.json", lengths)
    plot_lengths(lengths, output / "lengths.png")
    if norms:
        write_json(output / "norms.json", norms)
        plot_norms(norms, output / "norms.png")
    return {"lengths": lengths, "norms": norms}
