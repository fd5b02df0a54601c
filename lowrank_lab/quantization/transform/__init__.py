"""Changes of a model that leave what it computes as it is and make it easier to quantize. One file a transform."""
