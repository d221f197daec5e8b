"""labels.py and label_rows.py: which texts get which label, what the EOS state is taught, and what stays as it was."""

import gzip
import json
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import bag_of_words
import label_rows
import labels
import train
from modeling_causal2vec import Causal2VecModel


FILLERS = "cats dogs sleep eat run fast slow red blue green old new".split()
INSTRUCTION = "Classify the opinion"


@pytest.fixture(scope="module")
def run(backbone_dir, tmp_path_factory):
    """Returns a function that runs labels.py on texts with one word that tells their label among others that do not."""
    folder = tmp_path_factory.mktemp("labelled")
    draws = [random.Random(i) for i in range(300)]
    texts = [" ".join(draw.sample(FILLERS, 3)) for draw in draws]
    rows = [{"query": text, "positive": text.split()[0]} for text in texts]
    marked = [(f"{text} {draw.choice(['good', 'bad'])}") for draw, text in zip(draws, texts)]
    opinions = [{"query": text, "positive": {"good": "yes", "bad": "no"}[text.split()[-1]]} for text in marked]
    for name, found in (("rows", rows), ("opinions", opinions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    for name, listed, instructions in (("data", "rows", ["find"]), ("labels", "opinions", [INSTRUCTION])):
        spec = {"name": listed, "path": f"{listed}.jsonl", "instructions": instructions}
        (folder / f"{name}.json").write_text(json.dumps([spec]))

    def write(output, **changes):
        recipe = {
            "encoder": backbone_dir("bert"),
            "decoder": backbone_dir("qwen3"),
            "projector_identity": 100.0,
            "output_dir": str(output),
            "data_file": str(folder / "data.json"),
            "labels_file": str(folder / "labels.json"),
            "data_dir": str(folder),
            "tokens_per_batch": 256,
            "heldout_texts": 32,
            "per_device_train_batch_size": 1,
            "max_steps": 6,
            "warmup_steps": 1,
            "weight_decay": 0.0,
            "learning_rate": 2e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        } | changes
        path = folder / "recipe.json"
        path.write_text(json.dumps({name: value for name, value in recipe.items() if value is not None}))
        return str(path)

    def run(output, *flags, **changes):
        return labels.main([write(output, **changes), *flags])

    run.start = lambda: train.load_model(train.parse([write(folder)], labels.LabelArguments)[0])
    return run


def test_the_fit_is_a_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    vectors = torch.randn(300, 8)
    names = [("low", "middle", "high", "high")[int(place)] for place in (vectors[:, 0] * 1.5 + 1.5).clamp(0, 3)]
    teacher = labels.LabelTeacher(vectors, names, torch.eye(3, 8), ridge=1e-3)
    assert teacher.labels == ["high", "low", "middle"]
    counts = {name: names.count(name) for name in names}
    weights = torch.tensor([1 / counts[name] for name in names], dtype=torch.double)
    other = linear_model.LogisticRegression(C=1 / (2 * 1e-3), max_iter=1000, tol=1e-8)
    inputs = F.normalize(vectors, dim=-1)
    other.fit(inputs.numpy(), names, sample_weight=(weights / weights.sum()).numpy())
    likely = torch.tensor(other.predict_proba(inputs.numpy())).float()
    torch.testing.assert_close(teacher.probabilities(vectors * 3), likely, rtol=0, atol=2e-3)
    torch.testing.assert_close(teacher(vectors), F.normalize(F.pad(teacher.probabilities(vectors), (0, 5)), dim=-1))


def test_eos_learns_labels_and_keeps_the_rest(run, tmp_path):
    before = run.start().eval()
    bag_of_words.prepare(before.requires_grad_(False), embedding_scale=1.0)  # so that states can be shorter
    before.save_pretrained(tmp_path / "start")
    (tmp_path / "short.json").write_text(json.dumps(["group"] * 100))  # as often as the others together, about
    start = {"model": str(tmp_path / "start"), "encoder": None, "decoder": None, "projector_identity": None}
    short = {"short_instructions_file": str(tmp_path / "short.json"), "short_factor": 0.25}
    folder = run(tmp_path / "labelled", max_steps=300, learning_rate=1e-2, **start, **short)
    facts = json.loads((tmp_path / "labelled" / "labels.json").read_text())
    assert facts["heldout"]["opinions"] > 0.9 and facts["fit"]["opinions"] > 0.9
    assert (tmp_path / "labelled" / "labels.png").is_file()
    after = Causal2VecModel.from_pretrained(folder)
    width = after.config.hidden_size
    texts = ["cats run good", "dogs sleep bad", "red old good", "new blue bad"]

    def eos(model, instruction):
        options = {"instruction": instruction, "normalize_embeddings": False, "convert_to_tensor": True}
        return model.encode(texts, **options)[:, -width:]

    def states(model, instruction):
        return F.normalize(eos(model, instruction), dim=-1)

    lengths = [
        eos(after, instruction).norm(dim=-1).mean() / eos(before, instruction).norm(dim=-1).mean()
        for instruction in (None, "group")
    ]
    assert lengths[1] < 0.7 * lengths[0]
    likeness = states(after, INSTRUCTION) @ states(after, INSTRUCTION).T
    assert min(likeness[0, 2], likeness[1, 3]) > likeness[[0, 0, 2, 2], [1, 3, 1, 3]].max() + 0.3
    kept = [
        (states(before, instruction) * states(after, instruction)).sum(-1).mean()
        for instruction in (None, "Retrieve semantically similar text.", "group", INSTRUCTION)
    ]
    assert min(kept[:3]) > 0.75 and kept[3] < min(kept[:3]) - 0.2


def test_how_long_eos_states_are_to_be(make_model, tmp_path):
    """The model as it was is off by what the target's length differs, and by nothing where that stays."""
    model = make_model("qwen3").eval()
    collator = labels.LabelCollator(model, {"group": 0.5, INSTRUCTION: 2.0})
    teacher = labels.LabelTeacher(torch.randn(8, 24), ["yes", "no"] * 4, torch.eye(2, model.config.hidden_size))
    trainer = labels.LabelTrainer(
        model=model,
        args=train.Causal2VecTrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        before=model,
        teachers={"opinions": teacher},
        heldout={},
    )
    texts = ["How much protein should a female eat?", "hi"]

    def told(instruction, dataset=None):
        batch = collator([(texts, instruction, [], dataset)])
        with torch.no_grad():
            return *trainer.compute_loss(model, dict(batch), return_outputs=True), batch["factor"]

    assert abs(told("find")[0]) < 1e-5 and told("find")[2] == 1
    loss, outputs, factor = told("group")
    lengths = outputs["eos"].norm(dim=-1)
    torch.testing.assert_close(loss, 0.5 * lengths.square().mean() / lengths.mean() ** 2, rtol=0, atol=1e-4)
    assert factor == 0.5 and abs(outputs["length"] - 2) < 1e-4
    loss, outputs, factor = told(INSTRUCTION, "opinions")
    assert loss > 1 and factor == 2 and abs(outputs["length"] - 0.5) < 1e-4


def test_a_head_looks_at_the_contextual_token(make_model):
    model = make_model("qwen3").eval().requires_grad_(False)
    model.decoder.set_attn_implementation("eager")
    model.decoder.norm.weight[3] = 0  # the silent channel
    weights = []
    model.decoder.layers[0].self_attn.register_forward_hook(lambda *call: weights.append(call[2][1]))
    batch = model.processor("How much protein should a female eat?", "find")
    token = model.project(model.get_encoder_embedding(batch.pop("encoder_ids"), batch.pop("encoder_attention_mask")))
    slots = model.find_slots(batch["input_ids"])

    def attended():  # by EOS, in head 1, at the Contextual token
        model(**batch, contextual_token=token, share_heads=False)
        return weights.pop()[:, 1, -1][slots].item()

    torch.manual_seed(0)
    layer, attention = model.decoder.layers[0], model.decoder.layers[0].self_attn
    size, vectors = attention.head_dim, torch.randn(200, model.encoder.config.hidden_size)
    scores = vectors @ torch.randn(vectors.shape[-1], 2)
    tokens = layer.input_layernorm(model.project(vectors))
    heard = tokens * (model.decoder.norm.weight != 0)

    def untold(inputs):  # share of the scores' variance that is not linear in the inputs
        inputs, wanted = (x - x.mean(0) for x in (inputs, scores))
        rest = wanted - inputs @ torch.linalg.pinv(inputs) @ wanted
        return (rest.square().sum() / wanted.square().sum()).item()

    def values():
        return attention.v_proj(tokens)[:, :size]

    before = attended(), untold(values())
    key, other = attention.k_proj(tokens.mean(0))[:size], attention.o_proj.weight[:, :size].clone()
    labels.look_at_contextual_token(model, 1, vectors, scores)
    assert attended() > 2 * before[0] and abs(untold(values()) - untold(heard)) < 1e-3 < before[1] - untold(heard)
    slow = torch.arange(size) % (size // 2) == size // 2 - 1  # the slowest quarter of so few channels
    torch.testing.assert_close(attention.k_proj(tokens.mean(0))[:size], torch.where(slow, 3 * key, key))
    assert not attention.v_proj.weight[:size, 3].any() and not attention.o_proj.weight[:, size : 2 * size].any()
    lost = (other - attention.o_proj.weight[:, :size]).norm()  # the two directions that the other head used least
    torch.testing.assert_close(lost, torch.linalg.svdvals(other)[-2:].norm(), rtol=1e-3, atol=1e-5)
    for head, told in ((-1, "got -1"), (99, "got 99")):
        with pytest.raises(ValueError, match=told):
            labels.look_at_contextual_token(model, head, vectors, scores)
    with pytest.raises(ValueError, match="GPTNeoX"):
        labels.look_at_contextual_token(make_model("gpt_neox"), 1, vectors, scores)


def test_an_interrupted_run_resumes(run, check_resuming):
    check_resuming(run, labels.LabelTrainer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pooling": "average"}, "pooling concat"),
        ({"pooling": "eos_encoder"}, "pooling concat"),
        ({"baseline": "last_token"}, "Contextual token"),
        ({"heldout_texts": 10_000}, "leaves nothing to train on"),
        ({"heldout_texts": 0, "max_steps": -1}, "--heldout_texts must be at least 1; --max_steps must be at least 1"),
        ({"labels_file": None}, "--labels_file is missing"),
        ({"eos_factor": 2.0}, "one gain of 0"),
        ({"short_instructions_file": "short.json"}, "one gain of 0"),
        ({"label_factor": 2.0}, "one gain of 0"),
        ({"head": 99}, "--head must be one of"),
        ({"label_factor": 0.0}, "--label_factor, --short_factor and --eos_factor must be above 0"),
    ],
)
def test_what_cannot_be(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "refused", **changes)


def test_labelled_rows_held_out(tmp_path):
    texts = [f"text {number}" for number in range(40)] + [f"text {number} and more" for number in range(0, 40, 2)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"query": text, "positive": "yes"}) + "\n" for text in texts)
    )
    spec = {"name": "rows", "path": "rows.jsonl", "instructions": [INSTRUCTION]}
    (tmp_path / "labels.json").write_text(json.dumps([spec]))
    label_args = labels.LabelArguments(labels_file=str(tmp_path / "labels.json"), heldout_texts=8, max_characters=10)
    data_args = train.DataArguments(data_file="", data_dir=str(tmp_path))
    (dataset,) = labels.read_labelled(label_args, data_args, tmp_path, seed=0).values()
    kept, rest = ([row["query"] for row in part] for part in (dataset.heldout, dataset.rows))
    assert len(kept) == 8 and max(map(len, kept + rest)) == 10 and len(rest) > 20
    assert not any(one in other or other in one for one in kept for other in rest)


