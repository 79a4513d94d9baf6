"""Time by module: the reckoning on made-up marks, and the hooks on small models. Nothing asserts how long it takes."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.errors import UserMistake
from nas.latency.per_layer import LayerTime, Mark, check_layers, layer_times, per_layer, per_layer_of
from nas.latency.target import Target

module = importlib.import_module("nas.latency.per_layer")  # the package may export the function by that name
ONE = Target.parse("cpu:1")
ROOT, BLOCK, LEAF = range(3)
NAMES = [("", "Net"), ("block", "Block"), ("block.leaf", "Linear")]
MS = 1_000_000


def nested(leaf: float, *, hook: float = 0.0) -> list[Mark]:
    """The root works 1 ms before and 2 ms after a block, which works 3 ms around its leaf; hooks take ``hook`` ms."""
    marks, now = [], 0.0
    for entered, number, work in [
        (True, ROOT, 0.0),
        (True, BLOCK, 1.0),
        (True, LEAF, 1.5),
        (False, LEAF, leaf),
        (False, BLOCK, 1.5),
        (False, ROOT, 2.0),
    ]:
        now += work
        marks.append(Mark(number, entered, now * MS, (now + hook) * MS))
        now += hook
    return marks


def by_name(layers: Sequence[LayerTime]) -> dict[str, LayerTime]:
    return {layer.name: layer for layer in layers}


def test_self_is_total_without_the_children() -> None:
    layers = by_name(layer_times(NAMES, [nested(4.0)]))
    assert {name: (layer.self_ms, layer.total_ms) for name, layer in layers.items()} == {
        "": (3.0, 10.0),
        "block": (3.0, 7.0),
        "block.leaf": (4.0, 4.0),
    }
    assert [layer.depth for layer in layers.values()] == [0, 1, 2]
    assert layers["block.leaf"].share == pytest.approx(0.4)


def test_the_time_inside_the_hooks_is_nobodys() -> None:
    plain, hooked = (layer_times(NAMES, [nested(4.0, hook=hook)]) for hook in (0.0, 0.7))
    assert list(map(_rounded, hooked)) == list(map(_rounded, plain))


def _rounded(layer: LayerTime) -> tuple[Any, ...]:
    figures = (round(value, 9) for value in (layer.self_ms, layer.total_ms, layer.share))
    return (layer.name, layer.type, layer.depth, *figures, layer.calls)


def test_medians_over_the_repeats_leave_out_a_disturbed_one() -> None:
    layers = by_name(layer_times(NAMES, [nested(leaf) for leaf in (4.0, 4.2, 90.0, 3.9, 4.1)]))
    assert layers["block.leaf"].self_ms == pytest.approx(4.1)
    assert layers[""].total_ms == pytest.approx(10.1)


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=9))
def test_the_parts_sum_to_the_whole(leaves: list[float]) -> None:
    layers = layer_times(NAMES, [nested(leaf) for leaf in leaves])
    assert math.fsum(layer.self_ms for layer in layers) == pytest.approx(layers[0].total_ms)
    assert math.fsum(layer.share for layer in layers) == pytest.approx(1)


def test_a_module_called_twice_and_within_itself() -> None:
    at = itertools.count()
    marks = [
        Mark(number, entered, now * MS, now * MS)
        for now, (number, entered) in zip(
            at,
            [(0, True), (1, True), (1, True), (1, False), (1, False), (1, True), (1, False), (0, False)],
            strict=False,
        )
    ]
    outer, inner = layer_times(NAMES[:2], [marks])
    assert (inner.calls, inner.self_ms, inner.total_ms) == (3, 4.0, 4.0)  # not twice what is within itself
    assert (outer.self_ms, outer.total_ms) == (3.0, 7.0)


# -- real hooks --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(
            (x.dtype, x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else None)
        )
        for block in self.blocks:
            x = self.shared(block(x))
        return x


def test_modules_of_a_model() -> None:
    model = Net()
    found = per_layer(model, (torch.rand(2, 4),), ONE, repeats=3)
    layers = by_name(found.layers)
    assert list(layers) == [
        "", "blocks.0", "blocks.0.0", "blocks.0.1", "blocks.1", "blocks.1.0", "blocks.1.1", "shared",
    ]  # fmt: skip  # neither the list, which is not called, nor what is not used
    assert layers["shared"].calls == 2
    assert layers["blocks.0.0"].type == "Linear"
    assert all(layer.self_ms >= 0 for layer in found.layers)
    assert math.fsum(layer.self_ms for layer in found.layers) == pytest.approx(layers[""].total_ms)
    assert found.repeats == 3
    assert found.overhead == pytest.approx(found.hooked_ms / found.plain_ms - 1)
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["type"] == "Net"


def test_the_model_is_left_alone() -> None:
    model = Net().train()
    threads = torch.get_num_threads()
    per_layer(model, (torch.rand(2, 4),), ONE, repeats=3)
    assert model.training
    assert not model.seen  # a copy ran
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.get_num_threads() == threads


def test_bare_and_hooked_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[bool] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            order.append(bool(self._forward_hooks))
            return x

    monkeypatch.setattr(Watch, "__deepcopy__", lambda self, memo: self, raising=False)
    per_layer(Watch(), (torch.rand(2, 4),), ONE, repeats=4)
    assert order[-8:] == [False, True, True, False, False, True, True, False]


def test_hooks_go_when_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self._forward_hooks:
                raise RuntimeError("not now")
            return x

    model = Failing(2, 2)
    monkeypatch.setattr(Failing, "__deepcopy__", lambda self, memo: self, raising=False)
    with pytest.raises(RuntimeError, match="not now"):
        per_layer(model, (torch.rand(2, 4),), ONE, repeats=3)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_it_ends_when_the_time_is_up() -> None:
    assert per_layer(Net(), (torch.rand(2, 4),), ONE, repeats=1000, max_seconds=0).repeats == 3


def test_dtype_and_memory_format_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    monkeypatch.setattr(Net, "__deepcopy__", lambda self, memo: self, raising=False)
    per_layer(model, (torch.rand(1, 3, 2, 4),), Target.parse("cpu:1+bf16+channels_last"), repeats=3)
    assert set(model.seen) == {(torch.bfloat16, True)}


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a made-up clock that goes 1 ms with each look at it."""
    ticks = itertools.count(step=MS)
    monkeypatch.setattr(module.time, "thread_time_ns", lambda: next(ticks))
    found = per_layer(nn.Sequential(nn.ReLU()), (torch.rand(2, 4),), ONE, repeats=3)
    assert found.clock == "cpu"
    assert found.plain_ms == 1.0
    # Two looks at the clock in each of four hooks, of which those between the hooks are somebody's time.
    assert found.hooked_ms == 9.0
    assert [(layer.name, layer.self_ms, layer.total_ms) for layer in found.layers] == [
        ("", 2.0, 3.0),
        ("0", 1.0, 1.0),
    ]


