"""Parts of the library on a pretended GPU, against the same on the CPU; and the pretence itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from PIL import Image
from torch import nn

from stitchvm import sample
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.backbones.flux import FluxBackbone
from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.diffusers_native import FKCallback, GuidanceCallback
from stitchvm.generator import Generator
from stitchvm.metrics.correlation import SpearmanCorrelation
from stitchvm.metrics.items import ItemMean
from stitchvm.metrics.preference import PreferenceAccuracy
from stitchvm.metrics.retrieval import RetrievalRecall
from stitchvm.metrics.truth import TruthError
from stitchvm.modules.sample_lines import trajectories
from stitchvm.path import FlowPath
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.imagereward import ImageReward
from stitchvm.rewards.pickscore import PickScoreReward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.samplers.base import Sampler, value_streams
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.field import Field
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.scheduler import sde_scheduler
from stitchvm.samplers.svdd import SVDD
from stitchvm.schedule import CenterBiased, Fixed, LogitNormal, Uniform
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.monte_carlo import MonteCarloFactory
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.terminal import TerminalFactory
from stitchvm.values.tweedie import TweedieFactory
from stitchvm.values.weighted import Term, WeightedFactory, measured_constants
from tests.modules.sampling_runs import value_model
from tests.pretend_cuda import back, pretend_cuda
from tests.rewards import published
from tests.rewards.tiny import head_file
from tests.tiny import SD3_CONFIG

PROMPTS = ["a red circle", "a blue square"]


def mixed(cpu: torch.Tensor, gpu: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Returns what a GPU refuses."""
    index = torch.tensor([1, 0])
    return {
        "add": lambda: gpu + cpu,
        "add one": lambda: gpu + cpu[0, :1],
        "into the cpu": lambda: cpu.add_(gpu),
        "cat": lambda: torch.cat([gpu, cpu]),
        "stack of scalars": lambda: torch.stack([gpu[0, 0], torch.tensor(1.0)]),
        "where": lambda: torch.where(gpu > 0, gpu, cpu),
        "matmul": lambda: gpu @ cpu.T,
        "linear": lambda: nn.Linear(3, 2)(gpu),
        "cpu[gpu]": lambda: cpu[index.to("cuda")],
        "gpu[...] = cpu": lambda: gpu.__setitem__(index.to("cuda"), cpu),
        "gather": lambda: gpu.gather(0, index[:, None]),
        "embedding": lambda: nn.functional.embedding(index, gpu),
        "out": lambda: torch.add(gpu, 1, out=cpu),
        "generator": lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
        "in place": lambda: gpu.normal_(generator=torch.Generator()),
        "of the gpu": lambda: torch.rand(2, generator=torch.Generator("cuda")),
        "numpy": lambda: gpu.numpy(),
    }


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretend_cuda():
        cpu = torch.ones(2, 3)
        gpu = cpu.to("cuda")
        for name, work in mixed(cpu, gpu).items():
            with pytest.raises((RuntimeError, TypeError)):
                print(name, work())


