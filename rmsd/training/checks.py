"""What a trainer is given, looked at before anything is made of it and, where it may change, before the first step."""

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..models.heads import OutputHead
from ..models.parts import causal_lm
from ..models.sharding import whole


class ReadAgain(TrainerCallback):
    """When training begins, all that transformers, accelerate and the user may have changed of the model or the
    tokenizer since the trainer was made is read again; the ids of ends and padding are read at every use."""

    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        with whole(self._trainer.student), self._trainer.accelerator.autocast():
            read_model(self._trainer)


def read_model(trainer) -> None:
    """How a trainer's models compute their logits, and whether they have the ids that a step uses.

    Raises:
        ValueError: they do so in another way than a head's, or have not.
    """
    check_pad_id(trainer.pad_id, embedding_size(trainer.student))
    trainer.head_transform = OutputHead.of(trainer.student).transform
    trainer.teacher.read_head()


# What Trainer takes and this one would not heed, and what stands in its place.
_INSTEAD = {
    **dict.fromkeys(
        ("eval_dataset", "compute_metrics", "preprocess_logits_for_metrics"),
        "evaluator=, a function of the model that returns metrics, is what evaluates",
    ),
    "data_collator": "train_dataset's rows become batches by themselves",
    "compute_loss_func": "RMSDConfig says what the loss is; a subclass may override compute_loss",
    "model_init": "give the model",
}


def check_arguments(model, args, processing_class, evaluator=None, others=()) -> None:
    """
    Raises:
        TypeError: model, args or processing_class is another kind of thing, or one of the `others` is none that is
            heeded; with what to give.
        ValueError: the model is no causal LM, no weight of it is trained, or nothing evaluates it when it is to be.
    """
    from .config import RMSDConfig

    for name in others:
        if name in _INSTEAD:
            raise TypeError(f"RMSDTrainer takes no {name}: {_INSTEAD[name]}")
    if not hasattr(model, "named_parameters"):
        raise TypeError(
            f"model must be a loaded model, not {model!r:.80}: AutoModelForCausalLM.from_pretrained(...), or "
            "rmsd.models.loading.load_model(...)"
        )
    if not isinstance(args, RMSDConfig):
        raise TypeError(f"args must be an RMSDConfig, not {type(args).__name__}: it takes the same arguments and more")
    if hasattr(processing_class, "tokenizer"):
        kind = type(processing_class).__name__
        raise TypeError(f"processing_class must be a tokenizer, not a {kind}: give its .tokenizer")
    if not (callable(processing_class) and hasattr(processing_class, "decode")):
        raise TypeError(f"processing_class must be a tokenizer, not {type(processing_class).__name__}")
    if evaluator is None and (args.eval_strategy != "no" or args.eval_on_start):
        strategy = IntervalStrategy(args.eval_strategy).value  # which may have been set to a plain string
        asked = "eval_on_start=true" if args.eval_on_start else f"eval_strategy={strategy}"
        raise ValueError(f"{asked} needs an evaluator: RMSDTrainer(..., evaluator=...)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: the method needs a causal LM")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "no weight is trainable: the adapter was loaded for inference; load it with "
                "PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        raise ValueError("no weight is trainable: every parameter is frozen (requires_grad is False)")


def embedding_size(model) -> int:
    """Token ids that the model has: rows of its embedding, or what its config says where they are elsewhere."""
    weight = getattr(causal_lm(model).get_input_embeddings(), "weight", None)
    return len(weight) if weight is not None and weight.numel() else model.config.get_text_config().vocab_size


def check_pad_id(pad_id: int, size: int) -> None:
    """Raises ValueError where the embedding, of `size` rows, has none for the token that fills up batches."""
    if pad_id >= size:
        raise ValueError(
            f"the tokenizer's pad token has id {pad_id}, and the model's embedding {size} rows: "
            "model.resize_token_embeddings(len(tokenizer)), or tokenizer.pad_token = tokenizer.eos_token"
        )
