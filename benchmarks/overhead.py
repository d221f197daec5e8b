"""What Causal2Vec itself costs beside its two towers: processor time of one `encode` batch and of one training step.

    python -m benchmarks.overhead                            # bases/, which `make bases` makes
    python -m benchmarks.overhead --decoder bases/gemma-3-270m

Everything runs on one thread, and time is that thread's own, so that other work on the machine does not count. `towers` is
the time inside the forward passes of encoder, projector and decoder, `rest` everything else: tensors put in place, what is
kept of a prefix, checks that nothing changed. A training step is the recipe's (LoRA on both towers), its forward pass and
loss alone, since the backward pass is torch's. Medians; --output gets them as JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from saving_utils import write_json


ROOT = Path(__file__).resolve().parent.parent

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Towers:
    """Adds up the time that a model spends inside its encoder, projector and decoder."""

    def __init__(self, model):
        self.seconds = self._started = 0.0
        for part in (model.encoder, model.projector, model.decoder):
            part.register_forward_pre_hook(self._start)
            part.register_forward_hook(self._stop)

    def _start(self, module, args):
        self._started = time.thread_time()

    def _stop(self, module, args, output):
        self.seconds += time.thread_time() - self._started


def measure(run, towers: Towers, repeats: int) -> dict[str, float]:
    """Medians in milliseconds after one run that warms up."""
    run()
    rows = []
    for _ in range(repeats):
        towers.seconds, started = 0.0, time.thread_time()
        run()
        rows.append((time.thread_time() - started, towers.seconds))
    rest = statistics.median(total - inside for total, inside in rows)
    return {"towers_ms": 1e3 * statistics.median(inside for _, inside in rows), "rest_ms": 1e3 * rest}


def main(argv: list[str] | None = None) -> dict:
    from modeling_causal2vec import Causal2VecModel
    from training.arguments import ModelArguments
    from training.losses import InfoNCE
    from training.model import choose_parameters

    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", default=str(ROOT / "bases" / "all-MiniLM-L6-v2"))
    parser.add_argument("--decoder", default=str(ROOT / "bases" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    texts = [f"text number {i} about one thing" for i in range(args.rows)]
    model = Causal2VecModel.from_encoder_decoder_pretrained(args.encoder, args.decoder, dtype="float32")
    towers = Towers(model)
    results = {"encode": measure(lambda: model.encode(texts, instruction=INSTRUCTION), towers, args.repeats)}

    peft_model = choose_parameters(model, ModelArguments(train_decoder="lora", train_encoder="lora")).train()
    queries, documents = (
        dict(model.processor(texts, instruction, return_prefix_ids=True)) for instruction in (INSTRUCTION, None)
    )
    loss, ids = InfoNCE(), torch.arange(args.rows)

    def step():
        vectors = [peft_model(**side).embeddings for side in (queries, documents)]
        loss(*vectors, ids, ids + args.rows)

    results["training_step"] = measure(step, towers, args.repeats)
    results["layers"] = model.decoder.config.get_text_config().num_hidden_layers
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
