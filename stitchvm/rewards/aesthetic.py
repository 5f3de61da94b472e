"""The LAION aesthetic predictor: an MLP on the normalised CLIP ViT-L/14 embedding, trained to predict ratings.

The published heads are stacks of linear maps. `*-linearMSE.pth` (layers 0, 2, 4, 6, 7) has nothing between them
but dropout, so in use it is an affine map of the embedding; `*-reluMSE.pth` (layers 0, 3, 6, 9, 11) has a ReLU after
each but the last. Which one a file is, its keys tell. The scale is that of the ratings, about 1 to 10.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote

import torch
from torch import Tensor, nn

from stitchvm.hub import cache_folder, resolve, resolve_file
from stitchvm.rewards.checkpoint import load_clip
from stitchvm.rewards.open_clip_reward import OpenCLIPReward
from stitchvm.rewards.weights import read_state_dict

__all__ = ["AestheticReward"]

HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
SHA256 = {
    "sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
}
# the places of the linear maps in nn.Sequential → whether a ReLU follows each but the last
LAYOUTS = {(0, 2, 4, 6, 7): False, (0, 3, 6, 9, 11): True}


class AestheticReward(OpenCLIPReward):
    """The aesthetic score of an image; it reads no text.

    Arguments:
        model: `ViT-L-14-quickgelu`, `local-dir:FOLDER` or `world:aesthetic`.
        checkpoint: A tag of open_clip, a local file, or `org/name/file` on the hub. None: OpenAI's weights
            for an architecture name, the folder's own weights for a folder.
        head: The MLP: a local file, `world:aesthetic/aesthetic.pth`, `org/name/file` on the hub, or a URL.
            None: LAION's published head (a download of 3.7 MB) for an architecture name, `aesthetic.pth`
            in the folder for a folder.
        dtype: The dtype of the tower: "float32", "bfloat16" or "float16"; the head is float32.
        class_token: What tails with j > 1 do for a class token: "trainable", "constant", "readout" or
            "literal" (`CLIPTail`).
        gradient_checkpointing: Whether tails compute their blocks again in the backward pass.
        check_finite: Whether a score that is not finite is an error.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If a file does not fit.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str | None = None,
        head: str | None = None,
        dtype: str = "float32",
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
    ) -> None:
        built_in = ":" not in model
        weights = "openai" if checkpoint is None and built_in else checkpoint
        path = _head_file(model, head)  # before gigabytes are read
        super().__init__(
            # the published head was trained on OpenAI's CLIP; a folder knows its activation itself
            load_clip(model, weights, quick_gelu=True),
            id=model if weights is None else f"{model}/{weights}",
            dtype=dtype,
            class_token=class_token,
            gradient_checkpointing=gradient_checkpointing,
            check_finite=check_finite,
            uses_text=False,
        )
        self.head, self.affine = _build_head(path, self.embed_dim)
        self.head.requires_grad_(False).eval()
        self.init_args = {
            "model": model,
            "checkpoint": checkpoint,
            "head": head,
            "dtype": dtype,
            "class_token": class_token,
            "gradient_checkpointing": gradient_checkpointing,
            "check_finite": check_finite,
        }

    def _score(self, e: Tensor, text: Tensor | None) -> Tensor:
        for layer in self.head:
            # float32 whatever the tower was cast to
            e = (
                nn.functional.linear(e, layer.weight.float(), layer.bias.float())
                if isinstance(layer, nn.Linear)
                else layer(e)
            )
        return e.squeeze(-1)


def _head_file(model: str, head: str | None) -> Path:
    """Returns the local path of the MLP's file."""
    if head is None:
        if ":" in model:
            name = model.removeprefix("local-dir:").removeprefix("hf-hub:")
            path = resolve(name, allow_patterns=["aesthetic.pth"]) / "aesthetic.pth"
            if not path.is_file():
                raise FileNotFoundError(
                    f"'{model}' has no aesthetic.pth; give `head`, the file of the MLP"
                )
            return path
        head = HEAD
    if not head.startswith(("https://", "http://")):
        return resolve_file(head)
    name, path = unquote(head.rsplit("/", 1)[-1]), downloaded_head(head)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                head, str(path), SHA256.get(name, "")[:16], progress=False
            )
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"cannot download the aesthetic head {head} ({error}); give `head`, a local copy of the file"
            ) from error
    if name in SHA256 and hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise ValueError(
            f"{path} is not the published {name} (SHA-256 differs); delete it and try again"
        )
    return path


def downloaded_head(url: str) -> Path:
    """Returns where a head is kept: under its name if it is the published one, else apart from others of that name."""
    name = unquote(url.rsplit("/", 1)[-1])
    if url == HEAD or name in SHA256:  # the rehearsal, whose head is random, has emptied SHA256
        return cache_folder() / name
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _build_head(path: Path, embed_dim: int) -> tuple[nn.Sequential, bool]:
    """Returns the MLP in a file, and whether it is affine.

    Raises:
        ValueError: If the file has other keys, or is for embeddings of another width.
    """
    state = read_state_dict(path)
    names = [key.split(".") for key in state]
    known = all(len(n) == 3 and n[0] == "layers" and n[1].isdigit() for n in names)
    places = tuple(sorted({int(n[1]) for n in names})) if known else ()
    expected = {f"layers.{k}.{part}" for k in places for part in ("weight", "bias")}
    if places not in LAYOUTS or state.keys() != expected:
        layouts = " or ".join(f"layers.{{{', '.join(map(str, layout))}}}" for layout in LAYOUTS)
        raise ValueError(
            f"{path} is not an aesthetic head: it has {sorted(state)[:6]}, expected weight and bias of "
            f"{layouts}"
        )
    relu = LAYOUTS[places]
    layers: list[nn.Module] = []
    width = embed_dim
    for place in places:
        weight = state[f"layers.{place}.weight"].float()
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(
                f"layers.{place}.weight of {path} is {tuple(weight.shape)}, expected (…, {width}): this head "
                "was made for another CLIP"
            )
        linear = nn.Linear(width, weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": state[f"layers.{place}.bias"].float()})
        layers += [linear] if not relu or place == places[-1] else [linear, nn.ReLU()]
        width = weight.shape[0]
    if width != 1:
        raise ValueError(f"the last layer of {path} has {width} outputs, expected 1")
    return nn.Sequential(*layers), not relu
