"""Untrusted text in the report stays text, and nothing is fetched: as the page is written, and in a browser."""

import base64
import hashlib
import re

import pytest
from fake_run import make_run, rollout, write_lines
from test_report import page_of

from rmsd.report import write_report

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "javascript:window.hacked=1",
    "<!--<script>",
    "]]></svg><svg onload=window.hacked=1>",
    '"><iframe srcdoc="<script>parent.hacked=1</script>">',
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\u2029\u202e\x00\ud800",
]


def hostile_run(path, **more):
    """Every string that the page shows is an attack. `more`: keys of its recipe."""
    attack = "".join(HOSTILE)
    one = {
        **rollout(1, 0, "rmsd", 3),
        "prompt": attack,
        "privileged_context": attack,
        "tokens": HOSTILE,
        "student_logprob": [-1.0] * len(HOSTILE),
        "teacher_logprob": [-2.0] * len(HOSTILE),
        "divergence": [0.5] * len(HOSTILE),
        "candidates": list(range(len(HOSTILE))),
        "kept": [0, 1],
        "preferred": {str(i): text for i, text in enumerate(HOSTILE)} | {"__proto__": attack},
    }
    printable = "".join(HOSTILE[:-1])
    recipe = {"task": printable, "model": printable, "seed": printable, printable: printable, **more}
    run = make_run(path, method=printable, judge=printable, recipe=recipe, rollouts=[one])
    lines = [{"kind": kind, "step": s, attack: 0.5, "loss": 0.5} for kind in ("train", "eval") for s in (1, 2)]
    write_lines(run / "metrics.jsonl", lines)
    return run


def test_hostile_text_stays_text(tmp_path):
    tame, hostile = page_of(make_run(tmp_path / "tame")), page_of(hostile_run(tmp_path / "hostile"))
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in tame.elements}
    assert not [name for _, attrs in hostile.elements for name in attrs if name.startswith("on") or name == "style"]
    assert [tag for tag, _ in hostile.elements].count("script") == 2
    assert hostile.data["rollouts"][0]["tokens"] == HOSTILE
    assert not re.search("[<>&\u2028\u2029]", hostile.inline["application/json"])
    assert hostile.inline["script"] == tame.inline["script"]
    assert "49" not in hostile.html.split("<h1>")[1].split("</h1>")[0], "the recipe's text was rendered as a template"


def test_policy_admits_our_script_and_style_alone(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inline[name].encode()).digest()).decode()
        assert directives[f"{name}-src"] == f"'sha256-{digest}'"
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"


def test_nothing_is_fetched(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    links = [attrs[name] for _, attrs in page.elements for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|innerHTML|insertAdjacent|document\.write|eval\(", page.html)


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report([make_run(tmp_path_factory.mktemp("one") / "run")])


def test_a_browser_fetches_nothing(reader, page):
    reader.open(page)
    assert reader.run("return performance.getEntriesByType('resource').map((one) => one.name)") == []


def test_hostile_text_is_only_text_in_a_browser(tmp_path, reader, page):
    reader.open(page)
    names = "return [...new Set([...document.querySelectorAll('*')].map((one) => one.localName))]"
    tame = set(reader.run(names))
    reader.open(write_report([hostile_run(tmp_path / "run")]))
    assert reader.run("return window.hacked") is None
    assert set(reader.run(names)) <= tame
    tokens = reader.all("#answer .t")
    assert len(tokens) == len(HOSTILE)
    assert tokens[1].text == "<img·src=x·onerror=window.hacked=1>"
    assert tokens[2].text == "javascript:window.hacked=1"
    assert tokens[-1].text.startswith("⟨U+2028⟩⟨U+2029⟩⟨U+202E⟩⟨U+0000⟩")
    for token in tokens:
        reader.hover(token)
    starts = "return document.getElementById('prompt').textContent.startsWith(arguments[0])"
    assert reader.run(starts, HOSTILE[0] + HOSTILE[1])
    assert reader.run("return window.hacked") is None
    assert reader.run("return document.querySelectorAll('[onerror], [onload], [srcdoc], iframe, img').length") == 0


def test_the_policy_would_stop_what_slips_through(reader, page):
    reader.open(page)
    refused = reader.chrome.execute_async_script(
        """const done = arguments[0], refused = [];
        const attempt = (act) => { try { act(); } catch (error) { refused.push(error.name); } };
        const script = document.createElement('script'), image = document.createElement('img');
        attempt(() => { script.text = 'window.hacked = 1'; document.body.append(script); });
        attempt(() => { document.body.innerHTML += '<b id=x></b>'; });
        image.onerror = () => { refused.push('image'); done(refused); };
        image.src = 'http://127.0.0.1:9/';"""
    )
    assert refused == ["TypeError", "TypeError", "image"]
    assert reader.run("return window.hacked") is None
    assert any("Content Security Policy" in complaint for complaint in reader.complaints())
