"""Files of weights: what may stand in them, and loading them into a network without surprises."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["fill_positions", "is_torchscript", "load_strictly", "read_state_dict"]

# what a TorchScript archive holds beside its weights
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors or torch file, with or without a "state_dict" around them.

    Only tensors are unpickled. OpenAI's TorchScript archives are read too.

    Raises:
        ValueError: If the file holds something else.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_torchscript(path):
        state = torch.jit.load(path, map_location="cpu").state_dict()
        return {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of weights that can be read safely ({type(error).__name__}): expected "
            ".safetensors or a torch file of tensors only; a training checkpoint with an optimiser has "
            "to be stripped first (for HPSv2 take the *_compressed.pt file)"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if (
        not isinstance(state, dict)
        or not state
        or not all(torch.is_tensor(v) for v in state.values())
    ):
        raise ValueError(f"{path} holds no tensors by name: expected a state dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def is_torchscript(path: Path) -> bool:
    """Returns whether a file is a TorchScript archive, the format of OpenAI's own CLIP files."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_strictly(
    network: nn.Module,
    state: dict[str, Tensor],
    source: str,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Gives the network a checkpoint's tensors, as they are: without a copy, in the file's dtype.

    Arguments:
        network: The network; it may be on the meta device.
        state: The tensors by name.
        source: What they are, for the message.
        name_in_file: Maps the network's name of a tensor to that in the checkpoint, if they differ.

    Raises:
        ValueError: If keys are missing or unexpected, or have another shape; they are named.
    """
    if "text.token_embedding.weight" in network.state_dict() and "token_embedding.weight" in state:
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    tensors = network.state_dict()
    names = {name_in_file(key): key for key in tensors}
    own = {name: tensors[key] for name, key in names.items()}
    if "logit_scale" in state:  # (1,) or () in different releases
        state = {**state, "logit_scale": state["logit_scale"].reshape(own["logit_scale"].shape)}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {name}: {', '.join(keys[:6])}{', …' if len(keys) > 6 else ''}"
        for name, keys in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", wrong),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit {source}: {'; '.join(problems)}. Give the architecture that it "
            "was made for, or the right file."
        )
    network.load_state_dict({names[key]: value for key, value in state.items()}, assign=True)


def fill_positions(network: nn.Module) -> None:
    """Gives transformers' networks on the meta device the numbers 0, 1, … that no checkpoint need have."""
    for module in network.modules():
        positions = module._buffers.get("position_ids")
        if positions is not None:
            module._buffers["position_ids"] = torch.arange(positions.shape[-1])[None]
