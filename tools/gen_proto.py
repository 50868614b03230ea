"""Generates the protobuf stubs, or checks that the committed ones are current.

python -m tools.gen_proto [--check]
"""

import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"


def generate(out: Path) -> None:
    """Writes stubs and their type stubs for every .proto file below ``out``."""
    include = resources.files("grpc_tools") / "_proto"
    protos = sorted(str(p) for p in (SOURCE / "kvstore_proto").glob("*.proto"))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = [f"--{kind}_out={out}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{SOURCE}", f"-I{include}", *outputs, *protos]) != 0:
        sys.exit("protoc failed; its message stands above")


def stale() -> list[str]:
    """Names of committed stubs that differ from what the .proto files give now."""
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        fresh = {p.name: p.read_bytes() for p in (Path(tmp) / "kvstore_proto").iterdir()}
    here = {p.name: p.read_bytes() for p in (SOURCE / "kvstore_proto").glob("*_pb2*")}
    return sorted(name for name in fresh.keys() | here.keys() if fresh.get(name) != here.get(name))


def main() -> None:
    """Entry point."""
    if "--check" not in sys.argv[1:]:
        generate(SOURCE)
        return
    if names := stale():
        sys.exit(f"stale protobuf stubs: {', '.join(names)}; run `make proto` and commit them")


if __name__ == "__main__":
    main()
