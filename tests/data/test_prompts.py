"""Prompts from text, JSON lines and HPDv2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stitchvm.data.prompts import Prompts, read_prompts
from tests.data.files import write_hpdv2


def test_formats(tmp_path: Path) -> None:
    (tmp_path / "drawbench.txt").write_text("A red car.\nA dog.\n\nA red car.\n")
    assert read_prompts(tmp_path / "drawbench.txt") == ["A red car.", "A dog."]
    assert len(read_prompts(tmp_path / "drawbench.txt", unique=False)) == 3
    (tmp_path / "p.jsonl").write_text('{"text": "one", "id": 1}\n{"text": "two"}\n')
    assert read_prompts(tmp_path / "p.jsonl", key="text") == ["one", "two"]
    write_hpdv2(tmp_path)
    assert read_prompts(tmp_path / "train.json") == ["prompt 0", "prompt 1", "prompt 2"]


def test_loaders(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"p{i}" for i in range(10)))
    data = Prompts(str(tmp_path / "p.txt"), batch_size=4, seed=1)
    data.setup("predict")
    train = [prompt for batch in data.train_dataloader() for prompt in batch["prompt"]]
    assert len(set(train)) == 8 and train != sorted(train)
    batches = list(data.predict_dataloader())
    assert [batch["prompt"] for batch in batches] == [
        [f"p{i}" for i in r] for r in (range(4), range(4, 8), (8, 9))
    ]
    assert batches[2]["index"].tolist() == [8, 9]


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": "x"}))
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n{"prompt"')
    for name, message in [
        ("absent.txt", r"file of prompts not found: expected .*absent\.txt"),
        ("empty.txt", "has no prompts"),
        ("a.jsonl", r"Entry in line 1 of .* no key 'prompt', only \['caption'\]"),
        ("b.jsonl", "Line 2 of .* not valid JSON"),
        ("", "is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            Prompts(str(tmp_path / name)).setup("fit")
