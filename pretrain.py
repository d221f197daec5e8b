"""Makes the bundled decoder: a byte-level BPE tokenizer and a small causal language model, both from plain text.

Not part of the paper, which starts from published LLMs; this gives the repository a decoder of its own that is small
enough for a git clone. Three steps, each skipped when its result is already there: train the tokenizer on a sample of
the corpus, write the corpus as one file of token ids, train next-token prediction with transformers' Trainer (an
interrupted run resumes from its last checkpoint). Sizes and steps are the bundled decoder's by default: minutes on a
GPU, hours without. Pieces of text drawn by the seed are held out for perplexity.

    python pretrain.py --corpus_dir ../shared/data/corpus --output_dir runs/decoder
"""

import glob
import io
import json
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval_report import write_json


logger = logging.getLogger(__name__)

BOS, EOS, PAD, CONTEXTUAL = "<s>", "</s>", "<pad>", "<|contextual|>"


@dataclass
class PretrainArguments:
    """What to train on, how large, how long."""

    corpus_dir: str = field(
        metadata={"help": "Folder of .txt or .txt.zst files: a paragraph a line, blank line between documents."}
    )
    output_dir: str = field(metadata={"help": "Where the decoder, its tokenizer, checkpoints and pretrain.json go."})
    model: str | None = field(
        default=None,
        metadata={"help": "Decoder to go on from, a folder this script left; its tokenizer and sizes stay."},
    )
    shards: list[str] | None = field(default=None, metadata={"help": "File stems to use. Default: all in corpus_dir."})
    vocab_size: int = field(default=32768, metadata={"help": "Entries of the BPE vocabulary, special tokens included."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the decoder."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the decoder."})
    intermediate_size: int = field(default=1024, metadata={"help": "Width of the decoder's MLP."})
    max_tokens: int = field(
        default=60_000_000, metadata={"help": "Training tokens to prepare at most, spread over shards by size."}
    )
    skip_tokens: int = field(default=0, metadata={"help": "Tokens to pass over, which --model has been trained on."})
    heldout_tokens: int = field(default=100_000, metadata={"help": "Tokens kept back to measure perplexity."})
    seq_len: int = field(default=512, metadata={"help": "Tokens per training row."})
    batch_size: int = field(default=32, metadata={"help": "Rows per step."})
    max_steps: int = field(default=7000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the cosine schedule."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling, initialisation and order."})


def read_documents(path: str) -> Iterator[str]:
    """Yields the documents of one corpus file (blank line between documents)."""
    if path.endswith(".zst"):
        import zstandard

        stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(open(path, "rb")), encoding="utf-8")
    else:
        stream = open(path, encoding="utf-8")
    with stream:
        lines: list[str] = []
        for line in stream:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
        if lines:
            yield "".join(lines)