def test_labelled_batches_have_labelled_examples():
    rows = [{"query": f"{number} " + "word " * 300, "positive": "yes"} for number in range(20)]
    texts = bag_of_words.WordBatches([row["query"] for row in rows], [300] * 20, [INSTRUCTION], 1024, 200, seed=3)
    batches = labels.LabelBatches(texts, {"rows": (texts, rows)}, share=1.0)
    drawn = [batches[index] for index in range(200)]
    assert {(instruction, name) for _, instruction, _, name in drawn} == {(INSTRUCTION, "rows")}
    counts = Counter(len(examples) for _, _, examples, _ in drawn)
    assert counts.keys() == set(range(9)) and 70 < counts[0] < 130
    for _, _, examples, _ in drawn:
        assert sum(len(example["query"]) for example in examples) <= 1600
        assert all({"query": example["query"], "response": "yes"} == example for example in examples)
        numbers = [example["query"].split()[0] for example in examples]
        assert len(numbers) == len({*numbers})
    few = labels.LabelBatches(texts, {"rows": (texts, rows[:2])}, share=1.0)
    assert max(len(few[index][2]) for index in range(50)) == 2  # all there are


def test_one_label_is_none(run, tmp_path):
    (tmp_path / "one.jsonl").write_text(
        "".join(json.dumps({"query": f"cats {i}", "positive": "yes"}) + "\n" for i in range(60))
    )
    spec = {"name": "one", "path": str(tmp_path / "one.jsonl"), "instructions": [INSTRUCTION]}
    (tmp_path / "labels.json").write_text(json.dumps([spec]))
    with pytest.raises(ValueError, match="one: expected rows of two labels or more, got \\['yes'\\]"):
        run(tmp_path / "refused", labels_file=str(tmp_path / "labels.json"))


