"""From a model's weights to quantized ones: what is gathered on calibration text, and the conversion of all layers.

What a quantized weight is, and how one is fitted, is `qat.quant`; this package has the model around it.
"""
