"""The graphs of a base as ONNX files with adapters as inputs, each with a manifest that says what it takes."""
