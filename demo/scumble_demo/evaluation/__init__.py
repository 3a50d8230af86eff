"""What a trained adapter does, measured on pictures by the server as its users get them: `--evaluate`.

The judge is the base's scorer, which learnt from real pictures only and shares nothing with any adapter; so these
measures are for bases that have one (the demo's). Every set of prompts and seeds is fixed.
"""
