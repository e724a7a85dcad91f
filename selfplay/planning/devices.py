"""What GPUs can do, by their names. Peaks of the makers' data sheets, dense, in bf16."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    name: str
    flops: float  # floating-point operations a second
    bandwidth: float  # bytes a second from its memory


KNOWN = tuple(
    Device(name=name, flops=tera * 1e12, bandwidth=rate * 1e12)
    for name, tera, rate in (
        ("B200", 2250, 8.0), ("GH200", 989, 4.0), ("H200", 989, 4.8), ("H100 PCIe", 756, 2.0), ("H100 NVL", 835, 3.9),
        ("H100", 989, 3.35), ("H800", 989, 3.35), ("H20", 148, 4.0), ("A100", 312, 2.0), ("A800", 312, 2.0),
        ("L40S", 362, 0.86), ("L40", 181, 0.86), ("A40", 150, 0.7), ("A6000", 155, 0.77), ("L4", 121, 0.3),
        ("A10", 125, 0.6), ("V100", 125, 0.9), ("5090", 210, 1.8), ("4090", 165, 1.0), ("3090", 71, 0.94),
    )
)  # fmt: skip
USUAL = next(device for device in KNOWN if device.name == "H100")


def device(name: str) -> Device:
    """The GPU that `nvidia-smi` calls so; an H100 where none of the known ones is meant."""
    return next((known for known in KNOWN if known.name.lower() in name.lower()), USUAL)
