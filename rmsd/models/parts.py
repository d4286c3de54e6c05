"""Where a causal LM keeps its parts, whatever DDP, FSDP, DeepSpeed or PEFT has put around it; and its head set aside.

The output head multiplies by a weight of vocabulary times hidden size. Scoring and training read hidden states and
project only the rows they need, so a forward that is run for its hidden states runs no head (`no_head`); sampling needs
the logits of the last position alone (`last_position_head`).
"""

import contextlib
import weakref

import torch
from torch import Tensor, nn

# Models whose head does not multiply what their decoder returns: a layer stands between the two (BERT), or the decoder
# is not where get_decoder() looks for it.
_READ_AT_HEAD: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself: without DDP, DeepSpeed or PEFT around it."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_module(model: nn.Module) -> nn.Module:
    """The module whose product with the hidden states are the logits: a Linear, an adapter's or a quantised layer.

    Raises:
        ValueError: the model exposes none.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} exposes no output head (get_output_embeddings() has no weight)")
    return head


def decoder_feeds_head(model: nn.Module) -> bool:
    """Whether the head multiplies what the decoder returns, as far as `OutputHead.of` has found out."""
    return causal_lm(model) not in _READ_AT_HEAD


def read_at_head(model: nn.Module, at_head: bool) -> None:
    """Says where `captured_hidden` finds the hidden states of this model from now on."""
    (_READ_AT_HEAD.add if at_head else _READ_AT_HEAD.discard)(causal_lm(model))


@contextlib.contextmanager
def captured_hidden(model: nn.Module):
    """Collects what enters the output head, whichever way the model is called (so that DDP, FSDP and PEFT wrappers keep
    their hooks). Yields the list that each forward appends to. The decoder's output, all positions of it, whatever the
    head is asked for; or, of a model that `read_at_head` names, the head's input."""
    captured: list[Tensor] = []
    if decoder_feeds_head(model):
        decoder = causal_lm(model).get_decoder()
        handle = decoder.register_forward_hook(lambda module, inputs, output: captured.append(_last_hidden(output)))
    else:
        handle = head_module(model).register_forward_pre_hook(lambda head, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()


def _last_hidden(output) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    return output[0] if hidden is None and isinstance(output, tuple | list) else hidden


@contextlib.contextmanager
def no_head(model: nn.Module):
    """Forwards inside return logits of the right shape that are all 0 and cost nothing. Only the head's own `forward`
    is set aside, so the hooks by which FSDP gathers and shards its weight run as they would."""
    head, vocab_size = head_module(model), causal_lm(model).config.get_text_config().vocab_size
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    own = vars(head).get("forward")  # accelerate's dispatch puts one there
    head.forward = lambda hidden, *args, **kwargs: _Unprojected.apply(hidden, vocab_size, *parameters)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


@contextlib.contextmanager
def trained_as_before(model: nn.Module):
    """Whatever happens inside, the same parameters are trained afterwards. PEFT makes all of an adapter trainable each
    time that it switches it on, what the user has frozen too: LoRA-FA's A, or layers that are left alone."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)


@contextlib.contextmanager
def last_position_head(model: nn.Module):
    """Forwards inside project the last position alone, from contiguous memory: of a slice that is not contiguous, a
    CPU's product first copies the head's weight once a sequence."""
    handle = head_module(model).register_forward_pre_hook(
        lambda head, inputs: (inputs[0][:, -1:].contiguous(), *inputs[1:])
    )
    try:
        yield
    finally:
        handle.remove()


class _Unprojected(torch.autograd.Function):
    """Zeros of the logits' shape, in the graph of the hidden states and of the head's parameters, with no gradient for
    either: DDP takes a parameter that no output leads to for unused, and FSDP's hooks sit on the way."""

    @staticmethod
    def forward(ctx, hidden, vocab_size, *parameters):
        ctx.hidden = hidden.shape, hidden.dtype, hidden.device
        ctx.number = len(parameters)
        shape = *hidden.shape[:-1], vocab_size
        logits = hidden.new_empty_strided(shape, [0] * len(shape))  # one number; no view, of which FSDP warns
        logits.as_strided((1,), (1,)).zero_()
        return logits

    @staticmethod
    def backward(ctx, grad_logits):
        shape, dtype, device = ctx.hidden
        return torch.zeros(shape, dtype=dtype, device=device), None, *[None] * ctx.number
