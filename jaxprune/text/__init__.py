"""From texts to windows of token ids."""
