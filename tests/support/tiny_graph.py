"""A graph of two products with its manifest: what an engine is built of, without a base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scumble_build.export.manifest import Axis, File, GraphManifest, Port

ELEMENTS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def make_graph(folder: Path, dtype: str = "float16", name: str = "denoiser", **changed: Any) -> tuple[Path, Path]:
    """y = (x + more) w over dynamic rows and columns; `changed` are fields of the manifest that lie."""
    folder.mkdir(parents=True, exist_ok=True)
    element = ELEMENTS[dtype]
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(dtype)
    shape = ["rows", "tokens", 16]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "more"], ["sum"]), helper.make_node("MatMul", ["sum", "w"], ["y"])],
        name,
        [helper.make_tensor_value_info(each, element, shape) for each in ("x", "more")],
        [helper.make_tensor_value_info("y", element, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {
        "part": "denoiser",
        "graph": name,
        "family": "sd1",
        "base": "sha256:" + "0" * 64,
        "precision": "fp16" if dtype == "float16" else "fp32",
        "kept_in_fp32": (),
        "opset": 18,
        "exporter": "torch.export",
        "made_with": {},
        "code": "c0de",
        "inputs": tuple(Port(name=each, dtype=dtype, dims=tuple(shape), about="") for each in ("x", "more")),
        "outputs": (Port(name="y", dtype=dtype, dims=tuple(shape), about=""),),
        "axes": {"rows": Axis(min=1, opt=2, max=8), "tokens": Axis(min=4, opt=8, max=64, multiple=4)},
        "parameters": {},
        "onnx": File(name=path.name, sha256=digest, size=path.stat().st_size),
        "weights": File(name="none", sha256="0" * 64, size=0),
    }
    manifest = folder / f"{name}.json"
    GraphManifest(**(about | changed)).write(manifest)
    return path, manifest