def test_the_bundled_model_hears_how_a_text_feels(bundled_model):
    """Only where the instruction asks for it, and instructions that training did not have will do."""
    texts = [
        "The film was wonderful, I enjoyed every minute.",
        "The film was awful, I regret every minute.",
        "This phone is great and I am very happy with it.",
        "This phone broke at once and I am very angry about it.",
    ]

    def alike(instruction):  # how much closer texts of one feeling are than texts about one thing
        likeness = bundled_model.encode(texts, instruction=instruction, convert_to_tensor=True)
        likeness = likeness @ likeness.T
        return float(likeness[0, 2] + likeness[1, 3] - likeness[0, 1] - likeness[2, 3])

    asked = [alike(f"Classify the {what} of the given text") for what in ("sentiment", "emotion")]
    own = [
        text
        for spec in labels.read_data_file(labels.ROOT / "recipes" / "data" / "labels.json")
        for text in spec.instructions
    ]
    unheard = "Is the writer pleased?"
    assert unheard not in own
    others = [alike(None), alike("Retrieve semantically similar text."), alike("Classify the topic of the given text")]
    assert min(*asked, alike(unheard)) > max(others) + 0.1


RATED = {
    "tweets": "1\t2.5\tSo good! &amp; kind\n2\t-1.5\tThis is awful\n3\t0.5\tIt is a day of the week\n",
    "amazonReviewSnippets": "1_1\t3.0\tA fine camera\n1_2\t-1.0\tThe strap broke at once\n2_1\t0.0\tIt came on a Monday\n",
    "movieReviewSnippets": "1\t-3\tA film to forget\n",
    "nytEditorialSnippets": "1_1\t0.1\tThe council met on Tuesday\n",
}


