"""What runs the Trainer: pre-training, fine-tuning, packed data, checkpoints, sequence parallelism."""
