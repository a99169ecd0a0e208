"""Tasks: what a model is fine-tuned for, as data, features and scores."""
