"""Nothing in a step of a sampler makes the host wait for the device; errors come a step later, and say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stitchvm.deferral import Deferred, require
from stitchvm.rewards.base import NotFiniteError
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from tests.pretend_cuda import pretend_cuda, waits
from tests.test_fake_devices import PROMPTS, SAMPLERS, builder


@pytest.fixture
def on(tiny_sd3: Path, tiny_clip: Path, value_folder: Path) -> Callable[[str], Any]:
    return builder(tiny_sd3, tiny_clip, str(value_folder))


def test_no_step_waits_for_the_device(on: Callable[[str], Any]) -> None:
    with pretend_cuda():
        generator, values = on("cuda")
        for name, (value, make) in SAMPLERS.items():
            found = []
            for steps in (2, 2, 5):  # the first is for what is looked up once
                waits.clear()
                final = values["terminal"] if name in ("fk", "svdd", "best_of_n") else None
                sampler = make(num_steps=steps)
                run = sampler(generator, PROMPTS, values.get(value), final_value=final)
                # weights are computed from values in double precision on the CPU: a wait for each resampling
                resampled = sum(record.ancestors is not None for record in run.records)
                found.append((Counter(waits), resampled))
            (some, few), (more, many) = found[1:]
            assert sum((more - some).values()) == many - few, (name, more - some)


def test_a_check_on_a_gpu_waits_until_it_is_settled() -> None:
    checks = Deferred()
    with pretend_cuda() as device:
        good, bad = (torch.tensor([True, ok], device=device) for ok in (True, False))
        with pytest.raises(ValueError, match="at once"):
            require(bad, lambda: ValueError("at once"))
        with checks.collecting(lambda error: NotFiniteError(f"step 3: {error}")):
            waits.clear()
            require(good, lambda: ValueError("never"))
            require(bad, lambda: ValueError("first"))
            require(bad, lambda: ValueError("second"))
            with pytest.raises(ValueError, match="on the CPU"):
                require(torch.tensor([False]), lambda: ValueError("on the CPU"))
        assert len(checks) == 3 and not waits
        streams = {copied.stream for _, copied, _ in checks._waiting}
        assert streams == {torch.cuda.current_stream(device)}
        checks.settle(keep=2)
        assert len(checks) == 2
        with pytest.raises(NotFiniteError, match="step 3: first") as caught:
            checks.settle()
        assert isinstance(caught.value.__cause__, ValueError)
        checks.settle()  # nothing is left


def test_errors_name_the_step_that_they_come_from(on: Callable[[str], Any]) -> None:
    """An infinite strength of guidance at the second step, noticed in the third."""

    def messages(device: str) -> list[str]:
        generator, values = on(device)
        found = []
        samplers: list[Any] = [Breaking(b, num_steps=4, mode="raw") for b in ("latent", "value")]
        for sampler in (*samplers, Blurred(2, num_steps=4, resample_every=1, resample_from=1)):
            with pytest.raises(NotFiniteError) as caught:
                sampler(generator, PROMPTS, values["shared"])
            found.append(str(caught.value))
        return found

    here = messages("cpu")
    with pretend_cuda():
        there = messages("cuda")
    assert there == here
    assert "the latent is not finite at step 2" in here[0]
    assert "step 2," in here[1] and "step 2," in here[2]  # not that weights are no weights


class Blurred(FKSteering):
    """FK steering whose second step begins at latents that are not finite."""

    def advance(self, run: Any, k: int) -> Any:
        run.z = run.z * torch.inf if k == 1 else run.z
        return super().advance(run, k)


class Breaking(GuidedSampler):
    """Guidance whose second step has an infinite update, or begins at latents that are not finite."""

    def __init__(self, broken: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.broken = broken

    def advance(self, run: Any, k: int) -> Any:
        if k == 1 and self.broken == "value":
            run.z = run.z * torch.inf
        return super().advance(run, k)

    def _update(self, v: Any, gradient: Any, direction: Any, run: Any) -> Any:
        update = super()._update(v, gradient, direction, run)
        return update * torch.inf if run.field.step == 1 and self.broken == "latent" else update
