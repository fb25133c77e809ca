"""What libraries take beside any tensor, measured."""

from qat.footprint.shapes import Part
from qat.machine import Machine

# Bytes by kind of device: on a GPU cuBLAS's work space, 32 MiB for each stream and recording; on a CPU what oneDNN
# packs weights into, and code that is loaded when it is first used
TAKEN = {"cuda": 1.0e8, "cpu": 1.0e8}


def part(machine: Machine) -> Part:
    """As a part of any phase."""
    return Part("libraries", TAKEN.get(machine.device.type, TAKEN["cpu"]), "instance", least=False)
