"""The loss that a mixture of experts adds for its router: balanced use of the experts."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from .parts import causal_lm

CHOICES = ("add", "drop")


class RouterLoss:
    """A model's router loss, added to the training loss or left out, as the user says.

    A model computes it where its config sets `output_router_logits`, from the router's logits of all tokens of a
    forward. While sampling those of a step do not fit the mask of all steps, so the setting is off during the run, on
    in the forwards that train, and restored in what is saved.

    Args:
        model: a causal LM of transformers, or a PEFT model.
        choice: "add", with the config's `router_aux_loss_coef`; "drop"; None where the config does not ask for it.

    Raises:
        ValueError: the config asks for it and nothing was chosen, or the model has none to add.
    """

    def __init__(self, model: nn.Module, choice: str | None = None):
        self._config = causal_lm(model).config.get_text_config()
        self.asked_for = bool(getattr(self._config, "output_router_logits", False))
        coefficient = getattr(self._config, "router_aux_loss_coef", None)
        if self.asked_for and choice is None:
            raise ValueError(
                f"{type(model).__name__} adds a loss of its router (output_router_logits, router_aux_loss_coef="
                f"{coefficient}): set router_loss=add or router_loss=drop"
            )
        if choice == "add" and coefficient is None:
            raise ValueError(f"router_loss=add: {type(model).__name__} has no router loss (router_aux_loss_coef)")
        self.coefficient = float(coefficient) if choice == "add" else 0.0
        if self.asked_for:
            self._config.output_router_logits = False

    @contextlib.contextmanager
    def of_forwards(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Yields the list that each forward appends its router's loss, times the coefficient, to."""
        losses: list[Tensor] = []
        if not self.coefficient:
            yield losses
            return

        def asked(module, args, kwargs):
            return args, {**kwargs, "output_router_logits": True}

        def collect(module, args, output):
            if getattr(output, "aux_loss", None) is None:
                raise ValueError(f"{type(module).__name__} returns no router loss (aux_loss): set router_loss=drop")
            losses.append(self.coefficient * output.aux_loss)

        lm = causal_lm(model)
        hooks = lm.register_forward_pre_hook(asked, with_kwargs=True), lm.register_forward_hook(collect)
        try:
            yield losses
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def as_asked_for(self) -> Iterator[None]:
        """The config as it came, for what is saved."""
        if not self.asked_for:
            yield
            return
        self._config.output_router_logits = True
        try:
            yield
        finally:
            self._config.output_router_logits = False
