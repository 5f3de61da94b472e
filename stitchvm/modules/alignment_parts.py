"""The networks of an alignment run, built once, outside of the LightningModule's tree.

They are frozen but for the policy's few weights. Were they in the tree, every strategy would broadcast, move and gather
them, and every checkpoint would have to leave them out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.adapters.policy import Policy
from stitchvm.modules.alignment_checks import check_generator
from stitchvm.modules.held_out import HeldOut
from stitchvm.modules.judges import encoded_alone
from stitchvm.modules.ranks import all_agree
from stitchvm.modules.rows import Rows
from stitchvm.modules.sampling_parts import check_latent_space, latent_size, release
from stitchvm.modules.sharding import shard_transformer
from stitchvm.path import levels, working_dtype
from stitchvm.rewards.base import NotFiniteError
from stitchvm.samplers.sde import check_levels
from stitchvm.schedule import sigma_grid
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.parts import Parts
from stitchvm.values.terms import Scored, value_and_terms

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["AlignmentParts"]


@dataclass
class AlignmentParts:
    """What an alignment run is made of, on its device.

    Attributes:
        generator: The generator.
        value: The value, frozen.
        policy: The trained weights and their copies.
        held_out: The evaluation.
        latent_size: Height and width of the latents.
        sigmas: The levels of roll-outs, σ_0 … σ_N, float32 on the CPU.
        sharded: Whether the transformer is sharded: every rank must then make the same calls of it.
        prompts: The sets of prompts that were seen to ahead.
    """

    generator: Any
    value: Value
    policy: Policy
    held_out: HeldOut
    latent_size: tuple[int, int]
    sigmas: Tensor
    sharded: bool
    prompts: list[list[str]]

    @classmethod
    def build(
        cls,
        module: Alignment,
        device: torch.device,
        mesh: Any = None,
        prompts: list[list[str]] | None = None,
    ) -> AlignmentParts:
        """Builds the parts of a module.

        Arguments:
            module: The module.
            device: Where they go.
            mesh: The ranks that the transformer is sharded over, if it is.
            prompts: Sets of prompts, which are encoded before anything else is there beside the generator, the held-out
                ones last.

        Raises:
            FileNotFoundError: If something cannot be found.
            ValueError: If they do not go together.
        """
        # Lightning makes the GPU the default device of new tensors here: what waits in CPU memory would be loaded
        # there, levels that are read one by one would lie there
        with torch.device("cpu"):
            return cls._build(module, device, mesh, prompts or [])

    @classmethod
    def _build(
        cls, module: Alignment, device: torch.device, mesh: Any, prompts: list[list[str]]
    ) -> AlignmentParts:
        # what is wrong is said before work begins
        for path in module.value_factory.sources().values():
            StitchedValueModel.read(path)
        parts = Parts(module.reward_factory, module.generator_factory)
        generator: Any = parts.generator
        check_generator(generator)
        generator.to(device)  # before a value borrows its weights
        size = latent_size(generator, module.size)
        encode_ahead(generator, prompts, module.prompts_ahead)
        value = module.value_factory(parts).to(device)  # before adapters are there, to be hashed
        check_latent_space(value, generator.vae)
        held_out = HeldOut(
            module.evaluation, parts, module.reward_factory, device, size, module.seed
        )
        if prompts:
            held_out.judges.check_prompts(prompts[-1])
        release(value, None, held_out.judges)
        total = sum(p.numel() for p in generator.transformer.parameters())
        policy = module.policy_factory(generator.transformer, copies=module.copies)
        if isinstance(policy, PolicyWeights) and module.needs_frozen:
            policy.keep_base()
        generator.to(device)
        if module.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        if mesh is not None:
            check_equal_calls(held_out.sampler.micro_batch)
            adapters = policy if isinstance(policy, PolicyAdapters) else None
            shard_transformer(
                generator.transformer, mesh, None if adapters is None else all_weights(adapters)
            )
        sigmas = schedule(module, generator, size)
        trained = sum(p.numel() for p in policy.parameters().values())
        rank_zero_info(
            f"{type(module).__name__} trains {trained / 1e6:.2f} M weights ({type(policy).__name__}) on the "
            f"{total / 1e6:.0f} M of {generator.id}"
        )
        sharded = mesh is not None
        return cls(generator, value, policy, held_out, size, sigmas, sharded, prompts)

    def encode_new(self, prompts: list[list[str]], limit: int) -> None:
        """Encodes the prompts of another run, if there are at most `limit` distinct ones."""
        if prompts != self.prompts:
            encode_ahead(self.generator, prompts, limit)
            self.prompts = prompts

    @torch.no_grad()
    def conditions(self, rows: Rows) -> Any:
        """Returns the conditions of images' prompts."""
        for prompt in encoded_alone(rows.prompts, rows.device):
            self.generator.encode_prompts([prompt])
        return self.generator.encode_prompts(rows.prompts)

    def score(self, rows: Rows, z: Tensor, tau: Tensor | float) -> Scored:
        """Returns the values of latents, differentiable in z; all NaN where a reward is not finite.

        An exception on one rank alone would leave the others waiting for it. If the transformer is sharded, all ranks
        have NaN together, since gradients through a shared prefix are calls of all of them, too.

        Arguments:
            rows: The images.
            z: Their latents, with shape (B, C, H, W).
            tau: Their level.
        """
        for prompt in encoded_alone(rows.prompts, rows.device):
            self.value.encode_text([prompt])
        bound = self.value.bind(list(rows.prompts), generator=rows.streams("value"))
        found: Scored | None = None
        try:
            scored = value_and_terms(bound, z, levels(tau, z))
            found = replace(scored, value=scored.value.to(working_dtype(scored.value)))
        except NotFiniteError as error:
            # by whichever rank it is: the first may know nothing of it
            warnings.warn(f"update {rows.update}: {error}", stacklevel=2)
        if self.sharded and not all_agree(found is not None, z.device):
            found = None
        return found or Scored(z.float().flatten(1).sum(1) * torch.nan)


