"""Whose weights read the privileged context: frozen, live, averaged, an adapter switched off, or a snapshot."""

import adapters
import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import same, trainer, weights
from transformers import Trainer

from rmsd.run.costs import Sizes, teacher_bytes
from rmsd.training.continuation import has_plateaued
from rmsd.training.record import RunRecord, read_lines


def test_frozen_teacher_keeps_the_initial_weights(tmp_path):
    made = trainer(tmp_path)
    initial = weights(made.model)
    made.train()
    assert not same(initial, weights(made.model)) and same(initial, weights(made.teacher.model))


def test_adapter_off_is_the_teacher_under_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny.model()
    initial = weights(base)
    made = trainer(tmp_path, get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")))
    assert made.teacher.model is made.model, "no copy"
    made.train()
    trained = {name: value for name, value in weights(made.model).items() if "lora_B" in name}
    assert any(value.any() for value in trained.values())
    with made.teacher.active() as teacher:
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(teacher(ids).logits, tiny.model()(ids).logits)
    for name, value in weights(made.model).items():
        if "lora_" not in name:
            assert torch.equal(value, initial[name.removeprefix("base_model.model.").replace(".base_layer", "")])


def peft_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["initial", "adapter_off"])
def test_an_adapter_trained_before_is_a_part_of_what_training_starts_from(tmp_path, kind):
    """Of a second stage. A teacher without it would pull the student back to before the first."""
    student = peft_model()
    generator = torch.Generator().manual_seed(0)
    for name, value in student.named_parameters():
        if "lora_B" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    start = logits(student.eval())
    with student.disable_adapter():
        base = logits(student)
    assert (start - base).abs().max() > 1e-2
    made = trainer(tmp_path, student, teacher=kind, max_steps=3, save_strategy="steps", save_steps=2)
    trained = {name for name, value in made.model.named_parameters() if value.requires_grad}
    assert trained and not any(".teacher." in name for name in trained)
    made.train()
    assert (logits(made.model.eval()) - start).abs().max() > 1e-4, "training moved the student"
    expected = start if kind == "initial" else base
    torch.testing.assert_close(teacher_logits(made), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        "LORA, DoRA",
        "LORA, PiSSA",
        "LORA, biases",
        "LORA, the head saved whole",
        "LORA, tokens",
        "IA3",
        "LOHA",
        "OFT",
        "LN_TUNING",
    ],
)
def test_what_any_adapter_has_learnt_is_a_part_of_the_start(method):
    """`make sweep` tries every method of the installed PEFT."""
    assert adapters.tried(method) == ("trains", "")


def test_adapters_that_cannot_be_told_apart_are_refused_by_name(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    prompt = get_peft_model(tiny.model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"'default' learns prompts \(prompt_tuning\)"):
        trainer(tmp_path, prompt)
    two = get_peft_model(tiny.model(), config)
    two.add_adapter("second", config)
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, second; of lora\)"):
        trainer(tmp_path, two)
    two.base_model.set_adapter("second")
    made = trainer(tmp_path, two, max_steps=1)
    before = tiny.weights(two)
    made.train()
    moved = {name for name, value in two.named_parameters() if not torch.equal(before[name], value)}
    assert moved and all(".second." in name for name in moved), "one beside it stays as it is"
    two.add_adapter("teacher", config)
    with pytest.raises(ValueError, match="an adapter is named 'teacher'"):
        trainer(tmp_path, two)
    with pytest.raises(ValueError, match=r"adapter_off.* needs all trained weights in the adapter"):
        trainer(tmp_path, adapters.adapted("LORA, biases"), teacher="adapter_off")


def test_a_continuation_that_could_not_be_made_is_refused_before_the_run(tmp_path):
    for options in ({"continuation_steps": [1]}, {"continuation_metric": "loss"}):
        with pytest.raises(ValueError, match=r"teacher='adapter_off' keeps no copy, .* must be a LoRA"):
            trainer(tmp_path, adapters.adapted("IA3"), teacher="adapter_off", **options)
        trainer(tmp_path, adapters.adapted("LORA"), teacher="adapter_off", **options)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


