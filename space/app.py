"""A page on which visitors try a Causal2Vec model: a Space of the Hub, or on this machine.

    python space/app.py --model path/to/clone
    python space/app.py --model user/name --revision <40-digit commit>

`Search` finds passages of a visitor's text, for the query with and without an instruction; `Compare` shows the
similarities of a few texts as a heat map. Loading runs the code that stands beside the weights, so a model of the Hub
is taken at one commit only. Nothing outside this file is imported but what requirements.txt brings and gradio.
Invariants: what visitors wrote is escaped in all HTML; whatever they send, the work and memory of one request and the
number that wait are bounded.
"""

import argparse
import functools
import html
import os
import re
import time
from pathlib import Path

import numpy as np


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
from semantic_text_splitter import MarkdownSplitter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from transformers import AutoModel


MAX_CHARS = 20_000  # of the text that is searched
MAX_TOKENS = 6_400  # of the same; bounds the time of a search, which 20,000 rare characters do not
MAX_PASSAGES = 200
MAX_QUERY_CHARS = 500  # of a query, an instruction, and a text to compare
MAX_TEXTS = 16  # to compare
MAX_FILE_BYTES = 100_000
MAX_BODY_BYTES = 1_000_000  # of one HTTP request
MAX_WAITING = 16  # requests in the queue; those who come then are asked to try again
PASSAGE_TOKENS = 128
TOP = 5  # passages shown

QUERY = "why does honey not spoil"
QUERIES = [QUERY, "what should I do about a bee sting", "how do bees tell each other where food is"]
TEXT = """\
# Bees, a short guide

How long do bees live? Visitors ask this more often than anything else, and every summer the list of questions on the \
door of the shed is a new one.

A worker that hatches in June has worn herself out after about six weeks. One that hatches in October has less to do \
and lasts until spring; a queen may see three or four years.

A hive in May holds some forty thousand workers, a few hundred drones and one queen. In January ten thousand are left, \
packed in a ball around their food.

Honey keeps for decades because it is too dry and too sour for microbes. When it turns solid, warm the jar in water \
that your hand can stand, never in boiling water.

A forager that has found clover dances on the comb. The angle of her run against the vertical is the angle between sun \
and food, and a longer run means a longer flight.

Beginners should buy a calm colony in spring, a veil, gloves and a smoker, and join a club. The first year costs about \
as much as a decent bicycle, and it brings little or no honey.

A sting stays in the skin and goes on pumping. Scrape it off with a fingernail within seconds and cool the spot. \
Trouble with breathing is an emergency: call an ambulance.

Not every bee makes honey. Of some twenty thousand species most live alone, in the ground or in hollow stems, and many \
of them pollinate fruit trees better than the honey bee does.
"""
SENTENCES = """\
The bakery on the corner sells fresh bread every morning.
You can buy warm loaves there from six o'clock.
Our train was an hour late because of snow.
Winter weather delayed the railway.
She plays the cello in an amateur orchestra.
Interest rates were left unchanged this month."""
SYMMETRIC = "Retrieve semantically similar text"

# What WCAG 2 asks for, 4.5:1 between text and ground.
COLOURS = dict(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
)
CSS = """
.c2v-results { list-style: none; margin: 0; padding: 0; }
.c2v-results li { border-top: 1px solid var(--border-color-primary); padding: 0.6rem 0; margin: 0; }
.c2v-results p { display: block; margin: 0.3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.c2v-results .c2v-moved { float: right; color: var(--body-text-color-subdued); }
.c2v-bar { display: inline-block; width: 40%; height: 0.5rem; margin: 0 0.6rem; background: var(--border-color-primary); }
.c2v-bar span { display: block; height: 100%; background: #2b6cb0; }
.c2v-heat { margin: 0; }
.c2v-heat figcaption { padding-bottom: 0.5rem; color: var(--body-text-color-subdued); }
.c2v-heat div { overflow-x: auto; }
.c2v-heat table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.c2v-heat td, .c2v-heat thead th { min-width: 3rem; padding: 0.5rem 0.3rem; text-align: center; }
.c2v-heat tbody th { max-width: 16rem; padding-right: 0.6rem; font-weight: normal; text-align: left; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
@media (max-width: 640px) { .c2v-heat tbody th { max-width: 7rem; } }
"""


