"""Makes the classification rows that labels.py reads: texts whose positive is the name of their label.

Not part of the paper. Sentiment comes from the texts that VADER was made with (Hutto and Gilbert, 2014: tweets, and
sentences of product reviews, film reviews and editorials, rated from -4 to 4 by twenty people each). They are in the
source distribution of the package vaderSentiment, in additional_resources/hutto_ICWSM_2014.tar.gz. Reviews and editorials
are used whole, too; of film reviews there are single sentences only, and some of them are joined. Emotions are guessed: a
sentence of these texts or of a corpus that has words of one emotion and of no other (recipes/data/emotion_words.json, after
the tree of Shaver et al., 1987) is taken to express it.

    python label_rows.py --vader_dir hutto_ICWSM_2014 --corpus_dir ../shared/data/corpus --shards novels nltk_texts \
        --output_dir runs/labels
"""

import argparse
import html
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from corpus_pairs import write_rows
from pretrain import corpus_files, read_documents


ROOT = Path(__file__).resolve().parent
SENTIMENTS = ("negative", "neutral", "positive")
LONGEST = 220  # characters of a sentence whose emotion is guessed
RATED_FILES = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")


def rated_texts(folder: Path, joined: int, seed: int) -> Iterator[tuple[str, str]]:
    """
    Texts and their sentiments; sentences of one review or editorial (ids `3_1`, `3_2`, ...) also joined, and sentences of
    film reviews by [`joined_rows`].

    Raises:
        FileNotFoundError: a file is not in the folder.
        ValueError: a line is not an id, a rating and a text.
    """
    for name in RATED_FILES:
        path = folder / f"{name}_GroundTruth.txt"
        rows = []
        for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
            if line.strip():
                try:
                    key, rating, text = line.split("\t", 2)
                    rows.append((key, float(rating), html.unescape(text).strip()))
                except ValueError:
                    raise ValueError(f"{path}, line {number}: expected id, rating and text, got {line!r}.") from None
        yield from ((text, sentiment([rating])) for _, rating, text in rows)
        if name == "movieReviewSnippets":
            reviews = joined_rows(rows, joined, seed)
        else:
            parts = (row for row in rows if "_" in row[0])
            reviews = (list(review) for _, review in groupby(parts, lambda row: row[0].split("_")[0]))
        for review in reviews:
            if len(review) > 1:
                yield " ".join(text for *_, text in review), sentiment([rating for _, rating, _ in review])


def joined_rows(rows: Sequence[tuple], count: int, seed: int) -> Iterator[list[tuple]]:
    """
    Draws `count` lists of 3 to 16 of the rows of id, rating and text. Each row of a list is with a probability of two thirds
    of the list's own sentiment, else any; a row may come twice.
    """
    rng = random.Random(seed)
    pools = {label: [row for row in rows if sentiment([row[1]]) == label] for label in SENTIMENTS}
    for _ in range(count):
        own = pools[rng.choice(SENTIMENTS)] or rows
        yield [rng.choice(own if rng.random() < 2 / 3 else rows) for _ in range(rng.randint(3, 16))]


def sentiment(ratings: Sequence[float], neutral: float = 0.5) -> str:
    """
    The label of a text whose sentences have these ratings: neutral where their mean is from `-neutral` to `neutral`, both
    over the root of their number, as means of many ratings are nearer to each other.
    """
    mean, neutral = sum(ratings) / len(ratings), neutral / len(ratings) ** 0.5
    return SENTIMENTS[(mean >= -neutral) + (mean > neutral)]


def sentences(documents: Iterable[str], shortest: int = 20, longest: int = LONGEST) -> Iterator[str]:
    """The sentences of plain texts, of `shortest` to `longest` characters."""
    for document in documents:
        for paragraph in document.splitlines():
            for sentence in re.split(r"(?<=[.!?”\"])\s+(?=[A-Z“\"'])", paragraph):
                if shortest <= len(sentence.strip()) <= longest:
                    yield sentence.strip()


def emotional(texts: Iterable[str], words: dict[str, list[str]], per_word: int, seed: int) -> list[tuple[str, str]]:
    """Texts and their emotion, for those with words of one emotion alone: at most `per_word` for the first such word."""
    emotions = {word: emotion for emotion, listed in words.items() for word in listed}
    found = defaultdict(list)
    for text in dict.fromkeys(texts):
        matches = [word for word in re.findall(r"[a-z]+", text.lower()) if word in emotions]
        if len({emotions[word] for word in matches}) == 1:
            found[matches[0]].append(text)
    rng = random.Random(seed)
    return [
        (text, emotions[word])
        for word in sorted(found)
        for text in rng.sample(found[word], min(per_word, len(found[word])))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vader_dir", type=Path, required=True, help="folder of the files ..._GroundTruth.txt")
    parser.add_argument("--corpus_dir", required=True, help="folder of .txt or .txt.zst files, as for pretrain.py")
    parser.add_argument("--shards", nargs="+", help="file stems to use (default: all)")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets emotion.jsonl.gz and sentiment.jsonl.gz")
    parser.add_argument("--rows_per_word", type=int, default=25, help="sentences for an emotion's word and a source")
    parser.add_argument("--shortest", type=int, default=20, help="letters and digits of a text at least (default: 20)")
    parser.add_argument(
        "--joined", type=int, default=2_000, help="texts to join from sentences on films (default: 2000)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the choice of sentences (default: 42)")
    args = parser.parse_args(argv)

    rated = dict(rated_texts(args.vader_dir, args.joined, args.seed))
    rated = {text: label for text, label in rated.items() if length(text) >= args.shortest}
    words = json.loads((ROOT / "recipes" / "data" / "emotion_words.json").read_text(encoding="utf-8"))
    sources = [[text for text in rated if len(text) <= LONGEST]]
    sources += [sentences(read_documents(path)) for path in corpus_files(args.corpus_dir, args.shards)]
    labelled = {
        "sentiment": list(rated.items()),
        "emotion": [
            row
            for texts in sources
            for row in emotional((t for t in texts if length(t) >= args.shortest), words, args.rows_per_word, args.seed)
        ],
    }
    for name, rows in labelled.items():
        labels = sorted({label for _, label in rows})
        path = args.output_dir / f"{name}.jsonl.gz"
        write_rows(
            path,
            (
                {"query": text, "positive": label, "negatives": [other for other in labels if other != label]}
                for text, label in rows
            ),
        )
        print(f"{path}: {len(rows)} rows, {dict(sorted(Counter(label for _, label in rows).items()))}")


def length(text: str) -> int:
    """Its letters and digits: exclamations such as a bare greeting stand in many a dataset."""
    return sum(character.isalnum() for character in text)


if __name__ == "__main__":
    main()
