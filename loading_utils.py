"""Loading, saving and joining: the part of [`Causal2VecModel`] that deals with folders and the Hub.

A folder holds weights (one file or shards), both tokenizers, code and settings, or an adapter that names its base.
Invariants: missing or damaged weights, or another model's, raise an error and are never reinitialised; a folder's own
weights are the ones loaded; at any moment of a save the folder loads as the old model or the new one, never a mixture.
"""

import json
import os
import shutil
import struct
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, has_file, is_accelerate_available, is_gguf_available, logging


try:
    from .configuration_causal2vec import PROMPT_TEMPLATES
    from .saving_utils import (
        holds_weights,
        new_files,
        push_to_hub,
        read_json,
        refresh_hashes,
        resolve_base,
        write_plain_card,
        write_sentence_transformers_files,
    )
    from .tokenization_utils import Causal2VecProcessor, load_tokenizers
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from configuration_causal2vec import PROMPT_TEMPLATES
    from saving_utils import (
        holds_weights,
        new_files,
        push_to_hub,
        read_json,
        refresh_hashes,
        resolve_base,
        write_plain_card,
        write_sentence_transformers_files,
    )
    from tokenization_utils import Causal2VecProcessor, load_tokenizers


logger = logging.get_logger(__name__)

_PUSH_KWARGS = ("repo_id", "token", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


class PretrainedMixin:
    """`from_pretrained`, `save_pretrained`, `push_to_hub` and `from_encoder_decoder_pretrained`."""

    push_to_hub = push_to_hub

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As in transformers; also loads both tokenizers if the folder has them. If the folder holds only a PEFT adapter,
        loads its base and attaches the adapter; a relative base path is first resolved against the adapter's folder. If
        the folder holds weights, those are loaded; an adapter beside them is attached only if it names this folder as
        its base.

        Raises:
            ValueError: weights or adapter weights are missing, unexpected or damaged, the adapter names no base, or the
                folder holds no Causal2Vec model.
        """
        attention = kwargs.get("attn_implementation")
        if isinstance(attention, dict) and not set(attention) <= {"", *cls.config_class.sub_configs}:
            raise ValueError(
                f"`attn_implementation` per tower has the keys {sorted(cls.config_class.sub_configs)}, got "
                f"{sorted(attention)}."
            )
        if isinstance(kwargs.get("dtype"), dict):
            raise ValueError(f"`dtype` must be one for the whole model, got {kwargs['dtype']}.")
        source = pretrained_model_name_or_path
        adapter_kwargs = {**_only_hub(kwargs), **(kwargs.pop("adapter_kwargs", None) or {})}
        adapter_name = kwargs.pop("adapter_name", "default")
        # AutoModel may have followed an adapter to its base; this argument then names the adapter.
        adapter = adapter_kwargs.pop("_adapter_model_path", source)
        found = _find_adapter(adapter, adapter_kwargs)
        if found is None:
            return cls._load(source, *model_args, output_loading_info=output_loading_info, **kwargs)

        base, attach = found
        if base != adapter != source:
            base = source
        if base != source:  # whose revision is not the base's
            not_its_own = ("revision", "subfolder", "_commit_hash")
            kwargs = {name: value for name, value in kwargs.items() if name not in not_its_own}
        if base == adapter != source:
            kwargs = {**kwargs, **adapter_kwargs, "config": None}
        try:
            model, info = cls._load(base, *model_args, output_loading_info=True, **kwargs)
        except OSError as error:
            if base == adapter:
                raise
            raise OSError(f"The adapter {adapter} needs its base {base}, which cannot be loaded: {error}") from error
        if attach:
            loaded = model.load_adapter(str(adapter), adapter_name=adapter_name, adapter_kwargs=adapter_kwargs)
            if missing := sorted(loaded.missing_keys):
                raise ValueError(
                    f"The adapter {adapter} left {len(missing)} weights unset, such as {missing[:5]}: its file is of "
                    "another model, or transformers is 5.17, which skips modules trained in full; get 5.18."
                )
            if Path(base).is_dir():  # or a relative path would be resolved against the folder of the next save
                model.peft_config[adapter_name].base_model_name_or_path = str(Path(base).resolve())
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, source, *model_args, output_loading_info: bool = False, **kwargs):
        """`from_pretrained` without adapters: loads a folder's own weights, or a `state_dict`."""
        hub_kwargs = _only_hub(kwargs)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig) and (source, config) != (None, None):
            cls._check_config(source if config is None else config, hub_kwargs)
        _check_weight_files(source, hub_kwargs)
        try:
            model, info = super().from_pretrained(
                source,
                *model_args,
                output_loading_info=True,
                adapter_kwargs={"subfolder": "none"},  # or transformers would attach an adapter by itself
                **kwargs,
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # shipped code does not import safetensors
                raise
            raise ValueError(
                f"The weights of {source} are damaged or cut off: {error}. Get the files again."
            ) from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                keys = sorted(info[kind])
                raise ValueError(
                    f"{source} does not hold this model's weights: {len(keys)} {kind.replace('_', ' ')}, such as "
                    f"{keys[:5]}. Was the folder saved by Causal2Vec?"
                )
        _check_finite(model, source)
        if source is not None:
            try:
                tokenizers = load_tokenizers(
                    str(source), model.config.encoder_config, model.config.decoder_config, **hub_kwargs
                )
            except OSError as error:
                logger.warning("No tokenizers beside the weights, so `encode` will not work: %s", error)
            else:
                _check_tokenizers(model, *tokenizers)
                model.processor = Causal2VecProcessor.from_config(model.config, *tokenizers)
            try:
                model._instructions_file = Path(cached_file(source, "instructions.json", **hub_kwargs))
            except OSError:
                logger.info("No instructions.json beside the weights.")
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_config(cls, source: str, hub_kwargs: dict) -> None:
        """Refuses a folder without our config.json, for which transformers would build a model of default sizes."""
        found = cls.config_class.get_config_dict(source, **hub_kwargs)[0].get("model_type")
        if found == cls.config_class.model_type:
            return
        what = "no config.json" if found is None else f"the model_type {found!r}"
        raise ValueError(f"{source} must hold a Causal2Vec model, but has {what}. Was it saved completely?")

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """
        As in transformers; also saves both tokenizers, the code, sentence-transformers' files, the instructions and, if
        there is none yet, a model card. New files replace old ones only once all are written, so a model can be saved
        into the folder that it or its code came from. If a PEFT adapter is attached, only the adapter is saved.

        Raises:
            ValueError: `save_directory` is a file, or an adapter would be ignored there, beside another model's weights.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSH_KWARGS if name in kwargs}
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}.")
        if kwargs.get("distributed_checkpoint") or not is_main_process:
            return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        is_adapter, has_weights = getattr(self, "_hf_peft_config_loaded", False), holds_weights(target)
        with new_files(target) as temporary:
            super().save_pretrained(temporary, state_dict=state_dict and dict(state_dict), **kwargs)  # which empties it
            if is_adapter:
                base = _name_base(temporary / "adapter_config.json", target)
                if has_weights and base != ".":
                    raise ValueError(
                        f"{target} holds the weights of another model than the adapter's base, {base!r}, and would load as "
                        "that model. Save the adapter into a folder of its own."
                    )
                if not has_weights:
                    self.config.save_pretrained(temporary)  # so that AutoModel finds the code here
            if self._processor is not None:
                Causal2VecProcessor.from_config(
                    self.config, self._processor.tokenizer, self._processor.encoder_tokenizer
                ).save_pretrained(temporary)
            write_sentence_transformers_files(temporary, self.config)
            if self._instructions_file.is_file():
                shutil.copyfile(self._instructions_file, Path(temporary, "instructions.json"))
            if not (target / "README.md").exists():
                write_plain_card(temporary, self.config)
        refresh_hashes(target)
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), state_dict=state_dict, **hub_kwargs, **kwargs)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | None,
        decoder: str,
        *,
        dtype: str | torch.dtype | None = None,
        contextual_token: str = "<|contextual|>",
        encoder_kwargs: dict | None = None,
        decoder_kwargs: dict | None = None,
        **config_kwargs,
    ) -> PreTrainedModel:
        """
        Joins two pretrained backbones and their tokenizers into a new model with a newly initialised projector.

        Args:
            encoder, decoder (`str`): Local folders or Hub ids. The decoder may be an embedding model with last-token
                pooling (appendix C.3), also one that was saved as an adapter.
            dtype (`str` or `torch.dtype`, *optional*): The dtype of the whole model. Defaults to the decoder's.
            contextual_token (`str`): The placeholder for the Contextual token. If the decoder's tokenizer lacks it, it
                is added and the embedding matrix is resized.
            encoder_kwargs, decoder_kwargs (`dict`, *optional*): Arguments for the two `from_pretrained` calls, such as
                `{"revision": ..., "attn_implementation": ...}`. `{"gguf_file": NAME}` reads model and tokenizer from
                that GGUF file, dequantised to float32 unless `dtype` says otherwise.
            config_kwargs: Fields of [`Causal2VecConfig`]. `template_prefix` and `template_suffix` default to the entry
                of `PROMPT_TEMPLATES` that matches the decoder's chat template.

        Example:

        ```python
        >>> model = Causal2VecModel.from_encoder_decoder_pretrained("intfloat/e5-base-v2", "Qwen/Qwen3-0.6B")
        ```
        """
        unknown = sorted(set(config_kwargs) - {field.name for field in fields(cls.config_class)})
        if unknown:
            raise TypeError(f"{cls.config_class.__name__} has no {unknown}; see its documentation for the fields.")
        encoder_kwargs, decoder_kwargs = dict(encoder_kwargs or {}), dict(decoder_kwargs or {})
        decoder_model = load_backbone(decoder, dtype=dtype or "auto", **decoder_kwargs)
        tokenizer = load_backbone_tokenizer(decoder, decoder_model.config, **decoder_kwargs)
        encoder_tokenizer = encoder_model = None
        if encoder is not None:
            encoder_model = load_backbone(encoder, dtype=decoder_model.dtype, **encoder_kwargs)
            encoder_tokenizer = load_backbone_tokenizer(encoder, encoder_model.config, **encoder_kwargs)

        if contextual_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([contextual_token], special_tokens=True)
        if len(tokenizer) > decoder_model.get_input_embeddings().num_embeddings:
            decoder_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if "template_prefix" not in config_kwargs and "template_suffix" not in config_kwargs:
            config_kwargs["template_prefix"], config_kwargs["template_suffix"] = find_prompt_template(
                tokenizer.chat_template
            )
        for name, backbone in (
            ("max_seq_length", decoder_model),
            ("icl_max_seq_length", decoder_model),
            ("encoder_max_seq_length", encoder_model),
        ):
            limit = None if backbone is None else position_limit(backbone)
            default = getattr(cls.config_class, name)
            config_kwargs.setdefault(name, default if limit is None else min(default, limit))

        config = cls.config_class(
            encoder_config=None if encoder is None else encoder_model.config,
            decoder_config=decoder_model.config,
            contextual_token_id=tokenizer.convert_tokens_to_ids(contextual_token),
            dtype=decoder_model.dtype,
            **config_kwargs,
        )
        if config.has_encoder and encoder is None:
            raise ValueError(f"{cls.__name__} needs an `encoder`, got None.")
        model = cls(config, encoder=encoder_model, decoder=decoder_model)
        model.processor = Causal2VecProcessor.from_config(config, tokenizer, encoder_tokenizer)
        return model.eval()


def _find_adapter(source, hub_kwargs: dict) -> tuple[str, bool] | None:
    """
    For a folder or Hub id with an adapter_config.json: which model to load, and whether to attach the adapter to it. The
    model is `source` itself if it has weights of its own, and then the adapter is ignored unless `source` is its base.
    """
    if source is None:
        return None
    try:
        file = cached_file(source, "adapter_config.json", **hub_kwargs)
    except OSError:
        return None
    named = read_json(file).get("base_model_name_or_path")
    folder = Path(source, hub_kwargs.get("subfolder", ""))
    base = resolve_base(named, folder)
    if any(_has(source, name, hub_kwargs) for name in ("model.safetensors", "model.safetensors.index.json")):
        attach = base is not None and _is_same(base, folder)
        if not attach:
            logger.warning("%s has weights; the adapter beside them, which was made for %r, is ignored.", source, named)
        return source, attach
    if base is None:
        raise ValueError(
            f"The adapter {source} does not say which model it was made for: `base_model_name_or_path` in its "
            f"adapter_config.json is {named!r}. Write the base's folder or Hub id there."
        )
    return base, True


def _is_same(base: str, folder: Path) -> bool:
    """Whether an adapter's base is the folder or Hub id that the adapter lies in."""
    if folder.is_dir() and Path(base).is_dir():
        return os.path.samefile(base, folder)
    return base == str(folder)


def _name_base(config: Path, folder: Path) -> str | None:
    """Makes a local base in adapter_config.json relative to the folder that the adapter goes to; returns the base."""
    values = read_json(config)
    base = values["base_model_name_or_path"]
    if base and Path(base).is_dir():
        base = values["base_model_name_or_path"] = Path(
            os.path.relpath(Path(base).resolve(), folder.resolve())
        ).as_posix()
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    return base


def _has(source, name: str, hub_kwargs: dict) -> bool:
    """Whether a folder or Hub id has a file."""
    known = ("revision", "token", "cache_dir", "local_files_only")
    path = f"{hub_kwargs.get('subfolder', '')}/{name}".strip("/")
    return has_file(source, path, **{key: value for key, value in hub_kwargs.items() if key in known})


def _check_weight_files(source, hub_kwargs: dict) -> None:
    """
    Refuses a folder with both a single weight file and an index of shards: transformers would load the single file,
    even if it is older.
    """
    if source is None:
        return
    try:
        cached_file(source, "model.safetensors.index.json", **hub_kwargs)
    except OSError:
        return
    if _has(source, "model.safetensors", hub_kwargs):
        raise ValueError(
            f"{source} holds model.safetensors and the shards of model.safetensors.index.json, and does not say which are "
            "the weights. Remove the old ones."
        )


def _check_finite(model: PreTrainedModel, source: str) -> None:
    """Refuses weights that contain NaN or infinity, which one sum per tensor reveals."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
                raise ValueError(f"The weights of {source} are damaged: {name} holds values that are not finite.")


def _check_tokenizers(model: PreTrainedModel, tokenizer, encoder_tokenizer) -> None:
    """Refuses tokenizers whose sizes show that they belong to another model."""
    slot = model.config.contextual_token_id
    for tower, found, vocab_size in (
        ("decoder", tokenizer, model.get_input_embeddings().num_embeddings),
        ("encoder", encoder_tokenizer, model.config.get_text_config(encoder=True).vocab_size),
    ):
        if found is not None and len(found) > vocab_size:
            raise ValueError(
                f"The {tower}'s tokenizer has {len(found)} tokens, but the {tower} embeds {vocab_size}: it belongs to "
                "another model. Put the right tokenizer files beside the weights."
            )
    if slot not in tokenizer.added_tokens_decoder:
        raise ValueError(
            f"`contextual_token_id` is {slot}, but that is no added token of the decoder's tokenizer, which has "
            f"{len(tokenizer)}: it belongs to another model. Put the right tokenizer files beside the weights."
        )


def _only_hub(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name in _HUB_KWARGS and value is not None}


def load_backbone(folder_or_id: str, auto_class=AutoModel, **kwargs) -> PreTrainedModel:
    """
    `auto_class.from_pretrained` that insists on complete weights. LoRA is merged; a `gguf_file` is dequantised, so that
    the model can be trained and saved.

    Raises:
        ImportError: what transformers needs to read a GGUF file is not installed.
        ValueError: tensors are missing, which transformers would reinitialise, or a GGUF file is damaged.
    """
    if kwargs.get("gguf_file") is not None:
        check_gguf_available()
        kwargs["quantization_config"] = GgufConfig(
            dequantize=True
        )  # otherwise weights may stay packed, and cannot be saved
    try:
        model, info = auto_class.from_pretrained(folder_or_id, output_loading_info=True, **kwargs)
    except (IndexError, KeyError, OverflowError, ValueError, struct.error) as error:  # what the reader of GGUF raises
        if kwargs.get("gguf_file") is None:
            raise
        raise ValueError(
            f"{kwargs['gguf_file']} of {folder_or_id} cannot be read as GGUF, {type(error).__name__}: {error}. Is it cut off?"
        ) from error
    vars(model.config).pop("_model_name_or_path", None)  # a GGUF file's title
    adapted = [(n, module) for n, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.base_layer)
    if adapted:
        model._hf_peft_config_loaded = False  # or `save_pretrained` would look for adapters
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # a pooler is never used
    if missing:
        raise ValueError(
            f"{folder_or_id} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[:5]}."
        )
    return model


def load_backbone_tokenizer(folder_or_id: str, config, **kwargs):
    """`AutoTokenizer.from_pretrained` with those of the backbone's `kwargs` that apply to it."""
    gguf = {name: value for name, value in kwargs.items() if name == "gguf_file" and value is not None}
    tokenizer = AutoTokenizer.from_pretrained(folder_or_id, **_only_hub(kwargs), **gguf)
    for name in ("bos_token", "eos_token", "pad_token") if gguf else ():
        # transformers 5.17 reads them wrongly: EOS would be BOS
        if isinstance(token_id := getattr(config, f"{name}_id", None), int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def check_gguf_available() -> None:
    """Raises ImportError unless transformers can read GGUF files here."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise ImportError("Reading a GGUF file takes two more packages: pip install gguf accelerate")


def find_prompt_template(chat_template: str | None) -> tuple[str, str]:
    """Template prefix and suffix of the first entry of `PROMPT_TEMPLATES` whose marker the chat template holds."""
    for name, (marker, template_prefix, template_suffix) in PROMPT_TEMPLATES.items():
        if name == "none" or (isinstance(chat_template, str) and marker in chat_template):
            return template_prefix, template_suffix


def position_limit(backbone: PreTrainedModel) -> int | None:
    """The number of positions of a backbone; `None` if nothing limits them."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting behind the padding id.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
