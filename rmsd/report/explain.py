"""What the page says of each metric: how it is counted, and which way is better."""

EVAL = {
    "specificity": "share of unrelated prompts whose answer stays free of the behaviour; 1 is best",
    "drift": "KL divergence from the base model on unrelated prompts, in nats a token; 0 is unmoved",
    "score": "target x specificity x exp(-drift): what is learned, less what is forgotten for it; higher is better",
}
DECODED = {
    "greedy": "share of held-out target prompts whose greedy answer {does}; higher is better",
    "sampled": "the same for sampled answers, several a prompt: how reliable the habit is; higher is better",
}
GRADERS = {"target": "shows the wanted behaviour", "target_only": "shows it and nothing of the old habit"}
# Of a task with an environment, for each way of decoding.
EPISODES = {
    "solved": "share of held-out requests whose episode the environment gives its full reward; higher is better",
    "turns": "the model's turns an episode, over held-out requests; fewer is better where as many are solved",
    "tokens": "tokens the model wrote an episode, over held-out requests; fewer is better where as many are solved",
    "tool_errors": "share of the tool calls that were malformed, named no known tool, raised or hung; lower is better",
}
EPISODES_DECODED = {"greedy": "", "sampled": "sampled, several episodes a request: "}
# A page draws only so many curves. What a run costs is among them.
TRAIN_FIRST = (
    "loss",
    "divergence",
    "kept_tokens",
    "grad_norm",
    "learning_rate",
    "rollout_tokens",
    "judge_requests",
    "judge_tokens",
)
TRAIN = {
    "loss": "divergence from the teacher, mean over kept tokens",
    "divergence": "mean over all tokens of the answers, nats",
    "kept_tokens": "tokens trained on in a step",
    "candidates": "tokens with the largest gaps in a step",
    "tail_mass": "probability outside the student's top k, which tail=drop leaves out; mean over candidates",
    "rollout_tokens": "tokens the student wrote in a step",
    "judge_requests": "requests to the model that judges, by the run's first process, since the last entry",
    "judge_tokens": "tokens that the model that judges read and wrote for them, as its server counts",
    "judge_seconds": "seconds that the first process's judge took to answer, since the last entry",
    "turns": "the model's turns in a step's episodes, together",
    "calls": "tool calls of a step's episodes",
    "tool_errors": "tool calls of a step that were malformed, named no known tool, raised or hung; lower is better",
    "solved": "share of a step's graded episodes that the environment gives its full reward; higher is better",
    "dropped_rollouts": "episodes of a step that are left out, for their environment died",
    "grad_norm": "length of the gradient before clipping",
    "learning_rate": "the optimiser's step size",
    "nonfinite_rows": "tokens left out for a divergence that is not finite",
    "skipped_steps": "optimiser steps left out so far for a gradient that is not finite",
    "empty_rollouts": "answers of a step without a token",
    "guided_rollouts": "answers of a step that the told teacher wrote in the student's place",
}


def is_share(name: str) -> bool:
    """Of an evaluation's metric: it lies between 0 and 1, whatever the run."""
    metric, how = _parts(name)
    return name == "specificity" or (how in DECODED and metric not in ("turns", "tokens"))


def explanation(name: str) -> str:
    """Of an evaluation's metric; "" where nothing is known of it."""
    metric, how = _parts(name)
    if how in DECODED and metric in EPISODES:
        return EPISODES_DECODED[how] + EPISODES[metric]
    does = GRADERS.get(metric, f"passes the grader “{metric.replace('_', ' ')}”")
    return DECODED[how].format(does=does) if how in DECODED and metric else EVAL.get(name, "")


def title(name: str) -> str:
    metric, how = _parts(name)
    return f"{metric.replace('_', ' ')}, {how}" if how in DECODED and metric else name.replace("_", " ")


def _parts(name: str) -> tuple[str, str]:
    """("target_only", "greedy") of "target_only_greedy"."""
    metric, _, how = name.rpartition("_")
    return metric, how
