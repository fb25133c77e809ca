"""Packed exports as models: what transformers needs to load one, and the layer it then computes with.

Imported by `import qat` in other people's programs: nothing here may touch transformers' settings.
"""

METHOD = "qat_packed"  # `quant_method` and model type of our exports; plain transformers does not know this type
FILE = "packed.safetensors"  # file of the weights; plain transformers does not look for this name