def test_what_a_gpu_does_is_done() -> None:
    with pretend_cuda() as cuda:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x.device == cuda and x.is_cuda and x.to("cuda") is x and x.float() is x
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and float(x[1, 2]) == 5 and bool((x > 4).any())
        assert (x + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert x[torch.tensor([1])].tolist() == x[[1]].tolist() == [[3, 4, 5]]
        assert x.nonzero().device == torch.tensor([1.0], device="cuda").device == cuda
        x[0], x[1, 0] = torch.ones(3), 7.0
        assert x.cpu().numpy().tolist() == [[1, 1, 1], [7, 4, 5]]
        with torch.device("cuda"):
            assert torch.zeros(2).device == cuda
        with torch.device("meta"):
            assert nn.Linear(2, 2).weight.is_meta
        net = nn.Linear(3, 1)
        weight = net.weight
        net.to("cuda")
        assert net.weight is weight and weight.device == cuda
        for fused in (False, True):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
            net(x).sum().backward()
            assert weight.grad is not None and weight.grad.tolist() == [[8, 5, 6]]
            optimizer.step()
            optimizer.zero_grad()
        assert net.cpu().weight is weight and weight.device.type == "cpu"


def test_adapters_are_the_same_where_the_gpu_is_the_default_device() -> None:
    """As in Lightning's `configure_model`: the generator of A is one of the CPU."""

    def made() -> Any:
        network = SD3Transformer2DModel(**SD3_CONFIG)
        return PolicyAdapters(network, r=2, alpha=4).parameters()

    here = made()
    with pretend_cuda(), torch.device("cuda"):
        there = made()
        assert {p.device.type for p in there.values()} == {"cuda"}
        for key, value in back(there).items():
            assert torch.equal(value, here[key]), key


def both(work: Callable[[str], Any], rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Requires work on a device, nested tensors and numbers, to give the same there as on the CPU."""
    torch.manual_seed(0)
    here = back(work("cpu"))
    torch.manual_seed(0)
    with pretend_cuda():
        there = back(work("cuda"))
    torch.testing.assert_close(there, here, rtol=rtol, atol=atol, equal_nan=True)


def test_path_and_schedule() -> None:
    def work(device: str) -> Any:
        z, eps = torch.randn(2, 2, 4, 1, 1).to(device).unbind()
        u, path = z - eps, FlowPath()
        found: list[Any] = []
        for t in (0.5, torch.tensor(0.5), torch.tensor([0.1, 0.2, 0.5, 0.9])[:2].to(device)):
            for name in ("denoise", "noise", "score", "velocity_from_denoised", "interpolate"):
                found.append(getattr(path, name)(z, u, t))
            bridge = path.bridge(0.05 if isinstance(t, float) else 0.1 * t, t)
            found.append([bridge.anchor_weight, bridge.d_sigma])
            found.append(bridge.interpolate(z, eps))
        generator = torch.Generator(device).manual_seed(0)
        for law in (Uniform(stratified=True), CenterBiased(), LogitNormal(), Fixed()):
            drawn = law.sample(4, generator, device=device)
            assert drawn.device.type == law.sample(4, generator).device.type == device
            found.append(drawn)
        return found

    both(work)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_networks(family: str, request: pytest.FixtureRequest) -> None:
    """A backbone of its own, the generator with guidance, and the VAE, forwards and backwards."""
    folder = str(request.getfixturevalue(f"tiny_{family}"))

    def work(device: str) -> Any:
        cls = SD3Backbone if family == "sd3" else FluxBackbone
        backbone = cls(folder, dtype="float32", null_tokens=4).to(device)
        generator = Generator(folder, text_tokens=12, guidance_scale=3.5).to(device)
        z = torch.randn(2, generator.latent_channels, 8, 8).to(device).requires_grad_()
        t = torch.tensor([0.3, 0.8], device=device)
        h = backbone(z, t, 2)
        found = [h, backbone.suffix(backbone.advance(backbone.prefix(z, t, 2)))]
        cond = generator.encode_prompts(PROMPTS)
        assert cond.tokens.device.type == device
        state = generator.null_branch().prefix(z, t, 2)
        if generator.runs_null_branch():
            found += generator.velocity_parts(z, t, cond, prefix=state)
        found.append(generator.velocity(z, t, cond))
        noise = torch.Generator(device).manual_seed(0)
        pixels = generator.vae.decode(z)
        found += [pixels, generator.vae.encode(pixels, noise, sample=True)]
        found.append(generator.sigmas(3, (8, 8)))
        return [*found, torch.autograd.grad(sum(x.sum() for x in found[:-1]), z)[0]]

    both(work)


@pytest.fixture(scope="module")
def value_folder(tiny_sd3: Path, tiny_clip: Path, tmp_path_factory: Any) -> str:
    """Returns a value model on the first two blocks of the tiny SD3."""
    return str(value_model(tiny_sd3, tiny_clip, tmp_path_factory.mktemp("value")))


@pytest.fixture
def on(tiny_sd3: Path, tiny_clip: Path, value_folder: str) -> Callable[[str], Any]:
    return builder(tiny_sd3, tiny_clip, value_folder)


def builder(tiny_sd3: Path, tiny_clip: Path, value_folder: str) -> Callable[[str], Any]:
    """Returns what builds a generator and values on a device."""

    def built(device: str) -> tuple[Generator, dict[str, Value]]:
        generator = Generator(str(tiny_sd3), text_tokens=12, guidance_scale=3.5)
        parts = Parts(lambda: CLIPReward(model=f"local-dir:{tiny_clip}"), lambda: generator)
        generator.to(device)
        tweedie = TweedieFactory(velocity="cfg")
        shared = StitchedFactory(value_folder, share_generator=True)
        factories: dict[str, ValueFactory] = {
            "shared": shared,
            "stitched": StitchedFactory(value_folder),
            "vae_tweedie": TweedieFactory(checkpointing=True),
            "tweedie": tweedie,
            "monte_carlo": MonteCarloFactory(2, 2, use_prompts=True),
            "terminal": TerminalFactory(),
            "sum": WeightedFactory({"a": Term(shared), "b": Term(tweedie, 0.5)}),
        }
        return generator, {k: make(parts).to(device) for k, make in factories.items()}

    return built


def test_values(on: Callable[[str], Any]) -> None:
    """Every estimator, bound to prompts, as `Field` asks it, with its gradient."""

    def work(device: str) -> Any:
        generator, values = on(device)
        z = torch.randn(3, 4, 8, 8).to(device)
        found: dict[str, Any] = {}
        for name, value in values.items():
            level = torch.tensor(0.0 if name == "terminal" else 0.6)
            bound = value.bind(PROMPTS, generator=value_streams([0, 1]))
            field = Field(generator, PROMPTS, None, bound)
            row = torch.tensor([0, 0, 1])
            found[name] = field.value(z, level, row)[0]
            if name != "monte_carlo":
                v, gradient, left = field.value_gradient(z, level, row)
                found[name] = found[name], v, gradient
                field.velocity(z, level, row, left)
            field.bound.select(row.to(device))
        spread = measured_constants(values["sum"], z, torch.tensor([0.6], device=device), [""])
        return found, spread

    both(work)


SAMPLERS: dict[str, tuple[str, Callable[..., Sampler]]] = {
    "plain": ("", PlainSampler),
    "exact": ("shared", partial(GuidedSampler, mode="exact")),
    "cfg_rms": ("tweedie", partial(GuidedSampler, mode="cfg_rms", micro_batch=1)),
    "fk": ("shared", partial(FKSteering, 2, 2, resample_every=1, ess_threshold=0.9)),
    "fk_sum": ("sum", partial(FKSteering, 2, resample_every=1, final="sample", potential="max")),
    "fk_parent": ("terminal", partial(FKSteering, 2, resample_every=1, score="parent")),
    "best_of_n": ("stitched", partial(BestOfN, 2)),
    "svdd": ("tweedie", partial(SVDD, 2)),
}


def test_samplers(on: Callable[[str], Any]) -> None:
    def work(device: str) -> Any:
        generator, values = on(device)
        found = {}
        for name, (value, make) in SAMPLERS.items():
            final = values["terminal"] if name in ("fk", "svdd", "best_of_n") else None
            run = make(num_steps=3)(generator, PROMPTS, values.get(value), final_value=final)
            assert run.latents.device.type == device
            found[name] = [run.latents, trajectories(run)]
            assert (run.final_values is None) == (run.particles.shape[1] == 1)
        return found

    both(work, rtol=1e-2, atol=1e-3)


def rewards(tiny_clip: Path, folder: Path) -> dict[str, Callable[[], Reward]]:
    """Returns what builds one reward of each kind."""
    clip, head = f"local-dir:{tiny_clip}", str(head_file(folder / "head.pth"))
    return {
        "clip": partial(CLIPReward, model=clip),
        "bfloat16": partial(CLIPReward, model=clip, dtype="bfloat16"),
        "aesthetic": partial(AestheticReward, model=clip, head=head),
        "pickscore": partial(PickScoreReward, str(published.pickscore_folder(folder / "pick"))),
        "imagereward": partial(ImageReward, str(published.imagereward_folder(folder / "blip"))),
    }


def test_rewards(tiny_clip: Path, tmp_path: Path) -> None:
    """Scores and their gradients, of towers that stay, wait in CPU memory, or begin late."""
    factories = rewards(tiny_clip, tmp_path)

    def work(device: str) -> Any:
        x = torch.rand(2, 3, 20, 24).to(device).requires_grad_()
        found: dict[str, Any] = {}
        made = {name: make().to(device) for name, make in factories.items()}
        parts = {name: factories[name] for name in ("clip", "aesthetic")}
        made["sum"] = WeightedReward(parts, {"clip": 0.5}).to(device)
        for name, reward in made.items():
            text = reward.encode_text(PROMPTS) if reward.uses_text else None
            r = reward(x, text)
            assert r.device.type == device
            found[name] = [r, torch.autograd.grad(r.sum(), x)[0]]
            if name in ("clip", "aesthetic"):
                h, cls = reward.prefix(x, 2), reward.class_tokens(x, [2])[2]
                found[name].append(reward.tail(2).to(device)(h, cls).image)
        for name in ("clip", "aesthetic", "pickscore", "imagereward"):
            reward = made[name]
            reward.park()
            text = reward.encode_text([*PROMPTS, "above"])[:2] if reward.uses_text else None
            with torch.no_grad():
                found[name].append(reward.score(reward.embed(x).image, text))
            assert {p.device.type for p in reward.parameters()} <= {"cpu", device}
        return found

    both(work, rtol=1e-2, atol=1e-3)  # bfloat16


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_callbacks(family: str, tiny_clip: Path, request: pytest.FixtureRequest) -> None:
    """Guidance and resampling in diffusers' own pipeline, by a value on its transformer."""
    folder = request.getfixturevalue(f"tiny_{family}")

    def work(device: str) -> Any:
        pipe = DiffusionPipeline.from_pretrained(folder).to(device)
        pipe.set_progress_bar_config(disable=True)
        generator = Generator.from_pipeline(pipe, guidance_scale=3.5, text_tokens=12)
        reward = CLIPReward(model=f"local-dir:{tiny_clip}")
        torch.manual_seed(1)
        model = StitchedValueModel(generator.null_branch(), reward, (2, 1))
        value = StitchedValue(model.eval().requires_grad_(False)).to(device)
        size = {"height": 16, "width": 16}
        found = []
        for callback, count in (
            (GuidanceCallback(value, PROMPTS, mode="exact", **size), 1),
            (FKCallback(value, PROMPTS, particles=2, resample_every=1, **size), 2),
        ):
            if count > 1:
                pipe.scheduler = sde_scheduler(pipe.scheduler)
            found.append(
                pipe(
                    PROMPTS,
                    num_images_per_prompt=count,
                    num_inference_steps=3,
                    max_sequence_length=12,
                    generator=torch.Generator(device).manual_seed(0),
                    output_type="latent",
                    callback_on_step_end=callback,
                    **size,
                ).images
            )
        images = [Image.new("RGB", (1, 1)) for _ in range(4)]
        assert len(callback.best(images)) == 2
        sampled = sample(pipe, PROMPTS, value, "fk", num_steps=2, particles=2, **size)
        return [*found, sampled.samples.latents]

    both(work, rtol=1e-2, atol=1e-3)


def test_metrics() -> None:
    def work(device: str) -> Any:
        n, index = 6, torch.arange(6, device=device)
        x = torch.randn(n, 4).to(device)
        retrieval = RetrievalRecall(ks=(1,)).to(device)
        retrieval.update(x, index, x + 0.5, index)
        preference = PreferenceAccuracy().to(device)
        preference.update(x[:, 0], (index % 3).float(), index // 3, index)
        spearman = SpearmanCorrelation().to(device)
        spearman.update(x[:, 0], x[:, 1], index)
        truth = TruthError(resamples=8).to(device)
        truth.update(x[:, 0], x[:, 1], x[:, 2], index)
        mean = ItemMean().to(device)
        mean.update(x[:, 0], index)
        found = [retrieval.compute(), preference.compute(), spearman.compute(), truth.compute()]
        found.append({"mean": mean.compute()})
        return [{k: [v.value, v.stderr] for k, v in each.items()} for each in found]

    both(work)
