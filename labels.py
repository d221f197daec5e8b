"""Teaches the EOS state the labels of texts under instructions that ask for them, and leaves other vectors as they were.

    python labels.py recipes/labels.json
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 labels.py recipes/labels.json --resume

Not in the paper, whose decoders know what a sentiment is: the bundled one is small and learns it here, after train.py. A
labels file lists datasets as a data file does, of rows whose positive is the name of a label. How likely each label is
for a text is fitted to the encoder's vectors by logistic regression; under the dataset's instructions the EOS state,
which attends to the Contextual token, is drawn to the sum of directions that stand for the labels, each as far as it is
likely. Directions are orthonormal and near the EOS states of the labels' names. Under other instructions and none, both
states are drawn to what they were before; a list of instructions can be given under which EOS's becomes shorter, such as
those of clustering, to which single words say less than to a search. bag_of_words.py has left EOS without an eye for the
Contextual token, so one head of the first layer is turned to it at the start. The recipe is one of train.py with the
arguments of [`LabelArguments`] besides. Left in `output_dir`: `model/`, and `labels.json` and `labels.png` with the run's
curve.
"""

import copy
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import set_seed

from bag_of_words import (
    HeldoutTrainer,
    WordBatches,
    arguments_read,
    check_arguments,
    choose_texts,
    decoder_optimizer,
    lengthen_eos,
    silent_channel,
)
from data import DatasetSpec, load_rows, read_data_file
from eval_report import write_json
from modeling_causal2vec import Causal2VecModel
from train import (
    DataArguments,
    MarkComplete,
    find_checkpoint,
    last_norm,
    load_data,
    load_model,
    parse,
    plot,
    reads_encoder_once,
)


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent


@dataclass
class LabelArguments:
    """Which labels are taught, and on what."""

    labels_file: str | None = field(
        default=None, metadata={"help": "JSON list of datasets whose positives are names of labels."}
    )
    label_factor: float = field(
        default=1.0, metadata={"help": "Length of EOS states under labels' instructions, in what it was."}
    )
    short_instructions_file: str | None = field(
        default=None, metadata={"help": "JSON list of instructions under which EOS states become shorter."}
    )
    short_factor: float = field(default=0.5, metadata={"help": "Their length there, in what it was."})
    eos_factor: float = field(default=1.0, metadata={"help": "First lengthen EOS states by about this factor."})
    head: int = field(default=1, metadata={"help": "Which head of the first layer EOS is to look through."})
    labels_share: float = field(default=0.5, metadata={"help": "Share of batches that are taught labels."})
    tokens_per_batch: int = field(default=1024, metadata={"help": "Decoder tokens of the texts of a batch, about."})
    max_characters: int = field(default=800, metadata={"help": "What is read of a text."})
    texts_per_dataset: int = field(default=5_000, metadata={"help": "Texts to use of each dataset, at most."})
    fitted_rows: int = field(
        default=8_000, metadata={"help": "Rows of each labelled dataset that probabilities are fitted to, at most."}
    )
    heldout_texts: int = field(default=256, metadata={"help": "Rows or texts to hold out, of each kind."})


class Labelled(NamedTuple):
    """A labelled dataset: its entry in the labels file, its rows to train on, and those held out."""

    spec: DatasetSpec
    rows: list[dict]
    heldout: list[dict]


