"""What a thread that has computed once costs the others, as long as it lives: small operations of PyTorch on a CPU.

    python benchmarks/threads.py

OpenMP gives each thread that computes a team. With more threads in teams than cores, whoever waits in any of them
sleeps at once. Every operation is timed alone, beside an idle thread that has computed, and after that one has ended;
`ratio` is the second over the first. `qat.threads` is why nothing of ours computes in a second thread on a CPU.
"""

import threading
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn.functional import linear

SECONDS, REPEATS = 0.5, 3


def main() -> None:
    """Prints a table."""
    few_RD, rows_RV = torch.randn(64, 576, dtype=torch.bfloat16), torch.randn(64, 49_152)
    weight_OD = torch.randn(1536, 576, dtype=torch.bfloat16)
    operations: dict[str, Callable[[], object]] = {
        "product, 64 rows, 576 to 1,536": lambda: linear(few_RD, weight_OD),
        "softmax, 64 rows of 49,152": lambda: rows_RV.softmax(-1),
        "product of numbers, 64 by 576": lambda: few_RD * few_RD,
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds a call")
    print(f"{'operation':32}{'alone':>10}{'beside':>10}{'after':>10}{'ratio':>10}")
    for name, operation in operations.items():
        alone, beside, after = timed(operation), timed_beside(operation), timed(operation)
        print(f"{name:32}{alone:10.3f}{beside:10.3f}{after:10.3f}{beside / alone:10.1f}")


def timed_beside(operation: Callable[[], object]) -> float:
    """Beside a thread that has computed once and does nothing since."""
    computed, over = threading.Event(), threading.Event()

    def idle() -> None:
        operation()
        computed.set()
        over.wait()

    thread = threading.Thread(target=idle)
    thread.start()
    computed.wait()
    try:
        return timed(operation)
    finally:
        over.set()
        thread.join()


def timed(operation: Callable[[], object]) -> float:
    """Milliseconds a call, the median of some turns."""
    operation()
    return median(_turn(operation) for _ in range(REPEATS))


def _turn(operation: Callable[[], object]) -> float:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        operation()
        count += 1
    return 1000 * (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
