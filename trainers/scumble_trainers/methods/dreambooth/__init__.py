"""DreamBooth (Ruiz et al., 2208.12242): the whole model fine-tuned on a few pictures of one thing."""
