"""Map-style data sets over image files, and the count of those that could not be read."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from stitchvm.data.base import Sample
from stitchvm.data.reading import UnreadableImage, read_uint8

MAX_IN_A_ROW = 100
MAX_WARNINGS = 10


class ImageDataset(Dataset[Sample]):
    """Image files with what is known of each.

    A file that cannot be read is replaced by the next readable one, so that batches keep their size and order;
    `index`, `pixels` and all columns are then those of the replacement, and `bad` names the files passed over.

    Arguments:
        files: The paths of the images.
        resolution: The side of the square images, in pixels.
        columns: Further keys of a sample, one value for each file.
        missing: Files that the data set's list names but that are not there (counted, never read).

    Raises:
        ValueError: If there are no files.
    """

    def __init__(
        self,
        files: Sequence[str],
        resolution: int,
        columns: Mapping[str, Sequence[Any]] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        if not files:
            named = (
                f" ({len(missing)} are listed but missing, such as {missing[0]})"
                if missing
                else ""
            )
            raise ValueError(
                f"The data set has no images{named}: check the folder it is read from."
            )
        # One flat buffer: a list of strings is copied into every worker as their reference counts are touched.
        self.files = np.array([os.fsencode(file) for file in files])
        self.resolution = resolution
        self.columns = dict(columns or {})
        self.missing = list(missing)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the file names in their order, for caches; folders may move."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.path.basename(file) + b"\n")
        return digest.hexdigest()

    def _read(self, path: str) -> Tensor:
        return read_uint8(path, self.resolution)

    def __getitem__(self, index: int) -> Sample:
        bad: list[str] = []
        for i in range(index, index + min(len(self), MAX_IN_A_ROW)):
            i %= len(self)
            try:
                pixels = self._read(os.fsdecode(self.files[i]))
            except UnreadableImage as error:
                bad.append(str(error))
                continue
            sample: Sample = {"index": i, "pixels": pixels, "bad": bad}
            sample.update({key: values[i] for key, values in self.columns.items()})
            return sample
        raise ValueError(
            f"{len(bad)} images in a row could not be read, from {bad[0]} to {bad[-1]}: check that the folder is"
            " mounted and that the files are whole."
        )


class BadImages:
    """Counts unreadable images in the main process, and stops the run when they are too many.

    Too many are more than `max_fraction` of the data set in distinct files, or, since that may take a whole epoch to
    show, more than twice `max_fraction` of at least 1,000 images read.

    Arguments:
        num_samples: The number of images that are there.
        missing: Files that are listed but not there.
        max_fraction: The fraction of missing and unreadable images that is borne.

    Raises:
        ValueError: If there are too many missing ones already.
    """

    def __init__(
        self, num_samples: int, missing: Sequence[str] = (), max_fraction: float = 0.01
    ) -> None:
        self.total = num_samples + len(missing)
        self.max_fraction = max_fraction
        self.names: dict[str, None] = dict.fromkeys(missing)  # an ordered set
        self.read = 0
        self.skipped = 0
        self._check()

    def add(self, names: Sequence[str], read: int) -> None:
        """Counts the unreadable files `names` met while `read` images were read.

        Raises:
            ValueError: If there are too many; it names counts and examples.
        """
        self.read += read
        for name in names:
            if name in self.names:
                continue
            self.names[name] = None
            self.skipped += 1
            if self.skipped <= MAX_WARNINGS:
                more = "; further ones are only counted" if self.skipped == MAX_WARNINGS else ""
                warnings.warn(f"Skipped an unreadable image: {name}{more}.", stacklevel=3)
        if names:
            self._check()

    def _check(self) -> None:
        early = self.read >= 1000 and self.skipped > 2 * self.max_fraction * self.read
        if early or len(self.names) > self.max_fraction * self.total:
            examples = ", ".join(list(self.names)[-3:])
            seen = f" after {self.read} were read" if self.read else ""
            raise ValueError(
                f"{len(self.names)} of {self.total} images are missing or unreadable{seen}, more than"
                f" max_bad_fraction={self.max_fraction:g} allows; for example {examples}."
                " Mend the data set, or raise max_bad_fraction."
            )
