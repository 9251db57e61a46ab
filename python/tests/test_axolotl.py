"""The axolotl plugin, and the YAML that uses it."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import axolotl_stub
import pytest
import tiny_models
import yaml
from axolotl_stub import Config
from conftest import Sources, hub_snapshot
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner

import prequant_loader.peft

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "qwen3-30b-a3b-qlora.yaml"
OPTIONS = {line for line in (HERE / "axolotl_keys.txt").read_text().splitlines() if not line.startswith("#")}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin as axolotl makes it: imported by the name in the YAML, called without arguments."""
    prequant_loader.peft._restore_peft()
    axolotl_stub.install(monkeypatch)
    module, _, name = example()["plugins"][0].rpartition(".")
    yield getattr(importlib.import_module(module), name)()
    sys.modules.pop(module, None)
    prequant_loader.peft._restore_peft()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 4-bit weights, as far as the plugin looks."""
    folder = tmp_path / "folder"
    folder.mkdir()
    weight_map = {"w": "model-1.safetensors", "w.quant_state.bitsandbytes__nf4": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def example() -> dict[str, Any]:
    return yaml.safe_load(EXAMPLE.read_text())


# --- Hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_have_the_names_and_arguments_of_axolotl(plugin: Any) -> None:
    assert isinstance(plugin, axolotl_stub.BasePlugin)
    hooks = {name for name, value in vars(type(plugin)).items() if inspect.isfunction(value)}
    assert hooks == {"pre_model_load", "post_model_build", "pre_lora_load", "post_lora_merge"}
    for hook in hooks:
        ours, theirs = (inspect.signature(getattr(owner, hook)) for owner in (type(plugin), axolotl_stub.BasePlugin))
        assert list(ours.parameters) == list(theirs.parameters)


def test_peft_is_fixed_after_axolotl_has_patched_it(plugin: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl's patch takes the parameters in another order, unless it quantized them itself."""
    before = ParamWrapper._activate_lora
    plugin.pre_model_load(Config(base_model=str(folder), adapter="qlora", load_in_4bit=True))
    model = tiny_models.quantized_model()
    for _ in range(2):
        monkeypatch.setattr(BaseTuner, "_inject_parameters", lambda *_: pytest.fail("axolotl's"))
        plugin.pre_lora_load(Config(), model)
        assert ParamWrapper._activate_lora is not before
        assert BaseTuner._inject_parameters is prequant_loader.peft._inject_parameters


def test_quantize_moe_experts_is_an_error(plugin: Any, folder: Path) -> None:
    before = ParamWrapper._activate_lora
    with pytest.raises(ValueError, match="remove quantize_moe_experts from the YAML"):
        plugin.pre_model_load(Config(base_model=str(folder), quantize_moe_experts=True))
    assert ParamWrapper._activate_lora is before


@pytest.mark.parametrize("base_model", ["", None, "."])
def test_another_base_model_is_an_error(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_model: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="aren't 4-bit ones.*prequant convert"):
        plugin.pre_model_load(Config(base_model=base_model))


def test_base_model_may_be_any_place_with_4_bit_weights(plugin: Any, sources: Sources, tmp_path: Path) -> None:
    """What `save_pretrained` wrote, one file, and a repository in the hub's cache, none of which has a manifest."""
    converted = sources.converted("qwen3_moe", "--experts", "fuse")
    model = sources.model_class("qwen3_moe").from_pretrained(converted)
    model.save_pretrained(tmp_path / "saved")
    plugin.pre_model_load(Config(base_model=str(tmp_path / "saved")))
    with pytest.raises(ValueError, match="aren't 4-bit ones"):
        plugin.pre_model_load(Config(base_model=str(sources.source("qwen3_moe"))))


