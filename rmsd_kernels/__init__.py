"""Fused kernels for Relevance-Masked Self-Distillation: tensors in, tensors out."""

from .functional import scores_and_candidates, select_tokens, token_divergence, token_scores
from .heads.linear import TokenLogprobs, linear_token_divergence, linear_token_logprobs, linear_token_scores
from .heads.vocab_parallel import vocab_parallel_linear_token_divergence, vocab_parallel_linear_token_scores
from .reference import TokenScores, criterion_score

__version__ = "0.1.0"

__all__ = [
    "TokenLogprobs",
    "TokenScores",
    "criterion_score",
    "linear_token_divergence",
    "linear_token_logprobs",
    "linear_token_scores",
    "scores_and_candidates",
    "select_tokens",
    "token_divergence",
    "token_scores",
    "vocab_parallel_linear_token_divergence",
    "vocab_parallel_linear_token_scores",
]
