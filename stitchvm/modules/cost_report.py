"""`stitchvm fit --config … --print_cost`: what an update costs, before any is made, and nothing is written.

--print_cost           counts, and measures a short run of the update's own code
--print_cost count     counts only: networks are loaded into CPU memory, and hardly run
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from stitchvm.adapters.full import PolicyWeights
from stitchvm.modules import alignment_checks as checks
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.cost import (
    Plan,
    Prices,
    draft_plan,
    grpo_plan,
    nft_plan,
    rough,
    total,
)
from stitchvm.modules.cost_flops import counted_prices, no_checkpointing
from stitchvm.modules.cost_measure import WarmUp, measure, some_rows
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.grpo import FlowGRPO
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.tables import records_to_text
from stitchvm.value_model import StitchedValueModel

__all__ = ["cost_records", "forwards_of", "plan_of", "print_cost"]

MODES = ("measure", "count")
LOSSES = 3  # of the warm-up
LARGE = 10**8  # weights, from which on fake tensors are quicker than a CPU


def plan_of(module: LightningModule) -> Plan:
    """Returns what a fine-tuning runs for an image.

    Raises:
        ValueError: If its method is not known here.
    """
    if isinstance(module, DRaFT):
        return draft_plan(
            module.window,
            backprop_steps=module.backprop_steps,
            lam=module.lam,
            redraws=module.redraws,
        )
    if isinstance(module, DiffusionNFT):
        return nft_plan(module.window, fraction=module.fraction, lam=module.lam)
    if isinstance(module, FlowGRPO):
        return grpo_plan(module.stops, steps=module.window, bounds=module.bounds, kl=module.kl)
    raise ValueError(
        f"--print_cost knows DRaFT, DiffusionNFT and FlowGRPO, not a {type(module).__name__}: leave it out. (What a "
        "distillation takes is measured by benchmarks/distillation.py.)"
    )


def forwards_of(module: Alignment, counted: Prices | None) -> Prices:
    """Returns prices in forwards: by the conventions of `cost.py`, a value's by FLOPs if they are counted, else none.

    Arguments:
        module: The fine-tuning with its networks.
        counted: Its prices in FLOPs, nothing run again.
    """
    generator: Any = module.generator
    runs_null = getattr(generator, "runs_null_branch", None)
    branches = 2 if runs_null is not None and runs_null(module.guidance_scale) else 1
    shares = (0.0, 0.0)
    if counted is not None:
        a_pass = counted.forward / branches
        shares = counted.value / a_pass, counted.value_backward / a_pass
    return rough(
        shares[0],
        branches=branches,
        trained=isinstance(module.policy, PolicyWeights),
        again=module.gradient_checkpointing,
        value_backward=shares[1],
    )


def cost_records(plan: Plan, forwards: Prices, flops: Prices | None) -> list[dict[str, Any]]:
    """Returns a record per stage and one of all: calls for an image, in forwards and in FLOPs (None: not counted).

    Arguments:
        plan: What the method runs.
        forwards: Prices in forwards.
        flops: Prices in FLOPs.
    """
    mean = plan.mean()
    return [
        {
            "stage": name,
            "passes": work.forward,
            "frozen passes": work.frozen,
            "backward": work.backward + work.ends,
            "values": work.value,
            "their gradients": work.value_backward,
            "forwards": work.at(forwards),
            "flops": None if flops is None else work.at(flops),
        }
        for name, work in [*mean.items(), ("all", total(mean.values()))]
    ]


def print_cost(
    module: LightningModule, data: LightningDataModule, trainer: Trainer, mode: str
) -> None:
    """Prints what an update costs. Nothing is trained and nothing written; only the first process works.

    Arguments:
        module: The fine-tuning.
        data: Its prompts.
        trainer: Its Trainer, which says on which device and how many there are.
        mode: "measure" or "count".

    Raises:
        ValueError: If the run's settings do not go together, or its method is not known.
    """
    plan = plan_of(module)
    assert isinstance(module, Alignment)
    if not trainer.is_global_zero:
        return
    checks.check_trainer(trainer)
    module.check()
    sharded = type(trainer.strategy).__name__ == "ModelParallelStrategy"
    counts_only = mode == "count" or sharded
    device = torch.device("cpu") if counts_only else trainer.strategy.root_device
    every, prompts, devices = prompts_of(data, trainer)
    module.to(device)
    module.configure_model()
    here = len(prompts) * module.group_size
    print(heading(module, plan, here, devices))
    model, flops, why = counted(module, counts_only)
    forwards = forwards_of(module, model)
    records = cost_records(plan, forwards, flops)
    show = [
        {k: f"{x:.4g}" if isinstance(x, float) else x for k, x in record.items()}
        | {"TFLOP": None if record["flops"] is None else f"{record['flops'] / 1e12:.4g}"}
        for record in records
    ]
    warm_up: WarmUp | None = None
    if not counts_only:
        rows = some_rows(module, plan, prompts, LOSSES, plan.stops[len(plan.stops) // 2])
        if len(set(every)) <= module.prompts_ahead:  # as in training: text encoders are freed
            with torch.no_grad():
                module.generator.encode_ahead(rows.prompts)
        warm_up = measure(
            module,
            rows,
            plan,
            flops or forwards,
            total=here,
            losses=LOSSES,
            context=trainer.strategy.precision_plugin.train_step_context,
        )
        for record in show:
            found = warm_up.seconds
            record["seconds"] = f"{found.get(record['stage'], sum(found.values())):.4g}"
    columns = [key for key in show[0] if key != "flops"]
    print(f"\nper image{', and seconds of an update on a device' if warm_up else ''}:\n")
    print(records_to_text(show, rows=columns, column=None))
    whole, done = records[-1]["forwards"] * here, records[-1]["flops"]
    tera = "" if done is None else f", {done * here / 1e12:.4g} TFLOP"
    print(f"\nan update on a device: {here} images, {whole:.4g} forwards{tera}")
    print(f"\n{conventions(module, why)}")
    if warm_up is not None:
        print(f"\n{measured(warm_up, records[-1]['flops'], here)}")
    elif sharded:
        print(
            "\nnot measured: shards need all their processes. Run a few updates, and look at seconds/… in the logs."
        )


def counted(module: Alignment, idle: bool) -> tuple[Prices | None, Prices | None, str]:
    """Returns FLOPs without and with what is run again, or None and why not; `idle` networks will not be run."""
    built = module._built
    size = sum(p.numel() for p in built.generator.transformer.parameters())
    fake = idle and size > LARGE
    try:
        with no_checkpointing(built.generator, built.value):
            model = counted_prices(module, fake)
        again = module.gradient_checkpointing
        return model, counted_prices(module, fake) if again else model, ""
    except ValueError as error:
        return None, None, str(error)


def prompts_of(data: Any, trainer: Trainer) -> tuple[list[str], list[str], int]:
    """Returns all prompts, those of an update on a device, and how many devices there are.

    Raises:
        ValueError: If the data have no prompts, fewer than an update takes, or the devices do not divide them.
    """
    data.prepare_data()
    data.setup("fit")
    devices = trainer.num_devices * trainer.num_nodes
    every = getattr(data.train_data, "prompts", None)
    if every is None:
        raise ValueError(
            f"{type(data).__name__} has no prompts: fine-tuning takes some, as data.prompts.Prompts has."
        )
    update = getattr(data, "prompts_per_update", None) or data.batch_size * devices
    if update % devices or len(every) < update:
        raise ValueError(
            f"an update of {update} prompts, of {len(every)}, on {devices} devices: expected at most as many as there "
            "are, and a multiple of the number of devices. Change data.prompts_per_update."
        )
    return list(every), list(every[: update // devices]), devices


def heading(module: Alignment, plan: Plan, here: int, devices: int) -> str:
    """Returns what is counted, in words."""
    low, high, N = plan.window.low, plan.window.high, module.num_steps
    stops = f"all {N} steps" if low == high == N else f"{low} … {high} of {N} steps"
    images = f"{here * devices} images an update"
    images += f", {here} on each of {devices} devices" if devices > 1 else ""
    lines = [
        f"{type(module).__name__}: {images}, {module.group_size} for a prompt",
        f"roll-outs of {stops}, {plan.mean_losses():g} losses for an image, {module.micro_batch or here} images in one",
    ]
    models = [m for m in module._built.value.modules() if isinstance(m, StitchedValueModel)]
    for model in models:
        lines.append(
            f"value: {model.i} of {model.backbone.num_blocks} blocks, and {model.reward.id} from block {model.j} on"
        )
    return "\n".join(lines)


def conventions(module: Alignment, why: str) -> str:
    """Returns what the numbers mean."""
    weights = (
        "2, its weights are trained"
        if isinstance(module.policy, PolicyWeights)
        else "1, its weights are frozen"
    )
    again = " and 1 more, blocks are run again" if module.gradient_checkpointing else ""
    lines = [
        f"forwards: a pass of the transformer is 1 (2 with guidance), a backward pass {weights}{again}; a value and "
        "its gradient by their FLOPs",
        why or "TFLOP: counted by torch, 2 per multiply-add, with adapters and what is run again",
        "left out: text encoders, the optimiser's step, exchange between devices, evaluation",
    ]
    return "\n".join(lines)


def measured(warm_up: WarmUp, flops: float | None, here: int) -> str:
    """Returns what has been measured and how it was extrapolated, in words."""
    w, whole = warm_up, sum(warm_up.seconds.values())
    ran = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in w.measured.items())
    speed = "" if flops is None else f", {flops * here / whole / 1e12:.3g} TFLOP/s"
    lines = [
        f"an update takes about {whole:.1f} s: {here / whole:.3g} images/s{speed}",
        f"extrapolated from {w.rolled} roll-outs of {w.stop} steps and {w.losses} losses of {w.images} images ({ran}) "
        "by the count of what is left",
        f"memory: {w.peak_gib:.2f} GiB, {w.resident_gib:.2f} before it began ({w.memory}); AdamW adds "
        f"{w.optimiser_gib:.2f}",
    ]
    return "\n".join(lines)