def teacher_logits(made):
    with made.teacher.active() as teacher:
        return logits(teacher)


@pytest.mark.parametrize("make_model", [tiny.model, peft_model])
def test_live_teacher_is_the_student_and_ema_follows_it(tmp_path, make_model):
    live = trainer(tmp_path / "live", make_model(), teacher="live")
    live.train()
    torch.testing.assert_close(teacher_logits(live), logits(live.model.eval()))

    before = logits(make_model().eval())
    gaps = {}
    for decay in (0.0, 0.9):
        made = trainer(tmp_path / str(decay), make_model(), teacher="ema", ema_decay=decay, max_steps=3)
        made.train()
        student = logits(made.model.eval())
        gaps[decay] = (teacher_logits(made) - student).abs().max()
        assert (student - before).abs().max() > 1e-3, "training moved the student"
    assert gaps[0.0] < 1e-5 < gaps[0.9]


@pytest.mark.parametrize("make_model", [tiny.model, peft_model])
def test_continuation_makes_the_student_the_teacher_and_survives_a_resume(tmp_path, make_model):
    options = dict(max_steps=4, continuation_steps=[2], save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path, make_model(), callbacks=[RunRecord(tmp_path)], **options)
    initial = teacher_logits(whole)
    whole.train()
    assert (teacher_logits(whole) - initial).abs().max() > 1e-3
    assert (teacher_logits(whole) - logits(whole.model.eval())).abs().max() > 1e-4, "two steps have passed since"
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["continuation"]) for line in lines if line["kind"] == "continuation"] == [(2, 1)]
    assert [entry["step"] for entry in whole.state.log_history if "kept_tokens" in entry] == [1, 2, 3, 4]

    resumed = trainer(tmp_path, make_model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(teacher_logits(resumed), teacher_logits(whole), rtol=0, atol=0)
    assert same(weights(whole.model), weights(resumed.model))
    assert sum("continuation" in entry for entry in resumed.state.log_history) == 1


def test_a_resume_under_deepspeed_brings_the_teacher_too(tmp_path, monkeypatch):
    """Its engine loads the student's weights, and Trainer's own loading is left out."""
    options = dict(continuation_steps=[1], save_strategy="steps", save_steps=2)
    made, resumed = (trainer(tmp_path, **options) for _ in range(2))
    made.train()
    resumed.create_optimizer_and_scheduler(2)
    monkeypatch.setattr(resumed, "is_deepspeed_enabled", True)
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    resumed._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed.teacher.model), weights(made.teacher.model))


