"""Opening models and tokenizers, and projecting hidden states to the shared vocabulary."""
