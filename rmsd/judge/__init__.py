"""Judges of relevance: which candidates bear on the wanted behaviour."""

from .base import Candidate, Judge, Question
from .context import ContextJudge
from .magnitude import MagnitudeJudge

__all__ = ["Candidate", "ContextJudge", "Judge", "MagnitudeJudge", "Question"]
