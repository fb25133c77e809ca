"""Packed tensors: indices as the bit stream of `qat.quant.packing`, parts of formats in fp16, all else as asked."""