@pytest.mark.parametrize("make_model", [tiny.model, peft_model])
def test_a_trainer_whose_teacher_has_changed_cannot_go_back_to_before(tmp_path, make_model):
    """As after an interrupt in a notebook."""
    made = trainer(tmp_path, make_model(), continuation_steps=[2], save_strategy="steps", save_steps=1)
    made.train()
    with pytest.raises(ValueError, match=r"checkpoint-1 was written before the teacher changed.*make a new trainer"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resumed_student_has_its_adapter_where_trainer_forgets_it(tmp_path, monkeypatch):
    """As before transformers 5.23: beside a second adapter's folder it loads that alone."""
    options = dict(max_steps=4, continuation_steps=[2], save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path, peft_model(), **options)
    whole.train()

    def forgetful(self, folder, model=None):
        self.model.load_adapter(f"{folder}/teacher", "teacher", is_trainable=False)

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", forgetful)
    resumed = trainer(tmp_path, peft_model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_what_is_frozen_of_an_adapter_stays_frozen(tmp_path, kind):
    """PEFT makes all of an adapter trainable whenever it switches it on: the teacher does so at each reading."""

    def frozen_a():
        student = peft_model()
        for name, value in student.named_parameters():
            if "lora_A" in name:  # LoRA-FA
                value.requires_grad_(False)
        return student

    options = dict(teacher=kind, save_strategy="steps", save_steps=1)
    whole, resumed = (trainer(tmp_path, frozen_a(), **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    start = weights(peft_model())
    for made in (whole, resumed):
        own = {name: value for name, value in made.model.named_parameters() if "teacher" not in name.split(".")}
        may_move = {name for name in own if "lora_B" in name}
        assert {name for name, value in own.items() if value.requires_grad} == may_move
        assert {name for name in own if not torch.equal(own[name], start[name])} <= may_move
    assert same(weights(whole.model), weights(resumed.model))


def test_an_adapters_snapshot_is_an_adapter_not_a_copy_of_the_model(tmp_path):
    made = trainer(tmp_path, peft_model(), continuation_steps=[1])
    before = sum(parameter.numel() for parameter in made.model.parameters() if parameter.requires_grad)
    made.train()
    own = sum(value.numel() for name, value in made.model.named_parameters() if ".teacher." in name)
    assert own == before and made.teacher.model is made.model
    assert made.model.active_adapter == "default"
    trainable = {name for name, value in made.model.named_parameters() if value.requires_grad}
    assert trainable and not any(".teacher." in name for name in trainable), "only the student's adapter trains on"


@pytest.mark.parametrize("options", [{}, {"bf16": True}])
@pytest.mark.parametrize("kind", ["initial", "ema", "live"])
@pytest.mark.parametrize("make_model", [tiny.model, peft_model])
def test_a_teacher_that_is_the_student_reads_as_the_student_does(tmp_path, make_model, kind, options):
    """Without a privileged context no token of step 1 differs, whatever the precision of their forwards."""
    rows = [{"prompt": row["prompt"], "privileged_context": "", "completion": "It is zorblat"} for row in tiny.ROWS]
    made = trainer(tmp_path, make_model(), rows=rows, teacher=kind, max_steps=1, **options)
    made.train()
    (entry,) = (entry for entry in made.state.log_history if "candidates" in entry)
    assert entry["candidates"] == entry["divergence"] == 0 < entry["rollout_tokens"]


def test_an_embeddings_adapter_belongs_to_the_teacher_too(tmp_path):
    """Its parameters' names end in the adapter's, with no ".weight" after it."""
    from peft import LoraConfig, get_peft_model

    def model():
        config = LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(tiny.model(tie_word_embeddings=False), config)

    made = trainer(tmp_path / "run", model(), continuation_steps=[2])
    made.train()
    made.teacher.save(tmp_path)
    loaded = trainer(tmp_path / "other", model())
    loaded.teacher.load(tmp_path)
    student = {name: value for name, value in weights(made.model).items() if ".default" in name}
    assert any("lora_embedding_A" in name and value.any() for name, value in student.items()), "it has been trained"
    for teacher in (weights(made.model), weights(loaded.model)):
        assert all(torch.equal(value, teacher[name.replace(".default", ".teacher")]) for name, value in student.items())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("make_model", [tiny.model, peft_model])
def test_rollouts_readings_and_training_run_in_one_precision(tmp_path, make_model, bf16):
    """A PEFT model's generate goes past the forward that accelerate patches, and a copied teacher has none."""
    student, seen = make_model(), []
    decoder = (student.get_base_model() if hasattr(student, "get_base_model") else student).get_decoder()
    decoder.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))  # copied with it
    made = trainer(tmp_path, student, max_steps=1, bf16=bf16)
    seen.clear()  # building a trainer probes the head
    made.train()
    assert len(seen) > 2 and set(seen) == {bf16}


def test_a_moving_average_of_16_bit_weights_moves_and_survives_a_resume(tmp_path):
    """A step of it, a hundredth of the student's, is less than half a bf16 weight's last place."""
    options = dict(teacher="ema", ema_decay=0.99, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2)
    whole, resumed = (trainer(tmp_path, tiny.model().bfloat16(), **options) for _ in range(2))
    exact = [weight.detach().float() for weight in whole.model.parameters()]
    average = whole.teacher.average

    def averaged(decay):
        average(decay)
        for mine, theirs in zip(exact, whole.model.parameters(), strict=True):
            mine.lerp_(theirs.detach().float(), 1 - decay)

    whole.teacher.average = averaged
    initial = weights(whole.teacher.model)
    whole.train()
    assert not same(initial, weights(whole.teacher.model))
    for value, expected in zip(whole.teacher.model.parameters(), exact, strict=True):
        assert torch.equal(value, expected.bfloat16())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.teacher.model), weights(resumed.teacher.model))
    held = teacher_bytes(Sizes.of(whole.model), whole.args)
    assert held == sum(v.nbytes for v in (*whole.teacher.model.parameters(), *whole.teacher._averages.values()))
    whole.teacher.snapshot()
    assert same(weights(whole.teacher.model), weights(whole.model))
    average(0.5)
    assert same(weights(whole.teacher.model), weights(whole.model)), "the average begins anew"


