"""What is run: a method, with or without anchors and a continuation, at a rate, on a seed."""

from dataclasses import dataclass

RATES = (1e-4, 3e-4)  # of the LoRA adapter; each method takes the better one
RATE_SEED = 9  # on which that is found, and which no table holds
SEEDS = (0, 1, 2)
STEPS, EVERY, CONTINUATION = 90, 15, 60
PROBLEMS = 164  # of HumanEval: all
QUICK_STEPS = 30

HINTED, ANCHORED = "benchmarks/hinted.py", "pinapple"  # tasks: hints on all rows; on those about the fruit alone


@dataclass(frozen=True)
class Method:
    """A row of the table. `kind` is who trains: our recipe with `overrides`, or one of `baselines`."""

    title: str
    kind: str = "recipe"
    overrides: tuple[str, ...] = ()
    anchors: bool = False
    continued: bool = False


def _methods() -> dict[str, Method]:
    ours = {
        "opsd": ("OPSD", ("method=opsd",)),
        "rmsd_contrast": ("RMSD, contrast judge", ()),
        "rmsd_context": ("RMSD, context judge", ("judge.kind=context",)),
        "rmsd_magnitude": ("RMSD, magnitude judge", ("judge.kind=magnitude",)),
    }
    found = {
        "sft_templates": Method("SFT, templates", "sft_templates"),
        "sft_own": Method("SFT, own answers with the word replaced", "sft_own"),
        "rl": Method("RL, target reward", "rl"),
        "rl_hint": Method("RL, the hint in the prompt", "rl_hint"),
    }
    continued = (f"train.continuation_steps=[{CONTINUATION}]",)
    for name, (title, overrides) in ours.items():
        found[name] = Method(title, overrides=overrides)
        found[f"{name}_continued"] = Method(f"{title}, continued", overrides=(*overrides, *continued), continued=True)
    for name in ("opsd", "rmsd_contrast", "rmsd_context"):
        title, overrides = ours[name]
        found[f"{name}_anchors"] = Method(f"{title}, anchors", overrides=overrides, anchors=True)
        found[f"{name}_anchors_continued"] = Method(
            f"{title}, anchors, continued", overrides=(*overrides, *continued), anchors=True, continued=True
        )
    found["rmsd_contrast_guided"] = Method(
        "RMSD, contrast judge, guided rollouts", overrides=("train.guided_rollouts=0.25",)
    )
    return found


METHODS = _methods()
# What the published comparison turns on comes first, so that a suite that is interrupted has it.
ORDER = (
    "opsd",
    "rmsd_contrast",
    "rmsd_context",
    "opsd_continued",
    "rmsd_contrast_continued",
    "rmsd_context_continued",
    "opsd_anchors",
    "rmsd_contrast_anchors",
)


@dataclass(frozen=True)
class Job:
    method: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        steps = "" if self.steps == STEPS else f"-{self.steps}"
        return f"{self.method}-{self.rate:g}-{self.seed}{steps}"

    def overrides(self) -> list[str]:
        """Of `rmsd train`."""
        method = METHODS[self.method]
        return [
            f"task={ANCHORED if method.anchors else HINTED}",
            f"seed={self.seed}",
            f"evaluate.every={min(EVERY, self.steps)}",
            "evaluate.samples=2",
            "evaluate.temperature=1.0",
            f"train.max_steps={self.steps}",
            "train.save_total_limit=1",  # of 0.1 GB each: all of them, of all runs, are 100 GB
            f"train.learning_rate={self.rate:g}",
            *method.overrides,
        ]


def ordered(names: list[str] | None = None) -> list[str]:
    """Of METHODS, those named, or all."""
    every = [*ORDER, *(name for name in METHODS if name not in ORDER)]
    return [name for name in every if not names or name in names]
