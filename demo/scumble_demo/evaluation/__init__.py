"""`--evaluate`: measures a trained adapter's effect on images drawn by the server.

Images are classified by the base's scorer, which was trained on real pictures only and is independent of all adapters.
So the base must have a scorer, as the demo's has. All prompts and seeds are fixed.
"""
