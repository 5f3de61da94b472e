"""The conditions of prompts a generator has been told: each encoded once, kept in memory and, if asked, on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from stitchvm.backbones.null_text import PromptStore, null_condition
from stitchvm.backbones.text import Condition, TextEncoders


class PromptMemory:
    """Conditions by prompt, in CPU memory up to a limit.

    Arguments:
        encoders: What encodes a prompt that is not kept.
        limit: How many conditions are kept in memory; the oldest go first.
        folder: Where they are kept on disk, too; nowhere if None.

    Attributes:
        kept: The conditions in memory, the oldest first.
    """

    def __init__(self, encoders: TextEncoders, limit: int, folder: str | None = None) -> None:
        self.encoders, self.limit = encoders, limit
        self.kept: OrderedDict[str, Condition] = OrderedDict()
        self._store = PromptStore(encoders, folder) if folder else None
        self._null: Condition | None = None

    @property
    def null(self) -> Condition:
        """The condition of the empty prompt with B = 1."""
        if self._null is None:
            self._null = null_condition(self.encoders)
        return self._null

    def null_on(self, device: torch.device) -> Condition:
        """Returns the condition of the empty prompt on a device, where it is kept: it is asked for at every step."""
        if self.null.tokens.device != device:
            self._null = self.null.to(device)
        return self.null

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Condition:
        """Returns the condition of B prompts; those that are not kept are encoded in one batch.

        Raises:
            ValueError: If there are no prompts, or one text in their place.
        """
        texts = listed(prompts) or []
        known = {text: c for text in texts if (c := self._lookup(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing or not texts:
            encoded = self.encoders(missing, device=device)
            for number, text in enumerate(missing):
                known[text] = encoded.select(slice(number, number + 1)).to("cpu")
                self._put(text, known[text])
        for text, condition in known.items():
            self.kept[text] = condition
            self.kept.move_to_end(text)
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        return Condition.cat([known[text] for text in texts]).to(device)

    def encode_ahead(self, prompts: Sequence[str], device: torch.device) -> None:
        """Encodes prompts one by one with one encoder in memory at a time, keeps them all, and frees the encoders."""
        distinct = list(dict.fromkeys(listed(prompts) or []))
        self.limit = max(self.limit, len(distinct))
        known = {text: c for text in distinct if (c := self._lookup(text)) is not None}
        missing = [text for text in distinct if text not in known]
        self.kept.update(known)
        for text, condition in zip(missing, self.encoders.ahead(missing, device), strict=True):
            self.kept[text] = condition
            self._put(text, condition)
        self.free()

    def free(self) -> None:
        """Frees the encoders, after seeing to the empty prompt."""
        _ = self.null
        self.encoders.free()

    def _lookup(self, text: str) -> Condition | None:
        """Returns a condition from memory or disk."""
        if text in self.kept:
            return self.kept[text]
        return self._store.get(text) if self._store is not None else None

    def _put(self, text: str, condition: Condition) -> None:
        """Keeps a new condition on disk, if asked."""
        if self._store is not None:
            self._store.put(text, condition)


def listed(prompts: Sequence[str] | None) -> list[str] | None:
    """Returns prompts as a list.

    Raises:
        ValueError: If they are one text: its letters would be prompts.
    """
    if isinstance(prompts, str):
        raise ValueError(f"the prompts are one text, {prompts!r}: put it into a list.")
    return None if prompts is None else list(prompts)
