"""The updates of diffusers' schedulers as coefficients, for all steps of a schedule at once.

Each module has the formulas of one family. A formula takes a diffusers scheduler after `set_timesteps`, the first step
that is wanted and eta, and gives an `Update`. Timesteps, sigmas and whatever a config says about them are diffusers'.
"""
