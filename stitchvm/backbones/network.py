"""What the transformer backbones share: loading, the null text, running blocks, going on to the velocity."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stitchvm.backbones.base import Backbone, PrefixState
from stitchvm.backbones.loading import build_truncated, dtype_name, parse_dtype, read_config
from stitchvm.backbones.lora import adapters_off
from stitchvm.backbones.null_text import null_condition
from stitchvm.backbones.text import Condition, TextEncoders


class NetworkBackbone(Backbone):
    """A backbone around a diffusers transformer: the base of `SD3Backbone` and `FluxBackbone`.

    The transformer is either loaded (and then a submodule) or borrowed from somebody who owns and moves it.

    Attributes:
        null_tokens: The T5 length of the null text.
        gradient_checkpointing: Whether blocks are run again in the backward pass.
    """

    family: ClassVar[str]
    class_name: ClassVar[str]
    network: Any
    null_context: Tensor
    null_pooled: Tensor
    gradient_checkpointing: bool = False
    null_tokens: int | None = None

    # What a family defines.

    @abstractmethod
    def load_weights(
        self, model: Any, path: str, dtype: torch.dtype, revision: str | None
    ) -> None:
        """Loads the tensors of a (cut) meta-device model."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in memory."""

    @staticmethod
    @abstractmethod
    def block_count(config: dict[str, Any]) -> int:
        """Returns the number of blocks of a configuration."""

    @abstractmethod
    def read_shape(self, config: dict[str, Any]) -> None:
        """Takes channels and patch size from the transformer's configuration."""

    @abstractmethod
    def block_kwargs(self, state: PrefixState) -> dict[str, Any]:
        """Returns what a block takes besides the two token streams."""

    @abstractmethod
    def head(self, state: PrefixState) -> Tensor:
        """Returns the velocity from the tokens after the last block."""

    # Where the network comes from.

    def load(
        self,
        path: str,
        max_depth: int | None,
        dtype: str,
        null_tokens: int,
        null_embeddings: str | None,
        revision: str | None,
    ) -> None:
        """Loads the first `max_depth` blocks and the null text."""
        torch_dtype = parse_dtype(dtype)
        config = read_config(path, self.class_name, revision)
        model: Any = build_truncated(config, max_depth)
        self.load_weights(model, path, torch_dtype, revision)
        self.network = model
        encoders = TextEncoders(path, self.family, null_tokens, torch_dtype, revision)
        self.null_tokens = null_tokens
        self._adopt(path, dict(model.config), null_condition(encoders, null_embeddings))
        self.freeze()

    @classmethod
    def from_transformer(
        cls,
        transformer: Any,
        null: Condition,
        *,
        id: str = "borrowed",
        gradient_checkpointing: bool = False,
        **settings: Any,
    ) -> Self:
        """Returns a backbone on a transformer that is already in memory, without copying it.

        The transformer stays its owner's: it is no submodule, it is neither frozen nor moved, and its LoRA adapters are
        switched off while the backbone runs, so that the features are those of the frozen network.

        Arguments:
            transformer: A whole diffusers transformer, e.g. `generator.transformer`.
            null: The condition of the null text with B = 1, e.g. `generator.null`.
            id: What to call it in `config.json`.
            gradient_checkpointing: Whether blocks are run again in the backward pass.
            settings: Attributes of the family, such as `guidance` for FLUX.

        Raises:
            ValueError: If the transformer is of another class.
        """
        if not type(transformer).__name__.endswith(cls.class_name):
            raise ValueError(
                f"{cls.__name__} takes a {cls.class_name}, got a {type(transformer).__name__}: use the "
                "backbone class of that family"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        object.__setattr__(self, "network", transformer)  # not registered: it is borrowed
        for name, value in settings.items():
            if not hasattr(cls, name):
                raise ValueError(f"{cls.__name__} has no setting '{name}'")
            setattr(self, name, value)
        self.gradient_checkpointing = gradient_checkpointing
        self._adopt(id, dict(transformer.config), null)
        self.init_args = {
            "path": id,
            "max_depth": None,
            "dtype": dtype_name(self.dtype),
            **settings,
        }
        return self

    def _adopt(self, id: str, config: dict[str, Any], null: Condition) -> None:
        """Takes numbers from the configuration and the null text as buffers."""
        expected = (config["joint_attention_dim"], config["pooled_projection_dim"])
        got = (null.tokens.shape[-1], null.pooled.shape[-1])
        if got != expected or len(null) != 1:
            raise ValueError(
                f"null-text embeddings have batch {len(null)} and widths {got}, expected batch 1 and widths "
                f"{expected} for {id}: they belong to another model; delete the file or leave "
                "`null_embeddings` out"
            )
        self.id = id
        self.num_blocks = self.block_count(config)
        self.loaded_blocks = len(self.blocks)
        self.read_shape(config)
        self.register_buffer("null_context", null.tokens, persistent=False)
        self.register_buffer("null_pooled", null.pooled, persistent=False)

    @property
    def borrowed(self) -> bool:
        """Whether the transformer belongs to somebody else."""
        return "network" not in self._modules

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        return self.network.context_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.context_embedder.weight.device

    def null(self, batch: int) -> Condition:
        """Returns the null text for a batch, where the network is and in its dtype."""
        condition = Condition(self.null_context, self.null_pooled).to(self.device, self.dtype)
        # Copies: a linear layer adds its bias in another rounding when its input is an expanded view.
        return condition.repeat(batch)

    def width(self, depth: int) -> int:
        """Returns the channels D of the tokens, the same after every block."""
        self.check_depth(depth)
        return self.network.inner_dim

    # Running it.

    @contextmanager
    def frozen(self, *modules: nn.Module) -> Iterator[None]:
        """Runs modules in the network's own dtype whatever autocast says, and without borrowed adapters."""
        with torch.autocast(self.device.type, enabled=False):
            if self.borrowed:
                with adapters_off(*modules):
                    yield
            else:
                yield

    def advance(self, state: PrefixState) -> PrefixState:
        """Returns the state after one more block."""
        block = self.blocks[state.depth]
        kwargs = self.block_kwargs(state)

        def run(hidden: Tensor, context: Tensor | None) -> tuple[Tensor | None, Tensor]:
            # Inside of what checkpointing repeats: adapters must be off in the repetition, too.
            with self.frozen(block):
                return block(hidden_states=hidden, encoder_hidden_states=context, **kwargs)

        if self.gradient_checkpointing and torch.is_grad_enabled() and state.hidden.requires_grad:
            context, hidden = checkpoint(run, state.hidden, state.context, use_reentrant=False)
        else:
            context, hidden = run(state.hidden, state.context)
        # The streams of a single block are two views of one tensor, which would be kept alive whole.
        context = None if context is None else context.contiguous()
        return replace(state, depth=state.depth + 1, hidden=hidden.contiguous(), context=context)

    def suffix(self, state: PrefixState) -> Tensor:
        """Continues a prefix to the velocity u_t with shape (B, C, H, W).

        Raises:
            ValueError: If the backbone was loaded without its later blocks.
        """
        if self.loaded_blocks < self.num_blocks:
            raise ValueError(
                f"{self.id}: only the first {self.loaded_blocks} of {self.num_blocks} blocks were loaded, and the "
                "velocity needs all of them; load the backbone with max_depth=None"
            )
        while state.depth < self.num_blocks:
            state = self.advance(state)
        with self.frozen(self.network.norm_out, self.network.proj_out):
            return self.head(state)

    def shard(self, mesh: Any) -> Self:
        """Shards the network over a device mesh with FSDP2, block by block, and returns itself.

        Raises:
            ValueError: If the transformer is borrowed: its owner shards it.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.borrowed:
            raise ValueError(
                "a backbone on a borrowed transformer cannot be sharded by itself: shard its owner, or "
                "load the backbone from its own folder"
            )
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        for method in ("features", "prefix", "suffix"):
            register_fsdp_forward_method(self, method)
        return self
