"""The server's page in a real browser."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, Route, sync_playwright

from llama32.engine.settings import EngineSettings
from llama32.llm.llm import LLM
from llama32.llm.loading import load
from tests.serving import Served, serving, until

NAMES = "chromium chromium-browser google-chrome".split()
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason=f"none of {', '.join(NAMES)} is installed")

LONG = (
    "Tell me a story about a dog and a ball. " * 6 + "The dog is called Max."
)  # more than a page of the cache
HOSTILE = "<img src=x onerror=\"document.title = 'hacked'\"> & <b>5 €</b>\n😀👩‍👧"
FREE, EVICTABLE = (233, 233, 229), (174, 180, 186)  # the page's colours in light mode
COLOURS = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)]  # by request number
COLOURS += [(86, 180, 233), (213, 94, 0), (140, 107, 177), (168, 150, 0)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load("tiny", engine=EngineSettings(cache_tokens=16 * 1024))


@pytest.fixture(scope="module")
def served(llm) -> Iterator[Served]:
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    with opened(browser, served) as page:
        yield page
    served.assert_idle()


@contextmanager
def opened(browser: Browser, served: Served, **options: Any) -> Iterator[Page]:
    """The open page. Checks that the page has no errors and contacts only the server."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
    page.set_default_timeout(30_000)
    errors: list[str] = []
    urls: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(served.url)
    try:
        yield page
        assert [error for error in errors if not error.startswith("Failed to load resource")] == []
        assert [url for url in urls if not url.startswith(f"{served.url}/")] == []
    finally:
        page.close()


def evaluate(page: Page, expression: str) -> Any:
    """Evaluate an expression once.

    The page's security policy forbids `eval`, so Playwright cannot wait for an expression.
    """
    return page.evaluate(expression)


def ask(page: Page, text: str, **controls: float) -> None:
    for name, value in controls.items():
        page.fill(f"#{name}", str(value))
    until(lambda: evaluate(page, "llama32.model"))
    page.fill("#message", text)
    page.press("#message", "Enter")


def end(page: Page) -> None:
    until(lambda: evaluate(page, "llama32.stop === null && llama32.cache?.running.length === 0"))


def answers(page: Page) -> list[str]:
    """Texts of all answers, first to last."""
    return [answer.text_content() or "" for answer in page.locator(".answer-text").all()]


def request_bodies(page: Page) -> list[Any]:
    """Bodies of all completion requests from now on."""
    bodies: list[Any] = []

    def record(request: Request) -> None:
        if request.url.endswith("/completions"):
            bodies.append(request.post_data_json)

    page.on("request", record)
    return bodies


def alter_requests(page: Page, change: Callable[[Any], Any]) -> None:
    """Change the body of every completion request on its way to the server."""

    def alter(route: Route) -> None:
        route.continue_(post_data=json.dumps(change(route.request.post_data_json)))

    page.route("**/completions", alter)


def pixels(page: Page) -> list[tuple[int, ...]]:
    """Colour in the middle of each cell."""
    return [row[len(row) // 2] for row in rows(page)]


def rows(page: Page) -> list[list[tuple[int, ...]]]:
    """Colours across the middle of each cell, from left to right."""
    script = """() => {
      const { size, columns } = gridLayout(), grid = document.getElementById("grid");
      const copy = new OffscreenCanvas(grid.width, grid.height);
      const context = copy.getContext("2d", { willReadFrequently: true });
      context.drawImage(grid, 0, 0);
      return llama32.cache.requestsOf.map((_, page) => {
        const x = (page % columns) * size, y = Math.floor(page / columns) * size;
        return [...context.getImageData(x, y + Math.floor(size / 2), size - 1, 1).data];
      });
    }"""
    return [[tuple(row[i : i + 3]) for i in range(0, len(row), 4)] for row in page.evaluate(script)]


def test_the_page_loads_without_an_error_and_names_the_model(page):
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    response = page.reload()
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    until(lambda: "tiny, up to 1024 tokens" in page.text_content("header"))
    until(lambda: page.text_content("#num-free") == "256")
    assert set(pixels(page)) == {FREE}
    assert not page.is_visible("#unlock")
    assert messages == []


def test_an_answer_streams_in_and_is_what_the_api_gives_for_the_same_seed(page, served):
    ask(page, LONG, seed=7, max_tokens=30, temperature=0.8)
    lengths = set()
    while evaluate(page, "llama32.stop !== null"):
        lengths.add(len(answers(page)[0]))
    assert len(lengths) > 5
    message = {"role": "user", "content": LONG}
    same = served.client().chat.completions.create(
        model="tiny", messages=[message], seed=7, max_tokens=30, temperature=0.8
    )
    assert answers(page) == [same.choices[0].message.content]
    status = (page.text_content(".answer .numbers") or "").split(" · ")
    expected = r"30 tokens, first after \d+ ms, \d+ tokens/s, \d+ of \d+ prompt tokens cached"
    assert re.search(expected, ", ".join(status))
    assert status[-1] == "max tokens reached"


def test_each_token_has_the_colour_of_its_probability(page, served):
    ask(page, "A dog.", seed=3, max_tokens=25, temperature=1)
    end(page)
    same = served.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "A dog."}],
        seed=3,
        max_tokens=25,
        temperature=1,
        logprobs=True,
    )
    tokens = page.eval_on_selector_all(
        ".token",
        """spans => spans.map(span => [
          span.textContent,
          span.style.getPropertyValue("--p"),
          getComputedStyle(span).backgroundColor,
        ])""",
    )
    expected = same.choices[0].logprobs.content
    assert [text for text, _, _ in tokens] == [token.token for token in expected]
    probabilities = [2.718281828459045**token.logprob for token in expected]
    assert [float(p) for _, p, _ in tokens] == pytest.approx(probabilities, abs=1e-4)
    colours = [float(re.match(r"oklab\(([\d.]+)", colour)[1]) for _, _, colour in tokens]
    assert max(colours) - min(colours) > 0.1
    by_probability = sorted(zip(probabilities, colours, strict=True))
    assert [lightness for _, lightness in by_probability] == sorted(colours)


