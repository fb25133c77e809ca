"""Packed exports as models: what transformers needs to load one, and the layer it then computes with.

Imported by `import qat` in other people's programs: nothing here may touch transformers' settings.
"""

METHOD = "qat_packed"  # `quant_method`, and the model type that plain transformers does not know
FILE = "packed.safetensors"  # a name that plain transformers does not look for
