"""IP-Adapter (Ye et al., 2308.06721): pictures as prompts, with their own cross-attention beside the text's."""