def prompts_of(trainer: Trainer | None) -> list[list[str]]:
    """Returns the prompts of a run's data, those it is trained on, if it is, before those that are held out."""
    if trainer is None:
        return []
    names = ["train_data"] * (trainer.state.fn == "fit") + ["val_data"]
    sets = [getattr(trainer.datamodule, name, None) for name in names]
    return [list(each.prompts) for each in sets if each is not None]


def encode_ahead(generator: Any, prompts: Sequence[Sequence[str]], limit: int) -> None:
    """Encodes prompts and frees the text encoders, if there are at most `limit` distinct ones."""
    distinct = list(dict.fromkeys(prompt for each in prompts for prompt in each))
    if distinct and len(distinct) <= limit:
        rank_zero_info(f"encoding {len(distinct)} prompts")
        with torch.no_grad():
            generator.encode_ahead(distinct)


def check_equal_calls(micro_batch: int | None) -> None:
    """Raises ValueError if the ranks of a sharded transformer would call it unequally often in an evaluation."""
    if micro_batch is not None:
        raise ValueError(
            f"model.evaluation.sampler.micro_batch = {micro_batch} with a sharded transformer: ranks with one prompt "
            "more would make one call more, and wait for ever. Set it to null and lower data.batch_size."
        )


def schedule(module: Alignment, generator: Any, size: tuple[int, int]) -> Tensor:
    """Returns the levels of roll-outs, float32 on the CPU."""
    if module.grid == "pipeline":
        return check_levels(generator.sigmas(module.num_steps, size))
    return sigma_grid(module.num_steps, shift=module.shift, kind=module.grid)


def all_weights(policy: PolicyAdapters) -> list[Any]:
    """Returns the weights of an adapter and of its copies."""
    names = ("default", *policy.copies)
    return [p for name in names for p in policy.parameters(name).values()]