def test_the_card_of_a_token_lists_what_else_was_likely(page):
    ask(page, LONG, seed=3, max_tokens=12, temperature=1.5)
    end(page)
    assert not page.is_visible("#card")
    for i, token in enumerate(page.locator(".token").all()):
        token.hover()
        shares = [
            card_share(text) for text in page.locator(".alternative span").all_text_contents()
        ]
        assert len(shares) == 5, i
        assert 0 < sum(shares) < 100.3  # each is rounded
        assert shares == sorted(shares, reverse=True)
        heading = page.text_content("#card p")
        assert heading.startswith(f"Sampled: {visible(token.text_content())} (")
        sampled = page.locator("#card .sampled").all_text_contents()
        assert all(text.startswith(visible(token.text_content())) for text in sampled)
    page.hover("h1")
    assert not page.is_visible("#card")


def card_share(text: str) -> float:
    return 0 if text == "< 0.1%" else float(text.removesuffix("%"))


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵")


def test_the_keyboard_reaches_every_token(page):
    ask(page, "A dog.", seed=3, max_tokens=12)
    end(page)
    page.focus("#message")
    page.keyboard.press("Shift+Tab")
    tokens = [token.text_content() for token in page.locator(".token").all()]
    for token in tokens:
        assert evaluate(page, "document.activeElement.textContent") == token
        assert page.text_content("#card p").startswith(f"Sampled: {visible(token)} (")
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert evaluate(page, "document.activeElement.textContent") == tokens[-2]
    page.keyboard.press("Escape")
    assert not page.is_visible("#card")


def test_a_tap_opens_the_card(browser, served):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, served, **phone) as page:
        ask(page, "A dog.", seed=3, max_tokens=12)
        end(page)
        page.locator(".token").nth(3).tap()
        card = page.locator("#card").bounding_box()
        assert card["x"] >= 0
        assert card["x"] + card["width"] <= 390


def test_the_grid_shows_used_pages_while_an_answer_runs_and_none_after(page, served):
    ask(page, LONG, max_tokens=700)
    until(lambda: evaluate(page, "llama32.cache.counts.used") > 1)
    assert served.engine.stats.pages_held > 1
    pages = evaluate(page, "llama32.cache.running[0].pages")
    number = evaluate(page, "llama32.cache.running[0].number")
    colours = pixels(page)
    assert {colours[page] for page in pages} == {COLOURS[(number - 1) % 8]}
    assert page.locator("#running tr").count() == 1
    page.click("#stop")
    end(page)
    until(lambda: evaluate(page, "llama32.cache.counts.used") == 0)
    assert set(pixels(page)) == {FREE, EVICTABLE}
    assert page.text_content("#num-used") == page.text_content("#num-shared") == "0"
    assert page.locator("#running tr").count() == 0


