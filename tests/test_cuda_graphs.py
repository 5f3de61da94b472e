"""A graphed function answers what the function does, although all its calls work in the same memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stitchvm import cuda_graphs
from stitchvm.cuda_graphs import Graphed
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from tests.modules.sampling_runs import value_model
from tests.pretend_cuda import back, pretend_cuda
from tests.test_fake_devices import PROMPTS, builder

WIDTH = 3


class Recorder:
    """Stands in for torch's recorder and keeps its habits.

    Every answer lies in one place and is overwritten by the next call, and there is one set of activations for all
    functions of a pool: a backward pass that is not the latest call's finds another's.
    """

    def __init__(self) -> None:
        self.recorded: list[tuple[tuple[int, ...], bool]] = []
        self.latest: dict[int, Any] = {}
        self.current: torch.device | None = None

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.current = device
        yield
        self.current = None

    def pool(self) -> int:
        self.latest[len(self.latest)] = None
        return len(self.latest) - 1

    def record(self, function: Callable[[Tensor], Tensor], args: Any, pool: int) -> Any:
        assert not torch.is_autocast_cache_enabled() and not torch.is_inference_mode_enabled()
        assert self.current == args[0].device
        (own,) = args
        self.recorded.append((tuple(own.shape), own.requires_grad))
        place, gradient, activations = torch.empty_like(function(own)), torch.empty_like(own), {}
        latest = self.latest

        class Replayed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                latest[pool] = activations
                with torch.set_grad_enabled(own.requires_grad):
                    activations["x"] = x.detach().clone().requires_grad_(own.requires_grad)
                    activations["y"] = function(activations["x"])
                place.copy_(activations["y"].detach())
                return place.detach()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                if latest[pool] is not activations:
                    return torch.full_like(gradient, torch.nan)
                x, y = activations["x"], activations["y"]
                gradient.copy_(torch.autograd.grad(y, x, grad, retain_graph=True)[0])
                latest[pool] = None  # it works in the activations' memory
                return gradient.detach()

        return Replayed.apply


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", recorder.pool)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder.record)
    monkeypatch.setattr(torch.cuda, "device", recorder.device)
    return recorder


@pytest.fixture
def on(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path) -> Callable[[str], Any]:
    return builder(tiny_sd3, tiny_clip, str(value_model(tiny_sd3, tiny_clip, tmp_path)))


def cubic(device: Any = "cpu") -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns a network, and f(x) = (W x)³, whose gradient depends on what is kept."""
    torch.manual_seed(0)
    net = nn.Linear(WIDTH, WIDTH, bias=False).to(device).requires_grad_(False)
    return net, lambda x: net(x) ** 3


def graphed_cubic(device: Any) -> Graphed:
    net, function = cubic(device)
    return Graphed(function, lambda: [net])


def inputs(device: Any, *sizes: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, WIDTH, generator=random) for n in sizes]
    return [x.to(device).requires_grad_() for x in rows]


def test_later_calls_change_no_earlier_answer(recorder: Recorder) -> None:
    """Calls of one shape and of two, whose gradients are asked for in every order, and twice."""
    _, here = cubic()
    with pretend_cuda() as device:
        graphed = graphed_cubic(device)
        xs = inputs(device, 2, 2, 4, 2)
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 3, 2, 0]):
            ys = [graphed(x) for x in xs]
            found = [
                (k, torch.autograd.grad(ys[k].sum(), xs[k], retain_graph=True)) for k in order
            ]
            for k, (gradient,) in found:
                x = back(xs[k]).requires_grad_()
                y = here(x)
                assert torch.equal(back(ys[k]), y)
                assert torch.equal(back(gradient), torch.autograd.grad(y.sum(), x)[0])
    assert recorder.recorded == [((2, WIDTH), True), ((4, WIDTH), True)]


