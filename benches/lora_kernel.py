"""Compiles the fused LoRA kernel for GPUs that need not be there, and prints what a program of it takes.

    python benches/lora_kernel.py [--capabilities 80 89 90 120] [--ranks 16 64 128 256] [--dtypes fp16 bf16 fp32]

Needs the package `triton`, which comes along with torch's CUDA wheels. Prints JSON: for each kernel its tiles, the
registers of a thread, bytes that spill from them to memory, bytes of shared memory, and the tensor cores' instruction.
Speed is not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scumble_build.export.graph import PRECISIONS
from scumble_build.export.manifest import Precision
from scumble_server.executors.torch.paged_lora import constants, paged_lora

POINTERS = ("x", "y", "A", "B", "scale")
SIZES = ("tokens", "per_row", "inputs", "outputs", "stretch", "A_page", "B_page", "table_set")
ALIGNED = (
    "x",
    "y",
    "A",
    "B",
    "table",
    "scale",
    "tokens",
    "per_row",
    "inputs",
    "outputs",
    "stretch",
    "A_page",
    "B_page",
)
"""Multiples of 16 in every base, which lets the compiler load 16 bytes at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 89, 90, 120])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--dtypes", choices=list(PRECISIONS), nargs="+", default=list(PRECISIONS))
    arguments = parser.parse_args()
    kernels = [
        {"capability": capability, "rank": rank, "dtype": dtype, **compiled(capability, rank, dtype)}
        for capability in arguments.capabilities
        for dtype in arguments.dtypes
        for rank in arguments.ranks
    ]
    print(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1))


def compiled(capability: int, rank: int, dtype: Precision) -> dict[str, Any]:
    sizes, options = constants(rank, PRECISIONS[dtype])
    names, fixed = paged_lora.arg_names, {"table_page": 1, **sizes}
    signature = {
        **dict.fromkeys(POINTERS, f"*{dtype}"),
        "table": "*i64",
        **dict.fromkeys(SIZES, "i32"),
        **dict.fromkeys(fixed, "constexpr"),
    }
    source = ASTSource(
        paged_lora,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): size for name, size in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    product = next((name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx), "none")
    return {
        **sizes,
        **options,
        **_resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "product": product,
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread and bytes of its stack, where spilled registers lie, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: int(re.search(rf"{word}:(\d+)", usage).group(1))  # type: ignore[union-attr]
        for name, word in (("registers", "REG"), ("spilled", "STACK"))
    }


if __name__ == "__main__":
    main()
