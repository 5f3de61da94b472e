"""What samples depend on: the configuration and the weights, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from stitchvm.modules.report import run_config
from stitchvm.modules.sample_store import differences, plain
from stitchvm.results import weights_of
from stitchvm.rewards.base import Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.spec import fingerprint

if TYPE_CHECKING:
    from stitchvm.modules.sampling import Sampling

# arguments that change how many samples there are, or what is written beside them
NOT_SAMPLES = ("samples_per_prompt", "save_particles", "overwrite")


def configuration(module: Sampling) -> dict[str, Any]:
    """Returns a run's settings that samples, or their scores, depend on: plain data."""
    run = run_config(module)
    if run is None:
        found = {
            "sampler": describe(module.sampler),
            "generator": describe(module.generator_factory),
            "value": describe(module.value_factory),
            "final_value": describe(module.final_factory),
            "reward": describe(module.reward_factory),
            "rewards": describe(module.reward_factories),
            "checker": module.checker,
            "size": module.size,
            "seed": module.seed,
        }
    else:
        arguments = run["model"]["init_args"]
        found = {name: value for name, value in arguments.items() if name not in NOT_SAMPLES}
    return {"model": found, "trainer": {"precision": str(module.trainer.precision)}}


def describe(component: Any) -> Any:
    """Returns a component as plain data, from its class and public attributes."""
    if isinstance(component, Mapping):
        return {str(name): describe(part) for name, part in component.items()}
    if isinstance(component, (list, tuple)):
        return [describe(part) for part in component]
    if component is None or isinstance(component, (str, int, float, bool)):
        return component
    if isinstance(component, partial):
        named = [describe(component.func), *map(describe, component.args)]
        return {"class_path": named, "init_args": describe(component.keywords)}
    if isinstance(component, type) or not hasattr(component, "__dict__"):
        return getattr(component, "__qualname__", repr(component))
    if hasattr(component, "__qualname__"):  # a function
        return component.__qualname__
    cls = type(component)
    public = {k: describe(v) for k, v in vars(component).items() if not k.startswith("_")}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": public}


def weights(module: Sampling) -> dict[str, dict[str, Any]]:
    """Returns what was loaded, with fingerprints of the weights."""
    parts = module.parts
    assert parts is not None
    loaded = {
        "generator": parts.generator,
        "value": parts.value,
        "final_value": parts.final_value,
        **{f"rewards.{name}": reward for name, reward in parts.judges.rewards.items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for name, part in loaded.items():
        if part is None:
            continue
        known = getattr(part, "id", None)
        found[name] = {} if known is None else {"id": str(known)}
        if isinstance(part, nn.Module):
            found[name]["fingerprint"] = fingerprint(part)
    return found | files(module)


def files(module: Sampling) -> dict[str, dict[str, Any]]:
    """Returns the files beside whole models that are loaded, with what tells their content; nothing is loaded."""
    found = {
        f"{name} from {path}": weights_of(path)
        for name, factory in (("value", module.value_factory), ("final", module.final_factory))
        for path in ([] if factory is None else factory.sources().values())
    }
    tuned = _finetuned(module)
    return found if tuned is None else found | {f"generator from {tuned}": weights_of(tuned)}


def _finetuned(module: Sampling) -> str | None:
    """Returns the generator's `finetuned`, of which its fingerprint knows nothing where that is LoRA."""
    run = run_config(module)
    if run is None:
        return getattr(module.generator_factory, "keywords", {}).get("finetuned")
    generator = run["model"]["init_args"].get("generator")
    given = generator.get("init_args") if isinstance(generator, dict) else None
    return None if given is None else given.get("finetuned")


def changed_files(module: Sampling) -> list[str]:
    """Returns which of these files are not those that the finished samples were made with, as they tell it."""
    there, now = module.store.known("weights"), plain(files(module))
    both = [name for name in now if name in there]
    return differences({k: there[k] for k in both}, {k: now[k] for k in both})


def measured(module: Sampling) -> dict[str, dict[str, str]]:
    """Returns which reward `value` and `final_value` estimate: its name, and what tells it from any other."""
    parts = module.parts
    assert parts is not None
    values = {"value": parts.value, "final_value": parts.final_value}
    return {
        name: {"reward": value.reward.id, "is": identity(value.reward)}
        for name, value in values.items()
        if value is not None
    }


def identity(reward: Reward) -> str:
    """Returns a text that two rewards share only if they give the same scores."""
    if not isinstance(reward, WeightedReward):
        kind, settings = type(reward).__qualname__, sorted(reward.init_args.items())
        return f"{kind}{settings} {fingerprint(reward)}"
    terms = {
        f"{reward.weights[name]:g} ({identity(part)} - {reward.means[name]:g}) / {reward.stds[name]:g}"
        for name, part in reward.items()
    }
    return " + ".join(sorted(terms))
