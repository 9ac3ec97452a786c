"""Make PyTorch's CUDA build load on a Linux machine without CUDA, and torchcodec without FFmpeg.

Run it in a virtualenv after `pip install --no-deps -r requirements.txt`. It prints the folder
that LD_LIBRARY_PATH must name for torchcodec, and may be run again.

The Linux `torch` of the Python package index is the CUDA build, and asks for 2.3 GB of NVIDIA
libraries even where there is no GPU. A test that computes on the CPU needs them only to satisfy
the dynamic linker. This compiles one small library with a function for every name that torch
would take from them, and links it beside torch's own libraries under the names of the missing
ones. Only the CUDA runtime (2 MB) has to be the real one: torch asks it whether there is a GPU.
The virtualenv has no use of a GPU from then on. Needs `readelf` and `cc`.

torchcodec looks for FFmpeg under its usual names. The `av` package has it under others.
"""
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile

NVIDIA = r"lib(cu(?!da\.)|nccl|nvrtc|nvshmem|nvJitLink|nvToolsExt)"  # libcuda is the driver's: torch does without
SYMBOL = r" UND ((?:cu|nccl|nvrtc|nvshmem)\w*)(?:@([\w.]+))?"  # "FUNC GLOBAL DEFAULT UND cufftExecC2C@libcufft.so.12"


def imports_torch():
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)


def readelf(*args):
    return subprocess.run(["readelf", "-W", *args], capture_output=True, text=True, check=True).stdout


def stub_cuda(packages):
    if imports_torch().returncode == 0:
        return
    lib = packages / "torch" / "lib"
    real = {file.name for file in packages.glob("nvidia/*/lib/*.so*")}
    missing, versions = set(), {}
    for file in [file for file in lib.glob("lib*.so*") if not file.is_symlink()]:
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", file))
        missing.update(name for name in needed if re.match(NVIDIA, name) and name not in real)
        for symbol, version in re.findall(SYMBOL, readelf("--dyn-syms", file)):
            if version not in real:
                versions.setdefault(version, set()).add(symbol)
    stub = lib / "libno_cuda_stub.so"
    with tempfile.TemporaryDirectory() as tmp:
        source, script = pathlib.Path(tmp, "stub.c"), pathlib.Path(tmp, "stub.map")
        symbols = sorted(set().union(*versions.values()))
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in symbols))
        script.write_text(
            "".join(f"{v} {{ global: {'; '.join(sorted(names))}; }};\n" for v, names in versions.items() if v)
        )
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", f"-Wl,--version-script={script}", "-o", stub, source], check=True
        )
    for name in missing:
        (lib / name).unlink(missing_ok=True)
        (lib / name).symlink_to(stub.name)
    result = imports_torch()
    if result.returncode:
        sys.exit(f"torch does not import: {result.stderr or result.returncode}")


def link_ffmpeg(packages):
    folder = packages / "av.libs"
    for file in [file for file in folder.glob("lib*-*.so.*") if re.match(r"lib(av|sw)", file.name)]:
        link = folder / re.sub(r"-\w+(\.so\.\d+).*", r"\1", file.name)  # libavcodec-5e6b.so.62.28 as libavcodec.so.62
        link.unlink(missing_ok=True)
        link.symlink_to(file.name)
    return folder


if __name__ == "__main__":
    packages = pathlib.Path(importlib.util.find_spec("torch").origin).parent.parent
    if sys.platform == "linux":
        stub_cuda(packages)
        print(link_ffmpeg(packages))
