"""The world's tokenizers: byte-pair encodings learned from the grammar's own words, one token a word."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from stitchvm.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

CONTEXT = 16
PAD, BOS, EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


def words() -> tuple[str, ...]:
    """Returns the words of the grammar, in a fixed order."""
    found = ["a", "on", "background"]
    for phrase in (*COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS):
        found += [w for w in phrase.split() if w not in found]
    return tuple(found)


def learn_merges(vocabulary: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns the byte-pair merges (most frequent first) that make one token of every word."""
    spelled = [[*w[:-1], w[-1] + "</w>"] for w in vocabulary]
    merges = []
    while any(len(s) > 1 for s in spelled):
        pairs = Counter(p for s in spelled for p in pairwise(s))
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for s in spelled:
            i = 0
            while i < len(s) - 1:
                if (s[i], s[i + 1]) == best:
                    s[i : i + 2] = ["".join(best)]
                i += 1
    return merges


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns (token -> id, merges); <|pad|> is 0 and <|endoftext|> has the highest id, as CLIP's pooling wants."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = learn_merges(words())
    tokens = [PAD, *letters, *(c + "</w>" for c in letters), ",</w>", ".</w>"]
    tokens += list(dict.fromkeys("".join(m) for m in merges))
    return {t: i for i, t in enumerate([*dict.fromkeys(tokens), BOS, EOS])}, merges


def clip_tokenizer() -> CLIPTokenizer:
    """Returns the tokenizer of every CLIP text encoder of the world (context length 16)."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=PAD,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Returns a T5 tokenizer with one piece a word (<pad> 0, </s> 1, <unk> 2)."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{w}", -2.0) for w in words()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=CONTEXT)


def encode(captions: list[str]) -> list[list[int]]:
    """Returns token ids padded to 16, equal to `clip_tokenizer()` on captions of the grammar but much quicker."""
    vocabulary, _ = clip_vocabulary()
    rows = []
    for caption in captions:
        ids = [
            vocabulary[BOS],
            *(vocabulary[w + "</w>"] for w in caption.split()),
            vocabulary[EOS],
        ]
        rows.append(ids + [vocabulary[PAD]] * (CONTEXT - len(ids)))
    return rows
