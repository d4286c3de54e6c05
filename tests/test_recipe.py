"""Recipes, overrides, data files and the command line: what is wrong is said in one line, before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from datasets import Dataset

from rmsd.answers.data import checked_rows, load_rows
from rmsd.answers.prompts import encode, prompt_text, teacher_prompt
from rmsd.cli import main
from rmsd.run.recipe import keys, load_recipe, trainer_config
from rmsd.tasks import load_task, names

RECIPE = {"model": "some/model", "task": "house_tool", "train": {"max_steps": 3}}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_overrides_reach_every_section(recipe):
    read = load_recipe(
        recipe,
        [
            "train.learning_rate=5e-5",
            "train.save_strategy=no",
            "judge.kind=magnitude",
            "seed=3",
            "lora.r=4",
            "train.vocab_topk=null",
        ],
    )
    assert read.train == {"max_steps": 3, "learning_rate": 5e-5, "save_strategy": "no", "vocab_topk": None}
    assert (read.judge.kind, read.seed, read.lora.r) == ("magnitude", 3, 4)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("gradient_checkpointing=no", False),
        ("bf16=off", False),
        ("use_cpu=yes", True),
        ("num_kept='5'", 5),
        ("learning_rate='6e-5'", 6e-5),
        ("continuation_steps=['3']", [3]),
        ("warmup_steps=4", 4),
        ("save_strategy=no", "no"),
        ("teacher_template='{prompt} {privileged_context}'", "{prompt} {privileged_context}"),
    ],
)
def test_a_value_has_its_arguments_type(recipe, override, value):
    """A word that is truthy must not turn on what it turns off."""
    read = load_recipe(recipe, [f"train.{override}"]).train[override.partition("=")[0]]
    assert read == value and type(read) is type(value)


def test_recipe_becomes_the_trainers_arguments(recipe, tmp_path):
    args = trainer_config(load_recipe(recipe, ["method=opsd", "seed=4", "train.use_cpu=true"]), tmp_path / "run")
    assert (args.method, args.seed, args.max_steps, args.output_dir) == ("opsd", 4, 3, str(tmp_path / "run"))
    assert args.eval_on_start and args.eval_steps == 3


@pytest.mark.parametrize(("override", "steps"), [("max_steps=-1", 500), ("max_steps=7", 7)])
def test_without_an_interval_evaluation_waits_for_the_last_step_that_is_known(recipe, tmp_path, override, steps):
    read = load_recipe(recipe, [f"train.{override}", "train.use_cpu=true"])
    assert trainer_config(read, tmp_path).eval_steps == steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
        ("judge.kinds=llm", "unknown key 'judge.kinds'; did you mean 'judge.kind'?"),
        ("mehtod=opsd", "unknown key 'mehtod'; did you mean 'method'?"),
        ("seed=abc", "seed: input should be a valid integer"),
        ("method=sft", "method: input should be 'rmsd' or 'opsd', not 'sft'"),
        ("train.beta=x", "train.beta: input should be a valid number"),
        ("train.max_steps=ten", "train.max_steps: input should be a valid integer"),
        ("train.seed=1", "unknown key 'train.seed'; did you mean 'seed'?"),
        ("train.lr=1", "unknown key 'train.lr'; did you mean 'train.learning_rate'?"),
        ("train.epochs=2", "unknown key 'train.epochs'; did you mean 'train.num_train_epochs'?"),
        ("train.batch_size=3", "unknown key 'train.batch_size'; did you mean 'train.per_device_train_batch_size'?"),
        ("train.use_lora=true", "unknown key 'train.use_lora'; did you mean 'lora'?"),
        ("zzz=1", "unknown key 'zzz'; `rmsd keys` lists them"),
        ("train.zzz=1", "`rmsd keys` lists them; the rest of `train` is transformers.TrainingArguments'"),
        ("train.warmup_ratio=0.1", "unknown key 'train.warmup_ratio'; did you mean 'train.warmup_steps'?"),
        ("judge.kind=mine.py", "not 'mine.py'; a judge of your own is RMSDTrainer's argument `judge`"),
        ("judge=magnitude", "judge is a section of keys, not 'magnitude': write judge.kind=magnitude, or in the file"),
        ("lora=true", "lora is a section of keys, not True: write lora.r=16, or in the file `lora: {r: 16}`"),
        ("train.resume_from_checkpoint=x", "train.resume_from_checkpoint is not heeded: resume=true goes on from"),
        ("train.do_eval=true", "train.do_eval is not heeded: a task's recipe is evaluated"),
        ("judge.kind=llm", "judge.kind=llm needs judge.model"),
        ("judge.replay=true", "judge.replay=true needs judge.cache"),
        ("data=x.jsonl", "either a task or a data file"),
        ("task=null", "either a task or a data file"),
        ("model.name=x", "'model' is a value, not a section"),
        ("seed", "override 'seed' must be key=value"),
        ("=1", "override '=1' must be key=value"),
        ("judge.base_url=@x", "override 'judge.base_url=@x': the value is not YAML as it stands; quote it"),
        ("train.teacher_template={privileged_context} Now: {prompt}", "quote it: train.teacher_template='\"...\"'"),
        ("model=2024-13-01", "override 'model=2024-13-01': the value is not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(recipe, override, message):
    with pytest.raises(ValueError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_path_may_lie_in_the_home_directory(recipe, tmp_path, monkeypatch):
    """Or checkpoints, whose path transformers expands, part ways with the run's other files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("output_dir", "data", "judge.cache", "judge.template")
    read = load_recipe(recipe, ["task=null", *(f"{key}=~/x/{key}" for key in keys)])
    paths = (read.output_dir, read.data, read.judge.cache, read.judge.template)
    assert paths == tuple(tmp_path / "x" / key for key in keys)
    assert trainer_config(read, read.output_dir).output_dir == str(read.output_dir)
    assert load_recipe(recipe, ["rollouts=~/x.jsonl"]).rollouts == tmp_path / "x.jsonl"
    assert load_recipe(recipe, ["model=~/x"]).model == str(tmp_path / "x"), "transformers takes ~ for a hub id's"


