"""The stitched value model V_ω(z_t) = r_φ^{≥j}(s_ψ(u_θ^{≤i}(z_t))), Eq. (6).

A frozen diffusion backbone cut after block i, a stitching layer, and a trainable copy of the reward's blocks
from j on. What is saved is the stitch and the tail only; backbone and reward are named by their specs and are
loaded from where they came from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm._version import __version__
from stitchvm.backbones.base import Backbone
from stitchvm.hub import resolve
from stitchvm.packing import unpack
from stitchvm.rewards.base import Embedding, Reward, RewardTail
from stitchvm.spec import build, fingerprint, spec_of
from stitchvm.stitch import StitchLayer
from stitchvm.writing import written

__all__ = ["StitchedValueModel"]

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class StitchedValueModel(nn.Module):
    """u_θ^{≤i} → s_ψ → r_φ^{≥j}.

    Arguments:
        backbone: The frozen backbone u_θ, at least i blocks of it loaded.
        reward: The frozen reward r_φ; gives the tail, encodes text and scores.
        stitch_point: The pair (i, j): backbone blocks run, first reward block of the tail.

    Raises:
        ValueError: If the stitch point does not fit the backbone or the reward.
    """

    def __init__(self, backbone: Backbone, reward: Reward, stitch_point: tuple[int, int]) -> None:
        super().__init__()
        self.i, self.j = stitch_point
        _check_stitch_point(backbone, reward, self.i, self.j)
        self.backbone = backbone
        self.stitch = StitchLayer(backbone.width(self.i), reward.width, reward.grid)
        self.tail: RewardTail = reward.tail(self.j)
        # outside the module tree: the teacher is frozen, saved nowhere, and may be shared
        self._reward = [reward]

    @property
    def reward(self) -> Reward:
        """The clean-image reward whose blocks were stitched."""
        return self._reward[0]

    def _apply(self, fn: Any, recurse: bool = True) -> StitchedValueModel:
        super()._apply(fn, recurse)
        self.reward._apply(fn)
        return self

    def forward(self, z_t: Tensor, t: Tensor) -> Embedding:
        """Returns tokens (B, N, D) and image embedding (B, E) of noisy latents.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels in [0, 1], with shape (B,), float32.
        """
        return self.from_features(self.backbone(z_t, t, self.i))

    def from_features(self, h: Tensor) -> Embedding:
        """Returns tokens and image embedding from u^{≤i}(z_t), with shape (B, D, h, w)."""
        return self.tail(self.stitch(h))

    def value(self, z_t: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns V_ω(z_t) with shape (B,), differentiable in z_t.

        Arguments:
            z_t: The noisy latents, with shape (B, C, H, W).
            t: The noise levels in [0, 1], with shape (B,).
            text: The text embeddings of `reward.encode_text`, with shape (B, E), if the reward uses text.
        """
        return self.reward.score(self(z_t, t).image, text)

    def trainable(self) -> dict[str, Tensor]:
        """Returns the state of stitch and tail: everything that is not pretrained."""
        return {
            f"{part}.{key}": value
            for part in ("stitch", "tail")
            for key, value in getattr(self, part).state_dict().items()
        }

    def config(self) -> dict[str, Any]:
        """Returns what `config.json` holds: stitch point, backbone and reward specs, fingerprints."""
        backbone = spec_of(self.backbone)
        if "max_depth" in backbone["init_args"]:
            backbone["init_args"]["max_depth"] = self.i
        return {
            "format": FORMAT,
            "stitchvm_version": __version__,
            "stitch_point": [self.i, self.j],
            "backbone": backbone | {"fingerprint": used_weights(self.backbone, self.i)},
            "reward": spec_of(self.reward) | {"fingerprint": fingerprint(self.reward)},
        }

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        state: dict[str, Tensor] | None = None,
        config: dict[str, Any] | None = None,
        card: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes `config.json`, `model.safetensors` and a model card into `folder`.

        Arguments:
            folder: Where to write; made if it does not exist.
            state: The full state of stitch and tail, if the module's own is sharded.
            config: What `config()` returned before the module was sharded.
            card: The text of the model card; a plain one if None.
            overwrite: Whether files of these names may be replaced.

        Raises:
            FileExistsError: If `folder` holds a file of one of these names and `overwrite` is False.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        there = [name for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists()]
        if there and not overwrite:
            raise FileExistsError(
                f"{folder} already holds {' and '.join(there)}; choose another folder or pass overwrite=True"
            )
        folder.mkdir(parents=True, exist_ok=True)
        state = self.trainable() if state is None else state
        state = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        with written(folder / WEIGHTS) as part:
            save_file(state, part, metadata={"format": "pt"})
        config = self.config() if config is None else config
        texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
        texts[CARD] = model_card(config) if card is None else card
        for name, text in texts.items():
            with written(folder / name) as part:
                part.write_text(text)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        backbone: Backbone | None = None,
        reward: Reward | None = None,
        device: torch.device | str | None = None,
    ) -> StitchedValueModel:
        """Loads a value model from a folder or a hub id; backbone and reward come from their own ids.

        Arguments:
            path_or_id: What `save_pretrained` wrote: a folder, `world:NAME` or a hub id.
            backbone: An already loaded backbone to share, instead of the one named in the config.
            reward: An already loaded reward to share, instead of the one named in the config.
            device: Where to put the model and what it shares; by default where that is, or else the CPU.

        Raises:
            FileNotFoundError: If there is no value model at `path_or_id`.
            ValueError: If the given backbone or reward is not the one the stitch was trained on.
        """
        from safetensors.torch import load_file

        folder, config = _open(path_or_id)
        if device is None:
            shared = [part for part in (backbone, reward) if part is not None]
            places = (p.device for part in shared for p in part.parameters())
            device = next(places, torch.device("cpu"))
        if backbone is None:
            backbone = build(_without_fingerprint(config["backbone"]), Backbone)
        if reward is None:
            reward = build(_without_fingerprint(config["reward"]), Reward)
        assert backbone is not None and reward is not None
        model = cls(backbone, reward, tuple(config["stitch_point"]))
        _check_identity("backbone", config["backbone"], backbone, used_weights(backbone, model.i))
        _check_identity("reward", config["reward"], reward, fingerprint(reward))
        # what a borrowed transformer does not know of itself, such as the length of the null text: to be saved again
        backbone.init_args = config["backbone"]["init_args"] | backbone.init_args
        model.load_trainable(unpack(load_file(folder / WEIGHTS)), source=str(folder / WEIGHTS))
        return model.to(device).eval()

    @staticmethod
    def read(path_or_id: str | Path) -> dict[str, Any]:
        """Returns the configuration of a saved value model (see `config`), without loading anything else.

        Raises:
            FileNotFoundError: If there is no value model at `path_or_id`.
            ValueError: If it was written in another format, or a file is damaged.
        """
        return _open(path_or_id)[1]

    def load_trainable(self, state: dict[str, Tensor], source: str = "the given state") -> None:
        """Loads the state of stitch and tail, strictly.

        Raises:
            ValueError: If keys or shapes differ, naming them.
        """
        own = self.trainable()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [
            f"{key} {tuple(state[key].shape)} (expected {tuple(own[key].shape)})"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ]
        if missing or extra or wrong:
            raise ValueError(
                f"{source} does not fit the value model at (i, j) = ({self.i}, {self.j}): "
                f"missing {missing[:5]}, unexpected {extra[:5]}, wrong shape {sorted(wrong)[:5]}. "
                "It belongs to another backbone, reward or stitch point."
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])


