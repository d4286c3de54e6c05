"""The teacher: the same model, reading the student's answer under the prompt that holds the privileged context."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.heads import OutputHead, frozen_copy
from ..models.hidden import completion_hidden, row_lengths
from ..models.parts import trained_as_before
from ..models.sharding import whole
from ..models.transfer import to_device
from .rollout import Rollouts

KINDS = ("initial", "live", "ema", "adapter_off")
FILE = "teacher.safetensors"  # in a checkpoint, where the teacher is no longer the initial weights
_ADAPTER = "teacher"


class Teacher:
    """Whose weights read the privileged context.

    Args:
        model: the student.
        kind: "initial", the weights that training starts from: a frozen copy; under LoRA the adapter switched off, at
            no memory, or a copy of an adapter that has been trained before. "adapter_off" switches it off whatever it
            has learnt. "live" is the student as it is. "ema" is a copy that follows the student by `average`.
        autocast: makes the context that the student's forward runs in under mixed precision. accelerate puts it around
            the student alone; a copy without it would differ from the student by rounding where they agree.

    `snapshot` makes the student as it is now the teacher (continuation). Under LoRA that is a second adapter, not a
    copy of the model; another method of PEFT, or weights trained beside its adapter, are copied whole.

    Raises:
        ValueError: the model has no adapter to switch off, learnt prompts, or several adapters at once.
    """

    def __init__(
        self,
        model,
        kind: str = "initial",
        autocast: Callable = contextlib.nullcontext,
        head_dtype: torch.dtype | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"teacher must be one of {', '.join(KINDS)}, not {kind!r}")
        self.has_adapter = hasattr(model, "disable_adapter")
        if self.has_adapter:
            _check_adapters(model)
        elif kind == "adapter_off":
            raise ValueError("teacher='adapter_off' needs a PEFT model; 'initial' keeps a copy of any other")
        by_adapter = self.has_adapter and trains_lora_alone(model)
        if kind == "adapter_off" and beside_adapter(model):
            raise ValueError(
                f"teacher='adapter_off' needs all trained weights in the adapter, and {beside_adapter(model)} is "
                "beside it: 'initial' keeps a copy"
            )
        self.kind, self.student, self.autocast, self._head_dtype = kind, model, autocast, head_dtype
        self._by_adapter = by_adapter
        self.changed = False  # from the initial weights
        self.has_snapshot = False  # an adapter of its own
        self._averages: dict[str, Tensor] = {}  # fp32, of the weights below that
        self.is_copy = kind in ("initial", "ema") and not by_adapter
        if by_adapter and (kind == "ema" or (kind == "initial" and _changes_the_model(model))):
            self._add_adapter()
        self.model = frozen_copy(model) if self.is_copy else model
        self.read_head()

    def check_continuation(self) -> None:
        """Raises ValueError where `snapshot` could not make the student the teacher."""
        if self.kind == "live":
            raise ValueError("a live teacher is the student already: continuation needs teacher=initial or ema")
        if not self.is_copy and not self._by_adapter:
            raise ValueError(
                f"teacher={self.kind!r} keeps no copy, and a second adapter for a continuation must be a LoRA: take "
                "teacher='initial'"
            )

    def read_head(self) -> None:
        """Finds the head's transform. Raises ValueError as `OutputHead.of`."""
        with self._adapter():
            self._transform = OutputHead.of(self.model).transform

    @property
    def head(self) -> OutputHead:
        """Of the weights as they are now: FSDP puts others in their place. Under PEFT the adapter's own copy, or the
        original one, where `modules_to_save` names it."""
        with self._adapter():
            return OutputHead.current(self.model, self._transform).in_dtype(self._head_dtype)

    @contextlib.contextmanager
    def active(self):
        """The model as the teacher: in eval mode, under the right adapter."""
        was_training = self.model.training
        self.model.eval()
        with self._adapter():
            yield self.model
        self.model.train(was_training)

    @torch.no_grad()
    def hidden(self, teacher_prompt_ids: list[list[int]], rollouts: Rollouts, pad_id: int) -> Tensor:
        """(B, L, H): the teacher's hidden states for the student's answers."""
        with self.active() as model, self.autocast():  # not in `active`, where an engine takes merged weights
            return completion_hidden(
                model,
                teacher_prompt_ids,
                rollouts.completion_ids,
                rollouts.attention_mask,
                pad_id,
                lengths=row_lengths(rollouts.on_host.attention_mask),
            )

    @torch.no_grad()
    def kept_hidden(self, teacher_prompt_ids: list[list[int]], rollouts: Rollouts, pad_id: int, keep: Tensor) -> Tensor:
        """As `hidden`, but of the sequences that keep a token, up to the last one; without meaning elsewhere. `keep` is
        (B, L) bool on the host."""
        kept = keep.any(1).nonzero().squeeze(1)
        weight = self.head.weight
        hidden = weight.new_zeros(*keep.shape, weight.shape[1])
        if len(kept):
            upto = to_device(keep.flip(1).cumsum(1).flip(1).bool()[kept], weight.device)
            at = to_device(kept, weight.device)
            needed = rollouts.of(kept)
            masks = {"completion_mask": needed.completion_mask & upto, "attention_mask": needed.attention_mask & upto}
            needed = dataclasses.replace(needed, **masks)
            hidden[at] = self.hidden([teacher_prompt_ids[i] for i in kept.tolist()], needed, pad_id).to(weight.dtype)
        return hidden

    def average(self, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student, for kind "ema". The average is kept in fp32 beside weights
        of 16 bits: a step of it is less than half their last place, and would round away."""
        with torch.no_grad(), whole(self.student):
            for name, mine, theirs in self._pairs():
                average = mine
                if mine.dtype.itemsize < 4:
                    average = self._averages.get(name)
                    average = self._averages[name] = mine.float() if average is None else average
                average.lerp_(theirs.to(average.dtype), 1.0 - decay)
                if average is not mine:
                    mine.copy_(average)
        self.changed = True

    def snapshot(self) -> None:
        """The student's weights become the teacher's. Raises ValueError as `check_continuation`."""
        self.check_continuation()
        if not self.is_copy and not self.has_snapshot:
            self._add_adapter()
        with torch.no_grad(), whole(self.student):
            for _, mine, theirs in self._pairs():
                mine.copy_(theirs)
        self._averages.clear()
        self.changed = True

    def save(self, directory: str | Path) -> None:
        """Writes what `load` needs; nothing while the teacher is still the initial weights."""
        if self.changed:
            Path(directory).mkdir(parents=True, exist_ok=True)  # a sharded model has not made it yet
            state = self._state() | self._averages
            save_file({name: value.contiguous() for name, value in state.items()}, Path(directory) / FILE)

    def load_student(self, directory: str | Path) -> None:
        """Takes the student's adapter of a checkpoint: beside a second adapter's folder Trainer forgets the one at the
        checkpoint's root, before transformers 5.23."""
        if self.has_adapter and (Path(directory) / "adapter_model.safetensors").exists():
            self.student.load_adapter(directory, "default", is_trainable=self.student.active_adapter == "default")

    def load(self, directory: str | Path) -> None:
        """Takes the teacher that a checkpoint holds, if it holds one.

        Raises:
            ValueError: it holds none, so its teacher was the initial weights, which are no longer here.
        """
        path = Path(directory) / FILE
        if not path.exists():
            if self.changed:
                raise ValueError(
                    f"{directory} was written before the teacher changed, and the initial teacher is gone: make a new "
                    "trainer of the initial model, and resume with that"
                )
            return
        if not self.is_copy and not self.has_snapshot:
            self._add_adapter()
        saved = load_file(path)
        with torch.no_grad():
            for name, value in self._state().items():
                value.copy_(saved[name])
                if value.dtype.itemsize < saved[name].dtype.itemsize:
                    self._averages[name] = saved[name].to(value.device)
        self.changed = True

    # ---- adapters --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _adapter(self):
        if self.is_copy or not self.has_adapter or self.kind == "live":
            yield
            return
        with trained_as_before(self.model), self._own_adapter() if self.has_snapshot else self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def _own_adapter(self):
        student = self.student.active_adapter
        self.student.set_adapter(_ADAPTER)
        try:
            yield
        finally:
            self.student.set_adapter(student)

    def _add_adapter(self) -> None:
        student = self.student.active_adapter
        with trained_as_before(self.student):
            if _ADAPTER not in self.student.peft_config:  # Trainer has already made it when it loads a checkpoint
                self.student.add_adapter(_ADAPTER, _plain(self.student.peft_config[student]))
            self.student.set_adapter(student)
        self.has_snapshot = True
        with torch.no_grad():
            for _, mine, theirs in self._pairs():
                mine.copy_(theirs)

    def _pairs(self):
        """(name, teacher's, student's) of each parameter, in order."""
        if self.is_copy:
            for (name, mine), theirs in zip(self.model.named_parameters(), self.student.parameters(), strict=True):
                yield name, mine, theirs
            return
        student = self.student.active_adapter
        parameters = dict(self.student.named_parameters())
        for name, value in parameters.items():
            if _is_own(name):
                yield name, value, parameters[".".join(student if p == _ADAPTER else p for p in name.split("."))]

    def _state(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        if self.is_copy:
            return parameters
        return {name: value for name, value in parameters.items() if _is_own(name)}


def _check_adapters(model) -> None:
    learnt = sorted(name for name, config in model.peft_config.items() if getattr(config, "is_prompt_learning", False))
    if learnt:
        method = str(getattr(model.peft_config[learnt[0]].peft_type, "value", "")).lower()
        raise ValueError(
            f"the adapter {learnt[0]!r} learns prompts ({method}), not weights: the teacher and the student read "
            "prompts of their own; use LoRA or another method on weights"
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        methods = sorted({str(getattr(config.peft_type, "value", "")).lower() for config in model.peft_config.values()})
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active) or 'none'}; of {', '.join(methods)}): "
            "model.set_adapter(name) chooses one, model.add_weighted_adapter makes one of several"
        )
    if _ADAPTER in model.peft_config:
        raise ValueError(
            f"an adapter is named {_ADAPTER!r}, which is kept for the teacher's own: give it another name or, where "
            f"another trainer has left it behind, model.delete_adapter({_ADAPTER!r})"
        )