def test_a_second_dialog_with_the_same_beginning_finds_evictable_pages(page, served):
    beginning = "Lily and Tom go to the park. " * 10
    ask(page, beginning, max_tokens=5)
    end(page)
    assert " · 0 of " in page.text_content(".answer .numbers")
    num_evictable = evaluate(page, "llama32.cache.counts.evictable")
    assert num_evictable == int(page.text_content("#num-evictable")) > 0
    assert pixels(page).count(EVICTABLE) == num_evictable
    page.click("#new-dialog")
    assert answers(page) == []
    ask(page, beginning + "What do they see?", max_tokens=5)
    end(page)
    assert " · 64 of " in page.text_content(".answer .numbers")


def test_a_dialog_goes_on_from_its_first_answer_until_a_new_one_begins(page):
    bodies = request_bodies(page)
    ask(page, "A dog.", max_tokens=8, n=2)
    end(page)
    ask(page, "And a cat?", max_tokens=8, n=1)
    end(page)
    assert [message["content"] for message in bodies[1]["messages"]] == [
        "A dog.",
        answers(page)[0],
        "And a cat?",
    ]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    page.click("#new-dialog")
    ask(page, "A bird.", max_tokens=8)
    end(page)
    assert [message["content"] for message in bodies[2]["messages"]] == ["A bird."]


def test_several_answers_share_the_pages_of_the_prompt(page):
    ask(page, LONG, max_tokens=700, n=4, seed=5, temperature=1)
    until(lambda: evaluate(page, "llama32.cache.counts.shared") > 0)
    state = evaluate(page, "({ running: llama32.cache.running, counts: llama32.cache.counts })")
    shared = [page for page in state["running"][0]["pages"] if page in state["running"][1]["pages"]]
    assert len(shared) == state["counts"]["shared"] > 0
    stripes = [colour for colour in rows(page)[shared[0]] if colour in COLOURS]
    assert len({*stripes}) > 1
    until(lambda: page.locator("#running tr").count() == 4)
    until(lambda: len({*answers(page)}) == 4)
    page.click("#stop")
    end(page)


def test_an_answer_is_marked_with_the_colour_of_its_pages(page, llm):
    ask(page, LONG, max_tokens=700, n=3)
    until(lambda: page.locator(".answer .swatch").count() == 3)
    backgrounds = "swatches => swatches.map(swatch => swatch.style.background)"
    until(lambda: page.locator("#running .swatch").count() == 3)
    colours = page.eval_on_selector_all("#running .swatch", backgrounds)
    assert page.eval_on_selector_all(".answer .swatch", backgrounds) == colours
    numbers = page.locator("#running td:first-child").all_text_contents()
    page.click("#stop")
    end(page)
    statuses = page.locator(".answer .numbers").all_text_contents()
    assert [re.match(r"request (\d+): ", text)[1] for text in statuses] == numbers
    prompt = llm.require_chat().encode(
        [{"role": "user", "content": LONG}]
    )  # the prompt contains today's date
    pattern = rf"(\d+) of {len(prompt)} prompt tokens cached"
    cached = [re.search(pattern, text)[1] for text in statuses]
    assert cached[1:] == ["64", "64"]  # the page that the first answer computed


def test_stop_ends_the_request_in_the_engine(page, served):
    ask(page, LONG, max_tokens=700, n=3)
    until(lambda: len(answers(page)[0]) > 20)
    assert served.engine.stats.pages_held > 0
    page.click("#stop")
    until(lambda: served.engine.stats.pages_held == 0, seconds=2)
    end(page)
    assert page.locator(".answer", has_text="stopped by you").count() == 3
    assert page.locator(".error:visible", has_text=re.compile(".")).count() == 0
    assert page.is_enabled("#send")


def test_a_refusal_is_shown_and_the_message_is_kept(page):
    ask(page, "dog " * 1100)
    until(lambda: page.locator("article .error").count())
    assert "tokens; prompt and answer together may come to 1024" in page.text_content(
        "article .error"
    )
    assert page.input_value("#message") == "dog " * 1100
    ask(page, "A dog.", max_tokens=5)
    end(page)
    assert len(answers(page)[1]) > 3


def test_an_error_in_the_middle_of_an_answer_is_shown_and_its_beginning_stays(page, served):
    ask(page, LONG, max_tokens=700)
    until(lambda: len(answers(page)[0]) > 20)
    served.service.engine.fail(RuntimeError("the model caught fire"))
    until(lambda: page.locator("article .error").count())
    assert page.text_content("article .error") == "the request failed: the model caught fire"
    assert "failed" in page.text_content(".answer .numbers")
    assert len(answers(page)[0]) > 20


