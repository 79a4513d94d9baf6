"""What is said when NNI cannot be imported, whoever needs it. With NNIs that are written here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nas.errors import UserMistake
from nas.nni_import import nni_module


@pytest.fixture(autouse=True)
def _own_nni() -> Iterator[None]:
    """Without the modules of an NNI that is installed, and none of ours afterwards."""

    def take() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == "nni"]
        return {name: sys.modules.pop(name) for name in names}

    real = take()
    yield
    take()
    sys.modules.update(real)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "needs NNI 3.0, which is not installed"),
        ("import nni.missing", "needs NNI 3.0, which is not installed"),
        (
            "raise ModuleNotFoundError('No pkg_resources', name='pkg_resources.extern')",
            "needs NNI, and NNI needs pkg_resources, which setuptools 81 and later do not have any more",
        ),
        (
            "import not_there.either",
            "needs NNI, and NNI needs the package 'not_there', which is not installed",
        ),
        (
            "raise AttributeError('np.float was\\nremoved')",
            "needs NNI, and importing NNI failed (AttributeError: np.float was removed)",
        ),
    ],
)
def test_the_reason_and_the_way_out_in_one_line(
    content: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is None:
        monkeypatch.setitem(sys.modules, "nni", None)
    else:
        (tmp_path / "nni").mkdir()
        (tmp_path / "nni" / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserMistake) as caught:
        nni_module("compression", "pass 'x'", "pass 'y'")
    assert (
        str(caught.value)
        == f"pass 'x' {why}; install it with: pip install 'nas-toolkit[nni]', or use pass 'y'"
    )


def test_its_handler_of_the_standard_output_is_silenced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nni" / "runtime").mkdir(parents=True)
    for name in ("__init__.py", "runtime/__init__.py", "tool.py"):
        (tmp_path / "nni" / name).touch()
    (tmp_path / "nni" / "runtime" / "log.py").write_text(
        "calls = []\ndef silence_stdout():\n    calls.append(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert nni_module("tool", "pass 'x'", "pass 'y'").__name__ == "nni.tool"
    assert nni_module("tool", "pass 'x'", "pass 'y'").__name__ == "nni.tool"
    assert sys.modules["nni.runtime.log"].calls == [1]