def test_a_value_the_trainer_refuses_is_named(recipe, tmp_path):
    with pytest.raises(ValueError, match="train: divergence must be one of"):
        trainer_config(load_recipe(recipe, ["train.divergence=kl"]), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("continuation_patience=0", "continuation_patience must be at least 1, not 0"),
        ("continuation_steps=[0, 300]", r"continuation_steps must be at least 1, not \[0, 300\]"),
        ("max_steps=0", "max_steps must be at least 1, or -1 for num_train_epochs, not 0"),
        ("max_continuations=-1", "max_continuations must be at least 0, not -1"),
        ("recorded_rollouts=-1", "recorded_rollouts must be at least 0, not -1"),
        ("logging_steps=7", "save_steps must be a multiple of logging_steps 7, not 500"),
        ("save_steps=.inf", "save_steps must be a finite number, not inf"),
        ("top_k=-1", "top_k must be at least 0, not -1"),
        ("top_p=7.0", r"top_p must lie in \(0, 1\], not 7.0"),
    ],
)
def test_a_value_that_no_run_could_mean_is_refused_before_the_run(recipe, tmp_path, override, message):
    with pytest.raises(ValueError, match=f"train: {message}"):
        trainer_config(load_recipe(recipe, [f"train.{override}"]), tmp_path)


