"""Builds the native parts with ninja: two C ABI libraries (CPU, CUDA) and `_C`, the shim that calls their launchers.

The build is for this machine: CUDA kernels are compiled for the GPUs that are present, and `TORCH_CUDA_ARCH_LIST` names
others ("9.0a", or "All" for a wheel that serves many machines). A cross compiler in `CXX` builds for its own processor,
without `_C`. A wheel serves every Python: where `_C` was built for another one, ctypes calls the libraries.

A missing tool or GPU leaves a part out and `ulr_kernels/_build_info.py` says why; an error in our own sources ends the
build. `ULR_BUILD=cpp,cuda` (any subset, or `none`) builds just these parts, and then a missing tool is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
VERSION = runpy.run_path(str(ROOT / "ulr_kernels" / "_version.py"))["__version__"]
OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}  # of processors, on some systems


def processor(name: str) -> str:
    return OTHER_NAMES.get(name.lower(), name.lower())


SYSTEM, MACHINE = sys.platform, processor(platform.machine())
ALL_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
OLDEST_CAPABILITY = 8  # mma.sync of bf16 operands
OLDEST_NVCC = 12
WARNINGS = "-Wall -Wextra"  # .ci/run adds -Werror, by CXXFLAGS; a stranger's newer compiler must not end an install
CXX_FLAGS = f"-std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden {WARNINGS}"
# The same sources are compiled once for each instruction set of a processor; the library picks one when it is loaded.
INSTRUCTION_SETS = {
    "any": {"portable": ""},
    "x86_64": {
        # Sixteen registers: GCC else keeps more values live. Clang ignores these two flags.
        "avx2": "-mavx2 -mfma -mf16c -fschedule-insns -fsched-pressure -Wno-ignored-optimization-argument",
        # GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
        "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
        " -Wno-unknown-warning-option -Wno-maybe-uninitialized -Wno-uninitialized",
    },
    "aarch64": {"neon": ""},  # every processor of this kind has it
}
# The shim's Python symbols are the interpreter's; on macOS the linker must be told to leave them open.
SHIM_LINK_FLAGS = {"darwin": "-Wl,-undefined,dynamic_lookup"}
SHIM_SOURCES = ("bindings", "older_runtime")
CPU_ONCE = ("dispatch", "parallel", "philox")  # the other sources: once for each instruction set


class Absent(Exception):
    """A part cannot be built here; the message says which tool is missing."""


@dataclasses.dataclass
class Tools:
    """The tools that were found, by version; `absent` has a reason for each part that is left out."""

    compiler: str | None = None
    nvcc: str | None = None
    architectures: tuple[str, ...] = ()
    absent: dict[str, str] = dataclasses.field(default_factory=dict)


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


def find_compiler() -> str:
    if chosen := os.environ.get("CXX"):
        if shutil.which(shlex.split(chosen)[0]) is None:
            raise SystemExit(f"CXX must name a compiler on the PATH, got {chosen!r}")
        return chosen  # it may carry arguments, or a cache before the compiler
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return shlex.quote(path)
    raise Absent("no C++ compiler was found when the package was built (CXX, c++, g++, clang++)")


def machine_of(compiler: str) -> str:
    """The processor that a compiler builds for; a cross compiler's is another one than this machine's."""
    return processor(first_line(*shlex.split(compiler), "-dumpmachine").split("-")[0])


def machine_of_wheel() -> str:
    try:
        return machine_of(find_compiler())
    except Absent:
        return MACHINE


def find_shim_headers(machine: str) -> list[str]:
    """The folders of pybind11's and Python's headers, for `_C`."""
    if machine != MACHINE:
        raise Absent(f"there are no headers of a Python for {machine}")
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        raise Absent("Python's headers were not found when the package was built (Debian: python3-dev)")
    if importlib.util.find_spec("pybind11") is None:
        raise Absent("pybind11 was not found when the package was built")
    import pybind11

    return [pybind11.get_include(), python]


def find_ninja() -> str:
    if path := shutil.which("ninja"):
        return path
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    raise Absent("ninja was not found when the package was built")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = ([str(Path(home) / "bin" / "nvcc")] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for name in candidates:
        if path := shutil.which(name):
            return path
    raise Absent("nvcc was not found when the package was built (CUDA_HOME, PATH)")


def nvcc_version(nvcc: str) -> str:
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+)\.[\d.]+", printed)
    if found is None or int(found[1]) < OLDEST_NVCC:
        raise Absent(f"nvcc {OLDEST_NVCC} or newer is needed, {nvcc} says {found[0] if found else printed!r}")
    return found[0][1:]


def present_gpus() -> tuple[str, ...]:
    """The compute capabilities of this machine's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    return tuple(sorted(set(re.findall(r"^\d+\.\d$", printed, re.MULTILINE)), key=float))