def pieces(document: str, size: int = 20_000) -> Iterator[str]:
    """Cuts a long document (a novel is one) at white space into pieces of about `size` characters."""
    start = 0
    while start < len(document):
        end = start + size
        if end < len(document):
            cut = max(document.rfind(" ", start + size // 2, end), document.rfind("\n", start + size // 2, end))
            end = cut if cut > 0 else end
        yield document[start:end]
        start = end


def corpus_files(corpus_dir: str, shards: Sequence[str] | None = None) -> list[str]:
    """
    The files of the named shards, in their order, or of all.

    Raises:
        ValueError: a shard has no file or several, or there are none.
    """
    stems: dict[str, str] = {}
    for path in sorted(glob.glob(os.path.join(corpus_dir, "*.txt*"))):
        stem = os.path.basename(path).split(".")[0]
        if stem in stems:
            raise ValueError(f"{path} and {stems[stem]} are both named {stem}; rename one of them.")
        stems[stem] = path
    names = shards or list(stems)
    missing = [name for name in names if name not in stems]
    if missing or not names:
        raise ValueError(f"No corpus file for {missing or 'any shard'} in {corpus_dir}; found {sorted(stems)}.")
    return [stems[name] for name in names]


def load_pieces(args: PretrainArguments) -> list[str]:
    """All pieces of all chosen shards, shuffled by the seed."""
    paths = corpus_files(args.corpus_dir, args.shards)
    texts = [piece for path in paths for document in read_documents(path) for piece in pieces(document)]
    random.Random(args.seed).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], vocab_size: int, max_chars: int = 30_000_000):
    """A byte-level BPE tokenizer (every text has an encoding) with BOS, EOS, padding and the Contextual slot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, CONTEXTUAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def sample() -> Iterator[str]:
        seen = 0
        for text in texts:
            if seen >= max_chars:
                return
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[CONTEXTUAL],
        padding_side="right",
        model_max_length=4096,
    )


def write_tokens(texts: list[str], tokenizer, args: PretrainArguments, folder: Path) -> None:
    """
    Writes `train.npy` and `heldout.npy`, uint16, pieces separated by EOS, until the wanted numbers are reached. The
    same pieces are held out and passed over in every run with the same seed, shards, tokenizer and held-out tokens.
    """
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"Ids are stored in 16 bits, so vocab_size is at most 65536; got {tokenizer.vocab_size}.")
    targets = {"heldout": args.heldout_tokens, None: args.skip_tokens, "train": args.max_tokens}
    position = 0
    for name, target in targets.items():
        ids: list[np.ndarray] = []
        count = 0
        while count < target and position < len(texts):
            chunk = texts[position : position + 256]
            position += len(chunk)
            for encoding in tokenizer._tokenizer.encode_batch(chunk, add_special_tokens=False):
                ids.append(np.asarray(encoding.ids + [tokenizer.eos_token_id], dtype=np.uint16))
                count += len(ids[-1])
        if target and not count:
            raise ValueError(f"The corpus is used up before the {name or 'skipped'} tokens: lower --skip_tokens.")
        if name is None:
            continue
        temporary = folder / f"{name}.tmp.npy"
        np.save(temporary, np.concatenate(ids)[:target])
        temporary.rename(folder / f"{name}.npy")
        logger.info("%s: %d tokens", name, min(count, target))


class TokenRows:
    """Rows of `seq_len` ids cut from a memory-mapped token file."""

    def __init__(self, path: Path, seq_len: int):
        self.tokens = np.load(path, mmap_mode="r")
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict:
        row = self.tokens[index * self.seq_len : (index + 1) * self.seq_len].astype(np.int64)  # (seq_len,)
        return {"input_ids": row, "labels": row}


def fixed_arguments(args: PretrainArguments, file: Path) -> dict:
    """
    The arguments that a run keeps when it goes on: all but `--max_steps`, `--save_steps` and where things are.

    Raises:
        ValueError: those in `file`, which the folder's tokens and checkpoints were made with, are others.
    """
    free = ("corpus_dir", "output_dir", "max_steps", "save_steps")
    arguments = {name: value for name, value in vars(args).items() if name not in free}
    found = json.loads(file.read_text()) if file.exists() else arguments
    differing = [f"--{name} {found[name]!r}" for name in arguments if found[name] != arguments[name]]
    if differing:
        raise ValueError(f"{file.parent} holds a run with {', '.join(differing)}. Use these or another --output_dir.")
    return arguments


def seen_before(args: PretrainArguments) -> int:
    """
    Tokens that `--model` was trained on.

    Raises:
        ValueError: its run held other text out, so that its perplexity here would be that of text it may have seen.
    """
    if args.model is None:
        return 0
    if Path(args.model).resolve() == Path(args.output_dir).resolve():
        raise ValueError(f"--output_dir must be another folder than --model, got {args.model} for both.")
    facts = json.loads(Path(args.model, "pretrain.json").read_text())
    for name in ("seed", "shards", "heldout_tokens"):
        if getattr(args, name) != facts["arguments"][name]:
            raise ValueError(
                f"--{name} must be {facts['arguments'][name]!r}, as for {args.model}, so that the same text is held out; "
                f"got {getattr(args, name)!r}."
            )
    return facts["tokens_seen"] + facts.get("tokens_seen_before", 0)


def samples(
    model, tokenizer, rows: TokenRows, count: int = 4, prompt_tokens: int = 16, new_tokens: int = 48
) -> list[dict]:
    """How the model goes on with the beginnings of the first rows, drawn at temperature 0.8 from the 50 likeliest."""
    import torch

    model.eval()
    drawn = []
    for index in range(min(count, len(rows))):
        prompt = torch.as_tensor(rows[index]["input_ids"][None, :prompt_tokens], device=model.device)  # (1, prompt)
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
        )[0]
        parts = {"prompt": ids[:prompt_tokens], "continuation": ids[prompt_tokens:]}
        drawn.append({name: tokenizer.decode(part) for name, part in parts.items()})
    return drawn


def main() -> None:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output = Path(args.output_dir)
    before = seen_before(args)
    output.mkdir(parents=True, exist_ok=True)
    arguments = fixed_arguments(args, output / "arguments.json")

    if not all((output / name).exists() for name in ("tokenizer.json", "train.npy", "heldout.npy")):
        texts = load_pieces(args)
        logger.info("corpus: %d pieces, %d characters", len(texts), sum(map(len, texts)))
        if args.model:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(args.model)
        else:
            tokenizer = train_tokenizer(texts, args.vocab_size)
        write_tokens(texts, tokenizer, args, output)
        tokenizer.save_pretrained(output)
        write_json(output / "arguments.json", arguments)
        del texts

    import torch
    from transformers import (
        AutoTokenizer,
        Qwen3Config,
        Qwen3ForCausalLM,
        Trainer,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )
    from transformers.trainer_callback import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(output)
    set_seed(args.seed)
    checkpoints = output / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    finished = last is not None and int(last.rsplit("-", 1)[1]) >= args.max_steps
    if finished or args.model:
        model = Qwen3ForCausalLM.from_pretrained(last if finished else args.model, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=args.hidden_size,
                num_hidden_layers=args.num_hidden_layers,
                intermediate_size=args.intermediate_size,
                num_attention_heads=args.hidden_size // 64,
                num_key_value_heads=max(1, args.hidden_size // 192),
                head_dim=64,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, args.max_steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            seed=args.seed,
            dataloader_drop_last=True,
        ),
        train_dataset=TokenRows(output / "train.npy", args.seq_len),
        eval_dataset=TokenRows(output / "heldout.npy", args.seq_len),
        data_collator=default_data_collator,
    )
    if finished:
        trainer.state = TrainerState.load_from_json(str(Path(last, "trainer_state.json")))
    else:
        trainer.train(resume_from_checkpoint=last)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output))

    heldout = TokenRows(output / "heldout.npy", args.seq_len)
    characters = len(tokenizer.decode(np.asarray(heldout.tokens[: len(heldout) * args.seq_len], dtype=np.int64)))
    tokens = len(heldout) * args.seq_len
    facts = {
        "arguments": vars(args),
        "parameters": model.num_parameters(),
        "tokens_seen_before": before,
        "tokens_seen": trainer.state.global_step * args.batch_size * args.seq_len,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
        "heldout_bits_per_character": loss / math.log(2) * tokens / characters,
        "samples": samples(trainer.model, tokenizer, heldout),
        "log": trainer.state.log_history,
    }
    write_json(output / "pretrain.json", facts)
    logger.info("held-out perplexity %.1f after %d tokens", facts["heldout_perplexity"], facts["tokens_seen"])


if __name__ == "__main__":
    main()
