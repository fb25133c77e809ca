"""Quantization-aware distillation of small language models to a few bits a weight.

    model, tokenizer = qat.load("SR-001")
    student = qat.convert(model, quant="q2a4", text=["a document", "another"])

Importing this costs nothing: what the library needs is imported when one of its names is first used.
"""

from typing import TYPE_CHECKING, Any

from qat import registration

if TYPE_CHECKING:
    from qat.library import Student, convert, load

__all__ = ["Student", "convert", "load"]

registration.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qat.quiet import quiet

    with quiet():
        from qat import library
    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
