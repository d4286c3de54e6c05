"""`RMSDConfig`, the trainer's arguments: transformers' own, and the method's."""

import copy
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from rmsd_kernels.checks import check_options, check_selection

from ..answers.engines import ENGINES
from ..answers.prompts import PLACES, TEACHER_TEMPLATE
from ..answers.teacher import KINDS
from ..answers.tools import ToolLimits
from ..answers.vllm_engine import check_vllm
from ..criteria import CRITERIA, check_criterion
from ..models.router import CHOICES
from .continuation import lower_is_better
from .health import ACTIONS

METHODS = ("rmsd", "opsd")
UNITS = ("rollout", "turn")
# docs/real.md says what supports them, and what three times each does.
LORA_LEARNING_RATE, LEARNING_RATE = 1e-4, 2e-5

_LOSS_OPTIONS = (
    "num_candidates",
    "num_kept",
    "criterion",
    "threshold",
    "divergence",
    "beta",
    "vocab_topk",
    "tail",
    "temperature",
    "backend",
)
_LEAST = dict(
    sampling_temperature=0,
    max_completion_length=1,
    top_k=0,
    max_skipped_steps=0,
    unkept_kl=0,
    min_gap=0,
    recorded_rollouts=0,
    max_turns=1,
    max_tool_output=1,
    continuation_patience=1,
    continuation_min_delta=0,
    max_continuations=0,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
)


