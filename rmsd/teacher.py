"""The teacher: the same model, reading the student's answer under the prompt that holds the privileged context."""

import contextlib

import torch
from torch import Tensor

from .modeling import OutputHead, completion_hidden, frozen_copy
from .rollout import Rollouts


class Teacher:
    """The student's initial weights. Under PEFT these are the model with its adapter switched off, at no memory;
    otherwise a frozen copy."""

    def __init__(self, model):
        self.is_adapter_off = hasattr(model, "disable_adapter")
        self.model = model if self.is_adapter_off else frozen_copy(model)
        self.head = OutputHead.of(self.model)

    @contextlib.contextmanager
    def active(self):
        """The model as the teacher: in eval mode, its adapter off."""
        was_training = self.model.training
        self.model.eval()
        with self.model.disable_adapter() if self.is_adapter_off else contextlib.nullcontext():
            yield self.model
        self.model.train(was_training)

    @torch.no_grad()
    def hidden(self, teacher_prompt_ids: list[list[int]], rollouts: Rollouts, pad_id: int) -> Tensor:
        """(B, L, H): the teacher's hidden states for the student's answers."""
        with self.active() as model:
            return completion_hidden(
                model, teacher_prompt_ids, rollouts.completion_ids, rollouts.completion_mask, pad_id
            )
