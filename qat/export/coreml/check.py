"""Compares the model beside this file with the numbers recorded when it was exported. Runs on a Mac:

pip install coremltools && python check.py
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

MASKED = -1e4  # added to the attention score of an absent token
MAX_DIFFERENCE = 2e-2  # allowed difference of the logits, relative to their norm: what rounding to fp16 explains


def main() -> int:
    """Feeds the recorded tokens one by one and compares the logits of each."""
    import coremltools as ct

    here = Path(__file__).parent
    recorded = np.load(here / "reference.npz")
    model = ct.models.MLModel(str(here / "model.mlpackage"))
    state = model.make_state()
    mask = np.full((1, 1, 1, int(recorded["context"])), MASKED, np.float16)
    logits = []
    for position, token in enumerate(recorded["input_ids"]):
        mask[..., position] = 0
        given: dict[str, Any] = {
            "input_ids": np.array([[token]], np.int32),
            "position": np.array([position], np.int32),
            "mask": mask,
        }
        logits.append(model.predict(given, state=state)["logits"].reshape(-1).astype(np.float32))
    expected = recorded["logits"].astype(np.float32)
    error = float(np.linalg.norm(np.stack(logits) - expected) / np.linalg.norm(expected))
    agreed = float((np.stack(logits).argmax(-1) == expected.argmax(-1)).mean())
    print(f"{len(logits)} tokens: logits differ by {error:.2e} of their norm, the first choice agrees in {agreed:.0%}")
    return 0 if error <= MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