@dataclass
class RMSDConfig(TrainingArguments):
    """Every argument of `transformers.TrainingArguments` works; those listed here are added or have another default."""

    method: str = field(
        default="rmsd",
        metadata={"help": "rmsd keeps what the judge finds relevant; opsd trains on every token the student wrote."},
    )
    num_candidates: int = field(default=20, metadata={"help": "T: candidates a rollout, by the criterion."})
    num_kept: int = field(default=5, metadata={"help": "S: kept tokens a rollout, at most."})
    selection_unit: str = field(
        default="rollout", metadata={"help": "rollout or turn: T and S are of each rollout, or of each of its turns."}
    )
    criterion: str = field(default="logprob_gap", metadata={"help": f"What ranks candidates: {', '.join(CRITERIA)}."})
    threshold: float = field(default=0.0, metadata={"help": "A candidate's criterion must exceed this, in nats."})
    min_gap: float = field(
        default=0.1,
        metadata={"help": "Nats; a judge is not asked about a told row's candidate with a smaller gap. 0: about all."},
    )
    divergence: str = field(default="reverse_kl", metadata={"help": "reverse_kl, forward_kl or jsd."})
    beta: float = field(default=0.5, metadata={"help": "The teacher's weight in the jsd's mixture."})
    vocab_topk: int | None = field(
        default=500, metadata={"help": "K: the student's top logits, which the loss sums over; null: all."}
    )
    tail: str = field(
        default="bucket", metadata={"help": "bucket, renorm or drop: what becomes of the mass outside the top k."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both distributions, in scores and loss."})
    backend: str = field(default="auto", metadata={"help": "auto, triton, cpu or torch."})
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens a rollout, at most, with what tools say in it."}
    )
    max_turns: int = field(default=4, metadata={"help": "With tools: the model's turns a rollout, at most."})
    max_tool_output: int = field(
        default=2000, metadata={"help": "With tools: characters of a call's output that are read, at most."}
    )
    tool_seconds: float = field(default=10.0, metadata={"help": "With tools: seconds that a call may take."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollouts; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the rollouts' sampling."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the rollouts' sampling; 0 for all."})
    gap_weight: float | None = field(
        default=None,
        metadata={
            "help": "A kept token weighs sigmoid(this x (log q(y) - log p(y))) of its divergence; null: all of it."
        },
    )
    forward_kl_above: float | None = field(
        default=None,
        metadata={
            "help": "Nats; a kept token adds the forward KL where the teacher's entropy exceeds this; null: none."
        },
    )
    unkept_kl: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence from the untold teacher on tokens that are not kept; 0 for none."},
    )
    guided_rollouts: float = field(
        default=0.0,
        metadata={"help": "Share of told rows that the teacher answers, so that rare words are in the data."},
    )
    engine: str = field(
        default="transformers", metadata={"help": "transformers, vllm or vllm_server: who writes the rollouts."}
    )
    engine_scores: bool = field(
        default=False,
        metadata={"help": "Candidates come from the log-probabilities that the engine records of student and teacher."},
    )
    engine_cache_gb: float = field(default=1.0, metadata={"help": "GiB of vllm's KV cache."})
    engine_url: str = field(
        default="http://localhost:8000/v1", metadata={"help": "vllm_server: the server's endpoint, up to /v1."}
    )
    engine_folder: str | None = field(
        default=None,
        metadata={"help": "vllm_server: a folder that the server reads weights from; null: output_dir/engine."},
    )
    engine_seconds: float = field(
        default=600.0, metadata={"help": "vllm_server: seconds that it may take for an answer, or to come back."}
    )
    teacher_template: str = field(
        default=TEACHER_TEMPLATE,
        metadata={"help": "The teacher's user message, from {privileged_context} and {prompt}."},
    )
    teacher_place: str = field(
        default="user", metadata={"help": "user or system: the teacher's message that teacher_template is put into."}
    )
    teacher: str = field(
        default="initial",
        metadata={"help": "initial, live, ema or adapter_off: whose weights read the privileged context."},
    )
    ema_decay: float = field(
        default=0.99, metadata={"help": "teacher=ema: the share of itself that the teacher keeps at each step."}
    )
    continuation_steps: list[int] = field(
        default_factory=list, metadata={"help": "After these steps the student becomes the teacher."}
    )
    continuation_metric: str | None = field(
        default=None, metadata={"help": "The student also becomes the teacher when this (loss, ...) has plateaued."}
    )
    continuation_patience: int = field(default=3, metadata={"help": "Entries without improvement that make a plateau."})
    continuation_min_delta: float = field(
        default=0.0, metadata={"help": "A change of the metric that counts as an improvement is larger than this."}
    )
    max_continuations: int = field(default=1, metadata={"help": "Continuations that the metric may start, at most."})
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Training stops when more steps in a row than this had a gradient that is not finite."},
    )
    on_collapse: str = field(
        default="stop",
        metadata={"help": "stop, rollback (once, at half the rate) or warn, where the log shows a collapse."},
    )
    recorded_rollouts: int = field(default=8, metadata={"help": "Rollouts a step written for the report, at most."})

    router_loss: str | None = field(
        default=None, metadata={"help": "add or drop: a mixture of experts' own loss, where its config asks for it."}
    )
    self_check: bool = field(
        default=True, metadata={"help": "Check before the first step that the model is what a step takes it for."}
    )

    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Prompts, and so rollouts, in a micro-batch on each device."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate; null: 1e-4 for an adapter, 2e-5 for all weights."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between log entries."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Trainer's filter, which waits for the device at each micro-batch; a loss that is not finite adds "
            "nothing to the log's without it, too."
        },
    )
    report_to: str | list[str] = field(default="none", metadata={"help": "Integrations to report to."})
    # Trainer takes a bool; its own annotation, str, would have a recipe's `fsdp: true` refused.
    fsdp: bool | None = field(default=None, metadata={"help": "Shards the model over the processes (FSDP2)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows keep their columns."})
    # torch warns of pinning on every machine without an accelerator.
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Rows are text: there is nothing to pin."})

    def __post_init__(self):
        # Without it accelerate sees no accelerator and makes of each process that was launched a run of its own.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.greater_is_better is None and lower_is_better(self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers takes whatever is no loss for a score
        for name in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):  # int() of them would name no key
            if isinstance(value := getattr(self, name), float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value}")
        super().__post_init__()
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, not {self.max_steps}")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be above 0 and finite, not {self.num_train_epochs}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        check_criterion(self.criterion)
        check_selection(num_tokens=self.num_candidates, threshold=self.threshold, name="num_candidates")
        check_selection(num_tokens=self.num_kept, threshold=self.threshold, name="num_kept")
        check_options(
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            teacher_temperature=None,
            vocab_size=None,
            width=1,
            vocab_topk=self.vocab_topk,
            tail=self.tail,
        )
        if self.on_collapse not in ACTIONS:
            raise ValueError(f"on_collapse must be one of {', '.join(ACTIONS)}, not {self.on_collapse!r}")
        if self.on_collapse == "rollback" and (self.save_strategy == "no" or self.save_only_model):
            raise ValueError("on_collapse=rollback needs checkpoints that hold the optimizer: set save_strategy=steps")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        if self.engine_scores:
            # What an engine records is of the sampled token and the likeliest few, at temperature 1.
            if self.engine == "transformers":
                raise ValueError("engine_scores needs engine=vllm or vllm_server, not transformers")
            needed = dict(method="rmsd", criterion="logprob_gap", temperature=1.0)
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"engine_scores needs {name}={value}, not {getattr(self, name)}")
            if self.continuation_metric in ("divergence", "anchor_divergence", "student_entropy", "tail_mass"):
                raise ValueError(
                    f"engine_scores leaves {self.continuation_metric} unknown: name another continuation_metric"
                )
        if self.forward_kl_above is not None:
            if not math.isfinite(self.forward_kl_above):
                raise ValueError(f"forward_kl_above must be a finite number or null, not {self.forward_kl_above}")
            if self.engine_scores:
                raise ValueError("forward_kl_above needs the teacher's entropy, which engine_scores leaves unknown")
            if self.divergence == "forward_kl":
                raise ValueError("forward_kl_above adds the forward KL to another divergence: this is it already")
        if self.gap_weight is not None and not math.isfinite(self.gap_weight):
            raise ValueError(f"gap_weight must be a finite number or null, not {self.gap_weight}")
        if not 0.0 <= self.guided_rollouts <= 1.0:
            raise ValueError(f"guided_rollouts must lie in [0, 1], not {self.guided_rollouts}")
        if self.guided_rollouts and (self.engine != "transformers" or self.fsdp):
            # A vLLM would have to change weights twice a step, and ranks of FSDP2 wait for each other in every layer.
            raise ValueError("guided_rollouts needs engine=transformers, and no fsdp")
        if self.router_loss not in (None, *CHOICES):
            raise ValueError(f"router_loss must be add or drop, not {self.router_loss!r}")
        if self.engine == "vllm":
            check_vllm()
        if not self.engine_url.startswith(("http://", "https://")):
            raise ValueError(f"engine_url must begin with http:// or https://, not {self.engine_url!r}")
        for name in ("engine_cache_gb", "engine_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name, allowed in (("teacher_place", PLACES), ("selection_unit", UNITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not self.tool_seconds > 0:
            raise ValueError(f"tool_seconds must be above 0, not {self.tool_seconds}")
        if self.teacher not in KINDS:
            raise ValueError(f"teacher must be one of {', '.join(KINDS)}, not {self.teacher!r}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.teacher == "live" and (self.continuation_steps or self.continuation_metric):
            raise ValueError("continuation needs teacher=initial or ema: a live teacher is the student already")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if (
            self.save_strategy == "steps"
            and min(self.save_steps, self.logging_steps) >= 1
            and (self.save_steps % self.logging_steps)
        ):
            # A checkpoint holds whole entries: what a step counted since the last one would be lost to a resumed run.
            raise ValueError(
                f"save_steps must be a multiple of logging_steps {self.logging_steps:g}, not {self.save_steps:g}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if any(step < 1 for step in self.continuation_steps):
            raise ValueError(f"continuation_steps must be at least 1, not {self.continuation_steps}")
        if (getattr(self, "fsdp_plugin_args", None) or {}).get("fsdp_version", 2) != 2:
            raise ValueError("fsdp_config.version must be 2")
        values = {name: f"<the row's {name}>" for name in ("privileged_context", "prompt")}
        try:
            told = self.teacher_template.format(**values)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                "teacher_template: braces other than those of {privileged_context} and {prompt} must be doubled, "
                f"{{{{ and }}}}, not {self.teacher_template!r}"
            ) from error
        for name, value in values.items():
            if value not in told:
                raise ValueError(f"teacher_template must hold {{{name}}}, not {self.teacher_template!r}")

    def with_learning_rate(self, has_adapter: bool) -> "RMSDConfig":
        """Itself, or where it leaves the rate open a copy with the one for what is trained."""
        if self.learning_rate is not None:
            return self
        known = copy.copy(self)
        known.learning_rate = LORA_LEARNING_RATE if has_adapter else LEARNING_RATE
        return known

    @property
    def tool_limits(self) -> ToolLimits:
        return ToolLimits(seconds=self.tool_seconds, characters=self.max_tool_output)

    @property
    def loss_options(self) -> dict:
        """What RMSDLoss is made with."""
        return {name: getattr(self, name) for name in _LOSS_OPTIONS}

    @property
    def n_gpu(self) -> int:
        """One at most: several GPUs take several processes (torchrun). For a process that sees several, Trainer would
        divide each batch among them by DataParallel, whose copies' hidden states are not those of the batch."""
        return min(1, super().n_gpu)
