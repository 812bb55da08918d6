import platform

import pytest
import torch

from onsphere.studies.engine import machine as machine_file
from onsphere.studies.engine.machine import Machine, name_in, this_machine

X86 = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763  64-Core Processor

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (X86, "AMD EPYC 7763  64-Core Processor, cpu family 25, model 1"),
        ("model name : Some CPU\n", "Some CPU"),
        (ARM, f"{platform.machine()} 0x41/0xd0c/0x3"),
        ("processor\t: 0\n", None),
        ("", None),
    ],
    ids=["x86", "a name alone", "arm", "no name", "empty"],
)
def test_the_processor_is_read_from_the_list_of_linux(text, name):
    assert name_in(text) == name


def test_this_machine_has_a_name_and_the_threads_of_this_process():
    found = this_machine()
    assert found.processor == " ".join(found.processor.split()) != ""
    assert found.instructions == torch.backends.cpu.get_cpu_capability()
    assert found.threads == torch.get_num_threads()
    assert str(found) == f"{found.processor} ({found.instructions})"


def test_without_that_list_the_architecture_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_file, "_CPUINFO", tmp_path / "none")
    found = machine_file._processor.__wrapped__()
    assert found == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    "written", [None, {}, "AMD", {"processor": 3, "instructions": "AVX2", "threads": 1}]
)
def test_what_a_record_does_not_say_is_not_read(written):
    assert Machine.read(written) is None