def test_a_lost_connection_is_reported_until_the_server_answers_again(page, served):
    until(lambda: evaluate(page, "llama32.cache"))
    page.route("**/*", lambda route: route.abort())
    ask(page, "A dog.")
    until(lambda: page.locator("article .error").count())
    assert page.text_content("article .error") == "the server cannot be reached"
    until(lambda: page.text_content("#server-error") == "the server cannot be reached")
    page.unroute("**/*")
    until(lambda: page.text_content("#server-error") == "")


def test_the_page_asks_for_the_key_after_a_401(browser, llm):
    with serving(replace(llm), api_key="open sesame") as served, opened(browser, served) as page:
        until(lambda: page.is_visible("#key"))
        assert page.text_content("#server-error").startswith("send the right API key")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        until(lambda: page.is_visible("#key"))
        assert evaluate(page, "llama32.cache") is None
        page.fill("#key", "open sesame")
        page.press("#key", "Enter")
        until(lambda: evaluate(page, "llama32.cache"))
        assert page.is_hidden("#unlock")
        assert page.text_content("#server-error") == ""
        ask(page, "A dog.", max_tokens=5)
        end(page)
        assert len(answers(page)[0]) > 3


def test_a_model_that_cannot_chat_continues_texts(browser, llm):
    with (
        serving(replace(llm, chat_format=None)) as served,
        opened(browser, served) as page,
    ):
        bodies = request_bodies(page)
        ask(page, "Once upon a time", seed=1, max_tokens=20)
        end(page)
        ask(page, " Then", seed=1, max_tokens=5)
        end(page)
        first, second = answers(page)
        assert [body.get("prompt") for body in bodies] == [
            None,
            "Once upon a time",
            f"Once upon a time{first} Then",
        ]
        assert page.get_attribute("#message", "placeholder").startswith("Text to continue")
        assert page.locator("article .error").count() == 0
        assert page.locator(".token").count() == 25
        page.locator(".token").nth(2).hover()
        assert page.locator("#card .alternative").count() == 5
        assert second


@pytest.mark.parametrize("chats", [True, False])
def test_hostile_text_stays_text(browser, llm, chats):
    """Byte by byte, too: `tiny` has no tokens for most of the characters."""
    other = replace(llm) if chats else replace(llm, chat_format=None)
    with serving(other) as served, opened(browser, served) as page:
        alter_requests(page, lambda body: {**body, "structured_outputs": {"choice": [HOSTILE]}})
        ask(page, HOSTILE)
        end(page)
        assert page.text_content(".user-message") == HOSTILE
        assert answers(page) == [HOSTILE]
        assert page.locator("article :is(img, b)").count() == 0
        assert page.title() == "llama32"
        spans = page.locator(".token").all_text_contents()
        assert "".join(spans) == HOSTILE
        assert "€" in spans
        assert "😀" in spans
        page.locator(".token", has_text="😀").hover()
        headings = page.locator("#card p").all_text_contents()
        if chats:
            assert [re.search("<(.*)>", text)[1] for text in headings] == "f0 9f 98 80".split()
        assert len(headings) == 4


def token(text: bytes, *alternatives: str) -> dict[str, Any]:
    """A token as in the logprobs of a chunk."""
    texts = [text, *(alternative.encode() for alternative in alternatives)]
    sampled, *top = [
        {"token": text.decode(errors="replace"), "bytes": [*text], "logprob": -1.0 - i}
        for i, text in enumerate(texts)
    ]
    return {**sampled, "top_logprobs": top}


def fake_stream(page: Page, *pieces: tuple[str, list[dict[str, Any]]]) -> None:
    """Answer chats with a stream of these texts and tokens instead of the server's."""
    chunks = [
        {
            "id": "chatcmpl-1",
            "choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": tokens}}],
        }
        for text, tokens in pieces
    ]
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    body = "".join([*events, "data: [DONE]\n\n"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))


def test_a_token_with_html_stays_text_in_the_answer_and_on_the_card(page):
    fake_stream(page, (HOSTILE, [token(HOSTILE.encode(), HOSTILE, "<script>alert()</script>")]))
    ask(page, "A dog.")
    end(page)
    assert answers(page) == [HOSTILE]
    page.locator(".token").hover()
    assert page.locator("#card code").all_text_contents() == [
        visible(HOSTILE),
        visible(HOSTILE),
        "<script>alert()</script>",
    ]
    assert page.locator(":is(article, #card) :is(img, b, script)").count() == 0
    assert page.title() == "llama32"