def test_a_gradient_is_multiplied_by_what_comes_back(recorder: Recorder) -> None:
    _, here = cubic()
    with pretend_cuda() as device:
        net, function = cubic(device)
        (x,) = inputs(device, 2)
        weights = torch.tensor([2.0, -1.0], device=device)[:, None]
        (gradient,) = torch.autograd.grad((weights * Graphed(function, lambda: [net])(x)).sum(), x)
        own = back(x).requires_grad_()
        (expected,) = torch.autograd.grad((back(weights) * here(own)).sum(), own)
    assert torch.equal(back(gradient), expected)


def test_kinds_of_calls_have_graphs_of_their_own(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "KINDS", 3)
    with pretend_cuda() as device:
        graphed = graphed_cubic(device)
        (x,) = inputs(device, 2)
        assert graphed(x).requires_grad
        with torch.no_grad():
            assert not graphed(x).requires_grad
        assert not graphed(x.detach()).requires_grad
        assert graphed(x.double().detach().float()).shape == x.shape
        assert recorder.recorded == [((2, WIDTH), True), ((2, WIDTH), False)]
        for size in (4, 5, 6):  # beyond the limit as it is
            (y,) = inputs(device, size)
            assert torch.equal(back(graphed(y)), back(graphed.function(y)))
        assert recorder.recorded[2:] == [((4, WIDTH), True)]


def test_a_graph_of_inference_mode_serves_outside_of_it(recorder: Recorder) -> None:
    """Memory made there could not be written to elsewhere. (On the CPU: the pretence knows no such tensors.)"""
    _, function = cubic()
    (x,) = inputs("cpu", 2)
    memory = cuda_graphs._Memory(recorder.pool())
    with torch.inference_mode():
        graph = cuda_graphs._Graph(function, x, False, memory)
        assert torch.equal(graph.run(x)[0], function(x))
    with torch.no_grad():
        assert torch.equal(graph.run(2 * x)[0], function(2 * x))


def test_what_has_moved_is_recorded_anew(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_cuda() as device:
        graphed = graphed_cubic(device)
        (net,) = graphed.networks()
        (x,) = inputs(device, 2)
        graphed(x)
        net.weight.mul_(2)  # in place: a graph reads the weights where they are
        assert torch.equal(back(graphed(x)), back(graphed.function(x)))
        assert len(recorder.recorded) == 1
        place = net.weight.data_ptr() + 4096
        monkeypatch.setattr(type(net.weight), "data_ptr", lambda self: place)
        assert torch.equal(back(graphed(x)), back(graphed.function(x)))
        assert len(recorder.recorded) == 2 and len(recorder.latest) == 2  # in other memory
        net.requires_grad_(True)
        (gradient,) = torch.autograd.grad(graphed(x).sum(), net.weight)
        assert gradient.shape == net.weight.shape
    assert len(recorder.recorded) == 2


def test_what_is_replaced_is_recorded_anew(recorder: Recorder) -> None:
    with pretend_cuda() as device:
        nets = [
            cubic(device)[0],
            nn.Linear(WIDTH, WIDTH).to(device).requires_grad_(False).double(),
        ]
        graphed = Graphed(lambda x: nets[0](x.to(nets[0].weight.dtype)) ** 3, lambda: nets[:1])
        (x,) = inputs(device, 2)
        first = back(graphed(x))
        nets.reverse()
        second = back(graphed(x))
        assert not torch.equal(first, second.float())
        assert torch.equal(second, back(nets[0](x.double()) ** 3))
    assert len(recorder.recorded) == 2


def test_graphs_end_with_their_value_and_are_not_copied(
    on: Callable[[str], Any], recorder: Recorder
) -> None:
    with pretend_cuda() as device:
        graphed = graphed_cubic(device)
        (net,) = graphed.networks()
        (x,) = inputs(device, 2)
        graphed(x)
        assert not copy.deepcopy(graphed)._graphs and graphed._graphs
        net.cpu()
        graphed(x.cpu())
    assert not graphed._graphs and graphed._memory is None
    _, values = on("cpu")
    value = StitchedValue(values["shared"].value_model, cuda_graph=True)
    again = pickle.loads(pickle.dumps(value._graphed))
    h = torch.randn(1, value.value_model.stitch.in_width, 4, 4)
    assert torch.equal(again(h), value.from_features(h))
    gone = weakref.ref(value)
    gc.disable()
    try:
        del value
        assert gone() is None  # at once: nothing that it holds leads back to it
    finally:
        gc.enable()


def test_what_cannot_be_recorded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refused)
    monkeypatch.setattr(torch.cuda, "device", Recorder().device)
    with pretend_cuda() as device:
        net, function = cubic(device)
        (x,) = inputs(device, 2)
        error: Exception = RuntimeError("operation not permitted when stream is capturing")
        with pytest.raises(ValueError, match=r"not permitted.*cuda_graph: false"):
            Graphed(function, lambda: [net])(x)
        error = torch.OutOfMemoryError("no more")
        with pytest.raises(torch.OutOfMemoryError):
            Graphed(function, lambda: [net])(x)