class LabelTeacher:
    """
    What the EOS state is taught under a dataset's instructions: `sum_c p(c | encoder's vector) u_c`, of length 1.

    Args:
        vectors (`(rows, encoder_hidden_size)`): The encoder's vectors of labelled texts.
        labels (list of `str`): Their labels.
        directions (`(num_labels, hidden_size)`): `u_c`, in the order of the sorted labels.
        ridge (`float`): Weight of the squared coefficients beside the mean cross entropy, labels counting alike.
    """

    def __init__(self, vectors: torch.Tensor, labels: Sequence[str], directions: torch.Tensor, ridge: float = 2e-5):
        self.labels, self.directions = sorted(set(labels)), directions
        inputs = self._inputs(vectors)
        places = torch.tensor([self.labels.index(label) for label in labels])
        weights = 1 / places.bincount(minlength=len(self.labels)).float()
        self.coefficients = torch.zeros(inputs.shape[1], len(self.labels), requires_grad=True)
        solver = torch.optim.LBFGS([self.coefficients], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            value = F.cross_entropy(inputs @ self.coefficients, places, weights)
            value = value + ridge * self.coefficients[:-1].square().sum()
            value.backward()
            return value

        solver.step(loss)
        self.coefficients = self.coefficients.detach()

    @staticmethod
    def _inputs(vectors: torch.Tensor) -> torch.Tensor:
        vectors = F.normalize(vectors.float(), dim=-1)
        return torch.cat([vectors, torch.ones(len(vectors), 1)], dim=-1)

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(rows, num_labels)`."""
        return self._inputs(vectors) @ self.coefficients

    def probabilities(self, vectors: torch.Tensor) -> torch.Tensor:
        """Shape `(rows, num_labels)`."""
        return self.scores(vectors).softmax(-1)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Targets of shape `(rows, hidden_size)` and length 1."""
        return F.normalize(self.probabilities(vectors) @ self.directions, dim=-1)


@torch.no_grad()
def encoder_vectors(model: Causal2VecModel, texts: Sequence[str]) -> torch.Tensor:
    """The encoder's vectors, in the order of the texts: `(len(texts), encoder_hidden_size)`."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    vectors = []
    for start in range(0, len(order), 32):
        batch = model.processor([texts[place] for place in order[start : start + 32]])
        with torch.autocast(model.device.type, torch.bfloat16):
            part = model.get_encoder_embedding(
                batch["encoder_ids"].to(model.device), batch["encoder_attention_mask"].to(model.device)
            )
        vectors.append(part.float().cpu())
    return torch.cat(vectors)[torch.tensor(order).argsort()]


@torch.no_grad()
def label_directions(model: Causal2VecModel, labels: Sequence[str]) -> torch.Tensor:
    """The orthonormal vectors nearest to the EOS states of the labels' names: `(len(labels), hidden_size)`."""
    states = model.encode(list(labels), convert_to_tensor=True).float().cpu()[:, -model.config.hidden_size :]
    left, _, right = torch.linalg.svd(F.normalize(states, dim=-1), full_matrices=False)
    return left @ right


@torch.no_grad()
def look_at_contextual_token(model: Causal2VecModel, head: int, vectors: torch.Tensor, scores: torch.Tensor) -> None:
    """
    Makes EOS look at the Contextual token in one head of the decoder's first layer. The key of the mean token becomes three
    times as long, before the norm of keys where there is one, in the three sixteenths of its channels that rotary positions
    turn least; or the many keys of a long text would outweigh it. EOS's query becomes that key there and 0 elsewhere. Values
    tell `scores` as far as these are linear in the token, as uncorrelated sums of equal variance, at most half as many as a
    head has channels, in the directions that the group's other heads read least, which no longer read them. Values no longer
    read the silent channel of bag_of_words.py, which outweighs all else in the token. What the head hands on starts at 0.
    Keys and values are the group's, so its other heads see both change; the keys and queries of other tokens change as far
    as they are like the Contextual token and EOS.

    Args:
        vectors (`(rows, encoder_hidden_size)`): The encoder's vectors of texts.
        scores (`(rows, num_scores)`): What is to be told of them.

    Raises:
        ValueError: attention is not laid out as transformers' models with rotary embeddings have it, or has fewer heads,
            or the last norm has no gains.
    """
    layer = model.decoder.layers[0]
    attention = getattr(layer, "self_attn", None)
    parts = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
    gains = last_norm(model.decoder)
    if None in parts or gains is None or not hasattr(layer, "input_layernorm"):
        raise ValueError(
            "This needs a decoder whose layers have input_layernorm and self_attn with q_proj, k_proj, v_proj and o_proj, "
            f"and a last norm with gains; got {type(model.decoder).__name__}."
        )
    queries, keys, values, output = (part.weight for part in parts)
    size = attention.head_dim
    heads, shared = len(queries) // size, len(queries) // len(keys)
    if not 0 <= head < heads:
        raise ValueError(f"--head must be one of the {heads} heads of a layer, from 0; got {head}.")
    own, group = (slice(place * size, (place + 1) * size) for place in (head, head // shared))
    sharing = slice(group.start * shared, group.stop * shared)

    eos = layer.input_layernorm(model.get_input_embeddings().weight[model.processor.tokenizer.eos_token_id])
    tokens = layer.input_layernorm(model.project(vectors.to(model.device)))  # (rows, hidden_size)
    token = tokens.mean(0)
    slow = torch.arange(size, device=token.device) % (size // 2) >= size * 13 // 32
    key = torch.where(slow, keys[group] @ token, 0)  # (head_dim,)
    keys[group] += torch.outer(2 * key, token) / token.square().sum()
    query = key
    for norm in ("k_norm", "q_norm"):  # their gains, where the decoder has them
        query = query * getattr(getattr(attention, norm, None), "weight", 1)
    query = query * size**0.5 / query.norm()
    queries[own] += torch.outer(query - queries[own] @ eos, eos) / eos.square().sum()

    silent = gains == 0
    tokens = torch.where(silent, 0, tokens - token)
    reads = torch.linalg.pinv(tokens) @ scores.to(tokens)  # (hidden_size, num_scores)
    _, spread, right = torch.linalg.svd(tokens @ reads, full_matrices=False)
    count = min(int((spread > 1e-3 * spread[0]).sum()), size // 2)
    reads = reads @ right[:count].T / spread[:count] * len(tokens) ** 0.5  # of variance 1 and uncorrelated
    output[:, own] = 0
    used = output[:, sharing].unflatten(1, (shared, size)).flatten(0, 1)  # (hidden_size * shared, head_dim)
    unused = torch.linalg.svd(used, full_matrices=False).Vh[-count:]  # (count, head_dim)
    kept = torch.eye(size).to(unused) - unused.T @ unused
    output[:, sharing] = (output[:, sharing].unflatten(1, (shared, size)) @ kept).flatten(1)
    length = values[group].norm(dim=-1).mean()  # about the spread of a value, as tokens are of length 1 per channel
    values[group] = kept @ values[group] + length * unused.T @ reads.T
    values[group, silent] = 0


class LabelBatches(torch.utils.data.Dataset):
    """
    Batch `i`, drawn by `(seed, i)`: of one labelled dataset with one of its instructions, half of them with 1 to 8 rows of it
    as examples, whose texts have 1,600 characters in all at most; or of texts as [`WordBatches`] draws them. Its last field
    names the dataset, or is None.
    """

    def __init__(self, plain: WordBatches, labelled: dict[str, tuple[WordBatches, list[dict]]], share: float):
        self.plain, self.labelled, self.share = plain, labelled, share

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[list[str], str | None, list[dict], str | None]:
        rng = random.Random(f"{self.plain.seed} {index} labels")
        if rng.random() >= self.share:
            return *self.plain[index][:3], None
        name = rng.choice(sorted(self.labelled))
        batches, rows = self.labelled[name]
        drawn = rng.sample(rows, min(len(rows), rng.choice([0] * 8 + list(range(1, 9)))))
        examples = [{"query": row["query"][: 1600 // len(drawn)], "response": row["positive"]} for row in drawn]
        return batches[index][0], rng.choice(batches.instructions), examples, name


class LabelCollator:
    """Makes a batch's inputs; `dataset` goes along, and how long EOS's states are to be, in lengths of what they were."""

    def __init__(self, model: Causal2VecModel, factors: dict[str, float]):
        self.model, self.factors = model, factors

    def __call__(self, batches: list[tuple[list[str], str | None, list[dict], str | None]]) -> dict:
        ((texts, instruction, examples, dataset),) = batches
        examples = self.model.processor.fit_examples(instruction, examples)
        inputs = self.model.processor(texts, instruction, examples=examples or None)
        return {**inputs, "dataset": dataset, "factor": self.factors.get(instruction, 1.0)}


class LabelTrainer(HeldoutTrainer):
    """
    Trainer whose loss is, for each of the two states, its squared distance from what it should be, over the mean length of
    that and the mean length that EOS's states had, and 0.3 times 1 less their cosine.
    """

    def __init__(self, *args, before: Causal2VecModel, teachers: dict[str, LabelTeacher], **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.teachers = before, teachers

    def states(self, model, inputs: dict, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The Contextual token's and EOS's states, `(batch, hidden_size)` each."""
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, contextual_token=token, share_heads=True).embeddings.float().chunk(2, dim=-1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            vectors = self.before.get_encoder_embedding(inputs["encoder_ids"], inputs["encoder_attention_mask"])
            token = self.before.project(vectors)
            kept, before = self.states(self.before, inputs, token)
        length, target = before.norm(dim=-1).mean(), before
        if inputs["dataset"] is not None:
            target = length * self.teachers[inputs["dataset"]](vectors.cpu()).to(before)
        target = inputs["factor"] * target
        contextual, eos = self.states(model, inputs, token)
        loss = 0
        for state, wanted in ((contextual, kept), (eos, target)):
            cosine = F.cosine_similarity(state, wanted, dim=-1).mean()
            distance = (state - wanted).square().sum(-1).mean() / (length * wanted.norm(dim=-1).mean())
            loss = loss + distance + 0.3 * (1 - cosine)
        metrics = {"eos": eos, "cosine": cosine, "length": eos.norm(dim=-1).mean() / target.norm(dim=-1).mean()}
        return (loss, metrics) if return_outputs else loss

    def measure(self) -> dict[str, float]:
        """
        Share of held-out rows whose EOS state is nearest to their label; of all texts, its cosine to what it should be and
        its length over what that should be.
        """
        metrics = {}
        for name, (batches, labels) in self.heldout.items():
            outputs = self.outputs(batches)
            if name in self.teachers:
                teacher = self.teachers[name]
                nearest = (torch.cat([output["eos"] for output in outputs]).cpu() @ teacher.directions.T).argmax(-1)
                right = [teacher.labels[place] == label for place, label in zip(nearest.tolist(), labels, strict=True)]
                metrics[name] = sum(right) / len(right)
            for figure in ("cosine", "length"):
                metrics[f"{name}_{figure}"] = float(torch.stack([output[figure] for output in outputs]).mean())
        cosines = [value for name, value in metrics.items() if name.endswith("_cosine")]
        return metrics | {"score": sum(cosines) / len(cosines)}


def read_labelled(args: LabelArguments, data_args: DataArguments, cache_dir: Path, seed: int) -> dict[str, Labelled]:
    """
    Each dataset of the labels file by its name, its rows shuffled and their texts cut. Of these `heldout_texts` are held
    out: no text of the others has one of theirs in it, or is part of one. Texts joined from the same sentences may
    be on both sides.
    """
    rng, labelled = random.Random(seed), {}
    for spec in read_data_file(args.labels_file):
        rows = list(load_rows(spec, data_args.data_dir, str(cache_dir), data_args.skip_bad_rows))
        rng.shuffle(rows)
        rows = [row | {"query": row["query"][: args.max_characters]} for row in rows]
        heldout, rows = rows[: args.heldout_texts], rows[args.heldout_texts :]
        kept = [row["query"] for row in heldout]
        rows = [row for row in rows if not any(text in row["query"] or row["query"] in text for text in kept)]
        labelled[spec.name] = Labelled(spec, rows, heldout)
    return labelled


def read_instructions(
    args: LabelArguments, specs: Sequence[DatasetSpec], labelled: dict[str, Labelled]
) -> tuple[set[str], list[str], list[str]]:
    """The labels' instructions, those under which EOS's states become shorter, and the others: of MTEB, `specs`, made up."""
    own = {instruction for dataset in labelled.values() for instruction in dataset.spec.instructions}
    short_file = args.short_instructions_file
    short = [] if short_file is None else json.loads(Path(short_file).read_text(encoding="utf-8"))
    short = [instruction for instruction in short if instruction not in own]
    files = (ROOT / "instructions.json", ROOT / "recipes" / "data" / "other_instructions.json")
    mteb, made_up = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    asked = {instruction for spec in specs for instruction in spec.instructions}
    return own, short, sorted({*mteb.values(), *made_up, *asked} - own - {*short})


def fit_teachers(
    model: Causal2VecModel, labelled: dict[str, Labelled], fitted_rows: int
) -> tuple[dict[str, LabelTeacher], torch.Tensor]:
    """
    A teacher for each dataset, and the encoder's vectors that they were fitted to, `(rows, encoder_hidden_size)`.

    Raises:
        ValueError: the rows of a dataset have one label.
    """
    teachers, vectors = {}, []
    for name, dataset in labelled.items():
        fitted = dataset.rows[:fitted_rows]
        labels = [row["positive"] for row in fitted]
        names = sorted(set(labels))
        logger.info("%s: fitting %s", name, dict(Counter(labels)))
        if len(names) < 2:
            raise ValueError(f"{name}: expected rows of two labels or more, got {names}.")
        vectors.append(encoder_vectors(model, [row["query"] for row in fitted]))
        teachers[name] = LabelTeacher(vectors[-1], labels, label_directions(model, names))
    return teachers, torch.cat(vectors)


def heldout_batches(
    collator: LabelCollator,
    texts: list[str],
    labelled: dict[str, Labelled],
    instructions: dict[str, list[str | None]],
    size: int = 32,
) -> dict[str, tuple[list[dict], list[str] | None]]:
    """
    What [`LabelTrainer`] measures itself on: the held-out rows of each dataset, with their labels; and the texts, as many as
    those, under some of the `instructions` of each name.
    """
    starts = range(0, len(texts), size)
    heldout = {}
    for name, (spec, _, rows) in labelled.items():
        queries = [[row["query"] for row in rows[start : start + size]] for start in starts]
        batches = [collator([(part, spec.instructions[0], [], name)]) for part in queries]
        heldout[name] = batches, [row["positive"] for row in rows]
    for name, listed in instructions.items():
        if listed:
            parts = [(texts[start : start + size], listed[start % len(listed)], [], None) for start in starts]
            heldout[name] = [collator([part]) for part in parts], None
    return heldout


def main(argv: Sequence[str] | None = None) -> Path:
    """
    Runs the training; returns the folder of the model.

    Raises:
        ValueError: the model has no Contextual token or no EOS half, too little or only one label is left to train on, or
            an argument is missing or wrong.
    """
    model_args, data_args, args, label_args = parse(sys.argv[1:] if argv is None else list(argv), LabelArguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    output = Path(args.output_dir)
    check_arguments(data_args, args, label_args.heldout_texts)
    checkpoint = None if args.dry_run else find_checkpoint(args)
    if label_args.labels_file is None:
        raise ValueError("--labels_file is missing: a JSON list of datasets, such as recipes/data/labels.json.")
    model = load_model(model_args).to(args.device)
    model.requires_grad_(False)
    if not reads_encoder_once(model) or model.config.pooling != "concat":
        raise ValueError("This needs one Contextual token and an embedding of both states (pooling concat).")
    if min(label_args.label_factor, label_args.short_factor, label_args.eos_factor) <= 0:
        raise ValueError(
            "--label_factor, --short_factor and --eos_factor must be above 0: the loss is in these lengths."
        )
    if label_args.short_instructions_file is not None or (label_args.label_factor, label_args.eos_factor) != (1, 1):
        silent_channel(model)  # refuses a model whose states cannot change their length

    data, _ = load_data(data_args, args)
    texts = choose_texts(data.rows, label_args.texts_per_dataset, label_args.max_characters, args.seed)
    heldout_texts, texts = texts[: label_args.heldout_texts], texts[label_args.heldout_texts :]
    labelled = read_labelled(label_args, data_args, output / "data", args.seed)
    if not texts or not all(dataset.rows for dataset in labelled.values()):
        counts = {name: len(dataset.heldout) + len(dataset.rows) for name, dataset in labelled.items()}
        raise ValueError(
            f"--heldout_texts {label_args.heldout_texts} leaves nothing to train on: there are "
            f"{len(heldout_texts) + len(texts)} texts, and {counts} labelled rows."
        )
    own, short, others = read_instructions(label_args, data.specs, labelled)
    factors = dict.fromkeys(short, label_args.short_factor) | dict.fromkeys(own, label_args.label_factor)
    collator = LabelCollator(model, factors)
    teachers, vectors = fit_teachers(model, labelled, label_args.fitted_rows)
    heldout = heldout_batches(
        collator, heldout_texts, labelled, {"documents": [None], "queries": others, "short": short}
    )
    size = args.max_steps * args.world_size

    def batches(texts: list[str], instructions: list[str]) -> WordBatches:
        lengths = [len(ids) for ids in model.processor.tokenizer(texts)["input_ids"]]
        return WordBatches(texts, lengths, instructions, label_args.tokens_per_batch, size, args.seed)

    drawn, every = {}, list(texts)
    for name, (spec, rows, _) in labelled.items():
        here = [row["query"] for row in rows]
        drawn[name] = batches(here + texts[: len(here)], spec.instructions), rows
        every += here
    plain = batches(every, others + short)
    if args.dry_run:
        return output / "model"

    if label_args.eos_factor != 1:
        lengthen_eos(model, label_args.eos_factor)
    before = copy.deepcopy(model).eval()  # what other vectors are kept at
    scores = torch.cat([teacher.scores(vectors) for teacher in teachers.values()], dim=-1)
    look_at_contextual_token(model, label_args.head, vectors, scores)
    trainer = LabelTrainer(
        model=model,
        args=args,
        train_dataset=LabelBatches(plain, drawn, label_args.labels_share),
        eval_dataset=plain,  # Trainer wants one; evaluate() reads `heldout`
        data_collator=collator,
        optimizers=(decoder_optimizer(model, args), None),
        before=before,
        teachers=teachers,
        heldout=heldout,
        callbacks=[MarkComplete()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        facts = {
            "arguments": arguments_read(model_args, data_args, args, label_args),
            "rows": {name: len(dataset.rows) for name, dataset in labelled.items()},
            "texts": len(texts),
            "processes": args.world_size,
            "steps": trainer.state.global_step,
            "heldout": {name[5:]: value for name, value in metrics.items() if name.startswith("eval_")},
            "fit": {name: accuracy(model, teachers[name], dataset.heldout) for name, dataset in labelled.items()},
            "log": trainer.state.log_history,
        }
        write_json(output / "labels.json", facts)
        plot(trainer.state.log_history, output / "labels.png")
        model.save_pretrained(output / "model")
    return output / "model"


def accuracy(model: Causal2VecModel, teacher: LabelTeacher, rows: Sequence[dict]) -> float:
    """Share of rows whose label is the likeliest by the fit."""
    likeliest = teacher.probabilities(encoder_vectors(model, [row["query"] for row in rows])).argmax(-1)
    return sum(teacher.labels[place] == row["positive"] for place, row in zip(likeliest.tolist(), rows)) / len(rows)


if __name__ == "__main__":
    main()
