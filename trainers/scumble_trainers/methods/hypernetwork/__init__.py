"""Hypernetwork: a network, trained on many concepts, that predicts a LoRA from one picture."""
