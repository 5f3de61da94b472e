"""Memory of a device: counted sizes against hand-computed ones, sums of the table, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

ROOT = Path(__file__).parents[2]
META = torch.device("meta")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)


def test_the_fullest_rank_has_the_longer_chunks() -> None:
    from memory_page import elements, most_on_a_rank

    shapes = [(8, 3), (5, 2), (1,)]
    assert elements(shapes) == 35
    assert most_on_a_rank(shapes, 1) == 35
    assert most_on_a_rank(shapes, 4) == 2 * 3 + 2 * 2 + 1


def test_counted_sizes_are_those_by_hand() -> None:
    from memory_page import counts

    flux = counts("flux")
    u, D = flux["transformer"], 3072
    mlps = [(256, D), (D, D), (256, D), (D, D), (768, D), (D, D)]  # time, guidance, pooled text
    layers = [(64, D), (4096, D), *mlps, (D, 2 * D), (D, 64)]
    assert u["outside"] == sum(into * out + out for into, out in layers)
    assert u["parameters"] == 11_901_408_320 and u["buffers"] == 0
    assert u["all_on_rank"]["8"] * 2 == 11_901_408_320 * 2 // 8  # 2.98 GB in bfloat16
    assert u["blocks_on_rank"]["4"] == (u["parameters"] - u["outside"]) // 4
    # fused projections and MLP twice for image and text, 6 + 6 modulations, four norms of heads
    double = 2 * (4 * (D * D + D) + 8 * D * D + 5 * D + 6 * (D * D + D)) + 4 * 128
    assert u["largest_block"] == double
    assert flux["lora"]["parameters"] == 266 * 32 * 2 * D
    # 8 a block, but the last of SD 3.5 has 7: no text leaves it
    for model, depth, width, side in (("sd35m", 24, 1536, 384), ("sd35l", 38, 2432, 192)):
        found = counts(model)
        assert found["lora"]["parameters"] == (8 * depth - 1) * 32 * 2 * width
        assert found["transformer"]["buffers"] == side**2 * width
        stitch = found["dfn_clip"]["stitch"]
        assert stitch - counts("flux")["dfn_clip"]["stitch"] == (width - D) * 1280
    # the tail from block 1 on is the tower but for its patches: 3 x 14 x 14 into 1280
    for term in ("dfn_clip", "hpsv2"):
        assert flux[term]["tower"] - flux[term]["tail"] == 3 * 14 * 14 * 1280


def test_the_counts_are_those_of_the_installed_library() -> None:
    from memory_counts import blocks_of, transformer_of
    from memory_page import counts
    from rehearsal_facts import PIPELINES

    transformer = transformer_of(PIPELINES["flux"].networks[0])
    kept = counts("flux")["transformer"]
    assert sum(p.numel() for p in transformer.parameters()) == kept["parameters"]
    inside = sum(p.numel() for block in blocks_of(transformer) for p in block.parameters())
    assert inside == kept["parameters"] - kept["outside"]


def small() -> dict[str, Any]:
    """Counts of one-digit numbers."""
    term = {"parameters": 5, "tower": 4, "tail": 3, "stitch": 1}
    u = {"parameters": 10, "outside": 2, "buffers": 1, "largest_block": 4}
    u |= {"blocks_on_rank": {"1": 8, "4": 2}, "all_on_rank": {"1": 10, "4": 3}}
    parts: dict[str, Any] = {"transformer": u, "dfn_clip": term, "hpsv2": term}
    parts |= {"lora": {"parameters": 1}, "vae": {"parameters": 6}, "text": {"parameters": 7}}
    parts |= {"prefix": {"parameters": 3}}
    kept = {"checkpointing": False, "bytes": 100, "bytes_checkpointed": 50}
    return parts | {"activations": kept}


def test_bytes_of_a_device_are_added_up() -> None:
    from memory_page import full, lora

    found = small()
    # VAE, rewards, text encoders, activations
    rest = 4 * 6 + 4 * 10 + 2 * 7 + 100
    assert sum(lora(found, 1, False).values()) == 2 * (8 + 2 + 1) + 6 * 4 * 1 + rest
    # a stitched value: two tails and stitches, and no vision towers in the rewards
    tails = 4 * 2 * (3 + 1) - 4 * 2 * 4
    sharded = 2 * (2 + 2 + 1) + 2 * 2 * 4
    assert sum(lora(found, 4, True).values()) == sharded + 6 * 4 * 1 + rest + tails
    found["activations"]["checkpointing"] = True
    assert sum(lora(found, 4, True).values()) == sharded + 6 * 4 * 1 + rest + tails - 50
    # weights, gradient, two moments, old, EMA and frozen; the text encoders in float32
    rest = 4 * 1 + 4 * 6 + 4 * 10 + 4 * 7
    assert sum(full(found, 1, False).values()) == 7 * 4 * 10 + rest
    assert sum(full(found, 4, True).values()) == (
        7 * 4 * 3 + 4 * (3 * 4 + 2) + rest + tails + 2 * 3
    )


def test_the_least_number_of_devices_is_the_first_below_80_gb() -> None:
    from memory_page import fits, least

    assert least([90e9, 79e9, 10e9]) == "4" and least([81e9] * 3) == "–"
    row = next(r for r in fits().splitlines() if "FLUX.1-dev, all weights, stitched" in r)
    # T5 and CLIP in float32 beside the rest on eight: 76.6 GB
    assert row.endswith("| 57.1 | 19.5 | 8 | 8 |")


def test_the_configs_are_those_that_were_counted() -> None:
    from memory_page import NAMES, counts

    for model in NAMES:
        kept = counts(model)["activations"]
        run = yaml.safe_load((ROOT / kept["config"]).read_text(encoding="utf-8"))
        settings = run["model"]["init_args"]
        assert (
            model in kept["config"] and settings["gradient_checkpointing"] is kept["checkpointing"]
        )
        assert (settings["micro_batch"], settings["height"]) == (kept["batch"], kept["side"])
        assert kept["bytes_checkpointed"] < kept["bytes"] / 4


def test_autograd_keeps_inputs_of_layers_once_and_no_weights() -> None:
    from memory_counts import Kept

    with META:
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)]
        network, x = nn.Sequential(*blocks), torch.empty(2, 4)
    kept = Kept(network, list(blocks))
    with kept.counting():
        out = network(x).square()
    assert out.requires_grad
    # the linear layer's input and GELU's, 2 x 4 float32 numbers each; at the end the square's
    assert kept.bytes == {None: 32, 0: 64, 1: 64, 2: 64} and kept.whole == 224
    # three inputs of blocks, the square's, and one block run again
    assert kept.inputs == 96 and kept.checkpointed == 96 + 32 + 64


def test_attention_keeps_no_matrix() -> None:
    from memory_counts import Kept

    q, k, v = (torch.empty(1, 2, 3, 4, device=META, requires_grad=True) for _ in range(3))
    kept = Kept(nn.Identity(), [])
    with kept.counting():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape and out.requires_grad
    assert kept.whole == 4 * (4 * 24 + 6)  # queries, keys, values, output; a number a query
