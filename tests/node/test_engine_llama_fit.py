"""What a model takes is known before it is loaded, and one that cannot fit is refused with the sum."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest

from llmnode.engine import llama
from llmnode.engine.backend import ModelLoadError
from llmnode.engine.llama import LlamaOptions, fit
from llmnode.engine.llama.fit import HOST, Fit, Free, Part, host_memory
from llmnode.engine.llama.model import Model
from llmnode.engine.llama.native import native
from llmnode.engine.llama.tensors import tensor_sizes
from tests import tiny_model as recipe

MIB = 2**20


def options(kind: str = "tiny", **more: Any) -> LlamaOptions:
    return LlamaOptions(recipe.make(kind), **{"slots": 3, "n_ctx": 1024, "threads": 1, **more})


@pytest.mark.parametrize(
    "kind, more",
    [
        ("tiny", {}),
        ("tiny", {"sequences": 256}),
        ("tiny", {"flash_attn": "on", "cache_type_k": "f32", "cache_type_v": "f32"}),
        ("15m", {"n_ctx": 4096, "n_batch": 1024, "sequences": 5}),
        ("gemma3", {}),
        ("gemma3", {"swa_full": True}),
        ("lfm2", {"slots": 6}),
        ("mamba", {"cache_type_k": "bf16"}),
    ],
)
def test_the_estimate_is_what_llama_cpp_then_takes(kind: str, more: dict[str, Any]) -> None:
    estimated = llama.estimate(options(kind, **more))
    with native().listening() as lines:
        backend = llama.load(options(kind, **more, fit_check=False))
    assert (backend.room, backend.chosen) == (estimated.room, estimated.chosen)
    backend.close()
    taken: Counter[str] = Counter()
    for line in lines:
        if found := re.search(r" (model|KV|RS|compute|output) buffer size = +([\d.]+) MiB", line):
            taken[found[1]] += round(float(found[2]) * MIB)
    counted: Counter[str] = Counter()
    for part in estimated.fit.parts:
        counted[part.what] += part.size
    for what, name in [("weights", "model"), ("cache", "KV"), ("state", "RS"), ("compute buffer", "compute")]:
        assert counted[what] == pytest.approx(taken[name], abs=0.1 * MIB), what
    assert counted["logits"] >= taken["output"] - 0.03 * MIB


MEASURE = """
import sys
from pathlib import Path
import psutil
from llmnode.engine import llama
from llmnode.engine.backend import Chunk
options = llama.LlamaOptions(Path(sys.argv[1]), slots=2, n_ctx=2048, threads=1)
need = llama.estimate(options).fit
before = psutil.Process().memory_info().rss
backend = llama.load(options)
for seq in range(2):
    for start in range(0, 2048, 512):
        assert backend.decode([Chunk(seq, start, [7] * 512, min(512, backend.room.rows))]) == 0