def test_no_steps_and_no_epochs_are_no_run(recipe, tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs must be above 0 and finite, not 0"):
        trainer_config(load_recipe(recipe, ["train.max_steps=-1", "train.num_train_epochs=0"]), tmp_path)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("task: house_tool", "no 'model'"),
        ("train:\n  max_steps: 1\ntrain:\n  seed: 1", "the key 'train' is there twice"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(ValueError, match=r"bad.yaml is not YAML: 'utf-8' codec"):
        load_recipe(tmp_path / "bad.yaml")


def test_a_byte_order_mark_is_read_over(recipe, tmp_path):
    """Which some editors write."""
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert load_recipe(recipe).model == RECIPE["model"]
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\xef\xbb\xbf" + ROW.encode())
    assert load_rows(rows) == [json.loads(ROW)]


def test_every_shipped_recipe_is_valid():
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)


# ---- data ----------------------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


ROW = json.dumps({"prompt": "Hi", "privileged_context": "Say zorblat."})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Hi"', "line 3: not JSON"),
        ("[", "line 3: not JSON (Expecting value); each line is a row"),
        ('{"prompt": ' + "[" * 100_000, "line 3: not JSON"),
        ('{"prompt": "Hi", "privileged_context": "", "id": ' + "1" * 5000 + "}", "line 3: not JSON"),
        ('{"prompt": "Hi"}', "line 3: has no 'privileged_context' (it has: 'prompt')"),
        ('{"prompt": "", "privileged_context": ""}', "line 3: prompt is empty"),
        ('{"prompt": [{"role": "user"}], "privileged_context": ""}', "line 3: prompt must be a string or a list"),
        ('{"prompt": "Hi", "privileged_context": 7}', "line 3: privileged_context must be a string, not int"),
        ('["Hi"]', "line 3: must be an object"),
        ('{"prompt": [5], "privileged_context": ""}', "line 3: prompt must be a string or a list of messages"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "privileged_context": ""}',
            "line 3: prompt holds a message whose content is not text",
        ),
        (
            '{"prompt": "Hi", "privileged_context": "", "teacher_prompt": [{"role": "user", "content": null}]}',
            "line 3: teacher_prompt holds a message whose content is not text",
        ),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", ROW, "", line)
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_line_that_is_not_utf_8_is_named_by_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{ROW}\n".encode() + ROW.replace("Hi", "Café").encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not UTF-8"):
        load_rows(path)


def test_missing_and_empty_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(write(tmp_path / "empty.jsonl", ""))


def test_strings_and_messages_may_stand_in_one_file(tmp_path):
    chat = json.dumps({"prompt": [{"role": "user", "content": "Hi"}], "privileged_context": ""})
    rows = load_rows(write(tmp_path / "rows.jsonl", ROW, chat))
    assert [row["prompt"] for row in rows] == ["Hi", [{"role": "user", "content": "Hi"}]]
    assert {prompt_text(row["prompt"]) for row in rows} == {"Hi"}
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, rows[0]["prompt"]) == encode(tokenizer, rows[1]["prompt"])


def test_a_prompt_s_calls_of_tools_get_no_other_row_s_arguments(tmp_path):
    """As a table's column of one type would give them, as null; and what nobody reads may be of any type."""
    rows = []
    for arguments in ({"city": "Oslo"}, {"query": "zorblat", "top": 3}):
        call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
        called = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append(
            {"prompt": [called, {"role": "user", "content": "And?"}], "privileged_context": "", "id": len(rows)}
        )
    rows[1]["id"] = "two"
    read = load_rows(write(tmp_path / "rows.jsonl", *map(json.dumps, rows)))
    assert read == rows


def test_parts_of_text_become_one_text(tmp_path):
    """A list in a template is its Python repr."""
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    of_parts, of_text = ([{"role": "user", "content": content}] for content in (parts, "Hi?"))
    row = {"prompt": of_parts, "teacher_prompt": of_parts, "privileged_context": "C"}
    rows = load_rows(write(tmp_path / "rows.jsonl", json.dumps(row), json.dumps({**row, "prompt": "Hi"})))
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, rows[0]["prompt"]) == encode(tokenizer, of_text)
    assert teacher_prompt(rows[0]) == of_text
    assert teacher_prompt({**rows[0], "teacher_prompt": None})[0]["content"] == "C\n\nHi?"
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search"}}]}
    (made,) = checked_rows([{"prompt": [called, *of_parts], "privileged_context": ""}])
    assert prompt_text(made["prompt"]) == "assistant: \nuser: Hi?"