def beside_adapter(model) -> str | None:
    """The first trained parameter that is not the active adapter's, as a bias under LoRA's bias="all"; or None."""
    active = model.active_adapters[0]
    return next(
        (name for name, p in model.named_parameters() if p.requires_grad and active not in name.split(".")), None
    )


def trains_lora_alone(model) -> bool:
    """Whether a second adapter can hold what a PEFT model's student learns; a teacher of another one is a copy."""
    kind = model.peft_config[model.active_adapters[0]].peft_type
    return kind == "LORA" and beside_adapter(model) is None


def _plain(config):
    """An adapter's config for a second one of its shape that leaves the model alone: other ways to begin (PiSSA, OLoRA,
    LoftQ) take their part out of the base weights, and repeated layers would be repeated again."""
    return dataclasses.replace(config, init_lora_weights=True, layer_replication=None)


def _changes_the_model(model) -> bool:
    """Whether a LoRA adapter does something, which a new one's B of zeros does not: it has been trained, or (PiSSA,
    OLoRA) began as a part of the base weights. What else belongs to it (a magnitude, rows of the embedding) is taken to
    do something, unless it is a module's copy that is still equal to the original."""
    active = model.active_adapters[0]
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        parts = name.split(".")
        if active not in parts or value.is_meta or "lora_A" in parts or "lora_embedding_A" in parts:
            continue
        if "lora_B" in parts or "lora_embedding_B" in parts:
            same = not bool(value.any())
        elif "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            original = parameters.get(".".join([*parts[:at], "original_module", *parts[at + 2 :]]))
            same = original is not None and original.shape == value.shape and torch.equal(original, value)
        else:
            same = False
        if not same:
            return True
    return False


def _is_own(name: str) -> bool:
    """A parameter of the teacher's adapter: of a linear layer ...lora_A.teacher.weight, of an embedding
    ...lora_embedding_A.teacher."""
    return _ADAPTER in name.split(".")
