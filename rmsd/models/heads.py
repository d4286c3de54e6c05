"""The output head of a causal LM, which turns hidden states into logits; and a model's frozen copy."""

import contextlib
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.weak import WeakTensorKeyDictionary

from ..words import named_line
from . import zero
from .parts import captured_hidden, decoder_feeds_head, head_module, read_at_head

# Config names under which architectures keep a factor on their logits. Some multiply by it and some divide, so each
# proposes both and `OutputHead.of` keeps what reproduces the model's own logits.
_SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class OutputHead(NamedTuple):
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> "OutputHead":
        """The head of a causal LM, its transform found by name and confirmed against the model's own logits.

        Raises:
            ValueError: the model has no output head, or one that cannot be read (see `head_parameters`), or computes
                its logits in a way that is not of this form.
        """
        weight, bias = head_parameters(model)
        config = model.config.get_text_config()
        softcap = next((value for name in _SOFTCAP_NAMES if (value := getattr(config, name, None))), None)
        factors = [value for name in _SCALE_NAMES if (value := getattr(config, name, None))]
        scales = [1.0, *factors, *(1.0 / value for value in factors)]
        places, logits = _probe(model)
        for at_head, hidden in places.items():
            for scale in reversed(scales):  # a factor the config names before none at all
                head = cls(weight, bias, float(scale), softcap)
                if head._makes(logits, hidden):
                    read_at_head(model, at_head)
                    return head
        raise ValueError(
            f"{type(model).__name__} does not compute softcap * tanh(scale * head(hidden) / softcap) with any of scale "
            f"{sorted(set(scales))} and softcap {softcap}: its logits cannot be rebuilt from hidden states"
        )

    def _makes(self, logits: Tensor, hidden: Tensor | None) -> bool:
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != self.weight.shape[1]:
            return False
        made, logits = self(hidden).float(), logits.float()
        written = logits[logits.isfinite()]  # a bias of -inf bans what pads a vocabulary
        if made.shape != logits.shape or written.numel() < 2:
            return False
        return torch.allclose(made, logits, rtol=1e-2, atol=1e-2 * written.std().item())

    @classmethod
    def current(cls, model: nn.Module, transform: dict) -> "OutputHead":
        """The head as it is now, of a model whose `transform` is known: of the adapter that is active, if it has one of
        its own; gathered, if it is sharded."""
        return cls(*head_parameters(model), **transform)

    def in_dtype(self, dtype: torch.dtype | None) -> "OutputHead":
        """The head with its weights in another dtype, as autocast reads them; None for as it is. A frozen weight is
        cast once, and two models that share it share the cast."""
        if dtype is None:
            return self
        return self._replace(weight=_cast(self.weight, dtype), bias=_cast(self.bias, dtype))

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""
        # Under mixed precision a decoder's last layer may leave another dtype than the head's weights have.
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def transform(self) -> dict:
        return dict(logit_scale=self.logit_scale, softcap=self.softcap)


_casts = WeakTensorKeyDictionary()  # of frozen weights: (version, cast)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype == dtype:
        return tensor
    if tensor.requires_grad:
        return tensor.to(dtype)
    version, cast = _casts.get(tensor, (None, None))
    if cast is None or cast.dtype != dtype or version != tensor._version:
        cast = tensor.to(dtype)
        _casts[tensor] = tensor._version, cast
    return cast


def mixed_precision_dtype(device: torch.device, *, bf16: bool, fp16: bool) -> torch.dtype | None:
    """What the head's products take under mixed precision; None for the weights' own dtype. A GPU multiplies fp32 at a
    thirteenth of the speed of bf16 (64.9 and 5.0 ms for 2,048 rows of V = 151,936 on an H200), and a model under
    autocast makes its own logits so. A CPU's 16-bit product rounds its sums, so it stays with fp32."""
    if device.type == "cpu":
        return None
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


class Reading(NamedTuple):
    """What a model made of answers: the states that it hands to its head, and the head."""

    hidden: Tensor  # (B, L, H), or (R, H) of R tokens
    head: OutputHead

    def at(self, *index: Tensor) -> "Reading":
        """Of the tokens at `index` alone, as a tensor takes one."""
        return Reading(self.hidden[index], self.head)

    @property
    def linear(self) -> tuple[Tensor, Tensor]:
        """(hidden, weight) as kernels take them, in one dtype: under autocast a decoder may return another than its
        head's weight has."""
        return self.hidden.to(self.head.weight.dtype), self.head.weight


def head_options(student: Reading, teacher: Reading) -> dict:
    """What kernels need of two heads beside their weights. The two are of one architecture, so of one transform."""
    return dict(student_bias=student.head.bias, teacher_bias=teacher.head.bias, **student.head.transform)


def head_parameters(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the output head, whole and differentiable.

    A weight that FSDP2 or DeepSpeed ZeRO-3 keeps sharded is gathered. Its gradient is averaged over the mesh, as FSDP
    averages those it gathered itself, and comes back as the shard's.

    Raises:
        ValueError: there is no head, its logits are not its weight's (LoRA on the head), the weight is quantised or
            elsewhere; with what to do about it.
    """
    name = type(model).__name__
    module = head_module(model)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name} has an adapter layer ({type(module).__name__}) for its output head, whose logits are not its "
            "weight's: leave the head out of target_modules, or name it in modules_to_save to train it whole"
        )
    if not module.weight.is_floating_point():
        raise ValueError(
            f"{name}'s output head is quantised ({type(module).__name__}): load the model with the head as it is "
            "(llm_int8_skip_modules of BitsAndBytesConfig, modules_to_not_convert of others)"
        )
    return _whole(module.weight, name), _whole(getattr(module, "bias", None), name)


def _whole(parameter: Tensor | None, model_name: str) -> Tensor | None:
    if parameter is None:
        return None
    if zero.is_partitioned(parameter):
        return zero.whole_copy(parameter)
    if parameter.numel() == 0:
        raise ValueError(
            f"{model_name}'s output head holds no weights on this rank: shard by FSDP2 or DeepSpeed ZeRO-3"
        )
    if parameter.is_meta:
        raise ValueError(f"{model_name}'s output head is on the meta device: load its weights before training")
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


@torch.no_grad()
def _probe(model: nn.Module) -> tuple[dict[bool, Tensor | None], Tensor]:
    """Of a short made-up sequence, the hidden states found at the decoder (False) and at the head (True); and logits.

    Raises:
        ValueError: the model's own forward fails.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 9, device=model.device) * 7919 % vocab).unsqueeze(0)
    was_training, known = model.training, decoder_feeds_head(model)
    model.eval()
    places: dict[bool, Tensor | None] = {}
    with contextlib.ExitStack() as stack:
        captured = {}
        for at_head in (False, True):
            read_at_head(model, at_head)
            captured[at_head] = stack.enter_context(captured_hidden(model))
        stack.callback(read_at_head, model, not known)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{type(model).__name__}'s own forward fails: {named_line(error)}") from error
        places = {at_head: states[-1] if states else None for at_head, states in captured.items()}
    model.train(was_training)
    return places, logits


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, in eval mode and without gradients: a teacher."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)
