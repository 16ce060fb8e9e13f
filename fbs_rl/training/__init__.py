"""What the training commands are made of: settings, schedules, batches, evaluation, checkpoints."""
