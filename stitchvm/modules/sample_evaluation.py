"""`stitchvm test` on a folder of samples: clean rewards, the world's exact checker, GenEval.

    images/… + prompts → r_k(x, prompt) for every reward k → mean ± standard error; each sample's in scores.jsonl

All rewards are the clean ones, on the finished images (METHOD §4): what a method optimised and what it did not are
measured alike, whatever made the images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from stitchvm.metrics.geneval import ColourClassifier, Detector, GenEval
from stitchvm.metrics.geneval_score import GenEvalScore, geneval_records
from stitchvm.metrics.items import ItemMean
from stitchvm.modules.report import describe_data, print_table, run_config
from stitchvm.results import check_free, weights_of, write_results
from stitchvm.rewards.base import Reward
from stitchvm.spec import fingerprint
from stitchvm.values.parts import frozen

CHECKS = ("whole", "count", "colour", "shape", "relation", "background")


class SampleEvaluation(LightningModule):
    """Measures finished images with clean rewards; only tests.

    Arguments:
        rewards: Builds the rewards, by the name they get in the results.
        method: What made the images, for the records; the name of the samples' folder by default.
        checker: Whether the prompts are the embedded world's and its exact checker reads the images.
        detector: Builds an object detector for GenEval; its prompts must have their metadata.
        colours: Builds GenEval's colour classifier, for prompts that name a colour.
        overwrite: Whether results in the run's folder may be replaced.

    Attributes:
        run_config: The run's configuration as YAML, set by the command line, for metrics.json.
        records: The records, after a test.

    Raises:
        ValueError: If there is nothing to measure.
    """

    run_config: str | None = None

    def __init__(
        self,
        rewards: dict[str, Callable[[], Reward]] | None = None,
        method: str | None = None,
        checker: bool = False,
        detector: Callable[[], Detector] | None = None,
        colours: Callable[[], ColourClassifier] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if not rewards and not checker and detector is None:
            raise ValueError(
                "there is nothing to measure: give rewards (name: a file of configs/rewards/), the checker or a "
                "GenEval detector."
            )
        if colours is not None and detector is None:
            raise ValueError(
                "colours name those of the objects that a detector finds for GenEval: give a detector, or leave "
                "colours out."
            )
        self.factories = dict(rewards or {})
        if taken := {"checker", "geneval"} & set(self.factories):
            raise ValueError(
                f"{sorted(taken)} name other measurements: call the rewards otherwise."
            )
        self.method, self.checker, self.overwrite = method, checker, overwrite
        self.detector, self.colours = detector, colours
        self.rewards: nn.ModuleDict | None = None
        self.records: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        """Refuses anything but tests, and a folder that holds results."""
        if stage != "test":
            raise ValueError(f"SampleEvaluation measures only: run `stitchvm test`, not {stage}.")
        check_free(
            self.folder / "metrics.json",
            overwrite=self.overwrite,
            remedy="choose another folder with --trainer.default_root_dir, or set --model.overwrite=true.",
        )

    @property
    def folder(self) -> Path:
        """The run's folder: the trainer's default_root_dir."""
        return Path(self.trainer.default_root_dir)

    def configure_model(self) -> None:
        """Builds rewards and detector, once."""
        if self.rewards is not None:
            return
        self.rewards = nn.ModuleDict(
            {name: frozen(make()) for name, make in self.factories.items()}
        )
        self.geneval: GenEval | None = None
        if self.detector is not None:
            parts = frozen(self.detector()), None if self.colours is None else self.colours()
            self.geneval = GenEval(*parts)
            # registered, so that they move with this module
            self.judges = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])

    def on_test_start(self) -> None:
        """Prepares the metrics.

        Raises:
            ValueError: If GenEval could not judge one of the prompts.
        """
        dataset = getattr(getattr(self.trainer, "datamodule", None), "dataset", None)
        if self.geneval is not None:
            self._check_metadata([sample.metadata for sample in getattr(dataset, "samples", ())])
        names = [*self.factories, *(f"checker/{name}" for name in CHECKS if self.checker)]
        self.means = {name: ItemMean().to(self.device) for name in names}
        self.score = GenEvalScore().to(self.device)
        self.seen: list[dict[str, Any]] = []
        self.texts: dict[str, dict[str, Tensor]] = {name: {} for name in self.factories}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Scores a batch of images."""
        assert self.rewards is not None
        pixels, index = batch["pixels"].clamp(0, 1), batch["index"]
        rows = [
            {"index": i, "prompt": prompt, "file": file}
            for i, prompt, file in zip(
                index.tolist(),
                batch.get("prompt") or [None] * len(pixels),
                batch.get("file") or [None] * len(pixels),
                strict=True,
            )
        ]
        for name, reward in self.rewards.items():
            text = self._text(name, batch) if reward.uses_text else None
            values = reward(pixels, text)
            self._keep(name, values, index, rows)
        if self.checker:
            self._check(pixels, batch, rows)
        if self.geneval is not None:
            self._geneval(pixels, batch, rows)
        self.seen += rows

    def on_test_epoch_end(self) -> None:
        """Gathers the metrics of all devices; the first one writes and prints."""
        samples = getattr(getattr(self.trainer, "datamodule", None), "root", self.folder)
        method = self.method or Path(samples).resolve().name
        self.records = [
            self._record(name, metric, method)
            for name, metric in self.means.items()
            if metric.update_called
        ]
        if self.geneval is not None and self.score.update_called:
            found = geneval_records(self.score.compute(), self.geneval.label)
            self.records += [{**record, "estimator": method} for record in found]
        rows = self._gathered()
        if self.trainer.is_global_zero and self.records:
            self._report(rows)

    def teardown(self, stage: str) -> None:
        """Sees to it that no evaluation ends without a result.

        Raises:
            ValueError: If nothing was measured.
        """
        if stage == "test" and not self.records:
            raise ValueError(
                "nothing was measured: there are no samples, or trainer.limit_test_batches is 0. Check the data "
                "module's folder."
            )

    def _text(self, name: str, batch: dict[str, Any]) -> Tensor:
        """Returns the text embeddings of a batch; every prompt is encoded once per reward."""
        assert self.rewards is not None
        if batch.get("prompt") is None:
            raise ValueError(
                f"the reward {name!r} compares images with prompts, but the samples have none: use a folder "
                "with samples.jsonl, or give the file of prompts."
            )
        known, prompts = self.texts[name], batch["prompt"]
        missing = [p for p in dict.fromkeys(prompts) if p not in known]
        if missing:
            encode: Any = self.rewards[name].encode_text
            known.update(zip(missing, encode(missing), strict=True))
        return torch.stack([known[prompt] for prompt in prompts])

    def _keep(self, name: str, values: Tensor, index: Tensor, rows: list[dict[str, Any]]) -> None:
        self.means[name].update(values, index)
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value

    def _check(self, pixels: Tensor, batch: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        from stitchvm.world.checker import check_batch

        if batch.get("prompt") is None:
            raise ValueError(
                "the checker compares images with the world's captions, but the samples have none: use a folder with "
                "samples.jsonl, or give the file of prompts."
            )
        verdicts = check_batch(pixels.float().cpu().numpy(), batch["prompt"])
        for name in CHECKS:
            each = [{"whole": float(v.whole), **v.attributes}[name] for v in verdicts]
            values = torch.tensor(each, device=pixels.device)
            self._keep(f"checker/{name}", values, batch["index"], rows)

    def _geneval(self, pixels: Tensor, batch: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        assert self.geneval is not None
        metadata = batch.get("metadata") or [None]
        self._check_metadata(metadata)
        verdicts = self.geneval.evaluate(pixels, metadata)
        self.score.update(verdicts, metadata, batch["index"])
        for row, verdict in zip(rows, verdicts, strict=True):
            row |= {"correct": verdict.correct, "reason": verdict.reason}

    def _check_metadata(self, metadata: Sequence[Any]) -> None:
        """Raises ValueError if a prompt has no metadata, or names a colour and nothing here knows colours."""
        if not all(metadata):
            raise ValueError(
                "GenEval judges by each prompt's metadata, but the samples have none: sample the prompts of "
                "GenEval's evaluation_metadata.jsonl, which `stitchvm predict` keeps in samples.jsonl."
            )
        named = [e["prompt"] for e in metadata if any("color" in c for c in e["include"])]
        if named and self.colours is None:
            raise ValueError(
                f"{len(named)} prompts name colours, such as {named[0]!r}, but there is no classifier of colours: give "
                "model.colours (stitchvm.metrics.geneval_colours.CLIPColours)."
            )

    def _record(self, name: str, metric: ItemMean, method: str) -> dict[str, Any]:
        estimate = metric.compute()
        return {
            "metric": name,
            "estimator": method,
            "sigma": None,
            "value": float(estimate.value),
            "stderr": float(estimate.stderr),
            "n": int(estimate.n),
        }

    def _gathered(self) -> list[dict[str, Any]]:
        """Returns every device's rows, each sample once, in order."""
        rows = self.seen
        if self.trainer.world_size > 1:
            every: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(every, rows)
            rows = [row for part in every for row in part]
        return [row for _, row in sorted({row["index"]: row for row in rows}.items())]

    def _report(self, rows: list[dict[str, Any]]) -> None:
        assert self.rewards is not None
        weights = {
            name: {
                **weights_of(str(getattr(reward, "id", name))),
                "fingerprint": fingerprint(reward),
            }
            for name, reward in self.rewards.items()
        }
        path = write_results(
            self.folder / "metrics.json",
            self.records,
            config=run_config(self),
            overwrite=self.overwrite,
            extra={
                "data": describe_data(getattr(self.trainer, "datamodule", None)),
                "weights": weights,
            },
        )
        scores = self.folder / "scores.jsonl"
        scores.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print_table(self.records)
        print(f"wrote {path} and {scores}, a line for each sample")
