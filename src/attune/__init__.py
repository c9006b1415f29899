"""attune: post-train language models from their own attention to the prompt."""