def test_the_time_of_one_thread_tells_nothing_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "cpu_threads", lambda self: 2)
    assert per_layer(Net(), (torch.rand(2, 4),), Target.parse("cpu"), repeats=3).clock == "wall"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    found = per_layer(Net(), (torch.rand(2, 4),), Target.parse("cuda"), repeats=3)
    assert found.clock == "events"
    assert math.fsum(layer.self_ms for layer in found.layers) == pytest.approx(found.layers[0].total_ms)


class FakeEvents:
    """Events of a device that takes 1 ms between any two."""

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.made = 0

    def __call__(self, **_: Any) -> FakeEvent:
        self.made += 1
        return FakeEvent(self.clock)


class FakeEvent:
    def __init__(self, clock: itertools.count[int]):
        self._clock = clock
        self.at = -1

    def record(self) -> None:
        self.at = next(self._clock)

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, later: FakeEvent) -> float:
        return float(later.at - self.at)


def test_events_are_read_after_the_call_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    events = FakeEvents()
    monkeypatch.setattr(torch.cuda, "Event", events)
    readings = module._Events()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    taken = []
    for _ in range(3):
        with module._hooks(model, readings):
            assert readings.span(lambda: model(torch.rand(1, 2))) == 7
        taken.append(readings.take())
    assert events.made == 8  # two around the call, two for each of three modules
    layers = by_name(
        layer_times([(name, type(part).__name__) for name, part in model.named_modules()], taken)
    )
    assert {name: (layer.self_ms, layer.total_ms) for name, layer in layers.items()} == {
        "": (3.0, 5.0),
        "0": (1.0, 1.0),
        "1": (1.0, 1.0),
    }


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cpu+compile", r"--per-layer with target 'cpu\+compile': compile does not run module by module"),
        ("onnxruntime", r"onnxruntime does not run module by module; leave the runtime out \(eager\)"),
        ("mps", r"only cpu and cuda can be timed by module"),
    ],
)
def test_targets_that_cannot_be_taken_apart(target: str, message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        check_layers(Target.parse(target))


def test_too_few_repeats() -> None:
    with pytest.raises(UserMistake, match=r"repeats=2 must be at least 3"):
        per_layer(Net(), (torch.rand(2, 4),), ONE, repeats=2)


def test_by_name(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "def net(): return nn.Embedding(9, 2), (torch.zeros(1, 4, dtype=torch.int64),)\n"
    )
    assert [layer.type for layer in per_layer_of(f"{path}:net", ONE, repeats=3).layers] == ["Embedding"]
    assert per_layer_of(f"{path}:net", ONE, size="8-16", repeats=3).target == "cpu:1/8-16"


def test_an_onnx_file_has_no_modules(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "nothing", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(UserMistake, match=r"a\.onnx' is an ONNX file, which has no torch modules"):
        per_layer_of(str(tmp_path / "a.onnx"), ONE)
