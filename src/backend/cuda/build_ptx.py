"""Compiles the GPU's kernels to PTX with NVRTC: no toolkit, no GPU. See scripts/build-ptx."""

import argparse
import ctypes
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).resolve().parent
MODULES = ["kernels", "groups"]
HEADER = "elements.cuh"
# The oldest architecture that cuda-12 drivers run, so that one text serves all; no contraction, no approximation.
OPTIONS = ["--gpu-architecture=compute_75", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"]
OPTIONS += ["--std=c++14"]
ASSEMBLED_FOR = ["sm_75", "sm_80", "sm_90"]


def package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(f"nvidia.{name}")
    return pathlib.Path(list(spec.submodule_search_locations)[0])


def compile_ptx(source: pathlib.Path) -> str:
    """The PTX of a CUDA C file."""
    library = package("cuda_nvrtc") / "lib"
    ctypes.CDLL(str(library / "libnvrtc-builtins.so.11.8"), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library / "libnvrtc.so.11.2"))

    def call(name: str, *args) -> None:
        if code := getattr(nvrtc, name)(*args):
            raise SystemExit(f"{source}: {name} failed with {code}\n{log()}")

    def text(size_of: str, get: str) -> str:
        size = ctypes.c_size_t()
        getattr(nvrtc, size_of)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, get)(program, buffer)
        return buffer.value.decode()

    def log() -> str:
        return text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")

    program = ctypes.c_void_p()
    header, name = (FOLDER / HEADER).read_bytes(), source.name.encode()
    one = ctypes.c_char_p * 1
    call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), name, 1, one(header), one(HEADER.encode()))
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    call("nvrtcCompileProgram", program, len(OPTIONS), options)
    return text("nvrtcGetPTXSize", "nvrtcGetPTX")


def assemble(ptx: pathlib.Path) -> None:
    """Prints what ptxas says of each kernel, and fails if one spills registers to memory."""
    ptxas = package("cuda_nvcc") / "bin/ptxas"
    for architecture in ASSEMBLED_FOR:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as out:
            command = [str(ptxas), "--verbose", "--warn-on-spills", f"--gpu-name={architecture}", "-o", out.name, str(ptx)]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"ptxas for {architecture} failed:\n{result.stderr}")
        name = stack = ""
        for line in result.stderr.splitlines():
            if "Compiling entry function" in line:
                name = line.split("'")[1]
            elif "bytes spill stores" in line:
                stack = line.strip()
            elif "Used" in line:
                print(f"{architecture}  {name:20} {line.split(':')[1].strip()}; {stack}")
                if not stack.startswith("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"):
                    raise SystemExit(f"{name} spills on {architecture}: {stack}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/build-ptx", description="Compile src/backend/cuda/*.cu to the PTX committed beside them.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed PTX differs")
    arguments = parser.parse_args()
    for module in MODULES:
        source, committed = FOLDER / f"{module}.cu", FOLDER / f"{module}.ptx"
        ptx = compile_ptx(source)
        if not arguments.check:
            committed.write_text(ptx)
        elif not committed.exists() or committed.read_text() != ptx:
            sys.exit(f"{committed.name} is not what {source} compiles to: run scripts/build-ptx and commit it")
        print(f"{committed.name}: {len(ptx.splitlines())} lines, {'as committed' if arguments.check else 'written'}")
        assemble(committed)


main()
