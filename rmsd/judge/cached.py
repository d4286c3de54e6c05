"""Judges asked once: answers on disk, keyed by everything that determines them."""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .base import Judge, Question


class CachedJudge:
    """Wraps a judge; a question answered before is answered from `directory`.

    Args:
        judge: asked about what is not there yet. One that tells its answers one by one, by a method `ask_each` as
            LLMJudge's, has each of them kept though another fails, and nothing kept that is not its own.
        directory: one small JSON file an answer, each written whole or not at all.
        replay: never ask; a question that is not there raises LookupError.

    `stats` counts hits, misses and corrupt entries (asked again).
    """

    def __init__(self, judge: Judge, directory: str | Path, *, replay: bool = False):
        self.judge, self.directory, self.replay = judge, Path(directory), replay
        self.stats = {"hits": 0, "misses": 0, "corrupt": 0}
        self.directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, questions: Sequence[Question]) -> list[list[int]]:
        keys = [self._key(question) for question in questions]
        answers = [self._read(key) for key in keys]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        self.stats["hits"] += len(questions) - len(missing)
        if missing and self.replay:
            raise LookupError(
                f"judge.replay: {len(missing)} of {len(questions)} questions are not in the cache {self.directory}; "
                "run once without replay"
            )
        if missing:
            self.stats["misses"] += len(missing)
            asked = self._ask([questions[i] for i in missing], [keys[i] for i in missing])
            for i, answer in zip(missing, asked, strict=True):
                answers[i] = answer
        return answers

    def _ask(self, questions: list[Question], keys: list[str]) -> list[list[int]]:
        if hasattr(self.judge, "ask_each"):
            return self.judge.ask_each(questions, lambda i, answer: self._write(keys[i], answer))
        answers = self.judge(questions)
        for key, answer in zip(keys, answers, strict=True):
            self._write(key, answer)
        return answers

    def _key(self, question: Question) -> str:
        fingerprint = getattr(self.judge, "fingerprint", type(self.judge).__qualname__)
        asked = json.dumps([fingerprint, asdict(question)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _read(self, key: str) -> list[int] | None:
        try:
            answer = json.loads(self._path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):
            answer = None
        if not (isinstance(answer, list) and all(isinstance(position, int) for position in answer)):
            self.stats["corrupt"] += 1
            return None
        return answer

    def _write(self, key: str, answer: list[int]) -> None:
        # Two threads may bring the same question's answers at once.
        partial = self._path(key).with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_text(json.dumps(answer), encoding="utf-8")
        partial.replace(self._path(key))
