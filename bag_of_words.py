"""Teaches the EOS state which words its text has, on texts alone, before train.py goes on with pairs.

    python bag_of_words.py recipes/words.json
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 bag_of_words.py recipes/words.json --resume

Not in the paper, whose decoders are large and trained for long: the bundled decoder is small, and pairs alone would leave
its EOS state nearly the same for all texts. Bag-of-words prediction as a pretraining for retrieval is known from encoders
(arXiv 2401.11248). The recipe is one of train.py with the arguments of [`WordArguments`] besides; pairs are read as single
texts. The encoder is not read: a random vector stands in the Contextual token's place. Left in `output_dir`: `model/`, for
train.py's `--model`, and `words.json` and `words.png` with the run's curve.

At the end the projector is made larger, so that the layers have no say in the Contextual token's state, and shortens that
state until the EOS state has its share of a vector (see [`balance`]); labels.py can change that share.
"""

import json
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, set_seed

from card import without_machine_paths
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
    start_projector_as_identity,
)


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent


@dataclass
class WordArguments:
    """What the EOS state is taught, and in what."""

    embedding_scale: float = field(
        default=300.0,
        metadata={
            "help": "Multiply the word embeddings, EOS's excepted, so that what the layers add does not drown them."
        },
    )
    words_norm: float = field(
        default=0.6, metadata={"help": "Length of the target, in lengths of the Contextual token's state."}
    )
    tokens_per_batch: int = field(default=1024, metadata={"help": "Decoder tokens of the texts of a batch, about."})
    max_characters: int = field(default=800, metadata={"help": "What is read of a text."})
    texts_per_dataset: int = field(default=10_000, metadata={"help": "Texts to use of each dataset, at most."})
    heldout_texts: int = field(default=128, metadata={"help": "Texts to hold out of these."})
    final_identity: float = field(
        default=10_000.0, metadata={"help": "`--projector_identity` of the model that is left."}
    )
    eos_norm: float = field(
        default=0.5, metadata={"help": "Length of its EOS states, in lengths of the Contextual token's states."}
    )


