"""One layer's codebook, ours against four packages: seconds, and inertia relative to the optimum.

    pip install kmeans1d flash1dkmeans scikit-learn
    python benchmarks/codebooks.py --threads 2
    python benchmarks/codebooks.py --device cuda

A package that is not installed is named and left out; without numba, inertia is relative to ours.

A layer has 3072 × 1024 values, normal or heavy-tailed (Student's t with 3 degrees of freedom), alike in
weight or not. Every solver gets the same fp32 values and as many threads; the optimum is an exact dynamic
program over all sorted values in float64. Inertia is computed from each solver's codebook over all values.

kmeans1d and the plain kmeans-pytorch know no weights. kmeans-pytorch has an absolute tolerance, so it
gets standardised values; it may loop for ever, so it gets a time limit. `kmeans_pytorch 2048` is our
backend of that name, which hands 2048 quantiles to the package.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from qat.quant import backends, kmeans

SHAPE = (3072, 1024)
STACK = 20  # layers that a GPU solves together
Solver = Callable[[np.ndarray, np.ndarray | None, int], np.ndarray]


def main() -> None:
    """Every layer, size and solver; prints a row each."""
    options = arguments()
    rows = []
    with threads(options.threads):
        for name, x, weight in layers()[: options.layers]:
            for entries in options.entries:
                rows += compare(name, x, weight, entries, options)
                if options.json:
                    Path(options.json).write_text(json.dumps(rows, indent=1))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """As many for every package."""
    torch.set_num_threads(count)
    if installed("numba"):
        import numba

        numba.set_num_threads(count)
    if not installed("threadpoolctl"):
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(count):
        yield


@functools.cache
def installed(package: str) -> bool:
    """Says so once when it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"{package} is not installed and left out")
    return found


def compare(name: str, x: np.ndarray, weight: np.ndarray | None, entries: int, options: argparse.Namespace) -> list:
    """All solvers on one layer, ours first."""
    best = optimum(x, weight, entries) if installed("numba") else None
    print(f"\n{name}, {entries} entries")
    what = "inertia / optimum" if best else "inertia / ours"
    print(f"{'':24}{'first, s':>10}{'best, s':>10}{'ours = 1':>10}{what:>20}")
    rows = []
    for solver, (solve, repeats) in solvers(options).items():
        seconds, found = timed(solve, x, weight, entries, repeats or options.repeats)
        if found is None:
            print(f"{solver:24}{seconds}", flush=True)
            continue
        row = {"layer": name, "entries": entries, "solver": solver, "first_s": seconds[0], "best_s": min(seconds)}
        row["ratio"] = row["best_s"] / rows[0]["best_s"] if rows else 1.0
        best = best or inertia(x, weight, found)
        row["inertia"] = inertia(x, weight, found) / best
        rows.append(row)
        print(
            f"{solver:24}{row['first_s']:10.3f}{row['best_s']:10.3f}{row['ratio']:10.1f}{row['inertia']:20.6f}",
            flush=True,
        )
    return rows


def timed(solve: Solver, x: np.ndarray, weight: np.ndarray | None, entries: int, repeats: int) -> tuple:
    """Seconds of each call and the codebook; or a word on why there is none."""
    seconds: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        try:
            found = solve(x, weight, entries)
        except (TimeoutError, NotImplementedError) as reason:
            return str(reason), None
        seconds.append(time.perf_counter() - began)
    return seconds, np.sort(np.asarray(found, dtype=np.float64).ravel())


def layers() -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """Names, values and weights (None: all alike)."""
    draw = np.random.default_rng(0)
    normal = draw.normal(size=SHAPE).astype(np.float32).ravel()
    heavy = draw.standard_t(3, size=SHAPE).astype(np.float32).ravel()
    weight = draw.lognormal(sigma=1.0, size=SHAPE).astype(np.float32).ravel()
    return [
        ("normal", normal, None),
        ("normal, weighted", normal, weight),
        ("heavy-tailed", heavy, None),
        ("heavy-tailed, weighted", heavy, weight),
    ]


def solvers(options: argparse.Namespace) -> dict[str, tuple[Solver, int]]:
    """By name, with how often each is run where that is not the command line's number."""
    found: dict[str, tuple[Solver, int]] = {"ours": (on("cpu", kmeans.kmeans), 0)}
    if installed("kmeans_pytorch"):
        found["kmeans_pytorch 2048"] = (on("cpu", backends.kmeans_pytorch), 0)
        found["kmeans-pytorch"] = (lambda *a: package(*a, "cpu", options.limit), 1)
    if installed("flash1dkmeans"):
        found["flash1dkmeans"] = (flash, 0)
    if installed("kmeans1d"):
        found["kmeans1d"] = (exact_package, 1)
    if installed("sklearn"):
        found["scikit-learn k-means++"] = (lambda *a: scikit_learn(*a, "k-means++"), 0)
        found["scikit-learn quantiles"] = (lambda *a: scikit_learn(*a, "quantiles"), 0)
    if options.device == "cuda":
        found["ours, GPU"] = (on("cuda", kmeans.kmeans), 0)
        found[f"ours, GPU, {STACK} layers"] = (on("cuda", kmeans.kmeans, STACK), 0)
        if installed("kmeans_pytorch"):
            found["kmeans-pytorch, GPU"] = (lambda *a: package(*a, "cuda", options.limit), 1)
    return found


