"""Recipes: a YAML file, `key=value` overrides, and the checks made before anything is loaded."""

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .config import RMSDConfig

# TrainingArguments expands ~ in its output_dir, and checkpoints must lie where the rest of the run does.
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JudgeSection(_Section):
    kind: Literal["context", "magnitude", "llm"] = "context"
    on_topic: bool = False  # kind: context; keep nothing where neither prompt nor answer has a word of the context
    model: str | None = None  # of the endpoint, for kind: llm
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    min_relevance: float = 0.0
    max_concurrency: int = Field(8, ge=1)
    timeout: float = Field(60.0, gt=0)
    max_retries: int = Field(3, ge=0)
    max_tokens: int | None = Field(512, ge=1)  # of an answer; null, as for temperature: for a model that takes none
    temperature: float | None = Field(0.0, ge=0)
    on_error: Literal["raise", "magnitude", "skip"] = "raise"
    template: UserPath | None = None
    cache: UserPath | None = None  # a folder: answers are kept there
    replay: bool = False  # answer from the cache alone


class EvaluateSection(_Section):
    every: int | None = Field(None, ge=1)  # steps; always before and after training
    samples: int = Field(4, ge=0)  # sampled answers a target prompt
    temperature: float = Field(0.5, gt=0)
    max_new_tokens: int = Field(24, ge=1)


class LoraSection(_Section):
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class Recipe(_Section):
    """One run. `train` holds RMSDConfig's arguments, transformers' own among them."""

    model: str
    task: str | None = None  # a module of rmsd.tasks, or
    data: UserPath | None = None  # JSONL rows of prompt and privileged_context (then there is no evaluation)
    rollouts: UserPath | None = None  # JSONL rows with their completion: nothing is generated; beside a task or alone
    method: Literal["rmsd", "opsd"] = "rmsd"
    engine: Literal["transformers", "vllm"] = "transformers"  # who writes the rollouts
    seed: int = 0
    output_dir: UserPath = Path("runs/rmsd")
    resume: bool = False
    dry_run: bool = False  # check everything and print what the run would take; load no weights, ask and write nothing
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    # Fixed variables of the tokenizer's chat template, for instance enable_thinking: false.
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    # Of the model's config.json, for a dry run where that cannot be read: model_type and dimensions.
    architecture: dict[str, Any] | None = None
    lora: LoraSection | None = None
    judge: JudgeSection = JudgeSection()
    evaluate: EvaluateSection = EvaluateSection()
    train: dict[str, Any] = {}


# These follow from the recipe's own keys; given twice they could disagree.
_DERIVED = {"output_dir", "seed", "method", "engine", "data_seed", "eval_strategy", "eval_steps", "eval_on_start"}
_TRAIN_KEYS = {field.name for field in dataclasses.fields(RMSDConfig) if field.init} - _DERIVED

_TRAIN_TYPES = typing.get_type_hints(RMSDConfig)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 5e-5 is a float, and `no` is a word (save_strategy: no)."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        """Of a key that is there twice YAML's own would drop the first without a word."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            problem = f"the key {twice!r} is there twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Reads a recipe, applies `section.key=value` overrides, and checks every key and value.

    Raises:
        FileNotFoundError, ValueError: in one line; an unknown key is named with its nearest right one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} must be key=value, for instance train.max_steps=10")
        *sections, last = key.split(".")
        section = values
        for name in sections:
            if not isinstance(section.get(name, {}), dict | None):
                raise ValueError(f"override {override!r}: {name!r} is a value, not a section")
            section[name] = section.get(name) or {}
            section = section[name]
        try:
            section[last] = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a 13th month
            raise ValueError(
                f"override {override!r}: the value is not YAML as it stands; quote it: {key}='\"...\"'"
            ) from error
    return _checked(values)


def _checked(values: dict) -> Recipe:
    try:
        recipe = Recipe(**values)
    except (ValidationError, TypeError) as error:
        raise ValueError(_first_problem(error)) from error
    recipe.train = {key: _argument(key, value) for key, value in recipe.train.items()}
    if recipe.rollouts:
        if recipe.data:
            raise ValueError("rollouts bring their own rows: set one of rollouts, data")
    elif (recipe.task is None) == (recipe.data is None):
        raise ValueError("a recipe names either a task or a data file: set one of task, data")
    if recipe.judge.kind == "llm" and not recipe.judge.model:
        raise ValueError("judge.kind=llm needs judge.model, the model's name at the endpoint")
    if recipe.judge.replay and not recipe.judge.cache:
        raise ValueError("judge.replay=true needs judge.cache, the folder to answer from")
    if recipe.architecture is not None and "model_type" not in recipe.architecture:
        raise ValueError("architecture needs model_type, as in the model's config.json (qwen3, llama, ...)")
    return recipe


def _argument(key: str, value: Any) -> Any:
    """A value of `train` as its argument's own type: `no` is False for a bool, and stays a word for a strategy."""
    if key not in _TRAIN_KEYS:
        raise ValueError(_unknown(f"train.{key}"))
    try:
        valid = TypeAdapter(_TRAIN_TYPES[key]).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"train.{key}: {error.errors()[0]['msg'].lower()}, not {value!r}") from error
    # 4 for a float stays 4: a report compares recipes as they are written.
    return value if valid == value else valid


def _first_problem(error: Exception) -> str:
    if isinstance(error, TypeError):
        return str(error)
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return _unknown(key)
    if problem["type"] == "missing":
        return f"the recipe has no {key!r}"
    return f"{key}: {problem['msg'].lower()}, not {problem['input']!r}"


def _unknown(key: str) -> str:
    known = [*Recipe.model_fields, *(f"train.{name}" for name in sorted(_TRAIN_KEYS))]
    for name, section in (("judge", JudgeSection), ("evaluate", EvaluateSection), ("lora", LoraSection)):
        known += [f"{name}.{field}" for field in section.model_fields]
    # A key right but for its section is nearer than one that is spelled alike.
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, 1, 0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def trainer_config(recipe: Recipe, output_dir: Path) -> RMSDConfig:
    """The trainer's arguments.

    Raises:
        ValueError: for a value that RMSDConfig refuses, in one line.
    """
    steps = recipe.train.get("max_steps", 0)
    every = recipe.evaluate.every or (steps if steps > 0 else 500)  # -1, transformers' word for none, is no interval
    # A plan may be made on a machine that the run is not for: without a GPU, bf16 is refused unless use_cpu is set.
    elsewhere = {"use_cpu": True} if recipe.dry_run and not torch.accelerator.is_available() else {}
    evaluation = {} if recipe.task is None else dict(eval_on_start=True, eval_strategy="steps", eval_steps=every)
    try:
        return RMSDConfig(
            output_dir=str(output_dir),
            seed=recipe.seed,
            method=recipe.method,
            engine=recipe.engine,
            **evaluation,
            **{**elsewhere, **recipe.train},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"train: {str(error).splitlines()[0]}") from error