def architectures(nvcc: str) -> tuple[str, ...]:
    """The compute capabilities to build for, out of those that this nvcc knows.

    A list from the environment gets PTX of its newest entry too, for GPUs that are newer still.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    wanted = list(ALL_ARCHITECTURES) if chosen.lower() == "all" else [n for n in re.split(r"[;,\s]+", chosen) if n]
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: an entry must look like 9.0a or 12.0+PTX, got {name!r}")
    here = not wanted
    if here:
        wanted = [f"{name}a" if f"{name}a" in ALL_ARCHITECTURES else name for name in present_gpus()]
        if not wanted:
            raise Absent(
                "no GPU was found when the package was built (TORCH_CUDA_ARCH_LIST=9.0a builds for one elsewhere)"
            )
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    kept = [n for n in wanted if re.sub(r"\D", "", n) in known and int(n.split(".")[0]) >= OLDEST_CAPABILITY]
    if not kept:
        raise Absent(f"nvcc knows none of {', '.join(wanted)} from compute capability {OLDEST_CAPABILITY}.0 on")
    if not here and not any(name.endswith("+PTX") for name in kept):
        # PTX of an architecture-specific target (9.0a) runs nowhere else, so the newest plain one carries it.
        plain = [name for name in kept if name[-1].isdigit()]
        if plain:
            newest = max(plain, key=lambda name: float(name))
            kept[kept.index(newest)] += "+PTX"
    return tuple(kept)


def generate_code(names: tuple[str, ...]) -> str:
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class NinjaFile:
    """Rules and build statements. Paths are quoted by the one rule that ninja has: `$` before a space or a colon."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.3"]

    def rule(self, name: str, command: str, *, dependencies: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if dependencies:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: str, rule: str, inputs: list[str], **variables: str) -> str:
        quoted = [re.sub(r"([ :$])", r"$\1", path) for path in (output, *inputs)]
        self.lines.append(f"build {quoted[0]}: {rule} {' '.join(quoted[1:])}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n")


def cpu_objects(machine: str) -> list[tuple[str, Path, str]]:
    """The CPU library of a processor, named as `platform.machine` does: objects, their sources and compiler flags."""
    machine = processor(machine)
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    objects = [(source.stem, source, "") for source in sources if source.stem in CPU_ONCE]
    for isa, flags in (INSTRUCTION_SETS["any"] | INSTRUCTION_SETS.get(machine, {})).items():
        flags_of_isa = f"{flags} -DULR_ISA={isa} -DULR_ISA_{isa.upper()}"
        objects += [(f"{source.stem}.{isa}", source, flags_of_isa) for source in sources if source.stem not in CPU_ONCE]
    return objects


def from_build(path: Path) -> str:
    """A path of the project as ninja sees it. A copy of the project with its build folder needs no new build."""
    return os.path.relpath(path, BUILD)


