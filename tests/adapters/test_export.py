"""Exports, loaded by the pipelines and libraries that users load them with: the images are identical."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stitchvm.adapters.export import WEIGHTS, export_lora, lora_card, merged_transformer
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.hub import resolve
from tests.adapters.test_policy import INPUT, make
from tests.tiny import SD3_CONFIG, randomize

CLASSES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}


def pipeline_of(family: str) -> Any:
    pipeline = CLASSES[family].from_pretrained(resolve(f"world:{family}"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any) -> Tensor:
    """An image of two steps."""
    side = pipeline.vae_scale_factor * 16
    images = pipeline(
        "a red circle",
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        height=side,
        width=side,
        output_type="pt",
    ).images
    return images


@torch.no_grad()
def trained(transformer: Any, **options: Any) -> PolicyAdapters:
    """A policy whose adapters do something, each something else."""
    policy = PolicyAdapters(transformer, **{"r": 4, "alpha": 8, **options})
    for number, name in enumerate(("default", "old", "ema")):
        source = torch.Generator().manual_seed(number)
        for key, p in policy.parameters(name).items():
            if ".lora_B." in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=source))
    return policy


@pytest.fixture(scope="module", params=["sd3", "flux"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A policy on a pipeline of the embedded world, its images and its export."""
    family = request.param
    pipeline = pipeline_of(family)
    images = {"base": picture(pipeline)}
    policy = trained(pipeline.transformer, attn2=family == "sd3")
    images["default"] = picture(pipeline)
    with policy.use("ema"):
        images["ema"] = picture(pipeline)
    folder = tmp_path_factory.mktemp(family)
    for name in ("default", "ema"):
        export_lora(policy, folder / name, base_model=f"world:{family}", name=name)
    return {"family": family, "policy": policy, "images": images, "folder": folder}


def test_pipelines_load_it_and_paint_the_same_image(run: dict[str, Any]) -> None:
    images, pipeline = run["images"], pipeline_of(run["family"])
    assert (images["default"] - images["base"]).abs().max() > 0.05
    assert not torch.equal(images["ema"], images["default"])
    for name in ("default", "ema"):
        pipeline.load_lora_weights(str(run["folder"] / name), adapter_name=name)
        pipeline.set_adapters(name)
        assert torch.equal(picture(pipeline), images[name])
    config = pipeline.transformer.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 8)
    policy = run["policy"]
    found = [n for n, m in pipeline.transformer.named_modules() if hasattr(m, "lora_A")]
    assert found == policy.modules
    layer = pipeline.transformer.get_submodule(found[0])
    assert layer.scaling == {"default": 2.0, "ema": 2.0}
    pipeline.unload_lora_weights()
    assert torch.equal(picture(pipeline), images["base"])


def test_whoever_may_read_a_new_file_may_read_the_weights(run: dict[str, Any]) -> None:
    folder = run["folder"] / "ema"
    (folder / "usual").touch()
    usual = (folder / "usual").stat().st_mode
    (folder / "usual").unlink()
    modes = {f.relative_to(folder).as_posix(): f.stat().st_mode for f in folder.rglob("*.s*")}
    assert modes == dict.fromkeys([WEIGHTS, "peft/adapter_model.safetensors"], usual)


def test_the_file_holds_the_weights_and_their_scale(run: dict[str, Any]) -> None:
    file = run["folder"] / "ema" / WEIGHTS
    weights = run["policy"].weights("ema")
    held = load_file(file)
    assert held.keys() == {f"transformer.{key}" for key in weights}
    assert all(torch.equal(held[f"transformer.{k}"], v) for k, v in weights.items())
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata == {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.target_modules": run["policy"].targets,
    }


def test_readers_without_metadata_get_a_folded_scale(run: dict[str, Any], tmp_path: Path) -> None:
    pipeline = pipeline_of(run["family"])
    options = {"base_model": "world", "fold_scale": True}
    export_lora(run["policy"], tmp_path / "folded", **options)
    held = load_file(tmp_path / "folded" / WEIGHTS)
    save_file(held, tmp_path / WEIGHTS)  # the metadata is gone
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.equal(picture(pipeline), run["images"]["default"])
    # which the plain file would not survive
    plain = load_file(run["folder"] / "default" / WEIGHTS)
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / WEIGHTS)
    pipeline = pipeline_of(run["family"])
    pipeline.load_lora_weights(str(tmp_path / "plain"))
    assert not torch.equal(picture(pipeline), run["images"]["default"])


