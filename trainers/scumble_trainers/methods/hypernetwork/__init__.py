"""Hypernetwork: many concepts become a network that predicts a LoRA from one picture."""
