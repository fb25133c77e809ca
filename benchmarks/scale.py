"""One shape, converted and trained as a run does it: memory that was expected beside what was taken, and tokens/s.

    python benchmarks/scale.py qwen3-0.6b                      # a whole run of few steps, then memory phase by phase
    python benchmarks/scale.py qwen3-0.6b --stages convert distill     # conversion, then training, a process each
    python benchmarks/scale.py qwen3-8b --stages convert               # a conversion alone
    python benchmarks/scale.py qwen3-0.6b --teacher qwen3-1.7b         # taught by a larger one of the same tokens
    python benchmarks/scale.py qwen3-4b --length 1024 --words train.batch_size=32
    python benchmarks/scale.py tiny --words instance=cpu               # does it work at all, on any machine
    python benchmarks/scale.py qwen3-4b --devices 1 2 --length 128 --batch 64      # one and two GPUs, side by side
    python benchmarks/scale.py qwen3-8b --devices 2 --length 1024 --batch 8 --micro-batch 1 --steps 20
    python benchmarks/scale.py tiny --devices 1 2 --length 32 --batch 8 --micro-batch 4
    python benchmarks/scale.py table                       # Qwen3 from 0.6B to 8B, rows of 128 and 1,024, on one GPU
    python benchmarks/scale.py qwen3-8b --devices 1 --loss full_kl --tables     # one of its lines, otherwise cut

Weights are random bf16 numbers, written layer by layer, all in Qwen3's architecture; text is random words, and in a
whole run what such a model writes. Every stage is a process of its own, and what is printed is in its `result.json`.
Expected and taken are of the GPU, or else of the process, less what it had at its start. `share` is of the product
measured in the same process (`qat.machine.matmul_flops`), where a token costs 6 operations a weight of the student's
decoder layers and 4 of its head, and with the teacher beside it 2 a weight of the teacher's more.

With `--devices` nothing is converted: all weights learn on so many GPUs, one number after the other, and speed, memory
and losses are printed beside each other (`benchmarks/sharing.py`). `table` does so for the records' recipe (`full_kl`,
latent weights, the teacher beside the student) on one GPU; of the largest shape tables and scales alone learn.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sharing
import torch
from safetensors.torch import save_file
from sharing import Case, Shape

from qat import machine as machines
from qat import model_files, processes
from qat.config import InstanceConfig
from qat.models.tiny import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FIRST = 200  # first tokens from which text is written; the tokenizer has one for each byte
POOL = 1 << 24  # random numbers of which all weights are pieces
GB = 1e9


SHAPES = {
    "tiny": Shape(128, 384, 4, 4, 2, True, 32, 512),
    "smollm2": Shape(576, 1536, 30, 9, 3, True, 64, 49_152),
    "qwen3-0.6b": Shape(1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": Shape(2048, 6144, 28, 16, 8, True),
    "qwen3-4b": Shape(2560, 9728, 36, 32, 8, True),
    "qwen3-8b": Shape(4096, 12288, 36, 32, 8, False),
}
TOKENS = 16_384  # of a step of the table
LENGTHS = 128, 1024
# Shapes of the table, the tokens that are computed at once, and whether latent weights learn
TABLE = {
    "qwen3-0.6b": (16_384, True),
    "qwen3-1.7b": (16_384, True),
    "qwen3-4b": (8_192, True),
    "qwen3-8b": (8_192, False),
}


def main() -> None:
    """Writes the model where it is not there yet, runs the stages and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=[*SHAPES, "table"])
    parser.add_argument("--stages", nargs="+", default=["run"], choices=["run", "convert", "distill"])
    parser.add_argument("--teacher", choices=[*SHAPES], help="another shape, whose outputs it learns")
    parser.add_argument("--layers", type=int, help="decoder layers, if not as many as the shape has")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=512, help="rows of training text")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"), help="model, text and runs")
    parser.add_argument("--json", type=Path, help="a file to which every line is added")
    parser.add_argument("--words", nargs="*", default=[], help="further words of the command line")
    parser.add_argument("--devices", nargs="+", type=int, help="numbers of GPUs on which all weights are to learn")
    parser.add_argument("--batch", type=int, default=64, help="with --devices: rows a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="with --devices: rows computed at once")
    parser.add_argument("--checkpointing", action="store_true", help="with --devices: activations computed twice")
    parser.add_argument("--tables", action="store_true", help="with --devices: without latent weights")
    parser.add_argument("--loss", help="what is learned from; full_kl, with --devices bucket_kl")
    options = parser.parse_args()
    if options.shape == "table":
        table(options)
        return
    shape, theirs = (sized(name, options.layers) for name in (options.shape, options.teacher or options.shape))
    if options.devices:
        side_by_side(options, shape)
        return
    folder = options.folder / f"{options.shape}-{shape.layers}"
    write(shape, folder / "model")
    teacher = options.folder / f"{options.teacher}-{theirs.layers}" / "model"
    if options.teacher:
        write(theirs, teacher)
    text(folder / "text.txt", 2 * options.rows * options.length)
    loss = options.loss or "full_kl"
    common = [
        *("model=local", f"model.path={folder / 'model'}", f"train.steps={options.steps}"),
        *(f"cache.length={options.length}", f"cache.sequences={options.rows}", f"loss={loss}"),
        *(f"cache.train_targets={str(loss != 'full_kl').lower()}", f"outputs={folder / 'outputs'}", "tracker=none"),
        *(["teacher=local", f"teacher.path={teacher}"] if options.teacher else []),
    ]
    texts = {
        True: ["data=tokens", f"data.documents={FIRST}", f"data.answers={-(-2 * options.rows // FIRST)}"],
        False: ["data=text", f"data.path={folder / 'text.txt'}"],
    }
    start = ""
    for stage in options.stages:
        words = [*common, *texts[stage == "run"], f"stage={stage}", *options.words]
        if stage == "run":
            words.append(f"data.answer_tokens={options.length}")
        if stage == "distill":
            words.append(f"checkpoint={start}")
        began = time.monotonic()
        result = run(words)
        line = {"shape": options.shape, "stage": stage, "seconds": round(time.monotonic() - began, 1)}
        line |= {"teacher": options.teacher} if options.teacher else {}
        line |= figures(result, shape, theirs if loss == "full_kl" else None)
        print("  ".join(f"{name} {value}" for name, value in line.items() if name != "phases"), flush=True)
        print(by_phase(options.shape, line["phases"]), flush=True)
        keep(options.json, line | {"words": words})
        start = result["paths"].get("conversion", start)


def sized(name: str, layers: int | None) -> Shape:
    """A shape by its name, with so many decoder layers if that is said."""
    known = SHAPES[name]
    return Shape(**asdict(known) | {"layers": layers or known.layers})


def side_by_side(options: argparse.Namespace, shape: Shape) -> None:
    """Trains on each number of GPUs, each line printed and kept as soon as it is there, then all of them compared."""
    sizes = options.length, options.batch, options.micro_batch, options.steps
    case = Case(shape, *sizes, options.loss or "bucket_kl", options.checkpointing, not options.tables)
    lines = [found for count in options.devices if (found := trained(options.shape, case, count, options.json))]
    if lines:
        print(sharing.compared(lines, case), flush=True)


def table(options: argparse.Namespace) -> None:
    """Trains each shape of the table on one GPU, on rows of each length; one that fails leaves the others alone."""
    lines = []
    for name, (at_once, latent) in TABLE.items():
        for length in LENGTHS:
            sizes = length, TOKENS // length, at_once // length, options.steps
            found = trained(name, Case(SHAPES[name], *sizes, "full_kl", latent=latent), 1, options.json)
            lines += [found] if found else []
    print("| shape | rows | learns | tokens/s | share of the product | held, GB | peak, GB | expected, GB |")
    print("| --- " * 8 + "|")
    for one in lines:
        learns = "latent weights" if one["latent"] else "tables and scales"
        rows = f"{one['rows']} of {one['length']}, {one['micro_batch']} at once"
        memory = " | ".join(str(one[key]) for key in ("held_gb", "peak_gb", "expected_gb"))
        speed = f"{one['tokens_per_second']:,.0f} | {one['share']:.1%}"
        print(f"| {one['shape']} | {rows} | {learns} | {speed} | {memory} |", flush=True)


def trained(name: str, case: Case, count: int, path: Path | None) -> dict[str, Any] | None:
    """A case on so many GPUs: its line, printed and kept as soon as it is there; None where it fails, which is told."""
    began = time.monotonic()
    line = together(case, count)
    if line is None:
        spent = time.monotonic() - began
        print(f"{name}, rows of {case.length}, on {sharing.counted(count)} failed after {spent:.0f} s", flush=True)
        return None
    line |= {"shape": name, "rows": case.rows, "length": case.length, "loss": case.loss, "latent": case.latent}
    line["seconds"] = round(time.monotonic() - began, 1)
    print("  ".join(f"{key} {value}" for key, value in line.items() if key != "losses"), flush=True)
    keep(path, line)
    return line


def keep(path: Path | None, line: dict[str, Any]) -> None:
    """Adds a line to a file, if there is one."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def together(case: Case, count: int) -> dict[str, Any] | None:
    """What the first of so many processes prints; None where one of them fails, and then the others are ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, sharing.__file__, sharing.arguments(case)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=processes.environment(rank, count, port), text=True,
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip
    while None in [process.poll() for process in started]:
        if any(process.returncode for process in started):
            for process in started:
                process.kill()
        time.sleep(0.1)
    said = started[0].stdout.read() if started[0].stdout else ""
    if any(process.returncode for process in started) or not said:
        return None
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def run(words: list[str]) -> dict[str, Any]:
    """Runs a stage and gives its record."""
    outputs = Path(next(word.partition("=")[2] for word in words if word.startswith("outputs=")))
    before = set(outputs.glob("*/result.json"))
    subprocess.run([sys.executable, str(ROOT / "launch.py"), *words], cwd=ROOT, check=True)
    (path,) = set(outputs.glob("*/result.json")) - before
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def by_phase(shape: str, phases: dict[str, dict[str, float]]) -> str:
    """A table of what each phase took beside what it was expected to take, and of host memory."""
    rows = [f"{shape:26} {'expected':>9} {'taken':>9} {'ratio':>6} {'host':>9}  GB"]
    for name, one in phases.items():
        counts = f"{one['expected']:9.3f} {one['taken']:9.3f} {one['expected'] / max(one['taken'], 1e-9):6.2f}"
        rows.append(f"{name:26} {counts} {one['host']:9.3f}")
    return "\n".join(rows)


def figures(result: dict[str, Any], shape: Shape, beside: Shape | None) -> dict[str, Any]:
    """Memory expected and taken by phase, in GB, and speed where something was trained, perhaps beside a teacher."""
    names = {"expected": "planned_bytes", "taken": "peak_bytes", "host": "host_bytes"}
    phases = {
        phase: {name: round(counts[key] / GB, 4) for name, key in names.items()}
        for phase, counts in result["memory"]["phases"].items()
        if counts.keys() >= set(names.values())
    }
    found: dict[str, Any] = {"phases": phases}
    if "tokens_per_second" in result.get("throughput", {}):
        speed = result["throughput"]["tokens_per_second"]
        operations = speed * (6 * shape.decoder + 4 * shape.vocabulary * shape.hidden)
        if beside is not None:
            operations += speed * 2 * (beside.decoder + shape.vocabulary * beside.hidden)
        machine = machines.resolve(InstanceConfig(name="auto"))
        share = operations / machines.matmul_flops(machine, 8192 if machine.device.type == "cuda" else 2048)
        found |= {"tokens_per_second": speed, "share": round(share, 3)}
    return found


def write(shape: Shape, folder: Path) -> None:
    """A model of random weights as a folder of shards, one a decoder layer."""
    if (folder / model_files.CONFIG).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pool, draw = (0.02 * torch.randn(POOL, dtype=torch.float32)).bfloat16(), random.Random(0)
    places: dict[str, str] = {}

    def weight(*size: int) -> torch.Tensor:
        left, parts = torch.Size(size).numel(), []
        while left:
            start = draw.randrange(POOL // 2)
            parts.append(pool[start : start + min(left, POOL // 2)])
            left -= len(parts[-1])
        return torch.cat(parts).view(size)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    outer = ["model.embed_tokens.weight"] + ([] if shape.tied else ["lm_head.weight"])
    ends = {name: weight(shape.vocabulary, shape.hidden) for name in outer} | {"model.norm.weight": ones(shape.hidden)}
    save("model-00000.safetensors", ends)
    queries, keys = shape.heads * shape.head, shape.key_heads * shape.head
    matrices = {
        **{"self_attn.q_proj": (queries, shape.hidden), "self_attn.k_proj": (keys, shape.hidden)},
        **{"self_attn.v_proj": (keys, shape.hidden), "self_attn.o_proj": (shape.hidden, queries)},
        **{"mlp.gate_proj": (shape.inner, shape.hidden), "mlp.up_proj": (shape.inner, shape.hidden)},
        "mlp.down_proj": (shape.hidden, shape.inner),
    }
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
    norms |= {"self_attn.q_norm": shape.head, "self_attn.k_norm": shape.head}
    for layer in range(shape.layers):
        tensors = {name: weight(*size) for name, size in matrices.items()}
        tensors |= {name: ones(size) for name, size in norms.items()}
        named = {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
        save(f"model-{layer + 1:05d}.safetensors", named)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder)
    shape.config().save_pretrained(folder)


def text(path: Path, tokens: int) -> None:
    """Documents of random words, about so many tokens of one byte."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(2000)]
    documents, left = [], tokens
    while left > 0:
        documents.append(" ".join(draw.choices(words, k=draw.randint(20, 100))))
        left -= len(documents[-1])
    path.write_text("\n\n".join(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