print(psutil.Process().memory_info().rss - before, sum(part.size for part in need.parts), need.need("host"))
"""


def test_a_process_grows_by_what_was_estimated(tiny_model: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_model)], check=True, capture_output=True, text=True, timeout=200
    )
    grown, counted, need = map(int, run.stdout.split())
    assert 0.7 * counted < grown < need


def small_host(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(fit, "host_memory", lambda: Free(size, "available on this machine"))


def test_a_model_that_cannot_fit_is_refused_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    small_host(monkeypatch, 100 * MIB)
    with pytest.raises(ModelLoadError) as refusal:
        llama.load(options(sequences=3))
    text = str(refusal.value)
    assert "does not fit the memory" in text
    assert re.search(r"weights +host +4.3 MiB  21 tensors mapped from the file", text)
    assert re.search(r"cache +host +0.8 MiB  3072 cells x 2 layers, keys f16, values f16", text)
    assert re.search(r"logits +host +2.3 MiB  19 rows x 32064 x 4 bytes", text)
    assert re.search(r"margin +host +\d+.\d MiB  128 MiB and 5%", text)
    assert re.search(r"together +host +1\d\d.\d MiB  DOES NOT FIT in 100.0 MiB free: available on this machine", text)
    llama.load(options(sequences=3, fit_check=False)).close()
    small_host(monkeypatch, 1000 * MIB)
    llama.load(options(sequences=3)).close()


def test_a_device_that_is_too_small_is_enough_not_to_fit() -> None:
    parts = (Part("weights", HOST, 10 * MIB), Part("weights", "GPU0", 900 * MIB), Part("weights", "GPU1", 100 * MIB))
    free = {HOST: Free(1000 * MIB, "h"), "GPU0": Free(1100 * MIB, "0"), "GPU1": Free(1100 * MIB, "1")}
    assert Fit(parts, free).fits
    tight = Fit(parts, {**free, "GPU0": Free(950 * MIB, "0")})
    assert not tight.fits
    assert [line.split()[1] for line in tight.lines() if "DOES NOT FIT" in line] == ["GPU0"]
    idle = Fit(parts[:1], {HOST: Free(1000 * MIB, "h"), "GPU0": Free(5, "full")})
    assert idle.fits, "a device that nothing is put on may be full"


def test_layers_on_gpus_take_their_memory_there() -> None:
    """With lines as llama.cpp writes them for two GPUs and a first layer on the CPU: no test needs a GPU."""
    lines = [
        "load_tensors: layer   0 assigned to device CPU, is_swa = 0",
        "load_tensors: layer   1 assigned to device CUDA0, is_swa = 0",
        "load_tensors: layer   2 assigned to device CUDA1, is_swa = 0",
    ]
    gpus = ("CUDA0", "CUDA1")
    with Model(native(), options(), (), only_look=True) as model:
        parts = {part.device: part.size for part in fit._weights(model, options(), lines, gpus)}
    sizes = tensor_sizes(recipe.make("tiny"))
    block = {layer: sum(size for name, size in sizes.items() if name.startswith(f"blk.{layer}.")) for layer in (0, 1)}
    assert parts == {
        HOST: sizes["token_embd.weight"] + block[0],
        "CUDA0": block[1],
        "CUDA1": sizes["output.weight"] + sizes["output_norm.weight"],
    }
    cache = [
        "llama_kv_cache: layer   0: dev = CPU",
        "llama_kv_cache: layer   1: dev = CUDA0",
        "llama_kv_cache: layer   2: filtered",
        "llama_kv_cache: layer   3: dev = CUDA0",
        "llama_kv_cache: size =   30.00 MiB (  4096 cells,   3 layers,  4/1 seqs), "
        "K (f16):   15.00 MiB, V (q8_0):   15.00 MiB",
    ]
    assert {part.device: part.size for part in fit._cache(cache, gpus)} == {HOST: 10 * MIB, "CUDA0": 20 * MIB}
    buffers = [
        "sched_reserve:      CUDA0 compute buffer size =   301.75 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =     8.50 MiB",
    ]
    compute = fit._logged(buffers, gpus, "compute", "compute buffer")
    assert [(part.device, part.size) for part in compute] == [("CUDA0", int(301.75 * MIB)), (HOST, int(8.5 * MIB))]


def test_an_output_that_is_the_embedding_again_counts_where_it_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = ["load_tensors: layer   0 assigned to device CUDA0, is_swa = 0"]
    model = cast(Model, SimpleNamespace(path=path))
    parts = {part.device: part.size for part in fit._weights(model, LlamaOptions(path), lines, ("CUDA0",))}
    assert parts == {HOST: 25600, "CUDA0": 25600 + 256}
    assert [part.size for part in fit._weights(model, LlamaOptions(path), [], ())] == [25600 + 256]


@pytest.mark.parametrize("kind", ["tiny", "mamba", "bert"])
def test_sizes_of_tensors_are_read_from_the_file(kind: str) -> None:
    path = recipe.make(kind)
    truth = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    found = tensor_sizes(path)
    assert found.keys() == truth.keys()
    assert all(truth[name] <= size < truth[name] + 32 for name, size in found.items())


def test_every_file_of_a_split_model_counts(tmp_path: Path, tiny_model: Path) -> None:
    other = recipe.make("mamba")
    (tmp_path / "m-00001-of-00002.gguf").symlink_to(tiny_model)
    (tmp_path / "m-00002-of-00002.gguf").symlink_to(other)
    found = tensor_sizes(tmp_path / "m-00001-of-00002.gguf")
    assert found.keys() == tensor_sizes(tiny_model).keys() | tensor_sizes(other).keys()


def test_a_header_that_makes_no_sense_is_named(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(tiny_model.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"broken\.gguf: its header cannot be read"):
        tensor_sizes(path)


def control_group(tmp_path: Path, proc: str, files: dict[str, str]) -> Free:
    """host_memory in a made-up tree of control groups."""
    (tmp_path / "self").write_text(proc)
    for name, text in files.items():
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return host_memory(tmp_path / "self", tmp_path / "tree")


def test_a_control_groups_limit_is_what_is_free(tmp_path: Path) -> None:
    free = control_group(
        tmp_path,
        "0::/system.slice/llmnode@a.service\n",
        {
            "system.slice/llmnode@a.service/memory.max": "max\n",
            "system.slice/llmnode@a.service/memory.current": "5000\n",
            "system.slice/memory.max": f"{100 * MIB}\n",
            "system.slice/memory.current": f"{70 * MIB}\n",
            "system.slice/memory.stat": f"anon 12\nactive_file {8 * MIB}\ninactive_file {2 * MIB}\n",
        },
    )
    assert free.size == 40 * MIB, "page cache is given back"
    assert "100.0 MiB allowed by" in free.says
    assert "system.slice" in free.says


def test_a_control_group_of_the_first_version_counts_too(tmp_path: Path) -> None:
    free = control_group(
        tmp_path,
        "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
        {"memory/box/memory.limit_in_bytes": f"{9 * MIB}\n", "memory/box/memory.usage_in_bytes": f"{MIB}\n"},
    )
    assert free.size == 8 * MIB


def test_without_a_limit_what_the_machine_has_is_free(tmp_path: Path) -> None:
    free = control_group(tmp_path, "0::/\n", {})
    assert free.says == "available on this machine"
    assert free.size > 0
    assert host_memory(tmp_path / "missing", tmp_path).size > 0


def test_who_listens_within_a_listener_hears_apart_from_it(tiny_model: Path) -> None:
    with native().listening() as outer:
        with native().listening() as inner:
            pass
        llama.inspect(tiny_model)
    assert inner == []
    assert outer
