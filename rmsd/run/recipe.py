"""Recipes: a YAML file, `key=value` overrides, and the checks made before anything is loaded."""

import dataclasses
import json
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..models.loading import adapted
from ..models.wheels import WHEELS
from ..training.config import RMSDConfig
from ..words import first_line
from .problems import NOT_HEEDED, not_a_section, unknown

# TrainingArguments expands ~ in its output_dir, and checkpoints must lie where the rest of the run does.
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _key(default: Any, description: str, **limits):
    return Field(default, description=description, **limits)


class JudgeSection(_Section):
    kind: Literal["context", "contrast", "magnitude", "llm"] = _key(
        "context", "context, contrast, magnitude or llm: who says which candidates are relevant."
    )
    on_topic: bool = _key(
        False, "context, contrast: keep nothing where neither prompt nor answer has a word of the context."
    )
    contrast_floor: float = _key(
        0.5, "contrast: nats by which a wish must weaken when the context says something else.", ge=0
    )
    contrast_context: str | None = _key(
        None, "contrast: what the teacher is told instead, where rows have no such column; {column} is a row's."
    )
    model: str | None = _key(
        None, "llm: the model's name at the endpoint; given with contrast, it is asked about what that keeps."
    )
    base_url: str | None = _key(None, "llm: an OpenAI-compatible endpoint; null is OpenAI's.")
    api_key_env: str = _key("OPENAI_API_KEY", "llm: the environment variable that holds the key.")
    max_concurrency: int = _key(8, "llm: requests under way at once.", ge=1)
    timeout: float = _key(60.0, "llm: seconds that a request may take.", gt=0)
    max_retries: int = _key(3, "llm: how often a request is sent again that failed for a reason that may pass.", ge=0)
    max_tokens: int | None = _key(1024, "llm: tokens written about an answer, at most; null sends no limit.", ge=1)
    temperature: float | None = _key(0.0, "llm: its sampling temperature; null sends none.", ge=0)
    on_error: Literal["raise", "magnitude", "skip"] = _key(
        "raise", "llm: raise, magnitude or skip, where a request fails for good."
    )
    ask: Literal["list", "each"] = _key(
        "list", "llm: all candidates in one request, or each by itself, by how likely yes is and no."
    )
    log_odds: float = _key(0.5, "llm, each: a yes is by more than this likelier than no, in nats.")
    template: UserPath | None = _key(None, "llm: a jinja2 file in place of the built-in prompt.")
    shuffle: bool = _key(True, "llm: list candidates in an order that says nothing of the gap.")
    batch: int = _key(1, "llm: answers that share a request.", ge=1)
    requests_per_minute: int | None = _key(None, "llm: requests of each process, at most; more of them wait.", ge=1)
    tokens_per_minute: int | None = _key(None, "llm: tokens read and written for each process, at most.", ge=1)
    budget_tokens: int | None = _key(
        None, "llm: tokens read and written for each process, in all; then it stops. A resume has as many anew.", ge=1
    )
    cache: UserPath | None = _key(None, "A folder in which answers are kept.")
    replay: bool = _key(False, "Answer from the cache alone.")


class EvaluateSection(_Section):
    every: int | None = _key(None, "Steps between evaluations; without it before and after training alone.", ge=1)
    samples: int = _key(4, "Sampled answers a target prompt, beside a greedy one.", ge=0)
    temperature: float = _key(0.5, "Temperature of the sampled answers.", gt=0)
    max_new_tokens: int = _key(24, "Tokens of an answer, at most; with tools, of an episode.", ge=1)
    max_drift: float | None = _key(None, "Training stops where an evaluation finds more drift, in nats a token.", gt=0)


class LoraSection(_Section):
    r: int = _key(16, "The adapter's rank.", ge=1)
    alpha: int = _key(32, "The adapter is scaled by alpha / r.", ge=1)
    dropout: float = _key(0.0, "Dropout of the adapter's input.", ge=0, lt=1)
    target_modules: str | list[str] = _key("all-linear", "Modules that get an adapter, by the end of their name.")


