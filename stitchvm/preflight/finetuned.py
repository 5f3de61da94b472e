"""What a fine-tuning left for a generator: LoRA weights, or a whole transformer, of the pipeline's class and widths."""

from __future__ import annotations

from collections.abc import Iterator

from stitchvm.backbones.finetuned import CONFIG, LORA, lora_problem, network_problem
from stitchvm.preflight.findings import Finding
from stitchvm.preflight.pipelines import STEM, check_transformer, read_json
from stitchvm.preflight.places import Place, find
from stitchvm.preflight.tensors import AGAIN, BrokenFile, find_weights, read_header, read_weights

__all__ = ["check_finetuned"]


def check_finetuned(part: str, name: str, pipeline: Place) -> Iterator[Finding]:
    """Yields what is found of a generator's `finetuned`.

    Arguments:
        part: Where the configuration names the generator.
        name: The folder or hub id.
        pipeline: The pipeline that was trained.
    """
    part, place = f"{part}.finetuned", find(name)
    if place.folder is None:
        yield place.absent(part)
        return
    if (place.folder / CONFIG).is_file():
        try:
            assert pipeline.folder is not None
            ours, theirs = (read_json(f / CONFIG) for f in (pipeline.folder, place.folder))
            problem = network_problem(ours, theirs)
        except (OSError, BrokenFile):  # said of the pipeline itself, or below
            problem = None
        if problem is not None:
            yield Finding(part, name, "wrong", problem, "give what was trained on this pipeline")
            return
        yield from check_transformer(part, "Generator", place)
        return
    file = place.folder / LORA
    if not file.is_file():
        yield place.absent(part, LORA)
        return
    try:
        lora = read_header(file)
    except BrokenFile as error:
        yield Finding(part, f"{name}/{LORA}", "wrong", str(error), AGAIN)
        return
    try:
        assert pipeline.folder is not None
        network = read_weights(find_weights(pipeline.folder / "transformer", STEM))
    except (OSError, BrokenFile):  # said of the pipeline itself
        return
    problem = lora_problem(lora, network)
    if problem is not None:
        remedy = "give LoRA weights that were trained on this pipeline"
        yield Finding(part, f"{name}/{LORA}", "wrong", problem, remedy)
        return
    yield Finding(part, f"{name}/{LORA}", "ok")
