"""IP-Adapter (Ye et al., 2308.06721): pictures as prompts, through attention of their own beside the text's."""