def on(device: str, cluster: Callable, stack: int = 1) -> Solver:
    """A solver of ours on copies of a layer, which lie on the device before the clock starts."""
    ready: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def solve(x: np.ndarray, weight: np.ndarray | None, entries: int) -> np.ndarray:
        if id(x) not in ready:
            weight = np.ones_like(x) if weight is None else weight
            ready[id(x)] = tuple(torch.tensor(v, device=device).expand(stack, -1).contiguous() for v in (x, weight))
        return cluster(*ready[id(x)], entries)[0].cpu().numpy()

    return solve


def package(x: np.ndarray, weight: np.ndarray | None, entries: int, device: str, limit: float) -> np.ndarray:
    """kmeans-pytorch as it is, on standardised values, stopped by the one thing its loop calls: the progress bar."""
    if weight is not None:
        raise NotImplementedError("knows no weights")
    values = torch.from_numpy((x - x.mean()) / x.std())[:, None]
    ends = time.monotonic() + limit

    class Meter:
        def __init__(self, **_: object) -> None: ...

        def update(self) -> None: ...

        def set_postfix(self, center_shift: str, **_: object) -> None:
            if center_shift == "nan":
                raise TimeoutError("lost a cluster, and would not have ended")
            if time.monotonic() > ends:
                raise TimeoutError(f"not done in {limit:.0f} s")

    import kmeans_pytorch

    np.random.seed(0)
    bar, kmeans_pytorch.tqdm = kmeans_pytorch.tqdm, Meter
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            centres = kmeans_pytorch.kmeans(values, entries, device=torch.device(device))[1]
    finally:
        kmeans_pytorch.tqdm = bar
    return centres.double().numpy() * x.std() + x.mean()


def flash(x: np.ndarray, weight: np.ndarray | None, entries: int) -> np.ndarray:
    """flash1dkmeans."""
    import flash1dkmeans

    return flash1dkmeans.kmeans_1d(x, entries, sample_weights=weight, random_state=0)[0]


def exact_package(x: np.ndarray, weight: np.ndarray | None, entries: int) -> np.ndarray:
    """kmeans1d."""
    if weight is not None:
        raise NotImplementedError("knows no weights")
    import kmeans1d

    return np.array(kmeans1d.cluster(x, entries).centroids)


def scikit_learn(x: np.ndarray, weight: np.ndarray | None, entries: int, start: str) -> np.ndarray:
    """KMeans from one start, drawn or given as evenly spaced quantiles."""
    if start == "quantiles":
        places = (np.arange(entries) + 0.5) / entries
        method = {"method": "inverted_cdf", "weights": weight} if weight is not None else {}
        init = np.quantile(x, places, **method)[:, None]
    else:
        init = start
    import sklearn.cluster

    model = sklearn.cluster.KMeans(entries, init=init, n_init=1, random_state=0)
    return model.fit(x[:, None], sample_weight=weight).cluster_centers_


def inertia(x: np.ndarray, weight: np.ndarray | None, centres: np.ndarray) -> float:
    """Weighted squared distance to the nearest centre, in float64."""
    x = x.astype(np.float64)
    distance = x - centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, x)]
    return float((distance**2).sum() if weight is None else (weight * distance**2).sum())


def optimum(x: np.ndarray, weight: np.ndarray | None, entries: int) -> float:
    """The least inertia of all."""
    order = np.argsort(x)
    x = x[order] - x.mean(dtype=np.float64)
    mass = np.ones_like(x) if weight is None else weight[order].astype(np.float64)
    return float(compiled()(*(np.concatenate([[0.0], np.cumsum(mass * x**p)]) for p in range(3)), entries))


@functools.cache
def compiled() -> Callable:
    """The loop as machine code."""
    import numba

    return numba.njit(dynamic_program)


def dynamic_program(W: np.ndarray, S: np.ndarray, Q: np.ndarray, entries: int) -> float:
    """Cuts never cross as values are added, so each is sought between those of its neighbours."""
    count = len(W)
    cost = Q - S**2 / np.maximum(W, 1e-300)
    for _ in range(entries - 1):
        better = np.empty_like(cost)
        tasks = [(0, count - 1, 0, count - 1)]
        while tasks:
            low, high, first, last = tasks.pop()
            j = (low + high) // 2
            least, cut = np.inf, first
            for i in range(first, min(last, j) + 1):
                spread = Q[j] - Q[i] - (S[j] - S[i]) ** 2 / max(W[j] - W[i], 1e-300)
                if cost[i] + spread < least:
                    least, cut = cost[i] + spread, i
            better[j] = least
            if low < j:
                tasks.append((low, j - 1, first, cut))
            if j < high:
                tasks.append((j + 1, high, cut, last))
        cost = better
    return cost[-1]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: GPU figures beside")
    parser.add_argument("--layers", type=int, default=4, help="how many of the four")
    parser.add_argument("--entries", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that kmeans-pytorch may take")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