def quoted(path: str | Path) -> str:
    """For a command in a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def build_folder(machine: str) -> Path:
    return BUILD if machine == MACHINE else BUILD.with_name(f"{BUILD.name}-{machine}")


def write_ninja(
    compiler: str, includes: list[str] | None, nvcc: str | None, names: tuple[str, ...], cpp: bool, machine: str
) -> list[str]:
    """Write build.ninja; the names of the libraries that it makes.

    Args:
        compiler: a command.
        includes: the folders of pybind11's and Python's headers, or None for no `_C`.
        nvcc: a path, or None for no CUDA library.
        names: the compute capabilities of the CUDA library.
        cpp: whether to make the CPU library.
        machine: the processor that the compiler builds for.
    """
    ninja = NinjaFile()
    own = "-I" + from_build(ROOT / "csrc" / "include")
    extra = os.environ.get("CXXFLAGS", "")
    ninja.rule("cxx", f"{compiler} {CXX_FLAGS} {extra} {own} $flags -MMD -MF $out.d -c $in -o $out", dependencies=True)
    ninja.rule("link", f"{compiler} -shared -pthread $flags $in -o $out")
    made = []
    if includes is not None:
        shim = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
        headers = " ".join(f"-isystem {quoted(path)}" for path in includes)
        objects = [
            ninja.build(f"{name}.o", "cxx", [from_build(ROOT / "csrc" / f"{name}.cpp")], flags=headers)
            for name in SHIM_SOURCES
        ]
        made.append(ninja.build(shim, "link", objects, flags=SHIM_LINK_FLAGS.get(SYSTEM, "")))
    version = ninja.build(
        "version.o", "cxx", [from_build(ROOT / "csrc" / "version.cpp")], flags=f"-DULR_VERSION={VERSION}"
    )
    if cpp:
        objects = [
            ninja.build(f"cpu/{name}.o", "cxx", [from_build(source)], flags=flags)
            for name, source, flags in cpu_objects(machine)
        ]
        library = "libulr_cpu.dylib" if SYSTEM == "darwin" else "libulr_cpu.so"
        made.append(ninja.build(library, "link", [*objects, version]))
    if nvcc:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        flags = " ".join((ROOT / "csrc" / "cuda" / "nvcc_flags.txt").read_text().split())
        host = next(word for word in reversed(shlex.split(compiler)) if not word.startswith("-"))  # no cache, no option
        nvcc = f"{quoted(nvcc)} -ccbin {quoted(host)}"
        ninja.rule(
            "nvcc",
            f"{nvcc} {flags} {own} {generate_code(names)}"
            f" --threads {max(1, (os.cpu_count() or 1) // len(sources))} -MD -MF $out.d -c $in -o $out",
            dependencies=True,
        )
        ninja.rule("nvlink", f"{nvcc} -shared -cudart static {generate_code(names)} $in -o $out")
        objects = [ninja.build(f"cuda/{path.stem}.o", "nvcc", [from_build(path)]) for path in sources]
        made.append(ninja.build("libulr_cuda.so", "nvlink", [*objects, version]))
    folder = build_folder(machine)
    folder.mkdir(parents=True, exist_ok=True)
    ninja.write(folder / "build.ninja")
    return made


def plan_of(tools: Tools, parts: set[str]) -> str:
    """The line that says what is built, and why the rest is not."""
    with_tools = {"cpp": tools.compiler, "cuda": f"nvcc {tools.nvcc} for {', '.join(tools.architectures)}"}
    built = [f"{part} kernels ({with_tools[part]})" for part in sorted(parts - set(tools.absent))]
    names = {"_C": "_C, so ctypes calls the libraries", "cpp": "cpp kernels", "cuda": "cuda kernels"}
    left_out = [f"no {names[part]}: {reason}" for part, reason in sorted(tools.absent.items())]
    return "ulr_kernels builds " + "; ".join([" and ".join(built) or "nothing", *left_out])


def build_native(target: Path) -> Tools:
    """Build what the tools here allow, into the package at `target`."""
    requested = os.environ.get("ULR_BUILD") or None  # CI systems set an unused variable to nothing
    parts = {"cpp", "cuda"} if requested is None else set(filter(None, re.split(r"[,\s]+", requested))) - {"none"}
    if parts - {"cpp", "cuda"}:
        raise SystemExit(f"ULR_BUILD must name parts of cpp, cuda (or none), got {requested!r}")
    tools = Tools(absent={part: f"ULR_BUILD={requested} left it out" for part in {"cpp", "cuda"} - parts})
    made: list[str] = []
    includes = nvcc = None
    try:
        compiler, ninja = find_compiler(), find_ninja()
        tools.compiler = first_line(*shlex.split(compiler), "--version")
        machine = machine_of(compiler)
    except Absent as reason:
        tools.absent.update(dict.fromkeys(parts, str(reason)))
        print(plan_of(tools, parts), flush=True)
    else:
        try:
            includes = find_shim_headers(machine)
        except Absent as reason:
            tools.absent["_C"] = str(reason)
        if "cuda" in parts:
            try:
                nvcc = find_nvcc()
                tools.nvcc = nvcc_version(nvcc)
                tools.architectures = architectures(nvcc)
            except Absent as reason:
                nvcc = tools.nvcc = None
                tools.absent["cuda"] = str(reason)
        print(plan_of(tools, parts), flush=True)
        if parts - set(tools.absent):
            made = write_ninja(compiler, includes, nvcc, tools.architectures, "cpp" in parts, machine)
            subprocess.run([ninja, "-C", str(build_folder(machine))], check=True)
    if requested is not None and (missing := parts & set(tools.absent)):
        raise SystemExit("ULR_BUILD: " + "; ".join(f"{part}: {tools.absent[part]}" for part in sorted(missing)))
    target.mkdir(parents=True, exist_ok=True)
    for old in native_files(target):
        if old.name not in made:
            old.unlink()  # of an earlier build: _build_info.py would deny it
    for name in made:
        replace(build_folder(machine) / name, target / name)
    return tools


def native_files(package: Path) -> list[Path]:
    return [*package.glob("_C.*.so"), *package.glob("libulr_*.so"), *package.glob("libulr_*.dylib")]


def replace(source: Path, target: Path) -> None:
    """Copy by renaming over the target: a process that has the old library mapped keeps it."""
    if not target.exists() or source.stat().st_mtime_ns != target.stat().st_mtime_ns:
        shutil.copy2(source, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)


def write_build_info(tools: Tools, target: Path) -> None:
    (target / "_build_info.py").write_text(
        '"""Written by setup.py: what was built here, with what, and why the rest was not."""\n\n'
        f"COMPILER: str | None = {tools.compiler!r}\n"
        f"NVCC: str | None = {tools.nvcc!r}\n"
        f"CUDA_ARCHITECTURES: tuple[str, ...] = {tools.architectures!r}\n"
        f"ABSENT: dict[str, str] = {dict(sorted(tools.absent.items()))!r}  # part: reason\n"
    )


class BuildNative(build_ext):
    """setuptools' step for extension modules, done by ninja."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = ROOT / "ulr_kernels" if in_place else Path(self.build_lib) / "ulr_kernels"
        write_build_info(build_native(target), target)

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / "ulr_kernels"
        return [str(path) for path in (*native_files(target), target / "_build_info.py")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class ForEveryPython(bdist_wheel):
    """A wheel of one platform and of every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag.replace(MACHINE, machine_of_wheel())


if __name__ == "__main__":
    if SYSTEM not in ("linux", "darwin"):
        os.environ.setdefault("ULR_BUILD", "none")  # of no other system are the compiler's options known
    # The one extension makes setuptools run the step and mark the wheel as built for this platform.
    setup(
        version=VERSION,
        ext_modules=[Extension("ulr_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": ForEveryPython},
    )
