"""`stage=cache cache.inspect=true`: what is in a cache, for a person to look at."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat import plots
from qat.artifacts import Artifact
from qat.cache.batch import Batch
from qat.cache.format import kept
from qat.cache.reader import CacheReader
from qat.console import console, size, table
from qat.data.documents import SPLITS
from qat.stages.workspace import Workspace

LOOKED_AT = 4096  # rows looked at in each split, evenly spaced
EXAMPLES = 3
POSITIONS = 12  # positions shown of each example
CHOICES = 3  # most likely tokens of the teacher shown at each position
PICTURE = "tail.png"


def show(work: Workspace, cache: Artifact) -> None:
    """Prints counts, lengths and examples, and draws the probability outside the top-k."""
    readers = {split: CacheReader(cache, split) for split in SPLITS}
    meta = cache.manifest
    figures = {split: _figures(reader) for split, reader in readers.items()}
    names = list(figures["train"])
    table(cache.folder.name, ["", *SPLITS], [[name, *(f"{figures[s][name]:,}" for s in SPLITS)] for name in names])
    work.run.result["cache"] = figures | _size(cache, readers)
    told = {split: reader for split, reader in readers.items() if kept(meta, split)[0]}
    _examples(next(iter(told.values())), work.teacher.tokenizer())
    if meta["tail"] == "missing":
        console.print("the probability outside the top-k is not known to this cache: no histogram")
        return
    tails = {split: _tails(reader) for split, reader in told.items()}
    picture, mean = work.run.folder / PICTURE, float(next(iter(tails.values())).mean())
    plots.tail_mass(
        {s: tail.tolist() for s, tail in tails.items()}, f"{cache.folder.name}, tail {meta['tail']}", picture
    )
    console.say(f"outside the top {meta['top_k']}: {mean:.4f} on average; histogram", whole=str(picture))
    work.run.result["cache"]["tail_mean"] = round(mean, 6)
    work.run.result["paths"]["tail"] = str(picture)


def _size(cache: Artifact, readers: dict[str, CacheReader]) -> dict[str, float]:
    meta = cache.manifest
    whole = sum(path.stat().st_size for path in cache.folder.iterdir())
    each = whole / sum(reader.rows * (int(meta["length"]) - 1) for reader in readers.values())
    console.say(
        f"teacher {meta['teacher']['name']}; packing {meta['packing']}; {size(whole)}, {each:.0f} bytes a position"
    )
    return {"bytes": whole, "bytes_a_position": round(each, 1)}


def _figures(reader: CacheReader) -> dict[str, float]:
    """Counts, and the lengths of the documents, or parts of documents, in the rows looked at."""
    lengths, counted, looked = [], 0, 0
    for batch in _batches(reader):
        counted += int(batch.loss_mask.sum())
        looked += batch.loss_mask.numel()
        lengths.append(_lengths(batch))
    found, length = torch.cat(lengths), int(reader.meta["length"])
    return {
        "sequences": reader.rows,
        "tokens": reader.rows * length,
        "share of positions that count": round(counted / looked, 4),
        "texts a sequence": round(len(found) * (length - 1) / looked, 2),
        "shortest text, tokens": int(found.min()),
        "median text": int(found.median()),
        "longest text": int(found.max()),
    }


def _lengths(batch: Batch) -> Tensor:
    """Tokens of every document, or part of one, that a row holds; padding is none."""
    if not batch.joined:
        return batch.loss_mask.sum(1) + 1
    starts = batch.stored["document_starts"].flatten()
    return starts.cumsum(0).bincount()[1:]


def _tails(reader: CacheReader) -> Tensor:
    """Probability outside the top-k at every position that counts."""
    parts = [1 - batch.topk_logprobs[batch.loss_mask].exp().sum(-1) for batch in _batches(reader)]
    return torch.cat(parts).clamp(0, 1)


def _batches(reader: CacheReader) -> list[Batch]:
    rows = _spread(reader.rows, LOOKED_AT)
    return list(reader.stream(rows.split(256), torch.device("cpu")))


def _spread(rows: int, count: int) -> Tensor:
    """At most so many row numbers, evenly spread."""
    return torch.linspace(0, rows - 1, min(rows, count), dtype=torch.float32).long()


def _examples(reader: CacheReader, tokenizer: PreTrainedTokenizerBase) -> None:
    for row in _spread(reader.rows, EXAMPLES):
        batch = reader.batch(row[None])
        console.print(f"\nsequence {int(row)}: {tokenizer.decode(batch.input_ids[0])!r}", soft_wrap=True)
        table("", ["after", "comes", "the teacher expects"], _choices(batch, tokenizer), words=True)


def _choices(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """A few positions from the middle: the token, the one that follows, and the teacher's first choices."""
    ids, counts = batch.input_ids[0], batch.loss_mask[0]
    # Raw logits of an imported cache are made to sum to one here.
    logprobs = batch.topk_logprobs[0]
    logprobs = logprobs - logprobs.logsumexp(-1, keepdim=True).clamp_min(0)
    first = max(0, (len(counts) - POSITIONS) // 2)
    rows = []
    for place in range(first, min(len(counts), first + POSITIONS)):
        best = zip(batch.topk_ids[0, place, :CHOICES].tolist(), logprobs[place].exp().tolist(), strict=False)
        said = ", ".join(f"{tokenizer.decode([token])!r} {_percent(p)}" for token, p in best)
        here, following = (repr(tokenizer.decode([int(ids[at])])) for at in (place, place + 1))
        rows.append([here, following, said if counts[place] else "(does not count)"])
    return rows


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.005 else "<1%"
