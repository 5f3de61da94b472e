"""The parts of the GPU benchmarks, the most important first, with the FLOPs each will run and the seconds that gives.

FLOPs are added up from the counts in results/counts_*.json, by what each script runs at its settings here: warm-up,
repeats, both stops of a window. Seconds are those at a quarter of 790 TFLOP/s, an H200's rate, and a start: about what
parts took on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_work import PROBES, REPEATS, STEPS, Counts
from setups import SETUPS

__all__ = ["Part", "parts"]

RATE, SHARE = 790e12, 0.25
START = 10.0  # networks with random weights, first calls of every kernel
COMPILING = 60.0  # allowed for what is compiled
LONGEST, SLOW = 4.0, 60.0  # times the estimate that a part may take, and seconds of slow imports


@dataclass(frozen=True)
class Part:
    """One call of a script.

    Attributes:
        name: Its name, and that of its results file.
        what: What it measures.
        script: The module in benchmarks/.
        argv: Its command line, but for device, output and reduction.
        work: The FLOPs that it runs.
        waits: Seconds that are no FLOPs: compilation, reading files.
        minutes: Whether the script takes `--minutes`.
        gpu_only: Whether a CPU leaves it out.
    """

    name: str
    what: str
    script: str
    argv: tuple[str, ...] = ()
    work: float = 0.0
    waits: float = 0.0
    minutes: bool = False
    gpu_only: bool = False

    @property
    def estimate(self) -> float:
        """The seconds it should take on an H200."""
        return START + self.waits + self.work / (SHARE * RATE)

    @property
    def limit(self) -> float:
        """The seconds after which it is stopped."""
        return SLOW + LONGEST * self.estimate

    def command(self, folder: Path, device: str, reduced: bool) -> list[str]:
        """Returns its whole command line."""
        argv = [*self.argv, "--device", device, "--output", str(self.output(folder))]
        small = [*["--reduced"] * (reduced and self.script != "gpu_rate"), *self.small(device)]
        return [*argv, "--overwrite", *(small if reduced else [])]

    def small(self, device: str) -> list[str]:
        """Returns settings that make little of a reduced run: its numbers mean nothing."""
        few = {
            "distillation": ["--steps", "1"],
            "search": ["--probes", "4", "--held-out", "4", "--end-probes", "2"],
            "gpu_sampling": ["--repeats", "1"],
            "gpu_values": ["--repeats", "1"],
            "gpu_cli": ["--only", "plain"],
            "gpu_compile": ["--repeats", "1", *["--backend", "eager"] * (device == "cpu")],
        }
        return few.get(self.script, [])

    def output(self, folder: Path) -> Path:
        """Returns its results file."""
        return folder / f"{self.name}.json"


def parts(profile: bool = False, reduced: bool = False) -> list[Part]:
    """Returns the parts in the order in which they are run; profiles, if asked for, before the variants."""
    return list(_parts(Counts(), profile, reduced))


def _parts(of: Counts, profile: bool, reduced: bool) -> Iterator[Part]:
    def stage_2(side: int, what: str, name: str, *only: str, compiled: bool = False) -> Part:
        setup = SETUPS[f"sd35m_{side}"]
        small = setup.shrunk() if reduced else setup
        # words of variants' names, their batch sizes as shares of the shipped one
        named, words = (
            tuple(
                w.format(half=s.batch_size // 2, full=s.batch_size, twice=2 * s.batch_size)
                for w in only
            )
            for s in (small, setup)
        )
        argv = ("--setup", setup.name, "--steps", str(STEPS), "--only", *named)
        return Part(
            f"distillation_{side}{name}",
            f"stage 2 at {side}², {what}",
            "distillation",
            (*argv, *["--compile"] * compiled),
            of.distillation(setup.name, compiled, *words),
            waits=COMPILING if compiled else 10.0,  # images that are written and read
            gpu_only=compiled,
        )

    def sampling(name: str, setup: str, what: str, *only: str, compiled: bool = False) -> Part:
        argv = ("--setup", setup, "--only", *only, *["--compile", "inductor"] * compiled)
        work = of.sampling(setup, *only)
        waits = COMPILING * compiled
        return Part(name, what, "gpu_sampling", argv, work, waits, minutes=True, gpu_only=compiled)

    def training(method: str, compiled: bool = False) -> Part:
        only = f"={method} stitched" if compiled else method
        argv = ("--setup", "sd35m", "--repeats", "1", "--only", only)
        argv = (*argv, *["--compile", "inductor"] * compiled)
        name = f"training_{method.lower().replace('-', '')}{'_compiled' * compiled}"
        what = f"{method} per update, {'stitched, compiled' if compiled else 'terminal and stitched'}, 512²"
        work = of.training("sd35m", method, *["stitched"] * compiled)
        return Part(name, what, "training", argv, work, COMPILING * compiled, gpu_only=compiled)

    shipped = ("uncompiled, and cached latents", "", "batch {full}, K = 1", "K = 4, cached")
    yield Part("rate", "the device's rate of matrix products", "gpu_rate")
    yield stage_2(512, *shipped)
    compiled_only = ("=batch {full}, K = 1, compiled", "K = 4, cached latents, compiled")
    if not reduced:
        yield stage_2(512, "compiled", "_compiled", *compiled_only, compiled=True)
    yield sampling(
        "guidance", "sd35m_1024", "plain, DPS and DPS + StitchVM per image, 1024²", "DPS"
    )
    if not reduced:
        yield sampling(
            "guidance_compiled",
            "sd35m_1024",
            "plain and DPS + StitchVM, compiled",
            "=DPS stitched",
            "=DPS stitched, CUDA graph",
            compiled=True,
        )
    yield training("NFT")
    if not reduced:
        yield training("NFT", compiled=True)
    yield training("DRaFT-1")
    half = str(PROBES // 2)
    argv = ("--setup", "sd35m_512", "--repeats", str(REPEATS))
    argv = (*argv, "--probes", half, "--held-out", half)
    yield Part(
        "search", "stage 1 at 512²", "search", argv, of.search("sd35m_512", REPEATS), waits=5.0
    )
    yield stage_2(1024, *shipped)
    if not reduced:
        yield stage_2(1024, "compiled", "_compiled", compiled_only[0], compiled=True)
    sides = ("sd35m_1024", "sd35m_512")
    yield Part(
        "values",
        "one value call, stitched and Tweedie, with gradient and without, 1024² and 512²",
        "gpu_values",
        ("--setup", *sides),
        sum(map(of.values, sides)),
    )
    kernels = ("sd35m_1024", "flux_1024")
    yield Part(
        "attention",
        "gradients under each attention kernel, SD 3.5 Medium and FLUX.1-dev",
        "gpu_attention",
        ("--setup", *kernels),
        4 * sum(of.part(name, part, True) for name in kernels for part in ("prefix", "denoiser")),
    )
    yield sampling(
        "particles", "sd35m_1024", "FK steering and best of N per image, 1024²", "FK", "best"
    )
    yield training("DRaFT-3")
    if profile:
        for name, what, work in (
            (
                "distillation",
                "stage 2 at 512²",
                3 * SETUPS["sd35m_512"].batch_size * of.image("sd35m_512"),
            ),
            ("guidance", "DPS + StitchVM at 1024²", 3 * 4 * of.step("sd35m_1024", "DPS stitched")),
        ):
            argv = ("--of", name)
            what = f"torch.profiler, a step of {what}"
            yield Part(f"profile_{name}", what, "gpu_profile", argv, work, waits=15.0)
    yield Part(
        "cli",
        "the command line's kinds of run, the world",
        "gpu_cli",
        ("--limit", "90"),
        waits=60.0,
    )
    shapes = ("batch {half},", "batch {twice},", "K = 2", "batch {full}, K = 4")
    yield stage_2(512, "batch shapes", "_shapes", *shapes)
    repeats = 3
    yield Part(
        "compile",
        "torch.compile of each part, CUDA graph of the tail",
        "gpu_compile",
        ("--setup", "sd35m_1024", "--repeats", str(repeats)),
        4 * 2 * (1 + repeats) * of.all_parts("sd35m_1024"),
        waits=1.5 * COMPILING,
    )
    # what follows adds to what is known of other sizes
    if reduced:
        return
    yield sampling(
        "guidance_hpsv2", "sd35m_1024_hpsv2", "the same with HPSv2's reward (Table 1)", "DPS"
    )
    yield sampling("guidance_large", "sd35l_1024", "SD 3.5 Large", "DPS")
    yield sampling("guidance_flux", "flux_1024", "FLUX.1-dev", "DPS")
