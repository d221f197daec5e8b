"""space/: what its buttons do, its limits, and the page itself in a headless Chromium."""

import ast
import importlib
import json
import re
import shutil
import sys
import threading
import xml.etree.ElementTree as ElementTree

import httpx
import numpy as np
import pytest
from conftest import ROOT


gr = pytest.importorskip("gradio")
pytest.importorskip("semantic_text_splitter")
app = importlib.import_module("space.app")

INSTRUCTION = "Given a question, retrieve passages that answer it"
HOSTILE = (
    "<img src=x onerror='window.hacked=1'> \"&amp; ${window.hacked=2} {{value}} </p><script>window.hacked=3</script>"
)


@pytest.fixture(scope="module")
def demo(tiny_model):
    return app.Demo(tiny_model)


def listed(html: str) -> list[tuple[str, float]]:
    """Passage and score of each result."""
    items = ElementTree.fromstring(html).findall("li")
    assert [item.find("b").text for item in items] == [str(rank) for rank in range(1, len(items) + 1)]
    return [(item.find("p").text, float(item.find("span").tail)) for item in items]


def cells(html: str) -> list[list[float]]:
    rows = ElementTree.fromstring(html).findall("div/table/tbody/tr")
    return [[float(cell.text) for cell in row.findall("td")] for row in rows]


class TestSearch:
    @pytest.mark.parametrize("share", [1, 2, 4])
    def test_it_ranks_as_encode_does(self, demo, tiny_model, share):
        size = tiny_model.config.embedding_size // share
        passages = demo.passages(app.TEXT)
        assert len(passages) > app.TOP
        found = demo.search("why honey", INSTRUCTION, app.TEXT, size)
        for html, instruction in zip(found[:2], (None, INSTRUCTION)):
            query = tiny_model.encode("why honey", instruction=instruction, truncate_dim=size)
            scores = tiny_model.encode(passages, truncate_dim=size) @ query
            best = np.argsort(-scores)[: app.TOP]
            assert [passage for passage, _ in listed(html)] == [passages[i] for i in best]
            assert [score for _, score in listed(html)] == pytest.approx(scores[best].tolist(), abs=6e-4)
        assert listed(found[0]) != listed(found[1])
        assert f"{len(passages)} passages: " in found[2] and f"{size} of {tiny_model.config.embedding_size}" in found[2]

    def test_ranks_that_changed_are_told(self):
        html = app.results_html(["a", "b", "c"], np.array([0.1, 0.3, 0.2]), [1, 2, 0], before={0: 1, 2: 2, 1: 3})
        moved = [item.find("span[@class='c2v-moved']") for item in ElementTree.fromstring(html)]
        assert [span if span is None else span.text for span in moved] == ["was 3", None, "was 1"]

    def test_another_size_embeds_nothing_again(self, tiny_model, monkeypatch):
        demo, calls = app.Demo(tiny_model), []
        encode = tiny_model.encode
        monkeypatch.setattr(
            tiny_model, "encode", lambda texts, **kwargs: calls.append(texts) or encode(texts, **kwargs)
        )
        told = [demo.search("honey", INSTRUCTION, app.TEXT, size)[2] for size in (64, 16, 16)]
        assert len(calls) == 3  # passages, the query without and with the instruction
        assert told[1].split(" · ")[0] == told[0].split(" · ")[0]  # the milliseconds that the model took then

    def test_what_is_wrong_is_told(self, demo):
        for arguments, wrong in (
            (("", INSTRUCTION, "text"), "query is empty"),
            ((None, INSTRUCTION, "text"), "query is empty"),
            (("q" * 501, INSTRUCTION, "text"), "501 characters; at most 500"),
            (("query", " \n", "text"), "instruction is empty"),
            (("query", "i" * 501, "text"), "501 characters"),
            (("query", INSTRUCTION, " "), "text is empty"),
            (("query", INSTRUCTION, "t" * 20_001), "20,001 characters; at most 20,000"),
            (("query", INSTRUCTION, "漢" * 3_000), "9,000 tokens; at most 6,400"),
        ):
            with pytest.raises(gr.Error, match=wrong):
                app.told(demo.search)(*arguments, 16)

    def test_a_text_that_is_cut_is_told(self, demo):
        assert "cut" not in demo.search("honey", INSTRUCTION, "short", 16)[2]
        assert "1 text longer than the model reads" in demo.search("honey " * 80, INSTRUCTION[:9], "short", 16)[2]


