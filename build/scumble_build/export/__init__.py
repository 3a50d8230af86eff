"""Exports the graphs of a base to ONNX, with adapters as inputs, each with a manifest of its inputs and outputs."""
