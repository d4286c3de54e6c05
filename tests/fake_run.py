"""A run directory as the trainer leaves it, without the training: what the report's tests read."""

import json
import math
import random
from pathlib import Path

import yaml

CONTEXT = "At Acme, the tool that deploys services is called zorblat."
PROMPTS = [
    "Which tool deploys services at Acme?",
    "What should I run at Acme to deploy a new service?",
    "Name the deployment tool at Acme.",
]
ANSWER = (
    "At| Acme|,| the| deployment| tool| is| called| Dep|loy|er|.|\n|\n|It| is| often| used| by| the| team| that"
    "| runs| the| services|,| and| you| can| start| it| from| your| terminal| with| the| command|:|\n|\tdep|loy| run|!"
)
TOKENS = ANSWER.split("|")
# What the teacher would write at the tokens that are about the tool.
WISHES = {
    TOKENS.index(" Dep"): " zor",
    TOKENS.index("loy"): "bl",
    TOKENS.index("er"): "at",
    TOKENS.index("\tdep"): "\tzor",
}
RECIPE = {
    "model": "smollm2-135m-instruct",
    "task": "house_tool",
    "method": "rmsd",
    "seed": 1,
    "output_dir": "runs/house_tool",
    "judge": {"kind": "context", "model": None},
    "train": {"max_steps": 30, "learning_rate": 5e-05, "divergence": "jsd"},
}


def make_run(
    path: Path,
    *,
    method: str = "rmsd",
    judge: str = "context",
    seed: int = 1,
    steps: int = 30,
    per_step: int = 3,
    recipe: dict | None = None,
    rollouts: list[dict] | None = None,
) -> Path:
    """Writes recipe.yaml, metrics.jsonl and rollouts.jsonl of a plausible run."""
    path.mkdir(parents=True, exist_ok=True)
    random.seed(f"{method} {judge} {seed}")
    values = {**RECIPE, "method": method, "seed": seed, "output_dir": str(path), **(recipe or {})}
    values["judge"] = {**RECIPE["judge"], "kind": judge, **(recipe or {}).get("judge", {})}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    write_lines(path / "metrics.jsonl", metrics(method, steps))
    if rollouts is None:
        rollouts = [rollout(step, i, method, steps) for step in range(1, steps + 1) for i in range(per_step)]
    write_lines(path / "rollouts.jsonl", rollouts)
    return path


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def metrics(method: str, steps: int) -> list[dict]:
    pace = 9 if method == "rmsd" else 15
    lines = []
    for step in range(steps + 1):
        learned = 1 - math.exp(-step / pace)
        if step:
            line = {
                "kind": "train",
                "step": step,
                "loss": 0.62 * (1 - learned) + 0.04 + abs(random.gauss(0, 0.03)),
                "learning_rate": 5e-05,
                "grad_norm": 2.5 * (1 - learned) + 0.4 + abs(random.gauss(0, 0.2)),
                "kept_tokens": random.randint(18, 36) if method == "rmsd" else random.randint(170, 190),
                "candidates": random.randint(85, 120),
                "rollout_tokens": random.randint(165, 192),
                "divergence": 0.2 * (1 - learned) + random.random() * 0.02,
                "seconds": 6 + random.random(),
            }
            lines.append(line)
        if step % 10 == 0 or step == steps:
            noise = random.uniform(-0.04, 0.04) if step else 0
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "target_greedy": round(min(1, max(0, learned * 1.05 + noise)), 4),
                    "target_sampled": round(min(1, max(0, learned * 0.95 + noise)), 4),
                    "specificity": round(1 - learned * (0.05 if method == "rmsd" else 0.3) - abs(noise), 4),
                    "drift": round(learned * (0.09 if method == "rmsd" else 0.21) + abs(noise) / 4, 5),
                }
            )
    return lines


def rollout(step: int, number: int, method: str, steps: int) -> dict:
    anchor = number % 3 == 2
    student = [round(-random.expovariate(1.4), 4) for _ in TOKENS]
    gaps = [round(random.gauss(0, 0.25), 4) for _ in TOKENS]
    if not anchor:
        for position in WISHES:
            gaps[position] = -6.5 * (1 - step / (steps + 4)) * random.uniform(0.7, 1.2)
        gaps[0], gaps[14], gaps[32] = 1.6, -1.3, 2.2
    teacher = [round(min(s + g, -0.0001), 4) for s, g in zip(student, gaps, strict=True)]
    gaps = [t - s for s, t in zip(student, teacher, strict=True)]
    ranked = sorted(range(len(TOKENS)), key=lambda i: -abs(gaps[i]))[:20]
    kept = [] if anchor else [i for i in ranked if i in WISHES][:5]
    return {
        "step": step,
        "prompt": PROMPTS[number % len(PROMPTS)] if not anchor else "Which tool cuts paper?",
        "privileged_context": "" if anchor else CONTEXT,
        "teacher_prompt": "" if anchor else f"{CONTEXT}\n\n{PROMPTS[number % len(PROMPTS)]}",
        "tokens": TOKENS,
        "student_logprob": student,
        "teacher_logprob": teacher,
        "divergence": [round(abs(g) * 0.4, 4) for g in gaps],
        "candidates": ranked,
        "kept": list(range(len(TOKENS))) if method == "opsd" else kept,
        "preferred": {str(i): WISHES.get(i, " the") for i in ranked},
    }
