"""Fine-tuning of encoders on GLUE, and on text classification sets of one's own."""
