"""The web page in headless Chromium: asked, answered, stopped, compared, watched; nothing of a model's runs in it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal import cli
from polymodal.serving.page import FILES, POLICY, WEB
from tests.media.makers import tone
from tests.serving.conftest import Running, Told
from tools.browser import Browser, Page, find_chromium

CHROMIUM = find_chromium()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
KEY = "k" * 32
REPLY = "[...document.querySelectorAll('#{} .reply .text')].at(-1)?.innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM)
    yield browser
    browser.close()


def ready(browser: Browser, server: Running, view: str = "chat", **options: Any) -> Page:
    page = browser.page(**options)
    page.open(f"{server.url}/#{view}")
    page.wait("typeof talks === 'object' && talks.compare")
    return page


def ask(page: Page, text: str, view: str = "chat") -> None:
    page.js(f"document.querySelector('#{view} .composer textarea').focus()")
    page.type(text)
    page.key("Enter")


def quiet(page: Page, server: Running) -> None:
    """Nothing was complained of, and nobody else was asked."""
    assert page.complaints == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in page.asked), page.asked


@needs_browser
def test_a_question_is_answered_piece_by_piece_and_stopped(browser: Browser, told: Callable[..., Any]) -> None:
    model, server = told()
    page = ready(browser, server)
    assert page.js("document.activeElement === document.querySelector('#chat .composer textarea')")
    page.type("one")
    page.key("Enter", modifiers=8)  # shift
    page.type("two")
    page.key("Enter")
    assert page.wait("document.querySelector('.bubble')?.textContent") == "one\ntwo"
    model.steps.release(2)
    page.wait(f"{REPLY.format('chat')} === 'word word'")
    assert page.js("document.querySelector('.reply').classList.contains('waiting')")
    page.key("Escape")
    assert page.wait("document.querySelector('.reply:not(.waiting) .line').innerText").startswith("Stopped.")
    while not model.closed.is_set() and model.made < 10:  # one of the next steps finds out
        model.steps.release(1)
        model.closed.wait(0.2)
    assert model.closed.is_set() and model.made < 10
    model.steps.release(100)
    page.click("#chat .reply button[aria-label='Answer again']")
    page.wait(f"{REPLY.format('chat')} === '{('word ' * 12).strip()}' && !talks.chat.running")
    line = page.text("#chat .reply .line")
    assert re.search(r"3 tokens in\s+2 out\s+[\d.]+ s to first token", line), line
    assert page.js("$('live').innerText").split() == ["word"] * 14  # for screen readers, each word once
    page.js("document.querySelector('.said button').click()")
    assert (
        page.js("document.querySelector('#chat .composer textarea').value") == "one\ntwo" and page.text(".turns") == ""
    )
    quiet(page, server)


@needs_browser
def test_what_was_said_before_and_settings_are_sent(browser: Browser, told: Callable[..., Any]) -> None:
    model, server = told()
    model.steps.release(1000)
    heard: list[Any] = []
    stream = model.stream
    model.stream = lambda messages, params=None: (heard.append((messages, params)), stream(messages, params))[1]
    page = ready(browser, server)
    page.click("#chat .settings summary")
    page.js("document.querySelector('#chat .panel input').focus()")
    page.type("0.5")
    page.js("document.querySelectorAll('#chat .panel input')[1].focus()")
    page.type("3")
    page.js("document.querySelector('#chat .panel textarea').focus()")
    page.type("Be brief.")
    page.key("Escape")
    assert page.js("!document.querySelector('#chat details').open")
    for text in ("first", "second"):
        ask(page, text)
        page.wait("document.querySelector('.turn:last-child .reply:not(.waiting)') && !talks.chat.running")
    messages, params = heard[-1]
    assert [(m.role, m.text) for m in messages] == [
        ("system", "Be brief."), ("user", "first"), ("assistant", "word word word "), ("user", "second"),
    ]  # fmt: skip
    assert (params.temperature, params.max_new_tokens) == (0.5, 3)
    page.click("#chat .new")
    assert page.text(".turns") == "" and page.js("document.activeElement.tagName") == "TEXTAREA"
    quiet(page, server)


@needs_browser
def test_a_dropped_image_is_answered_and_what_the_model_saw_is_shown(
    browser: Browser, tiny: Running, tmp_path: Path
) -> None:
    PILImage.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "red.png")
    tone(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("no image")
    page = ready(browser, tiny)
    page.drop(tmp_path / "red.png", tmp_path / "a.wav")
    assert page.wait("document.querySelector('.composer .medium img')?.alt") == "red.png"
    page.wait("document.querySelector('.composer .medium audio')")
    pasted = f"new File([new Uint8Array({list((tmp_path / 'red.png').read_bytes())})], 'b.png', {{type: 'image/png'}})"
    page.js(f"clip = new DataTransfer(), clip.items.add({pasted}), 0")
    page.js("document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: clip, bubbles: true}))")
    page.wait("document.querySelectorAll('.composer .medium img').length === 2")
    page.click("#chat .composer .medium:last-child .remove")
    page.drop(tmp_path / "a.txt")
    assert (
        page.wait("document.querySelector('.composer .error').innerText") == "a.txt is no image, sound, video or PDF."
    )
    page.click("#chat .composer .medium.audio .remove")
    ask(page, "What is it?")
    page.wait("document.querySelector('.reply:not(.waiting)')", 30)
    assert page.js("document.querySelectorAll('.asked .medium img').length") == 1
    assert re.search(r"\d+ tokens in\s+\d+ image\s+\d+ out", page.text(".reply .line"))
    page.click(".reply button[aria-label='What the model saw']")
    page.wait("document.querySelector('.saw img')?.naturalWidth > 100")
    seen = page.text(".saw")
    tokens = page.js("document.querySelector('.reply .line').innerText.match(/(\\d+) image/)[1]")
    assert f"Image 1: {tokens} tokens" in seen and f"{tokens} of them media" in seen
    assert "60 × 40 pixels" in page.js("document.querySelector('.saw img').alt")
    page.click(".reply button[aria-label='What the model saw']")
    assert page.js("document.querySelector('.saw') === null")
    ask(page, "And now?")
    page.wait("document.querySelectorAll('.reply:not(.waiting)').length === 2", 30)
    assert "image" in page.text(".turn:last-child .line")  # which goes along, and is still seen
    assert page.js("document.querySelectorAll('.asked .medium img').length") == 1
    quiet(page, tiny)


@needs_browser
def test_a_question_is_recorded(browser: Browser, tiny: Running) -> None:
    page = ready(browser, tiny)
    page.click("#chat .mic")
    page.wait(
        "document.querySelector('#chat .mic').ariaPressed === 'true' && talks.chat.recorder?.state === 'recording'"
    )
    page.js("new Promise(done => setTimeout(done, 600))")
    page.click("#chat .mic")
    page.wait("document.querySelector('.composer .medium audio')")
    head = base64.b64decode(page.js("talks.chat.pending[0].part.input_audio.data"))[:44]
    assert head[:4] == b"RIFF" and int.from_bytes(head[24:28], "little") == 16000
    page.click("#chat .send")
    page.wait("document.querySelector('.reply:not(.waiting)')", 30)
    assert re.search(r"\d+ sound", page.text(".reply .line")), page.text(".reply .line")
    quiet(page, tiny)


@needs_browser
def test_a_reply_is_text_whatever_it_holds(browser: Browser, told: Callable[..., Any]) -> None:
    """Row 69."""
    model, server = told()
    model.word = (
        '<script>document.title="hit"</script><img src="http://evil.example/x.png" onerror="document.title=1">\n'
        '![x](http://evil.example/y.png) <a href="javascript:1">a</a>\n```html\n<b>bold</b>\n```\n' + "x" * 300_000
    )
    model.steps.release(1000)
    page = ready(browser, server)
    page.js("document.querySelectorAll('#chat .panel input')[1].value = 2")
    ask(page, "hi")
    page.wait("document.querySelector('.reply:not(.waiting)')", 20)
    said = page.js("document.querySelector('.reply .text').textContent")
    assert '<script>document.title="hit"</script><img src="http://evil.example/x.png"' in said and len(said) > 600_000
    assert page.text(".reply pre").strip() == "<b>bold</b>"
    assert page.js("document.querySelectorAll('.text img, .text script, .text a, .text b').length") == 0
    assert page.js("document.title") == "polymodal"
    assert page.js(
        "document.body.scrollWidth <= innerWidth && document.querySelector('.scroll').scrollWidth <= innerWidth"
    )
    quiet(page, server)


@needs_browser
def test_images_and_sounds_of_a_reply(browser: Browser, told: Callable[..., Any], tmp_path: Path) -> None:
    """As OpenAI and OpenRouter write them; an image from elsewhere is not fetched."""
    _, server = told()
    buffer = io.BytesIO()
    PILImage.new("RGB", (30, 20)).save(buffer, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    sound = tone(tmp_path / "a.wav").read_bytes()
    half = len(sound) // 2
    deltas: list[Any] = [
        {"content": "Here."},
        {"images": [{"type": "image_url", "image_url": {"url": url}} for url in (image, "http://evil.example/z.png")]},
        *({"audio": {"data": base64.b64encode(piece).decode()}} for piece in (sound[:half], sound[half:])),
    ]
    lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas]
    cards = (("tiny", "text", ["text", "image", "audio"]), ("piper", "text", ["audio"]), ("ears", "audio", ["text"]))
    models = [{"id": name, "modalities": {"input": [takes], "output": makes}} for name, takes, makes in cards]
    page = browser.page()
    page.replace("/v1/models", "application/json", json.dumps({"data": models}).encode())
    page.replace("/v1/chat/completions", "text/event-stream", "".join([*lines, "data: [DONE]\n\n"]).encode())
    page.open(f"{server.url}/")
    page.wait("typeof talks === 'object' && talks.compare")
    assert page.js("models.map(({id}) => id)") == ["tiny"]  # who draws, speaks or listens alone is no partner
    page.click("#chat .settings summary")
    for kind in ("image", "audio"):
        page.click(f"#chat .panel input[value={kind}]")
    asked = page.js("talks.chat.lanes[0].request([])")
    assert asked["modalities"] == ["text", "image", "audio"]
    assert asked["audio"] == {"voice": "piper", "format": "pcm16"}
    ask(page, "Draw and speak.")
    page.wait("document.querySelector('.made img')?.naturalWidth === 30")
    page.wait("document.querySelector('.made audio')?.duration > 0.1")
    assert page.js("document.querySelectorAll('.made img').length") == 1
    ask(page, "Again.")
    page.wait("document.querySelectorAll('.made audio').length === 2")
    history = page.js("talks.chat.messages(talks.chat.turns[1], 0)")
    assert history[1] == {"role": "assistant", "content": "Here.", "images": [deltas[1]["images"][0]]}
    quiet(page, server)


@needs_browser
def test_two_models_side_by_side(browser: Browser, told: Callable[..., Any]) -> None:
    other = Told()
    other.word = "other "
    model, server = told(beside={"other": other})
    model.steps.release(1000)
    other.steps.release(1000)
    page = ready(browser, server, "compare")
    assert page.js("[...document.querySelectorAll('#compare .lane select')].map(s => s.value)") == ["tiny", "other"]
    for turn in (1, 2):
        ask(page, "hi", "compare")
        done = f"document.querySelectorAll('#compare .reply:not(.waiting)').length === {2 * turn}"
        page.wait(f"{done} && !talks.compare.running")
        texts = page.js("[...document.querySelectorAll('#compare .turn:last-child .text')].map(t => t.innerText)")
        assert [text.split()[0] for text in texts] == ["word", "other"]
    assert [other.made, model.made] == [24, 24]
    left, right = page.js("[...document.querySelectorAll('.reply')].slice(0, 2).map(r => r.getBoundingClientRect().x)")
    assert left < right
    quiet(page, server)


@needs_browser
def test_a_run_is_watched_as_it_grows(browser: Browser, told: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine" / "stage2"
    grow(folder, 40)
    _, server = told(runs_folder=tmp_path / "runs")
    page = ready(browser, server, "runs")
    page.wait("document.querySelectorAll('.chart svg').length >= 4")
    assert page.text("#run h1") == "mine/stage2" and page.text(".numbers b") == "40"
    assert "held-out 0.9" in page.text(".chart .legend") and "A sun." in page.text(".sample")
    page.wait("document.querySelector('.sample img')?.naturalWidth === 8")
    grow(folder, 55)
    page.wait("document.querySelector('.numbers b').innerText === '55'")
    told_of = page.js("document.querySelector('.chart svg').getAttribute('aria-label')")
    assert re.fullmatch(r"Loss: from 3 to 0\.05\d* over 55 steps", told_of), told_of
    quiet(page, server)


@needs_browser
def test_languages_theme_tabs_and_a_phone(browser: Browser, told: Callable[..., Any]) -> None:
    _, server = told()
    page = ready(browser, server, width=360, height=700)
    en, zh = page.js("[Object.keys(STRINGS.en), Object.keys(STRINGS.zh)]")
    assert sorted(en) == sorted(zh) and len(set(en)) == len(en)
    used = set(re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', (WEB / "index.html").read_text("utf-8")))
    scripts = (WEB / "app.js").read_text("utf-8") + (WEB / "runs.js").read_text("utf-8")
    used |= set(re.findall(r'\b(?:t|label): \[?"(\w+)"', scripts)) | set(re.findall(r'\bt\("(\w+)"', scripts))
    used |= set(re.findall(r'\b(?:say|label|fail)\((?:[\w.]+, )?"(\w+)"', scripts))
    assert used <= set(en), used - set(en)
    slots = "t => Object.values(STRINGS[t]).map(s => String(s.match(/\\{\\d\\}/g)?.sort()))"
    assert page.js(f"({slots})('en')") == page.js(f"({slots})('zh')")
    assert page.js("document.documentElement.lang") == "en"
    page.click("#language")
    assert page.js("document.documentElement.lang") == "zh-Hans"
    assert page.text("#tab-chat") == "对话" and "问" in page.text("#chat h1")
    dark = "getComputedStyle(document.body).backgroundColor"
    light = page.js(dark)
    page.click("#theme")
    assert page.js(dark) != light
    page.js("document.querySelector('#tab-chat').focus()")
    for name in ("compare", "runs", "chat"):
        page.key("ArrowRight")
        assert page.js("document.activeElement.id") == f"tab-{name}" and page.js(f"!$('{name}').hidden")
        assert page.js("document.documentElement.scrollWidth") == 360
    names = (
        "[...document.querySelectorAll('button, input, select, textarea, summary')].filter(n => n.checkVisibility() "
        "&& !n.innerText?.trim() && !n.ariaLabel && !n.labels?.length).map(n => n.outerHTML)"
    )
    assert page.js(names) == []  # every control has a name
    quiet(page, server)


@needs_browser
def test_a_page_asks_for_the_key(browser: Browser, told: Callable[..., Any]) -> None:
    model, server = told(key=KEY)
    model.steps.release(1000)
    page = browser.page()
    page.open(f"{server.url}/")
    page.wait("$('ask-key').open")
    for given, then in (("wrong", "!$('key-wrong').hidden && $('ask-key').open"), (KEY, "talks.chat")):
        page.js("$('key').focus()")
        page.type(given)
        page.key("Enter")
        page.wait(then)
    ask(page, "hi")
    page.wait("document.querySelector('.reply:not(.waiting) .text')?.innerText.startsWith('word')")
    assert page.js("JSON.stringify([localStorage, document.cookie]).includes('kkk')") is False
    assert page.js("sessionStorage.getItem(KEY_PLACE)") == KEY
    assert all("kkk" not in url for url in page.asked)


def grow(folder: Path, steps: int) -> None:
    """A run's files as training writes them, up to a step."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8)).save(folder / "eval" / "1-0.jpg")
    line = {"learning_rate": {"llm": 1e-3}, "grad_norm": 1.0, "tokens_per_s": 900.0, "elapsed_s": 3.0, "samples": 9,
            "loss_by_source": {"a": 1.0}}  # fmt: skip
    lines = [{"step": n, "loss": 3 / n, "loss_by_kind": {"a": 1 / n, "b": 2 / n}, **line} for n in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"step": 99, "lo')
    entry = {
        "id": "x",
        "question": "What is it?",
        "expected": "A sun.",
        "images": ["eval/1-0.jpg"],
        "answer": "A moon.",
    }
    (folder / "eval.jsonl").write_text(json.dumps({"step": steps, "loss": 0.9, "answers": [entry]}) + "\n")


def test_a_run_is_read_behind_a_cursor(told: Callable[..., Any], tmp_path: Path) -> None:
    root, folder = tmp_path / "runs", tmp_path / "runs" / "mine" / "stage2"
    grow(folder, 5)
    _, server = told(runs_folder=root)
    assert [run["id"] for run in server.get("/v1/runs").json()["data"]] == ["mine/stage2"]
    assert server.get("/v1/runs").json()["data"][0]["step"] == 5
    found = server.get("/v1/runs/mine/stage2").json()
    assert [row["step"] for row in found["log"]["rows"]] == [1, 2, 3, 4, 5] and found["log"]["anew"]
    assert "loss_by_source" not in found["log"]["rows"][0] and found["images"] == ["eval/1-0.jpg"]
    log = folder / "log.jsonl"
    text = log.read_text().rpartition("\n")[0] + "\n"
    log.write_text(text + '{"step": 6, "loss": NaN}\n[]\n{"step": 7}\n')
    again = server.get(f"/v1/runs/mine/stage2?log={found['log']['cursor']}").json()["log"]
    assert [row["step"] for row in again["rows"]] == [7] and not again["anew"]
    work = log.with_suffix(".new")
    work.write_text(text)
    work.replace(log)  # as a resumed run does
    anew = server.get(f"/v1/runs/mine/stage2?log={again['cursor']}").json()["log"]
    assert [row["step"] for row in anew["rows"]] == [1, 2, 3, 4, 5] and anew["anew"]
    for cursor in ("x", "1-", "-1--1", f"{2**70}-{2**70}", "9" * 5000):
        assert len(server.get(f"/v1/runs/mine/stage2?log={cursor}").json()["log"]["rows"]) == 5
    image = server.get("/v1/runs/mine/stage2?image=eval/1-0.jpg")
    assert (image.status_code, image.headers["content-type"]) == (200, "image/jpeg")


def test_a_run_opens_nothing_but_its_own_files(told: Callable[..., Any], tmp_path: Path) -> None:
    root, secret = tmp_path / "runs", tmp_path / "secret"
    grow(root / "mine", 2)
    grow(secret, 2)
    (secret / "secret.jpg").write_bytes(b"secret")
    (root / "linked").symlink_to(secret)
    (root / "bare").mkdir()
    (root / "bare" / "log.jsonl").symlink_to(secret / "log.jsonl")
    (root / "mine" / "eval" / "secret.jpg").symlink_to(secret / "secret.jpg")
    (root / "mine" / "reconstructions").symlink_to(secret)
    os.mkfifo(root / "mine" / "eval" / "pipe.jpg")
    _, server = told(runs_folder=root)
    assert [run["id"] for run in server.get("/v1/runs").json()["data"]] == ["mine"]
    assert server.get("/v1/runs/mine").json()["images"] == ["eval/1-0.jpg"]
    for name in (
        "linked",
        "bare",
        "..",
        "../secret",
        "%2e%2e/secret",
        "mine/../../secret",
        f"{secret}",
        "mine%00",
        "x" * 5000,
    ):
        assert server.get(f"/v1/runs/{name}").status_code in (400, 404)
    for name in ("eval/secret.jpg", "eval/pipe.jpg", "log.jsonl", "../../secret/secret.jpg", "eval/..%2f..%2flog.jsonl",
                 "reconstructions/secret.jpg", "%2fetc%2fpasswd"):  # fmt: skip
        assert server.get(f"/v1/runs/mine?image={name}").status_code in (400, 404), name


def test_without_a_folder_there_are_no_runs(told: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    _, server = told()
    assert server.get("/v1/runs").json() == {"object": "list", "data": []}
    assert server.get("/v1/runs/x").status_code == 404
    assert cli.main(["serve", "--runs", "/no/such/folder"]) == 2
    assert "--runs /no/such/folder: there is no such folder" in capsys.readouterr().err


def test_only_the_pages_own_files_come_without_the_key(told: Callable[..., Any]) -> None:
    _, server = told(key=KEY)
    for path in FILES:
        answer = server.get(path)
        assert (answer.status_code, answer.headers["content-security-policy"]) == (200, POLICY)
        assert (
            answer.headers["referrer-policy"] == "no-referrer" and answer.headers["x-content-type-options"] == "nosniff"
        )
    assert "unsafe" not in POLICY and "http" not in POLICY
    for path in ("/v1/runs", "/v1/runs/x", "/v1/runs/x?image=eval/a.jpg", "/web/app.js", "/index.html", "//"):
        assert server.get(path).status_code == 401
    assert server.post({}).status_code == 401


def test_the_page_reads_no_text_as_html() -> None:
    for name, _ in FILES.values():
        text = (WEB / name).read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setHTML", text
        )
        assert not re.search(r"""(?:https?:)?//[\w.-]+\.\w""", text.replace("http://www.w3.org", "")), name
        assert not re.search(r"\son\w+=|<style|\sstyle=", text) or name != "index.html"


def test_a_preview_of_a_model_of_another_kind(told: Callable[..., Any]) -> None:
    _, server = told()
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    answer = server.post_to("/v1/preview", asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_model")


def test_a_preview_counts_as_the_answer_does(tiny: Running) -> None:
    buffer = io.BytesIO()
    PILImage.new("RGB", (60, 40)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    seen = tiny.post_to("/v1/preview", asked).json()
    usage = tiny.post({**asked, "max_tokens": 1}).json()["usage"]
    assert seen["prompt_tokens"] == usage["prompt_tokens"]
    assert seen["media_tokens"] == usage["prompt_tokens_details"]["image_tokens"] == seen["media"][0]["tokens"]
    assert seen["media"][0]["kind"] == "image" and seen["media"][0]["image"].startswith("data:image/webp;base64,")
    content[0]["image_url"] = {"url": "data:image/png;base64,AAAA"}  # type: ignore[assignment]
    broken = tiny.post_to("/v1/preview", asked)
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "messages[0].content[0].image_url.url")
    assert tiny.post_to("/v1/preview", {**asked, "model": "x"}).status_code == 404
