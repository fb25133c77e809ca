"""How long conversion takes at the shape of Qwen3-0.6B, whose speed needs no real weights.

    python benchmarks/conversion_speed.py [--layers 28] [--gather 65536]

Random weights and random second moments, in host memory as after calibration. Prints seconds and peak memory
of the first step alone (codebooks and scales: the alternating fit without assignment) and of a whole pass. With
`--gather`, of gathering the moments of so many random tokens as well, where the model lies on the device and counts.
"""

import argparse
import time
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from qat import machine as machines
from qat.cache.batch import Batch, Text
from qat.config import ConvertConfig, InstanceConfig, KMeansBackend, KMeansConfig, QuantConfig, WeightConfig
from qat.conversion import convert
from qat.conversion.moments import Moments, gather
from qat.machine import exact_matmul
from qat.peaks import taken
from qat.quant import kmeans
from qat.quant.architectures import Layer, select
from qat.quant.fit import importance
from qat.quant.places import matrix

VOCABULARY = 151936
PRESETS = {"q2a4": QuantConfig("q2a4", WeightConfig(2, 32), WeightConfig(4, 8))}


def main() -> None:
    """One row a measurement."""
    options = arguments()
    device = machines.resolve(InstanceConfig(name="auto")).device
    model = shape(options.layers)
    layers = select(model, PRESETS["q2a4"])
    moments = random_moments(layers, options.gradients, device)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        f"{len(layers)} layers, {sum(x.weights for x in layers):,} weights, {device}, model {model_bytes / 1e9:.2f} GB"
    )
    if options.gather:
        model.to(device)
        work = partial(gather, model, layers, random_text(options.gather), options.gradients)
        measured(device, f"moments of {options.gather} tokens", work)
        model.cpu()
    weights = partial(matrix, model)
    kmeans = KMeansConfig("exact", KMeansBackend.exact)
    measured(device, "warm-up (one block)", partial(alternating, layers[:7], weights, moments, device, 1))
    for rounds in options.rounds:
        work = partial(alternating, layers, weights, moments, device, rounds)
        measured(device, f"codebooks and scales, {rounds} rounds", work)
    for sweeps in options.sweeps:
        work = partial(convert.quantize, layers, weights, moments, ConvertConfig(sweeps=sweeps), kmeans, device)
        measured(device, f"a whole pass, {sweeps} sweeps", work)


def shape(layers: int) -> torch.nn.Module:
    """Qwen3-0.6B with random weights, in host memory."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, rope_theta=1e6,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).requires_grad_(False)


def random_moments(layers: list[Layer], gradients: bool, device: torch.device) -> Moments:
    """Second moments of correlated random vectors, the same for all layers of a shape."""
    sizes = {size for layer in layers for size in layer.shape}
    moment = {size: second_moment(size, device) for size in sizes}
    inputs = {layer.source: moment[layer.shape[1]] for layer in layers}
    return Moments(inputs, {layer.name: moment[layer.shape[0]] for layer in layers} if gradients else {})


def random_text(tokens: int) -> list[Batch]:
    """Sequences of 128 in micro-batches of 16."""
    return Text(torch.randint(VOCABULARY, (tokens // 128, 128))).batches(16)


def second_moment(size: int, device: torch.device) -> Tensor:
    """[size, size] fp32, in host memory."""
    with exact_matmul():
        mixing = torch.randn(size, size, device=device) / size**0.5 * 0.5 + torch.eye(size, device=device)
        x = torch.randn(2 * size, size, device=device) @ mixing
        return (x.mT @ x / len(x)).cpu()


def alternating(layers: list[Layer], weights, moments: Moments, device: torch.device, rounds: int) -> None:
    """Codebooks and scales of all layers, indices nearest to the grid."""
    with torch.no_grad(), exact_matmul():
        for stack in convert.stacks(layers, convert.STACK_BYTES[device.type]):
            weight = torch.stack([weights(layer.name).to(device, torch.float32) for layer in stack])
            h = importance(torch.stack([moments.inputs[layer.source].to(device) for layer in stack]))
            made = stack[0].format.start(weight, h, kmeans.kmeans)
            for _ in range(rounds):
                made = stack[0].format.alternated(made, weight, h)


def measured(device: torch.device, what: str, work) -> None:
    """Runs it once and prints its time and peak memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{what:40} {time.perf_counter() - began:8.2f} s   peak {taken(device) / 1e9:6.2f} GB", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, ConvertConfig().rounds])
    parser.add_argument("--sweeps", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--gather", type=int, default=0, help="tokens")
    parser.add_argument("--gradients", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
