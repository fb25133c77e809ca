
import pytest
import torch

from qat import machine
from qat.config import Device, InstanceConfig, Precision
from qat.errors import MissingError
from qat.machine import Machine, exact_matmul, resolve

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def instance(device=Device.auto, precision=Precision.fp32) -> InstanceConfig:
    return InstanceConfig(name="h200", device=device, precision=precision, micro_batch=3)


def test_without_a_gpu_the_cpu_computes(no_gpu):
    assert resolve(instance()) == Machine(CPU, torch.float32, 3, instance="h200")
    assert resolve(instance()).place() == {
        "instance": "h200",
        "device": "cpu, float32",
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps")])
def test_the_fastest_device_there_is_is_chosen(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve(instance()).device.type == chosen
    assert resolve(instance(Device.cpu)).device.type == "cpu"


@pytest.mark.parametrize("device", [Device.cuda, Device.mps])
def test_a_device_that_is_not_there_is_refused_by_name(no_gpu, device):
    with pytest.raises(MissingError, match=rf"instance=h200 needs a {device.name} device"):
        resolve(instance(device))


@pytest.mark.parametrize(("hardware", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_hardware(no_gpu, monkeypatch, hardware, chosen):
    monkeypatch.setattr(machine, "computes_bf16", lambda device: hardware)
    assert resolve(instance(precision=Precision.auto)).dtype is chosen
    assert resolve(instance(precision=Precision.bf16)).dtype is torch.bfloat16
    assert resolve(instance(precision=Precision.fp32)).dtype is torch.float32


def test_emulated_bf16_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not machine.computes_bf16(torch.device("cuda"))


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_either_instruction_set_makes_a_cpu_compute_bf16(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert machine.computes_bf16(CPU) == (avx512 or amx)


@pytest.mark.parametrize("shape", [(300, 200), (700, 1000), (3, 400, 600)])
def test_products_are_exact_inside(shape):
    a = torch.randn(shape)
    with exact_matmul():
        product = (a @ a.mT).double()
    exact = a.double() @ a.double().mT
    assert (product - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize(("error", "inside"), [(0, "medium"), (1e-3, "highest")])
def test_precision_is_full_inside_and_as_before_outside(monkeypatch, before, error, inside):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def rounded(a, b):  # exact on every machine, but for the error of fp32
        return (product(a.double(), b.double()) * (1 + error * (a.dtype == torch.float))).to(a.dtype)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    machine._medium_is_exact.cache_clear()
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with exact_matmul():
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError), exact_matmul():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before
    finally:
        machine._medium_is_exact.cache_clear()
        torch.set_float32_matmul_precision(usual)


def test_a_machine_describes_itself():
    assert Machine(CPU, torch.bfloat16, 8).describe() == "cpu, bfloat16"


def test_operations_are_counted_by_the_second(monkeypatch):
    monkeypatch.setattr(machine, "_timed_products", lambda a, repeats: 0.5 * repeats)
    assert machine.matmul_flops(Machine(CPU, torch.float32, 1), size=10, repeats=3) == 2 * 10**3 / 0.5


def test_a_product_takes_time():
    assert machine.matmul_flops(Machine(CPU, torch.float32, 1), size=64, repeats=2) > 0
