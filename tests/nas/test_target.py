"""Targets: their text, their fields, and what this machine can run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.environment import usable_cpus
from nas.errors import UserMistake
from nas.latency import Target
from nas.latency.runtimes import ALIASES, RUNTIMES, compile, openvino
from nas.latency.target import FORMS

RUNTIME_NAMES = ["compile", "cudagraph", "eager", "onnxruntime", "openvino", "tensorrt"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", Target("cpu")),
        ("cpu:4", Target("cpu", threads=4)),
        ("cpu:1@8", Target("cpu", threads=1, batch=8)),
        ("cpu+bf16", Target("cpu", dtype="bf16")),
        ("cuda", Target("cuda")),
        ("cuda:0", Target("cuda:0")),
        ("cuda:1+fp16", Target("cuda:1", dtype="fp16")),
        ("cuda:0+bf16+compile@64", Target("cuda:0", dtype="bf16", runtime="compile", batch=64)),
        ("cuda+cudagraph", Target("cuda", runtime="cudagraph")),
        ("cuda:3+fp16+tensorrt@8/224", Target("cuda:3", None, "fp16", "tensorrt", 8, "224")),
        ("cpu:2+onnxruntime", Target("cpu", 2, runtime="onnxruntime")),
        ("cpu+openvino/16-128", Target("cpu", runtime="openvino", size="16-128")),
        ("mps+fp16", Target("mps", dtype="fp16")),
        ("cpu:1+channels_last/224x192", Target("cpu", 1, size="224x192", channels_last=True)),
    ],
)
def test_targets_round_trip(text: str, expected: Target) -> None:
    assert Target.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" cuda:0+compile+bf16@1 ", "cuda:0+bf16+compile"),
        ("cpu:01+fp32", "cpu:1"),
        ("cpu+eager", "cpu"),
        ("cpu+ort", "cpu+onnxruntime"),
        ("cuda+trt", "cuda+tensorrt"),
        ("onnxruntime", "cpu+onnxruntime"),
        ("ort:2@4", "cpu:2+onnxruntime@4"),
        ("openvino+bf16", "cpu+bf16+openvino"),
        ("cpu+channels_last+compile", "cpu+compile+channels_last"),
        ("cpu/0100", "cpu/100"),
        ("cpu/016-0128", "cpu/16-128"),
        ("cpu@008/224x0192", "cpu@8/224x192"),
    ],
)
def test_other_spellings_have_one_canonical_form(text: str, canonical: str) -> None:
    assert str(Target.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "target 'gpu': unknown device 'gpu'.*allowed: cpu, cpu:THREADS, cuda, cuda:INDEX or mps"),
        ("cudaa", r"unknown device 'cudaa' \(did you mean 'cuda'\?\)"),
        ("onnxruntim", r"unknown device 'onnxruntim' \(did you mean 'onnxruntime'\?\)"),
        ("mps:0", "unknown device 'mps:0'"),
        ("", "unknown device ''"),
        ("cpu:", "threads '' must be a whole number from 1 to 1024"),
        ("cpu:0", "threads '0' must be a whole number from 1"),
        ("cpu:-1", "threads '-1' must be"),
        ("cpu:1_0", "threads '1_0' must be"),
        ("cuda:x", "device index 'x' must be a whole number from 0"),
        ("cpu@0", "batch '0' must be a whole number from 1 to 1000000"),
        ("cpu@", "batch '' must be"),
        ("cpu@8@8", "batch '8@8' must be"),
        ("cpu+compil", r"unknown option \+compil \(did you mean 'compile'\?\)"),
        ("cpu+channel_last", r"unknown option \+channel_last \(did you mean 'channels_last'\?\)"),
        ("cuda+cudagraphs", r"unknown option \+cudagraphs \(did you mean 'cudagraph'\?\)"),
        ("cpu+base", r"unknown option \+base"),  # a module of the package, but no runtime
        ("cpu+bf16+fp16", r"\+fp16 repeats or contradicts an option"),
        ("cpu+compile+compile", r"\+compile repeats or contradicts"),
        ("cpu+compile+ort", r"\+ort repeats or contradicts"),
        ("ort+compile", r"\+compile repeats or contradicts"),
        ("cpu+channels_last+channels_last", r"\+channels_last repeats"),
        ("cpu@8+bf16", r"batch '8\+bf16' must be"),
        ("cpu/", "size '' must be 224, 224x192 or a range of lengths 16-128"),
        ("cpu/0", "size '0' must be"),
        ("cpu/128-16", "size '128-16' must be .*lower end first"),
        ("cpu/16-16", "size '16-16' must be"),
        ("cpu/224*224", r"size '224\*224' must be"),
        ("cpu/224@8", "size '224@8' must be"),
        ("cpu/99999999", "each number from 1 to 10000000"),
    ],
)
def test_a_wrong_target_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        Target.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "target None must be a text or a mapping of fields; allowed: cpu"),
        (3, "target 3 must be a text"),
        (["cpu"], r"target \['cpu'\] must be a text"),
        ({"device": "cpu", "dtype": ["fp32"]}, r"target: dtype=\['fp32'\].*; allowed: fp32, bf16, fp16"),
        ({"device": "cpu", "dtype": {}}, "target: dtype={}; allowed: fp32, bf16, fp16"),
        ({"device": ["cpu"]}, r"target: device=\['cpu'\]; allowed"),
        ({"device": "cpu", "runtime": ["eager"]}, r"target: runtime=\['eager'\].*; allowed"),
        ({"device": "cpu", "size": [224, 192]}, r"target: size=\[224, 192\]; allowed"),
    ],
)
def test_other_types_are_mistakes_of_one_line(given: Any, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        Target.parse(given)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.text(alphabet="cpuda:0123456789+bf16compile@/x-ort ", max_size=24))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        target = Target.parse(text)
    except UserMistake:
        return
    assert Target.parse(str(target)) == target


_numbers = st.integers(1, 10_000_000)
_sizes = st.one_of(
    _numbers.map(str),
    st.tuples(_numbers, _numbers).map(lambda pair: f"{pair[0]}x{pair[1]}"),
    st.tuples(_numbers, _numbers)
    .filter(lambda pair: pair[0] != pair[1])
    .map(lambda pair: f"{min(pair)}-{max(pair)}"),
)
_devices = st.one_of(
    st.fixed_dictionaries({"device": st.just("cpu"), "threads": st.one_of(st.none(), st.integers(1, 1024))}),
    st.fixed_dictionaries(
        {"device": st.one_of(st.just("cuda"), st.just("mps"), st.integers(0, 1023).map("cuda:{}".format))}
    ),
)


@settings(deadline=None)
@given(
    _devices,
    st.sampled_from(["fp32", "bf16", "fp16"]),
    st.sampled_from(RUNTIME_NAMES),
    st.integers(1, 1_000_000),
    st.one_of(st.none(), _sizes),
    st.booleans(),
)
def test_every_valid_target_is_read_back_from_its_text_and_from_its_fields(
    device: dict[str, Any], dtype: Any, runtime: str, batch: int, size: str | None, channels_last: bool
) -> None:
    target = Target(
        **device, dtype=dtype, runtime=runtime, batch=batch, size=size, channels_last=channels_last
    )
    assert Target.parse(str(target)) == target
    assert Target.parse(vars(target)) == target
    assert target.compile == (runtime == "compile")


def test_a_recipe_gives_the_fields_as_a_mapping() -> None:
    found = Target.parse({"device": "cpu", "threads": 2, "runtime": "ort", "size": 224, "batch": 8})
    assert str(found) == "cpu:2+onnxruntime@8/224"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devise": "cpu"}, r"unknown field 'devise' \(did you mean 'device'\?\); allowed: device, threads"),
        ({"threads": 1}, "the field 'device' is missing"),
        ({"device": "cpu:1"}, "device='cpu:1'; allowed: cpu, cuda, cuda:INDEX or mps"),
        ({"device": "cuda:01"}, "device='cuda:01'"),
        ({"device": "cuda:1024"}, "device='cuda:1024'"),
        ({"device": 0}, "device=0"),
        ({"device": "cuda", "threads": 2}, "threads=2; allowed: a whole number from 1 to 1024 on a CPU"),
        ({"device": "cpu", "threads": True}, "threads=True"),
        ({"device": "cpu", "dtype": "bf61"}, r"dtype='bf61' \(did you mean 'bf16'\?\); allowed: fp32"),
        (
            {"device": "cpu", "runtime": "onxruntime"},
            r"runtime='onxruntime' \(did you mean 'onnxruntime'\?\)",
        ),
        ({"device": "cpu", "runtime": ["eager"]}, r"runtime=\['eager'\]"),
        ({"device": "cpu", "batch": 1.0}, "batch=1.0; allowed: a whole number"),
        ({"device": "cpu", "size": "0224"}, "size='0224'; allowed"),
        ({"device": "cpu", "size": [16, 128]}, r"size=\[16, 128\]"),
        ({"device": "cpu", "channels_last": "yes"}, "channels_last='yes'; allowed: true or false"),
    ],
)
def test_a_wrong_field_says_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        Target.parse(fields)
    assert "\n" not in str(caught.value)


def test_the_forms_name_every_runtime_and_alias() -> None:
    assert RUNTIMES.names() == RUNTIME_NAMES
    assert all(f"+{name}" in FORMS for name in RUNTIME_NAMES if name != "eager")
    assert set(ALIASES.values()) <= set(RUNTIME_NAMES)


def test_lengths_are_those_of_a_range_only() -> None:
    assert Target.parse("cpu/16-128").lengths == (16, 128)
    assert Target.parse("cpu/128").lengths is None
    assert Target.parse("cpu/128x16").lengths is None
    assert Target.parse("cpu").lengths is None


# -- what this machine can run -----------------------------------------------------------------------------------------


def refused(text: str) -> str:
    with pytest.raises(UserMistake) as caught:
        Target.parse(text).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def test_check_refuses_more_threads_than_cores() -> None:
    assert f"asks for 1024 threads, but this process may use {usable_cpus()} cores" in refused("cpu:1024")
    Target.parse("cpu:1").check()
    Target.parse("cpu").check()


def test_check_without_cuda_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(
        r"\(--gpu\) asks for a CUDA device but torch sees none .*'nas doctor'", refused("cuda:0+bf16")
    )


@pytest.mark.usefixtures("two_gpus")
def test_check_names_the_devices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch sees 2 CUDA device(s); allowed: cuda:0, cuda:1" in refused("cuda:2")
    Target.parse("cuda:1+bf16").check()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert "has no bf16; use +fp16" in refused("cuda:1+bf16")


def test_check_of_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "Apple's GPU but torch sees none" in refused("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    Target.parse("mps+fp16").check()
    assert "leave +channels_last out" in refused("mps+channels_last")
    assert "+cudagraph runs on cuda only" in refused("mps+cudagraph")


def test_check_wants_a_compiler_for_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    assert "+compile needs a C++ compiler; install g++" in refused("cpu+compile")


@pytest.mark.usefixtures("two_gpus")
def test_check_wants_triton_for_compile_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "find_spec", lambda name: None)
    assert "+compile on CUDA needs triton" in refused("cuda+compile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu+cudagraph", "+cudagraph runs on cuda only; use that device, or leave +cudagraph out"),
        ("cpu+tensorrt", "+tensorrt runs on cuda only"),
    ],
)
def test_check_refuses_a_runtime_on_another_device(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cpu+onnxruntime",
            "needs onnx and onnxruntime, which is not installed; pip install 'nas-toolkit[ex",
        ),
        ("cpu+openvino", "needs openvino and onnx, which is not installed; pip install openvino"),
        ("cuda+tensorrt", "needs tensorrt and onnx, which is not installed; pip install tensorrt"),
    ],
)
def test_check_says_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr("nas.latency.runtimes.base.find_spec", lambda name: None)
    assert message in refused(text)


@pytest.fixture
def _everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.latency.runtimes.base.find_spec", lambda name: object())


@pytest.mark.usefixtures("_everything_installed")
def test_check_refuses_what_an_engine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "onnxruntime has too few bf16 kernels; use +fp16 or neither" in refused("cpu+bf16+onnxruntime")
    assert "onnxruntime chooses the memory format itself" in refused("cpu+onnxruntime+channels_last")
    Target.parse("cpu+fp16+onnxruntime").check()

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return {"CPU": ["FP32", "INT8", "BIN"]}[device]

    class OpenVino:
        def __init__(self) -> None:
            self.Core = Core

    monkeypatch.setattr(openvino, "import_module", lambda name: OpenVino())
    assert "OpenVINO has no bf16 on this processor (it has FP32, INT8); leave +bf16 out" in refused(
        "cpu+bf16+openvino"
    )
    Target.parse("cpu+openvino").check()


@pytest.mark.usefixtures("two_gpus", "_everything_installed")
def test_check_refuses_onnxruntime_without_its_cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr("nas.latency.runtimes.onnxruntime.import_module", lambda name: Engine)
    assert "has no CUDA provider; pip uninstall onnxruntime" in refused("cuda+onnxruntime")
