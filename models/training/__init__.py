"""Training: nano from nothing on synthesised audio, or a full model by the paper's recipe."""
