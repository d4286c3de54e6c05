"""The judge of a recipe."""

import inspect
from collections.abc import Sequence

from ..answers.prompts import prompt_text
from ..judge import CachedJudge, ContextJudge, ContrastJudge, Judge, LLMJudge, MagnitudeJudge
from .recipe import JudgeSection

LLM_OPTIONS = {name for name in inspect.signature(LLMJudge).parameters if name != "model"}


def build_judge(section: JudgeSection, rows: Sequence[dict], dry_run: bool = False) -> Judge:
    """The judge of a recipe for these rows. A dry run makes no request and no cache."""
    asked = _asked_judge(section, rows, dry_run)
    if section.cache and asked and not dry_run:
        asked = CachedJudge(asked, section.cache, replay=section.replay)
    if section.kind != "contrast":
        return asked
    return ContrastJudge(rows, **contrast_options(section), on_topic=section.on_topic, then=asked)


def contrast_options(section: JudgeSection) -> dict:
    return dict(floor=section.contrast_floor, contrast_context=section.contrast_context)


def _asked_judge(section: JudgeSection, rows: Sequence[dict], dry_run: bool) -> Judge | None:
    """The one whose answers may be kept: a contrast judge's own follow from numbers that are there."""
    if section.kind == "llm" or (section.kind == "contrast" and section.model):
        options = section.model_dump(include=LLM_OPTIONS)
        judge = LLMJudge(section.model, **options)
        if not section.replay and section.on_error == "raise" and not dry_run:
            judge.check()
        return judge
    if section.kind == "contrast":
        return None
    if section.kind == "magnitude":
        return MagnitudeJudge()
    # Words of the data's prompts are no news.
    return ContextJudge((prompt_text(row["prompt"]) for row in rows), on_topic=section.on_topic)
