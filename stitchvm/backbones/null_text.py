"""Conditions of prompts kept on disk, above all the one of the null text "".

Text encoders are far larger than the blocks of a value model (T5-XXL alone has 4.7 B parameters). The null text is
therefore encoded once, by the model's own encoders, and read from a file ever after.

A file is `FINGERPRINT/PROMPT.safetensors` with the tensors `tokens` (1, M, D) and `pooled` (1, P). The fingerprint is
of the model, its encoders' files, the number of text tokens and the dtype, so a retrained encoder is noticed.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from stitchvm.backbones.loading import dtype_name
from stitchvm.backbones.text import Condition, TextEncoders
from stitchvm.hub import cache_folder, resolve
from stitchvm.writing import written

_HASH_BELOW = 16 * 2**20  # bytes; larger files are told apart by size and time


class PromptStore:
    """A folder of conditions, one safetensors file a prompt.

    Arguments:
        encoders: Whose conditions they are.
        folder: Where to keep them; the library's cache folder by default.
    """

    def __init__(self, encoders: TextEncoders, folder: str | Path | None = None) -> None:
        root = Path(folder).expanduser() if folder is not None else cache_folder() / "prompts"
        self.folder = root / fingerprint(encoders)
        self._described = {
            "model": encoders.path,
            "text_tokens": str(encoders.num_tokens),
            "dtype": dtype_name(encoders.dtype),
        }

    def file(self, prompt: str) -> Path:
        """Returns the file of a prompt."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def get(self, prompt: str) -> Condition | None:
        """Returns the condition of a prompt, or None if it has not been kept."""
        file = self.file(prompt)
        return read_condition(file) if file.is_file() else None

    def put(self, prompt: str, condition: Condition) -> None:
        """Keeps the condition of one prompt. A folder that cannot be written to gives a warning."""
        try:
            write_condition(self.file(prompt), condition, {**self._described, "prompt": prompt})
        except OSError as error:
            warnings.warn(f"cannot keep prompt embeddings in {self.folder}: {error}", stacklevel=2)


def read_condition(file: Path) -> Condition:
    """Returns the condition in a file.

    Raises:
        ValueError: If the file does not hold `tokens` (1, M, D) and `pooled` (1, P).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        tokens, pooled = tensors["tokens"], tensors["pooled"]
        if tokens.ndim != 3 or pooled.ndim != 2 or len(tokens) != 1 or len(pooled) != 1:
            raise ValueError(f"shapes {tuple(tokens.shape)} and {tuple(pooled.shape)}")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is no file of prompt embeddings ({error}): expected safetensors with `tokens` (1, M, D) "
            "and `pooled` (1, P); delete it if it is in the cache, it is then made again"
        ) from error
    return Condition(tokens, pooled)


def write_condition(file: Path, condition: Condition, metadata: dict[str, str]) -> None:
    """Writes the condition of one prompt, whole or not at all."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "tokens": condition.tokens.detach().cpu().contiguous(),
        "pooled": condition.pooled.detach().cpu().contiguous(),
    }
    with written(file) as part:
        save_file(tensors, part, metadata=metadata)


def null_condition(encoders: TextEncoders, null_embeddings: str | None = None) -> Condition:
    """Returns the condition of the null text with B = 1, on the CPU.

    The encoders are loaded, one at a time, only if neither the file nor the cache has it.

    Arguments:
        encoders: The model's encoders.
        null_embeddings: A file with `tokens` (1, M, D) and `pooled` (1, P), used as it is.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is of another layout.
    """
    if null_embeddings is not None:
        file = Path(null_embeddings).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"no file of null-text embeddings at {file.absolute()}; leave `null_embeddings` out to "
                "compute them with the model's own text encoders"
            )
        return read_condition(file).to(encoders.dtype)
    if not encoders.on_disk:
        return encoders([""]).to("cpu")
    store = PromptStore(encoders)
    if (kept := store.get("")) is not None:
        return kept
    condition = encoders([""], keep=False)
    store.put("", condition)
    return condition


def fingerprint(encoders: TextEncoders) -> str:
    """Returns what tells the conditions of one set of encoders from those of another."""
    folder = resolve(
        encoders.path, allow_patterns=["model_index.json"], revision=encoders.revision
    )
    digest = hashlib.sha256()
    for part in (encoders.path, encoders.family, encoders.num_tokens, dtype_name(encoders.dtype)):
        digest.update(f"{part}\n".encode())
    if folder.parent.name == "snapshots":  # of the hub's cache: named after the commit
        digest.update(folder.name.encode())
        return digest.hexdigest()[:32]
    for subfolder in sorted([*folder.glob("text_encoder*"), *folder.glob("tokenizer*")]):
        for file in sorted(f for f in subfolder.rglob("*") if f.is_file()):
            stat = file.stat()
            digest.update(f"{file.relative_to(folder).as_posix()} {stat.st_size} ".encode())
            if stat.st_size < _HASH_BELOW:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            else:
                digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]
