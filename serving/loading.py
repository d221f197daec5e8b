"""Loads a checkpoint for a program that serves it, by this repository's own classes.

No code that stands beside the weights is run.
"""

DTYPES = ("float32", "bfloat16", "float16", "auto")  # "auto": as saved


def load_model(model: str, dtype: str = "float32", revision: str | None = None, device=None):
    """
    Args:
        model (`str`): Folder or Hub id.
        dtype (`str`): Of the computation; `"auto"` as saved.
        revision (`str`, *optional*): Of a Hub id: a commit, or a branch or tag, which may move.
        device (`str` or `torch.device`, *optional*): Defaults to the accelerator, or else the CPU.

    Returns:
        [`Causal2VecModel`] in eval mode.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged or another model's.
    """
    from configuration_causal2vec import Causal2VecConfig
    from modeling_causal2vec import Causal2VecModel
    from runtime_utils import default_device

    revision = revision or "main"
    try:
        config = Causal2VecConfig.get_config_dict(model, revision=revision)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"The model must be a folder or a Hub id, got {model}: {error}") from error
    if config.get("model_type") != "causal2vec":  # before memory is taken for a model that is not there
        found = f"model_type {config['model_type']!r}" if "model_type" in config else "no config.json"
        raise ValueError(f"The model must be a Causal2Vec checkpoint; {model} has {found}.")
    loaded = Causal2VecModel.from_pretrained(model, revision=revision, dtype=dtype)
    return loaded.to(default_device() if device is None else device).eval()
