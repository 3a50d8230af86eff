"""ControlNet (Zhang et al., 2302.05543): a copy of the encoder that looks at a control picture."""