def test_tokens_of_one_character_are_joined_in_whatever_chunks_they_arrive(page):
    smile = [*map(token, (b"\xf0", b"\x9f\x98", b"\x80"))]
    fake_stream(
        page,
        ("A😀b", [token(b"A"), *smile, token(b"b")]),
        ("C", [token(b"C"), *smile[:2]]),
        ("😀d", [smile[2], token(b"d")]),
        ("\ufffd", [token(b"\x80")]),
    )
    ask(page, "A dog.")
    end(page)
    assert answers(page) == ["A😀bC😀d\ufffd"]
    assert page.locator(".token").all_text_contents() == [*"A😀bC😀d\ufffd"]
    page.locator(".token").nth(4).hover()
    assert [text[:15] for text in page.locator("#card p").all_text_contents()] == [
        "Sampled: <f0> (",
        "Sampled: <9f 98",
        "Sampled: <80> (",
    ]


def test_shift_enter_starts_a_line_and_sends_nothing(page):
    page.fill("#message", "A dog")
    page.press("#message", "Shift+Enter")
    page.keyboard.type("barks.")
    assert page.input_value("#message") == "A dog\nbarks."
    assert answers(page) == []
    page.fill("#message", "  \n ")
    page.press("#message", "Enter")
    assert answers(page) == []


def test_invalid_settings_are_not_sent(page):
    bodies = request_bodies(page)
    ask(page, "A dog.", n=9)
    assert page.evaluate("document.getElementById('composer').checkValidity()") is False
    assert bodies == []
    page.fill("#n", "1")
    page.fill("#temperature", "")
    page.fill("#max_tokens", "3")
    page.press("#message", "Enter")
    end(page)
    assert {"temperature", "seed"} & bodies[0].keys() == set()
    assert bodies[0]["max_tokens"] == 3


def test_the_status_describes_the_selected_page(page):
    ask(page, LONG, max_tokens=200)
    until(lambda: evaluate(page, "llama32.cache.counts.used") > 1)
    second = evaluate(page, "llama32.cache.running[0].pages[1]")
    size, columns = page.evaluate("[gridLayout().size, gridLayout().columns]")
    position = {"x": second % columns * size + 3, "y": second // columns * size + 3}
    page.hover("#grid", position=position)
    status = page.text_content("#page-status")
    assert re.fullmatch(rf"Page {second}, used by request \d+: tokens 65 to 128\.", status)
    page.click("#stop")
    end(page)
    page.hover("h1")
    assert page.text_content("#page-status").startswith("256 pages.")
    page.focus("#grid")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert re.match(rf"Page {columns}: (free|evictable)", page.text_content("#page-status"))
    page.keyboard.press("ArrowLeft")
    assert re.match(rf"Page {columns - 1}: (free|evictable)", page.text_content("#page-status"))


def test_the_page_polls_often_while_a_request_runs_and_never_while_hidden(page, served):
    times: list[float] = []
    page.on("request", lambda r: times.append(time.monotonic()) if "/cache" in r.url else None)
    ask(page, LONG, max_tokens=700, n=8)  # so that at least one runs long enough
    until(lambda: evaluate(page, "llama32.cache.running.length") and len(times) > 5)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sorted(gaps)[len(gaps) // 2] < 1
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", { get: () => true, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    page.wait_for_timeout(400)
    count = len(times)
    page.wait_for_timeout(600)
    assert len(times) == count
    page.evaluate(
        "() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.wait_for_timeout(600)
    assert len(times) > count
    page.click("#stop")
    end(page)


@pytest.mark.parametrize("pages", [1, 1000, 20_000, 500_000])
def test_every_page_has_a_cell(page, pages):
    until(lambda: evaluate(page, "llama32.cache"))
    size, columns, rows, width = page.evaluate(
        """pages => {
          const snapshot = { ...llama32.cache, pages, evictable: [[0, 1]], running: [] };
          llama32.cache = parseCache(snapshot);
          drawGrid();
          const { size, columns, rows } = gridLayout();
          return [size, columns, rows, document.getElementById("grid").clientWidth];
        }""",
        pages,
    )
    assert columns * size <= width
    assert columns * (rows - 1) < pages <= columns * rows
    assert rows * size <= 440 or size == 2
    assert page.locator("#grid").bounding_box()["height"] == pytest.approx(rows * size, abs=1)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(browser, served, width):
    with opened(browser, served, viewport={"width": width, "height": 800}) as page:
        ask(page, LONG + "w" * 200, max_tokens=20, n=3)
        until(lambda: page.locator("#running tr").count() == 3)
        for box in ("html", "#scroller", "#cache"):
            assert page.eval_on_selector(box, "box => box.scrollWidth - box.clientWidth") == 0
        assert page.locator("#send").bounding_box()["y"] < 800
        end(page)