def test_base_model_may_be_on_the_hub(plugin: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_snapshot(tmp_path, folder, monkeypatch)
    assert not (snapshot / "prequant.json").exists()
    plugin.pre_model_load(Config(base_model="owner/name"))


def test_a_merged_model_has_nothing_left_of_the_4_bit_folder(plugin: Any, sources: Sources, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(sources.converted("qwen3_moe", "--guard", "strict"), merged, ignore=shutil.ignore_patterns("*.safetensors*"))
    assert (merged / "README.md").exists() and "experts_implementation" in (merged / "config.json").read_text()
    plugin.post_lora_merge(Config(), "adapter", str(merged))
    assert [path.name for path in sorted(merged.iterdir())] == ["config.json", "generation_config.json"]
    assert "experts_implementation" not in json.loads((merged / "config.json").read_text())
    (merged / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\n## Loading the 4-bit experts\n\nprequant quantized\n")
    plugin.post_lora_merge(Config(), "adapter", str(merged))
    assert (merged / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_a_staged_loading_that_isnt_known_is_an_error(plugin: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later axolotl may have: the same question, and other modules behind it."""
    nf4 = ModuleType("axolotl.loaders.nf4")
    nf4.uses_staged_nf4 = lambda cfg: bool(cfg.qlora_sharded_model_loading)
    for name, module in {"axolotl.loaders": ModuleType("axolotl.loaders"), "axolotl.loaders.nf4": nf4}.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "prequant_loader.axolotl_staged", raising=False)
    plugin.pre_model_load(Config(base_model=str(folder)))
    with pytest.raises(ImportError, match="remove qlora_sharded_model_loading"):
        plugin.pre_model_load(Config(base_model=str(folder), qlora_sharded_model_loading=True))


def test_post_model_build_marks_4_bit_experts(plugin: Any) -> None:
    model = tiny_models.quantized_model()
    model._moe_experts_quantized = False  # what axolotl has set by now
    plugin.post_model_build(Config(), model)
    assert model._moe_experts_quantized is True


def test_post_model_build_leaves_other_models_alone(plugin: Any) -> None:
    model = tiny_models.bf16_model()
    model._moe_experts_quantized = False
    plugin.post_model_build(Config(), model)
    assert model._moe_experts_quantized is False


def test_the_package_needs_no_axolotl() -> None:
    """Importing the plugin without axolotl says what is missing; everything else imports."""
    code = (
        "import sys; sys.modules['axolotl'] = None\n"
        "import prequant_loader.peft\n"
        "try: import prequant_loader.axolotl\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "axolotl" in done.stdout


# --- The example -----------------------------------------------------------------------------------------------------


def test_example_has_only_options_that_axolotl_knows() -> None:
    config = example()
    assert config.keys() <= OPTIONS, config.keys() - OPTIONS
    for dataset in config["datasets"]:
        assert {f"datasets.{key}" for key in dataset} <= OPTIONS, dataset


def test_what_the_readme_adds_for_fsdp2_is_known_too() -> None:
    readme = (EXAMPLE.parent / "README.md").read_text()
    snippet = yaml.safe_load(readme.partition("Add to the YAML:\n")[2].partition("\n- ")[0])
    assert snippet["qlora_sharded_model_loading"] is True
    assert snippet.keys() <= OPTIONS, snippet.keys() - OPTIONS


def test_a_misspelt_option_would_be_noticed() -> None:
    assert {"lora_target_parameter", "lora_targets", "datasets.message_field"}.isdisjoint(OPTIONS)


def test_example_is_a_qlora_run_that_the_plugin_accepts(plugin: Any, folder: Path) -> None:
    config = Config(example(), base_model=str(folder))
    plugin.pre_model_load(config)
    assert (config.adapter, config.load_in_4bit) == ("qlora", True)
    assert config.lora_dropout == 0, "axolotl refuses dropout next to lora_target_parameters"
    assert "quantize_moe_experts" not in config and "lora_target_linear" not in config


def test_example_trains_attention_and_experts(plugin: Any, folder: Path) -> None:
    """On a tiny model of the same type, with a LoraConfig made as axolotl makes it."""
    config = Config(example(), base_model=str(folder))
    plugin.pre_model_load(config)
    base = tiny_models.quantized_model("qwen3_moe")
    plugin.pre_lora_load(config, base)
    model = get_peft_model(
        base,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            target_parameters=config.lora_target_parameters,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    assert len(model.base_model.targeted_module_names) == 2 * 4
    assert len(model.base_model.targeted_parameter_names) == 2 * 2
