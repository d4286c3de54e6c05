"""`python -m rmsd_kernels.env`: what is installed, which backend each operation takes for which tensors, and why."""

import importlib.metadata
import platform

import torch

from . import __version__, backends, checks, cpu

OPERATIONS = (
    "token_scores",
    "select_tokens",
    "scores_and_candidates",
    "token_divergence",
    "linear_token_scores",
    "linear_token_logprobs",
    "linear_token_divergence",
    "vocab_parallel_linear_token_scores",
    "vocab_parallel_linear_token_divergence",
)
PACKAGES = ("torch", "triton", "transformers", "flash-attn")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def namesakes() -> list[str]:
    """Other distributions, by name and version, that bring an import package or a script named `rmsd`, as one of
    chemistry does (root-mean-square deviation)."""
    scripts = importlib.metadata.entry_points(group="console_scripts", name="rmsd")
    found = {script.dist.name for script in scripts if script.dist}
    found.update(importlib.metadata.packages_distributions().get("rmsd", ()))
    return [f"{name} {version(name)}" for name in sorted(found) if name.replace("_", "-") != "rmsd-kernels"]


def devices() -> dict[str, str]:
    """Device type -> what it is, or why there is none."""
    try:
        kernels = f"C++ kernels of {cpu.capability()}"
        cpu.library()
    except ImportError as error:
        kernels = str(error)
    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads; {kernels}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        major, minor = torch.cuda.get_device_capability()
        compiler = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found["cuda"] = f"{', '.join(names)}; compute capability {major}.{minor}; {compiler}"
    else:
        built = torch.version.cuda or torch.version.hip
        found["cuda"] = "none: " + ("no device found" if built else "this torch is built without CUDA and ROCm")
    return found


def choice(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, why) that `backend="auto"` takes."""
    preferred = backends.PREFERRED_BACKENDS.get(device, "torch")
    reason = backends.why_not(preferred, torch.empty(0, dtype=dtype, device=device))
    return ("torch", f"{preferred} cannot: {reason}") if reason else (preferred, f"preferred for {device} tensors")


def report() -> str:
    lines = [f"rmsd_kernels {__version__}, Python {platform.python_version()}"]
    lines += [f"  {package:<13} {version(package)}" for package in PACKAGES]
    lines += [
        f"  {other} has the import name or the script `rmsd` too: whichever of the two was installed last has replaced "
        "files of the other. Keep them in environments of their own, and install rmsd-kernels again in its."
        for other in namesakes()
    ]
    lines += ["", "devices"]
    lines += [f"  {device:<13} {what}" for device, what in devices().items()]
    for device, what in devices().items():
        if what.startswith("none"):
            continue
        lines += ["", f"backend='auto' for {device} tensors"]
        taken: dict[tuple[str, str], list[str]] = {}
        for dtype in checks.LOGIT_DTYPES:
            taken.setdefault(choice(device, dtype), []).append(str(dtype).removeprefix("torch."))
        for operation in OPERATIONS:
            for (backend, why), dtypes in taken.items():
                lines.append(f"  {operation:<38} {', '.join(dtypes):<27} {backend:<7} {why}")
        others = [name for name in ("triton", "cpu") if name != backends.PREFERRED_BACKENDS.get(device)]
        tensor = torch.empty(0, device=device)
        for name in others:
            lines.append(f"  backend={name!r}: {backends.why_not(name, tensor) or 'would serve, if asked for'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
