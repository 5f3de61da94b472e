"""Prompts to conditions: the text encoders of a diffusers pipeline, run as the pipeline runs them.

SD3: two CLIP towers (penultimate hidden states, side by side) and T5 (appended on the sequence, no attention
mask) make the tokens; the two projected CLIP embeddings make the pooled vector. FLUX: T5 makes the tokens,
CLIP's pooled output the vector. Encoders are loaded when a prompt is not in the cache, and can be freed one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.hub import resolve

FAMILIES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
DEFAULT_TOKENS = {"sd3": 256, "flux": 512}
Outputs = tuple[Tensor, ...]
_PATTERNS = [
    "model_index.json",
    "transformer/config.json",
    "tokenizer*/*",
    "text_encoder*/config.json",
    "text_encoder*/model.safetensors",
    "text_encoder*/model-*.safetensors",
    "text_encoder*/model.safetensors.index.json",
]


@dataclass(frozen=True)
class Condition:
    """What a transformer is told of B prompts.

    Attributes:
        tokens: The text tokens, with shape (B, M, D).
        pooled: The pooled embedding, with shape (B, P).
    """

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Tensor | slice) -> Condition:
        """Returns the conditions of the samples `index`."""
        return Condition(self.tokens[index], self.pooled[index])

    def repeat(self, times: int) -> Condition:
        """Returns every condition `times` times, neighbours together: (B * times, ...)."""
        return Condition(
            self.tokens.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0)
        )

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Returns the condition on another device or in another dtype."""
        return Condition(self.tokens.to(*args, **kwargs), self.pooled.to(*args, **kwargs))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Returns several conditions as one batch."""
        return Condition(
            torch.cat([c.tokens for c in conditions]), torch.cat([c.pooled for c in conditions])
        )


class TextEncoders:
    """The text encoders of a pipeline folder or hub id, loaded when first used.

    Arguments:
        path: The pipeline's folder or hub id.
        family: "sd3" or "flux".
        num_tokens: The length T5's tokens are padded or cut to (the pipelines' `max_sequence_length`).
        dtype: The encoders' dtype.
        revision: The hub revision.
    """

    def __init__(
        self,
        path: str,
        family: str,
        num_tokens: int,
        dtype: torch.dtype,
        revision: str | None = None,
    ) -> None:
        if family not in DEFAULT_TOKENS:
            raise ValueError(f"family '{family}', expected one of {', '.join(DEFAULT_TOKENS)}")
        if not 1 <= num_tokens <= 512:
            raise ValueError(
                f"{num_tokens} text tokens, expected 1 ... 512: the length of T5's tokens, "
                f"{DEFAULT_TOKENS[family]} in the {family} pipeline"
            )
        self.path, self.family, self.num_tokens, self.dtype = path, family, num_tokens, dtype
        self.revision = revision
        self._found: Path | None = None
        self._loaded: dict[str, nn.Module] = {}
        self._tokenizers: dict[str, Any] = {}

    @property
    def on_disk(self) -> bool:
        """Whether what they say can be kept in a file, to be read in their place."""
        return True

    def with_tokens(self, num_tokens: int) -> TextEncoders:
        """Returns the same encoders for another length; they are loaded anew."""
        return TextEncoders(self.path, self.family, num_tokens, self.dtype, self.revision)

    def free(self) -> None:
        """Frees all encoders; the next prompt that is not cached loads them again."""
        self._loaded.clear()

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", keep: bool = True
    ) -> Condition:
        """Returns the condition of prompts.

        Arguments:
            prompts: The B prompts, encoded in one batch.
            device: Where the encoders run and the result lies.
            keep: Whether encoders stay in memory. If not, each is freed before the next is loaded.

        Raises:
            ValueError: If there are no prompts.
            FileNotFoundError: If the folder lacks an encoder.
        """
        texts = list(prompts)
        if not texts:
            raise ValueError("no prompts to encode; give at least one")
        place = torch.device(device)
        return self._join({name: self._encode(name, texts, place, keep) for name in self._names()})

    @torch.no_grad()
    def ahead(
        self, prompts: Sequence[str], device: torch.device | str = "cpu"
    ) -> Iterator[Condition]:
        """Yields the condition of each prompt by itself, on the CPU: what `self([prompt])` is, bit for bit.

        Each encoder is loaded once and freed before the next one is loaded; T5 is the last.

        Arguments:
            prompts: The prompts.
            device: Where the encoders run.
        """
        *first, last = self._names()
        place, made = torch.device(device), [dict[str, Outputs]() for _ in prompts]
        for name in first if made else ():
            for text, outputs in zip(prompts, made, strict=True):
                outputs[name] = self._encode(name, [text], place, True)
                outputs[name] = tuple(x.cpu() for x in outputs[name])
            self._loaded.pop(name, None)
        for text, outputs in zip(prompts, made, strict=True):
            outputs[last] = tuple(x.cpu() for x in self._encode(last, [text], place, True))
            yield self._join(outputs)
            outputs.clear()
        self._loaded.pop(last, None)

    def _names(self) -> list[str]:
        """Returns the encoders that the pipeline has, in the order in which they run."""
        if self.family == "flux":
            return ["text_encoder", "text_encoder_2"]
        three = self._component("text_encoder_3")[1] is not None
        return ["text_encoder", "text_encoder_2", *["text_encoder_3"] * three]

    def _encode(self, name: str, texts: list[str], device: torch.device, keep: bool) -> Outputs:
        """Returns what the condition takes of an encoder: tokens of SD3's CLIPs and of T5, vectors of CLIPs."""
        t5 = name == ("text_encoder_3" if self.family == "sd3" else "text_encoder_2")
        length = self.num_tokens if t5 else self._tokenizer("tokenizer").model_max_length
        ids = self._ids(name.replace("text_encoder", "tokenizer"), texts, length, device)
        if t5:
            return (self._run(name, ids, device, keep)[0].to(self.dtype),)
        if self.family == "flux":
            return (self._run(name, ids, device, keep).pooler_output.to(self.dtype),)
        out = self._run(name, ids, device, keep, output_hidden_states=True)
        return out.hidden_states[-2].to(self.dtype), out[0]

    def _join(self, outputs: dict[str, Outputs]) -> Condition:
        """SD3: [CLIP-L | CLIP-G] padded to T5's width, then T5's tokens. FLUX: T5's tokens and CLIP's vector."""
        if self.family == "flux":
            return Condition(*outputs["text_encoder_2"], *outputs["text_encoder"])
        hidden, pooled = zip(
            *(outputs[n] for n in ("text_encoder", "text_encoder_2")), strict=True
        )
        clip = torch.cat(hidden, dim=-1)
        if "text_encoder_3" in outputs:
            (t5,) = outputs["text_encoder_3"]
        else:
            config = self._folder() / "transformer" / "config.json"
            width = json.loads(config.read_text())["joint_attention_dim"]
            t5 = clip.new_zeros(len(clip), self.num_tokens, width)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return Condition(torch.cat([clip, t5], dim=-2), torch.cat(pooled, dim=-1))

    def _ids(self, name: str, texts: list[str], length: int, device: torch.device) -> Tensor:
        """Returns token ids with shape (B, length), padded and cut."""
        batch = self._tokenizer(name)(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return batch.input_ids.to(device)

    def _run(
        self, name: str, ids: Tensor, device: torch.device, keep: bool, **options: Any
    ) -> Any:
        """Runs one encoder in its own dtype, loading it before and freeing it after where needed."""
        encoder = self._loaded.get(name)
        if encoder is None:
            encoder = self._load(name, dtype=self.dtype).eval().requires_grad_(False)
        encoder = encoder.to(device)
        if keep:
            self._loaded[name] = encoder
        # as the networks that read the answer: it is kept, and not to depend on who asks for it first
        with torch.autocast(ids.device.type, enabled=False):
            return encoder(ids, **options)

    def _tokenizer(self, name: str) -> Any:
        """Returns a tokenizer, loaded once."""
        if name not in self._tokenizers:
            self._tokenizers[name] = self._load(name)
        return self._tokenizers[name]

    def _folder(self) -> Path:
        """Returns the pipeline's folder, with the encoders in it."""
        if self._found is None:
            self._found = resolve(self.path, allow_patterns=_PATTERNS, revision=self.revision)
        return self._found

    def _component(self, name: str) -> tuple[str | None, str | None]:
        """Returns library and class of a component in model_index.json."""
        index = self._folder() / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"'{self.path}' has no model_index.json: give a diffusers pipeline folder, or "
                "`null_embeddings`, a file of precomputed null-text embeddings"
            )
        library, class_name = json.loads(index.read_text()).get(name, (None, None))
        return library, class_name

    def _load(self, name: str, **options: Any) -> Any:
        """Loads one component with the class that model_index.json names."""
        import transformers

        _, class_name = self._component(name)
        folder = self._folder() / name
        if class_name is None or not folder.is_dir():
            raise FileNotFoundError(
                f"'{self.path}' lacks {name}/, which its text conditioning needs: complete the folder, "
                "or give `null_embeddings`, a file of precomputed null-text embeddings"
            )
        return getattr(transformers, class_name).from_pretrained(folder, **options)
