"""The device's rate of large matrix products, by dtype and size: what every utilisation is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import matmul_rate, parse, parser, write

SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
DTYPES = {"cuda": (torch.bfloat16, torch.float32, torch.float64), "cpu": (torch.float32,)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    made = parser(__doc__)
    args, device = parse(made, argv)
    records: list[dict[str, Any]] = []
    for dtype in DTYPES[device.type]:
        # the slower dtypes in the smaller sizes: their rate is soon reached
        for size in SIZES[device.type][: 3 if dtype == torch.bfloat16 else 2]:
            rate = matmul_rate(device, dtype, size)
            name = str(dtype).removeprefix("torch.")
            record = {"benchmark": "rate", "device": device.type, "dtype": name, "size": size}
            records.append(record | {"flops_per_s": rate, "seconds": 2 * size**3 / rate})
            print(f"{name}, {size}: {rate / 1e12:.4g} TFLOP/s")
    if args.output:
        write(args.output, records, device, args.overwrite)


if __name__ == "__main__":
    main()
