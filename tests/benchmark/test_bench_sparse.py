"""``tools/bench.py sparse``: runs in full on layers and models small enough for seconds; their numbers mean nothing here."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune.artifact.samples import read_samples
from graphprune.errors import LoweringError, VerifyError
from graphprune.targets.sparse_cpu import cost

TOOLS = Path(__file__).parents[2] / "tools"
KEYS = [
    "model", "pattern", "sparsity", "format", "batch", "sequence", "threads", "over_onnxruntime_fp32", "over_torch_dense",
    "over_deepsparse", "over_openvino_int8",
]  # fmt: skip
LATENCY = {
    "sparse-cpu-fp32-0.8": 0.02, "sparse-cpu-int8-0.8": 0.01, "onnx-fp32-dense": 0.08, "torch-fp32-dense": 0.1,
    "openvino-int8-dense": 0.04, "nncf-int8-dense": 0.03, "deepsparse-fp32-0.8": 0.025, "deepsparse-int8-0.8": 0.005,
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules, imported as ``tools/bench.py`` does."""
    monkeypatch.syspath_prepend(str(TOOLS))
    parts = (
        "sparse",
        "sparse_artifacts",
        "sparse_layers",
        "sparse_lowering",
        "sparse_models",
        "sparse_roofline",
        "sparse_tables",
    )
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in parts if name != "sparse_lowering"}
    yield SimpleNamespace(command=importlib.import_module("bench"), **modules)
    known = ("bench", "environment", "corners")
    for name in [name for name in sys.modules if name in known or name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of tiny layers do not go where those of real ones are kept."""
    monkeypatch.setattr(cost, "_file", lambda: tmp_path / "costs.json")


@pytest.fixture
def no_peaks(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(threads: int) -> None:
        raise tool.sparse.Unavailable("no compiler here")

    monkeypatch.setattr(tool.sparse, "measure_peaks", missing)


def run(tool: Any, *arguments: object) -> Result:
    return CliRunner().invoke(tool.command.app, ["sparse", *map(str, arguments)])


def quiet() -> Console:
    return Console(quiet=True)


# layers


def test_layers_are_measured(tool: Any, costs: None) -> None:
    from graphprune.targets.sparse_cpu.building import load_kernels

    load_kernels()
    peaks = tool.sparse_roofline.Peaks("test", 1e12, 4e12, 1e10)
    threads = torch.get_num_threads()
    found = [
        tool.sparse_layers.measure_layer(case, 1, peaks) for case in tool.sparse_layers.cases(32, (0.8,), (70,), (1,))
    ]
    assert torch.get_num_threads() == threads
    assert [(item.case.rows, item.case.features) for item in found] == [(32, 32), (128, 32), (32, 128)] * 2
    for item in found:
        assert min(item.kernel, item.layer, item.same_format, item.of_peak, item.of_memory) > 0
        assert item.chosen == (item.same_format if item.sparse else 1.0)
        if item.case.number_format == "fp32":
            assert item.same_format == item.layer


def test_weights_have_blocks_of_zeros(tool: Any) -> None:
    weight = tool.sparse_layers.random_weight(64, 32, 0.75)
    blocks = weight.view(16, 4, 32).ne(0)
    assert torch.equal(blocks.any(1), blocks.all(1))
    assert int(blocks.any(1).sum()) == 128


def test_forms_of_a_layer_compute_the_same(tool: Any) -> None:
    from graphprune.targets.sparse_cpu.building import load_kernels

    load_kernels()
    layers = tool.sparse_layers
    for kind, make in (("fp32", layers._floats), ("int8", layers._integers)):
        case = layers.Case(32, 64, kind, 0.5, 20, 1)
        runs = make(case, layers.random_weight(32, 64, 0.5))
        name, tolerance = ("dense", 1e-4) if kind == "fp32" else ("dense int8", 1e-3)
        assert torch.allclose(runs["layer"](), runs[name](), atol=tolerance)


def test_the_table_of_layers_and_its_goals(tool: Any) -> None:
    case = tool.sparse_layers.Case(768, 768, "fp32", 0.8, 128, 2)
    fast = tool.sparse_layers.Layer(case, 5.0, 3.0, 3.0, True, 0.5, 0.1)
    slow = replace(fast, case=replace(case, sparsity=0.5), same_format=0.9)
    dense = replace(slow, sparse=False)
    panels, rows = tool.sparse_tables.layer_goals([fast, slow])
    assert (panels.ratio, panels.goal, panels.met) == (5.0, ">= 4", True)
    assert (rows.ratio, rows.met) == (3.0, False)
    assert "50 % of the FMA peak" in panels.detail
    assert not tool.sparse_tables.fallback_goal([fast, slow]).met
    assert tool.sparse_tables.fallback_goal([fast, dense]).ratio == 1.0
    console = Console(record=True, width=160, file=io.StringIO())
    for table in tool.sparse_tables.layer_tables([fast, dense], (0.8,)):
        console.print(table)
    text = console.export_text()
    assert "fp32 0.8 128 2 768x768 5.00 3.00 - sparse 50 % 10 %" in " ".join(text.split())
    assert "fp32 0.5 1 0 1.000" in " ".join(text.split())


# roofline


def test_peaks_are_measured(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peaks = tool.sparse_roofline.measure_peaks(1)
    assert min(peaks.floats, peaks.bytes, peaks.memory) > 1e8
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(tool.sparse.Unavailable, match=r"no-compiler does not make peak\.cpp"):
        tool.sparse_roofline.measure_peaks(1)


def test_work_is_counted(tool: Any) -> None:
    roofline = tool.sparse_roofline
    floats = roofline.layer_work(8, 4, 0.5, 10, "fp32")
    assert (floats.floats, floats.bytes, floats.memory) == (320, 0, 16 * 4 + 4 * 2 + 10 * 12 * 4)
    integers = roofline.layer_work(8, 4, 0.5, 10, "int8")
    assert (integers.floats, integers.bytes, integers.memory) == (0, 320, 16 + 4 * 2 + 10 * 12)
    model = roofline.model_work(2, 4, 0.5, 1, 10, "int8")
    assert (model.floats, model.bytes) == (2 * 4 * 100 * 4 / 2, 2 * 2 * 10 * 0.5 * 12 * 16)
    assert roofline.model_work(2, 4, 0.5, 1, 10, "fp32").floats == 2 * (4 * 100 * 4 + 2 * 10 * 0.5 * 12 * 16)
    peaks = roofline.Peaks("test", 100.0, 1000.0, 10.0)
    assert roofline.Work(50, 500, 20).of_peak(peaks, 2.0) == 0.5
    assert roofline.Work(50, 500, 20).of_memory(peaks, 2.0) == 1.0


# artifacts


def test_artifacts_fit_what_they_were_made_by(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tool.sparse_artifacts
    store = module.Store(tmp_path, module.Model(1, 64))
    for contender in (module.Contender("sparse-cpu", "int8", 0.8), module.ONNXRUNTIME, module.DENSE_INT8[1]):
        assert not store.fits(contender)
        folder = store.folder(contender)
        folder.mkdir(parents=True)
        (folder / ("model.xml" if contender.runtime == "nncf" else "manifest.json")).touch()
        assert not store.fits(contender)
        store.mark(contender)
        assert store.fits(contender)
    assert not module.Store(tmp_path, module.Model(2, 64)).fits(contender)
    monkeypatch.setattr(module, "_digest", lambda: "other source")
    assert not store.fits(module.Contender("sparse-cpu", "int8", 0.8))
    assert store.fits(module.ONNXRUNTIME)
    store.remove(module.ONNXRUNTIME)
    assert not store.fits(module.ONNXRUNTIME)


def test_names_of_models_and_artifacts(tool: Any) -> None:
    module = tool.sparse_artifacts
    assert list(map(str, (module.Model(), module.Model(1), module.Model(2, 64)))) == [
        "bert-base", "bert-base, 1 of 12 layers", "bert, 2 layers of 64",
    ]  # fmt: skip
    names = [item.name for item in (*module.required([0.8]), *module.optional([0.8]))]
    assert sorted(names) == sorted(LATENCY)
    assert module.DENSE_INT8[1].target == "openvino"


def test_a_process_that_fails_says_why(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tool.sparse_artifacts
    side = tmp_path / "side.py"
    side.write_text('import sys\nprint(\'{"name": "onnx-fp32-dense", "error": ""}\')\nsys.exit(\'out of memory\')\n')
    monkeypatch.setattr(module, "WORKER", side)
    store = module.Store(tmp_path, module.Model(1, 64))
    left_out = module.lower(store, [module.ONNXRUNTIME, module.EAGER])
    assert left_out == {module.EAGER: "the process ended with status 1: out of memory"}


def test_what_is_missing_is_lowered(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    module = tool.sparse

    def lower(store: Any, todo: Any) -> dict[Any, str]:
        asked.append([item.name for item in todo])
        failed = [item for item in todo if item.runtime == "openvino"]
        for item in todo:
            if item not in failed:
                store.folder(item).mkdir(parents=True, exist_ok=True)
                (store.folder(item) / ("model.xml" if item.runtime == "nncf" else "manifest.json")).touch()
                store.mark(item)
        return dict.fromkeys(failed, "no such operator")

    monkeypatch.setattr(module, "_lower", lambda store, todo, console: lower(store, todo))
    monkeypatch.setattr(module, "find_deepsparse", lambda: None)
    monkeypatch.setattr(module, "missing_runtime", lambda item: "none" if item.runtime == "deepsparse" else None)
    plan = module._plan(True, None, None, [1], None)
    store, found = module.prepare(tmp_path, None, plan, False, quiet())
    assert str(store.model) == "bert-base, 1 of 12 layers"
    assert [item.name for item in found] == ["sparse-cpu-fp32-0.8", "onnx-fp32-dense", "torch-fp32-dense"]
    assert asked.pop() == [item.name for item in found]
    module.prepare(tmp_path, None, plan, False, quiet())
    assert asked == []
    full = replace(plan, quick=False)
    store, found = module.prepare(tmp_path, None, full, False, quiet())
    assert str(store.model) == "bert-base"
    assert len(asked.pop()) == 6
    assert [item.name for item in found][2:] == ["onnx-fp32-dense", "torch-fp32-dense", "nncf-int8-dense"]
    # Now the quick run has them, but not what starts slowly.
    _, known = module.prepare(tmp_path, None, plan, False, quiet())
    assert [item.name for item in known] == [item.name for item in found if item.runtime != "nncf"]
    assert asked == []
    monkeypatch.setattr(module, "missing_runtime", lambda item: "install it" if item.runtime == "onnx" else None)
    with pytest.raises(LoweringError, match=r"onnx-fp32-dense is missing, .* without: install it"):
        module.prepare(tmp_path / "other", None, full, False, quiet())


# models


class FakeRemote:
    """Stands for a process, and takes the times of ``LATENCY``."""

    def __init__(self, target: Any, folder: Path, *, threads: int | None = None):
        self.name = (folder.parent if folder.name == "int8" else folder).name

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.zeros(len(inputs["input_ids"]), np.float32)}

    def time(self, inputs: Mapping[str, np.ndarray], calls: int = 1) -> list[float]:
        return [9.0] * (calls > 2) + [LATENCY[self.name]] * (calls - (calls > 2))

    def __enter__(self) -> FakeRemote:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def faked(tool: Any, no_peaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts that are not there, in processes that are none."""
    module = tool.sparse_artifacts
    contenders = [*module.required([0.8]), *module.optional([0.8])]
    monkeypatch.setattr(tool.sparse_models, "Remote", FakeRemote)
    monkeypatch.setattr(tool.sparse_models, "_check", lambda *_: None)
    monkeypatch.setattr(
        tool.sparse, "prepare", lambda out, model, *_: (module.Store(out, model or module.Model()), contenders)
    )


def test_json_has_rows_and_the_machine(tool: Any, faked: None, tmp_path: Path) -> None:
    result = run(tool, "--only", "bert-base", "--quick", "--json", "--threads", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert list(content) == ["machine", "rows"]
    assert "cores" in content["machine"]
    floats, integers = content["rows"]
    assert list(floats) == list(integers) == KEYS
    assert list(floats.values())[:7] == ["bert-base", "4x1", 0.8, "fp32", 1, 128, 1]
    assert [floats[key] for key in KEYS[7:]] == [pytest.approx(4), pytest.approx(5), pytest.approx(1.25), None]
    assert [integers[key] for key in KEYS[7:]] == [
        pytest.approx(value) for value in (8, 10, 0.5, 3)
    ]  # NNCF's is the faster
    assert "int8 4x1 0.8 / DeepSparse" in result.stderr


def test_a_missed_goal_is_an_exit_code(tool: Any, faked: None, tmp_path: Path) -> None:
    options = (
        "--only",
        "bert-base",
        "--threads",
        1,
        "--batch",
        2,
        "--sequence",
        128,
        "--repeats",
        1,
        "--out",
        tmp_path,
    )
    result = run(tool, *options)
    assert result.exit_code == 1  # slower than DeepSparse in int8
    table = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "bert-base fp32 0.8 2 128 1 4.00 5.00 1.25 - 20.0 - -" in table
    assert any(line.startswith("fp32 4x1 0.8 / onnxruntime fp32 4.000 >= 3.5 yes") for line in table)
    assert any(line.startswith("int8 4x1 0.8 / DeepSparse 0.500 > 1 NO") for line in table)
    result = run(tool, *options, "--layers", 2)
    assert result.exit_code == 0  # goals are of BERT-base
    assert "DeepSparse 0.500" not in result.stdout


def test_outputs_must_be_finite(tool: Any, faked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRemote, "run", lambda self, inputs: {"logits": np.array([np.nan])})
    result = run(tool, "--only", "bert-base", "--quick", "--threads", 1, "--out", tmp_path)
    assert result.exit_code == 2
    assert "not finite" in result.stderr


@pytest.mark.slow
def test_real_processes_take_turns(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtimes are stood in for by one that starts fast."""
    pytest.importorskip("onnxruntime", reason="the stand-in needs the extra onnx")
    module = tool.sparse_artifacts
    monkeypatch.setattr(module.Contender, "target", property(lambda self: "onnx"))
    store = module.Store(tmp_path, module.Model(1, 64))
    contenders = [module.Contender("sparse-cpu", "fp32", 0.8), module.ONNXRUNTIME, module.EAGER]
    folder = store.folder(contenders[0])
    setting = importlib.import_module("benchmarks.measuring").Setting(1, 64, 1, 16)
    dense = importlib.import_module("benchmarks.quantization")._dense(setting)
    gp.export(dense, "onnx", folder, per_node=False)
    for contender in contenders[1:]:
        shutil.copytree(folder, store.folder(contender))
    peaks = tool.sparse_roofline.Peaks("test", 1e12, 4e12, 1e10)
    shape = tool.sparse_models.Shape(2, 16, 1)
    (found,) = tool.sparse_models.measure_models(store, contenders, shape, 2, peaks)
    assert found.row.over_onnxruntime_fp32 > 0
    assert found.row.over_torch_dense > 0
    assert found.of_peak > 0
    zeros = SimpleNamespace(run=lambda given: {name: 0 * value for name, value in read_samples(folder)[0][1].items()})
    with pytest.raises(VerifyError, match=r"does not compute its own sample outputs: .* --fresh"):
        tool.sparse_models._check(zeros, store, contenders[0])


@pytest.mark.slow
def test_a_small_model_is_lowered_and_measured(tool: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the comparison needs the extra onnx")
    options = ("--quick", "--json", "--layers", 1, "--hidden", 64, "--sequence", 16, "--threads", 1, "--out", tmp_path)
    result = run(tool, "--only", "bert-base", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["format"] for row in rows] == ["fp32", "int8"]
    assert all(row["over_onnxruntime_fp32"] > 0 and row["over_torch_dense"] > 0 for row in rows)


# the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "models"), "unknown part 'models'; known: layers, bert-base"),
        (("--threads", "4096"), "threads=4096 is not from 1 to"),
        (("--sequence", "513"), "sequence=513 is not from 1 to 512"),
        (("--batch", "0"), "batch=0 is not from 1 to what memory holds"),
    ],
)
def test_bad_options(tool: Any, options: tuple[str, ...], message: str) -> None:
    result = run(tool, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_layers_by_the_command(tool: Any, costs: None, no_peaks: None) -> None:
    result = run(
        tool, "--only", "layers", "--quick", "--json", "--hidden", 64, "--sequence", 8, "--threads", 1, "--repeats", 1
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == []
    assert "no compiler here" in result.stderr
    assert "256x64" in result.stderr


def test_the_other_measures_stay_options(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(tool.command.app, ["--help"])
    assert "sparse" in result.stdout
    result = CliRunner().invoke(tool.command.app, ["--only", "sparse"])
    assert result.exit_code == 2
    assert "python tools/bench.py sparse" in result.stderr
    assert "--quick" in run(tool, "--help").stdout