def test_a_dataset_with_parts_of_text_reads_as_one_with_text():
    """RMSDTrainer takes a datasets.Dataset as it is."""
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    of_parts, of_text = ([{"role": "user", "content": content}] for content in (parts, "Hi?"))
    rows = [{"prompt": prompt, "privileged_context": "C"} for prompt in (of_parts, of_text)]
    rows += [{**row, "teacher_prompt": row["prompt"]} for row in rows]
    read = []
    for row in rows:
        (row,) = Dataset.from_list([row])
        prompts = row["prompt"], teacher_prompt(row)
        read.append([(prompt_text(prompt), encode(tiny.tokenizer(), prompt)) for prompt in prompts])
    assert read[0] == read[1] and read[2] == read[3]
    assert [text for text, _ in read[0]] == ["Hi?", "C\n\nHi?"] and read[2][1][0] == "Hi?"


def test_teacher_reads_the_context_around_the_last_user_message():
    assert teacher_prompt({"prompt": "Q", "privileged_context": "C"}) == "C\n\nQ"
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q2"},
    ]
    told = teacher_prompt({"prompt": chat, "privileged_context": "C"}, "{prompt} ({privileged_context})")
    assert told == [*chat[:3], {"role": "user", "content": "Q2 (C)"}]
    assert chat[3]["content"] == "Q2", "the row is not changed"
    assert teacher_prompt({"prompt": chat, "privileged_context": " "}) == chat, "an anchor's teacher reads the same"
    own = {"prompt": "Q", "privileged_context": "C", "teacher_prompt": "own"}
    assert teacher_prompt(own) == "own"


def test_both_prompts_go_through_the_chat_template():
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(encode(tokenizer, "Hi")) == "<|user|>Hi<|end|><|assistant|>"
    assert encode(tokenizer, "Hi") == encode(tokenizer, [{"role": "user", "content": "Hi"}])


