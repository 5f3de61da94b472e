"""Rewards and judges: weights, architecture, activation, tokenizer, preprocessing, of every kind that ships."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from stitchvm.preflight.findings import Finding
from stitchvm.preflight.pipelines import TOKENIZERS, read_json
from stitchvm.preflight.places import Place, find, hub_state
from stitchvm.preflight.tensors import AGAIN, BrokenFile, Shapes, check_torch_file, read_header

__all__ = ["CHECKS", "clip_vision"]

Arguments = dict[str, Any]
OPEN_CLIP = "open_clip_config.json"


def check_clip(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of a `CLIPReward`."""
    yield from _open_clip(part, arguments["model"], arguments.get("checkpoint"))


def check_hpsv2(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of an `HPSv2Reward`."""
    from stitchvm.rewards.hpsv2 import FILES

    model, checkpoint = arguments["model"], arguments.get("checkpoint")
    version = arguments.get("version")
    if version not in FILES:
        detail = f"version {version!r}"
        yield Finding(part, model, "wrong", detail, f"one of {', '.join(FILES)}")
        return
    if checkpoint is None and ":" not in model:
        checkpoint = f"xswu/HPSv2/{FILES[version]}"
    yield from _open_clip(part, model, checkpoint, quick_gelu=False)


def check_aesthetic(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of an `AestheticReward`: the tower and the MLP."""
    model, checkpoint = arguments["model"], arguments.get("checkpoint")
    built_in = ":" not in model
    if checkpoint is None and built_in:
        checkpoint = "openai"
    yield from _open_clip(part, model, checkpoint, quick_gelu=True)
    yield from _head(part, model, arguments.get("head"))


def check_pickscore(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of a `PickScoreReward`: weights, tokenizer and preprocessing."""
    from stitchvm.rewards.pickscore import PROCESSOR
    from stitchvm.rewards.transformers_clip import WEIGHTS

    place = find(_bare(arguments["model"]))
    if place.folder is None:
        yield place.absent(part)
    else:
        try:
            kind = read_json(place.folder / "config.json").get("model_type")
            if kind != "clip":
                detail = f"config.json is that of a {kind!r} model, expected 'clip'"
                yield Finding(
                    part, place.name, "wrong", detail, "give a CLIPModel of transformers"
                )
        except FileNotFoundError:
            yield place.absent(part, "config.json")
        except BrokenFile as error:
            yield Finding(part, place.name, "wrong", str(error), AGAIN)
        yield from _one_of(part, place, WEIGHTS)[1]
    own = place.folder is not None and _tokenizer(place.folder)
    name = arguments.get("processor") or (None if own else PROCESSOR)
    if name is not None:
        yield from _has_tokenizer(part, find(name))


def check_imagereward(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of an `ImageReward`: weights, configuration and BERT's words."""
    from stitchvm.rewards.blip import CONFIG, TEXT_SETTINGS, WEIGHTS
    from stitchvm.rewards.imagereward import TOKENIZER

    place = find(_bare(arguments["model"]))
    if place.folder is None:
        yield place.absent(part)
    else:
        try:
            settings = read_json(place.folder / CONFIG)
            lacking = [key for key in TEXT_SETTINGS if key not in settings]
            if lacking:
                detail = f"{CONFIG} lacks {', '.join(lacking)}"
                yield Finding(part, place.name, "wrong", detail, "take ImageReward's own file")
        except FileNotFoundError:
            yield place.absent(part, CONFIG)
        except BrokenFile as error:
            yield Finding(part, place.name, "wrong", str(error), AGAIN)
        yield from _one_of(part, place, (WEIGHTS,))[1]
    own = place.folder is not None and _tokenizer(place.folder)
    name = arguments.get("tokenizer") or (None if own else TOKENIZER)
    if name is not None:
        yield from _has_tokenizer(part, find(name))


def check_colours(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of GenEval's `CLIPColours`."""
    yield from _open_clip(part, arguments["model"], arguments["checkpoint"])


def check_detector(part: str, arguments: Arguments) -> Iterator[Finding]:
    """Yields what is found of a `Mask2FormerDetector`."""
    place = find(arguments["model"])
    if place.folder is None:
        yield place.absent(part)
        return
    for file in ("config.json", "preprocessor_config.json"):
        if not (place.folder / file).is_file():
            yield place.absent(part, file)
    yield from _one_of(part, place, ("model.safetensors", "pytorch_model.bin"))[1]


CHECKS: dict[str, Callable[[str, Arguments], Iterator[Finding]]] = {
    "AestheticReward": check_aesthetic,
    "CLIPColours": check_colours,
    "CLIPReward": check_clip,
    "HPSv2Reward": check_hpsv2,
    "ImageReward": check_imagereward,
    "Mask2FormerDetector": check_detector,
    "PickScoreReward": check_pickscore,
}


def clip_vision(model: str) -> dict[str, Any] | None:
    """Returns the vision_cfg of an open_clip reward, if it is known."""
    if ":" not in model:
        import open_clip

        config = open_clip.get_model_config(model)
        return None if config is None else config["vision_cfg"]
    place = find(_bare(model))
    try:
        config = read_json(place.folder / OPEN_CLIP) if place.folder else {}
    except (OSError, BrokenFile):
        return None
    vision: dict[str, Any] | None = config.get("model_cfg", {}).get("vision_cfg")
    return vision


def _open_clip(
    part: str, model: str, checkpoint: str | None, quick_gelu: bool | None = None
) -> Iterator[Finding]:
    """Yields what is found of a CLIP of open_clip: an architecture with a tag or file, or a folder."""
    if ":" in model:
        place = find(_bare(model))
        if place.folder is None:
            yield place.absent(part)
            return
        if not (place.folder / OPEN_CLIP).is_file():
            yield place.absent(part, OPEN_CLIP)
            return
    else:
        try:
            place, files = _published(model, checkpoint, quick_gelu)
        except ValueError as error:
            yield Finding(part, model, "wrong", str(error), "see the message")
            return
        if place.folder is None:
            yield place.absent(part, files[0])
            return
        shapes, findings = _one_of(part, place, files)
        yield from _fits(part, model, shapes, findings)
        return
    if checkpoint is not None:
        place, files = _file(checkpoint)
    else:
        from stitchvm.rewards.checkpoint import WEIGHTS

        assert place.folder is not None
        files = (*WEIGHTS, *(p.name for p in sorted(place.folder.glob("*.pt"))))
    if place.folder is None:
        yield place.absent(part, files[0])
        return
    shapes, findings = _one_of(part, place, files)
    yield from _fits(part, model, shapes, findings)


def _published(
    model: str, checkpoint: str | None, quick_gelu: bool | None
) -> tuple[Place, tuple[str, ...]]:
    """Returns where an architecture's weights are and what they may be called.

    Raises:
        ValueError: If the architecture or tag is unknown, or computes another activation than the weights'.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    from stitchvm.rewards.checkpoint import WEIGHTS, _architecture_source, _check_activation

    source = _architecture_source(model, checkpoint)
    if source.quick_gelu is None:
        source = source._replace(quick_gelu=quick_gelu)
    _check_activation(model, source)
    tag = checkpoint or open_clip.list_pretrained_tags_by_model(model)[0]
    preset = get_pretrained_cfg(model, tag)
    if not preset and "/" not in tag and not tag.startswith("world:") and not Path(tag).exists():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise ValueError(
            f"'{tag}' is neither a file nor a tag of {model} ({tags or 'it has none'})"
        )
    if not preset:
        return _file(tag)
    return find(
        preset["hf_hub"].rstrip("/")
    ), WEIGHTS  # all tags of open_clip 3.2 and later have one


def _file(name: str) -> tuple[Place, tuple[str, ...]]:
    """Returns folder and file of `world:NAME/FILE`, a path, or `org/name/file` on the hub."""
    parts = name.split("/")
    local = Path(name).expanduser()
    remote = len(parts) >= 3 and not name.startswith((".", "/", "~", "world:"))
    if remote and not local.exists() and not Path(parts[0]).is_dir():
        return find("/".join(parts[:2])), ("/".join(parts[2:]),)
    folder = find(name).folder
    if folder is None:
        return Place(str(local.parent), local.parent, hub=False), (local.name,)
    return Place(str(folder.parent), folder.parent, hub=False), (folder.name,)


def _one_of(
    part: str, place: Place, names: tuple[str, ...]
) -> tuple[Shapes | None, list[Finding]]:
    """Returns shapes (of a safetensors file) and what is found of the first of `names` that is there."""
    assert place.folder is not None
    for name in names:
        file = place.folder / name
        if not file.is_file():
            continue
        try:
            if file.suffix == ".safetensors":
                return read_header(file), [Finding(part, f"{place.name}/{name}", "ok")]
            check_torch_file(file)
        except BrokenFile as error:
            return None, [Finding(part, f"{place.name}/{name}", "wrong", str(error), AGAIN)]
        return None, [Finding(part, f"{place.name}/{name}", "ok")]
    return None, [place.absent(part, names[0])]


def _fits(
    part: str, model: str, shapes: Shapes | None, findings: list[Finding]
) -> Iterator[Finding]:
    """Yields the findings, or that the weights are of another architecture."""
    vision = clip_vision(model)
    if shapes is not None and vision is not None:
        patch, width = vision["patch_size"], vision["width"]
        expected = {
            "visual.conv1.weight": (width, 3, patch, patch),
            "visual.positional_embedding": (1 + (vision["image_size"] // patch) ** 2, width),
        }
        for key, shape in expected.items():
            if shapes.get(key) != shape:
                detail = f"tensor '{key}' has shape {shapes.get(key)}, {model} makes it {shape}"
                remedy = "give the architecture that these weights were made for"
                yield findings[0]._replace(state="wrong", detail=detail, remedy=remedy)
                return
    yield from findings


def _head(part: str, model: str, head: str | None) -> Iterator[Finding]:
    """Yields what is found of the aesthetic MLP."""
    from stitchvm.rewards import aesthetic

    if head is None and ":" in model:
        place = find(_bare(model))
        if place.folder is not None:
            yield from _one_of(part, place, ("aesthetic.pth",))[1]
        return
    head = head or aesthetic.HEAD
    if not head.startswith(("https://", "http://")):
        place, files = _file(head)
        if place.folder is None:
            yield place.absent(part, files[0])
        else:
            yield from _one_of(part, place, files)[1]
        return
    name = unquote(head.rsplit("/", 1)[-1])
    path = aesthetic.downloaded_head(head)
    if not path.is_file():
        finding = hub_state(part, name)
        remedy = f"the run will fetch it; or give `head`, a local copy of {head}"
        yield finding._replace(remedy=remedy)
        return
    wanted = aesthetic.SHA256.get(name)
    if wanted is not None and hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        detail = f"{path} is not the published file (SHA-256 differs)"
        yield Finding(part, name, "wrong", detail, "delete it; the run will fetch it again")
        return
    yield Finding(part, name, "ok")


def _has_tokenizer(part: str, place: Place) -> Iterator[Finding]:
    if place.folder is None:
        yield place.absent(part)
    elif _tokenizer(place.folder):
        yield Finding(part, f"{place.name} (tokenizer)", "ok")
    else:
        yield place.absent(part, TOKENIZERS[0])


def _tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZERS)


def _bare(model: str) -> str:
    return model.removeprefix("local-dir:").removeprefix("hf-hub:")