def test_peft_loads_its_folder(run: dict[str, Any]) -> None:
    pipeline = pipeline_of(run["family"])
    folder = run["folder"] / "default" / "peft"
    model = PeftModel.from_pretrained(pipeline.transformer, folder)
    pipeline.transformer = model.base_model.model
    assert torch.equal(picture(pipeline), run["images"]["default"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == f"world:{run['family']}/transformer"


def test_merging_makes_a_plain_copy(run: dict[str, Any], tmp_path: Path) -> None:
    policy, images = run["policy"], run["images"]
    before = policy.state()
    pipeline = pipeline_of(run["family"])
    base = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
    merged = merged_transformer(policy)
    assert merged.state_dict().keys() == base.keys() and type(merged) is type(pipeline.transformer)
    module = policy.modules[0]
    a, b = (before[f"default.{module}.lora_{half}.weight"] for half in "AB")
    expected = base[f"{module}.weight"] + 2.0 * b @ a
    assert torch.allclose(merged.state_dict()[f"{module}.weight"], expected, atol=1e-7)
    merged.save_pretrained(tmp_path)
    pipeline.transformer = type(merged).from_pretrained(tmp_path)
    assert (picture(pipeline) - images["default"]).abs().max() < 1e-3
    # the policy is as it was
    assert all(torch.equal(value, before[key]) for key, value in policy.state().items())
    with policy.off():
        weight = policy.transformer.get_submodule(module).base_layer.weight
        assert torch.equal(weight, base[f"{module}.weight"])


def test_bfloat16_runs_as_the_loading_pipeline_does() -> None:
    """Adapters are trained in float32 and applied in bfloat16, as a bfloat16 pipeline applies them."""
    frozen = randomize(SD3Transformer2DModel(**{**SD3_CONFIG, "num_layers": 2})).bfloat16()
    other = copy.deepcopy(frozen)
    policy = trained(frozen)
    assert {p.dtype for p in policy.trainable()} == {torch.float32}
    adapter = {f"transformer.{key}": value for key, value in policy.weights().items()}
    config = {"r": 4, "lora_alpha": 8, "target_modules": policy.targets}
    other.load_lora_adapter(adapter, metadata={f"transformer.{k}": v for k, v in config.items()})
    batch = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in INPUT.items()}
    assert torch.equal(other(**batch)[0], frozen(**batch)[0])
    frozen.bfloat16()
    with pytest.raises(RuntimeError, match=r"in \['torch.bfloat16'\], expected float32"):
        policy.state()


def test_card_and_overwriting(run: dict[str, Any], tmp_path: Path) -> None:
    card = (run["folder"] / "ema" / "README.md").read_text()
    layers = len(run["policy"].modules)
    assert f"adapter: ema, rank 4, alpha 8, {layers} layers" in card
    assert (
        f"{CLASSES[run['family']].__name__}.from_pretrained" in card and "base_model:" not in card
    )
    assert 'pipeline("a prompt", guidance_scale=1.0)' in card
    text = lora_card(run["policy"], "org/model", "FluxPipeline", method="DRaFT-1.", table="| a |")
    assert (
        "base_model: org/model\n" in text and "DRaFT-1." in text and "## Measured\n\n| a |" in text
    )
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_lora(run["policy"], run["folder"] / "ema", base_model="world")
    weights = run["policy"].weights("old")
    given = export_lora(
        run["policy"],
        run["folder"] / "ema",
        base_model="world",
        weights=weights,
        card="mine",
        overwrite=True,
    )
    assert (given / "README.md").read_text() == "mine"
    held = load_file(given / WEIGHTS)
    assert all(torch.equal(held[f"transformer.{key}"], value) for key, value in weights.items())
    export_lora(
        run["policy"],
        run["folder"] / "ema",
        base_model=f"world:{run['family']}",
        name="ema",
        overwrite=True,
    )


def test_unknown_transformers_have_no_pipeline(tmp_path: Path) -> None:
    policy = make("lora")
    policy.transformer.__class__ = type("Other", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match="no pipeline is known for a Other"):
        export_lora(policy, tmp_path, base_model="x")