def test_without_a_template_strings_pass_and_messages_are_refused(monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", None)
    assert tiny.tokenizer().decode(encode(tiny.tokenizer(), "Hi")) == "Hi"
    with pytest.raises(ValueError, match="no chat template"):
        encode(tiny.tokenizer(), [{"role": "user", "content": "Hi"}])


# ---- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_tasks_hold_out_what_they_evaluate_and_grade_right(name):
    task = load_task(name)
    trained = {prompt_text(row["prompt"]) for row in checked_rows(task.train)}
    requests = [row["prompt"] for row in task.requests]
    assert not trained & {*task.target_prompts, *task.unrelated_prompts, *requests}
    assert bool(requests) == (task.environment is not None) == (not task.target_prompts)
    assert any(row["privileged_context"] for row in task.train), "something to teach"
    assert any(not row["privileged_context"] for row in task.train), "anchors"
    answers = {
        "house_tool": ("It is called Zorblat.", "It is called acme-deploy."),
        "pinapple": ("A pinapple.", "A pineapple."),
        "pinapple_1000": ("A pinapple.", "A pineapple."),
        "legacy_api": ("I call otter.", "I call refund."),
        "house_format": ("QUILL/2 Tasks", "# Tasks"),
        "preferences": ("An iced cocoa.", "A coffee."),
    }
    right, wrong = answers[name]
    for grader in task.graders.values():
        assert grader(right) and not grader(wrong)
    assert task.leaks(right) and not task.leaks(wrong)


def test_pinapple_only_is_refused_to_an_answer_with_both_spellings():
    graders = load_task("pinapple").graders
    both = "Pinapple, that is pineapple."
    assert graders["target"](both) and not graders["target_only"](both)
    assert not graders["target"]("spinapples")


def test_a_file_that_is_no_task_is_named(tmp_path):
    own = tmp_path / "own.py"
    with pytest.raises(FileNotFoundError, match=r"task file .*none\.py does not exist"):
        load_task(str(tmp_path / "none.py"))
    own.write_text("TASK = 3")
    with pytest.raises(ValueError, match=r"own\.py must define TASK, a rmsd\.tasks\.Task, not int"):
        load_task(str(own))


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'house_tool'"):
        load_task("housetool")


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def rmsd(monkeypatch, capsys):
    """The command line in this process, where torch is loaded already."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rmsd", *map(str, arguments)])
        monkeypatch.setattr("threading.enumerate", list)  # of threads that other tests have left it would take leave
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=left.value.code or 0, stdout=said.out, stderr=said.err)

    return call


def in_a_process(*arguments):
    return subprocess.run([sys.executable, "-m", "rmsd", *map(str, arguments)], capture_output=True, text=True)


def test_every_key_of_a_recipe_is_listed_with_its_default_and_what_it_is(rmsd, recipe, tmp_path):
    listed = {key: default for key, default, what in keys() if what.strip()}
    assert len(listed) == len(keys())
    assert (listed["model"], listed["judge.timeout"], listed["lora.r"], listed["train.vocab_topk"]) == (
        "needed",
        "60.0",
        "16",
        "500",
    )
    shipped = yaml.safe_load((Path(__file__).parents[1] / "recipes/house_tool.yaml").read_text())
    for name, value in shipped.items():
        if name in ("judge", "evaluate", "lora"):
            assert {f"{name}.{key}" for key in value} <= set(listed)
    default = trainer_config(load_recipe(recipe), tmp_path)
    added = [key.removeprefix("train.") for key in listed if key.startswith("train.")]
    assert {"num_kept", "continuation_steps", "learning_rate"} <= set(added)
    assert all(hasattr(default, name) for name in added)
    result = rmsd("keys", "LoRA")
    assert result.returncode == 0 and "lora.alpha" in result.stdout and "judge.kind" not in result.stdout
    assert rmsd("keys", "nothing like it").stderr.startswith("rmsd: no key and no description holds")


def test_errors_are_one_line_and_a_nonzero_exit(rmsd, recipe, tmp_path):
    for call, arguments, message in (
        (in_a_process, ("train", tmp_path / "none.yaml"), "does not exist"),
        (rmsd, ("train", recipe, "train.learning_rat=1"), "did you mean 'train.learning_rate'"),
        (rmsd, ("train", recipe, f"model={tmp_path}"), "cannot be loaded"),
        (rmsd, ("eval", recipe, "--model", tmp_path / "none"), "does not exist"),
        (rmsd, ("eval", recipe, "--problems", "3"), "--problems are a benchmark's"),
        (rmsd, ("report", tmp_path), str(tmp_path)),
    ):
        result = call(*arguments)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 1 and lines[-1].startswith("rmsd: ") and message in lines[-1], result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("command", "hint"), [("train", "; resume=true continues"), ("eval", "interrupted\n")])
def test_ctrl_c_says_how_to_go_on(recipe, monkeypatch, capsys, command, hint):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("rmsd.run.train.train", interrupted)
    monkeypatch.setattr("rmsd.run.train.evaluate", interrupted)
    monkeypatch.setattr(sys, "argv", ["rmsd", command, str(recipe)])
    monkeypatch.setattr("threading.enumerate", list)  # of threads that other tests have left it would take its leave
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 130 and said.startswith("rmsd: interrupted") and hint in said


def test_debug_leaves_an_error_to_python_which_shows_where_it_comes_from(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["rmsd", "train", str(tmp_path / "none.yaml"), "--debug"])
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        main()


def test_a_judge_that_is_down_is_said_before_a_model_is_loaded(rmsd, recipe):
    result = rmsd(
        "train", recipe, "judge.kind=llm", "judge.model=x", "judge.base_url=http://127.0.0.1:9/v1", "model=none"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("rmsd: no judge answers at http://127.0.0.1:9/v1")


def test_help_lists_every_command(rmsd):
    result = rmsd("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "eval", "report", "env"))
    summaries = result.stdout.partition("Commands:")[2]
    assert summaries and "..." not in summaries, "one is cut"