class WordVectors:
    """
    What the EOS state is taught: the weighted sum of its text's word vectors, of length 1. A word's vector is its row in
    the decoder's embedding table, centred and whitened, so that unlike words are nearly orthogonal; its weight is the
    square of log(1 / document frequency), so that what stands in every text counts for nothing.

    Args:
        embeddings (`(vocab_size, hidden_size)`): The decoder's embedding table.
        texts (list of `(length,)` tensors): Token ids of texts to count document frequencies in, each with what follows
            every text, such as EOS.
    """

    def __init__(self, embeddings: torch.Tensor, texts: Sequence[torch.Tensor]):
        counts = torch.zeros(len(embeddings))
        for ids in texts:
            counts[ids.unique()] += 1
        frequency = (counts / len(texts)).clamp(1e-4, 1)
        embeddings = embeddings.detach().float()
        directions = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False).U
        self.table = F.normalize(directions, dim=-1) * frequency.log().square().unsqueeze(-1)  # (vocab, hidden)

    def __call__(self, input_ids: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
        """Targets of shape `(batch, hidden_size)` for ids of shape `(batch, seq_len)` and a mask of those that count."""
        return F.normalize((self.table[input_ids] * is_word.unsqueeze(-1)).sum(1), dim=-1)


class WordBatches(torch.utils.data.Dataset):
    """
    Batch `i` of texts of about the same length, drawn by `(seed, i)`: the texts, the instruction that most batches have,
    1 to 5 pairs of other texts as in-context examples, which half of those have, and a seed.
    """

    def __init__(
        self,
        texts: Sequence[str],
        lengths: Sequence[int],
        instructions: Sequence[str],
        tokens: int,
        size: int,
        seed: int,
    ):
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        self.texts, self.lengths = [texts[index] for index in order], [lengths[index] for index in order]
        self.instructions, self.tokens, self.size, self.seed = instructions, tokens, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[list[str], str | None, list[dict], int]:
        rng = random.Random(f"{self.seed} {index}")
        place = rng.randrange(len(self.texts))
        near = range(max(0, place - 1000), min(len(self.texts), place + 1000))
        rows = rng.sample(near, min(len(near), max(2, self.tokens // (self.lengths[place] + 8))))
        texts = [self.texts[row] for row in rows]
        if rng.random() < 1 / 3:
            return texts, None, [], rng.getrandbits(32)
        count = rng.choice([0, 0, 0, 0, 0, 1, 2, 3, 4, 5])
        drawn = [self.texts[rng.randrange(len(self.texts))][:200] for _ in range(2 * count)]
        examples = [{"query": query, "response": response} for query, response in zip(drawn[::2], drawn[1::2])]
        return texts, rng.choice(self.instructions), examples, rng.getrandbits(32)


def is_word(model: Causal2VecModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of each row come after the Contextual token, padding left out: a mask of shape `(batch, seq_len)`."""
    is_slot = model.find_slots(batch["input_ids"])  # (batch, seq_len)
    return batch["attention_mask"].bool() & is_slot.cumsum(-1).bool() & ~is_slot


def read_words(model: Causal2VecModel, texts: Sequence[str]) -> list[torch.Tensor]:
    """The ids that come after the Contextual token, of each text."""
    words = []
    for start in range(0, len(texts), 256):
        batch = model.processor(texts[start : start + 256])
        words += [ids[mask] for ids, mask in zip(batch["input_ids"], is_word(model, batch))]
    return words


class WordCollator:
    """Makes a batch's inputs, with random vectors of length 1 in the encoder's place, and its targets."""

    def __init__(self, model: Causal2VecModel, words: WordVectors):
        self.model, self.words = model, words

    def __call__(self, batches: list[tuple[list[str], str | None, list[dict], int]]) -> dict[str, torch.Tensor]:
        ((texts, instruction, examples, seed),) = batches
        examples = self.model.processor.fit_examples(instruction, examples)
        batch = self.model.processor(texts, instruction, examples=examples or None)
        shape = (len(texts), self.model.encoder.config.get_text_config().hidden_size)
        vectors = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return {
            "input_ids": batch["input_ids"],  # (batch, seq_len)
            "attention_mask": batch["attention_mask"],
            "encoder_embedding": F.normalize(vectors, dim=-1),
            "labels": self.words(batch["input_ids"], is_word(self.model, batch)),  # (batch, hidden_size)
        }


class HeldoutTrainer(Trainer):
    """
    Trainer that scores itself by `measure` on `heldout`: batches, in whatever form that reads them. With `return_outputs`,
    `compute_loss` gives a batch's figures beside its loss.
    """

    def __init__(self, *args, heldout, **kwargs):
        super().__init__(*args, **kwargs)
        self.heldout = heldout
        self.model_accepts_loss_kwargs = False

    def measure(self) -> dict[str, float]:
        raise NotImplementedError

    def outputs(self, batches: list[dict]) -> list[dict]:
        """What `compute_loss` tells of each batch."""
        found = []
        for batch in batches:
            with self.compute_loss_context_manager():
                inputs = self._prepare_inputs(dict(batch))
                found.append(self.compute_loss(self.model, inputs, return_outputs=True)[1])
        return found

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class WordTrainer(HeldoutTrainer):
    """
    Trainer whose loss is the squared distance of EOS's state from the target, plus a part of 1 less their cosine, plus 1
    less the cosine of the Contextual token's state and what the projector put in, which the layers so leave alone.
    """

    def __init__(self, *args, words_norm: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.words_norm = words_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target = inputs.pop("labels")
        token = self.model.project(inputs.pop("encoder_embedding"))  # (batch, hidden_size)
        contextual, eos = (
            model(**inputs, contextual_token=token, share_heads=True).embeddings.float().chunk(2, dim=-1)
        )  # (batch, hidden_size) each
        kept = F.cosine_similarity(contextual, token.float() * last_norm(self.model.decoder), dim=-1).mean()
        eos = eos / (self.words_norm * contextual.norm(dim=-1).mean().detach())
        cosine = F.cosine_similarity(eos, target, dim=-1).mean()
        # The distance alone makes an unsure state short, and then stops teaching it; the cosine goes on.
        loss = (eos - target).square().sum(-1).mean() + 0.3 * (1 - cosine) + (1 - kept)
        metrics = {"cosine": cosine, "norm": eos.norm(dim=-1).mean() * self.words_norm, "kept": kept}
        return (loss, metrics) if return_outputs else loss

    def measure(self) -> dict[str, float]:
        outputs = self.outputs(self.heldout)
        metrics = {name: float(torch.stack([output[name] for output in outputs]).mean()) for name in outputs[0]}
        return metrics | {"score": metrics["cosine"]}


def choose_texts(datasets: Sequence[Sequence[dict]], count: int, characters: int, seed: int) -> list[str]:
    """About `count` texts of each dataset, queries and positives, cut to so many characters, none twice, shuffled."""
    rng = random.Random(seed)
    texts = set()
    for rows in datasets:
        for place in rng.sample(range(len(rows)), min(len(rows), count // 2)):
            texts |= {rows[place][side][:characters] for side in ("query", "positive")}
    texts = sorted(texts)
    rng.shuffle(texts)
    return texts


@torch.no_grad()
def prepare(model: Causal2VecModel, embedding_scale: float) -> int:
    """
    Scales the word embeddings, and lets the EOS state be short: the gain of the decoder's last norm becomes 0 at one
    channel, which the projector leaves alone, and what EOS writes there shortens the rest of its state. The channel is one
    that the encoder has no number for or, of equal widths, the one where the encoder's last norm has its smallest gain.

    Returns:
        The channel.

    Raises:
        ValueError: a backbone's last norm is not where transformers' models have it.
    """
    gains = last_norm(model.decoder)
    norms = [module.weight for module in model.encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    if gains is None or not norms:
        raise ValueError(
            "This needs a decoder with a `norm` behind its last layer and an encoder with LayerNorm; got "
            f"{type(model.decoder).__name__} and {type(model.encoder).__name__}."
        )
    table, eos = model.decoder.get_input_embeddings().weight, model.processor.tokenizer.eos_token_id
    factors = torch.full((len(table), 1), embedding_scale)
    factors[eos] = 1
    table *= factors
    channel = len(norms[-1]) if len(norms[-1]) < len(gains) else int(norms[-1].abs().argmin())
    gains[channel] = 0
    model.projector.linear_2.weight[channel] = 0
    return channel


def decoder_optimizer(model: Causal2VecModel, args: TrainingArguments) -> torch.optim.Muon:
    """
    An optimizer of the matrices of the decoder's layers, which from now on are all that is trained. Its steps are
    orthogonalised: the whitened target needs directions in which embeddings differ little.
    """
    model.requires_grad_(False)
    matrices = [weight for weight in model.decoder.layers.parameters() if weight.ndim == 2]
    for weight in matrices:
        weight.requires_grad_(True)
    return torch.optim.Muon(
        matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def check_arguments(data_args: DataArguments, args: TrainingArguments, heldout_texts: int) -> None:
    """
    Raises:
        ValueError: an argument of train.py is set to what batches of texts cannot be made by, or none is held out.
    """
    wrong = {
        "--heldout_texts must be at least 1": heldout_texts < 1,
        "--max_steps must be at least 1, there are no epochs": args.max_steps < 1,
        "--per_device_train_batch_size must be 1, as --tokens_per_batch says how many texts that is": (
            args.per_device_train_batch_size != 1
        ),
        "--streaming cannot be, as texts are drawn from all": data_args.streaming,
    }
    if any(wrong.values()):
        raise ValueError("; ".join(reason for reason, is_so in wrong.items() if is_so) + ".")


def arguments_read(model_args, data_args, args: TrainingArguments, more) -> dict:
    """The arguments of a run as its JSON tells them, without those of train.py that [`decoder_optimizer`] leaves no say."""
    arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict(), **asdict(more)}
    unread = (
        "train_decoder train_encoder lora_r lora_alpha lora_dropout optim optim_args adam_beta1 adam_beta2 adam_epsilon "
        "gradcache matryoshka_dims temperature distillation interpolation num_negatives max_examples train_max_length "
        "scheduler_steps share_heads projector_learning_rate"
    )
    return without_machine_paths({name: value for name, value in arguments.items() if name not in unread.split()})


@torch.no_grad()
def balance(model: Causal2VecModel, texts: Sequence[str], channel: int, scale: float, eos_norm: float) -> dict:
    """
    Starts the projector again as `scale` times the identity, and lets it write into the channel of [`prepare`], which
    shortens the Contextual token's state to where EOS states are `eos_norm` times as long. What it writes there grows with
    the encoder's vector: the hidden units' GELU(x) + GELU(-x), about sqrt(2 / pi) x^2, add up to a square of its length
    which, with a constant, is close to the length itself for the lengths that occur.

    Returns:
        The means over `texts` that this was computed from: length of the encoder's vectors, and of EOS states before.
    """
    model.cpu().eval()  # training may have left it on a GPU
    start_projector_as_identity(model.projector, scale, last_norm(model.decoder))
    linear = model.projector.linear_2
    linear.weight[channel] = 0
    figures = []
    for start in range(0, len(texts), 32):
        batch = model.processor(texts[start : start + 32])
        vectors = model.get_encoder_embedding(batch.pop("encoder_ids"), batch.pop("encoder_attention_mask"))
        token = model.project(vectors)  # (batch, hidden_size)
        contextual, eos = model(**batch, contextual_token=token).embeddings.chunk(2, dim=-1)
        lengths = [part.float().norm(dim=-1) for part in (vectors, token, contextual, eos)]
        figures.append(torch.stack([lengths[0], lengths[1] / lengths[0], lengths[3] / lengths[2]]))  # (3, batch)
    length, stretch, before = torch.cat(figures, dim=1).mean(1).tolist()
    share = max(0.0, (eos_norm / before) ** 2 - 1) ** 0.5  # of the channel, in lengths of the rest of the token
    linear.bias[channel] = share * stretch * length / 2
    linear.weight[channel] = share * stretch / length / 2 * (torch.pi / 2) ** 0.5
    return {"encoder_norm": length, "eos_norm_before": before}


def silent_channel(model: Causal2VecModel) -> int:
    """
    The channel that the decoder's last norm drops, so that what is written into it makes the rest of a state shorter.

    Raises:
        ValueError: there is no such channel, or more than one.
    """
    gains = last_norm(model.decoder)
    channels = [] if gains is None or model.projector is None else (gains == 0).nonzero().flatten().tolist()
    if len(channels) != 1:
        raise ValueError(
            "States change their length only in a model that bag_of_words.py started: its decoder's last norm should have "
            f"one gain of 0, and has {len(channels)}."
        )
    return channels[0]


def lengthen_eos(model: Causal2VecModel, factor: float) -> None:
    """
    Makes EOS states longer beside the Contextual token's, by about `factor`: multiplies what the projector writes into the
    [`silent_channel`], which shortens the latter (see [`balance`]).
    """
    channel = silent_channel(model)
    for parameter in model.projector.linear_2.parameters():
        parameter.data[channel] *= factor


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs the training; returns the folder of the model."""
    model_args, data_args, args, word_args = parse(sys.argv[1:] if argv is None else list(argv), WordArguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    output = Path(args.output_dir)
    check_arguments(data_args, args, word_args.heldout_texts)
    checkpoint = None if args.dry_run else find_checkpoint(args)

    data, _ = load_data(data_args, args)
    texts = choose_texts(data.rows, word_args.texts_per_dataset, word_args.max_characters, args.seed)
    held = word_args.heldout_texts
    if len(texts) <= held:
        raise ValueError(f"--heldout_texts {held} leaves no text to train on; there are {len(texts)}.")
    model = load_model(model_args)
    needed = {"baseline": None, "pooling": "concat", "contextual_position": "after_instruction", "num_slots": 1}
    if any(getattr(model.config, name) != value for name, value in needed.items()):
        raise ValueError(
            "This needs one Contextual token, behind the instruction, and an embedding of both states (pooling concat)."
        )
    words = WordVectors(model.decoder.get_input_embeddings().weight, read_words(model, texts[:20_000]))
    channel = prepare(model, word_args.embedding_scale)
    if model_args.projector_identity is None:  # `balance` would find out at the end
        raise ValueError("This needs --projector_identity, which makes the projector wide enough to be started as one.")
    optimizer = decoder_optimizer(model, args)

    lengths = [len(ids) for ids in model.processor.tokenizer(texts)["input_ids"]]
    collator = WordCollator(model, words)
    instructions = sorted(set(json.loads((ROOT / "instructions.json").read_text(encoding="utf-8")).values()))
    batches = WordBatches(
        texts[held:],
        lengths[held:],
        instructions,
        word_args.tokens_per_batch,
        args.max_steps * args.world_size,
        args.seed,
    )
    heldout = [collator([(texts[start : min(start + 32, held)], None, [], start)]) for start in range(0, held, 32)]
    logger.info(
        "%d texts, %d held out; %d matrices trained; channel %d set to 0",
        len(texts) - held,
        held,
        len(optimizer.param_groups[0]["params"]),
        channel,
    )
    if args.dry_run:
        return output / "model"
    trainer = WordTrainer(
        model=model,
        args=args,
        train_dataset=batches,
        eval_dataset=batches,  # Trainer wants one; evaluate() reads `heldout`
        data_collator=collator,
        optimizers=(optimizer, None),
        words_norm=word_args.words_norm,
        heldout=heldout,
        callbacks=[MarkComplete()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        facts = {
            "arguments": arguments_read(model_args, data_args, args, word_args),
            "texts": len(texts) - held,
            "processes": args.world_size,
            "steps": trainer.state.global_step,
            "heldout_cosine": metrics["eval_cosine"],
            "heldout_norm": metrics["eval_norm"],
            "heldout_kept": metrics["eval_kept"],
            **balance(model, texts[:held], channel, word_args.final_identity, word_args.eos_norm),
            "log": trainer.state.log_history,
        }
        write_json(output / "words.json", facts)
        plot(trainer.state.log_history, output / "words.png")
        model.save_pretrained(output / "model")
    return output / "model"


if __name__ == "__main__":
    main()
