"""Loads or joins the model to train, and chooses which parameters are trained (section 4.1)."""

import os
from pathlib import Path

import torch

from configuration_causal2vec import WITHOUT_ENCODER
from modeling_causal2vec import Causal2VecModel
from training.arguments import TRAINED, Causal2VecTrainingArguments, ModelArguments
from training.trainer import Causal2VecTrainer


def load_model(args: ModelArguments) -> Causal2VecModel:
    """
    The model to train, with all weights in `args.dtype`.

    Raises:
        ValueError: expected either a model or both backbones; or an argument contradicts the given model.
    """
    has_encoder = args.baseline not in WITHOUT_ENCODER
    encoder = args.encoder if has_encoder else None
    backbones = [encoder, args.decoder] if has_encoder else [args.decoder]
    if any(backbones) if args.model is not None else None in backbones:
        raise ValueError("Give either --model, or both --encoder and --decoder.")
    names = ("baseline", "pooling", "contextual_position", "num_contextual_tokens", "bidirectional")
    names += ("template_prefix", "template_suffix", "query_instruction", "text_prefix")
    names += ("max_seq_length", "icl_max_seq_length", "encoder_max_seq_length")
    changed = [
        name
        for name in (*names, "decoder_gguf_file", "contextual_token_norm")
        if getattr(args, name) not in (None, False, "")
    ]
    if args.model is not None and changed:
        raise ValueError(f"With --model, what the model is stays as it is; leave out --{' --'.join(changed)}.")
    attention = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model is not None:
        model = Causal2VecModel.from_pretrained(args.model, dtype=args.dtype, **attention)
    else:
        settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        gguf = {} if args.decoder_gguf_file is None else {"gguf_file": args.decoder_gguf_file}
        model = Causal2VecModel.from_encoder_decoder_pretrained(
            encoder,
            args.decoder,
            dtype=args.dtype,
            encoder_kwargs=attention,
            decoder_kwargs=attention | gguf,
            **settings,
        )
    return model


@torch.no_grad()
def scale_projector(model: Causal2VecModel, documents: dict[str, torch.Tensor], ratio: float) -> None:
    """
    Scales a new projector so that the Contextual tokens of these documents have, on average, `ratio` times the norm of
    their word embeddings. The paper does not say how the projector starts; drawn with the usual standard deviation of
    0.02 its tokens are a fifth as long as SmolLM2's words, and the first normalisation makes their gradients huge.

    Args:
        documents: The processor's tensors, `input_ids` and `attention_mask` `(batch, seq_len)`, those of the encoder alike.

    Raises:
        ValueError: the ratio is not positive.
    """
    if ratio <= 0:
        raise ValueError(f"--contextual_token_norm must be positive, got {ratio}.")
    ids, mask = documents["input_ids"], documents["attention_mask"].bool()
    words = model.get_input_embeddings()(ids[mask & (ids != model.config.contextual_token_id)])  # (words, hidden_size)
    vectors = model.get_encoder_embedding(documents["encoder_ids"], documents["encoder_attention_mask"])
    tokens = model.projector(vectors)  # (batch, hidden_size)
    scale = ratio * words.norm(dim=-1).mean() / tokens.norm(dim=-1).mean()
    for parameter in model.projector.linear_2.parameters():
        parameter.mul_(scale)


def choose_parameters(model: Causal2VecModel, args: ModelArguments):
    """
    Freezes what is not trained, adds LoRA where requested, and casts trained parameters to float32.

    Returns:
        The model, or a PeftModel around it.

    Raises:
        ValueError: one tower would be trained with LoRA and the other in full, the encoder does not exist, or the
            method is unknown.
    """
    towers = {"encoder": args.train_encoder, "decoder": args.train_decoder}
    if model.encoder is None and towers.pop("encoder") != "frozen":
        raise ValueError(f"--train_encoder must be frozen: the baseline {model.config.baseline!r} has no encoder.")
    for tower, how in towers.items():
        if how not in TRAINED:
            raise ValueError(f"--train_{tower} must be one of {TRAINED}, got {how!r}.")
    if set(towers.values()) >= {"lora", "full"}:
        raise ValueError("LoRA on one tower and full training of the other cannot be combined; choose one for both.")
    if "lora" in towers.values():
        from peft import LoraConfig, get_peft_model

        targets = [lora_targets(model, tower) for tower, how in towers.items() if how == "lora"]
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="|".join(targets),
            modules_to_save=None if model.projector is None else ["projector"],
        )
        model = get_peft_model(model, config)
    else:
        for tower, how in towers.items():
            getattr(model, tower).requires_grad_(how == "full")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def lora_targets(model: Causal2VecModel, tower: str) -> str:
    """A pattern that matches all linear layers of one tower and nothing else."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in getattr(model, tower).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return rf"{tower}\.(.*\.)?({'|'.join(sorted(names))})"


def keep_base(model: Causal2VecModel, folder: Path, args: Causal2VecTrainingArguments, resuming: bool) -> None:
    """Saves newly joined backbones, from one process, as the base of the adapter."""
    with args.main_process_first(local=False, desc="saving the base model"):
        if args.process_index == 0 and not (resuming and (folder / "config.json").exists()):
            model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder.resolve())  # which checkpoints name


def name_of_base(args: ModelArguments, adapter: Path) -> str | None:
    """The name of an adapter's base: its Hub id, or its path relative to the adapter's folder."""
    base = adapter.with_name("base") if args.model is None else Path(args.model)
    if args.base_id is not None or not base.exists():
        return args.base_id or args.model
    return Path(os.path.relpath(base.resolve(), adapter.resolve())).as_posix()


def whole_model(trainer: Causal2VecTrainer, args: ModelArguments):
    """
    The trained model or PeftModel. Under FSDP each process holds a part of it: all processes must call this, and the
    first receives a new model with all weights.
    """
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    model = choose_parameters(load_model(args), args)
    model.load_state_dict(weights)
    return model
