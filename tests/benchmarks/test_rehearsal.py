"""The rehearsal's own facts: sizes against published ones, files that load, configurations that all have a plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def table():
    """All networks at their real size, on the meta device."""
    import sys

    sys.path.insert(0, str(BENCHMARKS))
    from rehearsal_check import rows

    return {(row["name"], row["where"].rpartition("/")[2]): row for row in rows("full")}


def test_parameters_and_bytes_are_the_published_ones(table):
    """`rows` compares what is known to the byte; here what is known in words."""
    flux = table["flux", "transformer"]
    assert flux["published"] == flux["parameters"] == 11_901_408_320 and flux["files"] == 3
    medium, large = table["sd35m", "transformer"], table["sd35l", "transformer"]
    # "2.5 billion" and "8.1 billion" of the model cards count the table of positions, which is a buffer
    assert round((medium["bytes"] / 2) / 1e9, 1) == 2.5 and medium["files"] == 1
    assert round((large["bytes"] / 2) / 1e9, 1) == 8.1 and large["files"] == 2
    for name in ("sd35m", "sd35l", "flux"):
        t5 = table[name, "text_encoder_2" if name == "flux" else "text_encoder_3"]
        assert t5["parameters"] == t5["published"] == 4_762_310_656 and t5["files"] == 2


def test_a_wrong_size_is_told(monkeypatch):
    import rehearsal_check

    key = "aesthetic", "sac+logos+ava1-l14-linearMSE.pth"
    monkeypatch.setitem(rehearsal_check.PUBLISHED_BYTES, key, 3_000_000)
    with pytest.raises(ValueError, match="3,000,000"):
        rehearsal_check.rows("full", ("aesthetic",))


def test_shards_of_flux_end_where_the_published_ones_do():
    """Sizes of the three files, each within its header of the published size: the same tensors are in them."""
    from rehearsal_check import HEADER, _bytes
    from rehearsal_facts import PIPELINES, PUBLISHED_BYTES
    from rehearsal_shapes import shapes_of
    from rehearsal_weights import shard

    network = PIPELINES["flux"].networks[0]
    parts = shard(shapes_of(network.kind, network.config), network.dtype, 3)
    for k, part in enumerate(parts, 1):
        name = f"transformer/diffusion_pytorch_model-{k:05d}-of-00003.safetensors"
        header = PUBLISHED_BYTES["flux", name] - _bytes(part, "bfloat16")
        # a header has about a hundred bytes for each tensor: one tensor more or less would be megabytes
        assert 80 * len(part) < header < 160 * len(part) < HEADER


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_are_what_safetensors_reads(tmp_path, dtype):
    from rehearsal_weights import random_tensors, write_safetensors

    shapes = {
        "a.weight": (700, 1900),  # more than the block
        "norm.weight": (64,),
        "norm.bias": (64,),
        "logit_scale": (),
        "embeddings.position_ids": (1, 77),
    }
    path = tmp_path / "model.safetensors"
    size = write_safetensors(path, shapes, dtype)
    assert size == path.stat().st_size
    found, memory = load_file(path), random_tensors(shapes, dtype)
    assert {name: tuple(t.shape) for name, t in found.items()} == shapes
    assert all(torch.equal(found[name], memory[name]) for name in shapes)
    assert found["a.weight"].dtype == getattr(torch, dtype)
    weight, norm = found["a.weight"].float(), found["norm.weight"].float()
    assert float(weight.std()) == pytest.approx(1900**-0.5, rel=0.02) and abs(weight.mean()) < 1e-3
    assert float(norm.mean()) == pytest.approx(1, abs=0.02)
    assert float(found["logit_scale"]) == pytest.approx(4.605, abs=0.02)
    assert found["embeddings.position_ids"].flatten().tolist() == list(range(77))


def test_a_sharded_checkpoint(tmp_path):
    from rehearsal_weights import write_sharded

    shapes = {f"layers.{k}.weight": (10, 10) for k in range(7)}
    paths = write_sharded(tmp_path, "model", shapes, "float32", 3, "fp16")
    assert [p.name for p in paths] == [
        f"model.fp16-0000{k}-of-00003.safetensors" for k in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "model.safetensors.index.fp16.json").read_text())
    assert (
        index["metadata"]["total_size"] == 7 * 400 and index["weight_map"].keys() == shapes.keys()
    )
    for path in paths:
        own = {name for name, file in index["weight_map"].items() if file == path.name}
        assert own == set(load_file(path)) and own


def test_clips_own_tokenizer_is_rebuilt(tmp_path):
    """Its ids are those of open_clip's tokenizer, which are OpenAI's."""
    import open_clip
    from rehearsal_tokenizers import write_clip_tokenizer
    from transformers import CLIPTokenizer

    write_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    prompts = ["a photo of a cat, 3 dogs & an emoji: ½", "The Quick brown-fox's jump"]
    ids = tokenizer(prompts, padding="max_length", max_length=77).input_ids
    theirs = open_clip.get_tokenizer("ViT-L-14")(prompts)
    for own, row in zip(ids, theirs.tolist(), strict=True):
        end = own.index(49407)
        assert own[: end + 1] == row[: end + 1] and set(own[end:]) == {49407}


def test_berts_stand_in_has_its_special_tokens_in_place(tmp_path):
    from rehearsal_tokenizers import write_bert_tokenizer
    from transformers import BertTokenizer

    write_bert_tokenizer(tmp_path, 30522)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 30522
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id)
    assert (*special, tokenizer.sep_token_id, tokenizer.mask_token_id) == (0, 100, 101, 102, 103)
    ids = tokenizer("the red cat xyz").input_ids
    assert 100 not in ids and ids[0] == 101 and ids[-1] == 102


@pytest.mark.parametrize(("scale", "device"), [("tiny", "cpu"), ("full", "cpu"), ("full", "gpu")])
def test_every_configuration_has_a_plan_that_parses(tmp_path, scale, device, monkeypatch):
    """The overrides are options of the command that they are given to."""
    from rehearsal_child import RELOAD
    from rehearsal_plan import plans

    from stitchvm.lightning_cli import StitchCLI
    from stitchvm.preflight.compose import compose

    names = {p.stem for p in (BENCHMARKS.parent / "configs").glob("*.yaml")}
    found = {plan.name: plan for plan in plans(scale, device, ["*"], tmp_path)}
    assert found.keys() == {n for n in names if "world" not in n}
    order = list(found)
    assert order.index("distill_sd35m_hpsv2") < order.index("dps_stitched_sd35m")
    assert order.index("plain_sd35m") < order.index("eval_samples")
    unsearched = {n for n in found if "distill" in n and found[n].commands[0][0] != "search"}
    flux = {n for n in names if n.startswith("distill_flux")}
    assert unsearched == (flux if (scale, device) == ("full", "cpu") else set())
    for method in (
        "instantiate_classes",
        "after_instantiate_classes",
        "before_instantiate_classes",
    ):
        monkeypatch.setattr(StitchCLI, method, lambda self: None)
    monkeypatch.setattr(StitchCLI, "_run_subcommand", lambda self, name: None)
    if scale == "tiny":  # parsing takes a second each; the options are the same at every scale
        for name in (
            "distill_vae_sd35_clip",
            "nft_sd35m",
            "grpo_sd35m",
            "bon_flux",
            "eval_samples",
        ):
            for argv in {argv[0]: argv for argv in found[name].commands}.values():
                if argv[0] != RELOAD:
                    cli = StitchCLI(args=list(argv), command=argv[0])
                    assert cli.subcommand == argv[0]
    for plan in found.values():
        assert plan.makes and all(file.startswith(f"runs/{plan.name}/") for file in plan.makes)
        own = {argv[2] for argv in plan.commands if Path(argv[2]).stem == plan.name}
        (path,) = map(Path, own)
        assert compose([path])["trainer"]["default_root_dir"] == f"runs/{plan.name}"


def test_a_root_inside_the_repository_is_refused(tmp_path):
    from rehearsal import main

    with pytest.raises(SystemExit, match="inside the repository"):
        main(["--root", str(BENCHMARKS / "x"), "--write"])
    with pytest.raises(SystemExit, match="--root"):
        main(["--write"])
    with pytest.raises(SystemExit, match="expected some of sd35m"):
        main(["--root", str(tmp_path), "--only", "sd4", "--write"])


def test_only_the_folder_is_the_hub(tmp_path, monkeypatch):
    """Whatever the user's own settings are: one of them wins over HF_HOME."""
    import os

    from rehearsal_hub import enter

    for key in ("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "STITCHVM_CACHE"):
        monkeypatch.setenv(key, "mine")  # restored afterwards
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    enter(tmp_path)
    assert "HF_HUB_CACHE" not in os.environ
    assert (os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"]) == (str(tmp_path), "1")
    assert os.environ["STITCHVM_CACHE"] == str(tmp_path / "cache")


def test_writing_is_a_process_of_its_own(tmp_path):
    """It starts torch's threads, and after those a forked command would wait for ever in its first parallel loop."""
    from rehearsal import _apart

    assert _apart(os.mkdir, tmp_path / "made") == 0 and (tmp_path / "made").is_dir()
    assert _apart(os.mkdir, tmp_path / "made") == 1
    assert _apart(os._exit, 3) == 3  # of that process, not of this one


def test_list_writes_nothing(capsys, tmp_path, monkeypatch):
    from rehearsal import main

    monkeypatch.chdir(tmp_path)
    assert main(["--list", "--only", "aesthetic", "hpsv2"]) == 0
    said = capsys.readouterr().out
    assert "sac+logos+ava1-l14-linearMSE.pth" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_command_runs_in_a_process_of_its_own(method, tmp_path):
    from rehearsal_child import run_command

    done = run_command(tmp_path, ["--version"], tmp_path / "logs" / "0.log", method)
    assert done.code == 0 and done.seconds > 0 and done.peak_memory_gib > 0
    assert "stitchvm 0." in done.log.read_text()
    wrong = run_command(tmp_path, ["fits"], tmp_path / "logs" / "1.log", method)
    assert wrong.code == 2 and "did you mean 'fit'" in wrong.log.read_text()


def test_pages_of_files_are_told_apart(tmp_path):
    """A mapped file that has been read through counts as memory of the process, not as anonymous memory."""
    from rehearsal_child import _anonymous

    n = 16 * 2**20  # numbers of four bytes: 64 MiB
    (tmp_path / "file").write_bytes(bytes(4 * n))
    before = _anonymous(os.getpid())
    mapped = torch.from_file(str(tmp_path / "file"), size=n, dtype=torch.float32)
    assert mapped.sum() == 0 and _anonymous(os.getpid()) < before + 0.03
    held = torch.ones(n)
    assert before == 0 or (held.sum() == n and _anonymous(os.getpid()) > before + 0.05)


def test_why_a_command_failed(tmp_path):
    from rehearsal_child import Outcome
    from rehearsal_run import reason

    log = tmp_path / "0.log"
    log.write_text("a warning\nValueError: no such file\n")
    assert (
        reason(Outcome(1, 1.0, 2.0, "process", 1.5, log))
        == "exit code 1: ValueError: no such file"
    )
    assert reason(Outcome(-9, 1.0, 2.0, "process", 1.5, log)).startswith(
        "killed, most likely for want"
    )
    assert reason(Outcome(-6, 1.0, 2.0, "process", 1.5, log)) == "ended by SIGABRT"