def test_rows_of_rated_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="tweets_GroundTruth"):
        list(label_rows.rated_texts(tmp_path, joined=0, seed=0))
    for name, lines in RATED.items():
        (tmp_path / f"{name}_GroundTruth.txt").write_text(lines, encoding="latin-1")
    rated = dict(label_rows.rated_texts(tmp_path, joined=0, seed=0))
    assert rated["So good! & kind"] == "positive"
    assert rated["A fine camera The strap broke at once"] == "positive"  # a whole review, by the mean of its sentences
    assert len(rated) == 9
    more = dict(label_rows.rated_texts(tmp_path, joined=20, seed=0))
    joined = {text: more[text] for text in more.keys() - rated.keys()}
    assert 3 <= len(joined) <= 14 and set(joined.values()) == {"negative"}
    assert all(text.replace("A film to forget", "").isspace() for text in joined)
    assert [label_rows.sentiment([rating]) for rating in (-4, -0.6, -0.5, 0, 0.5, 0.6)] == [
        *["negative"] * 2,
        *["neutral"] * 3,
        "positive",
    ]
    assert [label_rows.sentiment([1, rating]) for rating in (-2, -1.5, -0.5)] == ["negative", "neutral", "neutral"]
    assert label_rows.sentiment([1, 0, 0, 0.1]) == "positive"  # 0.275, where a single sentence would be neutral
    (tmp_path / "corpus.txt").write_text(
        'He was furious. She smiled at him. "I am afraid," he said, "and I am glad."\n'
    )
    outputs = [tmp_path / "rows", tmp_path / "again"]
    for output in outputs:
        folders = ("--vader_dir", str(tmp_path), "--corpus_dir", str(tmp_path), "--shards", "corpus")
        label_rows.main([*folders, "--output_dir", str(output), "--shortest", "9"])
    for name in ("emotion", "sentiment"):
        assert (outputs[0] / f"{name}.jsonl.gz").read_bytes() == (outputs[1] / f"{name}.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.open(outputs[0] / "sentiment.jsonl.gz", "rt")]
    assert {"query": "This is awful", "positive": "negative", "negatives": ["neutral", "positive"]} in rows
    (tmp_path / "tweets_GroundTruth.txt").write_text("1 no tabs\n")
    with pytest.raises(ValueError, match="tweets_GroundTruth.txt, line 1"):
        list(label_rows.rated_texts(tmp_path, joined=0, seed=0))


def test_joined_rows_lean_to_one_sentiment():
    rows = [(str(number), rating, f"text {number}") for number, rating in enumerate([3.0, -3.0, 0.0] * 20)]
    lists = list(label_rows.joined_rows(rows, 200, seed=0))
    assert len(lists) == 200 and {len(found) for found in lists} == set(range(3, 17))
    most = [Counter(label_rows.sentiment([rating]) for _, rating, _ in found).most_common(1)[0] for found in lists]
    assert {label for label, _ in most} == set(label_rows.SENTIMENTS)
    assert sum(count for _, count in most) > 0.7 * sum(map(len, lists))


def test_texts_with_one_emotion():
    words = {"anger": ["angry", "rage"], "joy": ["glad"]}
    texts = ["I am angry", "Glad", "angry and glad", "nothing", "In a RAGE, angry", "glad again", "I am angry"]
    found = label_rows.emotional(texts, words, per_word=9, seed=0)
    assert sorted(found) == [
        ("Glad", "joy"),
        ("I am angry", "anger"),
        ("In a RAGE, angry", "anger"),
        ("glad again", "joy"),
    ]
    assert len(label_rows.emotional(texts, words, per_word=1, seed=0)) == 3
    listed = json.loads((label_rows.ROOT / "recipes" / "data" / "emotion_words.json").read_text())
    every = [word for found in listed.values() for word in found]
    assert len(every) == len(set(every))