def _open(path_or_id: str | Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder and the configuration of a saved value model, whose weights are a whole file."""
    from safetensors import SafetensorError, safe_open

    folder = resolve(str(path_or_id), allow_patterns=[CONFIG, WEIGHTS])
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{path_or_id} is not a value model: {name} is missing. Expected a folder written by "
                "save_pretrained (`stitchvm fit` leaves one as value_model/ in its run folder)."
            )
    again = "copy or download the value model again, or save it anew"
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON ({error}): {again}") from error
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} has format {config.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):  # its header and length
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is no safetensors file, or only a part of one ({error}): {again}"
        ) from error
    return folder, config


def used_weights(backbone: Backbone, i: int) -> str:
    """Returns the fingerprint of what a stitch after block i uses, however many blocks are loaded or borrowed."""
    network = getattr(backbone, "network", backbone)
    later = list(getattr(backbone, "blocks", []))[i:]
    head = [getattr(network, name) for name in ("norm_out", "proj_out") if hasattr(network, name)]
    return fingerprint(network, leave_out=[*later, *head])


def _check_stitch_point(backbone: Backbone, reward: Reward, i: int, j: int) -> None:
    if not 0 <= i <= backbone.loaded_blocks:
        raise ValueError(
            f"stitch point i = {i}: {backbone.id} has {backbone.loaded_blocks} of its "
            f"{backbone.num_blocks} blocks loaded; give i in 0..{backbone.loaded_blocks} or load more "
            "blocks (max_depth)"
        )
    if not 1 <= j <= reward.num_blocks:
        raise ValueError(
            f"stitch point j = {j}: {reward.id} has {reward.num_blocks} blocks; give j in "
            f"1..{reward.num_blocks}"
        )


def _without_fingerprint(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("class_path", "init_args")}


def _check_identity(
    kind: str, spec: dict[str, Any], component: Backbone | Reward, found: str
) -> None:
    if found != spec["fingerprint"]:
        raise ValueError(
            f"the stitch was trained on the {kind} {spec['init_args']} (weights {spec['fingerprint']}), "
            f"but {component.id} has weights {found}: features differ and values would be wrong. "
            f"Load the {kind} that config.json names, in float16 only if it was then, or distil again on this one."
        )


def model_card(config: dict[str, Any], table: str = "") -> str:
    """Returns the text of a model card (Markdown with hub metadata) for a value model.

    Arguments:
        config: What `StitchedValueModel.config` returns.
        table: A Markdown table of measured values, or "".
    """
    i, j = config["stitch_point"]
    measured = f"\n## Measured\n\n{table}\n" if table else ""
    return f"""---
library_name: stitchvm
tags: [value-model, reward-model, diffusion]
---
# Stitched value model

`V(z_t) = r^{{>=j}}(s(u^{{<=i}}(z_t)))` with (i, j) = ({i}, {j}) (arXiv 2605.19804, Eq. 6), made with
stitchvm {config["stitchvm_version"]}. This folder holds the stitching layer and the reward's tail only.

- backbone: `{config["backbone"]["class_path"]}` {json.dumps(config["backbone"]["init_args"])}
- reward: `{config["reward"]["class_path"]}` {json.dumps(config["reward"]["init_args"])}

```python
from stitchvm.value_model import StitchedValueModel

model = StitchedValueModel.from_pretrained("path/or/hub-id")
text = model.reward.encode_text(["a prompt"])
value = model.value(z_t, t, text)  # z_t (B, C, H, W), t (B,) in [0, 1]
```
{measured}"""