class TestPassages:
    def test_nothing_is_lost_and_none_is_too_long(self, demo, tiny_model):
        passages = demo.passages(app.TEXT)
        assert "".join("".join(passages).split()) == "".join(app.TEXT.split())
        assert not any(map(any, tiny_model.processor.towers_cut(passages)))
        lengths = [len(demo.tokenizer.encode(passage, add_special_tokens=False).ids) for passage in passages]
        assert max(lengths) <= min(tiny_model.processor.limits().values()) // 2

    def test_too_many(self, demo, monkeypatch):
        monkeypatch.setattr(app, "MAX_PASSAGES", 3)
        with pytest.raises(
            ValueError, match=rf"has {len(demo.passages('honey'))} ?|\d+ passages; at most 3 are searched"
        ):
            demo.passages(app.TEXT)


class TestFiles:
    @pytest.mark.parametrize(
        "content, text",
        [(b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo"), ("größe 漢".encode(), "größe 漢"), (b"x" * 20_000, "x" * 20_000)],
    )
    def test_read(self, content, text):
        assert app.read_file(content) == text

    @pytest.mark.parametrize(
        "content, wrong",
        [
            (None, "empty"),
            (b"", "empty"),
            (b" \n", "empty"),
            (b"\xff\xfea\x00", "no plain text in UTF-8"),
            (b"%PDF\0", "no plain text in UTF-8"),
            (b"x" * 20_001, "20,001 characters"),
            (b"x" * 100_001, "100,001 bytes; at most 100,000"),
        ],
    )
    def test_refused(self, content, wrong):
        with pytest.raises(gr.Error, match=wrong):
            app.told(app.read_file)(content)


class TestCompare:
    def test_it_is_encode(self, demo, tiny_model):
        texts = [line for line in app.SENTENCES.splitlines() if line]
        for instruction, size in ((app.SYMMETRIC, 64), (" ", 16)):
            html, told = demo.compare(f"\n{app.SENTENCES}\n\n", instruction, size)
            vectors = tiny_model.encode(texts, instruction=instruction.strip() or None, truncate_dim=size)
            assert np.abs(cells(html) - vectors @ vectors.T).max() < 6e-3
            assert told.startswith(f"{len(texts)} texts: ")

    @pytest.mark.parametrize(
        "lines, wrong",
        [
            (None, "there are 0"),
            ("one\n", "there are 1"),
            ("a\n" * 17, "2 to 16"),
            ("a\n" + "b" * 501, "text in line 2"),
        ],
    )
    def test_what_is_wrong_is_told(self, demo, lines, wrong):
        with pytest.raises(gr.Error, match=wrong):
            app.told(demo.compare)(lines, None, 16)

    def test_colours_can_be_read(self):
        """As WCAG 2 asks for: 4.5:1 between text and ground; and the ground darkens all the way."""
        grounds = []
        for value in np.linspace(-1, 1, 201):
            ground, text = re.fullmatch(r"background: rgb\((.+)\); color: #(\w+)", app.cell_style(value)).groups()
            grounds.append(app.luminance([int(part) for part in ground.split(",")]))
            light, dark = sorted([grounds[-1], {"000": 0, "fff": 1}[text]], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, value
        assert len(set(grounds[100:])) > 90 and grounds == sorted(grounds, reverse=True)


def test_what_visitors_write_is_escaped(demo):
    plain, instructed, _ = demo.search("honey", INSTRUCTION, HOSTILE, 16)
    for html in (plain, instructed):
        assert listed(html)[0][0] in HOSTILE  # as text
        assert {element.tag for element in ElementTree.fromstring(html).iter()} == {"ol", "li", "b", "span", "p"}
    heading = ElementTree.fromstring(demo.compare(f"{HOSTILE}\nother", None, 16)[0]).find("div/table/tbody/tr/th")
    assert heading.get("title") == HOSTILE and heading.find("b").tail == f" {HOSTILE}"


class TestModel:
    def test_of_the_hub_at_one_commit_only(self, monkeypatch):
        asked = []

        def from_pretrained(model, **kwargs):
            asked.append((model, kwargs["revision"]))
            raise OSError("no such model")

        monkeypatch.setattr(app.AutoModel, "from_pretrained", from_pretrained)
        for revision in (None, "", "main", "v1.0", "a" * 39, "A" * 40):
            with pytest.raises(ValueError, match="40 digits of a commit"):
                app.load("user/name", revision)
        assert asked == []
        with pytest.raises(OSError):
            app.load("user/name", "0123456789" * 4)
        assert asked == [("user/name", "0123456789" * 4)]

    def test_of_a_folder(self, saved_dir, tiny_model):
        model = app.load(str(saved_dir), revision="main")
        assert not model.training
        assert np.abs(model.encode("text") - tiny_model.encode("text")).max() < 1e-5

    def test_command(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("CAUSAL2VEC_MODEL", raising=False)
        for argv, told in (
            ([], "which model"),
            (["--model", "user/name"], "40 digits"),
            (["--model", str(tmp_path)], ""),
        ):
            with pytest.raises(SystemExit) as stopped:
                app.main(argv)
            assert stopped.value.code == 2 and told in capsys.readouterr().err


class TestFolder:
    def test_versions_are_those_that_are_tested(self):
        import yaml

        pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
        pinned |= dict(re.findall(r"^TORCH \?= (torch)==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        required = (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8")
        found = dict(re.findall(r"^([\w-]+)==([\d.]+)", required, re.M))
        assert set(found) == {"torch", "transformers", "semantic-text-splitter"}
        assert found == {name: pinned[name] for name in found}
        front = yaml.safe_load((ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
        assert (front["sdk"], front["sdk_version"], front["app_file"]) == ("gradio", pinned["gradio"], "app.py")
        assert (
            isinstance(front["python_version"], str) and len(front["short_description"]) <= 60
        )  # which the Hub checks

    def test_it_stands_alone(self):
        """app.py imports nothing of this repository: the Space is space/ and no more."""
        tree = ast.parse((ROOT / "space" / "app.py").read_text(encoding="utf-8"))
        found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        outside = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert outside == {"gradio", "numpy", "semantic_text_splitter", "starlette", "torch", "transformers"}

    def test_its_limits_are_told(self):
        table = (ROOT / "space" / "README.md").read_text(encoding="utf-8")
        limits = {name: value for name, value in vars(app).items() if name.startswith("MAX_")}
        assert len(limits) == 8
        for name, value in limits.items():
            assert re.search(rf"\b{value:,}\b", table), name


@pytest.fixture(scope="module")
def serve():
    """Returns a function from a Demo to the URL of its page."""
    pages = []

    def start(demo) -> str:
        pages.append(app.build(demo))
        return app.launch(pages[-1], prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1].rstrip("/")

    yield start
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def url(serve, demo) -> str:
    return serve(demo)


class TestServer:
    def test_large_requests_are_refused(self, url):
        join = f"{url}/gradio_api/queue/join"
        body = b'{"data": ["' + b"a" * app.MAX_BODY_BYTES + b'"]}'
        chunks = (b"a" * 100_000 for _ in range(11))  # of no told length
        assert httpx.post(join, content=body, headers={"content-type": "application/json"}).status_code == 413
        assert httpx.post(join, content=chunks, headers={"content-type": "application/json"}).status_code == 413
        for size, status in ((app.MAX_FILE_BYTES, 200), (app.MAX_FILE_BYTES + 1, 413), (2 * app.MAX_BODY_BYTES, 413)):
            response = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"a" * size)})
            assert response.status_code == status, size

    def test_the_queue_is_the_only_way_in(self, url):
        functions = httpx.get(f"{url}/config").json()["dependencies"]
        assert {function["api_name"] for function in functions if function["queue"]} >= {"search", "compare"}
        for function in functions:
            assert function["api_visibility"] == "private"
            if function["queue"]:
                body = {"fn_index": function["id"], "data": ["q", "i", "t", 16], "session_hash": "s"}
                assert httpx.post(f"{url}/gradio_api/run/predict", json=body).status_code == 404

    def test_nothing_of_the_machine_is_served(self, url):
        for path in ("/etc/hostname", str(ROOT / "README.md"), "README.md", str(ROOT / "space" / "app.py")):
            assert httpx.get(f"{url}/gradio_api/file={path}").status_code == 403
        for path in ("/monitoring", "/gradio_api/runs"):
            assert httpx.get(url + path).status_code in (403, 404)

    def test_a_full_queue_refuses(self, serve, tiny_model):
        demo, go_on, started = app.Demo(tiny_model), threading.Event(), threading.Event()
        url, embed, running, most = serve(demo), demo.embed, [], []

        def wait(texts, instruction):
            running.append(texts)
            most.append(len(running))
            started.set()
            go_on.wait(60)
            running.remove(texts)
            return embed(texts, instruction)

        demo.embed = wait
        names = {f["id"]: f["api_name"] for f in httpx.get(f"{url}/config").json()["dependencies"]}
        search, compare = [next(i for i, name in names.items() if name == wanted) for wanted in ("search", "compare")]
        bodies = [
            {"fn_index": search, "data": ["honey", INSTRUCTION, "honey", 16]},
            {"fn_index": compare, "data": ["one\ntwo", "", 16]},
        ]

        def join(number: int) -> httpx.Response:
            return httpx.post(f"{url}/gradio_api/queue/join", json={**bodies[number % 2], "session_hash": str(number)})

        try:
            assert join(0).status_code == 200 and started.wait(60)
            answers = [join(number) for number in range(1, app.MAX_WAITING + 3)]
        finally:
            go_on.set()
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200] * app.MAX_WAITING + [503] * 2
        assert "full" in answers[-1].text
        assert max(most) == 1, "two requests used the model at a time"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync window-size=1200,1400 user-data-dir={tmp_path_factory.mktemp('chromium')}"
    ).split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


class Page:
    """The page as a visitor uses it."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get("about:blank")
        for kind in ("performance", "browser"):
            driver.get_log(kind)  # what was before is left out
        driver.get(url)
        self.until(lambda: self.all("#plain li"), "no results of the example")

    def until(self, condition, failure: str):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda driver: condition(), failure)

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def __getitem__(self, selector: str):
        (element,) = self.all(selector)
        return element

    def write(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self[selector].send_keys(Keys.CONTROL, "a")
        self[selector].send_keys(text or Keys.DELETE)

    def tab(self, name: str) -> None:
        next(tab for tab in self.all("button[role=tab]") if tab.text == name).click()

    def passages(self, column: str) -> list[str]:
        return [element.text for element in self.all(f"#{column} li p")]

    def told(self, selector: str, text: str) -> None:
        self.until(lambda: any(text in element.text for element in self.all(selector)), f"no {text!r} in {selector}")

    def log(self, kind: str) -> list:
        return self.driver.get_log(kind)


@pytest.fixture(scope="module")
def bundled_url(serve, bundled_model) -> str:
    return serve(app.Demo(bundled_model))


@pytest.fixture
def page(browser, bundled_url) -> Page:
    return Page(browser, bundled_url)


class TestPage:
    def test_at_first_sight(self, page, bundled_url):
        assert page.driver.title == "Causal2Vec" and page["h1"].text == "Causal2Vec"
        for column in ("plain", "instructed"):
            assert len(page.passages(column)) == app.TOP
            assert page.passages(column)[0].startswith("Honey keeps for decades")
        assert re.search(r"8 passages: [\d.]+ ms · .* · comparing: [\d.]+ ms", page["#facts"].text)
        messages = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert len(asked) > 10
        assert [address for address in asked if not address.startswith((bundled_url, "data:", "about:"))] == []
        assert [entry for entry in page.log("browser") if entry["level"] == "SEVERE"] == []

    def test_search(self, page):
        page.write("#query textarea", "a sting in the skin")
        page["#search"].click()
        for column in ("plain", "instructed"):
            page.told(f"#{column} li:first-child p", "A sting stays in the skin")
        page.write("#text textarea", "Cats sleep all day.\n\nThe stock market fell by two percent this morning.")
        page.write("#query textarea", "shares lost value\n")  # Enter searches too
        page.told("#plain li:first-child p", "The stock market fell")

    def test_an_example(self, page):
        example = next(button for button in page.all("button") if button.text == app.QUERIES[1])
        example.click()
        page.told("#plain li:first-child p", "A sting stays in the skin")
        assert page["#query textarea"].get_property("value") == app.QUERIES[1]

    def test_the_instruction_changes_its_own_side_alone(self, page):
        before = [page[f"#{column}"].text for column in ("plain", "instructed")]
        page.write("#instruction textarea", "Find the price of a bicycle")
        page["#search"].click()
        page.until(lambda: page["#instructed"].text != before[1] and page.all("#instructed li"), "the same results")
        assert page["#plain"].text == before[0]

    def test_the_size(self, page):
        from selenium.webdriver.common.keys import Keys

        before = page["#plain"].text
        page["#size input[type=range]"].send_keys(Keys.HOME)
        page.told("#facts", "16 of ")
        page.until(lambda: page["#plain"].text != before, "the same results")
        page.write("#size input[type=number]", "")
        page["#size input[type=number]"].send_keys("128")  # by way of 1, which is too small
        page.told("#facts", "128 of ")
        assert page.all(".toast-body") == []

    def test_files(self, page, tmp_path):
        text = page["#text textarea"].get_property("value")
        for name, content, wrong in (
            ("bytes.txt", b"\xff\xfe\0", "no plain text in UTF-8"),
            ("large.txt", b"a" * 100_001, "exceed the maximum allowed size"),
            ("paper.pdf", b"%PDF", "Only .txt, .md allowed"),
        ):
            (tmp_path / name).write_bytes(content)
            page["input[type=file]"].send_keys(str(tmp_path / name))
            page.told(".toast-body", wrong)
            page["#text textarea"].click()  # nothing covers it
            assert page["#text textarea"].get_property("value") == text
        (tmp_path / "notes.md").write_text("# Trains\n\nThe night train to Vienna leaves at nine.", encoding="utf-8")
        page["input[type=file]"].send_keys(str(tmp_path / "notes.md"))
        page.until(lambda: "Vienna" in page["#text textarea"].get_property("value"), "the file is not shown")
        page["#search"].click()
        page.told("#plain li:first-child p", "The night train to Vienna")

    def test_what_is_wrong_is_told_and_then_it_goes_on(self, page):
        page.write("#query textarea", "")
        page["#search"].click()
        page.told(".toast-body", "The query is empty. Write something first.")
        page.write("#query textarea", "a sting in the skin")
        page["#search"].click()
        page.told("#plain li:first-child p", "A sting stays in the skin")

    def test_compare(self, page):
        page.tab("Compare")
        page.until(lambda: page["#heat_map"].is_displayed(), "no heat map")
        page.write("#lines textarea", "A cat sleeps.\nThe cat is asleep.\nShares fell.")
        page["#compare"].click()
        page.until(lambda: len(page.all("#heat_map tbody tr")) == 3, "not three rows")
        values = [float(cell.text) for cell in page.all("#heat_map tbody td")]
        assert values[::4] == [1, 1, 1] and values[1] > max(values[2], values[5])
        assert re.search(r"3 texts: [\d.]+ ms", page["#compare_facts"].text)

    def test_hostile_text_stays_text(self, page):
        page.write("#text textarea", HOSTILE)
        page["#search"].click()
        page.told("#plain li p", "onerror")
        assert page.passages("plain") == [HOSTILE]
        assert page.driver.execute_script("return window.hacked") is None

    def test_on_a_phone(self, page):
        metrics = dict(width=375, height=812, deviceScaleFactor=1, mobile=True)
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            for name, selector in (("Search", "#instructed"), ("Compare", "#heat_map")):
                page.tab(name)
                page.until(lambda: page[selector].is_displayed(), name)  # noqa: B023
                assert page.driver.execute_script("return document.documentElement.scrollWidth") <= 375
            scrolled = "const map = document.querySelector('#heat_map div table').parentElement; map.scrollLeft = 99;"
            assert page.driver.execute_script(f"{scrolled} return map.scrollLeft") == 99  # to what does not fit
        finally:
            page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
