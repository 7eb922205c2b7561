"""Copies NVIDIA's static runtime for a CUDA library that is linked here and loads beside an older glibc.

    python csrc/tools/older_cudart.py FOLDER        then: nvcc -L FOLDER -cudart static ...

glibc 2.34 moved functions such as dlopen and pthread_create into libc, with a new version of each symbol. A library
that is linked on a newer system takes the new versions, and older systems lack them. The copy asks for the old
versions, which both systems have. `make wheels PARTS=cpp,cuda` links it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 28)  # of manylinux_2_28
HAD_THEM = ("libdl.so.2", "libpthread.so.0", "librt.so.1")  # before glibc 2.34; later ones have empty libraries


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def static_runtime() -> Path:
    """NVIDIA's, of the nvcc on the PATH."""
    planned = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    folders = re.findall(r'"-L([^"]+)"', planned)
    return next(path for folder in folders if (path := Path(folder, "libcudart_static.a")).exists())


def versions_of(library: str) -> dict[str, list[tuple[int, ...]]]:
    """The glibc versions of each symbol that a library defines, in ascending order."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for version, name in re.findall(r"GLIBC_([\d.]+)\)?\s+(\w+)$", run("objdump", "-T", library), re.MULTILINE):
        found.setdefault(name, []).append(tuple(map(int, version.split("."))))
    return {name: sorted(versions) for name, versions in found.items()}


def older_names(undefined: set[str], versions: dict[str, list[tuple[int, ...]]]) -> dict[str, str]:
    """Symbols whose newest version is too new, with the newest version that is not."""
    names = {}
    for name in sorted(undefined & set(versions)):
        old = [version for version in versions[name] if version <= OLDEST]
        if old and versions[name][-1] > OLDEST:
            names[name] = f"{name}@GLIBC_{'.'.join(map(str, old[-1]))}"
    return names


def main(folder: Path) -> None:
    runtime = static_runtime()
    undefined = set(re.findall(r"^\s+U (\w+)$", run("nm", "--undefined-only", runtime), re.MULTILINE))
    names = older_names(undefined, versions_of(run("c++", "-print-file-name=libc.so.6").strip()))
    folder.mkdir(parents=True, exist_ok=True)
    renamed = folder / "renamed.txt"
    renamed.write_text("".join(f"{name} {older}\n" for name, older in names.items()))
    copy = (folder / "libcudart_older.a").resolve()
    run("objcopy", f"--redefine-syms={renamed}", runtime, copy)
    needed = " ".join(f"-l:{name}" for name in HAD_THEM)
    (folder / "libcudart_static.a").write_text(f"INPUT({copy} {needed})\n")  # a script of the linker


if __name__ == "__main__":
    main(Path(sys.argv[1]))
