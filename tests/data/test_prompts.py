"""Prompts from text, JSON lines, HPDv2, DrawBench and GenEval, or given on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist

from stitchvm.data.prompt_files import read_entries
from stitchvm.data.prompts import Prompts, read_prompts
from tests.data.files import write_hpdv2
from tests.data.test_arguments import parser

METADATA = [
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"}
    | {"exclude": [{"class": "dog", "count": 3}]},
    {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a dog left of a cat",
    },
]


def lines(path: Path, entries: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return str(path)


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
        ("absent.txt", r"no file of prompts .*absent\.txt: expected a \.txt"),
        ("empty.txt", "has no prompts"),
        ("a.jsonl", r"Entry in line 1 of .* no key 'prompt', only \['caption'\]"),
        ("b.jsonl", "Line 2 of .* not valid JSON"),
        ("", "is a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            Prompts(str(tmp_path / name)).setup("fit")


def test_drawbench(tmp_path: Path) -> None:
    """1,000 lines of 200 prompts with all that upsets a reader of tables: quotes, commas, other scripts."""
    prompts = [
        f'A sign, that says "{i}" \u2013 caf\u00e9, \u2028 and {i}\'s "' for i in range(200)
    ]
    repeated = [prompts[k % 200] for k in range(1000)]
    (tmp_path / "test.txt").write_bytes(("\r\n".join(repeated) + "\r\n").encode())
    assert read_prompts(tmp_path / "test.txt") == prompts
    assert read_prompts(tmp_path / "test.txt", unique=False) == repeated


def test_other_separators_do_not_end_a_line(tmp_path: Path) -> None:
    odd = "one\x0ctwo\u2028three\x85four"
    assert len(odd.splitlines()) == 4
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + f"{odd}\nnext".encode())
    assert read_prompts(tmp_path / "p.txt") == [odd, "next"]  # nor does a byte order mark stay
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False))
    assert read_prompts(tmp_path / "p.jsonl") == [odd]


def test_lists_of_texts(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["a", "b", "a"]')
    assert read_prompts(tmp_path / "p.json") == ["a", "b"]
    (tmp_path / "p.jsonl").write_text('"a"\n"b"\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a", "b"]


def test_geneval_keeps_the_whole_entry(tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", METADATA * 4)  # as other projects repeat it
    data = Prompts(path, batch_size=2)
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["metadata"] == METADATA and batch["index"].tolist() == [0, 1]
    assert batch["prompt"] == [entry["prompt"] for entry in METADATA]
    assert len(read_entries(path, unique=False)) == 8
    plain = Prompts(lines(tmp_path / "p.jsonl", [{"prompt": "x", "tag": "y"}]))
    plain.setup("predict")
    assert all("metadata" not in batch for batch in plain.predict_dataloader())


def test_geneval_errors(tmp_path: Path) -> None:
    counting = METADATA[0]
    other = counting | {"include": [{"class": "cat", "count": 2}]}
    for entries, message in [
        ([counting, other], "has the prompt 'a photo of two dogs' twice with different metadata"),
        ([counting, {"prompt": "x"}], "1 entries are GenEval metadata and 1 are not, such as 'x'"),
        ([counting | {"tag": "count"}], "Entry in line 1 of .* has the tag 'count': expected one"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_entries(lines(tmp_path / "m.jsonl", entries))
    lines(tmp_path / "m.jsonl", [counting, other])
    assert len(read_entries(tmp_path / "m.jsonl", unique=False)) == 2


def test_given_prompts() -> None:
    data = Prompts(prompts=["a cat ", 'two "dogs", one cat'], batch_size=1)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [batch["prompt"] for batch in batches] == [["a cat"], ['two "dogs", one cat']]
    again = Prompts(prompts=["a", "a"], unique=False)
    again.setup("predict")
    assert [batch["prompt"] for batch in again.predict_dataloader()] == [["a", "a"]]


def test_command_line() -> None:
    arguments = ["--data=stitchvm.data.prompts.Prompts", '--data.prompts=["a: b", "null", "1"]']
    config = parser().parse_args(arguments)
    assert config.data.init_args.prompts == ["a: b", "null", "1"]
    given = {"class_path": "stitchvm.data.prompts.Prompts", "init_args": {"path": "x"}}
    over = parser().parse_args(
        [f"--data={json.dumps(given)}", '--data.prompts=["a"]', "--data.path=null"]
    )
    data = parser().instantiate_classes(over).data
    assert data.prompts == ["a"] and data.path is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path = None and prompts = None: give exactly one"),
        ({"path": "x", "prompts": ["a"]}, r"prompts = \['a'\]: give exactly one"),
        ({"prompts": []}, r"not empty, got \[\]"),
        ({"prompts": ["a", " "]}, "not empty"),
        ({"prompts": "a cat"}, r"a list, got one text: \['a cat'\]"),
        ({"prompts": ["a", "b", "a "]}, "has 'a' 2 times: set unique to false"),
    ],
)
def test_exactly_one_source(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(**arguments)


def test_malformed_files(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Prompts,Category\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "null.jsonl").write_text('{"prompt": null}')
    (tmp_path / "list.jsonl").write_text('"a"\n[1]')
    (tmp_path / "empty.json").write_text("[]")
    for name, message in [
        ("t.csv", "is a table; expected a .txt file"),
        ("latin.txt", "is not UTF-8"),
        ("null.jsonl", "in line 1 of .* text under 'prompt'; got None"),
        ("list.jsonl", r"in line 2 of .* got \[1\]"),
        ("empty.json", "non-empty list"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)


class Taker(pl.LightningModule):
    """Returns what it was given."""

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[int, str]]:
        return list(zip(batch["index"].tolist(), batch["prompt"], strict=True))


def test_a_trainer_predicts_in_order() -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)
    data = Prompts(prompts=[f"p{i}" for i in range(5)], batch_size=2)
    taken = trainer.predict(Taker(), datamodule=data)
    assert taken == [[(0, "p0"), (1, "p1")], [(2, "p2"), (3, "p3")], [(4, "p4")]]


def test_a_process_group_without_a_trainer_divides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Prompts(prompts=[f"p{i}" for i in range(7)], batch_size=2)
    data.setup("predict")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append([batch["index"].tolist() for batch in data.predict_dataloader()])
    assert parts == [[[0, 2], [4, 6]], [[1, 3], [5]]]
