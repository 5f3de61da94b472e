"""Tokenizers: CLIP's own, and stand-ins for T5's and BERT's.

CLIP's vocabulary is rebuilt from the merges that open_clip ships, so that it is the published one: 49,408 tokens, the
end of text the last. T5's sentencepiece model and BERT's word list are in no library here. BERT's stand-in has as many
tokens as the published list, the special ones at their places, and letters; T5's has letters and a few words (its
tokenizer.json, without the spiece.model that the hub has beside it).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

__all__ = ["write_bert_tokenizer", "write_clip_tokenizer", "write_t5_tokenizer"]

START, END = "<|startoftext|>", "<|endoftext|>"
BERT_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_clip_tokenizer(folder: Path, pad: str = END) -> None:
    """Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json of CLIP's tokenizer.

    Arguments:
        folder: Where to write.
        pad: The padding token: the end of text, but "!" in the second tokenizer of SD3.
    """
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    pieces += ["".join(line.split()) for line in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write(folder / "special_tokens_map.json", special)
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    _write(folder / "tokenizer_config.json", config)


def write_t5_tokenizer(folder: Path) -> None:
    """Writes a stand-in for T5's tokenizer: letters and a few words, its special tokens, 512 tokens at most."""
    from transformers import T5Tokenizer

    words = ("a", "the", "of", "red", "blue", "cat", "dog", "photo")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -4.0) for letter in LETTERS]
    T5Tokenizer(vocab=pieces, extra_ids=100, model_max_length=512).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", config | {"tokenizer_class": "T5Tokenizer"})


def write_bert_tokenizer(folder: Path, tokens: int) -> None:
    """Writes a stand-in for bert-base-uncased's vocab.txt with as many tokens, and its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [BERT_SPECIAL.get(k, f"[unused{k}]") for k in range(tokens)]
    own = [*LETTERS, *(f"##{letter}" for letter in LETTERS), "a", "the", "of", "red", "cat"]
    own = list(dict.fromkeys(own))
    words[1000 : 1000 + len(own)] = own
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    config = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    _write(folder / "tokenizer_config.json", config)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), "utf-8")
