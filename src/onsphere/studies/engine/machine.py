"""The kind of machine that computed a record: on another kind, sums may round otherwise."""

import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """What rounding depends on, besides the cell and PyTorch's version, which are in its key.

    Two machines that are equal here give the same records, bit for bit.

    Attributes:
        processor: its name, as the maker gives it.
        instructions: the vector instructions that PyTorch uses on it, as ``"AVX2"``.
        threads: how many threads computed the cell.
    """

    processor: str
    instructions: str
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.processor} ({self.instructions})"

    @classmethod
    def read(cls, written: Any) -> "Machine | None":
        """Read what a record says; ``None`` where it says nothing, as older ones do."""
        match written:
            case {"processor": str(name), "instructions": str(vectors), "threads": int(threads)}:
                return cls(name, vectors, threads)
        return None


def this_machine() -> Machine:
    """Return the machine that runs this process, with the threads that it uses."""
    instructions = torch.backends.cpu.get_cpu_capability()
    return Machine(_processor(), instructions, torch.get_num_threads())


@lru_cache(maxsize=1)
def _processor() -> str:
    """Return the processor's name; the architecture's, where no better one is known."""
    found = _brand() or platform.processor() or platform.machine() or "unknown"
    return " ".join(found.split())


def _brand() -> str | None:
    system = platform.system()
    if system == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        return told.stdout.strip()
    if system == "Linux" and _CPUINFO.exists():
        return name_in(_CPUINFO.read_text(errors="replace"))
    return None


def name_in(cpuinfo: str) -> str | None:
    """Return the first processor's name in the text of Linux's ``/proc/cpuinfo``.

    With the numbers of family and model, for a virtual machine may shorten the name. Arm has no
    names there, but numbers of maker and part, which tell kinds apart as well.
    """
    first: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip(), value.strip())
    if name := first.get("model name"):
        numbers = [f"{key} {first[key]}" for key in ("cpu family", "model") if key in first]
        return ", ".join([name, *numbers])
    parts = [first[key] for key in ("CPU implementer", "CPU part", "CPU variant") if key in first]
    return f"{platform.machine()} {'/'.join(parts)}" if parts else None
