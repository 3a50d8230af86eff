"""Traces a graph's module to an ONNX model without weights."""
