"""The model card that a trained folder carries: what it is, how to use it, and the facts of its run."""

from pathlib import Path


TEMPLATE = """
# {name}

A [Causal2Vec](https://arxiv.org/abs/2507.23386) text embedding model: `{encoder}` reads the text and gives one
Contextual token, which `{decoder}` reads with the text. {dim} numbers per text, compared by cosine.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)
queries = model.encode(["how much protein should a female eat"], instruction={instruction!r})
passages = model.encode(["As a general guideline, women need 46 grams of protein per day."])
print(queries @ passages.T)
```

## Training

{steps} steps of {global_batch_size} rows, temperature {temperature}, peak learning rate {learning_rate}, seed {seed};
decoder: {train_decoder}, encoder: {train_encoder}. Final loss {final_loss:.4f}. All arguments and the log are in
`training.json`.

| dataset | rows | per epoch | instructions |
|---|---|---|---|
{datasets}

Inputs longer than {max_seq_length} tokens are cut. The weights carry the licences of their base models and of the
training data; see there before use.
"""


def write_card(folder: str | Path, facts: dict, model, name: str) -> None:
    """Renders the card of a run (the contents of its training.json) into `folder/README.md`."""
    from huggingface_hub import ModelCard, ModelCardData

    arguments, plan = facts["arguments"], facts["plan"]
    config = model.config
    encoder = arguments["encoder"] or f"the encoder of {arguments['model']}"
    decoder = arguments["decoder"] or f"the decoder of {arguments['model']}"
    rows = [
        f"| {d['name']} | {d['rows']:,} | {d['rows_per_epoch']:,} | {'; '.join(d['instructions'])} |"
        for d in plan["datasets"]
    ]
    text = TEMPLATE.format(
        name=name,
        encoder=encoder,
        decoder=decoder,
        dim=2 * config.hidden_size,
        instruction=config.query_instruction or plan["datasets"][0]["instructions"][0],
        steps=facts["steps"],
        global_batch_size=plan["global_batch_size"],
        final_loss=facts["final_loss"],
        datasets="\n".join(rows),
        max_seq_length=config.max_seq_length,
        **{key: arguments[key] for key in ("temperature", "learning_rate", "seed", "train_decoder", "train_encoder")},
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["causal2vec", "text-embeddings", "sentence-similarity", "custom_code"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(folder) / "README.md")
