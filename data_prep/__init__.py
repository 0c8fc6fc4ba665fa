"""From text to tokenised records."""