def load(model: str, revision: str | None = None):
    """
    Args:
        model (`str`): A folder, or a model of the Hub.
        revision (`str`, *optional*): Of a model of the Hub: the commit, 40 hexadecimal digits. Its code is run.

    Raises:
        ValueError: a model of the Hub without a commit.
        OSError: there is no such model.
    """
    if Path(model).is_dir():
        revision = None
    elif not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"{model} is no folder, and a model of the Hub needs the 40 digits of a commit as its revision, got "
            f"{revision!r}: a branch or tag may come to hold other code."
        )
    model = AutoModel.from_pretrained(model, revision=revision, trust_remote_code=True, use_safetensors=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_file(content: bytes | None) -> str:
    """The text of a visitor's file; raises ValueError if it is too large or no text."""
    if not content:
        raise ValueError("The file is empty. Choose another one.")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"The file has {len(content):,} bytes; at most {MAX_FILE_BYTES:,} are read.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError("The file is no plain text in UTF-8. Choose a .txt or .md file.")
    return checked("file", text.replace("\r\n", "\n"), MAX_CHARS)


def checked(name: str, text: str | None, most: int) -> str:
    """The text without white space around it; raises ValueError if nothing is left or it is too long."""
    text = (text or "").strip()
    if not text:
        raise ValueError(f"The {name} is empty. Write something first.")
    if len(text) > most:
        raise ValueError(f"The {name} has {len(text):,} characters; at most {most:,} are allowed. Shorten it.")
    return text


class Demo:
    """What the page's buttons do, with one model."""

    def __init__(self, model):
        self.model = model
        self.tokenizer = model.processor.tokenizer.backend_tokenizer
        # The encoder's tokenizer may need more tokens than the decoder's, which are counted.
        most = min(PASSAGE_TOKENS, min(model.processor.limits().values()) // 2)
        self.splitter = MarkdownSplitter.from_huggingface_tokenizer(self.tokenizer, (most // 4, most))
        self.embed = functools.lru_cache(maxsize=64)(self._embed)  # so that a smaller size embeds nothing again
        model.encode(TEXT.split("\n"))  # the first call is slower than all others

    def _embed(self, texts: tuple[str, ...], instruction: str | None) -> tuple[np.ndarray, float, int]:
        """Vectors of shape (texts, embedding size), the milliseconds that they took, and how many texts were cut."""
        cut = sum(map(bool, self.model.processor.towers_cut(texts, instruction)))
        start = time.perf_counter()
        vectors = self.model.encode(texts, instruction=instruction, truncation="silent", show_progress_bar=False)
        return vectors, 1000 * (time.perf_counter() - start), cut

    def passages(self, text: str | None) -> tuple[str, ...]:
        """Cuts a text into passages; raises ValueError if there is none, or it is too long."""
        text = checked("text", text, MAX_CHARS)
        tokens = len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if tokens > MAX_TOKENS:  # before it is cut, which takes longest where words are rare
            raise ValueError(f"The text has {tokens:,} tokens; at most {MAX_TOKENS:,} are searched. Shorten it.")
        passages = tuple(self.splitter.chunks(text))
        if len(passages) > MAX_PASSAGES:
            raise ValueError(f"The text has {len(passages)} passages; at most {MAX_PASSAGES} are searched. Shorten it.")
        return passages

    def search(self, query: str | None, instruction: str | None, text: str | None, size: int) -> tuple[str, str, str]:
        """HTML of the passages closest to the query without and with the instruction, and a line on time and size."""
        query = checked("query", query, MAX_QUERY_CHARS)
        instruction = checked("instruction", instruction, MAX_QUERY_CHARS)
        passages = self.passages(text)
        vectors, milliseconds, cut = self.embed(passages, None)
        plain, _, cut_plain = self.embed((query,), None)
        instructed, query_milliseconds, cut_instructed = self.embed((query,), instruction)
        start = time.perf_counter()
        vectors = shortened(vectors, size)  # (passages, size)
        scores = [vectors @ shortened(q, size)[0] for q in (plain, instructed)]
        milliseconds = {
            f"{len(passages)} passage{'s' * (len(passages) > 1)}": milliseconds,
            "the query with its instruction": query_milliseconds,
            "comparing": 1000 * (time.perf_counter() - start),
        }
        orders = [np.argsort(-s, kind="stable").tolist() for s in scores]
        before = {passage: rank for rank, passage in enumerate(orders[0], 1)}
        return (
            results_html(passages, scores[0], orders[0]),
            results_html(passages, scores[1], orders[1], before),
            self.facts(milliseconds, size, cut + max(cut_plain, cut_instructed)),
        )

    def compare(self, lines: str | None, instruction: str | None, size: int) -> tuple[str, str]:
        """HTML of a heat map of the lines' similarities to each other, and a line on time and size."""
        texts = tuple(line.strip() for line in (lines or "").splitlines() if line.strip())
        if not 2 <= len(texts) <= MAX_TEXTS:
            raise ValueError(f"Write 2 to {MAX_TEXTS} texts, one per line; there are {len(texts)}.")
        texts = tuple(checked(f"text in line {i}", line, MAX_QUERY_CHARS) for i, line in enumerate(texts, 1))
        instruction = checked("instruction", instruction, MAX_QUERY_CHARS) if (instruction or "").strip() else None
        vectors, milliseconds, cut = self.embed(texts, instruction)
        vectors = shortened(vectors, size)
        return heat_map_html(texts, vectors @ vectors.T), self.facts({f"{len(texts)} texts": milliseconds}, size, cut)

    def facts(self, milliseconds: dict[str, float], size: int, cut: int) -> str:
        told = [f"{name}: {value:.{0 if value >= 10 else 2}f} ms" for name, value in milliseconds.items()]
        told.append(f"{size} of {self.model.config.embedding_size} numbers per vector")
        if cut:
            told.append(f"{cut} text{'s' * (cut > 1)} longer than the model reads, cut at the end")
        return " · ".join(told)


def shortened(vectors: np.ndarray, size: int) -> np.ndarray:
    """The first `size` numbers of each vector, scaled to length 1, as `truncate_dim` gives them: (texts, size)."""
    vectors = vectors[:, :size]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def results_html(passages, scores, order: list[int], before: dict[int, int] | None = None) -> str:
    """The best passages as a list; with the ranks that they had `before`, which of them rose or fell."""
    items = []
    for rank, passage in enumerate(order[:TOP], 1):
        score = float(scores[passage])
        moved = f'<span class="c2v-moved">was {before[passage]}</span>' if before and before[passage] != rank else ""
        bar = f'<span class="c2v-bar" aria-hidden="true"><span style="width: {100 * max(score, 0):.0f}%"></span></span>'
        items.append(f"<li><b>{rank}</b>{bar}{score:z.3f}{moved}<p>{html.escape(passages[passage])}</p></li>")
    return f'<ol class="c2v-results">{"".join(items)}</ol>'


def heat_map_html(texts, similarities: np.ndarray) -> str:
    """A table with a cell per pair of texts."""
    head = "".join(f'<th scope="col">{number}</th>' for number in range(1, len(texts) + 1))
    rows = []
    for number, (text, row) in enumerate(zip(texts, similarities.tolist(), strict=True), 1):
        cells = "".join(f'<td style="{cell_style(value)}">{value:z.2f}</td>' for value in row)
        text = html.escape(text)
        rows.append(f'<tr><th scope="row" title="{text}"><b>{number}</b> {text}</th>{cells}</tr>')
    return (
        '<figure class="c2v-heat"><figcaption>Cosine similarity, from 0 or less (white) to 1 (dark blue)</figcaption>'
        f"<div><table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></figure>"
    )


def cell_style(similarity: float) -> str:
    """White to dark blue, and whichever of black and white is read better on it."""
    share = min(max(similarity, 0.0), 1.0)
    colour = [round(255 + share * (end - 255)) for end in (8, 48, 107)]
    return f"background: rgb({', '.join(map(str, colour))}); color: {'#000' if luminance(colour) > 0.179 else '#fff'}"


def luminance(colour: list[int]) -> float:
    """The relative luminance of an sRGB colour, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def told(function):
    """Shows a ValueError to the visitor, who can do something about it."""

    @functools.wraps(function)
    def run(*args):
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return run


def build(demo: Demo) -> gr.Blocks:
    """The page, with results of its example."""
    largest = demo.model.config.embedding_size
    instruction = demo.model.config.query_instruction or "Given a question, retrieve passages that answer the question"

    def size_slider(elem_id: str) -> gr.Slider:
        info = "Fewer numbers take less memory, and tell texts apart less well."
        slider = gr.Slider(
            min(16, largest),
            largest,
            largest,
            step=8,
            precision=0,
            label="Size of a vector",
            info=info,
            elem_id=elem_id,
        )
        # While a number is typed into its field, that is empty, or holds one out of range.
        slider.preprocess = lambda size: round(min(max(size or 0, slider.minimum), slider.maximum))
        return slider

    # One request uses the model at a time, whichever button it came from.
    event = dict(concurrency_id="model", api_visibility="private", trigger_mode="always_last", show_progress="minimal")
    with gr.Blocks(title="Causal2Vec", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown(
            "# Causal2Vec\nSearches by meaning, with embeddings of a language model that is told what to look for. Try it on "
            "your own text."
        )
        with gr.Tab("Search"):
            plain, instructed, facts = demo.search(QUERY, instruction, TEXT, largest)
            query = gr.Textbox(QUERY, label="Query", elem_id="query")
            examples = gr.Examples(
                QUERIES, query, label="Queries to try", api_visibility="private", cache_examples=False
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    text = gr.Textbox(TEXT, label="Text to search", lines=9, max_lines=9, elem_id="text")
                    upload = gr.UploadButton(
                        "Open a .txt or .md file", type="binary", file_types=[".txt", ".md"], size="md", elem_id="file"
                    )
                with gr.Column(min_width=300):
                    info = "Says what is looked for. Passages carry none."
                    instruct = gr.Textbox(instruction, label="Instruction", info=info, lines=2, elem_id="instruction")
                    size = size_slider("size")
                    button = gr.Button("Search", variant="primary", elem_id="search")
            with gr.Row():
                with gr.Column(min_width=300):
                    gr.Markdown("### Without the instruction")
                    plain = gr.HTML(plain, elem_id="plain")
                with gr.Column(min_width=300):
                    gr.Markdown("### With the instruction")
                    instructed = gr.HTML(instructed, elem_id="instructed")
            facts = gr.Markdown(facts, elem_id="facts")
            search = dict(
                fn=told(demo.search), inputs=[query, instruct, text, size], outputs=[plain, instructed, facts], **event
            )
            gr.on([button.click, query.submit, size.change], **search)
            examples.load_input_event.then(**search)
            upload.upload(told(read_file), upload, text, api_visibility="private", show_progress="hidden")
        with gr.Tab("Compare"):
            heat_map, facts = demo.compare(SENTENCES, SYMMETRIC, largest)
            with gr.Row():
                with gr.Column(min_width=300):
                    label = f"Texts to compare, one per line, at most {MAX_TEXTS}"
                    lines = gr.Textbox(SENTENCES, label=label, lines=7, max_lines=MAX_TEXTS, elem_id="lines")
                with gr.Column(min_width=300):
                    info = "The same for all texts, as they are alike. None is fine, too."
                    instruct = gr.Textbox(SYMMETRIC, label="Instruction", info=info, elem_id="symmetric")
                    size = size_slider("compare_size")
                    button = gr.Button("Compare", variant="primary", elem_id="compare")
            heat_map = gr.HTML(heat_map, elem_id="heat_map")
            facts = gr.Markdown(facts, elem_id="compare_facts")
            gr.on([button.click, size.change], told(demo.compare), [lines, instruct, size], [heat_map, facts], **event)
    return page.queue(default_concurrency_limit=1, max_size=MAX_WAITING, api_open=False)


class BodyLimit:
    """ASGI middleware that refuses HTTP requests with a body of more than `MAX_BODY_BYTES`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        size = 0

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, f"A request has at most {MAX_BODY_BYTES:,} bytes.")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


def launch(page: gr.Blocks, **options):
    """Serves the page within its limits; see `gr.Blocks.launch` for options and what it returns."""
    fonts = dict(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))  # the visitor's own
    return page.launch(
        theme=gr.themes.Default(primary_hue="blue", **fonts).set(**COLOURS),
        css=CSS,
        max_file_size=MAX_FILE_BYTES,
        app_kwargs={"middleware": [Middleware(BodyLimit)]},
        footer_links=["gradio", "settings"],
        enable_monitoring=False,
        run_history=False,  # which would keep what visitors write
        ssr_mode=False,
        share=False,
        **options,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=os.environ.get("CAUSAL2VEC_MODEL"), help="folder or Hub id (default: $CAUSAL2VEC_MODEL)"
    )
    parser.add_argument(
        "--revision",
        default=os.environ.get("CAUSAL2VEC_REVISION"),
        help="40-digit commit of a Hub id (default: $CAUSAL2VEC_REVISION)",
    )
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("which model? Give --model, or set CAUSAL2VEC_MODEL.")
    try:
        model = load(args.model, args.revision)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    launch(build(Demo(model)))


if __name__ == "__main__":
    main()
