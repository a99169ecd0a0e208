"""Fine-tuning by one command: question answering, classification and named entities, with compression on the way."""