class QuantizationSection(_Section):
    """As transformers' BitsAndBytesConfig names them."""

    load_in_4bit: Literal[True] = _key(True, "The layers' weights, but the head's and the embedding's, in 4 bits each.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _key("nf4", "nf4 or fp4: which 16 values a weight may have.")
    bnb_4bit_use_double_quant: bool = _key(False, "The scale of every 64 weights in 8 bits, not 32.")

    @property
    def bytes_a_weight(self) -> float:
        """Half a byte, and a scale for every 64; of scales in 8 bits, 4 bytes more for every 256."""
        return 0.5 + (1 + 4 / 256 if self.bnb_4bit_use_double_quant else 4) / 64


class Recipe(_Section):
    """One run. `train` holds RMSDConfig's arguments, transformers' own among them."""

    model: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        description="A folder, a hub id, a .gguf file, or a name that comes in wheels: " + ", ".join(WHEELS) + "."
    )
    task: str | None = _key(None, "A module of rmsd.tasks, or a Python file that defines TASK.")
    data: UserPath | None = _key(
        None, "In place of a task: JSONL rows of prompt and privileged_context; no evaluation."
    )
    rollouts: UserPath | None = _key(
        None, "JSONL rows with their completion: nothing is generated; with a task or alone."
    )
    environment: str | None = _key(
        None, "A Python file that defines ENVIRONMENT or TOOLS, which answers may call; or a task, for its own."
    )
    method: Literal["rmsd", "opsd"] = _key(
        "rmsd", "rmsd keeps what the judge finds relevant; opsd trains on every token."
    )
    engine: Literal["transformers", "vllm", "vllm_server"] = _key(
        "transformers", "transformers, vllm or vllm_server: who writes the rollouts."
    )
    seed: int = _key(0, "Seed of the sampling, the order of rows and new adapters.")
    output_dir: UserPath = _key(Path("runs/rmsd"), "The run's folder: checkpoints, records, model, report.")
    resume: bool = _key(False, "Go on from the folder's last checkpoint.")
    dry_run: bool = _key(False, "Check everything and print what the run would take; load, ask and write nothing.")
    dtype: Literal["float32", "bfloat16", "float16"] = _key(
        "float32", "float32, bfloat16 or float16: of the weights as loaded."
    )
    attn_implementation: str = _key(
        "auto", "How attention is computed, as transformers names it; auto takes flash-attn where it serves."
    )
    trust_remote_code: bool = _key(False, "Run code that comes with the model.")
    chat_template_kwargs: dict[str, bool | int | float | str] = _key({}, "Fixed variables of the chat template.")
    # For a dry run where the model's config.json cannot be read: model_type and dimensions.
    architecture: dict[str, Any] | None = _key(
        None, "What the model's config.json holds, for a dry run that cannot read it."
    )
    lora: LoraSection | None = _key(None, "Train a LoRA adapter; null trains all weights.")
    quantization: QuantizationSection | None = _key(
        None, "Quantization, by bitsandbytes, of the model that a LoRA is trained on."
    )
    judge: JudgeSection = JudgeSection()
    evaluate: EvaluateSection = EvaluateSection()
    train: dict[str, Any] = _key({}, "The trainer's arguments: below, and all of transformers.TrainingArguments.")


# These follow from the recipe's own keys; given twice they could disagree.
_DERIVED = {"output_dir", "seed", "method", "engine", "data_seed", "eval_strategy", "eval_steps", "eval_on_start"}
_TRAIN_KEYS = {field.name for field in dataclasses.fields(RMSDConfig) if field.init} - _DERIVED - NOT_HEEDED.keys()

_TRAIN_TYPES = typing.get_type_hints(RMSDConfig)


_SECTIONS = {
    "judge": JudgeSection,
    "evaluate": EvaluateSection,
    "lora": LoraSection,
    "quantization": QuantizationSection,
}


def keys() -> list[tuple[str, str, str]]:
    """(key, default, what it is) of every key of a recipe; of `train` those that RMSDConfig adds or changes."""
    found = []
    for prefix, section in (("", Recipe), *((f"{name}.", of) for name, of in _SECTIONS.items())):
        for name, key in section.model_fields.items():
            if prefix or name not in ("judge", "evaluate"):
                default = "needed" if key.is_required() else _shown(key.default)
                found.append((prefix + name, default, key.description))
    own = {name for name in RMSDConfig.__annotations__ if name in _TRAIN_KEYS}
    for key in dataclasses.fields(RMSDConfig):
        if key.name in own:
            made = key.default_factory is not dataclasses.MISSING
            default = _shown(key.default_factory() if made else key.default)
            found.append((f"train.{key.name}", default, key.metadata["help"]))
    return found


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


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
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
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
    if recipe.quantization and not (recipe.lora or adapted(recipe.model)):
        raise ValueError("quantization leaves the model's own weights as they are: set lora too, which is trained")
    if recipe.quantization and recipe.train.get("fsdp"):
        raise ValueError("train.fsdp does not shard quantised weights: leave out one of quantization, train.fsdp")
    if recipe.quantization and recipe.engine == "vllm":
        raise ValueError(
            "engine=vllm takes no quantised weights: use engine=transformers, or engine=vllm_server with a server "
            "that holds the model quantised alike"
        )
    return recipe


def _argument(key: str, value: Any) -> Any:
    """A value of `train` as its argument's own type: `no` is False for a bool, and stays a word for a strategy."""
    if key in NOT_HEEDED:
        raise ValueError(f"train.{key} is not heeded: {NOT_HEEDED[key]}")
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
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type") and key in _SECTIONS:
        return not_a_section(key, problem["input"], _SECTIONS[key].model_fields)
    if problem["type"] == "missing":
        return f"the recipe has no {key!r}"
    own = "; a judge of your own is RMSDTrainer's argument `judge`" if key == "judge.kind" else ""
    return f"{key}: {problem['msg'].lower()}, not {problem['input']!r}{own}"


def _unknown(key: str) -> str:
    own = [*Recipe.model_fields, *(f"train.{name}" for name in RMSDConfig.__annotations__ if name in _TRAIN_KEYS)]
    for name, section in _SECTIONS.items():
        own += [f"{name}.{field}" for field in section.model_fields]
    return unknown(key, [*own, *(f"train.{name}" for name in sorted(_TRAIN_KEYS))], own)


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
        raise ValueError(f"train: {first_line(error)}") from error
