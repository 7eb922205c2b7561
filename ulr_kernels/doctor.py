"""`ulr.describe`: which back end runs each op, and why the others are absent."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

import torch

from ulr_kernels import dispatch, noise_contract, noise_tables
from ulr_kernels._version import __version__, old_torch
from ulr_kernels.backends import _abi, _native, cpp

NO_TOOL = "none when the package was built"


def describe() -> str:
    """A table of ops and back ends per device, the reasons for every absence, and the versions that matter."""
    contract = f"noise contract {noise_contract.CONTRACT_VERSION} ({noise_tables.SHA256[:12]})"
    lines = [f"ulr_kernels {__version__}, {contract}", ""]
    lines += [f"{name:<10} {value}" for name, value in _machine().items()]
    for device in dispatch.ORDER:
        lines += ["", f"on {device}:", *_table(device)]
    return "\n".join(lines)


def _table(device: str) -> list[str]:
    """The ops by the back end that runs them; ops with the same answers share a paragraph."""
    if device == "cuda" and not torch.cuda.is_available():
        return [
            "  torch sees no CUDA device",
            *(f"  {name:<8} {why}" for name, why in _absent("noise", device).items()),
        ]
    paragraphs: dict[tuple, list[str]] = {}
    for op in dispatch.op_names():
        found = {name: dispatch.find(name, op, device) for name in dispatch.ORDER[device]}
        chosen = next(name for name, provider in found.items() if not isinstance(provider, str))
        paragraphs.setdefault((chosen, *_absent(op, device).items()), []).append(op)
    lines = []
    for (chosen, *absent), ops in paragraphs.items():
        lines += [f"  {chosen:<8} runs {', '.join(ops)}", *(f"  {name:<8} absent: {why}" for name, why in absent)]
    return lines


def _absent(op: str, device: str) -> dict[str, str]:
    found = {name: dispatch.find(name, op, device) for name in dispatch.NAMES}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _machine() -> dict[str, str]:
    """The versions, the tools that built the kernels, and what the CPU offers."""
    built = _native._build_info
    old = old_torch(torch.__version__)
    cuda = torch.version.cuda or "none in this build of torch"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        cuda += f", {torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads{f'; {old}' if old else ''}",
        "triton": _version("triton") if importlib.util.find_spec("triton") else "not installed",
        "CUDA": cuda,
        "compiler": (built and built.COMPILER) or NO_TOOL,
        "nvcc": f"{built.NVCC} (built for {', '.join(built.CUDA_ARCHITECTURES)})" if built and built.NVCC else NO_TOOL,
        "CPU": cpp.describe(),
        "calls": f"of the libraries by {_abi.CALLS_BY}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"
