"""What a run can be asked to do."""

from enum import Enum


class Stage(Enum):
    """What `stage=…` does."""

    run = "cache, convert, distill and evaluate, each skipped when its artifact exists"
    cache = "record the teacher's outputs"
    convert = "quantize the teacher's weights, to codebooks or grids"
    distill = "train a quantized student on a cache"
    evaluate = "measure a checkpoint on text held apart from training"
    export = "write a checkpoint in another tool's format"
    chat = "talk to a checkpoint"
    report = "write the run log and the report"
    pull = "fetch a named checkpoint, cache or run from the store"
    push = "put a checkpoint or a cache into the store"
    store = "list what the store holds"
    doctor = "show what this machine has, what a run would use, and what is amiss"
