"""Judges of relevance: which candidates bear on the wanted behaviour."""

from .base import Candidate, Judge, Question
from .cached import CachedJudge
from .context import ContextJudge
from .contrast import ContrastJudge
from .llm import LLMJudge
from .magnitude import MagnitudeJudge

__all__ = [
    "CachedJudge",
    "Candidate",
    "ContextJudge",
    "ContrastJudge",
    "Judge",
    "LLMJudge",
    "MagnitudeJudge",
    "Question",
]
