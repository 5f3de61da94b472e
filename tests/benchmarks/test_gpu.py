"""The GPU benchmarks as one command: its plan, its processes with limits, all at reduced size."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Scripts for workers: each writes what it was given to --output, or fails as it is told."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    (folder / "gpu_trial.py").write_text(
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "READY = []\n"
        "def prepare(argv):\n"
        "    READY.append(time.time())\n"
        "def main(argv):\n"
        "    print('began', flush=True)\n"
        "    if '--fail' in argv:\n"
        "        raise RuntimeError('no such luck')\n"
        "    if '--exit' in argv:\n"
        "        raise SystemExit('no time left')\n"
        "    time.sleep(600 if '--hang' in argv else 2 if '--nap' in argv else 0)\n"
        "    out = Path(argv[argv.index('--output') + 1])\n"
        "    record = {'argv': argv, 'ready': READY[0], 'began': time.time(), 'own': sys.argv}\n"
        "    out.write_text(json.dumps({'records': [record]}))\n"
    )
    return "gpu_trial"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_is_ready_before_it_begins(tmp_path, script, method):
    from gpu_worker import Worker

    output, log = tmp_path / "out.json", tmp_path / "log.txt"
    context = multiprocessing.get_context(method)
    worker = Worker(context, script, ["--output", str(output)], log, minutes=True)
    time.sleep(0.5)
    before = time.time()
    seconds, error = worker.run(30)
    assert error is None and seconds < 30
    (record,) = json.loads(output.read_text())["records"]
    assert record["began"] >= before and record["own"][0] == "gpu_trial.py"
    assert record["argv"][-2:] == ["--minutes", "0.45"]  # a tenth is left to write what there is
    assert "began" in log.read_text()


def test_what_fails_or_hangs_says_so(tmp_path, script):
    from gpu_worker import Worker

    context = multiprocessing.get_context("forkserver")

    def outcome(*argv, limit=30.0):
        return Worker(context, script, argv, tmp_path / "log.txt").run(limit)

    assert outcome("--fail")[1] == "exit code 70: RuntimeError: no such luck"
    assert outcome("--exit")[1] == "exit code 1: no time left"
    seconds, error = outcome("--hang", limit=2.0)
    assert error == "stopped after its limit of 2 s" and seconds < 10
    waiting = Worker(context, script, ["--hang"], tmp_path / "log.txt")
    waiting.stop()  # one that never began
    assert not waiting.process.is_alive()
    assert "no_such_script" in Worker(context, "no_such_script", [], tmp_path / "log").run(30)[1]


@pytest.fixture
def light(monkeypatch):
    """Nothing heavy is imported beforehand."""
    import gpu_run
    from gpu_plan import Part

    monkeypatch.setattr(gpu_run, "PRELOAD", [])
    monkeypatch.setattr(Part, "small", lambda *_: [])
    return gpu_run, Part


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_the_next_part_is_made_ready_while_one_runs(tmp_path, script, light, device):
    gpu_run, Part = light
    runs = gpu_run.Runs(tmp_path, device, True)
    plan = [Part("first", "naps", script, ("--nap",)), Part("second", "follows", script)]
    gpu_run.run(runs, plan, 100)
    first, second = (
        json.loads((tmp_path / f"{p.name}.json").read_text())["records"][0] for p in plan
    )
    assert (second["ready"] < first["began"]) == (device == "cuda")  # at its end: it naps before
    assert second["began"] > first["began"]


def test_the_same_command_goes_on_with_what_is_missing(tmp_path, script, light, capsys):
    gpu_run, Part = light
    good, bad = Part("good", "works", script), Part("bad", "fails", script, ("--fail",))
    late, other = Part("late", "is late", script), Part("other", "compiles", script, gpu_only=True)
    runs = gpu_run.Runs(tmp_path, "cpu", True)
    gpu_run.run(runs, [good, bad, other], 100)
    gpu_run.run(runs, [late], 5)
    states = {r["part"]: r for r in json.loads((tmp_path / "gpu.json").read_text())["records"]}
    assert {name: r["state"] for name, r in states.items()} == {
        "good": "done",
        "bad": "failed",
        "other": "skipped",
        "late": "skipped",
    }
    assert "no such luck" in states["bad"]["message"]
    assert states["late"]["message"] == "it needs about 10 s, 5 s are left"
    began = (tmp_path / "good.json").read_bytes()
    capsys.readouterr()

    again = gpu_run.Runs(tmp_path, "cpu", True)
    mended = Part("bad", "works now", script)
    gpu_run.run(again, [good, mended, late], 100)
    assert capsys.readouterr().out.splitlines()[0] == "good: done before"
    assert (tmp_path / "good.json").read_bytes() == began
    assert {n: again.states[n]["state"] for n in ("bad", "late")} == {
        "bad": "done",
        "late": "done",
    }
    assert set(again.results([good, mended, late, other])) == {"good", "bad", "late"}
    with pytest.raises(SystemExit, match="reduced results on cpu"):
        gpu_run.Runs(tmp_path, "cuda", False)


def test_the_plan_fits_and_its_words_name_variants():
    import gpu_plan
    from common import chosen
    from sampling_setups import SAMPLING_SETUPS
    from sampling_variants import variants as sampling_variants
    from setups import SETUPS
    from steps import variants
    from training_setups import trainings

    for reduced in (False, True):
        plan = gpu_plan.parts(profile=True, reduced=reduced)
        assert len({part.name for part in plan}) == len(plan)
        for part in plan:
            assert (BENCHMARKS / f"{part.script}.py").is_file()
            argv = part.command(Path("folder"), "cuda", reduced)
            assert ("--reduced" in argv) == (reduced and part.script != "gpu_rate")
            if "--only" not in part.argv:
                continue
            at = part.argv.index("--only") + 1
            words = [w for w in part.argv[at:] if not w.startswith("--") and w != "inductor"]
            name = part.argv[1]
            if part.script == "distillation":
                setup = SETUPS[name].shrunk() if reduced else SETUPS[name]
                names = [v.name for v in variants(setup, "--compile" in part.argv)]
            elif part.script == "training":
                names = [t.name for t in trainings()]
            else:
                names = [
                    v.name for v in sampling_variants(not name.startswith("flux"), graphs=True)
                ]
                assert name in SAMPLING_SETUPS
            for word in words:
                assert any(chosen(n, [word]) for n in names), (part.name, word, names)
    plan = gpu_plan.parts(profile=True)
    first = plan[: 1 + [p.name for p in plan].index("search")]
    assert sum(p.estimate for p in first) < 9 * 60  # what is most important, in one call
    assert sum(p.estimate for p in plan) < 20 * 60
    small = [p.name for p in gpu_plan.parts(profile=True, reduced=True)]
    assert small == [p.name for p in plan if not p.gpu_only][: len(small)]


def test_work_by_hand():
    from gpu_work import Counts

    of = Counts()
    of.sampling_records = [
        {"setup": "s", "part": name, "flops": f, "backward_flops": 2 * f}
        for name, f in (
            ("denoiser", 1000.0),
            ("prefix", 200.0),
            ("stitch and tail", 40.0),
            ("decoder", 300.0),
            ("reward", 20.0),
        )
    ] + [
        {"setup": "s", "variant": "plain", "method": "plain", "steps": 10, "flops": 20_000.0},
        {"setup": "s", "variant": "FK x", "method": "fk", "steps": 7, "flops": 70_000.0},
        {"setup": "s", "variant": "DPS x", "method": "dps", "steps": 10, "flops": 90_000.0},
    ]
    parts = 1560 * 4  # forward alone, and forward with twice as much backward
    assert of.all_parts("s") == parts
    # two steps of plain, all seven of FK; each part and choice once more than it is timed
    assert of.sampling("s", "FK") == 2 * (4000 + 70_000) + 3 * (4 * 1000 + 3 * 900 + parts)
    # without gradient and with it: 5 forwards for each sample asked; the denoiser under one and two branches
    assert of.values("s") == 4 * (26 * 4 * 240 + 4 * (3 * 1000 + 2 * 320))

    of.distillation_records = [
        {"setup": "sd35m_512", "tflop_per_image": 0, "variant": f"batch 32, {v}", "flops": f}
        for v, f in (("K = 1", 10.0), ("K = 4", 30.0), ("K = 4, cached latents", 20.0))
    ]
    # 12 micro-batches each (a cycle to warm up, two timed), and 12 in parts; 16 images of half a batch
    assert of.distillation("sd35m_512", False, "K = 4, cached") == 12 * 32 * (20 + 10)
    assert of.distillation("sd35m_512", False, "batch 16,") == 12 * (32 * 10 + 16 * 10)
    assert of.distillation("sd35m_512", True, "K = 4, cached latents, compiled") == 12 * 32 * 30

    about = {"setup": "sd35m", "flops_rollout": 7.0, "flops_value": 1.0, "flops_update": 24.0}
    of.training_records = [
        about | {"variant": "NFT terminal", "stop": [25, 25], "losses": 24.0, "flops": 32.0},
        about | {"variant": "NFT stitched", "stop": [12, 17], "losses": 12.0, "flops": 32.0},
        about | {"variant": "DRaFT-1 stitched", "stop": [3, 7], "losses": 1.0, "flops": 32.0},
    ]
    # 24 rolled out twice, three losses of nine images; both stops of the window
    assert of.training("sd35m", "NFT") == (48 * 8 + 27 * 1) + 2 * (48 * 8 + 27 * 2)
    assert of.training("sd35m", "DRaFT-1") == 2 * 24 * 32


def test_command_lists_parts_and_refuses_real_sizes_on_a_cpu(tmp_path, capsys):
    import gpu

    assert gpu.main(["--list", "--profile"]) == 0
    lines = capsys.readouterr().out
    assert "profile_guidance" in lines and "distillation_512" in lines
    with pytest.raises(SystemExit, match="give --output"):
        gpu.main([])
    with pytest.raises(SystemExit, match="add --reduced"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results yet"):
        gpu.main(["--device", "cpu", "--reduced", "--report", "--output", str(tmp_path)])


@pytest.mark.slow
def test_everything_at_reduced_size(tmp_path, capsys, monkeypatch):
    import gpu
    from gpu_plan import parts

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--reduced"])
    command = ["--output", str(tmp_path), "--reduced", "--device", "cpu", "--profile"]
    # the others run the same scripts once more
    left_out = {"distillation_1024", "particles", "training_draft3"}
    plan = [p for p in parts(profile=True, reduced=True) if p.name not in left_out]
    command += ["--only", *(part.name for part in plan)]
    assert gpu.main([*command, "--minutes", "30"]) == 0
    states = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert {r["part"]: r["state"] for r in states} == {part.name: "done" for part in plan}
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [r for r in summary["records"] if r["summary"] == "row"]
    quiet = {"attention", "compile", "cli", "profile_distillation", "profile_guidance"}  # no rows
    assert {r["part"] for r in rows} == {part.name for part in plan} - quiet
    for row in rows:
        assert row["error"] is None if "error" in row else True
        assert row["seconds"] > 0 and row["flops"] > 0 and row["peak_memory_gib"] != 0
        floor = row["flops"] / summary["matmul_flops_per_s"]
        assert row["utilisation"] == pytest.approx(floor / row["seconds"])
    names = {r["ratio"] for r in summary["records"] if r["summary"] == "ratio"}
    assert names >= {
        "distillation uncompiled: utilisation",
        "roll-out: utilisation",
        "fastest Tweedie / stitched: time",
        "stitched / fastest Tweedie: memory",
        "stitched / plain: time",
        "NFT terminal / stitched: time per sample",
        "DRaFT-1 terminal / stitched: time per sample",
        "stage 1 / one plain pass of backbone and reward: time",
    }
    changed = {r["change"] for r in summary["records"] if r["summary"] == "change"}
    assert {"compiled per block", "CUDA graph", "batch 1 -> 8"} <= changed
    for of in ("distillation", "guidance"):
        assert "aten::" in (tmp_path / f"profile_{of}.txt").read_text()
    printed = capsys.readouterr().out
    assert (tmp_path / "summary.txt").read_text() in printed
    assert gpu.main([*command, "--minutes", "0"]) == 0  # all of it was done before