def test_samplers_draw_the_same(on: Callable[[str], Any], recorder: Recorder) -> None:
    """Guidance and FK steering by a value with graphs, on a GPU, against the CPU; nothing is recorded there."""
    samplers = (
        GuidedSampler(strength=0.5, num_steps=3, micro_batch=2),
        FKSteering(particles=3, num_steps=4, resample_every=1, resample_from=1, micro_batch=4),
    )

    def run(device: str) -> list[Any]:
        generator, values = on(device)
        plain = values["shared"]
        value = StitchedValue(plain.value_model, cuda_graph=True)
        prompts = [*PROMPTS, PROMPTS[0]]
        return [
            back(one(generator, prompts, v, final_value=values["terminal"]).latents)
            for one in samplers
            for v in (plain, value)
        ]

    here = run("cpu")
    assert not recorder.recorded
    with pretend_cuda():
        there = run("cuda")
    # three samples, two at a time, with gradients; nine particles, four at a time, without
    assert [(shape[0], wanted) for shape, wanted in recorder.recorded] == [
        *((2, True), (1, True)),
        *((4, False), (1, False)),
    ]
    for found in (here, there):
        assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    torch.testing.assert_close(there, here)


def test_blocks_that_are_run_again_are_not_recorded(
    on: Callable[[str], Any], recorder: Recorder
) -> None:
    with pretend_cuda():
        _, values = on("cuda")
        value = StitchedValue(values["shared"].value_model, cuda_graph=True)
        value.value_model.tail.gradient_checkpointing = True
        z = torch.randn(2, 4, 8, 8, device="cuda", requires_grad=True)
        value.bind(PROMPTS)(z, torch.full((2,), 0.5, device="cuda")).sum().backward()
        assert z.grad is not None
    assert not recorder.recorded


def test_the_factory_hands_it_on() -> None:
    assert StitchedFactory("folder", cuda_graph=True).cuda_graph
    assert not StitchedFactory("folder").cuda_graph


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).cuda().requires_grad_(False)
    graphed = Graphed(lambda x: net(x).mean(1), lambda: [net])
    xs = [torch.randn(n, 9, 64, device="cuda", requires_grad=True) for n in (2, 1, 2)]
    for _ in range(2):
        ys = [graphed(x) for x in xs]
        for x, y in zip(xs, ys, strict=True):
            expected = net(x).mean(1)
            weights = torch.randn_like(y)
            assert torch.equal(y, expected)
            (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
            for _ in range(2):
                (found,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
                assert torch.equal(found, wanted)
        with torch.no_grad():
            assert torch.equal(graphed(xs[0]), net(xs[0]).mean(1))
    memory, old = graphed._memory, [p.data for p in net.parameters()]  # kept: not given out again
    net.cpu()
    net.cuda()
    assert torch.equal(graphed(xs[0]), net(xs[0]).mean(1))
    assert old and graphed._memory is not memory
