"""What models are trained on: sources of text, tokenizers, the tokenised corpus, batches and their loader."""
