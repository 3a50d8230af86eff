"""A made-up seventh method: a vector that is added to the states of every text, on their way to cross-attention.

Three modules and, in the test that uses them, a line in each of three tables: all that a method needs that asks for no
new input of the graph.
"""
