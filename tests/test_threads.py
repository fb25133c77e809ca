"""Work beside other work: by threads for a GPU, by whoever asks on a processor, where no other thread may compute."""

import threading

import pytest
import torch

from qat import threads
from qat.cache import writer
from qat.cache.reader import CacheReader
from qat.cache.shards import Shards
from tests import tiny

CPU = torch.device("cpu")


def test_on_a_processor_work_is_done_once_by_whoever_asks_and_none_that_nobody_asks_for():
    done = []

    def work(number, more=0):
        done.append((number + more, threading.current_thread()))
        return number + more

    with threads.beside(CPU, 2, "of-two") as pool:
        first, second, never = pool.submit(work, 1), pool.submit(work, 2, more=3), pool.submit(work, 9)
        assert not done
        assert (second.result(), first.result(), second.result()) == (5, 1, 5)
    assert done == [(5, threading.current_thread()), (1, threading.current_thread())] and not never.done()


def test_for_a_gpu_it_is_done_by_a_thread_of_that_name():
    with threads.beside(torch.device("cuda"), 1, "other") as pool:
        assert pool.submit(lambda: threading.current_thread().name).result().startswith("other")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fails_is_raised_where_the_result_is_taken(device):
    with threads.beside(torch.device(device), 1, "failing") as pool:
        failing = pool.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failing.result()


def test_rows_are_read_by_whoever_trains_on_a_processor(cache, monkeypatch):
    readers, read = set(), Shards.read
    monkeypatch.setattr(Shards, "read", lambda *given: readers.add(threading.current_thread()) or read(*given))
    reader = CacheReader(cache, "train")
    assert len(list(reader.stream(reader.in_order(4), CPU))) > 1
    assert readers == {threading.current_thread()}


def test_shards_are_written_by_whoever_computes_them_on_a_processor(teacher, tmp_path, monkeypatch):
    makers, write = set(), writer._write
    monkeypatch.setattr(writer, "_write", lambda *given: makers.add(threading.current_thread()) or write(*given))
    tiny.cache_of(teacher, tmp_path)
    assert makers == {threading.current_thread()}