@pytest.mark.parametrize(
    ("values", "plateau"),
    [
        ([3.0, 2.0, 1.0], False),
        ([3.0, 2.0, 2.0, 2.1], True),
        ([3.0, 2.95, 2.9], True),
        ([1.0, 2.0], False),
        ([], False),
        ([float("nan"), 3.0, 2.0, 1.0], False),
        ([3.0, float("nan"), float("nan")], True),
    ],
)
def test_plateau_is_patience_entries_without_improvement(values, plateau):
    lower = ("loss", "tail_mass", "repetition", "eval_tool_errors_greedy", "eval_drift")
    history = [{**dict.fromkeys(lower, value), "eval_x": -value, "step": step} for step, value in enumerate(values)]
    for metric in (*lower, "eval_x"):
        assert has_plateaued(history, metric, patience=2, min_delta=0.2) is plateau
    continued = [*history, {"continuation": 1, "step": len(history) - 1}]
    assert not has_plateaued(continued, "loss", patience=2, min_delta=0.2), "counted anew"


def test_a_loss_under_the_teacher_before_is_nothing_to_improve_on():
    """Where a continuation is due by its step, that step's entry is logged after it."""
    history = [{"continuation": 1, "step": 3}, *({"loss": loss, "step": 3 + i} for i, loss in enumerate((1, 4, 3, 2)))]
    assert not has_plateaued(history, "loss", patience=3, min_delta=0.0)
    history += [{"loss": 2, "step": step} for step in (7, 8, 9)]
    assert has_plateaued(history, "loss", patience=3, min_delta=0.0)


def test_a_step_evaluated_again_has_not_waited_any_longer():
    history = [{"eval_x": 0.5, "step": step} for step in (0, 10, 10, 10)]
    assert not has_plateaued(history, "eval_x", patience=2, min_delta=0.0)
    assert has_plateaued([*history, {"eval_x": 0.5, "step": 20}], "eval_x", patience=2, min_delta=0.0)
    continued = [history[0], {"continuation": 1, "step": 0}, *({"eval_x": 0.5, "step": step} for step in (0, 10, 20))]
    assert not has_plateaued(continued, "eval_x", patience=2, min_delta=0.0), "step 0 was before the continuation"


def test_a_resumed_run_continues_at_the_uninterrupted_runs_step(tmp_path):
    """Its checkpoint's step is evaluated again where training starts with an evaluation."""
    options = dict(
        evaluator=lambda model: {"target": 0.5},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        continuation_metric="eval_target",
        continuation_patience=3,
        save_strategy="steps",
        save_steps=2,
    )
    runs = [trainer(tmp_path, **options) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for run in runs:
        assert [entry["step"] for entry in run.state.log_history if "continuation" in entry] == [3]


def test_continuation_by_a_metric_stops_at_its_limit(tmp_path):
    made = trainer(
        tmp_path,
        evaluator=lambda model: {"target": 0.5},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=1,
        continuation_metric="eval_target",
        continuation_patience=2,
        max_continuations=2,
    )
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "continuation" in entry] == [3, 6]


def test_adapter_off_is_refused_without_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="adapter_off"):
        trainer(tmp_path, teacher="adapter_off")
