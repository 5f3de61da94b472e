"""Retrieval benchmarks: Karpathy's test splits of MSCOCO (5,000 images) and Flickr30K (1,000 images).

MSCOCO: `coco_test_karpathy.json` (CocoCaptions format: {"images": [{"id", "file_name"}], "annotations": [{"image_id",
"caption"}]}) or Karpathy's own `dataset_coco.json` ({"images": [{"filename", "split", "sentences": [{"raw"}]}]}), and
the images of val2014. Both hold all 25,010 captions; `captions_per_image: 5` takes the first five, the other common
convention (25,000).

Flickr30K: `flickr30k_test_karpathy.txt` (lines "name.jpg,caption", with or without a header) or
`dataset_flickr30k.json`, and the images in `flickr30k-images`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stitchvm.data.annotations import Located, field, read_json
from stitchvm.data.benchmark import BenchmarkModule
from stitchvm.data.datasets import ImageDataset
from stitchvm.data.reading import require

WHERE_COCO = (
    "cocodataset.org (2014 val images) and the release 1.0.0 of the GitHub repository mehdidc/retrieval_annotations"
    " (annotations; or Karpathy's caption_datasets.zip)"
)
WHERE_FLICKR = (
    "the Flickr30K page of the University of Illinois (images; on request) and the release 1.0.0 of the GitHub"
    " repository mehdidc/retrieval_annotations (annotations; or Karpathy's caption_datasets.zip)"
)
COCO_FOLDERS = ["val2014", "images/val2014", ""]
FLICKR_FOLDERS = ["flickr30k-images", "flickr30k_images", "Images", "images", ""]

Captions = dict[str, list[str]]


class Retrieval(BenchmarkModule):
    """Images with all their captions: batches with `captions`.

    Arguments:
        coco: The folder of MSCOCO ("coco"), or None to leave it out.
        flickr30k: The folder of Flickr30K ("flickr30k"), or None to leave it out.
        captions_per_image: At most so many captions of each image, or None for all.
        **kwargs: Those of `BenchmarkModule`.
    """

    task = "retrieval"

    def __init__(
        self,
        coco: str | None = None,
        flickr30k: str | None = None,
        captions_per_image: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.coco = coco
        self.flickr30k = flickr30k
        self.captions_per_image = captions_per_image

    def test_data(self) -> dict[str, ImageDataset]:
        if self.captions_per_image is not None and self.captions_per_image < 1:
            raise ValueError(
                f"captions_per_image must be at least 1, or null for all; got {self.captions_per_image}."
            )
        data: dict[str, ImageDataset] = {}
        if self.coco is not None:
            captions = coco_captions(self.coco)
            images = Located(self.coco, COCO_FOLDERS, "COCO's val2014 images", WHERE_COCO)
            data["coco"] = self._dataset(captions, images)
        if self.flickr30k is not None:
            captions = flickr30k_captions(self.flickr30k)
            images = Located(self.flickr30k, FLICKR_FOLDERS, "Flickr30K's images", WHERE_FLICKR)
            data["flickr30k"] = self._dataset(captions, images)
        return data

    def _dataset(self, captions: Captions, images: Located) -> ImageDataset:
        kept, files, missing = images.split(list(captions))
        texts = [texts[: self.captions_per_image] for texts in captions.values()]
        return ImageDataset(
            files, self.resolution, {"captions": [texts[i] for i in kept]}, missing
        )


def coco_captions(root: str) -> Captions:
    """Returns the captions of each image of COCO's Karpathy test split, by file name.

    Raises:
        ValueError: If the annotations are missing or malformed.
    """
    names = ["coco_test_karpathy.json", "annotations/coco_test_karpathy.json", "dataset_coco.json"]
    path = require(root, names, "COCO's Karpathy test captions", WHERE_COCO)
    return (
        karpathy_captions(path) if path.name == "dataset_coco.json" else coco_format_captions(path)
    )


def flickr30k_captions(root: str) -> Captions:
    """Returns the captions of each image of Flickr30K's Karpathy test split, by file name.

    Raises:
        ValueError: If the annotations are missing or malformed.
    """
    names = ["flickr30k_test_karpathy.txt", "dataset_flickr30k.json"]
    path = require(root, names, "Flickr30K's Karpathy test captions", WHERE_FLICKR)
    return karpathy_captions(path) if path.suffix == ".json" else text_captions(path)


def coco_format_captions(path: Path) -> Captions:
    """Reads {"images": ..., "annotations": ...}. Raises ValueError if malformed or an image has no caption."""
    content = read_json(path, dict)
    texts: dict[int, list[str]] = {}
    for i, entry in enumerate(field(content, ("annotations",), path, "(top)")):
        texts.setdefault(field(entry, ("image_id",), path, i), []).append(
            field(entry, ("caption",), path, i)
        )
    captions: Captions = {}
    for i, entry in enumerate(field(content, ("images",), path, "(top)")):
        captions[field(entry, ("file_name",), path, i)] = texts.get(
            field(entry, ("id",), path, i), []
        )
    return _checked(captions, path)


def karpathy_captions(path: Path) -> Captions:
    """Reads the images of split "test" of Karpathy's format. Raises ValueError if malformed or none are there."""
    captions: Captions = {}
    for i, entry in enumerate(field(read_json(path, dict), ("images",), path, "(top)")):
        if field(entry, ("split",), path, i) == "test":
            sentences = field(entry, ("sentences",), path, i)
            captions[field(entry, ("filename",), path, i)] = [
                field(s, ("raw",), path, i) for s in sentences
            ]
    return _checked(captions, path)


def text_captions(path: Path) -> Captions:
    """Reads lines "name.jpg,caption". Raises ValueError if a line other than the first is not so."""
    captions: Captions = {}
    # not splitlines, which cuts captions at form feeds and Unicode line separators
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        name, found, caption = line.partition(".jpg,")
        if found:
            captions.setdefault(name.strip() + ".jpg", []).append(caption.strip())
        elif line.strip() and number > 0:
            raise ValueError(
                f"Line {number + 1} of {path} is not of the form name.jpg,caption: {line[:60]!r}."
            )
    return _checked(captions, path)


def _checked(captions: Captions, path: Path) -> Captions:
    empty = [name for name, texts in captions.items() if not texts]
    if empty or not captions:
        problem = (
            f"{len(empty)} images without a caption, such as {empty[0]}"
            if empty
            else "no test images"
        )
        raise ValueError(f"{path} has {problem}: is it the right file?")
    return captions
