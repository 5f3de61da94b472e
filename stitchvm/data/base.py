"""What a batch is.

Every data module of the library yields plain dicts with these keys (those that apply):

| key        | type and shape                     | meaning                                               |
|------------|------------------------------------|-------------------------------------------------------|
| `index`    | int64 (B,)                         | position in the data set; identifies a sample         |
| `pixels`   | float32 (B, 3, H, W) in [0, 1]     | the image, resized and centre-cropped                 |
| `latents`  | float (B, C, h, w)                 | the VAE's latent of `pixels`, scaled, when cached     |
| `prompt`   | list[str], length B                | the text that belongs to the image                    |
| `captions` | list[list[str]], length B          | all captions of the image (retrieval)                 |
| `metadata` | list[dict], length B               | GenEval's entry of the prompt                         |
| `file`     | list[str], length B                | where the image is, below its folder (samples)        |
| `seed`     | int64 (B,)                         | the seed that the image was sampled with (samples)    |
| `group`    | int64 (B,)                         | which prompt's images belong together (preference,    |
|            |                                    | samples: the number of the prompt)                    |
| `rank`     | float32 (B,)                       | human rank within the group, lower is better          |
| `score`    | float32 (B,)                       | human or true score (aesthetic)                       |
| `epoch`    | int                                | the pass over the data the batch is of (training)     |

Images travel from the workers as uint8, a quarter of the bytes. The loader turns them into float32, except training
batches under a Trainer: they go to the device as uint8 and the data module's `on_after_batch_transfer` turns them into
float32 there. Either way a step sees the table above.

A sample (what a data set's `__getitem__` returns) has the same keys without the batch axis, and may have `bad`:
the files that could not be read on the way to this sample. The loader takes `bad` out of the batch and counts it.

`index` is that of the image that was delivered. Where an unreadable image was replaced by the next readable one, or a
sample had to be given to two devices, an index occurs twice in an evaluation: metrics keep one of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Any]
Batch = dict[str, Any]


def collate(samples: Sequence[Sample]) -> Batch:
    """Returns the batch of `samples`: tensors stacked, numbers as tensors, strings and lists as lists.

    `bad` lists of the samples are joined into one.
    """
    batch: Batch = {}
    for key in samples[0]:
        if key == "bad":
            continue
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        elif isinstance(values[0], float):
            batch[key] = torch.tensor(values, dtype=torch.float32)
        else:
            batch[key] = values
    batch["bad"] = [name for sample in samples for name in sample.get("bad", ())]
    return batch


def to_float(batch: Batch) -> Batch:
    """Returns the batch with uint8 `pixels` as float32 in [0, 1], on the device where they are."""
    pixels = batch.get("pixels")
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
        batch = {**batch, "pixels": pixels.to(torch.float32).div_(255)}
    return batch
