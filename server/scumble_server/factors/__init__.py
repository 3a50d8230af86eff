"""LoRAs as inputs: the factors of whatever methods become LoRAs, bound, carried by rows and stacked."""
