"""TensorRT engines of a base's graphs: one for each part, built ahead of time, kept in the registry.

api.py        TensorRT and TensorRT for RTX behind one set of types
key.py        what an engine was built from and for, and whether it fits a machine
profiles.py   which shapes an engine takes
builder.py    builds a plan from a graph and its manifest
store.py      engines in the registry: publish, find, load
"""
