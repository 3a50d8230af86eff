"""TensorRT engines of a base's graphs: one for each part, made ahead, kept in the registry.

api.py        TensorRT and TensorRT for RTX behind one set of types
key.py        what an engine was made from and for, and whether it fits a machine
profiles.py   which shapes an engine takes
builder.py    a graph and its manifest → a plan
store.py      engines in the registry: publish, find, load
"""
